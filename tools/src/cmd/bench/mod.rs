//! `shardfs bench`: how fast a directory or a cluster is, and beside what.
//!
//! Directories are measured in turn within one run and the run is repeated, so that whatever else the machine does
//! meets all of them; reported are medians over the runs. What was written is checked when it is read, and a
//! mismatch ends the run with an error. Everything a run makes lies in a directory, shard or prefix of its own and
//! is removed when it ends, fails or is interrupted.
//!
//! `files.rs`, `io.rs`, `kv.rs` measure; `workers.rs`, `content.rs`, `workspace.rs`, `reference.rs` are what they
//! stand on; `stats.rs`, `environment.rs`, `report.rs` say it.

mod content;
mod environment;
mod files;
mod io;
mod kv;
mod progress;
mod reference;
mod report;
mod stats;
mod workers;
mod workspace;

use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Subcommand, ValueEnum};
use shardfs_proto::types::limits::{BATCH_BYTES_MAX, BATCH_ITEMS_MAX, VALUE_BYTES_MAX};
use shardfs_proto::types::{ShardName, clock};

use crate::context::Context;
use crate::failure::Failure;
use crate::size;
use environment::Environment;
use progress::Progress;
use reference::Reference;
use report::{Report, Sample, Target};
use workspace::{Cold, Stop};

/// Times that a run may be repeated.
const RUNS_MAX: u32 = 1_000;
/// Bytes of a small file.
const FILE_SIZE_MAX: u64 = 64 << 20;
/// Bytes of a sequential request.
const BLOCK_MAX: u64 = 256 << 20;
/// Seconds that a timed phase may take.
const SECONDS_MAX: u64 = 3_600;
/// Callers of a row of `kv`: they share one client, whose sessions have a window of about as many calls.
const CALLERS_MAX: usize = 1_000;
/// Values that a row of `kv` may put; bounds what the benchmark remembers of them.
const VALUES_MAX: u64 = 9_000_000;
/// Bytes of a key that `kv` makes, with its share of the message around it.
const KEY_SHARE_BYTES: usize = 128;
/// Workers of the fsync row of `all`.
const ALL_FSYNC_WORKERS: usize = 4;

/// Measure how fast a directory or a cluster is
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Subcommand, Debug)]
enum What {
    /// Small files: create, stat, read, readdir, rename, unlink, mkdir, rmdir
    Files(FilesArgs),
    /// Large files: sequential and random reads and writes, cold and warm
    Io(IoArgs),
    /// Values over gRPC: Put, Get, BatchPut, BatchGet on the cluster
    Kv(KvArgs),
    /// The whole table: small files with 1 and 8 workers, files with fsync, large files
    All(AllArgs),
}

/// A directory to measure, with the name of its column.
#[derive(Clone, Debug)]
struct Directory {
    name: String,
    path: PathBuf,
}

impl FromStr for Directory {
    type Err = String;

    fn from_str(text: &str) -> Result<Directory, String> {
        let (name, path) = match text.split_once('=') {
            Some((name, path)) if !name.is_empty() && !name.contains('/') => (name.to_owned(), path),
            _ => (text.to_owned(), text),
        };
        if path.is_empty() {
            return Err("write DIR or NAME=DIR".to_owned());
        }
        Ok(Directory { name, path: PathBuf::from(path) })
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum ReferenceKind {
    /// ext4 on a loop device over a sparse file with direct I/O, as `loop` volumes are; needs root
    Ext4,
}

/// What is compared, and how often.
#[derive(clap::Args, Debug)]
struct Compare {
    /// Directories to measure in turn; NAME=DIR names the column
    #[arg(value_name = "DIR", required_unless_present = "reference")]
    dirs: Vec<Directory>,
    /// Also measure a filesystem made for this run, as the first column
    #[arg(long, value_name = "KIND")]
    reference: Option<ReferenceKind>,
    /// Where the backing file of the reference lies: on the disk that holds what it is compared with
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    reference_dir: PathBuf,
    /// Size of the reference filesystem (sparse)
    #[arg(long, value_name = "SIZE", default_value = "8GiB", value_parser = size::parse)]
    reference_size: u64,
    /// The column that ratios refer to [default: the first]
    #[arg(long, value_name = "NAME")]
    base: Option<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(clap::Args, Debug)]
struct Output {
    /// How often to measure everything; the median is reported
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=i64::from(RUNS_MAX)))]
    runs: u32,
    /// Also write the report as JSON; `-` writes only that, to standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Makes the same content and order as an earlier run [default: a new one]
    #[arg(long)]
    seed: Option<u64>,
}

