//! What a session did that was answered and may not be durable yet: made again when the shard has moved.
//!
//! A node answers some mutations before they are on its device. If the shard moves to another node then, they may be
//! lost, while programs count on a later fsync to make them durable. So they are kept here until a sync has
//! succeeded, and, before anything else is asked under another epoch, made again in order under their old numbers: what
//! was not lost after all is answered from its slot. What others have changed since is not overwritten
//! ([`Repetition`](crate::types::op::Repetition)): that is a loss, and told.
//!
//! Invariants: entries are in order of their numbers; each knows the epoch under which it was answered last. A sync makes
//! durable what had been answered, under the epoch that it ran under, when it began: so a sync's answer takes off what was
//! kept before it began ([`Mark`]) and under its epoch, and nothing else. An answer of an old primary may be noted after others have
//! been made again at the new one: it is made again by itself then, before the next call.
//!
//! A loss is told to every open file once, like an error of writing back by a local kernel ([`Client::check_losses`]);
//! what nobody was told of, who comes next is told.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::Client;
use super::channel::Node;
use super::session::{Session, header};
use crate::convert;
use crate::status;
use crate::types::op::Repetition;
use crate::types::{Error, Reason, Result, ShardId, Version};
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
    /// Entries that were ever kept.
    arrivals: u64,
    /// The last version that the session gave an inode, and under which epoch; while there are entries.
    own: HashMap<u64, (u64, Version)>,
    losses: Losses,
}

/// What could not be made again.
#[derive(Clone, Default)]
struct Losses {
    /// How many there were.
    count: u64,
    /// How many somebody was told of.
    told: u64,
    last: Option<Error>,
}

impl Losses {
    fn add(&mut self, error: Error) {
        self.count += 1;
        self.last = Some(error);
    }

    /// Fails if there are more than were seen, which then are as many.
    fn tell(&mut self, seen: u64) -> Result<()> {
        match &self.last {
            Some(error) if self.count > seen => {
                self.told = self.count;
                Err(error.clone())
            }
            _ => Ok(()),
        }
    }
}

#[derive(Clone)]
struct Entry {
    sequence: u64,
    /// How many had been kept before, this one included.
    arrival: u64,
    epoch: u64,
    inode: u64,
    /// Of the inode, after the operation.
    version: Version,
    operation: wire::Operation,
    bytes: usize,
}

/// What was kept when a sync began.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Mark(u64);

/// A mutation that was answered before it was durable.
pub(super) struct Answered {
    pub(super) epoch: u64,
    pub(super) sequence: u64,
    pub(super) inode: u64,
    /// Of the inode, after it.
    pub(super) version: Version,
    pub(super) operation: wire::Operation,
    pub(super) data_bytes: usize,
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
    /// Keeps a mutation.
    pub(super) fn keep(&self, answered: Answered) -> Fill {
        let Answered { epoch, sequence, inode, version, operation, data_bytes } = answered;
        let mut state = self.state.lock();
        if state.entries.is_empty() {
            (state.epoch, state.mixed) = (epoch, false);
        }
        state.mixed |= state.epoch != epoch;
        state.arrivals += 1;
        let (arrival, bytes) = (state.arrivals, data_bytes + ENTRY_BYTES);
        // Answers may cross.
        let at = state.entries.partition_point(|entry| entry.sequence < sequence);
        state.entries.insert(at, Entry { sequence, arrival, epoch, inode, version, operation, bytes });
        state.bytes += bytes;
        state.note(epoch, inode, version);
        let full =
            |share: usize| state.entries.len() >= ENTRIES_MAX / share || state.bytes >= BYTES_MAX / share;
        match (full(1), full(2)) {
            (true, _) => Fill::Full,
            (false, true) => Fill::Half,
            (false, false) => Fill::Low,
        }
    }

    /// The session has given an inode a version, durably or not.
    pub(super) fn note(&self, epoch: u64, inode: u64, version: Version) {
        let mut state = self.state.lock();
        if !state.entries.is_empty() {
            state.note(epoch, inode, version);
        }
    }

    /// What a sync that begins now makes durable; `None`: there is nothing.
    pub(super) fn mark(&self) -> Option<Mark> {
        let state = self.state.lock();
        (!state.entries.is_empty()).then_some(Mark(state.arrivals))
    }

