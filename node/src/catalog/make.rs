//! How a shard comes: empty, or with the content of another one, as a snapshot or a clone.
//!
//! The order is that of the module above: its record, `creating`, with its name and id; its bytes; its state. An empty shard that a crash
//! left half-made is made by `resume`; a copy only if its bytes are whole: else it would show a later moment than its caller asked for.
//!
//! A copy lies on the volume of its source, whose record must stay as it is until the copy is reserved: it is not deleted meanwhile.

use std::path::Path;
use std::sync::Arc;

use shardfs_proto::types::cluster::ShardInfo;
use shardfs_proto::types::{ClientId, Error, Reason, Result, ShardId, ShardName, Timestamp, clock};

use super::change::exists;
use super::serving::Served;
use super::{Catalog, SHOWN_WAIT_MAX, deleted};
use crate::cluster::bootstrap::random_id;
use crate::cluster::records::{
    self, FORMAT, NEXT_SHARD_ID, ShardRecord, StateWord, name_key, request_key, shard_key, snapshot_key,
};
use crate::cluster::store::{Demand, KeyRange, KeyValue, Op, StoreError, Txn};
use crate::cluster::view::Kept;
use crate::shard::{CopyInit, ShardInit};

/// How often a new shard's reservation is tried while others make shards too.
const RESERVE_ATTEMPTS_MAX: usize = 64;
/// Characters of a request id.
const REQUEST_ID_BYTES_MAX: usize = 64;
/// With less room for growth than this no copy is made: it keeps what deletes would free.
const COPY_ROOM_MIN_BYTES: u64 = 64 << 20;

/// What a new shard is to be.
pub(super) struct Blank {
    pub(super) owner: ClientId,
    pub(super) name: ShardName,
    /// `None`: the source's, or the cluster's.
    pub(super) limit_bytes: Option<u64>,
    /// Not empty: our own calls to the store have to be told apart.
    pub(super) request_id: String,
    pub(super) content: Content,
}

/// What is in it at first.
#[derive(Clone, Copy)]
pub(super) enum Content {
    /// A root directory.
    Empty { mode: u32, uid: u32, gid: u32 },
    /// What this shard holds, as a snapshot of it. The caller holds its lock.
    SnapshotOf(ShardId),
    /// What this shard holds, as a shard like others. The caller holds its lock.
    CloneOf(ShardId),
}

/// What reserves a new shard's name and id.
struct Reservation {
    record: ShardRecord,
    /// The volume that it comes to.
    served: Arc<Served>,
    /// What it is a copy of.
    source: Option<Kept<ShardRecord>>,
}

/// The request id that was given; without one, one that nobody else has.
pub(super) fn checked_request_id(given: String) -> Result<String> {
    if given.len() > REQUEST_ID_BYTES_MAX {
        return Err(Error::invalid(format!("a request id has at most {REQUEST_ID_BYTES_MAX} bytes")));
    }
    Ok(if given.is_empty() { format!("auto-{}", random_id()) } else { given })
}

impl Blank {
    fn name_key(&self) -> String {
        match self.content {
            Content::SnapshotOf(shard) => snapshot_key(shard, &self.name),
            Content::Empty { .. } | Content::CloneOf(_) => name_key(&self.owner, &self.name),
        }
    }

    fn taken(&self) -> Error {
        match self.content {
            Content::SnapshotOf(shard) => Error::new(
                Reason::ShardExists,
                format!(
                    "shard {shard} has a snapshot named {:?} already: choose another name",
                    self.name.as_str()
                ),
            )
            .with_shard(shard),
            Content::Empty { .. } | Content::CloneOf(_) => exists(&self.owner, &self.name),
        }
    }
}

