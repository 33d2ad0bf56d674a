//! The embedded store's data on redb: keys, leases, the revision.
//!
//! | table | key | value |
//! |---|---|---|
//! | `keys` | key | format u8 = 1, created u64, modified u64, version u64, lease u64 (little-endian), value |
//! | `leases` | lease u64 | term in ms u32 |
//! | `lease-keys` | lease u64, key | empty |
//! | `meta` | `format`, `revision`, `reserved`, `next-lease` | u64 |
//!
//! Invariants: a group of commands is one redb transaction; it is committed durably before it is
//! answered unless it changed volatile keys only. `reserved` is a durable number that no revision ever
//! handed out exceeds; after anything but a clean close the store goes on from there, so that revisions
//! of volatile changes that a crash took back are never given out again.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use parking_lot::RwLock;
use redb::{
    Database, DatabaseError, Durability, ReadableDatabase, ReadableTable, Table, TableDefinition, TableError,
    WriteTransaction,
};

use shardfs_proto::types::clock;

use crate::cluster::lease;
use crate::cluster::store::{
    Compare, Demand, Event, KeyRange, KeyValue, LeaseId, Op, RANGE_BYTES_MAX, RangeAnswer, Revision,
    StoreError, StoreResult, TXN_DELETES_MAX, Txn, TxnAnswer, VOLATILE_PREFIX, WatchBatch,
};

const KEYS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("keys");
const LEASES: TableDefinition<u64, u32> = TableDefinition::new("leases");
const LEASE_KEYS: TableDefinition<(u64, &[u8]), ()> = TableDefinition::new("lease-keys");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

/// The layout above.
const FORMAT: u64 = 1;
const RECORD_FORMAT: u8 = 1;
const RECORD_HEADER_BYTES: usize = 1 + 4 * 8;
/// Revisions reserved ahead at every durable commit: hours of heartbeats.
const RESERVE: u64 = 100_000;
/// Keys of one lease, so that its end is one revision that fits a message.
const LEASE_KEYS_MAX: usize = 1024;
/// redb's page cache: the metadata of a small cluster, whole.
const CACHE_BYTES: usize = 32 << 20;
/// How long a file whose device failed is left before it is opened again: until the leases have ended that a heartbeat
/// renewed which it may have lost.
const REOPEN_PAUSE: Duration = lease::TERM;

/// What the writer does, in order.
pub(super) enum Command {
    Txn(Txn),
    LeaseGrant { ttl_ms: u32 },
    LeaseRevoke { lease: LeaseId },
}

/// What it answers.
pub(super) enum Outcome {
    Txn(TxnAnswer),
    LeaseGranted { lease: LeaseId, ttl_ms: u32 },
    LeaseRevoked,
}

/// Reads, from any thread, as long as the writer lives.
#[derive(Clone)]
pub(super) struct Reader {
    db: Arc<RwLock<Weak<Database>>>,
}

/// The one writer.
pub(super) struct Writer {
    path: PathBuf,
    /// `None`: broken, and closed.
    db: Option<Arc<Database>>,
    /// Where readers find it.
    place: Arc<RwLock<Weak<Database>>>,
    revision: u64,
    reserved: u64,
    /// There are committed changes that a crash may take back.
    volatile: bool,
    /// The device failed in the middle of a commit: what the file holds is not known until it is opened again.
    broken: Option<Broken>,
    /// It was opened again, at this revision: what was published before says nothing about what it holds.
    reopened: Option<Revision>,
}

struct Broken {
    message: String,
    next_try: Instant,
}

/// What is found when the file is opened.
pub(super) struct Opened {
    pub(super) reader: Reader,
    pub(super) writer: Writer,
    pub(super) revision: Revision,
    /// Leases and their terms.
    pub(super) leases: Vec<(LeaseId, u32)>,
    /// It was not closed cleanly: volatile changes may have been taken back.
    pub(super) crashed: bool,
}

fn failed(error: impl Into<redb::Error>) -> StoreError {
    StoreError::Failed(error.into().to_string())
}

