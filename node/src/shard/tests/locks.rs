//! Byte-range locks: against a model, over restarts, with the ends of their holders; waiting for them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::types::limits::{LOCKS_PER_FILE_MAX, LOCKS_PER_SHARD_MAX};
use shardfs_proto::types::op::{OpResult, Operation};
use shardfs_proto::types::{FileLock, InodeNo, LockKind, LockOwner, LockRange, Reason, Result, SessionId};

use super::harness::*;
use crate::shard::executor::{Command, Work};
use crate::shard::keys::Cf;
use crate::shard::session::{Effect, Live};
use crate::shard::{Shard, Wanted};

const ROOT: InodeNo = InodeNo::ROOT;
const READ: Option<LockKind> = Some(LockKind::Read);
const WRITE: Option<LockKind> = Some(LockKind::Write);
/// More than anything here takes.
const LONG: Duration = Duration::from_secs(60);

async fn session(world: &World) -> SessionId {
    world.shard().open_session("test".into()).await.unwrap()
}

fn range(start: u64, end: u64) -> LockRange {
    LockRange::new(start, end).unwrap()
}

fn set(inode: InodeNo, owner: u64, range: LockRange, kind: Option<LockKind>) -> Operation {
    Operation::SetLock { inode, owner, pid: owner as u32 + 100, range, kind }
}

async fn run(
    world: &World,
    session: SessionId,
    inode: InodeNo,
    owner: u64,
    range: LockRange,
    kind: Option<LockKind>,
) -> Result<OpResult> {
    world.run_as(Some(session), None, set(inode, owner, range, kind)).await
}

fn reason(outcome: Result<OpResult>) -> Option<Reason> {
    outcome.err().map(|error| error.reason())
}

fn wanted(session: SessionId, number: u64, inode: InodeNo) -> Wanted {
    let owner = LockOwner { session, number };
    Wanted { owner, inode, range: LockRange::ALL, kind: LockKind::Write }
}

/// Which bytes of a short file an owner has locked; the last one stands for all from there on.
const BYTES: usize = 24;
type Bytes = [Option<LockKind>; BYTES];

