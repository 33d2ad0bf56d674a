//! The only user of the system's clocks.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

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
