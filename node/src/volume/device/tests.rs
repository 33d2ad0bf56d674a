//! Loop devices stand for whole devices; they have no reservations, so all but the fence is seen here. The fence is tried on
//! a real target by `make test-vm`.

use shardfs_proto::types::{Epoch, NodeId, VolumeId};

use super::*;
use crate::volume::fence::{FenceKey, Takeover, required};

/// A loop device, which goes with the test.
struct Bench {
    dir: tempfile::TempDir,
    device: PathBuf,
    _mounts: mounts::MountsGuard,
}

impl Bench {
    fn new() -> Option<Bench> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: loop devices need root and /dev/loop-control");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("disk");
        File::create(&file).unwrap().set_len(96 << 20).unwrap();
        let mut tag = [0; sys::LO_NAME_BYTES];
        tag[..12].copy_from_slice(b"shardfs-test");
        let device = sys::attach_device(&file, &tag).unwrap();
        sys::set_read_only(&device, &open(&device, false).unwrap(), false).unwrap();
        Some(Bench { dir, device, _mounts: mounts::MountsGuard::shared() })
    }

    fn spec(&self, node: &str) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId::new("vol-test").unwrap(),
            cluster_id: "c1".into(),
            source: self.device.clone(),
            size_bytes: 0,
            formatted: false,
            mount_point: self.dir.path().join(node).join("vol-test"),
            allow_unfenced: true,
        }
    }

    fn win(&self, spec: &VolumeSpec, standby: Standby, epoch: u64) -> Result<Attached> {
        let key = FenceKey::new(&NodeId::new("node-1").unwrap(), Epoch::new(epoch).unwrap()).unwrap();
        let takeover = Takeover::new(key, std::time::Duration::from_secs(5));
        let fenced = DeviceProvider.fence().acquire(spec, &takeover)?;
        DeviceProvider.promote(spec, standby, fenced)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for node in ["a", "b"] {
            if let Err(error) = mounts::unmount_all(&self.dir.path().join(node).join("vol-test")) {
                eprintln!("cleaning up a test: {error}");
            }
        }
        if let Err(error) = sys::detach_device(&self.device) {
            eprintln!("cleaning up a test: {error}");
        }
    }
}

#[test]
fn is_formatted_once_and_moves_between_roles() {
    let Some(bench) = Bench::new() else { return };
    let mut spec = bench.spec("a");
    DeviceProvider.create(&spec).unwrap();
    let standby = DeviceProvider.attach_backup(&spec).unwrap();
    assert_eq!(ext4::probe(&bench.device).unwrap(), Content::Zeros, "a backup writes nothing");
    let attached = bench.win(&spec, standby, 2).unwrap();
    fs::write(attached.root.join("x"), "y").unwrap();
    let standby = DeviceProvider.demote(&spec, attached).unwrap();
    assert!(!DeviceProvider.describe(&spec).unwrap().mounted);
    // The record lags behind: it says that the device was never in use.
    let attached = bench.win(&spec, standby, 3).unwrap();
    assert_eq!(fs::read(attached.root.join("x")).unwrap(), b"y");
    // A process that was killed leaves its mount.
    drop(attached);
    spec.formatted = true;
    let standby = DeviceProvider.attach_backup(&spec).unwrap();
    assert!(mounts::at(&spec.mount_point).unwrap().is_empty());
    let attached = bench.win(&spec, standby, 4).unwrap();
    assert_eq!(fs::read(attached.root.join("x")).unwrap(), b"y");
    DeviceProvider.detach(&spec, attached).unwrap();
}

#[test]
fn two_nodes_do_not_share_a_path() {
    let Some(bench) = Bench::new() else { return };
    let (a, b) = (bench.spec("a"), bench.spec("b"));
    let standby = DeviceProvider.attach_backup(&a).unwrap();
    let error = DeviceProvider.attach_backup(&b).unwrap_err();
    assert_eq!(error.reason(), Reason::Unavailable, "{error}");
    let attached = bench.win(&a, standby, 2).unwrap();
    // The process is dead, its mount is there.
    drop(attached);
    let error = DeviceProvider.attach_backup(&b).unwrap_err();
    assert_eq!(error.reason(), Reason::Unavailable, "{error}");
    assert!(mounts::at(&a.mount_point).unwrap().len() == 1);
}

