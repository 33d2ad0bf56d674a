//! Real loop devices and mounts; without root they say that they are skipped.

use std::path::PathBuf;
use std::process::Command;

use shardfs_proto::types::Reason;

use super::super::ext4::{PROBE_BYTES, classify, label};
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
    let written = || sys::sectors_written(Path::new(&attached.device)).unwrap();
    witness.check_journal().unwrap();
    witness.prove().unwrap();
    let before = written();
    for _ in 0..100 {
        witness.check_journal().unwrap();
    }
    rustix::fs::syncfs(File::open(&attached.root).unwrap()).unwrap();
    assert_eq!(written(), before, "it changes nothing");
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
    make_filesystem(&spec.source, &VolumeId::new("other").unwrap(), Target::SparseFile).unwrap();
    let error = LoopProvider.create(&spec).unwrap_err();
    assert!(error.message().contains("sfs-other"), "{error}");
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
