//! Elections and hand-overs: one transaction each, which compares everything that it relies on.
//!
//! Invariant: when an election succeeds, the loser's lease is over and stays over for this volume: the transaction names the
//! heartbeat (or the death) that was judged, so an unseen one makes it fail, and it changes the loser's depositions,
//! so every later heartbeat is made in the knowledge of the loss (see `heartbeat`).

use shardfs_proto::types::{Epoch, Error, NodeId, Reason, Result, VolumeId};

use super::plan::{self, Health, Promotion};
use super::records::{self, NodeRecord, VolumeRecord};
use super::store::{Demand, MetaStore, Revision, StoreError, Txn};
use super::view::{Kept, View};

/// What became of an attempt.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// The record says so now, at this revision, under this epoch.
    Won(Revision, Epoch),
    /// Something that was relied on has changed.
    Overtaken,
    /// It may have come true, or may still.
    Unknown,
}

/// Takes a volume: (primary, epoch) := (me, epoch + 1).
pub async fn elect(
    store: &dyn MetaStore,
    view: &View,
    me: &NodeRecord,
    volume: &Kept<VolumeRecord>,
) -> Result<Outcome> {
    let old = &volume.record;
    let mut txn = Txn::new();
    if let Some(from) = old.primary.as_ref().filter(|from| **from != me.id) {
        txn = match lease_is_over(view, from, txn) {
            Some(txn) => txn,
            None => return Ok(Outcome::Overtaken),
        };
        let epoch = next(old.epoch)?;
        txn = txn.put(records::deposition_key(from), format!("{} {epoch}", old.id));
    }
    let mut backups = old.backups.clone();
    backups.retain(|node| *node != me.id);
    if let Some(from) = old.primary.as_ref().filter(|from| **from != me.id) {
        backups.push(from.clone());
    }
    let fresh = VolumeRecord {
        primary: Some(me.id.clone()),
        backups,
        epoch: next(old.epoch)?,
        holder: me.incarnation.clone(),
        // Where an operator wanted it, it was, and is no more: it does not move back by itself. A restart moves nothing.
        target: if old.primary.as_ref() == Some(&me.id) { old.target.clone() } else { None },
        predecessors: old.predecessors_of_next(),
        handed_over: false,
        unmounted: false,
        ..(**old).clone()
    };
    // This process must be the node still.
    let Some(mine) = view.node(&me.id).filter(|kept| kept.record.incarnation == me.incarnation) else {
        return Ok(Outcome::Overtaken);
    };
    change(store, txn.when(records::node_key(&me.id), Demand::Modified(mine.modified)), volume, fresh).await
}

/// Adds what a transaction has to demand that is right only while a node's lease is over; `None`: it is not, for all that
/// is known. Who makes it also changes the node's depositions.
pub fn lease_is_over(view: &View, node: &NodeId, txn: Txn) -> Option<Txn> {
    match view.health(node) {
        Health::Dead(_) => {
            view.death_revision(node).map(|seen| txn.when(records::death_key(node), Demand::Modified(seen)))
        }
        Health::Silent(_) => view
            .heartbeat_revision(node)
            .map(|seen| txn.when(records::heartbeat_key(node), Demand::Modified(seen))),
        Health::Absent => Some(txn.when(records::heartbeat_key(node), Demand::Absent)),
        Health::Alive | Health::Unknown => None,
    }
}

/// Gives a volume, which this process no longer serves, to a node that is alive. `unmounted`: see [`VolumeRecord::unmounted`].
pub async fn hand_over(
    store: &dyn MetaStore,
    view: &View,
    me: &NodeId,
    volume: &Kept<VolumeRecord>,
    to: &NodeId,
    unmounted: bool,
) -> Result<Outcome> {
    let old = &volume.record;
    let Some(successor) = view.node(to) else { return Ok(Outcome::Overtaken) };
    if old.primary.as_ref() != Some(me) || !old.backups.contains(to) {
        return Ok(Outcome::Overtaken);
    }
    let mut backups = old.backups.clone();
    backups.retain(|node| node != to);
    backups.push(me.clone());
    let fresh = VolumeRecord {
        primary: Some(to.clone()),
        backups,
        epoch: next(old.epoch)?,
        holder: successor.record.incarnation.clone(),
        // It went elsewhere for another reason, and stays there.
        target: old.target.clone().filter(|target| target == to),
        predecessors: old.predecessors_of_next(),
        handed_over: true,
        unmounted,
        ..(**old).clone()
    };
    let txn = Txn::new().when(records::node_key(to), Demand::Modified(successor.modified));
    change(store, txn, volume, fresh).await
}

