//! What has been written to a shard's log but may not be on the device yet.
//!
//! Groups are numbered in the order they are written. A session's writes that are not synced are noted
//! *before* the batch is written, so that whoever sees them in a snapshot finds the note; they are
//! struck off after a sync that began after the batch was written.
//!
//! Invariant: a sync that returned covers every group whose write had returned when it began. Waiters
//! that need no more than a sync under way covers share the next one: the barrier.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::{Error, Result, SessionId, clock};

use super::Room;
use super::store::Store;

#[derive(Default)]
struct Unsynced {
    /// The last group whose write returned.
    written: u64,
    /// The last group that is on the device, with all before it.
    synced: u64,
    /// When the oldest group that is not synced was written.
    since: Option<Instant>,
    /// The last unsynced group of each session.
    sessions: HashMap<Option<SessionId>, u64>,
}

impl Unsynced {
    fn mark_synced(&mut self, group: u64, began: Instant) {
        self.synced = self.synced.max(group);
        self.sessions.retain(|_, last| *last > group);
        self.since = if self.written > self.synced { Some(began) } else { None };
    }
}

/// See the module.
#[derive(Default)]
pub struct SyncLog {
    unsynced: Mutex<Unsynced>,
    barrier: tokio::sync::Mutex<()>,
}

impl SyncLog {
    /// The next group is going to be written, with changes by these sessions; its number.
    pub fn begin(&self, sessions: impl Iterator<Item = Option<SessionId>>) -> u64 {
        let mut u = self.unsynced.lock();
        let group = u.written + 1;
        for session in sessions {
            u.sessions.insert(session, group);
        }
        u.since.get_or_insert_with(clock::monotonic);
        group
    }

    /// A group was written, and synced or not.
    pub fn written(&self, group: u64, synced: bool) {
        let mut u = self.unsynced.lock();
        u.written = u.written.max(group);
        if synced {
            u.mark_synced(group, clock::monotonic());
        }
    }

    /// The last group that has unsynced changes of somebody but `session`. Callers without a session are
    /// strangers to each other.
    pub fn of_others(&self, session: Option<SessionId>) -> Option<u64> {
        let u = self.unsynced.lock();
        u.sessions.iter().filter(|(by, _)| by.is_none() || **by != session).map(|(_, group)| *group).max()
    }

    /// How long the oldest unsynced group has waited.
    pub fn age(&self) -> Option<Duration> {
        let since = self.unsynced.lock().since?;
        Some(clock::monotonic().saturating_duration_since(since))
    }

    /// Makes everything durable that was written before the call.
    pub async fn sync(&self, store: &Arc<dyn Store>, room: &Arc<dyn Room>) -> Result<()> {
        let need = self.unsynced.lock().written;
        self.sync_up_to(store, room, need).await
    }

    /// Makes what a snapshot taken before the call shows of groups up to `need` durable.
    pub async fn sync_up_to(&self, store: &Arc<dyn Store>, room: &Arc<dyn Room>, need: u64) -> Result<()> {
        if self.unsynced.lock().synced >= need {
            return Ok(());
        }
        let _one_at_a_time = self.barrier.lock().await;
        let (began, target) = {
            let u = self.unsynced.lock();
            if u.synced >= need {
                return Ok(());
            }
            (clock::monotonic(), u.written)
        };
        let (store, room) = (Arc::clone(store), Arc::clone(room));
        let synced = tokio::task::spawn_blocking(move || store.sync_log().inspect(|()| room.synced())).await;
        synced.map_err(|e| Error::internal(format!("a sync of the log was lost: {e}")))??;
        self.unsynced.lock().mark_synced(target, began);
        Ok(())
    }

    /// The same from a thread that may block, for the executor.
    pub fn sync_blocking(&self, store: &dyn Store, room: &dyn Room) -> Result<()> {
        let (began, target) = {
            let u = self.unsynced.lock();
            if u.synced >= u.written {
                return Ok(());
            }
            (clock::monotonic(), u.written)
        };
        store.sync_log()?;
        room.synced();
        self.unsynced.lock().mark_synced(target, began);
        Ok(())
    }
}
