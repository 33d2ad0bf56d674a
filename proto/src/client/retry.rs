//! The only retry loop.
//!
//! A call is attempted, each attempt bounded in time, until it succeeds, fails for good, or its deadline
//! has passed. Between attempts: jittered exponential backoff, or what the node advises. Everything that
//! comes here is safe to repeat: reads, idempotent calls, and mutations that are numbered in a session.

use std::future::Future;
use std::time::{Duration, Instant};

use super::Client;
use super::channel::Node;
use crate::types::cluster::Selector;
use crate::types::{Error, Reason, Result, ShardId, clock};

/// The first pause; a restart or promotion takes longer, a full queue less.
const BACKOFF_FIRST: Duration = Duration::from_millis(5);
/// The longest pause: how late after a recovery a waiting call may notice it.
const BACKOFF_MAX: Duration = Duration::from_millis(200);
/// An attempt that has no answer for so long is given up and repeated: the node may hang.
pub(super) const ATTEMPT_MAX: Duration = Duration::from_secs(10);

/// What an attempt gets however close the deadline is: so that one is made, whose error tells what is wrong.
const ATTEMPT_MIN: Duration = Duration::from_millis(100);

/// Without an answer for so long, other nodes are asked whether the shard has moved, and then this often again: a node that
/// is stopped or cut off does not refuse, it is silent.
const MOVED_ASK_AFTER: Duration = Duration::from_millis(500);
const MOVED_ASK_PAUSE: Duration = Duration::from_millis(250);

/// Where a call goes.
#[derive(Clone, Copy)]
pub(super) enum Target {
    /// Any node.
    Any,
    /// The primary of the shard's volume.
    Shard(ShardId),
}

/// What an attempt gets to know.
pub(super) struct Attempt {
    pub(super) node: Node,
    /// The epoch to send; 0: none known.
    pub(super) epoch: u64,
    /// 0 for the first. Later ones may meet effects of earlier ones.
    pub(super) number: u32,
}

pub(super) struct Backoff {
    pause: Duration,
}

impl Backoff {
    pub(super) fn new() -> Backoff {
        Backoff { pause: BACKOFF_FIRST }
    }

    /// The next pause: half fixed, half random, doubling.
    pub(super) fn next(&mut self, advised_ms: u32) -> Duration {
        let half = self.pause / 2;
        let jittered = half + half.mul_f64(fastrand::f64());
        self.pause = (self.pause * 2).min(BACKOFF_MAX);
        jittered.max(Duration::from_millis(advised_ms.into())).min(BACKOFF_MAX)
    }
}

impl Client {
    /// Runs `attempt` until it succeeds, fails for good, or the deadline has passed; then the last error.
    pub(super) async fn call<T, F, Fut>(&self, target: Target, attempt: F) -> Result<T>
    where
        F: FnMut(Attempt) -> Fut,
        Fut: Future<Output = Result<T, tonic::Status>>,
    {
        self.call_within(target, self.inner.config.deadline, ATTEMPT_MAX, attempt).await
    }

    /// The same with a deadline and a bound of its own for the attempts.
    pub(super) async fn call_within<T, F, Fut>(
        &self,
        target: Target,
        deadline: Duration,
        attempt_max: Duration,
        attempt: F,
    ) -> Result<T>
    where
        F: FnMut(Attempt) -> Fut,
        Fut: Future<Output = Result<T, tonic::Status>>,
    {
        self.call_waiting(target, deadline, (attempt_max, Duration::ZERO), attempt).await
    }

    /// The same, for a call on which the node may be silent for so long as it should: that long its attempts take more, and its silence
    /// says nothing.
    pub(super) async fn call_waiting<T, F, Fut>(
        &self,
        target: Target,
        deadline: Duration,
        (attempt_max, silence): (Duration, Duration),
        mut attempt: F,
    ) -> Result<T>
    where
        F: FnMut(Attempt) -> Fut,
        Fut: Future<Output = Result<T, tonic::Status>>,
    {
        let started = clock::monotonic();
        let mut backoff = Backoff::new();
        let mut number = 0;
        loop {
            let attempt_max = bounded(attempt_max + silence, deadline, started.elapsed());
            let error = match self.attempt(target, number, (attempt_max, silence), &mut attempt).await {
                Ok(answer) => return Ok(answer),
                Err(error) => error,
            };
            if !error.is_retryable() {
                return Err(error);
            }
            if let Some(location) = error.location()
                && let Target::Shard(shard) = target
            {
                self.inner.routes.learn(shard, location);
            }
            let pause = backoff.next(error.retry_after_ms());
            if past(started, deadline, pause) {
                return Err(Error::new(
                    Reason::Deadline,
                    format!("no success within {} s: {}", deadline.as_secs_f32().round(), error.message()),
                ));
            }
            tracing::debug!(number, %error, "call is repeated");
            tokio::time::sleep(pause).await;
            number += 1;
        }
    }

