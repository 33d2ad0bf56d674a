//! The algorithm against the model: whatever the device does, two never write.

use shardfs_proto::types::{Epoch, NodeId};

use super::model::{Abort, Nexus, Path, Target};
use super::*;

const A: Nexus = 1;
const B: Nexus = 2;
const C: Nexus = 3;
const BOUND: Duration = Duration::from_secs(5);

fn bounds() -> Bounds {
    Bounds { call: Duration::from_secs(1), abort: Duration::from_millis(40), drain: Duration::from_millis(5) }
}

fn key(node: Nexus, epoch: u64) -> FenceKey {
    FenceKey::new(&NodeId::new(format!("node-{node}")).unwrap(), Epoch::new(epoch).unwrap()).unwrap()
}

fn reserver(path: Path) -> Reserver {
    Reserver { volume: VolumeId::new("vol-1").unwrap(), bounds: bounds(), commands: Arc::new(path) }
}

fn take(target: &Arc<Target>, nexus: Nexus, epoch: u64) -> Result<Fenced> {
    reserver(target.path(nexus)).acquire(&Takeover::new(key(nexus, epoch), BOUND))
}

fn actions(fenced: &Fenced) -> Vec<Action> {
    fenced.steps().iter().map(|step| step.action).collect()
}

/// Nobody but this nexus writes.
fn writes_alone(target: &Target, writer: Nexus) {
    for nexus in [A, B, C] {
        assert_eq!(target.write(nexus, "late").is_ok(), nexus == writer, "nexus {nexus}, writer {writer}");
    }
}

#[test]
fn a_free_device_is_reserved_and_again() {
    let target = Target::new(Abort::Works, true);
    let fenced = take(&target, A, 1).unwrap();
    use Action::*;
    assert_eq!(actions(&fenced), [Registered, Reserved, Waited, Verified]);
    writes_alone(&target, A);
    assert_eq!(actions(&take(&target, A, 1).unwrap()), [Registered, Reserved, Waited, Verified]);
    // The same node at a later epoch keeps the reservation under another key.
    take(&target, A, 4).unwrap();
    assert_eq!(target.holder_key(), Some(key(A, 4).get()));
    assert_eq!(target.registered_keys(), [key(A, 4).get()]);
}

#[test]
fn the_holders_commands_are_aborted() {
    let target = Target::new(Abort::Works, true);
    take(&target, A, 1).unwrap();
    target.write(A, "under way").unwrap();
    let fenced = take(&target, B, 2).unwrap();
    use Action::*;
    assert_eq!(actions(&fenced), [Registered, PreemptedAborting, Reserved, Verified]);
    target.complete();
    assert_eq!(target.media(), [""; 0]);
    writes_alone(&target, B);
}

#[test]
fn an_abort_that_hangs_is_followed_by_a_plain_preemption_and_a_wait() {
    for abort in [Abort::HangsBefore, Abort::HangsAfter, Abort::Unsupported] {
        let target = Target::new(abort, true);
        take(&target, A, 1).unwrap();
        target.write(A, "under way").unwrap();
        let fenced = take(&target, B, 2).unwrap();
        let seen = actions(&fenced);
        assert!(seen.contains(&Action::Waited), "{abort:?}: {seen:?}");
        assert_eq!(seen.contains(&Action::AbortHung), abort != Abort::Unsupported, "{abort:?}: {seen:?}");
        target.complete();
        writes_alone(&target, B);
        // The hanging one takes effect after somebody else has won.
        let third = Target::path(&target, C);
        third.register(key(C, 3).get()).unwrap();
        third.preempt(key(C, 3).get(), key(B, 2).get(), false).unwrap();
        target.let_go();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(target.holder_key(), Some(key(C, 3).get()), "{abort:?}");
        writes_alone(&target, C);
    }
}

#[test]
fn a_target_that_is_harmed_by_aborts_is_only_preempted() {
    let target = Target::new(Abort::Harmful, true);
    take(&target, A, 1).unwrap();
    target.write(A, "under way").unwrap();
    let seen = actions(&take(&target, B, 2).unwrap());
    assert!(seen.contains(&Action::Preempted) && seen.contains(&Action::Waited), "{seen:?}");
    writes_alone(&target, B);
}