    /// Takes off what a sync under an epoch has made durable.
    pub(super) fn synced(&self, mark: Mark, epoch: u64) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let bytes = &mut state.bytes;
        state.entries.retain(|entry| {
            let durable = entry.arrival <= mark.0 && entry.epoch == epoch;
            *bytes -= if durable { entry.bytes } else { 0 };
            !durable
        });
        state.settle();
    }

    /// Gives everything up: the session is gone.
    pub(super) fn give_up(&self) {
        let mut state = self.state.lock();
        if !state.entries.is_empty() {
            state.losses.add(Error::new(
                Reason::SessionUnknown,
                "the session expired before what it had written was durable: it may be lost",
            ));
        }
        state.entries.clear();
        state.bytes = 0;
        state.settle();
    }

    /// Tells what the session before has lost.
    pub(super) fn inherit(&self, last: &Unsynced) {
        self.state.lock().losses = last.state.lock().losses.clone();
    }

    /// Whether there is anything that a sync would make durable, or would tell.
    fn is_open(&self) -> bool {
        let state = self.state.lock();
        !state.entries.is_empty() || state.losses.count > state.losses.told
    }

    fn pending(&self, epoch: u64) -> Vec<Entry> {
        let state = self.state.lock();
        if state.epoch == epoch && !state.mixed {
            return Vec::new();
        }
        state.entries.iter().filter(|entry| entry.epoch != epoch).cloned().collect()
    }

    /// The last version that the session gave an inode under an epoch.
    fn own(&self, epoch: u64, inode: u64) -> Option<Version> {
        let own = self.state.lock().own.get(&inode).copied();
        own.filter(|(under, _)| *under == epoch).map(|(_, version)| version)
    }

    /// Notes that an entry was made again under an epoch, and which version its inode has since.
    fn made_again(&self, epoch: u64, sequence: u64, version: Version) {
        let mut state = self.state.lock();
        if let Some(entry) = state.entries.iter_mut().find(|entry| entry.sequence == sequence) {
            (entry.epoch, entry.version) = (epoch, version);
            let inode = entry.inode;
            state.note(epoch, inode, version);
        }
        state.settle();
    }

    /// Takes off an entry that cannot be made again, or need not be.
    fn drop_entry(&self, sequence: u64, loss: Option<Error>) {
        let mut state = self.state.lock();
        let state = &mut *state;
        let bytes = &mut state.bytes;
        state.entries.retain(|entry| {
            *bytes -= if entry.sequence == sequence { entry.bytes } else { 0 };
            entry.sequence != sequence
        });
        if let Some(error) = loss {
            state.losses.add(error);
        }
        state.settle();
    }
}

impl State {
    fn note(&mut self, epoch: u64, inode: u64, version: Version) {
        let own = self.own.entry(inode).or_insert((epoch, version));
        *own = (*own).max((epoch, version));
    }

