//! The metadata store of a dev cluster: the embedded one, served by the supervisor, or an etcd; filled with the
//! cluster's volumes.
//!
//! An etcd holds one cluster. Which one is said by the id that is recorded there; the cluster's folder remembers its own.
//! Nothing is written to, or deleted from, an etcd whose records are another cluster's.

use std::sync::Arc;
use std::time::Duration;

use shardfs_node::cluster::bootstrap::{self, VolumeSpec};
use shardfs_node::cluster::connect::MetaSettings;
use shardfs_node::cluster::embedded_server;
use shardfs_node::cluster::records::{self, CLUSTER_KEY, ClusterRecord, FORMAT};
use shardfs_node::cluster::store::{Demand, MetaStore, Txn};
use shardfs_node::net::ListenAddr;
use shardfs_proto::types::{NodeId, VolumeId};

use super::state::{EtcdMeta, Layout, Recorded, Settings, VolumeKind};
use crate::failure::{Failure, OrFail, Result};

/// How long the note that everything is stopped is tried.
const NOTE_WAIT_MAX: Duration = Duration::from_secs(1);

/// Opens the embedded store and serves it on its socket; nothing is to be served if the records are in an etcd.
pub async fn serve(layout: &Layout, settings: &Settings) -> Result<Option<embedded_server::Handle>> {
    if settings.etcd.is_some() {
        return Ok(None);
    }
    let file = layout.meta().join("store.redb");
    let served = embedded_server::serve(file, ListenAddr::Unix(Layout::meta_socket(settings))).await;
    served.map(Some).map_err(|e| {
        Failure::from(e).hint("a metadata store belongs to one supervisor: is another one running?")
    })
}

/// Makes the cluster's id and the records of its volumes, those that are missing.
pub async fn bootstrap(layout: &Layout, settings: &mut Settings) -> Result<()> {
    let store = store(&settings.meta())?;
    if settings.etcd.is_some() {
        claim(&*store, layout, settings).await?;
    } else {
        bootstrap::ensure_cluster_id(&*store).await?;
    }
    store.txn(Txn::new().delete(records::STOPPING)).await.map_err(|e| Failure::new(e.to_string()))?;
    for (number, (volume, node)) in settings.volume_names().into_iter().enumerate() {
        let source = layout.volume_source(settings.volumes, &volume);
        let source = source.to_str().ok_or_else(|| {
            Failure::usage(format!("{} is not UTF-8", source.display())).hint("choose another --dir")
        })?;
        let spec = VolumeSpec {
            id: VolumeId::new(volume)?,
            provider: settings.volumes.as_str().to_owned(),
            source: source.to_owned(),
            size_bytes: match settings.volumes {
                VolumeKind::Loop => settings.volume_size_bytes,
                VolumeKind::Dir => 0,
            },
            primary: NodeId::new(node.clone())?,
            backups: backups(settings, &node, number)?,
            allow_unfenced: false,
        };
        bootstrap::ensure_volume(&*store, &spec).await?;
    }
    Ok(())
}

/// Tells the nodes that all of them are being stopped, so that none hands its volumes to another. If it does not
/// succeed, the next start finds the volumes elsewhere: no more.
pub async fn note_stopping(settings: &Settings) {
    let Ok(store) = settings.meta().connect() else { return };
    let mut txn = Txn::new().put(records::STOPPING, "");
    if let Some(etcd) = &settings.etcd {
        // It may hold another cluster.
        let ours = ClusterRecord { v: FORMAT, id: etcd.cluster_id.clone() };
        txn = txn.when(CLUSTER_KEY, Demand::Value(records::encode(&ours)));
    }
    match tokio::time::timeout(NOTE_WAIT_MAX, store.txn(txn)).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the nodes do not know that all are stopped"),
        Err(_) => tracing::debug!("the nodes do not know that all are stopped"),
    }
}

/// All other nodes, another one first for each of a node's volumes: so they spread when the node fails.
fn backups(settings: &Settings, primary: &str, number: usize) -> Result<Vec<NodeId>> {
    let mut others: Vec<String> = settings.node_names().into_iter().filter(|node| node != primary).collect();
    if !others.is_empty() {
        let turns = number / settings.node_names().len() % others.len();
        others.rotate_left(turns);
    }
    Ok(others.into_iter().map(NodeId::new).collect::<shardfs_proto::types::Result<_>>()?)
}

/// Deletes the cluster's records from its etcd, if it has one and they are there. The nodes must be down.
pub async fn delete(settings: &Settings) -> Result<()> {
    let Some(etcd) = settings.etcd.as_ref().filter(|etcd| etcd.recorded != Recorded::No) else {
        return Ok(());
    };
    let store = store(&etcd.reached)?;
    bootstrap::delete_cluster(&*store, &etcd.cluster_id)
        .await
        .map(drop)
        .map_err(|e| unreached(etcd, e.into()))
}

fn store(settings: &MetaSettings) -> Result<Arc<dyn MetaStore>> {
    settings.connect().with_context(|| format!("--meta {}", settings.address))
}

/// Sees to it that the etcd holds this cluster and no other.
async fn claim(store: &dyn MetaStore, layout: &Layout, settings: &mut Settings) -> Result<()> {
    let Some(etcd) = settings.etcd.clone() else { return Ok(()) };
    let found = bootstrap::cluster_id(store).await.map_err(|e| unreached(&etcd, e.into()))?;
    let address = &etcd.reached.address;
    match (found, etcd.recorded) {
        (Some(id), _) if id != etcd.cluster_id => return Err(taken(&etcd, &id)),
        (Some(_), Recorded::Done) => return Ok(()),
        (None, Recorded::Done) => {
            return Err(Failure::new(format!("{address} holds no records of the cluster in {}", layout.dir().display()))
                .hint(
                    "it did once: start the etcd that has them, or name it with --meta; if they are lost, `dev down --delete` \
                     and a new cluster are left",
                ));
        }
        (Some(_) | None, Recorded::No | Recorded::Begun) => {}
    }
    // Written down before and after: whoever finds half of it knows whose it is.
    remember(layout, settings, Recorded::Begun)?;
    let id =
        bootstrap::claim_cluster_id(store, &etcd.cluster_id).await.map_err(|e| unreached(&etcd, e.into()))?;
    if id != etcd.cluster_id {
        remember(layout, settings, Recorded::No)?;
        return Err(taken(&etcd, &id));
    }
    remember(layout, settings, Recorded::Done)
}

fn remember(layout: &Layout, settings: &mut Settings, recorded: Recorded) -> Result<()> {
    if let Some(etcd) = &mut settings.etcd {
        etcd.recorded = recorded;
    }
    layout.write_settings(settings)
}

fn taken(etcd: &EtcdMeta, id: &str) -> Failure {
    let address = &etcd.reached.address;
    Failure::new(format!("{address} holds another cluster, {id}"))
        .hint(
            "one etcd holds one cluster: give this one an etcd of its own. If the other one is no longer needed, \
             `shardfs dev down --delete` with its --dir takes its records away (without its folder: `etcdctl del --prefix shardfs/`)",
        )
}

fn unreached(etcd: &EtcdMeta, failure: Failure) -> Failure {
    failure.context(format!("--meta {}", etcd.reached.address))
        .hint("does it run (`etcdctl --endpoints HOST:PORT endpoint health`), and are --meta and its settings right?")
}
