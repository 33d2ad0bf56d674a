//! Adding by policy over a real store, with a cloud of which only the disks matter: none is ever attached.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use shardfs_proto::types::Reason;

use super::*;
use crate::catalog::tests::{Bench, TestNode, eventually};
use crate::volume::Providers;
use crate::volume::cloud::{
    BackupTags, Cloud, Disk, DiskId, DiskState, Machine, MachineState, NewDisk, Snapshot, SnapshotId,
};
use crate::volume::ebs::EbsProvider;
use crate::volume::nvme::Links;

/// Disks by token, as all machines see them.
#[derive(Debug, Default)]
struct Disks {
    made: Mutex<BTreeMap<String, Disk>>,
    asked: AtomicU32,
    deleted: AtomicU32,
    /// The disk is made, but that is not answered.
    loses_answers: AtomicBool,
    /// Nothing is made.
    refuses: AtomicBool,
}

impl Disks {
    fn there(&self) -> Vec<String> {
        self.made.lock().values().map(|disk| disk.volume.clone()).collect()
    }

    /// A disk that was kept when its volume was taken out.
    fn keep(&self, cluster_id: &str, volume: &str) {
        let size = DiskSize { gib: 8, iops: 3_000 };
        let new = NewDisk {
            cluster_id: cluster_id.to_owned(),
            volume: VolumeId::new(volume).unwrap(),
            token: format!("kept-{volume}"),
            size,
            kms_key: None,
            from: None,
        };
        self.make(&new);
    }

    fn make(&self, new: &NewDisk) -> DiskId {
        let mut made = self.made.lock();
        let id =
            DiskId::new(format!("vol-{:017x}", 1 + made.len() as u32 + self.deleted.load(Ordering::Relaxed)));
        let fresh = Disk {
            id: id.unwrap(),
            state: DiskState::Ready,
            size: new.size,
            zone: "z".into(),
            multi_attach: true,
            encrypted: new.kms_key.is_some(),
            created: clock::now(),
            cluster_id: new.cluster_id.clone(),
            volume: new.volume.as_str().to_owned(),
            token: new.token.clone(),
            attachments: Vec::new(),
        };
        made.entry(new.token.clone()).or_insert(fresh).id.clone()
    }
}

#[derive(Debug)]
struct FakeCloud(Machine, Arc<Disks>);

fn not_here<T>() -> Result<T> {
    Err(Error::unavailable("this cloud attaches nothing"))
}

impl Cloud for FakeCloud {
    fn machine(&self) -> &Machine {
        &self.0
    }

    fn create(&self, new: &NewDisk) -> Result<DiskId> {
        self.1.asked.fetch_add(1, Ordering::Relaxed);
        if self.1.refuses.load(Ordering::Relaxed) {
            return Err(Error::new(Reason::NotPermitted, "the role lacks ec2:CreateVolume"));
        }
        let id = self.1.make(new);
        match self.1.loses_answers.load(Ordering::Relaxed) {
            true => Err(Error::unavailable("the answer was lost")),
            false => Ok(id),
        }
    }

    fn disk(&self, id: &DiskId) -> Result<Option<Disk>> {
        Ok(self.1.made.lock().values().find(|disk| disk.id == *id).cloned())
    }

    fn disks(&self, cluster_id: &str) -> Result<Vec<Disk>> {
        Ok(self.1.made.lock().values().filter(|disk| disk.cluster_id == cluster_id).cloned().collect())
    }

    fn machines(&self, _ids: &[String]) -> Result<Vec<MachineState>> {
        Ok(Vec::new())
    }

    fn check_machines(&self, _ids: &[String]) -> Result<()> {
        Ok(())
    }

    fn attach(&self, _disk: &DiskId) -> Result<()> {
        not_here()
    }

    fn detach(&self, _disk: &DiskId, _machine: &str, _force: bool) -> Result<()> {
        Ok(())
    }

    fn modify(&self, _disk: &DiskId, _size: DiskSize) -> Result<()> {
        not_here()
    }

    fn delete(&self, disk: &DiskId) -> Result<()> {
        self.1.deleted.fetch_add(1, Ordering::Relaxed);
        self.1.made.lock().retain(|_, made| made.id != *disk);
        Ok(())
    }

