//! `shardfs put`: files, directories or standard input become values.
//!
//! Small files travel in batches, larger ones alone, those above a message's size as a stream; several at a time. Memory is
//! bounded by the number of jobs. A value becomes visible as a whole or not at all.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, Stream, StreamExt};
use shardfs_proto::client::Client;
use shardfs_proto::types::limits::VALUE_BYTES_MAX;
use shardfs_proto::types::op::{Durability, PutItem, PutOptions};
use shardfs_proto::types::{Error, Key, Reason, ShardId, Timestamp, Version, clock};
use tokio::sync::mpsc;

use super::progress::Progress;
use super::remote::{Tree, ends_everything, find_shard};
use crate::context::Context;
use crate::failure::{EXIT_FAILURE, Failure, OrFail, Result};
use crate::paths::RemotePath;
use crate::size;
use walk::{Found, walk};

mod walk;

/// Files up to this size travel in batches.
const BATCHED_BYTES_MAX: u64 = 256 << 10;
/// Items of a batch, and its bytes: large enough to share a sync, small enough to keep several on their way.
const BATCH_ITEMS: usize = 256;
/// See [`BATCH_ITEMS`].
const BATCH_BYTES: u64 = 2 << 20;
/// How long a file is sent anew after its stream broke off, and the pause before.
const STREAM_AGAIN_MAX: Duration = Duration::from_secs(60);
const STREAM_AGAIN_PAUSE: Duration = Duration::from_millis(200);
/// Bytes of one piece of a stream.
const PIECE_BYTES: usize = 1 << 20;
/// Pieces, and files of a walk, that are read ahead.
const AHEAD: usize = 8;
/// Transfers at a time.
const JOBS_MAX: u64 = 256;

/// `shardfs put`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "A DEST that ends with `/` is a directory: each SRC keeps its own name below it. Otherwise DEST is the new name.

Examples:
  shardfs put cat.jpg photos/               as photos/cat.jpg
  shardfs put cat.jpg photos/2026/first     as photos/2026/first
  shardfs put a.txt b.txt notes/drafts/     two files
  shardfs put -r ./site www/v1              everything in ./site, below www/v1
  shardfs put -r ./site www/                everything in ./site, below www/site
  tar c dir | shardfs put - backup/dir.tar  from standard input

A value replaces one of the same name as a whole: nobody ever sees half of it. Directories are made as needed. \
With -r: symbolic links are stored as such, sockets and devices are skipped, an error with one file does not stop the \
others (the exit code is then 1).

A value has the permission bits (rwx) of its file, so that what is private stays private on a mount; --mode gives others."
)]
pub struct Args {
    /// Files, directories (with -r), or `-` for standard input
    #[arg(required = true, value_name = "SRC")]
    sources: Vec<PathBuf>,
    /// SHARD/KEY, or SHARD/DIRECTORY/
    #[arg(required = true, value_name = "DEST")]
    dest: OsString,
    /// Directories with everything in them
    #[arg(long, short)]
    recursive: bool,
    /// Keep modification times, and set-id and sticky bits too
    #[arg(long, short)]
    preserve: bool,
    /// Permission bits, octal [default: those of a file; of standard input: 0644 for new ones]
    #[arg(long, value_parser = super::shard::parse_mode, conflicts_with = "preserve")]
    mode: Option<u32>,
    /// Fail if the key is there already
    #[arg(long)]
    if_absent: bool,
    /// Fail unless the value has this version (`shardfs stat` shows it)
    #[arg(long, value_name = "VERSION", conflicts_with_all = ["if_absent", "recursive"])]
    if_version: Option<u64>,
    /// Do not wait for the device: a crash of a machine within 5 s may lose it
    #[arg(long)]
    buffered: bool,
    /// Transfers at a time
    #[arg(long, short, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=JOBS_MAX))]
    jobs: u64,
    /// Say what was stored
    #[arg(long, short)]
    verbose: bool,
}

/// What all transfers share.
struct Upload {
    client: Client,
    shard: ShardId,
    /// The shard as it was typed.
    place: String,
    durability: Durability,
    preserve: bool,
    options: PutOptions,
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let dest = RemotePath::parse(&args.dest)?;
    let from_stdin = args.sources.iter().any(|s| s.as_os_str() == "-");
    if from_stdin && args.sources.len() > 1 {
        return Err(Failure::usage("`-` (standard input) stands alone"));
    }
    if from_stdin && args.recursive {
        return Err(Failure::usage("-r needs a directory, not standard input"));
    }
    if args.sources.len() > 1 && !dest.trailing_slash {
        return Err(Failure::usage(format!("several sources need a directory as DEST: {dest}/")));
    }
    // Looked at before the cluster is asked: what was typed wrong is said at once.
    let mut roots = Vec::new();
    for source in args.sources.iter().filter(|_| !from_stdin) {
        let meta = fs::metadata(source).with_context(|| source.display().to_string())?;
        if meta.is_dir() && !args.recursive {
            return Err(Failure::usage(format!("{} is a directory", source.display()))
                .hint("-r stores it with everything in it"));
        }
        roots.push((source.clone(), destination(source, &meta, &dest)?, meta));
    }

