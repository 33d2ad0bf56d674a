//! The metadata store of a dev cluster: served by the supervisor, filled with the cluster's volumes.

use std::time::Duration;

use shardfs_node::cluster::bootstrap::{self, VolumeSpec};
use shardfs_node::cluster::embedded::EmbeddedStore;
use shardfs_node::cluster::embedded_server;
use shardfs_node::cluster::records;
use shardfs_node::cluster::store::{MetaStore as _, Txn};
use shardfs_node::net::ListenAddr;
use shardfs_proto::types::{NodeId, VolumeId};

use super::state::{Layout, Settings, VolumeKind};
use crate::failure::{Failure, Result};

/// How long the note that everything is stopped is tried.
const NOTE_WAIT_MAX: Duration = Duration::from_secs(1);

/// Opens the store and serves it on its socket.
pub async fn serve(layout: &Layout, settings: &Settings) -> Result<embedded_server::Handle> {
    let file = layout.meta().join("store.redb");
    embedded_server::serve(file, ListenAddr::Unix(Layout::meta_socket(settings))).await.map_err(|e| {
        Failure::from(e).hint("a metadata store belongs to one supervisor: is another one running?")
    })
}

/// Makes the cluster's id and the records of its volumes, those that are missing.
pub async fn bootstrap(layout: &Layout, settings: &Settings) -> Result<()> {
    let address = format!("unix:{}", Layout::meta_socket(settings).display());
    let store = EmbeddedStore::new(&address).map_err(|e| Failure::new(e.to_string()))?;
    bootstrap::ensure_cluster_id(&store).await?;
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
        };
        bootstrap::ensure_volume(&store, &spec).await?;
    }
    Ok(())
}

/// Tells the nodes that all of them are being stopped, so that none hands its volumes to another. If it does not
/// succeed, the next start finds the volumes elsewhere: no more.
pub async fn note_stopping(settings: &Settings) {
    let address = format!("unix:{}", Layout::meta_socket(settings).display());
    let Ok(store) = EmbeddedStore::with_retry(&address, NOTE_WAIT_MAX) else { return };
    let noted = store.txn(Txn::new().put(records::STOPPING, "")).await;
    if let Err(error) = noted {
        tracing::debug!(%error, "the nodes do not know that all are stopped");
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