impl Catalog {
    /// Makes a shard; with the request id of an earlier call, answers that call's.
    pub(super) async fn make(self: &Arc<Self>, blank: &Blank) -> Result<ShardInfo> {
        let name_key = blank.name_key();
        let request_key = request_key(&blank.owner, &blank.request_id);
        for _ in 0..RESERVE_ATTEMPTS_MAX {
            let read = Txn {
                success: [&request_key, &name_key, NEXT_SHARD_ID]
                    .map(|key| Op::Range(KeyRange::key(key.to_owned())))
                    .into(),
                ..Txn::new()
            };
            let answer = self.parts.store.txn(read).await?;
            let [made, named, next] = &answer.results[..] else {
                return Err(Error::internal("the metadata store answered another number of reads"));
            };
            if let Some(made) = made.first() {
                match self.made_before(parse_id(made)?).await {
                    Err(error) if is_anothers_folder(&error) => continue,
                    made => return made,
                }
            }
            if !named.is_empty() {
                return Err(blank.taken());
            }
            let (number, demand) = match next.first() {
                Some(kv) => (records::decode_number(&kv.key, &kv.value)?, Demand::Modified(kv.modified)),
                None => (1, Demand::Absent),
            };
            let id = ShardId::new(number).map_err(|_| {
                Error::new(
                    Reason::IdsExhausted,
                    format!("all {} shard ids of this cluster are used", ShardId::MAX),
                )
            })?;
            let Reservation { record, served, source } = self.reservation(blank, id)?;
            let volume = self
                .parts
                .view
                .volume(&served.id)
                .ok_or_else(|| Error::unavailable(format!("volume {} has gone", served.id)))?;
            let mut txn = Txn::new()
                .when(NEXT_SHARD_ID, demand)
                .when(name_key.clone(), Demand::Absent)
                .when(request_key.clone(), Demand::Absent)
                // Still ours, under the same epoch.
                .when(records::volume_key(&served.id), Demand::Modified(volume.modified))
                .put(NEXT_SHARD_ID, (number + 1).to_string())
                .put(name_key.clone(), id.to_string())
                .put(request_key.clone(), id.to_string())
                .put(shard_key(id), records::encode(&record));
            if let Some(source) = source {
                txn = txn.when(shard_key(source.record.id), Demand::Modified(source.modified));
            }
            // Before anybody can see the record: `resume` would take a copy for one that a crash has left. Others are made by whoever
            // comes first, and do not wait for each other here.
            let mut lock = match record.copy_of {
                Some(_) => Some(self.locks.lock(id).await),
                None => None,
            };
            match self.parts.store.txn(txn).await {
                Ok(answer) if answer.succeeded => {
                    fail::fail_point!("catalog-new-reserved", |_| Err(Error::unavailable("failpoint")));
                    let kept = Kept { record: Arc::new(record), modified: answer.revision };
                    let _lock = match lock.take() {
                        Some(lock) => lock,
                        None => self.locks.lock(id).await,
                    };
                    match self.build(&kept).await {
                        // The next id may be free; the reservation was taken back.
                        Err(error) if is_anothers_folder(&error) => continue,
                        built => return built,
                    }
                }
                // Somebody was faster, or our copy of a record is old.
                Ok(answer) => self.parts.view.wait_for(answer.revision, SHOWN_WAIT_MAX).await?,
                // The next round finds the request if it was made.
                Err(StoreError::OutcomeUnknown(why)) => tracing::warn!(why, "making a shard: once more"),
                Err(error) => return Err(error.into()),
            }
        }
        Err(Error::new(Reason::Busy, "many shards are being made at once: try again")
            .with_retry_after_ms(100))
    }

    fn reservation(&self, blank: &Blank, id: ShardId) -> Result<Reservation> {
        let source = match blank.content {
            Content::Empty { .. } => None,
            Content::SnapshotOf(source) | Content::CloneOf(source) => Some(self.copyable(source)?),
        };
        let of = source.as_ref().map(|kept| &*kept.record);
        let served = match of {
            None => self.most_room()?,
            Some(of) => self.with_room_for_copies(of)?,
        };
        let (mode, uid, gid) = match (blank.content, of) {
            (Content::Empty { mode, uid, gid }, _) => (mode, uid, gid),
            (_, of) => of.map_or((0, 0, 0), |of| (of.mode, of.uid, of.gid)),
        };
        let record = ShardRecord {
            v: FORMAT,
            id,
            name: blank.name.clone(),
            owner: blank.owner.clone(),
            volume: served.id.clone(),
            state: StateWord::Creating,
            limit_bytes: match of {
                None => blank.limit_bytes.or(self.tunable().limit_bytes_default),
                Some(of) => blank.limit_bytes.or(of.limit_bytes),
            },
            created: clock::now(),
            request_id: blank.request_id.clone(),
            mode,
            uid,
            gid,
            purged: false,
            snapshot_of: match blank.content {
                Content::SnapshotOf(shard) => Some(shard),
                Content::Empty { .. } | Content::CloneOf(_) => None,
            },
            copy_of: of.map(|of| of.id),
            rollback: None,
        }
        .with_format();
        Ok(Reservation { record, served, source })
    }

