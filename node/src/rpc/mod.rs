//! The gRPC services Storage, Files, Admin and Backups, and the server that carries them.
//!
//! A handler decodes (`shardfs_proto::convert`), makes one core call, and encodes; what an operation
//! means is not decided here. Every call about a shard goes through the catalog, which checks owner,
//! state and epoch. Errors leave through `shardfs_proto::status` only.
//!
//! Invariants: a panic in a handler becomes INTERNAL and never ends the process; every call is told to
//! the [`CallObserver`] once, also one whose client went away; a call that is dropped (the client went
//! away) leaves no half of a mutation, because mutations are handed to the shard's executor as a whole.
//!
//! Blocking: point reads run where they are (they hit memory nearly always); scans and reads of more
//! than [`INLINE_READ_BYTES_MAX`] run on the blocking pool.
//!
//! Must not: touch a store's keys or records, or retry.

mod admin;
mod backups;
mod budget;
mod files;
mod snapshots;
mod source;
mod storage;
mod stream;

use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures::FutureExt;
use shardfs_proto::types::cluster::Selector;
use shardfs_proto::types::limits::MESSAGE_BYTES_MAX;
use shardfs_proto::types::op::Durability;
use shardfs_proto::types::{ClientId, Epoch, Error, Reason, Result, Sequence, SessionId, ShardId, clock};
use shardfs_proto::wire::{self, CLIENT_ID_METADATA};
use shardfs_proto::{convert, status};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::metadata::MetadataMap;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::TcpIncoming;
use tonic::{Code, Response, Status};
use tonic_health::server::HealthReporter;
use tower::util::MapResponseLayer;

use crate::catalog::Catalog;
use crate::shard::{Mutation, ReadView, Shard};

/// Bytes that a read may copy on an async thread: one chunk, which takes tens of microseconds.
const INLINE_READ_BYTES_MAX: u64 = 64 << 10;
/// Flow-control window of one HTTP/2 stream: a whole value without a round trip.
const STREAM_WINDOW_BYTES: u32 = 4 << 20;
/// Flow-control window of one connection: several streams at full speed; also what a connection may
/// make this process buffer.
const CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// Largest HTTP/2 frame that is accepted: fewer frames for large values.
const FRAME_BYTES_MAX: u32 = 1 << 20;
/// Calls under way on one connection.
const STREAMS_PER_CONNECTION_MAX: u32 = 1024;
/// A connection that is silent for so long is asked whether it is there, and closed after as long again.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// A request's headers: identity and what proxies add.
const HEADER_LIST_BYTES_MAX: u32 = 16 << 10;
/// Fsck runs at a time on a node: each takes a thread and disk bandwidth.
const CHECKS_MAX: usize = 2;
/// Streamed Puts at a time on a node: each holds up to two pieces in memory.
const PUT_STREAMS_MAX: usize = 256;

/// Is told of every call: for metrics. Must be cheap; it runs on the call's thread.
pub trait CallObserver: Send + Sync + 'static {
    /// A call (`Storage/Put`, ...) ended with `code` after `elapsed`; for an answer in a stream, with its
    /// last message. `Cancelled`: the client went away.
    fn call_finished(&self, method: &'static str, code: Code, elapsed: Duration);
}

/// Observes nothing.
pub struct NoObserver;

impl CallObserver for NoObserver {
    fn call_finished(&self, _: &'static str, _: Code, _: Duration) {}
}

/// What reflection lists and health checks know.
const SERVICES: [&str; 4] =
    ["shardfs.v1.Storage", "shardfs.v1.Files", "shardfs.v1.Admin", "shardfs.v1.Backups"];

/// What every service's handlers share. Cheap to clone.
#[derive(Clone)]
pub struct Services {
    catalog: Arc<Catalog>,
    observer: Arc<dyn CallObserver>,
    checks: Arc<tokio::sync::Semaphore>,
    put_streams: Arc<tokio::sync::Semaphore>,
}

/// Where to listen. Bound by the caller, so that a port in use is its error to report.
pub enum Listener {
    /// A TCP socket.
    Tcp(TcpListener),
    /// A unix socket.
    Unix(UnixListener),
}

impl Services {
    /// The services over a node's catalog.
    pub fn new(catalog: Arc<Catalog>, observer: Arc<dyn CallObserver>) -> Services {
        Services {
            catalog,
            observer,
            checks: Arc::new(tokio::sync::Semaphore::new(CHECKS_MAX)),
            put_streams: Arc::new(tokio::sync::Semaphore::new(PUT_STREAMS_MAX)),
        }
    }