impl Output {
    /// What every measured thing is made from; each run gets another.
    fn seed(&self) -> u64 {
        self.seed.unwrap_or_else(|| fastrand::u64(..))
    }
}

#[derive(clap::Args, Debug)]
struct FilesArgs {
    #[command(flatten)]
    compare: Compare,
    /// Workers at a time, each in a directory of its own; one series each
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,8", value_parser = workers_of)]
    workers: Vec<usize>,
    /// Files of each worker
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = files_of)]
    files: usize,
    /// Bytes of each file
    #[arg(long, default_value = "4096", value_parser = file_size_of)]
    size: usize,
    /// fsync each file before it is closed
    #[arg(long)]
    fsync: bool,
    /// Measure stat, readdir and read with cold kernel caches as well; needs root
    #[arg(long)]
    cold: bool,
}

#[derive(clap::Args, Debug)]
struct IoArgs {
    #[command(flatten)]
    compare: Compare,
    #[command(flatten)]
    io: IoSettings,
}

#[derive(clap::Args, Debug)]
struct IoSettings {
    /// Bytes of the file that is written and read front to back
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size::parse)]
    io_size: u64,
    /// Bytes of a sequential request
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = block_of)]
    block: usize,
    /// Bytes of all files of the random phases together
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size::parse)]
    random_size: u64,
    /// Random jobs at a time, each on a file of its own
    #[arg(long, value_name = "N", default_value = "4", value_parser = workers_of)]
    jobs: usize,
    /// Seconds of each random phase
    #[arg(long, value_name = "S", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    seconds: u64,
}

#[derive(clap::Args, Debug)]
struct KvArgs {
    /// A shard to use; keys go below a prefix of their own [default: make one, delete it]
    #[arg(long, value_name = "NAME")]
    shard: Option<String>,
    /// Bytes of a value
    #[arg(long, default_value = "1024", value_parser = value_size_of)]
    size: usize,
    /// Callers at a time of Put and Get; one series each
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,64", value_parser = callers_of)]
    callers: Vec<usize>,
    /// Callers at a time of BatchPut and BatchGet; one series each
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,8", value_parser = callers_of)]
    batch_callers: Vec<usize>,
    /// Values of a batch
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(2..=BATCH_ITEMS_MAX as i64))]
    batch: u32,
    /// Seconds of each row
    #[arg(long, value_name = "S", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    seconds: u64,
    /// Values that a row puts at most
    #[arg(long, value_name = "N", default_value_t = 500_000, value_parser = clap::value_parser!(u64).range(1..=VALUES_MAX))]
    values: u64,
    #[command(flatten)]
    output: Output,
}

#[derive(clap::Args, Debug)]
struct AllArgs {
    #[command(flatten)]
    compare: Compare,
    /// Files of each worker
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = files_of)]
    files: usize,
    /// Bytes of each file
    #[arg(long, default_value = "4096", value_parser = file_size_of)]
    size: usize,
    #[command(flatten)]
    io: IoSettings,
}

fn number_in(text: &str, min: usize, max: usize) -> Result<usize, String> {
    let number: usize = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if (min..=max).contains(&number) { Ok(number) } else { Err(format!("{number} is not in {min}..={max}")) }
}

fn size_in(text: &str, max: u64) -> Result<usize, String> {
    let bytes = size::parse(text)?;
    if (1..=max).contains(&bytes) {
        Ok(bytes as usize)
    } else {
        Err(format!("{text} is not in 1..={}", size::human(max)))
    }
}

fn workers_of(text: &str) -> Result<usize, String> {
    number_in(text, 1, workers::WORKERS_MAX)
}

