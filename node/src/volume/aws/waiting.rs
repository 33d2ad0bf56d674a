//! Waits for what EC2 does in its own time, and for what it says to become true.

use std::time::Duration;

use shardfs_proto::types::{Error, Result};
use tokio::time::{Instant, sleep, timeout_at};

use super::failure::Failure;

/// The first pause between two looks.
const PAUSE_MIN: Duration = Duration::from_millis(400);
/// The longest.
const PAUSE_MAX: Duration = Duration::from_secs(4);
/// What one pause is longer than the one before.
const PAUSE_GROWTH: f64 = 1.5;
/// EC2's answers may be behind by seconds: what it does not know all this time is not there.
pub(super) const CERTAIN_AFTER: Duration = Duration::from_secs(10);

/// What a look at it came to.
pub(super) enum Step<T> {
    /// It is as it should be.
    Done(T),
    /// Not yet, and why.
    Wait(String),
    /// Not yet; what to do next need not wait. The callers bound how often they say so.
    AtOnce,
}

/// Why a step failed.
pub(super) enum Trouble {
    /// A call failed; it is repeated if that may pass.
    Call(Failure),
    /// Nothing to wait for.
    Final(Error),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Trouble {
        Trouble::Call(failure)
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Trouble {
        Trouble::Final(error)
    }
}

/// Repeats a step until it is done, fails for good, or the time is over.
pub(super) async fn until<T>(
    what: &str,
    at_most: Duration,
    mut step: impl AsyncFnMut() -> Result<Step<T>, Trouble>,
) -> Result<T> {
    let deadline = Instant::now() + at_most;
    let mut pause = PAUSE_MIN;
    let mut last = "no answer of EC2".to_owned();
    loop {
        match timeout_at(deadline, step()).await {
            Ok(Ok(Step::Done(value))) => return Ok(value),
            Ok(Ok(Step::AtOnce)) => continue,
            Ok(Ok(Step::Wait(why))) => last = why,
            Ok(Err(Trouble::Call(failure))) if failure.passes() => last = failure.to_string(),
            Ok(Err(Trouble::Call(failure))) => return Err(Error::from(failure).context(what)),
            Ok(Err(Trouble::Final(error))) => return Err(error.context(what)),
            Err(_elapsed) => {}
        }
        // Jitter: machines that wait for the same event do not ask in step.
        let next = Instant::now() + pause.mul_f64(0.5 + fastrand::f64() / 2.0);
        if next >= deadline {
            return Err(Error::unavailable(format!(
                "{what}: not done after {} seconds: {last}",
                at_most.as_secs()
            )));
        }
        sleep(next - Instant::now()).await;
        pause = pause.mul_f64(PAUSE_GROWTH).min(PAUSE_MAX);
    }
}

/// Since when EC2 does not know something.
#[derive(Default)]
pub(super) struct Absence {
    since: Option<Instant>,
}

impl Absence {
    /// It does not now; whether it is certain.
    pub(super) fn is_certain(&mut self) -> bool {
        self.since.get_or_insert_with(Instant::now).elapsed() >= CERTAIN_AFTER
    }

    /// It does.
    pub(super) fn over(&mut self) {
        self.since = None;
    }
}
