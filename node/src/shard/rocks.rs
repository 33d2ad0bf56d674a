//! A shard's store on RocksDB; the only file that knows rocksdb.
//!
//! Owns: the options of the database and its families, the merge operator's registration, and what
//! RocksDB's errors mean. The block cache, the write-buffer budget and the background threads are
//! shared by all shards of a process ([`RocksShared`]).
//!
//! Invariants: the log is recovered to a point in time and its files are listed in the manifest, so a
//! lost one is an error and no silent crash tail; damage within a log is found before it is replayed (`wal`); a snapshot or iterator never outlives its database.
//!
//! Must not: know what keys and values mean (chunk patches excepted).

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bytes::Bytes;
use parking_lot::Mutex;
use rocksdb::checkpoint::Checkpoint;
use rocksdb::{
    BlockBasedOptions, BottommostLevelCompaction, Cache, ColumnFamily, ColumnFamilyDescriptor,
    CompactOptions, DB, DBCompressionType, DBRawIterator, DBRecoveryMode, Env, ErrorKind, FlushOptions,
    InfoLogger, LogLevel, MergeOperands, Options, ReadOptions, Snapshot, WriteBatch, WriteBufferManager,
    WriteOptions,
};
use shardfs_proto::types::{Error, Reason, Result, ShardId};

use super::chunk;
use super::keys::Cf;
use super::store::{Batch, Change, Reader, Store, StoreProperties, Visit};

/// Bytes of a memtable of `chunk`, and of each other family; the shared budget bounds their sum.
const CHUNK_WRITE_BUFFER_BYTES: usize = 32 << 20;
const WRITE_BUFFER_BYTES: usize = 16 << 20;
/// The unit in which memtables take memory: small, because most families of most shards hold little.
const ARENA_BLOCK_BYTES: usize = 128 << 10;
/// Bytes of log that an open (a failover) may have to replay.
const WAL_BYTES_MAX: u64 = 96 << 20;
/// Chunk values of at least this size live in blob files: compactions do not rewrite them.
const BLOB_BYTES_MIN: u64 = 16 << 10;
/// Bytes of a blob file.
const BLOB_FILE_BYTES: u64 = 64 << 20;
/// Patches of one chunk in a memtable before they are folded at the next write.
const PATCHES_MAX: usize = 16;
/// Files that one shard keeps open.
const OPEN_FILES_MAX: i32 = 512;
/// RocksDB's own log: size and number of files.
const INFO_LOG_BYTES_MAX: usize = 1 << 20;
const INFO_LOG_FILES_MAX: usize = 3;
/// Background threads of all shards together: flushes, compactions.
const FLUSH_THREADS: i32 = 2;
const COMPACTION_THREADS: i32 = 2;
/// The name under which the merge operator is recorded in the database.
const MERGE_OPERATOR: &str = "shardfs.chunk.v1";

/// What all shards of a process share.
#[derive(Clone)]
pub struct RocksShared {
    cache: Cache,
    cache_capacity_bytes: usize,
    write_buffers: WriteBufferManager,
    env: Env,
}

impl RocksShared {
    /// One block cache and one write-buffer budget of these sizes in bytes.
    pub fn new(block_cache_bytes: usize, write_buffer_bytes: usize) -> RocksShared {
        let mut env = Env::new().expect("the default environment is always there");
        env.set_high_priority_background_threads(FLUSH_THREADS);
        env.set_low_priority_background_threads(COMPACTION_THREADS);
        RocksShared {
            cache: Cache::new_hyper_clock_cache(block_cache_bytes, 0),
            cache_capacity_bytes: block_cache_bytes,
            write_buffers: WriteBufferManager::new_write_buffer_manager(write_buffer_bytes, false),
            env,
        }
    }

    /// Bytes of the block cache in use.
    pub fn cache_used_bytes(&self) -> u64 {
        self.cache.get_usage() as u64
    }

    /// Bytes that the block cache may take.
    pub fn cache_capacity_bytes(&self) -> u64 {
        self.cache_capacity_bytes as u64
    }