/// Opens or makes the file.
pub(super) fn open(path: &Path) -> StoreResult<Opened> {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    let db = builder.create(path).map_err(|e| match e {
        DatabaseError::DatabaseAlreadyOpen => StoreError::Failed(format!(
            "{} is in use by another process: only one may keep a metadata store",
            path.display()
        )),
        e => StoreError::Failed(format!("opening {}: {e}", path.display())),
    })?;
    let mut leases = Vec::new();
    let tx = db.begin_write().map_err(failed)?;
    let (start, crashed);
    {
        let mut meta = tx.open_table(META).map_err(failed)?;
        tx.open_table(KEYS).map_err(failed)?;
        tx.open_table(LEASE_KEYS).map_err(failed)?;
        for item in tx.open_table(LEASES).map_err(failed)?.iter().map_err(failed)? {
            let (id, ttl) = item.map_err(failed)?;
            leases.extend(LeaseId::new(id.value()).map(|id| (id, ttl.value())));
        }
        let format = read_meta(&meta, "format")?;
        if format.is_some_and(|f| f != FORMAT) {
            return Err(StoreError::Failed(format!(
                "{} has format {}, this program knows {FORMAT}: use the program version that wrote it, or a newer one",
                path.display(),
                format.unwrap_or_default()
            )));
        }
        let revision = read_meta(&meta, "revision")?.unwrap_or(0);
        start = revision.max(read_meta(&meta, "reserved")?.unwrap_or(0));
        crashed = start > revision;
        for (name, value) in [("format", FORMAT), ("revision", start), ("reserved", start + RESERVE)] {
            meta.insert(name, value).map_err(failed)?;
        }
    }
    tx.commit().map_err(failed)?;
    let db = Arc::new(db);
    let place = Arc::new(RwLock::new(Arc::downgrade(&db)));
    let writer = Writer {
        path: path.to_owned(),
        db: Some(db),
        place: place.clone(),
        revision: start,
        reserved: start + RESERVE,
        volatile: false,
        broken: None,
        reopened: None,
    };
    Ok(Opened { reader: Reader { db: place }, writer, revision: Revision::new(start), leases, crashed })
}

fn read_meta(meta: &impl ReadableTable<&'static str, u64>, name: &str) -> StoreResult<Option<u64>> {
    Ok(meta.get(name).map_err(failed)?.map(|v| v.value()))
}

impl Reader {
    /// The writer has ended and nobody reads: the file is closed.
    pub(super) fn is_closed(&self) -> bool {
        self.db.read().strong_count() == 0
    }

    /// Reads a range from the last commit. Blocks on the device.
    pub(super) fn range(&self, range: &KeyRange, limit: usize) -> StoreResult<RangeAnswer> {
        let gone = || StoreError::Unavailable("it is stopping, or its file is being opened again".into());
        let db = self.db.read().upgrade().ok_or_else(gone)?;
        let tx = db.begin_read().map_err(failed)?;
        let revision = read_meta(&tx.open_table(META).map_err(failed)?, "revision")?.unwrap_or(0);
        let (kvs, more) = scan(&tx.open_table(KEYS).map_err(failed)?, range, limit)?;
        Ok(RangeAnswer { revision: Revision::new(revision), kvs, more })
    }
}

impl Writer {
    /// Runs a group of commands as one commit; answers each, and says what changed.
    pub(super) fn apply(&mut self, commands: Vec<Command>) -> (Vec<StoreResult<Outcome>>, Vec<WatchBatch>) {
        let count = commands.len();
        let error = match self.mend().and_then(|()| self.group(commands)) {
            Ok(done) => return done,
            Err(error) => error,
        };
        ((0..count).map(|_| Err(error.clone())).collect(), Vec::new())
    }

    fn group(&mut self, commands: Vec<Command>) -> StoreResult<(Vec<StoreResult<Outcome>>, Vec<WatchBatch>)> {
        let mut tx = self.begin()?;
        let mut revision = self.revision;
        let mut durable = false;
        let mut outcomes = Vec::with_capacity(commands.len());
        let mut batches = Vec::new();
        {
            let mut group = Group::open(&tx)?;
            for command in commands {
                let mut events = Vec::new();
                let next = revision + 1;
                let outcome = match command {
                    Command::Txn(txn) => group.txn(txn, next, &mut events)?.map(|(succeeded, results)| {
                        let revision = Revision::new(if events.is_empty() { revision } else { next });
                        Outcome::Txn(TxnAnswer { revision, succeeded, results })
                    }),
                    Command::LeaseGrant { ttl_ms } => {
                        durable = true;
                        Ok(Outcome::LeaseGranted { lease: group.grant(ttl_ms)?, ttl_ms })
                    }
                    Command::LeaseRevoke { lease } => {
                        durable = true;
                        group.revoke(lease, &mut events)?.map(|()| Outcome::LeaseRevoked)
                    }
                };
                if !events.is_empty() {
                    revision = next;
                    durable |= events.iter().any(|e| !e.key().starts_with(VOLATILE_PREFIX));
                    batches.push(WatchBatch { revision: Revision::new(revision), events });
                }
                outcomes.push(outcome);
            }
            if batches.is_empty() && !durable {
                drop(group);
                tx.abort().map_err(failed)?;
                return Ok((outcomes, batches));
            }
            durable |= revision > self.reserved;
            group.meta.insert("revision", revision).map_err(failed)?;
            if durable {
                group.meta.insert("reserved", revision + RESERVE).map_err(failed)?;
            }
        }
        self.commit(&mut tx, durable)?;
        tx.commit().map_err(|e| self.break_down(e))?;
        self.revision = revision;
        self.volatile = !durable;
        if durable {
            self.reserved = revision + RESERVE;
        }
        Ok((outcomes, batches))
    }

