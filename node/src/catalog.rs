//! Shards as the cluster knows them: who owns which, where it is served, and how one comes and goes.
//!
//! A shard's record in the metadata store decides; its bytes follow. The orders that make every crash harmless:
//! - new: record `creating` with its name and id, then the bytes, then `active`;
//! - close: the bytes are sealed, then the record says so;
//! - delete: calls are refused, then the record says `deleted` (the name is free from here), then the bytes go;
//! - copy, rollback: see `make` and `rollback`.
//!
//! What a crash left half-done is finished when its volume is attached, and once in a while (`resume`).
//! Changes of one shard are made one after the other, by the primary of its volume. They run to their end
//! even if the caller goes away.
//!
//! [`Catalog::local_shard`] and [`Catalog::open_shard`] answer from memory: no file operation calls
//! the metadata store.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::clock::{self, BootTime};
use shardfs_proto::types::cluster::{NodeInfo, NodeStatus, Selector, ShardInfo, VolumeInfo};
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{ClientId, Epoch, Error, NodeId, Reason, Result, ShardId, VolumeId};
use tokio_util::sync::CancellationToken;

use crate::cluster::lease::Lease;
use crate::cluster::records::{NodeRecord, ShardRecord, StateWord};
use crate::cluster::store::MetaStore;
use crate::cluster::view::{Kept, View};
use crate::shard::{Room, Shard, ShardManager};
use crate::volume::Providers;

mod backups;
mod barrier;
mod change;
mod damage;
mod disks;
mod figures;
mod make;
mod provisioning;
mod publish;
mod resume;
mod roles;
mod rollback;
mod serving;
mod shard_room;
mod snapshots;
mod versions;
mod views;
mod volumes;

use backups::Backups;
pub use damage::DamageList;
pub use figures::{Cause, Failovers};
use provisioning::Provisioner;
use roles::Roles;
pub use serving::Served;
use serving::Serving;
pub use views::BackupRead;
use views::Views;

/// How long a listing waits for this node's copy of the records to be up to date.
const REFRESH_WAIT_MAX: Duration = Duration::from_secs(1);
/// How long a change waits until this node's copy shows it.
const SHOWN_WAIT_MAX: Duration = Duration::from_secs(5);
/// Shards whose files are being removed at a time on a node.
const PURGES_MAX: usize = 4;
/// Changes of shards under way at a time on a node.
const CHANGES_MAX: usize = 256;

/// What a catalog is made of.
pub struct CatalogParts {
    /// This node.
    pub node_id: NodeId,
    /// Its data directory: volumes are mounted under `volumes/` in it.
    pub data_dir: PathBuf,
    /// What devices are called on this machine, where their volumes' records call them otherwise.
    pub devices: BTreeMap<VolumeId, PathBuf>,
    /// The kinds of volumes that this node can use.
    pub providers: Providers,
    /// Where backups of loop volumes lie; `None`: beside their backing files.
    pub backup_dir: Option<PathBuf>,
    /// The cluster's id, as the volumes must name it.
    pub cluster_id: String,
    /// Bytes of a chunk of new shards.
    pub chunk_bytes: u32,
    /// What may change while it runs.
    pub tunable: Tunable,
    /// The metadata store.
    pub store: Arc<dyn MetaStore>,
    /// The copy of its records; somebody runs it.
    pub view: Arc<View>,
    /// This process's lease.
    pub lease: Arc<Lease>,
    /// This process's record of the node.
    pub record: NodeRecord,
    /// From when on no earlier process of this node can hold a lease.
    pub alone_from: BootTime,
    /// The shards of this node.
    pub manager: Arc<ShardManager>,
}

/// The shards of the cluster, as one node sees and serves them.
pub struct Catalog {
    parts: CatalogParts,
    started: Instant,
    serving: Serving,
    roles: Roles,
    locks: Locks,
    /// Shards whose calls are refused for the moment.
    fenced: Mutex<HashSet<ShardId>>,
    changes: Arc<tokio::sync::Semaphore>,
    purges: tokio::sync::Semaphore,
    damage: Arc<DamageList>,
    failovers: Arc<Failovers>,
    views: Views,
    backups: Backups,
    provisioner: Provisioner,
    tunable: Mutex<Tunable>,
    rounds: AtomicU64,
    stop: CancellationToken,
}