    let client = context.client()?;
    let shard = find_shard(&client, &dest.shard).await?.id;
    let upload = Upload {
        client,
        shard,
        place: dest.shard.to_string(),
        durability: if args.buffered { Durability::Buffered } else { Durability::Sync },
        preserve: args.preserve,
        options: PutOptions {
            mode: args.mode,
            if_absent: args.if_absent,
            if_version: args.if_version.map(Version::new),
            ..PutOptions::default()
        },
    };
    if from_stdin {
        if dest.trailing_slash {
            return Err(Failure::usage("standard input has no name").hint(format!("write a key: {dest}NAME")));
        }
        let key = dest.require_key()?;
        let progress = Progress::new(&dest.to_string(), None);
        let bytes = upload.stdin(&key, &progress).await;
        let bytes = bytes.map_err(|failure| explained(&upload.place, &key, failure))?;
        if args.verbose {
            progress.note(&format!("{dest}: {}", size::human(bytes)));
        }
        return Ok(());
    }
    upload.files(roots, &args).await
}

/// The key of a source, or the directory's prefix; `None`: the shard's root.
fn destination(source: &Path, meta: &Metadata, dest: &RemotePath) -> Result<Option<Key>> {
    if dest.trailing_slash {
        let name = source
            .file_name()
            .map(OsStr::to_owned)
            .or_else(|| fs::canonicalize(source).ok()?.file_name().map(OsStr::to_owned))
            .ok_or_else(|| Failure::usage(format!("{} has no name to keep", source.display())))?;
        return dest.join(name.as_bytes()).map(Some);
    }
    match dest.key() {
        Some(key) => Ok(Some(key)),
        None if meta.is_dir() => Ok(None),
        None => Err(Failure::usage(format!("{dest} is a shard"))
            .hint(format!("`{dest}/` puts the file into it under its own name"))),
    }
}

impl Upload {
    /// A file that is private here stays private there. What is no regular file says nothing about its content.
    fn options_for(&self, meta: &Metadata) -> PutOptions {
        let mut options = self.options.clone();
        if options.mode.is_none() && meta.is_file() {
            options.mode = Some(meta.mode() & 0o777);
        }
        if self.preserve {
            options.mode = Some(meta.mode() & 0o7777);
            options.mtime = Timestamp::new(meta.mtime(), meta.mtime_nsec() as u32).ok();
        }
        options
    }

    async fn stdin(&self, key: &Key, progress: &Progress) -> Result<u64> {
        let (pieces, first) = {
            let mut pieces = read_pieces(io::stdin());
            // What fits into one message is put in one call, which can be repeated.
            let mut first = Vec::new();
            let mut whole = true;
            while let Some(piece) = pieces.recv().await {
                first.push(piece?);
                if first.iter().map(Bytes::len).sum::<usize>() > VALUE_BYTES_MAX - PIECE_BYTES {
                    whole = false;
                    break;
                }
            }
            if whole {
                let value = Bytes::from(first.concat());
                let bytes = value.len() as u64;
                self.client
                    .put(self.shard, key.clone(), value, self.options.clone(), self.durability)
                    .await?;
                return Ok(bytes);
            }
            (pieces, first)
        };
        let head = futures::stream::iter(first.into_iter().map(Ok));
        let data = head.chain(as_stream(pieces));
        let bar = progress.handle();
        let data = data.inspect(move |piece| bar.add(piece.as_ref().map_or(0, |p| p.len() as u64)));
        let meta = self
            .client
            .put_stream(self.shard, key.clone(), self.options.clone(), self.durability, None, data)
            .await?;
        Ok(meta.attr.size)
    }

