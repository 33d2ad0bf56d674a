//! Streamed answers: a producer makes batches on the blocking pool, a bounded channel carries them.
//!
//! Invariants: between batches no thread is held, so a client that reads slowly costs memory only, and
//! that is bounded: [`BATCHES_AHEAD`] batches in the channel, one in the making, one being sent. A
//! client that went away ends the work at the next batch.

use std::pin::Pin;
use std::task::{Context, Poll};

use shardfs_proto::status;
use shardfs_proto::types::{Error, Result};
use tokio::sync::mpsc;
use tonic::Status;

use super::{Observation, panicked};

/// Batches that wait in the channel: the next is made while one is sent.
const BATCHES_AHEAD: usize = 1;
/// How often is looked, while a client reads slowly, whether the shard is wanted back.
const WANTED_BACK_LOOK: std::time::Duration = std::time::Duration::from_millis(50);

/// What a producer's turn brought.
pub(super) enum Turn {
    /// There may be more.
    More,
    /// That was the last.
    Done,
}

/// Makes a streamed answer, some messages a turn.
pub(super) trait Producer: Send + 'static {
    /// One message of the answer.
    type Message: Send + 'static;
    /// Appends messages: a bounded number of bounded bytes, perhaps none. May block on a disk.
    fn turn(&mut self, out: &mut Vec<Self::Message>) -> Result<Turn>;
    /// Whether what it reads is wanted back: the stream ends then, and its client goes on elsewhere.
    fn wanted_back(&self) -> bool;
}

/// A streamed answer.
pub struct Answer<T> {
    batches: mpsc::Receiver<Result<Vec<T>, Error>>,
    current: std::vec::IntoIter<T>,
    observation: Observation,
    ended: bool,
}

/// Starts a producer; the stream ends when it does.
pub(super) fn answer<P: Producer>(
    what: &'static str,
    producer: P,
    observation: Observation,
) -> Answer<P::Message> {
    let (sender, batches) = mpsc::channel(BATCHES_AHEAD);
    let observed = observation.clone();
    tokio::spawn(async move {
        let mut producer = producer;
        loop {
            if producer.wanted_back() {
                // The reader may take its time.
                drop(producer);
                let _ = sender.send(Err(moved())).await;
                return;
            }
            let turn = tokio::task::spawn_blocking(move || {
                let mut out = Vec::new();
                let turn = producer.turn(&mut out);
                (producer, out, turn)
            });
            let Ok((back, out, turn)) = turn.await else {
                // The receiver may be gone; then nobody is left to tell.
                let _ = sender.send(Err(panicked(what))).await;
                return;
            };
            producer = back;
            if !out.is_empty() {
                match send(&sender, out, producer).await {
                    Some(back) => producer = back,
                    None => return,
                }
            }
            match turn {
                Ok(Turn::More) if sender.is_closed() => return,
                Ok(Turn::More) => {}
                Ok(Turn::Done) => return,
                Err(error) => {
                    // Who does not read keeps no shard.
                    drop(producer);
                    let _ = sender.send(Err(observed.behind(error).await)).await;
                    return;
                }
            }
        }
    });
    Answer { batches, current: Vec::new().into_iter(), observation, ended: false }
}

/// Sends a batch; `None`: it is not to go on. A client that reads slowly, or not at all, does not keep what is wanted back.
async fn send<P: Producer>(
    sender: &mpsc::Sender<Result<Vec<P::Message>, Error>>,
    batch: Vec<P::Message>,
    producer: P,
) -> Option<P> {
    let mut batch = Some(batch);
    while !producer.wanted_back() {
        match tokio::time::timeout(WANTED_BACK_LOOK, sender.reserve()).await {
            Ok(Ok(place)) => {
                if let Some(batch) = batch.take() {
                    place.send(Ok(batch));
                }
                return Some(producer);
            }
            Ok(Err(_)) => return None,
            Err(_) => {}
        }
    }
    drop(producer);
    // The end of the channel without the last batch must not look like the end.
    let sender = sender.clone();
    let batch = batch.unwrap_or_default();
    tokio::spawn(async move {
        if sender.send(Ok(batch)).await.is_ok() {
            let _ = sender.send(Err(moved())).await;
        }
    });
    None
}

/// Where a stream ends that is to go on elsewhere.
fn moved() -> Error {
    Error::unavailable("the shard is being handed over or opened anew").with_retry_after_ms(20)
}

/// A streamed answer over messages that are there already.
pub(super) fn ready<T>(messages: Vec<T>, observation: Observation) -> Answer<T> {
    let (_, batches) = mpsc::channel(1);
    Answer { batches, current: messages.into_iter(), observation, ended: false }
}

/// A streamed answer that somebody else feeds.
pub(super) fn fed<T>(batches: mpsc::Receiver<Result<Vec<T>, Error>>, observation: Observation) -> Answer<T> {
    Answer { batches, current: Vec::new().into_iter(), observation, ended: false }
}

impl<T> futures::Stream for Answer<T>
where
    T: Unpin,
{
    type Item = Result<T, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if self.ended {
                return Poll::Ready(None);
            }
            if let Some(message) = self.current.next() {
                return Poll::Ready(Some(Ok(message)));
            }
            match self.batches.poll_recv(cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Some(Ok(batch))) => self.current = batch.into_iter(),
                Poll::Ready(Some(Err(error))) => {
                    self.ended = true;
                    self.observation.failed(&error);
                    return Poll::Ready(Some(Err(status::to_status(&error))));
                }
                Poll::Ready(None) => {
                    self.ended = true;
                    self.observation.succeeded();
                }
            }
        }
    }
}
