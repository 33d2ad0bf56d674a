//! Proof that this node still has a volume: a write to the device that began after the question.
//!
//! The device refuses a node that was deposed, so a write that succeeds says that at its beginning nobody else had the
//! volume. Questions that come while a write is under way wait for the next one: it serves them all.
//!
//! Invariant: a question is answered `Ok` only by a write that began after it was asked; or, while nobody else can have been
//! elected, by a look at the filesystem after it was asked ([`Barrier::glance`]): it may have failed by itself.

use std::sync::Arc;

use parking_lot::Mutex;
use shardfs_proto::types::{Error, Result};
use tokio::sync::watch;

use crate::volume::Witness;

/// Of one volume, under one epoch.
pub struct Barrier {
    witness: Mutex<Option<Arc<Witness>>>,
    state: Mutex<State>,
    /// The last write that ended, and whether it failed: a volume that was lost once stays lost.
    ended: watch::Sender<(u64, Option<Error>)>,
}

#[derive(Default)]
struct State {
    /// Writes begun.
    begun: u64,
    running: bool,
    /// Somebody asked after the one that is running began.
    again: bool,
    /// What was seen at the last look, and looks since at which it was the same.
    looked_at: (Seen, u32),
}

/// What a look sees: the write that is running, and what the device has completed.
type Seen = (Option<u64>, Option<u64>);

impl Barrier {
    /// Of the volume that the witness tells of.
    pub fn new(witness: Witness) -> Arc<Barrier> {
        Arc::new(Barrier {
            witness: Mutex::new(Some(Arc::new(witness))),
            state: Mutex::default(),
            ended: watch::Sender::new((0, None)),
        })
    }

    /// Whether a write has failed.
    pub fn failed(&self) -> Option<Error> {
        self.ended.borrow().1.clone()
    }

    /// Waits until a write has failed.
    pub async fn failure(&self) -> Error {
        let mut ended = self.ended.subscribe();
        let failed = ended.wait_for(|(_, failed)| failed.is_some()).await.map(|ended| ended.1.clone());
        match failed {
            Ok(Some(error)) => error,
            // It is there for as long as this is waited for.
            Ok(None) | Err(_) => std::future::pending().await,
        }
    }

    /// Waits for a write that begins from now on.
    pub async fn pass(self: &Arc<Self>) -> Result<()> {
        let mut ended = self.ended.subscribe();
        let wanted = {
            let mut state = self.state.lock();
            // The one that is running began before this question.
            let wanted = state.begun + 1;
            if state.running {
                state.again = true;
            } else {
                state.running = true;
                state.begun = wanted;
                self.spawn();
            }
            wanted
        };
        let done = ended
            .wait_for(|(number, failed)| *number >= wanted || failed.is_some())
            .await
            .map_err(|_| Error::internal("a barrier was dropped while it was waited for"))?;
        match &done.1 {
            None => Ok(()),
            Some(error) => Err(error.clone()),
        }
    }

    /// Looks whether the device still answers; to be called at a steady pace. If a write is the same one at `looks_max` looks, and
    /// the device has completed nothing meanwhile, it is not waited for any longer: a device that hangs gives no error, and nobody
    /// else would take the volume. One that is slow because it has much to do completes something. Counted in looks, for a
    /// process that was stopped has missed them as well.
    pub fn look(&self, looks_max: u32) {
        let witness = self.witness.lock().clone();
        self.look_at(witness.and_then(|witness| witness.completed()), looks_max);
    }

    fn look_at(&self, completed: Option<u64>, looks_max: u32) {
        let looks = {
            let mut state = self.state.lock();
            let seen = (state.running.then_some(state.begun), completed);
            let same = state.looked_at.0 == seen && state.running && completed.is_some();
            state.looked_at = (seen, if same { state.looked_at.1 + 1 } else { 0 });
            state.looked_at.1
        };
        if looks >= looks_max && self.failed().is_none() {
            self.fail(&Error::unavailable(format!("a write has not ended after {looks} looks")));
        }
    }

    /// Whether the filesystem is there, so that the syncs before count; `None`: that takes a write to tell. Cheap, and
    /// does not wait.
    pub fn glance(&self) -> Option<Result<()>> {
        if let Some(error) = self.failed() {
            return Some(Err(error));
        }
        // Not under the lock: a look waits for nothing, but another thread's journal check may.
        let witness = self.witness.lock().clone();
        let seen = match witness {
            Some(witness) => witness.glance()?,
            None => Err(Error::unavailable("the volume is being given up")),
        };
        Some(seen.map_err(|e| self.fail(&e)))
    }

