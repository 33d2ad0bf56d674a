//! The latest changes, for watches: bounded, in memory, shared by all watchers.
//!
//! Invariants: every revision from `floor` on is here, in order; what is published is committed. Watchers
//! pull, so a slow one costs nothing and is told [`StoreError::Compacted`] when it falls behind.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;
use tokio::sync::watch;

use crate::cluster::store::{Event, KeyRange, Revision, StoreError, StoreResult, WatchBatch};

/// Revisions that are kept: some 20 minutes of the heartbeats of three nodes.
pub(super) const REVISIONS_MAX: usize = 16_384;
/// Bytes of keys and values that are kept.
pub(super) const BYTES_MAX: usize = 32 << 20;
/// Revisions that a watcher takes at a time.
const TAKE_MAX: usize = 128;

pub(super) struct Log {
    inner: Mutex<Inner>,
    latest: watch::Sender<u64>,
}

struct Inner {
    batches: VecDeque<(usize, Arc<WatchBatch>)>,
    bytes: usize,
    /// The first revision that is here or yet to come.
    floor: u64,
    latest: u64,
}

/// What a watcher took.
pub(super) struct Taken {
    /// Whole revisions that concern its range.
    pub(super) batches: Vec<WatchBatch>,
    /// It has seen everything up to here.
    pub(super) upto: Revision,
}

impl Log {
    /// Empty, at a revision.
    pub(super) fn new(revision: Revision) -> Log {
        let inner = Inner {
            batches: VecDeque::new(),
            bytes: 0,
            floor: revision.next().get(),
            latest: revision.get(),
        };
        Log { inner: Mutex::new(inner), latest: watch::Sender::new(revision.get()) }
    }

    /// Adds committed revisions, in order.
    pub(super) fn publish(&self, batches: Vec<WatchBatch>) {
        let Some(last) = batches.last().map(|b| b.revision.get()) else { return };
        {
            let mut inner = self.inner.lock();
            for batch in batches {
                assert!(batch.revision.get() > inner.latest, "revisions are published in order");
                inner.latest = batch.revision.get();
                let bytes = batch.events.iter().map(event_bytes).sum();
                inner.bytes += bytes;
                inner.batches.push_back((bytes, Arc::new(batch)));
            }
            while inner.batches.len() > REVISIONS_MAX || inner.bytes > BYTES_MAX {
                let Some((bytes, batch)) = inner.batches.pop_front() else { break };
                inner.bytes -= bytes;
                inner.floor = batch.revision.next().get();
            }
        }
        self.latest.send_replace(last);
    }

    /// Begins anew at a later revision: watches of what was before end with [`StoreError::Compacted`].
    pub(super) fn reset(&self, revision: Revision) {
        let mut inner = self.inner.lock();
        assert!(revision.get() > inner.latest, "revisions are published in order");
        *inner = Inner {
            batches: VecDeque::new(),
            bytes: 0,
            floor: revision.next().get(),
            latest: revision.get(),
        };
        drop(inner);
        self.latest.send_replace(revision.get());
    }

    /// Tells of new revisions.
    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.latest.subscribe()
    }

    /// The first revision of a watch that asked for `from`.
    pub(super) fn start(&self, from: Revision) -> StoreResult<Revision> {
        let inner = self.inner.lock();
        let now = Revision::new(inner.latest).next();
        match from.get() {
            0 => Ok(now),
            // A revision that is still to come was seen under a store that this one is not.
            asked if asked < inner.floor || asked > now.get() => Err(StoreError::Compacted),
            _ => Ok(from),
        }
    }

    /// Some of what happened from `next` on.
    pub(super) fn take(&self, range: &KeyRange, next: Revision) -> StoreResult<Taken> {
        let (batches, upto) = {
            let inner = self.inner.lock();
            if next.get() < inner.floor {
                return Err(StoreError::Compacted);
            }
            let begin = inner.batches.partition_point(|(_, b)| b.revision < next);
            let batches: Vec<_> =
                inner.batches.iter().skip(begin).take(TAKE_MAX).map(|(_, b)| b.clone()).collect();
            let all = begin + batches.len() == inner.batches.len();
            let upto = match batches.last() {
                Some(batch) if !all => batch.revision,
                Some(_) | None => Revision::new(inner.latest),
            };
            (batches, upto)
        };
        let concerning = |batch: Arc<WatchBatch>| {
            let events: Vec<Event> =
                batch.events.iter().filter(|e| range.contains(e.key())).cloned().collect();
            (!events.is_empty()).then_some(WatchBatch { revision: batch.revision, events })
        };
        Ok(Taken { batches: batches.into_iter().filter_map(concerning).collect(), upto })
    }
}

fn event_bytes(event: &Event) -> usize {
    match event {
        Event::Put(kv) => kv.key.len() + kv.value.len(),
        Event::Delete(key) => key.len(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(revision: u64, key: &'static str) -> WatchBatch {
        WatchBatch { revision: Revision::new(revision), events: vec![Event::Delete(key.into())] }
    }

    #[test]
    fn forgets_the_oldest_and_says_so() {
        let log = Log::new(Revision::new(10));
        let all = KeyRange::prefix("k");
        assert!(matches!(log.start(Revision::new(10)), Err(StoreError::Compacted)));
        assert!(matches!(log.start(Revision::new(12)), Err(StoreError::Compacted)));
        assert_eq!(log.start(Revision::new(11)).unwrap(), Revision::new(11));
        let count = REVISIONS_MAX as u64 + 5;
        log.publish((0..count).map(|i| batch(11 + i, "k")).collect());
        assert!(matches!(log.take(&all, Revision::new(15)), Err(StoreError::Compacted)));
        let taken = log.take(&all, Revision::new(16)).unwrap();
        assert_eq!(taken.batches.len(), TAKE_MAX);
        assert_eq!(taken.upto.get(), 16 + TAKE_MAX as u64 - 1);
        let taken = log.take(&KeyRange::key("other"), Revision::new(10 + count)).unwrap();
        assert!(taken.batches.is_empty());
        assert_eq!(taken.upto.get(), 10 + count);
    }
}
