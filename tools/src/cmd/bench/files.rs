//! Small files: how fast names and small contents come and go.
//!
//! Phases, each by all workers at a time, each in a directory of its own: create+write+close (with fsync if asked), stat,
//! open+read+close, readdir, rename, unlink, mkdir, rmdir. What was created is checked: sizes by stat, every
//! byte by read, names by readdir. Later phases find what the kernel cached in earlier ones (warm), as programs do;
//! `also_cold` measures stat, readdir and read a first time after the kernel's caches were dropped.

use std::ffi::CStr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use shardfs_proto::types::clock;

use super::content::Content;
use super::progress::Progress;
use super::report::Sample;
use super::stats::{Latencies, Unit, per_second};
use super::workers::{self, Phase};
use super::workspace::{Cold, Stop, Workspace};

/// A phase that changes nothing is repeated by each worker until this much time has gone, as one pass over a cached
/// directory is too short to be timed.
const READ_PHASE_MIN: Duration = Duration::from_millis(200);

/// What to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Numbers of workers, one series of phases each.
    pub workers: Vec<usize>,
    /// Files of each worker.
    pub files: usize,
    /// Bytes of each file.
    pub size: usize,
    /// fsync before each close.
    pub fsync: bool,
    /// Only the first phase; for the fsync row of a comparison.
    pub create_only: bool,
    /// Measure reads cold as well.
    pub also_cold: bool,
}

/// Runs the phases below `parent` once.
pub fn run(
    parent: &Path,
    settings: &Settings,
    seed: u64,
    stop: &Stop,
    progress: &Progress,
) -> Result<Vec<Sample>> {
    let content = Content::new(seed);
    let mut samples = Vec::new();
    for &workers in &settings.workers {
        let workspace = Workspace::new(parent)?;
        let mut series = Series {
            base: workspace.path(),
            workers,
            settings,
            content: &content,
            stop,
            progress,
            samples: &mut samples,
        };
        series.run()?;
        workspace.remove()?;
    }
    Ok(samples)
}

struct Series<'a> {
    base: &'a Path,
    workers: usize,
    settings: &'a Settings,
    content: &'a Content,
    stop: &'a Stop,
    progress: &'a Progress,
    samples: &'a mut Vec<Sample>,
}

