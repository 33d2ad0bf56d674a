//! A watch on etcd that survives connections, members and restarts.
//!
//! [`Follower`] is what a watch knows: pure, tested without an etcd. [`follow`] is the stream around it: it connects,
//! asks for progress while nothing happens, notices silence, and begins again where the follower stands.
//!
//! Callers rely on a batch's revision: nodes take up what was taken from them when their copy of the records shows it.
//! So how far a watch has come is said only when it is certain: from events, and from progress that etcd sends in order with
//! them. Progress that is **asked for** comes in order since 3.4.25 and 3.5.8 (etcd issue 15220); before, its answer
//! overtakes events, and is a sign of life, no more. On such a member the watch is therefore on all keys, of which those
//! outside the range are left out here: every revision has an event then. Users who may not read all keys do without.

use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::WatchOptions;
use etcd_client::proto::{PbEvent, PbWatchResponse};
use shardfs_proto::types::clock;

use super::pool::{Connection, Pool};
use super::{convert, errors};
use crate::cluster::retry::Backoff;
use crate::cluster::store::{Event, KeyRange, Revision, StoreError, StoreResult, WatchBatch, WatchStream};

/// Progress is asked for when nothing has arrived for so long.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(750);
/// A member from which nothing arrives for so long, though it was asked, is given up.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// Bytes of one revision: what one request puts by default, times twenty for keys that a lease or a range deletes.
const REVISION_BYTES_MAX: usize = 32 << 20;
/// etcd's id of a watch in an answer to a question for progress.
const EVERY_WATCH: i64 = -1;

/// How far a watch has come.
pub(super) struct Follower {
    range: KeyRange,
    /// Everything of the range up to here has been delivered.
    delivered: u64,
    /// The revision that is arriving, which may be followed by more of it; 0: none.
    arriving: u64,
    /// Its events.
    events: Vec<Event>,
    bytes: usize,
}

impl Follower {
    /// One that wants `from` next.
    pub(super) fn new(range: KeyRange, from: Revision) -> Follower {
        let delivered = from.get().saturating_sub(1);
        Follower { range, delivered, arriving: 0, events: Vec::new(), bytes: 0 }
    }

    /// What a new connection asks for: of what was cut off nothing is left. To etcd 0 would mean "from now on".
    pub(super) fn resume(&mut self) -> Revision {
        self.arriving = 0;
        self.events.clear();
        self.bytes = 0;
        Revision::new(self.delivered + 1)
    }

    /// A batch that says where the watch stands.
    fn position(&self) -> WatchBatch {
        WatchBatch { revision: Revision::new(self.delivered), events: Vec::new() }
    }

    /// A sign of life. `progress`: that far the watch has come, said in order with the events.
    pub(super) fn quiet(&mut self, progress: Option<u64>) -> WatchBatch {
        self.delivered = self.delivered.max(progress.unwrap_or(0));
        self.position()
    }

    /// Events in the order in which they came. `fragment`: the last revision among them may go on in the next message.
    pub(super) fn events(&mut self, events: Vec<PbEvent>, fragment: bool) -> StoreResult<Vec<WatchBatch>> {
        let mut batches = Vec::new();
        for event in events {
            let bytes = event.kv.as_ref().map_or(0, |kv| kv.key.len() + kv.value.len());
            let (revision, event) = convert::event(event)?;
            let revision = revision.get();
            if revision != self.arriving {
                self.complete(&mut batches);
                // Callers believe that there was nothing: they read all anew.
                if revision <= self.delivered {
                    return Err(StoreError::Compacted);
                }
                self.arriving = revision;
            }
            if !self.range.contains(event.key()) {
                continue;
            }
            self.bytes += bytes;
            if self.bytes > REVISION_BYTES_MAX {
                return Err(StoreError::Compacted);
            }
            self.events.push(event);
        }
        if !fragment {
            self.complete(&mut batches);
        }
        Ok(batches)
    }

    /// The revision that was arriving is whole. One without events of the range is told as a position.
    fn complete(&mut self, batches: &mut Vec<WatchBatch>) {
        if self.arriving == 0 {
            return;
        }
        self.delivered = std::mem::take(&mut self.arriving);
        self.bytes = 0;
        let batch =
            WatchBatch { revision: Revision::new(self.delivered), events: std::mem::take(&mut self.events) };
        match batches.last_mut() {
            Some(last) if last.events.is_empty() && batch.events.is_empty() => *last = batch,
            _ => batches.push(batch),
        }
    }
}