    fn snapshot(&self, _disk: &DiskId, _backup: &BackupTags, _token: &str) -> Result<SnapshotId> {
        not_here()
    }

    fn snapshots(&self, _cluster_id: &str) -> Result<Vec<Snapshot>> {
        Ok(Vec::new())
    }

    fn wait_for_snapshot(&self, _id: &SnapshotId, _at_most: Duration) -> Result<()> {
        not_here()
    }

    fn delete_snapshot(&self, _id: &SnapshotId) -> Result<()> {
        not_here()
    }
}

async fn node(bench: &Bench, id: &str, disks: &Arc<Disks>) -> TestNode {
    let machine = Machine { id: format!("i-{id}"), zone: "z".into(), region: "r".into() };
    let cloud = Arc::new(FakeCloud(machine, disks.clone()));
    bench.node_in_cloud(id, Providers::with_cloud(EbsProvider::new(cloud, Links::default()))).await
}

/// Two nodes in a cloud, without a volume.
async fn two() -> (Bench, Arc<Disks>, TestNode, TestNode) {
    let (bench, disks) = (Bench::new(&[]).await, Arc::new(Disks::default()));
    let (a, b) = (node(&bench, "a", &disks).await, node(&bench, "b", &disks).await);
    for node in [&a, &b] {
        eventually("who acts is clear, and both may have volumes", async || {
            let healths = node.catalog.parts.view.healths();
            healths.len() == 2 && healths.values().all(|health| *health == Health::Alive)
        })
        .await;
    }
    (bench, disks, a, b)
}

fn policy() -> Policy {
    Policy {
        min_free_bytes: GIB,
        gib: 8,
        iops: 0,
        kms_key: None,
        volumes_max: 3,
        cost_max: "1000".parse().unwrap(),
        prices: Prices::LIST,
        nodes: Vec::new(),
    }
}

async fn record(node: &TestNode) -> (ProvisioningRecord, Option<Revision>) {
    let (_, Held { record, modified }) = node.catalog.held().await.unwrap();
    (record, modified)
}

