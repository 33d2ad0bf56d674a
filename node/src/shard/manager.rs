//! Which shards are open: opened at the first use, closed when others need the place, deleted for good.
//!
//! Owns: the block cache and write-buffer budget that all shards share, the table of shards, and the
//! task that syncs what was answered as buffered, ends silent sessions and gives freed space back.
//!
//! Invariants: a shard's database is open at most once: opening, closing and deleting one hold its
//! slot's lock. A shard that anyone still holds is not closed for want of places. A folder with the name
//! `shard-N` is a whole shard: it is built under another name and renamed; one that is deleted is renamed
//! first, so a crash leaves nothing that looks like a shard. A new shard is never made of another one's folder: ids are
//! given again after the metadata store was restored to an older state.
//!
//! Must not: decide which shards exist or who may use them (`catalog`).

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use shardfs_proto::types::limits::SESSION_TTL;
use shardfs_proto::types::{Error, Reason, Result, ShardId, clock};
use tokio::runtime::Handle;

use super::executor::FLUSH_WORTH_BYTES;
use super::handle::{Shard, initialize};
use super::rocks::{RocksShared, RocksStore};
use super::store::{Store, StoreProperties};
use super::{PublishedView, Room, ShardInit};
use copies::remove_building;
pub use copies::{CopyInit, check_creation, rehome};

mod copies;

/// Age at which buffered operations are synced, and how often that is looked at: together, with a slow
/// sync, below UNSYNCED_AGE_MAX.
const UNSYNCED_AGE: Duration = Duration::from_secs(2);
const TICK: Duration = Duration::from_millis(500);
/// Ticks between two looks at space to give back, and at sessions.
const RECLAIM_TICKS: u64 = 4;
const SESSION_TICKS: u64 = 30;
/// Freed logical bytes after which a shard's files are rewritten at once.
const RECLAIM_BYTES: u64 = 256 << 20;
/// The same while the volume is short of room, and what short means.
const RECLAIM_BYTES_SHORT: u64 = 1 << 20;
const SHORT_ROOM_BYTES: u64 = 512 << 20;
/// Ticks between two looks at what a reclaim left, and how much of it is worth another.
const RECLAIM_AGAIN_TICKS: u64 = 20;
const RECLAIM_LEFT_BYTES: u64 = 16 << 20;
/// How long an open waits for a place, and a close for its callers to leave.
const PLACE_WAIT_MAX: Duration = Duration::from_secs(5);
const LEAVE_WAIT_MAX: Duration = Duration::from_secs(10);
/// Shards that are being opened at a time: an opening reads and replays a log, on a thread of its own.
const OPENINGS_MAX: usize = 8;
const WAIT_STEP: Duration = Duration::from_millis(10);

/// Sizes of what the shards of a node share.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ShardSettings {
    /// Block cache, bytes.
    pub block_cache_bytes: usize,
    /// Memtables of all shards, bytes.
    pub write_buffer_bytes: usize,
    /// Shards that are open at a time.
    pub open_shards_max: usize,
    /// Silence after which a session ends.
    pub session_ttl: Duration,
}

impl Default for ShardSettings {
    fn default() -> ShardSettings {
        ShardSettings {
            block_cache_bytes: 256 << 20,
            write_buffer_bytes: 128 << 20,
            open_shards_max: 256,
            session_ttl: SESSION_TTL,
        }
    }
}

/// Figures of the manager and, summed, of the open shards' stores.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ManagerStatus {
    /// Shards open.
    pub open_shards: usize,
    /// Shards that may be open.
    pub open_shards_max: usize,
    /// Block cache in use, bytes.
    pub block_cache_used_bytes: u64,
    /// Block cache, bytes.
    pub block_cache_capacity_bytes: u64,
    /// Memtables, bytes.
    pub write_buffer_used_bytes: u64,
    /// Memtables' budget, bytes.
    pub write_buffer_capacity_bytes: u64,
    /// Of the open shards' stores.
    pub stores: StoreProperties,
}

/// An open shard and the room it was opened with.
type Open = (Arc<Shard>, Arc<dyn Room>);

