//! Who should serve which volume, decided: `(intent, observed) -> actions`, without I/O, clocks or randomness.
//!
//! Every node plans for itself, from what it observes; the metadata store's compare-and-set decides between plans
//! that disagree, and the device between processes that do not listen. A plan is made anew whenever something changes;
//! its actions are idempotent and may be cut off anywhere: what was left half-done is observed next time.
//!
//! Invariants:
//! - what is not known ([`Health::Unknown`], [`Local::Busy`]) leads to no action on it;
//! - a volume is taken from a node only if that node's lease is over for certain: it is dead, or was silent for longer
//!   than the term while this node's own connection to the store was healthy;
//! - a volume is given, unless an operator asks for it, only to a node that is believed able to use it: who failed is left
//!   alone for a while that grows with every failure ([`Doubt`]), and balancing never tries it;
//! - at most one action a volume.
//!
//! Must not: know the store, devices or shards.

use std::collections::BTreeMap;
use std::time::Duration;

use shardfs_proto::types::{Epoch, NodeId, VolumeId};

mod memory;

pub use memory::{Calm, Doubts};

/// What a candidate waits for each one that is before it in line: longer than an election takes, so that normally one
/// transaction is made, not as many as there are backups.
pub const STAGGER: Duration = Duration::from_millis(150);
/// A volume is moved for balance only if nothing was amiss for so long.
pub const BALANCE_AFTER: Duration = Duration::from_secs(10);
/// A process that is younger takes nothing from a node that is not there: when a cluster starts, its nodes come one after
/// the other.
pub const ABSENT_GRACE: Duration = Duration::from_secs(5);
/// Attempts after which a primary that cannot use its volume gives it to a backup, and nobody waits for it any more.
pub const ATTEMPTS_MAX: u32 = 2;
/// Silence after which an operator is told that a node is not there.
const HICCUP_MAX: Duration = Duration::from_secs(2);
/// A node that is silent for so long is gone: what follows from that has happened.
pub const GONE_AFTER: Duration = Duration::from_secs(60);
/// Volumes that one node may serve more than another before one is moved.
pub const IMBALANCE_MAX: usize = 1;

/// How a node is, as seen from here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Health {
    /// Its counter grew lately.
    Alive,
    /// Its lease is over since so long, and may come back with its next heartbeat.
    Silent(Duration),
    /// Its process ended, since so long: somebody saw it.
    Dead(Duration),
    /// It left in order, or was never there.
    Absent,
    /// It has not been listened to for long enough.
    Unknown,
}

/// What this node has of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Local {
    /// Nothing.
    Detached,
    /// Attached, not mounted.
    Backup,
    /// Mounted for writing, and served under this epoch.
    Primary(Epoch),
    /// The device refused a write, or the filesystem was shut down under it.
    Fenced,
    /// It failed while this node served it under the record's epoch, and was let go of. What was answered before it was
    /// durable may be lost, so clients have to hear of another epoch.
    Lost,
    /// The record gives it to this node, which has failed to use it more than once.
    Unusable,
    /// An action on it is under way, or a failed one waits before it is tried again.
    Busy,
}

/// What is held against a node that failed to use a volume. Worse is greater.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Doubt {
    /// It may try again if nobody better is there.
    Failed,
    /// It failed just now: it is too early to try again.
    Paused,
}

/// A volume: its record, and what this node has of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// Which.
    pub id: VolumeId,
    /// Who serves it, by the record.
    pub primary: Option<NodeId>,
    /// Who stands by, preferred first.
    pub backups: Vec<NodeId>,
    /// The record's epoch.
    pub epoch: Epoch,
    /// The epoch was given to this very process, not to an earlier one of this node.
    pub given: bool,
    /// Where an operator wants it.
    pub target: Option<NodeId>,
    /// It was made: it has been attached once.
    pub formatted: bool,
    /// Whoever had it before its primary gave it away in order.
    pub handed_over: bool,
    /// It is being taken out of the cluster, and has no shards.
    pub retired: bool,
    /// What this node has of it.
    pub local: Local,
    /// Attempts of this node on it that failed, in a row.
    pub attempts: u32,
    /// Nodes that failed to use it lately; see [`Doubts`].
    pub doubts: BTreeMap<NodeId, Doubt>,
}

