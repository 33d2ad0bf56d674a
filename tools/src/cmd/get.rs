//! `shardfs get`: values become files, a directory of them a directory, or bytes on standard output.
//!
//! A file appears under its name only when it is complete: it is written beside it and renamed. A large value is read by
//! ranges pinned to one version, several on their way at a time; if it changes meanwhile, the download starts anew.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, FileTimes, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use futures::stream::FuturesUnordered;
use futures::{FutureExt, StreamExt};
use parking_lot::Mutex;
use shardfs_proto::client::{Client, ListItem, ListOptions};
use shardfs_proto::types::limits::VALUE_BYTES_MAX;
use shardfs_proto::types::op::ObjectMeta;
use shardfs_proto::types::{Attr, FileKind, Key, Reason, ShardId, Timestamp, ViewLabel};

use super::progress::Progress;
use super::reads::{self, ReadArgs};
use super::remote::{ends_everything, find_shard, resolve};
use crate::context::Context;
use crate::failure::{Failure, OrFail, Result};
use crate::output::{self, Out, printable};
use crate::paths::RemotePath;
use crate::size;

/// Bytes of one range.
const RANGE_BYTES: u64 = VALUE_BYTES_MAX as u64;
/// Ranges of one value on their way.
const RANGES_AHEAD: usize = 4;
/// Times that a download starts anew because the value changed.
const RESTARTS_MAX: u32 = 5;
/// Transfers at a time.
const JOBS_MAX: u64 = 256;

/// `shardfs get`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "A DEST that ends with `/` is a directory: SRC keeps its own name below it; so it does in an existing directory, unless \
-r is given. Otherwise DEST is the new name. Without DEST, SRC comes into the working directory under its own name.

Examples:
  shardfs get photos/cat.jpg                 as ./cat.jpg
  shardfs get photos/cat.jpg - | display     to standard output
  shardfs get -r photos/2026 ./2026          everything below photos/2026
  shardfs get -rp photos ./photos            the whole shard, with modes and times
  shardfs get --read-from backup photos/a .  from a backup, as it was a few seconds ago

A file is there as a whole or not at all; a value that changes while it is read is read again from its start. With -r an \
error with one file does not stop the others (the exit code is then 1)."
)]
pub struct Args {
    /// SHARD/KEY; with -r also a directory, or a whole SHARD
    #[arg(value_name = "SRC")]
    source: OsString,
    /// File, directory, or `-` for standard output
    #[arg(value_name = "DEST")]
    dest: Option<PathBuf>,
    /// A directory with everything in it
    #[arg(long, short)]
    recursive: bool,
    /// Keep permission bits and modification times
    #[arg(long, short)]
    preserve: bool,
    /// Transfers at a time
    #[arg(long, short, default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=JOBS_MAX))]
    jobs: u64,
    /// Say what was fetched
    #[arg(long, short)]
    verbose: bool,
    #[command(flatten)]
    reads: ReadArgs,
}

/// What all transfers share.
struct Download {
    client: Client,
    shard: ShardId,
    preserve: bool,
    /// It is one value: its size is the total. Put on the device before it gets its name.
    single: bool,
    /// Whence the first piece of the last value was.
    whence: Mutex<Option<ViewLabel>>,
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let source = RemotePath::parse(&args.source)?;
    let to_stdout = args.dest.as_deref().is_some_and(|d| d.as_os_str() == "-");
    if to_stdout && args.recursive {
        return Err(Failure::usage("-r needs a directory as DEST, not standard output"));
    }
    let client = context.client()?.with_reads(args.reads.read_from()?);
    let shard = find_shard(&client, &source.shard).await?.id;
    let download = Download {
        client,
        shard,
        preserve: args.preserve,
        single: !args.recursive,
        whence: Mutex::default(),
    };
    if args.recursive {
        let attr = resolve(&download.client, shard, source.rest()).await.context(&source)?;
        if attr.kind == FileKind::Directory {
            let dest = directory_destination(&source, args.dest.as_deref());
            return download.tree(&source, &dest, &args).await;
        }
    }
    let Some(key) = source.key().filter(|_| !source.trailing_slash) else {
        return Err(
            Failure::usage(format!("{source} is a directory")).hint("-r fetches it with everything in it")
        );
    };
    let progress = Progress::new(&source.to_string(), None);
    let (fetched, bytes) = if to_stdout {
        let bytes = download.to_stdout(&key, &progress).await;
        (source.to_string(), bytes.with_context(|| format!("get {source}"))?)
    } else {
        let dest = file_destination(&source, args.dest.as_deref());
        let bytes = download.to_file(&key, &dest, &progress).await;
        (dest.display().to_string(), bytes.with_context(|| format!("get {source}"))?)
    };
    if args.verbose {
        let whence = reads::described(download.whence.lock().as_ref());
        progress.note(&format!("{fetched}: {}, {whence}", size::human(bytes)));
    }
    Ok(())
}

