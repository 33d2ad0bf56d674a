//! Volumes on real folders and real loop devices.

use std::fs;
use std::path::Path;

use shardfs_proto::types::{NodeId, Reason, VolumeId};

use super::*;

fn spec(dir: &Path, id: &str, provider: &str) -> VolumeSpec {
    VolumeSpec {
        id: VolumeId::new(id).unwrap(),
        node: NodeId::new(format!("test-{}", std::process::id())).unwrap(),
        source: dir.join(format!("{id}.{provider}")),
        size_bytes: if provider == loopdev::NAME { loopdev::SIZE_BYTES_MIN } else { 0 },
        mount_point: dir.join("volumes").join(id),
    }
}

/// Loop devices need root; without it the tests say so.
fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: loop devices need root");
    }
    root
}

/// Detaches when the test ends, however it ends.
struct Cleanup(VolumeSpec);

impl Drop for Cleanup {
    fn drop(&mut self) {
        if let Ok(attachment) = loopdev::LoopProvider.attach(&self.0) {
            let _ = attachment.detach();
        }
    }
}

#[test]
fn a_folder_is_attached_once() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), "vol-1", "dir");
    let provider = provider("dir").unwrap();
    let first = provider.attach(&spec).unwrap();
    fs::write(first.root().join("x"), "y").unwrap();
    assert_eq!(fs::read_to_string(spec.source.join("x")).unwrap(), "y");
    assert_eq!(provider.attach(&spec).err().unwrap().reason(), Reason::Unavailable);
    assert!(provider.describe(&spec).unwrap().mounted);
    first.detach().unwrap();
    provider.attach(&spec).unwrap().detach().unwrap();
    provider.delete(&spec).unwrap();
    assert!(!spec.source.exists());
}

#[test]
fn a_foreign_folder_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut spec = spec(dir.path(), "vol-1", "dir");
    fs::create_dir_all(&spec.source).unwrap();
    fs::write(spec.source.join("somebody's"), "data").unwrap();
    assert_eq!(dir::DirProvider.attach(&spec).err().unwrap().reason(), Reason::Corrupt);
    fs::remove_file(spec.source.join("somebody's")).unwrap();
    dir::DirProvider.attach(&spec).unwrap().detach().unwrap();
    spec.id = VolumeId::new("vol-2").unwrap();
    let error = dir::DirProvider.attach(&spec).err().unwrap();
    assert!(error.message().contains("vol-1"), "{error}");
}

#[test]
fn a_loop_volume_lives_through_attach_crash_and_detach() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), "vol-1", "loop");
    let _cleanup = Cleanup(spec.clone());
    let provider = provider("loop").unwrap();
    assert!(!provider.describe(&spec).unwrap().exists);
    let attachment = provider.attach(&spec).unwrap();
    fs::write(attachment.root().join("kept"), "bytes").unwrap();
    let described = provider.describe(&spec).unwrap();
    assert!(described.mounted && described.exists && described.size_bytes == spec.size_bytes);
    assert_eq!(provider.delete(&spec).unwrap_err().reason(), Reason::Unavailable);
    // A killed node leaves its mount and device: the next attach clears them.
    std::mem::drop(attachment);
    let attachment = provider.attach(&spec).unwrap();
    assert_eq!(fs::read_to_string(attachment.root().join("kept")).unwrap(), "bytes");
    // Busy: clear error, and everything as it was.
    let held = fs::File::open(attachment.root().join("kept")).unwrap();
    assert_eq!(attachment.detach().unwrap_err().reason(), Reason::Unavailable);
    drop(held);
    attachment.detach().unwrap();
    attachment.detach().unwrap();
    let described = provider.describe(&spec).unwrap();
    assert!(!described.mounted && described.device.is_none());
    provider.delete(&spec).unwrap();
}

#[test]
fn foreign_data_is_never_formatted() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), "vol-1", "loop");
    let mut bytes = vec![0u8; spec.size_bytes as usize];
    bytes[700_000] = 1;
    fs::write(&spec.source, &bytes).unwrap();
    let error = loopdev::LoopProvider.attach(&spec).err().unwrap();
    assert_eq!(error.reason(), Reason::Corrupt);
    assert!(loopdev::LoopProvider.describe(&spec).unwrap().device.is_none(), "left attached");
    assert_eq!(fs::read(&spec.source).unwrap(), bytes);
}

#[test]
fn a_volume_under_another_id_is_refused() {
    if !root() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let one = spec(dir.path(), "vol-1", "loop");
    let _cleanup = Cleanup(one.clone());
    loopdev::LoopProvider.attach(&one).unwrap().detach().unwrap();
    let two = VolumeSpec { source: one.source.clone(), ..spec(dir.path(), "vol-2", "loop") };
    let error = loopdev::LoopProvider.attach(&two).err().unwrap();
    assert_eq!(error.reason(), Reason::Corrupt);
    assert!(loopdev::LoopProvider.describe(&two).unwrap().device.is_none(), "left attached");
}

#[test]
fn room_keeps_a_reserve() {
    let dir = tempfile::tempdir().unwrap();
    let room = VolumeRoom::new(dir.path()).unwrap();
    assert!(room.growth_bytes() < room.free_bytes());
    assert!(room.free_bytes() <= room.total_bytes());
}

#[test]
fn sizes_and_names_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    let mut small = spec(dir.path(), "vol-1", "loop");
    small.size_bytes = 4096;
    assert_eq!(loopdev::LoopProvider.create(&small).unwrap_err().reason(), Reason::InvalidArgument);
    assert!(provider("nvme").is_err());
}
