//! `shardfs rm`: keys, and directories with everything in them.

use std::ffi::OsString;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use shardfs_proto::client::Client;
use shardfs_proto::types::op::{Durability, Operation};
use shardfs_proto::types::{Cookie, FileKind, FileName, InodeNo, Reason, ShardId};

use super::progress::Progress;
use super::remote::{ends_everything, find_shard, resolve_if_there};
use crate::context::Context;
use crate::failure::{EXIT_FAILURE, Failure, Result};
use crate::paths::RemotePath;

/// Entries of one look into a directory.
const PAGE: u32 = 1024;
/// Removals at a time.
const JOBS_MAX: u64 = 512;

/// `shardfs rm`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  shardfs rm photos/cat.jpg
  shardfs rm -r photos/2025           the directory and all that is in it
  shardfs rm -r photos/               all that is in the shard; `shardfs shard delete` removes the shard too
  shardfs rm -f photos/maybe          no error if it is not there

Removing a key also removes directories that are left empty by it and that were made by `put`.")]
pub struct Args {
    /// SHARD/KEY
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<OsString>,
    /// Directories with everything in them
    #[arg(long, short)]
    recursive: bool,
    /// What is not there is no error
    #[arg(long, short)]
    force: bool,
    /// Removals at a time
    #[arg(long, short, default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=JOBS_MAX))]
    jobs: u64,
    /// Say what was removed
    #[arg(long, short)]
    verbose: bool,
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let paths = args.paths.iter().map(|p| RemotePath::parse(p)).collect::<Result<Vec<_>>>()?;
    for path in &paths {
        if path.rest().is_empty() && !(args.recursive && path.trailing_slash) {
            let shard = &path.shard;
            return Err(Failure::usage(format!("{shard} is a shard")).hint(format!(
                "`shardfs shard delete {shard}` deletes it; `shardfs rm -r {shard}/` empties it"
            )));
        }
    }
    let client = context.client()?;
    let mut failed = 0;
    for path in &paths {
        if let Err(failure) = remove(&client, path, &args).await {
            let failure = failure.context(format!("rm {path}"));
            if paths.len() == 1 || failure.reason().is_some_and(ends_everything) {
                return Err(failure);
            }
            crate::output::note(failure.render().trim_end());
            failed += 1;
        }
    }
    if failed > 0 { Err(Failure::silent(EXIT_FAILURE)) } else { Ok(()) }
}

async fn remove(client: &Client, path: &RemotePath, args: &Args) -> Result<()> {
    let shard = match find_shard(client, &path.shard).await {
        Ok(info) => info.id,
        Err(e) if args.force && e.reason() == Some(Reason::ShardNotFound) => return Ok(()),
        Err(e) => return Err(e),
    };
    let removal = Removal { client, shard, jobs: args.jobs as usize, progress: Progress::count("removing") };
    let Some(key) = path.key() else {
        removal.contents(InodeNo::ROOT).await?;
        return Ok(client.sync(shard).await?);
    };
    if !path.trailing_slash {
        match client.delete(shard, &key, Durability::Sync).await {
            Ok(_) => {
                if args.verbose {
                    removal.progress.note(&format!("removed {path}"));
                }
                return Ok(());
            }
            Err(e) if e.reason() == Reason::NotFound && args.force => return Ok(()),
            // A directory, symlink, FIFO, socket or device: no value, but a name that can be removed.
            Err(e) if matches!(e.reason(), Reason::IsDirectory | Reason::WrongKind) => {}
            Err(e) => return Err(e.into()),
        }
    }
    let Some((parent, attr)) = resolve_if_there(client, shard, &key).await? else {
        return if args.force { Ok(()) } else { Err(Failure::new("not there")) };
    };
    let name = key.split_last().1;
    if attr.kind == FileKind::Directory {
        if !args.recursive {
            return Err(Failure::new("is a directory").hint("-r removes it with everything in it"));
        }
        removal.contents(attr.inode).await?;
        let operation = Operation::RemoveDirectory { parent, name };
        client.mutate(shard, operation, Durability::Buffered).await?;
    } else if path.trailing_slash {
        return Err(Failure::new("is no directory"));
    } else {
        client.mutate(shard, Operation::Unlink { parent, name }, Durability::Buffered).await?;
    }
    client.sync(shard).await?;
    if args.verbose {
        removal.progress.note(&format!("removed {path}"));
    }
    Ok(())
}

struct Removal<'a> {
    client: &'a Client,
    shard: ShardId,
    jobs: usize,
    progress: Progress,
}

/// A directory on the way down.
struct Level {
    inode: InodeNo,
    /// Where it hangs; `None`: the directory that stays.
    name: Option<(InodeNo, FileName)>,
    after: Cookie,
    /// Its page of subdirectories that are still to be entered.
    directories: Vec<(InodeNo, FileName)>,
    end: bool,
}

impl Removal<'_> {
    /// Empties a directory, depth first; holds a page of each directory on the way down. Not synced.
    async fn contents(&self, directory: InodeNo) -> Result<()> {
        let level =
            |inode, name| Level { inode, name, after: Cookie::new(0), directories: Vec::new(), end: false };
        let mut stack = vec![level(directory, None)];
        while let Some(top) = stack.last_mut() {
            if let Some((inode, name)) = top.directories.pop() {
                let parent = top.inode;
                stack.push(level(inode, Some((parent, name))));
            } else if !top.end {
                let page = self.client.read_directory(self.shard, top.inode, top.after, PAGE, false).await?;
                top.end = page.end || page.entries.is_empty();
                let mut names = Vec::new();
                for entry in page.entries {
                    top.after = entry.cookie;
                    let name = FileName::new(entry.name)?;
                    if entry.kind == FileKind::Directory {
                        top.directories.push((entry.inode, name));
                    } else {
                        names.push(name);
                    }
                }
                let inode = top.inode;
                self.unlink(inode, names).await?;
            } else {
                let name = top.name.take();
                stack.pop();
                if let Some((parent, name)) = name {
                    self.apply(Operation::RemoveDirectory { parent, name }).await?;
                }
            }
        }
        Ok(())
    }

    async fn unlink(&self, parent: InodeNo, names: Vec<FileName>) -> Result<()> {
        let mut running = FuturesUnordered::new();
        for name in names {
            running.push(self.apply(Operation::Unlink { parent, name }));
            if running.len() >= self.jobs
                && let Some(result) = running.next().await
            {
                result?;
            }
        }
        while let Some(result) = running.next().await {
            result?;
        }
        Ok(())
    }

    /// Somebody else may have been faster.
    async fn apply(&self, operation: Operation) -> Result<()> {
        match self.client.mutate(self.shard, operation, Durability::Buffered).await {
            Ok(_) => {
                self.progress.add(1);
                Ok(())
            }
            Err(e) if e.reason() == Reason::NotFound => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}
