//! Calls about snapshots of shards. A snapshot is a closed shard: what reads a shard reads it, by its id.

use super::Client;
use super::retry::Target;
use super::shards::{ATTEMPT_MAX, request_id, selected};
use crate::convert;
use crate::types::cluster::{CloneShard, Selector, ShardInfo};
use crate::types::{Error, Reason, Result, ShardId, ShardName};
use crate::wire;

impl Client {
    /// Makes a snapshot: it holds what was answered before, and is durable. A repetition after a lost answer makes no other one.
    ///
    /// # Errors
    /// `ShardExists` if the shard has one of that name; `NotPermitted` if it has as many as it may have.
    pub async fn snapshot_shard(&self, shard: ShardId, name: &ShardName) -> Result<ShardInfo> {
        let request = wire::SnapshotShardRequest {
            shard: selected(shard),
            name: name.as_str().to_owned(),
            request_id: request_id(""),
        };
        let request = &request;
        let reply = self
            .call_within(Target::Shard(shard), self.inner.config.deadline, ATTEMPT_MAX, async |attempt| {
                attempt.node.storage().snapshot_shard(attempt.node.request(request.clone())).await
            })
            .await?;
        self.learned(reply.into_inner())
    }

    /// A shard's snapshots, in order of name.
    pub async fn snapshots(&self, shard: ShardId) -> Result<Vec<ShardInfo>> {
        self.list_snapshots(shard, "").await
    }

    /// A shard's snapshot of that name.
    ///
    /// # Errors
    /// `ShardNotFound`.
    pub async fn snapshot_by_name(&self, shard: ShardId, name: &ShardName) -> Result<ShardInfo> {
        let found = self.list_snapshots(shard, name.as_str()).await?;
        found.into_iter().next().ok_or_else(|| {
            let words = format!("shard {shard} has no snapshot named {:?}", name.as_str());
            Error::new(Reason::ShardNotFound, words).with_shard(shard)
        })
    }

    async fn list_snapshots(&self, shard: ShardId, name: &str) -> Result<Vec<ShardInfo>> {
        self.call(Target::Any, async |attempt| {
            let request = wire::ListSnapshotsRequest { shard: selected(shard), name: name.to_owned() };
            let mut stream =
                attempt.node.storage().list_snapshots(attempt.node.request(request)).await?.into_inner();
            let mut snapshots = Vec::new();
            while let Some(snapshot) = stream.message().await? {
                snapshots.push(self.learned(snapshot).map_err(|e| crate::status::to_status(&e))?);
            }
            Ok(snapshots)
        })
        .await
    }

    /// Gives a shard the content of one of its snapshots; what was written since is lost. Done once, however often its answer is lost.
    ///
    /// # Errors
    /// `ShardNotFound` if there is no such snapshot; `ShardReadOnly` of a closed shard.
    pub async fn rollback_shard(&self, shard: ShardId, snapshot: &ShardName) -> Result<ShardInfo> {
        let request = wire::RollbackShardRequest {
            shard: selected(shard),
            snapshot: snapshot.as_str().to_owned(),
            request_id: request_id(""),
        };
        let request = &request;
        let reply = self
            .call_within(Target::Shard(shard), self.inner.config.deadline, ATTEMPT_MAX, async |attempt| {
                attempt.node.storage().rollback_shard(attempt.node.request(request.clone())).await
            })
            .await?;
        self.learned(reply.into_inner())
    }

    /// Makes a shard with the content of a shard or snapshot. With an empty `request_id` one is made up.
    ///
    /// # Errors
    /// `ShardExists` if the owner has a shard of that name.
    pub async fn clone_shard(&self, new: &CloneShard) -> Result<ShardInfo> {
        let source = match &new.source {
            Selector::Id(id) => *id,
            Selector::Name(name) => self.shard_by_name(name).await?.id,
        };
        let request = wire::CloneShardRequest {
            source: Some(convert::selector_to_wire(&Selector::Id(source))),
            name: new.name.as_str().to_owned(),
            limit_bytes: new.limit_bytes.unwrap_or(0),
            request_id: request_id(&new.request_id),
        };
        let request = &request;
        let reply = self
            .call_within(Target::Shard(source), self.inner.config.deadline, ATTEMPT_MAX, async |attempt| {
                attempt.node.storage().clone_shard(attempt.node.request(request.clone())).await
            })
            .await?;
        self.learned(reply.into_inner())
    }
}
