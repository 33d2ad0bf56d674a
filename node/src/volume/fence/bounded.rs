//! Calls into the kernel that may never come back, with an end in time.
//!
//! A call that outlives its bound goes on in a thread of its own, which ends with it; its answer is dropped.
//! So nothing that it does late may harm: every user says why.

use std::sync::mpsc;
use std::time::Duration;

use shardfs_proto::types::{Error, Result};

/// Runs it in a thread of its own; `None` if it has not ended in time.
pub(super) fn bounded<T: Send + 'static>(
    what: &str,
    bound: Duration,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<Option<T>> {
    let (answer, answered) = mpsc::sync_channel(1);
    std::thread::Builder::new()
        .name("fence".into())
        .spawn(move || {
            // Nobody waits any more: the bound is over.
            let _ = answer.send(work());
        })
        .map_err(|e| Error::io(format!("starting a thread for {what}: {e}")))?;
    match answered.recv_timeout(bound) {
        Ok(done) => Ok(Some(done)),
        Err(mpsc::RecvTimeoutError::Timeout) => Ok(None),
        Err(mpsc::RecvTimeoutError::Disconnected) => {
            Err(Error::internal(format!("{what}: its thread panicked")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ends_answers_and_what_hangs_does_not() {
        assert_eq!(bounded("x", Duration::from_secs(5), || 7).unwrap(), Some(7));
        let (_keep, never) = mpsc::channel::<()>();
        let hung = bounded("x", Duration::from_millis(20), move || never.recv().is_ok()).unwrap();
        assert_eq!(hung, None);
    }
}
