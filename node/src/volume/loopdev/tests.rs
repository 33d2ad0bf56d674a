//! Real loop devices and mounts; without root they say that they are skipped.

use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::Command;

use shardfs_proto::types::{Epoch, NodeId, Reason};

use super::super::ext4::{PROBE_BYTES, classify, is_anothers, label};
use super::super::fence::{FenceKey, Takeover};
use super::super::leftovers;
use super::sys::attach_device;
use super::*;

/// Unmounts and detaches whatever a test left.
struct Bench {
    dir: tempfile::TempDir,
    _mounts: mounts::MountsGuard,
}

impl Bench {
    fn new() -> Option<Bench> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: loop devices need root and /dev/loop-control");
            return None;
        }
        Some(Bench { dir: tempfile::tempdir().unwrap(), _mounts: mounts::MountsGuard::shared() })
    }

    fn spec(&self) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId::new("vol-test").unwrap(),
            cluster_id: "c1".into(),
            source: self.dir.path().join("vol-test.img"),
            size_bytes: 96 << 20,
            formatted: false,
            mount_point: self.dir.path().join("volumes/vol-test"),
            allow_unfenced: false,
        }
    }
}

/// Whether this process may enlarge a filesystem that is mounted; says so if not.
fn may_enlarge() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let may = u64::from_str_radix(effective.trim(), 16).unwrap() & (1 << CAP_SYS_RESOURCE) != 0;
    if !may {
        eprintln!("skipped: enlarging needs CAP_SYS_RESOURCE (`make test-vm` has it)");
    }
    may
}

impl Drop for Bench {
    fn drop(&mut self) {
        let spec = self.spec();
        if let Err(error) = tag(&spec.mount_point, &spec.id).and_then(|tag| clean_up(&spec, &tag)) {
            eprintln!("cleaning up a test: {error}");
        }
    }
}

#[test]
fn attaches_detaches_and_keeps_content() {
    let Some(bench) = Bench::new() else { return };
    let mut spec = bench.spec();
    LoopProvider.create(&spec).unwrap();
    let meta = fs::metadata(&spec.source).unwrap();
    assert_eq!(meta.len(), spec.size_bytes);
    let attached = LoopProvider.attach(&spec).unwrap();
    fs::write(attached.root.join("x"), "y").unwrap();
    let seen = LoopProvider.describe(&spec).unwrap();
    assert!(seen.mounted);
    assert_eq!(seen.devices, std::slice::from_ref(&attached.device));
    let second = LoopProvider.attach(&spec).unwrap_err();
    assert_eq!(second.reason(), Reason::Unavailable, "{second}");
    LoopProvider.detach(&spec, attached).unwrap();
    let seen = LoopProvider.describe(&spec).unwrap();
    assert!(!seen.mounted && seen.devices.is_empty(), "{seen:?}");
    spec.formatted = true;
    LoopProvider.create(&spec).unwrap();
    let attached = LoopProvider.attach(&spec).unwrap();
    assert_eq!(fs::read(attached.root.join("x")).unwrap(), b"y");
    LoopProvider.detach(&spec, attached).unwrap();
}

#[test]
fn cleans_up_what_a_killed_node_left() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    LoopProvider.create(&spec).unwrap();
    let attached = LoopProvider.attach(&spec).unwrap();
    fs::write(attached.root.join("unsynced"), "kept by the page cache").unwrap();
    // A killed process keeps neither lock nor memory, but the mount and the device stay.
    drop(attached);
    let again = LoopProvider.attach(&spec).unwrap();
    assert_eq!(fs::read(again.root.join("unsynced")).unwrap(), b"kept by the page cache");
    let seen = LoopProvider.describe(&spec).unwrap();
    assert_eq!(seen.devices, std::slice::from_ref(&again.device));
    assert_eq!(mounts::at(&spec.mount_point).unwrap().len(), 1);
    LoopProvider.detach(&spec, again).unwrap();
    // Killed between attaching the device and mounting it.
    let tag = tag(&spec.mount_point, &spec.id).unwrap();
    attach_device(&spec.source, &tag).unwrap();
    assert_eq!(devices_with_tag(&tag).unwrap().len(), 1);
    let again = LoopProvider.attach(&spec).unwrap();
    assert_eq!(devices_with_tag(&tag).unwrap().len(), 1);
    LoopProvider.detach(&spec, again).unwrap();
    // Killed while formatting.
    fs::remove_file(&spec.source).unwrap();
    fs::write(spec.source.with_file_name("vol-test.img.new"), "half").unwrap();
    LoopProvider.create(&spec).unwrap();
    let again = LoopProvider.attach(&spec).unwrap();
    LoopProvider.detach(&spec, again).unwrap();
}

