//! What the mount means: every request of the kernel as an operation of its own, free of fuser.
//!
//! The root of the mount holds the client id's shards (`root`) and the virtual directory
//! (`virtual_dir`); below a shard's root, requests become calls of the client (`names`, `attrs`, `files`,
//! `locks`, `dirs`). `.snap` at a shard's root holds its snapshots (`snapshots`): closed shards, with other numbers than its own.
//!
//! What the kernel may keep, and until when:
//! - Names and attributes in an active shard: not at all, unless the settings say otherwise. A change by
//!   anyone shows at once. Directories' attributes are good for one clock tick, so that the permission
//!   check that follows a lookup costs nothing; a lookup always brings fresh ones.
//! - In a closed shard: [`CLOSED_TTL`], since nothing changes there. The shard's own name is the
//!   exception: a closed shard can be renamed and deleted.
//! - Pages: a file's pages outlive its close if its version is the same when it is opened again, and was no
//!   other between (`pages`); the kernel drops them itself when it sees another size or modification time, and it
//!   looks at every read. It is told to when a file has become older than it was.
//!
//! Whether a shard is closed is asked *before* the call whose answer is to be kept.

pub mod attrs;
pub mod dirs;
mod files;
mod json;
pub mod locks;
mod memo;
pub mod names;
mod newborn;
mod pages;
mod root;
mod second_look;
mod shards;
mod snapshots;
pub mod types;
pub mod virtual_dir;

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use parking_lot::Mutex;
use shardfs_proto::client::{Client, ReadCounts};
use shardfs_proto::types::op::{Durability, OpResult, Operation};
use shardfs_proto::types::{
    Attr, ClientId, Error, FileKind, GlobalInode, InodeNo, ShardId, Timestamp, clock,
};

use crate::failure::{Outcome, Posix};
use crate::handles::{Handles, Releaser};
use memo::Memo;
use newborn::Newborn;
use pages::Pages;
use root::RootState;
use second_look::SecondLook;
use shards::Shards;
use types::{Entry, FileStat, Node, Ttl};
use virtual_dir::{VirtualNode, VirtualState};

/// How long the kernel may answer from a closed shard by itself.
pub const CLOSED_TTL: Duration = Duration::from_secs(3600);
/// The shortest time that the kernel can keep something: until the clock ticks next.
const ONE_TICK: Duration = Duration::from_nanos(1);
/// The bits that let somebody write.
const WRITE_BITS: u32 = 0o222;

/// How a mount behaves.
#[derive(Clone, Debug)]
pub struct FsSettings {
    /// Where it is mounted, for people.
    pub mount_point: PathBuf,
    /// For whom it acts.
    pub client_id: ClientId,
    /// The nodes it was told of, for people.
    pub endpoints: Vec<String>,
    /// How long the kernel may keep attributes of active shards.
    pub attr_ttl: Duration,
    /// How long the kernel may keep names of active shards.
    pub entry_ttl: Duration,
    /// Permission bits of the root of the mount.
    pub root_mode: u32,
    /// Owner of the root and of the virtual directory.
    pub uid: u32,
    /// Group of the root and of the virtual directory.
    pub gid: u32,
    /// Every change is durable when it is answered (mount options `sync`, `dirsync`).
    pub sync_changes: bool,
}

/// Has the kernel drop the pages of a file. Does not wait for it.
pub type PageDropper = Box<dyn Fn(GlobalInode) + Send + Sync>;

/// A mount.
pub struct Fs {
    client: Client,
    settings: FsSettings,
    handles: Handles,
    releaser: Releaser,
    shards: Shards,
    memo: Memo,
    second_look: SecondLook,
    pages: Pages,
    page_dropper: OnceLock<PageDropper>,
    newborn: Newborn,
    root: RootState,
    virtuals: VirtualState,
    /// Shards with changes that no sync of this mount has covered yet.
    unsynced: Mutex<HashSet<ShardId>>,
    started: Timestamp,
}

