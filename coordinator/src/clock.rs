//! The one place that reads the system's clocks, so that everything else can be given a time.

use std::time::{SystemTime, UNIX_EPOCH};

pub use std::time::{Duration, Instant};

/// Milliseconds since the Unix epoch, for timestamps that are stored or shown; may jump when the clock is set.
#[expect(clippy::disallowed_methods, reason = "the one place that may")]
pub fn now_ms() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// A point on the monotonic clock, for durations and deadlines.
pub fn monotonic() -> Instant {
    Instant::now()
}
