//! When a daemon is started again, and when not.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use super::*;
use crate::mounts::MountId;
use crate::records::{Failed, Told};

fn end(status: ExitStatus) -> End {
    End { status, lived: Duration::ZERO, asked: false }
}

fn killed() -> End {
    end(ExitStatus::from_raw(libc::SIGKILL))
}

fn exited(code: i32) -> End {
    end(ExitStatus::from_raw(code << 8))
}

fn told(failed: Option<bool>) -> Told {
    let id = MountId { mount: 7, device: (0, 52) };
    Told {
        place: Some(Place::new(Path::new("/mnt/x"), Some(id), false)),
        failed: failed.map(|refused| Failed { words: "words".into(), refused }),
    }
}

#[test]
fn one_that_dies_is_started_again() {
    assert!(matches!(next(&killed(), &told(None), true, true), Next::Again(why) if why.contains("SIGKILL")));
    let panicked = exited(101);
    assert!(matches!(next(&panicked, &told(None), true, true), Next::Again(_)));
    let failed = next(&exited(1), &told(Some(false)), true, true);
    assert!(matches!(failed, Next::Again(why) if why.contains("words")));
}

#[test]
fn one_that_ends_in_order_is_not() {
    assert_eq!(next(&exited(0), &told(None), true, true), Next::End(0));
    let asked = End { asked: true, ..killed() };
    assert_eq!(next(&asked, &told(None), true, true), Next::End(1));
    assert_eq!(next(&killed(), &told(None), true, false), Next::End(0), "somebody had unmounted it");
    assert_eq!(next(&exited(1), &told(Some(false)), true, false), Next::End(1), "it took its mount along");
}

#[test]
fn one_that_never_mounted_is_not() {
    assert_eq!(next(&exited(32), &told(Some(false)), false, true), Next::End(32));
    let died = next(&killed(), &Told::default(), false, true);
    assert!(matches!(died, Next::Fail(why) if why.contains("before the mount was usable")));
}

#[test]
fn settings_that_are_refused_end_it() {
    assert_eq!(next(&exited(78), &told(Some(true)), false, true), Next::End(78), "it has said it itself");
    let refused = next(&exited(78), &told(Some(true)), true, true);
    assert!(matches!(refused, Next::Refuse(why) if why.contains("refused") && why.contains("words")));
}

#[test]
fn pauses_grow_and_end_and_a_long_life_counts() {
    let mut restarts = Restarts::default();
    let short = Duration::from_secs(1);
    let pauses: Vec<u128> = (0..RESTARTS_IN_A_ROW_MAX)
        .filter_map(|_| restarts.next(short))
        .map(|pause| pause.as_millis())
        .collect();
    assert_eq!(pauses, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000]);
    assert_eq!(restarts.next(short), None);
    assert_eq!(restarts.next(HEALTHY_AFTER), Some(Duration::ZERO));
    assert_eq!(restarts.next(short), Some(BACKOFF_FIRST));
    assert_eq!(restarts.total, RESTARTS_IN_A_ROW_MAX + 2);
}