fn callers_of(text: &str) -> Result<usize, String> {
    number_in(text, 1, CALLERS_MAX)
}

fn files_of(text: &str) -> Result<usize, String> {
    number_in(text, 1, files::FILES_MAX)
}

fn file_size_of(text: &str) -> Result<usize, String> {
    size_in(text, FILE_SIZE_MAX)
}

fn value_size_of(text: &str) -> Result<usize, String> {
    size_in(text, VALUE_BYTES_MAX as u64)
}

fn block_of(text: &str) -> Result<usize, String> {
    let block = size_in(text, BLOCK_MAX)?;
    if block.is_multiple_of(content::BLOCK_BYTES) {
        Ok(block)
    } else {
        Err(format!("{text} is not a multiple of {} bytes", content::BLOCK_BYTES))
    }
}

impl IoSettings {
    fn settings(&self) -> Result<io::Settings> {
        let smallest = (self.jobs * content::BLOCK_BYTES) as u64;
        if self.random_size < smallest {
            bail!(Failure::usage(format!(
                "--random-size must be {smallest} bytes or more, 4 KiB for each job"
            )));
        }
        if self.io_size == 0 || !self.io_size.is_multiple_of(content::BLOCK_BYTES as u64) {
            bail!(Failure::usage("--io-size must be a multiple of 4 KiB"));
        }
        Ok(io::Settings {
            size: self.io_size,
            block: self.block,
            random_size: self.random_size,
            jobs: self.jobs,
            random_time: Duration::from_secs(self.seconds),
            cold: Cold::best(),
        })
    }

    fn note(&self, settings: &io::Settings, report: &mut Report) {
        report.setting(
            "sequential",
            format!("{} in {}", size::human(self.io_size), size::human(self.block as u64)),
        );
        report.setting(
            "random",
            format!("{} in {} files, {} s", size::human(self.random_size), self.jobs, self.seconds),
        );
        report.setting("cold by", settings.cold.as_str());
    }
}

/// Runs the command; `context` leads to the cluster that `kv` measures.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let stop = Stop::default();
    let signals = tokio::spawn(watch_signals(stop.clone()));
    let progress = Progress::on_terminal();
    let result = match args.what {
        What::Kv(args) => key_value(args, context, &stop, &progress).await,
        What::Files(args) => {
            blocking(stop.clone(), move |stop, progress| small_files(args, stop, progress)).await
        }
        What::Io(args) => {
            blocking(stop.clone(), move |stop, progress| large_files(args, stop, progress)).await
        }
        What::All(args) => blocking(stop.clone(), move |stop, progress| all(args, stop, progress)).await,
    };
    progress.finish();
    signals.abort();
    match result {
        Err(error) if stop.requested() => {
            tracing::debug!("interrupted: {error:#}");
            Err(Failure::interrupted().into())
        }
        result => result,
    }
}

/// The first signal asks the run to end and clean up; the second ends the process.
async fn watch_signals(stop: Stop) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut interrupt), Ok(mut terminate)) =
        (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
    else {
        tracing::warn!("cannot watch for signals: an interrupted benchmark will not clean up");
        return;
    };
    let mut times = 0;
    loop {
        let seen = tokio::select! {
            seen = interrupt.recv() => seen,
            seen = terminate.recv() => seen,
        };
        if seen.is_none() {
            return;
        }
        times += 1;
        if times > 1 {
            eprintln!(
                "shardfs bench: ended at once; what it made is left behind ({}*)",
                workspace::NAME_PREFIX
            );
            std::process::exit(i32::from(crate::failure::EXIT_INTERRUPTED));
        }
        eprintln!("shardfs bench: cleaning up (once more: end at once)");
        stop.request();
    }
}

/// Threads and system calls that block have no place on the runtime's threads.
async fn blocking(
    stop: Stop,
    work: impl FnOnce(&Stop, &Progress) -> Result<()> + Send + 'static,
) -> Result<()> {
    let work = tokio::task::spawn_blocking(move || {
        let progress = Progress::on_terminal();
        let result = work(&stop, &progress);
        progress.finish();
        result
    });
    work.await.context("the benchmark panicked: this is a bug")?
}

