//! The metadata store as a trait, with the shape that etcd gives: ordered keys, one revision that grows
//! with every change, transactions that compare and set, watches that resume, leases.
//!
//! Invariants that every implementation keeps (`store/tests.rs` runs them all through one suite):
//! - a transaction is atomic, and durable when it is answered; the exception is [`VOLATILE_PREFIX`];
//! - revisions never go back and never name two different changes;
//! - a watch delivers every change of its range once, in order, in whole revisions, or says
//!   [`StoreError::Compacted`]; it never leaves a gap in silence;
//! - a transaction changes a key once: a branch that puts a key twice, or puts one that it deletes, is refused;
//! - a transaction whose outcome is not known says so ([`StoreError::OutcomeUnknown`]) and is never
//!   repeated by the implementation; reads and watches are.
//!
//! The types are domain types: no wire, no disk.

use std::collections::BTreeSet;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use futures::stream::BoxStream;
use shardfs_proto::types::{Error, Reason};

/// Bytes of a key.
pub const KEY_BYTES_MAX: usize = 1 << 10;
/// Bytes of a value: a metadata record, never file content.
pub const VALUE_BYTES_MAX: usize = 1 << 20;
/// Compares, and operations of either branch, of one transaction: etcd's default.
pub const TXN_OPS_MAX: usize = 128;
/// Bytes of keys and values of one transaction, so that every revision fits one message of a watch.
pub const TXN_BYTES_MAX: usize = 4 << 20;
/// Keys that one transaction may delete, for the same reason. The embedded store refuses more; etcd does not count them.
pub const TXN_DELETES_MAX: usize = 8192;
/// Bytes of keys and values of one answer to a range; what is left is asked for again.
pub const RANGE_BYTES_MAX: usize = 4 << 20;
/// Shortest and longest term of a lease.
pub const LEASE_TTL_MIN: Duration = Duration::from_millis(100);
/// See [`LEASE_TTL_MIN`].
pub const LEASE_TTL_MAX: Duration = Duration::from_secs(3600);
/// Keys whose value a crash of the store itself may set back by some seconds: heartbeats, several a
/// second from every node, which would otherwise cost a device sync each. A transaction that also
/// touches another key is durable as a whole.
pub const VOLATILE_PREFIX: &[u8] = b"shardfs/heartbeats/";

/// Result of a store call.
pub type StoreResult<T> = Result<T, StoreError>;

/// What the store answers when it does not do what it was asked for.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing happened; the store cannot be reached, is too busy, or has no room for now.
    #[error("the metadata store is not available: {0}")]
    Unavailable(String),
    /// The change may or may not have been made: read again.
    #[error("whether the metadata store has made a change is not known: {0}")]
    OutcomeUnknown(String),
    /// The revisions asked for are no longer kept: range again, then watch from there.
    #[error("the watch is too old: its revision is no longer kept")]
    Compacted,
    /// The lease has expired, was revoked, or never was.
    #[error("the metadata store knows no such lease")]
    LeaseUnknown,
    /// The request breaks a limit or makes no sense.
    #[error("the metadata store refused the request: {0}")]
    Invalid(String),
    /// The store's own file is damaged, its device fails, or it is another store than before.
    #[error("the metadata store failed: {0}")]
    Failed(String),
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Error {
        let reason = match &error {
            StoreError::Unavailable(_) | StoreError::OutcomeUnknown(_) | StoreError::Compacted => {
                Reason::Unavailable
            }
            StoreError::LeaseUnknown => Reason::NotFound,
            StoreError::Invalid(_) => Reason::InvalidArgument,
            StoreError::Failed(_) => Reason::Io,
        };
        Error::new(reason, error.to_string())
    }
}

/// The number of a change of the store; 0 before the first.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Revision(u64);

impl Revision {
    /// Any number.
    pub const fn new(revision: u64) -> Revision {
        Revision(revision)
    }

    /// The number itself.
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The one after it.
    pub const fn next(self) -> Revision {
        Revision(self.0 + 1)
    }
}

impl fmt::Debug for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Revision({})", self.0)
    }
}

impl fmt::Display for Revision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// A lease's number; never 0.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LeaseId(u64);

