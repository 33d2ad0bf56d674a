//! A node put together: store, view, heartbeat, volumes, shards, gRPC, HTTP; and taken apart again in the
//! reverse order.
//!
//! Invariants: one process a data directory; nothing is registered before the addresses are bound; after a
//! clean shutdown no volume is attached and no shard open. Everything that is started here is stopped here.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::FutureExt as _;
use shardfs_proto::client::{Client, ClientConfig};
use shardfs_proto::types::{ClientId, clock};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::catalog::{Catalog, CatalogParts};
use crate::clouds;
use crate::cluster::bootstrap;
use crate::cluster::heartbeat::{self, Heart};
use crate::cluster::lease::{self, Lease};
use crate::cluster::records::{self, FORMAT, NodeRecord};
use crate::cluster::store::{MetaStore, get};
use crate::cluster::view::View;
use crate::config::NodeConfig;
use crate::control::Control;
use crate::http;
use crate::metrics::Metrics;
use crate::net::{bind_tcp, bind_unix};
use crate::notify;
use crate::parent::Child;
use crate::reload::Reload;
use crate::rpc::{Listener, Services};
use crate::shard::{ShardManager, ShardSettings};

/// How long a start waits for the volumes to be attached before it serves what there is; making a new
/// filesystem takes seconds.
const VOLUMES_WAIT_MAX: Duration = Duration::from_secs(60);
/// Pause between attempts to reach the metadata store at the start.
const STORE_PAUSE: Duration = Duration::from_secs(1);
/// How long one attempt is waited for before that is said.
const STORE_WAIT_MAX: Duration = Duration::from_secs(3);
/// Pause between two returns of unused memory to the system.
const TRIM_PAUSE: Duration = Duration::from_secs(30);
/// How long a node that is registered under our id may take to answer.
const TAKEN_WAIT_MAX: Duration = Duration::from_millis(500);
/// How long the parts that only watch or report may take to end.
const TASK_END_WAIT_MAX: Duration = Duration::from_secs(2);

