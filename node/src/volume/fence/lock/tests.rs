//! Locks of processes that are stopped, killed and resumed.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use shardfs_proto::types::{Epoch, NodeId, VolumeId};

use super::*;
use crate::volume::VolumeProvider;
use crate::volume::dir::DirProvider;

fn spec(dir: &Path, node: &str) -> VolumeSpec {
    VolumeSpec {
        id: VolumeId::new("vol-1").unwrap(),
        cluster_id: "c1".into(),
        source: dir.join("backing"),
        size_bytes: 0,
        formatted: false,
        mount_point: dir.join(node).join("volumes/vol-1"),
        allow_unfenced: false,
    }
}

fn takeover(node: &str, epoch: u64) -> Takeover {
    let key = FenceKey::new(&NodeId::new(node).unwrap(), Epoch::new(epoch).unwrap()).unwrap();
    Takeover::new(key, Duration::from_millis(200))
}

/// Holds the folder's lock.
struct Holder(Child);

impl Holder {
    fn start(folder: &Path) -> Holder {
        let script = "exec 9<\"$0\"; flock -x 9; echo; exec sleep 60";
        let mut child =
            Command::new("bash").arg("-c").arg(script).arg(folder).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = [0u8; 1];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        Holder(child)
    }

    fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.0), signal).unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_stopped_holder_is_waited_for_in_vain_and_a_killed_one_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let new = spec(dir.path(), "new");
    DirProvider.create(&new).unwrap();
    assert_eq!(LockFence.capability(&new).unwrap(), FenceKind::Lock);
    let holder = Holder::start(&new.source);
    holder.signal(rustix::process::Signal::STOP);
    let error = LockFence.acquire(&new, &takeover("new", 2)).unwrap_err();
    assert_eq!(error.reason(), Reason::Unavailable);
    assert!(error.message().contains("no device fence"), "{error}");
    drop(holder);
    let standby = DirProvider.attach_backup(&new).unwrap();
    let fenced = LockFence.acquire(&new, &takeover("new", 2)).unwrap();
    let attached = DirProvider.promote(&new, standby, fenced).unwrap();
    fs::write(attached.root.join("x"), "y").unwrap();
    assert!(LockFence.still_held(&new, takeover("new", 2).key).unwrap());
    // While it is attached nobody else has it; afterwards only a later epoch.
    let other = spec(dir.path(), "other");
    assert_eq!(LockFence.acquire(&other, &takeover("other", 3)).unwrap_err().reason(), Reason::Unavailable);
    let standby = DirProvider.demote(&new, attached).unwrap();
    assert!(!new.mount_point.exists());
    DirProvider.detach_backup(&new, standby).unwrap();
    assert_eq!(LockFence.acquire(&other, &takeover("other", 2)).unwrap_err().reason(), Reason::StaleEpoch);
    let standby = DirProvider.attach_backup(&other).unwrap();
    let fenced = LockFence.acquire(&other, &takeover("other", 3)).unwrap();
    assert!(!LockFence.still_held(&new, takeover("new", 2).key).unwrap());
    let attached = DirProvider.promote(&other, standby, fenced).unwrap();
    assert_eq!(fs::read(attached.root.join("x")).unwrap(), b"y");
}

#[test]
fn a_folder_is_not_promoted_without_its_lock() {
    let dir = tempfile::tempdir().unwrap();
    let spec = spec(dir.path(), "new");
    DirProvider.create(&spec).unwrap();
    let standby = DirProvider.attach_backup(&spec).unwrap();
    let without = super::super::unfenced(takeover("new", 1).key);
    assert_eq!(DirProvider.promote(&spec, standby, without).unwrap_err().reason(), Reason::InvalidArgument);
}
