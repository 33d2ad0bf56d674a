//! Real loop devices and mounts; without root they say that they are skipped.

use std::sync::atomic::{AtomicBool, Ordering};

use super::super::LoopProvider;
use super::*;
use crate::volume::VolumeProvider;
use crate::volume::fence::{FenceKey, Takeover};
use shardfs_proto::types::{Epoch, NodeId, VolumeId};

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

    /// What a node knows of the volume.
    fn spec(&self, node: &str) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId::new("vol-test").unwrap(),
            cluster_id: "c1".into(),
            source: self.dir.path().join("vol-test.img"),
            size_bytes: 96 << 20,
            formatted: false,
            mount_point: self.dir.path().join(node).join("volumes/vol-test"),
            allow_unfenced: false,
        }
    }

    fn views(&self, node: &str) -> PathBuf {
        self.dir.path().join(node).join("views/vol-test")
    }

    fn devices(&self) -> usize {
        let backing = sys::Backing::of(&self.spec("a").source).unwrap();
        sys::devices().unwrap().iter().filter(|device| device.backing == backing).count()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for node in ["a", "b"] {
            let spec = self.spec(node);
            if let Err(error) = clean_up(&spec, &self.views(node)) {
                eprintln!("cleaning up a test: {error}");
            }
            if let Err(error) =
                tag(&spec.mount_point, &spec.id).and_then(|tag| super::super::clean_up(&spec, &tag))
            {
                eprintln!("cleaning up a test: {error}");
            }
        }
    }
}

fn written(root: &Path, name: &str, byte: u8) {
    fs::write(root.join(name), vec![byte; 300_000]).unwrap();
}

#[test]
fn a_view_shows_what_was_settled_and_writes_nothing() {
    let Some(bench) = Bench::new() else { return };
    let (a, b) = (bench.spec("a"), bench.spec("b"));
    LoopProvider.create(&a).unwrap();
    let attached = LoopProvider.attach(&a).unwrap();
    let root = attached.root.clone();
    // An orphan: without a device that refuses writes, a mount would clean it up.
    written(&root, "orphan", 1);
    let orphan = File::open(root.join("orphan")).unwrap();
    fs::remove_file(root.join("orphan")).unwrap();
    fs::create_dir(root.join("view-1")).unwrap();
    written(&root.join("view-1"), "file", 7);
    LoopProvider.settle(&root).unwrap();
    let mut first = LoopProvider.open_view(&b, &bench.views("b").join("1")).unwrap();
    assert_eq!(fs::read(first.root().join("view-1/file")).unwrap(), vec![7; 300_000]);
    assert!(fs::write(first.root().join("x"), "y").is_err());
    let kept = File::open(first.root().join("view-1/file")).unwrap();

    // The primary goes on: another view, a name that goes, files that take the room.
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut n = 0u32;
            while !stop.load(Ordering::Relaxed) {
                written(&root, &format!("busy-{}", n % 40), n as u8);
                n += 1;
                if n.is_multiple_of(8) {
                    File::open(&root).unwrap().sync_all().unwrap();
                }
            }
        });
        for n in 2..8u8 {
            let folder = root.join(format!("view-{n}"));
            fs::create_dir(&folder).unwrap();
            written(&folder, "file", n);
            LoopProvider.settle(&root).unwrap();
            let mut view = LoopProvider.open_view(&b, &bench.views("b").join(n.to_string())).unwrap();
            let path = view.root().join(format!("view-{n}/file"));
            assert_eq!(fs::read(path).unwrap(), vec![n; 300_000], "view {n}");
            assert_eq!(view.retire().unwrap().sectors_written, Some(0));
        }
        stop.store(true, Ordering::Relaxed);
    });
    // What is open shows what it showed.
    use std::os::unix::fs::FileExt;
    let mut content = vec![0; 300_000];
    kept.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(content, vec![7; 300_000]);
    drop(kept);
    assert_eq!(first.retire().unwrap().sectors_written, Some(0));
    assert_eq!(bench.devices(), 1, "only the primary's");
    drop(orphan);
    LoopProvider.detach(&a, attached).unwrap();
}

#[test]
fn a_killed_backup_leaves_nothing_to_its_successor() {
    let Some(bench) = Bench::new() else { return };
    let (a, b) = (bench.spec("a"), bench.spec("b"));
    LoopProvider.create(&a).unwrap();
    let attached = LoopProvider.attach(&a).unwrap();
    LoopProvider.settle(&attached.root).unwrap();
    for n in ["1", "2"] {
        // Not retired, as by a process that was killed.
        drop(LoopProvider.open_view(&b, &bench.views("b").join(n)).unwrap());
    }
    assert_eq!(bench.devices(), 3);
    LoopProvider.clean_views(&b, &bench.views("b")).unwrap();
    assert_eq!(bench.devices(), 1);
    assert_eq!(fs::read_dir(bench.views("b")).unwrap().count(), 0);
    // The next one is at a place of the same name.
    let mut view = LoopProvider.open_view(&b, &bench.views("b").join("1")).unwrap();
    view.retire().unwrap();
    LoopProvider.detach(&a, attached).unwrap();
}

#[test]
fn views_hinder_neither_fence_nor_promotion() {
    let Some(bench) = Bench::new() else { return };
    let (a, b) = (bench.spec("a"), bench.spec("b"));
    LoopProvider.create(&a).unwrap();
    let old = LoopProvider.attach(&a).unwrap();
    written(&old.root, "file", 5);
    LoopProvider.settle(&old.root).unwrap();
    let standby = LoopProvider.attach_backup(&b).unwrap();
    let mut view = LoopProvider.open_view(&b, &bench.views("b").join("1")).unwrap();
    let kept = File::open(view.root().join("file")).unwrap();
    let key = FenceKey::new(&NodeId::new("b").unwrap(), Epoch::new(2).unwrap()).unwrap();
    let takeover = Takeover::new(key, std::time::Duration::from_secs(10));
    let fenced = LoopProvider.fence().acquire(&b, &takeover).unwrap();
    let new = LoopProvider.promote(&b, standby, fenced).unwrap();
    written(&new.root, "file-2", 6);
    // The view was not mistaken for somebody who writes.
    use std::os::unix::fs::FileExt;
    let mut content = vec![0; 300_000];
    kept.read_exact_at(&mut content, 0).unwrap();
    assert_eq!(content, vec![5; 300_000]);
    drop(kept);
    assert_eq!(view.retire().unwrap().sectors_written, Some(0));
    LoopProvider.detach(&b, new).unwrap();
    drop(old);
}
