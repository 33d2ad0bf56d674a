//! `.shardfs`: read-only files at the root of the mount that tell about it and the cluster.
//!
//! The directory is found by name but not listed, so that copying the root copies shards only. A file's
//! content is made when it is opened, and read past the page cache to its end; its size in stat is that
//! of a content made at most [`SIZE_AGE_MAX`] ago.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use shardfs_proto::types::{FileKind, GlobalInode, clock};

use super::Fs;
use super::json;
use super::types::{BLOCK_BYTES, DirItem, Entry, FileStat, Ttl};
use crate::failure::{Outcome, Posix};

/// The age to which a size is told again.
const SIZE_AGE_MAX: Duration = Duration::from_secs(1);
/// How long the making of `status` waits for each node.
const NODE_WAIT_MAX: Duration = Duration::from_secs(2);

/// Something in the virtual directory, or the directory itself.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum VirtualNode {
    /// `.shardfs`.
    Directory,
    /// What this is.
    Readme,
    /// The mount, and each node as it sees itself.
    Status,
    /// Nodes, as the metadata store knows them.
    Nodes,
    /// Volumes, as the metadata store knows them.
    Volumes,
    /// The shards of the mount's client id.
    Shards,
}

const ALL: [VirtualNode; 6] = [
    VirtualNode::Directory,
    VirtualNode::Readme,
    VirtualNode::Status,
    VirtualNode::Nodes,
    VirtualNode::Volumes,
    VirtualNode::Shards,
];

impl VirtualNode {
    /// Inode numbers of the mount that belong to no shard: 1 is the root.
    pub fn ino(self) -> GlobalInode {
        GlobalInode::outside(match self {
            VirtualNode::Directory => 2,
            VirtualNode::Readme => 3,
            VirtualNode::Status => 4,
            VirtualNode::Nodes => 5,
            VirtualNode::Volumes => 6,
            VirtualNode::Shards => 7,
        })
    }

    /// By its inode number.
    pub fn of(ino: GlobalInode) -> Option<VirtualNode> {
        ALL.into_iter().find(|node| node.ino() == ino)
    }

    fn name(self) -> &'static str {
        match self {
            VirtualNode::Directory => shardfs_proto::types::name::VIRTUAL_DIRECTORY,
            VirtualNode::Readme => "README",
            VirtualNode::Status => "status",
            VirtualNode::Nodes => "nodes",
            VirtualNode::Volumes => "volumes",
            VirtualNode::Shards => "shards",
        }
    }

    fn named(name: &[u8]) -> Option<VirtualNode> {
        ALL.into_iter().find(|node| *node != VirtualNode::Directory && node.name().as_bytes() == name)
    }
}

/// The sizes that were told last.
#[derive(Default)]
pub struct VirtualState {
    sizes: Mutex<HashMap<VirtualNode, (u64, Instant)>>,
}

/// The directory's entries.
pub(super) fn items() -> Vec<DirItem> {
    let item = |ino, kind, name: &'static str, offset| DirItem {
        ino,
        kind,
        name: Bytes::from_static(name.as_bytes()),
        offset,
        entry: None,
    };
    let mut items = vec![
        item(VirtualNode::Directory.ino(), FileKind::Directory, ".", 1),
        item(GlobalInode::ROOT, FileKind::Directory, "..", 2),
    ];
    for node in ALL.into_iter().filter(|node| *node != VirtualNode::Directory) {
        items.push(item(node.ino(), FileKind::Regular, node.name(), node.ino().get()));
    }
    items
}

impl Fs {
    pub(super) async fn lookup_virtual(&self, parent: VirtualNode, name: &[u8]) -> Outcome<Entry> {
        if parent != VirtualNode::Directory {
            return Err(Posix::NotDirectory.into());
        }
        self.virtual_entry(VirtualNode::named(name).ok_or(Posix::NoEntry)?).await
    }

    pub(super) async fn virtual_entry(&self, node: VirtualNode) -> Outcome<Entry> {
        let directory = node == VirtualNode::Directory;
        let size = if directory { 0 } else { self.virtual_size(node).await };
        let at = if directory { self.started } else { clock::now() };
        let stat = FileStat {
            ino: node.ino(),
            kind: if directory { FileKind::Directory } else { FileKind::Regular },
            mode: if directory { 0o555 } else { 0o444 },
            nlink: if directory { 2 } else { 1 },
            uid: self.settings.uid,
            gid: self.settings.gid,
            rdev: 0,
            size,
            blocks: size.div_ceil(u64::from(BLOCK_BYTES)) * u64::from(BLOCK_BYTES / 512),
            atime: at,
            mtime: at,
            ctime: at,
            btime: self.started,
            has_acl: Some(false),
        };
        Ok(Entry { stat, ttl: Ttl { attr: Duration::ZERO, entry: Duration::ZERO } })
    }