impl Volume {
    fn doubt(&self, node: &NodeId) -> Option<Doubt> {
        self.doubts.get(node).copied()
    }
}

/// What a node knows when it plans.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Observed {
    /// The node itself.
    pub me: NodeId,
    /// Whether the store answered lately: without it nothing can be elected or handed over.
    pub store_reachable: bool,
    /// Whether this process's lease is held. A node without one takes no volume.
    pub lease_held: bool,
    /// No earlier process of this node can hold a lease any more.
    pub alone: bool,
    /// Since when this process looks.
    pub looking_for: Duration,
    /// All nodes.
    pub nodes: BTreeMap<NodeId, Health>,
    /// The whole cluster is being stopped: volumes stay where they are.
    pub stopping: bool,
    /// Nodes that are to serve nothing.
    pub draining: Vec<NodeId>,
    /// Since when nothing changes; see [`Calm`].
    pub calm_since: Duration,
    /// All volumes, in order of id.
    pub volumes: Vec<Volume>,
}

/// Something to do.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Action {
    /// Attach it without mounting.
    Attach(VolumeId),
    /// Take it from `from`, whose lease is over: (primary, epoch) := (me, epoch + 1), if nothing has changed. `from` is this
    /// node itself if the epoch was an earlier process's.
    Elect {
        /// Which.
        volume: VolumeId,
        /// From whom; `None`: nobody has it.
        from: Option<NodeId>,
    },
    /// Fence, mount and serve: the record says that this node is the primary under this epoch.
    Promote(VolumeId, Epoch),
    /// Stop serving and give it to a node that is ready.
    HandOver(VolumeId, NodeId),
    /// Stop serving: somebody else is the primary, or the device says so. Drop what is dirty.
    StepDown(VolumeId),
    /// Let go of it: it is no longer this node's.
    Detach(VolumeId),
    /// Stop serving it, let go of it, and remove its record.
    Retire(VolumeId),
}

impl Action {
    /// The volume that it is about.
    pub fn volume(&self) -> &VolumeId {
        match self {
            Action::Attach(volume)
            | Action::Elect { volume, .. }
            | Action::Promote(volume, _)
            | Action::HandOver(volume, _)
            | Action::StepDown(volume)
            | Action::Detach(volume)
            | Action::Retire(volume) => volume,
        }
    }
}

/// What this node should do now.
pub fn plan(observed: &Observed) -> Vec<Action> {
    // Volumes by node: by the records, then by what this plan and those of the others (who reckon alike) add.
    let mut loads: BTreeMap<&NodeId, usize> = BTreeMap::new();
    for primary in observed.volumes.iter().filter_map(|v| v.primary.as_ref()) {
        *loads.entry(primary).or_default() += 1;
    }
    let mut actions = Vec::new();
    let mut moving = false;
    for volume in &observed.volumes {
        let winner = successor(observed, volume, &loads);
        if let Some((winner, _)) = winner {
            *loads.entry(winner).or_default() += 1;
        }
        if let Some(action) = for_volume(observed, volume, winner) {
            moving |= matches!(action, Action::HandOver(..));
            actions.push(action);
        }
    }
    if actions.is_empty() && !moving {
        actions.extend(balance(observed, &loads));
    }
    actions
}

/// The node that should take the volume from one whose lease is over, and since when it may.
fn successor<'a>(
    observed: &'a Observed,
    volume: &'a Volume,
    loads: &BTreeMap<&NodeId, usize>,
) -> Option<(&'a NodeId, Vec<&'a NodeId>)> {
    let over = match &volume.primary {
        None => true,
        Some(primary) => observed.over_since(primary).is_some(),
    };
    if !over {
        return None;
    }
    let mut line: Vec<&NodeId> = volume.backups.iter().filter(|node| observed.may_serve(node)).collect();
    if line.is_empty() {
        // Better a node that is being drained than none.
        line = volume.backups.iter().filter(|node| observed.health(node) == Health::Alive).collect();
    }
    // Stable: nodes with equal loads stay in the record's order. Who failed comes last, and comes still.
    line.sort_by_key(|node| (volume.doubt(node), loads.get(*node).copied().unwrap_or(0)));
    line.first().copied().map(|first| (first, line))
}