    /// Bytes of all memtables.
    pub fn write_buffer_used_bytes(&self) -> u64 {
        self.write_buffers.get_usage() as u64
    }

    fn db_options(&self, create: bool) -> Options {
        let mut o = Options::default();
        o.set_env(&self.env);
        o.create_if_missing(create);
        o.create_missing_column_families(create);
        o.set_paranoid_checks(true);
        o.set_wal_recovery_mode(DBRecoveryMode::PointInTime);
        o.set_track_and_verify_wals_in_manifest(true);
        o.set_max_total_wal_size(WAL_BYTES_MAX);
        o.set_write_buffer_manager(&self.write_buffers);
        o.set_max_open_files(OPEN_FILES_MAX);
        o.set_max_background_jobs(FLUSH_THREADS + COMPACTION_THREADS);
        // Preallocated log space of many open shards would eat a small volume.
        o.set_allow_fallocate(false);
        o.set_bytes_per_sync(1 << 20);
        o.set_log_level(LogLevel::Warn);
        o.set_max_log_file_size(INFO_LOG_BYTES_MAX);
        o.set_keep_log_file_num(INFO_LOG_FILES_MAX);
        o.set_stats_dump_period_sec(0);
        o.set_stats_persist_period_sec(0);
        o
    }

    fn family_options(&self, cf: Option<Cf>) -> Options {
        let mut table = BlockBasedOptions::default();
        table.set_block_cache(&self.cache);
        table.set_block_size(8 << 10);
        table.set_bloom_filter(10.0, false);
        table.set_cache_index_and_filter_blocks(true);
        table.set_pin_l0_filter_and_index_blocks_in_cache(true);
        table.set_format_version(6);
        let mut o = Options::default();
        o.set_block_based_table_factory(&table);
        o.set_compression_type(DBCompressionType::Lz4);
        o.set_write_buffer_size(WRITE_BUFFER_BYTES);
        o.set_arena_block_size(ARENA_BLOCK_BYTES);
        o.set_write_buffer_manager(&self.write_buffers);
        o.set_level_compaction_dynamic_level_bytes(true);
        // No Bloom filters of memtables: each takes a part of the largest memtable's size when it is made, of the budget as well, and most
        // families of most shards hold little.
        if cf == Some(Cf::Chunk) {
            o.set_write_buffer_size(CHUNK_WRITE_BUFFER_BYTES);
            o.set_enable_blob_files(true);
            o.set_min_blob_size(BLOB_BYTES_MIN);
            o.set_blob_file_size(BLOB_FILE_BYTES);
            o.set_blob_compression_type(DBCompressionType::None);
            o.set_enable_blob_gc(true);
            o.set_blob_gc_age_cutoff(0.25);
            o.set_blob_gc_force_threshold(0.5);
            o.set_blob_cache(&self.cache);
            o.set_max_successive_merges(PATCHES_MAX);
            o.set_merge_operator(MERGE_OPERATOR, full_merge, partial_merge);
        }
        if matches!(cf, Some(Cf::Dirent | Cf::Cookie | Cf::Chunk | Cf::Sys)) {
            // Many tombstones in a row make scans slow: such files are compacted early.
            o.add_compact_on_deletion_collector_factory(4096, 2048, 0.5);
        }
        o
    }
}

fn full_merge(_key: &[u8], base: Option<&[u8]>, patches: &MergeOperands) -> Option<Vec<u8>> {
    chunk::apply_patches(base, patches)
}

fn partial_merge(_key: &[u8], _base: Option<&[u8]>, patches: &MergeOperands) -> Option<Vec<u8>> {
    chunk::join_patches(patches.iter())
}

struct Inner {
    shard: ShardId,
    db: DB,
}

impl Inner {
    fn cf(&self, cf: Cf) -> &ColumnFamily {
        self.db.cf_handle(cf.name()).expect("every family was opened")
    }

    fn error(&self, what: &str, e: &rocksdb::Error) -> Error {
        map_error(self.shard, what, e)
    }

