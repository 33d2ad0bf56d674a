//! Backups over real loop volumes: of what images are refused, and by which nodes; what the records say. Without root they say that they are
//! skipped.

use std::fs;
use std::path::Path;

use shardfs_proto::types::NodeId;
use shardfs_proto::types::backups::{RestoreTo, Restored, VerifyItem};
use tokio::sync::mpsc;

use super::*;
use crate::catalog::tests::{Bench, PATIENCE, TestNode, by_id, eventually, me, name, new, put, reason};
use crate::volume::images::PrivateMount;

pub(super) fn volume(id: &str) -> VolumeId {
    VolumeId::new(id).unwrap()
}

pub(super) async fn serves(node: &TestNode, id: &str) {
    eventually("it is served", async || {
        let kept = node.catalog.parts.view.volume(&volume(id));
        node.catalog.serving.get(&volume(id)).is_some() && kept.is_some_and(|kept| kept.record.formatted)
    })
    .await;
}

/// A new shard with one file.
pub(super) async fn shard(node: &TestNode, label: &str) -> ShardId {
    let id = node.catalog.new_shard(&me(), new(label)).await.unwrap().id;
    write(node, id, "before").await;
    id
}

pub(super) async fn write(node: &TestNode, id: ShardId, key: &str) {
    let shard = node.catalog.open_shard(&me(), &by_id(id), None).await.unwrap();
    put(&shard, key).await.unwrap();
}

/// How many files a shard has.
pub(super) async fn count(node: &TestNode, id: ShardId) -> u64 {
    let shard = node.catalog.open_shard(&me(), &by_id(id), None).await.unwrap();
    shard.usage().inodes - 1
}

pub(super) fn anew(id: &str, nodes: &[&str]) -> RestoreTo {
    RestoreTo::NewVolume {
        volume: volume(id),
        nodes: nodes.iter().map(|node| NodeId::new(*node).unwrap()).collect(),
        source: String::new(),
        name_suffix: String::new(),
    }
}

pub(super) fn in_place() -> RestoreTo {
    RestoreTo::InPlace { drop_missing: true }
}

pub(super) async fn restore(node: &TestNode, backup: &str, to: RestoreTo) -> Result<Restored> {
    node.catalog.restore_backup(backup, to).await
}

/// What a verification finds, in words.
pub(super) async fn findings(node: &TestNode, backup: &str) -> Result<Vec<String>> {
    let (items, mut told) = mpsc::channel(4);
    let verifying = tokio::spawn(node.catalog.clone().verify_backup(backup.to_owned(), false, items));
    let mut found = Vec::new();
    while let Some(item) = told.recv().await {
        match item {
            VerifyItem::Finding { detail, .. } => found.push(detail),
            VerifyItem::Shard { findings, .. } => {
                found.extend(findings.into_iter().map(|(_, detail)| detail))
            }
            VerifyItem::Step(_) | VerifyItem::Summary { .. } => {}
        }
    }
    verifying.await.unwrap().map(|()| found)
}

/// Ends a node that serves `vol-1`, whose file goes, and starts it again.
pub(super) async fn lose_the_file(bench: &Bench, node: TestNode) -> TestNode {
    node.end().await;
    fs::remove_file(bench.volume_file("vol-1")).unwrap();
    bench.node("node-1").await
}

