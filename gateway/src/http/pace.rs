//! How long a request's body may take. Pauses are forgiven, a sender that trickles is not: it would hold memory and a
//! place that others wait for.

use std::time::Duration;

use coordinator::clock::{self, Instant};

use crate::error::ApiError;

/// A client that sends nothing for so long is cut off.
pub const BODY_IDLE: Duration = Duration::from_secs(30);
/// Every body gets this long, however little comes of it.
const BODY_GRACE: Duration = Duration::from_secs(60);
/// Beyond the grace so much must have come on average; the slowest DSL line that is sold sends more than this.
const MIN_BYTES_PER_S: u64 = 64 << 10;

/// What came of a body since its first byte was awaited.
#[derive(Debug)]
pub struct Pace {
    started: Instant,
    seen_bytes: u64,
}

impl Pace {
    /// The body is awaited from now on.
    pub fn start() -> Self {
        Self {
            started: clock::monotonic(),
            seen_bytes: 0,
        }
    }

    /// So many more bytes came.
    pub fn saw(&mut self, bytes: usize) {
        self.seen_bytes = self.seen_bytes.saturating_add(bytes as u64);
    }

    /// Bytes that came.
    pub fn seen_bytes(&self) -> u64 {
        self.seen_bytes
    }

    /// How long the next bytes may take.
    pub fn patience(&self) -> Duration {
        patience(self.seen_bytes, self.started.elapsed())
    }

    /// What to answer when they took longer.
    pub fn late(&self) -> ApiError {
        let why = if self.started.elapsed() < allowed(self.seen_bytes) {
            format!("stopped coming for {} s", BODY_IDLE.as_secs())
        } else {
            format!("came slower than {} KiB/s", MIN_BYTES_PER_S >> 10)
        };
        ApiError::timed_out(format!("the request's body {why}; send it again"))
    }
}

fn patience(seen_bytes: u64, elapsed: Duration) -> Duration {
    BODY_IDLE.min(allowed(seen_bytes).saturating_sub(elapsed))
}

fn allowed(seen_bytes: u64) -> Duration {
    BODY_GRACE + Duration::from_millis(seen_bytes.saturating_mul(1000) / MIN_BYTES_PER_S)
}

#[cfg(test)]
impl Pace {
    /// A body of which nothing came until its time was over.
    pub fn overdue() -> Self {
        let started = clock::monotonic()
            .checked_sub(BODY_GRACE)
            .expect("a clock that can go back a minute");
        Self {
            started,
            seen_bytes: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const S: Duration = Duration::from_secs(1);

    #[test]
    fn a_trickle_gets_its_grace_and_not_more() {
        assert_eq!(patience(0, Duration::ZERO), BODY_IDLE);
        assert_eq!(patience(2, 59 * S), S);
        assert_eq!(patience(3, 61 * S), Duration::ZERO);
    }

    #[test]
    fn a_body_at_the_slowest_pace_is_never_cut_off() {
        for seconds in 0..800 {
            let seen = MIN_BYTES_PER_S * u64::from(seconds);
            assert_eq!(patience(seen, seconds * S), BODY_IDLE, "after {seconds} s");
        }
    }

    #[test]
    fn a_body_at_half_the_slowest_pace_ends_after_twice_the_grace() {
        let patience_after = |seconds: u32| {
            let seen = MIN_BYTES_PER_S / 2 * u64::from(seconds);
            patience(seen, seconds * S)
        };
        assert!(patience_after(119) > Duration::ZERO);
        assert_eq!(patience_after(121), Duration::ZERO);
    }

    #[test]
    fn the_answer_says_whether_the_body_paused_or_crawled() {
        assert!(Pace::start().late().message().contains("stopped coming"));
        let error = Pace::overdue().late();
        assert_eq!(error.status().as_u16(), 408);
        assert!(error.message().contains("64 KiB/s"), "{}", error.message());
    }
}