    fn get(&self, cf: Cf, key: &[u8], options: &ReadOptions) -> Result<Option<Bytes>> {
        match self.db.get_cf_opt(self.cf(cf), key, options) {
            Ok(value) => Ok(value.map(Bytes::from)),
            Err(e) => Err(self.error("read", &e)),
        }
    }

    fn multi_get(&self, cf: Cf, keys: &[&[u8]], options: &ReadOptions) -> Result<Vec<Option<Bytes>>> {
        let found = self.db.batched_multi_get_cf_opt(self.cf(cf), keys.iter().copied(), false, options);
        found
            .into_iter()
            .map(|value| match value {
                Ok(value) => Ok(value.map(|v| Bytes::copy_from_slice(&v))),
                Err(e) => Err(self.error("read", &e)),
            })
            .collect()
    }

    fn contains(&self, cf: Cf, key: &[u8], mut options: ReadOptions) -> Result<bool> {
        if cf != Cf::Chunk {
            return match self.db.get_pinned_cf_opt(self.cf(cf), key, &options) {
                Ok(value) => Ok(value.is_some()),
                Err(e) => Err(self.error("read", &e)),
            };
        }
        // An iterator finds the key without fetching the blob.
        options.set_allow_unprepared_value(true);
        let mut iterator = self.db.raw_iterator_cf_opt(self.cf(cf), options);
        iterator.seek(key);
        if let Some(found) = iterator.key() {
            return Ok(found == key);
        }
        iterator.status().map_err(|e| self.error("read", &e))?;
        Ok(false)
    }

    fn scan(
        &self,
        cf: Cf,
        (from, to): (&[u8], Option<&[u8]>),
        mut options: ReadOptions,
        keys_only: bool,
        visit: &mut Visit<'_>,
    ) -> Result<()> {
        if to.is_some_and(|to| to <= from) {
            return Ok(());
        }
        if let Some(to) = to {
            options.set_iterate_upper_bound(to);
        }
        if keys_only {
            options.set_allow_unprepared_value(true);
        }
        let mut iterator: DBRawIterator<'_> = self.db.raw_iterator_cf_opt(self.cf(cf), options);
        iterator.seek(from);
        while let Some(key) = iterator.key() {
            let flow = if keys_only {
                visit(key, &[])?
            } else {
                let value = iterator.value().unwrap_or_default();
                visit(key, value)?
            };
            if let ControlFlow::Break(()) = flow {
                return Ok(());
            }
            iterator.next();
        }
        iterator.status().map_err(|e| self.error("scan", &e))
    }
}

/// A store on RocksDB.
pub struct RocksStore {
    inner: Arc<Inner>,
    reclaims: Reclaims,
}

/// Whether reclaims may run. `stopped` and `under_way` are each changed before the other one is looked at, so either a
/// reclaim sees that it must not run, or who stops them sees that one does.
#[derive(Default)]
struct Reclaims {
    stopped: AtomicBool,
    under_way: AtomicUsize,
    /// Whether RocksDB runs no manual compactions. It counts how often it was told, and must not be told to go on once too often.
    paused: Mutex<bool>,
}

/// A reclaim is under way, for as long as this lives.
struct Reclaiming<'a>(&'a Reclaims);

impl Reclaiming<'_> {
    fn begin(reclaims: &Reclaims) -> Reclaiming<'_> {
        reclaims.under_way.fetch_add(1, Ordering::SeqCst);
        Reclaiming(reclaims)
    }

    fn is_stopped(&self) -> bool {
        self.0.stopped.load(Ordering::SeqCst)
    }
}

impl Drop for Reclaiming<'_> {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::SeqCst);
    }
}

impl RocksStore {
    /// Makes a new database, or opens one that is there, with all families.
    pub fn create(shared: &RocksShared, shard: ShardId, path: &Path) -> Result<RocksStore> {
        Self::open_with(shared, shard, path, true)
    }

