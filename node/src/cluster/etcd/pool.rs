//! The connection to an etcd: to one of its members at a time, to another one when that does not answer.
//!
//! Invariants:
//! - a connection is used only after its member has answered a read in agreement with the majority, belongs to the same
//!   etcd as every member before it, and knows no less than they: two etcds that one address names by mistake are never
//!   taken for one, nor is one that was made anew, or from a backup, at the same address;
//! - whatever fails here has sent nothing that changes anything;
//! - no lock is held by a caller's future, which may never be polled again: who connects is a task of its own, and goes
//!   on to the next member also when its caller has no patience left, as heartbeats have little;
//! - why a member cannot be used is noted (`trouble`), whether or not anybody still waits for it.
//!
//! The crate and its transport would reconnect by themselves; that is switched off ([`connect_once`]): what is behind an
//! address may have changed, and a token that etcd has forgotten is of no use.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use etcd_client::proto::PbResponseHeader;
use etcd_client::{
    Channel, Client, ConnectOptions, GetOptions, KvClient, LeaseClient, MaintenanceClient, WatchClient,
};
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use shardfs_proto::types::clock;
use tokio::net::TcpStream;
use tonic::transport::{Channel as Transport, Endpoint};

use super::errors;
use super::settings::EtcdSettings;
use super::trouble::{self, Cut, Given, Progress, Stage, Troubles};
use crate::cluster::records::CLUSTER_KEY;
use crate::cluster::retry::chain;
use crate::cluster::store::{RANGE_BYTES_MAX, Revision, StoreError, StoreResult};

/// How long one member may take to be connected to, to check the user and to answer a read.
const MEMBER_TIMEOUT: Duration = Duration::from_millis(1500);
/// How long a TCP connection may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// How long all members together may take.
const CONNECT_ALL_TIMEOUT: Duration = Duration::from_secs(5);
/// A connection on which nothing arrives is tested this often. etcd refuses tests that come more often than every 5 s
/// (its --grpc-keepalive-min-time).
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_millis(6500);
/// How long the answer to a test may take.
const KEEP_ALIVE_TIMEOUT: Duration = Duration::from_secs(3);
/// What a stream, and a connection, may send without being asked for more: a large page at once.
const STREAM_WINDOW_BYTES: u32 = 2 << 20;
/// See [`STREAM_WINDOW_BYTES`].
const CONNECTION_WINDOW_BYTES: u32 = 8 << 20;
/// Whoever gave up a call after this long has found the connection wanting.
const SUSPECT_AFTER: Duration = Duration::from_millis(800);
/// The largest answer to a range that is taken. What is larger is asked for again in smaller pages.
const PAGE_BYTES_MAX: usize = 2 * RANGE_BYTES_MAX;
/// The largest answer to a transaction that is taken: what it deleted and read.
const TXN_ANSWER_BYTES_MAX: usize = 32 << 20;
/// The largest message of a watch that is taken. etcd cuts them at its --max-request-bytes (1.5 MiB), but never within
/// an event.
const WATCH_MESSAGE_BYTES_MAX: usize = 16 << 20;

/// A connection to one member.
pub(super) struct Connection {
    generation: u64,
    member: String,
    etcd_id: u64,
    progress_in_order: bool,
    /// The pool's.
    revision_seen: Arc<AtomicU64>,
    client: Client,
}

impl Connection {
    /// The member, for messages.
    pub(super) fn member(&self) -> &str {
        &self.member
    }

    /// Whether the member answers questions for progress in order with a watch's events.
    pub(super) fn progress_in_order(&self) -> bool {
        self.progress_in_order
    }

    /// For ranges.
    pub(super) fn pages(&self) -> KvClient {
        self.client.kv_client().max_decoding_message_size(PAGE_BYTES_MAX)
    }

    /// For transactions.
    pub(super) fn transactions(&self) -> KvClient {
        self.client.kv_client().max_decoding_message_size(TXN_ANSWER_BYTES_MAX)
    }

