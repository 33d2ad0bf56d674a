//! `shardfs bench`: how fast a directory or a cluster is, and beside what.
//!
//! Directories are measured in turn within one run and the run is repeated, so that whatever else the machine does
//! meets all of them; reported are medians over the runs. What was written is checked when it is read, and a
//! mismatch ends the run with an error. Everything a run makes lies in a directory, shard or prefix of its own and
//! is removed when it ends, fails or is interrupted.
//!
//! `files.rs`, `io.rs`, `tree.rs`, `kv.rs`, `failover.rs`, `snapshot.rs` measure; `workers.rs`, `content.rs`, `workspace.rs`, `reference.rs` are what they
//! stand on; `stats.rs`, `environment.rs`, `report.rs` say it.

mod args;
mod content;
mod environment;
mod failover;
mod files;
mod io;
mod kv;
mod progress;
mod reference;
mod report;
mod snapshot;
mod stats;
mod tree;
mod workers;
mod workspace;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use shardfs_proto::types::clock;
use shardfs_proto::types::limits::BATCH_BYTES_MAX;

use crate::context::Context;
use crate::failure::{EXIT_INTERRUPTED, EXIT_TERMINATED, Failure};
use crate::paths::shard_ref;
use crate::size;
pub use args::Args;
use args::{
    AllArgs, Compare, Directory, FilesArgs, IoArgs, IoSettings, KvArgs, Output, ReferenceKind, TreeArgs, What,
};
use environment::Environment;
use progress::Progress;
use reference::Reference;
use report::{Report, Sample, Target};
use workspace::{Cold, Stop};

/// Bytes of a key that `kv` makes, with its share of the message around it.
const KEY_SHARE_BYTES: usize = 128;
/// Workers of the fsync row of `all`.
const ALL_FSYNC_WORKERS: usize = 4;

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
        What::Failover(args) => failover::run(&args, context, &stop, &progress).await,
        What::Snapshot(args) => snapshot::run(&args, context, &stop, &progress).await,
        What::Kv(args) => key_value(args, context, &stop, &progress).await,
        What::Files(args) => {
            blocking(stop.clone(), move |stop, progress| small_files(args, stop, progress)).await
        }
        What::Io(args) => {
            blocking(stop.clone(), move |stop, progress| large_files(args, stop, progress)).await
        }
        What::Tree(args) => {
            blocking(stop.clone(), move |stop, progress| file_tree(args, stop, progress)).await
        }
        What::All(args) => blocking(stop.clone(), move |stop, progress| all(args, stop, progress)).await,
    };
    progress.finish();
    signals.abort();
    match result {
        Err(error) => match stop.exit_code() {
            Some(code) => {
                tracing::debug!("interrupted: {error:#}");
                let failure = match code {
                    EXIT_TERMINATED => Failure::terminated(),
                    _ => Failure::interrupted(),
                };
                Err(failure.into())
            }
            None => Err(error),
        },
        Ok(()) => Ok(()),
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
        let (seen, code) = tokio::select! {
            seen = interrupt.recv() => (seen, EXIT_INTERRUPTED),
            seen = terminate.recv() => (seen, EXIT_TERMINATED),
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
            std::process::exit(i32::from(code));
        }
        eprintln!("shardfs bench: cleaning up (once more: end at once)");
        stop.request(code);
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

fn file_tree(args: TreeArgs, stop: &Stop, progress: &Progress) -> Result<()> {
    let source = tree::Source::make(&args.scratch, tree::SHAPE, args.compare.output.seed(), stop, progress)?;
    let cold = Cold::best();
    let note = |report: &mut Report| report.setting("tree", source.describe());
    compare(&args.compare, stop, progress, note, |dir, _seed, progress| {
        tree::run_all(dir, &source, cold, stop, progress)
    })?;
    source.remove()
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
    let source = tree::Source::make(&args.scratch, tree::SHAPE, args.compare.output.seed(), stop, progress)?;
    let note = |report: &mut Report| {
        note_files(report, &small);
        args.io.note(&large, report);
        report.setting("tree", source.describe());
    };
    compare(&args.compare, stop, progress, note, |dir, seed, progress| {
        let mut samples = files::run(dir, &small, seed, stop, progress)?;
        samples.extend(files::run(dir, &synced, seed, stop, progress)?);
        samples.extend(tree::run_all(dir, &source, large.cold, stop, progress)?);
        samples.extend(io::run(dir, &large, seed, stop, progress)?);
        Ok(samples)
    })?;
    source.remove()
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
        shard: args.shard.as_deref().map(shard_ref).transpose()?,
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
    use clap::Parser as _;

    use super::args::tests::Line;
    use super::*;

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
        let What::Files(args) = Line::parse_from(line.split(' ')).args.what else { panic!("not files") };
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
