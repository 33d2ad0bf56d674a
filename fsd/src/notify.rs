//! What the service manager is told, by sd_notify(3): that the mount is usable, that the daemon lives, that it leaves; by its
//! parent, that it died. So the unit says `NotifyAccess=all`, and the parent takes WATCHDOG_PID, which names the parent, out of the
//! daemon's environment.
//!
//! Invariants: a sign of life is given when the mount has just answered for its root: from the kernel through the threads that take
//! requests and the runtime, and back. That answer waits for nodes no longer than a moment, and for no lock that a request holds which
//! does: a cluster that is away is no reason to end the mount that programs wait on. Without NOTIFY_SOCKET nothing is sent, and none
//! of this runs.

use std::path::{Path, PathBuf};

use sd_notify::NotifyState;

use crate::probe;

/// Signs of life within the manager's patience.
const SIGNS_PER_PATIENCE: u32 = 2;

fn tell(states: &[NotifyState]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::warn!(%error, ?states, "the service manager cannot be told");
    }
}

/// The mount is usable.
pub fn ready(mount_point: &Path) {
    let status = format!("mounted at {}", mount_point.display());
    tell(&[NotifyState::Ready, NotifyState::Status(&status)]);
}

/// The settings are read again; [`ready`] ends that.
pub fn reloading() {
    match NotifyState::monotonic_usec_now() {
        Ok(now) => tell(&[NotifyState::Reloading, now]),
        Err(error) => tracing::warn!(%error, "the monotonic clock"),
    }
}

/// Said by the parent: the daemon is gone, and what becomes of it.
pub fn died(words: &str) {
    // A newline would begin another message.
    tell(&[NotifyState::Status(&words.replace('\n', " "))]);
}

/// The mount goes.
pub fn stopping() {
    tell(&[NotifyState::Stopping, NotifyState::Status("unmounting")]);
}

/// Gives signs of life while the mount answers; never returns.
pub async fn keep_alive(mount_point: PathBuf) {
    let Some(patience) = sd_notify::watchdog_enabled() else { return std::future::pending().await };
    // By the clock, not from answer to answer: without nodes that takes its moment.
    let mut ticks = tokio::time::interval(patience / SIGNS_PER_PATIENCE);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        // Where the mount does not answer this waits as well: one question is under way at a time.
        let answer = probe::answer(&mount_point).await;
        if let Err(error) = &answer {
            // That nobody can ask says nothing against the mount, which programs wait on.
            tracing::warn!(%error, "asking whether the mount answers");
        }
        // Whatever it says, it answers: after an unmount from outside it is another file system that does.
        tell(&[NotifyState::Watchdog]);
    }
}