    /// For leases.
    pub(super) fn leases(&self) -> LeaseClient {
        self.client.lease_client()
    }

    /// For questions about the etcd itself.
    pub(super) fn maintenance(&self) -> MaintenanceClient {
        self.client.maintenance_client()
    }

    /// The etcd to which the member belongs, by etcd's own number.
    pub(super) fn etcd_id(&self) -> u64 {
        self.etcd_id
    }

    /// For watches.
    pub(super) fn watches(&self) -> WatchClient {
        self.client.watch_client().max_decoding_message_size(WATCH_MESSAGE_BYTES_MAX)
    }

    /// The revision that an answer names, after checking that it comes from the etcd that we know.
    pub(super) fn revision(&self, header: Option<&PbResponseHeader>) -> StoreResult<Revision> {
        let header =
            header.ok_or_else(|| StoreError::Failed(format!("{}: an answer without header", self.member)))?;
        if header.cluster_id != self.etcd_id {
            return Err(another_etcd(&self.member));
        }
        let revision = u64::try_from(header.revision)
            .map_err(|_| StoreError::Failed(format!("{}: a negative revision", self.member)))?;
        self.revision_seen.fetch_max(revision, Ordering::AcqRel);
        Ok(Revision::new(revision))
    }
}

/// Since 3.4.25 and 3.5.8 (etcd issue 15220). A version that cannot be read is taken for an older one.
fn progress_in_order(version: &str) -> bool {
    let mut numbers = version.split('.').map(|part| {
        let digits = part.split(|c: char| !c.is_ascii_digit()).next().unwrap_or_default();
        digits.parse::<u32>().ok()
    });
    match (numbers.next().flatten(), numbers.next().flatten(), numbers.next().flatten()) {
        (Some(3), Some(4), Some(patch)) => patch >= 25,
        (Some(3), Some(5), Some(patch)) => patch >= 8,
        (Some(major), Some(minor), _) => (major, minor) > (3, 5),
        _ => false,
    }
}

fn another_etcd(member: &str) -> StoreError {
    StoreError::Failed(format!(
        "{member} belongs to another etcd than the one that answered before: check the addresses"
    ))
}

/// Why there is no connection. Nothing was sent.
pub(super) struct Unconnected {
    /// Of each member that was tried.
    pub(super) error: StoreError,
    /// Another attempt at once would be in vain: the settings do not fit any member.
    pub(super) lasting: bool,
}

impl From<Unconnected> for StoreError {
    fn from(unconnected: Unconnected) -> StoreError {
        unconnected.error
    }
}

/// Why one member could not be connected to.
struct Refusal {
    error: StoreError,
    /// See [`trouble::is_misfit`].
    misfit: bool,
}

impl From<StoreError> for Refusal {
    fn from(error: StoreError) -> Refusal {
        Refusal { error, misfit: false }
    }
}

/// Connections, one at a time.
pub(super) struct Pool {
    settings: EtcdSettings,
    /// The member that is tried next. Moved on before it is tried.
    cursor: AtomicUsize,
    current: Mutex<Option<Arc<Connection>>>,
    /// One connects, the others wait for it. Held across awaits, by tasks only; nothing else is locked under it for longer
    /// than a copy.
    connecting: tokio::sync::Mutex<()>,
    generation: AtomicU64,
    /// The id of the etcd, 0 while no member has answered.
    etcd_id: AtomicU64,
    /// The greatest revision that any answer named.
    revision_seen: Arc<AtomicU64>,
    reachable: AtomicBool,
    troubles: Troubles,
    /// The last change that takes room was refused because the quota is used up.
    no_space: AtomicBool,
}

impl Pool {
    /// No I/O.
    pub(super) fn new(settings: EtcdSettings) -> Pool {
        // Nodes spread over the members.
        let first = fastrand::usize(..settings.members.len().max(1));
        Pool {
            settings,
            cursor: AtomicUsize::new(first),
            current: Mutex::new(None),
            connecting: tokio::sync::Mutex::new(()),
            generation: AtomicU64::new(0),
            etcd_id: AtomicU64::new(0),
            revision_seen: Arc::default(),
            reachable: AtomicBool::new(false),
            troubles: Troubles::default(),
            no_space: AtomicBool::new(false),
        }
    }

