//! Requests on their way in: large messages of all connections share one budget of memory, and a request that
//! its client cancels is an error, not an end.
//!
//! A message is read only when its whole length fits, and keeps its share until its call is answered or,
//! in a stream, until the next message comes. What waits is held back by HTTP/2 flow control, in the
//! client. Since a message takes its share at once, two calls never wait for each other's rest; one whose
//! client stalls in the middle of a message is broken off.
//!
//! Small messages are not counted: the number of calls bounds them.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use axum::http::Request;
use bytes::Bytes;
use http_body::{Body as HttpBody, Frame, SizeHint};
use parking_lot::Mutex;
use shardfs_proto::status;
use shardfs_proto::types::limits::MESSAGE_BYTES_MAX;
use shardfs_proto::types::{Error, Reason};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use tokio::time::Sleep;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};

/// Bytes of large requests that a node holds at a time.
const BUDGET_BYTES: usize = 256 << 20;
/// Messages below this are not counted.
const COUNTED_BYTES_MIN: usize = 64 << 10;
/// How long a message may take to arrive once its share is taken.
const ARRIVAL_MAX: Duration = Duration::from_secs(60);
/// End of the path of the one call whose request is a stream.
const STREAMED: &str = "/PutStream";
/// Unit of the budget.
const UNIT_BYTES: usize = 1024;
/// Of gRPC's framing: a flag and the length.
const PREFIX_BYTES: usize = 5;

/// The budget of a node, as a layer around its services.
#[derive(Clone)]
pub(super) struct RequestBudget(Arc<Semaphore>);

impl RequestBudget {
    pub(super) fn new() -> RequestBudget {
        RequestBudget(Arc::new(Semaphore::new(BUDGET_BYTES / UNIT_BYTES)))
    }
}

impl<S> Layer<S> for RequestBudget {
    type Service = Budgeted<S>;

    fn layer(&self, inner: S) -> Budgeted<S> {
        Budgeted { inner, budget: Arc::clone(&self.0) }
    }
}

/// A share of the budget, kept by the call and filled by its body.
type Share = Arc<Mutex<Option<OwnedSemaphorePermit>>>;

/// Services whose requests are counted.
#[derive(Clone)]
pub(super) struct Budgeted<S> {
    inner: S,
    budget: Arc<Semaphore>,
}

impl<S: Service<Request<Body>>> Service<Request<Body>> for Budgeted<S>
where
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let share = Share::default();
        let budget = Arc::clone(&self.budget);
        let streamed = request.uri().path().ends_with(STREAMED);
        let counted = request.map(|body| Body::new(Counted::new(body, budget, Arc::clone(&share), streamed)));
        let call = self.inner.call(counted);
        Box::pin(async move {
            let answer = call.await;
            drop(share);
            answer
        })
    }
}

type Acquiring = Pin<Box<dyn Future<Output = Result<OwnedSemaphorePermit, AcquireError>> + Send>>;

enum State {
    Reading,
    /// A frame that is passed on when its message has its share.
    Waiting(Acquiring, Option<Frame<Bytes>>),
    /// A counted message is arriving.
    Arriving(Pin<Box<Sleep>>),
}

/// A request's body.
struct Counted {
    body: Body,
    budget: Arc<Semaphore>,
    share: Share,
    prefix: [u8; PREFIX_BYTES],
    /// Bytes of the prefix that are there.
    prefix_bytes: usize,
    /// Bytes of the current message still to come.
    message_left: usize,
    /// Whether it has many messages, each done with when the next is asked for.
    streamed: bool,
    /// See [`ARRIVAL_MAX`].
    arrival_max: Duration,
    state: State,
}

impl Counted {
    fn new(body: Body, budget: Arc<Semaphore>, share: Share, streamed: bool) -> Counted {
        Counted {
            body,
            budget,
            share,
            prefix: [0; PREFIX_BYTES],
            prefix_bytes: 0,
            message_left: 0,
            streamed,
            arrival_max: ARRIVAL_MAX,
            state: State::Reading,
        }
    }

    /// Follows the framing over some bytes; answers the bytes of the messages to count that begin in them.
    fn follow(&mut self, mut data: &[u8]) -> usize {
        let mut begun = 0;
        while !data.is_empty() {
            if self.message_left > 0 {
                let passed = self.message_left.min(data.len());
                self.message_left -= passed;
                data = &data[passed..];
                continue;
            }
            let taken = (PREFIX_BYTES - self.prefix_bytes).min(data.len());
            self.prefix[self.prefix_bytes..][..taken].copy_from_slice(&data[..taken]);
            self.prefix_bytes += taken;
            data = &data[taken..];
            if self.prefix_bytes == PREFIX_BYTES {
                let [_, a, b, c, d] = self.prefix;
                self.message_left = u32::from_be_bytes([a, b, c, d]) as usize;
                self.prefix_bytes = 0;
                // One that is larger than allowed is refused by the decoder before it is read.
                if (COUNTED_BYTES_MIN..=MESSAGE_BYTES_MAX).contains(&self.message_left) {
                    begun += self.message_left;
                }
            }
        }
        begun
    }
}

