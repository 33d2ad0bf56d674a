//! The embedded metadata store: one process keeps it in one file and serves it to the nodes over gRPC
//! (`shardfs.meta.v1.Meta`), with the shape that etcd gives.
//!
//! - One writer thread drains a bounded queue; what waits together becomes one commit and one device
//!   sync. A call is answered after the commit that holds it is durable.
//! - Keys under [`store::VOLATILE_PREFIX`](super::store::VOLATILE_PREFIX) are committed without a sync of their own; a crash of this
//!   process may take back their last [`VOLATILE_AGE_MAX`]. Everything else survives any crash.
//! - Leases expire by this process's monotonic clock; after a restart each has its whole term again.
//! - Watches are served from the latest changes in memory; one that asks for older ones is told so
//!   (OUT_OF_RANGE) and ranges again.
//! - One process a file: the file itself is locked.

use std::collections::HashMap;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use futures::Stream;
use parking_lot::Mutex;
use shardfs_proto::types::clock;
use shardfs_proto::wire::meta as wire;
use shardfs_proto::wire::meta::meta_server::{Meta, MetaServer};
use tokio::sync::oneshot;
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::lease;
use super::store::{
    KeyRange, LEASE_TTL_MAX, LEASE_TTL_MIN, LeaseId, RANGE_BYTES_MAX, Revision, StoreError, StoreResult,
    TXN_BYTES_MAX, WatchBatch, check_range,
};
use super::wire::{
    batch_to_wire, error_to_status, range_answer_to_wire, range_from_wire, txn_answer_to_wire, txn_from_wire,
};
use crate::net::{self, ListenAddr};
use db::{Command, Outcome, Reader, Writer};
use log::Log;

mod db;
mod log;

/// Calls that may wait for the writer.
const QUEUE_MAX: usize = 1024;
/// Calls of one commit.
const GROUP_MAX: usize = 256;
/// Age that a volatile change may reach before it is synced.
pub const VOLATILE_AGE_MAX: Duration = Duration::from_secs(5);
/// How often a watch without events says where it stands.
const WATCH_PROGRESS_INTERVAL: Duration = Duration::from_secs(1);
/// Watches at a time; one a node, and some for tools.
const WATCHES_MAX: usize = 256;
/// Bytes of a message either way: what one transaction or one page of a range may hold, and its framing.
pub(super) const MESSAGE_BYTES_MAX: usize =
    2 * if TXN_BYTES_MAX > RANGE_BYTES_MAX { TXN_BYTES_MAX } else { RANGE_BYTES_MAX } + (8 << 20);
/// How long a stop waits for connections to end.
const STOP_WAIT_MAX: Duration = Duration::from_secs(3);

/// A running store.
pub struct Handle {
    address: ListenAddr,
    /// New calls are refused.
    stop: CancellationToken,
    /// Nothing will be published any more: watches end when they have told everything.
    ended: CancellationToken,
    reader: Reader,
    server: tokio::task::JoinHandle<()>,
    queue: SyncSender<Message>,
    writer: Option<JoinHandle<()>>,
}

