//! What several commands ask of a cluster: a shard by what was typed, an inode by its path, trees.

use std::collections::HashMap;

use bytes::Bytes;
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::{Selector, ShardInfo};
use shardfs_proto::types::op::{Durability, NewInode, Operation};
use shardfs_proto::types::{Attr, FileKind, FileName, InodeNo, Key, Reason, ShardId};

use crate::failure::{Failure, OrFail, Result};
use crate::paths::ShardRef;

/// Directories that are remembered; when there are more, all are forgotten.
const DIRECTORIES_MAX: usize = 4096;

/// The shard or snapshot that was typed. What is a shard's name is one, whatever else it may be.
pub async fn find_shard(client: &Client, shard: &ShardRef) -> Result<ShardInfo> {
    let selector = match shard {
        ShardRef::Shard(selector) => selector,
        ShardRef::Snapshot(of, name) => {
            let of = find_selected(client, of).await?;
            return client.snapshot_by_name(of.id, name).await.map_err(Failure::from);
        }
    };
    let missing = match find_selected(client, selector).await {
        Err(error) if error.reason() == Reason::ShardNotFound => error,
        found => return found.map_err(Failure::from),
    };
    let Some((of, name)) = shard.as_snapshot() else { return Err(missing.into()) };
    match find_selected(client, &of).await {
        Ok(of) => client.snapshot_by_name(of.id, &name).await.map_err(Failure::from),
        // `a@b` where there is no shard `a`: a shard's name.
        Err(error) if error.reason() == Reason::ShardNotFound => Err(missing.into()),
        Err(error) => Err(error.into()),
    }
}

async fn find_selected(client: &Client, shard: &Selector) -> shardfs_proto::types::Result<ShardInfo> {
    match shard {
        Selector::Name(name) => client.shard_by_name(name).await,
        Selector::Id(id) => client.shard(*id).await,
    }
}

/// What a path names, whatever its kind; empty: the shard's root. Follows no symlinks.
pub async fn resolve(client: &Client, shard: ShardId, path: &[u8]) -> Result<Attr> {
    let mut attr = client.get_attr(shard, InodeNo::ROOT).await?;
    for component in path.split(|b| *b == b'/').filter(|c| !c.is_empty()) {
        if attr.kind != FileKind::Directory {
            return Err(Failure::new(format!(
                "{}: a component is no directory",
                crate::output::printable(path)
            )));
        }
        attr = client.lookup(shard, attr.inode, component).await?;
    }
    Ok(attr)
}

/// Like [`resolve`], with `None` for what is not there.
pub async fn resolve_if_there(client: &Client, shard: ShardId, key: &Key) -> Result<Option<(InodeNo, Attr)>> {
    let (directories, name) = key.split_last();
    let mut parent = InodeNo::ROOT;
    for directory in directories {
        match client.lookup(shard, parent, directory.as_bytes()).await {
            Ok(attr) if attr.kind == FileKind::Directory => parent = attr.inode,
            Ok(_) => return Ok(None),
            Err(e) if e.reason() == Reason::NotFound => return Ok(None),
            Err(e) => return Err(e.into()),
        }
    }
    match client.lookup(shard, parent, name.as_bytes()).await {
        Ok(attr) => Ok(Some((parent, attr))),
        Err(e) if e.reason() == Reason::NotFound => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Makes directories and symlinks below a shard's root, which Put cannot.
pub struct Tree {
    client: Client,
    shard: ShardId,
    root: Attr,
    known: HashMap<Bytes, InodeNo>,
}

impl Tree {
    /// Of a shard; what it makes belongs to the owner of the shard's root.
    pub async fn new(client: &Client, shard: ShardId) -> Result<Tree> {
        let root = client.get_attr(shard, InodeNo::ROOT).await?;
        Ok(Tree { client: client.clone(), shard, root, known: HashMap::new() })
    }

    /// The directory of a path, made with its parents where they are missing. Empty: the root.
    pub async fn directory(&mut self, path: &[u8], mode: u32, durability: Durability) -> Result<InodeNo> {
        let mut at = InodeNo::ROOT;
        let mut end = 0;
        for component in path.split(|b| *b == b'/').filter(|c| !c.is_empty()) {
            end += component.len() + usize::from(end > 0);
            let so_far = Bytes::copy_from_slice(&path[..end]);
            if let Some(inode) = self.known.get(&so_far) {
                at = *inode;
                continue;
            }
            at = self
                .child_directory(at, component, mode, durability)
                .await
                .with_context(|| crate::output::printable(&so_far))?;
            if self.known.len() >= DIRECTORIES_MAX {
                self.known.clear();
            }
            self.known.insert(so_far, at);
        }
        Ok(at)
    }

    async fn child_directory(
        &self,
        parent: InodeNo,
        name: &[u8],
        mode: u32,
        durability: Durability,
    ) -> Result<InodeNo> {
        let operation = Operation::MakeDirectory {
            parent,
            name: FileName::new(Bytes::copy_from_slice(name))?,
            inode: NewInode { mode, uid: self.root.uid, gid: self.root.gid, unmasked_mode: None },
        };
        match self.client.mutate(self.shard, operation, durability).await {
            Ok(result) => result
                .attr
                .map(|a| a.inode)
                .ok_or_else(|| Failure::new("the node's answer lacks the directory")),
            Err(e) if e.reason() == Reason::AlreadyExists => {
                let attr = self.client.lookup(self.shard, parent, name).await?;
                if attr.kind == FileKind::Directory {
                    Ok(attr.inode)
                } else {
                    Err(Failure::new("is there and no directory"))
                }
            }
            Err(e) => Err(e.into()),
        }
    }

    /// A symlink, in place of one that is there.
    pub async fn symlink(&mut self, key: &Key, target: Bytes, durability: Durability) -> Result<()> {
        let bytes = key.as_bytes();
        let parent_path = bytes.iter().rposition(|b| *b == b'/').map_or(&[][..], |at| &bytes[..at]);
        let (_, name) = key.split_last();
        let parent = self.directory(parent_path, 0o755, durability).await?;
        let make = Operation::MakeSymlink {
            parent,
            name: name.clone(),
            target: target.clone(),
            inode: NewInode { mode: 0o777, uid: self.root.uid, gid: self.root.gid, unmasked_mode: None },
        };
        match self.client.mutate(self.shard, make.clone(), durability).await {
            Ok(_) => return Ok(()),
            Err(e) if e.reason() == Reason::AlreadyExists => {}
            Err(e) => return Err(e.into()),
        }
        let there = self.client.lookup(self.shard, parent, name.as_bytes()).await?;
        if there.kind == FileKind::Directory {
            return Err(Failure::new("is a directory"));
        }
        if there.kind == FileKind::Symlink && self.client.read_link(self.shard, there.inode).await? == target
        {
            return Ok(());
        }
        self.client.mutate(self.shard, Operation::Unlink { parent, name }, durability).await?;
        self.client.mutate(self.shard, make, durability).await?;
        Ok(())
    }
}

/// Whether going on with other keys makes no sense after such an error.
pub fn ends_everything(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::ShardNotFound
            | Reason::ShardDeleted
            | Reason::ShardReadOnly
            | Reason::WrongOwner
            | Reason::NoClientId
            | Reason::ShardFull
            | Reason::VolumeFull
            | Reason::IdsExhausted
            | Reason::Unavailable
            | Reason::NotPrimary
            | Reason::StaleEpoch
            | Reason::Busy
            | Reason::Deadline
            | Reason::Io
            | Reason::Internal
    )
}
