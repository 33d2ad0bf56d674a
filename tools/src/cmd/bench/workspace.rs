//! What a run leaves behind: nothing. The directory of its own that a run works in, and how a run is stopped.
//!
//! A benchmark writes only below a [`Workspace`], a fresh directory inside the directory it was given, and
//! removes it when it ends, fails or is interrupted. Work that takes long asks [`Stop::check`] between calls.

use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::{Context as _, Result, bail};
use shardfs_proto::client::Client;
use shardfs_proto::types::ShardName;
use shardfs_proto::types::cluster::{NewShard, ShardInfo};

/// Start of the name of every directory, shard and file that a benchmark makes outside of one.
pub const NAME_PREFIX: &str = "shardfs-bench-";

/// Permission bits of the shards that are made.
const SHARD_MODE: u32 = 0o700;

/// Says whether the run should end early. Clones share the answer.
#[derive(Clone, Default)]
pub struct Stop(Arc<AtomicU8>);

impl Stop {
    /// Asks the run to end; the command will end with this code.
    pub fn request(&self, exit_code: u8) {
        self.0.store(exit_code, Ordering::Relaxed);
    }

    /// The exit code for which somebody asked.
    pub fn exit_code(&self) -> Option<u8> {
        Some(self.0.load(Ordering::Relaxed)).filter(|code| *code != 0)
    }

    /// Whether somebody asked.
    pub fn requested(&self) -> bool {
        self.exit_code().is_some()
    }

    /// An error once somebody asked.
    pub fn check(&self) -> Result<()> {
        if self.requested() {
            bail!("interrupted: no result; what the benchmark made is being removed");
        }
        Ok(())
    }
}

/// A name that no other run has.
pub fn unique_name() -> String {
    format!("{NAME_PREFIX}{}-{:08x}", std::process::id(), fastrand::u32(..))
}

/// Makes a shard of this run's own, of that name, wherever there is most room.
pub async fn new_shard(client: &Client, name: &str) -> Result<ShardInfo> {
    let new = NewShard {
        name: ShardName::new(name)?,
        limit_bytes: None,
        mode: SHARD_MODE,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        request_id: name.to_owned(),
    };
    client.new_shard(&new).await.context("cannot make a shard for the benchmark")
}

/// A directory of this run's own. [`Workspace::remove`] it to hear of errors; dropping it removes it as well and
/// prints them.
pub struct Workspace {
    path: PathBuf,
    removed: bool,
}

impl Workspace {
    /// Makes it inside `parent`.
    pub fn new(parent: &Path) -> Result<Workspace> {
        let path = parent.join(unique_name());
        std::fs::DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .with_context(|| format!("cannot make a directory in {}", parent.display()))?;
        Ok(Workspace { path, removed: false })
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it with everything below.
    pub fn remove(mut self) -> Result<()> {
        self.removed = true;
        remove(&self.path)
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        if !self.removed
            && let Err(error) = remove(&self.path)
        {
            eprintln!("shardfs bench: {error:#}");
        }
    }
}

fn remove(path: &Path) -> Result<()> {
    std::fs::remove_dir_all(path)
        .with_context(|| format!("cannot remove {}: remove it yourself with `rm -r`", path.display()))
}

/// How a cold state is made for reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cold {
    /// The kernel's caches of the whole machine are dropped: needs root.
    DropCaches,
    /// The pages of the file itself are given up (`fadvise`); names and attributes stay cached.
    Fadvise,
}

impl Cold {
    /// The best that this process may do.
    pub fn best() -> Cold {
        if std::fs::OpenOptions::new().write(true).open(DROP_CACHES).is_ok() {
            Cold::DropCaches
        } else {
            Cold::Fadvise
        }
    }

    /// For the head of a report.
    pub fn as_str(self) -> &'static str {
        match self {
            Cold::DropCaches => "drop_caches (kernel caches; a server's own memory stays warm)",
            Cold::Fadvise => "fadvise (pages of the file only: not root)",
        }
    }

    /// Makes what is on stable storage cold: all of it, or the pages of `file`.
    pub fn make(self, file: Option<&std::fs::File>) -> Result<()> {
        if let Some(file) = file {
            rustix::fs::fsync(file).context("fsync")?;
            rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed).context("fadvise")?;
        }
        if self == Cold::DropCaches {
            rustix::fs::sync();
            std::fs::write(DROP_CACHES, "3").with_context(|| format!("cannot write {DROP_CACHES}"))?;
        }
        Ok(())
    }
}

const DROP_CACHES: &str = "/proc/sys/vm/drop_caches";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_workspace_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let kept = Workspace::new(dir.path()).unwrap();
        std::fs::create_dir(kept.path().join("sub")).unwrap();
        std::fs::write(kept.path().join("sub/file"), "x").unwrap();
        let dropped = Workspace::new(dir.path()).unwrap();
        assert_ne!(kept.path(), dropped.path());
        drop(dropped);
        kept.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_missing_parent_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let error = Workspace::new(&dir.path().join("none")).err().unwrap();
        assert!(format!("{error:#}").contains("none"));
    }

    #[test]
    fn a_stop_reaches_every_clone() {
        let stop = Stop::default();
        let other = stop.clone();
        other.check().unwrap();
        stop.request(crate::failure::EXIT_INTERRUPTED);
        assert!(other.check().is_err());
    }
}
