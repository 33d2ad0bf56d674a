//! What a session did that was answered and may not be durable yet: made again when the shard has moved.
//!
//! A node answers some mutations before they are on its device. If the shard moves to another node then, they may be
//! lost, while programs count on a later fsync to make them durable. So they are kept here until a sync has
//! succeeded, and, before anything else is asked under another epoch, made again in order under their old numbers: what
//! was not lost after all is answered from its slot.
//!
//! Invariants: entries are in order of their numbers; each knows the epoch under which it was answered last; a sync under an
//! epoch makes everything durable that was here when it began and was answered under that epoch. An answer of an old primary may be
//! noted after others have been made again at the new one: it is made again by itself then, before the next call. Nobody
//! had seen it, so that is as good a place as any.

use std::collections::VecDeque;
use std::sync::Arc;

use parking_lot::Mutex;

use super::Client;
use super::channel::Node;
use super::session::{Session, header};
use crate::types::{Error, Reason, Result, ShardId};
use crate::wire;

/// What is kept at most before a sync is waited for: some of the largest writes; and fewer than a session has slots.
const ENTRIES_MAX: usize = 512;
const BYTES_MAX: usize = 32 << 20;
/// What an entry costs beside its data.
const ENTRY_BYTES: usize = 256;

#[derive(Default)]
pub(super) struct Unsynced {
    state: Mutex<State>,
    /// Held while entries are made again.
    replaying: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// Of the entries, unless they are `mixed`.
    epoch: u64,
    mixed: bool,
    entries: VecDeque<Entry>,
    bytes: usize,
    /// Of an entry that could not be made again: told to the next sync.
    lost: Option<Error>,
}

#[derive(Clone)]
struct Entry {
    sequence: u64,
    epoch: u64,
    operation: wire::Operation,
    bytes: usize,
}

/// How full it is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Fill {
    /// Nothing to do.
    Low,
    /// A sync in the background keeps callers from waiting.
    Half,
    /// A sync has to be waited for.
    Full,
}

impl Unsynced {
    /// Keeps a mutation that was answered under an epoch.
    pub(super) fn keep(
        &self,
        epoch: u64,
        sequence: u64,
        operation: wire::Operation,
        data_bytes: usize,
    ) -> Fill {
        let mut state = self.state.lock();
        if state.entries.is_empty() {
            (state.epoch, state.mixed) = (epoch, false);
        }
        state.mixed |= state.epoch != epoch;
        let bytes = data_bytes + ENTRY_BYTES;
        // Answers may cross.
        let at = state.entries.partition_point(|entry| entry.sequence < sequence);
        state.entries.insert(at, Entry { sequence, epoch, operation, bytes });
        state.bytes += bytes;
        let full =
            |share: usize| state.entries.len() >= ENTRIES_MAX / share || state.bytes >= BYTES_MAX / share;
        match (full(1), full(2)) {
            (true, _) => Fill::Full,
            (false, true) => Fill::Half,
            (false, false) => Fill::Low,
        }
    }

    /// The number up to which a sync that begins now makes everything durable; `None`: there is nothing.
    pub(super) fn mark(&self) -> Option<u64> {
        self.state.lock().entries.back().map(|entry| entry.sequence)
    }

    /// What a sync has made durable. An error: something was lost before.
    pub(super) fn synced(&self, mark: Option<u64>) -> Result<()> {
        let mut state = self.state.lock();
        let Some(mark) = mark else { return state.lost.take().map_or(Ok(()), Err) };
        while let Some(entry) = state.entries.front().filter(|entry| entry.sequence <= mark) {
            let bytes = entry.bytes;
            state.entries.pop_front();
            state.bytes -= bytes;
        }
        state.lost.take().map_or(Ok(()), Err)
    }

    /// Gives everything up: the session is gone.
    pub(super) fn give_up(&self) {
        let mut state = self.state.lock();
        if !state.entries.is_empty() {
            state.lost = Some(Error::new(
                Reason::SessionUnknown,
                "the session expired before what it had written was durable: it may be lost",
            ));
        }
        state.entries.clear();
        state.bytes = 0;
    }

    fn pending(&self, epoch: u64) -> Vec<Entry> {
        let state = self.state.lock();
        if state.epoch == epoch && !state.mixed {
            return Vec::new();
        }
        state.entries.iter().filter(|entry| entry.epoch != epoch).cloned().collect()
    }

