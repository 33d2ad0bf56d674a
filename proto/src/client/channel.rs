//! Connections: a few per node, made when first used, kept, and remade by the transport when they break.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::UnixStream;
use tonic::metadata::{Ascii, MetadataValue};
use tonic::transport::{Channel, Endpoint};

use crate::types::limits::{MESSAGE_BYTES_MAX, REPLY_BYTES_MAX};
use crate::types::{ClientId, Error, Result};
use crate::wire::admin_client::AdminClient;
use crate::wire::backups_client::BackupsClient;
use crate::wire::files_client::FilesClient;
use crate::wire::storage_client::StorageClient;
use crate::wire::{CLIENT_ID_METADATA, GetStatusRequest};

/// Connections to one node: one HTTP/2 connection is served by one task at either end, so one alone
/// would keep to one core.
const CONNECTIONS_PER_NODE: usize = 2;
/// Nodes whose connections are kept.
const NODES_MAX: usize = 1024;
/// A host that does not answer a SYN for so long is tried again later.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// HTTP/2 windows: hold a few full messages, so that a stream is not throttled by round trips.
const STREAM_WINDOW_BYTES: u32 = 8 << 20;
/// See [`STREAM_WINDOW_BYTES`].
const CONNECTION_WINDOW_BYTES: u32 = 32 << 20;
/// A peer that is silent to pings for so long is gone.
const KEEP_ALIVE: Duration = Duration::from_secs(5);
/// A node that has not answered a call for so long is asked for a sign of life, and then this often again.
const PROBE_AFTER: Duration = Duration::from_millis(300);
/// See [`PROBE_AFTER`].
const PROBE_PAUSE: Duration = Duration::from_secs(1);
/// Without a sign of life for so long, a node is given up for the attempt; for each further attempt twice as long, as what is silent
/// may be a busy machine.
const PROBE_WAIT_FIRST: Duration = Duration::from_millis(300);
/// See [`PROBE_WAIT_FIRST`].
const PROBE_WAIT_MAX: Duration = Duration::from_secs(10);

/// One node's gRPC clients.
#[derive(Clone)]
pub(super) struct Node {
    pub(super) endpoint: Arc<str>,
    channel: Channel,
    client_id: MetadataValue<Ascii>,
}

impl Node {
    pub(super) fn storage(&self) -> StorageClient<Channel> {
        StorageClient::new(self.channel.clone())
            .max_decoding_message_size(REPLY_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub(super) fn files(&self) -> FilesClient<Channel> {
        FilesClient::new(self.channel.clone())
            .max_decoding_message_size(REPLY_BYTES_MAX)
            .max_encoding_message_size(MESSAGE_BYTES_MAX)
    }

    pub(super) fn admin(&self) -> AdminClient<Channel> {
        AdminClient::new(self.channel.clone()).max_decoding_message_size(REPLY_BYTES_MAX)
    }

    pub(super) fn backups(&self) -> BackupsClient<Channel> {
        BackupsClient::new(self.channel.clone()).max_decoding_message_size(REPLY_BYTES_MAX)
    }

    /// A request that says for whom it is made.
    pub(super) fn request<T>(&self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.metadata_mut().insert(CLIENT_ID_METADATA, self.client_id.clone());
        request
    }

    /// Whether the node answers.
    pub(super) async fn probe(&self, within: Duration) -> bool {
        let mut admin = self.admin();
        let call = admin.get_status(self.request(GetStatusRequest {}));
        matches!(tokio::time::timeout(within, call).await, Ok(Ok(_)))
    }

    /// Ends when the node shows no sign of life any more. Slow calls of a process that runs are waited for, those of one that
    /// is stopped or cut off are not. `attempt`: 0 for the first; later ones are more patient.
    pub(super) async fn silent(&self, attempt: u32) {
        let wait = (PROBE_WAIT_FIRST * (1 << attempt.min(16))).min(PROBE_WAIT_MAX);
        tokio::time::sleep(PROBE_AFTER).await;
        while self.probe(wait).await {
            tokio::time::sleep(PROBE_PAUSE).await;
        }
    }
}

/// The connections of a client.
pub(super) struct Channels {
    client_id: MetadataValue<Ascii>,
    nodes: Mutex<HashMap<String, Vec<Channel>>>,
    turn: AtomicUsize,
}

enum Address {
    Unix(PathBuf),
    Http(Box<Endpoint>),
}

impl Channels {
    pub(super) fn new(client_id: &ClientId) -> Result<Channels> {
        let client_id = MetadataValue::try_from(client_id.as_str())
            .map_err(|_| Error::invalid(format!("client id {client_id} does not fit into a header")))?;
        Ok(Channels { client_id, nodes: Mutex::default(), turn: AtomicUsize::new(0) })
    }

    /// Whether an endpoint is well-formed.
    pub(super) fn check(&self, endpoint: &str) -> Result<()> {
        parse(endpoint).map(drop)
    }

    /// The first of a node's endpoints that can be used from here: a unix socket only if it is there.
    pub(super) fn usable<'a>(&self, endpoints: &'a [String]) -> Option<&'a str> {
        let good = |e: &&String| match parse(e) {
            Ok(Address::Unix(path)) => path.exists(),
            Ok(Address::Http(_)) => true,
            Err(_) => false,
        };
        endpoints.iter().find(good).or_else(|| endpoints.first()).map(String::as_str)
    }