/// One shard's place in the table.
#[derive(Default)]
struct Slot {
    /// Locked while the shard is being opened, closed or deleted.
    shard: tokio::sync::Mutex<Option<Open>>,
    /// The open shard again, for the fast path: dead while it is closed.
    open: Mutex<Weak<Shard>>,
    last_used: AtomicU64,
}

impl Slot {
    fn open(&self) -> Option<Arc<Shard>> {
        self.open.lock().upgrade().filter(|shard| !shard.is_broken())
    }
}

/// See the module.
pub struct ShardManager {
    settings: ShardSettings,
    shared: RocksShared,
    slots: Mutex<HashMap<ShardId, Arc<Slot>>>,
    clock: AtomicU64,
    started: AtomicBool,
    opening: tokio::sync::Semaphore,
    /// Shards that are being looked after.
    kept_up: Mutex<HashSet<ShardId>>,
}

impl ShardManager {
    /// With nothing open.
    pub fn new(settings: ShardSettings) -> Arc<ShardManager> {
        let shared = RocksShared::new(settings.block_cache_bytes, settings.write_buffer_bytes);
        Arc::new(ShardManager {
            settings,
            shared,
            slots: Mutex::default(),
            clock: AtomicU64::new(0),
            started: AtomicBool::new(false),
            opening: tokio::sync::Semaphore::new(OPENINGS_MAX),
            kept_up: Mutex::default(),
        })
    }

    /// Makes a shard in a folder, of no creation in particular. See [`ShardManager::create_by`].
    pub fn create(&self, dir: &Path, init: &ShardInit) -> Result<()> {
        self.create_by(dir, init, "")
    }

    /// Makes a shard in a folder. Blocks; durable when it returns; done already by the same creation, which `origin` tells from
    /// all others: no error. A shard of another creation is left alone: [`Reason::AlreadyExists`], which means nothing
    /// else here.
    pub fn create_by(&self, dir: &Path, init: &ShardInit, origin: &str) -> Result<()> {
        if is_whole(dir) {
            return check_origin(dir, init.id, origin);
        }
        let building = with_suffix(dir, "creating")?;
        remove_tree(&building)?;
        io("make", &building, std::fs::create_dir_all(&building))?;
        fail::fail_point!("shard::create::made_dir");
        write_file(&building.join(ORIGIN_FILE), origin.as_bytes())?;
        {
            let store = RocksStore::create(&self.shared, init.id, &building)?;
            fail::fail_point!("shard::create::made_db");
            initialize(&store, init)?;
            store.flush()?;
        }
        fail::fail_point!("shard::create::initialized");
        sync_dir(&building)?;
        io("rename", &building, std::fs::rename(&building, dir))?;
        sync_dir(parent(dir)?)?;
        fail::fail_point!("shard::create::renamed");
        Ok(())
    }

    fn slot(&self, id: ShardId) -> Arc<Slot> {
        Arc::clone(self.slots.lock().entry(id).or_default())
    }

    /// A shard, if it is open. That somebody asks whether it is, is no use of it.
    pub fn opened(&self, id: ShardId) -> Option<Arc<Shard>> {
        self.slots.lock().get(&id)?.open()
    }