    /// Knows again under which epochs entries were answered.
    fn settle(&mut self) {
        let first = self.entries.front().map(|entry| entry.epoch);
        if let Some(epoch) = first {
            self.epoch = epoch;
            self.mixed = self.entries.iter().any(|entry| entry.epoch != epoch);
        } else {
            self.mixed = false;
            self.own.clear();
        }
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
            tracing::debug!(%shard, epoch, count = pending.len(), "the shard has moved: repeating what may be lost");
        }
        let mut repeated = 0;
        for entry in pending {
            let sequence = entry.sequence;
            let repetition = Repetition { answered: entry.version, own: unsynced.own(epoch, entry.inode) };
            let times_only = sets_times_only(&entry.operation);
            let request = wire::MutateRequest {
                header: Some(header(shard, epoch, Some(session.id))),
                sequence,
                operation: Some(entry.operation),
                durability: wire::Durability::Buffered.into(),
                repetition: Some(convert::repetition_to_wire(repetition)),
            };
            let error = match node.files().mutate(node.request(request)).await {
                Ok(reply) => {
                    let attr = reply.into_inner().result.and_then(|result| result.attr);
                    let version = attr.map_or(entry.version, |attr| Version::new(attr.version));
                    unsynced.made_again(epoch, sequence, version);
                    repeated += 1;
                    continue;
                }
                Err(status) => verdict(status)?,
            };
            let loss = match error.reason() {
                // What was written to is gone since.
                Reason::NotFound => None,
                // A later change of this session is there, in the slot that this one had: so this one is.
                Reason::SequenceStale => None,
                // Whoever changed it since has given it times as well.
                Reason::VersionMismatch if times_only => None,
                Reason::ShardFull | Reason::VolumeFull => Some(error),
                // Whatever was the matter: to who asks for durability it is an I/O error.
                _ => Some(Error::io(format!(
                    "what was written before the shard moved, and not synced, is lost: {}",
                    error.message()
                ))),
            };
            if let Some(error) = &loss {
                tracing::error!(%shard, inode = entry.inode, %error, "a change that was not durable yet could not be repeated");
            }
            unsynced.drop_entry(sequence, loss);
        }
        if repeated > 0 {
            tracing::info!(%shard, epoch, repeated, "the shard has moved: what may have been lost was made again");
        }
        Ok(())
    }

    /// Whether a sync of the shard has anything to do or to tell.
    pub fn is_sync_due(&self, shard: ShardId) -> bool {
        self.inner.sessions.current(shard).is_some_and(|session| session.unsynced.is_open())
    }

    /// For [`Client::check_losses`], of somebody who begins to look now.
    pub fn losses_told(&self, shard: ShardId) -> u64 {
        self.inner.sessions.current(shard).map_or(0, |session| session.unsynced.state.lock().losses.told)
    }

    /// Fails, once for each `seen`, if something that this client had done in the shard was lost before it was durable: after
    /// a [`Client::make_durable`], and for somebody who began to look at [`Client::losses_told`].
    pub fn check_losses(&self, shard: ShardId, seen: &AtomicU64) -> Result<()> {
        let Some(session) = self.inner.sessions.current(shard) else { return Ok(()) };
        let mut state = session.unsynced.state.lock();
        let count = state.losses.count;
        state.losses.tell(seen.fetch_max(count, Ordering::Relaxed))
    }

    /// Fails if something was lost of which nobody was told.
    pub fn check_untold_losses(&self, shard: ShardId) -> Result<()> {
        let Some(session) = self.inner.sessions.current(shard) else { return Ok(()) };
        let mut state = session.unsynced.state.lock();
        let told = state.losses.told;
        state.losses.tell(told)
    }
}

/// The node's last word on an entry, which ends it. Everything else may pass, and the entry stays: only the node knows that a change
/// cannot be made again, and what the transport says (a stream that was reset, a proxy) is nothing that it has decided.
fn verdict(status: tonic::Status) -> Result<Error, tonic::Status> {
    let undecided = match status::said_by_node(&status) {
        // The outcome is not known: a request that arrived too slowly, for one.
        Some(error) if error.reason() == Reason::Deadline => error,
        Some(error) if error.is_retryable() => return Err(status),
        Some(error) => return Ok(error),
        None => status::transport_error(&status),
    };
    Err(tonic::Status::unavailable(undecided.message()))
}