    /// All services, with health checks and reflection. The reporter says SERVING for each of them; set
    /// NOT_SERVING before a shutdown.
    pub async fn routes(&self) -> Result<(Routes, HealthReporter)> {
        use wire::admin_server::AdminServer;
        use wire::backups_server::BackupsServer;
        use wire::files_server::FilesServer;
        use wire::storage_server::StorageServer;
        let limit = MESSAGE_BYTES_MAX;
        // An answer to a mutation that was applied must not fail for its size; streams bound their own messages.
        let storage = StorageServer::new(storage::StorageService::new(self.clone()))
            .max_decoding_message_size(limit)
            .max_encoding_message_size(usize::MAX);
        let files = FilesServer::new(files::FilesService::new(self.clone()))
            .max_decoding_message_size(limit)
            .max_encoding_message_size(usize::MAX);
        let admin =
            AdminServer::new(admin::AdminService::new(self.clone())).max_encoding_message_size(usize::MAX);
        let backups = BackupsServer::new(backups::BackupsService::new(self.clone()))
            .max_encoding_message_size(usize::MAX);
        let (reporter, health) = tonic_health::server::health_reporter();
        reporter.set_serving::<StorageServer<storage::StorageService>>().await;
        reporter.set_serving::<FilesServer<files::FilesService>>().await;
        reporter.set_serving::<AdminServer<admin::AdminService>>().await;
        reporter.set_serving::<BackupsServer<backups::BackupsService>>().await;
        let reflection = || {
            let builder = tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(wire::FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET);
            // The set also describes the metadata store, which is served elsewhere.
            let others = ["grpc.health.v1.Health", "grpc.reflection.v1.ServerReflection"];
            SERVICES.iter().chain(&others).fold(builder, |builder, name| builder.with_service_name(*name))
        };
        let bad = |e: tonic_reflection::server::Error| Error::internal(format!("reflection: {e}"));
        let routes = Routes::new(storage)
            .add_service(files)
            .add_service(admin)
            .add_service(backups)
            .add_service(health)
            .add_service(reflection().build_v1().map_err(bad)?)
            .add_service(reflection().build_v1alpha().map_err(bad)?)
            .prepare();
        Ok((routes, reporter))
    }

    /// The durability of a change that its session cannot make again: it must not be lost when the volume moves.
    fn lasting(&self, shard: ShardId, asked: Durability) -> Durability {
        if self.catalog.may_move(shard) { Durability::Sync } else { asked }
    }

    /// Serves on all listeners until `shutdown` ends, then lets the calls under way finish (the caller
    /// bounds how long). Says NOT_SERVING as soon as the shutdown begins.
    pub async fn serve(
        &self,
        listeners: Vec<Listener>,
        shutdown: impl Future<Output = ()> + Send + 'static,
    ) -> Result<()> {
        let (routes, reporter) = self.routes().await?;
        let shutdown = async move {
            shutdown.await;
            for service in [""].iter().chain(&SERVICES) {
                reporter.set_service_status(*service, tonic_health::ServingStatus::NotServing).await;
            }
        }
        .boxed()
        .shared();
        let budget = budget::RequestBudget::new();
        let servers = listeners.into_iter().map(|listener| {
            let mut layered = server().layer(MapResponseLayer::new(with_detail)).layer(budget.clone());
            let router = layered.add_routes(routes.clone());
            let shutdown = shutdown.clone();
            async move {
                match listener {
                    Listener::Tcp(listener) => {
                        let incoming = TcpIncoming::from(listener)
                            .with_nodelay(Some(true))
                            .with_keepalive(Some(KEEPALIVE));
                        router.serve_with_incoming_shutdown(incoming, shutdown).await
                    }
                    Listener::Unix(listener) => {
                        router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown).await
                    }
                }
                .map_err(|e| Error::io(format!("the gRPC server failed: {e}")))
            }
        });
        futures::future::try_join_all(servers).await?;
        Ok(())
    }

