//! The client of the embedded metadata store.
//!
//! Reads and watches are repeated (bounded, with jitter) while the store cannot be reached; a
//! transaction only if it is certain that nothing happened: the connection could not be made, or the
//! store said so itself. Everything else is [`StoreError::OutcomeUnknown`]. One connection serves all calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use futures::future::BoxFuture;
use parking_lot::Mutex;
use shardfs_proto::types::clock;
use shardfs_proto::wire::meta as wire;
use shardfs_proto::wire::meta::meta_client::MetaClient;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use super::embedded_server::MESSAGE_BYTES_MAX;
use super::retry::{self, Backoff, RETRY_MAX, chain};
use super::store::{
    KeyRange, LeaseId, MetaStore, RangeAnswer, Revision, StoreError, StoreResult, Txn, TxnAnswer,
    WatchStream, check_range,
};
use super::wire::{
    batch_from_wire, error_from_status, range_answer_from_wire, range_to_wire, txn_answer_from_wire,
    txn_to_wire,
};

/// How long one connection attempt may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long one call may take: a commit on a slow device and what waits before it.
const CALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection on which nothing arrives for this long is broken: the store sends watches a sign of life every
/// second.
const WATCH_SILENCE_MAX: Duration = Duration::from_secs(4);

/// A client. Cheap to clone.
#[derive(Clone)]
pub struct EmbeddedStore {
    shared: Arc<Shared>,
}

struct Shared {
    endpoint: Endpoint,
    address: String,
    connection: Mutex<Option<(u64, MetaClient<Channel>)>>,
    generation: AtomicU64,
    reachable: AtomicBool,
    retry_max: Duration,
}

impl EmbeddedStore {
    /// For `http://host:port` or `unix:/path`. No I/O.
    pub fn new(address: &str) -> StoreResult<EmbeddedStore> {
        EmbeddedStore::with_retry(address, RETRY_MAX)
    }