fn sets_times_only(operation: &wire::Operation) -> bool {
    match &operation.kind {
        Some(wire::operation::Kind::SetAttr(set)) => {
            set.mode.is_none() && set.uid.is_none() && set.gid.is_none() && set.size.is_none()
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keep(unsynced: &Unsynced, epoch: u64, sequence: u64) -> Fill {
        keep_bytes(unsynced, epoch, sequence, 10)
    }

    fn keep_bytes(unsynced: &Unsynced, epoch: u64, sequence: u64, data_bytes: usize) -> Fill {
        unsynced.keep(Answered {
            epoch,
            sequence,
            inode: 7,
            version: Version::new(100 * epoch + sequence),
            operation: wire::Operation::default(),
            data_bytes,
        })
    }

    fn pending(unsynced: &Unsynced, epoch: u64) -> Vec<u64> {
        unsynced.pending(epoch).iter().map(|e| e.sequence).collect()
    }

    fn sync(unsynced: &Unsynced, epoch: u64) {
        if let Some(mark) = unsynced.mark() {
            unsynced.synced(mark, epoch);
        }
    }

    #[test]
    fn entries_stay_until_a_sync_that_began_after_them() {
        let unsynced = Unsynced::default();
        assert_eq!(unsynced.mark(), None);
        assert_eq!(keep(&unsynced, 3, 2), Fill::Low);
        let mark = unsynced.mark().unwrap();
        // Sent before the other one, and answered while the sync runs: it may not be covered.
        keep(&unsynced, 3, 1);
        keep(&unsynced, 3, 3);
        unsynced.synced(mark, 3);
        assert!(pending(&unsynced, 3).is_empty());
        assert_eq!(pending(&unsynced, 4), [1, 3]);
        sync(&unsynced, 3);
        assert_eq!(unsynced.mark(), None);
        assert_eq!(unsynced.state.lock().bytes, 0);
    }

    #[test]
    fn a_sync_covers_what_was_answered_under_its_epoch() {
        let unsynced = Unsynced::default();
        keep(&unsynced, 3, 1);
        keep(&unsynced, 4, 2);
        sync(&unsynced, 4);
        assert_eq!(pending(&unsynced, 4), [1]);
        assert!(unsynced.is_open());
    }

    #[test]
    fn an_answer_of_an_old_primary_that_is_noted_late_is_made_again() {
        let unsynced = Unsynced::default();
        let version = Version::new;
        keep(&unsynced, 3, 1);
        assert_eq!(pending(&unsynced, 4), [1]);
        assert_eq!(unsynced.own(4, 7), None);
        unsynced.made_again(4, 1, version(900));
        assert_eq!(unsynced.own(4, 7), Some(version(900)));
        assert_eq!(pending(&unsynced, 4), [0; 0]);
        keep(&unsynced, 4, 3);
        keep(&unsynced, 3, 2);
        assert_eq!(pending(&unsynced, 4), [2]);
        assert_eq!(pending(&unsynced, 5), [1, 2, 3]);
        unsynced.note(4, 7, version(950));
        assert_eq!(unsynced.own(4, 7), Some(version(950)));
        assert_eq!((unsynced.own(5, 7), unsynced.own(4, 8)), (None, None));
        unsynced.made_again(4, 2, version(951));
        assert_eq!(pending(&unsynced, 4), [0; 0]);
        sync(&unsynced, 4);
        assert_eq!(unsynced.mark(), None);
        keep(&unsynced, 3, 4);
        assert_eq!(pending(&unsynced, 3), [0; 0]);
        assert_eq!(pending(&unsynced, 4), [4]);
    }

    #[test]
    fn a_loss_is_told_to_everybody_who_looks_and_to_the_next_session() {
        let unsynced = Unsynced::default();
        keep(&unsynced, 1, 1);
        keep(&unsynced, 1, 2);
        unsynced.drop_entry(1, None);
        assert_eq!(unsynced.state.lock().losses.count, 0);
        unsynced.drop_entry(2, Some(Error::io("lost")));
        let tell = |unsynced: &Unsynced, seen| unsynced.state.lock().losses.tell(seen);
        assert!(unsynced.is_open(), "nobody was told");
        assert!(tell(&unsynced, 0).is_err());
        assert!(!unsynced.is_open());
        assert!(tell(&unsynced, 0).is_err(), "another one that has looked since before");
        assert!(tell(&unsynced, 1).is_ok());
        keep(&unsynced, 1, 3);
        let next = Unsynced::default();
        unsynced.give_up();
        next.inherit(&unsynced);
        assert!(tell(&next, 1).is_err());
        assert_eq!(unsynced.mark(), None);
    }

    #[test]
    fn only_a_nodes_own_verdict_ends_an_entry() {
        let said = |reason| verdict(status::to_status(&Error::new(reason, "said")));
        for reason in [Reason::NotFound, Reason::VersionMismatch, Reason::VolumeFull, Reason::Io] {
            assert_eq!(said(reason).unwrap().reason(), reason);
        }
        for reason in [Reason::Busy, Reason::NotPrimary, Reason::Unavailable, Reason::Deadline] {
            assert!(status::from_status(&said(reason).unwrap_err()).is_retryable(), "{reason:?}");
        }
        for number in 1..=16 {
            let travelled = tonic::Status::new(tonic::Code::from_i32(number), "RST_STREAM");
            let error = status::from_status(&verdict(travelled).unwrap_err());
            assert!(error.is_retryable() && error.message() == "RST_STREAM", "{number}: {error}");
        }
    }

    #[test]
    fn it_has_a_bound() {
        let unsynced = Unsynced::default();
        let fills: Vec<Fill> = (1..=40).map(|n| keep_bytes(&unsynced, 1, n, 1 << 20)).collect();
        assert_eq!((fills[0], fills[20], fills[39]), (Fill::Low, Fill::Half, Fill::Full));
        sync(&unsynced, 1);
        assert_eq!(keep_bytes(&unsynced, 1, 41, 0), Fill::Low);
    }
}