impl HttpBody for Counted {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        loop {
            match &mut this.state {
                State::Waiting(acquiring, frame) => {
                    // The semaphore is never closed.
                    let permit = ready!(acquiring.as_mut().poll(cx)).ok();
                    let frame = frame.take();
                    *this.share.lock() = permit;
                    this.state = State::Arriving(Box::pin(tokio::time::sleep(this.arrival_max)));
                    return Poll::Ready(frame.map(Ok));
                }
                State::Arriving(late) => {
                    if this.message_left == 0 {
                        if this.streamed {
                            *this.share.lock() = None;
                        }
                        this.state = State::Reading;
                    } else if late.as_mut().poll(cx).is_ready() {
                        let error = Error::new(
                            Reason::Deadline,
                            format!(
                                "a message did not arrive within {} s: broken off",
                                this.arrival_max.as_secs()
                            ),
                        );
                        return Poll::Ready(Some(Err(status::to_status(&error))));
                    }
                }
                State::Reading => {}
            }
            let frame = match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                // The decoder takes a request that its client cancelled for one that has ended: half a value
                // would be stored as a whole one.
                Some(Err(status)) if status.code() == Code::Cancelled => {
                    let error = Error::unavailable("the client broke the request off");
                    return Poll::Ready(Some(Err(status::to_status(&error))));
                }
                other => return Poll::Ready(other),
            };
            let begun = frame.data_ref().map_or(0, |data| {
                let data = data.clone();
                this.follow(&data)
            });
            if begun == 0 {
                return Poll::Ready(Some(Ok(frame)));
            }
            // What came before in this stream has been taken by now.
            *this.share.lock() = None;
            let units = begun.div_ceil(UNIT_BYTES).min(BUDGET_BYTES / UNIT_BYTES) as u32;
            let acquiring = Arc::clone(&this.budget).acquire_many_owned(units);
            this.state = State::Waiting(Box::pin(acquiring), Some(frame));
        }
    }

    fn is_end_stream(&self) -> bool {
        !matches!(self.state, State::Waiting(..)) && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body of these frames.
    struct Frames(std::collections::VecDeque<Bytes>);

    impl HttpBody for Frames {
        type Data = Bytes;
        type Error = Status;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
            Poll::Ready(self.0.pop_front().map(|data| Ok(Frame::data(data))))
        }
    }

    #[tokio::test]
    async fn a_cancelled_request_has_not_ended() {
        struct Cancelled;
        impl HttpBody for Cancelled {
            type Data = Bytes;
            type Error = Status;
            fn poll_frame(
                self: Pin<&mut Self>,
                _: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
                Poll::Ready(Some(Err(Status::cancelled("reset"))))
            }
        }
        let (mut body, _share) = counted(&[], 1, &RequestBudget::new());
        body.body = Body::new(Cancelled);
        let outcome = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.unwrap();
        assert_eq!(outcome.unwrap_err().code(), Code::Unavailable);
    }

    fn message(bytes: usize) -> Vec<u8> {
        let mut framed = vec![0];
        framed.extend((bytes as u32).to_be_bytes());
        framed.extend((0..bytes).map(|i| i as u8));
        framed
    }

    fn counted(all: &[u8], frame_bytes: usize, budget: &RequestBudget) -> (Counted, Share) {
        let share = Share::default();
        let body = Body::new(Frames(all.chunks(frame_bytes).map(Bytes::copy_from_slice).collect()));
        (Counted::new(body, Arc::clone(&budget.0), Arc::clone(&share), false), share)
    }

    async fn next(body: &mut Counted) -> Option<Bytes> {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await?;
        Some(frame.unwrap().into_data().unwrap())
    }

    #[tokio::test]
    async fn bytes_pass_unchanged_and_shares_follow_the_messages() {
        let budget = RequestBudget::new();
        let all = budget.0.available_permits();
        let large = 300 << 10;
        for frame_bytes in [1, 3, 4096, 100_000, 10 << 20] {
            let stream = [message(10), message(large), message(0), message(large), message(7)].concat();
            let (mut body, share) = counted(&stream, frame_bytes, &budget);
            let (mut passed, mut least) = (Vec::new(), all);
            while let Some(data) = next(&mut body).await {
                passed.extend_from_slice(&data);
                least = least.min(budget.0.available_permits());
            }
            assert!(passed == stream, "frames of {frame_bytes}");
            let messages = if frame_bytes > stream.len() { 2 } else { 1 };
            assert_eq!(all - least, messages * large / UNIT_BYTES, "frames of {frame_bytes}");
            drop((body, share));
            assert_eq!(budget.0.available_permits(), all);
        }
    }

    #[tokio::test]
    async fn a_large_message_waits_for_its_share_and_a_stalled_one_is_broken_off() {
        let budget = RequestBudget::new();
        let taken =
            Arc::clone(&budget.0).acquire_many_owned((BUDGET_BYTES / UNIT_BYTES) as u32).await.unwrap();
        let whole = message(1 << 20);
        let (mut body, share) = counted(&whole, 2 << 20, &budget);
        let mut first = Box::pin(next(&mut body));
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut first).await.is_err(), "no room yet");
        drop(taken);
        assert_eq!(first.await.unwrap(), whole);
        assert!(share.lock().is_some());

        /// A message that stops in the middle.
        struct Stalling(Option<Bytes>);
        impl HttpBody for Stalling {
            type Data = Bytes;
            type Error = Status;
            fn poll_frame(
                mut self: Pin<&mut Self>,
                _: &mut Context<'_>,
            ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
                match self.0.take() {
                    Some(data) => Poll::Ready(Some(Ok(Frame::data(data)))),
                    None => Poll::Pending,
                }
            }
        }
        let (mut body, _share) = counted(&[], 1, &budget);
        body.arrival_max = Duration::from_millis(100);
        body.body = Body::new(Stalling(Some(Bytes::copy_from_slice(&whole[..1000]))));
        assert_eq!(next(&mut body).await.unwrap().len(), 1000);
        let broken = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await.unwrap();
        assert_eq!(broken.unwrap_err().code(), Code::DeadlineExceeded);
    }
}