#[test]
fn a_read_only_flag_that_somebody_left_is_taken_away() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    LoopProvider.create(&spec).unwrap();
    let attached = LoopProvider.attach(&spec).unwrap();
    let device = PathBuf::from(&attached.device);
    LoopProvider.detach(&spec, attached).unwrap();
    let set = |flag: &str| Command::new("blockdev").arg(flag).arg(&device).status().unwrap();
    assert!(set("--setro").success());
    // Most likely it is the same device again: the free one with the lowest number.
    let attached = LoopProvider.attach(&spec).unwrap();
    fs::write(attached.root.join("x"), "written").unwrap();
    LoopProvider.detach(&spec, attached).unwrap();
    assert!(set("--setrw").success());
}

#[test]
fn a_journal_that_was_aborted_is_seen_although_reads_go_on() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    LoopProvider.create(&spec).unwrap();
    let attached = LoopProvider.attach(&spec).unwrap();
    let witness = attached.witness().unwrap();
    witness.check_journal().unwrap();
    witness.prove().unwrap();
    let changed = || {
        let meta = fs::metadata(attached.root.join(".shardfs-volume")).unwrap();
        (meta.ctime(), meta.ctime_nsec())
    };
    let before = changed();
    for _ in 0..100 {
        witness.check_journal().unwrap();
    }
    assert_eq!(changed(), before, "it changes nothing");
    let aborted = Command::new("mount").args(["-o", "remount,abort"]).arg(&attached.root).output().unwrap();
    assert!(aborted.status.success(), "{aborted:?}");
    witness.check().unwrap();
    assert!(witness.check_journal().is_err());
    assert!(witness.prove().is_err());
    drop(witness);
    LoopProvider.detach(&spec, attached).unwrap();
}

#[test]
fn a_node_leaves_the_devices_of_others_alone() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    LoopProvider.create(&spec).unwrap();
    let other = tag(&bench.dir.path().join("other-node/volumes/vol-test"), &spec.id).unwrap();
    let device = attach_device(&spec.source, &other).unwrap();
    let attached = LoopProvider.attach(&spec).unwrap();
    LoopProvider.detach(&spec, attached).unwrap();
    let left = devices_with_tag(&other).unwrap();
    detach_device(&device).unwrap();
    assert_eq!(left, [device]);
}

#[test]
fn refuses_to_format_anything_of_use() {
    let Some(bench) = Bench::new() else { return };
    let mut spec = bench.spec();
    fs::write(&spec.source, vec![7u8; 2 << 20]).unwrap();
    assert_eq!(LoopProvider.create(&spec).unwrap_err().reason(), Reason::InvalidArgument);
    assert_eq!(fs::read(&spec.source).unwrap(), vec![7u8; 2 << 20]);
    fs::remove_file(&spec.source).unwrap();
    // Another volume's filesystem.
    let file = File::create(&spec.source).unwrap();
    file.set_len(spec.size_bytes).unwrap();
    let other = VolumeSpec { id: VolumeId::new("other").unwrap(), ..spec.clone() };
    make_filesystem(&spec.source, &other.id, Target::SparseFile, marked_uuid(&other)).unwrap();
    let error = LoopProvider.create(&spec).unwrap_err();
    assert!(error.message().contains("volume other"), "{error}");
    assert!(!error.message().contains("remove"), "{error}");
    fs::remove_file(&spec.source).unwrap();
    // A volume that was in use and whose file is gone, or empty.
    spec.formatted = true;
    assert_eq!(LoopProvider.create(&spec).unwrap_err().reason(), Reason::Corrupt);
    File::create(&spec.source).unwrap().set_len(spec.size_bytes).unwrap();
    LoopProvider.create(&spec).unwrap();
    assert_eq!(LoopProvider.attach(&spec).unwrap_err().reason(), Reason::Corrupt);
    assert!(!LoopProvider.describe(&spec).unwrap().mounted);
}

