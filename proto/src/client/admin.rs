//! What an operator asks.

use std::time::{Duration, Instant};

use futures::Stream;

use super::Client;
use super::channel::Node;
use super::retry::{ATTEMPT_MAX, Target};
use super::shards::selected;
use crate::convert;
use crate::types::cluster::{CheckItem, NewVolume, NodeInfo, NodeStatus, ShardInfo, VolumeInfo};
use crate::types::{Error, NodeId, Reason, Result, ShardId, VolumeId, clock};
use crate::wire;

/// How long a promotion is waited for, unless the client's deadline is shorter.
const PROMOTE_WAIT_MAX: Duration = Duration::from_secs(30);
/// How much earlier than the caller's deadline a node is told to give a promotion up, so that its reason is heard; of a short
/// deadline, a quarter.
const PROMOTE_ANSWER_GRACE: Duration = Duration::from_secs(1);
/// Pause between two questions whether a volume is served.
const SERVED_ASK_PAUSE: Duration = Duration::from_millis(50);
/// Asking one certain node is not repeated for long: the answer to "is it there" may be no.
const NODE_ATTEMPT_MAX: Duration = Duration::from_secs(3);
/// Publishing flushes shards: on a busy device that takes seconds.
const PUBLISH_ATTEMPT_MAX: Duration = Duration::from_secs(30);

impl Client {
    /// The nodes of the cluster.
    pub async fn nodes(&self) -> Result<Vec<NodeInfo>> {
        self.nodes_within(self.inner.config.deadline, ATTEMPT_MAX).await
    }

    /// The same with a deadline and a bound of its own for the attempts; their addresses are learned.
    pub(super) async fn nodes_within(
        &self,
        deadline: Duration,
        attempt_max: Duration,
    ) -> Result<Vec<NodeInfo>> {
        let reply = self
            .call_within(Target::Any, deadline, attempt_max, async |attempt| {
                attempt.node.admin().list_nodes(attempt.node.request(wire::ListNodesRequest {})).await
            })
            .await?;
        let nodes = reply.into_inner().nodes.into_iter().map(convert::node_info_from_wire);
        let nodes: Vec<NodeInfo> = nodes.collect::<Result<_>>()?;
        self.inner.routes.learn_nodes(&nodes);
        Ok(nodes)
    }

    /// The volumes of the cluster.
    pub async fn volumes(&self) -> Result<Vec<VolumeInfo>> {
        let reply = self
            .call(Target::Any, async |attempt| {
                attempt.node.admin().list_volumes(attempt.node.request(wire::ListVolumesRequest {})).await
            })
            .await?;
        reply.into_inner().volumes.into_iter().map(convert::volume_info_from_wire).collect()
    }

    /// Adds a volume to the cluster; its first node makes and serves it.
    pub async fn add_volume(&self, volume: &NewVolume) -> Result<VolumeInfo> {
        let request = convert::new_volume_to_wire(volume);
        let deadline = self.inner.config.deadline;
        // A cloud takes its time; what was begun goes on, and is found when the call is repeated.
        let attempt_max = if volume.provider == "aws" { deadline } else { ATTEMPT_MAX };
        let reply = self
            .call_within(Target::Any, deadline, attempt_max, async |attempt| {
                attempt.node.admin().add_volume(attempt.node.request(request.clone())).await
            })
            .await?;
        convert::volume_info_from_wire(reply.into_inner())
    }