#[test]
fn a_kernel_that_cannot_read_is_done_without() {
    for (predecessors, expected) in [
        (vec![], Action::Cleared),
        (vec![key(A, 1)], Action::PreemptedAborting),
        (vec![key(C, 2), key(A, 1)], Action::PreemptedAborting),
        (vec![key(C, 2)], Action::Cleared),
    ] {
        let target = Target::new(Abort::Works, false);
        take(&target, A, 1).unwrap();
        let mut takeover = Takeover::new(key(B, 3), BOUND);
        takeover.predecessors.clone_from(&predecessors);
        let fenced = reserver(target.path(B)).acquire(&takeover).unwrap();
        assert!(actions(&fenced).contains(&expected), "{predecessors:?}: {fenced}");
        writes_alone(&target, B);
        let b = reserver(target.path(B));
        assert!(b.still_held(key(B, 3)).unwrap());
        assert!(!reserver(target.path(A)).still_held(key(A, 1)).unwrap());
    }
}

#[test]
fn an_older_epoch_gives_up() {
    let target = Target::new(Abort::Works, true);
    take(&target, B, 3).unwrap();
    let error = take(&target, A, 2).unwrap_err();
    assert_eq!(error.reason(), Reason::StaleEpoch, "{error}");
    assert_eq!(target.registered_keys(), [key(B, 3).get()]);
    writes_alone(&target, B);
}

#[test]
fn what_a_power_cut_took_is_noticed_and_taken_again() {
    for readable in [true, false] {
        let target = Target::new(Abort::Works, readable);
        take(&target, A, 1).unwrap();
        let a = reserver(target.path(A));
        assert!(a.still_held(key(A, 1)).unwrap());
        target.forget();
        assert!(!a.still_held(key(A, 1)).unwrap());
        take(&target, A, 1).unwrap();
        assert!(a.still_held(key(A, 1)).unwrap());
        writes_alone(&target, A);
    }
}

#[test]
fn older_registrations_are_swept() {
    let target = Target::new(Abort::Works, true);
    target.path(A).register(key(A, 1).get()).unwrap();
    target.path(C).register(key(C, 9).get()).unwrap();
    let fenced = take(&target, B, 2).unwrap();
    assert!(actions(&fenced).contains(&Action::Swept), "{fenced}");
    // One of a later epoch stays: it is a winner in the middle of its work.
    assert_eq!(target.registered_keys(), [key(B, 2).get(), key(C, 9).get()]);
}

#[test]
fn a_handed_over_device_is_not_waited_for() {
    let target = Target::new(Abort::Works, true);
    take(&target, A, 1).unwrap();
    let a = reserver(target.path(A));
    a.release(key(A, 1)).unwrap();
    a.release(key(A, 1)).unwrap();
    assert_eq!(target.registered_keys(), [0u64; 0]);
    let takeover = Takeover { handed_over: true, ..Takeover::new(key(B, 2), BOUND) };
    let fenced = reserver(target.path(B)).acquire(&takeover).unwrap();
    assert!(!actions(&fenced).contains(&Action::Waited), "{fenced}");
    // Not ours any more: nothing changes.
    a.release(key(A, 1)).unwrap();
    writes_alone(&target, B);
}

#[test]
fn what_was_handed_over_is_taken_without_a_gap_and_without_waiting() {
    for readable in [true, false] {
        let target = Target::new(Abort::HangsBefore, readable);
        take(&target, A, 1).unwrap();
        let takeover =
            Takeover { predecessors: vec![key(A, 1)], handed_over: true, ..Takeover::new(key(B, 2), BOUND) };
        let fenced = reserver(target.path(B)).acquire(&takeover).unwrap();
        use Action::*;
        let swept_or_not: Vec<Action> = actions(&fenced).into_iter().filter(|a| *a != Swept).collect();
        assert_eq!(swept_or_not, [Registered, Preempted, Reserved, Verified], "{fenced}");
        writes_alone(&target, B);
        // Held by somebody else than who handed over: nothing is known of that one.
        let takeover = Takeover {
            predecessors: vec![key(A, 3), key(B, 2)],
            handed_over: true,
            ..Takeover::new(key(C, 4), BOUND)
        };
        let fenced = reserver(target.path(C)).acquire(&takeover).unwrap();
        assert!(actions(&fenced).contains(&Waited), "{fenced}");
        writes_alone(&target, C);
    }
}

/// Refuses the command of this number.
fn failing(number: u32, refusal: Refusal) -> super::model::Hook {
    let first = std::sync::OnceLock::new();
    Box::new(move |command| (command - first.get_or_init(|| command) == number).then(|| refusal.clone()))
}

