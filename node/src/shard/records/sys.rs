//! The records of family `sys`.

use bytes::Bytes;
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{
    ClientId, Error, FileLock, LockKind, LockOwner, LockRange, Reason, Result, Sequence, SessionId, ShardId,
    Timestamp,
};

use crate::shard::fingerprint::Fingerprint;

use super::codec::{Decoder, Encoder};

/// The format of a shard as a whole. A shard with a newer one is refused.
pub const HEADER_FORMAT: u8 = 1;

/// What the shard is.
///
/// | bytes | field |
/// |---|---|
/// | 1 | format of the shard: 1 |
/// | 8 | shard id |
/// | 1 | state: 1 active, 2 read-only |
/// | 8 | limit on logical bytes, 0 = none |
/// | 4 | chunk size, bytes |
/// | 12 | creation: seconds i64, nanoseconds u32 |
/// | 1 + n | owner |
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Its id.
    pub id: ShardId,
    /// The client id that owns it.
    pub owner: ClientId,
    /// Active or read-only; the other states live in the metadata store alone.
    pub state: ShardState,
    /// Limit on the logical bytes.
    pub limit_bytes: Option<u64>,
    /// Bytes of a chunk.
    pub chunk_bytes: u32,
    /// When it was made.
    pub created: Timestamp,
}

/// Chunk sizes that make sense: smaller ones make too many keys, larger ones too large writes.
const CHUNK_BYTES_RANGE: std::ops::RangeInclusive<u32> = 4096..=(16 << 20);

impl Header {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut e = Encoder::new(HEADER_FORMAT, 96);
        e.u64(self.id.get());
        e.u8(if self.state == ShardState::ReadOnly { 2 } else { 1 });
        e.u64(self.limit_bytes.unwrap_or(0));
        e.u32(self.chunk_bytes);
        e.time(self.created);
        e.short(self.owner.as_str().as_bytes());
        e.finish()
    }

    /// From bytes. A newer format is an error that names it.
    pub fn decode(value: &[u8]) -> Result<Header> {
        if let Some(found) = value.first().filter(|found| **found > HEADER_FORMAT) {
            // Nothing is damaged: a restart, fsck or restore mends nothing.
            let message = format!(
                "the shard has format {found}; this version of ShardFS reads up to format {HEADER_FORMAT}: \
                 install a newer one"
            );
            return Err(Error::new(Reason::Unsupported, message));
        }
        let mut d = Decoder::new("header", value, HEADER_FORMAT)?;
        let number = d.u64()?;
        let id = ShardId::new(number).map_err(|_| d.bad("a shard id"))?;
        let state = match d.u8()? {
            1 => ShardState::Active,
            2 => ShardState::ReadOnly,
            _ => return Err(d.bad("a state")),
        };
        let limit = d.u64()?;
        let chunk_bytes = d.u32()?;
        if !CHUNK_BYTES_RANGE.contains(&chunk_bytes) {
            return Err(d.bad("a chunk size"));
        }
        let created = d.time()?;
        let owner = d.short()?;
        let owner = ClientId::new(d.text(owner)?).map_err(|_| d.bad("an owner"))?;
        d.finish()?;
        Ok(Header { id, owner, state, limit_bytes: (limit != 0).then_some(limit), chunk_bytes, created })
    }
}

/// What the shard has counted.
///
/// | bytes | field |
/// |---|---|
/// | 1 | format: 1 |
/// | 8 | logical bytes in use |
/// | 8 | inodes |
/// | 8 | next inode number |
/// | 8 | next id (contents, cookies) |
/// | 8 | operations applied; the last one's number is the greatest version |
/// | 8 | next session id |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Counters {
    /// Sum of [`super::InodeRecord::used_bytes`].
    pub used_bytes: u64,
    /// Inode records.
    pub inodes: u64,
    /// Never used yet.
    pub next_ino: u64,
    /// Never used yet.
    pub next_id: u64,
    /// Number of the last operation.
    pub op_seq: u64,
    /// Never used yet.
    pub next_session: u64,
}

