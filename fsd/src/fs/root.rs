//! The root of the mount: its directories are the client id's shards.
//!
//! - `mkdir` makes a shard with the caller as owner, `rmdir` deletes one whose root directory is empty.
//! - `rename` within the root renames a shard; a target that is there is EEXIST, empty or not: replacing a
//!   shard would take two steps, of which a crash could leave the first.
//! - `chmod` that leaves nobody a write bit on a shard's root directory closes the shard for good; there
//!   is no way back, and asking for one is EROFS.
//! - Nothing else can stand in the root: making a file, link, symlink or device is EPERM.
//!
//! A shard that another client makes, renames or deletes shows at the next lookup: the kernel keeps no
//! names of the root.

use std::collections::HashMap;
use std::pin::pin;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use shardfs_proto::types::cluster::{NewShard, ShardInfo};
use shardfs_proto::types::name::VIRTUAL_DIRECTORY;
use shardfs_proto::types::op::{SetAttr, ShardState};
use shardfs_proto::types::{
    Attr, Error, FileKind, GlobalInode, InodeNo, NodeId, Reason, ShardId, ShardName, Timestamp, Version,
    clock,
};

use super::dirs::FIRST_OFFSET;
use super::names::check_length;
use super::shards::OwnChange;
use super::types::{BLOCK_BYTES, Caller, DirItem, Entry, FileStat, Node, RenameMode, Space, Ttl};
use super::virtual_dir::VirtualNode;
use super::{Fs, WRITE_BITS};
use crate::failure::{Failure, Outcome, Posix};

/// The age to which the number of shards, which the root's nlink tells, is not asked for again.
const COUNT_AGE_MAX: Duration = Duration::from_secs(1);
/// How long stat of the root waits for the nodes; after that it tells what it knew last.
const COUNT_WAIT_MAX: Duration = Duration::from_secs(2);
/// How long the attributes of a shard's directory are waited for before it is asked whether its node is away,
/// and how long it is then waited for less.
const SHARD_WAIT_MAX: Duration = Duration::from_secs(2);
const AWAY_AGE_MAX: Duration = Duration::from_secs(5);
/// The wait while the node is known to be away.
const AWAY_WAIT_MAX: Duration = Duration::from_millis(20);
/// Shards whose attributes are remembered; when there are more, all are forgotten.
const SEEN_MAX: usize = 16_384;
/// Permission bits that are shown of a shard whose node is away and whose attributes this mount has never seen.
const AWAY_MODE: u32 = 0o755;
/// How long statfs of the root waits for each node; one that does not answer is left out.
const SPACE_WAIT_MAX: Duration = Duration::from_secs(2);

/// What is remembered of the root.
#[derive(Default)]
pub struct RootState {
    known: Mutex<Known>,
    /// When a node was last found to be away.
    away: Mutex<HashMap<NodeId, Instant>>,
    /// The attributes that shards' directories had last, to show while their node is away.
    seen: Mutex<HashMap<ShardId, Attr>>,
}

#[derive(Default)]
struct Known {
    shards: u32,
    counted: Option<Instant>,
    changed: Option<Timestamp>,
}

impl RootState {
    fn counted(&self, shards: u32) {
        let mut known = self.known.lock();
        if known.counted.is_some() && known.shards != shards {
            known.changed = Some(clock::now());
        }
        known.shards = shards;
        known.counted = Some(clock::monotonic());
    }

    fn changed(&self) {
        let mut known = self.known.lock();
        known.changed = Some(clock::now());
        known.counted = None;
    }
}

impl Fs {
    /// The root's attributes.
    pub(super) async fn root_stat(&self) -> (FileStat, Duration) {
        let fresh = {
            let known = self.root.known.lock();
            known.counted.is_some_and(|at| clock::monotonic().duration_since(at) < COUNT_AGE_MAX)
        };
        if !fresh
            && let Ok(Ok(shards)) = tokio::time::timeout(COUNT_WAIT_MAX, self.client.list_shards()).await
        {
            self.root.counted(shards.len().try_into().unwrap_or(u32::MAX - 2));
        }
        let known = self.root.known.lock();
        let changed = known.changed.unwrap_or(self.started);
        let stat = FileStat {
            ino: GlobalInode::ROOT,
            kind: FileKind::Directory,
            mode: self.settings.root_mode,
            nlink: known.shards.saturating_add(2),
            uid: self.settings.uid,
            gid: self.settings.gid,
            rdev: 0,
            size: u64::from(BLOCK_BYTES),
            blocks: 0,
            atime: changed,
            mtime: changed,
            ctime: changed,
            btime: self.started,
            has_acl: Some(false),
        };
        (stat, COUNT_AGE_MAX)
    }

