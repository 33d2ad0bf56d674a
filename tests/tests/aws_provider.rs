//! The cloud that nodes ask for disks, through the real SDK: against the emulator, which fails as EC2 does, and against moto, which
//! others have written.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use shardfs_node::volume::aws::{Aws, AwsSettings};
use shardfs_node::volume::cloud::{
    AttachmentState, BackupTags, Cloud, Disk, DiskId, DiskSize, DiskState, NewDisk, SnapshotId,
};
use shardfs_proto::types::{Error, Reason, VolumeId};
use shardfs_tests::cluster::eventually;
use shardfs_tests::ec2::{Call, Delays, Ec2, Fault, Instance, Kind, Options, Outcome};
use shardfs_tests::ports;
use shardfs_tests::run::sh;

const ZONE: &str = "us-east-1a";
const KIND: &str = "r6i.large";
const TAG: &str = "prod";
const CLUSTER_ID: &str = "6f1ed002ab5595859014ebf0951522d9";
/// What states that take no time may need until they show.
const SOON: Duration = Duration::from_secs(60);
/// A snapshot.
const SNAPSHOT_MAX: Duration = Duration::from_secs(120);
const MOTO_VERSION: &str = "5.2.5";
/// The calls that a life makes of EC2.
const ACTIONS: [&str; 12] = [
    "AttachVolume",
    "CreateSnapshot",
    "CreateVolume",
    "DeleteSnapshot",
    "DeleteVolume",
    "DescribeInstanceTypes",
    "DescribeInstances",
    "DescribeSnapshots",
    "DescribeVolumes",
    "DescribeVolumesModifications",
    "DetachVolume",
    "ModifyVolume",
];

fn start(delays: Delays) -> Ec2 {
    Ec2::start(Options { bytes_per_gib: 1 << 20, disk_bytes: 1 << 30, delays, ..Options::default() })
}

fn quick() -> Ec2 {
    start(Options::default().delays)
}

fn settings(ec2: &Ec2, instance: &Instance) -> AwsSettings {
    AwsSettings {
        endpoint: Some(ec2.endpoint()),
        imds_endpoint: Some(instance.imds.clone()),
        cluster_tag: TAG.to_owned(),
        ..AwsSettings::default()
    }
}

fn connect(ec2: &Ec2, instance: &Instance) -> Aws {
    Aws::connect(settings(ec2, instance)).unwrap()
}

fn volume(name: &str) -> VolumeId {
    VolumeId::new(name).unwrap()
}

fn new_disk(name: &str) -> NewDisk {
    NewDisk {
        cluster_id: CLUSTER_ID.to_owned(),
        volume: volume(name),
        token: format!("{name}-1"),
        size: DiskSize { gib: 8, iops: 1000 },
        kms_key: None,
        from: None,
    }
}

fn backup(name: &str) -> BackupTags {
    BackupTags { cluster_id: CLUSTER_ID.to_owned(), volume: volume(name), backup: "b-1".to_owned() }
}

fn disk(aws: &Aws, id: &DiskId) -> Disk {
    aws.disk(id).unwrap().unwrap()
}

fn holders(disk: &Disk) -> Vec<&str> {
    let mut ids: Vec<&str> = disk.attachments.iter().map(|a| a.machine.as_str()).collect();
    ids.sort_unstable();
    ids
}

fn says(error: &Error, reason: Reason, parts: &[&str]) {
    assert_eq!(error.reason(), reason, "{error}");
    for part in parts {
        assert!(error.message().contains(part), "{part:?} is not in: {error}");
    }
}

