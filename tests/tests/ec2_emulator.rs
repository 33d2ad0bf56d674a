//! The emulator of EC2 itself: what it answers, how long that takes, and what instances see of it.

#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use shardfs_tests::cluster::eventually;
use shardfs_tests::ec2::{Ec2, Fault, Instance, Kind, Options, Outcome, ROLE};

const PATIENCE: Duration = Duration::from_secs(60);
/// A state that is looked at while it lasts.
const LASTS: Duration = Duration::from_secs(4);
const ZONE: &str = "us-east-1a";
const IO2: &str =
    "CreateVolume&AvailabilityZone=us-east-1a&VolumeType=io2&Size=4&Iops=1000&MultiAttachEnabled=true";

fn emulator() -> Ec2 {
    Ec2::start(Options { bytes_per_gib: 16 << 20, ..Options::default() })
}

/// A request over HTTP; none if the connection ended without an answer.
fn http(url: &str, method: &str, path: &str, headers: &[(&str, &str)], body: &str) -> Option<(u16, String)> {
    let host = url.strip_prefix("http://").unwrap();
    let mut stream = TcpStream::connect(host).unwrap();
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    for (name, value) in headers {
        request += &format!("{name}: {value}\r\n");
    }
    request += &format!("Content-Length: {}\r\n\r\n{body}", body.len());
    stream.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    // A connection that is cut may be reset.
    let _ = stream.read_to_string(&mut answer);
    let (head, body) = answer.split_once("\r\n\r\n")?;
    Some((head.split(' ').nth(1)?.parse().ok()?, body.to_owned()))
}

fn call_by(ec2: &Ec2, key: &str, call: &str) -> Option<(u16, String)> {
    let signature =
        format!("AWS4-HMAC-SHA256 Credential={key}/20260101/us-east-1/ec2/aws4_request, Signature=0");
    let body = format!("Version=2016-11-15&Action={call}");
    http(&ec2.endpoint(), "POST", "/", &[("Authorization", &signature)], &body)
}

/// A call that must succeed.
fn call(ec2: &Ec2, text: &str) -> String {
    let (status, body) = call_by(ec2, "AKIATEST", text).unwrap();
    assert_eq!(status, 200, "{text}: {body}");
    body
}

/// A call that must be refused; the code.
fn refused(ec2: &Ec2, text: &str) -> String {
    let (status, body) = call_by(ec2, "AKIATEST", text).unwrap();
    assert_ne!(status, 200, "{text}: {body}");
    element(&body, "Code")
}

/// Text of the first element of this name.
fn element(xml: &str, name: &str) -> String {
    let found =
        xml.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once(&format!("</{name}>")));
    found.unwrap_or_else(|| panic!("no {name} in {xml}")).0.to_owned()
}

fn wait_for_status(ec2: &Ec2, volume: &str, status: &str) {
    eventually(PATIENCE, || match ec2.volume(volume) {
        Some(found) if found.status() == status => Ok(()),
        other => Err(format!("{other:?}")),
    });
}

fn volume(ec2: &Ec2, call_text: &str) -> String {
    let id = element(&call(ec2, call_text), "volumeId");
    wait_for_status(ec2, &id, "available");
    id
}

fn begin_attaching(ec2: &Ec2, volume: &str, instance: &Instance, device: &str) {
    call(ec2, &attach(volume, &instance.id, device));
}

fn attach(volume: &str, instance: &str, device: &str) -> String {
    format!("AttachVolume&VolumeId={volume}&InstanceId={instance}&Device=%2Fdev%2F{device}")
}

fn detach(volume: &str, instance: &Instance) -> String {
    format!("DetachVolume&VolumeId={volume}&InstanceId={}", instance.id)
}

fn attached(ec2: &Ec2, volume: &str, instance: &Instance) {
    begin_attaching(ec2, volume, instance, "sdf");
    eventually(PATIENCE, || fs::read_link(instance.link(volume)).map_err(|e| e.to_string()));
}

fn capacity(device: &Path) -> u64 {
    let name = device.file_name().unwrap().to_str().unwrap();
    fs::read_to_string(format!("/sys/block/{name}/size")).unwrap().trim().parse::<u64>().unwrap() * 512
}

/// Writes a block to a device past the page cache.
fn write_block(device: &Path, byte: u8) {
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let device = OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(device).unwrap();
    device.write_all_at(&Block([byte; 4096]).0, 0).unwrap();
}