impl Fs {
    /// A mount for a client. To be called on the runtime on which the operations will run.
    pub fn new(client: Client, settings: FsSettings) -> Fs {
        let releaser = Releaser::start(client.clone());
        Fs {
            client,
            settings,
            handles: Handles::default(),
            releaser,
            shards: Shards::default(),
            memo: Memo::default(),
            second_look: SecondLook::default(),
            pages: Pages::default(),
            page_dropper: OnceLock::new(),
            newborn: Newborn::default(),
            root: RootState::default(),
            virtuals: VirtualState::default(),
            unsynced: Mutex::default(),
            started: clock::now(),
        }
    }

    /// How the kernel is told to drop pages; the first one given counts.
    pub fn drop_pages_by(&self, dropper: PageDropper) {
        self.page_dropper.set(dropper).ok();
    }

    /// How many files and directories are open.
    pub fn open_handles(&self) -> usize {
        self.handles.len()
    }

    /// Whether a node answers.
    pub async fn reachable(&self, within: Duration) -> bool {
        self.client.reachable(within).await
    }

    /// Who answered the reads so far.
    pub fn read_counts(&self) -> ReadCounts {
        self.client.read_counts()
    }

    /// A thread asks something: what it looked up before was for something else.
    pub fn asks_anew(&self, thread: u32) {
        self.memo.discard(thread);
    }

    /// Makes durable what this mount changed and gives back what it holds open, or gives that up after `within`. Ends the sessions in
    /// any case, which has a bound of its own: what is locked or held open with other shards does not stay because of one that is away.
    pub async fn shut_down(&self, within: Duration) {
        let work = async {
            let shards: Vec<ShardId> = self.unsynced.lock().drain().collect();
            let syncs = shards.iter().map(|shard| async move {
                if let Err(error) = self.client.sync(*shard).await {
                    tracing::warn!(%shard, %error, "cannot sync before leaving; the node syncs within seconds");
                }
            });
            futures::future::join_all(syncs).await;
            self.releaser.drained().await;
        };
        if tokio::time::timeout(within, work).await.is_err() {
            tracing::warn!("left without an answer of every node");
        }
        self.client.close().await;
    }

    fn node(&self, ino: u64) -> Outcome<Node> {
        let global = GlobalInode::from_raw(ino);
        if global == GlobalInode::ROOT {
            return Ok(Node::Root);
        }
        if let Some(node) = VirtualNode::of(global) {
            return Ok(Node::Virtual(node));
        }
        if let Some(shard) = snapshots::shard_of(global) {
            return Ok(Node::Snapshots(shard));
        }
        let (shard, inode) = global.split().ok_or(Posix::Stale)?;
        Ok(Node::InShard(shard, inode))
    }

    /// The kernel is about to be shown these attributes.
    fn will_show(&self, shard: ShardId, attr: &Attr) {
        let ino = GlobalInode::new(shard, attr.inode);
        if self.pages.shown(ino, attr)
            && let Some(drop_pages) = self.page_dropper.get()
        {
            drop_pages(ino);
        }
    }

    /// What stat shows of an inode: a closed shard's root directory without write permission.
    fn stat(&self, shard: ShardId, attr: &Attr) -> FileStat {
        let mut stat = FileStat::of(shard, attr);
        if attr.inode == InodeNo::ROOT && self.shards.is_closed(shard) {
            stat.mode &= !WRITE_BITS;
        }
        stat
    }

    /// `closed`: whether the shard was known to be closed before the attributes were asked for.
    fn ttl(&self, closed: bool, inode: InodeNo, kind: FileKind) -> Ttl {
        if closed {
            let entry = if inode == InodeNo::ROOT { self.settings.entry_ttl } else { CLOSED_TTL };
            return Ttl { attr: CLOSED_TTL, entry };
        }
        let least = if kind == FileKind::Directory { ONE_TICK } else { Duration::ZERO };
        Ttl { attr: self.settings.attr_ttl.max(least), entry: self.settings.entry_ttl }
    }