    fn commit(&self, tx: &mut WriteTransaction, durable: bool) -> StoreResult<()> {
        let durability = if durable { Durability::Immediate } else { Durability::None };
        tx.set_durability(durability).map_err(|e| StoreError::Failed(e.to_string()))
    }

    /// Once its device has failed, a database takes nothing until it is opened again: when there is room on the disk again,
    /// say. That is tried now and then.
    fn mend(&mut self) -> StoreResult<()> {
        let Some(broken) = &mut self.broken else { return Ok(()) };
        let unavailable = |message: &str| StoreError::Unavailable(format!("its file failed: {message}"));
        if clock::monotonic() < broken.next_try {
            return Err(unavailable(&broken.message));
        }
        broken.next_try = clock::monotonic() + REOPEN_PAUSE;
        *self.place.write() = Weak::new();
        self.db = None;
        let opened = open(&self.path).map_err(|error| unavailable(&error.to_string()))?;
        tracing::info!(file = %self.path.display(), "metadata store: writes work again");
        self.db = opened.writer.db;
        *self.place.write() = self.db.as_ref().map_or_else(Weak::new, Arc::downgrade);
        // Beyond every revision that was handed out.
        self.revision = opened.writer.revision;
        self.reserved = opened.writer.reserved;
        self.volatile = false;
        self.broken = None;
        self.reopened = Some(opened.revision);
        Ok(())
    }

    /// The revision at which the file was opened again since this was asked last.
    pub(super) fn take_reopened(&mut self) -> Option<Revision> {
        self.reopened.take()
    }

    fn begin(&mut self) -> StoreResult<WriteTransaction> {
        let begun = match &self.db {
            Some(db) => db.begin_write(),
            None => return Err(StoreError::Unavailable("its file is closed".into())),
        };
        begun.map_err(|error| {
            self.note_broken(&error);
            StoreError::Unavailable(format!("its file failed: {error}"))
        })
    }

    fn note_broken(&mut self, error: &dyn std::fmt::Display) {
        tracing::error!(file = %self.path.display(), %error, "metadata store: its file failed; it is opened again");
        let next_try = clock::monotonic() + REOPEN_PAUSE;
        self.broken = Some(Broken { message: error.to_string(), next_try });
    }

    fn break_down(&mut self, error: redb::CommitError) -> StoreError {
        self.note_broken(&error);
        StoreError::OutcomeUnknown(format!("a commit failed: {error}"))
    }

    /// Makes volatile changes durable, if there are any.
    pub(super) fn flush(&mut self) -> StoreResult<()> {
        if !self.volatile || self.broken.is_some() {
            return Ok(());
        }
        self.settle(self.revision + RESERVE)
    }

    /// Makes everything durable and says that no revision was handed out beyond it.
    pub(super) fn close(mut self) -> StoreResult<()> {
        if self.broken.is_some() {
            return Ok(());
        }
        self.settle(self.revision)
    }

    fn settle(&mut self, reserved: u64) -> StoreResult<()> {
        let tx = self.begin()?;
        tx.open_table(META).map_err(failed)?.insert("reserved", reserved).map_err(failed)?;
        tx.commit().map_err(|e| self.break_down(e))?;
        self.reserved = reserved;
        self.volatile = false;
        Ok(())
    }
}

/// The tables during one group. An `Err` of the outer result gives up the group, one of the inner
/// result fails one command, which then has changed nothing.
struct Group<'t> {
    keys: Table<'t, &'static [u8], &'static [u8]>,
    leases: Table<'t, u64, u32>,
    lease_keys: Table<'t, (u64, &'static [u8]), ()>,
    meta: Table<'t, &'static str, u64>,
}