fn first_byte(file: &Path) -> u8 {
    let mut byte = [0];
    fs::File::open(file).unwrap().read_exact(&mut byte).unwrap();
    byte[0]
}

#[test]
fn a_volume_lives_and_dies() {
    let ec2 = emulator();
    let instance = ec2.instance(ZONE, "r7i.xlarge");
    let tags = "TagSpecification.1.ResourceType=volume&TagSpecification.1.Tag.1.Key=shard&TagSpecification.1.Tag.1.Value=7";
    ec2.delays(|delays| delays.create = LASTS);
    let created = call(&ec2, &format!("{IO2}&{tags}"));
    let id = element(&created, "volumeId");
    assert_eq!(element(&created, "status"), "creating");
    assert_eq!(refused(&ec2, &attach(&id, &instance.id, "sdf")), "IncorrectState");
    wait_for_status(&ec2, &id, "available");
    assert_eq!(fs::metadata(ec2.backing_file(&id)).unwrap().len(), 4 * (16 << 20));

    ec2.delays(|delays| {
        delays.attach = LASTS;
        delays.link = LASTS;
    });
    begin_attaching(&ec2, &id, &instance, "sdf");
    let described = call(&ec2, "DescribeVolumes&Filter.1.Name=tag%3Ashard&Filter.1.Value.1=7");
    assert!(
        described.contains("<status>in-use</status>") && described.contains("<status>attaching</status>")
    );
    eventually(PATIENCE, || ec2.device(&id, &instance).ok_or_else(|| "no device".to_owned()));
    assert!(fs::read_link(instance.link(&id)).is_err(), "the link comes later than the attachment");
    let device = eventually(PATIENCE, || fs::read_link(instance.link(&id)).map_err(|e| e.to_string()));
    assert_eq!(ec2.device(&id, &instance), Some(device.clone()));
    assert_eq!(capacity(&device), 4 * (16 << 20));
    let dio = format!("/sys/block/{}/loop/dio", device.file_name().unwrap().to_str().unwrap());
    assert_eq!(fs::read_to_string(dio).unwrap().trim(), "1", "past the page cache");
    let instances = call(&ec2, &format!("DescribeInstances&InstanceId.1={}", instance.id));
    assert!(instances.contains(&id) && instances.contains("<name>running</name>"));

    assert_eq!(refused(&ec2, &format!("DeleteVolume&VolumeId={id}")), "VolumeInUse");
    assert_eq!(element(&call(&ec2, &detach(&id, &instance)), "status"), "detaching");
    wait_for_status(&ec2, &id, "available");
    assert!(fs::symlink_metadata(instance.link(&id)).is_err());
    let backing = device.file_name().unwrap().to_str().unwrap().to_owned();
    let backing = fs::read_to_string(format!("/sys/block/{backing}/loop/backing_file")).unwrap_or_default();
    assert!(!backing.contains(&id), "the device is free");

    call(&ec2, &format!("DeleteVolume&VolumeId={id}"));
    eventually(PATIENCE, || ec2.volume(&id).map_or(Ok(()), |volume| Err(format!("{volume:?}"))));
    assert_eq!(refused(&ec2, &format!("DescribeVolumes&VolumeId.1={id}")), "InvalidVolume.NotFound");
    assert!(!ec2.backing_file(&id).exists());
    assert_eq!(ec2.volumes_ever(), 1);
}

