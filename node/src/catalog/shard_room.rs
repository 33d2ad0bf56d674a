//! A served volume as its shards see it: what room is left, and whether this node may still speak for it.
//!
//! Invariant: an answer is confirmed only if this node's lease was held, and the volume's filesystem was there, at a moment
//! after it was made, or a write that began after the question reached the device.

use std::sync::Arc;

use futures::future::BoxFuture;
use shardfs_proto::types::{Epoch, Error, Result, VolumeId};

use super::barrier::Barrier;
use crate::cluster::lease::Lease;
use crate::cluster::view::View;
use crate::shard::Room;
use crate::volume::room::VolumeRoom;

/// Of one volume, under one epoch.
pub(super) struct ShardRoom {
    pub(super) id: VolumeId,
    pub(super) epoch: Epoch,
    pub(super) room: Arc<VolumeRoom>,
    pub(super) lease: Arc<Lease>,
    pub(super) view: Arc<View>,
    /// `None`: a write proves nothing.
    pub(super) barrier: Option<Arc<Barrier>>,
}

impl Room for ShardRoom {
    fn growth_bytes(&self) -> u64 {
        self.room.growth_bytes()
    }

    fn wrote(&self, bytes: u64) {
        self.room.wrote(bytes);
    }

    fn unflushed(&self, before: u64, now: u64) {
        self.room.unflushed(before, now);
    }

    fn look_again(&self) {
        self.room.look_again();
    }

    fn total_bytes(&self) -> u64 {
        self.room.total_bytes()
    }

    fn free_bytes(&self) -> u64 {
        self.room.free_bytes()
    }

    fn synced(&self) {
        if let Some(barrier) = &self.barrier {
            barrier.synced();
        }
    }

    fn confirm(&self) -> Option<BoxFuture<'_, Result<()>>> {
        // Held after the fact: nobody else can have had the volume then, unless the lease was lost and won back in
        // between. That is done only when the copy of the records shows what was lost: so it is looked at second.
        if self.lease.is_held() {
            if self.view.volume_epoch(&self.id) == Some(self.epoch) {
                // Nobody has taken it; it may have failed by itself.
                let barrier = self.barrier.as_ref()?;
                return match barrier.glance() {
                    Some(Ok(())) => None,
                    Some(Err(error)) => Some(Box::pin(std::future::ready(Err(error)))),
                    None => Some(Box::pin(barrier.pass())),
                };
            }
            let moved = Error::unavailable(format!("volume {} is being served elsewhere now", self.id));
            return Some(Box::pin(std::future::ready(Err(moved.with_retry_after_ms(20)))));
        }
        Some(match &self.barrier {
            Some(barrier) => Box::pin(barrier.pass()),
            None => Box::pin(std::future::ready(Err(Error::unavailable(
                "this node does not reach the metadata store, and a volume without a fence may be another's by now",
            )
            .with_retry_after_ms(100)))),
        })
    }
}