    /// A sync has succeeded. If it may not count, everything fails from now on: what waits for it asks for proof before it is
    /// answered.
    pub fn synced(&self) {
        let witness = self.witness.lock().clone();
        let checked = match witness {
            Some(witness) => witness.check_journal(),
            // Nothing is confirmed any more.
            None => return,
        };
        if let Err(e) = checked {
            self.fail(&e);
        }
    }

    fn fail(&self, error: &Error) -> Error {
        let error = lost(error);
        self.ended.send_modify(|ended| {
            ended.1.get_or_insert_with(|| error.clone());
        });
        error
    }

    fn spawn(self: &Arc<Self>) {
        let this = self.clone();
        // Goes on when its callers have left: others may have come since.
        tokio::task::spawn_blocking(move || {
            loop {
                let number = this.state.lock().begun;
                let outcome = this.write();
                let failed = outcome.is_err();
                this.ended.send_modify(|ended| {
                    ended.0 = number;
                    if let Err(error) = outcome {
                        ended.1.get_or_insert(error);
                    }
                });
                let mut state = this.state.lock();
                if !state.again || failed {
                    state.running = false;
                    return;
                }
                state.again = false;
                state.begun += 1;
            }
        });
    }

    fn write(&self) -> Result<()> {
        fail::fail_point!("catalog-barrier", |_| Err(Error::unavailable("failpoint")));
        let Some(witness) = self.witness.lock().clone() else {
            return Err(Error::unavailable("the volume is being given up"));
        };
        witness.prove().map_err(|e| lost(&e))
    }

    /// Lets go of the file, so that the volume can be unmounted.
    pub fn close(&self) {
        *self.witness.lock() = None;
    }
}

fn lost(error: &Error) -> Error {
    Error::unavailable(format!("another node has the volume, or its device failed: {}", error.message()))
        .with_retry_after_ms(20)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_device_that_hangs_is_given_up() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity");
        std::fs::write(&path, "x").unwrap();
        let barrier = Barrier::new(Witness::of(&path).unwrap());
        for _ in 0..10 {
            barrier.pass().await.unwrap();
            barrier.look_at(Some(7), 2);
        }
        assert!(barrier.failed().is_none(), "each write was another one");
        // As while one is under way that does not end.
        {
            let mut state = barrier.state.lock();
            state.running = true;
            state.begun += 1;
        }
        let waiting = tokio::spawn({
            let barrier = barrier.clone();
            async move { barrier.pass().await }
        });
        for completed in 0..10 {
            barrier.look_at(Some(completed), 2);
        }
        assert!(barrier.failed().is_none(), "it is slow, and has much to do");
        for _ in 0..10 {
            barrier.look_at(None, 2);
        }
        assert!(barrier.failed().is_none(), "nobody knows");
        for looks in 0..3 {
            assert!(barrier.failed().is_none(), "{looks} looks");
            barrier.look_at(Some(10), 2);
        }
        assert!(waiting.await.unwrap().is_err(), "who waits hears of it");
        assert!(barrier.failed().is_some());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn questions_share_writes_that_begin_after_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity");
        std::fs::write(&path, "x").unwrap();
        let barrier = Barrier::new(Witness::of(&path).unwrap());
        let mut tasks = Vec::new();
        for _ in 0..200 {
            let barrier = barrier.clone();
            tasks.push(tokio::spawn(async move {
                let before = barrier.state.lock().begun;
                barrier.pass().await.unwrap();
                let ended = barrier.ended.borrow().0;
                assert!(ended > before, "a write that began later: {ended} after {before}");
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
        assert!(barrier.failed().is_none());
        let writes = barrier.ended.borrow().0;
        assert!((1..=200).contains(&writes), "{writes}");
    }

    #[tokio::test]
    async fn a_volume_that_is_lost_stays_lost() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("identity");
        std::fs::write(&path, "x").unwrap();
        let barrier = Barrier::new(Witness::of(&path).unwrap());
        barrier.pass().await.unwrap();
        assert!(barrier.glance().is_some_and(|seen| seen.is_ok()));
        barrier.close();
        assert!(barrier.glance().is_some_and(|seen| seen.is_err()));
        assert!(barrier.pass().await.is_err());
        assert!(barrier.failed().is_some());
        assert!(barrier.pass().await.is_err());
    }
}