#[test]
fn calls_are_checked() {
    let ec2 = emulator();
    let here = ec2.instance(ZONE, "r7i.xlarge");
    let create = |rest: &str| refused(&ec2, &format!("CreateVolume&AvailabilityZone=us-east-1a&{rest}"));
    assert_eq!(create("VolumeType=gp3&Size=4&MultiAttachEnabled=true"), "InvalidParameterCombination");
    assert_eq!(create("VolumeType=io2&Size=4&Iops=4001"), "InvalidParameterValue");
    assert_eq!(create("VolumeType=io2&Size=3&Iops=100"), "InvalidParameterValue");
    assert_eq!(create("VolumeType=io2&Size=4"), "MissingParameter");
    assert_eq!(create("VolumeType=io2&Size=4&Iops=100&KmsKeyId=k"), "InvalidParameterDependency");
    assert_eq!(create("VolumeType=io2&Size=4&Iops=100&Nonsense=k"), "UnknownParameter");
    assert_eq!(create("VolumeType=io2&Size=4&Iops=100&DryRun=true"), "DryRunOperation");
    assert_eq!(create("Size=4&SnapshotId=snap-01234567"), "InvalidSnapshot.NotFound");
    assert_eq!(refused(&ec2, "CreateVolume&AvailabilityZone=eu-west-1a&Size=4"), "InvalidZone.NotFound");
    assert_eq!(refused(&ec2, "RunInstances"), "InvalidAction");
    assert_eq!(refused(&ec2, "DescribeVolumes&VolumeId.1=vol-xyz"), "InvalidParameterValue");
    assert_eq!(
        refused(&ec2, "DescribeVolumes&Filter.1.Name=colour&Filter.1.Value.1=x"),
        "InvalidParameterValue"
    );
    assert_eq!(ec2.volumes_ever(), 0);

    let id = volume(&ec2, IO2);
    let to = |instance: &Instance, device| refused(&ec2, &attach(&id, &instance.id, device));
    assert_eq!(to(&ec2.instance("us-east-1b", "r7i.xlarge"), "sdf"), "InvalidVolume.ZoneMismatch");
    assert_eq!(to(&ec2.instance(ZONE, "t2.large"), "sdf"), "UnsupportedOperation");
    assert_eq!(refused(&ec2, &attach(&id, "i-01234567", "sdf")), "InvalidInstanceID.NotFound");
    assert_eq!(refused(&ec2, &attach(&id, "i-hello", "sdf")), "InvalidInstanceID.Malformed");
    assert_eq!(to(&here, "nvme1n1"), "InvalidParameterValue");
    begin_attaching(&ec2, &id, &here, "sdf");
    assert_eq!(to(&here, "sdg"), "VolumeInUse");
    let other = volume(&ec2, "CreateVolume&AvailabilityZone=us-east-1a&VolumeType=gp3&Size=4");
    let (_, body) = call_by(&ec2, "K", &attach(&other, &here.id, "sdf")).unwrap();
    assert!(body.contains("Attachment point /dev/sdf is already in use"), "{body}");
    let stopped = ec2.instance(ZONE, "r7i.xlarge");
    ec2.stop(&stopped);
    assert_eq!(to(&stopped, "sdf"), "IncorrectState");
    for _ in 1..16 {
        begin_attaching(&ec2, &id, &ec2.instance(ZONE, "r7i.xlarge"), "sdf");
    }
    assert_eq!(to(&ec2.instance(ZONE, "r7i.xlarge"), "sdf"), "AttachmentLimitExceeded");
    assert_eq!(refused(&ec2, &format!("DetachVolume&VolumeId={id}")), "InvalidParameterCombination");
    assert_eq!(refused(&ec2, &detach(&other, &here)), "IncorrectState");
    assert_eq!(refused(&ec2, &detach(&id, &stopped)), "InvalidAttachment.NotFound");

    let unsigned = http(&ec2.endpoint(), "POST", "/", &[], "Action=DescribeVolumes").unwrap();
    assert!(unsigned.0 == 401 && unsigned.1.contains("<Code>AuthFailure</Code>"), "{unsigned:?}");
    let types = call(&ec2, "DescribeInstanceTypes&InstanceType.1=r7i.xlarge&InstanceType.2=t2.large");
    assert!(
        types.contains("<hypervisor>nitro</hypervisor>") && types.contains("<hypervisor>xen</hypervisor>")
    );
}

#[test]
fn a_client_token_makes_one_volume() {
    let ec2 = emulator();
    let first = element(&call(&ec2, &format!("{IO2}&ClientToken=t")), "volumeId");
    assert_eq!(element(&call(&ec2, &format!("{IO2}&ClientToken=t")), "volumeId"), first);
    assert_eq!(refused(&ec2, &format!("{IO2}&Encrypted=true&ClientToken=t")), "IdempotentParameterMismatch");
    assert_ne!(element(&call(&ec2, &format!("{IO2}&ClientToken=u")), "volumeId"), first);
    assert_eq!(ec2.volumes_ever(), 2);
}

