//! How a cluster begins: its id, and the records of its volumes; and how it ends. All of it may be repeated, may be
//! cut off anywhere, and may be done by several processes at once.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};

use shardfs_proto::types::{Epoch, Error, NodeId, Reason, Result, VolumeId};

use super::records::{self, CLUSTER_KEY, ClusterRecord, FORMAT, PREFIX, VolumeRecord};
use super::store::{Demand, KeyRange, KeyValue, MetaStore, Op, StoreError, Txn, get, range_all};

/// How often a transaction whose outcome is unknown, or that somebody else overtook, is looked at again.
const ATTEMPTS_MAX: usize = 8;
/// Keys that are deleted at once: a revision of them is a small message.
const DELETE_KEYS_MAX: usize = 512;

/// A volume as an operator defines it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeSpec {
    /// Its id.
    pub id: VolumeId,
    /// `loop`, `device`, `dir` or `aws`.
    pub provider: String,
    /// The backing file, device or folder; absolute. Nodes may be told another path of a device. Of `aws` the disk's id.
    pub source: String,
    /// Bytes of the backing file, which is made when the volume is attached first, or of the disk; 0 for others.
    pub size_bytes: u64,
    /// Of `aws`: reads and writes a second that its disk is to have; 0: as it has them.
    pub iops: u32,
    /// The node that shall serve it.
    pub primary: NodeId,
    /// Nodes that stand by.
    pub backups: Vec<NodeId>,
    /// It is served even if its device has no working fence.
    pub allow_unfenced: bool,
}

/// A random number of 128 bits, in hex.
pub fn random_id() -> String {
    format!("{:032x}", fastrand::u128(..))
}

/// The cluster's id, made if there is none.
pub async fn ensure_cluster_id(store: &dyn MetaStore) -> Result<String> {
    claim_cluster_id(store, &random_id()).await
}

/// Gives the cluster this id unless it has one; answers the one that it has.
pub async fn claim_cluster_id(store: &dyn MetaStore, id: &str) -> Result<String> {
    let fresh = ClusterRecord { v: FORMAT, id: id.to_owned() };
    let kept = put_if_absent(store, CLUSTER_KEY, records::encode(&fresh)).await?;
    Ok(records::decode::<ClusterRecord>(CLUSTER_KEY.as_bytes(), &kept)?.id)
}

/// The id of the cluster whose records the store holds; `None`: it holds none.
pub async fn cluster_id(store: &dyn MetaStore) -> Result<Option<String>> {
    Ok(cluster_record(store).await?.map(|(id, _)| id))
}

async fn cluster_record(store: &dyn MetaStore) -> Result<Option<(String, KeyValue)>> {
    let Some(kv) = get(store, CLUSTER_KEY).await?.1 else { return Ok(None) };
    Ok(Some((records::decode::<ClusterRecord>(&kv.key, &kv.value)?.id, kv)))
}

