//! The runtime of what must go on in time, whatever the node is busy with: its heartbeats, and its copy of the records.
//!
//! Invariant: nothing runs on it that blocks, or that a caller can make long. What it calls has connections of its own, made
//! on it: a connection is driven by the runtime that made it.

use std::future::Future;

use tokio::runtime::{Builder, EnterGuard, Runtime};
use tokio::task::JoinHandle;

/// Two: reading all records anew keeps one thread for a while, and heartbeats do not wait for it.
const THREADS: usize = 2;

/// See the module. Ends with everything on it when dropped.
pub struct Control(Option<Runtime>);

impl Control {
    /// With nothing to do.
    pub fn start() -> std::io::Result<Control> {
        let mut builder = Builder::new_multi_thread();
        builder.worker_threads(THREADS).thread_name("control").enable_all().build().map(Some).map(Control)
    }

    fn runtime(&self) -> &Runtime {
        self.0.as_ref().expect("taken by the drop alone")
    }

    /// Runs something on it.
    pub fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
        self.runtime().spawn(work)
    }

    /// What is made while the guard lives belongs to it.
    pub fn enter(&self) -> EnterGuard<'_> {
        self.runtime().enter()
    }
}

impl Drop for Control {
    fn drop(&mut self) {
        // It is dropped by a task of another runtime, which must not wait.
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    /// The runtime that drops it has one thread, which waits for nothing.
    #[tokio::test]
    async fn it_goes_on_while_the_others_are_held_up() {
        let control = Control::start().unwrap();
        let (beats, mut heard) = tokio::sync::mpsc::unbounded_channel();
        control.spawn(async move {
            let mut ticks = tokio::time::interval(Duration::from_millis(1));
            loop {
                ticks.tick().await;
                if beats.send(()).is_err() {
                    return;
                }
            }
        });
        // This runtime does nothing else meanwhile.
        std::thread::sleep(Duration::from_secs(1));
        let mut count = 0;
        while heard.try_recv().is_ok() {
            count += 1;
        }
        assert!(count > 10, "{count} beats");
        drop(control);
        let ended =
            tokio::time::timeout(Duration::from_secs(60), async { while heard.recv().await.is_some() {} });
        ended.await.unwrap();
    }
}