#[test]
fn descriptions_have_pages() {
    let ec2 = Ec2::start(Options { page_limit: Some(2), bytes_per_gib: 1 << 20, ..Options::default() });
    let mut made: Vec<String> = (0..5).map(|_| volume(&ec2, IO2)).collect();
    made.sort();
    let (mut found, mut next) = (Vec::new(), String::new());
    for page in 1.. {
        let answer = call(&ec2, &format!("DescribeVolumes{next}"));
        found.extend(
            answer.split("<volumeId>").skip(1).map(|rest| rest.split('<').next().unwrap().to_owned()),
        );
        if !answer.contains("<nextToken>") {
            assert_eq!(page, 3);
            break;
        }
        next = format!("&NextToken={}", element(&answer, "nextToken"));
    }
    assert_eq!(found, made);
    assert_eq!(refused(&ec2, "DescribeVolumes&NextToken=nonsense"), "InvalidNextToken");
    assert_eq!(refused(&ec2, "DescribeVolumes&MaxResults=2"), "InvalidParameterValue");

    call(&ec2, &format!("CreateTags&ResourceId.1={}&Tag.1.Key=a&Tag.1.Value=b", made[3]));
    let tagged = call(&ec2, "DescribeVolumes&Filter.1.Name=tag-key&Filter.1.Value.1=a");
    assert!(tagged.contains(&made[3]) && !tagged.contains(&made[2]));
}

#[test]
fn a_snapshot_is_a_point_in_time() {
    let ec2 = emulator();
    let instance = ec2.instance(ZONE, "r7i.xlarge");
    let id = volume(&ec2, IO2);
    attached(&ec2, &id, &instance);
    write_block(&instance.link(&id), 1);
    ec2.delays(|delays| delays.snapshot = LASTS);
    let taken = call(&ec2, &format!("CreateSnapshot&VolumeId={id}&Description=one"));
    let snapshot = element(&taken, "snapshotId");
    assert_eq!(element(&taken, "status"), "pending");
    write_block(&instance.link(&id), 2);
    let from = format!("{IO2}&SnapshotId={snapshot}");
    assert_eq!(refused(&ec2, &from), "IncorrectState");
    eventually(PATIENCE, || ec2.snapshots()[0].completed.then_some(()).ok_or_else(|| "pending".to_owned()));
    assert_eq!(refused(&ec2, &from.replace("Size=4", "Size=3")), "InvalidParameterValue");
    let restored = volume(&ec2, &from.replace("Size=4", "Size=8"));
    assert_eq!(first_byte(&ec2.backing_file(&id)), 2);
    assert_eq!(first_byte(&ec2.backing_file(&restored)), 1);
    assert_eq!(fs::metadata(ec2.backing_file(&restored)).unwrap().len(), 8 * (16 << 20));
    let described = call(&ec2, &format!("DescribeSnapshots&Owner.1=self&SnapshotId.1={snapshot}"));
    assert_eq!(
        (element(&described, "progress").as_str(), element(&described, "volumeSize").as_str()),
        ("100%", "4")
    );
    call(&ec2, &format!("DeleteSnapshot&SnapshotId={snapshot}"));
    assert_eq!(refused(&ec2, &format!("DeleteSnapshot&SnapshotId={snapshot}")), "InvalidSnapshot.NotFound");
}

#[test]
fn a_volume_grows_where_it_is() {
    let ec2 = Ec2::start(Options {
        bytes_per_gib: 16 << 20,
        modification_cooldown: Duration::from_secs(3600),
        ..Options::default()
    });
    let instances = [ec2.instance(ZONE, "r7i.xlarge"), ec2.instance(ZONE, "r7i.xlarge")];
    let id = volume(&ec2, IO2);
    instances.iter().for_each(|instance| attached(&ec2, &id, instance));
    assert_eq!(refused(&ec2, &format!("ModifyVolume&VolumeId={id}&Size=3")), "InvalidParameterValue");
    assert_eq!(refused(&ec2, &format!("ModifyVolume&VolumeId={id}&Iops=4001")), "InvalidParameterValue");
    ec2.delays(|delays| delays.optimize = LASTS);
    let modified = call(&ec2, &format!("ModifyVolume&VolumeId={id}&Size=6&Iops=6000"));
    assert_eq!(element(&modified, "modificationState"), "modifying");
    for instance in &instances {
        eventually(PATIENCE, || match capacity(&fs::read_link(instance.link(&id)).unwrap()) {
            bytes if bytes == 6 * (16 << 20) => Ok(()),
            other => Err(other.to_string()),
        });
    }
    let again = format!("ModifyVolume&VolumeId={id}&Size=7");
    assert_eq!(refused(&ec2, &again), "IncorrectModificationState");
    eventually(PATIENCE, || {
        let state = element(
            &call(&ec2, &format!("DescribeVolumesModifications&VolumeId.1={id}")),
            "modificationState",
        );
        if state == "completed" { Ok(()) } else { Err(state) }
    });
    assert_eq!(refused(&ec2, &again), "VolumeModificationRateExceeded");
    let volume = ec2.volume(&id).unwrap();
    assert_eq!((volume.size_gib, volume.iops), (6, Some(6000)));
}

