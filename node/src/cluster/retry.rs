//! What the clients of metadata stores share: pauses between attempts, and how an error is told whole.

use std::time::Duration;

use shardfs_proto::types::clock;

use super::store::{StoreError, StoreResult};

/// How long a call is repeated.
pub(super) const RETRY_MAX: Duration = Duration::from_secs(10);
/// Pauses between attempts, before jitter.
const BACKOFF_MIN: Duration = Duration::from_millis(20);
/// See [`BACKOFF_MIN`].
const BACKOFF_MAX: Duration = Duration::from_millis(500);

/// Pauses that double, with jitter.
pub(super) struct Backoff {
    pause: Duration,
}

impl Backoff {
    pub(super) fn new() -> Backoff {
        Backoff { pause: BACKOFF_MIN }
    }

    pub(super) fn next(&mut self) -> Duration {
        let pause = self.pause.mul_f64(0.5 + fastrand::f64());
        self.pause = (self.pause * 2).min(BACKOFF_MAX);
        pause
    }
}

/// Attempts a call until it succeeds, fails for good, or `within` is over. `repeatable`: it may be made twice.
pub(super) async fn repeat<T, Fut>(
    repeatable: bool,
    within: Duration,
    attempt: impl Fn() -> Fut,
) -> StoreResult<T>
where
    Fut: Future<Output = StoreResult<T>>,
{
    let end = clock::monotonic() + within;
    let mut backoff = Backoff::new();
    loop {
        let error = match attempt().await {
            Ok(reply) => return Ok(reply),
            Err(error) => error,
        };
        let again = match &error {
            StoreError::Unavailable(_) => true,
            StoreError::OutcomeUnknown(_) => repeatable,
            StoreError::Compacted
            | StoreError::LeaseUnknown
            | StoreError::Invalid(_)
            | StoreError::Failed(_) => false,
        };
        let pause = backoff.next();
        if !again || clock::monotonic() + pause >= end {
            return Err(match error {
                // Of a read nothing is unknown: it did not happen.
                StoreError::OutcomeUnknown(why) if repeatable => StoreError::Unavailable(why),
                error => error,
            });
        }
        tokio::time::sleep(pause).await;
    }
}

/// An error with its causes.
pub(super) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        // Some layers repeat the text of what is below them.
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}
