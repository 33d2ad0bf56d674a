//! Real loop devices, ext4 and processes; without root they say that they are skipped.

use std::fs;
use std::process::Command;

use rustix::process::Signal;

use super::old_primary::*;
use super::*;
use crate::volume::loopdev::LoopProvider;
use crate::volume::mounts::MountsGuard;
use crate::volume::{Attached, VolumeProvider};

/// A volume and its nodes' folders; takes everything down.
struct Bench {
    dir: tempfile::TempDir,
    _mounts: MountsGuard,
}

impl Bench {
    fn new() -> Option<Bench> {
        Self::with(MountsGuard::shared())
    }

    fn with(mounts: MountsGuard) -> Option<Bench> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: loop devices need root and /dev/loop-control");
            return None;
        }
        let bench = Bench { dir: tempfile::tempdir().unwrap(), _mounts: mounts };
        LoopProvider.create(&bench.spec("old")).unwrap();
        if let Err(error) = ShutdownFence.capability(&bench.spec("old")) {
            eprintln!("skipped: {error}");
            return None;
        }
        Some(bench)
    }

    fn spec(&self, node: &str) -> VolumeSpec {
        spec(self.dir.path(), node)
    }

    fn start(&self, mode: Mode) -> OldPrimary {
        OldPrimary::start(self.dir.path(), mode, &[])
    }

    fn acquire(&self, node: &str, epoch: u64) -> Result<Fenced> {
        ShutdownFence.acquire(&self.spec(node), &Takeover::new(key(node, epoch), BOUND))
    }

    /// Attaches, fences, mounts.
    fn win(&self, node: &str, epoch: u64) -> Attached {
        let standby = LoopProvider.attach_backup(&self.spec(node)).unwrap();
        let fenced = self.acquire(node, epoch).unwrap();
        eprintln!("{fenced}");
        LoopProvider.promote(&self.spec(node), standby, fenced).unwrap()
    }

    fn device_of(&self, node: &str) -> Option<LoopDevice> {
        let spec = self.spec(node);
        let tag = loopdev::tag(&spec.mount_point, &spec.id).unwrap();
        sys::devices().unwrap().into_iter().find(|d| d.tag == tag)
    }

    fn image(&self) -> u64 {
        // Not from this kernel's cache of the file: devices write around it.
        Command::new("sync").status().unwrap();
        let bytes = fs::read(self.spec("old").source).unwrap();
        u64::from(crc32c::crc32c(&bytes)) << 32 | bytes.len() as u64
    }

    fn check_filesystem(&self) {
        let output = Command::new("e2fsck")
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .arg("-fn")
            .arg(self.spec("old").source)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        for node in ["old", "new", "third"] {
            let spec = self.spec(node);
            let Ok(standby) = LoopProvider.attach_backup(&spec) else {
                eprintln!("cleaning up a test: {} stays", spec.mount_point.display());
                continue;
            };
            if let Err(error) = LoopProvider.detach_backup(&spec, standby) {
                eprintln!("cleaning up a test: {error}");
            }
        }
    }
}

fn counters(device: &LoopDevice) -> quiet::Counters {
    let text = fs::read_to_string(Path::new("/sys/block").join(&device.name).join("stat")).unwrap();
    quiet::Counters::parse(&text).unwrap()
}

fn all_there(root: &Path, writer: &str, files: impl IntoIterator<Item = usize>) {
    for i in files {
        let path = root.join(name(writer, i));
        let found = fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        assert!(found == content(writer, i), "{} is damaged", path.display());
    }
}

fn write_synced(root: &Path, writer: &str, files: std::ops::Range<usize>) {
    for i in files {
        let mut file = File::create_new(root.join(name(writer, i))).unwrap();
        std::io::Write::write_all(&mut file, &content(writer, i)).unwrap();
        file.sync_all().unwrap();
    }
}

fn all_failed(report: &[(String, String)]) {
    assert!(report.len() > 10, "{report:?}");
    // What is under way when the journal is aborted may hear of a read-only filesystem.
    let failed = |what: &str, result: &str| match what {
        "device" => result == libc::EPERM.to_string(),
        "synced write" => [libc::EIO, libc::EROFS].iter().any(|errno| result == errno.to_string()),
        _other => result == libc::EIO.to_string(),
    };
    let wrong: Vec<_> =
        report.iter().filter(|(what, result)| what != "demote" && !failed(what, result)).collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// How the old primary is when the election is over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Old {
    Stopped,
    Running,
    Killed,
}