    /// How the members are reached.
    pub(super) fn settings(&self) -> &EtcdSettings {
        &self.settings
    }

    /// Each member that could not be used when it was tried last, and why; `None`: none is known.
    pub(super) fn troubles(&self) -> Option<String> {
        self.troubles.told()
    }

    /// Whether etcd refuses changes, as far as is known.
    pub(super) fn has_no_space(&self) -> bool {
        self.no_space.load(Ordering::Acquire)
    }

    /// A change was refused because etcd's quota is used up.
    pub(super) fn note_no_space(&self, connection: &Connection) {
        if !self.no_space.swap(true, Ordering::AcqRel) {
            tracing::warn!(member = connection.member(), "{}", errors::NO_SPACE);
        }
    }

    /// A change that takes room was made.
    pub(super) fn note_space(&self) {
        // A write for every heartbeat of every node would be one for nothing.
        if self.has_no_space() && self.no_space.swap(false, Ordering::AcqRel) {
            tracing::info!("etcd takes changes again");
        }
    }

    /// Whether the last call, or the running watch, was answered.
    pub(super) fn reachable(&self) -> bool {
        self.reachable.load(Ordering::Relaxed)
    }

    /// A connection to a member that answers. Cancel-safe.
    pub(super) async fn connection(self: &Arc<Self>) -> Result<Arc<Connection>, Unconnected> {
        if let Some(connection) = self.current() {
            return Ok(connection);
        }
        let pool = self.clone();
        let connecting = tokio::spawn(async move {
            match tokio::time::timeout(CONNECT_ALL_TIMEOUT, pool.connect_any()).await {
                Ok(outcome) => outcome,
                Err(_) => {
                    let address = pool.settings.address();
                    let why = pool.troubles().map(|why| format!(": {why}")).unwrap_or_default();
                    Err(unconnected(format!(
                        "{address}: no member answers within {CONNECT_ALL_TIMEOUT:?}{why}"
                    )))
                }
            }
        });
        let outcome = match connecting.await {
            Ok(outcome) => outcome,
            Err(error) => Err(unconnected(format!("connecting: {error}"))),
        };
        if outcome.is_err() {
            self.reachable.store(false, Ordering::Relaxed);
        }
        outcome
    }

    fn current(&self) -> Option<Arc<Connection>> {
        self.current.lock().clone()
    }

    async fn connect_any(&self) -> Result<Arc<Connection>, Unconnected> {
        let _one = self.connecting.lock().await;
        if let Some(connection) = self.current() {
            return Ok(connection);
        }
        let members = &self.settings.members;
        let mut failures: Vec<(&str, StoreError)> = Vec::new();
        let mut lasting = true;
        for _ in members {
            // Before the attempt: it may be cancelled.
            let turn = self.cursor.fetch_add(1, Ordering::Relaxed);
            let member = &members[turn % members.len()];
            let progress = Progress::default();
            let refusal = match tokio::time::timeout(MEMBER_TIMEOUT, self.connect(member, &progress)).await {
                Ok(Ok(connection)) => {
                    self.troubles.end(member);
                    let connection = Arc::new(connection);
                    *self.current.lock() = Some(connection.clone());
                    return Ok(connection);
                }
                Ok(Err(refusal)) => refusal,
                Err(_) => self.cut(progress.stage(), &Cut::TimedOut(MEMBER_TIMEOUT)),
            };
            lasting &= self.troubles.note(member, &reason(&refusal.error), refusal.misfit);
            failures.push((member.as_str(), refusal.error));
        }
        Err(Unconnected { error: whole_failure(&failures), lasting })
    }