/// Opens or makes the file at `path` and serves it at `listen`.
pub async fn serve(path: PathBuf, listen: ListenAddr) -> Result<Handle> {
    // The file is opened on the thread that owns the writer; a repair after a crash may take a while.
    let file = path.clone();
    let opened = tokio::task::spawn_blocking(move || db::open(&file))
        .await
        .context("opening the metadata store")?
        .with_context(|| format!("the metadata store {}", path.display()))?;
    if opened.crashed {
        // A heartbeat that was answered may have been taken back: the lease that it renewed must end before anybody
        // can be elected without having seen it.
        tokio::time::sleep(lease::TERM).await;
    }
    let log = Arc::new(Log::new(opened.revision));
    let leases = Leases::new(opened.leases);
    let (queue, messages) = sync_channel(QUEUE_MAX);
    let writer_loop = WriterLoop {
        writer: opened.writer,
        log: log.clone(),
        leases: leases.clone(),
        flushed: clock::monotonic(),
    };
    let (stop, ended) = (CancellationToken::new(), CancellationToken::new());
    let service = Service {
        reader: opened.reader.clone(),
        queue: queue.clone(),
        log,
        leases,
        stop: stop.clone(),
        ended: ended.clone(),
        watches: Arc::new(tokio::sync::Semaphore::new(WATCHES_MAX)),
    };
    let service = MetaServer::new(service)
        .max_decoding_message_size(MESSAGE_BYTES_MAX)
        .max_encoding_message_size(MESSAGE_BYTES_MAX);
    let router = tonic::transport::Server::builder()
        .tcp_nodelay(true)
        .http2_keepalive_interval(Some(Duration::from_secs(10)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .add_service(service);
    let stopped = stop.clone().cancelled_owned();
    let (address, server) = match listen {
        ListenAddr::Tcp(address) => {
            let listener = net::bind_tcp(address).await?;
            let address = ListenAddr::Tcp(listener.local_addr()?);
            let serving = router.serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped);
            (address, tokio::spawn(log_end(serving)))
        }
        ListenAddr::Unix(path) => {
            let listener = net::bind_unix(&path)?;
            let serving = router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped);
            (ListenAddr::Unix(path), tokio::spawn(log_end(serving)))
        }
    };
    let writer = std::thread::Builder::new()
        .name("meta-writer".into())
        .spawn(move || writer_loop.run(&messages))
        .context("starting the metadata store's writer")?;
    tracing::info!(%address, file = %path.display(), "metadata store serves");
    Ok(Handle { address, stop, ended, reader: opened.reader, server, queue, writer: Some(writer) })
}

async fn log_end(serving: impl Future<Output = Result<(), tonic::transport::Error>>) {
    if let Err(error) = serving.await {
        tracing::error!(%error, "metadata store: serving ended");
    }
}

impl Handle {
    /// Where it serves; as text it is a node's `--meta`.
    pub fn address(&self) -> &ListenAddr {
        &self.address
    }

    /// Stops: watches end, waiting calls are answered, the file is closed cleanly.
    pub async fn shutdown(self) -> Result<()> {
        self.end(true).await
    }

    /// Stops as a crash would: connections break and nothing more is made durable on purpose.
    pub async fn kill(self) -> Result<()> {
        self.end(false).await
    }

    async fn end(mut self, clean: bool) -> Result<()> {
        self.stop.cancel();
        let (queue, writer) = (self.queue.clone(), self.writer.take());
        // The writer first, so that watches can tell what it did last.
        let written = tokio::task::spawn_blocking(move || {
            // A writer that has ended needs no message.
            let _ = queue.send(Message::Stop { clean });
            writer.map_or(Ok(()), |w| {
                w.join().map_err(|_| anyhow::anyhow!("the metadata store's writer panicked"))
            })
        })
        .await
        .context("stopping the metadata store")?;
        self.ended.cancel();
        if !clean || tokio::time::timeout(STOP_WAIT_MAX, &mut self.server).await.is_err() {
            self.server.abort();
            // Only its end is of interest here; that it was aborted is known.
            let _ = (&mut self.server).await;
        }
        if let ListenAddr::Unix(path) = &self.address {
            // Not being there any more is as good.
            let _ = std::fs::remove_file(path);
        }
        let closed = async {
            while !self.reader.is_closed() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        if tokio::time::timeout(STOP_WAIT_MAX, closed).await.is_err() {
            tracing::warn!("metadata store: its file is still being read");
        }
        written
    }
}

enum Message {
    Call { command: Command, answer: oneshot::Sender<StoreResult<Outcome>> },
    Stop { clean: bool },
}

/// When each lease ends, by this process's clock.
#[derive(Clone)]
struct Leases(Arc<Mutex<HashMap<LeaseId, (u32, Instant)>>>);

impl Leases {
    fn new(leases: Vec<(LeaseId, u32)>) -> Leases {
        let now = clock::monotonic();
        let whole_term = |(id, ttl)| (id, (ttl, now + Duration::from_millis(u64::from(ttl))));
        Leases(Arc::new(Mutex::new(leases.into_iter().map(whole_term).collect())))
    }

