//! Large files: sequential and random reads and writes, cold and warm told apart.
//!
//! 1. One file is written front to back and fsynced; the time is from open to the end of the fsync.
//! 2. It is read front to back cold, then warm; then, untimed, every byte is compared.
//! 3. Every job has a file of its own (one inode's lock would else be what is measured). Random blocks of 4 KiB: read
//!    cold (each block at most once), read warm (after an untimed full read), written; then fsync; then, untimed and
//!    cold, every byte is compared with the last write of its block.
//!
//! Timed reads check the first 8 bytes of each 4 KiB (see `content.rs`).

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use shardfs_proto::types::clock;

use super::content::{BLOCK_BYTES, Content};
use super::progress::Progress;
use super::report::Sample;
use super::stats::{Latencies, Unit, mebibytes_per_second, per_second};
use super::workers;
use super::workspace::{Cold, Stop, Workspace};

/// Bytes of a random read or write.
const RANDOM_BYTES: usize = BLOCK_BYTES;
/// Requests by which files are made and checked outside of timed phases.
const UNTIMED_REQUEST_BYTES: usize = 1 << 20;
/// The file of the sequential phases; jobs have files 0, 1, ...
const SEQUENTIAL_FILE: u64 = u64::MAX;
/// Streams of random numbers, so that no phase repeats another's order.
const COLD_READS: u64 = 1;
const WARM_READS: u64 = 2;
const WRITES: u64 = 3;

/// What to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Bytes of the sequential file.
    pub size: u64,
    /// Bytes of a sequential request; a multiple of 4 KiB.
    pub block: usize,
    /// Bytes of all random files together.
    pub random_size: u64,
    /// Random jobs at a time.
    pub jobs: usize,
    /// How long each random phase takes at most.
    pub random_time: Duration,
    /// How cold is made.
    pub cold: Cold,
}

/// Runs the phases below `parent` once.
pub fn run(
    parent: &Path,
    settings: &Settings,
    seed: u64,
    stop: &Stop,
    progress: &Progress,
) -> Result<Vec<Sample>> {
    let workspace = Workspace::new(parent)?;
    let bench = Bench { dir: workspace.path(), settings, content: &Content::new(seed), seed, stop, progress };
    let mut samples = bench.sequential()?;
    samples.extend(bench.random()?);
    workspace.remove()?;
    Ok(samples)
}

struct Bench<'a> {
    dir: &'a Path,
    settings: &'a Settings,
    content: &'a Content,
    seed: u64,
    stop: &'a Stop,
    progress: &'a Progress,
}