/// A running node.
pub struct Node {
    config: NodeConfig,
    /// Released when the process no longer uses the data directory.
    _lock: OwnedFd,
    addresses: Addresses,
    catalog: Arc<Catalog>,
    serving: JoinHandle<shardfs_proto::types::Result<()>>,
    http: Option<JoinHandle<std::io::Result<()>>>,
    /// Without which a node is none, and what each looks after.
    vital: Vec<(&'static str, JoinHandle<()>)>,
    trimming: JoinHandle<()>,
    /// Tells the service manager, if there is one.
    telling: Option<JoinHandle<()>>,
    heartbeat: JoinHandle<()>,
    stopping: CancellationToken,
    stop_serving: CancellationToken,
    stop_heartbeat: CancellationToken,
    stop_background: CancellationToken,
    replaced: CancellationToken,
    /// Last: what runs on it is ended in order before.
    _control: Control,
}

/// Where a node is reached.
#[derive(Clone, PartialEq, Eq, Debug, serde::Serialize)]
pub struct Addresses {
    /// gRPC, preferred first.
    pub endpoints: Vec<String>,
    /// HTTP; empty: none.
    pub http: String,
}

impl Node {
    /// Starts a node. It serves when this returns. Waits for the metadata store as long as it takes: the caller
    /// drops the future to give up.
    pub async fn start(config: NodeConfig, mut child: Child) -> Result<Node> {
        let lock = claim(&config.data_dir)?;
        raise_file_limit();
        let (listeners, addresses, http_listener) = bind(&config).await?;
        let store = config.meta.connect().context("--meta")?;
        let control = Control::start().context("starting the control runtime")?;
        let control_store = {
            let _on = control.enter();
            config.meta.connect().context("--meta")?
        };
        notify::starting("waiting for the metadata store");
        let cluster_id = reach(&*store, &config.meta.address).await;

        let (providers, instance_id) = clouds::connect(&config).await?;
        let record = NodeRecord {
            v: FORMAT,
            id: config.id.clone(),
            endpoints: addresses.endpoints.clone(),
            http: addresses.http.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            started: clock::now(),
            incarnation: child.incarnation.clone(),
            instance_id,
            region: config.region.clone().unwrap_or_default(),
            cloud: providers.ebs().is_ok(),
        };
        refuse_if_taken(&*store, &cluster_id, &record).await?;
        let alone = is_alone(&*store, &config).await?;
        let registered = heartbeat::register(&*store, &record).await?;
        child.has_registered();
        // An earlier process of this node, on another machine, may still count on its lease; its heartbeats fail from now on.
        let alone_from = if alone { clock::boot() } else { clock::boot() + lease::SILENCE_MAX };
        note_incarnation(&config.data_dir, &record.incarnation)?;

        let (stop_heartbeat, stop_background, replaced) =
            (CancellationToken::new(), CancellationToken::new(), CancellationToken::new());
        let stopping = CancellationToken::new();
        let lease = Arc::new(Lease::default());
        let view = View::new();
        let heart = Heart {
            store: control_store.clone(),
            id: config.id.clone(),
            registered: registered.clone(),
            view: view.clone(),
            lease: lease.clone(),
            replaced: replaced.clone(),
        };
        let heartbeat = control.spawn(heart.run(stop_heartbeat.clone()));
        let mut vital =
            vec![("the records", control.spawn(view.clone().run(control_store, stop_background.clone())))];
        while view.wait_for(registered.revision, STORE_PAUSE).await.is_err() {
            tracing::warn!("waiting for the cluster's records");
        }

        let manager = ShardManager::new(ShardSettings {
            block_cache_bytes: usize::try_from(config.block_cache_bytes).context("--block-cache")?,
            write_buffer_bytes: usize::try_from(config.write_buffer_bytes).context("--write-buffer")?,
            open_shards_max: config.open_shards_max,
            ..ShardSettings::default()
        });
        let catalog = Catalog::new(CatalogParts {
            node_id: config.id.clone(),
            data_dir: config.data_dir.clone(),
            devices: config.devices.clone(),
            providers,
            backup_dir: config.backup_dir.clone(),
            cluster_id,
            chunk_bytes: config.chunk_bytes,
            tunable: config.tunable(),
            store,
            view,
            lease: lease.clone(),
            record,
            alone_from,
            manager,
        });
        vital.push(("the volumes", tokio::spawn(catalog.clone().run())));
        notify::starting("waiting for the volumes");
        if tokio::time::timeout(VOLUMES_WAIT_MAX, catalog.settled()).await.is_err() {
            tracing::warn!("some volumes are still being attached; serving the others");
        }

        let trimming = tokio::spawn(give_memory_back(stop_background.clone()));
        let metrics = Metrics::of(catalog.failovers().clone());
        let stop_serving = CancellationToken::new();
        let services = Services::new(catalog.clone(), metrics.clone());
        let stopped = stop_serving.clone().cancelled_owned();
        let serving = tokio::spawn(async move { services.serve(listeners, stopped).await });
        let status: http::StatusSource = Arc::new({
            let catalog = catalog.clone();
            move || catalog.status_now()
        });
        let telling = notify::wanted().then(|| {
            let catalog = catalog.clone();
            let rounds: notify::Rounds = Box::new(move || [lease.rounds(), catalog.rounds()]);
            let (stopping, stop) = (stopping.clone(), stop_background.clone());
            tokio::spawn(notify::keep_telling(status.clone(), rounds, stopping, stop))
        });
        let http = http_listener.map(|listener| {
            tokio::spawn(http::serve(listener, metrics, status, stop_background.clone().cancelled_owned()))
        });
        let node = Node {
            config,
            _lock: lock,
            addresses,
            catalog,
            serving,
            http,
            vital,
            trimming,
            telling,
            heartbeat,
            stopping,
            stop_serving,
            stop_heartbeat,
            stop_background,
            replaced,
            _control: control,
        };
        node.say_ready()?;
        Ok(node)
    }

