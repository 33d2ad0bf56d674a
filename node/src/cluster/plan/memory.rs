//! What a node remembers from one look to the next: since when nothing changes, and who failed to use a volume. Every moment
//! is given by the caller.
//!
//! Nobody writes down that he failed: it shows in the records, which all nodes see. A node that gives a volume away although it
//! was asked by nobody, and not for balance, could not use it. What is missed (a node's copy of the records was made
//! anew, a process is younger) is not judged: it costs one more trial.

use std::collections::BTreeMap;
use std::time::Duration;

use shardfs_proto::types::clock::BootTime;
use shardfs_proto::types::{Epoch, NodeId, VolumeId};

use super::{ATTEMPTS_MAX, BALANCE_AFTER, Doubt, GONE_AFTER, Health, IMBALANCE_MAX, Local, Volume};

/// How long a node that failed to use a volume is not given it: doubles with every failure.
const PAUSE_MIN: Duration = Duration::from_secs(5);
/// See [`PAUSE_MIN`].
const PAUSE_MAX: Duration = Duration::from_secs(5 * 60);
/// After so long without another failure it is forgotten.
const KEPT: Duration = Duration::from_secs(60 * 60);
/// Who keeps a volume for so long can use it: others would have been able to try by then.
const PROVEN_AFTER: Duration = PAUSE_MAX.saturating_mul(2);
/// Balancing takes nothing from a node that has it for less; with a margin for what a look is late.
const BALANCE_NEVER_BEFORE: Duration = Duration::from_millis(BALANCE_AFTER.as_millis() as u64 / 2);

/// Since when nothing changes.
#[derive(Default, Debug)]
pub struct Calm {
    since: Option<BootTime>,
    landmarks: Landmarks,
}

/// What changes only when something happens.
#[derive(PartialEq, Eq, Default, Debug)]
struct Landmarks {
    alive: Vec<NodeId>,
    draining: Vec<NodeId>,
    volumes: Vec<(VolumeId, Epoch, Option<NodeId>)>,
}

impl Calm {
    /// Looks; answers how long nothing has changed.
    pub fn look(
        &mut self,
        now: BootTime,
        nodes: &BTreeMap<NodeId, Health>,
        draining: &[NodeId],
        volumes: &[Volume],
    ) -> Duration {
        let alive = nodes.iter().filter(|(_, health)| **health == Health::Alive);
        let landmarks = Landmarks {
            alive: alive.map(|(node, _)| node.clone()).collect(),
            draining: draining.to_vec(),
            volumes: volumes.iter().map(|v| (v.id.clone(), v.epoch, v.target.clone())).collect(),
        };
        if self.landmarks != landmarks || !nodes.values().all(at_rest) || !volumes.iter().all(is_settled) {
            self.since = None;
        }
        self.landmarks = landmarks;
        now.since(*self.since.get_or_insert(now))
    }
}

/// One that is gone for good changes nothing any more: its volumes' elections are changes of their own.
fn at_rest(health: &Health) -> bool {
    match health {
        Health::Alive | Health::Absent | Health::Dead(_) => true,
        Health::Silent(since) => *since >= GONE_AFTER,
        Health::Unknown => false,
    }
}

/// One that this node cannot use may stay so for long.
fn is_settled(volume: &Volume) -> bool {
    matches!(volume.local, Local::Detached | Local::Backup | Local::Primary(_))
        || volume.attempts >= ATTEMPTS_MAX
}

/// Who failed to use which volume.
#[derive(Default, Debug)]
pub struct Doubts(BTreeMap<VolumeId, History>);

#[derive(Debug)]
struct History {
    primary: Option<NodeId>,
    epoch: Epoch,
    /// Since when it is so; `None`: for longer than this process looks.
    since: Option<BootTime>,
    failures: BTreeMap<NodeId, Failure>,
}

#[derive(Debug)]
struct Failure {
    count: u32,
    last: BootTime,
    /// A later process of the node is not to blame.
    process: Option<String>,
}

impl Doubts {
    /// Looks at all volumes and writes into each who is doubted. Answers those whose epoch has changed. `process` names a
    /// node's process.
    pub fn look(
        &mut self,
        now: BootTime,
        process: impl Fn(&NodeId) -> Option<String>,
        draining: &[NodeId],
        volumes: &mut [Volume],
    ) -> Vec<VolumeId> {
        let mut loads: BTreeMap<NodeId, usize> = BTreeMap::new();
        for primary in self.0.values().filter_map(|history| history.primary.as_ref()) {
            *loads.entry(primary.clone()).or_default() += 1;
        }
        // They are in order of id.
        self.0.retain(|id, _| volumes.binary_search_by(|volume| volume.id.cmp(id)).is_ok());
        let mut changed = Vec::new();
        for volume in volumes {
            let history = self.0.entry(volume.id.clone()).or_insert_with(|| History {
                primary: volume.primary.clone(),
                epoch: volume.epoch,
                since: None,
                failures: BTreeMap::new(),
            });
            if history.epoch != volume.epoch {
                if let Some(giver) = history.failed(now, draining, volume, &loads) {
                    let failure = history.failures.entry(giver.clone()).or_insert_with(|| Failure {
                        count: 0,
                        last: now,
                        process: process(&giver),
                    });
                    failure.count = failure.count.saturating_add(1);
                    failure.last = now;
                }
                history.primary = volume.primary.clone();
                history.epoch = volume.epoch;
                history.since = Some(now);
                changed.push(volume.id.clone());
            }
            history
                .failures
                .retain(|node, failure| now.since(failure.last) < KEPT && process(node) == failure.process);
            volume.doubts =
                history.failures.iter().map(|(node, failure)| (node.clone(), failure.doubt(now))).collect();
        }
        changed
    }

    /// What is held against a node, as of the last look.
    pub fn doubt(&self, volume: &VolumeId, node: &NodeId, now: BootTime) -> Option<Doubt> {
        self.0.get(volume)?.failures.get(node).map(|failure| failure.doubt(now))
    }
}

impl History {
    /// The node that gave the volume away because it could not use it, if that is what has happened.
    fn failed(
        &mut self,
        now: BootTime,
        draining: &[NodeId],
        volume: &Volume,
        loads: &BTreeMap<NodeId, usize>,
    ) -> Option<NodeId> {
        let held = self.since.map(|since| now.since(since));
        let giver = self.primary.clone()?;
        if held.is_some_and(|held| held >= PROVEN_AFTER) {
            self.failures.remove(&giver);
        }
        let receiver = volume.primary.as_ref()?;
        // Of several changes at once nothing is known.
        let one_step = self.epoch.get().checked_add(1) == Some(volume.epoch.get());
        let asked = draining.contains(&giver) || volume.target.as_ref() == Some(receiver);
        if !one_step || !volume.handed_over || asked || *receiver == giver {
            return None;
        }
        let load = |node: &NodeId| loads.get(node).copied().unwrap_or(0);
        let balanced = held.is_none_or(|held| held >= BALANCE_NEVER_BEFORE)
            && load(receiver) + IMBALANCE_MAX < load(&giver)
            && !self.failures.contains_key(&giver);
        (!balanced).then_some(giver)
    }
}

impl Failure {
    fn doubt(&self, now: BootTime) -> Doubt {
        // Far more doublings than to the longest pause would overflow.
        let doublings = self.count.saturating_sub(1).min(16);
        let pause = PAUSE_MIN.saturating_mul(1 << doublings).min(PAUSE_MAX);
        if now.since(self.last) < pause { Doubt::Paused } else { Doubt::Failed }
    }
}

#[cfg(test)]
mod tests;