    async fn files(&self, roots: Vec<(PathBuf, Option<Key>, Metadata)>, args: &Args) -> Result<()> {
        let several = args.recursive || roots.len() > 1;
        let total = (!several).then(|| roots.iter().map(|(_, _, m)| m.len()).sum());
        let only = roots.first().and_then(|(_, key, _)| key.as_ref());
        let name = only.map(|key| path_text(&self.place, key)).unwrap_or_default();
        let progress = Progress::new(if several { "storing" } else { &name }, total);
        let mut walk = walk(roots);
        let mut tree: Option<Tree> = None;
        let mut running = FuturesUnordered::new();
        let mut batch = Batch::default();
        let mut tally = Tally { several, place: self.place.clone(), ..Tally::default() };
        loop {
            let found = walk.recv().await;
            // A batch is sent when it is full, or when nothing more comes.
            let ready = match &found {
                None => batch.take(),
                Some(Found::File { meta, .. }) if batch.would_overflow(meta.len()) => batch.take(),
                Some(_) => None,
            };
            if let Some(items) = ready {
                running.push(self.batch(items, &progress).boxed_local());
            }
            match found {
                None => break,
                Some(Found::Problem(failure)) => tally.problem(&progress, &failure),
                Some(Found::File { path, key, meta }) if several && meta.len() <= BATCHED_BYTES_MAX => {
                    batch.add(path, key, meta);
                }
                Some(Found::File { path, key, meta }) => {
                    running.push(self.single(path, key, meta, &progress).boxed_local());
                }
                Some(Found::EmptyDirectory { key, mode }) => {
                    let tree = self.tree(&mut tree).await?;
                    let mode = if self.preserve { mode } else { 0o755 };
                    let result = tree.directory(key.as_bytes(), mode, self.durability).await.map(|_| 0);
                    tally.count(&progress, &key, result, args.verbose)?;
                }
                Some(Found::Symlink { path, key }) => {
                    let tree = self.tree(&mut tree).await?;
                    let result = match fs::read_link(&path) {
                        Ok(target) => {
                            let target = Bytes::copy_from_slice(target.as_os_str().as_bytes());
                            tree.symlink(&key, target, self.durability).await.map(|()| 0)
                        }
                        Err(e) => Err(Failure::from(e).context(path.display())),
                    };
                    tally.count(&progress, &key, result, args.verbose)?;
                }
            }
            while running.len() >= args.jobs as usize {
                let done: Vec<(Key, Result<u64>)> = running.next().await.unwrap_or_default();
                tally.count_all(&progress, done, args.verbose)?;
            }
        }
        while let Some(done) = running.next().await {
            tally.count_all(&progress, done, args.verbose)?;
        }
        if several && args.verbose {
            progress.note(&format!("{} stored, {}", tally.stored, size::human(tally.bytes)));
        }
        match tally.problems {
            0 => Ok(()),
            // The only one stands for the whole.
            _ if !several => Err(tally.last.unwrap_or_else(|| Failure::silent(EXIT_FAILURE))),
            problems => {
                Err(Failure::new(format!("{problems} of {} were not stored", problems + tally.stored)))
            }
        }
    }