    /// Reads its settings again; what is refused changes nothing.
    pub fn reload(&mut self, reload: &Reload) {
        match reload.again(&mut self.config, |tunable| self.catalog.tune(tunable)) {
            Ok(outcome) => tracing::info!(
                changed = outcome.changed.join(", "),
                need_restart = outcome.need_restart.join(", "),
                "the settings are read again"
            ),
            Err(error) => tracing::error!(
                error = %format!("{error:#}"),
                "the settings are refused, those of before go on"
            ),
        }
    }

    /// Where it is reached.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Its catalog.
    pub fn catalog(&self) -> &Arc<Catalog> {
        &self.catalog
    }

    /// Ends when the node cannot go on; answers why.
    pub async fn failed(&mut self) -> anyhow::Error {
        let vital = self.vital.iter_mut().map(|(what, task)| {
            async move {
                match task.await {
                    Ok(()) => anyhow::anyhow!("what looks after {what} ended"),
                    Err(error) => anyhow::anyhow!("what looks after {what}: {error}"),
                }
            }
            .boxed()
        });
        tokio::select! {
            biased;
            _ = self.replaced.cancelled() => {
                anyhow::anyhow!("another process registered as {}: this one stops", self.config.id)
            }
            (failure, ..) = futures::future::select_all(vital) => failure,
            ended = &mut self.heartbeat => match ended {
                Ok(()) => anyhow::anyhow!("the heartbeat ended"),
                Err(error) => anyhow::anyhow!("the heartbeat: {error}"),
            },
            ended = &mut self.serving => match ended {
                Ok(Ok(())) => anyhow::anyhow!("the gRPC server ended"),
                Ok(Err(error)) => anyhow::Error::new(error),
                Err(error) => anyhow::anyhow!("the gRPC server: {error}"),
            },
        }
    }

    /// Takes no more calls, lets those under way finish (bounded), closes all shards, unmounts and
    /// detaches all volumes.
    pub async fn shutdown(mut self) -> Result<()> {
        tracing::info!(node = %self.config.id, "stopping");
        self.stopping.cancel();
        notify::stopping();
        // While it still serves: callers are told where the volumes have gone.
        self.catalog.leave().await;
        self.stop_serving.cancel();
        if !self.serving.is_finished()
            && tokio::time::timeout(self.config.shutdown, &mut self.serving).await.is_err()
        {
            tracing::warn!("calls are still under way after {:?}: cutting them off", self.config.shutdown);
            self.serving.abort();
            end(&mut self.serving).await;
        }
        let closed = self.catalog.shutdown().await;
        self.stop_heartbeat.cancel();
        end(&mut self.heartbeat).await;
        self.stop_background.cancel();
        for (_, task) in &mut self.vital {
            end(task).await;
        }
        end(&mut self.trimming).await;
        if let Some(telling) = &mut self.telling {
            end(telling).await;
        }
        if let Some(http) = &mut self.http {
            end(http).await;
        }
        if let Some(path) = &self.config.listen_unix {
            // Not being there any more is as good.
            let _ = std::fs::remove_file(path);
        }
        closed.context("closing the shards")?;
        tracing::info!(node = %self.config.id, "stopped");
        Ok(())
    }