#[test]
fn cut_off_at_any_command_it_is_repeated() {
    for readable in [true, false] {
        for number in 0..8 {
            let target = Target::new(Abort::Works, readable);
            take(&target, A, 1).unwrap();
            let mut path = target.path(B);
            path.before = Some(failing(number, Refusal::Failed("cut off".into())));
            // Some refusals are survived: reading is not needed.
            let _first = reserver(path).acquire(&Takeover::new(key(B, 2), BOUND));
            take(&target, B, 2).unwrap();
            writes_alone(&target, B);
            assert_eq!(target.holder_key(), Some(key(B, 2).get()), "{number}");
        }
    }
}

#[test]
fn passing_failures_are_repeated() {
    for number in 0..5 {
        let target = Target::new(Abort::Works, true);
        take(&target, A, 1).unwrap();
        let mut path = target.path(B);
        path.before = Some(failing(number, Refusal::Passing("unit attention".into())));
        reserver(path).acquire(&Takeover::new(key(B, 2), BOUND)).unwrap();
        writes_alone(&target, B);
    }
}

#[test]
fn an_older_winner_that_is_resumed_anywhere_takes_nothing() {
    for number in 0..8 {
        let target = Target::new(Abort::Works, true);
        take(&target, A, 1).unwrap();
        let later = target.clone();
        let begun = std::sync::atomic::AtomicU32::new(0);
        let mut path = target.path(B);
        path.before = Some(Box::new(move |_| {
            // Stopped before its command of this number; the next election is won meanwhile.
            if begun.fetch_add(1, std::sync::atomic::Ordering::SeqCst) == number {
                take(&later, C, 3).unwrap();
            }
            None
        }));
        let outcome = reserver(path).acquire(&Takeover::new(key(B, 2), BOUND));
        if target.holder_key() == Some(key(B, 2).get()) {
            // It was through before it was stopped at this number.
            assert!(outcome.is_ok(), "{number}");
            continue;
        }
        assert_eq!(target.holder_key(), Some(key(C, 3).get()), "{number}");
        assert!(outcome.is_err(), "{number}: {outcome:?}");
        writes_alone(&target, C);
    }
}

#[test]
fn a_device_that_answers_nothing_ends_in_time() {
    let target = Target::new(Abort::Works, true);
    take(&target, A, 1).unwrap();
    let mut path = target.path(B);
    let hung = Arc::new(parking_lot::Mutex::new(()));
    let held = hung.clone();
    let guard = hung.lock();
    path.before = Some(Box::new(move |_| {
        drop(held.lock());
        Some(Refusal::Failed("late".into()))
    }));
    let begun = shardfs_proto::types::clock::monotonic();
    let error = reserver(path).acquire(&Takeover::new(key(B, 2), BOUND)).unwrap_err();
    assert_eq!(error.reason(), Reason::Deadline, "{error}");
    assert!(begun.elapsed() < 4 * BOUND, "{:?}", begun.elapsed());
    drop(guard);
    writes_alone(&target, A);
}

#[test]
fn capability_needs_reservations() {
    for readable in [true, false] {
        let target = Target::new(Abort::Works, readable);
        take(&target, A, 1).unwrap();
        reserver(target.path(B)).capability().unwrap();
        reserver(target.path(A)).capability().unwrap();
        assert_eq!(target.holder_key(), Some(key(A, 1).get()));
        let mut without = target.path(B);
        without.before = Some(Box::new(|_| Some(Refusal::Unsupported("ENOTTY".into()))));
        assert_eq!(reserver(without).capability().unwrap_err().reason(), Reason::Unsupported);
    }
}

#[test]
fn a_target_that_names_no_conflict_is_understood() {
    let target = Target::with(Abort::HangsAfter, false, true);
    reserver(target.path(A)).capability().unwrap();
    take(&target, A, 1).unwrap();
    reserver(target.path(B)).capability().unwrap();
    let takeover = Takeover { predecessors: vec![key(C, 3), key(A, 1)], ..Takeover::new(key(B, 4), BOUND) };
    reserver(target.path(B)).acquire(&takeover).unwrap();
    writes_alone(&target, B);
    // Preempted, and so registered no longer.
    let a = reserver(target.path(A));
    assert!(!a.still_held(key(A, 1)).unwrap());
    a.release(key(A, 1)).unwrap();
    writes_alone(&target, B);
}