#[test]
fn a_formatting_that_was_cut_off_is_begun_again() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec("a");
    write_first_sector(&bench.device, &mark(&spec)).unwrap();
    open(&bench.device, true).unwrap().write_all_at(b"half of an inode table", 40_960).unwrap();
    let other = VolumeSpec { cluster_id: "c2".into(), ..bench.spec("b") };
    let standby = DeviceProvider.attach_backup(&other).unwrap();
    assert_eq!(bench.win(&other, standby, 2).unwrap_err().reason(), Reason::InvalidArgument);
    let standby = DeviceProvider.attach_backup(&spec).unwrap();
    let attached = bench.win(&spec, standby, 2).unwrap();
    DeviceProvider.detach(&spec, attached).unwrap();
    let mut sector = [1; MARK_BYTES];
    open(&bench.device, false).unwrap().read_exact_at(&mut sector, 0).unwrap();
    assert_eq!(sector, [0; MARK_BYTES]);
}

#[test]
fn what_holds_something_else_is_never_formatted() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec("a");
    let write = |at: u64, bytes: &[u8]| open(&bench.device, true).unwrap().write_all_at(bytes, at).unwrap();
    write(510, &[0x55, 0xAA]);
    let error = bench.win(&spec, DeviceProvider.attach_backup(&spec).unwrap(), 2).unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument, "{error}");
    assert_eq!(inspect(&bench.device).unwrap().holds, Holds::Unknown);
    write(510, &[0, 0]);
    assert_eq!(inspect(&bench.device).unwrap().holds, Holds::Nothing);
    let foreign = [7; ext4::UUID_BYTES];
    make_filesystem(&bench.device, &VolumeId::new("other").unwrap(), Target::Device, foreign).unwrap();
    let error = bench.win(&spec, DeviceProvider.attach_backup(&spec).unwrap(), 2).unwrap_err();
    assert!(error.message().contains("sfs-other"), "{error}");
    // Its own label, of another cluster: seen before anything is taken from anybody.
    make_filesystem(&bench.device, &spec.id, Target::Device, foreign).unwrap();
    assert_eq!(DeviceProvider.create(&spec).unwrap_err().reason(), Reason::InvalidArgument);
    format(&spec, &bench.device).unwrap();
    DeviceProvider.create(&spec).unwrap();
    assert_eq!(inspect(&bench.device).unwrap().holds, Holds::Volume("sfs-vol-test".into()));
    let attached = bench.win(&spec, DeviceProvider.attach_backup(&spec).unwrap(), 2).unwrap();
    DeviceProvider.detach(&spec, attached).unwrap();
    let other = VolumeSpec { cluster_id: "c2".into(), ..bench.spec("b") };
    let error = bench.win(&other, DeviceProvider.attach_backup(&other).unwrap(), 3).unwrap_err();
    assert_eq!(error.reason(), Reason::InvalidArgument, "{error}");
    assert!(mounts::at(&other.mount_point).unwrap().is_empty());
    // It was in use before and is empty now.
    write(0, &[0; ext4::PROBE_BYTES]);
    let used = VolumeSpec { formatted: true, ..spec };
    let error = bench.win(&used, DeviceProvider.attach_backup(&used).unwrap(), 3).unwrap_err();
    assert_eq!(error.reason(), Reason::Corrupt, "{error}");
}

#[test]
fn without_reservations_it_is_refused_unless_allowed() {
    let Some(bench) = Bench::new() else { return };
    let mut spec = bench.spec("a");
    assert_eq!(required(DeviceProvider.fence(), &spec).unwrap(), FenceKind::None);
    spec.allow_unfenced = false;
    let error = required(DeviceProvider.fence(), &spec).unwrap_err();
    assert_eq!(error.reason(), Reason::Unsupported, "{error}");
    let standby = DeviceProvider.attach_backup(&spec).unwrap();
    assert_eq!(bench.win(&spec, standby, 2).unwrap_err().reason(), Reason::Unsupported);
    assert_eq!(ext4::probe(&bench.device).unwrap(), Content::Zeros);
}

#[test]
fn what_is_no_whole_device_is_refused() {
    let Some(bench) = Bench::new() else { return };
    let file = VolumeSpec { source: bench.dir.path().join("disk"), ..bench.spec("a") };
    assert_eq!(DeviceProvider.create(&file).unwrap_err().reason(), Reason::InvalidArgument);
    let gone = VolumeSpec { source: "/dev/no-such-device".into(), ..bench.spec("a") };
    let error = DeviceProvider.create(&gone).unwrap_err();
    assert_eq!(error.reason(), Reason::NotFound);
    assert!(error.message().contains("--device vol-test="), "{error}");
    assert!(!DeviceProvider.describe(&gone).unwrap().exists);
}