    /// Opens a database that must be there. Replays its log. An error names the shard and what is wrong.
    pub fn open(shared: &RocksShared, shard: ShardId, path: &Path) -> Result<RocksStore> {
        super::wal::check_logs(path)
            .and_then(|()| super::wal::cut_manifest(path))
            .map_err(|e| e.context(format!("shard {shard}")).with_shard(shard))?;
        Self::open_with(shared, shard, path, false)
    }

    fn open_with(shared: &RocksShared, shard: ShardId, path: &Path, create: bool) -> Result<RocksStore> {
        let mut families = vec![ColumnFamilyDescriptor::new("default", shared.family_options(None))];
        for cf in Cf::ALL {
            families.push(ColumnFamilyDescriptor::new(cf.name(), shared.family_options(Some(cf))));
        }
        let db = DB::open_cf_descriptors(&shared.db_options(create), path, families)
            .map_err(|e| map_error(shard, &format!("open {}", path.display()), &e))?;
        Ok(RocksStore::of(shard, db))
    }

    fn of(shard: ShardId, db: DB) -> RocksStore {
        RocksStore { inner: Arc::new(Inner { shard, db }), reclaims: Reclaims::default() }
    }

    /// Deletes the files of a closed database.
    pub fn destroy(shared: &RocksShared, shard: ShardId, path: &Path) -> Result<()> {
        DB::destroy(&shared.db_options(false), path)
            .map_err(|e| map_error(shard, &format!("destroy {}", path.display()), &e))
    }
}

impl Reader for RocksStore {
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Bytes>> {
        match self.inner.db.get_cf(self.inner.cf(cf), key) {
            Ok(value) => Ok(value.map(Bytes::from)),
            Err(e) => Err(self.inner.error("read", &e)),
        }
    }

    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Bytes>>> {
        self.inner.multi_get(cf, keys, &ReadOptions::default())
    }

    fn contains(&self, cf: Cf, key: &[u8]) -> Result<bool> {
        self.inner.contains(cf, key, ReadOptions::default())
    }

    fn scan(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.inner.scan(cf, (from, to), ReadOptions::default(), false, visit)
    }

    fn scan_keys(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.inner.scan(cf, (from, to), ReadOptions::default(), true, visit)
    }
}

/// Opens a checkpoint, perhaps on a device that refuses writes: changes nothing, and logs nowhere.
pub fn open_published(shared: &RocksShared, shard: ShardId, path: &Path) -> Result<Arc<dyn Reader>> {
    super::wal::check_logs(path).map_err(|e| e.context(format!("shard {shard}")).with_shard(shard))?;
    let mut options = shared.db_options(false);
    // All tables from the beginning: their names may be gone later.
    options.set_max_open_files(-1);
    // The logs stay verified (`db_options`): told not to, RocksDB 11.12 wants to write that to the manifest, and crashes.
    options.set_info_logger(InfoLogger::new_callback_logger(LogLevel::Error, |_, message| {
        tracing::debug!(message, "rocksdb");
    }));
    let mut families = vec![ColumnFamilyDescriptor::new("default", shared.family_options(None))];
    for cf in Cf::ALL {
        families.push(ColumnFamilyDescriptor::new(cf.name(), shared.family_options(Some(cf))));
    }
    let db = DB::open_cf_descriptors_read_only(&options, path, families, false)
        .map_err(|e| map_error(shard, &format!("open the view {}", path.display()), &e))?;
    Ok(Arc::new(RocksStore::of(shard, db)))
}

/// A snapshot with the database that it is of.
struct RocksSnapshot {
    /// Dropped before `inner`: fields drop in order of declaration.
    snapshot: Snapshot<'static>,
    inner: Arc<Inner>,
}

// SAFETY: a RocksDB snapshot is an immutable sequence number behind a pointer; RocksDB allows its use
// and release from any thread.
unsafe impl Send for RocksSnapshot {}
// SAFETY: as above; reads through it take no exclusive state.
unsafe impl Sync for RocksSnapshot {}

