//! Views from the primary to a backup and away again: on folders, against a real metadata store.

use std::collections::BTreeSet;
use std::path::Path;

use shardfs_proto::types::Key;

use super::folders::list;
use super::*;
use crate::catalog::BackupRead;
use crate::catalog::tests::{Bench, TestNode, by_id, eventually, me, new, put};
use crate::shard::read;
use crate::volume::views::views_dir;

const LONG: Duration = Duration::from_secs(60);

/// Two nodes; the first serves the volume, the second stands by.
async fn two() -> (Bench, TestNode, TestNode, ShardId) {
    let world = Bench::with_backups("vol-1", "n1", &["n2"]).await;
    let (one, two) = (world.node("n1").await, world.node("n2").await);
    let shard = one.catalog.new_shard(&me(), new("s")).await.unwrap().id;
    let view = &two.catalog.parts.view;
    eventually("the backup knows the shard", async || view.shard(shard).is_some()).await;
    (world, one, two, shard)
}

async fn fill(node: &TestNode, shard: ShardId, key: &str) {
    let shard = node.catalog.open_shard(&me(), &by_id(shard), None).await.unwrap();
    put(&shard, key).await.unwrap();
}

/// Has the primary publish, as a backup does over gRPC.
async fn publish(node: &TestNode, shard: ShardId) -> Vec<ShardId> {
    let volume = node.catalog.parts.view.shard(shard).unwrap().record.volume.clone();
    loop {
        match node.catalog.publish_views(&volume, None, &[shard], Duration::from_millis(1)).await {
            // The period was there at the same time, with a record of its own.
            Err(error) if error.reason() == Reason::Unavailable => {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            outcome => return outcome.unwrap(),
        }
    }
}

async fn view_of(node: &TestNode, shard: ShardId) -> BackupRead {
    let found = std::cell::RefCell::new(None);
    eventually("the backup opens a view", async || {
        let view = node.catalog.view_for(&me(), &by_id(shard), Some(LONG)).await;
        *found.borrow_mut() = view.ok();
        found.borrow().is_some()
    })
    .await;
    found.into_inner().unwrap()
}

fn has(read: &BackupRead, key: &str) -> bool {
    let found = read::find_value(&read.view(), &Key::new(key.to_owned()).unwrap());
    match read.finish(found) {
        Ok(_) => true,
        Err(error) if error.reason() == Reason::NotFound => false,
        Err(error) => panic!("{error}"),
    }
}

fn views_in(shard_dir: &Path) -> BTreeSet<String> {
    list(&views_dir(shard_dir)).unwrap().into_iter().map(|(name, _)| name).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_reads_what_was_published_and_views_go_with_their_last_reader() {
    let (world, one, two, shard) = two().await;
    fill(&one, shard, "a").await;
    assert_eq!(publish(&one, shard).await, [shard]);
    let first = view_of(&two, shard).await;
    assert!(has(&first, "a") && first.label().age < LONG && !first.label().last);
    assert!(first.label().sequence >= 1);
    let dir = world.shard_dir("vol-1", shard);
    assert_eq!(views_in(&dir).len(), 1);

    // Nothing has changed: the same view, true at a later time.
    let before = one.catalog.parts.view.view_of(shard).unwrap().record;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    publish(&one, shard).await;
    let after = one.catalog.parts.view.view_of(shard).unwrap().record;
    assert!(after.name == before.name && after.true_at > before.true_at);

    // A change: a new view; the old one stays while it is read.
    fill(&one, shard, "b").await;
    tokio::time::sleep(Duration::from_millis(1100)).await;
    publish(&one, shard).await;
    eventually("the backup has the new one", async || has(&view_of(&two, shard).await, "b")).await;
    assert!(!has(&first, "b") && has(&first, "a"), "what a view shows never changes");
    let second = view_of(&two, shard).await;
    assert!(second.label().sequence > first.label().sequence);
    assert!(views_in(&dir).contains(&before.name.to_string()), "it is read");
    drop(first);
    eventually("the old one goes", async || !views_in(&dir).contains(&before.name.to_string())).await;
    assert_eq!(views_in(&dir).len(), 1);
    drop(second);
    let figures = two.catalog.view_figures();
    assert!(figures.opened >= 2 && figures.answers >= 4, "{figures:?}");

    two.end().await;
    assert!(one.catalog.parts.view.pins_on(&before.volume).is_empty(), "who leaves holds nothing");
    one.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn closed_shards_have_a_last_view_and_deleted_ones_none() {
    let (world, one, two, shard) = two().await;
    fill(&one, shard, "a").await;
    one.catalog.close_shard(&me(), &by_id(shard)).await.unwrap();
    let catalog = &two.catalog;
    eventually("the backup serves it whoever asks", async || {
        catalog.view_for(&me(), &by_id(shard), None).await.is_ok()
    })
    .await;
    let read = catalog.view_for(&me(), &by_id(shard), None).await.unwrap();
    assert!(read.label().last && read.label().age.is_zero() && has(&read, "a"));
    let dir = world.shard_dir("vol-1", shard);
    assert_eq!(views_in(&dir).len(), 1);

    // While it is read, its bytes stay.
    one.catalog.delete_shard(&me(), &by_id(shard), false).await.unwrap();
    eventually("the announcement is gone", async || catalog.parts.view.view_of(shard).is_none()).await;
    assert!(dir.exists());
    drop(read);
    eventually("its bytes are gone", async || !dir.exists()).await;
    two.end().await;
    one.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_tries_to_publish_a_deleted_shard() {
    let (_world, one, two, shard) = two().await;
    fill(&one, shard, "a").await;
    let volume = read_volume(&one, shard);
    assert_eq!(publish(&one, shard).await, [shard]);
    one.catalog.delete_shard(&me(), &by_id(shard), false).await.unwrap();
    let failures = || one.catalog.views.figures.publish_failures.load(Ordering::Relaxed);
    let served = one.catalog.serving.get(&volume).unwrap();
    // A round that began before the deletion ends.
    drop(served.publisher.round.lock().await);
    let before = failures();
    // A backup that has not seen the deletion yet asks once more.
    let now = clock::monotonic();
    assert_eq!(served.publisher.note(&[shard], Duration::ZERO, now), [shard]);
    assert_eq!(one.catalog.publish(&served, &[shard], Duration::ZERO).await.unwrap(), []);
    assert!(!served.publisher.is_wanted(shard), "it is forgotten at once");
    assert_eq!(failures(), before);
    drop(served);
    two.end().await;
    one.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_that_may_have_lost_its_hold_answers_nothing() {
    let (_world, one, two, shard) = two().await;
    fill(&one, shard, "a").await;
    publish(&one, shard).await;
    let read = view_of(&two, shard).await;
    assert!(has(&read, "a"));
    // As the primary does when the backup's lease is over.
    let key = records::views::pin_key(&read_volume(&one, shard), &two.catalog.parts.node_id);
    let answer = one.catalog.parts.store.txn(Txn::new().delete(key)).await.unwrap();
    two.catalog.parts.view.wait_for(answer.revision, LONG).await.unwrap();
    let error = read.finish(Ok(())).unwrap_err();
    assert_eq!(error.reason(), Reason::Unavailable, "{error}");
    assert!(error.location().is_some(), "it says whom to ask");
    drop(read);
    // It is opened anew, with a new hold.
    assert!(has(&view_of(&two, shard).await, "a"));
    assert!(two.catalog.view_figures().refused_lost >= 1);

    two.end().await;
    one.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_block_that_does_not_pass_its_checksum_is_no_answer() {
    let (world, one, two, shard) = two().await;
    fill(&one, shard, "a").await;
    publish(&one, shard).await;
    let read = view_of(&two, shard).await;
    let name = one.catalog.parts.view.view_of(shard).unwrap().record.name;
    let folder = view_dir(&world.shard_dir("vol-1", shard), name);
    let mut damaged = 0;
    for (name, path) in list(&folder).unwrap() {
        if name.ends_with(".sst") {
            let mut bytes = std::fs::read(&path).unwrap();
            bytes[..16].fill(0x5a);
            std::fs::write(&path, bytes).unwrap();
            damaged += 1;
        }
    }
    assert!(damaged > 0);
    let found = read::find_value(&read.view(), &Key::new("a").unwrap());
    assert_eq!(found.as_ref().map(drop).unwrap_err().reason(), Reason::Corrupt);
    let error = read.finish(found.map(drop)).unwrap_err();
    assert_eq!(error.reason(), Reason::Unavailable, "the primary may have it: {error}");
    assert!(error.location().is_some());
    assert_eq!(two.catalog.view_figures().refused_unreadable, 1);
    assert!(two.catalog.status_now().damaged_shards.is_empty(), "the shard may be in order");
    drop(read);
    two.end().await;
    // What was flushed cannot be read by the primary either: its folder is one.
    one.end().await;
}

fn read_volume(node: &TestNode, shard: ShardId) -> VolumeId {
    node.catalog.parts.view.shard(shard).unwrap().record.volume.clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_crash_left_is_swept() {
    let (world, one, two, shard) = two().await;
    two.end().await;
    one.end().await;
    let views = views_dir(&world.shard_dir("vol-1", shard));
    // Of an earlier epoch, half-made, and something else. A primary looks for them once, when it has begun.
    for name in ["1-900", "1-901.tmp", "x"] {
        std::fs::create_dir_all(views.join(name)).unwrap();
    }
    let one = world.node("n1").await;
    let serves = async || one.catalog.open_shard(&me(), &by_id(shard), None).await.is_ok();
    eventually("the first serves again", serves).await;
    let two = world.node("n2").await;
    fill(&one, shard, "a").await;
    publish(&one, shard).await;
    let named = |name: &str| views.join(name).exists();
    eventually("they are gone", async || !named("1-900") && !named("1-901.tmp") && !named("x")).await;
    assert_eq!(views_in(&world.shard_dir("vol-1", shard)).len(), 1);
    two.end().await;
    one.end().await;
}