    /// Clients for the node at an endpoint.
    pub(super) fn node(&self, endpoint: &str) -> Result<Node> {
        let mut nodes = self.nodes.lock();
        if !nodes.contains_key(endpoint) {
            if nodes.len() >= NODES_MAX {
                nodes.clear();
            }
            let address = parse(endpoint)?;
            let channels = (0..CONNECTIONS_PER_NODE).map(|_| open(&address)).collect();
            nodes.insert(endpoint.to_owned(), channels);
        }
        let channels = &nodes[endpoint];
        let channel = channels[self.turn.fetch_add(1, Ordering::Relaxed) % channels.len()].clone();
        Ok(Node { endpoint: endpoint.into(), channel, client_id: self.client_id.clone() })
    }
}

/// Whether it is the address of a node.
pub(super) fn is_endpoint(text: &str) -> bool {
    parse(text).is_ok()
}

fn parse(endpoint: &str) -> Result<Address> {
    let malformed =
        || Error::invalid(format!("endpoint {endpoint:?}: expected unix:/PATH or http://HOST:PORT"));
    if let Some(path) = endpoint.strip_prefix("unix:") {
        let path = path.strip_prefix("//").unwrap_or(path);
        if !path.starts_with('/') {
            return Err(malformed());
        }
        return Ok(Address::Unix(path.into()));
    }
    if !endpoint.starts_with("http://") {
        return Err(malformed());
    }
    let parsed = Endpoint::from_shared(endpoint.to_owned()).map_err(|_| malformed())?;
    if parsed.uri().port().is_none() {
        return Err(malformed());
    }
    Ok(Address::Http(Box::new(parsed)))
}

fn open(address: &Address) -> Channel {
    let set = |endpoint: Endpoint| {
        endpoint
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEP_ALIVE)
            .keep_alive_timeout(KEEP_ALIVE)
            .keep_alive_while_idle(true)
    };
    match address {
        Address::Http(endpoint) => set(endpoint.as_ref().clone()).connect_lazy(),
        Address::Unix(path) => {
            let path = path.clone();
            // The authority is never resolved: the connector ignores it.
            let endpoint = set(Endpoint::from_static("http://shardfs.local"));
            endpoint.connect_with_connector_lazy(tower::service_fn(move |_| {
                let path = path.clone();
                async move { UnixStream::connect(path).await.map(TokioIo::new) }
            }))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_checked() {
        for good in ["unix:/run/x.sock", "unix:///run/x.sock", "http://127.0.0.1:7000", "http://node-1:7000"]
        {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in
            ["", "127.0.0.1:7000", "unix:x.sock", "https://a:1", "http://a", "http://a b:1", "ftp://a:1"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
