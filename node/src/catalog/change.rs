//! Close, rename, delete, and how records change: see the orders in the module above. New ones: `make`.
//!
//! A compare-and-set whose outcome is unknown is repeated until it is known: if the first one was made after
//! all, the repetition finds its own value; if not, it takes the first one's place and the first can no
//! longer succeed.
//!
//! What a record says of a volume's content (its bytes are there, are gone, it was empty) is written only if the volume was served by this
//! node all the time, under one epoch, and what it wrote is there for whoever serves it next: see [`Catalog::commit_on`].

use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::types::cluster::{NewShard, Selector, ShardInfo};
use shardfs_proto::types::{ClientId, Cookie, Error, InodeNo, Reason, Result, ShardId, ShardName};

use super::make::{Blank, Content, checked_request_id};
use super::serving::Served;
use super::{Catalog, Fence, SHOWN_WAIT_MAX, deleted};
use crate::cluster::records::{self, ShardRecord, StateWord, VolumeRecord, name_key, shard_key};
use crate::cluster::store::{Demand, KeyRange, KeyValue, Op, Revision, StoreError, Txn};
use crate::cluster::view::Kept;
use crate::shard::read;

/// How often a change is tried while its volume's record changes too.
const COMMIT_ATTEMPTS_MAX: usize = 8;
/// Pauses while an outcome is unknown.
const UNKNOWN_PAUSE_MIN: Duration = Duration::from_millis(100);
/// See [`UNKNOWN_PAUSE_MIN`].
const UNKNOWN_PAUSE_MAX: Duration = Duration::from_secs(2);

/// How a compare-and-set ended.
pub(super) enum Committed {
    /// Ours is there, since this revision.
    Done(Revision),
    /// Something else is there.
    Overtaken(Overtaken),
}

/// Why a compare-and-set changed nothing.
pub(super) struct Overtaken {
    /// What the failure branch of its caller read.
    read: Vec<Vec<KeyValue>>,
    /// The shard's record was as it was demanded at this revision: another demand has failed.
    record_unchanged: Option<Revision>,
}

impl Catalog {
    /// Makes a shard on the volume of this node that has the most room, then the fewest shards. With the
    /// request id of an earlier call: that call's shard.
    pub async fn new_shard(self: &Arc<Self>, client: &ClientId, request: NewShard) -> Result<ShardInfo> {
        let blank = Blank {
            owner: client.clone(),
            name: request.name,
            limit_bytes: request.limit_bytes,
            request_id: checked_request_id(request.request_id)?,
            content: Content::Empty { mode: request.mode, uid: request.uid, gid: request.gid },
        };
        let this = self.clone();
        self.to_the_end(async move { this.make(&blank).await }).await
    }

    /// Makes a shard read-only for good. Repeating it is no error.
    pub async fn close_shard(self: &Arc<Self>, client: &ClientId, selector: &Selector) -> Result<ShardInfo> {
        let (this, client, id) = (self.clone(), client.clone(), self.local_shard(client, selector, None)?.id);
        self.to_the_end(async move {
            let _lock = this.locks.lock(id).await;
            let shard = this.open_shard(&client, &Selector::Id(id), None).await?;
            shard.set_read_only().await?;
            fail::fail_point!("catalog-close-sealed", |_| Err(Error::unavailable("failpoint")));
            let kept = this.find(&client, &Selector::Id(id))?;
            drop(shard);
            // The shard has said so, durably; where it is served makes no difference.
            let info = this.set_state(&kept, StateWord::ReadOnly, None).await?;
            this.publish_last(id).await;
            Ok(info)
        })
        .await
    }

    /// Gives a shard another name.
    pub async fn rename_shard(
        self: &Arc<Self>,
        client: &ClientId,
        selector: &Selector,
        name: ShardName,
    ) -> Result<ShardInfo> {
        let (this, client, id) = (self.clone(), client.clone(), self.local_shard(client, selector, None)?.id);
        self.to_the_end(async move {
            let _lock = this.locks.lock(id).await;
            this.local_shard(&client, &Selector::Id(id), None)?;
            let kept = this.find(&client, &Selector::Id(id))?;
            if kept.record.snapshot_of.is_some() {
                let words = format!("shard {id} is a snapshot, whose name stays: clone it under another one");
                return Err(Error::new(Reason::NotPermitted, words).with_shard(id));
            }
            if kept.record.name == name {
                return Ok(this.parts.view.shard_info(&kept.record));
            }
            let record = ShardRecord { name: name.clone(), ..(*kept.record).clone() };
            let (old, new) = (name_key(&client, &kept.record.name), name_key(&client, &name));
            let txn = Txn::new()
                .when(new.clone(), Demand::Absent)
                .delete(old)
                .put(new.clone(), id.to_string())
                .or_read(new);
            match this.commit(&kept, &record, txn).await? {
                Committed::Done(revision) => this.shown(&record, revision).await,
                Committed::Overtaken(other) if other.read.iter().flatten().next().is_some() => {
                    Err(exists(&client, &name))
                }
                Committed::Overtaken(_) => Err(overtaken(id)),
            }
        })
        .await
    }