    async fn tree<'a>(&self, tree: &'a mut Option<Tree>) -> Result<&'a mut Tree> {
        if tree.is_none() {
            *tree = Some(Tree::new(&self.client, self.shard).await?);
        }
        Ok(tree.as_mut().expect("it was just made"))
    }

    async fn single(
        &self,
        path: PathBuf,
        key: Key,
        meta: Metadata,
        progress: &Progress,
    ) -> Vec<(Key, Result<u64>)> {
        let result = self.file(&path, &key, &meta, progress).await;
        vec![(key, result)]
    }

    async fn file(&self, path: &Path, key: &Key, meta: &Metadata, progress: &Progress) -> Result<u64> {
        let options = self.options_for(meta);
        // What is no regular file (a FIFO, say) has no size to go by.
        if meta.is_file() && meta.len() <= VALUE_BYTES_MAX as u64 {
            let path = path.to_owned();
            let limit = VALUE_BYTES_MAX as u64 + 1;
            let read = tokio::task::spawn_blocking(move || read_small(&path, limit)).await;
            let value = read.map_err(|e| Failure::new(e.to_string()))??;
            if value.len() <= VALUE_BYTES_MAX {
                let bytes = value.len() as u64;
                self.client.put(self.shard, key.clone(), value, options, self.durability).await?;
                progress.add(bytes);
                return Ok(bytes);
            }
            // It has grown meanwhile.
        }
        // A stream breaks off with its node, and nothing is stored; a regular file can be read again. Not if it must be
        // new: one that was stored, and whose answer was lost, would be in its own way.
        let again = meta.is_file() && !options.if_absent && options.if_version.is_none();
        let deadline = clock::monotonic() + STREAM_AGAIN_MAX;
        let mut counted = 0;
        loop {
            let file = File::open(path).with_context(|| path.display().to_string())?;
            let (bar, sent) = (progress.handle(), Arc::new(AtomicU64::new(0)));
            let (sending, before) = (sent.clone(), counted);
            let data = as_stream(read_pieces(file)).inspect(move |piece| {
                let bytes = piece.as_ref().map_or(0, |p| p.len() as u64);
                let now = sending.fetch_add(bytes, Ordering::Relaxed) + bytes;
                bar.add(now.saturating_sub(before).min(bytes));
            });
            let stored = self
                .client
                .put_stream(self.shard, key.clone(), options.clone(), self.durability, None, data)
                .await;
            match stored {
                Ok(stored) => return Ok(stored.attr.size),
                Err(error) if again && error.is_retryable() && clock::monotonic() < deadline => {
                    tracing::debug!(%error, "the stream broke off: once more");
                    counted = counted.max(sent.load(Ordering::Relaxed));
                    tokio::time::sleep(STREAM_AGAIN_PAUSE).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Reads and stores small files together; each has a result of its own.
    async fn batch(
        &self,
        files: Vec<(PathBuf, Key, Metadata)>,
        progress: &Progress,
    ) -> Vec<(Key, Result<u64>)> {
        let mut outcomes = Vec::with_capacity(files.len());
        let options: Vec<PutOptions> = files.iter().map(|(_, _, meta)| self.options_for(meta)).collect();
        let read = tokio::task::spawn_blocking(move || {
            let limit = BATCHED_BYTES_MAX * 2;
            files
                .into_iter()
                .map(|(path, key, meta)| (read_small(&path, limit), path, key, meta))
                .collect::<Vec<_>>()
        });
        let Ok(read) = read.await else { return outcomes };
        let mut items = Vec::with_capacity(read.len());
        for ((value, path, key, meta), options) in read.into_iter().zip(options) {
            match value {
                // It grew while it was read: it goes its own way.
                Ok(value) if value.len() as u64 >= BATCHED_BYTES_MAX * 2 => {
                    let result = self.file(&path, &key, &meta, progress).await;
                    outcomes.push((key, result));
                }
                Ok(value) => items.push(PutItem { key, value, options }),
                Err(failure) => outcomes.push((key, Err(failure))),
            }
        }
        let sent: Vec<(Key, u64)> = items.iter().map(|i| (i.key.clone(), i.value.len() as u64)).collect();
        match self.client.batch_put(self.shard, items, false, self.durability).await {
            Ok(results) => {
                for ((key, bytes), result) in sent.into_iter().zip(results) {
                    progress.add(bytes);
                    outcomes.push((key, result.map(|_| bytes).map_err(Failure::from)));
                }
            }
            Err(error) => outcomes.extend(sent.into_iter().map(|(key, _)| (key, Err(failure_of(&error))))),
        }
        outcomes
    }
}

fn failure_of(error: &Error) -> Failure {
    Failure::from(error.clone())
}

/// A key with its shard, as it would be typed.
fn path_text(place: &str, key: &Key) -> String {
    format!("{place}/{}", crate::output::printable(key.as_bytes()))
}

/// Why a key was not stored, by the names that were typed.
fn explained(place: &str, key: &Key, failure: Failure) -> Failure {
    let path = path_text(place, key);
    let failure = match failure.reason() {
        Some(Reason::IsDirectory) => {
            failure.hint(format!("`{path}/` puts something into that directory under its own name"))
        }
        _ => failure,
    };
    failure.context(format!("put {path}"))
}

/// Counts what was stored, says what was not.
#[derive(Default)]
struct Tally {
    /// Say at once what was not stored; a single source's failure is the command's.
    several: bool,
    /// The shard as it was typed.
    place: String,
    stored: u64,
    bytes: u64,
    problems: u64,
    last: Option<Failure>,
}

impl Tally {
    fn count_all(&mut self, progress: &Progress, done: Vec<(Key, Result<u64>)>, verbose: bool) -> Result<()> {
        for (key, result) in done {
            self.count(progress, &key, result, verbose)?;
        }
        Ok(())
    }

    fn count(&mut self, progress: &Progress, key: &Key, result: Result<u64>, verbose: bool) -> Result<()> {
        match result {
            Ok(bytes) => {
                self.stored += 1;
                self.bytes += bytes;
                if verbose {
                    progress.note(&crate::output::printable(key.as_bytes()));
                }
            }
            Err(failure) => {
                let failure = explained(&self.place, key, failure);
                if failure.reason().is_some_and(ends_everything) {
                    return Err(failure);
                }
                self.problem(progress, &failure);
            }
        }
        Ok(())
    }

    fn problem(&mut self, progress: &Progress, failure: &Failure) {
        self.problems += 1;
        if self.several {
            progress.note(&format!("error: {failure}"));
        }
        self.last = Some(failure.clone());
    }
}

/// Small files that wait for each other.
#[derive(Default)]
struct Batch {
    files: Vec<(PathBuf, Key, Metadata)>,
    bytes: u64,
}

impl Batch {
    fn add(&mut self, path: PathBuf, key: Key, meta: Metadata) {
        self.bytes += meta.len();
        self.files.push((path, key, meta));
    }

    fn would_overflow(&self, bytes: u64) -> bool {
        self.files.len() == BATCH_ITEMS || self.bytes + bytes > BATCH_BYTES
    }

    fn take(&mut self) -> Option<Vec<(PathBuf, Key, Metadata)>> {
        self.bytes = 0;
        (!self.files.is_empty()).then(|| std::mem::take(&mut self.files))
    }
}

fn read_small(path: &Path, limit: u64) -> Result<Bytes> {
    let words = || path.display().to_string();
    let mut value = Vec::new();
    File::open(path).and_then(|f| f.take(limit).read_to_end(&mut value)).with_context(words)?;
    Ok(value.into())
}

/// Reads in a thread of its own; ends with the source, an error, or when nobody listens.
fn read_pieces(mut source: impl Read + Send + 'static) -> mpsc::Receiver<io::Result<Bytes>> {
    let (send, receive) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        loop {
            let mut piece = vec![0; PIECE_BYTES];
            let mut filled = 0;
            let mut failed = None;
            while filled < piece.len() {
                match source.read(&mut piece[filled..]) {
                    Ok(0) => break,
                    Ok(n) => filled += n,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(e) => {
                        failed = Some(e);
                        break;
                    }
                }
            }
            let end = filled < piece.len();
            piece.truncate(filled);
            if let Some(e) = failed {
                let _ = send.blocking_send(Err(e));
                return;
            }
            if filled > 0 && send.blocking_send(Ok(piece.into())).is_err() || end {
                return;
            }
        }
    });
    receive
}

fn as_stream(
    receive: mpsc::Receiver<io::Result<Bytes>>,
) -> impl Stream<Item = io::Result<Bytes>> + Send + 'static {
    futures::stream::unfold(receive, |mut receive| async move {
        receive.recv().await.map(|piece| (piece, receive))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dest(text: &str) -> RemotePath {
        RemotePath::parse(OsStr::new(text)).unwrap()
    }

    #[test]
    fn destinations_follow_the_slash() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("site");
        fs::create_dir(&dir).unwrap();
        let file = dir.join("a.txt");
        fs::write(&file, "x").unwrap();
        let key = |source: &Path, to: &str| {
            let meta = fs::metadata(source).unwrap();
            destination(source, &meta, &dest(to))
                .map(|k| k.map(|k| String::from_utf8(k.as_bytes().to_vec()).unwrap()))
        };
        assert_eq!(key(&file, "s/").unwrap().as_deref(), Some("a.txt"));
        assert_eq!(key(&file, "s/x/").unwrap().as_deref(), Some("x/a.txt"));
        assert_eq!(key(&file, "s/x").unwrap().as_deref(), Some("x"));
        assert_eq!(key(&dir, "s/").unwrap().as_deref(), Some("site"));
        assert_eq!(key(&dir.join("."), "s/").unwrap().as_deref(), Some("site"));
        assert_eq!(key(&dir, "s/v").unwrap().as_deref(), Some("v"));
        assert_eq!(key(&dir, "s").unwrap(), None);
        let failure = key(&file, "s").unwrap_err();
        assert_eq!(failure.hint_text(), Some("`s/` puts the file into it under its own name"));
    }

    #[test]
    fn failures_name_what_was_typed() {
        let key = Key::new("a/b").unwrap();
        let error = |reason| Failure::from(Error::new(reason, "shard 4: no"));
        let failure = explained("photos", &key, error(Reason::IsDirectory));
        assert_eq!(failure.message(), "put photos/a/b: shard 4: no");
        assert!(failure.hint_text().is_some_and(|h| h.starts_with("`photos/a/b/` puts")), "{failure:?}");
        let failure = explained("photos", &key, error(Reason::ShardFull));
        assert!(failure.hint_text().is_some_and(|h| h.contains("--limit")), "{failure:?}");
    }

    #[tokio::test]
    async fn pieces_are_whole() {
        let data = vec![7u8; PIECE_BYTES * 2 + 5];
        let mut pieces = read_pieces(io::Cursor::new(data));
        let mut sizes = Vec::new();
        while let Some(piece) = pieces.recv().await {
            sizes.push(piece.unwrap().len());
        }
        assert_eq!(sizes, [PIECE_BYTES, PIECE_BYTES, 5]);
    }
}