    /// Has a volume served by one of its backups; answers when the node says that it serves it.
    pub async fn promote_volume(&self, volume: &VolumeId, node: &NodeId) -> Result<VolumeInfo> {
        let patience = PROMOTE_WAIT_MAX.min(self.inner.config.deadline);
        let until = clock::monotonic() + patience;
        let grace = PROMOTE_ANSWER_GRACE.min(patience / 4);
        let left = || until.saturating_duration_since(clock::monotonic());
        let reply = self
            .call_within(Target::Any, patience, patience, async |attempt| {
                let request = wire::PromoteVolumeRequest {
                    volume_id: volume.as_str().to_owned(),
                    node_id: node.as_str().to_owned(),
                    // 0 would leave it to the node.
                    timeout_ms: u32::try_from(left().saturating_sub(grace).as_millis())
                        .unwrap_or(u32::MAX)
                        .max(1),
                };
                attempt.node.admin().promote_volume(attempt.node.request(request)).await
            })
            .await?;
        let moved = convert::volume_info_from_wire(reply.into_inner())?;
        let served = self.wait_served(volume, node, until);
        tokio::time::timeout(left().max(grace), served).await.unwrap_or_else(|_| {
            Err(Error::unavailable(format!("volume {volume} was given to {node}, which does not answer")))
        })?;
        Ok(moved)
    }

    /// Waits until a node says itself that it serves a volume: the record says only that it is to. Asks once at least.
    async fn wait_served(&self, volume: &VolumeId, node: &NodeId, until: Instant) -> Result<()> {
        let nodes = self.nodes().await?;
        let endpoints = nodes.into_iter().find(|info| info.id == *node).map(|info| info.endpoints);
        let endpoints = endpoints.ok_or_else(|| Error::not_found(format!("there is no node {node}")))?;
        let mut trouble = "it has not answered".to_owned();
        loop {
            match self.node_status(&endpoints).await {
                Ok(status) => match status.volumes.into_iter().find(|status| status.id == *volume) {
                    Some(status) if status.trouble.is_empty() => return Ok(()),
                    Some(status) => trouble = status.trouble,
                    // By its copy of the records it has it not yet, or not any more.
                    None => {
                        let volumes = self.volumes().await?;
                        let primary = volumes.into_iter().find(|v| v.id == *volume).and_then(|v| v.primary);
                        if primary.as_ref() != Some(node) {
                            let now = primary
                                .map_or_else(|| "no node has it".to_owned(), |p| format!("{p} has it"));
                            return Err(Error::unavailable(format!(
                                "volume {volume} was given to {node}, which did not keep it ({trouble}); now {now}"
                            )));
                        }
                    }
                },
                Err(error) => trouble = error.message().to_owned(),
            }
            if clock::monotonic() + SERVED_ASK_PAUSE >= until {
                return Err(Error::unavailable(format!(
                    "volume {volume} was given to {node}, which does not serve it: {trouble}"
                )));
            }
            tokio::time::sleep(SERVED_ASK_PAUSE).await;
        }
    }

    /// Says that a node is to serve nothing, or may serve again.
    pub async fn drain_node(&self, node: &NodeId, drain: bool) -> Result<NodeInfo> {
        let request = wire::DrainNodeRequest { node_id: node.as_str().to_owned(), drain };
        let reply = self
            .call(Target::Any, async |attempt| {
                attempt.node.admin().drain_node(attempt.node.request(request.clone())).await
            })
            .await?;
        convert::node_info_from_wire(reply.into_inner())
    }

    /// All shards of all owners, in order of id.
    pub async fn all_shards(&self, include_deleted: bool) -> Result<Vec<ShardInfo>> {
        self.call(Target::Any, async |attempt| {
            let request = wire::ListAllShardsRequest { include_deleted };
            let mut stream =
                attempt.node.admin().list_all_shards(attempt.node.request(request)).await?.into_inner();
            let mut shards = Vec::new();
            while let Some(shard) = stream.message().await? {
                shards.push(convert::shard_info_from_wire(shard).map_err(|e| crate::status::to_status(&e))?);
            }
            Ok(shards)
        })
        .await
    }

    /// The node at one of these addresses.
    pub(super) fn node_at(&self, endpoints: &[String]) -> Result<Node> {
        let endpoint = self.inner.channels.usable(endpoints).ok_or_else(|| Error::invalid("no endpoint"))?;
        self.inner.channels.node(endpoint)
    }