    fn say_ready(&self) -> Result<()> {
        let line = serde_json::to_string(&self.addresses).context("the addresses as JSON")? + "\n";
        tracing::info!(node = %self.config.id, endpoints = ?self.addresses.endpoints, http = %self.addresses.http, "ready");
        notify::ready();
        let Some(number) = self.config.ready_fd else { return Ok(()) };
        if number < 0 {
            bail!("--ready-fd {number}: no descriptor has this number");
        }
        // SAFETY: the descriptor was given to this process by who started it, and is used for this line only;
        // that it is not open is an error of the next call.
        let fd = unsafe { BorrowedFd::borrow_raw(number) };
        let copy = rustix::io::fcntl_dupfd_cloexec(fd, 3).with_context(|| format!("--ready-fd {number}"))?;
        File::from(copy)
            .write_all(line.as_bytes())
            .with_context(|| format!("writing to --ready-fd {number}"))?;
        if number > libc::STDERR_FILENO {
            // SAFETY: as above; nothing else in this process knows the number.
            drop(unsafe { OwnedFd::from_raw_fd(number) });
        }
        Ok(())
    }
}

/// Returns to the system, now and then, what large requests needed: the allocator by itself keeps it.
async fn give_memory_back(stop: CancellationToken) {
    while tokio::time::timeout(TRIM_PAUSE, stop.cancelled()).await.is_err() {
        let trimmed = tokio::task::spawn_blocking(|| {
            // SAFETY: may be called at any time, from any thread.
            #[cfg(target_env = "gnu")]
            unsafe {
                libc::malloc_trim(0);
            }
        });
        if trimmed.await.is_err() {
            return;
        }
    }
}

async fn end<T>(task: &mut JoinHandle<T>) {
    if task.is_finished() {
        return;
    }
    if tokio::time::timeout(TASK_END_WAIT_MAX, &mut *task).await.is_err() {
        task.abort();
    }
}

/// The file in the data directory that names its last process.
const INCARNATION_FILE: &str = "incarnation";

/// Whether no earlier process of this node runs: the one that registered last used this data directory, whose lock is ours now.
async fn is_alone(store: &dyn MetaStore, config: &NodeConfig) -> Result<bool> {
    let key = records::node_key(&config.id);
    let Some(kv) = get(store, key.clone()).await.context("looking for an earlier process of this node")?.1
    else {
        return Ok(true);
    };
    let record: NodeRecord = records::decode(key.as_bytes(), &kv.value)?;
    // One that is missing or unreadable only costs the wait for a lease to end.
    let last = std::fs::read_to_string(config.data_dir.join(INCARNATION_FILE)).unwrap_or_default();
    Ok(last == record.incarnation)
}

fn note_incarnation(dir: &Path, incarnation: &str) -> Result<()> {
    let (path, fresh) = (dir.join(INCARNATION_FILE), dir.join(format!("{INCARNATION_FILE}.new")));
    std::fs::write(&fresh, incarnation)
        .and_then(|()| std::fs::rename(&fresh, &path))
        .with_context(|| format!("writing {}", path.display()))
}

/// Makes the data directory and takes its lock.
fn claim(dir: &Path) -> Result<OwnedFd> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .with_context(|| format!("making the data directory {}", dir.display()))?;
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("opening {}", path.display()))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file.into()),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            bail!(
                "another node uses the data directory {}: stop it, or give another --data-dir",
                dir.display()
            )
        }
        Err(e) => Err(e).with_context(|| format!("locking {}", path.display())),
    }
}

/// Every open shard holds dozens of files.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit on open files stays at {:?}", limit.current);
    }
}

async fn bind(config: &NodeConfig) -> Result<(Vec<Listener>, Addresses, Option<tokio::net::TcpListener>)> {
    let tcp = bind_tcp(config.listen).await.context("--listen")?;
    let local = tcp.local_addr().context("--listen")?;
    let mut listeners = vec![Listener::Tcp(tcp)];
    let mut endpoints = Vec::new();
    if let Some(path) = &config.listen_unix {
        let path = std::path::absolute(path).context("--listen-unix")?;
        listeners.push(Listener::Unix(bind_unix(&path).context("--listen-unix")?));
        endpoints.push(format!("unix:{}", path.display()));
    }
    endpoints.push(format!("http://{}", advertised(config.advertise.as_deref(), local)?));
    let http = match config.http {
        Some(address) => Some(bind_tcp(address).await.context("--http")?),
        None => None,
    };
    let http_address = match &http {
        Some(listener) => format!("http://{}", listener.local_addr().context("--http")?),
        None => String::new(),
    };
    Ok((listeners, Addresses { endpoints, http: http_address }, http))
}