/// Everything that a volume goes through on two machines; what EC2 does not do at once it is asked for again, as nodes do.
fn life(a: &Aws, b: &Aws, name: &str) {
    let new = new_disk(name);
    let id = again(|| a.create(&new));
    assert_eq!(again(|| a.create(&new)), id);
    let made = again(|| a.disk(&id)).unwrap();
    assert_eq!((made.state, made.size, made.multi_attach), (DiskState::Ready, new.size, true));
    assert_eq!((made.cluster_id.as_str(), made.volume.as_str()), (CLUSTER_ID, name));

    let machines = [a.machine().id.clone(), b.machine().id.clone()];
    again(|| a.check_machines(&machines));
    assert_eq!(again(|| a.machines(&machines)).len(), 2);
    for aws in [a, b] {
        again(|| aws.attach(&id));
        again(|| aws.attach(&id));
    }
    let larger = DiskSize { gib: 12, iops: 2000 };
    again(|| b.modify(&id, larger));
    again(|| b.modify(&id, larger));

    let token = format!("{name}-b-1");
    let snapshot = again(|| a.snapshot(&id, &backup(name), &token));
    assert_eq!(again(|| a.snapshot(&id, &backup(name), &token)), snapshot);
    again(|| a.wait_for_snapshot(&snapshot, SNAPSHOT_MAX));
    // A list may be behind.
    let found = eventually(SOON, || {
        let listed = again(|| a.snapshots(CLUSTER_ID));
        listed.into_iter().find(|s| s.id == snapshot).ok_or_else(|| format!("{snapshot} is not listed"))
    });
    assert_eq!((found.percent, found.failed, found.gib), (100, false, 12));
    assert_eq!(
        (found.disk.as_str(), found.volume.as_str(), found.backup.as_str()),
        (id.as_str(), name, "b-1")
    );

    let restored = NewDisk {
        volume: volume(&format!("{name}-copy")),
        token: format!("{name}-copy-1"),
        size: larger,
        from: Some(snapshot.clone()),
        ..new
    };
    let copy = again(|| b.create(&restored));
    eventually(SOON, || {
        let listed = again(|| a.disks(CLUSTER_ID));
        match [&id, &copy].iter().all(|made| listed.iter().any(|disk| disk.id == **made)) {
            true => Ok(()),
            false => Err(format!("{id} or {copy} is not listed: {listed:?}")),
        }
    });

    for machine in &machines {
        again(|| a.detach(&id, machine, false));
        again(|| a.detach(&id, machine, false));
    }
    for disk in [&copy, &id] {
        again(|| a.delete(disk));
    }
    again(|| a.delete_snapshot(&snapshot));
}

/// Repeats what may pass, as those do who use the cloud.
fn again<T>(mut call: impl FnMut() -> Result<T, Error>) -> T {
    for _ in 0..4 {
        match call() {
            Err(error) if error.is_retryable() => eprintln!("once more: {error}"),
            result => return result.unwrap(),
        }
    }
    call().unwrap()
}

/// Nothing is left, and nothing was made twice.
fn nothing_is_left(ec2: &Ec2, made: u64) {
    ec2.clear_faults();
    eventually(SOON, || match (ec2.volumes(), ec2.snapshots()) {
        (volumes, snapshots) if volumes.is_empty() && snapshots.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    });
    assert_eq!(ec2.volumes_ever(), made);
    let is_done = |call: &Call| {
        matches!(call.outcome, Outcome::Done | Outcome::DoneButRefused(_) | Outcome::DoneButSilent)
    };
    let snapshots = ec2.calls().into_iter().filter(|call| call.action == "CreateSnapshot" && is_done(call));
    assert_eq!(snapshots.count() as u64, made / 2);
}