/// Settings that may change while the node runs; each use takes what is there at its moment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tunable {
    /// The limit of shards that ask for none.
    pub limit_bytes_default: Option<u64>,
    /// Pause between two views of a shard that is read on backups; zero: none are published.
    pub publish_every: Duration,
}

/// A shard that this node serves.
pub struct LocalShard {
    /// Its id.
    pub id: ShardId,
    /// Its folder.
    pub dir: PathBuf,
    /// Its volume's room.
    pub room: Arc<dyn Room>,
    /// Its state, by its record.
    pub state: ShardState,
    /// Under which its volume is served.
    pub epoch: Epoch,
    served: Arc<Served>,
}

impl Catalog {
    /// Serves nothing until [`Catalog::run`] has attached the volumes.
    pub fn new(parts: CatalogParts) -> Arc<Catalog> {
        Arc::new(Catalog {
            tunable: Mutex::new(parts.tunable),
            parts,
            started: clock::monotonic(),
            serving: Serving::default(),
            roles: Roles::default(),
            locks: Locks::default(),
            fenced: Mutex::default(),
            changes: Arc::new(tokio::sync::Semaphore::new(CHANGES_MAX)),
            purges: tokio::sync::Semaphore::new(PURGES_MAX),
            damage: Arc::default(),
            failovers: Arc::default(),
            views: Views::default(),
            backups: Backups::default(),
            provisioner: Provisioner::default(),
            rounds: AtomicU64::new(0),
            stop: CancellationToken::new(),
        })
    }

    /// What may change while it runs.
    fn tunable(&self) -> Tunable {
        *self.tunable.lock()
    }

    /// Takes other settings from now on.
    pub fn tune(&self, tunable: Tunable) {
        *self.tunable.lock() = tunable;
    }

    /// How often the loop that looks after the volumes has gone round.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// The shard, if the caller owns it and this node serves its volume under `epoch` (`None`: not compared).
    /// From memory.
    pub fn local_shard(
        &self,
        client: &ClientId,
        selector: &Selector,
        epoch: Option<Epoch>,
    ) -> Result<LocalShard> {
        let record = self.find(client, selector)?.record;
        let id = record.id;
        match record.state {
            StateWord::Active | StateWord::ReadOnly => {}
            StateWord::Deleted => return Err(deleted(id)),
            StateWord::Creating => {
                return Err(Error::unavailable(format!("shard {id} is being made"))
                    .with_shard(id)
                    .with_retry_after_ms(50));
            }
        }
        let served = self.served(&record, epoch)?;
        if self.fenced.lock().contains(&id) {
            return Err(Error::unavailable(format!(
                "shard {id} is being deleted, looked at for it, or rolled back"
            ))
            .with_shard(id)
            .with_retry_after_ms(20));
        }
        Ok(LocalShard {
            id,
            dir: served.shard_dir(id),
            room: served.room(),
            state: record.state.into(),
            epoch: served.epoch,
            served,
        })
    }

    /// The shard as [`Catalog::local_shard`] has it, with what is open of it: nothing is opened.
    pub fn opened_shard(
        &self,
        client: &ClientId,
        selector: &Selector,
        epoch: Option<Epoch>,
    ) -> Result<(LocalShard, Option<Arc<Shard>>)> {
        let local = self.local_shard(client, selector, epoch)?;
        let shard = self.parts.manager.opened(local.id);
        Ok((local, shard))
    }

    /// The shard, open: see [`Catalog::local_shard`].
    pub async fn open_shard(
        self: &Arc<Self>,
        client: &ClientId,
        selector: &Selector,
        epoch: Option<Epoch>,
    ) -> Result<Arc<Shard>> {
        let local = self.local_shard(client, selector, epoch)?;
        let shard = self.parts.manager.open(local.id, &local.dir, local.room).await?;
        local.served.note_open();
        // A deletion that began meanwhile has closed what was open before, not what was opened since.
        self.local_shard(client, &Selector::Id(local.id), None)?;
        // A crash between sealing a shard and its record: every use shows it.
        if local.state == ShardState::Active && shard.usage().state == ShardState::ReadOnly {
            self.note_sealed(local.id);
        }
        Ok(shard)
    }