    /// The shard in a folder, opened if need be. Whoever holds it keeps it open.
    pub async fn open(self: &Arc<Self>, id: ShardId, dir: &Path, room: Arc<dyn Room>) -> Result<Arc<Shard>> {
        let slot = self.slot(id);
        slot.last_used.store(self.clock.fetch_add(1, Ordering::Relaxed), Ordering::Relaxed);
        if let Some(shard) = slot.open() {
            return Ok(shard);
        }
        self.start_background();
        let mut guard = slot.shard.lock().await;
        if let Some((shard, _)) = &*guard {
            if !shard.is_broken() {
                return Ok(Arc::clone(shard));
            }
            self.close_locked(id, &slot, &mut guard).await?;
        }
        self.make_place(id).await?;
        // When a volume moves, everybody comes for his shards at once: all of them together would leave the node no time to live.
        let permit = self.opening.acquire().await;
        permit.as_ref().map_err(|_| Error::unavailable("the node is stopping"))?;
        let (shared, path, room_too) = (self.shared.clone(), dir.to_owned(), Arc::clone(&room));
        let runtime = Handle::current();
        let opened = tokio::task::spawn_blocking(move || -> Result<Arc<Shard>> {
            if !is_whole(&path) {
                return Err(Error::corrupt(format!(
                    "shard {id}: {} is not a shard's folder",
                    path.display()
                ))
                .with_shard(id));
            }
            let store = Arc::new(RocksStore::open(&shared, id, &path)?);
            copies::finish_adoption(&path, id, &store, &room_too)?;
            Shard::open(id, store, room_too, runtime)
        })
        .await;
        drop(permit);
        let shard = opened.map_err(|e| Error::internal(format!("shard {id}: the open was lost: {e}")))??;
        *slot.open.lock() = Arc::downgrade(&shard);
        *guard = Some((Arc::clone(&shard), room));
        tracing::debug!(shard = %id, "opened");
        Ok(shard)
    }

    /// Opens a published view in a folder; `keeps` lives as long as it. It takes no place among the open shards.
    pub async fn open_published(
        &self,
        id: ShardId,
        dir: PathBuf,
        keeps: Box<dyn Any + Send + Sync>,
    ) -> Result<PublishedView> {
        let shared = self.shared.clone();
        let opened = tokio::task::spawn_blocking(move || PublishedView::open(&shared, id, &dir, keeps)).await;
        opened.map_err(|e| Error::internal(format!("shard {id}: opening a view was lost: {e}")))?
    }

    /// Closes idle shards until there is a place for one more.
    async fn make_place(&self, opening: ShardId) -> Result<()> {
        let begun = clock::monotonic();
        loop {
            let mut candidates: Vec<(u64, ShardId, Arc<Slot>)> = {
                let slots = self.slots.lock();
                let open = |slot: &&Arc<Slot>| slot.open.lock().strong_count() > 0;
                if slots.values().filter(open).count() < self.settings.open_shards_max {
                    return Ok(());
                }
                slots
                    .iter()
                    .filter(|(id, slot)| **id != opening && slot.open.lock().strong_count() == 1)
                    .map(|(id, slot)| (slot.last_used.load(Ordering::Relaxed), *id, Arc::clone(slot)))
                    .collect()
            };
            candidates.sort_unstable_by_key(|(used, ..)| *used);
            let mut closed = false;
            for (_, id, slot) in candidates {
                let Ok(mut guard) = slot.shard.try_lock() else { continue };
                match self.close_if_idle(id, &slot, &mut guard).await {
                    Ok(true) => {
                        closed = true;
                        break;
                    }
                    Ok(false) => {}
                    // Another one may do.
                    Err(error) => tracing::debug!(shard = %id, %error, "an idle shard cannot be closed"),
                }
            }
            if closed {
                continue;
            }
            if clock::monotonic().saturating_duration_since(begun) > PLACE_WAIT_MAX {
                return Err(Error::new(
                    Reason::Busy,
                    format!(
                        "shard {opening}: {} shards are open and in use, the limit: try again, or raise open_shards_max",
                        self.settings.open_shards_max
                    ),
                )
                .with_retry_after_ms(500));
            }
            tokio::time::sleep(WAIT_STEP).await;
        }
    }

    /// Closes a shard unless anyone holds it; whether it did.
    async fn close_if_idle(&self, id: ShardId, slot: &Slot, guard: &mut Option<Open>) -> Result<bool> {
        let Some((shard, _)) = guard.as_ref() else { return Ok(false) };
        shard.sync().await?;
        // With the weak handle emptied under its lock nobody can come by any more.
        {
            let mut open = slot.open.lock();
            if Arc::strong_count(shard) > 1 {
                return Ok(false);
            }
            *open = Weak::new();
        }
        let taken = guard.take();
        let dropped = tokio::task::spawn_blocking(move || drop(taken)).await;
        dropped.map_err(|e| Error::internal(format!("shard {id}: the close was lost: {e}")))?;
        tracing::debug!(shard = %id, "closed");
        Ok(true)
    }