    /// Runs a unary call: turns its error into a status, a panic into INTERNAL, and tells the observer.
    async fn unary<T>(
        &self,
        method: &'static str,
        call: impl Future<Output = Result<T>>,
    ) -> Result<Response<T>, Status> {
        let observation = self.observe(method);
        let outcome = match guarded(method, call).await {
            Ok(answer) => Ok(answer),
            Err(error) => Err(self.catalog.behind(error).await),
        };
        observation.end(&outcome);
        outcome.map(Response::new).map_err(|error| status::to_status(&error))
    }

    /// Runs the beginning of a call whose answer is a stream; the stream takes the observation along.
    async fn streaming<S>(
        &self,
        method: &'static str,
        call: impl AsyncFnOnce(Observation) -> Result<S>,
    ) -> Result<Response<S>, Status> {
        let observation = self.observe(method);
        let failed = observation.clone();
        match guarded(method, call(observation)).await {
            Ok(stream) => Ok(Response::new(stream)),
            Err(error) => {
                let error = failed.behind(error).await;
                failed.failed(&error);
                Err(status::to_status(&error))
            }
        }
    }

    fn observe(&self, method: &'static str) -> Observation {
        Observation::begin(self.observer.clone(), Some(self.catalog.clone()), method)
    }

    /// The shard that a call is about, if the caller may use it here.
    async fn shard(&self, client: &ClientId, selector: &Selector, epoch: u64) -> Result<Arc<Shard>> {
        self.catalog.open_shard(client, selector, Epoch::new(epoch)).await
    }
}

/// A server with this system's transport settings, to which routes can be added.
pub fn server() -> Server {
    Server::builder()
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_frame_size(FRAME_BYTES_MAX)
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_max_header_list_size(HEADER_LIST_BYTES_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .tcp_nodelay(true)
        .tcp_keepalive(Some(KEEPALIVE))
}

/// Gives an error of the transport (a message that is too large or none, a call that is unknown) the detail
/// that the handlers' errors have.
fn with_detail(response: Answered) -> Answered {
    let Some(status) = Status::from_header_map(response.headers()) else { return response };
    let reason = match status.code() {
        Code::OutOfRange => Reason::TooLarge,
        Code::Internal => Reason::InvalidArgument,
        Code::Unimplemented => Reason::Unsupported,
        _ => return response,
    };
    if !status.details().is_empty() {
        return response;
    }
    status::to_status(&Error::new(reason, status.message())).into_http()
}

type Answered = axum::http::Response<tonic::body::Body>;

/// One call under observation. Dropped without an end, the last clone reports `Cancelled`.
#[derive(Clone)]
struct Observation(Arc<Observed>);

struct Observed {
    observer: Arc<dyn CallObserver>,
    /// None only where there is nothing to tell it.
    catalog: Option<Arc<Catalog>>,
    method: &'static str,
    started: Instant,
    code: parking_lot::Mutex<Option<Code>>,
}

impl Observation {
    fn begin(
        observer: Arc<dyn CallObserver>,
        catalog: Option<Arc<Catalog>>,
        method: &'static str,
    ) -> Observation {
        let code = parking_lot::Mutex::new(None);
        Observation(Arc::new(Observed { observer, catalog, method, started: clock::monotonic(), code }))
    }

    /// What to answer instead of an error; see [`Catalog::behind`].
    async fn behind(&self, error: Error) -> Error {
        match &self.0.catalog {
            Some(catalog) => catalog.behind(error).await,
            None => error,
        }
    }

    fn end<T>(self, outcome: &Result<T>) {
        match outcome {
            Ok(_) => self.succeeded(),
            Err(error) => self.failed(error),
        }
    }

    fn succeeded(&self) {
        self.end_with(Code::Ok);
    }

    fn failed(&self, error: &Error) {
        if let Some(catalog) = &self.0.catalog {
            catalog.damage().note_error(self.0.method, error);
        }
        self.end_with(status::code(error.reason()));
    }

    fn end_with(&self, code: Code) {
        self.0.code.lock().get_or_insert(code);
    }
}

impl Drop for Observed {
    fn drop(&mut self) {
        let code = self.code.get_mut().unwrap_or(Code::Cancelled);
        self.observer.call_finished(self.method, code, self.started.elapsed());
    }
}

/// Runs `call`; a panic in it becomes an error.
async fn guarded<T>(what: &'static str, call: impl Future<Output = Result<T>>) -> Result<T> {
    // What the call had under way is dropped with it; shared state behind it has locks that do not
    // poison and is changed by the executors only.
    match AssertUnwindSafe(call).catch_unwind().await {
        Ok(outcome) => outcome,
        Err(_) => Err(panicked(what)),
    }
}

fn panicked(what: &'static str) -> Error {
    tracing::error!(call = what, "a call panicked; the panic's own message stands before this line");
    Error::internal(format!("{what} failed because of a bug in the node: see its log"))
}

/// Runs `read` over a view: where it is if it is light, else on the blocking pool.
async fn on_view<T: Send + 'static>(
    what: &'static str,
    view: ReadView,
    heavy: bool,
    read: impl FnOnce(&ReadView) -> Result<T> + Send + 'static,
) -> Result<T> {
    if !heavy {
        return read(&view);
    }
    tokio::task::spawn_blocking(move || read(&view)).await.unwrap_or_else(|_| Err(panicked(what)))
}

