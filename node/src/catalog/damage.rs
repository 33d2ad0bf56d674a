//! Shards of which damage was found since the node started: for the log, `shardfs status` and monitoring.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use shardfs_proto::types::cluster::DamagedShard;
use shardfs_proto::types::{Error, Reason, ShardId};

/// What a damaged shard's first error said, by shard.
#[derive(Default)]
pub struct DamageList(Mutex<BTreeMap<ShardId, String>>);

impl DamageList {
    /// Notes an error that tells of damage to a shard, and logs it once a shard: who reads the log should
    /// not have to hear it from a client.
    pub fn note_error(&self, method: &'static str, error: &Error) {
        if error.reason() == Reason::Corrupt
            && let Some(shard) = error.shard()
        {
            self.note(shard, method, error.message());
        }
    }

    /// Notes damage.
    pub fn note(&self, shard: ShardId, method: &'static str, what: &str) {
        self.0.lock().entry(shard).or_insert_with(|| {
            tracing::error!(%shard, call = method, error = what, "the shard is damaged");
            what.to_owned()
        });
    }

    /// A check of everything found nothing.
    pub fn mended(&self, shard: ShardId) {
        if self.0.lock().remove(&shard).is_some() {
            tracing::info!(%shard, "the shard is in order again");
        }
    }

    /// Those of which `keep` is true, in order of id.
    pub fn list(&self, keep: impl Fn(ShardId) -> bool) -> Vec<DamagedShard> {
        let shards = self.0.lock();
        let kept = shards.iter().filter(|(id, _)| keep(**id));
        kept.map(|(id, error)| DamagedShard { id: *id, error: error.clone() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_error_of_a_shard_is_kept_until_it_is_mended() {
        let shard = ShardId::new(7).unwrap();
        let list = DamageList::default();
        list.note_error("Storage/Get", &Error::new(Reason::NotFound, "no").with_shard(shard));
        list.note_error("Storage/Get", &Error::corrupt("of no shard"));
        assert_eq!(list.list(|_| true), []);
        list.note_error("Storage/Get", &Error::corrupt("first").with_shard(shard));
        list.note_error("Storage/Get", &Error::corrupt("second").with_shard(shard));
        assert_eq!(list.list(|_| true), [DamagedShard { id: shard, error: "first".into() }]);
        assert_eq!(list.list(|_| false), []);
        list.mended(shard);
        assert_eq!(list.list(|_| true), []);
    }
}