#[test]
fn every_call_does_what_it_says() {
    let ec2 = Ec2::start(Options {
        bytes_per_gib: 1 << 20,
        disk_bytes: 1 << 30,
        page_limit: Some(2),
        ..Options::default()
    });
    let machines = [ec2.instance(ZONE, KIND), ec2.instance(ZONE, "m7g.metal")];
    let [a, b] = [connect(&ec2, &machines[0]), connect(&ec2, &machines[1])];
    assert_eq!((a.machine().id.as_str(), a.machine().zone.as_str()), (machines[0].id.as_str(), ZONE));
    assert_eq!(a.machine().region, "us-east-1");
    life(&a, &b, "vol-life");
    nothing_is_left(&ec2, 2);

    // More than a page of each.
    let ids: Vec<DiskId> = (0..5)
        .map(|number| {
            let mut new = new_disk(&format!("vol-{number}"));
            new.kms_key = match number {
                0 => Some(String::new()),
                1 => Some("alias/shardfs".to_owned()),
                _ => None,
            };
            a.create(&new).unwrap()
        })
        .collect();
    let listed = b.disks(CLUSTER_ID).unwrap();
    assert_eq!(listed.len(), 5);
    assert!(b.disks("another").unwrap().is_empty());
    let emulated: Vec<_> = ids.iter().map(|id| ec2.volume(id.as_str()).unwrap()).collect();
    assert_eq!((emulated[0].encrypted, emulated[0].kms_key_id.as_deref()), (true, None));
    assert_eq!((emulated[1].encrypted, emulated[1].kms_key_id.as_deref()), (true, Some("alias/shardfs")));
    assert!(!emulated[2].encrypted);
    let tags = &emulated[2].tags;
    for (key, value) in [
        ("Name", "shardfs prod vol-2"),
        ("shardfs:cluster", TAG),
        ("shardfs:cluster-id", CLUSTER_ID),
        ("shardfs:volume", "vol-2"),
        ("shardfs:token", "vol-2-1"),
    ] {
        assert_eq!(tags.get(key).map(String::as_str), Some(value), "{tags:?}");
    }

    // On both machines, with names that differ; all at once.
    thread::scope(|scope| {
        for id in &ids {
            for aws in [&a, &b] {
                scope.spawn(move || aws.attach(id).unwrap());
            }
        }
    });
    for id in &ids {
        let found = disk(&a, id);
        let mut both = [a.machine().id.as_str(), b.machine().id.as_str()];
        both.sort_unstable();
        assert_eq!(holders(&found), both);
        assert!(found.attachments.iter().all(|a| a.state == AttachmentState::Attached));
        for machine in &machines {
            eventually(SOON, || match machine.link(id.as_str()).exists() {
                true => Ok(()),
                false => Err(format!("no link to {id}")),
            });
        }
    }
    let snapshots: Vec<SnapshotId> =
        ids.iter().map(|id| a.snapshot(id, &backup("vol-0"), &format!("{id}-b")).unwrap()).collect();
    assert_eq!(a.snapshots(CLUSTER_ID).unwrap().len(), 5);
    assert!(a.snapshots("another").unwrap().is_empty());

    let error = a.delete(&ids[0]).unwrap_err();
    says(&error, Reason::InvalidArgument, &[ids[0].as_str(), &machines[0].id, &machines[1].id, "detach"]);
    // One that is gone has no disks any more, and stays known for a while.
    ec2.terminate(&machines[1]);
    let states = a.machines(&[machines[1].id.clone(), "i-00000000000000000".to_owned()]).unwrap();
    assert_eq!((states.len(), states[0].running, states[0].kind.as_str()), (1, false, "m7g.metal"));
    assert!(a.machines(&[]).unwrap().is_empty());
    for (id, snapshot) in ids.iter().zip(&snapshots) {
        a.detach(id, &machines[1].id, false).unwrap();
        a.detach(id, "i-00000000000000000", false).unwrap();
        a.detach(id, a.machine().id.as_str(), false).unwrap();
        a.delete(id).unwrap();
        a.delete(id).unwrap();
        a.delete_snapshot(snapshot).unwrap();
    }
    assert_eq!(a.disks(CLUSTER_ID).unwrap(), []);
    eventually(SOON, || if ec2.volumes().is_empty() { Ok(()) } else { Err("volumes are left".to_owned()) });
    assert_eq!(ec2.volumes_ever(), 7);

    // What is gone is gone, for certain; that takes a while, each.
    let (id, snapshot, a) = (&ids[0], &snapshots[0], &a);
    thread::scope(|scope| {
        scope.spawn(|| assert_eq!(a.disk(id).unwrap(), None));
        scope.spawn(|| a.delete(id).unwrap());
        scope.spawn(|| a.delete_snapshot(snapshot).unwrap());
        scope.spawn(|| a.detach(id, a.machine().id.as_str(), false).unwrap());
        scope.spawn(|| says(&a.attach(id).unwrap_err(), Reason::NotFound, &[id.as_str()]));
        let size = DiskSize { gib: 8, iops: 1000 };
        scope.spawn(move || says(&a.modify(id, size).unwrap_err(), Reason::NotFound, &[id.as_str()]));
        let taken = || a.snapshot(id, &backup("vol-0"), "t").unwrap_err();
        scope.spawn(move || says(&taken(), Reason::NotFound, &[id.as_str()]));
        let waited = || a.wait_for_snapshot(snapshot, SNAPSHOT_MAX).unwrap_err();
        scope.spawn(move || says(&waited(), Reason::NotFound, &[snapshot.as_str()]));
    });
}

/// Every action fails in this way the first time.
fn one_failure_each(kind: &Kind) {
    let ec2 = quick();
    let [a, b] = [ec2.instance(ZONE, KIND), ec2.instance(ZONE, KIND)].map(|i| connect(&ec2, &i));
    for action in ACTIONS {
        ec2.fault(Fault::of(kind.clone()).on(action).times(1));
    }
    life(&a, &b, "vol-1");
    let is_done = matches!(kind, Kind::ServerErrorAfterSuccess | Kind::TimeoutAfterSuccess(_));
    for action in ACTIONS {
        let calls = ec2.calls().into_iter().filter(|call| call.action == action).count();
        let is_made_without_token = is_done && action == "CreateSnapshot";
        assert!(is_made_without_token || calls >= 2, "{action} was not tried again after {kind:?}");
    }
    nothing_is_left(&ec2, 2);
}

#[test]
fn what_ec2_throttles_is_done_later() {
    one_failure_each(&Kind::Throttle);
}

#[test]
fn what_ec2_fails_to_do_is_done_later() {
    one_failure_each(&Kind::ServerError);
    one_failure_each(&Kind::Unavailable);
}

#[test]
fn what_was_done_although_ec2_says_it_failed_is_not_done_twice() {
    one_failure_each(&Kind::ServerErrorAfterSuccess);
}

#[test]
fn what_ec2_does_not_answer_is_done_later() {
    one_failure_each(&Kind::TimeoutBefore(Duration::from_millis(300)));
}

#[test]
fn what_was_done_and_not_answered_is_not_done_twice() {
    one_failure_each(&Kind::TimeoutAfterSuccess(Duration::from_millis(300)));
}