fn volumes(node: &TestNode) -> Vec<String> {
    node.catalog.parts.view.volumes().iter().map(|kept| kept.record.id.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn two_that_act_at_once_add_one_volume() {
    let (_bench, disks, a, b) = two().await;
    assert_eq!((a.catalog.acting(), b.catalog.acting()), (NodeId::new("a").ok(), NodeId::new("a").ok()));
    // The record alone: their loops have not looked yet.
    let checked = a.catalog.checked(policy()).unwrap();
    assert_eq!(checked.iops, 3_000);
    a.catalog.change_provisioning(|record| record.policy = Some(checked.clone())).await.unwrap();
    let (held, modified) = record(&a).await;
    let begun = [&a, &b].map(|node| node.catalog.begin_adding(&held, modified.unwrap(), &checked));
    for outcome in join_all(begun).await {
        outcome.unwrap();
    }
    eventually("it is added", async || record(&a).await.0.making.is_none()).await;
    assert_eq!(disks.there(), ["auto-1"]);
    for node in [&a, &b] {
        eventually("both see it", async || volumes(node) == ["auto-1"]).await;
        // Its room is to come: nothing more is added.
        node.catalog.provision().await.unwrap();
        let state = node.catalog.provisioning(true).await.unwrap();
        assert!(state.verdict.contains("auto-1 is not served yet"), "{}", state.verdict);
        assert_eq!((state.volumes, state.adds), (1, None));
        assert_eq!(state.monthly, Prices::LIST.monthly(8, 3_000));
    }
    assert_eq!((disks.there().len(), record(&a).await.0.next), (1, 2));
    let kept = a.catalog.parts.view.volume(&VolumeId::new("auto-1").unwrap()).unwrap();
    assert_eq!(kept.record.backups.len(), 1, "the other stands by: {:?}", kept.record);
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_process_has_begun_another_one_goes_on_with() {
    let (_bench, disks, a, b) = two().await;
    disks.loses_answers.store(true, Ordering::Relaxed);
    a.catalog.set_provisioning(Some(policy())).await.unwrap();
    a.catalog.provision().await.unwrap();
    let (held, _) = record(&a).await;
    assert_eq!(held.making.as_ref().unwrap().by.as_str(), "a");
    assert!(held.failures >= 1 && held.last_error.contains("the answer was lost"), "{held:?}");
    let state = b.catalog.provisioning(true).await.unwrap();
    assert!(state.verdict.contains("auto-1 is being made by a"), "{}", state.verdict);
    assert_eq!((state.volumes, state.making), (1, VolumeId::new("auto-1").ok()));
    // As long as that process lives, it is its own.
    b.catalog.provision().await.unwrap();
    assert_eq!(record(&b).await.0.making.unwrap().by.as_str(), "a");
    disks.loses_answers.store(false, Ordering::Relaxed);
    a.end().await;
    // The pause after the failure, at most twice, as b may have seen another record of it first.
    eventually("b goes on", async || {
        b.catalog.provision().await.unwrap();
        volumes(&b) == ["auto-1"] && record(&b).await.0.making.is_none()
    })
    .await;
    assert_eq!(disks.there(), ["auto-1"]);
    assert!(disks.asked.load(Ordering::Relaxed) >= 2);
    let (held, _) = record(&b).await;
    assert_eq!((held.failures, held.last_error.as_str()), (0, ""));
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn off_gives_up_what_is_not_there_yet_and_nothing_else() {
    let (_bench, disks, a, b) = two().await;
    disks.keep(&a.catalog.parts.cluster_id, "auto-1");
    disks.loses_answers.store(true, Ordering::Relaxed);
    a.catalog.set_provisioning(Some(policy())).await.unwrap();
    a.catalog.provision().await.unwrap();
    // The name of a disk that was kept is not given again.
    assert_eq!(record(&a).await.0.making.unwrap().volume.as_str(), "auto-2");
    assert_eq!(disks.there().len(), 2);
    let state = b.catalog.set_provisioning(None).await.unwrap();
    assert_eq!(state.policy, None);
    // Not by the other, which cannot know whether the first is at it still.
    b.catalog.provision().await.unwrap();
    eventually("it is given up", async || {
        a.catalog.provision().await.unwrap();
        record(&a).await.0.making.is_none()
    })
    .await;
    assert_eq!(disks.there(), ["auto-1"], "what was kept stays");
    a.catalog.provision().await.unwrap();
    assert_eq!((disks.there().len(), volumes(&a).len()), (1, 0));
    let state = a.catalog.provisioning(false).await.unwrap();
    assert_eq!((state.verdict.as_str(), state.failures), ("nothing: there is no policy", 0));
    // One that is there stays when the policy goes.
    disks.loses_answers.store(false, Ordering::Relaxed);
    a.catalog.set_provisioning(Some(policy())).await.unwrap();
    a.catalog.provision().await.unwrap();
    eventually("it is added", async || volumes(&a) == ["auto-3"]).await;
    a.catalog.set_provisioning(None).await.unwrap();
    a.catalog.provision().await.unwrap();
    assert_eq!(volumes(&a), ["auto-3"]);
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_making_that_is_given_up_takes_no_disk_of_another_making() {
    use crate::cluster::records::{FORMAT, MakingRecord};
    let (_bench, disks, a, b) = two().await;
    let (cluster_id, volume) = (a.catalog.parts.cluster_id.clone(), VolumeId::new("vol-7").unwrap());
    disks.keep(&cluster_id, "vol-7");
    let size = DiskSize { gib: 8, iops: 3_000 };
    let making = MakingRecord {
        v: FORMAT,
        volume: volume.clone(),
        token: "its own".into(),
        size,
        kms_key: None,
        since: clock::now(),
    };
    let txn = Txn::new().put(records::making_key(&volume), records::encode(&making));
    a.catalog.parts.store.txn(txn).await.unwrap();
    disks.make(&NewDisk {
        cluster_id,
        volume: volume.clone(),
        token: making.token,
        size,
        kms_key: None,
        from: None,
    });
    assert_eq!(disks.there().len(), 2);
    a.catalog.remove_volume(&volume, false, Duration::from_secs(30)).await.unwrap();
    assert_eq!(disks.made.lock().keys().collect::<Vec<_>>(), ["kept-vol-7"]);
    assert!(a.catalog.makings().await.unwrap().is_empty());
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_refused_is_said_and_not_begun() {
    let (_bench, disks, a, b) = two().await;
    disks.refuses.store(true, Ordering::Relaxed);
    a.catalog.set_provisioning(Some(policy())).await.unwrap();
    a.catalog.provision().await.unwrap();
    let state = b.catalog.provisioning(true).await.unwrap();
    assert!(state.last_error.contains("ec2:CreateVolume") && state.failures >= 1, "{state:?}");
    assert_eq!((state.making, disks.there().len()), (None, 0));
    // It pauses; setting the policy anew ends that.
    let asked = disks.asked.load(Ordering::Relaxed);
    a.catalog.provision().await.unwrap();
    assert_eq!(disks.asked.load(Ordering::Relaxed), asked);
    disks.refuses.store(false, Ordering::Relaxed);
    a.catalog.set_provisioning(Some(policy())).await.unwrap();
    a.catalog.provision().await.unwrap();
    eventually("it is added", async || volumes(&a).len() == 1).await;
    a.end().await;
    b.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn policies_that_could_never_act_are_refused() {
    let (bench, _disks, a, b) = two().await;
    let alone = bench.node("c").await;
    let wrong = |policy: Policy| a.catalog.checked(policy).unwrap_err().message().to_owned();
    let named = |names: &[&str]| names.iter().map(|name| NodeId::new(*name).unwrap()).collect::<Vec<_>>();
    eventually("c is known", async || a.catalog.parts.view.node(&NodeId::new("c").unwrap()).is_some()).await;
    for (policy, said) in [
        (Policy { gib: 3, ..policy() }, "4 to 65536 GiB"),
        (Policy { iops: 9_000, ..policy() }, "8000"),
        (Policy { min_free_bytes: 0, ..policy() }, "--min-free"),
        (Policy { min_free_bytes: 6 * GIB + 1, ..policy() }, "75 %"),
        (Policy { volumes_max: 0, ..policy() }, "--max-volumes"),
        (Policy { cost_max: "195.99".parse().unwrap(), ..policy() }, "196.00"),
        (Policy { nodes: named(&["a", "x"]), ..policy() }, "no node x"),
        (Policy { nodes: named(&["a", "a"]), ..policy() }, "twice"),
        (Policy { nodes: named(&["c"]), ..policy() }, "--aws-cluster"),
    ] {
        let message = wrong(policy);
        assert!(message.contains(said), "no {said:?} in: {message}");
    }
    for fine in [
        Policy { min_free_bytes: 6 * GIB, ..policy() },
        Policy { cost_max: "196".parse().unwrap(), ..policy() },
        Policy { nodes: named(&["b", "a"]), ..policy() },
    ] {
        a.catalog.checked(fine).unwrap();
    }
    for node in [alone, a, b] {
        node.end().await;
    }
}

#[test]
fn pauses_grow_and_are_counted_from_what_was_seen() {
    let (mut memory, start) = (Memory::default(), clock::monotonic());
    let at = |seconds| start + Duration::from_secs(seconds);
    let (first, second) = (Revision::new(5), Revision::new(9));
    assert_eq!(memory.pause(0, first, start), None);
    assert_eq!(memory.pause(1, first, at(1)), Some(PAUSE_MIN));
    assert_eq!(memory.pause(1, first, at(4)), Some(Duration::from_secs(7)));
    assert_eq!(memory.pause(1, first, at(11)), None);
    assert_eq!(memory.pause(2, second, at(12)), Some(2 * PAUSE_MIN));
    assert_eq!(memory.pause(u32::MAX, Revision::new(11), at(13)), Some(PAUSE_MAX));
    // The policy was set anew.
    assert_eq!(memory.pause(0, Revision::new(12), at(14)), None);
    let volume = VolumeId::new("vol-1").unwrap();
    assert_eq!(memory.out_of_sight(&volume, at(20)), Duration::ZERO);
    assert_eq!(memory.out_of_sight(&volume, at(27)), Duration::from_secs(7));
}
