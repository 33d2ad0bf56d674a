//! What earlier processes of this node have left attached of volumes that are none of its volumes any more: nobody attaches those
//! again, which would clean up, so it is taken away here, once after the start.
//!
//! Invariant: a volume is taken for none of this node's only by an answer of the metadata store, while nothing else is begun on it here.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::types::{Error, Result, VolumeId};

use super::{Busy, Catalog};
use crate::catalog::serving::blocking;
use crate::cluster::records::{self, VolumeRecord};
use crate::cluster::store;
use crate::volume::leftovers;

/// Pause before what could not be taken away is tried again: the store may be away, or somebody may look at a mount.
const AGAIN: Duration = Duration::from_secs(15);
/// How long taking one away may take.
const TAKE_AWAY_WAIT_MAX: Duration = Duration::from_secs(30);

impl Catalog {
    /// Unmounts and detaches all of it.
    pub(super) async fn take_away_left(self: Arc<Self>) {
        let folders = ["volumes", "views"].map(|name| self.parts.data_dir.join(name));
        let found = blocking(move || {
            folders.iter().map(|folder| leftovers::places(folder)).try_fold(
                BTreeSet::new(),
                |mut all, some| {
                    all.extend(some?);
                    Ok(all)
                },
            )
        });
        let mut left = match found.await {
            Ok(found) => found,
            Err(error) => {
                tracing::error!(%error, "looking for what an earlier process has left");
                return;
            }
        };
        loop {
            for volume in left.clone() {
                match self.take_away_left_of(&volume).await {
                    Ok(()) => drop(left.remove(&volume)),
                    Err(error) => {
                        tracing::warn!(%volume, %error, "taking away what an earlier process has left: later")
                    }
                }
            }
            if left.is_empty() {
                return;
            }
            tokio::select! {
                _ = self.stop.cancelled() => return,
                _ = tokio::time::sleep(AGAIN) => {}
            }
        }
    }

    async fn take_away_left_of(&self, volume: &VolumeId) -> Result<()> {
        if self.parts.view.volume(volume).is_some_and(|kept| self.is_node_of(&kept.record)) {
            return Ok(());
        }
        if !self.roles.busy.lock().insert(volume.clone()) {
            return Err(Error::unavailable(format!("volume {volume} is being attached, or let go of")));
        }
        let busy = Busy { catalog: self, volume };
        let done = self.take_away_unless_ours(volume).await;
        drop(busy);
        done
    }

    /// Then whoever attaches it cleans up first.
    fn is_node_of(&self, record: &VolumeRecord) -> bool {
        let me = &self.parts.node_id;
        record.primary.as_ref() == Some(me) || record.backups.contains(me)
    }

    async fn take_away_unless_ours(&self, volume: &VolumeId) -> Result<()> {
        // By this process: it lets go of them itself.
        if self.serving.get(volume).is_some() || self.serving.stands_by(volume) {
            return Ok(());
        }
        let (_, kv) = store::get(&*self.parts.store, records::volume_key(volume)).await?;
        if let Some(kv) = kv {
            let record: VolumeRecord = records::decode(&kv.key, &kv.value)?;
            if self.is_node_of(&record) {
                return Ok(());
            }
        }
        let (cluster_id, id) = (self.parts.cluster_id.clone(), volume.clone());
        let at = self.parts.data_dir.join("volumes").join(volume.as_str());
        let mounted = self
            .work(volume, TAKE_AWAY_WAIT_MAX, move || leftovers::take_away(&cluster_id, &id, &at))
            .await?;
        if mounted {
            tracing::info!(%volume, "it is no volume of this node any more: what an earlier process had attached of it is detached");
        }
        if self.take_away_views(volume).await? {
            tracing::info!(%volume, "it is no volume of this node any more: views that an earlier process had of it are taken away");
        }
        Ok(())
    }
}