    /// An attempt ended without an answer.
    fn cut(&self, stage: Stage, cut: &Cut) -> Refusal {
        let why = trouble::tell(Given::of(&self.settings), stage, cut);
        Refusal { error: StoreError::Unavailable(why), misfit: trouble::is_misfit(stage, cut) }
    }

    /// Connects to one member and asks it how it is.
    async fn connect(&self, member: &str, progress: &Progress) -> Result<Connection, Refusal> {
        let tls = self.settings.tls()?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let wrong = |e: tonic::transport::Error| StoreError::Invalid(format!("{member}: {}", chain(&e)));
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{member}")).map_err(wrong)?;
        if let Some(tls) = tls {
            endpoint = endpoint.tls_config(tls).map_err(wrong)?;
        }
        let endpoint = endpoint
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_TIMEOUT)
            // etcd permits tests only while a call is under way, and ends connections of who does otherwise, with the
            // calls on them. A node always has its watch under way.
            .keep_alive_while_idle(false);
        let channel = connect_once(&endpoint, member, progress)
            .await
            .map_err(|e| self.cut(progress.stage(), &Cut::Broken(errors::transport_cause(&e))))?;
        progress.reach(Stage::Question);
        let mut options = ConnectOptions::new().with_require_leader(true).with_auto_token_refresh(true);
        if let Some((name, password)) = self.settings.credentials()? {
            options = options.with_user(name, password.0);
        }
        // Before the read: what others learn meanwhile, it need not know.
        let seen = self.revision_seen.load(Ordering::Acquire);
        let asked = async {
            let mut client = Client::from_channel(Channel::Tonic(channel), Some(options)).await?;
            let status = client.status().await?.0;
            let read = client.get(CLUSTER_KEY, Some(GetOptions::new().with_keys_only())).await?.0;
            Ok::<_, etcd_client::Error>((client, status, read))
        };
        let (client, status, read) = asked.await.map_err(|e: etcd_client::Error| {
            if let Some(why) = errors::connection_ended(&e) {
                return self.cut(Stage::Question, &Cut::Broken(why));
            }
            Refusal::from(match errors::error(e) {
                // Nothing was to be changed.
                StoreError::OutcomeUnknown(why) => StoreError::Unavailable(why),
                error => error,
            })
        })?;
        let etcd_id = read.header.as_ref().map_or(0, |header| header.cluster_id);
        if etcd_id == 0 {
            return Err(StoreError::Failed("it does not say to which etcd it belongs".into()).into());
        }
        if let Err(known) = self.etcd_id.compare_exchange(0, etcd_id, Ordering::AcqRel, Ordering::Acquire)
            && known != etcd_id
        {
            return Err(another_etcd(member).into());
        }
        let generation = self.generation.fetch_add(1, Ordering::Relaxed);
        let revision_seen = self.revision_seen.clone();
        let connection = Connection {
            generation,
            member: member.to_owned(),
            etcd_id,
            progress_in_order: progress_in_order(&status.version),
            revision_seen,
            client,
        };
        let revision = connection.revision(read.header.as_ref())?.get();
        if revision < seen {
            return Err(StoreError::Failed(format!(
                "{member} has gone back from revision {seen} to {revision}: etcd was made anew or from a backup. If that is \
                 meant, restart this process"
            ))
            .into());
        }
        tracing::debug!(member, version = status.version, "connected to etcd");
        Ok(connection)
    }

    /// What the outcome of a call says about its connection.
    pub(super) fn judge<T>(&self, connection: &Connection, outcome: &StoreResult<T>) {
        let broken = match outcome {
            Ok(_) | Err(StoreError::Compacted | StoreError::LeaseUnknown | StoreError::Invalid(_)) => false,
            Err(StoreError::Unavailable(_) | StoreError::OutcomeUnknown(_) | StoreError::Failed(_)) => true,
        };
        self.reachable.store(!broken, Ordering::Relaxed);
        if broken {
            self.forget(connection);
        }
    }

    /// The next call goes to the next member.
    fn forget(&self, connection: &Connection) {
        let mut current = self.current.lock();
        if current.as_ref().is_some_and(|c| c.generation == connection.generation) {
            *current = None;
        }
    }

    /// Watches over a call: see [`Patience`].
    pub(super) fn patience(&self, connection: Arc<Connection>) -> Patience<'_> {
        Patience { pool: self, connection, begun: clock::monotonic(), ended: false }
    }
}