const COUNTERS_FORMAT: u8 = 1;

/// What an inode with its name counts beside its content: records in five families, roughly.
pub const INODE_COST_BYTES: u64 = 512;

impl Counters {
    /// Logical bytes: what the shard's limit and usage count. The root is free.
    pub fn charged_bytes(&self) -> u64 {
        self.used_bytes.saturating_add(self.inodes.saturating_sub(1).saturating_mul(INODE_COST_BYTES))
    }

    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut e = Encoder::new(COUNTERS_FORMAT, 49);
        for n in [self.used_bytes, self.inodes, self.next_ino, self.next_id, self.op_seq, self.next_session] {
            e.u64(n);
        }
        e.finish()
    }

    /// From bytes.
    pub fn decode(value: &[u8]) -> Result<Counters> {
        let mut d = Decoder::new("counters", value, COUNTERS_FORMAT)?;
        let counters = Counters {
            used_bytes: d.u64()?,
            inodes: d.u64()?,
            next_ino: d.u64()?,
            next_id: d.u64()?,
            op_seq: d.u64()?,
            next_session: d.u64()?,
        };
        d.finish()?;
        Ok(counters)
    }
}

/// A session.
///
/// | bytes | field |
/// |---|---|
/// | 1 | format: 1 |
/// | 12 | opened: seconds i64, nanoseconds u32 |
/// | 1 + n | label |
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SessionRecord {
    /// When it was opened.
    pub opened: Timestamp,
    /// Who holds it, for people.
    pub label: String,
}

const SESSION_FORMAT: u8 = 1;

impl SessionRecord {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut e = Encoder::new(SESSION_FORMAT, 14 + self.label.len());
        e.time(self.opened);
        e.short(self.label.as_bytes());
        e.finish()
    }

    /// From bytes.
    pub fn decode(value: &[u8]) -> Result<SessionRecord> {
        let mut d = Decoder::new("session", value, SESSION_FORMAT)?;
        let opened = d.time()?;
        let label = d.short()?;
        let label = d.text(label)?.to_owned();
        d.finish()?;
        Ok(SessionRecord { opened, label })
    }
}

/// A result slot: the answer to the mutation of a sequence number.
///
/// | bytes | field |
/// |---|---|
/// | 1 | format: 2; format 1 has no fingerprint |
/// | 8 | sequence |
/// | 4 | fingerprint |
/// | rest | the wire message `OperationResult` |
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slot {
    /// Whose answer it is.
    pub sequence: Sequence,
    /// What tells the mutation from another under the same number; `None`: of an earlier version.
    pub fingerprint: Option<Fingerprint>,
    /// The encoded message.
    pub result: Bytes,
}

const SLOT_FORMAT: u8 = 2;
const SLOT_FORMAT_BARE: u8 = 1;

impl Slot {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let format = if self.fingerprint.is_some() { SLOT_FORMAT } else { SLOT_FORMAT_BARE };
        let mut e = Encoder::new(format, 13 + self.result.len());
        e.u64(self.sequence.get());
        if let Some(fingerprint) = self.fingerprint {
            e.u32(fingerprint.get());
        }
        e.raw(&self.result);
        e.finish()
    }

    /// From bytes.
    pub fn decode(value: &[u8]) -> Result<Slot> {
        let bare = value.first() == Some(&SLOT_FORMAT_BARE);
        let mut d = Decoder::new("result", value, if bare { SLOT_FORMAT_BARE } else { SLOT_FORMAT })?;
        let number = d.u64()?;
        let sequence = Sequence::new(number).ok_or_else(|| d.bad("sequence 0"))?;
        let fingerprint = if bare { None } else { Some(Fingerprint::from_stored(d.u32()?)) };
        Ok(Slot { sequence, fingerprint, result: Bytes::copy_from_slice(d.rest()) })
    }
}

/// An inode without a name.
///
/// | bytes | field |
/// |---|---|
/// | 1 | format: 1 |
/// | n x 8 | sessions, ascending |
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Orphan {
    /// The sessions that hold it open; not empty while the record is there.
    pub holders: Vec<SessionId>,
}