    /// The caller's shards in order of name, snapshots excepted. Shows every change that was answered before, on any node, unless the
    /// metadata store is away.
    pub async fn list_shards(&self, client: &ClientId, include_deleted: bool) -> Result<Vec<ShardInfo>> {
        self.refresh().await?;
        let mut infos = self.infos(|record| {
            record.owner == *client
                && record.snapshot_of.is_none()
                && (include_deleted || record.state != StateWord::Deleted)
        });
        infos.sort_by(|a, b| a.name.cmp(&b.name).then(a.id.cmp(&b.id)));
        Ok(infos)
    }

    /// One shard of the caller's, deleted ones by id; without usage. As fresh as [`Catalog::list_shards`].
    pub async fn get_shard(&self, client: &ClientId, selector: &Selector) -> Result<ShardInfo> {
        self.refresh().await?;
        Ok(self.parts.view.shard_info(&self.find(client, selector)?.record))
    }

    /// All shards of all owners in order of id, snapshots included.
    pub async fn list_all_shards(&self, include_deleted: bool) -> Result<Vec<ShardInfo>> {
        self.refresh().await?;
        Ok(self.infos(|record| include_deleted || record.state != StateWord::Deleted))
    }

    /// All nodes in order of id.
    pub async fn list_nodes(&self) -> Result<Vec<NodeInfo>> {
        self.refresh().await?;
        Ok(self.parts.view.node_infos())
    }

    /// All volumes in order of id.
    pub async fn list_volumes(&self) -> Result<Vec<VolumeInfo>> {
        self.refresh().await?;
        Ok(self.parts.view.volume_infos())
    }

    /// This node as it sees itself.
    pub async fn status(&self) -> Result<NodeStatus> {
        Ok(self.status_now())
    }

    /// The same, for callers that do not wait.
    pub fn status_now(&self) -> NodeStatus {
        let manager = self.parts.manager.status();
        NodeStatus {
            id: self.parts.node_id.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            volumes: self.volume_statuses(),
            open_shards: manager.open_shards as u32,
            open_shards_max: manager.open_shards_max as u32,
            block_cache_used_bytes: manager.block_cache_used_bytes,
            block_cache_capacity_bytes: manager.block_cache_capacity_bytes,
            write_buffer_used_bytes: manager.write_buffer_used_bytes,
            store_reachable: self.parts.lease.succeeded(),
            cluster_id: self.parts.cluster_id.clone(),
            damaged_shards: self.damage.list(|id| {
                self.parts.view.shard(id).is_some_and(|kept| kept.record.state != StateWord::Deleted)
            }),
            views: self.view_figures(),
        }
    }

    /// Whether another node may take the shard's volume at any time.
    pub fn may_move(&self, shard: ShardId) -> bool {
        let view = &self.parts.view;
        view.shard(shard)
            .and_then(|kept| view.volume(&kept.record.volume))
            .is_some_and(|kept| !kept.record.backups.is_empty())
    }

    /// The shards of which damage was found.
    pub fn damage(&self) -> &Arc<DamageList> {
        &self.damage
    }

    /// How often volumes came to this node and left it.
    pub fn failovers(&self) -> &Arc<Failovers> {
        &self.failovers
    }

    /// Lets the record of a sealed shard follow, in the background; what fails is done at its next use.
    fn note_sealed(self: &Arc<Self>, id: ShardId) {
        let Ok(permit) = self.changes.clone().try_acquire_owned() else { return };
        let this = self.clone();
        tokio::spawn(async move {
            let _permit = permit;
            // Whoever holds the lock is at it, or will be by the shard's next use.
            let Some(_lock) = this.locks.try_lock(id) else { return };
            let Some(kept) = this.parts.view.shard(id) else { return };
            if kept.record.state == StateWord::Active
                && let Err(error) = this.set_state(&kept, StateWord::ReadOnly, None).await
            {
                tracing::warn!(shard = %id, %error, "noting that a shard is sealed: later");
            }
        });
    }

    fn infos(&self, keep: impl Fn(&ShardRecord) -> bool) -> Vec<ShardInfo> {
        let view = &self.parts.view;
        view.shards(keep).iter().map(|kept| view.shard_info(&kept.record)).collect()
    }