impl RocksSnapshot {
    fn new(inner: &Arc<Inner>) -> RocksSnapshot {
        let inner = Arc::clone(inner);
        let snapshot = inner.db.snapshot();
        // SAFETY: the snapshot borrows `inner.db`, which lives in the Arc's allocation and is kept alive
        // and unmoved by `inner`; the field order drops the snapshot first; the 'static reference never
        // leaves this type.
        let snapshot = unsafe { std::mem::transmute::<Snapshot<'_>, Snapshot<'static>>(snapshot) };
        RocksSnapshot { snapshot, inner }
    }

    fn options(&self) -> ReadOptions {
        let mut options = ReadOptions::default();
        options.set_snapshot(&self.snapshot);
        options
    }
}

impl Reader for RocksSnapshot {
    fn get(&self, cf: Cf, key: &[u8]) -> Result<Option<Bytes>> {
        self.inner.get(cf, key, &self.options())
    }

    fn multi_get(&self, cf: Cf, keys: &[&[u8]]) -> Result<Vec<Option<Bytes>>> {
        self.inner.multi_get(cf, keys, &self.options())
    }

    fn contains(&self, cf: Cf, key: &[u8]) -> Result<bool> {
        self.inner.contains(cf, key, self.options())
    }

    fn scan(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.inner.scan(cf, (from, to), self.options(), false, visit)
    }

    fn scan_keys(&self, cf: Cf, from: &[u8], to: Option<&[u8]>, visit: &mut Visit<'_>) -> Result<()> {
        self.inner.scan(cf, (from, to), self.options(), true, visit)
    }
}

impl Store for RocksStore {
    fn snapshot(&self) -> Result<Arc<dyn Reader>> {
        Ok(Arc::new(RocksSnapshot::new(&self.inner)))
    }

    fn write(&self, batch: &Batch, sync: bool) -> Result<()> {
        let size = batch.size_bytes() as usize + 32 * batch.changes.len();
        let mut wb = WriteBatch::with_capacity_bytes(size);
        for (from, to) in &batch.chunk_ranges {
            wb.delete_range_cf(self.inner.cf(Cf::Chunk), from, to);
        }
        let families = Cf::ALL.map(|cf| self.inner.cf(cf));
        for (cf, key, change) in &batch.changes {
            let family = families[cf.position()];
            match change {
                Change::Put(value) => wb.put_cf(family, key, value),
                Change::Delete => wb.delete_cf(family, key),
                Change::Patch(patches) => patches.iter().for_each(|patch| wb.merge_cf(family, key, patch)),
            }
        }
        let mut options = WriteOptions::default();
        options.set_sync(sync);
        self.inner.db.write_opt(&wb, &options).map_err(|e| self.inner.error("write", &e))
    }

    fn sync_log(&self) -> Result<()> {
        self.inner.db.flush_wal(true).map_err(|e| self.inner.error("sync the log", &e))
    }

    fn flush(&self) -> Result<()> {
        let families = Cf::ALL.map(|cf| self.inner.cf(cf));
        let mut options = FlushOptions::default();
        options.set_wait(true);
        self.inner.db.flush_cfs_opt(&families, &options).map_err(|e| self.inner.error("flush", &e))
    }

    fn checkpoint(&self, dir: &Path) -> Result<()> {
        let make = || Checkpoint::new(&self.inner.db)?.create_checkpoint(dir);
        make().map_err(|e| self.inner.error(&format!("checkpoint {}", dir.display()), &e))
    }

    fn resume(&self) -> Result<()> {
        self.inner.db.resume().map_err(|e| self.inner.error("resume after a failed write", &e))
    }

    fn reclaim(&self) -> Result<()> {
        let reclaiming = Reclaiming::begin(&self.reclaims);
        let go_on = || match reclaiming.is_stopped() {
            false => Ok(()),
            true => {
                let shard = self.inner.shard;
                let message = format!("shard {shard}: a reclaim was stopped: the shard is wanted back");
                Err(Error::unavailable(message).with_shard(shard))
            }
        };
        go_on()?;
        self.flush()?;
        let mut options = CompactOptions::default();
        options.set_exclusive_manual_compaction(false);
        options.set_bottommost_level_compaction(BottommostLevelCompaction::ForceOptimized);
        // All of them: entries and index values that were deleted may weigh more than content.
        for cf in Cf::ALL {
            go_on()?;
            self.inner.db.compact_range_cf_opt(self.inner.cf(cf), None::<&[u8]>, None::<&[u8]>, &options);
        }
        // One that was cut short does not say so.
        go_on()
    }

