//! The check against the model of a device, and against devices that lie.

use super::super::Holder;
use super::super::model::{Abort, Nexus, Path, Target};
use super::*;

const A: Nexus = 1;
const B: Nexus = 2;
const BOUNDS: Bounds =
    Bounds { call: Duration::from_secs(5), abort: Duration::from_millis(40), drain: Duration::ZERO };

/// A path whose writes take what the model says, unless it lies.
struct Tried {
    path: Path,
    /// The device takes every write.
    takes_all: bool,
}

impl Side for Tried {
    fn write(&self) -> Outcome<()> {
        if self.takes_all {
            return Ok(());
        }
        self.path.target.write(self.path.nexus, "block").map(|()| self.path.target.complete())
    }

    fn read(&self) -> Outcome<()> {
        Ok(())
    }
}

impl Commands for Tried {
    fn register(&self, key: u64) -> Outcome<()> {
        self.path.register(key)
    }

    fn reserve(&self, key: u64) -> Outcome<()> {
        self.path.reserve(key)
    }

    fn release(&self, key: u64) -> Outcome<()> {
        self.path.release(key)
    }

    fn aborts(&self) -> bool {
        self.path.aborts()
    }

    fn preempt(&self, own: u64, victim: u64, abort: bool) -> Outcome<()> {
        self.path.preempt(own, victim, abort)
    }

    fn clear(&self, own: u64) -> Outcome<()> {
        self.path.clear(own)
    }

    fn holder(&self) -> Outcome<Option<Holder>> {
        self.path.holder()
    }

    fn keys(&self) -> Outcome<Vec<u64>> {
        self.path.keys()
    }
}

fn tried(target: &Arc<Target>, nexus: Nexus, takes_all: bool) -> Arc<dyn Side> {
    Arc::new(Tried { path: target.path(nexus), takes_all })
}

fn checked(target: &Arc<Target>, force: bool) -> Vec<Step> {
    Check::new([tried(target, A, false), tried(target, B, false)], BOUNDS).run(force)
}

fn not_ok(steps: &[Step]) -> Vec<(&'static str, Verdict)> {
    steps.iter().filter(|s| s.verdict != Verdict::Ok).map(|s| (s.name, s.verdict)).collect()
}

fn nothing_is_left(target: &Target) {
    assert_eq!(target.registered_keys(), [0u64; 0]);
    assert_eq!(target.holder_key(), None);
}

#[test]
fn a_device_that_keeps_its_promises_passes() {
    for (abort, readable, vague, expected) in [
        (Abort::Works, true, false, vec![]),
        (Abort::Works, true, true, vec![]),
        (Abort::Works, false, false, vec![("read keys", Verdict::Poor)]),
        (Abort::Unsupported, true, false, vec![("preempt and abort", Verdict::Poor)]),
        (
            Abort::Harmful,
            false,
            true,
            vec![("preempt and abort", Verdict::Poor), ("read keys", Verdict::Poor)],
        ),
        (Abort::HangsBefore, true, false, vec![("preempt and abort", Verdict::Poor)]),
        (Abort::HangsAfter, true, true, vec![("preempt and abort", Verdict::Poor)]),
    ] {
        let target = Target::with(abort, readable, vague);
        let steps = checked(&target, false);
        assert_eq!(not_ok(&steps), expected, "{abort:?} {readable}: {steps:#?}");
        assert_eq!(steps.last().unwrap().name, "release");
        target.let_go();
        nothing_is_left(&target);
    }
}

#[test]
fn a_device_that_takes_every_write_is_found_out() {
    let target = Target::new(Abort::Works, true);
    let steps = Check::new([tried(&target, A, false), tried(&target, B, true)], BOUNDS).run(false);
    assert_eq!(not_ok(&steps), [("conflict", Verdict::Broken)], "{steps:#?}");
    nothing_is_left(&target);
}

#[test]
fn two_names_of_one_path_and_two_disks_are_found_out() {
    let target = Target::new(Abort::Works, true);
    let steps = Check::new([tried(&target, A, false), tried(&target, A, false)], BOUNDS).run(false);
    assert_eq!(not_ok(&steps).last().unwrap().1, Verdict::Broken, "{steps:#?}");
    nothing_is_left(&target);
    let (one, other) = (Target::new(Abort::Works, true), Target::new(Abort::Works, true));
    let steps = Check::new([tried(&one, A, false), tried(&other, B, false)], BOUNDS).run(false);
    assert_eq!(not_ok(&steps), [("conflict", Verdict::Broken)], "{steps:#?}");
    nothing_is_left(&one);
    nothing_is_left(&other);
}

#[test]
fn what_somebody_holds_is_left_alone_unless_told() {
    for readable in [true, false] {
        let target = Target::new(Abort::Works, readable);
        let other = target.path(9);
        other.register(77).unwrap();
        other.reserve(77).unwrap();
        let steps = checked(&target, false);
        assert_eq!(not_ok(&steps), [("free", Verdict::Broken)], "{steps:#?}");
        assert_eq!(target.holder_key(), Some(77));
        assert_eq!(target.registered_keys(), [77]);
        let steps = checked(&target, true);
        assert!(not_ok(&steps).iter().all(|(_, verdict)| *verdict == Verdict::Poor), "{steps:#?}");
        nothing_is_left(&target);
    }
}

#[test]
fn what_a_killed_check_left_is_no_obstacle() {
    let target = Target::new(Abort::Works, true);
    let killed = target.path(A);
    killed.register(KEYS[FIRST]).unwrap();
    killed.reserve(KEYS[FIRST]).unwrap();
    assert_eq!(not_ok(&checked(&target, false)), []);
    nothing_is_left(&target);
}

#[test]
fn a_primary_takes_the_checks_keys_for_a_strangers() {
    for key in KEYS {
        assert_eq!(super::super::FenceKey::from_raw(key), None);
        assert_ne!(key, 0);
    }
}