    /// Brings the copy of the records up to date; if the store is away, what is there must do.
    async fn refresh(&self) -> Result<()> {
        let view = &self.parts.view;
        let known = view.revision() != Default::default();
        if known && !self.parts.lease.succeeded() {
            return Ok(());
        }
        match view.catch_up(&*self.parts.store, REFRESH_WAIT_MAX).await {
            Err(error) if !known => Err(error),
            Err(error) => {
                tracing::debug!(%error, "answering from what is known");
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    /// The record of a shard of the caller's.
    fn find(&self, client: &ClientId, selector: &Selector) -> Result<Kept<ShardRecord>> {
        match selector {
            Selector::Id(id) => {
                let kept = self.parts.view.shard(*id).ok_or_else(|| {
                    Error::new(Reason::ShardNotFound, format!("there is no shard {id}")).with_shard(*id)
                })?;
                if kept.record.owner != *client {
                    return Err(Error::new(
                        Reason::WrongOwner,
                        format!("shard {id} does not belong to client id {client}"),
                    )
                    .with_shard(*id));
                }
                Ok(kept)
            }
            Selector::Name(name) => self.parts.view.shard_by_name(client, name).ok_or_else(|| {
                Error::new(
                    Reason::ShardNotFound,
                    format!("client id {client} has no shard named {name:?}", name = name.as_str()),
                )
            }),
        }
    }

    /// The volume of a shard, if this node serves it.
    fn served(&self, record: &ShardRecord, epoch: Option<Epoch>) -> Result<Arc<Served>> {
        let id = record.id;
        let (mine, now) = self.parts.view.is_primary(&record.volume, &self.parts.node_id);
        let location = || self.parts.view.location(&record.volume);
        if !mine {
            let location = location();
            let where_now = match &location.node {
                Some(node) => format!("shard {id} is served by {node}"),
                None => format!("shard {id} is served by no node at the moment"),
            };
            return Err(Error::new(Reason::NotPrimary, where_now).with_shard(id).with_location(location));
        }
        if epoch.is_some_and(|epoch| epoch != now) {
            return Err(Error::new(Reason::StaleEpoch, format!("shard {id} is served under epoch {now}"))
                .with_shard(id)
                .with_location(location()));
        }
        // One that is being given up, or taken again, is not served under the record's epoch.
        self.serving.get(&record.volume).filter(|served| served.epoch == now).ok_or_else(|| {
            let trouble =
                self.serving.trouble(&record.volume).unwrap_or_else(|| "it is being taken over".into());
            Error::unavailable(format!("volume {} of shard {id} is not usable: {trouble}", record.volume))
                .with_shard(id)
                .with_retry_after_ms(20)
        })
    }
}

fn deleted(id: ShardId) -> Error {
    Error::new(Reason::ShardDeleted, format!("shard {id} was deleted")).with_shard(id)
}

/// One lock a shard, for its changes.
#[derive(Default)]
struct Locks(Mutex<HashMap<ShardId, Arc<tokio::sync::Mutex<()>>>>);

impl Locks {
    async fn lock(&self, id: ShardId) -> tokio::sync::OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock();
            // Nobody else can take a lock that only the map holds while the map is locked.
            locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            locks.entry(id).or_default().clone()
        };
        lock.lock_owned().await
    }

    fn try_lock(&self, id: ShardId) -> Option<tokio::sync::OwnedMutexGuard<()>> {
        let lock = self.0.lock().entry(id).or_default().clone();
        lock.try_lock_owned().ok()
    }
}

/// Calls of a shard are refused as long as this lives.
struct Fence {
    catalog: Arc<Catalog>,
    id: ShardId,
}

impl Fence {
    fn new(catalog: &Arc<Catalog>, id: ShardId) -> Fence {
        catalog.fenced.lock().insert(id);
        Fence { catalog: catalog.clone(), id }
    }
}

impl Drop for Fence {
    fn drop(&mut self) {
        self.catalog.fenced.lock().remove(&self.id);
    }
}

#[cfg(test)]
#[cfg(feature = "failpoints")]
mod failpoints;
#[cfg(test)]
mod tests;