    /// Closes a shard for certain: nobody gets it any more, those who hold it are waited for.
    async fn close_locked(&self, id: ShardId, slot: &Slot, guard: &mut Option<Open>) -> Result<()> {
        let Some((shard, _)) = guard.as_ref() else { return Ok(()) };
        if !shard.is_broken() {
            shard.sync().await?;
        }
        *slot.open.lock() = Weak::new();
        shard.want_back(true);
        let begun = clock::monotonic();
        while Arc::strong_count(shard) > 1 {
            if clock::monotonic().saturating_duration_since(begun) > LEAVE_WAIT_MAX {
                shard.want_back(false);
                *slot.open.lock() = Arc::downgrade(shard);
                return Err(Error::unavailable(format!(
                    "shard {id} is in use and cannot be closed yet: try again"
                ))
                .with_retry_after_ms(500));
            }
            tokio::time::sleep(WAIT_STEP).await;
        }
        let taken = guard.take();
        let dropped = tokio::task::spawn_blocking(move || drop(taken)).await;
        dropped.map_err(|e| Error::internal(format!("shard {id}: the close was lost: {e}")))
    }

    /// Syncs and closes a shard if it is open.
    pub async fn close(&self, id: ShardId) -> Result<()> {
        let Some(slot) = self.slots.lock().get(&id).cloned() else { return Ok(()) };
        let mut guard = slot.shard.lock().await;
        self.close_locked(id, &slot, &mut guard).await
    }

    /// Closes a shard whose volume is another node's now: nothing is synced, and those who hold it are waited for.
    pub async fn abandon(&self, id: ShardId) -> Result<()> {
        let Some(slot) = self.slots.lock().get(&id).cloned() else { return Ok(()) };
        let mut guard = slot.shard.lock().await;
        if let Some((shard, _)) = guard.as_ref() {
            shard.executor().give_up();
        }
        self.close_locked(id, &slot, &mut guard).await
    }

    /// Closes those shards that are open; see [`ShardManager::abandon`]. The first error after all were tried.
    pub async fn abandon_all(&self, which: impl Fn(ShardId) -> bool) -> Result<()> {
        let ids: Vec<ShardId> = {
            let slots = self.slots.lock();
            let open = |slot: &Slot| slot.shard.try_lock().is_ok_and(|shard| shard.is_some());
            slots.iter().filter(|(id, slot)| which(**id) && open(slot)).map(|(id, _)| *id).collect()
        };
        let closed = futures::future::join_all(ids.into_iter().map(|id| self.abandon(id))).await;
        closed.into_iter().collect()
    }

    /// Writes what shards have in memory to their files; what fails is logged.
    pub async fn flush(&self, which: impl Fn(ShardId) -> bool) {
        let flushing =
            self.open_shards().into_iter().filter(|(shard, _)| which(shard.id())).map(|(shard, _)| {
                tokio::task::spawn_blocking(move || {
                    if let Err(error) = shard.executor().store().flush() {
                        tracing::warn!(shard = %shard.id(), %error, "flushing a shard");
                    }
                })
            });
        futures::future::join_all(flushing.collect::<Vec<_>>()).await;
    }

    /// Syncs and closes all shards; the first error after all were tried.
    pub async fn close_all(&self) -> Result<()> {
        let ids: Vec<ShardId> = self.slots.lock().keys().copied().collect();
        let closed = futures::future::join_all(ids.into_iter().map(|id| self.close(id))).await;
        closed.into_iter().collect()
    }

    /// Removes a shard with its folder. Durable when it returns; a deletion that was cut off goes on.
    pub async fn delete(&self, id: ShardId, dir: &Path) -> Result<()> {
        let slot = self.slot(id);
        let mut guard = slot.shard.lock().await;
        self.close_locked(id, &slot, &mut guard).await?;
        let dir = dir.to_owned();
        let deleted = tokio::task::spawn_blocking(move || delete_dir(&dir)).await;
        deleted.map_err(|e| Error::internal(format!("shard {id}: the deletion was lost: {e}")))??;
        drop(guard);
        let mut slots = self.slots.lock();
        // Somebody may have come by meanwhile; their open finds no folder.
        if slots.get(&id).is_some_and(|there| Arc::ptr_eq(there, &slot) && Arc::strong_count(&slot) == 2) {
            slots.remove(&id);
        }
        Ok(())
    }