    async fn attempt<T, F, Fut>(
        &self,
        target: Target,
        number: u32,
        (attempt_max, silence): (Duration, Duration),
        attempt: &mut F,
    ) -> Result<T>
    where
        F: FnMut(Attempt) -> Fut,
        Fut: Future<Output = Result<T, tonic::Status>>,
    {
        let (node, epoch) = match target {
            Target::Any => (self.any_node()?, 0),
            Target::Shard(shard) => self.route(shard).await?,
        };
        let endpoint = node.endpoint.clone();
        let asked = node.clone();
        let answer = async {
            let call = tokio::time::timeout(attempt_max, async {
                if let Target::Shard(shard) = target
                    && let Some(session) = self.inner.sessions.current(shard)
                {
                    self.replay(shard, &session, &node, epoch).await?;
                }
                attempt(Attempt { node, epoch, number }).await
            });
            match target {
                Target::Any => tokio::select! {
                    answer = call => Ok(answer),
                    () = asked.silent(number) => Err("is silent"),
                },
                Target::Shard(shard) => tokio::select! {
                    answer = call => Ok(answer),
                    () = self.moved(shard, epoch, silence) => Err("is silent, and the shard has moved"),
                },
            }
        };
        let error = match answer.await {
            Ok(Ok(Ok(answer))) => return Ok(answer),
            Ok(Ok(Err(status))) => answered(&status, &endpoint, target),
            Ok(Err(_)) => Error::unavailable(format!(
                "{endpoint} did not answer within {:.1} s",
                attempt_max.as_secs_f32()
            )),
            Err(why) => {
                // The others are asked first from now on, whatever is asked next.
                self.inner.routes.rotate(&endpoint);
                return Err(Error::unavailable(format!("{endpoint} {why}")));
            }
        };
        if error.is_retryable() {
            match target {
                Target::Any => self.inner.routes.rotate(&endpoint),
                Target::Shard(shard) if error.reason() != Reason::Busy => {
                    self.inner.routes.forget(shard, &endpoint);
                    self.inner.sessions.suspect(shard);
                }
                Target::Shard(_) => {}
            }
        }
        Err(error)
    }
}

impl Client {
    /// Ends when another node says that the shard is served under a later epoch; the route is learned then. `silence`: as long
    /// as that, nobody is asked.
    async fn moved(&self, shard: ShardId, epoch: u64, silence: Duration) {
        tokio::time::sleep(silence + MOVED_ASK_AFTER).await;
        loop {
            if let Ok(Some(node)) = self.another_node(shard)
                && let Ok(info) = self.ask_shard(&node, &Selector::Id(shard)).await
                && info.location.epoch.get() > epoch
            {
                self.inner.sessions.suspect(shard);
                return;
            }
            tokio::time::sleep(MOVED_ASK_PAUSE).await;
        }
    }
}

/// The error behind a status. One that no node said comes from the transport, so it names the endpoint;
/// and a peer that does not know our services is no node: another endpoint may be one.
fn answered(status: &tonic::Status, endpoint: &str, target: Target) -> Error {
    if let Some(error) = crate::status::said_by_node(status) {
        return error;
    }
    let error = crate::status::transport_error(status);
    match (target, error.reason()) {
        (Target::Any, Reason::Unsupported | Reason::Internal) => {
            Error::unavailable(format!("{endpoint} is no ShardFS node: {}", error.message()))
        }
        (Target::Any | Target::Shard(_), _) => error.context(endpoint),
    }
}

/// How long an attempt may take, so that the deadline is kept. A deadline of zero is that of one attempt, however long it takes.
fn bounded(attempt_max: Duration, deadline: Duration, elapsed: Duration) -> Duration {
    match deadline {
        Duration::ZERO => attempt_max,
        deadline => attempt_max.min(deadline.saturating_sub(elapsed).max(ATTEMPT_MIN)),
    }
}

fn past(started: Instant, deadline: Duration, pause: Duration) -> bool {
    clock::monotonic().duration_since(started).saturating_add(pause) > deadline
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_of_the_transport_name_the_endpoint() {
        let refused = answered(&tonic::Status::unavailable("refused"), "http://h:1", Target::Any);
        assert!(refused.is_retryable() && refused.message().contains("http://h:1"));
        let foreign = answered(&tonic::Status::unimplemented(""), "http://h:1", Target::Any);
        assert_eq!(foreign.reason(), Reason::Unavailable);
        let ours = crate::status::to_status(&Error::not_found("no such key"));
        assert_eq!(answered(&ours, "http://h:1", Target::Any).message(), "no such key");
    }

    #[test]
    fn an_attempt_ends_with_the_deadline() {
        let seconds = Duration::from_secs;
        assert_eq!(bounded(seconds(10), seconds(60), seconds(0)), seconds(10));
        assert_eq!(bounded(seconds(10), seconds(4), seconds(0)), seconds(4));
        assert_eq!(bounded(seconds(10), seconds(60), seconds(57)), seconds(3));
        assert_eq!(bounded(seconds(10), seconds(4), seconds(5)), ATTEMPT_MIN);
        assert_eq!(bounded(seconds(10), Duration::ZERO, seconds(1)), seconds(10));
        assert_eq!(bounded(seconds(10), super::super::DEADLINE_NEVER, seconds(9999)), seconds(10));
        assert!(!past(clock::monotonic(), super::super::DEADLINE_NEVER, seconds(9999)));
    }

    #[test]
    fn backoff_grows_to_its_bound() {
        let mut backoff = Backoff::new();
        let pauses: Vec<Duration> = (0..20).map(|_| backoff.next(0)).collect();
        assert!(pauses[0] <= BACKOFF_FIRST && pauses[0] >= BACKOFF_FIRST / 2);
        assert!(pauses[19] >= BACKOFF_MAX / 2);
        assert!(pauses.iter().all(|p| *p <= BACKOFF_MAX));
        assert!(Backoff::new().next(100) >= Duration::from_millis(100));
    }
}