fn small_files(args: FilesArgs, stop: &Stop, progress: &Progress) -> Result<()> {
    if args.cold && Cold::best() != Cold::DropCaches {
        bail!(Failure::usage("--cold drops the kernel's caches, which needs root"));
    }
    let settings = files::Settings {
        workers: args.workers,
        files: args.files,
        size: args.size,
        fsync: args.fsync,
        create_only: false,
        also_cold: args.cold,
    };
    let note = |report: &mut Report| note_files(report, &settings);
    compare(&args.compare, stop, progress, note, |dir, seed, progress| {
        files::run(dir, &settings, seed, stop, progress)
    })
}

fn large_files(args: IoArgs, stop: &Stop, progress: &Progress) -> Result<()> {
    let settings = args.io.settings()?;
    let note = |report: &mut Report| args.io.note(&settings, report);
    compare(&args.compare, stop, progress, note, |dir, seed, progress| {
        io::run(dir, &settings, seed, stop, progress)
    })
}

fn all(args: AllArgs, stop: &Stop, progress: &Progress) -> Result<()> {
    let small = files::Settings {
        workers: vec![1, 8],
        files: args.files,
        size: args.size,
        fsync: false,
        create_only: false,
        also_cold: false,
    };
    let synced =
        files::Settings { workers: vec![ALL_FSYNC_WORKERS], fsync: true, create_only: true, ..small.clone() };
    let large = args.io.settings()?;
    let note = |report: &mut Report| {
        note_files(report, &small);
        args.io.note(&large, report);
    };
    compare(&args.compare, stop, progress, note, |dir, seed, progress| {
        let mut samples = files::run(dir, &small, seed, stop, progress)?;
        samples.extend(files::run(dir, &synced, seed, stop, progress)?);
        samples.extend(io::run(dir, &large, seed, stop, progress)?);
        Ok(samples)
    })
}

fn note_files(report: &mut Report, settings: &files::Settings) {
    report.setting("small files", format!("{} a worker, {} bytes each", settings.files, settings.size));
}

/// Measures every target in turn, as often as asked, and writes the report.
fn compare(
    args: &Compare,
    stop: &Stop,
    progress: &Progress,
    note: impl FnOnce(&mut Report),
    measure: impl Fn(&Path, u64, &Progress) -> Result<Vec<Sample>>,
) -> Result<()> {
    let reference = match args.reference {
        Some(ReferenceKind::Ext4) => Some(Reference::ext4(&args.reference_dir, args.reference_size)?),
        None => None,
    };
    let mut dirs = Vec::new();
    if let Some(reference) = &reference {
        dirs.push(Directory { name: "ext4".to_owned(), path: reference.path().to_owned() });
    }
    dirs.extend(args.dirs.iter().cloned());
    let mut targets = Vec::new();
    for dir in &dirs {
        targets.push(Target { name: dir.name.clone(), filesystem: environment::filesystem_type(&dir.path)? });
    }
    let mut report = Report::new(Environment::look(clock::now()), targets, args.base.as_deref())?;
    let seed = args.output.seed();
    note_runs(&mut report, &args.output, seed);
    note(&mut report);
    for run in 0..args.output.runs {
        for (number, dir) in dirs.iter().enumerate() {
            stop.check()?;
            let progress =
                progress.within(format!("run {} of {}, {}: ", run + 1, args.output.runs, dir.name));
            let samples = measure(&dir.path, content::mix(seed ^ u64::from(run)), &progress)
                .with_context(|| format!("{} (run {}, --seed {seed})", dir.name, run + 1))?;
            report.add(number, samples);
        }
    }
    progress.finish();
    report.write(args.output.json.as_deref())?;
    reference.map_or(Ok(()), Reference::remove)
}

fn note_runs(report: &mut Report, output: &Output, seed: u64) {
    report.setting("runs", output.runs.to_string());
    report.setting("seed", seed.to_string());
}

