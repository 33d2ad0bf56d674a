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

/// Year, month, day and second of the day of seconds since 1970, in the proleptic Gregorian calendar.
/// Counts days in eras of 400 years that begin on 1 March of the year 0.
pub fn civil(seconds: i64) -> (i64, u32, u32, u32) {
    const DAYS_OF_ERA: i64 = 146_097;
    const DAYS_TO_1970: i64 = 719_468;
    let second = seconds.rem_euclid(86_400) as u32;
    let days = seconds.div_euclid(86_400) + DAYS_TO_1970;
    let era = days.div_euclid(DAYS_OF_ERA);
    let day = days.rem_euclid(DAYS_OF_ERA);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day_of_month = (day_of_year - (153 * march_month + 2) / 5 + 1) as u32;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 } as u32;
    (year + era * 400 + i64::from(month <= 2), month, day_of_month, second)
}
