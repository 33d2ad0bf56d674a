//! Clocks: leases are timed by the boot clock, files by the wall clock.

use std::time::Duration;

use shardfs_proto::types::clock;

use super::Check;

/// Nobody has set the wall clock by others' (`adjtimex`, linux/timex.h).
const STA_UNSYNC: i32 = 0x40;

/// Looks.
pub fn checks() -> Vec<Check> {
    vec![boot(), wall(status())]
}

fn boot() -> Check {
    const NAME: &str = "boot clock";
    let before = clock::boot();
    std::thread::sleep(Duration::from_millis(1));
    match clock::boot().since(before) {
        Duration::ZERO => Check::fail(
            NAME,
            "CLOCK_BOOTTIME stands still: leases cannot be timed",
            "use a kernel and a sandbox in which clock_gettime(CLOCK_BOOTTIME) works",
        ),
        _goes => Check::ok(NAME, "CLOCK_BOOTTIME goes"),
    }
}

fn status() -> Option<i32> {
    // SAFETY: all fields of `timex` are numbers, of which zero is one; with `modes` 0 the kernel only fills it.
    let mut asked: libc::timex = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one `timex`.
    let state = unsafe { libc::adjtimex(&raw mut asked) };
    (state >= 0).then_some(asked.status)
}

fn wall(status: Option<i32>) -> Check {
    const NAME: &str = "wall clock";
    match status {
        Some(status) if status & STA_UNSYNC == 0 => Check::ok(NAME, "is kept by time synchronisation"),
        Some(_) => Check::warn(
            NAME,
            "is not synchronised: times of files may differ between machines (failover does not use it)",
            "run chrony, systemd-timesyncd or ntpd",
        ),
        None => Check::skipped(NAME, "the kernel does not say whether it is synchronised"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn clocks_are_judged() {
        assert_eq!(wall(Some(0)).outcome, Outcome::Ok);
        assert_eq!(wall(Some(STA_UNSYNC | 1)).outcome, Outcome::Warn);
        assert_eq!(wall(None).outcome, Outcome::Skipped);
        assert_eq!(boot().outcome, Outcome::Ok);
    }
}