    /// Figures; a moment's work for each open shard.
    pub fn status(&self) -> ManagerStatus {
        let open = self.open_shards();
        let mut stores = StoreProperties::default();
        for (shard, _) in &open {
            let p = shard.properties();
            stores.sst_bytes += p.sst_bytes;
            stores.blob_bytes += p.blob_bytes;
            stores.memtable_bytes += p.memtable_bytes;
            stores.pending_compaction_bytes += p.pending_compaction_bytes;
            stores.write_stalled |= p.write_stalled;
        }
        ManagerStatus {
            open_shards: open.len(),
            open_shards_max: self.settings.open_shards_max,
            block_cache_used_bytes: self.shared.cache_used_bytes(),
            block_cache_capacity_bytes: self.shared.cache_capacity_bytes(),
            write_buffer_used_bytes: self.shared.write_buffer_used_bytes(),
            write_buffer_capacity_bytes: self.settings.write_buffer_bytes as u64,
            stores,
        }
    }

    /// The open shards whose slots are not being changed just now.
    fn open_shards(&self) -> Vec<Open> {
        let slots: Vec<Arc<Slot>> = self.slots.lock().values().cloned().collect();
        slots.iter().filter_map(|slot| slot.shard.try_lock().ok()?.clone()).collect()
    }

    fn start_background(self: &Arc<Self>) {
        if self.started.swap(true, Ordering::AcqRel) {
            return;
        }
        let manager = Arc::downgrade(self);
        tokio::spawn(async move {
            let mut ticks = 0u64;
            loop {
                tokio::time::sleep(TICK).await;
                let Some(manager) = manager.upgrade() else { return };
                ticks += 1;
                manager.keep_up(ticks);
            }
        });
    }

    /// Looks after every open shard, each in a task of its own: one whose device hangs keeps no other waiting.
    fn keep_up(self: &Arc<Self>, ticks: u64) {
        let ttl = self.settings.session_ttl;
        for (shard, room) in self.open_shards() {
            if !self.kept_up.lock().insert(shard.id()) {
                continue;
            }
            let under_way = KeptUp { manager: self.clone(), shard: shard.id() };
            tokio::spawn(async move {
                keep_up_one(shard, room, ticks, ttl).await;
                drop(under_way);
            });
        }
    }
}

/// A shard is being looked after, for as long as this lives.
struct KeptUp {
    manager: Arc<ShardManager>,
    shard: ShardId,
}

impl Drop for KeptUp {
    fn drop(&mut self) {
        self.manager.kept_up.lock().remove(&self.shard);
    }
}