    fn with_room_for_copies(&self, of: &ShardRecord) -> Result<Arc<Served>> {
        let served = self.served(of, None)?;
        if served.room.growth_bytes() >= COPY_ROOM_MIN_BYTES {
            return Ok(served);
        }
        let words = format!(
            "volume {} has too little room for a copy of shard {}, which would keep what deletes free: delete something first",
            served.id, of.id
        );
        Err(Error::new(Reason::VolumeFull, words).with_shard(of.id))
    }

    /// The record of a shard that can be copied.
    fn copyable(&self, id: ShardId) -> Result<Kept<ShardRecord>> {
        let kept = self.parts.view.shard(id).ok_or_else(|| deleted(id))?;
        match kept.record.state {
            StateWord::Active | StateWord::ReadOnly => Ok(kept),
            StateWord::Deleted => Err(deleted(id)),
            StateWord::Creating => Err(Error::unavailable(format!("shard {id} is being made"))
                .with_shard(id)
                .with_retry_after_ms(50)),
        }
    }

    /// The shard that an earlier call with the same request id made, finished if it was not.
    async fn made_before(self: &Arc<Self>, id: ShardId) -> Result<ShardInfo> {
        let _lock = self.locks.lock(id).await;
        let answer = self.parts.store.range(KeyRange::key(shard_key(id)), 1).await?;
        let Some(kv) = answer.kvs.first() else {
            return Err(Error::unavailable(format!("shard {id} is being removed")).with_retry_after_ms(50));
        };
        let record: ShardRecord = records::decode(&kv.key, &kv.value)?;
        if record.state == StateWord::Creating {
            self.served(&record, None)?;
            return self.build(&Kept { record: Arc::new(record), modified: kv.modified }).await;
        }
        self.shown(&record, kv.modified).await
    }

    /// Makes the bytes of a shard that is `creating` and gives it its state. The caller holds its lock and has
    /// read the record under it, or made it. If the bytes cannot be made, the reservation is taken back; the folder
    /// of another creation is left as it is.
    pub(super) async fn build(self: &Arc<Self>, kept: &Kept<ShardRecord>) -> Result<ShardInfo> {
        let record = &kept.record;
        let served = self.served(record, None)?;
        let dir = served.shard_dir(record.id);
        let made = match record.copy_of {
            None => self.create(record, &dir).await,
            Some(source) => self.copy(record, source, &served, &dir).await,
        };
        if let Err(error) = made {
            tracing::error!(shard = %record.id, volume = %record.volume, %error, "a shard cannot be made");
            if is_anothers_folder(&error) {
                // Its bytes are not ours to remove.
                self.take_back_record(&served, kept).await;
            } else {
                self.take_back(&served, kept).await;
            }
            return Err(error.with_shard(record.id));
        }
        fail::fail_point!("catalog-new-built", |_| Err(Error::unavailable("failpoint")));
        self.make_final(kept, &served).await
    }

    async fn make_final(self: &Arc<Self>, kept: &Kept<ShardRecord>, served: &Served) -> Result<ShardInfo> {
        if kept.record.snapshot_of.is_none() {
            return self.set_state(kept, StateWord::Active, Some(served)).await;
        }
        let info = self.set_state(kept, StateWord::ReadOnly, Some(served)).await?;
        // It can be read here from now on; on backups when its view is there, for which nobody waits.
        let (this, id) = (self.clone(), kept.record.id);
        tokio::spawn(async move { this.publish_last(id).await });
        Ok(info)
    }

