//! Gives a shard the content of one of its snapshots.
//!
//! The order: calls are refused; the record says that a rollback is under way; views of the shard are taken from their readers, because
//! their files lie in its folder; its folder is exchanged with a copy of the snapshot (`shard/manager/copies.rs`); the record says that
//! it is done. A crash leaves the one content or the other, and a record that says that this is not known: whoever serves
//! the volume next looks, notes it and removes what lies beside (`settle_rollback`). One that was not done is not done later.
//!
//! The record keeps the request's id: a call that comes again is answered, and takes nothing back that was written since.

use std::sync::Arc;

use shardfs_proto::types::cluster::{Selector, ShardInfo};
use shardfs_proto::types::{ClientId, Error, Reason, Result, ShardId, ShardName};

use super::change::{Committed, overtaken};
use super::make::checked_request_id;
use super::serving::Served;
use super::{Catalog, Fence, LocalShard};
use crate::cluster::records::{Rollback, ShardRecord, StateWord};
use crate::cluster::store::Txn;
use crate::cluster::view::Kept;

impl Catalog {
    /// Gives a shard the content of its snapshot of that name. With the request id of an earlier call: done already.
    pub async fn rollback_shard(
        self: &Arc<Self>,
        client: &ClientId,
        selector: &Selector,
        snapshot: ShardName,
        request_id: String,
    ) -> Result<ShardInfo> {
        let local = self.local_shard(client, selector, None)?;
        self.check_versions(&local.served.id, "nothing is rolled back")?;
        let id = local.id;
        let (this, client, request_id) = (self.clone(), client.clone(), checked_request_id(request_id)?);
        self.to_the_end(async move {
            let _lock = this.locks.lock(id).await;
            let local = this.local_shard(&client, &Selector::Id(id), None)?;
            let kept = this.settle_rollback(&local.served, this.find(&client, &Selector::Id(id))?).await?;
            if kept.record.rollback.as_ref().is_some_and(|last| last.request_id == request_id) {
                return Ok(this.parts.view.shard_info(&kept.record));
            }
            if kept.record.state != StateWord::Active {
                let words = format!(
                    "shard {id} is closed (read-only) and stays as it is: clone the snapshot instead"
                );
                return Err(Error::new(Reason::ShardReadOnly, words).with_shard(id));
            }
            let source = this.snapshot_of(id, &snapshot)?;
            let _source_lock = this.locks.lock(source).await;
            // It may have been deleted before its lock was ours.
            this.snapshot_of(id, &snapshot)?;
            let fence = Fence::new(&this, id);
            let done = this.roll_back(&local, &kept, source, request_id).await;
            drop(fence);
            done
        })
        .await
    }

    fn snapshot_of(&self, id: ShardId, name: &ShardName) -> Result<ShardId> {
        let found = self.parts.view.snapshot_by_name(id, name);
        let whole = found.filter(|kept| kept.record.state == StateWord::ReadOnly);
        whole.map(|kept| kept.record.id).ok_or_else(|| {
            let words = format!("shard {id} has no snapshot named {:?}", name.as_str());
            Error::new(Reason::ShardNotFound, words).with_shard(id)
        })
    }

    async fn roll_back(
        self: &Arc<Self>,
        local: &LocalShard,
        kept: &Kept<ShardRecord>,
        snapshot: ShardId,
        request_id: String,
    ) -> Result<ShardInfo> {
        let (id, served) = (local.id, &local.served);
        let source = self.parts.manager.open(snapshot, &served.shard_dir(snapshot), served.room()).await?;
        let begun = Rollback { snapshot, request_id, done: false };
        // From here on no view of the shard as it was is announced any more: that demands the record as it was.
        let kept = self.set_rollback(served, kept, Some(begun.clone())).await?;
        fail::fail_point!("catalog-rollback-recorded", |_| Err(Error::unavailable("failpoint")));
        if !self.release_views(served, id).await {
            self.set_rollback(served, &kept, None).await?;
            let words = format!("shard {id} is still being read on a backup, from a view: try again");
            return Err(Error::unavailable(words).with_shard(id).with_retry_after_ms(500));
        }
        let replaced =
            self.parts.manager.replace(id, &local.dir, &source, &begun.request_id, served.room()).await;
        let outcome = match &replaced {
            Ok(()) => self.set_rollback(served, &kept, Some(Rollback { done: true, ..begun })).await,
            // Perhaps only what came after the exchange has failed.
            Err(_) => self.settle_rollback(served, kept).await,
        };
        let kept = outcome?;
        match replaced {
            Err(error) if kept.record.rollback.is_none() => Err(error),
            Ok(()) | Err(_) => {
                tracing::info!(shard = %id, %snapshot, "rolled back");
                Ok(self.parts.view.shard_info(&kept.record))
            }
        }
    }

    /// Finds out how a rollback ended that was begun, notes that, and removes what it left. The caller holds the shard's lock.
    pub(super) async fn settle_rollback(
        &self,
        served: &Served,
        kept: Kept<ShardRecord>,
    ) -> Result<Kept<ShardRecord>> {
        let Some(begun) = kept.record.rollback.clone().filter(|rollback| !rollback.done) else {
            return Ok(kept);
        };
        let (id, dir) = (kept.record.id, served.shard_dir(kept.record.id));
        let replaced = self.parts.manager.settle_replacement(id, &dir, &begun.request_id).await?;
        tracing::info!(shard = %id, replaced, "a rollback that was cut off");
        self.set_rollback(served, &kept, replaced.then_some(Rollback { done: true, ..begun })).await
    }

    async fn set_rollback(
        &self,
        served: &Served,
        kept: &Kept<ShardRecord>,
        rollback: Option<Rollback>,
    ) -> Result<Kept<ShardRecord>> {
        let record = ShardRecord { rollback, ..(*kept.record).clone() };
        match self.commit_on(served, kept, &record, Txn::new()).await? {
            Committed::Done(revision) => {
                self.shown(&record, revision).await?;
                Ok(Kept { record: Arc::new(record), modified: revision })
            }
            Committed::Overtaken(_) => Err(overtaken(kept.record.id)),
        }
    }
}