async fn key_value(args: KvArgs, context: &Context, stop: &Stop, progress: &Progress) -> Result<()> {
    let batch = args.batch as usize;
    if batch * (args.size + KEY_SHARE_BYTES) > BATCH_BYTES_MAX {
        bail!(Failure::usage(format!(
            "a batch of {batch} values of {} bytes is larger than a message may be ({}): lower --batch or --size",
            args.size,
            size::human(BATCH_BYTES_MAX as u64)
        )));
    }
    let settings = kv::Settings {
        shard: args.shard.map(ShardName::new).transpose()?,
        size: args.size,
        callers: args.callers,
        batch_callers: args.batch_callers,
        batch,
        row_time: Duration::from_secs(args.seconds),
        values_max: args.values,
    };
    let target = Target { name: "cluster".to_owned(), filesystem: "ShardFS over gRPC".to_owned() };
    let mut report = Report::new(Environment::look(clock::now()), vec![target], None)?;
    let seed = args.output.seed();
    note_runs(&mut report, &args.output, seed);
    report.setting("values", format!("{} bytes, batches of {batch}, {} s a row", args.size, args.seconds));
    for run in 0..args.output.runs {
        stop.check()?;
        let progress = progress.within(format!("run {} of {}: ", run + 1, args.output.runs));
        let place = kv::Place::prepare(context.client()?, settings.shard.as_ref()).await?;
        let measured =
            kv::run(&place, &settings, run, content::mix(seed ^ u64::from(run)), stop, &progress).await;
        progress.phase("cleaning up");
        let cleaned = place.clean().await;
        let samples = measured.with_context(|| format!("run {}, --seed {seed}", run + 1))?;
        cleaned?;
        report.add(0, samples);
    }
    progress.finish();
    report.write(args.output.json.as_deref())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(line: &str) -> Result<What, clap::Error> {
        Line::try_parse_from(line.split(' ')).map(|line| line.args.what)
    }

    #[test]
    fn defaults_and_names() {
        let What::Files(args) = parse("bench files /mnt/a ext4=/mnt/b /c=d").unwrap() else {
            panic!("not files")
        };
        assert_eq!((args.workers, args.files, args.size), (vec![1, 8], 2_000, 4_096));
        let dirs: Vec<(&str, &str)> =
            args.compare.dirs.iter().map(|d| (d.name.as_str(), d.path.to_str().unwrap())).collect();
        assert_eq!(dirs, [("/mnt/a", "/mnt/a"), ("ext4", "/mnt/b"), ("/c=d", "/c=d")]);
        let What::Kv(args) = parse("bench kv --callers 1,2,3 --size 4KiB").unwrap() else { panic!("not kv") };
        assert_eq!((args.callers, args.size, args.batch), (vec![1, 2, 3], 4_096, 1_000));
        assert!(matches!(parse("bench all --reference ext4").unwrap(), What::All(_)));
    }

    #[test]
    fn nonsense_is_refused() {
        for line in [
            "bench files",
            "bench files /a --workers 0",
            "bench files /a --workers 1,x",
            "bench files /a --size 0",
            "bench files /a --runs 0",
            "bench io /a --block 5000",
            "bench io /a --jobs 100000",
            "bench io /a --seconds 0",
            "bench kv --batch 1",
            "bench kv --size 5MiB",
            "bench all --reference xfs /a",
        ] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn a_comparison_of_two_directories() {
        let dir = tempfile::tempdir().unwrap();
        let json = dir.path().join("report.json");
        for name in ["a", "b"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
        }
        let at = dir.path().display();
        let line =
            format!("bench files a={at}/a b={at}/b --workers 2 --files 5 --runs 2 --json {}", json.display());
        let What::Files(args) = parse(&line).unwrap() else { panic!("not files") };
        small_files(args, &Stop::default(), &Progress::hidden()).unwrap();
        let report: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&json).unwrap()).unwrap();
        assert_eq!(report["targets"].as_array().unwrap().len(), 2);
        for metric in report["metrics"].as_array().unwrap() {
            for result in metric["results"].as_array().unwrap() {
                assert_eq!(result["runs"].as_array().unwrap().len(), 2, "{metric}");
            }
        }
        for name in ["a", "b"] {
            assert_eq!(std::fs::read_dir(dir.path().join(name)).unwrap().count(), 0);
        }
    }
}
