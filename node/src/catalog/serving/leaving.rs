//! Letting go of volumes: of one that goes elsewhere, of one that is taken out of the cluster, of all at the end.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::types::{Error, Result, ShardId, VolumeId};

use super::{NOTE_WAIT_MAX, Served, Serving, StoodBy, TAKE_WAIT_MAX};
use crate::catalog::{CHANGES_MAX, Catalog, SHOWN_WAIT_MAX};
use crate::cluster::records::{self, VolumeRecord};
use crate::cluster::store::{Demand, Txn};
use crate::cluster::view::Kept;
use crate::volume::{Standby, VolumeSpec};

/// How long what is done before a hand-over, while calls are answered, may take: a device may hang.
const FLUSH_WAIT_MAX: Duration = Duration::from_secs(10);
/// How long shards may take to close, if what is dirty is written; those who hold one have their own bound.
const CLOSE_WAIT_MAX: Duration = Duration::from_secs(30);
/// The same if it is dropped.
const ABANDON_WAIT_MAX: Duration = Duration::from_secs(12);
/// How long a cloud may take to detach a disk, and to delete it.
const RELEASE_WAIT_MAX: Duration = Duration::from_secs(150);
/// How long an unmount may take.
const UNMOUNT_WAIT_MAX: Duration = Duration::from_secs(10);

/// For as long as it lives, the device of a volume that is being let go of is watched as those of volumes that are served.
struct Watched<'a> {
    serving: &'a Serving,
    served: &'a Arc<Served>,
}

impl<'a> Watched<'a> {
    fn begin(serving: &'a Serving, served: &'a Arc<Served>) -> Watched<'a> {
        serving.leaving.lock().push(served.clone());
        Watched { serving, served }
    }
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.serving.leaving.lock().retain(|other| !Arc::ptr_eq(other, self.served));
    }
}

impl Catalog {
    /// Lets go of a volume that was stood by for.
    pub(in crate::catalog) async fn stand_down(&self, id: &VolumeId) -> Result<()> {
        let Some(StoodBy { provider, spec, standby }) = self.serving.standbys.lock().remove(id) else {
            return Ok(());
        };
        let providers = self.parts.providers.clone();
        self.work(id, UNMOUNT_WAIT_MAX, move || providers.get(&provider)?.detach_backup(&spec, standby)).await
    }

    /// Takes from this machine what attaching a volume gave it, if this node is no node of it.
    pub(in crate::catalog) async fn release(&self, record: &VolumeRecord) -> Result<()> {
        let me = &self.parts.node_id;
        // It may be in use as another one.
        if let Some(other) = self.other_with_source(record) {
            tracing::warn!(volume = %record.id, %other, "its disk is another volume's as well: it stays attached");
            return Ok(());
        }
        if record.primary.as_ref() == Some(me) || record.backups.contains(me) {
            return Ok(());
        }
        self.release_as(&record.id, record.provider.clone(), self.spec_of(record)).await
    }

    pub(in crate::catalog) async fn release_as(
        &self,
        id: &VolumeId,
        provider: String,
        spec: VolumeSpec,
    ) -> Result<()> {
        let providers = self.parts.providers.clone();
        self.work(id, RELEASE_WAIT_MAX, move || providers.get(&provider)?.release(&spec)).await
    }