    fn entry(&self, shard: ShardId, closed: bool, attr: &Attr) -> Entry {
        Entry { stat: self.stat(shard, attr), ttl: self.ttl(closed, attr.inode, attr.kind) }
    }

    /// The entry of something that was made or changed just now, in a shard that is therefore not closed.
    fn changed_entry(&self, shard: ShardId, result: OpResult) -> Outcome<Entry> {
        Ok(self.entry(shard, false, &attr_of(result)?))
    }

    async fn mutate(&self, shard: ShardId, operation: Operation, sync: bool) -> Outcome<OpResult> {
        self.mutate_through(None, shard, operation, sync).await
    }

    /// The same through an open file: fails if locks were lost on which its users may rely.
    async fn mutate_through(
        &self,
        handle: Option<u64>,
        shard: ShardId,
        operation: Operation,
        sync: bool,
    ) -> Outcome<OpResult> {
        let seen = handle.and_then(|handle| self.seen_lock_losses(handle));
        let durability =
            if sync || self.settings.sync_changes { Durability::Sync } else { Durability::Buffered };
        if durability == Durability::Buffered {
            self.unsynced.lock().insert(shard);
        }
        let changed = operation.changed_inode();
        let outcome = self.client.mutate_through(shard, operation, durability, seen).await;
        if let Some(inode) = changed {
            let attr = outcome.as_ref().ok().and_then(|result| result.attr.as_ref());
            self.pages.changed(GlobalInode::new(shard, inode), attr);
        }
        Ok(outcome?)
    }

    /// `seen`: losses that the file knows of; without, whoever comes first is told.
    async fn sync(&self, shard: ShardId, seen: Option<&AtomicU64>) -> Outcome<()> {
        if !self.shards.is_closed(shard) || self.client.is_sync_due(shard) {
            // Taken out first: what changes meanwhile puts it back in.
            self.unsynced.lock().remove(&shard);
            if let Err(error) = self.client.make_durable(shard).await {
                self.unsynced.lock().insert(shard);
                return Err(error.into());
            }
        }
        // Of a closed shard, closing has made everything durable.
        Ok(match seen {
            Some(seen) => self.client.check_losses(shard, seen),
            None => self.client.check_untold_losses(shard),
        }?)
    }
}

fn attr_of(result: OpResult) -> Outcome<Attr> {
    Ok(result.attr.ok_or_else(|| Error::internal("the node's answer lacks attributes"))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardfs_proto::client::ClientConfig;

    /// A mount whose node is away.
    pub(super) fn cut_off(deadline: Duration) -> Fs {
        let client_id = ClientId::new("test").unwrap();
        let endpoints = vec!["unix:/nonexistent/shardfs.sock".to_owned()];
        let config = ClientConfig { deadline, ..ClientConfig::new(endpoints.clone(), client_id.clone()) };
        let settings = FsSettings {
            mount_point: PathBuf::from("/mnt"),
            client_id,
            endpoints,
            attr_ttl: Duration::ZERO,
            entry_ttl: Duration::ZERO,
            root_mode: 0o755,
            uid: 0,
            gid: 0,
            sync_changes: false,
        };
        Fs::new(Client::new(config).unwrap(), settings)
    }

    #[tokio::test]
    async fn sessions_are_ended_although_a_shard_does_not_answer_before() {
        let fs = cut_off(shardfs_proto::client::DEADLINE_NEVER);
        let shard = ShardId::new(1).unwrap();
        fs.unsynced.lock().insert(shard);
        fs.shut_down(Duration::from_millis(50)).await;
        let error = fs.client.open(shard, InodeNo::ROOT).await.unwrap_err();
        assert_eq!(error.message(), "the client was closed");
    }
}