    fn begin(&self, lease: LeaseId, ttl_ms: u32) {
        let end = clock::monotonic() + Duration::from_millis(u64::from(ttl_ms));
        self.0.lock().insert(lease, (ttl_ms, end));
    }

    /// The term that began anew; `None`: the lease has ended.
    fn renew(&self, lease: LeaseId) -> Option<u32> {
        let now = clock::monotonic();
        let mut leases = self.0.lock();
        let (ttl_ms, end) = leases.get_mut(&lease)?;
        if *end <= now {
            return None;
        }
        *end = now + Duration::from_millis(u64::from(*ttl_ms));
        Some(*ttl_ms)
    }

    fn forget(&self, lease: LeaseId) {
        self.0.lock().remove(&lease);
    }

    /// Leases that have ended, and when the next one will.
    fn ended(&self, now: Instant) -> (Vec<LeaseId>, Option<Instant>) {
        let leases = self.0.lock();
        let ended = leases.iter().filter(|(_, (_, end))| *end <= now).map(|(id, _)| *id).collect();
        (ended, leases.values().map(|(_, end)| *end).filter(|end| *end > now).min())
    }
}

struct WriterLoop {
    writer: Writer,
    log: Arc<Log>,
    leases: Leases,
    flushed: Instant,
}

impl WriterLoop {
    fn run(mut self, messages: &Receiver<Message>) {
        loop {
            let now = clock::monotonic();
            let (ended, next_end) = self.leases.ended(now);
            if !ended.is_empty() {
                self.expire(ended);
                continue;
            }
            if now >= self.flushed + VOLATILE_AGE_MAX {
                self.flushed = now;
                if let Err(error) = self.writer.flush() {
                    tracing::error!(%error, "metadata store: a flush failed");
                }
            }
            let wake = next_end
                .map_or(self.flushed + VOLATILE_AGE_MAX, |end| end.min(self.flushed + VOLATILE_AGE_MAX));
            let first = match messages.recv_timeout(wake.saturating_duration_since(now)) {
                Ok(message) => message,
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => break self.close(true),
            };
            let mut group = Vec::new();
            let mut answers = Vec::new();
            let mut stop = None;
            for message in std::iter::once(first).chain(messages.try_iter()) {
                match message {
                    Message::Call { command, answer } => {
                        group.push(command);
                        answers.push(answer);
                    }
                    Message::Stop { clean } => stop = Some(clean),
                }
                if stop.is_some() || group.len() == GROUP_MAX {
                    break;
                }
            }
            if !group.is_empty() && stop != Some(false) {
                self.group(group, answers);
            }
            if let Some(clean) = stop {
                break self.close(clean);
            }
        }
    }

    fn group(&mut self, commands: Vec<Command>, answers: Vec<oneshot::Sender<StoreResult<Outcome>>>) {
        let outcomes = self.apply(commands);
        for (outcome, answer) in outcomes.into_iter().zip(answers) {
            if let Ok(Outcome::LeaseGranted { lease, ttl_ms }) = &outcome {
                self.leases.begin(*lease, *ttl_ms);
            }
            // A caller that has gone away reads again when it comes back.
            let _ = answer.send(outcome);
        }
    }

    fn apply(&mut self, commands: Vec<Command>) -> Vec<StoreResult<Outcome>> {
        let (outcomes, batches) = self.writer.apply(commands);
        if let Some(revision) = self.writer.take_reopened() {
            self.log.reset(revision);
        }
        self.log.publish(batches);
        outcomes
    }