    /// Notes that entries were made again under an epoch.
    fn made_again(&self, epoch: u64, sequences: &[u64]) {
        let mut state = self.state.lock();
        for entry in state.entries.iter_mut().filter(|entry| sequences.contains(&entry.sequence)) {
            entry.epoch = epoch;
        }
        state.epoch = epoch;
        state.mixed = state.entries.iter().any(|entry| entry.epoch != epoch);
    }
}

impl Client {
    /// Makes what may be lost again, if the shard is served under another epoch than before.
    ///
    /// # Errors
    /// What may pass: the caller begins anew.
    pub(super) async fn replay(
        &self,
        shard: ShardId,
        session: &Arc<Session>,
        node: &Node,
        epoch: u64,
    ) -> Result<(), tonic::Status> {
        let unsynced = &session.unsynced;
        if unsynced.pending(epoch).is_empty() {
            return Ok(());
        }
        let _alone = unsynced.replaying.lock().await;
        let pending = unsynced.pending(epoch);
        if !pending.is_empty() {
            tracing::info!(%shard, epoch, count = pending.len(), "the shard has moved: repeating what may be lost");
        }
        let sequences: Vec<u64> = pending.iter().map(|entry| entry.sequence).collect();
        for entry in pending {
            let request = wire::MutateRequest {
                header: Some(header(shard, epoch, Some(session.id))),
                sequence: entry.sequence,
                operation: Some(entry.operation),
                durability: wire::Durability::Buffered.into(),
            };
            if let Err(status) = node.files().mutate(node.request(request)).await {
                let error = crate::status::from_status(&status);
                if error.is_retryable() {
                    return Err(status);
                }
                // What was written to is gone since: that is no loss.
                if error.reason() != Reason::NotFound {
                    tracing::error!(%shard, %error, "a change that was not durable yet could not be repeated");
                    unsynced.state.lock().lost.get_or_insert(error);
                }
            }
        }
        unsynced.made_again(epoch, &sequences);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_stay_until_a_sync_that_began_after_them() {
        let unsynced = Unsynced::default();
        assert_eq!(unsynced.mark(), None);
        let keep = |sequence| unsynced.keep(3, sequence, wire::Operation::default(), 10);
        assert_eq!(keep(2), Fill::Low);
        keep(1);
        let mark = unsynced.mark();
        assert_eq!(mark, Some(2));
        keep(3);
        unsynced.synced(mark).unwrap();
        assert!(unsynced.pending(3).is_empty());
        assert_eq!(unsynced.pending(4).iter().map(|e| e.sequence).collect::<Vec<_>>(), [3]);
        unsynced.give_up();
        assert!(unsynced.synced(None).is_err(), "the loss is told");
        assert!(unsynced.synced(None).is_ok(), "once");
    }

    #[test]
    fn an_answer_of_an_old_primary_that_is_noted_late_is_made_again() {
        let unsynced = Unsynced::default();
        let keep = |epoch, sequence| unsynced.keep(epoch, sequence, wire::Operation::default(), 10);
        let pending = |epoch| unsynced.pending(epoch).iter().map(|e| e.sequence).collect::<Vec<_>>();
        keep(3, 1);
        assert_eq!(pending(4), [1]);
        unsynced.made_again(4, &[1]);
        assert_eq!(pending(4), [0; 0]);
        keep(4, 3);
        keep(3, 2);
        assert_eq!(pending(4), [2]);
        assert_eq!(pending(5), [1, 2, 3]);
        unsynced.made_again(4, &[2]);
        assert_eq!(pending(4), [0; 0]);
        unsynced.synced(unsynced.mark()).unwrap();
        keep(3, 4);
        assert_eq!(pending(3), [0; 0]);
        assert_eq!(pending(4), [4]);
    }

    #[test]
    fn it_has_a_bound() {
        let unsynced = Unsynced::default();
        let fills: Vec<Fill> =
            (1..=40).map(|n| unsynced.keep(1, n, wire::Operation::default(), 1 << 20)).collect();
        assert_eq!((fills[0], fills[20], fills[39]), (Fill::Low, Fill::Half, Fill::Full));
        unsynced.synced(unsynced.mark()).unwrap();
        assert_eq!(unsynced.keep(1, 41, wire::Operation::default(), 0), Fill::Low);
    }
}