/// The stream.
pub(super) fn follow(pool: Arc<Pool>, range: KeyRange, from: Revision) -> WatchStream {
    Box::pin(async_stream::stream! {
        let mut follower = Follower::new(range.clone(), from);
        let mut backoff = Backoff::new();
        let mut denied = false;
        loop {
            match open(&pool, &range, !denied, follower.resume()).await {
                Ok(mut stream) => loop {
                    match stream.next(&mut follower).await {
                        Ok(batches) => {
                            pool.judge(&stream.connection, &Ok(()));
                            backoff = Backoff::new();
                            for batch in batches {
                                yield Ok(batch);
                            }
                        }
                        Err(StoreError::Unavailable(why) | StoreError::OutcomeUnknown(why)) => {
                            tracing::debug!(why, member = stream.connection.member(), "etcd: the watch begins again");
                            pool.judge::<()>(&stream.connection, &Err(StoreError::Unavailable(why)));
                            break;
                        }
                        // All keys are not for everybody; and etcd before 3.5 says the same when only the token has ended: a
                        // new connection has a new one.
                        Err(StoreError::Invalid(why)) if !denied => {
                            denied = true;
                            pool.judge::<()>(&stream.connection, &Err(StoreError::Unavailable(why)));
                            break;
                        }
                        Err(error) => {
                            yield Err(error);
                            return;
                        }
                    }
                },
                Err(StoreError::Unavailable(why) | StoreError::OutcomeUnknown(why)) => {
                    tracing::debug!(why, "etcd: the watch waits");
                }
                Err(error) => {
                    yield Err(error);
                    return;
                }
            }
            tokio::time::sleep(backoff.next()).await;
        }
    })
}

/// A watch on one connection.
struct Watching {
    connection: Arc<Connection>,
    stream: etcd_client::WatchStream,
    /// Answers to questions for progress come in order with the events.
    progress_in_order: bool,
    /// Its id; known once etcd has made it.
    id: Option<i64>,
    heard: Instant,
    /// When something was heard, or progress was asked for, last.
    stirred: Instant,
}

/// `may_widen`: to all keys, if that is how the watch comes to know where it stands.
async fn open(pool: &Arc<Pool>, range: &KeyRange, may_widen: bool, from: Revision) -> StoreResult<Watching> {
    let (start, end) = convert::range_bounds(range)?;
    let connection = pool.connection().await?;
    let progress_in_order = connection.progress_in_order();
    let mut options = WatchOptions::new()
        .with_start_revision(convert::signed(from.get())?)
        .with_progress_notify()
        .with_fragment();
    if may_widen && !progress_in_order {
        options = options.with_all_keys();
    } else if let Some(end) = end {
        options = options.with_range(end);
    }
    let opened =
        match tokio::time::timeout(SILENCE_MAX, connection.watches().watch(start, Some(options))).await {
            Ok(Ok(stream)) => Ok(stream),
            Ok(Err(error)) => Err(errors::error(error)),
            Err(_) => Err(StoreError::Unavailable(format!("no watch within {SILENCE_MAX:?}"))),
        };
    pool.judge(&connection, &opened);
    let now = clock::monotonic();
    Ok(Watching { connection, stream: opened?, progress_in_order, id: None, heard: now, stirred: now })
}

impl Watching {
    /// What arrives next. Errors that a new connection may mend are `Unavailable`.
    async fn next(&mut self, follower: &mut Follower) -> StoreResult<Vec<WatchBatch>> {
        loop {
            let now = clock::monotonic();
            let silent_at = self.heard + SILENCE_MAX;
            if now >= silent_at {
                return Err(StoreError::Unavailable("the watch is silent".into()));
            }
            let ask_at = self.stirred + PROGRESS_INTERVAL;
            // A watch that etcd has not made yet has no progress.
            let until = if self.id.is_some() { ask_at.min(silent_at) } else { silent_at };
            let reply =
                tokio::time::timeout(until.saturating_duration_since(now), self.stream.message()).await;
            let Ok(reply) = reply else {
                if self.id.is_some() && clock::monotonic() >= ask_at {
                    self.stirred = clock::monotonic();
                    // Room for many more questions than are asked before silence ends the watch.
                    self.stream
                        .request_progress()
                        .await
                        .map_err(|e| StoreError::Unavailable(e.to_string()))?;
                }
                continue;
            };
            let response = match reply {
                Ok(Some(response)) => response.0,
                Ok(None) => return Err(StoreError::Unavailable("etcd ended the watch".into())),
                // More in one event than is taken: what it was is read anew.
                Err(error) if errors::is_answer_too_large(&error) => return Err(StoreError::Compacted),
                Err(error) => return Err(errors::error(error)),
            };
            self.heard = clock::monotonic();
            self.stirred = self.heard;
            return self.understand(response, follower);
        }
    }