    /// How one node sees itself. Asked once.
    ///
    /// # Errors
    /// `Unavailable` if it does not answer.
    pub async fn node_status(&self, endpoints: &[String]) -> Result<NodeStatus> {
        let node = self.node_at(endpoints)?;
        let mut admin = node.admin();
        let call = admin.get_status(node.request(wire::GetStatusRequest {}));
        match tokio::time::timeout(NODE_ATTEMPT_MAX, call).await {
            Ok(Ok(reply)) => convert::node_status_from_wire(reply.into_inner()),
            Ok(Err(status)) => Err(crate::status::from_status(&status)),
            Err(_) => Err(Error::unavailable(format!("{} did not answer", node.endpoint))),
        }
    }

    /// Asks the primary of a volume, at one of these endpoints, to publish views of shards. Asked once; answers the shards of which
    /// there is a young view now.
    pub async fn publish_views(
        &self,
        endpoints: &[String],
        volume: &VolumeId,
        shards: &[ShardId],
        max_age: Duration,
    ) -> Result<Vec<ShardId>> {
        let node = self.node_at(endpoints)?;
        let request = wire::PublishViewsRequest {
            volume_id: volume.as_str().to_owned(),
            epoch: 0,
            shard_ids: shards.iter().map(|shard| shard.get()).collect(),
            // 0 would mean that they do not mind.
            max_age_ms: u32::try_from(max_age.as_millis()).unwrap_or(u32::MAX).max(1),
        };
        let mut admin = node.admin();
        let call = admin.publish_views(node.request(request));
        match tokio::time::timeout(PUBLISH_ATTEMPT_MAX, call).await {
            Ok(Ok(reply)) => reply.into_inner().shard_ids.into_iter().map(ShardId::new).collect(),
            Ok(Err(status)) => Err(crate::status::from_status(&status)),
            Err(_) => Err(Error::unavailable(format!("{} did not answer", node.endpoint))),
        }
    }

    /// Whether any node answers within `within`: of those that were configured, or the one that is asked at present.
    pub async fn reachable(&self, within: Duration) -> bool {
        let configured = self.inner.config.endpoints.iter();
        let nodes = configured.filter_map(|endpoint| self.inner.channels.node(endpoint).ok());
        let probes: Vec<_> = nodes
            .chain(self.any_node().ok())
            .map(|node| Box::pin(async move { node.probe(within).await.then_some(()).ok_or(()) }))
            .collect();
        !probes.is_empty() && futures::future::select_ok(probes).await.is_ok()
    }

    /// Checks a shard, whoever owns it, against the invariants of its records, while it serves. Findings,
    /// then a summary.
    pub fn check_shard(
        &self,
        shard: ShardId,
        read_data: bool,
    ) -> impl Stream<Item = Result<CheckItem>> + Send + use<> {
        let client = self.clone();
        async_stream::try_stream! {
            client.learn_any(shard).await?;
            let mut stream = client
                .call(Target::Shard(shard), async |attempt| {
                    let request = wire::CheckShardRequest { shard: selected(shard), read_data };
                    attempt.node.admin().check_shard(attempt.node.request(request)).await
                })
                .await?
                .into_inner();
            while let Some(reply) = stream.message().await.map_err(|status| crate::status::from_status(&status))? {
                yield convert::check_item_from_wire(reply)?;
            }
        }
    }

    /// Learns where a shard lives that may be somebody else's, which GetShard would not tell.
    async fn learn_any(&self, shard: ShardId) -> Result<()> {
        let shards = self.all_shards(false).await?;
        let info = shards.iter().find(|info| info.id == shard).ok_or_else(|| {
            Error::new(Reason::ShardNotFound, format!("there is no shard {shard}")).with_shard(shard)
        })?;
        self.inner.routes.learn(shard, &info.location);
        Ok(())
    }
}