/// For whom a call is made.
fn caller(metadata: &MetadataMap) -> Result<ClientId> {
    let value = metadata.get(CLIENT_ID_METADATA).ok_or_else(|| {
        Error::new(
            Reason::NoClientId,
            format!("the call names no client id: set the gRPC metadata entry {CLIENT_ID_METADATA:?}"),
        )
    })?;
    let text = value.to_str().map_err(|_| {
        Error::invalid(format!("the metadata entry {CLIENT_ID_METADATA:?} is not ASCII text"))
    })?;
    ClientId::new(text)
}

/// Says of an error about which shard it is, unless it does already.
fn about<T>(shard: ShardId, outcome: Result<T>) -> Result<T> {
    outcome.map_err(|error| if error.shard().is_some() { error } else { error.with_shard(shard) })
}

/// Session and sequence of a mutation: both or none.
fn write_id(session: u64, sequence: u64) -> Result<(Option<SessionId>, Option<Sequence>)> {
    match (SessionId::new(session), Sequence::new(sequence)) {
        (None, Some(_)) => {
            Err(Error::invalid("a sequence number without a session: open one with Files.OpenSession"))
        }
        pair => Ok(pair),
    }
}

/// The identity of a Storage service's mutation: none, or whole.
fn storage_write_id(write: Option<wire::WriteId>) -> Result<(Option<SessionId>, Option<Sequence>)> {
    let write = write.unwrap_or_default();
    match write_id(write.session_id, write.sequence)? {
        (Some(_), None) => {
            Err(Error::invalid("write_id names a session but no sequence number (they start at 1)"))
        }
        pair => Ok(pair),
    }
}

/// A mutation of the Storage service.
fn storage_mutation(
    write: Option<wire::WriteId>,
    durability: i32,
    operation: shardfs_proto::types::op::Operation,
) -> Result<Mutation> {
    let (session, sequence) = storage_write_id(write)?;
    let durability = convert::durability_from_wire(durability, Durability::Sync)?;
    Ok(Mutation { session, sequence, durability, operation })
}

#[cfg(test)]
mod tests;