fn ends_with_slash(path: &Path) -> bool {
    matches!(
        path.as_os_str().as_bytes(),
        [.., b'/'] | b"." | b".." | [.., b'/', b'.'] | [.., b'/', b'.', b'.']
    )
}

fn file_destination(source: &RemotePath, dest: Option<&Path>) -> PathBuf {
    match dest {
        None => PathBuf::from(source.base_name()),
        Some(dest) if ends_with_slash(dest) || dest.is_dir() => dest.join(source.base_name()),
        Some(dest) => dest.to_owned(),
    }
}

fn directory_destination(source: &RemotePath, dest: Option<&Path>) -> PathBuf {
    match dest {
        None => PathBuf::from(source.base_name()),
        Some(dest) if ends_with_slash(dest) => dest.join(source.base_name()),
        Some(dest) => dest.to_owned(),
    }
}

/// Where the bytes of a value go.
trait Sink {
    fn piece(&mut self, piece: &Bytes) -> Result<()>;
    /// From the start again; false: it cannot.
    fn restart(&mut self) -> Result<bool>;
}

struct StdoutSink {
    out: Out,
    began: bool,
}

impl Sink for StdoutSink {
    fn piece(&mut self, piece: &Bytes) -> Result<()> {
        self.began |= !piece.is_empty();
        self.out.bytes(piece)
    }

    fn restart(&mut self) -> Result<bool> {
        Ok(!self.began)
    }
}

/// A file beside its destination, removed when it is dropped before it got its name.
struct Partial {
    file: File,
    path: PathBuf,
    dest: PathBuf,
    named: bool,
}

impl Partial {
    fn new(dest: &Path) -> Result<Partial> {
        let name =
            dest.file_name().ok_or_else(|| Failure::usage(format!("{} is no file name", dest.display())))?;
        let mut aside = OsString::from(".");
        // A name of 255 bytes has no room for more.
        aside.push(OsStr::from_bytes(&name.as_bytes()[..name.len().min(200)]));
        aside.push(format!(".{:08x}.partial", fastrand::u32(..)));
        let path = dest.with_file_name(aside);
        let file = OpenOptions::new().write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("cannot write {}", dest.display()))?;
        Ok(Partial { file, path, dest: dest.to_owned(), named: false })
    }

    fn name(mut self, durable: bool) -> Result<()> {
        let words = || format!("cannot write {}", self.dest.display());
        if durable {
            self.file.sync_all().with_context(words)?;
        }
        fs::rename(&self.path, &self.dest).with_context(words)?;
        self.named = true;
        Ok(())
    }
}

impl Sink for Partial {
    fn piece(&mut self, piece: &Bytes) -> Result<()> {
        self.file.write_all(piece).with_context(|| format!("cannot write {}", self.dest.display()))
    }