impl Bench<'_> {
    fn sequential(&self) -> Result<Vec<Sample>> {
        let path = self.dir.join("sequential");
        let size = self.settings.size;
        let sample = |name: &str, took: Duration, latencies| Sample {
            name: format!("sequential {name}"),
            workers: 1,
            unit: Unit::MebibytesPerSecond,
            value: mebibytes_per_second(size, took),
            latencies: Some(latencies),
        };
        self.progress.phase("sequential write");
        let began = clock::monotonic();
        let file = make(&path)?;
        let written = self.write_all(&file, SEQUENTIAL_FILE, size, self.settings.block)?;
        fsync(&file, &path)?;
        let mut samples = vec![sample("write+fsync", began.elapsed(), written)];
        self.settings.cold.make(Some(&file))?;
        drop(file);
        for state in ["cold", "warm"] {
            self.progress.phase(&format!("sequential read, {state}"));
            let began = clock::monotonic();
            let file = open(&path)?;
            let latencies =
                self.read_all(&file, SEQUENTIAL_FILE, size, self.settings.block, |content, got, first| {
                    content.check_stamps(got, SEQUENTIAL_FILE, first, 0)
                })?;
            samples.push(sample(&format!("read, {state}"), began.elapsed(), latencies));
        }
        self.progress.phase("comparing");
        let file = open(&path)?;
        self.read_all(&file, SEQUENTIAL_FILE, size, UNTIMED_REQUEST_BYTES, |content, got, first| {
            content.check(got, SEQUENTIAL_FILE, first, 0)
        })?;
        std::fs::remove_file(&path).with_context(|| format!("remove {}", path.display()))?;
        Ok(samples)
    }

    fn random(&self) -> Result<Vec<Sample>> {
        let jobs = self.settings.jobs;
        let blocks = self.settings.random_size / jobs as u64 / RANDOM_BYTES as u64;
        let size = blocks * RANDOM_BYTES as u64;
        let files = (0..jobs).map(|job| make(&self.path(job))).collect::<Result<Vec<File>>>()?;
        self.progress.phase("making the files of the random phases");
        for (job, file) in files.iter().enumerate() {
            self.write_all(file, job as u64, size, UNTIMED_REQUEST_BYTES)?;
            fsync(file, &self.path(job))?;
        }
        for file in &files {
            self.settings.cold.make(Some(file))?;
        }
        drop(files);

        let files = (0..jobs).map(|job| open(&self.path(job))).collect::<Result<Vec<File>>>()?;
        let mut samples = vec![self.random_reads("random read 4 KiB, cold", &files, blocks, true)?];
        self.progress.phase("reading everything");
        self.compare(&files, size, |_, _| 0)?;
        samples.push(self.random_reads("random read 4 KiB, warm", &files, blocks, false)?);
        let (written, generations) = self.random_writes(&files, blocks)?;
        samples.extend(written);

        self.progress.phase("comparing");
        for file in &files {
            self.settings.cold.make(Some(file))?;
        }
        drop(files);
        let files = (0..jobs).map(|job| open(&self.path(job))).collect::<Result<Vec<File>>>()?;
        self.compare(&files, size, |job, block| generations[job][block as usize])?;
        Ok(samples)
    }

    fn random_reads(&self, name: &str, files: &[File], blocks: u64, once: bool) -> Result<Sample> {
        self.progress.phase(name);
        let deadline = self.settings.random_time;
        let (took, answers) = workers::run(files.len(), self.stop, |job, phase| {
            let mut random = self.random_source(job, if once { COLD_READS } else { WARM_READS });
            let mut order: Vec<u64> = (0..blocks).collect();
            random.shuffle(&mut order);
            let mut buffer = vec![0; RANDOM_BYTES];
            let mut latencies = Latencies::new();
            let began = clock::monotonic();
            let mut next = 0;
            while began.elapsed() < deadline {
                phase.check()?;
                if next == order.len() {
                    if once {
                        break;
                    }
                    next = 0;
                }
                let block = order[next];
                next += 1;
                let call = clock::monotonic();
                read_exactly(&files[job], &mut buffer, block * RANDOM_BYTES as u64)?;
                latencies.record(call.elapsed());
                self.content.check_stamps(&buffer, job as u64, block, 0)?;
            }
            Ok(latencies)
        })?;
        Ok(rate(name, &answers, took))
    }

    /// Also answers the generation of every block of every file: how often it was written.
    fn random_writes(&self, files: &[File], blocks: u64) -> Result<(Vec<Sample>, Vec<Vec<u32>>)> {
        self.progress.phase("random write");
        let deadline = self.settings.random_time;
        let all = clock::monotonic();
        let (took, answers) = workers::run(files.len(), self.stop, |job, phase| {
            let mut random = self.random_source(job, WRITES);
            let mut generations = vec![0_u32; blocks as usize];
            let mut buffer = vec![0; RANDOM_BYTES];
            let mut latencies = Latencies::new();
            let began = clock::monotonic();
            while began.elapsed() < deadline {
                phase.check()?;
                let block = random.u64(0..blocks);
                let generation = &mut generations[block as usize];
                *generation += 1;
                self.content.fill(&mut buffer, job as u64, block, *generation);
                let call = clock::monotonic();
                write_exactly(&files[job], &buffer, block * RANDOM_BYTES as u64)?;
                latencies.record(call.elapsed());
            }
            Ok((latencies, generations))
        })?;
        for (job, file) in files.iter().enumerate() {
            self.stop.check()?;
            fsync(file, &self.path(job))?;
        }
        let with_fsync = all.elapsed();
        let (latencies, generations): (Vec<Latencies>, Vec<Vec<u32>>) = answers.into_iter().unzip();
        let mut synced = rate("random write+fsync 4 KiB", &latencies, with_fsync);
        synced.latencies = None;
        Ok((vec![rate("random write 4 KiB", &latencies, took), synced], generations))
    }

    fn compare(&self, files: &[File], size: u64, generation: impl Fn(usize, u64) -> u32) -> Result<()> {
        for (job, file) in files.iter().enumerate() {
            self.read_all(file, job as u64, size, UNTIMED_REQUEST_BYTES, |content, got, first| {
                for (number, block) in (first..).zip(got.chunks(BLOCK_BYTES)) {
                    content.check(block, job as u64, number, generation(job, number))?;
                }
                Ok(())
            })
            .with_context(|| format!("{}", self.path(job).display()))?;
        }
        Ok(())
    }

    fn write_all(&self, file: &File, id: u64, size: u64, request: usize) -> Result<Latencies> {
        let mut latencies = Latencies::new();
        let mut buffer = vec![0; request];
        let mut offset = 0;
        while offset < size {
            self.stop.check()?;
            let length = (size - offset).min(request as u64) as usize;
            self.content.fill(&mut buffer[..length], id, offset / BLOCK_BYTES as u64, 0);
            let call = clock::monotonic();
            write_exactly(file, &buffer[..length], offset)?;
            latencies.record(call.elapsed());
            offset += length as u64;
        }
        Ok(latencies)
    }

    fn read_all(
        &self,
        file: &File,
        id: u64,
        size: u64,
        request: usize,
        check: impl Fn(&Content, &[u8], u64) -> Result<()>,
    ) -> Result<Latencies> {
        let mut latencies = Latencies::new();
        let mut buffer = vec![0; request];
        let mut offset = 0;
        while offset < size {
            self.stop.check()?;
            let length = (size - offset).min(request as u64) as usize;
            let call = clock::monotonic();
            read_exactly(file, &mut buffer[..length], offset).with_context(|| format!("file {id}"))?;
            latencies.record(call.elapsed());
            check(self.content, &buffer[..length], offset / BLOCK_BYTES as u64)?;
            offset += length as u64;
        }
        let length = file.metadata().context("fstat")?.len();
        if length != size {
            bail!("WRONG CONTENT: file {id} has {length} bytes, expected {size}");
        }
        Ok(latencies)
    }

    fn random_source(&self, job: usize, phase: u64) -> fastrand::Rng {
        fastrand::Rng::with_seed(super::content::mix(self.seed ^ (job as u64) << 32 ^ phase))
    }

    fn path(&self, job: usize) -> PathBuf {
        self.dir.join(format!("random{job}"))
    }
}

