//! Publishing, decided: when a view is due, whether one is needed, which folders may go. Pure.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, Instant};

use shardfs_proto::types::ShardId;

use crate::cluster::records::views::{Pinned, ViewName, ViewRecord};

/// The least pause between two views of a shard, whatever is asked: each costs a flush and a commit of the file system's journal.
pub(super) const PAUSE_MIN: Duration = Duration::from_secs(1);
/// Somebody reads a shard on backups for so long after it was last said.
pub(super) const INTEREST_TERM: Duration = Duration::from_secs(60);

/// Somebody reads a shard on a backup.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Interest {
    /// Until when, unless it is said again.
    pub(super) until: Instant,
    /// Between two views.
    pub(super) pause: Duration,
    /// When a view was last begun.
    pub(super) begun: Option<Instant>,
}

impl Interest {
    /// Said anew: the shortest pause that is asked for counts, until nobody has asked for it for a while.
    pub(super) fn renewed(self, pause: Duration, now: Instant) -> Interest {
        let stale = self.until <= now;
        Interest {
            until: now + INTEREST_TERM,
            pause: if stale { pause } else { self.pause.min(pause) },
            begun: self.begun,
        }
    }

    /// Whether a view is to be made.
    pub(super) fn is_due(&self, now: Instant) -> bool {
        self.until > now && self.begun.is_none_or(|begun| now.saturating_duration_since(begun) >= self.pause)
    }
}

/// The pause between two views for readers who take such an age; zero: they do not mind.
pub(super) fn pause(every: Duration, max_age: Duration) -> Duration {
    let wanted = if max_age.is_zero() { every } else { every.min(max_age) };
    wanted.max(PAUSE_MIN)
}

/// Whether the view that is announced is what a new one would be.
pub(super) fn is_current(announced: Option<&ViewRecord>, sequence: u64, closed: bool) -> bool {
    announced.is_some_and(|view| view.last || (view.sequence == sequence && !closed))
}

/// The views of a shard whose files nobody needs.
pub(super) fn disposable(
    shard: ShardId,
    there: &BTreeSet<ViewName>,
    announced: Option<ViewName>,
    pinned: &HashSet<Pinned>,
    doubtful: &HashSet<Pinned>,
) -> Vec<ViewName> {
    let needed = |name: ViewName| {
        let view = Pinned { shard, name };
        announced == Some(name) || pinned.contains(&view) || doubtful.contains(&view)
    };
    there.iter().copied().filter(|name| !needed(*name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::records::FORMAT;
    use shardfs_proto::types::{Epoch, VolumeId, clock};

    fn name(number: u64) -> ViewName {
        ViewName::new(Epoch::FIRST, number)
    }

    #[test]
    fn pauses_are_those_of_the_most_demanding_reader_within_bounds() {
        let s = Duration::from_secs;
        for (every, max_age, expected) in [
            (s(5), s(0), s(5)),
            (s(5), s(3), s(3)),
            (s(5), s(60), s(5)),
            (s(5), Duration::from_millis(10), PAUSE_MIN),
            (Duration::from_millis(100), s(0), PAUSE_MIN),
        ] {
            assert_eq!(pause(every, max_age), expected, "{every:?} {max_age:?}");
        }
        let now = clock::monotonic();
        let fresh = Interest { until: now + s(1), pause: s(3), begun: None };
        assert!(fresh.is_due(now) && !fresh.is_due(now + s(1)));
        let renewed = fresh.renewed(s(5), now);
        assert_eq!((renewed.pause, renewed.until), (s(3), now + INTEREST_TERM));
        assert_eq!(fresh.renewed(s(2), now).pause, s(2));
        assert_eq!(fresh.renewed(s(5), now + s(1)).pause, s(5), "who asked for less has gone");
        let begun = Interest { begun: Some(now), ..renewed };
        assert!(!begun.is_due(now + s(2)) && begun.is_due(now + s(3)));
    }

    #[test]
    fn a_view_is_made_of_what_has_changed() {
        let announced = |sequence, last| ViewRecord {
            v: FORMAT,
            shard: ShardId::new(1).unwrap(),
            volume: VolumeId::new("v").unwrap(),
            name: name(1),
            sequence,
            true_at: 1,
            last,
        };
        for (view, sequence, closed, expected) in [
            (None, 5, false, false),
            (Some(announced(5, false)), 5, false, true),
            (Some(announced(4, false)), 5, false, false),
            // The state of the shard is part of what a view shows.
            (Some(announced(5, false)), 5, true, false),
            (Some(announced(5, true)), 5, true, true),
        ] {
            assert_eq!(is_current(view.as_ref(), sequence, closed), expected, "{view:?}");
        }
    }

    #[test]
    fn what_is_announced_pinned_or_in_doubt_stays() {
        let (shard, other) = (ShardId::new(1).unwrap(), ShardId::new(2).unwrap());
        let there: BTreeSet<ViewName> = (1..=6).map(name).collect();
        let pinned = HashSet::from([
            Pinned { shard, name: name(2) },
            // Of another shard.
            Pinned { shard: other, name: name(3) },
        ]);
        let doubtful = HashSet::from([Pinned { shard, name: name(5) }]);
        let gone = disposable(shard, &there, Some(name(6)), &pinned, &doubtful);
        assert_eq!(gone, [name(1), name(3), name(4)]);
        let none = HashSet::new();
        assert_eq!(disposable(shard, &there, None, &none, &none).len(), 6);
    }
}
