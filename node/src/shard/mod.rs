//! One shard: a directory tree with its files, on one store, with one writer.
//!
//! See ARCHITECTURE.md, "Inside a shard". Arrows: `manager -> handle -> executor -> group -> ops -> txn ->
//! store`; `read`, `list` and `check` build on a [`ReadView`] and never write.

mod adopt;
mod cache;
pub mod check;
pub mod chunk;
mod content;
mod executor;
mod fingerprint;
mod group;
mod handle;
pub mod keys;
pub mod list;
mod locks;
pub mod manager;
pub mod mem;
mod ops;
mod published;
pub mod read;
pub mod records;
pub mod rocks;
pub mod seek;
mod session;
pub mod store;
mod sync_log;
mod txn;
mod view;
mod wal;

pub use content::{ContentWriter, PutStreamStart};
pub use handle::{KeepAnswer, Mutation, Shard, initialize};
pub use locks::Wanted;
pub use manager::{CopyInit, ManagerStatus, ShardManager, ShardSettings, check_creation, rehome};
pub use published::PublishedView;
pub use view::ReadView;

use futures::future::BoxFuture;
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{ClientId, Result, ShardId};

/// What a new shard is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardInit {
    /// Its id.
    pub id: ShardId,
    /// The client id that owns it.
    pub owner: ClientId,
    /// Limit on its logical bytes.
    pub limit_bytes: Option<u64>,
    /// Bytes of a chunk, fixed for good: see [`chunk::CHUNK_BYTES`].
    pub chunk_bytes: u32,
    /// Permission bits of the root directory.
    pub mode: u32,
    /// Owner of the root directory.
    pub uid: u32,
    /// Group of the root directory.
    pub gid: u32,
}

/// What a shard asks of the volume that it lies on: what room is left, and whether this process may still speak for it. Answers
/// about room are cached: they cost next to nothing.
///
/// What was written is on the volume once, in a log, and will be there twice, when it is flushed: until
/// then its bytes are spoken for.
pub trait Room: Send + Sync {
    /// Bytes that the volume's shards may still grow by.
    fn growth_bytes(&self) -> u64;
    /// Notes that so many bytes were added to a log.
    fn wrote(&self, bytes: u64);
    /// Notes that a shard's bytes which are not flushed yet were `before` and are `now`.
    fn unflushed(&self, before: u64, now: u64);
    /// Makes the next answer a fresh one.
    fn look_again(&self);
    /// Bytes of the volume.
    fn total_bytes(&self) -> u64;
    /// Bytes free on it.
    fn free_bytes(&self) -> u64;
    /// A sync of something on the volume has succeeded; whether it counts shows when an answer that waits for it is confirmed.
    /// Blocks for some microseconds.
    fn synced(&self) {}
    /// Whether what this process has read or done up to now, and no later than now, is the volume's truth. `None`: it is,
    /// for certain. Else the answer has to wait for proof, or is not to be given.
    fn confirm(&self) -> Option<BoxFuture<'_, Result<()>>> {
        None
    }
}

/// Figures of a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Usage {
    /// Logical bytes.
    pub used_bytes: u64,
    /// Inodes, the root included.
    pub inodes: u64,
    /// Limit on the logical bytes.
    pub limit_bytes: Option<u64>,
    /// Active or read-only.
    pub state: ShardState,
}

#[cfg(test)]
mod tests;