#[test]
fn only_what_bears_the_volumes_own_identity_is_deleted_with_it() {
    let Some(bench) = Bench::new() else { return };
    let unused = bench.spec();
    let own = VolumeSpec { formatted: true, ..unused.clone() };
    let other = |formatted| VolumeSpec { id: VolumeId::new("other").unwrap(), formatted, ..unused.clone() };
    let elsewhere = |formatted| VolumeSpec { cluster_id: "c2".into(), formatted, ..unused.clone() };
    let is_left = |spec: &VolumeSpec, word: &str| {
        let why = LoopProvider.delete(spec).unwrap().unwrap();
        assert!(why.contains(word), "{why}");
        assert!(spec.source.exists(), "{why}");
    };
    LoopProvider.create(&unused).unwrap();
    let attached = LoopProvider.attach(&unused).unwrap();
    fs::write(attached.root.join("x"), "y").unwrap();
    // Also while it is in use.
    for formatted in [false, true] {
        is_left(&other(formatted), "volume vol-test of ShardFS");
        is_left(&elsewhere(formatted), "another cluster");
    }
    rustix::fs::syncfs(File::open(&attached.root).unwrap()).unwrap();
    LoopProvider.detach(&unused, attached).unwrap();
    is_left(&unused, "never served here");
    let attached = LoopProvider.attach(&own).unwrap();
    assert_eq!(fs::read(attached.root.join("x")).unwrap(), b"y");
    LoopProvider.detach(&own, attached).unwrap();
    assert_eq!(LoopProvider.delete(&own).unwrap(), None);
    assert!(!own.source.exists());
    assert_eq!(LoopProvider.delete(&own).unwrap(), None, "once more is harmless");

    // What was made for it and never in use.
    LoopProvider.create(&unused).unwrap();
    is_left(&other(false), "volume vol-test of ShardFS");
    assert_eq!(LoopProvider.delete(&unused).unwrap(), None);
    assert!(!unused.source.exists());

    // Of an older version: the UUID tells nothing, the record does.
    File::create(&own.source).unwrap().set_len(own.size_bytes).unwrap();
    let drawn = 0x0f8f_ad5b_d9cb_469f_a165_7086_7728_950e_u128.to_be_bytes();
    make_filesystem(&own.source, &own.id, Target::SparseFile, drawn).unwrap();
    is_left(&unused, "never served here");
    assert_eq!(LoopProvider.delete(&own).unwrap(), None);
    assert!(!own.source.exists());

    for (content, word) in
        [(&[0u8; 8192][..], "no filesystem"), (&[1; 8192], "unknown"), (b"a note", "unknown")]
    {
        fs::write(&own.source, content).unwrap();
        is_left(&unused, word);
        is_left(&own, word);
    }
    fs::remove_file(&own.source).unwrap();
    fs::create_dir(&own.source).unwrap();
    is_left(&own, "no file");
}

#[test]
fn the_volume_of_another_cluster_is_not_fenced() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    let takeover = |epoch| {
        let key = FenceKey::new(&NodeId::new("node-1").unwrap(), Epoch::new(epoch).unwrap()).unwrap();
        Takeover::new(key, std::time::Duration::from_secs(5))
    };
    LoopProvider.create(&spec).unwrap();
    let attached = LoopProvider.attach(&spec).unwrap();
    let mut other = VolumeSpec { cluster_id: "c2".into(), ..spec.clone() };
    other.mount_point = bench.dir.path().join("other/volumes/vol-test");
    // Whatever the record of the other cluster says.
    for formatted in [false, true] {
        other.formatted = formatted;
        LoopProvider.create(&other).unwrap();
        let standby = LoopProvider.attach_backup(&other).unwrap();
        let error = LoopProvider.fence().acquire(&other, &takeover(9)).unwrap_err();
        assert_eq!(error.reason(), Reason::InvalidArgument, "{error}");
        assert!(error.message().contains("another cluster than c2"), "{error}");
        fs::write(attached.root.join("x"), "it goes on").unwrap();
        rustix::fs::syncfs(File::open(&attached.root).unwrap()).unwrap();
        LoopProvider.detach_backup(&other, standby).unwrap();
    }
    LoopProvider.detach(&spec, attached).unwrap();
    // Its own node takes it with an earlier epoch: nothing was claimed.
    let standby = LoopProvider.attach_backup(&spec).unwrap();
    match LoopProvider.fence().capability(&spec) {
        Ok(_) => {
            let fenced = LoopProvider.fence().acquire(&spec, &takeover(2)).unwrap();
            let attached = LoopProvider.promote(&spec, standby, fenced).unwrap();
            LoopProvider.detach(&spec, attached).unwrap();
        }
        Err(error) => eprintln!("skipped: {error}"),
    }
}