    fn understand(
        &mut self,
        response: PbWatchResponse,
        follower: &mut Follower,
    ) -> StoreResult<Vec<WatchBatch>> {
        let revision = self.connection.revision(response.header.as_ref());
        if response.compact_revision != 0 {
            return Err(StoreError::Compacted);
        }
        if response.canceled {
            return Err(cancelled(&response.cancel_reason));
        }
        let revision = revision?.get();
        if response.created {
            self.id = Some(response.watch_id);
            return Ok(vec![follower.position()]);
        }
        if !response.events.is_empty() || response.fragment {
            return follower.events(response.events, response.fragment);
        }
        // What etcd sends unasked, to one watch, was always in order.
        let in_order = self.progress_in_order || response.watch_id != EVERY_WATCH;
        Ok(vec![follower.quiet(in_order.then_some(revision))])
    }
}

/// Why etcd ended a watch; it has no code for that.
fn cancelled(reason: &str) -> StoreError {
    if reason.contains("permission denied") {
        StoreError::Invalid(format!("{reason}: the user needs read access to the keys shardfs/*"))
    } else if reason.contains("compacted") {
        StoreError::Compacted
    } else {
        StoreError::Unavailable(format!("etcd ended the watch: {reason}"))
    }
}

#[cfg(test)]
mod tests {
    use etcd_client::proto::PbKeyValue;

    use super::*;

    fn put(revision: i64, key: &str, bytes: usize) -> PbEvent {
        let kv = PbKeyValue {
            key: key.into(),
            value: vec![0; bytes],
            create_revision: revision,
            mod_revision: revision,
            version: 1,
            lease: 0,
        };
        PbEvent { r#type: 0, kv: Some(kv), prev_kv: None }
    }

    fn shape(batches: &[WatchBatch]) -> Vec<(u64, usize)> {
        batches.iter().map(|b| (b.revision.get(), b.events.len())).collect()
    }

    fn follower(from: u64) -> Follower {
        Follower::new(KeyRange::prefix("w/"), Revision::new(from))
    }

    #[test]
    fn revisions_are_delivered_whole() {
        let mut follower = follower(5);
        assert_eq!(follower.resume().get(), 5);
        // Three messages of one answer: 6 goes on in the second, 8 in the third.
        let first = follower.events(vec![put(5, "w/a", 1), put(6, "w/a", 1)], true).unwrap();
        assert_eq!(shape(&first), [(5, 1)]);
        let second = follower.events(vec![put(6, "w/b", 1), put(8, "w/a", 1)], true).unwrap();
        assert_eq!(shape(&second), [(6, 2)]);
        let third = follower.events(vec![put(8, "w/b", 1)], false).unwrap();
        assert_eq!(shape(&third), [(8, 2)]);
        // Cut off within a revision, it is asked for as a whole.
        assert_eq!(shape(&follower.events(vec![put(9, "w/a", 1)], true).unwrap()), []);
        assert_eq!(follower.resume().get(), 9);
        let again = follower.events(vec![put(9, "w/a", 1), put(9, "w/b", 1)], false).unwrap();
        assert_eq!(shape(&again), [(9, 2)]);
    }

    #[test]
    fn keys_of_others_move_a_watch_on_and_are_left_out() {
        let mut follower = follower(5);
        let batches = follower
            .events(
                vec![
                    put(5, "v", 1),
                    put(6, "x", 1),
                    put(7, "w/a", 1),
                    put(7, "x", 1),
                    put(8, "x", 33 << 20),
                    put(9, "w/b", 1),
                    put(10, "x", 1),
                ],
                true,
            )
            .unwrap();
        // 10 may go on.
        assert_eq!(shape(&batches), [(6, 0), (7, 1), (8, 0), (9, 1)]);
        assert_eq!(follower.resume().get(), 10);
    }

    #[test]
    fn only_progress_in_order_moves_a_watch_on() {
        let mut follower = follower(5);
        assert_eq!(follower.quiet(None).revision.get(), 4);
        assert_eq!(shape(&follower.events(vec![put(7, "w/a", 1)], false).unwrap()), [(7, 1)]);
        assert_eq!(follower.quiet(Some(10)).revision.get(), 10);
        assert_eq!(follower.resume().get(), 11);
        assert_eq!(follower.quiet(Some(3)).revision.get(), 10, "less than before takes nothing back");
        // No silent gap, whatever a server does.
        assert!(matches!(follower.events(vec![put(8, "w/a", 1)], false), Err(StoreError::Compacted)));
    }

    #[test]
    fn a_revision_without_end_is_read_anew() {
        let mut follower = follower(1);
        for _ in 0..31 {
            assert_eq!(shape(&follower.events(vec![put(5, "w/a", 1 << 20)], true).unwrap()), []);
        }
        assert!(matches!(follower.events(vec![put(5, "w/a", 1 << 20)], true), Err(StoreError::Compacted)));
    }

    #[test]
    fn from_the_beginning_is_not_from_now_on() {
        assert_eq!(follower(0).resume().get(), 1);
    }
}