impl LeaseId {
    /// Any number but 0, which on the wire means "none".
    pub fn new(id: u64) -> Option<LeaseId> {
        (id != 0).then_some(LeaseId(id))
    }

    /// The number itself.
    pub fn get(self) -> u64 {
        self.0
    }
}

/// A key with what the store knows about it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyValue {
    /// The key.
    pub key: Bytes,
    /// The value.
    pub value: Bytes,
    /// The revision that made it.
    pub created: Revision,
    /// The revision that changed it last.
    pub modified: Revision,
    /// Changes since it was made; 1 when new.
    pub version: u64,
    /// The lease under which it lives.
    pub lease: Option<LeaseId>,
}

/// One key, or all keys from `start` (inclusive) to `end` (exclusive).
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeyRange {
    start: Bytes,
    end: Option<Bytes>,
}

impl KeyRange {
    /// Just this key.
    pub fn key(key: impl Into<Bytes>) -> KeyRange {
        KeyRange { start: key.into(), end: None }
    }

    /// From `start` to before `end`.
    pub fn between(start: impl Into<Bytes>, end: impl Into<Bytes>) -> KeyRange {
        KeyRange { start: start.into(), end: Some(end.into()) }
    }

    /// All keys that begin with `prefix`, which is not empty and not all 0xff.
    pub fn prefix(prefix: impl Into<Bytes>) -> KeyRange {
        let start: Bytes = prefix.into();
        let mut end = start.to_vec();
        while end.last() == Some(&0xff) {
            end.pop();
        }
        *end.last_mut().expect("a prefix has a byte below 0xff") += 1;
        KeyRange { start, end: Some(end.into()) }
    }

    /// Its first key.
    pub fn start(&self) -> &Bytes {
        &self.start
    }

    /// The key after its last; `None`: it is one key.
    pub fn end(&self) -> Option<&Bytes> {
        self.end.as_ref()
    }

    /// Whether the key lies in it.
    pub fn contains(&self, key: &[u8]) -> bool {
        match &self.end {
            None => key == self.start,
            Some(end) => key >= &self.start[..] && key < &end[..],
        }
    }

    /// What is left of it after `key`; `None`: nothing.
    pub fn after(&self, key: &[u8]) -> Option<KeyRange> {
        let end = self.end.clone()?;
        let mut start = Vec::with_capacity(key.len() + 1);
        start.extend_from_slice(key);
        start.push(0);
        (start < end[..].to_vec()).then(|| KeyRange { start: start.into(), end: Some(end) })
    }
}

/// What a transaction demands of a key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Demand {
    /// It is not there.
    Absent,
    /// It was changed last at this revision.
    Modified(Revision),
    /// It has this version.
    Version(u64),
    /// It has this value.
    Value(Bytes),
}

/// A condition of a transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Compare {
    /// The key.
    pub key: Bytes,
    /// What must hold for it.
    pub demand: Demand,
}

/// One operation of a transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Sets a key, whole.
    Put {
        /// The key.
        key: Bytes,
        /// Its value.
        value: Bytes,
        /// The lease under which it lives; `None`: until it is deleted.
        lease: Option<LeaseId>,
    },
    /// Deletes keys; answers what it removed.
    Delete(KeyRange),
    /// Reads keys, as they are after the operations before it.
    Range(KeyRange),
}

/// If all `compares` hold then `success`, else `failure`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Txn {
    /// The conditions.
    pub compares: Vec<Compare>,
    /// What is done if all hold.
    pub success: Vec<Op>,
    /// What is done otherwise.
    pub failure: Vec<Op>,
}

impl Txn {
    /// Without conditions or operations.
    pub fn new() -> Txn {
        Txn::default()
    }

    /// Adds a condition.
    pub fn when(mut self, key: impl Into<Bytes>, demand: Demand) -> Txn {
        self.compares.push(Compare { key: key.into(), demand });
        self
    }

    /// Adds a put to the success branch.
    pub fn put(mut self, key: impl Into<Bytes>, value: impl Into<Bytes>) -> Txn {
        self.success.push(Op::Put { key: key.into(), value: value.into(), lease: None });
        self
    }