/// A takeover from an old primary that writes; then it is resumed, and `wait` passes.
fn take_over(old_is: Old, mode: Mode, wait: Duration) {
    let Some(bench) = Bench::new() else { return };
    // A backup since long ago, whose kernel has read all of the device.
    let new = bench.spec("new");
    let standby = LoopProvider.attach_backup(&new).unwrap();
    let mut old = bench.start(mode);
    old.wait_until("its first files", |old| old.acknowledged() > 0);
    // While somebody has it open its cache is kept.
    let mut reader = File::open(standby.device()).unwrap();
    std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
    let enough = fastrand::usize(30..150);
    old.wait_until("its files", |old| old.acknowledged() >= enough);
    std::thread::sleep(Duration::from_micros(fastrand::u64(0..5000)));
    match old_is {
        Old::Stopped => old.signal(Signal::STOP),
        Old::Killed => old.kill(),
        Old::Running => {}
    }
    let fenced = bench.acquire("new", 2).unwrap();
    eprintln!("{old_is:?}: {fenced}");
    if old_is == Old::Killed {
        // It may go on a little later than the fence.
        let begun = clock::monotonic();
        while bench.device_of("old").is_some() {
            assert!(begun.elapsed() < ANSWERED_MAX, "the mount of a dead process stays");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    let old_device = bench.device_of("old");
    assert_eq!(old_device.is_none(), old_is == Old::Killed);
    let before = old_device.as_ref().map(counters);
    let attached = LoopProvider.promote(&new, standby, fenced).unwrap();
    drop(reader);
    if old_is == Old::Running {
        old.report();
    }
    let acknowledged = old.acknowledged();
    assert!(acknowledged >= enough);
    all_there(&attached.root, "old", 0..acknowledged);
    // The winner takes the room that the old one's kernel believes to be its own.
    for i in (0..acknowledged).step_by(2) {
        fs::remove_file(attached.root.join(name("old", i))).unwrap();
    }
    for i in 0..64 {
        let _ = fs::remove_file(attached.root.join(format!("dirty-{i}")));
    }
    fs::remove_file(attached.root.join("held")).unwrap();
    File::open(&attached.root).unwrap().sync_all().unwrap();
    write_synced(&attached.root, "new", 0..300);
    if old_is != Old::Killed {
        old.signal(Signal::CONT);
        let report = old.report();
        all_failed(&report);
        // What it acknowledged since it was resumed was synced before.
        all_there(&attached.root, "old", acknowledged..old.acknowledged());
        if mode == Mode::WriteThenDemote {
            assert!(report.contains(&("demote".into(), "ok".into())), "{report:?}");
        }
    }
    Command::new("sync").status().unwrap();
    std::thread::sleep(wait);
    write_synced(&attached.root, "new", 300..310);
    if mode == Mode::Write
        && let Some(device) = &old_device
    {
        assert_eq!(Some(counters(device)), before, "the old device has written");
    }
    assert!(ShutdownFence.still_held(&new, key("new", 2)).unwrap());
    LoopProvider.detach(&new, attached).unwrap();
    let image = bench.image();
    bench.check_filesystem();
    // The old one's end changes nothing, nor does its unmount.
    old.kill();
    let spec = bench.spec("old");
    let standby = LoopProvider.attach_backup(&spec).unwrap();
    LoopProvider.detach_backup(&spec, standby).unwrap();
    assert_eq!(bench.image(), image, "the volume was changed");
    let attached = bench.win("third", 3);
    all_there(&attached.root, "old", (0..acknowledged).filter(|i| i % 2 == 1));
    all_there(&attached.root, "new", 0..310);
    assert!(!ShutdownFence.still_held(&new, key("new", 2)).unwrap());
    LoopProvider.detach(&bench.spec("third"), attached).unwrap();
}

#[test]
fn a_stopped_primary_that_is_resumed_writes_nothing() {
    for _ in 0..3 {
        take_over(Old::Stopped, Mode::Write, Duration::from_millis(300));
    }
}

#[test]
#[ignore = "waits more than a minute for the kernel's writeback; run by make test-long"]
fn nor_does_its_kernel_a_minute_later() {
    take_over(Old::Stopped, Mode::Write, Duration::from_secs(70));
}

#[test]
fn a_primary_that_runs_writes_nothing_more() {
    for _ in 0..3 {
        take_over(Old::Running, Mode::Write, Duration::from_millis(100));
    }
}

#[test]
fn a_fenced_primary_becomes_a_backup() {
    take_over(Old::Stopped, Mode::WriteThenDemote, Duration::from_millis(100));
}

#[test]
fn a_killed_primary_leaves_nothing() {
    take_over(Old::Killed, Mode::Write, Duration::from_millis(100));
}

#[test]
fn a_winner_that_was_stopped_before_it_mounted_mounts_nothing() {
    let Some(bench) = Bench::new() else { return };
    let mut old = bench.start(Mode::StopBeforeMount);
    old.wait_until("it stops", |old| old.state() == Some('T'));
    let attached = bench.win("new", 2);
    write_synced(&attached.root, "new", 0..20);
    old.signal(Signal::CONT);
    let report = old.report();
    assert!(report[0].1.contains("another node has taken the volume"), "{report:?}");
    all_there(&attached.root, "new", 0..20);
    // It may try again from the start, and learns that it is too late.
    let again = bench.acquire("old", 1).unwrap_err();
    assert_eq!(again.reason(), Reason::StaleEpoch, "{again}");
    write_synced(&attached.root, "new", 20..30);
    LoopProvider.detach(&bench.spec("new"), attached).unwrap();
    bench.check_filesystem();
}

#[test]
fn a_mount_in_another_namespace_is_reached() {
    // The new namespace has copies of all mounts, which would outlive those of other tests.
    let Some(bench) = Bench::with(MountsGuard::alone()) else { return };
    let before = ["unshare", "--mount", "--propagation", "private"];
    let mut old = OldPrimary::start(bench.dir.path(), Mode::Write, &before);
    old.wait_until("its files", |old| old.acknowledged() >= 20);
    assert!(mounts::at(&bench.spec("old").mount_point).unwrap().is_empty());
    old.signal(Signal::STOP);
    let attached = bench.win("new", 2);
    all_there(&attached.root, "old", 0..old.acknowledged());
    old.signal(Signal::CONT);
    all_failed(&old.report());
    write_synced(&attached.root, "new", 0..20);
    LoopProvider.detach(&bench.spec("new"), attached).unwrap();
    bench.check_filesystem();
}

#[test]
fn a_device_that_is_claimed_and_cannot_be_reached_is_refused() {
    let Some(bench) = Bench::new() else { return };
    let standby = LoopProvider.attach_backup(&bench.spec("old")).unwrap();
    let claim = sys::claim_device(standby.device()).unwrap();
    let winner = LoopProvider.attach_backup(&bench.spec("new")).unwrap();
    let short = Takeover::new(key("new", 2), Duration::from_secs(1));
    let error = ShutdownFence.acquire(&bench.spec("new"), &short).unwrap_err();
    assert!(error.message().contains("cannot be fenced"), "{error}");
    drop(claim);
    let fenced = bench.acquire("new", 2).unwrap();
    let attached = LoopProvider.promote(&bench.spec("new"), winner, fenced).unwrap();
    LoopProvider.detach(&bench.spec("new"), attached).unwrap();
}

#[test]
fn what_was_not_fenced_is_not_promoted() {
    let Some(bench) = Bench::new() else { return };
    let error = bench.acquire("old", 1).unwrap_err();
    assert!(error.message().contains("attach it as a backup"), "{error}");
    let spec = bench.spec("old");
    drop(LoopProvider.attach_backup(&spec).unwrap());
    let fenced = bench.acquire("old", 1).unwrap();
    // Attached anew since: the new device is read-only.
    let standby = LoopProvider.attach_backup(&spec).unwrap();
    let error = LoopProvider.promote(&spec, standby, fenced).unwrap_err();
    assert_eq!(error.reason(), Reason::Unavailable, "{error}");
    assert!(mounts::at(&spec.mount_point).unwrap().is_empty());
}

#[test]
fn an_attachment_without_a_fence_leaves_a_volume_in_use_alone() {
    let Some(bench) = Bench::new() else { return };
    let attached = bench.win("new", 1);
    let error = LoopProvider.attach(&bench.spec("old")).unwrap_err();
    assert!(error.message().contains("in use"), "{error}");
    assert!(bench.device_of("old").is_none());
    LoopProvider.detach(&bench.spec("new"), attached).unwrap();
    let attached = LoopProvider.attach(&bench.spec("old")).unwrap();
    // Its lock on the backing file stands in no winner's way.
    let winner = bench.win("new", 2);
    assert!(fs::write(attached.root.join("x"), "y").is_err());
    LoopProvider.detach(&bench.spec("new"), winner).unwrap();
    LoopProvider.detach(&bench.spec("old"), attached).unwrap();
    bench.check_filesystem();
}

#[test]
fn a_demoted_primary_is_a_backup_and_wins_again() {
    let Some(bench) = Bench::new() else { return };
    let spec = bench.spec("old");
    let attached = bench.win("old", 1);
    write_synced(&attached.root, "old", 0..5);
    let standby = LoopProvider.demote(&spec, attached).unwrap();
    assert!(mounts::at(&spec.mount_point).unwrap().is_empty());
    let other = bench.win("new", 2);
    all_there(&other.root, "old", 0..5);
    LoopProvider.detach(&bench.spec("new"), other).unwrap();
    // The device is read-only again until the fence is acquired.
    let past = File::options().write(true).open(standby.device()).unwrap();
    assert!(std::os::unix::fs::FileExt::write_at(&past, b"x", 0).is_err());
    drop(past);
    let fenced = bench.acquire("old", 3).unwrap();
    let attached = LoopProvider.promote(&spec, standby, fenced).unwrap();
    all_there(&attached.root, "old", 0..5);
    LoopProvider.detach(&spec, attached).unwrap();
}

#[test]
fn devices_without_reservations_say_so() {
    let Some(bench) = Bench::new() else { return };
    let standby = LoopProvider.attach_backup(&bench.spec("old")).unwrap();
    let mut spec = bench.spec("old");
    spec.source = standby.device().to_owned();
    let fence = super::super::reservation::ReservationFence::default();
    let error = super::super::required(&fence, &spec).unwrap_err();
    assert_eq!(error.reason(), Reason::Unsupported);
    assert!(error.message().contains("no reservations"), "{error}");
    spec.source = bench.spec("old").source;
    assert!(fence.capability(&spec).unwrap_err().message().contains("no block device"));
}

#[test]
fn kernel_versions_are_understood() {
    assert_eq!(kernel_version("6.18.44-fc-v669"), Some((6, 18)));
    assert_eq!(kernel_version("6.1.0-37-amd64"), Some((6, 1)));
    assert_eq!(kernel_version("7.0-rc1"), Some((7, 0)));
    assert_eq!(kernel_version("linux"), None);
}

#[cfg(feature = "failpoints")]
mod failpoints {
    //! Acquisitions that are cut off between any two of their steps, and repeated.

    use super::*;

    #[test]
    fn cut_off_anywhere_it_is_repeated() {
        let scenario = fail::FailScenario::setup();
        let steps = ["claimed", "shut_down", "settled", "drained", "read_only", "still", "removed"];
        for (old_is, step) in steps.iter().flat_map(|step| [(Old::Stopped, step), (Old::Killed, step)]) {
            let Some(bench) = Bench::new() else { return };
            let point = format!("fence::shutdown::{step}");
            let mut old = bench.start(Mode::Write);
            old.wait_until("its files", |old| old.acknowledged() >= 20);
            match old_is {
                Old::Killed => old.kill(),
                _other => old.signal(Signal::STOP),
            }
            let standby = LoopProvider.attach_backup(&bench.spec("new")).unwrap();
            fail::cfg(&point, "return").unwrap();
            for _ in 0..2 {
                let cut_off = bench.acquire("new", 2);
                // What is gone needs no second fence.
                let again = cut_off.is_ok() && old_is == Old::Killed && *step == "removed";
                assert!(again || cut_off.unwrap_err().message().contains("failpoint"), "{point}");
            }
            fail::remove(&point);
            let fenced = bench.acquire("new", 2).unwrap();
            let attached = LoopProvider.promote(&bench.spec("new"), standby, fenced).unwrap();
            all_there(&attached.root, "old", 0..old.acknowledged());
            write_synced(&attached.root, "new", 0..20);
            if old_is == Old::Stopped {
                old.signal(Signal::CONT);
                all_failed(&old.report());
            }
            all_there(&attached.root, "new", 0..20);
            LoopProvider.detach(&bench.spec("new"), attached).unwrap();
            bench.check_filesystem();
        }
        scenario.teardown();
    }
}