fn model_range(rng: &mut fastrand::Rng) -> (usize, usize, LockRange) {
    let first = rng.usize(..BYTES);
    let last = rng.usize(first..BYTES);
    let end = if last == BYTES - 1 { LockRange::TO_THE_END } else { last as u64 };
    (first, last, range(first as u64, end))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_are_those_of_a_simple_model() {
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    for mut world in World::both(None, 4096) {
        let file = world.create(ROOT, "f").await.inode;
        let mut sessions = vec![session(&world).await, session(&world).await];
        let mut model: BTreeMap<LockOwner, Bytes> = BTreeMap::new();
        let (mut done, mut refused) = (0, 0);
        for step in 0..1500 {
            let owner = LockOwner { session: *rng.choice(&sessions).unwrap(), number: rng.u64(..3) };
            let (first, last, bytes) = model_range(&mut rng);
            let kind = *rng.choice(&[None, READ, WRITE]).unwrap();
            let excluded = model.iter().any(|(other, held)| {
                *other != owner
                    && held[first..=last].iter().flatten().any(|held| match (held, kind) {
                        (_, None) | (LockKind::Read, READ) => false,
                        (_, Some(_)) => true,
                    })
            });
            let got = reason(run(&world, owner.session, file, owner.number, bytes, kind).await);
            assert_eq!(got, excluded.then_some(Reason::LockConflict), "seed {seed}, step {step}");
            if excluded {
                refused += 1;
            } else {
                done += 1;
                model.entry(owner).or_insert([None; BYTES])[first..=last].fill(kind);
            }
            if step % 100 == 99 {
                let ended = sessions.swap_remove(rng.usize(..sessions.len()));
                world.shard().close_session(ended).await.unwrap();
                model.retain(|owner, _| owner.session != ended);
                sessions.push(session(&world).await);
            }
            if step % 150 == 149 {
                world.reopen();
            }
            if step % 50 == 49 {
                compare(&world, file, &model, sessions[0]).await;
                world.check(&format!("seed {seed}, step {step}")).await;
            }
        }
        assert!(done > 100 && refused > 100, "{done} done, {refused} refused");
        for gone in sessions {
            world.shard().close_session(gone).await.unwrap();
        }
        assert_eq!(count(&world.view().await, Cf::Sys), 2, "locks leave nothing");
    }
}

/// Somebody else is kept from each byte by exactly those that the model names.
async fn compare(world: &World, file: InodeNo, model: &BTreeMap<LockOwner, Bytes>, asking: SessionId) {
    let owner = LockOwner { session: asking, number: 99 };
    for at in 0..BYTES {
        let end = if at == BYTES - 1 { LockRange::TO_THE_END } else { at as u64 };
        for kind in [LockKind::Read, LockKind::Write] {
            let wanted = Wanted { owner, inode: file, range: range(at as u64, end), kind };
            let held = world.shard().test_lock(wanted).await.unwrap();
            let expected = model.iter().any(|(_, held)| match held[at] {
                Some(LockKind::Write) => true,
                Some(LockKind::Read) => kind == LockKind::Write,
                None => false,
            });
            assert_eq!(held.is_some(), expected, "byte {at}, {kind:?}");
            if let Some(held) = held {
                assert_eq!(model[&held.owner][at], Some(held.kind));
                assert_eq!(held.pid, held.owner.number as u32 + 100);
                // The whole lock is what the model has of that kind around the byte.
                let bytes = &model[&held.owner];
                let (first, last) =
                    (held.range.start() as usize, held.range.end().min(BYTES as u64 - 1) as usize);
                assert!(bytes[first..=last].iter().all(|kind| *kind == Some(held.kind)));
                assert!(first == 0 || bytes[first - 1] != Some(held.kind), "neighbours are one lock");
                assert!(last == BYTES - 1 || bytes[last + 1] != Some(held.kind), "neighbours are one lock");
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_outlives_restarts_and_crashes_but_not_its_session_or_file() {
    for mut world in World::both(None, 4096) {
        let (a, b) = (session(&world).await, session(&world).await);
        let (f, g) = (world.create(ROOT, "f").await.inode, world.create(ROOT, "g").await.inode);
        run(&world, a, f, 1, LockRange::ALL, WRITE).await.unwrap();
        run(&world, a, g, 1, LockRange::ALL, READ).await.unwrap();
        for round in 0..2 {
            assert_eq!(reason(run(&world, b, f, 1, range(5, 5), READ).await), Some(Reason::LockConflict));
            assert_eq!(reason(run(&world, b, g, 1, range(5, 5), WRITE).await), Some(Reason::LockConflict));
            world.check(&format!("round {round}")).await;
            world.reopen();
        }
        // Advisory: nobody is kept from writing.
        world.run_as(Some(b), None, write(f, 0, b"written")).await.unwrap();
        let crashed = world.crash();
        assert_eq!(reason(run(&crashed, b, f, 1, range(5, 5), READ).await), Some(Reason::LockConflict));
        crashed.check("crashed").await;
        // The file goes, and its locks with it; the number is not given again.
        world.run(unlink(ROOT, "g")).await.unwrap();
        world.shard().keep_session(a, Some(vec![])).await.unwrap();
        world.shard().keep_session(b, Some(vec![])).await.unwrap();
        assert_eq!(reason(run(&world, b, g, 1, range(5, 5), WRITE).await), Some(Reason::NotFound));
        world.check("a file that is gone").await;
        world.shard().close_session(a).await.unwrap();
        run(&world, b, f, 1, LockRange::ALL, WRITE).await.unwrap();
        world.check("a session that has ended").await;
        assert_eq!(reason(run(&world, a, f, 1, LockRange::ALL, None).await), Some(Reason::SessionUnknown));
        let directory = world.mkdir(ROOT, "d").await.inode;
        assert_eq!(reason(run(&world, b, directory, 1, LockRange::ALL, READ).await), Some(Reason::WrongKind));
        let nobodys = world.run(set(f, 1, LockRange::ALL, READ)).await;
        assert_eq!(reason(nobodys), Some(Reason::InvalidArgument), "an owner is of a session");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_repeated_lock_is_granted_once() {
    for mut world in World::both(None, 4096) {
        let (a, b) = (session(&world).await, session(&world).await);
        let f = world.create(ROOT, "f").await.inode;
        let lock = |kind| set(f, 1, LockRange::ALL, kind);
        world.run_as(Some(a), Some(1), lock(WRITE)).await.unwrap();
        world.run_as(Some(a), Some(2), lock(None)).await.unwrap();
        world.run_as(Some(b), Some(1), lock(WRITE)).await.unwrap();
        for _ in 0..2 {
            // Both were answered long ago: neither is done again.
            world.run_as(Some(a), Some(1), lock(WRITE)).await.unwrap();
            world.run_as(Some(a), Some(2), lock(None)).await.unwrap();
            assert_eq!(reason(world.run_as(Some(a), Some(3), lock(WRITE)).await), Some(Reason::LockConflict));
            let other = reason(world.run_as(Some(a), Some(2), set(f, 2, LockRange::ALL, None)).await);
            assert_eq!(other, Some(Reason::InvalidArgument), "another mutation under its number");
            world.reopen();
        }
        world.check("repeated").await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn locks_have_a_limit() {
    let world = World::mem(None, 4096);
    let a = session(&world).await;
    let (f, g) = (world.create(ROOT, "f").await.inode, world.create(ROOT, "g").await.inode);
    for n in 0..LOCKS_PER_FILE_MAX as u64 {
        run(&world, a, f, 1, range(2 * n, 2 * n), WRITE).await.unwrap();
    }
    let past = 2 * LOCKS_PER_FILE_MAX as u64;
    assert_eq!(reason(run(&world, a, f, 1, range(past, past), WRITE).await), Some(Reason::LocksExhausted));
    run(&world, a, g, 1, range(past, past), WRITE).await.unwrap();
    // What makes no more of them is done.
    run(&world, a, f, 1, range(0, 2), WRITE).await.unwrap();
    run(&world, a, f, 1, range(past, past), WRITE).await.unwrap();
    run(&world, a, f, 1, LockRange::ALL, None).await.unwrap();
    world.check("limits").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_locks_of_a_shard_have_a_limit() {
    let mut world = World::mem(None, 4096);
    let a = session(&world).await;
    let f = world.create(ROOT, "f").await.inode;
    world.close();
    let store = world.store();
    let mut live = Live::load(&*store).unwrap();
    let owner = LockOwner { session: a, number: 1 };
    let lock = |n: u64| FileLock { owner, pid: 1, range: range(2 * n, 2 * n), kind: LockKind::Write };
    let locks: Vec<FileLock> = (0..LOCKS_PER_FILE_MAX as u64).map(lock).collect();
    let others = (LOCKS_PER_SHARD_MAX / LOCKS_PER_FILE_MAX) as u64;
    for inode in (0..others).map(|n| InodeNo::new(f.get() + 1 + n).unwrap()) {
        live.apply(Effect::Locks { inode, locks: locks.clone(), loosened: false });
    }
    assert_eq!(live.lock_count(), LOCKS_PER_SHARD_MAX);
    let ask = |live: &mut Live, kind| {
        let work = Work::Operation(set(f, 1, range(0, 0), kind));
        let command = Command::Mutate { session: Some(a), numbered: None, work };
        let (answers, ..) = run_group(&*store, live, &[command]);
        answers.into_iter().find_map(|answer| answer.err().map(|error| error.reason()))
    };
    assert_eq!(ask(&mut live, WRITE), Some(Reason::LocksExhausted));
    assert_eq!(ask(&mut live, None), None);
    // One fewer makes room for one.
    let inode = InodeNo::new(f.get() + 1).unwrap();
    live.apply(Effect::Locks { inode, locks: locks[1..].to_vec(), loosened: true });
    assert_eq!(ask(&mut live, WRITE), None);
    assert_eq!(live.lock_count(), LOCKS_PER_SHARD_MAX);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_keeps_one_way_back_for_the_locks_of_a_file() {
    let mut world = World::mem(None, 4096);
    let (a, b) = (session(&world).await, session(&world).await);
    let (f, g) = (world.create(ROOT, "f").await.inode, world.create(ROOT, "g").await.inode);
    run(&world, a, f, 1, range(1, 1), WRITE).await.unwrap();
    world.close();
    let store = world.store();
    let mut live = Live::load(&*store).unwrap();
    let before = live.locks(f).to_vec();
    let lock = |session, inode, at: u64, kind| Command::Mutate {
        session: Some(session),
        numbered: None,
        work: Work::Operation(set(inode, 2, range(2 * at, 2 * at), kind)),
    };
    let mut commands: Vec<Command> = (1..100).map(|at| lock(b, f, at, WRITE)).collect();
    commands.extend([lock(b, f, 1, None), lock(b, g, 1, READ), lock(a, g, 1, READ)]);
    commands.push(Command::EndSession { session: a });
    let (answers, _, undo) = run_group(&*store, &mut live, &commands);
    assert!(answers.iter().all(Result::is_ok));
    assert_eq!((live.locks(f).len(), live.locks(g).len(), live.lock_count()), (98, 1, 99));
    assert_eq!(undo.len(), 3, "two files and a session");
    undo.into_iter().rev().for_each(|undo| live.undo(undo));
    assert_eq!((live.locks(f), live.locks(g), live.lock_count()), (&before[..], &[][..], 1));
    assert!(live.is_known(a));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_silent_holder_ends_when_somebody_wants_its_lock() {
    let silence = Duration::from_millis(400);
    for world in World::both(None, 4096) {
        let (a, b) = (session(&world).await, session(&world).await);
        let (f, g) = (world.create(ROOT, "f").await.inode, world.create(ROOT, "g").await.inode);
        world.shard().executor().set_lock_silence(LONG);
        run(&world, a, f, 1, range(0, 9), WRITE).await.unwrap();
        run(&world, a, g, 1, LockRange::ALL, WRITE).await.unwrap();
        assert_eq!(reason(run(&world, b, f, 1, LockRange::ALL, READ).await), Some(Reason::LockConflict));
        tokio::time::sleep(2 * silence).await;
        world.shard().executor().set_lock_silence(silence);
        // Silence alone ends nobody, nor does somebody who wants something else.
        run(&world, b, f, 1, range(10, 10), WRITE).await.unwrap();
        world.shard().keep_session(a, None).await.unwrap();
        tokio::time::sleep(2 * silence).await;
        run(&world, b, f, 1, LockRange::ALL, WRITE).await.unwrap();
        assert_eq!(world.shard().keep_session(a, None).await.unwrap_err().reason(), Reason::SessionUnknown);
        assert_eq!(reason(run(&world, a, f, 1, LockRange::ALL, READ).await), Some(Reason::SessionUnknown));
        run(&world, b, g, 1, LockRange::ALL, WRITE).await.unwrap();
        world.check("a silent holder").await;
    }
}

/// Waits in the background.
fn waiting(shard: &Arc<Shard>, wanted: Wanted) -> tokio::task::JoinHandle<Result<()>> {
    let shard = Arc::clone(shard);
    tokio::spawn(async move { shard.wait_lock(wanted, LONG).await })
}

/// The same, and again when a circle would be closed: it is others who must be refused in the end.
fn patient(shard: &Arc<Shard>, wanted: Wanted) -> tokio::task::JoinHandle<Result<()>> {
    let shard = Arc::clone(shard);
    tokio::spawn(async move {
        loop {
            match shard.wait_lock(wanted, LONG).await {
                Err(error) if error.reason() == Reason::Deadlock => {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
                outcome => return outcome,
            }
        }
    })
}

async fn over(waiting: tokio::task::JoinHandle<Result<()>>) -> Result<()> {
    tokio::time::timeout(LONG / 2, waiting).await.expect("it is told").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_is_told_by_whatever_frees_the_lock() {
    let world = World::rocks(None, 4096);
    let b = session(&world).await;
    let (f, g) = (world.create(ROOT, "f").await.inode, world.create(ROOT, "g").await.inode);
    world.shard().wait_lock(wanted(b, 1, f), LONG).await.unwrap();
    for freed_by in ["unlock", "read lock", "session", "file"] {
        let a = session(&world).await;
        let file = if freed_by == "file" { g } else { f };
        run(&world, a, file, 1, LockRange::ALL, WRITE).await.unwrap();
        let shard = world.shard();
        let wanted = Wanted { kind: LockKind::Read, ..wanted(b, 1, file) };
        let waiting = waiting(&shard, wanted);
        tokio::time::sleep(Duration::from_millis(100)).await;
        assert!(!waiting.is_finished(), "{freed_by}");
        match freed_by {
            "unlock" => drop(run(&world, a, f, 1, LockRange::ALL, None).await.unwrap()),
            "read lock" => drop(run(&world, a, f, 1, LockRange::ALL, READ).await.unwrap()),
            "session" => world.shard().close_session(a).await.unwrap(),
            _ => drop(world.run(unlink(ROOT, "g")).await.unwrap()),
        }
        over(waiting).await.unwrap();
        world.shard().close_session(a).await.unwrap();
    }
    // Time ends it as well, and a shard that is to be closed lets nobody wait.
    let a = session(&world).await;
    run(&world, a, f, 1, LockRange::ALL, WRITE).await.unwrap();
    world.shard().wait_lock(wanted(b, 1, f), Duration::from_millis(50)).await.unwrap();
    let shard = world.shard();
    let last = waiting(&shard, wanted(b, 1, f));
    tokio::time::sleep(Duration::from_millis(50)).await;
    shard.want_back(true);
    over(last).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_waits_for_himself() {
    let world = World::mem(None, 4096);
    let (a, b, c) = (session(&world).await, session(&world).await, session(&world).await);
    let mut files = Vec::new();
    for (owner, n) in [(a, "f"), (b, "g"), (c, "h")] {
        let file = world.create(ROOT, n).await.inode;
        run(&world, owner, file, 1, LockRange::ALL, WRITE).await.unwrap();
        files.push(file);
    }
    let shard = world.shard();
    // a waits for b, b for c, and then c for a.
    let (first, second) = (patient(&shard, wanted(a, 1, files[1])), patient(&shard, wanted(b, 1, files[2])));
    // Whoever asks last closes the circle.
    while shard.executor().waits().count() < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let closing = async {
        loop {
            // The others may not wait yet.
            if let Err(error) = shard.wait_lock(wanted(c, 1, files[0]), Duration::from_millis(5)).await {
                return error.reason();
            }
        }
    };
    assert_eq!(tokio::time::timeout(LONG / 2, closing).await.unwrap(), Reason::Deadlock);
    // Another owner of the same session may wait.
    shard.wait_lock(wanted(c, 2, files[0]), Duration::from_millis(5)).await.unwrap();
    // Who has left does not wait any more.
    first.abort();
    assert!(first.await.unwrap_err().is_cancelled());
    shard.wait_lock(wanted(c, 1, files[0]), Duration::from_millis(5)).await.unwrap();
    run(&world, c, files[2], 1, LockRange::ALL, None).await.unwrap();
    over(second).await.unwrap();
}