    /// Adds a put under a lease to the success branch.
    pub fn put_leased(mut self, key: impl Into<Bytes>, value: impl Into<Bytes>, lease: LeaseId) -> Txn {
        self.success.push(Op::Put { key: key.into(), value: value.into(), lease: Some(lease) });
        self
    }

    /// Adds the deletion of one key to the success branch.
    pub fn delete(mut self, key: impl Into<Bytes>) -> Txn {
        self.success.push(Op::Delete(KeyRange::key(key)));
        self
    }

    /// Adds a read of one key to the failure branch.
    pub fn or_read(mut self, key: impl Into<Bytes>) -> Txn {
        self.failure.push(Op::Range(KeyRange::key(key)));
        self
    }

    /// Whether neither branch changes anything: it may then be repeated like a read.
    pub fn only_reads(&self) -> bool {
        self.success.iter().chain(&self.failure).all(|op| matches!(op, Op::Range(_)))
    }

    /// Checks the limits.
    pub fn check(&self) -> StoreResult<()> {
        for (what, count) in [
            ("compares", self.compares.len()),
            ("operations", self.success.len()),
            ("operations", self.failure.len()),
        ] {
            if count > TXN_OPS_MAX {
                return Err(StoreError::Invalid(format!(
                    "{count} {what} in a transaction; the limit is {TXN_OPS_MAX}"
                )));
            }
        }
        let mut bytes = 0;
        for compare in &self.compares {
            check_key(&compare.key)?;
            bytes += compare.key.len();
            if let Demand::Value(value) = &compare.demand {
                bytes += value.len();
            }
        }
        check_branch(&self.success)?;
        check_branch(&self.failure)?;
        for op in self.success.iter().chain(&self.failure) {
            match op {
                Op::Put { key, value, .. } => {
                    check_key(key)?;
                    if value.len() > VALUE_BYTES_MAX {
                        return Err(StoreError::Invalid(format!(
                            "a value of {} bytes; the limit is {VALUE_BYTES_MAX}",
                            value.len()
                        )));
                    }
                    bytes += key.len() + value.len();
                }
                Op::Delete(range) | Op::Range(range) => {
                    check_range(range)?;
                    bytes += range.start.len();
                }
            }
        }
        if bytes > TXN_BYTES_MAX {
            return Err(StoreError::Invalid(format!(
                "a transaction of {bytes} bytes; the limit is {TXN_BYTES_MAX}"
            )));
        }
        Ok(())
    }
}

/// A branch puts a key at most once, and puts none that it deletes: one revision is one change of a key.
fn check_branch(ops: &[Op]) -> StoreResult<()> {
    let mut puts = BTreeSet::new();
    for op in ops {
        if let Op::Put { key, .. } = op
            && !puts.insert(key)
        {
            return Err(StoreError::Invalid(format!(
                "the key {} is put twice in a transaction",
                key.escape_ascii()
            )));
        }
    }
    for op in ops {
        if let Op::Delete(range) = op
            && let Some(key) = puts.iter().find(|key| range.contains(key))
        {
            return Err(StoreError::Invalid(format!(
                "the key {} is put and deleted in a transaction",
                key.escape_ascii()
            )));
        }
    }
    Ok(())
}

/// Checks a range's keys. Its ends may be one byte longer than a key: see [`KeyRange::after`].
pub fn check_range(range: &KeyRange) -> StoreResult<()> {
    if range.start.is_empty() || range.start.len() > KEY_BYTES_MAX + 1 {
        return Err(StoreError::Invalid(format!(
            "a range that starts at a key of {} bytes",
            range.start.len()
        )));
    }
    if range.end.as_ref().is_some_and(|end| end.len() > KEY_BYTES_MAX + 1) {
        return Err(StoreError::Invalid(format!("the end of a range has more than {KEY_BYTES_MAX} bytes")));
    }
    Ok(())
}

fn check_key(key: &Bytes) -> StoreResult<()> {
    if key.is_empty() || key.len() > KEY_BYTES_MAX {
        return Err(StoreError::Invalid(format!(
            "a key of {} bytes; the limits are 1 and {KEY_BYTES_MAX}",
            key.len()
        )));
    }
    Ok(())
}