    /// `.` and `..` of the root, then its shards in the order of their ids.
    pub(super) async fn root_items(&self) -> Outcome<Vec<DirItem>> {
        let mut shards = self.client.list_shards().await?;
        self.root.counted(shards.len().try_into().unwrap_or(u32::MAX - 2));
        shards.retain(|info| matches!(info.state, ShardState::Active | ShardState::ReadOnly));
        shards.sort_by_key(|info| info.id);
        let item = |ino, name: &'static [u8], offset| DirItem {
            ino,
            kind: FileKind::Directory,
            name: Bytes::from_static(name),
            offset,
            entry: None,
        };
        let mut items = vec![item(GlobalInode::ROOT, b".", 1), item(GlobalInode::ROOT, b"..", 2)];
        items.extend(shards.into_iter().map(|info| {
            self.shards.learn(&info);
            DirItem {
                ino: GlobalInode::new(info.id, InodeNo::ROOT),
                kind: FileKind::Directory,
                offset: FIRST_OFFSET + info.id.get(),
                name: Bytes::from(info.name.as_str().to_owned()),
                entry: None,
            }
        }));
        Ok(items)
    }

    pub(super) async fn lookup_in_root(&self, name: &[u8]) -> Outcome<Entry> {
        check_length(name)?;
        if name == VIRTUAL_DIRECTORY.as_bytes() {
            return self.virtual_entry(VirtualNode::Directory).await;
        }
        // What cannot be a shard's name is not there.
        let name = ShardName::from_bytes(name).map_err(|_| Posix::NoEntry)?;
        let guess = self.shards.guess(&name);
        let (info, attr) = match guess {
            Some(id) => {
                let closed = self.shards.is_closed(id);
                let mut asked = pin!(self.client.get_attr(id, InodeNo::ROOT));
                let early = tokio::time::timeout(AWAY_WAIT_MAX, asked.as_mut());
                let (info, early) = tokio::join!(self.shard_named(&name), early);
                let info = info?;
                match early {
                    _ if info.id != id => self.with_root_attr(info).await,
                    Ok(attr) => {
                        self.saw(id, &attr);
                        (info, (closed, attr))
                    }
                    Err(_) => {
                        let attr = self.unless_away(&info, asked).await;
                        (info, (closed, attr))
                    }
                }
            }
            None => {
                let info = self.shard_named(&name).await?;
                self.with_root_attr(info).await
            }
        };
        let (closed, attr) = attr;
        let attr = attr.map_err(gone_is_no_entry)?;
        Ok(self.root_entry(info.id, closed, &attr))
    }

    async fn with_root_attr(&self, info: ShardInfo) -> (ShardInfo, (bool, Result<Attr, Error>)) {
        let closed = self.shards.is_closed(info.id);
        let asked = pin!(self.client.get_attr(info.id, InodeNo::ROOT));
        let attr = self.unless_away(&info, asked).await;
        (info, (closed, attr))
    }

    /// What was asked of a shard's node; while the cluster says that the node is away, what is known without it.
    /// So one node that is away makes nobody wait who looks at the root: the kernel lets no name be made
    /// there while another is looked up.
    async fn unless_away(
        &self,
        info: &ShardInfo,
        mut asked: std::pin::Pin<&mut impl Future<Output = Result<Attr, Error>>>,
    ) -> Result<Attr, Error> {
        let Some(node) = &info.location.node else { return asked.await };
        let is_fresh = |at: &Instant| clock::monotonic().duration_since(*at) < AWAY_AGE_MAX;
        loop {
            let away = self.root.away.lock().get(node).is_some_and(is_fresh);
            let wait = if away { AWAY_WAIT_MAX } else { SHARD_WAIT_MAX };
            if let Ok(answer) = tokio::time::timeout(wait, asked.as_mut()).await {
                self.root.away.lock().remove(node);
                self.saw(info.id, &answer);
                return answer;
            }
            if self.is_away(node).await {
                let seen = self.root.seen.lock().get(&info.id).cloned();
                return Ok(seen.unwrap_or_else(|| away_attr(info, self.settings.uid, self.settings.gid)));
            }
        }
    }

    fn saw(&self, shard: ShardId, answer: &Result<Attr, Error>) {
        let Ok(attr) = answer else { return };
        let mut seen = self.root.seen.lock();
        if seen.len() >= SEEN_MAX {
            seen.clear();
        }
        seen.insert(shard, attr.clone());
    }

    /// Whether the other nodes miss its heartbeat.
    async fn is_away(&self, node: &NodeId) -> bool {
        let Ok(Ok(nodes)) = tokio::time::timeout(SHARD_WAIT_MAX, self.client.nodes()).await else {
            return false;
        };
        let away = nodes.iter().any(|info| info.id == *node && !info.alive);
        let mut known = self.root.away.lock();
        if away {
            known.insert(node.clone(), clock::monotonic());
        } else {
            known.remove(node);
        }
        away
    }

    /// A shard's entry in the root: the name is never kept by the kernel longer than the settings say.
    pub(super) fn root_entry(&self, shard: ShardId, closed: bool, attr: &Attr) -> Entry {
        let ttl = self.ttl(closed, attr.inode, attr.kind);
        Entry { stat: self.stat(shard, attr), ttl: Ttl { entry: self.settings.entry_ttl, ..ttl } }
    }

    /// The shard of that name, with what this mount itself changed a moment ago laid over the node's answer.
    async fn shard_named(&self, name: &ShardName) -> Outcome<ShardInfo> {
        let told = self.client.shard_by_name(name).await;
        let own = self.shards.own_change(name);
        let info = match (told, own) {
            (Ok(info), Some(OwnChange::Removed(id))) if info.id == id => {
                // The node may not know yet that the shard has another name, or is gone.
                let now = self.client.shard(id).await.map_err(gone_is_no_entry)?;
                if now.name != *name {
                    return Err(Posix::NoEntry.into());
                }
                now
            }
            (Err(error), Some(OwnChange::Made(id))) if error.reason() == Reason::ShardNotFound => {
                let now = self.client.shard(id).await.map_err(gone_is_no_entry)?;
                if now.name != *name {
                    return Err(Posix::NoEntry.into());
                }
                now
            }
            (told, _) => told.map_err(gone_is_no_entry)?,
        };
        match info.state {
            ShardState::Active | ShardState::ReadOnly => {
                self.shards.learn(&info);
                Ok(info)
            }
            ShardState::Creating | ShardState::Deleted => Err(Posix::NoEntry.into()),
        }
    }

    pub(super) async fn make_shard(&self, caller: Caller, name: &[u8], mode: u32) -> Outcome<Entry> {
        check_length(name)?;
        if name == VIRTUAL_DIRECTORY.as_bytes() {
            return Err(Posix::Exists.into());
        }
        let name = ShardName::from_bytes(name)?;
        let new = NewShard {
            name: name.clone(),
            limit_bytes: None,
            mode,
            uid: caller.uid,
            gid: caller.gid,
            request_id: String::new(),
        };
        let info = self.client.new_shard(&new).await?;
        self.shards.changed(&name, OwnChange::Made(info.id));
        self.shards.learn(&info);
        self.root.changed();
        let attr = self.client.get_attr(info.id, InodeNo::ROOT).await?;
        Ok(self.root_entry(info.id, false, &attr))
    }

    pub(super) async fn remove_shard(&self, name: &[u8]) -> Outcome<()> {
        if name == VIRTUAL_DIRECTORY.as_bytes() {
            return Err(Posix::NotPermitted.into());
        }
        let name = ShardName::from_bytes(name).map_err(|_| Posix::NoEntry)?;
        let info = self.shard_named(&name).await?;
        self.client.delete_shard(info.id, true).await.map_err(gone_is_no_entry)?;
        self.unsynced.lock().remove(&info.id);
        self.shards.changed(&name, OwnChange::Removed(info.id));
        self.root.changed();
        Ok(())
    }

    pub(super) async fn rename_shard(&self, name: &[u8], new_name: &[u8], mode: RenameMode) -> Outcome<()> {
        check_length(new_name)?;
        let reserved = VIRTUAL_DIRECTORY.as_bytes();
        if name == reserved || new_name == reserved {
            return Err(Posix::NotPermitted.into());
        }
        if mode.exchange {
            return Err(Posix::Invalid.into());
        }
        let name = ShardName::from_bytes(name).map_err(|_| Posix::NoEntry)?;
        let new_name = ShardName::from_bytes(new_name)?;
        let info = self.shard_named(&name).await?;
        let renamed = self.client.rename_shard(info.id, &new_name).await.map_err(gone_is_no_entry)?;
        self.shards.changed(&name, OwnChange::Removed(info.id));
        self.shards.changed(&new_name, OwnChange::Made(info.id));
        self.shards.learn(&renamed);
        self.root.changed();
        Ok(())
    }

    /// Why nothing can be unlinked in the root.
    pub(super) fn no_file_in_root(&self, name: &[u8]) -> Failure {
        let there = self.shards.guess(&match ShardName::from_bytes(name) {
            Ok(name) => name,
            Err(_) => return Posix::NoEntry.into(),
        });
        if there.is_some() { Posix::IsDirectory.into() } else { Posix::NoEntry.into() }
    }

    /// Changes the mode of a shard's root directory, and maybe closes the shard.
    pub(super) async fn set_shard_mode(&self, shard: ShardId, set: SetAttr, mode: u32) -> Outcome<FileStat> {
        let info = self.client.shard(shard).await?;
        self.shards.learn(&info);
        let closing = mode & WRITE_BITS == 0;
        if info.state == ShardState::ReadOnly {
            let attr = self.client.get_attr(shard, InodeNo::ROOT).await?;
            let stat = self.stat(shard, &attr);
            let alone = set == SetAttr { mode: Some(mode), ..SetAttr::default() };
            if closing && alone && stat.mode == mode {
                return Ok(stat);
            }
            return Err(Posix::ReadOnly.into());
        }
        let stat = self.set_attr_in_shard(shard, InodeNo::ROOT, None, set).await?;
        if closing {
            let closed = self.client.close_shard(shard).await?;
            self.shards.learn(&closed);
            self.shards.close(shard);
            self.unsynced.lock().remove(&shard);
            tracing::info!(%shard, name = %closed.name, "closed for good");
        }
        Ok(stat)
    }

    /// Space of a shard: its limit, or its volume's room; of the rest, the sum over the volumes.
    pub async fn space(&self, ino: u64) -> Outcome<Space> {
        let block = u64::from(BLOCK_BYTES);
        let shard = match self.node(ino)? {
            Node::InShard(shard, _) | Node::Snapshots(shard) => shard,
            Node::Root | Node::Virtual(_) => return self.space_of_volumes().await,
        };
        let stat = self.client.stat_shard(shard).await?;
        let free_inodes = InodeNo::MAX.get() - stat.inodes_used.min(InodeNo::MAX.get());
        Ok(Space {
            blocks: stat.total_bytes / block,
            free_blocks: stat.free_bytes / block,
            available_blocks: stat.available_bytes / block,
            inodes: stat.inodes_used.saturating_add(free_inodes),
            free_inodes,
        })
    }

    async fn space_of_volumes(&self) -> Outcome<Space> {
        let nodes = self.client.nodes().await?;
        let asked = nodes.iter().filter(|node| node.alive).map(|node| async move {
            tokio::time::timeout(SPACE_WAIT_MAX, self.client.node_status(&node.endpoints)).await
        });
        let (mut total, mut free) = (0u64, 0u64);
        for status in futures::future::join_all(asked).await.into_iter().flatten().flatten() {
            for volume in status.volumes {
                total = total.saturating_add(volume.total_bytes);
                free = free.saturating_add(volume.free_bytes);
            }
        }
        let block = u64::from(BLOCK_BYTES);
        let shards = u64::from(self.root.known.lock().shards);
        let free_inodes = ShardId::MAX.get() - shards.min(ShardId::MAX.get());
        Ok(Space {
            blocks: total / block,
            free_blocks: free / block,
            available_blocks: free / block,
            inodes: shards.saturating_add(free_inodes),
            free_inodes,
        })
    }
}

/// A shard that is not there is a name that is not there.
pub(super) fn gone_is_no_entry(error: Error) -> Failure {
    match error.reason() {
        Reason::ShardNotFound | Reason::ShardDeleted => Posix::NoEntry.into(),
        _ => error.into(),
    }
}

/// A shard's directory as it looks while its node is away.
fn away_attr(info: &ShardInfo, uid: u32, gid: u32) -> Attr {
    Attr {
        inode: InodeNo::ROOT,
        kind: FileKind::Directory,
        mode: AWAY_MODE,
        uid,
        gid,
        nlink: 2,
        size: u64::from(BLOCK_BYTES),
        blocks: 0,
        rdev: 0,
        atime: info.created,
        mtime: info.created,
        ctime: info.created,
        btime: info.created,
        version: Version::new(0),
        // Or `ls -l` would wait for the node after all.
        has_acl: Some(false),
    }
}
