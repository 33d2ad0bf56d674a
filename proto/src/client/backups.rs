//! Backups of volumes: taken, listed, restored, verified, deleted, and schedules of them.
//!
//! What works on an image goes to a node that reaches it, and may take as long as a volume is large. So these calls have no bound of their
//! own: a node that shows no sign of life is given up, one that works is waited for.

use std::collections::BTreeSet;

use futures::Stream;

use super::Client;
use super::channel::Node;
use super::retry::{Backoff, Target};
use crate::convert;
use crate::types::backups::{BackupInfo, BackupSchedule, RestoreTo, Restored, VerifyItem};
use crate::types::{Error, NodeId, Reason, Result, VolumeId, clock};
use crate::wire;

impl Client {
    /// Takes a backup of a volume while it is used. Answers when it is there. Not repeated: another attempt would take another one.
    pub async fn create_backup(&self, volume: &VolumeId) -> Result<BackupInfo> {
        let node = self.primary_of_volume(volume).await?.ok_or_else(|| {
            Error::unavailable(format!(
                "volume {volume} is served by no node: a backup is taken of one that is served"
            ))
        })?;
        let request = wire::CreateBackupRequest { volume_id: volume.as_str().to_owned() };
        let mut backups = node.backups();
        let reply = patiently(&node, backups.create_backup(node.request(request))).await?;
        convert::volume_backup_from_wire(reply)
    }

    /// The backups of a volume or of all, oldest first.
    pub async fn backups(&self, volume: Option<&VolumeId>) -> Result<Vec<BackupInfo>> {
        let volume_id = volume.map(|volume| volume.as_str().to_owned()).unwrap_or_default();
        let reply = self
            .call(Target::Any, async |attempt| {
                let request = wire::ListBackupsRequest { volume_id: volume_id.clone() };
                attempt.node.backups().list_backups(attempt.node.request(request)).await
            })
            .await?;
        reply.into_inner().backups.into_iter().map(convert::volume_backup_from_wire).collect()
    }

    /// A backup.
    ///
    /// # Errors
    /// `NotFound`.
    pub async fn backup(&self, id: &str) -> Result<BackupInfo> {
        let all = self.backups(None).await?;
        all.into_iter()
            .find(|backup| backup.id == id)
            .ok_or_else(|| Error::not_found(format!("there is no backup {id}")))
    }

    /// Deletes a backup with its image.
    pub async fn delete_backup(&self, backup: &BackupInfo) -> Result<()> {
        let request = wire::DeleteBackupRequest { backup_id: backup.id.clone() };
        self.where_it_lies(&backup.volume, async |node: Node| {
            let mut backups = node.backups();
            patiently(&node, backups.delete_backup(node.request(request.clone()))).await.map(drop)
        })
        .await
    }

    /// Makes a volume of a backup. Repeated with the same values it goes on with what was cut off.
    pub async fn restore_backup(&self, backup: &BackupInfo, to: &RestoreTo) -> Result<Restored> {
        let request = convert::restore_to_wire(&backup.id, to);
        let restore = async |node: Node| {
            let mut backups = node.backups();
            let reply = patiently(&node, backups.restore_backup(node.request(request.clone()))).await?;
            convert::restored_from_wire(reply)
        };
        match to {
            RestoreTo::InPlace { .. } => self.where_it_lies(&backup.volume, restore).await,
            RestoreTo::NewVolume { nodes, .. } => {
                let first = nodes.first().ok_or_else(|| Error::invalid("a volume has one node at least"))?;
                let node = self.node_of(first).await?;
                let node = node.ok_or_else(|| Error::not_found(format!("there is no node {first}")))?;
                restore(node).await
            }
        }
    }

    /// Restores a backup into something that goes away again, and checks it. Ends with a summary, or with an error. `quick`: the content of
    /// files is not read.
    pub fn verify_backup(
        &self,
        backup: BackupInfo,
        quick: bool,
    ) -> impl Stream<Item = Result<VerifyItem>> + Send + use<> {
        let client = self.clone();
        async_stream::try_stream! {
            let request = wire::VerifyBackupRequest { backup_id: backup.id.clone(), quick };
            let (_, node) = client.near(&backup.volume, &BTreeSet::new()).await?;
            let mut backups = node.backups();
            let mut stream = patiently(&node, backups.verify_backup(node.request(request))).await?;
            while let Some(item) = patiently(&node, wrapped(stream.message())).await? {
                yield convert::verify_item_from_wire(item)?;
            }
        }
    }