/// A channel over one TCP connection. When that has ended, calls fail with an error that says that they were not sent.
async fn connect_once(
    endpoint: &Endpoint,
    member: &str,
    progress: &Progress,
) -> Result<Transport, tonic::transport::Error> {
    let used = AtomicBool::new(false);
    let member = member.to_owned();
    let progress = progress.clone();
    let connector = tower::service_fn(move |_| {
        let again = used.swap(true, Ordering::Relaxed);
        let member = member.clone();
        let progress = progress.clone();
        async move {
            if again {
                return Err(io::Error::new(io::ErrorKind::NotConnected, "the connection has ended"));
            }
            let connected = tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(&member)).await;
            let stream = connected.map_err(|_| {
                io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {CONNECT_TIMEOUT:?}"))
            })??;
            stream.set_nodelay(true)?;
            progress.reach(Stage::Session);
            Ok(TokioIo::new(stream))
        }
    });
    endpoint.connect_with_connector(connector).await
}

/// A call under way. If it is dropped before its end after a while, the member is suspect: who has less patience
/// than our timeouts must not be stuck with a member that never answers.
pub(super) struct Patience<'a> {
    pool: &'a Pool,
    connection: Arc<Connection>,
    begun: Instant,
    ended: bool,
}

impl Patience<'_> {
    /// The call has ended by itself.
    pub(super) fn end(mut self) {
        self.ended = true;
    }
}

impl Drop for Patience<'_> {
    fn drop(&mut self) {
        if !self.ended && self.begun.elapsed() >= SUSPECT_AFTER {
            self.pool.forget(&self.connection);
            self.pool.reachable.store(false, Ordering::Relaxed);
            let why = format!("a call had no answer within {SUSPECT_AFTER:?}");
            self.pool.troubles.note(self.connection.member(), &why, false);
        }
    }
}

/// Nobody is connected to, for no member's reason.
fn unconnected(why: String) -> Unconnected {
    Unconnected { error: StoreError::Unavailable(why), lasting: false }
}

/// What an error says beyond its kind.
fn reason(error: &StoreError) -> String {
    match error {
        StoreError::Unavailable(why)
        | StoreError::OutcomeUnknown(why)
        | StoreError::Invalid(why)
        | StoreError::Failed(why) => why.clone(),
        StoreError::Compacted | StoreError::LeaseUnknown => error.to_string(),
    }
}

/// One error for all members: certain ones only if there is no other.
fn whole_failure(failures: &[(&str, StoreError)]) -> StoreError {
    let reasons: Vec<(&str, String)> =
        failures.iter().map(|(member, error)| (*member, reason(error))).collect();
    let told = trouble::list(reasons.iter().map(|(member, why)| (*member, why.as_str())));
    if failures.iter().all(|(_, e)| matches!(e, StoreError::Invalid(_))) {
        StoreError::Invalid(told)
    } else if failures.iter().all(|(_, e)| matches!(e, StoreError::Invalid(_) | StoreError::Failed(_))) {
        StoreError::Failed(told)
    } else {
        StoreError::Unavailable(told)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_in_which_progress_waits_its_turn() {
        for (version, in_order) in [
            ("3.3.27", false),
            ("3.4.23", false),
            ("3.4.25", true),
            ("3.5.0", false),
            ("3.5.8-rc.1", true),
            ("3.5.21", true),
            ("3.6.0", true),
            ("4.0.1", true),
            ("", false),
            ("next", false),
            ("3.5", false),
        ] {
            assert_eq!(progress_in_order(version), in_order, "{version}");
        }
    }
}