    /// Lets go of a volume that is retired, whatever state it is in, and removes its record.
    pub(in crate::catalog) async fn take_out(self: &Arc<Self>, kept: &Kept<VolumeRecord>) -> Result<()> {
        let record = &kept.record;
        // Who retired it has looked. What is deleted here does not come back, so once more.
        self.check_unused(&record.id)?;
        let mut spec = self.spec_of(record);
        if let Some(served) = self.serving.get(&record.id) {
            // That may not be noted yet.
            spec.formatted = true;
            served.publisher.stop().await;
            self.let_go(&served, false).await?;
        }
        self.drop_leftovers(&record.id).await?;
        if self.serving.stands_by(&record.id) {
            self.stand_down(&record.id).await?;
        } else {
            // A process of this node that was killed may have left something.
            let (spec, name) = (spec.clone(), record.provider.clone());
            let providers = self.parts.providers.clone();
            let cleaned = self
                .work(&record.id, TAKE_WAIT_MAX, move || {
                    let provider = providers.get(&name)?;
                    match provider.describe(&spec)? {
                        seen if seen.exists && (seen.mounted || !seen.devices.is_empty()) => {
                            provider.detach_backup(&spec, provider.attach_backup(&spec)?)
                        }
                        _ => Ok(()),
                    }
                })
                .await;
            if let Err(error) = cleaned {
                tracing::warn!(volume = %record.id, %error, "cleaning up after a volume that leaves");
            }
        }
        let mut left = None;
        if let Some(other) = self.other_with_source(record) {
            left = Some(format!("it is the disk of volume {other} as well"));
        } else if record.delete_content {
            let name = record.provider.clone();
            // Who removes the record without this node waits until the lease is over.
            if !self.parts.lease.is_held() {
                return Err(Error::unavailable("this node's lease is over"));
            }
            let providers = self.parts.providers.clone();
            let deleting = move || providers.get(&name)?.delete(&spec);
            left = self.work(&record.id, RELEASE_WAIT_MAX, deleting).await?;
        } else {
            self.release_as(&record.id, record.provider.clone(), spec).await?;
        }
        if let Some(why) = &left {
            tracing::warn!(volume = %record.id, source = record.source, why, "what the volume was made of is left as it is");
        }
        let key = records::volume_key(&record.id);
        let txn = Txn::new()
            .when(key.clone(), Demand::Modified(kept.modified))
            .delete(key)
            .delete(records::backups::schedule_key(&record.id));
        let txn =
            txn.delete(records::making_key(&record.id)).delete(records::backups::restoring_key(&record.id));
        let is_deleted = record.delete_content && left.is_none();
        let txn = match left.filter(|_| record.delete_content) {
            Some(why) => txn.put(records::left_key(&record.id), why),
            None => txn.delete(records::left_key(&record.id)),
        };
        // If it did not come true, the record is there still, and says the same.
        let answer = self.parts.store.txn(txn).await?;
        if answer.succeeded {
            tracing::info!(volume = %record.id, deleted = is_deleted, "taken out of the cluster");
            self.serving.remove_trouble(&record.id);
        }
        self.parts.view.wait_for(answer.revision, NOTE_WAIT_MAX).await
    }

    /// Closes a volume's shards and unmounts it. `lost`: somebody else has it, so what is dirty is dropped. Answers whether all that
    /// was written to it is on it, and nothing is under way.
    pub(in crate::catalog) async fn let_go(&self, served: &Arc<Served>, lost: bool) -> Result<bool> {
        if lost {
            self.serving.note_failed(&served.id, served.epoch);
        }
        let _watched = Watched::begin(&self.serving, served);
        self.serving.served.lock().remove(&served.id);
        // One that is under way holds a shard open.
        served.publisher.stop().await;
        let mut closed = self.close_shards(served, lost).await;
        let clean = closed && !lost;
        if !closed && !lost && served.lost().is_some() {
            // It was lost since: what is dirty is dropped.
            closed = self.close_shards(served, true).await;
        }
        if !closed {
            // What it had not synced may be lost.
            self.serving.note_failed(&served.id, served.epoch);
        }
        // Where only a lock keeps others away, it is kept for as long as a shard is open.
        while !closed && !served.refuses_deposed {
            if self.stop.is_cancelled() {
                self.serving.withheld.lock().push(served.clone());
                return Err(Error::unavailable(format!(
                    "volume {}: shards of it are in use until this process ends",
                    served.id
                )));
            }
            tracing::warn!(volume = %served.id, "waiting for those who use its shards");
            closed = self.close_shards(served, true).await;
        }
        match self.demote(served).await {
            Ok(standby) => {
                if let Some(standby) = standby {
                    self.serving.standbys.lock().insert(served.id.clone(), StoodBy::of(served, standby));
                }
                Ok(clean)
            }
            // Its next primary takes it from this node all the same; what is left is cleaned up before it is attached again.
            Err(error) if served.refuses_deposed => {
                tracing::error!(volume = %served.id, %error, "a volume that is let go of cannot be unmounted");
                self.serving.note_failed(&served.id, served.epoch);
                Ok(false)
            }
            Err(error) => {
                self.serving.note_failed(&served.id, served.epoch);
                Err(error)
            }
        }
    }