    /// Deletes a shard and its content; `only_if_empty`: unless its root directory has entries.
    pub async fn delete_shard(
        self: &Arc<Self>,
        client: &ClientId,
        selector: &Selector,
        only_if_empty: bool,
    ) -> Result<ShardInfo> {
        let kept = self.find(client, selector)?;
        let id = kept.record.id;
        if kept.record.state != StateWord::Deleted {
            self.local_shard(client, selector, None)?;
        }
        let (this, client) = (self.clone(), client.clone());
        self.to_the_end(async move {
            let _lock = this.locks.lock(id).await;
            let kept = this.find(&client, &Selector::Id(id))?;
            if kept.record.state == StateWord::Deleted {
                return Err(deleted(id));
            }
            let local = this.local_shard(&client, &Selector::Id(id), None)?;
            this.check_no_snapshots(id).await?;
            // From here on no call gets hold of the shard, and what was got before finds it closed.
            let fence = Fence::new(&this, id);
            match this.parts.manager.close(id).await {
                Err(error) if only_if_empty => return Err(error),
                Err(error) => tracing::warn!(shard = %id, %error, "closing a shard that is to be deleted"),
                Ok(()) => {}
            }
            if only_if_empty {
                this.check_empty(id, &local).await?;
            }
            let record = ShardRecord { state: StateWord::Deleted, ..(*kept.record).clone() };
            let txn = Txn::new().delete(record.name_key());
            // A node that was deposed meanwhile may have found empty what others have filled.
            let revision = match this.commit_on(&local.served, &kept, &record, txn).await? {
                Committed::Done(revision) => revision,
                Committed::Overtaken(_) => return Err(overtaken(id)),
            };
            fail::fail_point!("catalog-delete-recorded", |_| Err(Error::unavailable("failpoint")));
            let info = this.shown(&record, revision).await;
            let purging = this.clone();
            tokio::spawn(async move {
                let kept = Kept { record: Arc::new(record), modified: revision };
                purging.purge(kept).await;
                // Whoever comes by now must find the record deleted.
                while purging.parts.view.wait_for(revision, SHOWN_WAIT_MAX).await.is_err() {
                    if purging.stop.is_cancelled() {
                        break;
                    }
                }
                drop(fence);
            });
            info
        })
        .await
    }

    async fn check_empty(&self, id: ShardId, local: &super::LocalShard) -> Result<()> {
        let shard = self.parts.manager.open(id, &local.dir, local.room.clone()).await?;
        let view = shard.read_view(None).await?;
        let page = tokio::task::spawn_blocking(move || {
            read::read_directory(&view, InodeNo::ROOT, Cookie::new(0), 1, false)
        })
        .await
        .map_err(|e| Error::internal(format!("looking into a shard: {e}")))??;
        drop(shard);
        if page.entries.is_empty() {
            return Ok(());
        }
        Err(Error::new(
            Reason::ShardNotEmpty,
            format!("shard {id} is not empty: remove its content first, or delete it with its content"),
        )
        .with_shard(id))
    }

    /// Removes the bytes of a deleted shard and notes it. What fails is tried again by `resume`.
    pub(super) async fn purge(&self, kept: Kept<ShardRecord>) {
        let record = &kept.record;
        let Some(served) = self.serving.get(&record.volume) else { return };
        if !self.release_views(&served, record.id).await {
            return;
        }
        // Many files are removed for a shard: many shards at once would hold up the journal of their volume.
        let Ok(_permit) = self.purges.acquire().await else { return };
        if let Err(error) = self.parts.manager.delete(record.id, &served.shard_dir(record.id)).await {
            tracing::error!(shard = %record.id, %error, "a deleted shard's bytes cannot be removed; it is tried again");
            return;
        }
        let purged = ShardRecord { purged: true, ..(**record).clone() };
        match self.commit_on(&served, &kept, &purged, Txn::new()).await {
            Ok(Committed::Done(_)) => {}
            Ok(Committed::Overtaken(_)) => tracing::debug!(shard = %record.id, "its record is gone already"),
            Err(error) => tracing::warn!(shard = %record.id, %error, "noting that a shard's bytes are gone"),
        }
    }

    /// Sets a record's state and shows it. `on`: see [`Catalog::commit_on`].
    pub(super) async fn set_state(
        &self,
        kept: &Kept<ShardRecord>,
        state: StateWord,
        on: Option<&Served>,
    ) -> Result<ShardInfo> {
        if kept.record.state == state {
            return Ok(self.parts.view.shard_info(&kept.record));
        }
        let record = ShardRecord { state, ..(*kept.record).clone() };
        let committed = match on {
            Some(served) => self.commit_on(served, kept, &record, Txn::new()).await?,
            None => self.commit(kept, &record, Txn::new()).await?,
        };
        match committed {
            Committed::Done(revision) => self.shown(&record, revision).await,
            Committed::Overtaken(_) => Err(overtaken(record.id)),
        }
    }

