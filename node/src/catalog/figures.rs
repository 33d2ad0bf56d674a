//! How often volumes came to this node and left it, since its process started: for monitoring.
//!
//! What is counted has happened: a volume that was won but could not be used is no takeover.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use shardfs_proto::types::{NodeId, VolumeId};

use crate::cluster::plan::Health;

/// How a volume came to this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// Its primary gave it away in order.
    HandOver,
    /// The process of its primary was seen to end.
    Death,
    /// Its primary was silent for longer than its lease.
    Silence,
    /// It had no primary, or that one was not there.
    Absence,
    /// It was this node's before: of an earlier process, or until it failed under this one.
    Reclaim,
}

impl Cause {
    /// All of them, in the order of their declaration.
    pub const ALL: [Cause; 5] =
        [Cause::HandOver, Cause::Death, Cause::Silence, Cause::Absence, Cause::Reclaim];

    /// Why `me` takes a volume from `from`, at the moment at which it does.
    pub fn of_election(me: &NodeId, from: Option<&NodeId>, health: impl FnOnce(&NodeId) -> Health) -> Cause {
        match from {
            None => Cause::Absence,
            Some(from) if from == me => Cause::Reclaim,
            Some(from) => match health(from) {
                Health::Dead(_) => Cause::Death,
                Health::Absent => Cause::Absence,
                // From one that is alive again nothing is won, and then nothing is counted.
                Health::Silent(_) | Health::Alive | Health::Unknown => Cause::Silence,
            },
        }
    }

    /// A word of a closed set.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::HandOver => "hand_over",
            Cause::Death => "death",
            Cause::Silence => "silence",
            Cause::Absence => "absence",
            Cause::Reclaim => "reclaim",
        }
    }
}

/// Counters of takeovers, hand-overs and step-downs.
#[derive(Default)]
pub struct Failovers {
    takeovers: [AtomicU64; Cause::ALL.len()],
    hand_overs: AtomicU64,
    step_downs: AtomicU64,
    /// Why volumes that are not served yet were last tried to be taken.
    elections: Mutex<HashMap<VolumeId, Cause>>,
}

impl Failovers {
    /// This node is about to take a volume: why is known now, not when it serves it.
    pub fn note_election(&self, volume: &VolumeId, cause: Cause) {
        self.elections.lock().insert(volume.clone(), cause);
    }

    /// This node serves a volume that it did not serve before. `handed_over`: as its record says.
    pub fn note_takeover(&self, volume: &VolumeId, handed_over: bool) {
        let elected = self.elections.lock().remove(volume);
        // An epoch that was not handed over is of this process's own election.
        let cause = if handed_over { Cause::HandOver } else { elected.unwrap_or(Cause::Reclaim) };
        self.takeovers[cause as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// This node gave a volume away.
    pub fn note_hand_over(&self) {
        self.hand_overs.fetch_add(1, Ordering::Relaxed);
    }

    /// This node stopped serving a volume that is another's, or that failed.
    pub fn note_step_down(&self) {
        self.step_downs.fetch_add(1, Ordering::Relaxed);
    }

    /// Volumes that came to this node so.
    pub fn takeovers(&self, cause: Cause) -> u64 {
        self.takeovers[cause as usize].load(Ordering::Relaxed)
    }

    /// Volumes that this node gave away.
    pub fn hand_overs(&self) -> u64 {
        self.hand_overs.load(Ordering::Relaxed)
    }

    /// Volumes that this node lost.
    pub fn step_downs(&self) -> u64 {
        self.step_downs.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn an_election_is_told_apart_by_what_became_of_the_primary() {
        let node = |name| NodeId::new(name).unwrap();
        let (me, other) = (node("node-1"), node("node-2"));
        let second = Duration::from_secs(1);
        for (from, health, cause) in [
            (None, Health::Alive, Cause::Absence),
            (Some(&me), Health::Alive, Cause::Reclaim),
            (Some(&other), Health::Dead(second), Cause::Death),
            (Some(&other), Health::Silent(second), Cause::Silence),
            (Some(&other), Health::Absent, Cause::Absence),
        ] {
            assert_eq!(Cause::of_election(&me, from, |_| health), cause, "{from:?} {health:?}");
        }
        assert!(Cause::ALL.iter().enumerate().all(|(at, cause)| *cause as usize == at));
    }

    #[test]
    fn a_takeover_counts_by_its_last_election_unless_it_was_handed_over() {
        let (one, two) = (VolumeId::new("vol-1").unwrap(), VolumeId::new("vol-2").unwrap());
        let counted = Failovers::default();
        counted.note_election(&one, Cause::Silence);
        counted.note_election(&one, Cause::Death);
        counted.note_takeover(&one, false);
        // Lost to another node, which handed it over later.
        counted.note_election(&two, Cause::Death);
        counted.note_takeover(&two, true);
        counted.note_takeover(&two, false);
        counted.note_hand_over();
        counted.note_step_down();
        let takeovers = Cause::ALL.map(|cause| counted.takeovers(cause));
        assert_eq!(takeovers, [1, 1, 0, 0, 1]);
        assert_eq!((counted.hand_overs(), counted.step_downs()), (1, 1));
    }
}
