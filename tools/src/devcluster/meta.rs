//! The metadata store of a dev cluster: served by the supervisor, filled with the cluster's volumes.

use shardfs_node::cluster::bootstrap::{self, VolumeSpec};
use shardfs_node::cluster::embedded::EmbeddedStore;
use shardfs_node::cluster::embedded_server;
use shardfs_node::net::ListenAddr;
use shardfs_proto::types::{NodeId, VolumeId};

use super::state::{Layout, Settings, VolumeKind};
use crate::failure::{Failure, Result};

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
    for (volume, node) in settings.volume_names() {
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
            primary: NodeId::new(node)?,
            backups: Vec::new(),
        };
        bootstrap::ensure_volume(&store, &spec).await?;
    }
    Ok(())
}
