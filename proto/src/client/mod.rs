//! The one client: which node to ask, when to ask again, and how to have a mutation happen once.
//!
//! [`Client`] is a cheap handle; clones share connections, routes and sessions. Every call is routed to
//! the node that serves the shard (`route`), repeated within one deadline while that may help (`retry`,
//! the only retry loop), and, if it changes something, numbered in a session (`session`) so that a
//! repetition gets the first answer. Reads may be answered by backups (`reads`); a new shard goes where there is room (`placing`). The calls stand in `shards`, `snapshots`, `files`, `locks`, `values`,
//! `volumes`, `backups` and `admin`.
//!
//! Call [`Client::close`] before dropping the last handle: it ends the sessions, so that nodes need not
//! wait until they expire.

mod admin;
mod backups;
mod channel;
mod files;
mod locks;
mod placing;
mod provisioning;
mod reads;
mod retry;
mod route;
mod session;
mod shards;
mod snapshots;
mod unsynced;
mod values;
mod volumes;

use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;

pub use files::{DirectoryEntry, DirectoryPage};
pub use locks::LockRequest;
pub use reads::ReadCounts;
pub use session::SessionWatcher;
pub use values::{Labelled, ListItem, ListOptions};

use crate::types::{ClientId, Error, ReadFrom, Result};
use channel::Channels;
use route::Routes;
use session::Sessions;

/// Time in which a call is repeated before its caller sees the error: long enough for a failover or a
/// quick restart.
pub const DEADLINE_DEFAULT: Duration = Duration::from_secs(60);
/// A call is repeated until it is answered; whoever makes it must be able to give up by other means.
pub const DEADLINE_NEVER: Duration = Duration::MAX;

/// How to reach a cluster, and for whom.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// Addresses of one or more nodes, preferred first: `unix:/path` or `http://host:port`.
    pub endpoints: Vec<String>,
    /// For whom to act.
    pub client_id: ClientId,
    /// How long a call is repeated while the cluster does not answer; [`DEADLINE_NEVER`]: for ever.
    pub deadline: Duration,
    /// Says to people who holds a session, such as `host:pid mount /mnt`.
    pub label: String,
}

impl ClientConfig {
    /// With the default deadline, and a label made of the process id.
    pub fn new(endpoints: Vec<String>, client_id: ClientId) -> ClientConfig {
        ClientConfig {
            endpoints,
            client_id,
            deadline: DEADLINE_DEFAULT,
            label: format!("pid {}", std::process::id()),
        }
    }
}

/// A connection to a cluster on behalf of one client id.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
    /// Who may answer this handle's reads.
    reads: ReadFrom,
    /// Shared by all handles but those of the keeper itself, so that it ends with the last of them whatever its calls wait for.
    keeper: Option<Arc<Keeper>>,
}

/// The keep-alive task, once there is a session.
#[derive(Default)]
struct Keeper {
    task: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

struct Inner {
    config: ClientConfig,
    channels: Channels,
    routes: Routes,
    sessions: Sessions,
    turns: locks::Turns,
    /// Places for calls that wait for locks.
    lock_waits: tokio::sync::Semaphore,
    read_counters: reads::Counters,
}

impl Client {
    /// Checks the configuration; connects when the first call is made.
    ///
    /// # Errors
    /// `InvalidArgument` if there is no endpoint or one is malformed.
    pub fn new(config: ClientConfig) -> Result<Client> {
        if config.endpoints.is_empty() {
            return Err(Error::invalid("no endpoint of a node is given"));
        }
        let channels = Channels::new(&config.client_id)?;
        for endpoint in &config.endpoints {
            channels.check(endpoint)?;
        }
        let routes = Routes::new(config.endpoints.clone());
        Ok(Client {
            inner: Arc::new(Inner {
                config,
                channels,
                routes,
                sessions: Sessions::default(),
                turns: locks::Turns::default(),
                lock_waits: tokio::sync::Semaphore::new(locks::WAITS_MAX),
                read_counters: reads::Counters::default(),
            }),
            reads: ReadFrom::Primary,
            keeper: Some(Arc::default()),
        })
    }

    /// For whom this client acts.
    pub fn client_id(&self) -> &ClientId {
        &self.inner.config.client_id
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Some(task) = self.task.lock().take() {
            task.abort();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::op::{Durability, Operation, PutOptions};
    use crate::types::{FileName, InodeNo, Key, Reason, ShardId};
    use bytes::Bytes;

    fn client(endpoint: &str, deadline: Duration) -> Client {
        let mut config = ClientConfig::new(vec![endpoint.into()], ClientId::new("test").unwrap());
        config.deadline = deadline;
        Client::new(config).unwrap()
    }

    /// What is spawned must be Send: compiling this is the test.
    #[tokio::test]
    async fn calls_can_be_spawned_and_end_at_their_deadline() {
        let client = client("unix:/nonexistent/shardfs.sock", Duration::from_millis(100));
        let shard = ShardId::new(1).unwrap();
        let c = client.clone();
        let operation = Operation::Unlink {
            parent: InodeNo::ROOT,
            name: FileName::new(Bytes::from_static(b"x")).unwrap(),
        };
        let error = tokio::spawn(async move { c.mutate(shard, operation, Durability::Buffered).await });
        assert_eq!(error.await.unwrap().unwrap_err().reason(), Reason::Deadline);
        let c = client.clone();
        let error = tokio::spawn(async move { c.lookup(shard, InodeNo::ROOT, b"x").await });
        assert_eq!(error.await.unwrap().unwrap_err().reason(), Reason::Deadline);
        let c = client.clone();
        let error = tokio::spawn(async move { c.open(shard, InodeNo::ROOT).await });
        assert_eq!(error.await.unwrap().unwrap_err().reason(), Reason::Deadline);
        let c = client.clone();
        let put = tokio::spawn(async move {
            let key = Key::new("k").unwrap();
            c.put(shard, key, Bytes::new(), PutOptions::default(), Durability::Sync).await
        });
        assert_eq!(put.await.unwrap().unwrap_err().reason(), Reason::Deadline);
        let c = client.clone();
        let listed = tokio::spawn(async move {
            use futures::StreamExt;
            let mut items = Box::pin(c.list(shard, ListOptions::default()));
            items.next().await.map(|item| item.map(drop))
        });
        assert_eq!(listed.await.unwrap().unwrap().unwrap_err().reason(), Reason::Deadline);
        assert!(!client.reachable(Duration::from_millis(50)).await);
        client.close().await;
    }

    #[test]
    fn bad_configurations_are_refused() {
        let id = ClientId::new("x").unwrap();
        assert!(Client::new(ClientConfig::new(vec![], id.clone())).is_err());
        assert!(Client::new(ClientConfig::new(vec!["127.0.0.1:1".into()], id)).is_err());
    }
}