/// Deletes all records of the cluster with this id, whose nodes are down; whether it was there. Records of another one
/// stay. The id goes last: a deletion that was cut off is repeated.
pub async fn delete_cluster(store: &dyn MetaStore, id: &str) -> Result<bool> {
    let mut found = false;
    let mut failures = 0;
    loop {
        let kv = match cluster_record(store).await? {
            Some((kept, kv)) if kept == id => kv,
            Some(_) | None => return Ok(found),
        };
        found = true;
        let page = store.range(KeyRange::prefix(PREFIX), DELETE_KEYS_MAX).await?;
        // The id itself is in the first page or a later one; while there are later ones it is spared.
        let mut keys: Vec<_> = page.kvs.into_iter().map(|kv| kv.key).collect();
        if page.more {
            keys.retain(|key| key != CLUSTER_KEY);
        }
        let range = |first: &bytes::Bytes, last: &bytes::Bytes| {
            let mut end = last.to_vec();
            end.push(0);
            Op::Delete(KeyRange::between(first.clone(), end))
        };
        let mut txn = Txn::new().when(CLUSTER_KEY, Demand::Modified(kv.modified));
        if page.more {
            // Two ranges around it.
            let (before, after): (Vec<_>, Vec<_>) =
                keys.iter().partition(|key| key[..] < *CLUSTER_KEY.as_bytes());
            for part in [before, after] {
                if let (Some(first), Some(last)) = (part.first(), part.last()) {
                    txn.success.push(range(first, last));
                }
            }
        } else {
            txn.success.push(Op::Delete(KeyRange::prefix(PREFIX)));
        }
        match store.txn(txn).await {
            Ok(_) => {}
            // The next round sees what is left.
            Err(error @ StoreError::OutcomeUnknown(_)) => {
                failures += 1;
                if failures >= ATTEMPTS_MAX {
                    return Err(Error::from(error).context("deleting the cluster's records"));
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
}

/// Writes a volume's record unless there is one; answers the one that is there. One that says something else is an error,
/// and so is another volume with the same source. Which of its nodes serves it is not looked at: that changes.
///
/// Two that are added with one source at the same moment may both come through: their label or identity tells them apart
/// before anything is served.
pub async fn ensure_volume(store: &dyn MetaStore, spec: &VolumeSpec) -> Result<VolumeRecord> {
    if spec.provider == crate::volume::AWS {
        crate::volume::ebs::check_source(&spec.id, &spec.source)?;
    } else if !spec.source.starts_with('/') {
        return Err(Error::invalid(format!(
            "volume {}: the source {:?} is no absolute path",
            spec.id, spec.source
        )));
    }
    // Names that restores and backups give to files beside a volume's.
    if spec.provider == "loop"
        && (spec.source.ends_with(".restoring")
            || spec.source.contains(".img.backup-")
            || spec.source.contains(".replaced-"))
    {
        return Err(Error::invalid(format!(
            "volume {}: the name of {} is one that backups give: rename it first",
            spec.id, spec.source
        )));
    }
    crate::volume::check_spec(&spec.id, &spec.provider, spec.size_bytes)?;
    let record = VolumeRecord {
        v: FORMAT,
        id: spec.id.clone(),
        provider: spec.provider.clone(),
        source: spec.source.clone(),
        size_bytes: spec.size_bytes,
        iops: spec.iops,
        primary: Some(spec.primary.clone()),
        backups: spec.backups.clone(),
        epoch: Epoch::FIRST,
        holder: String::new(),
        target: None,
        formatted: false,
        allow_unfenced: spec.allow_unfenced,
        predecessors: Vec::new(),
        handed_over: false,
        unmounted: false,
        leaving: false,
        retired: false,
        delete_content: false,
    };
    let key = records::volume_key(&spec.id);
    refuse_shared_source(store, spec).await?;
    // What was being made for it is made with it: nobody takes that for half-made later.
    let making = Op::Delete(KeyRange::key(records::making_key(&spec.id)));
    let kept = put_if_absent_and(store, &key, records::encode(&record), &[making]).await?;
    let kept: VolumeRecord = records::decode(key.as_bytes(), &kept)?;
    if (&kept.provider, &kept.source) != (&spec.provider, &spec.source) {
        return Err(Error::invalid(format!(
            "volume {} is {} {} already, not {} {}: choose another id",
            spec.id, kept.provider, kept.source, spec.provider, spec.source
        )));
    }
    let other = differences(&kept, spec);
    if !other.is_empty() {
        return Err(Error::new(
            Reason::AlreadyExists,
            format!(
                "volume {} is there already and stays as it is; it differs in {}: `shardfs volume attach` and `detach` \
                 change its nodes, `grow` its size, and --allow-unfenced stays as it was chosen",
                spec.id,
                other.join(", and in ")
            ),
        ));
    }
    Ok(kept)
}

/// In what a volume differs from what is asked for, beyond its source.
fn differences(kept: &VolumeRecord, spec: &VolumeSpec) -> Vec<String> {
    fn names(nodes: &BTreeSet<&NodeId>) -> String {
        nodes.iter().map(|node| node.as_str()).collect::<Vec<_>>().join(", ")
    }
    let mut other = Vec::new();
    // Elections change their order only.
    let has: BTreeSet<&NodeId> = kept.primary.iter().chain(&kept.backups).collect();
    let asked: BTreeSet<&NodeId> = std::iter::once(&spec.primary).chain(&spec.backups).collect();
    if has != asked {
        other.push(format!("its nodes (it has {}, not {})", names(&has), names(&asked)));
    }
    if kept.size_bytes != spec.size_bytes {
        other.push(format!("its size (it has {} bytes, not {})", kept.size_bytes, spec.size_bytes));
    }
    if kept.allow_unfenced != spec.allow_unfenced {
        let word = |allowed: bool| if allowed { "allowed" } else { "not allowed" };
        other.push(format!(
            "whether it is served without a fence (that is {}, not {})",
            word(kept.allow_unfenced),
            word(spec.allow_unfenced)
        ));
    }
    other
}

/// A path without `.`, `..` and repeated slashes; what symlinks make of it is not looked at: it is of other machines.
fn lexical(path: &str) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in Path::new(path).components() {
        match component {
            Component::ParentDir => {
                plain.pop();
            }
            other => plain.push(other),
        }
    }
    plain
}

/// Two volumes over one file, folder or device of a node would destroy each other.
pub async fn refuse_shared_source(store: &dyn MetaStore, spec: &VolumeSpec) -> Result<()> {
    for kv in range_all(store, KeyRange::prefix(records::VOLUMES)).await?.kvs {
        // One that cannot be read is nobody's obstacle.
        let Ok(other) = records::decode::<VolumeRecord>(&kv.key, &kv.value) else { continue };
        // Paths that are written differently may be the same.
        let same = other.provider == spec.provider && lexical(&other.source) == lexical(&spec.source);
        // Different machines may call different devices the same; a disk of a cloud is called the same everywhere.
        let mut asked = std::iter::once(&spec.primary).chain(&spec.backups);
        let together = spec.provider == crate::volume::AWS
            || asked.any(|node| other.primary.as_ref() == Some(node) || other.backups.contains(node));
        if same && together && other.id != spec.id && kv.key == records::volume_key(&other.id) {
            return Err(Error::new(
                Reason::AlreadyExists,
                format!(
                    "volume {}: {} {} is the source of volume {} already: choose another one",
                    spec.id, spec.provider, spec.source, other.id
                ),
            ));
        }
    }
    Ok(())
}

/// Writes a record unless there is one; answers the one that is there.
pub async fn put_if_absent(store: &dyn MetaStore, key: &str, value: bytes::Bytes) -> Result<bytes::Bytes> {
    put_if_absent_and(store, key, value, &[]).await
}

/// The same, with what is done beside it.
async fn put_if_absent_and(
    store: &dyn MetaStore,
    key: &str,
    value: bytes::Bytes,
    beside: &[Op],
) -> Result<bytes::Bytes> {
    let mut last = None;
    for _ in 0..ATTEMPTS_MAX {
        if let Some(kv) = get(store, key.to_owned()).await?.1 {
            return Ok(kv.value);
        }
        let mut txn = Txn::new().when(key.to_owned(), Demand::Absent).put(key.to_owned(), value.clone());
        txn.success.extend(beside.iter().cloned());
        match store.txn(txn).await {
            Ok(answer) if answer.succeeded => return Ok(value),
            // Somebody else was first, or we were: the next read tells.
            Ok(_) => {}
            Err(error @ StoreError::OutcomeUnknown(_)) => last = Some(error),
            Err(error) => return Err(error.into()),
        }
    }
    let last = last.unwrap_or_else(|| StoreError::Unavailable("the key keeps changing".into()));
    Err(Error::from(last).context(format!("writing {key}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::embedded::EmbeddedStore;
    use crate::cluster::embedded_server::serve;

    #[tokio::test]
    async fn a_cluster_goes_and_others_stay() {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(dir.path().join("meta.redb"), "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let store = EmbeddedStore::new(&server.address().to_string()).unwrap();
        assert_eq!(cluster_id(&store).await.unwrap(), None);
        assert!(!delete_cluster(&store, "one").await.unwrap());
        assert_eq!(claim_cluster_id(&store, "one").await.unwrap(), "one");
        assert_eq!(claim_cluster_id(&store, "two").await.unwrap(), "one");
        // Several pages before and behind the id, and a neighbour that is nobody's.
        for i in 0..11 {
            let many = (0..100).fold(Txn::new(), |txn, j| {
                let folder = if i < 6 { "a" } else { "shards" };
                txn.put(format!("{PREFIX}{folder}/{i}/{j}"), "v")
            });
            store.txn(many).await.unwrap();
        }
        store.txn(Txn::new().put("shardfs0", "v").put("other", "v")).await.unwrap();
        assert!(!delete_cluster(&store, "two").await.unwrap());
        assert!(delete_cluster(&store, "one").await.unwrap());
        assert_eq!(cluster_id(&store).await.unwrap(), None);
        assert_eq!(store.range(KeyRange::prefix(PREFIX), 1).await.unwrap().kvs, []);
        assert_eq!(store.range(KeyRange::between("a", "z"), 0).await.unwrap().kvs.len(), 2);
        server.shutdown().await.unwrap();
    }

    #[tokio::test]
    async fn a_volume_is_added_once_and_has_its_source_to_itself() {
        let dir = tempfile::tempdir().unwrap();
        let server = serve(dir.path().join("meta.redb"), "127.0.0.1:0".parse().unwrap()).await.unwrap();
        let store = EmbeddedStore::new(&server.address().to_string()).unwrap();
        let node = |id: &str| NodeId::new(id).unwrap();
        let volume = |id: &str, provider: &str, source: &str| VolumeSpec {
            id: VolumeId::new(id).unwrap(),
            provider: provider.into(),
            source: source.into(),
            size_bytes: 0,
            iops: 0,
            primary: node("a"),
            backups: vec![node("b"), node("c")],
            allow_unfenced: false,
        };
        let first = volume("vol-1", "device", "/dev/x");
        let record = ensure_volume(&store, &first).await.unwrap();
        assert_eq!(ensure_volume(&store, &first).await.unwrap(), record);
        for source in ["/dev/x", "/dev//x", "/dev/./x", "/dev/y/../x", "//dev/./y/.././x/", "/../dev/x"] {
            let error = ensure_volume(&store, &volume("vol-2", "device", source)).await.unwrap_err();
            assert_eq!(error.reason(), Reason::AlreadyExists, "{error}");
            assert!(error.message().contains("volume vol-1 already"), "{error}");
        }
        ensure_volume(&store, &volume("vol-2", "dir", "/dev/x")).await.unwrap();
        let elsewhere =
            VolumeSpec { primary: node("x"), backups: vec![], ..volume("vol-4", "device", "/dev/x") };
        ensure_volume(&store, &elsewhere).await.unwrap();
        // Not the same, though it begins so.
        ensure_volume(&store, &volume("vol-5", "device", "/dev/x/../x/y")).await.unwrap();
        ensure_volume(&store, &volume("vol-3", "device", "/dev/y")).await.unwrap();
        // After an election.
        let moved =
            VolumeRecord { primary: Some(node("c")), backups: vec![node("b"), node("a")], ..record.clone() };
        store.txn(Txn::new().put(records::volume_key(&moved.id), records::encode(&moved))).await.unwrap();
        assert_eq!(ensure_volume(&store, &first).await.unwrap(), moved);
        for (other, word) in [
            (VolumeSpec { backups: vec![node("b")], ..first.clone() }, "a, b, c, not a, b)"),
            (VolumeSpec { primary: node("d"), ..first.clone() }, "its nodes"),
            (VolumeSpec { allow_unfenced: true, ..first.clone() }, "without a fence"),
        ] {
            let error = ensure_volume(&store, &other).await.unwrap_err();
            assert_eq!(error.reason(), Reason::AlreadyExists, "{error}");
            assert!(error.message().contains(word), "{error}");
        }
        let error = ensure_volume(&store, &volume("vol-4", "loop", "/srv/x.img")).await.unwrap_err();
        assert!(error.message().contains("64 MiB to 64 TiB: give --size"), "{error}");
        server.shutdown().await.unwrap();
    }
}