/// Changes what is on an image.
async fn change_image(bench: &Bench, image: &Path, change: impl FnOnce(&Path) + Send + 'static) {
    let at = bench.volume_file("unused").with_file_name("image-under-test");
    let image = image.to_owned();
    blocking(move || {
        let mounted = PrivateMount::open(&image, &at)?;
        change(mounted.root());
        mounted.close()
    })
    .await
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn a_node_without_the_image_changes_nothing_and_says_who_has_it() {
    let Some(bench) = Bench::on_disk("node-1", &[]).await else { return };
    let (one, two) = (bench.node("node-1").await, bench.node("node-2").await);
    serves(&one, "vol-1").await;
    let shard = shard(&one, "photos").await;
    let backup = one.catalog.create_backup(&volume("vol-1")).await.unwrap();
    // As on a machine that does not have the folder.
    let (image, elsewhere) = (Path::new(&backup.image), bench.volume_file("elsewhere"));
    fs::rename(image, &elsewhere).unwrap();
    let files = bench.files();
    let revision = two.catalog.backup_records(None).await.unwrap()[0].1;
    for to in [anew("vol-9", &["node-2"]), in_place()] {
        let refused = restore(&two, &backup.id, to).await.unwrap_err();
        assert_eq!(refused.reason(), Reason::NotFound, "{refused}");
        assert!(refused.message().contains("node-1 has taken it"), "{refused}");
        assert!(!refused.message().contains("  "), "{refused}");
    }
    let refused = findings(&two, &backup.id).await.unwrap_err();
    assert!(refused.message().contains("node-1 has taken it"), "{refused}");
    assert_eq!(reason(two.catalog.delete_backup(&backup.id).await), Reason::InvalidArgument);
    assert!(two.catalog.restoring(&volume("vol-9")).await.unwrap().is_none());
    assert!(two.catalog.restoring(&volume("vol-1")).await.unwrap().is_none());
    assert_eq!(two.catalog.backup_records(None).await.unwrap()[0].1, revision);
    assert_eq!(bench.files(), files);
    assert_eq!(count(&one, shard).await, 1);
    // The one that has taken it says that it is gone.
    let refused = restore(&one, &backup.id, anew("vol-9", &["node-1"])).await.unwrap_err();
    assert!(refused.message().contains("is gone"), "{refused}");
    fs::rename(&elsewhere, image).unwrap();
    restore(&two, &backup.id, anew("vol-9", &["node-2"])).await.unwrap();
    serves(&two, "vol-9").await;
    two.catalog.delete_backup(&backup.id).await.unwrap();
    assert!(!image.exists());
    one.end().await;
    two.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn an_image_of_something_else_is_refused() {
    let Some(bench) = Bench::on_disk("node-1", &[]).await else { return };
    let node = bench.node("node-1").await;
    serves(&node, "vol-1").await;
    let shard = shard(&node, "photos").await;
    let backup = node.catalog.create_backup(&volume("vol-1")).await.unwrap();
    let (id, image) = (&backup.id, Path::new(&backup.image));
    assert_eq!(findings(&node, id).await.unwrap(), [""; 0]);
    let good = bench.volume_file("good");
    fs::copy(image, &good).unwrap();
    let cluster = node.catalog.parts.cluster_id.clone();
    let in_file = |file: &'static str, from: String, to: &'static str| {
        move |root: &Path| {
            let path = root.join(file);
            let text = fs::read_to_string(&path).unwrap();
            assert!(text.contains(&from), "{text}");
            fs::write(&path, text.replace(&from, to)).unwrap();
        }
    };
    let origin = format!("shard-{shard}/origin");
    let other_creation = move |root: &Path| {
        let path = root.join(&origin);
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.contains(r#""owner":"me""#), "{text}");
        fs::write(&path, text.replace(r#""owner":"me""#, r#""owner":"other""#)).unwrap();
    };
    type Change = Box<dyn FnOnce(&Path) + Send>;
    let changes: [(&str, Change); 4] = [
        (
            "the manifest of another cluster",
            Box::new(in_file(".shardfs-backup.json", cluster.clone(), "another")),
        ),
        ("the identity of another cluster", Box::new(in_file(".shardfs-volume", cluster, "another"))),
        ("the identity of another volume", Box::new(in_file(".shardfs-volume", "vol-1".into(), "vol-2"))),
        ("a shard of another creation", Box::new(other_creation)),
    ];
    for (number, (what, change)) in changes.into_iter().enumerate() {
        fs::copy(&good, image).unwrap();
        change_image(&bench, image, change).await;
        let new = format!("vol-{}", 20 + number);
        let refused = restore(&node, id, anew(&new, &["node-1"])).await.unwrap_err();
        assert!(matches!(refused.reason(), Reason::Corrupt | Reason::InvalidArgument), "{what}: {refused}");
        node.catalog.remove_volume(&volume(&new), false, PATIENCE).await.unwrap();
        assert!(!findings(&node, id).await.unwrap().is_empty(), "{what}");
    }
    assert_eq!(node.catalog.list_all_shards(true).await.unwrap().len(), 1);
    // In place, the id has been given to another shard since: the last change.
    let node = lose_the_file(&bench, node).await;
    let refused = restore(&node, id, in_place()).await.unwrap_err();
    assert!(refused.message().contains("another creation"), "{refused}");
    assert!(!bench.volume_file("vol-1").exists(), "it is not put in place");
    fs::copy(&good, image).unwrap();
    restore(&node, id, in_place()).await.unwrap();
    serves(&node, "vol-1").await;
    assert_eq!(count(&node, shard).await, 1);
    fs::remove_file(good).unwrap();
    assert_eq!(bench.files().len(), 2, "{:?}", bench.files());
    node.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ids_of_before_are_as_good_as_new_ones() {
    let Some(bench) = Bench::on_disk("node-1", &[]).await else { return };
    let node = bench.node("node-1").await;
    serves(&node, "vol-1").await;
    let shard = shard(&node, "photos").await;
    let backup = node.catalog.create_backup(&volume("vol-1")).await.unwrap();
    // As an older version has named it.
    let old = "20201129T195900Z-1f3a";
    let image = backup.image.replace(&backup.id, old);
    fs::rename(&backup.image, &image).unwrap();
    let (id, renamed) = (backup.id.clone(), (backup.id, old));
    change_image(&bench, Path::new(&image), move |root| {
        let path = root.join(".shardfs-backup.json");
        fs::write(&path, fs::read_to_string(&path).unwrap().replace(&renamed.0, renamed.1)).unwrap();
    })
    .await;
    let (record, _) = node.catalog.find_backup(&id).await.unwrap().unwrap();
    let record = BackupRecord { id: old.into(), image, ..record };
    let txn = Txn::new()
        .delete(backup_key(&record.volume, &id))
        .put(backup_key(&record.volume, old), records::encode(&record));
    node.catalog.parts.store.txn(txn).await.unwrap();
    assert_eq!(findings(&node, old).await.unwrap(), [""; 0]);
    let restored = restore(&node, old, anew("vol-9", &["node-1"])).await.unwrap();
    assert_eq!(restored.shards.iter().map(|shard| shard.old).collect::<Vec<_>>(), [shard]);
    serves(&node, "vol-9").await;
    assert_eq!(count(&node, restored.shards[0].id).await, 1);
    assert_eq!(restored.shards[0].name, name("photos.restored"));
    node.catalog.delete_backup(old).await.unwrap();
    assert!(node.catalog.list_backups(None).await.unwrap().is_empty());
    assert_eq!(bench.files(), ["vol-1.img", "vol-9.img"].map(str::to_owned).into());
    node.end().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_two_that_find_a_backup_due_one_takes_it() {
    let Some(bench) = Bench::on_disk("node-1", &[]).await else { return };
    let node = bench.node("node-1").await;
    serves(&node, "vol-1").await;
    node.catalog.set_backup_schedule(&volume("vol-1"), 3600, 3).await.unwrap();
    let (schedule, modified) = node.catalog.schedule_records().await.unwrap().remove(0);
    // And the node's own round may be a third one.
    let taken = tokio::join!(
        node.catalog.take_scheduled(&schedule, modified),
        node.catalog.take_scheduled(&schedule, modified)
    );
    assert!(taken.0.is_err() || taken.1.is_err());
    eventually("it is taken", async || {
        let listed = node.catalog.list_backups(None).await.unwrap();
        assert!(listed.len() < 2, "{listed:?}");
        listed.iter().any(|backup| backup.state == BackupState::Done)
    })
    .await;
    node.end().await;
}