    /// Closes the shards of a volume; whether all of them are closed. `lost`: what is dirty is dropped.
    async fn close_shards(&self, served: &Served, lost: bool) -> bool {
        let closing = self.parts.view.shards(|record| record.volume == served.id).into_iter().map(|kept| {
            let id = kept.record.id;
            async move {
                let closed = match lost {
                    true => self.parts.manager.abandon(id).await,
                    false => self.parts.manager.close(id).await,
                };
                if let Err(error) = &closed {
                    tracing::error!(shard = %id, %error, "closing a shard");
                }
                closed.is_ok()
            }
        });
        let at_most = if lost { ABANDON_WAIT_MAX } else { CLOSE_WAIT_MAX };
        let closing = tokio::time::timeout(at_most, futures::future::join_all(closing));
        let closed = tokio::select! {
            biased;
            closed = closing => closed,
            // Nobody waits for what cannot end.
            why = served.barrier.failure(), if !lost && served.refuses_deposed => {
                tracing::warn!(volume = %served.id, epoch = %served.epoch, %why, "stepping down while its shards are being closed");
                return false;
            }
        };
        match closed {
            Ok(closed) => !closed.contains(&false),
            Err(_) => {
                tracing::error!(volume = %served.id, "its shards cannot be closed: its device hangs");
                false
            }
        }
    }

    /// Unmounts a volume; it is stood by for then.
    async fn demote(&self, served: &Arc<Served>) -> Result<Option<Standby>> {
        let this = served.clone();
        // A step takes a moment, and no other is made of a volume that this node does not serve.
        let grown = tokio::time::timeout(UNMOUNT_WAIT_MAX, served.growing.lock()).await;
        let _grown = grown.map_err(|_| {
            Error::unavailable(format!("volume {}: it is being enlarged: its device hangs", served.id))
        })?;
        self.work(&served.id, UNMOUNT_WAIT_MAX, move || {
            let Some(attached) = this.attached.lock().take() else { return Ok(None) };
            this.barrier.close();
            this.providers.get(&this.provider)?.demote(&this.spec, attached).map(Some)
        })
        .await
    }

    /// Lets what is in memory reach the files while the volume is still served, so that the pause after is short.
    pub(in crate::catalog) async fn flush_volume(&self, served: &Served) {
        let on_it = self.parts.view.shards(|record| record.volume == served.id);
        let ids: HashSet<ShardId> = on_it.into_iter().map(|kept| kept.record.id).collect();
        let flushing = self.parts.manager.flush(|id| ids.contains(&id));
        if tokio::time::timeout(FLUSH_WAIT_MAX, flushing).await.is_err() {
            tracing::warn!(volume = %served.id, "its shards are not flushed yet");
        }
    }

    /// Plans no more and gives every volume to a node that is ready, as far as there is one.
    pub async fn leave(self: &Arc<Self>) {
        self.stop.cancel();
        self.roles.idle().await;
        self.give_away().await;
    }

    /// Stops changes, closes all shards, detaches all volumes. What cannot be detached is logged; the next
    /// start cleans it up.
    pub async fn shutdown(&self) -> Result<()> {
        self.stop.cancel();
        // Changes under way hold a permit each; with all of them none is left.
        let all = u32::try_from(CHANGES_MAX).unwrap_or(u32::MAX);
        let waited = tokio::time::timeout(SHOWN_WAIT_MAX, self.changes.acquire_many(all)).await;
        if waited.is_err() {
            tracing::warn!("stopping while shards are being changed; the next start finishes it");
        }
        self.roles.idle().await;
        self.drop_views().await;
        for served in self.serving.all() {
            served.publisher.stop().await;
        }
        let closing = tokio::time::timeout(CLOSE_WAIT_MAX, self.parts.manager.close_all());
        let closed = closing.await.unwrap_or_else(|_| Err(Error::unavailable("a device hangs")));
        let mut ending = self.serving.all();
        if closed.is_ok() {
            ending.append(&mut self.serving.withheld.lock());
        }
        for served in ending {
            self.serving.served.lock().remove(&served.id);
            match self.demote(&served).await {
                Ok(standby) => {
                    let stood = standby.map(|standby| StoodBy::of(&served, standby));
                    drop(stood.map(|stood| self.serving.standbys.lock().insert(served.id.clone(), stood)));
                }
                Err(error) => {
                    tracing::error!(volume = %served.id, %error, "unmounting a volume; the next start cleans up")
                }
            }
        }
        for id in self.serving.standing_by() {
            if let Err(error) = self.stand_down(&id).await {
                tracing::error!(volume = %id, %error, "detaching a volume; the next start cleans up");
            }
        }
        closed
    }
}