fn for_volume(
    observed: &Observed,
    volume: &Volume,
    successor: Option<(&NodeId, Vec<&NodeId>)>,
) -> Option<Action> {
    let me = &observed.me;
    let id = volume.id.clone();
    let mine = volume.primary.as_ref() == Some(me);
    match volume.local {
        Local::Busy => None,
        Local::Fenced => Some(Action::StepDown(id)),
        Local::Primary(epoch) if !mine || epoch != volume.epoch => Some(Action::StepDown(id)),
        // It has no shards, so it need not be mounted for it, and what cannot be used leaves as well.
        _ if mine && volume.retired => {
            (observed.store_reachable && observed.lease_held).then_some(Action::Retire(id))
        }
        Local::Primary(_) => hand_over_to(observed, volume).map(|to| Action::HandOver(id, to.clone())),
        // Another machine may have a better way to the device.
        Local::Lost if mine => match ready_backup(observed, volume).filter(|_| !observed.stopping) {
            Some(to) => Some(Action::HandOver(id, to.clone())),
            None => (observed.lease_held && observed.store_reachable)
                .then(|| Action::Elect { volume: id, from: Some(me.clone()) }),
        },
        // The record has another epoch by now; it is looked at again.
        Local::Lost => None,
        // With nobody who may be able it stays, and is tried again with growing pauses.
        Local::Unusable if mine && volume.given => {
            let ready = hand_over_to(observed, volume).or_else(|| ready_backup(observed, volume));
            match ready.filter(|_| !observed.stopping) {
                Some(to) => Some(Action::HandOver(id, to.clone())),
                None => Some(Action::Promote(id, volume.epoch)),
            }
        }
        Local::Unusable | Local::Detached | Local::Backup if mine && !observed.lease_held => None,
        Local::Detached | Local::Backup if mine && volume.given => Some(Action::Promote(id, volume.epoch)),
        Local::Unusable | Local::Detached | Local::Backup if mine => (observed.alone
            && observed.store_reachable)
            .then(|| Action::Elect { volume: id, from: Some(me.clone()) }),
        Local::Unusable | Local::Detached if volume.backups.contains(me) => {
            // What nobody has made cannot be attached: who is elected makes it.
            let election = if volume.formatted { None } else { election(observed, volume, successor) };
            Some(election.unwrap_or(Action::Attach(id)))
        }
        Local::Unusable | Local::Detached => None,
        Local::Backup if !volume.backups.contains(me) => Some(Action::Detach(id)),
        Local::Backup => election(observed, volume, successor),
    }
}

/// This node's election, if it is its turn.
fn election(
    observed: &Observed,
    volume: &Volume,
    successor: Option<(&NodeId, Vec<&NodeId>)>,
) -> Option<Action> {
    let (_, line) = successor?;
    let since = match &volume.primary {
        None => Duration::MAX,
        Some(primary) => observed.over_since(primary)?,
    };
    let place = u32::try_from(line.iter().position(|node| **node == observed.me)?).unwrap_or(u32::MAX);
    let turn = since >= STAGGER.saturating_mul(place);
    (turn && !observed.stopping && observed.lease_held && observed.store_reachable)
        .then(|| Action::Elect { volume: volume.id.clone(), from: volume.primary.clone() })
}

/// Where a volume that this node serves should go instead.
fn hand_over_to<'a>(observed: &'a Observed, volume: &'a Volume) -> Option<&'a NodeId> {
    if observed.stopping || !observed.store_reachable {
        return None;
    }
    let ready = |node: &&NodeId| volume.backups.contains(node) && observed.health(node) == Health::Alive;
    let target = volume.target.as_ref().filter(|target| !observed.draining.contains(target));
    if let Some(target) = target.filter(|target| **target != observed.me) {
        return Some(target).filter(ready);
    }
    observed.draining.contains(&observed.me).then(|| ready_backup(observed, volume)).flatten()
}