    /// Replaces a record that says something of what is on a volume. Done only if nobody else has been given the volume by then, and
    /// after a proof that what this node has written to it is there: whoever serves it next finds what the record says.
    pub(super) async fn commit_on(
        &self,
        served: &Served,
        kept: &Kept<ShardRecord>,
        record: &ShardRecord,
        more: Txn,
    ) -> Result<Committed> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            served.prove().await.map_err(|error| error.with_shard(record.id).with_retry_after_ms(20))?;
            let volume = self.still_given(served, record.id)?;
            let txn = more.clone().when(records::volume_key(&served.id), Demand::Modified(volume.modified));
            match self.commit(kept, record, txn).await? {
                // The volume's record, as when an operator asks for another node, or one of the caller's.
                Committed::Overtaken(Overtaken { record_unchanged: Some(revision), read })
                    if attempts < COMMIT_ATTEMPTS_MAX && read.iter().all(Vec::is_empty) =>
                {
                    self.parts.view.wait_for(revision, SHOWN_WAIT_MAX).await?;
                }
                outcome => return Ok(outcome),
            }
        }
    }

    /// The record of a volume, which still gives it to this node under the epoch under which it is served.
    pub(super) fn still_given(&self, served: &Served, shard: ShardId) -> Result<Kept<VolumeRecord>> {
        let mine = |kept: &Kept<VolumeRecord>| {
            kept.record.epoch == served.epoch && kept.record.primary.as_ref() == Some(&self.parts.node_id)
        };
        self.parts.view.volume(&served.id).filter(mine).ok_or_else(|| {
            Error::unavailable(format!("volume {} has moved meanwhile", served.id))
                .with_shard(shard)
                .with_location(self.parts.view.location(&served.id))
                .with_retry_after_ms(20)
        })
    }

    /// Replaces a record, with `more` in the same transaction; its outcome is known when this returns.
    pub(super) async fn commit(
        &self,
        kept: &Kept<ShardRecord>,
        record: &ShardRecord,
        more: Txn,
    ) -> Result<Committed> {
        let (key, value) = (shard_key(record.id), records::encode(&record.clone().with_format()));
        let mut txn = more.when(key.clone(), Demand::Modified(kept.modified)).put(key.clone(), value.clone());
        txn.failure.push(Op::Range(KeyRange::key(key)));
        let mut unknown = false;
        let mut pause = UNKNOWN_PAUSE_MIN;
        loop {
            match self.parts.store.txn(txn.clone()).await {
                Ok(answer) if answer.succeeded => return Ok(Committed::Done(answer.revision)),
                Ok(mut answer) => {
                    let found = answer.results.pop().unwrap_or_default();
                    return Ok(match found.into_iter().next() {
                        Some(kv) if unknown && kv.value == value => Committed::Done(kv.modified),
                        there => Committed::Overtaken(Overtaken {
                            read: answer.results,
                            record_unchanged: there
                                .filter(|kv| kv.modified == kept.modified)
                                .map(|_| answer.revision),
                        }),
                    });
                }
                Err(error @ StoreError::OutcomeUnknown(_)) => {
                    unknown = true;
                    tracing::warn!(shard = %record.id, %error, "changing a shard's record: once more");
                }
                Err(error) if !unknown => return Err(error.into()),
                Err(error) => {
                    tracing::warn!(shard = %record.id, %error, "the outcome of a change is still unknown")
                }
            }
            tokio::select! {
                _ = self.stop.cancelled() => return Err(Error::unavailable("the node is stopping")),
                _ = tokio::time::sleep(pause.mul_f64(0.5 + fastrand::f64())) => {}
            }
            pause = (pause * 2).min(UNKNOWN_PAUSE_MAX);
        }
    }

    /// Waits until this node's copy shows a change, so that the caller's next call finds it.
    pub(super) async fn shown(&self, record: &ShardRecord, revision: Revision) -> Result<ShardInfo> {
        self.parts.view.wait_for(revision, SHOWN_WAIT_MAX).await?;
        Ok(self.parts.view.shard_info(record))
    }

    /// Runs a change in a task of its own: a caller that goes away does not cut it off.
    pub(super) async fn to_the_end<T: Send + 'static>(
        &self,
        change: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<T> {
        let permit = self.changes.clone().try_acquire_owned().map_err(|_| {
            Error::new(Reason::Busy, "many shards are being changed at once: try again")
                .with_retry_after_ms(100)
        })?;
        let running = tokio::spawn(async move {
            let _permit = permit;
            change.await
        });
        running.await.map_err(|e| Error::internal(format!("changing a shard: {e}")))?
    }
}

pub(super) fn exists(client: &ClientId, name: &ShardName) -> Error {
    Error::new(
        Reason::ShardExists,
        format!("client id {client} has a shard named {:?} already: choose another name", name.as_str()),
    )
}

pub(super) fn overtaken(id: ShardId) -> Error {
    Error::unavailable(format!("shard {id} was changed by somebody else at the same time: try again"))
        .with_shard(id)
        .with_retry_after_ms(50)
}
