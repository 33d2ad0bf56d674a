//! Pins against a real embedded store, with real heartbeats.

use super::*;
use crate::cluster::elect::tests::{Member, PATIENCE, World, until};
use crate::cluster::records::views::ViewName;
use crate::cluster::store::get;
use shardfs_proto::types::{Epoch, ShardId};

fn vol() -> VolumeId {
    VolumeId::new("vol-1").unwrap()
}

fn shard() -> ShardId {
    ShardId::new(7).unwrap()
}

/// Announces a view of shard 7, past all primaries.
async fn announce(member: &Member, number: u64) -> Kept<ViewRecord> {
    let record = ViewRecord {
        v: FORMAT,
        shard: shard(),
        volume: vol(),
        name: ViewName::new(Epoch::FIRST, number),
        sequence: 1,
        true_at: 1,
        last: false,
    };
    let txn = Txn::new().put(view_key(&vol(), shard()), records::encode(&record));
    let revision = member.store.txn(txn).await.unwrap().revision;
    member.view.wait_for(revision, PATIENCE).await.unwrap();
    member.view.view_of(shard()).unwrap()
}

async fn pin_it(member: &Member, kept: &Kept<ViewRecord>) -> Option<Revision> {
    let views = vec![Pinned { shard: shard(), name: kept.record.name }];
    let fresh = std::slice::from_ref(kept);
    let pinned = pin(&*member.store, &member.view, &member.record, &vol(), views, fresh).await.unwrap();
    if let Some(revision) = pinned {
        member.view.wait_for(revision, PATIENCE).await.unwrap();
    }
    pinned
}

#[tokio::test(flavor = "multi_thread")]
async fn only_what_is_announced_can_be_pinned() {
    let world = World::new().await;
    let b = world.member("b").await;
    let first = announce(&b, 1).await;
    let second = announce(&b, 2).await;
    assert!(pin_it(&b, &first).await.is_none(), "it was superseded");
    assert!(b.view.pins_on(&vol()).is_empty());
    assert!(pin_it(&b, &second).await.is_some());
    let pins = b.view.pins_on(&vol());
    assert_eq!(pins[0].record.views, [Pinned { shard: shard(), name: second.record.name }]);
    // Nothing is used any more: the record goes.
    let none = pin(&*b.store, &b.view, &b.record, &vol(), Vec::new(), &[]).await.unwrap();
    b.view.wait_for(none.unwrap(), PATIENCE).await.unwrap();
    assert!(b.view.pins_on(&vol()).is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn pins_are_broken_only_when_the_lease_is_over_and_stay_broken() {
    let world = World::new().await;
    let (a, mut b) = (world.member("a").await, world.member("b").await);
    let view = announce(&b, 1).await;
    pin_it(&b, &view).await.unwrap();
    until("a sees b alive, and its pin", || {
        lease_is_over(&a.view, &b.record.id, Txn::new()).is_none() && a.view.pins_on(&vol()).len() == 1
    })
    .await;
    assert_eq!(break_abandoned(&*a.store, &a.view, &vol()).await.unwrap(), 0, "it lives");

    // b's heart stands still for longer than its lease, as in a process that was stopped.
    b.hang();
    until("b is silent", || lease_is_over(&a.view, &b.record.id, Txn::new()).is_some()).await;
    assert!(!b.lease.is_held(), "its own lease was over before");
    assert_eq!(break_abandoned(&*a.store, &a.view, &vol()).await.unwrap(), 1);
    let depositions = get(&*a.store, records::deposition_key(&b.record.id)).await.unwrap();
    assert!(depositions.1.is_some(), "its next heartbeat learns of it");
    // When its lease is back, its copy shows that the pin is gone.
    b.beat().await;
    until("b is back", || b.lease.is_held()).await;
    assert!(b.view.pin(&vol(), &b.record.id).is_none());

    // What it has open still may be gone: it is not held again beside another view, nor alone.
    let other = announce(&b, 2).await;
    let open = |kept: &Kept<ViewRecord>| Pinned { shard: shard(), name: kept.record.name };
    for views in [vec![open(&view), open(&other)], vec![open(&view)]] {
        let fresh = std::slice::from_ref(&other);
        let pinned = pin(&*b.store, &b.view, &b.record, &vol(), views, fresh).await.unwrap();
        assert!(pinned.is_none(), "a hold that was broken came back");
    }
    pin_it(&b, &other).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_later_process_drops_the_pins_of_the_earlier_one() {
    let world = World::new().await;
    let b = world.member("b").await;
    let view = announce(&b, 1).await;
    pin_it(&b, &view).await.unwrap();
    let later = world.member("b").await;
    until("it sees the pin", || later.view.pins_of(&later.record.id).len() == 1).await;
    drop_stale(&*later.store, &later.view, &later.record).await.unwrap();
    until("it is gone", || later.view.pins_of(&later.record.id).is_empty()).await;
    // The earlier one is the node no more.
    let view = announce(&later, 2).await;
    until("the earlier one sees it", || b.view.view_of(shard()).unwrap().modified == view.modified).await;
    assert!(pin_it(&b, &view).await.is_none());
}