#[test]
fn uuids_of_other_clusters_are_known() {
    let of = |cluster: &str, volume: &str| VolumeSpec {
        id: VolumeId::new(volume).unwrap(),
        cluster_id: cluster.into(),
        source: "/x".into(),
        size_bytes: 0,
        formatted: true,
        mount_point: "/y".into(),
        allow_unfenced: false,
    };
    let spec = of("c1", "vol-1");
    let drawn = |text: &str| u128::from_str_radix(text, 16).unwrap().to_be_bytes();
    for (found, anothers, what) in [
        (marked_uuid(&spec), false, "its own"),
        (marked_uuid(&of("c2", "vol-1")), true, "of another cluster"),
        (marked_uuid(&of("c1", "vol-2")), true, "of another volume"),
        (drawn("0f8fad5bd9cb469fa16570867728950e"), false, "drawn by mkfs"),
        (drawn("0f8fad5bd9cb169fa16570867728950e"), false, "made of the time by mkfs"),
        (drawn("0f8fad5bd9cb869f216570867728950e"), false, "of another variant"),
        (drawn("0f8fad5bd9cb869fa16570867728950e"), true, "made by somebody"),
        ([0; 16], false, "none"),
    ] {
        assert_eq!(is_anothers(found, &spec), anothers, "{what}");
    }
    assert_eq!((marked_uuid(&spec)[6] >> 4, marked_uuid(&spec)[8] >> 6), (8, 0b10));
}

#[test]
fn formats_an_operators_empty_file() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    File::create(&spec.source).unwrap().set_len(spec.size_bytes).unwrap();
    LoopProvider.create(&spec).unwrap();
    let attached = LoopProvider.attach(&spec).unwrap();
    LoopProvider.detach(&spec, attached).unwrap();
}

#[test]
fn content_is_classified() {
    assert_eq!(classify(&[0; PROBE_BYTES]), Content::Zeros);
    assert_eq!(classify(&[]), Content::Zeros);
    assert_eq!(classify(&[1]), Content::Unknown);
    let mut bytes = vec![0; 4096];
    bytes[1024 + 56..1024 + 58].copy_from_slice(&[0x53, 0xEF]);
    bytes[1024 + 120..1024 + 125].copy_from_slice(b"sfs-x");
    assert_eq!(classify(&bytes), Content::Ext4 { label: b"sfs-x".to_vec() });
    assert_eq!(label(&VolumeId::new("a-rather-long-volume").unwrap()), "sfs-a-rather-lon");
}

#[test]
fn a_volume_grows_while_it_is_used_and_what_was_cut_off_goes_on() {
    let Some(bench) = Bench::new().filter(|_| may_enlarge()) else { return };
    let mut spec = bench.spec();
    LoopProvider.create(&spec).unwrap();
    let attached = LoopProvider.attach(&spec).unwrap();
    let place = Place { root: attached.root.clone(), device: PathBuf::from(&attached.device) };
    let total = || rustix::fs::statvfs(&place.root).map(|stat| stat.f_blocks * stat.f_frsize).unwrap();
    let file = File::create(place.root.join("open")).unwrap();
    let before = total();
    let grow = |spec: &VolumeSpec| while !LoopProvider.grow(spec, &place).unwrap() {};
    grow(&spec);
    assert_eq!(total(), before);
    // Somebody was cut off after the first step.
    spec.size_bytes = 512 << 20;
    OpenOptions::new().write(true).open(&spec.source).unwrap().set_len(spec.size_bytes).unwrap();
    grow(&spec);
    assert!(total() > before + (350 << 20), "{} of {}", total(), spec.size_bytes);
    // More than it had room for.
    let mut file = std::io::BufWriter::new(file);
    for _ in 0..200 {
        std::io::Write::write_all(&mut file, &vec![7u8; 1 << 20]).unwrap();
    }
    drop(file);
    spec.size_bytes = 256 << 20;
    grow(&spec);
    assert_eq!(fs::metadata(&spec.source).unwrap().len(), 512 << 20, "it never shrinks");
    LoopProvider.detach(&spec, attached).unwrap();
    let checked = Command::new("fsck.ext4").arg("-fn").arg(&spec.source).output().unwrap();
    assert!(checked.status.success(), "{checked:?}");
    spec.formatted = true;
    let attached = LoopProvider.attach(&spec).unwrap();
    assert_eq!(fs::metadata(attached.root.join("open")).unwrap().len(), 200 << 20);
    LoopProvider.detach(&spec, attached).unwrap();
}