#[test]
fn an_answer_that_does_not_come_is_not_waited_for_for_long() {
    let ec2 = quick();
    let a = connect(&ec2, &ec2.instance(ZONE, KIND));
    ec2.fault(Fault::of(Kind::TimeoutAfterSuccess(Duration::from_secs(60))).on("CreateVolume").times(1));
    let begun = Instant::now();
    let id = a.create(&new_disk("vol-1")).unwrap();
    assert!((9..55).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    a.delete(&id).unwrap();
    nothing_is_left_of_volumes(&ec2, 1);
}

fn nothing_is_left_of_volumes(ec2: &Ec2, made: u64) {
    eventually(SOON, || if ec2.volumes().is_empty() { Ok(()) } else { Err("volumes are left".to_owned()) });
    assert_eq!(ec2.volumes_ever(), made);
}

#[test]
fn descriptions_that_are_behind_are_not_believed() {
    let ec2 = start(Delays::all(Duration::from_millis(300)));
    let [a, b] = [ec2.instance(ZONE, KIND), ec2.instance(ZONE, KIND)].map(|i| connect(&ec2, &i));
    ec2.fault(Fault::of(Kind::StaleReads(Duration::from_secs(3))));
    for action in
        ["AttachVolume", "DetachVolume", "ModifyVolume", "CreateSnapshot", "DeleteVolume", "DeleteSnapshot"]
    {
        ec2.fault(Fault::of(Kind::StaleReads(Duration::from_secs(3))).on(action));
    }
    life(&a, &b, "vol-1");
    nothing_is_left(&ec2, 2);
}

#[test]
fn a_disk_is_attached_and_detached_for_certain_while_some_answers_are_behind() {
    let ec2 = quick();
    let machines = [ec2.instance(ZONE, KIND), ec2.instance(ZONE, KIND)];
    let [a, b] = [connect(&ec2, &machines[0]), connect(&ec2, &machines[1])];
    let id = a.create(&new_disk("vol-1")).unwrap();
    ec2.fault(Fault::of(Kind::StaleReads(Duration::from_secs(2))).probability(0.5));
    let has = |machine: &Instance| ec2.volume(id.as_str()).unwrap().attachment(&machine.id).is_some();
    for _ in 0..5 {
        a.attach(&id).unwrap();
        assert!(has(&machines[0]));
        // Before descriptions show it.
        a.detach(&id, &machines[0].id, false).unwrap();
        assert!(!has(&machines[0]));
        b.attach(&id).unwrap();
        assert!(has(&machines[1]));
        a.detach(&id, &machines[1].id, false).unwrap();
        assert!(!has(&machines[1]));
        thread::sleep(Duration::from_secs(2));
    }
    a.delete(&id).unwrap();
    nothing_is_left_of_volumes(&ec2, 1);
}

/// Everything that can go wrong does, at random; what is left is found by the cluster's tags.
#[test]
fn many_failures_leave_nothing_behind() {
    thread::scope(|scope| {
        for seed in 1..=3 {
            scope.spawn(move || {
                let options =
                    Options { seed, bytes_per_gib: 1 << 20, disk_bytes: 1 << 30, ..Options::default() };
                let ec2 = Ec2::start(options);
                let [a, b] = [ec2.instance(ZONE, KIND), ec2.instance(ZONE, KIND)].map(|i| connect(&ec2, &i));
                let hold = Duration::from_millis(100);
                for kind in [
                    Kind::Throttle,
                    Kind::ServerError,
                    Kind::ServerErrorAfterSuccess,
                    Kind::TimeoutBefore(hold),
                    Kind::TimeoutAfterSuccess(hold),
                ] {
                    ec2.fault(Fault::of(kind).probability(0.1));
                }
                // Not those of snapshots: what made them is asked for again at once, and there are no tokens.
                for action in
                    ["DescribeVolumes", "DescribeVolumesModifications", "AttachVolume", "DetachVolume"]
                {
                    let kind = Kind::StaleReads(Duration::from_secs(1));
                    ec2.fault(Fault::of(kind).on(action).probability(0.2));
                }
                for number in 0..3 {
                    life(&a, &b, &format!("vol-{seed}-{number}"));
                }
                nothing_is_left(&ec2, 6);
            });
        }
    });
}

#[test]
fn stuck_attachments_are_said_and_can_be_forced() {
    let ec2 = quick();
    let machine = ec2.instance(ZONE, KIND);
    let a = connect(&ec2, &machine);
    let id = a.create(&new_disk("vol-1")).unwrap();

    ec2.fault(Fault::of(Kind::StuckAttach));
    let begun = Instant::now();
    let error = a.attach(&id).unwrap_err();
    says(&error, Reason::Unavailable, &[id.as_str(), &machine.id, "25 seconds", "force"]);
    assert!((20..55).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    ec2.clear_faults();
    a.attach(&id).unwrap();

    ec2.fault(Fault::of(Kind::StuckDetach));
    let begun = Instant::now();
    let error = a.detach(&id, &machine.id, false).unwrap_err();
    says(&error, Reason::Unavailable, &[id.as_str(), &machine.id, "60 seconds", "`--force`", "allowed only"]);
    assert!((50..120).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    let held = disk(&a, &id);
    assert_eq!(held.attachments[0].state, AttachmentState::Detaching);
    a.detach(&id, &machine.id, true).unwrap();
    assert!(disk(&a, &id).attachments.is_empty());
    a.attach(&id).unwrap();
}

/// A call of the cloud.
type Attempt<'a> = &'a dyn Fn() -> Result<(), Error>;

#[test]
fn what_the_role_does_not_allow_is_named() {
    let ec2 = quick();
    let machine = ec2.instance(ZONE, KIND);
    let a = connect(&ec2, &machine);
    let id = a.create(&new_disk("vol-1")).unwrap();
    let snapshot = a.snapshot(&id, &backup("vol-1"), "t").unwrap();
    let ids = [machine.id.clone()];
    let size = DiskSize { gib: 9, iops: 1000 };
    let calls: [(&str, Attempt); 14] = [
        ("AttachVolume", &|| a.attach(&id)),
        ("CreateSnapshot", &|| a.snapshot(&id, &backup("vol-1"), "other").map(drop)),
        ("CreateVolume", &|| a.create(&new_disk("vol-2")).map(drop)),
        ("DeleteSnapshot", &|| a.delete_snapshot(&snapshot)),
        ("DeleteVolume", &|| a.delete(&id)),
        ("DescribeInstanceTypes", &|| a.check_machines(&ids)),
        ("DescribeInstances", &|| a.machines(&ids).map(drop)),
        ("DescribeInstances", &|| a.attach(&id)),
        ("DescribeSnapshots", &|| a.snapshots(CLUSTER_ID).map(drop)),
        ("DescribeSnapshots", &|| a.wait_for_snapshot(&snapshot, SNAPSHOT_MAX)),
        ("DescribeVolumes", &|| a.disk(&id).map(drop)),
        ("DescribeVolumesModifications", &|| a.modify(&id, size)),
        ("DetachVolume", &|| a.detach(&id, &machine.id, false)),
        ("ModifyVolume", &|| a.modify(&id, size)),
    ];
    for (action, call) in calls {
        ec2.fault(Fault::of(Kind::Unauthorized).on(action).by(&machine.access_key));
        let begun = Instant::now();
        let error = call().unwrap_err();
        says(
            &error,
            Reason::NotPermitted,
            &[&format!("ec2:{action}"), "deploy/iam-policy.json", &machine.id],
        );
        assert!(begun.elapsed() < Duration::from_secs(20), "{action}: {:?}", begun.elapsed());
        ec2.clear_faults();
    }
    for (code, words) in [("RequestExpired", "clock"), ("AuthFailure", "credentials")] {
        let (status, code, message) = (403, code.to_owned(), "words of EC2".to_owned());
        ec2.fault(Fault::of(Kind::Refused { status, code, message }).times(1));
        says(&a.disk(&id).unwrap_err(), Reason::NotPermitted, &[words, "words of EC2"]);
    }
}

#[test]
fn a_token_is_good_for_one_disk() {
    let ec2 = quick();
    let a = connect(&ec2, &ec2.instance(ZONE, KIND));
    let new = new_disk("vol-1");
    let id = a.create(&new).unwrap();
    let other_size = NewDisk { size: DiskSize { gib: 9, iops: 1000 }, ..new.clone() };
    let other_volume = NewDisk { volume: volume("vol-2"), ..new.clone() };
    let encrypted = NewDisk { kms_key: Some(String::new()), ..new.clone() };
    for other in [other_size, other_volume, encrypted] {
        says(
            &a.create(&other).unwrap_err(),
            Reason::InvalidArgument,
            &[id.as_str(), "token vol-1-1", "another token"],
        );
    }
    // The same token in another cluster: its own disks are another matter, but EC2 compares.
    let elsewhere = NewDisk { cluster_id: "another".to_owned(), ..new.clone() };
    says(
        &a.create(&elsewhere).unwrap_err(),
        Reason::InvalidArgument,
        &["IdempotentParameterMismatch", "another token"],
    );

    a.delete(&id).unwrap();
    nothing_is_left_of_volumes(&ec2, 1);
    says(&a.create(&new).unwrap_err(), Reason::NotFound, &[]);
    for wrong in ["", "a b", "a*"] {
        assert!(a.create(&NewDisk { token: wrong.to_owned(), ..new.clone() }).is_err());
    }
    let huge = NewDisk { size: DiskSize { gib: 65_537, iops: 1000 }, token: "t".to_owned(), ..new };
    says(&a.create(&huge).unwrap_err(), Reason::InvalidArgument, &["65536"]);
    assert_eq!(ec2.volumes_ever(), 1);
}

#[test]
fn quotas_and_refusals_say_what_to_do() {
    let ec2 = quick();
    let a = connect(&ec2, &ec2.instance(ZONE, KIND));
    for (code, part) in [("VolumeLimitExceeded", "quota"), ("MaxIOPSLimitExceeded", "quota")] {
        let (status, code, message) = (400, code.to_owned(), "words of EC2".to_owned());
        ec2.fault(Fault::of(Kind::Refused { status, code, message }).on("CreateVolume").times(1));
        says(&a.create(&new_disk("vol-1")).unwrap_err(), Reason::Unsupported, &[part, "words of EC2"]);
    }
    let id = a.create(&new_disk("vol-1")).unwrap();
    let (status, code) = (400, "ConcurrentSnapshotLimitExceeded".to_owned());
    let busy = Kind::Refused { status, code, message: "words of EC2".to_owned() };
    ec2.fault(Fault::of(busy).on("CreateSnapshot").times(1));
    says(&a.snapshot(&id, &backup("vol-1"), "t").unwrap_err(), Reason::Unavailable, &["another snapshot"]);
    // Once in 15 seconds, EBS says: for certain not done, so it is tried again.
    let (status, code) = (400, "SnapshotCreationPerVolumeRateExceeded".to_owned());
    let often = Kind::Refused { status, code, message: "words of EC2".to_owned() };
    ec2.fault(Fault::of(often).on("CreateSnapshot").times(2));
    a.snapshot(&id, &backup("vol-1"), "t").unwrap();
    // A disk that EC2 has lost.
    ec2.destroy_backing_file(id.as_str());
    assert_eq!(disk(&a, &id).state, DiskState::Failed);
    says(&a.attach(&id).unwrap_err(), Reason::Io, &["failed", id.as_str()]);
    a.delete(&id).unwrap();
}

#[test]
fn disks_that_cannot_be_shared_are_not_attached() {
    let ec2 = quick();
    let [here, there, old] = [(ZONE, KIND), ("us-east-1b", KIND), (ZONE, "m4.large")]
        .map(|(zone, kind)| connect(&ec2, &ec2.instance(zone, kind)));
    let far = there.create(&new_disk("vol-far")).unwrap();
    says(&here.attach(&far).unwrap_err(), Reason::InvalidArgument, &["us-east-1b", ZONE]);
    sh(
        "/",
        &format!(
            "curl --silent --fail --show-error '{}' -H 'Authorization: AWS4-HMAC-SHA256 Credential=K/1/r/ec2/x' \
         --data 'Action=CreateVolume&AvailabilityZone={ZONE}&Size=8&VolumeType=gp3'",
            ec2.endpoint()
        ),
    );
    let alone = ec2.volumes().into_iter().find(|v| !v.multi_attach).unwrap().id;
    let alone = DiskId::new(alone).unwrap();
    says(&here.attach(&alone).unwrap_err(), Reason::InvalidArgument, &["multi-attach", alone.as_str()]);

    let ids: Vec<String> = [&here, &there, &old].map(|aws| aws.machine().id.clone()).into();
    here.check_machines(&ids[..1]).unwrap();
    let error = here.check_machines(&ids).unwrap_err();
    says(&error, Reason::InvalidArgument, &[&ids[1], "us-east-1b", &ids[2], "m4.large", "Nitro"]);
    let unknown = "i-00000000000000000".to_owned();
    says(
        &here.check_machines(std::slice::from_ref(&unknown)).unwrap_err(),
        Reason::InvalidArgument,
        &[&unknown],
    );

    // Sixteen machines are the most.
    let id = here.create(&new_disk("vol-1")).unwrap();
    let others: Vec<Aws> = (0..17).map(|_| connect(&ec2, &ec2.instance(ZONE, KIND))).collect();
    thread::scope(|scope| others[..16].iter().for_each(|aws| drop(scope.spawn(|| aws.attach(&id).unwrap()))));
    let error = others[16].attach(&id).unwrap_err();
    says(&error, Reason::Unsupported, &["16 machines", &others[0].machine().id, "detach"]);
    let ids: Vec<String> = others.iter().map(|aws| aws.machine().id.clone()).collect();
    assert_eq!(here.machines(&ids).unwrap().len(), 17);
    says(&here.check_machines(&ids).unwrap_err(), Reason::InvalidArgument, &["16"]);
    // A machine that has all the disks that it can have.
    for number in 0..27 {
        let id = here.create(&new_disk(&format!("vol-m-{number}"))).unwrap();
        here.attach(&id).unwrap();
    }
    others[0].detach(&id, &others[0].machine().id, false).unwrap();
    says(
        &here.attach(&id).unwrap_err(),
        Reason::Unsupported,
        &["detach another disk", "AttachmentLimitExceeded"],
    );
}

#[test]
fn changes_are_waited_for_and_their_rate_is_bounded() {
    let mut delays = Options::default().delays;
    delays.modify = Duration::from_secs(2);
    delays.optimize = Duration::from_secs(1);
    let ec2 = Ec2::start(Options {
        bytes_per_gib: 1 << 20,
        disk_bytes: 1 << 30,
        delays,
        modification_cooldown: Duration::from_secs(3600),
        ..Options::default()
    });
    let [a, b] = [ec2.instance(ZONE, KIND), ec2.instance(ZONE, KIND)].map(|i| connect(&ec2, &i));
    let id = a.create(&new_disk("vol-1")).unwrap();
    a.modify(&id, DiskSize { gib: 8, iops: 1000 }).unwrap();
    assert!(!ec2.calls().iter().any(|call| call.action == "ModifyVolume"));
    says(&a.modify(&id, DiskSize { gib: 7, iops: 1000 }).unwrap_err(), Reason::InvalidArgument, &["smaller"]);
    // Two ask for the same at once: whoever comes second finds it under way.
    let size = DiskSize { gib: 10, iops: 1000 };
    thread::scope(|scope| {
        let (a, b, id) = (&a, &b, &id);
        scope.spawn(move || a.modify(id, size).unwrap());
        scope.spawn(move || b.modify(id, size).unwrap());
    });
    assert_eq!(disk(&a, &id).size, size);
    let done = |call: &Call| call.action == "ModifyVolume" && call.outcome == Outcome::Done;
    let calls = ec2.calls();
    let calls: Vec<_> = calls.iter().filter(|call| done(call)).collect();
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0].parameters.get("Iops"), None);
    // The next one only after some hours.
    let begun = Instant::now();
    let error = a.modify(&id, DiskSize { gib: 11, iops: 1000 }).unwrap_err();
    says(&error, Reason::Unavailable, &["some hours", "repeat"]);
    assert!(begun.elapsed() < Duration::from_secs(90), "{:?}", begun.elapsed());
}

#[test]
fn where_there_is_no_metadata_service_it_is_said_what_to_do() {
    let ec2 = quick();
    let machine = ec2.instance(ZONE, KIND);
    let a = connect(&ec2, &machine);
    a.disks(CLUSTER_ID).unwrap();
    ec2.set_imds(&machine, false);
    let begun = Instant::now();
    let error = Aws::connect(settings(&ec2, &machine)).unwrap_err();
    says(&error, Reason::Unavailable, &["--region, --zone and --instance-id"]);
    assert!(begun.elapsed() < Duration::from_secs(28), "{:?}", begun.elapsed());
    // With what it would have said: but then there are no credentials.
    let told = AwsSettings {
        region: Some("us-east-1".to_owned()),
        zone: Some(ZONE.to_owned()),
        instance_id: Some(machine.id.clone()),
        ..settings(&ec2, &machine)
    };
    let without = Aws::connect(told.clone()).unwrap();
    let error = without.disks(CLUSTER_ID).unwrap_err();
    assert!(matches!(error.reason(), Reason::NotPermitted | Reason::Unavailable), "{error}");
    assert!(error.message().contains("credentials"), "{error}");
    // Those that it gave before are good for hours.
    a.disks(CLUSTER_ID).unwrap();
    ec2.set_imds(&machine, true);
    assert_eq!(Aws::connect(told).unwrap().disks(CLUSTER_ID).unwrap(), []);
}

#[test]
fn credentials_are_fetched_anew_before_they_expire() {
    let ec2 = Ec2::start(Options {
        bytes_per_gib: 1 << 20,
        disk_bytes: 1 << 30,
        credentials_live: Duration::from_secs(15),
        ..Options::default()
    });
    let a = connect(&ec2, &ec2.instance(ZONE, KIND));
    let id = a.create(&new_disk("vol-1")).unwrap();
    for _ in 0..4 {
        thread::sleep(Duration::from_secs(5));
        disk(&a, &id);
    }
    a.delete(&id).unwrap();
}

/// A server that is ended with the test.
struct Moto {
    server: Child,
    url: String,
    bin: PathBuf,
}

impl Moto {
    fn start() -> Moto {
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/scripts/moto.sh");
        let bin = PathBuf::from(
            sh("/", &format!("{script} '{}' {MOTO_VERSION}", env!("CARGO_TARGET_TMPDIR"))).trim(),
        );
        let port = ports::free();
        let server = Command::new(bin.join("moto_server"))
            .args(["-H", "127.0.0.1", "-p", &port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let moto = Moto { server, url: format!("http://127.0.0.1:{port}"), bin };
        eventually(Duration::from_secs(120), || {
            std::net::TcpStream::connect(("127.0.0.1", port)).map(drop).map_err(|e| e.to_string())
        });
        moto
    }

    /// Makes an instance, by the SDK for Python.
    fn instance(&self) -> String {
        let script = format!(
            "import boto3\n\
             ec2 = boto3.client('ec2', endpoint_url='{}', region_name='us-east-1', aws_access_key_id='k', \
             aws_secret_access_key='s')\n\
             image = ec2.describe_images(Owners=['amazon'])['Images'][0]['ImageId']\n\
             made = ec2.run_instances(ImageId=image, MinCount=1, MaxCount=1, InstanceType='{KIND}', \
             Placement={{'AvailabilityZone': '{ZONE}'}})\n\
             print(made['Instances'][0]['InstanceId'])\n",
            self.url
        );
        let output =
            Command::new(Path::new(&self.bin).join("python")).args(["-c", &script]).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8_lossy(&output.stdout).trim().to_owned()
    }
}

impl Drop for Moto {
    fn drop(&mut self) {
        self.server.kill().unwrap();
        self.server.wait().unwrap();
    }
}

/// Another emulator, which others have written: no delays, no faults, one attachment, no client tokens.
#[test]
fn moto_is_used_as_the_emulator_is() {
    let moto = Moto::start();
    // The credentials are those that an emulated machine gives.
    let ec2 = quick();
    let source = ec2.instance(ZONE, KIND);
    let told = AwsSettings {
        region: Some("us-east-1".to_owned()),
        zone: Some(ZONE.to_owned()),
        instance_id: Some(moto.instance()),
        endpoint: Some(moto.url.clone()),
        imds_endpoint: Some(source.imds.clone()),
        cluster_tag: TAG.to_owned(),
    };
    let a = Aws::connect(told).unwrap();
    let me = a.machine().id.clone();
    a.check_machines(std::slice::from_ref(&me)).unwrap();
    let states = a.machines(&[me.clone(), "i-00000000000000000".to_owned()]).unwrap();
    assert_eq!((states.len(), states[0].running, states[0].kind.as_str()), (1, true, KIND));

    let new = NewDisk { kms_key: Some(String::new()), ..new_disk("vol-1") };
    let id = a.create(&new).unwrap();
    // By the tag: moto knows no tokens.
    assert_eq!(a.create(&new).unwrap(), id);
    let made = disk(&a, &id);
    assert_eq!((made.state, made.size, made.zone.as_str()), (DiskState::Ready, new.size, ZONE));
    assert_eq!((made.multi_attach, made.encrypted), (true, true));
    assert_eq!((made.cluster_id.as_str(), made.volume.as_str()), (CLUSTER_ID, "vol-1"));
    assert_eq!(a.disks(CLUSTER_ID).unwrap().len(), 1);

    a.attach(&id).unwrap();
    a.attach(&id).unwrap();
    assert_eq!(holders(&disk(&a, &id)), [me.as_str()]);
    let second = a.create(&new_disk("vol-2")).unwrap();
    a.attach(&second).unwrap();
    let larger = DiskSize { gib: 12, iops: 2000 };
    a.modify(&id, larger).unwrap();
    a.modify(&id, larger).unwrap();
    assert_eq!(disk(&a, &id).size, larger);
    a.modify(&id, DiskSize { gib: 13, iops: 2000 }).unwrap();
    assert_eq!(disk(&a, &id).size.gib, 13);

    let snapshot = a.snapshot(&id, &backup("vol-1"), "b-1").unwrap();
    assert_eq!(a.snapshot(&id, &backup("vol-1"), "b-1").unwrap(), snapshot);
    a.wait_for_snapshot(&snapshot, SNAPSHOT_MAX).unwrap();
    let listed = a.snapshots(CLUSTER_ID).unwrap();
    assert_eq!((listed.len(), &listed[0].id, listed[0].percent), (1, &snapshot, 100));
    assert_eq!((listed[0].disk.as_str(), listed[0].backup.as_str()), (id.as_str(), "b-1"));
    let restored =
        NewDisk { from: Some(snapshot.clone()), size: DiskSize { gib: 13, iops: 1000 }, ..new_disk("vol-3") };
    let copy = a.create(&restored).unwrap();

    says(&a.delete(&id).unwrap_err(), Reason::InvalidArgument, &[&me]);
    for disk in [&id, &second, &copy] {
        a.detach(disk, &me, false).unwrap();
        a.detach(disk, &me, false).unwrap();
        a.delete(disk).unwrap();
    }
    a.delete_snapshot(&snapshot).unwrap();
    a.delete_snapshot(&snapshot).unwrap();
    assert_eq!(a.disks(CLUSTER_ID).unwrap(), []);
    assert!(a.snapshots(CLUSTER_ID).unwrap().is_empty());
    assert_eq!(a.disk(&id).unwrap(), None);
    a.delete(&id).unwrap();
}
