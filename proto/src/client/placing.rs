//! Where a new shard goes: to a node that is drawn by lot, with the room of its volumes as its weight. A node whose volumes are full
//! says nothing of the others: they are asked as well, before that is what the caller hears.

use std::collections::HashSet;
use std::time::Duration;

use futures::future::join_all;

use super::Client;
use crate::types::cluster::{NodeInfo, NodeStatus};
use crate::types::{Error, Reason, Result};

/// Nodes that are asked for their room.
const ASKED_MAX: usize = 32;
/// How long their answers are waited for.
const ROOM_WAIT_MAX: Duration = Duration::from_millis(300);
/// How long nodes that cannot say whether they have room are asked while others are full: one that takes a volume over can soon.
const FULL_WAIT_MAX: Duration = Duration::from_secs(5);

/// What a node says of its volumes.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Room {
    /// Bytes by which shards may grow on them.
    Bytes(u64),
    /// Nothing.
    Unknown,
    /// It has none.
    NoVolume,
}

impl Room {
    fn of(status: &NodeStatus) -> Room {
        if status.volumes.is_empty() {
            return Room::NoVolume;
        }
        let bytes = status.volumes.iter().map(|volume| volume.free_bytes);
        Room::Bytes(bytes.fold(0, u64::saturating_add))
    }
}

/// Puts nodes in the order in which they are asked; those without volumes are left out if others have some. `lot`: numbers between
/// 0 and 1.
fn order<T>(mut nodes: Vec<(T, Room)>, mut lot: impl FnMut() -> f64) -> Vec<T> {
    if nodes.iter().any(|(_, room)| *room != Room::NoVolume) {
        nodes.retain(|(_, room)| *room != Room::NoVolume);
    }
    let mut keyed: Vec<((u8, f64), T)> = nodes
        .into_iter()
        .map(|(node, room)| {
            let drawn = lot();
            let key = match room {
                Room::Bytes(0) => (2, drawn),
                // The first of exponential waits is each one's with the probability that its rate has in the sum of rates.
                Room::Bytes(bytes) => (0, -(1.0 - drawn).ln() / bytes as f64),
                Room::Unknown | Room::NoVolume => (1, drawn),
            };
            (key, node)
        })
        .collect();
    keyed.sort_by(|(a, _), (b, _)| a.0.cmp(&b.0).then(a.1.total_cmp(&b.1)));
    keyed.into_iter().map(|(_, node)| node).collect()
}

/// Which nodes have refused a shard because their volumes are full.
#[derive(Default)]
pub(super) struct Refusals {
    full: HashSet<usize>,
    last: Option<Error>,
}

impl Refusals {
    /// What the failure at one of `nodes` means for the call, which has been under way for so long. `None`: what it says.
    pub(super) fn judge(
        &mut self,
        at: usize,
        nodes: usize,
        error: &Error,
        waited: Duration,
    ) -> Option<Error> {
        let is_full = error.reason() == Reason::VolumeFull;
        if is_full {
            self.full.insert(at);
            self.last = Some(error.clone());
        } else if !error.is_retryable() {
            return None;
        }
        let last = self.last.as_ref()?;
        if self.full.len() >= nodes || waited >= FULL_WAIT_MAX {
            return Some(last.clone());
        }
        is_full.then(|| Error::unavailable(format!("{}; other nodes are asked", error.message())))
    }

    /// What the caller hears of the call's last error.
    pub(super) fn told(self, error: Error) -> Error {
        self.last.filter(|_| error.reason() == Reason::Deadline).unwrap_or(error)
    }
}

impl Client {
    /// The nodes that a new shard may go to, in the order in which they are asked.
    pub(super) async fn places(&self) -> Result<Vec<NodeInfo>> {
        let mut nodes = self.nodes().await?;
        nodes.retain(|node| node.alive && !node.endpoints.is_empty());
        fastrand::shuffle(&mut nodes);
        let asked = nodes.iter().take(ASKED_MAX).map(|node| async {
            match tokio::time::timeout(ROOM_WAIT_MAX, self.node_status(&node.endpoints)).await {
                Ok(Ok(status)) => Room::of(&status),
                Ok(Err(_)) | Err(_) => Room::Unknown,
            }
        });
        let rooms = join_all(asked).await.into_iter().chain(std::iter::repeat(Room::Unknown));
        let nodes = nodes.iter().cloned().zip(rooms).collect();
        Ok(order(nodes, fastrand::f64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_drawn_by_their_room_and_full_ones_come_last() {
        let mut lots = fastrand::Rng::with_seed(7);
        let mut firsts = [0; 5];
        for _ in 0..4000 {
            let nodes =
                [Room::Bytes(0), Room::Bytes(3 << 40), Room::Unknown, Room::NoVolume, Room::Bytes(1 << 40)];
            let ordered = order(nodes.into_iter().enumerate().collect(), || lots.f64());
            assert_eq!(ordered.len(), 4, "one without volumes is left out");
            assert_eq!(ordered[2..], [2, 0], "unknown, then full");
            firsts[ordered[0]] += 1;
        }
        assert!((2800..3200).contains(&firsts[1]), "three quarters of 4000: {firsts:?}");
        assert_eq!(firsts[1] + firsts[4], 4000);
        let alone = order(vec![("a", Room::NoVolume)], || 0.0);
        assert_eq!(alone, ["a"], "it may have one soon");
    }

    #[test]
    fn a_full_node_is_no_answer_before_the_others_had_their_turn() {
        let full = Error::new(Reason::VolumeFull, "no room");
        let silent = Error::unavailable("silent");
        let reason = |judged: Option<Error>| judged.map(|error| error.reason());
        let mut refusals = Refusals::default();
        assert!(refusals.judge(1, 3, &silent, FULL_WAIT_MAX).is_none(), "nobody is full yet");
        let first = refusals.judge(0, 3, &full, Duration::ZERO).unwrap();
        assert!(first.is_retryable() && first.message().contains("no room"), "{first}");
        assert!(refusals.judge(1, 3, &silent, Duration::ZERO).is_none());
        // Whoever stays silent is not waited for to the end.
        assert_eq!(reason(refusals.judge(1, 3, &silent, FULL_WAIT_MAX)), Some(Reason::VolumeFull));
        let again = reason(refusals.judge(0, 3, &full, Duration::ZERO));
        assert_eq!(again, Some(Reason::Unavailable), "the same node");
        assert_eq!(reason(refusals.judge(1, 3, &full, Duration::ZERO)), Some(Reason::Unavailable));
        assert_eq!(reason(refusals.judge(2, 3, &full, Duration::ZERO)), Some(Reason::VolumeFull));
        // What no other node would answer otherwise ends the call at once.
        let exists = Error::new(Reason::ShardExists, "there");
        assert!(refusals.judge(1, 3, &exists, FULL_WAIT_MAX).is_none());
        for nodes in [0, 1] {
            let judged = Refusals::default().judge(0, nodes, &full, Duration::ZERO);
            assert_eq!(reason(judged), Some(Reason::VolumeFull));
        }
        let deadline = || Error::new(Reason::Deadline, "no success");
        assert_eq!(refusals.told(deadline()).reason(), Reason::VolumeFull);
        assert_eq!(Refusals::default().told(deadline()).reason(), Reason::Deadline);
    }
}