    fn stop_reclaims(&self, stopped: bool) -> bool {
        self.reclaims.stopped.store(stopped, Ordering::SeqCst);
        !stopped || self.reclaims.under_way.load(Ordering::SeqCst) > 0
    }

    fn settle_reclaims(&self) {
        let mut paused = self.reclaims.paused.lock();
        // Under the lock: whoever comes last, the last word is what was told last.
        let stopped = self.reclaims.stopped.load(Ordering::SeqCst);
        match (stopped, *paused) {
            // Stays so until it is taken back: a compaction that has not quite begun ends as well.
            (true, false) => self.inner.db.disable_manual_compaction(),
            (false, true) => self.inner.db.enable_manual_compaction(),
            (true, true) | (false, false) => {}
        }
        *paused = stopped;
    }

    fn unflushed_bytes(&self) -> u64 {
        let of = |cf: Cf| {
            let bytes =
                self.inner.db.property_int_value_cf(self.inner.cf(cf), "rocksdb.cur-size-all-mem-tables");
            // An empty memtable has some as well.
            bytes.ok().flatten().unwrap_or(0).saturating_sub(ARENA_BLOCK_BYTES as u64)
        };
        Cf::ALL.into_iter().map(of).sum()
    }

    fn properties(&self) -> StoreProperties {
        let db = &self.inner.db;
        let sum = |name: &str| -> u64 {
            let of = |cf: Cf| db.property_int_value_cf(self.inner.cf(cf), name).ok().flatten().unwrap_or(0);
            Cf::ALL.into_iter().map(of).sum()
        };
        StoreProperties {
            sst_bytes: sum("rocksdb.total-sst-files-size"),
            blob_bytes: sum("rocksdb.total-blob-file-size"),
            memtable_bytes: sum("rocksdb.cur-size-all-mem-tables"),
            pending_compaction_bytes: sum("rocksdb.estimate-pending-compaction-bytes"),
            write_stalled: sum("rocksdb.is-write-stopped") != 0
                || sum("rocksdb.actual-delayed-write-rate") != 0,
        }
    }
}