async fn keep_up_one(shard: Arc<Shard>, room: Arc<dyn Room>, ticks: u64, ttl: Duration) {
    if let Err(error) = shard.keep_up(UNSYNCED_AGE).await {
        tracing::warn!(shard = %shard.id(), %error, "buffered operations could not be synced yet");
    }
    let unflushed = shard.executor().note_unflushed();
    if room.growth_bytes() < SHORT_ROOM_BYTES && unflushed >= FLUSH_WORTH_BYTES {
        let shard = Arc::clone(&shard);
        let flush = move || shard.executor().flush_if_short(SHORT_ROOM_BYTES);
        if let Err(error) = tokio::task::spawn_blocking(flush).await {
            tracing::error!(%error, "a flush panicked");
        }
    }
    if ticks.is_multiple_of(SESSION_TICKS)
        && let Err(error) = shard.expire_sessions(ttl).await
    {
        tracing::debug!(shard = %shard.id(), %error, "sessions could not be looked at");
    }
    if !ticks.is_multiple_of(RECLAIM_TICKS) {
        return;
    }
    let short = room.growth_bytes() < SHORT_ROOM_BYTES;
    let enough = if short { RECLAIM_BYTES_SHORT } else { RECLAIM_BYTES };
    let executor = shard.executor();
    // The files tell as well: a reclaim that found no room for itself, or a snapshot in its way,
    // gave back less than was freed.
    let left = || {
        let (files, used) = (shard.properties(), executor.usage().used_bytes);
        (files.sst_bytes + files.blob_bytes).saturating_sub(used + used / 4) >= RECLAIM_LEFT_BYTES
    };
    let again = short && ticks.is_multiple_of(RECLAIM_AGAIN_TICKS) && left();
    if (executor.freed_bytes() >= enough || again) && executor.begin_reclaim() {
        let freed = executor.take_freed_bytes();
        // Not waited for: it may take minutes. The shard stays open meanwhile.
        tokio::task::spawn_blocking(move || {
            let executor = shard.executor();
            if let Err(error) = executor.store().reclaim() {
                executor.note_freed_bytes(freed);
                match error.reason() {
                    // It was stopped for the shard to be closed.
                    Reason::Unavailable => {
                        tracing::debug!(shard = %shard.id(), %error, "freed space is given back later")
                    }
                    _ => {
                        tracing::warn!(shard = %shard.id(), %error, "freed space could not be given back yet")
                    }
                }
            }
            executor.end_reclaim();
        });
    }
}

/// Whether a folder holds a whole database.
fn is_whole(dir: &Path) -> bool {
    dir.join("CURRENT").is_file()
}

/// The file beside the database that tells of which creation it is. Shards of earlier versions have none.
const ORIGIN_FILE: &str = "origin";

fn write_file(path: &Path, content: &[u8]) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut file = File::create(path)?;
        file.write_all(content)?;
        file.sync_all()
    };
    io("write", path, write())
}

/// Fails unless a whole shard is of this creation. One without a word about it was made by an earlier version, in another call
/// than this one.
fn check_origin(dir: &Path, id: ShardId, origin: &str) -> Result<()> {
    let path = dir.join(ORIGIN_FILE);
    match std::fs::read(&path) {
        Ok(found) if found == origin.as_bytes() => Ok(()),
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => io("read", &path, Err(e)),
        Ok(_) | Err(_) => Err(Error::new(
            Reason::AlreadyExists,
            format!(
                "the folder {} of shard {id} holds a shard of another creation and is left alone: was the metadata store restored \
                 to an older state?",
                dir.display()
            ),
        )
        .with_shard(id)),
    }
}

fn with_suffix(dir: &Path, suffix: &str) -> Result<PathBuf> {
    let name =
        dir.file_name().ok_or_else(|| Error::internal(format!("{}: no folder's name", dir.display())))?;
    let mut name = name.to_owned();
    name.push(".");
    name.push(suffix);
    Ok(dir.with_file_name(name))
}

fn parent(dir: &Path) -> Result<&Path> {
    dir.parent().ok_or_else(|| Error::internal(format!("{}: a folder without a parent", dir.display())))
}

fn delete_dir(dir: &Path) -> Result<()> {
    let doomed = with_suffix(dir, "deleted")?;
    if dir.exists() {
        // One that was cut off goes first, so that the name is free.
        remove_tree(&doomed)?;
        io("rename", dir, std::fs::rename(dir, &doomed))?;
        sync_dir(parent(dir)?)?;
    }
    fail::fail_point!("shard::delete::renamed");
    remove_tree(&doomed)?;
    remove_building(&with_suffix(dir, "creating")?)?;
    if parent(dir)?.exists() {
        sync_dir(parent(dir)?)?;
    }
    Ok(())
}

fn remove_tree(dir: &Path) -> Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        result => io("remove", dir, result),
    }
}

fn sync_dir(dir: &Path) -> Result<()> {
    io("sync", dir, File::open(dir).and_then(|file| file.sync_all()))
}

fn io<T>(what: &str, path: &Path, result: std::io::Result<T>) -> Result<T> {
    result.map_err(|e| {
        let reason = match e.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => Reason::VolumeFull,
            _ => Reason::Io,
        };
        Error::new(reason, format!("{what} {}: {e}", path.display()))
    })
}
