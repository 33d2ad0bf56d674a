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
use shardfs_node::cluster::store::{Demand, MetaStore, Txn, get};
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

/// Makes the cluster's id, and the records of its volumes unless all were made once: from then on volumes are what the records say,
/// changed and deleted by operators. After a start that was cut off, those that are missing are made.
pub async fn bootstrap(layout: &Layout, settings: &mut Settings) -> Result<()> {
    let store = store(&settings.meta())?;
    if settings.etcd.is_some() {
        claim(&*store, layout, settings).await?;
    } else {
        bootstrap::ensure_cluster_id(&*store).await?;
    }
    store.txn(Txn::new().delete(records::STOPPING)).await.map_err(|e| Failure::new(e.to_string()))?;
    // The nodes make them, when they are there: only they can.
    if settings.volumes == VolumeKind::Aws || layout.volumes_were_added()? {
        return Ok(());
    }
    for (number, (volume, node)) in settings.volume_names().into_iter().enumerate() {
        let id = VolumeId::new(volume.clone())?;
        let (_, there) =
            get(&*store, records::volume_key(&id)).await.map_err(|e| Failure::new(e.to_string()))?;
        if there.is_some() {
            continue;
        }
        let source = layout.volume_source(settings.volumes, &volume);
        let source = source.to_str().ok_or_else(|| {
            Failure::usage(format!("{} is not UTF-8", source.display())).hint("choose another --dir")
        })?;
        let spec = VolumeSpec {
            id,
            provider: settings.volumes.as_str().to_owned(),
            source: source.to_owned(),
            size_bytes: match settings.volumes {
                VolumeKind::Loop => settings.volume_size_bytes,
                VolumeKind::Dir | VolumeKind::Aws => 0,
            },
            iops: 0,
            primary: NodeId::new(node.clone())?,
            backups: backups(settings, &node, number)?,
            allow_unfenced: false,
        };
        bootstrap::ensure_volume(&*store, &spec).await?;
    }
    layout.note_volumes_added()
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
pub fn backups(settings: &Settings, primary: &str, number: usize) -> Result<Vec<NodeId>> {
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

/// Fails unless the etcd that is asked for, if it is another one than before, answers and may hold this cluster. Writes nothing: the
/// settings that are stored may be the only ones that lead to the records.
pub async fn check_new(layout: &Layout, stored: Option<&Settings>, settings: &Settings) -> Result<()> {
    let Some(etcd) = &settings.etcd else { return Ok(()) };
    let known = stored.and_then(|stored| stored.etcd.as_ref());
    if known.is_some_and(|known| known.reached == etcd.reached) {
        // It may be away for a moment.
        return Ok(());
    }
    check(&*store(&etcd.reached)?, layout, etcd).await.map(drop)
}

/// Fails unless the etcd holds this cluster, or may; answers whether it does.
async fn check(store: &dyn MetaStore, layout: &Layout, etcd: &EtcdMeta) -> Result<bool> {
    let found = bootstrap::cluster_id(store).await.map_err(|e| unreached(etcd, e.into()))?;
    match found {
        Some(id) if id != etcd.cluster_id => Err(taken(etcd, &id)),
        None if etcd.recorded == Recorded::Done => {
            let (address, dir) = (&etcd.reached.address, layout.dir().display());
            Err(Failure::new(format!("{address} holds no records of the cluster in {dir}")).hint(
                "it did once: start the etcd that has them, or name it with --meta; if they are lost, `dev down --delete` \
                 and a new cluster are left",
            ))
        }
        found => Ok(found.is_some()),
    }
}

/// Sees to it that the etcd holds this cluster and no other.
async fn claim(store: &dyn MetaStore, layout: &Layout, settings: &mut Settings) -> Result<()> {
    let Some(etcd) = settings.etcd.clone() else { return Ok(()) };
    if check(store, layout, &etcd).await? && etcd.recorded == Recorded::Done {
        return Ok(());
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

#[cfg(test)]
mod tests {
    use shardfs_node::cluster::records::VolumeRecord;

    use super::super::launch::{Wanted, plan};
    use super::*;

    #[tokio::test]
    async fn volumes_are_added_once_and_are_what_the_records_say_from_then_on() {
        use shardfs_node::cluster::embedded_server::serve;

        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::new(&temp.path().join("c"));
        layout.create().unwrap();
        let server = serve(temp.path().join("store"), "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let reached = MetaSettings::of(server.address().to_string());
        let store = reached.connect().unwrap();
        let wanted = Wanted { volumes: Some(VolumeKind::Dir), ..Wanted::default() };
        let mut settings = plan(&layout, None, &wanted, true).unwrap();
        settings.etcd = Some(EtcdMeta { reached, cluster_id: "us".to_owned(), recorded: Recorded::No });
        let key = |id: &str| records::volume_key(&VolumeId::new(id).unwrap());
        let read = async |id: &str| {
            let (_, kv) = get(&*store, key(id)).await.unwrap();
            kv.map(|kv| records::decode::<VolumeRecord>(&kv.key, &kv.value).unwrap())
        };
        bootstrap(&layout, &mut settings).await.unwrap();
        let made = read("vol-1").await.unwrap();
        assert_eq!((made.backups.len(), made.size_bytes), (2, 0));

        // Others are its nodes and size by now, and a start was cut off before the last volume.
        let changed = VolumeRecord { backups: Vec::new(), size_bytes: 1 << 40, ..made };
        let txn = Txn::new().put(key("vol-1"), records::encode(&changed)).delete(key("vol-3"));
        store.txn(txn).await.unwrap();
        std::fs::remove_file(layout.volumes_added_file()).unwrap();
        bootstrap(&layout, &mut settings).await.unwrap();
        assert_eq!(read("vol-1").await, Some(changed));
        assert!(read("vol-3").await.is_some());

        // One that is deleted after that stays so.
        store.txn(Txn::new().delete(key("vol-3"))).await.unwrap();
        bootstrap(&layout, &mut settings).await.unwrap();
        assert!(read("vol-2").await.is_some() && read("vol-3").await.is_none());
        server.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn another_store_is_looked_at_first() {
        use shardfs_node::cluster::embedded_server::serve;

        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::new(&temp.path().join("c"));
        let mut servers = Vec::new();
        for name in ["empty", "ours", "another"] {
            let file = temp.path().join(name);
            servers.push(serve(file, "127.0.0.1:0".parse().unwrap()).await.unwrap());
        }
        let at = |server: usize| MetaSettings::of(servers[server].address().to_string());
        let with = |reached: MetaSettings, recorded: Recorded| {
            let mut settings = plan(&layout, None, &Wanted::default(), true).unwrap();
            settings.etcd = Some(EtcdMeta { reached, cluster_id: "us".to_owned(), recorded });
            settings
        };
        for (server, id) in [(1, "us"), (2, "them")] {
            let store = at(server).connect().unwrap();
            bootstrap::claim_cluster_id(&*store, id).await.unwrap();
        }
        let stored = with(MetaSettings::of("etcd://127.0.0.1:1"), Recorded::Done);
        let check = async |stored: Option<&Settings>, server: usize, recorded: Recorded| {
            let checked = check_new(&layout, stored, &with(at(server), recorded)).await;
            checked.map_err(|failure| failure.message().to_owned())
        };
        check(Some(&stored), 1, Recorded::Done).await.unwrap();
        check(None, 0, Recorded::No).await.unwrap();
        let failure = check(Some(&stored), 0, Recorded::Done).await.unwrap_err();
        assert!(failure.contains("holds no records of the cluster"), "{failure}");
        for (stored, recorded) in [(Some(&stored), Recorded::Done), (None, Recorded::No)] {
            let failure = check(stored, 2, recorded).await.unwrap_err();
            assert!(failure.contains("holds another cluster, them"), "{failure}");
        }
        // What is written down already is not looked at here: it may be away for a moment.
        check_new(&layout, Some(&stored), &stored).await.unwrap();
        assert!(!layout.dir().exists(), "nothing is made");
        assert_eq!(bootstrap::cluster_id(&*at(0).connect().unwrap()).await.unwrap(), None);
        for server in servers {
            server.shutdown().await.unwrap();
        }
    }
}