    fn expire(&mut self, ended: Vec<LeaseId>) {
        for lease in &ended {
            self.leases.forget(*lease);
        }
        let commands = ended.into_iter().map(|lease| Command::LeaseRevoke { lease }).collect();
        let outcomes = self.apply(commands);
        for error in outcomes.into_iter().filter_map(Result::err) {
            // Revoked while it was expiring: the same end.
            if !matches!(error, StoreError::LeaseUnknown) {
                tracing::error!(%error, "metadata store: a lease could not be ended");
            }
        }
    }

    fn close(self, clean: bool) {
        if !clean {
            return;
        }
        if let Err(error) = self.writer.close() {
            tracing::error!(%error, "metadata store: closing failed; the next start recovers");
        }
    }
}

struct Service {
    reader: Reader,
    queue: SyncSender<Message>,
    log: Arc<Log>,
    leases: Leases,
    stop: CancellationToken,
    ended: CancellationToken,
    watches: Arc<tokio::sync::Semaphore>,
}

impl Service {
    async fn run(&self, command: Command) -> Result<Outcome, Status> {
        if self.stop.is_cancelled() {
            return Err(error_to_status(StoreError::Unavailable("it is stopping".into())));
        }
        let (answer, answered) = oneshot::channel();
        match self.queue.try_send(Message::Call { command, answer }) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                return Err(error_to_status(StoreError::Unavailable(format!(
                    "{QUEUE_MAX} calls are waiting already"
                ))));
            }
            Err(TrySendError::Disconnected(_)) => {
                return Err(error_to_status(StoreError::Unavailable("it is stopping".into())));
            }
        }
        match answered.await {
            Ok(outcome) => outcome.map_err(error_to_status),
            Err(_) => Err(error_to_status(StoreError::OutcomeUnknown("it stopped meanwhile".into()))),
        }
    }
}

/// An answer of another kind than its command's is a bug of the writer.
fn mismatch() -> Status {
    error_to_status(StoreError::Failed("an answer does not fit its command".into()))
}

type WatchReplies = Pin<Box<dyn Stream<Item = Result<wire::WatchReply, Status>> + Send>>;

#[tonic::async_trait]
impl Meta for Service {
    type WatchStream = WatchReplies;

    async fn range(
        &self,
        request: Request<wire::RangeRequest>,
    ) -> Result<Response<wire::RangeReply>, Status> {
        let request = request.into_inner();
        let range = range_from_wire(request.key, request.range_end);
        check_range(&range).map_err(error_to_status)?;
        let limit = usize::try_from(request.limit).unwrap_or(usize::MAX);
        let answer = if range.end().is_none() {
            self.reader.range(&range, limit)
        } else {
            let reader = self.reader.clone();
            tokio::task::spawn_blocking(move || reader.range(&range, limit))
                .await
                .map_err(|e| Status::internal(e.to_string()))?
        };
        answer.map(|a| Response::new(range_answer_to_wire(a))).map_err(error_to_status)
    }

    async fn txn(&self, request: Request<wire::TxnRequest>) -> Result<Response<wire::TxnReply>, Status> {
        let txn = txn_from_wire(request.into_inner()).map_err(error_to_status)?;
        match self.run(Command::Txn(txn)).await? {
            Outcome::Txn(answer) => Ok(Response::new(txn_answer_to_wire(answer))),
            Outcome::LeaseGranted { .. } | Outcome::LeaseRevoked => Err(mismatch()),
        }
    }

    async fn watch(&self, request: Request<wire::WatchRequest>) -> Result<Response<WatchReplies>, Status> {
        let request = request.into_inner();
        let range = range_from_wire(request.key, request.range_end);
        check_range(&range).map_err(error_to_status)?;
        let start = self.log.start(Revision::new(request.start_revision)).map_err(error_to_status)?;
        let Ok(permit) = self.watches.clone().try_acquire_owned() else {
            return Err(error_to_status(StoreError::Unavailable(format!(
                "{WATCHES_MAX} watches are running already"
            ))));
        };
        let batches = watch(self.log.clone(), range, start, self.ended.clone());
        let replies = async_stream::stream! {
            let _permit = permit;
            for await batch in batches {
                yield batch.map(batch_to_wire).map_err(error_to_status);
            }
        };
        Ok(Response::new(Box::pin(replies)))
    }

