//! How long a request is waited for: as long as its caller lives.
//!
//! The kernel lets a program that was killed go only when its request is answered, and fuser has no
//! INTERRUPT. So while a request waits (for a node that is away, maybe for ever), the daemon looks whether the
//! caller has a SIGKILL pending; any signal that ends a program shows as one.

use std::pin::Pin;
use std::time::Duration;

use shardfs_proto::client::DEADLINE_DEFAULT;

/// How long what a program has asked for is tried once the program is dead. Work that is dropped then may or may not have been
/// done; what it holds open goes with the session.
pub(super) const AFTER_DEATH_MAX: Duration = DEADLINE_DEFAULT;
/// Requests that are answered sooner are never looked at.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// From then on.
const NEXT_LOOK: Duration = Duration::from_millis(500);
/// While a lock is waited for: half of what a signal may take to be noticed, or less.
pub(super) const LOCK_LOOK: Duration = Duration::from_millis(250);
/// The bit of SIGKILL in a signal mask.
const KILL_BIT: u64 = 1 << (libc::SIGKILL - 1);

/// The work's outcome; `None` if the thread is about to die. The work is as it was then, and can go on.
pub(super) async fn until_dying<F: Future>(thread: u32, mut work: Pin<&mut F>) -> Option<F::Output> {
    let mut look = FIRST_LOOK;
    loop {
        match tokio::time::timeout(look, work.as_mut()).await {
            Ok(outcome) => return Some(outcome),
            Err(_) if thread != 0 && is_dying(thread) => return None,
            Err(_) => look = NEXT_LOOK,
        }
    }
}

fn is_dying(thread: u32) -> bool {
    // Unreadable: it is in another PID namespace, or gone, which it cannot be while it waits.
    std::fs::read_to_string(format!("/proc/{thread}/status")).is_ok_and(|status| kill_pending(&status))
}

fn kill_pending(status: &str) -> bool {
    let masks = status.lines().filter_map(|line| {
        let mask = line.strip_prefix("SigPnd:").or_else(|| line.strip_prefix("ShdPnd:"))?;
        u64::from_str_radix(mask.trim(), 16).ok()
    });
    masks.fold(0, |all, mask| all | mask) & KILL_BIT != 0
}

/// What signals a thread has to take.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Pending {
    Nothing,
    /// One that ends its waiting.
    Signal,
    /// Its end.
    Kill,
}

/// What signals a thread has to take. 0: the kernel itself, which takes none.
pub(super) fn pending(thread: u32) -> Pending {
    if thread == 0 {
        return Pending::Nothing;
    }
    std::fs::read_to_string(format!("/proc/{thread}/status")).map_or(Pending::Nothing, |s| pending_in(&s))
}

fn pending_in(status: &str) -> Pending {
    if kill_pending(status) {
        return Pending::Kill;
    }
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let mask = |name| field(name).and_then(|mask| u64::from_str_radix(mask, 16).ok()).unwrap_or(0);
    // A signal for the whole process goes to its first thread if that takes it. To tell another one that it was interrupted would be
    // wrong if somebody else takes the signal: the kernel would show the program a number that is no error.
    let takes_shared =
        field("Threads:") == Some("1") || field("Pid:").is_some_and(|pid| field("Tgid:") == Some(pid));
    let all = mask("SigPnd:") | if takes_shared { mask("ShdPnd:") } else { 0 };
    match all & !mask("SigBlk:") & !mask("SigIgn:") {
        0 => Pending::Nothing,
        _ => Pending::Signal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;

    #[test]
    fn a_signal_is_seen_by_the_thread_that_takes_it() {
        let status = |pid, threads, own: u64, shared: u64, blocked: u64, ignored: u64| {
            pending_in(&format!(
                "Tgid:\t5\nPid:\t{pid}\nThreads:\t{threads}\nSigPnd:\t{own:016x}\nShdPnd:\t{shared:016x}\nSigBlk:\t{blocked:016x}\n\
                 SigIgn:\t{ignored:016x}\n"
            ))
        };
        let usr1 = 1 << (libc::SIGUSR1 - 1);
        assert_eq!(status(5, 1, 0, 0, 0, 0), Pending::Nothing);
        assert_eq!(status(5, 1, 0, usr1, 0, 0), Pending::Signal);
        assert_eq!(status(5, 4, 0, usr1, 0, 0), Pending::Signal);
        assert_eq!(status(6, 4, 0, usr1, 0, 0), Pending::Nothing, "the first thread takes it");
        assert_eq!(status(6, 4, usr1, 0, 0, 0), Pending::Signal);
        assert_eq!(status(5, 1, usr1, usr1, usr1, 0), Pending::Nothing, "blocked");
        assert_eq!(status(5, 1, usr1, usr1, 0, usr1), Pending::Nothing, "ignored");
        assert_eq!(status(6, 4, 0, KILL_BIT, u64::MAX, 0), Pending::Kill);
        assert_eq!(pending(0), Pending::Nothing);
    }

    #[test]
    fn a_pending_kill_is_seen_in_either_mask() {
        let status =
            |own: &str, shared: &str| format!("Name:\tx\nSigPnd:\t{own}\nShdPnd:\t{shared}\nSigBlk:\t0\n");
        assert!(kill_pending(&status("0000000000000100", "0000000000000000")));
        assert!(kill_pending(&status("0000000000000000", "0000000000004100")));
        assert!(!kill_pending(&status("0000000000000002", "0000000000004000")));
        assert!(!kill_pending("no masks"));
    }

    #[test]
    fn a_living_thread_is_not_dying() {
        assert!(!is_dying(std::process::id()));
        assert!(!is_dying(u32::MAX));
    }

    #[tokio::test]
    async fn slow_work_is_waited_for() {
        let work = pin!(async {
            tokio::time::sleep(FIRST_LOOK + NEXT_LOOK / 4).await;
            7
        });
        assert_eq!(until_dying(std::process::id(), work).await, Some(7));
    }
}