#[test]
fn faults_happen_as_asked() {
    let ec2 = emulator();
    let instance = ec2.instance(ZONE, "r7i.xlarge");
    ec2.fault(Fault::of(Kind::Throttle).on("DescribeVolumes").times(1));
    assert_eq!(refused(&ec2, "DescribeVolumes"), "RequestLimitExceeded");
    call(&ec2, "DescribeVolumes");

    let hold = Duration::from_millis(200);
    ec2.fault(Fault::of(Kind::TimeoutAfterSuccess(hold)).on("CreateVolume").times(1));
    let start = Instant::now();
    assert_eq!(call_by(&ec2, "K", IO2), None);
    assert!(start.elapsed() >= hold);
    assert_eq!(ec2.volumes_ever(), 1);
    let id = ec2.volumes()[0].id.clone();
    wait_for_status(&ec2, &id, "available");
    ec2.fault(Fault::of(Kind::TimeoutBefore(Duration::ZERO)).on("CreateVolume").times(1));
    assert_eq!(call_by(&ec2, "K", IO2), None);
    assert_eq!(ec2.volumes_ever(), 1);

    ec2.fault(Fault::of(Kind::Unauthorized).by(&instance.access_key));
    let (status, body) = call_by(&ec2, &instance.access_key, &attach(&id, &instance.id, "sdf")).unwrap();
    assert_eq!((status, element(&body, "Code").as_str()), (403, "UnauthorizedOperation"));
    let who = format!("assumed-role/{ROLE}/{} is not authorized to perform: ec2:AttachVolume", instance.id);
    assert!(body.contains(&who) && body.contains(&format!("volume/{id}")), "{body}");

    ec2.fault(Fault::of(Kind::StuckAttach).times(1));
    begin_attaching(&ec2, &id, &instance, "sdf");
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(ec2.volume(&id).unwrap().attachments[0].status.name(), "attaching");
    ec2.clear_faults();
    eventually(PATIENCE, || fs::read_link(instance.link(&id)).map_err(|e| e.to_string()));

    ec2.fault(Fault::of(Kind::StuckDetach));
    call(&ec2, &detach(&id, &instance));
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(ec2.volume(&id).unwrap().attachments[0].status.name(), "detaching");
    assert!(instance.link(&id).exists());
    call(&ec2, &format!("{}&Force=true", detach(&id, &instance)));
    wait_for_status(&ec2, &id, "available");

    let calls = ec2.calls();
    assert!(calls.iter().any(|c| c.action == "CreateVolume" && c.outcome == Outcome::DoneButSilent));
    assert!(calls.iter().any(|c| c.outcome == Outcome::Silent));
    let denied = calls.iter().find(|c| c.key == instance.access_key).unwrap();
    assert_eq!(denied.parameters["VolumeId"], id);
    assert_eq!(denied.outcome, Outcome::Refused("UnauthorizedOperation".to_owned()));
}

#[test]
fn reads_can_be_stale() {
    let ec2 = emulator();
    let old = volume(&ec2, IO2);
    std::thread::sleep(LASTS + Duration::from_millis(200));
    ec2.fault(Fault::of(Kind::StaleReads(LASTS)));
    let new = element(&call(&ec2, IO2), "volumeId");
    assert_eq!(refused(&ec2, &format!("DescribeVolumes&VolumeId.1={new}")), "InvalidVolume.NotFound");
    let listed = call(&ec2, "DescribeVolumes");
    assert!(listed.contains(&old) && !listed.contains(&new));
    eventually(PATIENCE, || {
        let (status, body) = call_by(&ec2, "K", &format!("DescribeVolumes&VolumeId.1={new}")).unwrap();
        if status == 200 { Ok(()) } else { Err(body) }
    });
    ec2.fault(Fault::of(Kind::StaleReads(Duration::from_secs(60))).on("DeleteVolume").times(1));
    assert_eq!(refused(&ec2, &format!("DeleteVolume&VolumeId={old}")), "InvalidVolume.NotFound");
    call(&ec2, &format!("DeleteVolume&VolumeId={old}"));
}

