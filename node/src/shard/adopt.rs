//! Makes a copy of a shard's database a shard of its own: what in it belonged to the one that it was copied from goes.
//!
//! Invariants: the tree, its contents and their indexes stay as they are. Sessions and their answers go, and with them what only they
//! held: locks, unlinked files and Puts that were under way. A copy that takes a shard's place gets that shard's sessions and answers, so that
//! a call which was made before is not made again, and their locks, on which programs go on to rely (those of files that are not in it go when it is
//! opened); and no number that the shard has given is given again.
//!
//! A crash in the middle leaves something that is neither: the copy is no shard before this has returned (`manager`).

use std::ops::ControlFlow;
use std::sync::Arc;

use bytes::Bytes;
use shardfs_proto::types::{Error, Result};

use super::Room;
use super::executor::{Executor, VERSION_GAP};
use super::keys::{self, Cf};
use super::records::{Counters, Header};
use super::store::{Batch, Change, Store};

/// Records that are removed or written at a time.
const BATCH_RECORDS: usize = 8192;

/// Gives a copy this header; its chunk size stays what it is. Written to files when it returns.
pub(super) fn adopt(store: Arc<dyn Store>, header: Header, room: Arc<dyn Room>) -> Result<()> {
    adopt_above(&store, header, None, room)?;
    store.flush()
}

/// Puts a copy in the place of a shard, whose closed database is `live`: it gets its header and its sessions, and goes on above its
/// numbers. Written to files when it returns.
pub(super) fn succeed(store: Arc<dyn Store>, live: &dyn Store, room: Arc<dyn Room>) -> Result<()> {
    let (header, counters) = head(live)?;
    // Above those as well that were answered and lost before.
    let floor = Counters { op_seq: counters.op_seq + VERSION_GAP, ..counters };
    adopt_above(&store, header, Some(floor), room)?;
    for prefix in [keys::SESSIONS, keys::RESULTS, keys::LOCKS_ALL] {
        copy_all(live, &*store, prefix)?;
    }
    store.flush()
}

fn adopt_above(
    store: &Arc<dyn Store>,
    header: Header,
    floor: Option<Counters>,
    room: Arc<dyn Room>,
) -> Result<()> {
    for prefix in [keys::LOCKS_ALL, keys::RESULTS, keys::SESSIONS] {
        remove_all(&**store, prefix)?;
    }
    let (old, counters) = head(&**store)?;
    let header = Header { chunk_bytes: old.chunk_bytes, ..header };
    let counters = floor.map_or(counters, |floor| raised(counters, floor));
    let put = |key: &'static [u8], value| (Cf::Sys, Bytes::from_static(key), Change::Put(value));
    let changes = vec![put(keys::HEADER, header.encode()), put(keys::COUNTERS, counters.encode())];
    store.write(&Batch { chunk_ranges: Vec::new(), changes }, true)?;
    // Without their sessions, orphans and staged contents are what a crash would have left: it frees them.
    drop(Executor::new(Arc::clone(store), header, counters, room)?);
    Ok(())
}

/// Header and counters, whichever shard's they are.
fn head(store: &dyn Store) -> Result<(Header, Counters)> {
    let record = |key, what: &str| {
        let found = store.get(Cf::Sys, key)?;
        found.ok_or_else(|| Error::corrupt(format!("there is no {what} record")))
    };
    let header = Header::decode(&record(keys::HEADER, "header")?)?;
    Ok((header, Counters::decode(&record(keys::COUNTERS, "counters")?)?))
}

/// With no number that was given under either: inodes, contents, versions and sessions of what is gone are nobody else's later.
fn raised(counters: Counters, floor: Counters) -> Counters {
    Counters {
        used_bytes: counters.used_bytes,
        inodes: counters.inodes,
        next_ino: counters.next_ino.max(floor.next_ino),
        next_id: counters.next_id.max(floor.next_id),
        op_seq: counters.op_seq.max(floor.op_seq),
        next_session: counters.next_session.max(floor.next_session),
    }
}

fn remove_all(store: &dyn Store, prefix: &[u8]) -> Result<()> {
    in_batches(store, prefix, store, |_| Change::Delete)
}

fn copy_all(from: &dyn Store, to: &dyn Store, prefix: &[u8]) -> Result<()> {
    in_batches(from, prefix, to, |value| Change::Put(Bytes::copy_from_slice(value)))
}

/// Changes a key of `to` for each one of `from` with a prefix.
fn in_batches(
    from: &dyn Store,
    prefix: &[u8],
    to: &dyn Store,
    change: impl Fn(&[u8]) -> Change,
) -> Result<()> {
    let end = keys::prefix_end(prefix);
    let mut next = prefix.to_vec();
    loop {
        let mut changes = Vec::new();
        from.scan(Cf::Sys, &next, end.as_deref(), &mut |key, value| {
            changes.push((Cf::Sys, Bytes::copy_from_slice(key), change(value)));
            Ok(if changes.len() < BATCH_RECORDS { ControlFlow::Continue(()) } else { ControlFlow::Break(()) })
        })?;
        let Some((_, last, _)) = changes.last() else { return Ok(()) };
        next = [&last[..], &[0]].concat();
        to.write(&Batch { chunk_ranges: Vec::new(), changes }, false)?;
    }
}