    fn restart(&mut self) -> Result<bool> {
        use std::io::Seek;
        self.file.set_len(0)?;
        self.file.rewind()?;
        Ok(true)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.named {
            // It may be gone with its folder.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// What exists and is no regular file (a device, a FIFO) is written into, not replaced.
struct Direct {
    file: File,
    began: bool,
}

impl Sink for Direct {
    fn piece(&mut self, piece: &Bytes) -> Result<()> {
        self.began |= !piece.is_empty();
        self.file.write_all(piece).map_err(Failure::from)
    }

    fn restart(&mut self) -> Result<bool> {
        Ok(!self.began)
    }
}

impl Download {
    async fn to_stdout(&self, key: &Key, progress: &Progress) -> Result<u64> {
        let mut sink = StdoutSink { out: Out::new(), began: false };
        let meta = self.value(key, &mut sink, progress).await?;
        sink.out.flush()?;
        Ok(meta.attr.size)
    }

    async fn to_file(&self, key: &Key, dest: &Path, progress: &Progress) -> Result<u64> {
        let there = fs::metadata(dest);
        if let Ok(there) = &there
            && !there.is_file()
        {
            if there.is_dir() {
                return Err(Failure::new(format!("{} is a directory", dest.display())));
            }
            let file =
                OpenOptions::new().write(true).open(dest).with_context(|| dest.display().to_string())?;
            return Ok(self.value(key, &mut Direct { file, began: false }, progress).await?.attr.size);
        }
        // A symlink to a file stays one.
        let dest = if there.is_ok() { fs::canonicalize(dest)? } else { dest.to_owned() };
        let mut partial = Partial::new(&dest)?;
        let meta = self.value(key, &mut partial, progress).await?;
        if self.preserve {
            keep(&partial.file, &meta.attr).with_context(|| dest.display().to_string())?;
        }
        let size = meta.attr.size;
        partial.name(self.single)?;
        Ok(size)
    }

    /// All bytes of one version of a value.
    async fn value(&self, key: &Key, sink: &mut dyn Sink, progress: &Progress) -> Result<ObjectMeta> {
        let mut restarts = 0;
        loop {
            match self.one_version(key, sink, progress).await {
                Err(failure) if failure.reason() == Some(Reason::VersionMismatch) => {
                    restarts += 1;
                    if restarts > RESTARTS_MAX || !sink.restart()? {
                        return Err(failure.context("the value changed while it was read"));
                    }
                }
                other => return other,
            }
        }
    }

    async fn one_version(&self, key: &Key, sink: &mut dyn Sink, progress: &Progress) -> Result<ObjectMeta> {
        let (meta, first, whence) =
            self.client.get_range_labelled(self.shard, key, 0, RANGE_BYTES, None).await?;
        *self.whence.lock() = whence;
        let (size, version) = (meta.attr.size, meta.attr.version);
        if self.single {
            progress.restart(size);
        }
        progress.add(first.len() as u64);
        let begun = first.len() as u64;
        sink.piece(&first)?;
        let ranges = (begun..size).step_by(RANGE_BYTES as usize).map(|offset| async move {
            let length = RANGE_BYTES.min(size - offset);
            let (_, piece) = self.client.get_range(self.shard, key, offset, length, Some(version)).await?;
            if piece.len() as u64 != length {
                return Err(Failure::new(format!("{} bytes at {offset} instead of {length}", piece.len())));
            }
            Ok(piece)
        });
        let mut ranges = futures::stream::iter(ranges).buffered(RANGES_AHEAD);
        while let Some(piece) = ranges.next().await {
            let piece = piece?;
            progress.add(piece.len() as u64);
            sink.piece(&piece)?;
        }
        Ok(meta)
    }

    async fn tree(&self, source: &RemotePath, dest: &Path, args: &Args) -> Result<()> {
        fs::create_dir_all(dest).with_context(|| format!("cannot make {}", dest.display()))?;
        let mut local = LocalTree { root: dest.to_owned(), checked: None };
        let progress = Progress::new("fetching", None);
        let mut prefix = source.rest().to_vec();
        if !prefix.is_empty() {
            prefix.push(b'/');
        }
        let options = ListOptions {
            prefix: prefix.clone().into(),
            include_directories: true,
            ..ListOptions::default()
        };
        let mut items = std::pin::pin!(self.client.list(self.shard, options));
        let mut running = FuturesUnordered::new();
        let shard = source.shard.to_string();
        let mut tally = Tally { verbose: args.verbose, shard, ..Tally::default() };
        while let Some(item) = items.next().await {
            let ListItem::Key { key, kind, meta } = item? else { continue };
            let Some(relative) = key.strip_prefix(&prefix[..]).filter(|r| !r.is_empty()) else { continue };
            match kind {
                FileKind::Directory => tally.count(&progress, &key, local.directory(relative).map(|_| 0))?,
                FileKind::Regular => {
                    let path = match local.parent_of(relative) {
                        Ok(path) => path,
                        Err(failure) => {
                            tally.count(&progress, &key, Err(failure))?;
                            continue;
                        }
                    };
                    let (download, progress) = (self, &progress);
                    running.push(
                        async move {
                            let result = match Key::new(key.clone()) {
                                Ok(k) => download.to_file(&k, &path, progress).await,
                                Err(e) => Err(e.into()),
                            };
                            (key, result)
                        }
                        .boxed_local(),
                    );
                }
                FileKind::Symlink => {
                    let result = self.symlink(relative, meta, &mut local).await.map(|()| 0);
                    tally.count(&progress, &key, result)?;
                }
                FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice => {
                    let skipped = Failure::new(format!("skipped: it is a {}", output::kind_text(kind)));
                    tally.count(&progress, &key, Err(skipped))?;
                }
            }
            while running.len() >= args.jobs as usize {
                if let Some((key, result)) = running.next().await {
                    tally.count(&progress, &key, result)?;
                }
            }
        }
        while let Some((key, result)) = running.next().await {
            tally.count(&progress, &key, result)?;
        }
        if args.verbose {
            progress.note(&format!("{} fetched, {}", tally.fetched, size::human(tally.bytes)));
        }
        if tally.problems > 0 {
            let all = tally.problems + tally.fetched;
            return Err(Failure::new(format!("{} of {all} were not fetched", tally.problems)));
        }
        Ok(())
    }

    async fn symlink(&self, relative: &[u8], meta: Option<ObjectMeta>, local: &mut LocalTree) -> Result<()> {
        let meta = meta.ok_or_else(|| Failure::new("the listing lacks its metadata"))?;
        let target = self.client.read_link(self.shard, meta.attr.inode).await?;
        let path = local.parent_of(relative)?;
        let target = OsStr::from_bytes(&target);
        match fs::symlink_metadata(&path) {
            Ok(there) if there.is_symlink() && fs::read_link(&path)? == Path::new(target) => return Ok(()),
            Ok(there) if there.is_dir() => {
                return Err(Failure::new(format!("{} is a directory", path.display())));
            }
            Ok(_) => fs::remove_file(&path)?,
            Err(_) => {}
        }
        local.checked = None;
        std::os::unix::fs::symlink(target, &path).with_context(|| path.display().to_string())
    }
}

/// Permission bits without set-id ones, and the modification time.
fn keep(file: &File, attr: &Attr) -> io::Result<()> {
    file.set_permissions(Permissions::from_mode(attr.mode & 0o777))?;
    let time = system_time(attr.mtime);
    file.set_times(FileTimes::new().set_modified(time))
}

fn system_time(time: Timestamp) -> std::time::SystemTime {
    let nanos = Duration::from_nanos(u64::from(time.nanos()));
    let seconds = Duration::from_secs(time.seconds().unsigned_abs());
    if time.seconds() >= 0 { UNIX_EPOCH + seconds + nanos } else { UNIX_EPOCH - seconds + nanos }
}

/// The directory that a tree is fetched into. Never writes through a symlink below its root: a shard's content
/// must not choose where on this machine it lands.
struct LocalTree {
    root: PathBuf,
    /// The directory that was looked at last, relative to the root.
    checked: Option<PathBuf>,
}

impl LocalTree {
    /// Makes a directory, and those above it.
    fn directory(&mut self, relative: &[u8]) -> Result<PathBuf> {
        let relative = relative.strip_suffix(b"/").unwrap_or(relative);
        let wanted = PathBuf::from(OsStr::from_bytes(relative));
        if self.checked.as_deref() != Some(&wanted) {
            let mut path = self.root.clone();
            for component in wanted.components() {
                // A key has no `..` and begins with no `/`: checked all the same, because it decides where is written.
                let std::path::Component::Normal(name) = component else {
                    return Err(Failure::new(format!("{} would leave the directory", printable(relative))));
                };
                path.push(name);
                match fs::symlink_metadata(&path) {
                    Ok(there) if there.is_dir() => {}
                    Ok(_) => {
                        return Err(Failure::new(format!(
                            "{} is in the way and no directory",
                            path.display()
                        )));
                    }
                    Err(_) => {
                        fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?
                    }
                }
            }
            self.checked = Some(wanted.clone());
        }
        Ok(self.root.join(wanted))
    }

    /// Where a file goes; makes the directories above it. A symlink in its place is removed.
    fn parent_of(&mut self, relative: &[u8]) -> Result<PathBuf> {
        let at = relative.iter().rposition(|b| *b == b'/');
        let (directory, name) = match at {
            Some(at) => (&relative[..at], &relative[at + 1..]),
            None => (&[][..], relative),
        };
        let path = self.directory(directory)?.join(OsStr::from_bytes(name));
        if fs::symlink_metadata(&path).is_ok_and(|m| m.is_symlink()) {
            fs::remove_file(&path).with_context(|| path.display().to_string())?;
        }
        Ok(path)
    }
}

/// Counts what was fetched, says what was not.
#[derive(Default)]
struct Tally {
    fetched: u64,
    bytes: u64,
    problems: u64,
    verbose: bool,
    /// As it was typed.
    shard: String,
}

impl Tally {
    fn count(&mut self, progress: &Progress, key: &[u8], result: Result<u64>) -> Result<()> {
        match result {
            Ok(bytes) => {
                self.fetched += 1;
                self.bytes += bytes;
                if self.verbose {
                    progress.note(&printable(key));
                }
                Ok(())
            }
            Err(failure) => {
                let failure = failure.context(format!("get {}/{}", self.shard, printable(key)));
                if failure.reason().is_some_and(ends_everything) {
                    return Err(failure);
                }
                self.problems += 1;
                progress.note(&format!("error: {failure}"));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn destinations() {
        let temp = tempfile::tempdir().unwrap();
        let source = RemotePath::parse(OsStr::new("s/d/x")).unwrap();
        let dir = temp.path();
        assert_eq!(file_destination(&source, None), Path::new("x"));
        assert_eq!(file_destination(&source, Some(dir)), dir.join("x"));
        assert_eq!(file_destination(&source, Some(&dir.join("y"))), dir.join("y"));
        assert_eq!(file_destination(&source, Some(Path::new("new/"))), Path::new("new/x"));
        assert_eq!(file_destination(&source, Some(Path::new("."))), Path::new("./x"));
        assert_eq!(directory_destination(&source, Some(dir)), dir);
        assert_eq!(directory_destination(&source, Some(Path::new("new/"))), Path::new("new/x"));
    }

    #[test]
    fn a_partial_file_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let dest = temp.path().join("x");
        let mut partial = Partial::new(&dest).unwrap();
        partial.piece(&Bytes::from_static(b"half")).unwrap();
        drop(partial);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
        let mut partial = Partial::new(&dest).unwrap();
        partial.piece(&Bytes::from_static(b"wrong")).unwrap();
        assert!(partial.restart().unwrap());
        partial.piece(&Bytes::from_static(b"all")).unwrap();
        partial.name(true).unwrap();
        assert_eq!(fs::read(&dest).unwrap(), b"all");
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
    }

    #[test]
    fn nothing_is_written_through_symlinks() {
        let temp = tempfile::tempdir().unwrap();
        let (root, outside) = (temp.path().join("root"), temp.path().join("outside"));
        fs::create_dir(&root).unwrap();
        fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, root.join("link")).unwrap();
        let mut local = LocalTree { root: root.clone(), checked: None };
        assert!(
            local.parent_of(b"link/x").unwrap_err().message().ends_with("is in the way and no directory")
        );
        assert!(local.directory(b"../outside/y").is_err());
        assert_eq!(local.parent_of(b"a/b/c").unwrap(), root.join("a/b/c"));
        assert!(root.join("a/b").is_dir());
        assert_eq!(local.parent_of(b"link").unwrap(), root.join("link"));
        assert!(!root.join("link").exists() && outside.exists());
    }

    #[test]
    fn old_times_survive() {
        let temp = tempfile::tempdir().unwrap();
        let file = File::create(temp.path().join("x")).unwrap();
        for (seconds, nanos) in [(0, 0), (-1, 500_000_000), (1_795_231_445, 123_456_789)] {
            let time = system_time(Timestamp::new(seconds, nanos).unwrap());
            file.set_times(FileTimes::new().set_modified(time)).unwrap();
            use std::os::unix::fs::MetadataExt;
            let meta = file.metadata().unwrap();
            assert_eq!((meta.mtime(), meta.mtime_nsec()), (seconds, i64::from(nanos)));
        }
    }
}
