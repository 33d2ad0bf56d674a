//! The lease of a node's process, timed by each side's own boot clock.
//!
//! The holder counts its term from the **start** of its last heartbeat that succeeded; everybody else counts silence from the
//! moment at which they saw that heartbeat, which is later, and only while they heard the store. So when an observer
//! says that a lease is over, its holder has said so before.
//!
//! An election names, in its transaction, the heartbeat that it saw last and raises the loser's count of depositions, which
//! each heartbeat compares: a heartbeat that the observer did not see makes the election fail, and after an election the
//! loser's heartbeats fail until its copy of the records shows what it lost.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use shardfs_proto::types::clock::{self, BootTime};

/// The term of a lease.
pub const TERM: Duration = Duration::from_secs(1);
/// Silence after which observers take a lease for ended: the term, and the drift of two clocks in that time (far below
/// one part in a thousand) with a good margin.
pub const SILENCE_MAX: Duration = Duration::from_millis(1100);
/// Longer silence of the whole store is the observer's own trouble and counts for nobody: its own heartbeats come back
/// to it every 250 ms.
pub const HEARING_GAP_MAX: Duration = Duration::from_millis(600);

/// What a process knows of its own lease and heartbeat.
#[derive(Debug, Default)]
pub struct Lease {
    counter: AtomicU64,
    succeeded: AtomicBool,
    /// Boot clock, ns; 0: never held.
    until_nanos: AtomicU64,
}

impl Lease {
    /// A heartbeat that was begun at this moment has succeeded.
    pub fn renew(&self, begun: BootTime, counter: u64) {
        self.counter.store(counter, Ordering::Relaxed);
        self.until_nanos.fetch_max((begun + TERM).nanos(), Ordering::AcqRel);
        self.succeeded.store(true, Ordering::Relaxed);
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
    fn observers_are_later_than_holders() {
        assert!(SILENCE_MAX > TERM && HEARING_GAP_MAX < TERM);
    }
}
