//! How a cluster begins: its id, and the records of its volumes. All of it may be repeated and may be done by
//! several processes at once.

use shardfs_proto::types::{Epoch, Error, NodeId, Result, VolumeId};

use super::records::{self, CLUSTER_KEY, ClusterRecord, FORMAT, VolumeRecord};
use super::store::{Demand, MetaStore, StoreError, Txn, get};

/// How often a transaction whose outcome is unknown, or that somebody else overtook, is looked at again.
const ATTEMPTS_MAX: usize = 8;

/// A volume as an operator defines it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeSpec {
    /// Its id.
    pub id: VolumeId,
    /// `loop` or `dir`.
    pub provider: String,
    /// The backing file or folder; absolute.
    pub source: String,
    /// Bytes of the backing file, which is made when the volume is attached first; 0 for `dir`.
    pub size_bytes: u64,
    /// The node that shall serve it.
    pub primary: NodeId,
    /// Nodes that stand by.
    pub backups: Vec<NodeId>,
}

/// A random number of 128 bits, in hex.
pub fn random_id() -> String {
    format!("{:032x}", fastrand::u128(..))
}

/// The cluster's id, made if there is none.
pub async fn ensure_cluster_id(store: &dyn MetaStore) -> Result<String> {
    let fresh = ClusterRecord { v: FORMAT, id: random_id() };
    let kept = put_if_absent(store, CLUSTER_KEY, records::encode(&fresh)).await?;
    Ok(records::decode::<ClusterRecord>(CLUSTER_KEY.as_bytes(), &kept)?.id)
}

/// Writes a volume's record unless there is one; answers the one that is there. One that names another
/// provider or source is an error: volumes do not move that way.
pub async fn ensure_volume(store: &dyn MetaStore, spec: &VolumeSpec) -> Result<VolumeRecord> {
    if !spec.source.starts_with('/') {
        return Err(Error::invalid(format!(
            "volume {}: the source {:?} is no absolute path",
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
        primary: Some(spec.primary.clone()),
        backups: spec.backups.clone(),
        epoch: Epoch::FIRST,
        holder: String::new(),
        target: None,
        formatted: false,
    };
    let key = records::volume_key(&spec.id);
    let kept: VolumeRecord =
        records::decode(key.as_bytes(), &put_if_absent(store, &key, records::encode(&record)).await?)?;
    if (&kept.provider, &kept.source) != (&spec.provider, &spec.source) {
        return Err(Error::invalid(format!(
            "volume {} is {} {} already, not {} {}: choose another id",
            spec.id, kept.provider, kept.source, spec.provider, spec.source
        )));
    }
    Ok(kept)
}

async fn put_if_absent(store: &dyn MetaStore, key: &str, value: bytes::Bytes) -> Result<bytes::Bytes> {
    let mut last = None;
    for _ in 0..ATTEMPTS_MAX {
        if let Some(kv) = get(store, key.to_owned()).await?.1 {
            return Ok(kv.value);
        }
        let txn = Txn::new().when(key.to_owned(), Demand::Absent).put(key.to_owned(), value.clone());
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