type TxnDone = (bool, Vec<Vec<KeyValue>>);

impl<'t> Group<'t> {
    fn open(tx: &'t WriteTransaction) -> StoreResult<Group<'t>> {
        let table = |e: TableError| failed(e);
        Ok(Group {
            keys: tx.open_table(KEYS).map_err(table)?,
            leases: tx.open_table(LEASES).map_err(table)?,
            lease_keys: tx.open_table(LEASE_KEYS).map_err(table)?,
            meta: tx.open_table(META).map_err(table)?,
        })
    }

    fn txn(&mut self, txn: Txn, revision: u64, events: &mut Vec<Event>) -> StoreResult<StoreResult<TxnDone>> {
        let mut succeeded = true;
        for compare in &txn.compares {
            succeeded &= self.holds(compare)?;
        }
        let ops = if succeeded { txn.success } else { txn.failure };
        // Everything that can be refused is refused before anything is changed.
        let mut deletes = 0;
        for op in &ops {
            match op {
                Op::Put { lease: Some(lease), .. } => {
                    if self.leases.get(lease.get()).map_err(failed)?.is_none() {
                        return Ok(Err(StoreError::LeaseUnknown));
                    }
                    let under = (lease.get(), &b""[..])..(lease.get() + 1, &b""[..]);
                    if self.lease_keys.range(under).map_err(failed)?.take(LEASE_KEYS_MAX).count()
                        == LEASE_KEYS_MAX
                    {
                        return Ok(Err(StoreError::Invalid(format!(
                            "a lease holds at most {LEASE_KEYS_MAX} keys"
                        ))));
                    }
                }
                Op::Delete(range) => {
                    let (gone, more) = scan(&self.keys, range, TXN_DELETES_MAX)?;
                    deletes += gone.len();
                    if more || deletes > TXN_DELETES_MAX {
                        return Ok(Err(StoreError::Invalid(format!(
                            "a transaction deletes more than {TXN_DELETES_MAX} keys or {RANGE_BYTES_MAX} bytes: do it \
                             in pieces"
                        ))));
                    }
                }
                Op::Put { .. } | Op::Range(_) => {}
            }
        }
        let mut results = Vec::with_capacity(ops.len());
        for op in ops {
            results.push(match op {
                Op::Put { key, value, lease } => {
                    let kv = self.put(key, value, lease, revision)?;
                    replace_event(events, Event::Put(kv));
                    Vec::new()
                }
                Op::Delete(range) => {
                    let mut all = Vec::new();
                    loop {
                        let (gone, more) = scan(&self.keys, &range, 0)?;
                        for kv in &gone {
                            self.remove(kv)?;
                            replace_event(events, Event::Delete(kv.key.clone()));
                        }
                        all.extend(gone);
                        if !more {
                            break all;
                        }
                    }
                }
                Op::Range(range) => scan(&self.keys, &range, 0)?.0,
            });
        }
        Ok(Ok((succeeded, results)))
    }

    fn holds(&self, compare: &Compare) -> StoreResult<bool> {
        let found = self.get(&compare.key)?;
        Ok(match (&compare.demand, found) {
            (Demand::Absent, found) => found.is_none(),
            (Demand::Modified(revision), Some(kv)) => kv.modified == *revision,
            (Demand::Version(version), Some(kv)) => kv.version == *version,
            (Demand::Value(value), Some(kv)) => kv.value == *value,
            (Demand::Modified(_) | Demand::Version(_) | Demand::Value(_), None) => false,
        })
    }

    fn get(&self, key: &Bytes) -> StoreResult<Option<KeyValue>> {
        match self.keys.get(&key[..]).map_err(failed)? {
            None => Ok(None),
            Some(record) => Ok(Some(decode(key.clone(), record.value())?)),
        }
    }

    fn put(
        &mut self,
        key: Bytes,
        value: Bytes,
        lease: Option<LeaseId>,
        revision: u64,
    ) -> StoreResult<KeyValue> {
        let old = self.get(&key)?;
        let revision = Revision::new(revision);
        let kv = KeyValue {
            created: old.as_ref().map_or(revision, |kv| kv.created),
            version: old.as_ref().map_or(0, |kv| kv.version) + 1,
            modified: revision,
            key,
            value,
            lease,
        };
        if let Some(old_lease) = old.and_then(|kv| kv.lease) {
            self.lease_keys.remove((old_lease.get(), &kv.key[..])).map_err(failed)?;
        }
        if let Some(lease) = lease {
            self.lease_keys.insert((lease.get(), &kv.key[..]), ()).map_err(failed)?;
        }
        self.keys.insert(&kv.key[..], &encode(&kv)[..]).map_err(failed)?;
        Ok(kv)
    }

    fn remove(&mut self, kv: &KeyValue) -> StoreResult<()> {
        if let Some(lease) = kv.lease {
            self.lease_keys.remove((lease.get(), &kv.key[..])).map_err(failed)?;
        }
        self.keys.remove(&kv.key[..]).map_err(failed)?;
        Ok(())
    }

    fn grant(&mut self, ttl_ms: u32) -> StoreResult<LeaseId> {
        let id = read_meta(&self.meta, "next-lease")?.unwrap_or(1);
        self.meta.insert("next-lease", id + 1).map_err(failed)?;
        self.leases.insert(id, ttl_ms).map_err(failed)?;
        LeaseId::new(id).ok_or_else(|| StoreError::Failed("lease number 0".into()))
    }

    fn revoke(&mut self, lease: LeaseId, events: &mut Vec<Event>) -> StoreResult<StoreResult<()>> {
        if self.leases.remove(lease.get()).map_err(failed)?.is_none() {
            return Ok(Err(StoreError::LeaseUnknown));
        }
        let mut keys = Vec::new();
        let under = (lease.get(), &b""[..])..(lease.get() + 1, &b""[..]);
        for item in self.lease_keys.range(under).map_err(failed)? {
            keys.push(Bytes::copy_from_slice(item.map_err(failed)?.0.value().1));
        }
        for key in keys {
            self.lease_keys.remove((lease.get(), &key[..])).map_err(failed)?;
            self.keys.remove(&key[..]).map_err(failed)?;
            events.push(Event::Delete(key));
        }
        Ok(Ok(()))
    }
}

/// A revision holds one event a key: the last.
fn replace_event(events: &mut Vec<Event>, event: Event) {
    events.retain(|e| e.key() != event.key());
    events.push(event);
}

fn scan(
    keys: &impl ReadableTable<&'static [u8], &'static [u8]>,
    range: &KeyRange,
    limit: usize,
) -> StoreResult<(Vec<KeyValue>, bool)> {
    let Some(end) = range.end() else {
        let found = keys.get(&range.start()[..]).map_err(failed)?;
        let kv = found.map(|record| decode(range.start().clone(), record.value())).transpose()?;
        return Ok((kv.into_iter().collect(), false));
    };
    let mut kvs: Vec<KeyValue> = Vec::new();
    if end <= range.start() {
        return Ok((kvs, false));
    }
    let mut bytes = 0;
    for item in keys.range::<&[u8]>(&range.start()[..]..&end[..]).map_err(failed)? {
        if (limit != 0 && kvs.len() == limit) || bytes >= RANGE_BYTES_MAX {
            return Ok((kvs, true));
        }
        let (key, record) = item.map_err(failed)?;
        let kv = decode(Bytes::copy_from_slice(key.value()), record.value())?;
        bytes += kv.key.len() + kv.value.len();
        kvs.push(kv);
    }
    Ok((kvs, false))
}

fn encode(kv: &KeyValue) -> BytesMut {
    let mut record = BytesMut::with_capacity(RECORD_HEADER_BYTES + kv.value.len());
    record.extend_from_slice(&[RECORD_FORMAT]);
    for number in [kv.created.get(), kv.modified.get(), kv.version, kv.lease.map_or(0, LeaseId::get)] {
        record.extend_from_slice(&number.to_le_bytes());
    }
    record.extend_from_slice(&kv.value);
    record
}

fn decode(key: Bytes, record: &[u8]) -> StoreResult<KeyValue> {
    if record.len() < RECORD_HEADER_BYTES || record[0] != RECORD_FORMAT {
        return Err(StoreError::Failed(format!("the record of key {} is damaged", key.escape_ascii())));
    }
    let number = |at: usize| {
        let bytes = record[1 + 8 * at..1 + 8 * (at + 1)].try_into().expect("eight bytes of a checked length");
        u64::from_le_bytes(bytes)
    };
    Ok(KeyValue {
        key,
        value: Bytes::copy_from_slice(&record[RECORD_HEADER_BYTES..]),
        created: Revision::new(number(0)),
        modified: Revision::new(number(1)),
        version: number(2),
        lease: LeaseId::new(number(3)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_has_these_bytes() {
        let kv = KeyValue {
            key: Bytes::from_static(b"k"),
            value: Bytes::from_static(b"value"),
            created: Revision::new(1),
            modified: Revision::new(0x0203),
            version: 4,
            lease: LeaseId::new(5),
        };
        let golden = b"\x01\x01\0\0\0\0\0\0\0\x03\x02\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0value";
        assert_eq!(&encode(&kv)[..], golden);
        assert_eq!(decode(kv.key.clone(), golden).unwrap(), kv);
        assert!(decode(kv.key.clone(), b"\x02").is_err());
        assert!(decode(kv.key, b"").is_err());
    }

    #[test]
    fn a_file_of_a_newer_format_is_refused_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta.redb");
        drop(open(&path).unwrap());
        let newer = |format: Option<u64>| {
            let db = Database::builder().open(&path).unwrap();
            let tx = db.begin_write().unwrap();
            let mut meta = tx.open_table(META).unwrap();
            if let Some(format) = format {
                meta.insert("format", format).unwrap();
            }
            let found = ["format", "reserved"].map(|name| read_meta(&meta, name).unwrap());
            drop(meta);
            tx.commit().unwrap();
            found
        };
        let before = newer(Some(FORMAT + 1));
        let error = open(&path).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(&format!("format {}", FORMAT + 1)) && error.contains("newer"), "{error}");
        assert_eq!(newer(None), before);
    }

    /// A filesystem of its own, gone with the test.
    struct Tmpfs(tempfile::TempDir);

    impl Tmpfs {
        fn mount(&self, options: &str) {
            let status = std::process::Command::new("mount")
                .args(["-t", "tmpfs", "-o", options, "tmpfs"])
                .arg(self.0.path())
                .status();
            assert!(status.unwrap().success(), "mount -o {options}");
        }
    }

    impl Drop for Tmpfs {
        fn drop(&mut self) {
            let _ = std::process::Command::new("umount").args(["--lazy"]).arg(self.0.path()).status();
        }
    }

    #[test]
    fn a_disk_that_was_full_is_written_again_when_it_has_room() {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: mounting needs root");
            return;
        }
        let disk = Tmpfs(tempfile::tempdir().unwrap());
        disk.mount("size=4m");
        let path = disk.0.path().join("meta.redb");
        let mut opened = open(&path).unwrap();
        let mut put = |key: String, bytes: usize| {
            let command = Command::Txn(Txn::new().put(key, vec![7; bytes]));
            let outcome = opened.writer.apply(vec![command]).0.pop().unwrap();
            (outcome.map(drop), opened.writer.revision, opened.writer.take_reopened())
        };
        let mut kept = 0;
        while put(format!("k{kept}"), 100_000).0.is_ok() {
            kept += 1;
            assert!(kept < 1000, "4 MiB are full");
        }
        let (refused, revision, _) = put("more".into(), 1);
        assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
        disk.mount("remount,size=64m");
        let begun = clock::monotonic();
        let reopened = loop {
            let (outcome, _, reopened) = put("again".into(), 1);
            if outcome.is_ok() {
                break reopened.expect("whoever watches is told");
            }
            assert!(begun.elapsed() < std::time::Duration::from_secs(90), "{outcome:?}");
            std::thread::sleep(std::time::Duration::from_millis(50));
        };
        assert!(reopened.get() > revision, "no revision is given out twice");
        let found = opened.reader.range(&KeyRange::prefix("k"), 0).unwrap();
        assert!(found.kvs.len() >= kept, "{} of {kept}", found.kvs.len());
        opened.writer.close().unwrap();
    }

    #[test]
    fn revisions_jump_after_a_crash_and_not_after_a_close() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("meta.redb");
        let mut opened = open(&path).unwrap();
        assert!(open(&path).is_err(), "a second process is refused");
        let put = |key: &'static [u8]| vec![Command::Txn(Txn::new().put(key, "v"))];
        opened.writer.apply(put(b"a")).0.pop().unwrap().map(drop).unwrap();
        opened.writer.close().unwrap();
        drop(opened.reader);
        let mut opened = open(&path).unwrap();
        assert_eq!(opened.revision.get(), 1);
        opened.writer.apply(put(VOLATILE_PREFIX)).0.pop().unwrap().map(drop).unwrap();
        assert_eq!(opened.writer.revision, 2);
        drop(opened);
        let opened = open(&path).unwrap();
        assert!(opened.revision.get() > 2, "{:?}", opened.revision);
    }
}
