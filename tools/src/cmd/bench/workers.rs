//! Threads that start together, and the time until the last is done.
//!
//! Workers are threads of this process, not processes: they share one address space and one table of open files,
//! which costs them a few shared locks that processes would not share (some percent on a local filesystem, nothing
//! that shows on a mount), and in return results, errors and the stop flag need no channel of their own. Every worker
//! has a directory of its own, because the kernel lets only one of them at a time change a directory (and
//! FUSE, unless the daemon asks for more, look into one): eight workers in one directory measure that lock.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Condvar, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use shardfs_proto::types::clock;

use super::workspace::Stop;

/// Workers that a benchmark may have.
pub const WORKERS_MAX: usize = 512;

/// What a worker asks whether to go on.
pub struct Phase<'a> {
    stop: &'a Stop,
    failed: AtomicBool,
    began: Mutex<Option<Instant>>,
    start: Condvar,
}

impl Phase<'_> {
    /// An error once the run is interrupted or another worker failed.
    pub fn check(&self) -> Result<()> {
        self.stop.check()?;
        if self.failed.load(Ordering::Relaxed) {
            bail!(OTHER_FAILED);
        }
        Ok(())
    }

    fn wait(&self) -> Result<()> {
        let mut began = self.began.lock().expect("no worker panics while it holds this lock");
        while began.is_none() {
            began = self.start.wait(began).expect("no worker panics while it holds this lock");
        }
        drop(began);
        self.check()
    }

    fn release(&self) -> Instant {
        let now = clock::monotonic();
        *self.began.lock().expect("no worker panics while it holds this lock") = Some(now);
        self.start.notify_all();
        now
    }
}

/// The error of a worker that ended because of another's; never the one that is reported.
const OTHER_FAILED: &str = "another worker failed";

/// Runs `work` on as many threads, which start together; answers the time from the start until the last was done, and
/// what each answered. The first error of any is the error of all.
pub fn run<T: Send>(
    workers: usize,
    stop: &Stop,
    work: impl Fn(usize, &Phase<'_>) -> Result<T> + Sync,
) -> Result<(Duration, Vec<T>)> {
    let phase =
        Phase { stop, failed: AtomicBool::new(false), began: Mutex::new(None), start: Condvar::new() };
    let one = |number: usize| {
        let answer = phase.wait().and_then(|()| work(number, &phase));
        if answer.is_err() {
            phase.failed.store(true, Ordering::Relaxed);
        }
        (answer, clock::monotonic())
    };
    let (began, answers) = std::thread::scope(|scope| -> Result<_> {
        let mut threads = Vec::with_capacity(workers);
        for number in 0..workers {
            let thread = std::thread::Builder::new().name(format!("bench-{number}")).spawn_scoped(scope, {
                let one = &one;
                move || one(number)
            });
            match thread {
                Ok(thread) => threads.push(thread),
                Err(error) => {
                    phase.failed.store(true, Ordering::Relaxed);
                    phase.release();
                    return Err(error).with_context(|| format!("cannot start worker {number} of {workers}"));
                }
            }
        }
        let began = phase.release();
        let answers = threads.into_iter().map(|t| t.join()).collect::<Vec<_>>();
        Ok((began, answers))
    })?;
    let mut results = Vec::with_capacity(workers);
    let mut first_error: Option<anyhow::Error> = None;
    let mut ended = began;
    for answer in answers {
        let Ok((answer, when)) = answer else { bail!("a worker panicked: this is a bug of the benchmark") };
        ended = ended.max(when);
        match answer {
            Ok(result) => results.push(result),
            Err(error) => {
                let secondary = first_error.as_ref().is_none_or(|e| e.to_string() == OTHER_FAILED);
                if secondary {
                    first_error = Some(error);
                }
            }
        }
    }
    match first_error {
        Some(error) => Err(error),
        None => Ok((ended.duration_since(began), results)),
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicUsize;

    use super::*;

    #[test]
    fn all_run_and_answer_in_order() {
        let running = AtomicUsize::new(0);
        let (_, got) = run(4, &Stop::default(), |number, phase| {
            running.fetch_add(1, Ordering::SeqCst);
            // Ends only if all four run at a time.
            while running.load(Ordering::SeqCst) < 4 {
                phase.check()?;
                std::thread::yield_now();
            }
            Ok(number)
        })
        .unwrap();
        assert_eq!(got, [0, 1, 2, 3]);
    }

    #[test]
    fn one_failure_ends_all_and_is_the_one_reported() {
        let error = run(3, &Stop::default(), |number, phase| {
            if number == 2 {
                bail!("the third broke");
            }
            loop {
                phase.check()?;
                std::thread::yield_now();
            }
            #[allow(unreachable_code)]
            Ok(())
        })
        .unwrap_err();
        assert_eq!(error.to_string(), "the third broke");
    }

    #[test]
    fn a_stop_ends_all() {
        let stop = Stop::default();
        stop.request(crate::failure::EXIT_INTERRUPTED);
        assert!(run(2, &stop, |_, _| Ok(())).is_err());
    }
}