const ORPHAN_FORMAT: u8 = 1;

impl Orphan {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut e = Encoder::new(ORPHAN_FORMAT, 1 + 8 * self.holders.len());
        for session in &self.holders {
            e.u64(session.get());
        }
        e.finish()
    }

    /// From bytes.
    pub fn decode(value: &[u8]) -> Result<Orphan> {
        let mut d = Decoder::new("orphan", value, ORPHAN_FORMAT)?;
        let mut holders = Vec::with_capacity(value.len() / 8);
        while d.position() < value.len() {
            let number = d.u64()?;
            holders.push(SessionId::new(number).ok_or_else(|| d.bad("session 0"))?);
        }
        d.finish()?;
        Ok(Orphan { holders })
    }

    /// Whether a session holds it.
    pub fn is_held_by(&self, session: SessionId) -> bool {
        self.holders.contains(&session)
    }
}

/// A content that no inode names yet: a streamed Put that is under way. What is found at an open was
/// left by a crash, and goes.
///
/// | bytes | field |
/// |---|---|
/// | 1 | format: 1 |
/// | 8 | session, 0 = none |
/// | 12 | begun: seconds i64, nanoseconds u32 |
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Staged {
    /// Whose Put it is.
    pub session: Option<SessionId>,
    /// When it was begun.
    pub begun: Timestamp,
}

const STAGED_FORMAT: u8 = 1;

impl Staged {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut e = Encoder::new(STAGED_FORMAT, 21);
        e.u64(self.session.map_or(0, SessionId::get));
        e.time(self.begun);
        e.finish()
    }

    /// From bytes.
    pub fn decode(value: &[u8]) -> Result<Staged> {
        let mut d = Decoder::new("staged content", value, STAGED_FORMAT)?;
        let staged = Staged { session: SessionId::new(d.u64()?), begun: d.time()? };
        d.finish()?;
        Ok(staged)
    }
}

/// The locks of an inode.
///
/// | bytes | field |
/// |---|---|
/// | 1 | format: 1 |
/// | 8 | session |
/// | 8 | the owner's number within it |
/// | 4 | process id |
/// | 8 | first byte |
/// | 8 | last byte |
/// | 1 | kind: 1 read, 2 write |
///
/// All but the first repeat, by first bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LocksRecord {
    /// Not empty while the record is there.
    pub locks: Vec<FileLock>,
}

const LOCKS_FORMAT: u8 = 1;
const LOCK_BYTES: usize = 37;

impl LocksRecord {
    /// To bytes.
    pub fn encode(&self) -> Bytes {
        let mut e = Encoder::new(LOCKS_FORMAT, 1 + LOCK_BYTES * self.locks.len());
        for lock in &self.locks {
            e.u64(lock.owner.session.get());
            e.u64(lock.owner.number);
            e.u32(lock.pid);
            e.u64(lock.range.start());
            e.u64(lock.range.end());
            e.u8(match lock.kind {
                LockKind::Read => 1,
                LockKind::Write => 2,
            });
        }
        e.finish()
    }

    /// From bytes.
    pub fn decode(value: &[u8]) -> Result<LocksRecord> {
        let mut d = Decoder::new("locks", value, LOCKS_FORMAT)?;
        let mut locks = Vec::with_capacity(value.len() / LOCK_BYTES);
        while d.position() < value.len() {
            let session = d.u64()?;
            let session = SessionId::new(session).ok_or_else(|| d.bad("session 0"))?;
            let owner = LockOwner { session, number: d.u64()? };
            let pid = d.u32()?;
            let (start, end) = (d.u64()?, d.u64()?);
            let range = LockRange::new(start, end).map_err(|_| d.bad("a range"))?;
            let kind = match d.u8()? {
                1 => LockKind::Read,
                2 => LockKind::Write,
                _ => return Err(d.bad("a kind")),
            };
            locks.push(FileLock { owner, pid, range, kind });
        }
        d.finish()?;
        Ok(LocksRecord { locks })
    }
}