/// The backup that is alive, may serve, is believed able, and serves least; who never failed comes first.
fn ready_backup<'a>(observed: &'a Observed, volume: &'a Volume) -> Option<&'a NodeId> {
    let served =
        |node: &NodeId| observed.volumes.iter().filter(|other| other.primary.as_ref() == Some(node)).count();
    let able = |node: &&NodeId| observed.may_serve(node) && volume.doubt(node) != Some(Doubt::Paused);
    let ready = volume.backups.iter().filter(able);
    ready.min_by_key(|node| (volume.doubt(node), served(node))).filter(|_| observed.store_reachable)
}

/// One volume to a node that serves fewer, when all is calm.
fn balance(observed: &Observed, loads: &BTreeMap<&NodeId, usize>) -> Option<Action> {
    if observed.stopping
        || observed.calm_since < BALANCE_AFTER
        || !observed.store_reachable
        || !observed.lease_held
    {
        return None;
    }
    let load = |node: &NodeId| loads.get(node).copied().unwrap_or(0);
    let mine = load(&observed.me);
    // Only who has most gives, so that two never give to the same node at once; of several the first. One that is away,
    // with volumes that nobody else can take, holds up nobody.
    let able = observed.nodes.keys().filter(|node| observed.may_serve(node));
    let most = able.max_by_key(|node| (load(node), std::cmp::Reverse(*node)))?;
    if *most != observed.me {
        return None;
    }
    let served = observed.volumes.iter().filter(|v| {
        // One that an operator has placed stays there.
        matches!(v.local, Local::Primary(_)) && v.target.as_ref() != Some(&observed.me) && !v.retired
    });
    let moves = served.flat_map(|volume| {
        // A trial of a node that failed is a pause for the volume's users.
        let able = move |node: &&NodeId| observed.may_serve(node) && volume.doubt(node).is_none();
        volume.backups.iter().filter(able).map(move |node| (volume, node))
    });
    let (volume, node) = moves.min_by_key(|(_, node)| load(node))?;
    (load(node) + IMBALANCE_MAX < mine).then(|| Action::HandOver(volume.id.clone(), node.clone()))
}

/// How a volume's move that an operator asked for stands.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Promotion {
    /// It is under way.
    Waiting,
    /// The record says so.
    Moved,
    /// Somebody asked for another node since.
    Overtaken(NodeId),
    /// It went elsewhere, or its node gave it away again: nobody tries any more.
    Failed,
    /// The node is not there.
    Away,
    /// The node cannot be judged at the moment.
    Unclear,
    /// The node is to serve nothing.
    Drained,
}

/// How the move of a volume to the node `to` stands, by its record, after the target was set to `to` (or before, with that
/// target).
pub fn promotion(
    primary: Option<&NodeId>,
    target: Option<&NodeId>,
    to: &NodeId,
    health: Health,
    drained: bool,
) -> Promotion {
    match target {
        Some(other) if other != to => Promotion::Overtaken(other.clone()),
        _ if primary == Some(to) => Promotion::Moved,
        None => Promotion::Failed,
        Some(_) if drained => Promotion::Drained,
        Some(_) => match health {
            Health::Alive => Promotion::Waiting,
            Health::Dead(_) | Health::Absent => Promotion::Away,
            // A hiccup ends.
            Health::Silent(since) if since < HICCUP_MAX => Promotion::Unclear,
            Health::Silent(_) => Promotion::Away,
            Health::Unknown => Promotion::Unclear,
        },
    }
}

impl Observed {
    fn health(&self, node: &NodeId) -> Health {
        if *node == self.me {
            return Health::Alive;
        }
        self.nodes.get(node).copied().unwrap_or(Health::Absent)
    }

    /// Since when a node's lease is over for certain.
    fn over_since(&self, node: &NodeId) -> Option<Duration> {
        match self.health(node) {
            Health::Silent(since) | Health::Dead(since) => Some(since),
            Health::Absent => (self.looking_for >= ABSENT_GRACE).then_some(Duration::MAX),
            Health::Alive | Health::Unknown => None,
        }
    }

    /// Whether a node may be given volumes.
    fn may_serve(&self, node: &NodeId) -> bool {
        self.health(node) == Health::Alive && !self.draining.contains(node)
    }
}

#[cfg(test)]
mod tests;
