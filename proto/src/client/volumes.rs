//! The life of a volume: given to nodes, made larger, taken out of the cluster.

use std::time::Duration;

use super::Client;
use super::retry::{Attempt, Backoff, Target};
use crate::convert;
use crate::types::cluster::{Stray, VolumeInfo};
use crate::types::{Error, NodeId, Reason, Result, VolumeId, clock};
use crate::wire;

/// How long a volume that leaves is waited for in one attempt.
const REMOVE_ATTEMPT_MAX: Duration = Duration::from_secs(30);
/// How much earlier than its caller a node gives up, so that its reason is heard.
const ANSWER_GRACE: Duration = Duration::from_secs(1);

impl Client {
    /// Has a node stand by for a volume.
    pub async fn attach_volume(&self, volume: &VolumeId, node: &NodeId) -> Result<VolumeInfo> {
        let reply = self
            .call(Target::Any, async |attempt| {
                let (volume_id, node_id) = (volume.as_str().to_owned(), node.as_str().to_owned());
                let request = wire::AttachVolumeRequest { volume_id, node_id };
                attempt.node.admin().attach_volume(attempt.node.request(request)).await
            })
            .await?;
        convert::volume_info_from_wire(reply.into_inner())
    }

    /// Has a node stand by for a volume no more.
    pub async fn detach_volume(&self, volume: &VolumeId, node: &NodeId) -> Result<VolumeInfo> {
        let reply = self
            .call(Target::Any, async |attempt| {
                let (volume_id, node_id) = (volume.as_str().to_owned(), node.as_str().to_owned());
                let request = wire::DetachVolumeRequest { volume_id, node_id };
                attempt.node.admin().detach_volume(attempt.node.request(request)).await
            })
            .await?;
        convert::volume_info_from_wire(reply.into_inner())
    }

    /// Makes a volume larger while it is used; see the request. Answers when it has grown: its node is waited for as long as it
    /// takes, and found again if the volume moves.
    pub async fn grow_volume(&self, volume: &VolumeId, size_bytes: u64) -> Result<VolumeInfo> {
        let begun = clock::monotonic();
        let mut backoff = Backoff::new();
        loop {
            let error = match self.grow_once(volume, size_bytes).await {
                Ok(grown) => return Ok(grown),
                Err(error) if error.is_retryable() || error.reason() == Reason::NotPrimary => error,
                Err(error) => return Err(error),
            };
            let pause = backoff.next(error.retry_after_ms());
            if begun.elapsed() + pause > self.inner.config.deadline {
                return Err(error);
            }
            tokio::time::sleep(pause).await;
        }
    }

    async fn grow_once(&self, volume: &VolumeId, size_bytes: u64) -> Result<VolumeInfo> {
        let (volumes, nodes) = (self.volumes().await?, self.nodes().await?);
        let info = volumes.into_iter().find(|info| info.id == *volume);
        let info = info.ok_or_else(|| Error::not_found(format!("there is no volume {volume}")))?;
        let primary = info.primary.and_then(|primary| nodes.into_iter().find(|node| node.id == primary));
        let primary = primary.ok_or_else(|| {
            Error::unavailable(format!("volume {volume} is served by no node: it grows while it is served"))
        })?;
        let node = self.node_at(&primary.endpoints)?;
        let request = wire::GrowVolumeRequest { volume_id: volume.as_str().to_owned(), size_bytes };
        let mut admin = node.admin();
        let call = admin.grow_volume(node.request(request));
        tokio::select! {
            reply = call => match reply {
                Ok(reply) => convert::volume_info_from_wire(reply.into_inner()),
                Err(status) => Err(crate::status::from_status(&status)),
            },
            // Growing takes its time; a node that has gone does not come back with an answer.
            () = node.silent(0) => Err(Error::unavailable(format!("{} is silent", primary.id))),
        }
    }

    /// Gives a volume of kind `aws` other IOPS while it is used.
    pub async fn set_volume_iops(&self, volume: &VolumeId, iops: u32) -> Result<VolumeInfo> {
        let reply = self
            .in_cloud(async |attempt| {
                let request = wire::SetVolumeIopsRequest { volume_id: volume.as_str().to_owned(), iops };
                attempt.node.admin().set_volume_iops(attempt.node.request(request)).await
            })
            .await?;
        convert::volume_info_from_wire(reply.into_inner())
    }

    /// What the cloud has of the cluster and the records do not account for.
    pub async fn strays(&self) -> Result<Vec<Stray>> {
        let reply = self
            .in_cloud(async |attempt| {
                attempt.node.admin().list_strays(attempt.node.request(wire::ListStraysRequest {})).await
            })
            .await?;
        reply.into_inner().strays.into_iter().map(convert::stray_from_wire).collect()
    }

    /// Removes a stray; see the request.
    pub async fn remove_stray(&self, stray: &Stray, force: bool) -> Result<()> {
        let removed = self
            .in_cloud(async |attempt| {
                let request = wire::RemoveStrayRequest {
                    volume_id: stray.volume.clone(),
                    disk: stray.disk.clone(),
                    machine: stray.machine.clone(),
                    force,
                };
                attempt.node.admin().remove_stray(attempt.node.request(request)).await
            })
            .await;
        removed.map(drop)
    }

    async fn in_cloud<T, F, Fut>(&self, attempt: F) -> Result<T>
    where
        F: FnMut(Attempt) -> Fut,
        Fut: Future<Output = std::result::Result<T, tonic::Status>>,
    {
        // What was begun goes on, whoever waits: repeated, the call finds it.
        let deadline = self.inner.config.deadline;
        self.call_within(Target::Any, deadline, deadline, attempt).await
    }

    /// Takes a volume that has no shards out of the cluster; answers when it has gone, and why what was to be deleted with it was left,
    /// if it was; an empty text: an answer was lost, and whether it was deleted is not known.
    pub async fn remove_volume(&self, volume: &VolumeId, delete_content: bool) -> Result<Option<String>> {
        let attempt_max = REMOVE_ATTEMPT_MAX.min(self.inner.config.deadline);
        let timeout = attempt_max.saturating_sub(ANSWER_GRACE.min(attempt_max / 4));
        let removed = self
            .call_within(Target::Any, self.inner.config.deadline, attempt_max, async |attempt| {
                let request = wire::RemoveVolumeRequest {
                    volume_id: volume.as_str().to_owned(),
                    delete_content,
                    // 0 would leave it to the node.
                    timeout_ms: u32::try_from(timeout.as_millis()).unwrap_or(u32::MAX).max(1),
                };
                match attempt.node.admin().remove_volume(attempt.node.request(request)).await {
                    // An earlier attempt whose answer was lost has done it: what that said is not known.
                    Err(status)
                        if attempt.number > 0
                            && crate::status::from_status(&status).reason() == Reason::NotFound =>
                    {
                        Ok(None)
                    }
                    outcome => outcome.map(Some),
                }
            })
            .await;
        Ok(match removed? {
            Some(reply) => Some(reply.into_inner().left).filter(|why| !why.is_empty()),
            None => delete_content.then(String::new),
        })
    }
}