    /// Finishes a copy that a crash left `creating` if its bytes are whole; else takes it back. See the module.
    pub(super) async fn finish_copy(self: &Arc<Self>, kept: &Kept<ShardRecord>) -> Result<()> {
        let served = self.served(&kept.record, None)?;
        let (dir, id, origin) = (served.shard_dir(kept.record.id), kept.record.id, origin(&kept.record));
        let manager = self.parts.manager.clone();
        let whole = tokio::task::spawn_blocking(move || manager.is_made_by(&dir, id, &origin))
            .await
            .map_err(|e| Error::internal(format!("looking at a copy: {e}")))?;
        match whole {
            Ok(true) => self.make_final(kept, &served).await.map(drop),
            Ok(false) => {
                self.take_back(&served, kept).await;
                Ok(())
            }
            Err(error) if is_anothers_folder(&error) => {
                self.take_back_record(&served, kept).await;
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    async fn create(&self, record: &ShardRecord, dir: &Path) -> Result<()> {
        let init = ShardInit {
            id: record.id,
            owner: record.owner.clone(),
            limit_bytes: record.limit_bytes,
            chunk_bytes: self.parts.chunk_bytes,
            mode: record.mode,
            uid: record.uid,
            gid: record.gid,
        };
        let (manager, origin, dir) = (self.parts.manager.clone(), origin(record), dir.to_owned());
        tokio::task::spawn_blocking(move || manager.create_by(&dir, &init, &origin))
            .await
            .map_err(|e| Error::internal(format!("making a shard: {e}")))?
    }

    async fn copy(&self, record: &ShardRecord, source: ShardId, served: &Served, dir: &Path) -> Result<()> {
        self.copyable(source)?;
        let init = CopyInit {
            id: record.id,
            owner: record.owner.clone(),
            state: match record.snapshot_of {
                Some(_) => StateWord::ReadOnly.into(),
                None => StateWord::Active.into(),
            },
            limit_bytes: record.limit_bytes,
            created: record.created,
        };
        let manager = &self.parts.manager;
        let source = manager.open(source, &served.shard_dir(source), served.room()).await?;
        manager.copy(&source, dir, &init, &origin(record)).await
    }

    async fn take_back(&self, served: &Served, kept: &Kept<ShardRecord>) {
        let record = &kept.record;
        if let Err(error) = self.parts.manager.delete(record.id, &served.shard_dir(record.id)).await {
            tracing::error!(shard = %record.id, %error, "what was made of a shard cannot be removed; it is tried again");
            return;
        }
        self.take_back_record(served, kept).await;
    }

    async fn take_back_record(&self, served: &Served, kept: &Kept<ShardRecord>) {
        let record = &kept.record;
        let volume = match served.prove().await.and_then(|()| self.still_given(served, record.id)) {
            Ok(volume) => volume,
            // Whoever has the volume makes the shard, or takes it back.
            Err(error) => {
                tracing::info!(shard = %record.id, %error, "a shard's reservation is left to others");
                return;
            }
        };
        let txn = Txn::new()
            .when(records::volume_key(&served.id), Demand::Modified(volume.modified))
            .when(shard_key(record.id), Demand::Modified(kept.modified))
            .delete(shard_key(record.id))
            .delete(record.name_key())
            .delete(request_key(&record.owner, &record.request_id));
        if let Err(error) = self.parts.store.txn(txn).await {
            tracing::error!(shard = %record.id, %error, "a shard's reservation cannot be taken back; it is tried again");
        }
    }
}

fn parse_id(kv: &KeyValue) -> Result<ShardId> {
    ShardId::new(records::decode_number(&kv.key, &kv.value)?)
}

/// What tells a creation from all others, also from those that a metadata store has forgotten which was restored.
pub(super) fn origin(record: &ShardRecord) -> String {
    origin_of(record.created, &record.owner, &record.request_id)
}

/// See [`origin`].
pub(super) fn origin_of(created: Timestamp, owner: &ClientId, request_id: &str) -> String {
    // In alphabetical order: so it is written by whichever map.
    serde_json::json!({ "created": created, "owner": owner, "request_id": request_id }).to_string()
}

/// Whether a shard could not be made because its folder holds another one.
fn is_anothers_folder(error: &Error) -> bool {
    error.reason() == Reason::AlreadyExists
}
