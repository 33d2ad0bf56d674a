//! The lease of a node's process, timed by each side's own boot clock.
//!
//! The holder counts its term from the **start** of its last heartbeat that succeeded; everybody else counts silence from the
//! moment at which they saw that heartbeat, which is later, and only while they heard the store. So when an observer
//! says that a lease is over, its holder has said so before.
//!
//! An election names, in its transaction, the heartbeat that it saw last and raises the loser's count of depositions, which
//! each heartbeat compares: a heartbeat that the observer did not see makes the election fail, and after an election the
//! loser's heartbeats fail until its copy of the records shows what it lost.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use shardfs_proto::types::clock::{self, BootTime};

use super::store::Revision;

/// The term of a lease.
pub const TERM: Duration = Duration::from_secs(1);
/// Silence after which observers take a lease for ended: the term, and the drift of two clocks in that time (far below
/// one part in a thousand) with a good margin.
pub const SILENCE_MAX: Duration = Duration::from_millis(1100);
/// Longer silence of the whole store is the observer's own trouble and counts for nobody: its own heartbeats come back
/// to it every 250 ms.
pub const HEARING_GAP_MAX: Duration = Duration::from_millis(600);

/// Own heartbeats that are remembered: a quarter of an hour of them.
const BEATS_KEPT: usize = 4096;

/// What a process knows of its own lease and heartbeat.
#[derive(Debug, Default)]
pub struct Lease {
    counter: AtomicU64,
    succeeded: AtomicBool,
    rounds: AtomicU64,
    /// Boot clock, ns; 0: never held.
    until_nanos: AtomicU64,
    /// Own heartbeats: the revision of each, and when it was begun. Ascending.
    beats: Mutex<VecDeque<(Revision, BootTime)>>,
}

impl Lease {
    /// A heartbeat that was begun at this moment has succeeded.
    pub fn renew(&self, begun: BootTime, counter: u64) {
        self.counter.store(counter, Ordering::Relaxed);
        self.until_nanos.fetch_max((begun + TERM).nanos(), Ordering::AcqRel);
        self.succeeded.store(true, Ordering::Relaxed);
    }

    /// The heartbeat begins another round.
    pub fn note_round(&self) {
        self.rounds.fetch_add(1, Ordering::Relaxed);
    }

    /// Rounds that the heartbeat has begun, whether or not the store answered: it lives while they grow.
    pub fn rounds(&self) -> u64 {
        self.rounds.load(Ordering::Relaxed)
    }

    /// Remembers a heartbeat that was begun at this moment and has this revision.
    pub fn note_beat(&self, revision: Revision, begun: BootTime) {
        let mut beats = self.beats.lock();
        if beats.len() == BEATS_KEPT {
            beats.pop_front();
        }
        beats.push_back((revision, begun));
    }

    /// A moment before the store reached a revision: the begin of the last own heartbeat that is no later than it. Two
    /// machines can so speak of one moment without having the same time. `None`: this process is younger, or it is
    /// longer ago than is remembered.
    pub fn before(&self, revision: Revision) -> Option<BootTime> {
        let beats = self.beats.lock();
        let after = beats.partition_point(|(beat, _)| *beat <= revision);
        beats.get(after.checked_sub(1)?).map(|(_, begun)| *begun)
    }

    /// A heartbeat did not reach the store; answers whether the one before did.
    pub fn missed(&self) -> bool {
        self.succeeded.swap(false, Ordering::Relaxed)
    }

    /// Whether nobody else can have been elected yet: at this moment, not at one before or after.
    pub fn is_held(&self) -> bool {
        clock::boot() < self.until()
    }

    /// When it ends.
    pub fn until(&self) -> BootTime {
        BootTime::from_nanos(self.until_nanos.load(Ordering::Acquire))
    }

    /// The counter of the last heartbeat.
    pub fn counter(&self) -> u64 {
        self.counter.load(Ordering::Relaxed)
    }

    /// Whether the last heartbeat reached the store.
    pub fn succeeded(&self) -> bool {
        self.succeeded.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_term_begins_with_the_heartbeat_not_with_its_answer() {
        let lease = Lease::default();
        assert!(!lease.is_held() && !lease.succeeded());
        let now = clock::boot();
        lease.renew(now, 1);
        assert!(lease.is_held());
        assert_eq!(lease.until(), now + TERM);
        // An answer that comes late renews nothing that a later one has renewed.
        lease.renew(BootTime::from_nanos(now.nanos() - 500_000_000), 2);
        assert_eq!(lease.until(), now + TERM);
        let old = Lease::default();
        old.renew(BootTime::from_nanos(now.nanos().saturating_sub(2_000_000_000)), 1);
        assert!(!old.is_held());
        assert!(old.missed() && !old.missed());
    }

    #[test]
    fn a_revision_is_later_than_the_beats_before_it() {
        let lease = Lease::default();
        let at = |ms: u64| BootTime::from_nanos(ms * 1_000_000);
        assert_eq!(lease.before(Revision::new(100)), None);
        for (revision, ms) in [(10, 250), (14, 500), (20, 750)] {
            lease.note_beat(Revision::new(revision), at(ms));
        }
        for (revision, begun) in
            [(9, None), (10, Some(250)), (13, Some(250)), (14, Some(500)), (19, Some(500)), (99, Some(750))]
        {
            assert_eq!(lease.before(Revision::new(revision)), begun.map(at), "{revision}");
        }
        for n in 0..2 * BEATS_KEPT as u64 {
            lease.note_beat(Revision::new(21 + n), at(751 + n));
        }
        assert_eq!(lease.before(Revision::new(20)), None, "longer ago than is remembered");
        assert_eq!(lease.beats.lock().len(), BEATS_KEPT);
    }

    #[test]
    fn observers_are_later_than_holders() {
        assert!(SILENCE_MAX > TERM && HEARING_GAP_MAX < TERM);
    }
}