/// What an error of RocksDB means. RocksDB names a damaged SST or log in its message, a damaged blob file
/// it does not: then only the shard is known.
fn map_error(shard: ShardId, what: &str, e: &rocksdb::Error) -> Error {
    let text = e.to_string();
    let full = text.contains("No space left on device") || text.contains("Disk quota exceeded");
    let error = match e.kind() {
        _ if full => Error::new(
            Reason::VolumeFull,
            format!("shard {shard}: {what}: the volume has no room: delete something or grow it ({text})"),
        ),
        ErrorKind::Corruption => Error::corrupt(format!(
            "shard {shard}: {what}: {text}: other shards are served; restore this one from a copy"
        )),
        ErrorKind::InvalidArgument if text.contains("does not exist") => {
            Error::corrupt(format!("shard {shard}: {what}: the database is not there or incomplete: {text}"))
        }
        ErrorKind::IOError if text.contains("No such file or directory") => {
            Error::corrupt(format!("shard {shard}: {what}: a file of the database is missing: {text}"))
        }
        ErrorKind::Busy | ErrorKind::TryAgain | ErrorKind::TimedOut | ErrorKind::ShutdownInProgress => {
            Error::unavailable(format!("shard {shard}: {what}: {text}"))
        }
        ErrorKind::IOError if text.contains("lock") || text.contains("Resource temporarily unavailable") => {
            Error::unavailable(format!("shard {shard}: {what}: the database is open elsewhere: {text}"))
        }
        ErrorKind::NotFound
        | ErrorKind::NotSupported
        | ErrorKind::InvalidArgument
        | ErrorKind::IOError
        | ErrorKind::MergeInProgress
        | ErrorKind::Incomplete
        | ErrorKind::Aborted
        | ErrorKind::Expired
        | ErrorKind::CompactionTooLarge
        | ErrorKind::ColumnFamilyDropped
        | ErrorKind::Unknown => Error::io(format!("shard {shard}: {what}: {text}")),
    };
    error.with_shard(shard)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// Keys of one file: it takes four files until RocksDB compacts them by itself.
    const KEYS: usize = 3_000;
    const VALUE_BYTES: usize = 4 << 10;

    /// A database half of whose bytes are deleted ones, in three files.
    fn worth_a_reclaim(dir: &Path) -> (RocksShared, RocksStore) {
        let shared = RocksShared::new(8 << 20, 64 << 20);
        let store = RocksStore::create(&shared, ShardId::new(7).unwrap(), dir).unwrap();
        fill(&store, "kept");
        fill(&store, "gone");
        let delete = |n: usize| (Cf::Index, Bytes::from(format!("gone{n:06}")), Change::Delete);
        let changes = (0..KEYS).map(delete).collect();
        store.write(&Batch { chunk_ranges: Vec::new(), changes }, false).unwrap();
        store.flush().unwrap();
        (shared, store)
    }

    fn fill(store: &RocksStore, prefix: &str) {
        let mut rng = fastrand::Rng::with_seed(7);
        for from in (0..KEYS).step_by(1000) {
            let put = |n: usize| {
                let mut value = vec![0; VALUE_BYTES];
                rng.fill(&mut value);
                (Cf::Index, Bytes::from(format!("{prefix}{n:06}")), Change::Put(Bytes::from(value)))
            };
            let changes = (from..from + 1000).map(put).collect();
            store.write(&Batch { chunk_ranges: Vec::new(), changes }, false).unwrap();
        }
        store.flush().unwrap();
    }

    #[test]
    fn no_reclaim_runs_while_they_are_stopped() {
        let dir = tempfile::tempdir().unwrap();
        let (_shared, store) = worth_a_reclaim(dir.path());
        assert!(!store.stop_reclaims(true), "none is under way");
        let stopped = store.reclaim().unwrap_err();
        assert_eq!((stopped.reason(), stopped.shard()), (Reason::Unavailable, ShardId::new(7).ok()));
        let before = store.properties().sst_bytes;
        assert!(store.stop_reclaims(false));
        store.settle_reclaims();
        store.reclaim().unwrap();
        let after = store.properties().sst_bytes;
        assert!(after < before * 3 / 4, "{after} bytes of {before} are left");
    }

    #[test]
    fn a_reclaim_ends_when_it_is_stopped_and_another_one_runs_afterwards() {
        let dir = tempfile::tempdir().unwrap();
        let (_shared, store) = worth_a_reclaim(dir.path());
        let before = store.properties().sst_bytes;
        // Before it compacts, while it does, and perhaps when it is done.
        for pause_ms in [0, 1, 3, 10, 30, 100] {
            std::thread::scope(|scope| {
                let reclaim = scope.spawn(|| store.reclaim());
                std::thread::sleep(Duration::from_millis(pause_ms));
                if store.stop_reclaims(true) {
                    store.settle_reclaims();
                }
                if let Err(stopped) = reclaim.join().unwrap() {
                    assert_eq!(stopped.reason(), Reason::Unavailable, "{stopped}");
                }
                if store.stop_reclaims(false) {
                    store.settle_reclaims();
                }
            });
        }
        store.reclaim().unwrap();
        let after = store.properties().sst_bytes;
        assert!(after < before * 3 / 4, "{after} bytes of {before} are left");
        let kept = store.get(Cf::Index, b"kept000001").unwrap().map(|value| value.len());
        assert_eq!(kept, Some(VALUE_BYTES));
        assert_eq!(store.get(Cf::Index, b"gone000001").unwrap(), None);
    }
}
