//! How long a request is waited for: as long as its caller lives.
//!
//! The kernel lets a program that was killed go only when its request is answered, and fuser has no
//! INTERRUPT. So while a request waits (for a node that is away), the daemon looks whether the caller has
//! a SIGKILL pending; any signal that ends a program shows as one.

use std::pin::Pin;
use std::time::Duration;

/// Requests that are answered sooner are never looked at.
const FIRST_LOOK: Duration = Duration::from_secs(1);
/// From then on.
const NEXT_LOOK: Duration = Duration::from_millis(500);
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::pin::pin;

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