impl Series<'_> {
    fn run(&mut self) -> Result<()> {
        for number in 0..self.workers {
            let dir = self.base.join(format!("p{number}"));
            std::fs::create_dir(&dir).with_context(|| format!("mkdir {}", dir.display()))?;
        }
        self.each(
            if self.settings.fsync { "create+write+fsync+close" } else { "create+write+close" },
            create,
        )?;
        if self.settings.create_only {
            return Ok(());
        }
        if self.settings.also_cold {
            for (name, operation) in [("stat, cold", stat as Operation), ("open+read+close, cold", read)] {
                Cold::DropCaches.make(None)?;
                self.each(name, operation)?;
            }
            Cold::DropCaches.make(None)?;
            self.readdir("readdir, cold", Duration::ZERO)?;
        }
        self.repeated("stat", stat)?;
        self.repeated("open+read+close", read)?;
        self.readdir("readdir", READ_PHASE_MIN)?;
        self.each("rename", rename)?;
        self.each("unlink", unlink)?;
        self.each("mkdir", make_directory)?;
        self.each("rmdir", remove_directory)
    }

    /// Every file once.
    fn each(&mut self, name: &str, operation: Operation) -> Result<()> {
        self.passes(name, operation, Duration::ZERO)
    }

    /// Every file at least once.
    fn repeated(&mut self, name: &str, operation: Operation) -> Result<()> {
        self.passes(name, operation, READ_PHASE_MIN)
    }

    fn passes(&mut self, name: &str, operation: Operation, at_least: Duration) -> Result<()> {
        self.phase(name, |number, phase| {
            let mut worker = Worker::new(self.base, number, self.settings, self.content)?;
            let mut latencies = Latencies::new();
            let began = clock::monotonic();
            loop {
                for file in 0..self.settings.files {
                    phase.check()?;
                    latencies.record(operation(&mut worker, file)?);
                }
                if began.elapsed() >= at_least {
                    let done = latencies.count();
                    return Ok((done, latencies));
                }
            }
        })
    }

    fn readdir(&mut self, name: &str, at_least: Duration) -> Result<()> {
        self.phase(name, |number, phase| {
            let dir = self.base.join(format!("p{number}"));
            let mut latencies = Latencies::new();
            let mut entries = 0;
            let began = clock::monotonic();
            loop {
                phase.check()?;
                let (count, took) = list(&dir).with_context(|| format!("readdir {}", dir.display()))?;
                if count != self.settings.files {
                    bail!(
                        "WRONG CONTENT: {} has {count} names, expected {}",
                        dir.display(),
                        self.settings.files
                    );
                }
                latencies.record(took);
                entries += count as u64;
                if began.elapsed() >= at_least {
                    return Ok((entries, latencies));
                }
            }
        })
    }

    fn phase(
        &mut self,
        name: &str,
        work: impl Fn(usize, &Phase<'_>) -> Result<(u64, Latencies)> + Sync,
    ) -> Result<()> {
        self.progress.phase(&format!("{name}, {} workers", self.workers));
        let (took, answers) = workers::run(self.workers, self.stop, work)?;
        let mut all = Latencies::new();
        let mut done = 0;
        for (count, latencies) in &answers {
            done += count;
            all.add(latencies);
        }
        let value = per_second(done, took);
        self.samples.push(Sample {
            name: name.to_owned(),
            workers: self.workers,
            unit: Unit::PerSecond,
            value,
            latencies: Some(all),
        });
        Ok(())
    }
}

/// Does one thing with the worker's file of that number; answers how long the calls took, checks not included.
type Operation = fn(&mut Worker<'_>, usize) -> Result<Duration>;

struct Worker<'a> {
    number: u64,
    settings: &'a Settings,
    content: &'a Content,
    buffer: Vec<u8>,
    paths: [PathBuffer; 3],
}

impl<'a> Worker<'a> {
    fn new(base: &Path, number: usize, settings: &'a Settings, content: &'a Content) -> Result<Worker<'a>> {
        let dir = base.join(format!("p{number}"));
        let path = |letter| PathBuffer::new(&dir, letter);
        Ok(Worker {
            number: number as u64,
            settings,
            content,
            // One byte more than a file has, so that a file that is too long shows.
            buffer: vec![0; settings.size + 1],
            paths: [path('f')?, path('g')?, path('d')?],
        })
    }

    /// What tells this file's content from all others'.
    fn file_id(&self, file: usize) -> u64 {
        self.number << 32 | file as u64
    }
}

fn create(worker: &mut Worker<'_>, file: usize) -> Result<Duration> {
    let id = worker.file_id(file);
    let size = worker.settings.size;
    worker.content.fill(&mut worker.buffer[..size], id, 0, 0);
    let path = worker.paths[0].name(file);
    let began = clock::monotonic();
    let fd = rustix::fs::openat(
        CWD,
        path,
        OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC,
        Mode::from_raw_mode(0o644),
    )
    .with_context(|| format!("create {path:?}"))?;
    let mut rest = &worker.buffer[..size];
    while !rest.is_empty() {
        let written = rustix::io::write(&fd, rest).with_context(|| format!("write {path:?}"))?;
        if written == 0 {
            bail!("write {path:?}: nothing was written");
        }
        rest = &rest[written..];
    }
    if worker.settings.fsync {
        rustix::fs::fsync(&fd).with_context(|| format!("fsync {path:?}"))?;
    }
    close(fd).with_context(|| format!("close {path:?}"))?;
    Ok(began.elapsed())
}