fn rate(name: &str, latencies: &[Latencies], took: Duration) -> Sample {
    let mut all = Latencies::new();
    for one in latencies {
        all.add(one);
    }
    Sample {
        name: name.to_owned(),
        workers: latencies.len(),
        unit: Unit::PerSecond,
        value: per_second(all.count(), took),
        latencies: Some(all),
    }
}

fn make(path: &Path) -> Result<File> {
    let mut options = File::options();
    options.read(true).write(true).create_new(true).mode(0o644);
    options.open(path).with_context(|| format!("create {}", path.display()))
}

fn open(path: &Path) -> Result<File> {
    File::options().read(true).write(true).open(path).with_context(|| format!("open {}", path.display()))
}

fn fsync(file: &File, path: &Path) -> Result<()> {
    rustix::fs::fsync(file).with_context(|| format!("fsync {}", path.display()))
}

fn read_exactly(file: &File, mut buffer: &mut [u8], mut offset: u64) -> Result<()> {
    while !buffer.is_empty() {
        let count = match rustix::io::pread(file, &mut *buffer, offset) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error).with_context(|| format!("read at offset {offset}")),
        };
        if count == 0 {
            bail!("WRONG CONTENT: the file ends at {offset}, {} bytes too early", buffer.len());
        }
        buffer = &mut buffer[count..];
        offset += count as u64;
    }
    Ok(())
}

fn write_exactly(file: &File, mut buffer: &[u8], mut offset: u64) -> Result<()> {
    while !buffer.is_empty() {
        let count = match rustix::io::pwrite(file, buffer, offset) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR) => continue,
            Err(error) => return Err(error).with_context(|| format!("write at offset {offset}")),
        };
        if count == 0 {
            bail!("write at offset {offset}: nothing was written");
        }
        buffer = &buffer[count..];
        offset += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            size: 3 * (1 << 20) + 4096,
            block: 1 << 20,
            random_size: 1 << 20,
            jobs: 2,
            random_time: Duration::from_millis(500),
            cold: Cold::Fadvise,
        }
    }

    #[test]
    fn a_run_measures_every_phase_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let samples = run(dir.path(), &settings(), 1, &Stop::default(), &Progress::hidden()).unwrap();
        let names: Vec<&str> = samples.iter().map(|s| s.name.as_str()).collect();
        assert_eq!(
            names,
            [
                "sequential write+fsync",
                "sequential read, cold",
                "sequential read, warm",
                "random read 4 KiB, cold",
                "random read 4 KiB, warm",
                "random write 4 KiB",
                "random write+fsync 4 KiB",
            ]
        );
        assert!(samples.iter().all(|s| s.value > 0.0));
        assert_eq!(samples[0].latencies.as_ref().unwrap().count(), 4);
        assert!(samples[3].latencies.as_ref().unwrap().count() <= 256);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn files_that_changed_are_found() {
        let dir = tempfile::tempdir().unwrap();
        let (content, settings, stop, progress) =
            (Content::new(1), settings(), Stop::default(), Progress::hidden());
        let bench = Bench {
            dir: dir.path(),
            settings: &settings,
            content: &content,
            seed: 1,
            stop: &stop,
            progress: &progress,
        };
        let file = make(&bench.path(0)).unwrap();
        bench.write_all(&file, 0, 1 << 20, 1 << 16).unwrap();
        bench.compare(std::slice::from_ref(&file), 1 << 20, |_, _| 0).unwrap();
        write_exactly(&file, &[0; 1], 70_000).unwrap();
        let error = bench.compare(std::slice::from_ref(&file), 1 << 20, |_, _| 0).unwrap_err();
        assert!(format!("{error:#}").contains("offset 70000"), "{error:#}");
        write_exactly(&file, &[0; 1], 1 << 20).unwrap();
        assert!(bench.compare(&[file], 1 << 20, |_, _| 0).is_err());
    }
}
