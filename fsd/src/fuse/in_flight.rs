//! Requests in flight: each runs as a task, and is replied to when it has ended.
//!
//! They are bounded by their size (`IN_FLIGHT_BYTES_MAX`). At the bound the threads that read /dev/fuse wait, and the kernel
//! queues; a request ends by the client's deadline, if there is one, or some time after its caller, so that they go on. What
//! the kernel has queued, a caller that is killed leaves without this program.

use std::pin::pin;
use std::sync::Arc;

use fuser::Errno;
use shardfs_proto::types::clock;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::Fuse;
use super::answer::{Asked, Refuse, Unwanted, conclude, note_walk};
use super::patience;
use crate::failure::Outcome;
use crate::fs::Fs;

/// Bytes of requests and of the replies they ask for, in flight.
const IN_FLIGHT_BYTES_MAX: usize = 256 << 20;
/// What a request without content counts for; also the unit in which bytes are counted.
const REQUEST_BYTES: usize = 16 << 10;

pub(super) fn places() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(IN_FLIGHT_BYTES_MAX / REQUEST_BYTES))
}

impl Fuse {
    /// Takes a request's place among those in flight, waiting at the bound.
    pub(super) fn place(&self, bytes: usize) -> Option<OwnedSemaphorePermit> {
        let units = (1 + bytes / REQUEST_BYTES) as u32;
        if let Ok(permit) = self.in_flight.clone().try_acquire_many_owned(units) {
            return Some(permit);
        }
        // None only if the semaphore were closed, which nobody does.
        self.runtime.block_on(self.in_flight.clone().acquire_many_owned(units)).ok()
    }

    /// Runs a request on the runtime and replies. `bytes`: of content, either way.
    ///
    /// A caller with a fatal signal pending gets its reply early: the kernel would not let it go otherwise.
    /// What was asked is done all the same, if it can be within [`patience::AFTER_DEATH_MAX`].
    pub(super) fn run<R, T, W>(
        &self,
        asked: Asked,
        bytes: usize,
        reply: R,
        work: impl FnOnce(Arc<Fs>) -> W,
        ok: impl FnOnce(R, T) + Send + 'static,
    ) where
        R: Refuse,
        T: Unwanted,
        W: Future<Output = Outcome<T>> + Send + 'static,
    {
        let permit = self.place(bytes);
        let metrics = self.metrics.clone();
        metrics.in_flight.inc();
        let fs = self.fs.clone();
        let work = work(fs.clone());
        self.runtime.spawn(async move {
            let started = clock::monotonic();
            let mut work = pin!(work);
            let failed = match patience::until_dying(asked.thread, work.as_mut()).await {
                Some(outcome) => {
                    note_walk(&fs, asked, &outcome);
                    conclude(asked, reply, outcome, ok)
                }
                None => {
                    reply.refuse(Errno::EINTR);
                    if let Ok(Ok(value)) = tokio::time::timeout(patience::AFTER_DEATH_MAX, work).await {
                        value.give_back(&fs);
                    }
                    Some(libc::EINTR)
                }
            };
            metrics.in_flight.dec();
            metrics.answered(asked.op, started.elapsed(), failed);
            drop(permit);
        });
    }

    /// The same for a reply that the work fills. The work changes nothing, and ends with its caller.
    pub(super) fn run_filling<R, W>(
        &self,
        asked: Asked,
        reply: R,
        work: impl FnOnce(Arc<Fs>, R) -> W,
        ok: impl FnOnce(R) + Send + 'static,
    ) where
        R: Refuse,
        W: Future<Output = (R, Outcome<()>)> + Send + 'static,
    {
        let permit = self.place(0);
        let metrics = self.metrics.clone();
        metrics.in_flight.inc();
        let work = work(self.fs.clone(), reply);
        self.runtime.spawn(async move {
            let started = clock::monotonic();
            let mut work = Box::pin(work);
            let failed = match patience::until_dying(asked.thread, work.as_mut()).await {
                Some((reply, outcome)) => conclude(asked, reply, outcome, |reply, ()| ok(reply)),
                None => {
                    // With the work goes its reply, which fuser answers.
                    drop(work);
                    Some(libc::EINTR)
                }
            };
            metrics.in_flight.dec();
            metrics.answered(asked.op, started.elapsed(), failed);
            drop(permit);
        });
    }

    /// Replies to a request that needs no node.
    pub(super) fn at_once<R: Refuse, T>(
        &self,
        asked: Asked,
        reply: R,
        outcome: Outcome<T>,
        ok: impl FnOnce(R, T),
    ) {
        let started = clock::monotonic();
        let failed = conclude(asked, reply, outcome, ok);
        self.metrics.answered(asked.op, started.elapsed(), failed);
    }
}