    async fn lease_grant(
        &self,
        request: Request<wire::LeaseGrantRequest>,
    ) -> Result<Response<wire::LeaseGrantReply>, Status> {
        let asked = Duration::from_millis(u64::from(request.into_inner().ttl_ms));
        if !(LEASE_TTL_MIN..=LEASE_TTL_MAX).contains(&asked) {
            return Err(error_to_status(StoreError::Invalid(format!(
                "a lease of {asked:?}; the limits are {LEASE_TTL_MIN:?} and {LEASE_TTL_MAX:?}"
            ))));
        }
        match self.run(Command::LeaseGrant { ttl_ms: asked.as_millis() as u32 }).await? {
            Outcome::LeaseGranted { lease, ttl_ms } => {
                Ok(Response::new(wire::LeaseGrantReply { lease_id: lease.get(), ttl_ms }))
            }
            Outcome::Txn(_) | Outcome::LeaseRevoked => Err(mismatch()),
        }
    }

    async fn lease_keep_alive(
        &self,
        request: Request<wire::LeaseKeepAliveRequest>,
    ) -> Result<Response<wire::LeaseKeepAliveReply>, Status> {
        let lease = LeaseId::new(request.into_inner().lease_id);
        match lease.and_then(|lease| self.leases.renew(lease)) {
            Some(ttl_ms) => Ok(Response::new(wire::LeaseKeepAliveReply { ttl_ms })),
            None => Err(error_to_status(StoreError::LeaseUnknown)),
        }
    }

    async fn lease_revoke(
        &self,
        request: Request<wire::LeaseRevokeRequest>,
    ) -> Result<Response<wire::LeaseRevokeReply>, Status> {
        let Some(lease) = LeaseId::new(request.into_inner().lease_id) else {
            return Err(error_to_status(StoreError::LeaseUnknown));
        };
        self.run(Command::LeaseRevoke { lease }).await?;
        self.leases.forget(lease);
        Ok(Response::new(wire::LeaseRevokeReply {}))
    }
}

/// The batches of one watch: where it stands, then whole revisions, and every second without any where it
/// stands.
fn watch(
    log: Arc<Log>,
    range: KeyRange,
    start: Revision,
    ended: CancellationToken,
) -> impl Stream<Item = StoreResult<WatchBatch>> {
    async_stream::stream! {
        let mut latest = log.subscribe();
        let mut next = start;
        let mut told = Revision::new(start.get() - 1);
        let mut last_look = false;
        let mut progress = tokio::time::interval(WATCH_PROGRESS_INTERVAL);
        progress.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        progress.reset();
        yield Ok(WatchBatch { revision: told, events: Vec::new() });
        loop {
            // Marked before taking: what comes while taking wakes again.
            latest.borrow_and_update();
            let taken = match log.take(&range, next) {
                Ok(taken) => taken,
                Err(error) => {
                    yield Err(error);
                    break;
                }
            };
            let went_on = taken.upto >= next;
            next = next.max(taken.upto.next());
            for batch in taken.batches {
                told = batch.revision;
                yield Ok(batch);
            }
            if went_on {
                continue;
            }
            if last_look {
                yield Err(StoreError::OutcomeUnknown("the metadata store is stopping".into()));
                break;
            }
            tokio::select! {
                // What was published before is still told.
                _ = ended.cancelled() => last_look = true,
                _ = latest.changed() => {}
                _ = progress.tick() => {
                    told = told.max(Revision::new(next.get() - 1));
                    yield Ok(WatchBatch { revision: told, events: Vec::new() });
                }
            }
        }
    }
}