fn stat(worker: &mut Worker<'_>, file: usize) -> Result<Duration> {
    let path = worker.paths[0].name(file);
    let began = clock::monotonic();
    let found = rustix::fs::statat(CWD, path, AtFlags::empty()).with_context(|| format!("stat {path:?}"))?;
    let took = began.elapsed();
    if found.st_size as usize != worker.settings.size {
        bail!("WRONG CONTENT: {path:?} has {} bytes, expected {}", found.st_size, worker.settings.size);
    }
    Ok(took)
}

fn read(worker: &mut Worker<'_>, file: usize) -> Result<Duration> {
    let id = worker.file_id(file);
    let size = worker.settings.size;
    let path = worker.paths[0].name(file);
    let began = clock::monotonic();
    let fd = rustix::fs::openat(CWD, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("open {path:?}"))?;
    let mut got = 0;
    loop {
        let count =
            rustix::io::read(&fd, &mut worker.buffer[got..]).with_context(|| format!("read {path:?}"))?;
        got += count;
        if count == 0 || got >= size {
            break;
        }
    }
    close(fd).with_context(|| format!("close {path:?}"))?;
    let took = began.elapsed();
    if got != size {
        bail!("WRONG CONTENT: {path:?}: read {got} bytes, expected {size}");
    }
    worker.content.check(&worker.buffer[..size], id, 0, 0).with_context(|| format!("{path:?}"))?;
    Ok(took)
}

fn rename(worker: &mut Worker<'_>, file: usize) -> Result<Duration> {
    let [from, to, _] = &mut worker.paths;
    let (from, to) = (from.name(file), to.name(file));
    let began = clock::monotonic();
    rustix::fs::renameat(CWD, from, CWD, to).with_context(|| format!("rename {from:?} to {to:?}"))?;
    Ok(began.elapsed())
}

fn unlink(worker: &mut Worker<'_>, file: usize) -> Result<Duration> {
    let path = worker.paths[1].name(file);
    let began = clock::monotonic();
    rustix::fs::unlinkat(CWD, path, AtFlags::empty()).with_context(|| format!("unlink {path:?}"))?;
    Ok(began.elapsed())
}

fn make_directory(worker: &mut Worker<'_>, file: usize) -> Result<Duration> {
    let path = worker.paths[2].name(file);
    let began = clock::monotonic();
    rustix::fs::mkdirat(CWD, path, Mode::from_raw_mode(0o755)).with_context(|| format!("mkdir {path:?}"))?;
    Ok(began.elapsed())
}

fn remove_directory(worker: &mut Worker<'_>, file: usize) -> Result<Duration> {
    let path = worker.paths[2].name(file);
    let began = clock::monotonic();
    rustix::fs::unlinkat(CWD, path, AtFlags::REMOVEDIR).with_context(|| format!("rmdir {path:?}"))?;
    Ok(began.elapsed())
}

/// Names in a directory but `.` and `..`, and how long it took.
fn list(dir: &Path) -> Result<(usize, Duration)> {
    let began = clock::monotonic();
    let fd =
        rustix::fs::openat(CWD, dir, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let mut count = 0;
    for entry in rustix::fs::Dir::new(fd)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            count += 1;
        }
    }
    Ok((count, began.elapsed()))
}

/// close(2) with its error, which on network filesystems is that of a write.
fn close(fd: rustix::fd::OwnedFd) -> Result<()> {
    use std::os::fd::IntoRawFd as _;
    // SAFETY: the descriptor was owned by `fd`, which gave it up, and is not used again.
    match unsafe { libc::close(fd.into_raw_fd()) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error().into()),
    }
}

/// Paths that differ in a number, made without allocation, so that making them costs the timed loop little.
struct PathBuffer {
    bytes: Vec<u8>,
    digits_at: usize,
}

/// Digits of the number in a path.
const PATH_DIGITS: usize = 7;