    /// The same, with a bound on how long calls are repeated.
    pub fn with_retry(address: &str, retry_max: Duration) -> StoreResult<EmbeddedStore> {
        let endpoint = Endpoint::from_shared(address.to_owned())
            .map_err(|e| StoreError::Invalid(format!("{address:?} is no address of a metadata store: {e}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(Duration::from_secs(5))
            .keep_alive_timeout(Duration::from_secs(5))
            .keep_alive_while_idle(true);
        Ok(EmbeddedStore {
            shared: Arc::new(Shared {
                endpoint,
                address: address.to_owned(),
                connection: Mutex::new(None),
                generation: AtomicU64::new(0),
                reachable: AtomicBool::new(false),
                retry_max,
            }),
        })
    }

    /// A connected client and its generation. Failing means that nothing was sent.
    async fn connection(&self) -> StoreResult<(u64, MetaClient<Channel>)> {
        let shared = &self.shared;
        if let Some(connection) = shared.connection.lock().clone() {
            return Ok(connection);
        }
        let connected = tokio::time::timeout(CONNECT_TIMEOUT, shared.endpoint.connect()).await;
        let channel = match connected {
            Ok(Ok(channel)) => channel,
            Ok(Err(error)) => return Err(self.not_connected(&chain(&error))),
            Err(_) => return Err(self.not_connected("connecting took too long")),
        };
        let generation = shared.generation.fetch_add(1, Ordering::Relaxed);
        let client = MetaClient::new(channel)
            .max_decoding_message_size(MESSAGE_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX);
        let connection = (generation, client);
        *shared.connection.lock() = Some(connection.clone());
        Ok(connection)
    }

    fn not_connected(&self, why: &str) -> StoreError {
        self.shared.reachable.store(false, Ordering::Relaxed);
        StoreError::Unavailable(format!("{}: {why}", self.shared.address))
    }

    /// What a call's end says about the connection.
    fn judge(&self, generation: u64, status: Option<&Status>) {
        // A store that is stopping aborts: the next one is behind another connection.
        let broken = status.is_some_and(|s| {
            matches!(
                s.code(),
                Code::Unavailable
                    | Code::Unknown
                    | Code::Cancelled
                    | Code::Internal
                    | Code::DeadlineExceeded
                    | Code::Aborted
            )
        });
        self.shared.reachable.store(!broken, Ordering::Relaxed);
        if broken {
            let mut connection = self.shared.connection.lock();
            if connection.as_ref().is_some_and(|(g, _)| *g == generation) {
                *connection = None;
            }
        }
    }

    /// One attempt of one call.
    async fn attempt<T, F, Fut>(&self, call: &F) -> StoreResult<T>
    where
        F: Fn(MetaClient<Channel>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        let (generation, client) = self.connection().await?;
        let status = match tokio::time::timeout(CALL_TIMEOUT, call(client)).await {
            Ok(Ok(reply)) => {
                self.judge(generation, None);
                return Ok(reply.into_inner());
            }
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded(format!("no answer within {CALL_TIMEOUT:?}")),
        };
        self.judge(generation, Some(&status));
        Err(match error_from_status(&status) {
            StoreError::OutcomeUnknown(why) => {
                StoreError::OutcomeUnknown(format!("{}: {why}", self.shared.address))
            }
            // Only a watch can be too old; elsewhere this code is the transport's word for a message too large.
            StoreError::Compacted => StoreError::Invalid(status.message().to_owned()),
            error @ (StoreError::Unavailable(_)
            | StoreError::LeaseUnknown
            | StoreError::Invalid(_)
            | StoreError::Failed(_)) => error,
        })
    }

    /// Attempts until one succeeds, fails for good, or time is up. `repeatable`: a call may be made twice.
    async fn repeat<T, F, Fut>(&self, repeatable: bool, call: F) -> StoreResult<T>
    where
        F: Fn(MetaClient<Channel>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, Status>>,
    {
        retry::repeat(repeatable, self.shared.retry_max, || self.attempt(&call)).await
    }
}

impl MetaStore for EmbeddedStore {
    fn range(&self, range: KeyRange, limit: usize) -> BoxFuture<'_, StoreResult<RangeAnswer>> {
        Box::pin(async move {
            check_range(&range)?;
            let (key, range_end) = range_to_wire(&range);
            let request = wire::RangeRequest { key, range_end, limit: limit as u64 };
            let call = |mut client: MetaClient<Channel>| {
                let request = request.clone();
                async move { client.range(request).await }
            };
            self.repeat(true, call).await.map(range_answer_from_wire)
        })
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, StoreResult<TxnAnswer>> {
        Box::pin(async move {
            txn.check()?;
            let repeatable = txn.only_reads();
            let request = txn_to_wire(txn);
            let call = |mut client: MetaClient<Channel>| {
                let request = request.clone();
                async move { client.txn(request).await }
            };
            self.repeat(repeatable, call).await.map(txn_answer_from_wire)
        })
    }

    fn watch(&self, range: KeyRange, from: Revision) -> WatchStream {
        let store = self.clone();
        Box::pin(async_stream::stream! {
            if let Err(error) = check_range(&range) {
                yield Err(error);
                return;
            }
            let mut next = from;
            let mut backoff = Backoff::new();
            loop {
                let mut heard = clock::monotonic();
                match store.open_watch(&range, next).await {
                    Ok((generation, mut replies)) => loop {
                        let reply = tokio::time::timeout(silence_left(heard), replies.message()).await;
                        let status = match reply {
                            Ok(Ok(Some(reply))) => {
                                heard = clock::monotonic();
                                backoff = Backoff::new();
                                store.judge(generation, None);
                                let batch = batch_from_wire(reply);
                                next = next.max(batch.revision.next());
                                yield Ok(batch);
                                continue;
                            }
                            Ok(Ok(None)) => Status::unavailable("the watch ended"),
                            Ok(Err(status)) => status,
                            Err(_) => Status::deadline_exceeded("the watch is silent"),
                        };
                        store.judge(generation, Some(&status));
                        if status.code() == Code::OutOfRange {
                            yield Err(StoreError::Compacted);
                            return;
                        }
                        break;
                    },
                    Err(error @ (StoreError::Compacted | StoreError::Invalid(_) | StoreError::Failed(_) | StoreError::LeaseUnknown)) => {
                        yield Err(error);
                        return;
                    }
                    Err(StoreError::Unavailable(why) | StoreError::OutcomeUnknown(why)) => {
                        tracing::debug!(why, "metadata store: the watch waits");
                    }
                }
                tokio::time::sleep(backoff.next()).await;
            }
        })
    }

    fn lease_grant(&self, ttl: Duration) -> BoxFuture<'_, StoreResult<LeaseId>> {
        Box::pin(async move {
            let ttl_ms = u32::try_from(ttl.as_millis())
                .map_err(|_| StoreError::Invalid(format!("a lease of {ttl:?}")))?;
            // Granting twice is harmless: a lease that nobody keeps alive ends.
            let call = |mut client: MetaClient<Channel>| async move {
                client.lease_grant(wire::LeaseGrantRequest { ttl_ms }).await
            };
            let reply = self.repeat(true, call).await?;
            LeaseId::new(reply.lease_id).ok_or_else(|| StoreError::Failed("it granted lease number 0".into()))
        })
    }

    fn lease_keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, StoreResult<()>> {
        Box::pin(async move {
            let call = |mut client: MetaClient<Channel>| async move {
                client.lease_keep_alive(wire::LeaseKeepAliveRequest { lease_id: lease.get() }).await
            };
            self.repeat(true, call).await.map(drop)
        })
    }

    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, StoreResult<()>> {
        Box::pin(async move {
            let call = |mut client: MetaClient<Channel>| async move {
                client.lease_revoke(wire::LeaseRevokeRequest { lease_id: lease.get() }).await
            };
            self.repeat(false, call).await.map(drop)
        })
    }

    fn reachable(&self) -> bool {
        self.shared.reachable.load(Ordering::Relaxed)
    }
}

fn silence_left(heard: Instant) -> Duration {
    (heard + WATCH_SILENCE_MAX).saturating_duration_since(clock::monotonic())
}

impl EmbeddedStore {
    async fn open_watch(
        &self,
        range: &KeyRange,
        from: Revision,
    ) -> StoreResult<(u64, tonic::Streaming<wire::WatchReply>)> {
        let (generation, mut client) = self.connection().await?;
        let (key, range_end) = range_to_wire(range);
        let request = wire::WatchRequest { key, range_end, start_revision: from.get() };
        let status = match tokio::time::timeout(CALL_TIMEOUT, client.watch(request)).await {
            Ok(Ok(reply)) => return Ok((generation, reply.into_inner())),
            Ok(Err(status)) => status,
            Err(_) => Status::deadline_exceeded(format!("no answer within {CALL_TIMEOUT:?}")),
        };
        self.judge(generation, Some(&status));
        Err(error_from_status(&status))
    }
}