/// What others reach the TCP address by. An advertised port 0 stands for the one that was bound.
fn advertised(advertise: Option<&str>, local: SocketAddr) -> Result<String> {
    let Some(text) = advertise else {
        if local.ip().is_unspecified() {
            bail!(
                "--listen {local} means all addresses: say with --advertise HOST:PORT which one others use"
            );
        }
        return Ok(local.to_string());
    };
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) if text.parse::<IpAddr>().is_err() => {
            let port =
                port.parse::<u16>().with_context(|| format!("--advertise {text:?}: expected HOST:PORT"))?;
            (host, if port == 0 { local.port() } else { port })
        }
        _ => (text, local.port()),
    };
    if host.is_empty() || host.contains(['/', '@', ' ']) {
        bail!("--advertise {text:?}: expected HOST:PORT");
    }
    Ok(format!("{host}:{port}"))
}

/// Fails if the node that is registered under our id answers: it would stop, and serve its volumes no more. Our
/// own addresses are nobody else's by now.
async fn refuse_if_taken(store: &dyn MetaStore, cluster_id: &str, ours: &NodeRecord) -> Result<()> {
    let Some(kv) = get(store, records::node_key(&ours.id)).await?.1 else { return Ok(()) };
    let there: NodeRecord = records::decode(&kv.key, &kv.value)?;
    let endpoints: Vec<String> =
        there.endpoints.iter().filter(|endpoint| !ours.endpoints.contains(endpoint)).cloned().collect();
    for endpoint in endpoints {
        let client = Client::new(ClientConfig {
            endpoints: vec![endpoint.clone()],
            client_id: ClientId::new("shardfs-node").context("our client id")?,
            deadline: TAKEN_WAIT_MAX,
            label: ours.id.to_string(),
        })?;
        let asked = client.node_status(std::slice::from_ref(&endpoint));
        if let Ok(Ok(status)) = tokio::time::timeout(TAKEN_WAIT_MAX, asked).await
            && status.id == ours.id
            // Its old port may be that of a node of another cluster by now.
            && status.cluster_id == cluster_id
        {
            bail!(
                "node {} is running already and answers at {endpoint}: stop it first, or give another --id",
                ours.id
            );
        }
    }
    Ok(())
}

/// The cluster's id, as soon as the store can be reached.
async fn reach(store: &dyn MetaStore, address: &str) -> String {
    loop {
        match tokio::time::timeout(STORE_WAIT_MAX, bootstrap::ensure_cluster_id(store)).await {
            Ok(Ok(id)) => return id,
            Ok(Err(error)) => tracing::warn!(%error, "waiting for the metadata store"),
            Err(_) => tracing::warn!(address, "waiting for the metadata store: it does not answer"),
        }
        tokio::time::sleep(STORE_PAUSE).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_advertised() {
        let local: SocketAddr = "10.1.2.3:7400".parse().unwrap();
        let any: SocketAddr = "0.0.0.0:7400".parse().unwrap();
        assert_eq!(advertised(None, local).unwrap(), "10.1.2.3:7400");
        assert!(advertised(None, any).is_err());
        assert_eq!(advertised(Some("host:0"), any).unwrap(), "host:7400");
        assert_eq!(advertised(Some("host:1"), any).unwrap(), "host:1");
        assert_eq!(advertised(Some("host"), any).unwrap(), "host:7400");
        for bad in ["", ":1", "host:x", "http://host:1"] {
            assert!(advertised(Some(bad), any).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn one_process_a_data_directory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let first = claim(&path).unwrap();
        let error = claim(&path).unwrap_err().to_string();
        assert!(error.contains("another node"), "{error}");
        drop(first);
        claim(&path).unwrap();
    }
}