impl PathBuffer {
    fn new(dir: &Path, letter: char) -> Result<PathBuffer> {
        use std::os::unix::ffi::OsStrExt as _;
        let mut bytes =
            dir.join(format!("{letter}{}", "0".repeat(PATH_DIGITS))).as_os_str().as_bytes().to_vec();
        let digits_at = bytes.len() - PATH_DIGITS;
        bytes.push(0);
        CStr::from_bytes_with_nul(&bytes).context("a directory's name contains a NUL")?;
        Ok(PathBuffer { bytes, digits_at })
    }

    fn name(&mut self, mut number: usize) -> &CStr {
        for digit in self.bytes[self.digits_at..self.digits_at + PATH_DIGITS].iter_mut().rev() {
            *digit = b'0' + (number % 10) as u8;
            number /= 10;
        }
        CStr::from_bytes_with_nul(&self.bytes).expect("checked when it was made; digits are no NUL")
    }
}

/// Files that a worker may have: what [`PATH_DIGITS`] can number.
pub const FILES_MAX: usize = 10_000_000;

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            workers: vec![1, 3],
            files: 20,
            size: 5_000,
            fsync: false,
            create_only: false,
            also_cold: false,
        }
    }

    #[test]
    fn a_run_measures_every_phase_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let samples = run(dir.path(), &settings(), 1, &Stop::default(), &Progress::hidden()).unwrap();
        let names: Vec<(&str, usize)> = samples.iter().map(|s| (s.name.as_str(), s.workers)).collect();
        let phases = [
            "create+write+close",
            "stat",
            "open+read+close",
            "readdir",
            "rename",
            "unlink",
            "mkdir",
            "rmdir",
        ];
        let want: Vec<(&str, usize)> = [1, 3].iter().flat_map(|w| phases.map(|p| (p, *w))).collect();
        assert_eq!(names, want);
        for sample in &samples {
            let calls = sample.latencies.as_ref().unwrap().count();
            assert!(sample.value > 0.0, "{}", sample.name);
            match sample.name.as_str() {
                "readdir" => assert!(calls >= sample.workers as u64),
                "stat" | "open+read+close" => assert!(calls >= 20 * sample.workers as u64),
                _ => assert_eq!(calls, 20 * sample.workers as u64, "{}", sample.name),
            }
        }
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn an_interrupted_run_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let stop = Stop::default();
        stop.request(crate::failure::EXIT_INTERRUPTED);
        assert!(run(dir.path(), &settings(), 1, &stop, &Progress::hidden()).is_err());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn fsync_and_create_only() {
        let dir = tempfile::tempdir().unwrap();
        let settings = Settings { workers: vec![2], fsync: true, create_only: true, ..settings() };
        let samples = run(dir.path(), &settings, 1, &Stop::default(), &Progress::hidden()).unwrap();
        assert_eq!(samples.len(), 1);
        assert_eq!(samples[0].name, "create+write+fsync+close");
    }

    #[test]
    fn wrong_content_is_found() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("p0")).unwrap();
        let (settings, content) = (settings(), Content::new(5));
        let mut worker = Worker::new(dir.path(), 0, &settings, &content).unwrap();
        create(&mut worker, 0).unwrap();
        read(&mut worker, 0).unwrap();
        let path = dir.path().join("p0/f0000000");
        let good = std::fs::read(&path).unwrap();
        let mut bad = good.clone();
        bad[4_999] ^= 1;
        for (what, bytes) in
            [("flipped", bad), ("short", good[..4_999].to_vec()), ("long", [&good[..], b"x"].concat())]
        {
            std::fs::write(&path, bytes).unwrap();
            let error = read(&mut worker, 0).unwrap_err();
            assert!(format!("{error:#}").contains("WRONG CONTENT"), "{what}: {error:#}");
        }
        assert!(stat(&mut worker, 0).unwrap_err().to_string().contains("5001 bytes"));
    }

    #[test]
    fn paths() {
        let mut path = PathBuffer::new(Path::new("/a b"), 'f').unwrap();
        assert_eq!(path.name(42), c"/a b/f0000042");
        assert_eq!(path.name(FILES_MAX - 1), c"/a b/f9999999");
    }
}
