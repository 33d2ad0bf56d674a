//! What can be typed after `shardfs bench`, and what is refused.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Subcommand, ValueEnum};
use shardfs_proto::types::limits::{BATCH_ITEMS_MAX, VALUE_BYTES_MAX};

use super::{content, files, workers};
use crate::size;

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
/// Shards that `failover` may make.
const SHARDS_MAX: u32 = 10_000;
/// Values that a row of `kv` may put; bounds what the benchmark remembers of them.
const VALUES_MAX: u64 = 9_000_000;

/// Measure how fast a directory or a cluster is
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    pub(super) what: What,
}

#[derive(Subcommand, Debug)]
pub(super) enum What {
    /// Small files: create, stat, read, readdir, rename, unlink, mkdir, rmdir
    Files(FilesArgs),
    /// Large files: sequential and random reads and writes, cold and warm
    Io(IoArgs),
    /// A tree of 9,000 files: tar, grep, find, cp, git, rm
    Tree(TreeArgs),
    /// Values over gRPC: Put, Get, BatchPut, BatchGet on the cluster
    Kv(KvArgs),
    /// Time without service when a volume moves: its node is killed, frozen, or hands it over
    Failover(FailoverArgs),
    /// Snapshots and clones of a shard that is being written to
    Snapshot(SnapshotArgs),
    /// The whole table: small files with 1 and 8 workers, files with fsync, large files, a tree
    All(AllArgs),
}

/// A directory to measure, with the name of its column.
#[derive(Clone, Debug)]
pub(super) struct Directory {
    pub(super) name: String,
    pub(super) path: PathBuf,
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
pub(super) enum ReferenceKind {
    /// ext4 on a loop device over a sparse file with direct I/O, as `loop` volumes are; needs root
    Ext4,
}

/// What is compared, and how often.
#[derive(clap::Args, Debug)]
pub(super) struct Compare {
    /// Directories to measure in turn; NAME=DIR names the column
    #[arg(value_name = "DIR", required_unless_present = "reference")]
    pub(super) dirs: Vec<Directory>,
    /// Also measure a filesystem made for this run, as the first column
    #[arg(long, value_name = "KIND")]
    pub(super) reference: Option<ReferenceKind>,
    /// Where the backing file of the reference lies: on the disk that holds what it is compared with
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    pub(super) reference_dir: PathBuf,
    /// Size of the reference filesystem (sparse)
    #[arg(long, value_name = "SIZE", default_value = "8GiB", value_parser = size::parse)]
    pub(super) reference_size: u64,
    /// The column that ratios refer to [default: the first]
    #[arg(long, value_name = "NAME")]
    pub(super) base: Option<String>,
    #[command(flatten)]
    pub(super) output: Output,
}

#[derive(clap::Args, Debug)]
pub(super) struct Output {
    /// How often to measure everything; the median is reported
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=i64::from(RUNS_MAX)))]
    pub(super) runs: u32,
    /// Also write the report as JSON; `-` writes only that, to standard output
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
    /// Makes the same content and order as an earlier run [default: a new one]
    #[arg(long)]
    pub(super) seed: Option<u64>,
}

impl Output {
    /// What every measured thing is made from; each run gets another.
    pub(super) fn seed(&self) -> u64 {
        self.seed.unwrap_or_else(|| fastrand::u64(..))
    }
}

/// What is done to the node that serves a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub(super) enum Fault {
    /// Its process is killed; its parent records the death
    Kill,
    /// It is stopped for longer than a lease, its parent too: silent, as a machine that has gone. Not on volumes of kind dir, which
    /// have no fence against it
    Freeze,
    /// An operator moves the volume: `volume promote`
    Promote,
}

#[derive(clap::Args, Debug)]
pub(super) struct FailoverArgs {
    /// What is done to the node that serves the volume; one series each
    #[arg(long, value_name = "FAULT,...", value_delimiter = ',', default_value = "kill,freeze,promote")]
    pub(super) fault: Vec<Fault>,
    /// How often
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u32).range(1..=i64::from(RUNS_MAX)))]
    pub(super) runs: u32,
    /// Shards on the volume; one is written to, each of the others holds one value and is idle
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=i64::from(SHARDS_MAX)))]
    pub(super) shards: u32,
    /// Also write every run as JSON; `-` writes only that, to standard output
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