/// A backup's device is as large as the file was when it was made.
#[test]
fn a_backup_that_attached_before_the_volume_grew_serves_all_of_it() {
    let Some(bench) = Bench::new().filter(|_| may_enlarge()) else { return };
    let mut spec = bench.spec();
    LoopProvider.create(&spec).unwrap();
    let standby = LoopProvider.attach_backup(&spec).unwrap();
    let other = VolumeSpec { mount_point: bench.dir.path().join("others/vol-test"), ..spec.clone() };
    let attached = LoopProvider.attach(&other).unwrap();
    let place = Place { root: attached.root.clone(), device: PathBuf::from(&attached.device) };
    spec.size_bytes = 256 << 20;
    let larger = VolumeSpec { size_bytes: spec.size_bytes, ..other.clone() };
    while !LoopProvider.grow(&larger, &place).unwrap() {}
    LoopProvider.detach(&other, attached).unwrap();
    spec.formatted = true;
    let me = FenceKey::new(&NodeId::new("node-a").unwrap(), Epoch::new(2).unwrap()).unwrap();
    let takeover = Takeover::new(me, std::time::Duration::from_secs(5));
    let fenced = LoopProvider.fence().acquire(&spec, &takeover).unwrap();
    let attached = LoopProvider.promote(&spec, standby, fenced).unwrap();
    let total = rustix::fs::statvfs(&attached.root).map(|stat| stat.f_blocks * stat.f_frsize).unwrap();
    assert!(total > 200 << 20, "{total}");
    LoopProvider.detach(&spec, attached).unwrap();
}

#[test]
fn what_a_killed_process_has_left_is_taken_away_and_nothing_else() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec();
    let (at, folder) = (spec.mount_point.clone(), spec.mount_point.parent().unwrap());
    let take_away = || leftovers::take_away(&spec.cluster_id, &spec.id, &at);
    LoopProvider.create(&spec).unwrap();
    assert!(!take_away().unwrap(), "never attached");
    let attached = LoopProvider.attach(&spec).unwrap();
    fs::write(attached.root.join("k"), "v").unwrap();
    let others = folder.join("others");
    fs::create_dir(&others).unwrap();
    fs::write(folder.join("file"), "no place").unwrap();
    let found: Vec<String> = leftovers::places(folder).unwrap().iter().map(ToString::to_string).collect();
    assert_eq!(found, ["others", "vol-test"]);
    assert!(leftovers::places(&folder.join("none")).unwrap().is_empty());
    take_away().expect_err("a process has it");
    assert_eq!(mounts::at(&at).unwrap().len(), 1);

    // The locks go with a process; its mount and its device do not.
    drop(attached);
    assert!(take_away().unwrap());
    assert!(mounts::at(&at).unwrap().is_empty());
    assert!(devices_with_tag(&tag(&at, &spec.id).unwrap()).unwrap().is_empty());
    assert!(!take_away().unwrap(), "once");

    // Views as well.
    let spec = VolumeSpec { formatted: true, ..spec.clone() };
    let views = bench.dir.path().join("views/vol-test");
    drop(LoopProvider.open_view(&spec, &views.join("1")).unwrap());
    assert!(leftovers::take_away_views(&spec.cluster_id, &spec.id, &views).unwrap());
    assert!(!leftovers::take_away_views(&spec.cluster_id, &spec.id, &views).unwrap());

    // What somebody else has mounted in such a place stays.
    rustix::mount::mount("none", &others, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let refused = leftovers::take_away(&spec.cluster_id, &VolumeId::new("others").unwrap(), &others);
    let stays = mounts::at(&others).unwrap().len();
    mounts::unmount_all(&others).unwrap();
    assert_eq!(stays, 1);
    refused.expect_err("not this node's");

    // The content is what it was.
    let again = LoopProvider.attach(&spec).unwrap();
    assert_eq!(fs::read(again.root.join("k")).unwrap(), b"v");
    LoopProvider.detach(&spec, again).unwrap();
}