async fn change(
    store: &dyn MetaStore,
    txn: Txn,
    volume: &Kept<VolumeRecord>,
    fresh: VolumeRecord,
) -> Result<Outcome> {
    let key = records::volume_key(&fresh.id);
    let txn = txn.when(key.clone(), Demand::Modified(volume.modified)).put(key, records::encode(&fresh));
    match store.txn(txn).await {
        Ok(answer) if answer.succeeded => Ok(Outcome::Won(answer.revision, fresh.epoch)),
        Ok(_) => Ok(Outcome::Overtaken),
        Err(StoreError::OutcomeUnknown(why)) => {
            tracing::warn!(volume = %fresh.id, why, "whether a volume's record has changed is not known");
            Ok(Outcome::Unknown)
        }
        Err(error) => Err(Error::from(error).context(format!("volume {}", fresh.id))),
    }
}

fn next(epoch: Epoch) -> Result<Epoch> {
    epoch.get().checked_add(1).and_then(Epoch::new).ok_or_else(|| Error::internal("epochs are used up"))
}

/// How a volume's move to a node stands.
pub fn promotion(view: &View, volume: &VolumeRecord, to: &NodeId) -> Promotion {
    let drained = view.draining().contains(to);
    plan::promotion(volume.primary.as_ref(), volume.target.as_ref(), to, view.health(to), drained)
}

/// Fails unless a volume has moved or still may. Only what mends itself is worth repeating: a promotion that was overtaken and is
/// repeated by its caller would overtake the other.
pub fn refuse(promotion: &Promotion, volume: &VolumeRecord, to: &NodeId) -> Result<()> {
    let id = &volume.id;
    match promotion {
        Promotion::Waiting | Promotion::Moved => Ok(()),
        Promotion::Overtaken(other) => Err(Error::new(
            Reason::VersionMismatch,
            format!("volume {id} does not move to {to}: somebody else has asked for {other} meanwhile"),
        )),
        Promotion::Failed => Err(Error::new(
            Reason::VersionMismatch,
            format!(
                "volume {id} has not moved to {to}, or {to} could not use it: {}",
                volume
                    .primary
                    .as_ref()
                    .map_or_else(|| "no node serves it".to_owned(), |node| format!("{node} has it now"))
            ),
        )),
        Promotion::Away => Err(Error::invalid(format!("{to} is not alive: start it first"))),
        Promotion::Unclear => Err(Error::unavailable(format!("{to} is not alive, or has only just started"))),
        Promotion::Drained => Err(Error::invalid(format!(
            "{to} is drained and serves nothing: `shardfs node drain {to} --undo` lets it"
        ))),
    }
}

/// Asks that a volume be served by a node; `None`: wherever.
pub async fn set_target(
    store: &dyn MetaStore,
    view: &View,
    volume: &VolumeId,
    target: Option<&NodeId>,
) -> Result<Revision> {
    change_volume(store, volume, |record, _| {
        if let Some(target) = target
            && record.primary.as_ref() != Some(target)
            && !record.backups.contains(target)
        {
            let candidates: Vec<&str> = record.backups.iter().map(NodeId::as_str).collect();
            return Err(Error::invalid(format!(
                "{target} does not stand by for volume {volume}; those who do: {}",
                if candidates.is_empty() { "none".to_owned() } else { candidates.join(", ") }
            )));
        }
        record.target = target.cloned();
        if let Some(target) = target {
            refuse(&promotion(view, record, target), record, target)?;
        }
        Ok(true)
    })
    .await
}

/// Changes a volume's record in one compare-and-set, made anew while others change it: `change` gets the record and its revision, and
/// says whether there is anything to change. The revision that the record has then.
pub async fn change_volume(
    store: &dyn MetaStore,
    volume: &VolumeId,
    change: impl Fn(&mut VolumeRecord, Revision) -> Result<bool>,
) -> Result<Revision> {
    const ATTEMPTS_MAX: usize = 8;
    let key = records::volume_key(volume);
    for _ in 0..ATTEMPTS_MAX {
        let (_, Some(kv)) = super::store::get(store, key.clone()).await? else {
            return Err(Error::not_found(format!("there is no volume {volume}")));
        };
        let mut record: VolumeRecord = records::decode(key.as_bytes(), &kv.value)?;
        if !change(&mut record, kv.modified)? {
            return Ok(kv.modified);
        }
        let txn = Txn::new()
            .when(key.clone(), Demand::Modified(kv.modified))
            .put(key.clone(), records::encode(&record));
        match store.txn(txn).await {
            Ok(answer) if answer.succeeded => return Ok(answer.revision),
            // What was made after all is found in the next round.
            Ok(_) | Err(StoreError::OutcomeUnknown(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Error::unavailable(format!("the record of volume {volume} keeps changing: try again")))
}

#[cfg(test)]
pub(super) mod tests;
