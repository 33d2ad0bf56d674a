//! Pins: what keeps the files of a view, on a backup that reads them and on the primary that would delete them.
//!
//! Invariants:
//! - A backup opens a view only after its pin was written in a transaction that demands that the view's record is unchanged. So a pin
//!   of a view that was superseded at revision R was made before R.
//! - The primary deletes a view's files only if the view is not the announced one by a copy of the records that shows its own
//!   last announcement, and no pin in that copy names it.
//! - What was pinned and is no more is never pinned again while it is open: its files may be gone. A pin names only what the record
//!   before it named, and what is announced.
//! - A pin of a node whose lease is over may be broken, in a transaction that demands what an election demands and changes the
//!   node's depositions. So if that node lives after all, its next heartbeat succeeds only when its copy shows that the pin is gone; and
//!   a backup gives an answer only if, after it was read, its lease was held and then its copy showed the pin.

use shardfs_proto::types::{NodeId, Result, VolumeId};

use super::elect::lease_is_over;
use super::records::views::{PinRecord, Pinned, ViewRecord, pin_key, view_key};
use super::records::{self, FORMAT, NodeRecord};
use super::store::{Demand, MetaStore, Revision, StoreError, Txn};
use super::view::{Kept, View};

/// Replaces what this process uses of a volume. `fresh`: the records of views that were not pinned before. `None`: something that
/// is relied on has changed, or the outcome is not known; the copy of the records will tell.
pub async fn pin(
    store: &dyn MetaStore,
    view: &View,
    me: &NodeRecord,
    volume: &VolumeId,
    views: Vec<Pinned>,
    fresh: &[Kept<ViewRecord>],
) -> Result<Option<Revision>> {
    let key = pin_key(volume, &me.id);
    let Some(mine) = view.node(&me.id).filter(|kept| kept.record.incarnation == me.incarnation) else {
        return Ok(None);
    };
    let old = view.pin(volume, &me.id);
    let held = |view: &Pinned| {
        let old = old.as_ref().filter(|old| old.record.incarnation == me.incarnation);
        old.is_some_and(|old| old.record.views.contains(view))
    };
    let announced = |view: &Pinned| {
        fresh.iter().any(|kept| kept.record.shard == view.shard && kept.record.name == view.name)
    };
    if !views.iter().all(|view| held(view) || announced(view)) {
        return Ok(None);
    }
    let mut txn = Txn::new().when(records::node_key(&me.id), Demand::Modified(mine.modified));
    txn = match &old {
        Some(old) => txn.when(key.clone(), Demand::Modified(old.modified)),
        None => txn.when(key.clone(), Demand::Absent),
    };
    for kept in fresh {
        txn = txn.when(view_key(volume, kept.record.shard), Demand::Modified(kept.modified));
    }
    let record = PinRecord {
        v: FORMAT,
        volume: volume.clone(),
        node: me.id.clone(),
        incarnation: me.incarnation.clone(),
        views,
    };
    let txn = if record.views.is_empty() { txn.delete(key) } else { txn.put(key, records::encode(&record)) };
    committed(store.txn(txn).await)
}

/// Takes away the pins of an earlier process of this node, which can hold no lease any more.
pub async fn drop_stale(store: &dyn MetaStore, view: &View, me: &NodeRecord) -> Result<()> {
    for kept in view.pins_of(&me.id) {
        if kept.record.incarnation != me.incarnation {
            let key = pin_key(&kept.record.volume, &me.id);
            let txn = Txn::new().when(key.clone(), Demand::Modified(kept.modified)).delete(key);
            committed(store.txn(txn).await)?;
        }
    }
    Ok(())
}

/// Breaks the pins of nodes whose lease is over, which keep files of a volume. Answers how many.
pub async fn break_abandoned(store: &dyn MetaStore, view: &View, volume: &VolumeId) -> Result<usize> {
    let mut broken = 0;
    for kept in view.pins_on(volume) {
        let node: &NodeId = &kept.record.node;
        let Some(txn) = lease_is_over(view, node, Txn::new()) else { continue };
        let key = pin_key(volume, node);
        let txn = txn
            .when(key.clone(), Demand::Modified(kept.modified))
            .delete(key)
            .put(records::deposition_key(node), format!("{volume} views"));
        if committed(store.txn(txn).await)?.is_some() {
            tracing::info!(%volume, %node, "released the views of a node that is away");
            broken += 1;
        }
    }
    Ok(broken)
}

fn committed(outcome: Result<super::store::TxnAnswer, StoreError>) -> Result<Option<Revision>> {
    match outcome {
        Ok(answer) if answer.succeeded => Ok(Some(answer.revision)),
        Ok(_) | Err(StoreError::OutcomeUnknown(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests;