/// Answer to a range.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RangeAnswer {
    /// The revision at which it was read.
    pub revision: Revision,
    /// What was found, in order of key.
    pub kvs: Vec<KeyValue>,
    /// There is more: the limit, or [`RANGE_BYTES_MAX`], was reached.
    pub more: bool,
}

/// Answer to a transaction.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TxnAnswer {
    /// The revision after it: its own if it changed something.
    pub revision: Revision,
    /// Whether the conditions held.
    pub succeeded: bool,
    /// One for each operation of the branch that was taken: what a range found or a delete removed.
    pub results: Vec<Vec<KeyValue>>,
}

/// One change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// The key has this value now.
    Put(KeyValue),
    /// The key is gone.
    Delete(Bytes),
}

impl Event {
    /// The key that changed.
    pub fn key(&self) -> &Bytes {
        match self {
            Event::Put(kv) => &kv.key,
            Event::Delete(key) => key,
        }
    }
}

/// A whole revision of a watch, or, without events, the news that nothing else happened up to it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WatchBatch {
    /// All events of the range up to and including this revision have been delivered.
    pub revision: Revision,
    /// The changes of this revision.
    pub events: Vec<Event>,
}

/// A running watch. It reconnects by itself; [`StoreError::Compacted`] and errors that no
/// repetition mends end it. While the store cannot be reached it is silent.
pub type WatchStream = BoxStream<'static, StoreResult<WatchBatch>>;

/// A metadata store. Calls are bounded in time. Dropping a future of `txn` leaves its outcome unknown.
pub trait MetaStore: Send + Sync + 'static {
    /// Reads at most `limit` keys of a range (0: no limit but [`RANGE_BYTES_MAX`]).
    fn range(&self, range: KeyRange, limit: usize) -> BoxFuture<'_, StoreResult<RangeAnswer>>;

    /// Runs a transaction.
    fn txn(&self, txn: Txn) -> BoxFuture<'_, StoreResult<TxnAnswer>>;

    /// Changes of a range from revision `from` on, inclusive. The first batch comes at once and says where the
    /// watch stands.
    fn watch(&self, range: KeyRange, from: Revision) -> WatchStream;

    /// A new lease with at least this term.
    fn lease_grant(&self, ttl: Duration) -> BoxFuture<'_, StoreResult<LeaseId>>;

    /// Begins the lease's term anew.
    fn lease_keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, StoreResult<()>>;

    /// Ends a lease and deletes its keys.
    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, StoreResult<()>>;

    /// Whether the last call, or the running watch, reached the store.
    fn reachable(&self) -> bool;
}

/// Everything in a range, read page by page.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct WholeRange {
    /// The revision of the first page: a watch from the next one misses nothing.
    pub first: Revision,
    /// The revision of the last page: after a watch's events up to it the copy is consistent.
    pub last: Revision,
    /// What was found, in order of key.
    pub kvs: Vec<KeyValue>,
}

/// Reads a whole range, however large.
pub async fn range_all(store: &dyn MetaStore, range: KeyRange) -> StoreResult<WholeRange> {
    let page = store.range(range.clone(), 0).await?;
    let mut whole = WholeRange { first: page.revision, last: page.revision, kvs: page.kvs };
    let mut more = page.more;
    while more {
        let Some(rest) = whole.kvs.last().and_then(|kv| range.after(&kv.key)) else { break };
        let page = store.range(rest, 0).await?;
        if page.kvs.is_empty() && page.more {
            return Err(StoreError::Failed("a page of a range came back empty".into()));
        }
        whole.last = page.revision;
        whole.kvs.extend(page.kvs);
        more = page.more;
    }
    Ok(whole)
}

/// Reads one key.
pub async fn get(store: &dyn MetaStore, key: impl Into<Bytes>) -> StoreResult<(Revision, Option<KeyValue>)> {
    let mut answer = store.range(KeyRange::key(key), 1).await?;
    Ok((answer.revision, answer.kvs.pop()))
}

#[cfg(test)]
mod tests;