    /// Has backups of a volume taken again and again; 0 seconds: no more.
    pub async fn set_backup_schedule(&self, volume: &VolumeId, every_s: u64, keep: u32) -> Result<()> {
        let set = self.call(Target::Any, async |attempt| {
            let volume_id = volume.as_str().to_owned();
            let request = wire::SetBackupScheduleRequest { volume_id, every_seconds: every_s, keep };
            attempt.node.backups().set_backup_schedule(attempt.node.request(request)).await
        });
        set.await.map(drop)
    }

    /// All schedules, in order of their volumes.
    pub async fn backup_schedules(&self) -> Result<Vec<BackupSchedule>> {
        let reply = self
            .call(Target::Any, async |attempt| {
                let request = wire::ListBackupSchedulesRequest {};
                attempt.node.backups().list_backup_schedules(attempt.node.request(request)).await
            })
            .await?;
        reply.into_inner().schedules.into_iter().map(convert::schedule_from_wire).collect()
    }

    /// The node that serves a volume by the records, if there is such a volume and it lives.
    async fn primary_of_volume(&self, volume: &VolumeId) -> Result<Option<Node>> {
        let info = self.volumes().await?.into_iter().find(|info| info.id == *volume);
        match info.and_then(|info| info.primary) {
            Some(primary) => self.node_of(&primary).await,
            None => Ok(None),
        }
    }

    /// A node, if it lives.
    async fn node_of(&self, id: &NodeId) -> Result<Option<Node>> {
        let found = self.nodes().await?.into_iter().find(|info| info.id == *id && info.alive);
        found.map(|info| self.node_at(&info.endpoints)).transpose()
    }

    /// A node that reaches the images of a volume, best first; not one of those that are silent.
    async fn near(&self, volume: &VolumeId, silent: &BTreeSet<NodeId>) -> Result<(NodeId, Node)> {
        let (volumes, nodes) = (self.volumes().await?, self.nodes().await?);
        let info = volumes.into_iter().find(|info| info.id == *volume);
        let own = info.into_iter().flat_map(|info| info.primary.into_iter().chain(info.backups));
        let mut line = own.chain(nodes.iter().map(|info| info.id.clone())).filter(|id| !silent.contains(id));
        let chosen = line.find_map(|id| nodes.iter().find(|info| info.id == id && info.alive));
        let chosen = chosen.ok_or_else(|| Error::unavailable("no node is alive that could be asked"))?;
        Ok((chosen.id.clone(), self.node_at(&chosen.endpoints)?))
    }

    /// Asks a node that reaches the images of a volume: its primary, else one of its backups, else any. A volume that is being taken over
    /// moves: then once more, for as long as a call is repeated.
    async fn where_it_lies<T>(&self, volume: &VolumeId, call: impl AsyncFn(Node) -> Result<T>) -> Result<T> {
        let begun = clock::monotonic();
        let mut backoff = Backoff::new();
        let mut silent = BTreeSet::new();
        loop {
            let (id, node) = self.near(volume, &silent).await?;
            let error = match call(node).await {
                Err(error) if error.is_retryable() || error.reason() == Reason::NotPrimary => error,
                outcome => return outcome,
            };
            if error.reason() != Reason::NotPrimary {
                silent.insert(id);
            }
            let pause = backoff.next(error.retry_after_ms());
            if begun.elapsed() + pause > self.inner.config.deadline {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }
}

async fn wrapped<T>(
    message: impl Future<Output = std::result::Result<T, tonic::Status>>,
) -> std::result::Result<tonic::Response<T>, tonic::Status> {
    message.await.map(tonic::Response::new)
}

/// Waits for an answer for as long as the node shows signs of life.
async fn patiently<T>(
    node: &Node,
    call: impl Future<Output = std::result::Result<tonic::Response<T>, tonic::Status>>,
) -> Result<T> {
    tokio::select! {
        biased;
        reply = call => match reply {
            Ok(reply) => Ok(reply.into_inner()),
            Err(status) => Err(crate::status::from_status(&status)),
        },
        () = node.silent(0) => Err(Error::unavailable(format!("{} is silent", node.endpoint))),
    }
}
