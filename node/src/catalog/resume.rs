//! Finishes what a crash left half-done, for the volumes that this node serves: shards that are `creating`
//! are made or taken back, rollbacks that were cut off are looked at, deleted ones lose their bytes, old records of deleted ones go.

use std::sync::Arc;

use shardfs_proto::types::VolumeId;

use super::Catalog;
use crate::cluster::records::{self, ShardRecord, StateWord, request_key, shard_key};
use crate::cluster::store::{Demand, KeyRange, Txn};
use crate::cluster::view::Kept;

/// Records of deleted shards that a volume keeps, so that late callers hear "deleted" and not "unknown".
pub(super) const TOMBSTONES_MAX: usize = 1000;

impl Catalog {
    /// One pass over one volume. What fails is logged and done by a later pass.
    pub(super) async fn resume(self: &Arc<Self>, volume: &VolumeId) {
        let half = |record: &ShardRecord| {
            record.volume == *volume
                && match record.state {
                    StateWord::Creating => true,
                    StateWord::Deleted => !record.purged,
                    StateWord::Active | StateWord::ReadOnly => record.is_rolling_back(),
                }
        };
        for kept in self.parts.view.shards(half) {
            if self.stop.is_cancelled() {
                return;
            }
            self.resume_one(&kept).await;
        }
        self.trim(volume).await;
    }

    async fn resume_one(self: &Arc<Self>, kept: &Kept<ShardRecord>) {
        let id = kept.record.id;
        // A call that is at it holds the lock; after it the record tells.
        let _lock = self.locks.lock(id).await;
        if self.fenced.lock().contains(&id) {
            return;
        }
        let fresh = match self.parts.store.range(KeyRange::key(shard_key(id)), 1).await {
            Ok(answer) => answer.kvs.into_iter().next(),
            Err(error) => {
                tracing::warn!(shard = %id, %error, "finishing what was left half-done: later");
                return;
            }
        };
        let Some(kv) = fresh else { return };
        let record: ShardRecord = match records::decode(&kv.key, &kv.value) {
            Ok(record) => record,
            Err(error) => {
                tracing::error!(shard = %id, %error, "finishing what was left half-done");
                return;
            }
        };
        let kept = Kept { record: Arc::new(record), modified: kv.modified };
        match kept.record.state {
            StateWord::Creating if kept.record.copy_of.is_some() => {
                if let Err(error) = self.finish_copy(&kept).await {
                    tracing::warn!(shard = %id, %error, "could not finish a copy, nor take it back");
                }
            }
            StateWord::Creating => match self.build(&kept).await {
                Ok(_) => tracing::info!(shard = %id, "finished making it"),
                Err(error) => tracing::warn!(shard = %id, %error, "could not finish making it"),
            },
            StateWord::Deleted if !kept.record.purged => self.purge(kept).await,
            StateWord::Active | StateWord::ReadOnly if kept.record.is_rolling_back() => {
                let Some(served) = self.serving.get(&kept.record.volume) else { return };
                if let Err(error) = self.settle_rollback(&served, kept).await {
                    tracing::warn!(shard = %id, %error, "could not find out how a rollback ended");
                }
            }
            StateWord::Deleted | StateWord::Active | StateWord::ReadOnly => {}
        }
    }

    async fn trim(&self, volume: &VolumeId) {
        let gone = |record: &ShardRecord| record.volume == *volume && record.purged;
        let tombstones = self.parts.view.shards(gone);
        let surplus = tombstones.len().saturating_sub(TOMBSTONES_MAX);
        // In order of id: the oldest first.
        for kept in tombstones.iter().take(surplus) {
            let record = &kept.record;
            let txn = Txn::new()
                .when(shard_key(record.id), Demand::Modified(kept.modified))
                .delete(shard_key(record.id))
                .delete(request_key(&record.owner, &record.request_id));
            if let Err(error) = self.parts.store.txn(txn).await {
                tracing::warn!(shard = %record.id, %error, "forgetting a deleted shard: later");
                return;
            }
        }
    }
}