    /// 0 when the nodes do not answer: the file can still be listed.
    async fn virtual_size(&self, node: VirtualNode) -> u64 {
        let known = self.virtuals.sizes.lock().get(&node).copied();
        match known {
            Some((size, at)) if clock::monotonic().duration_since(at) < SIZE_AGE_MAX => size,
            _ => match tokio::time::timeout(NODE_WAIT_MAX, self.render(node)).await {
                Ok(Ok(content)) => content.len() as u64,
                Ok(Err(_)) | Err(_) => 0,
            },
        }
    }

    /// The content, as of now.
    pub(super) async fn render(&self, node: VirtualNode) -> Outcome<Bytes> {
        let content = match node {
            VirtualNode::Directory => return Err(Posix::IsDirectory.into()),
            VirtualNode::Readme => README.to_owned(),
            VirtualNode::Status => json::text(&self.status().await?),
            VirtualNode::Nodes => json::text(&json::nodes(&self.client.nodes().await?)),
            VirtualNode::Volumes => json::text(&json::volumes(&self.client.volumes().await?)),
            VirtualNode::Shards => json::text(&json::shards(&self.client.list_shards().await?)),
        };
        let told = (content.len() as u64, clock::monotonic());
        self.virtuals.sizes.lock().insert(node, told);
        Ok(content.into())
    }

    async fn status(&self) -> Outcome<Value> {
        let nodes = self.client.nodes().await?;
        let asked = nodes.iter().map(|node| async move {
            match tokio::time::timeout(NODE_WAIT_MAX, self.client.node_status(&node.endpoints)).await {
                Ok(Ok(status)) => json::node_status(&status),
                Ok(Err(error)) => json!({ "id": node.id.as_str(), "error": error.message() }),
                Err(_) => json!({ "id": node.id.as_str(), "error": "no answer within 2 s" }),
            }
        });
        let statuses = futures::future::join_all(asked).await;
        let settings = &self.settings;
        Ok(json!({
            "mount": {
                "mount_point": settings.mount_point.to_string_lossy(),
                "client_id": settings.client_id.as_str(),
                "endpoints": settings.endpoints,
                "version": env!("CARGO_PKG_VERSION"),
                "pid": std::process::id(),
                "started": json::time(self.started),
                "open_handles": self.handles.len(),
            },
            "nodes": statuses,
        }))
    }
}

const README: &str = "\
This is a ShardFS mount. Each directory beside this one is a shard:
  mkdir NAME       makes a shard            rmdir NAME     deletes an empty one
  mv NAME NEW      renames one              chmod a-w NAME closes one for good
  mkdir NAME/.snap/WHEN keeps NAME as it is now: read it there; rmdir removes that
Inside a shard, files are files; over gRPC the same bytes are values whose keys are their paths.

The files here are read-only and made when they are opened:
  status     this mount, and every node as it sees itself
  nodes      the cluster's nodes
  volumes    the cluster's volumes
  shards     the shards of this mount's client id
";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_names_are_unique_and_found_again() {
        for node in ALL {
            assert_eq!(VirtualNode::of(node.ino()), Some(node));
            assert_eq!(node.ino().split(), None);
        }
        assert_eq!(VirtualNode::of(GlobalInode::ROOT), None);
        assert_eq!(VirtualNode::named(b"status"), Some(VirtualNode::Status));
        assert_eq!(VirtualNode::named(b".shardfs"), None);
        assert_eq!(VirtualNode::named(b"nope"), None);
        let names: std::collections::HashSet<_> = ALL.iter().map(|n| n.name()).collect();
        assert_eq!(names.len(), ALL.len());
    }

    #[test]
    fn offsets_grow() {
        let items = items();
        assert!(items.windows(2).all(|pair| pair[0].offset < pair[1].offset));
        assert_eq!(items.len(), ALL.len() + 1);
    }

    #[test]
    fn the_readme_ends_with_a_newline() {
        assert!(README.ends_with('\n') && README.is_ascii());
    }
}