#[test]
fn instances_reboot_and_end() {
    let ec2 = emulator();
    let instance = ec2.instance(ZONE, "r7i.xlarge");
    let id = volume(&ec2, IO2);
    attached(&ec2, &id, &instance);
    ec2.delays(|delays| delays.link = LASTS);
    ec2.reboot(&instance);
    assert!(!instance.link(&id).exists());
    eventually(PATIENCE, || fs::read_link(instance.link(&id)).map_err(|e| e.to_string()));
    ec2.destroy_backing_file(&id);
    assert_eq!(ec2.volume(&id).unwrap().status(), "error");
    let mut content = Vec::new();
    let read = OpenOptions::new().read(true).open(instance.link(&id)).unwrap().read_to_end(&mut content);
    assert!(read.is_err() && content.is_empty(), "{read:?}");
    ec2.terminate(&instance);
    eventually(PATIENCE, || match ec2.volume(&id).unwrap().attachments {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    });
    assert!(fs::symlink_metadata(instance.link(&id)).is_err());
    assert!(call(&ec2, "DescribeInstances").contains("<name>terminated</name>"));
}

#[test]
fn metadata_needs_a_token() {
    let ec2 = emulator();
    let instance = ec2.instance("us-east-1b", "r7i.xlarge");
    let get = |path: &str, token: &str| {
        http(&instance.imds, "GET", path, &[("X-aws-ec2-metadata-token", token)], "").unwrap()
    };
    let put = |ttl: &str| {
        let headers = [("X-aws-ec2-metadata-token-ttl-seconds", ttl)];
        http(&instance.imds, "PUT", "/latest/api/token", &headers, "").unwrap()
    };
    assert_eq!(get("/latest/meta-data/instance-id", "").0, 401);
    assert_eq!(put("0").0, 400);
    let token = put("4").1;
    assert_eq!(get("/latest/meta-data/instance-id", &token), (200, instance.id.clone()));
    std::thread::sleep(LASTS + Duration::from_millis(100));
    assert_eq!(get("/latest/meta-data/instance-id", &token).0, 401, "it is too old");
    let token = put("21600").1;
    let text = |path: &str| get(path, &token).1;
    assert_eq!(text("/latest/meta-data/placement/region"), "us-east-1");
    assert_eq!(text("/latest/meta-data/placement/availability-zone"), "us-east-1b");
    assert_eq!(text("/latest/meta-data/instance-type"), "r7i.xlarge");
    assert!(text("/latest/dynamic/instance-identity/document").contains(&instance.id));
    assert_eq!(text("/latest/meta-data/iam/security-credentials/"), ROLE);
    let credentials = text(&format!("/latest/meta-data/iam/security-credentials/{ROLE}"));
    let credentials: serde_json::Value = serde_json::from_str(&credentials).unwrap();
    assert_eq!(credentials["AccessKeyId"], instance.access_key.as_str());
    assert_eq!(get("/latest/meta-data/nothing", &token).0, 404);
}

#[test]
fn nothing_is_left() {
    let ec2 = emulator();
    let instance = ec2.instance(ZONE, "r7i.xlarge");
    let id = volume(&ec2, IO2);
    attached(&ec2, &id, &instance);
    let file = ec2.backing_file(&id);
    let root = file.parent().and_then(Path::parent).unwrap().to_owned();
    // As a program under test does, which then ends without taking its device down.
    let own = std::process::Command::new("losetup").args(["--find", "--show"]).arg(&file).output().unwrap();
    assert!(own.status.success());
    drop(ec2);
    assert!(!root.exists());
    let devices = std::process::Command::new("losetup").args(["--list", "--noheadings"]).output().unwrap();
    assert!(!String::from_utf8_lossy(&devices.stdout).contains(root.to_str().unwrap()));
    assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains(root.to_str().unwrap()));
}