#[derive(clap::Args, Debug)]
pub(super) struct SnapshotArgs {
    /// Bytes in the shard
    #[arg(long, default_value = "1GiB", value_parser = size::parse)]
    pub(super) size: u64,
    /// Bytes of the values that are overwritten meanwhile, one after the other, each synced
    #[arg(long, value_name = "SIZE", default_value = "64KiB", value_parser = value_size_of)]
    pub(super) write_size: usize,
    /// How often
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=i64::from(RUNS_MAX)))]
    pub(super) runs: u32,
    /// Also write every run as JSON; `-` writes only that, to standard output
    #[arg(long, value_name = "FILE")]
    pub(super) json: Option<PathBuf>,
}

#[derive(clap::Args, Debug)]
pub(super) struct FilesArgs {
    #[command(flatten)]
    pub(super) compare: Compare,
    /// Workers at a time, each in a directory of its own; one series each
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,8", value_parser = workers_of)]
    pub(super) workers: Vec<usize>,
    /// Files of each worker
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = files_of)]
    pub(super) files: usize,
    /// Bytes of each file
    #[arg(long, default_value = "4096", value_parser = file_size_of)]
    pub(super) size: usize,
    /// fsync each file before it is closed
    #[arg(long)]
    pub(super) fsync: bool,
    /// Measure stat, readdir and read with cold kernel caches as well; needs root
    #[arg(long)]
    pub(super) cold: bool,
}

#[derive(clap::Args, Debug)]
pub(super) struct IoArgs {
    #[command(flatten)]
    pub(super) compare: Compare,
    #[command(flatten)]
    pub(super) io: IoSettings,
}

#[derive(clap::Args, Debug)]
pub(super) struct IoSettings {
    /// Bytes of the file that is written and read front to back
    #[arg(long, value_name = "SIZE", default_value = "1GiB", value_parser = size::parse)]
    pub(super) io_size: u64,
    /// Bytes of a sequential request
    #[arg(long, value_name = "SIZE", default_value = "1MiB", value_parser = block_of)]
    pub(super) block: usize,
    /// Bytes of all files of the random phases together
    #[arg(long, value_name = "SIZE", default_value = "256MiB", value_parser = size::parse)]
    pub(super) random_size: u64,
    /// Random jobs at a time, each on a file of its own
    #[arg(long, value_name = "N", default_value = "4", value_parser = workers_of)]
    pub(super) jobs: usize,
    /// Seconds of each random phase
    #[arg(long, value_name = "S", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    pub(super) seconds: u64,
}

#[derive(clap::Args, Debug)]
pub(super) struct TreeArgs {
    #[command(flatten)]
    pub(super) compare: Compare,
    /// Where the tree and its archive are made, outside of what is measured
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    pub(super) scratch: PathBuf,
}

#[derive(clap::Args, Debug)]
pub(super) struct KvArgs {
    /// A shard to use; keys go below a prefix of their own [default: make one, delete it]
    #[arg(long, value_name = "NAME")]
    pub(super) shard: Option<String>,
    /// Bytes of a value
    #[arg(long, default_value = "1024", value_parser = value_size_of)]
    pub(super) size: usize,
    /// Callers at a time of Put and Get; one series each
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,64", value_parser = callers_of)]
    pub(super) callers: Vec<usize>,
    /// Callers at a time of BatchPut and BatchGet; one series each
    #[arg(long, value_name = "N,...", value_delimiter = ',', default_value = "1,8", value_parser = callers_of)]
    pub(super) batch_callers: Vec<usize>,
    /// Values of a batch
    #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u32).range(2..=BATCH_ITEMS_MAX as i64))]
    pub(super) batch: u32,
    /// Seconds of each row
    #[arg(long, value_name = "S", default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=SECONDS_MAX))]
    pub(super) seconds: u64,
    /// Values that a row puts at most
    #[arg(long, value_name = "N", default_value_t = 500_000, value_parser = clap::value_parser!(u64).range(1..=VALUES_MAX))]
    pub(super) values: u64,
    #[command(flatten)]
    pub(super) output: Output,
}

#[derive(clap::Args, Debug)]
pub(super) struct AllArgs {
    #[command(flatten)]
    pub(super) compare: Compare,
    /// Files of each worker
    #[arg(long, value_name = "N", default_value_t = 2_000, value_parser = files_of)]
    pub(super) files: usize,
    /// Bytes of each file
    #[arg(long, default_value = "4096", value_parser = file_size_of)]
    pub(super) size: usize,
    #[command(flatten)]
    pub(super) io: IoSettings,
    /// Where the tree and its archive are made, outside of what is measured
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    pub(super) scratch: PathBuf,
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

#[cfg(test)]
pub(super) mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    pub(crate) struct Line {
        #[command(flatten)]
        pub(crate) args: Args,
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
}
