//! The only user of the system's clocks.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::Timestamp;

/// The wall clock, for file times and people. Never for timeouts.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp::new(since.as_secs() as i64, since.subsec_nanos())
        .expect("a system clock's nanoseconds are in range")
}

/// The monotonic clock, for intervals within one process.
pub fn monotonic() -> Instant {
    Instant::now()
}

/// A moment of the boot clock, which also counts while the machine is suspended: for leases, of which two machines
/// must not think differently for longer than their clocks drift.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct BootTime(Duration);

impl BootTime {
    /// Nanoseconds since the boot; what fits 64 bits is 584 years.
    pub fn nanos(self) -> u64 {
        u64::try_from(self.0.as_nanos()).unwrap_or(u64::MAX)
    }

    /// From [`BootTime::nanos`].
    pub const fn from_nanos(nanos: u64) -> BootTime {
        BootTime(Duration::from_nanos(nanos))
    }

    /// Time since an earlier moment; zero if it is later.
    pub fn since(self, earlier: BootTime) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl std::ops::Add<Duration> for BootTime {
    type Output = BootTime;

    fn add(self, more: Duration) -> BootTime {
        BootTime(self.0.saturating_add(more))
    }
}

impl std::ops::Sub<Duration> for BootTime {
    type Output = BootTime;

    /// The boot at the earliest.
    fn sub(self, less: Duration) -> BootTime {
        BootTime(self.0.saturating_sub(less))
    }
}

impl std::ops::AddAssign<Duration> for BootTime {
    fn add_assign(&mut self, more: Duration) {
        *self = *self + more;
    }
}

/// The boot clock.
pub fn boot() -> BootTime {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel writes one `timespec`. The call does not fail for a clock that every Linux since 2.6.39 has.
    let done = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut now) };
    assert_eq!(done, 0, "the boot clock can be read");
    BootTime(Duration::new(now.tv_sec.cast_unsigned(), u32::try_from(now.tv_nsec).unwrap_or(0)))
}
