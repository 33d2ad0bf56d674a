//! Calls about shards as such.

use std::time::Duration;

use parking_lot::Mutex;

use super::Client;
use super::placing::Refusals;
use super::retry::Target;
use crate::convert;
use crate::status::{from_status, to_status};
use crate::types::cluster::{NewShard, Selector, ShardInfo};
use crate::types::{Error, Reason, Result, ShardId, ShardName, clock};
use crate::wire;

/// Making, closing and deleting a shard touch the metadata store and many files.
pub(super) const ATTEMPT_MAX: Duration = Duration::from_secs(30);

impl Client {
    /// Makes a shard on one of the cluster's nodes, drawn by lot among those alive with the room of their volumes as weight. With an
    /// empty `request_id` one is made up, so that repetitions are safe.
    ///
    /// # Errors
    /// `ShardExists`; `VolumeFull` if no node has room.
    pub async fn new_shard(&self, new: &NewShard) -> Result<ShardInfo> {
        let request_id = request_id(&new.request_id);
        let request = wire::NewShardRequest {
            name: new.name.as_str().to_owned(),
            limit_bytes: new.limit_bytes.unwrap_or(0),
            mode: Some(new.mode),
            uid: new.uid,
            gid: new.gid,
            request_id,
        };
        let begun = clock::monotonic();
        let nodes = self.places().await?;
        let refusals = Mutex::new(Refusals::default());
        let (request, nodes, refused) = (&request, &nodes, &refusals);
        let made = self
            .call_within(Target::Any, self.inner.config.deadline, ATTEMPT_MAX, async |attempt| {
                let at = attempt.number as usize % nodes.len().max(1);
                let endpoint = nodes.get(at).and_then(|node| self.inner.channels.usable(&node.endpoints));
                let node = match endpoint.map(|endpoint| self.inner.channels.node(endpoint)) {
                    Some(Ok(node)) => node,
                    Some(Err(_)) | None => attempt.node,
                };
                // Not the node of the attempt, so it is watched here.
                let answer = tokio::select! {
                    answer = async { node.storage().new_shard(node.request(request.clone())).await } => answer,
                    () = node.silent(attempt.number / nodes.len().max(1) as u32) => Err(tonic::Status::unavailable(format!("{} is silent", node.endpoint))),
                };
                answer.map_err(|status| {
                    let said = from_status(&status);
                    let judged = refused.lock().judge(at, nodes.len(), &said, begun.elapsed());
                    judged.map_or(status, |judged| to_status(&judged))
                })
            })
            .await;
        match made {
            Ok(shard) => self.learned(shard.into_inner()),
            Err(error) => Err(refusals.into_inner().told(error)),
        }
    }

    /// Makes a shard read-only for good.
    pub async fn close_shard(&self, shard: ShardId) -> Result<ShardInfo> {
        let request = wire::CloseShardRequest { shard: selected(shard) };
        let request = &request;
        let reply = self
            .call_within(Target::Shard(shard), self.inner.config.deadline, ATTEMPT_MAX, async |attempt| {
                attempt.node.storage().close_shard(attempt.node.request(request.clone())).await
            })
            .await?;
        self.learned(reply.into_inner())
    }

    /// Gives a shard another name.
    ///
    /// # Errors
    /// `ShardExists` if the owner has one of that name.
    pub async fn rename_shard(&self, shard: ShardId, new_name: &ShardName) -> Result<ShardInfo> {
        let request =
            wire::RenameShardRequest { shard: selected(shard), new_name: new_name.as_str().to_owned() };
        let request = &request;
        let reply = self
            .call_within(Target::Shard(shard), self.inner.config.deadline, ATTEMPT_MAX, async |attempt| {
                attempt.node.storage().rename_shard(attempt.node.request(request.clone())).await
            })
            .await?;
        self.learned(reply.into_inner())
    }

    /// Deletes a shard. With `only_if_empty`: `ShardNotEmpty` unless its root directory is empty.
    pub async fn delete_shard(&self, shard: ShardId, only_if_empty: bool) -> Result<()> {
        let request = wire::DeleteShardRequest { shard: selected(shard), only_if_empty };
        let request = &request;
        let mut repeated = false;
        let deleted = self
            .call_within(Target::Shard(shard), self.inner.config.deadline, ATTEMPT_MAX, |attempt| {
                repeated |= attempt.number > 0;
                async move { attempt.node.storage().delete_shard(attempt.node.request(request.clone())).await }
            })
            .await;
        match deleted {
            Ok(_) => {}
            // An earlier attempt did it, and its answer was lost.
            Err(error)
                if repeated && matches!(error.reason(), Reason::ShardDeleted | Reason::ShardNotFound) => {}
            Err(error) => return Err(error),
        }
        self.inner.sessions.forget(shard);
        Ok(())
    }

    /// The caller's shards, in order of name; deleted ones only on request.
    pub async fn list_shards_with(&self, include_deleted: bool) -> Result<Vec<ShardInfo>> {
        self.call(Target::Any, async |attempt| {
            let request = wire::ListShardsRequest { include_deleted };
            let mut stream =
                attempt.node.storage().list_shards(attempt.node.request(request)).await?.into_inner();
            let mut shards = Vec::new();
            while let Some(shard) = stream.message().await? {
                shards.push(self.learned(shard).map_err(|e| crate::status::to_status(&e))?);
            }
            Ok(shards)
        })
        .await
    }

    /// The caller's shards, in order of name.
    pub async fn list_shards(&self) -> Result<Vec<ShardInfo>> {
        self.list_shards_with(false).await
    }

    /// The caller's shard of that name.
    ///
    /// # Errors
    /// `ShardNotFound`.
    pub async fn shard_by_name(&self, name: &ShardName) -> Result<ShardInfo> {
        let selector = Selector::Name(name.clone());
        let reply =
            self.call(Target::Any, async |attempt| self.get_shard(attempt.node, &selector).await).await?;
        self.learned(reply)
    }

    /// A shard, with its usage, from its primary.
    pub async fn shard(&self, shard: ShardId) -> Result<ShardInfo> {
        let selector = Selector::Id(shard);
        let reply = self
            .call(Target::Shard(shard), async |attempt| self.get_shard(attempt.node, &selector).await)
            .await?;
        self.learned(reply)
    }

    async fn get_shard(
        &self,
        node: super::channel::Node,
        selector: &Selector,
    ) -> Result<wire::Shard, tonic::Status> {
        let request = wire::GetShardRequest { shard: Some(convert::selector_to_wire(selector)) };
        Ok(node.storage().get_shard(node.request(request)).await?.into_inner())
    }

    pub(super) fn learned(&self, shard: wire::Shard) -> Result<ShardInfo, Error> {
        let info = convert::shard_info_from_wire(shard)?;
        self.inner.routes.learn_info(&info);
        Ok(info)
    }
}

/// The request id that was given; without one, one that nobody else has.
pub(super) fn request_id(given: &str) -> String {
    match given {
        "" => format!("{:016x}{:016x}", fastrand::u64(..), fastrand::u64(..)),
        given => given.to_owned(),
    }
}

pub(super) fn selected(shard: ShardId) -> Option<wire::ShardSelector> {
    Some(convert::selector_to_wire(&Selector::Id(shard)))
}
