//! The Admin service: what an operator asks of a node. Covers all owners.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::convert;
use shardfs_proto::types::cluster::{CheckItem, Selector};
use shardfs_proto::types::limits::PUBLISH_SHARDS_MAX;
use shardfs_proto::types::{Epoch, Error, NodeId, Reason, Result, ShardId, VolumeId};
use shardfs_proto::wire::{self, admin_server::Admin};
use tokio::sync::mpsc;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::stream::{self, Answer};
use super::{Services, about, caller};
use crate::shard::check;

/// How long a promotion is waited for unless the caller says, and at most.
const PROMOTE_WAIT_DEFAULT: Duration = Duration::from_secs(30);
const PROMOTE_WAIT_MAX: Duration = Duration::from_secs(300);
const CHECK: &str = "Admin/CheckShard";
/// Findings of a check that wait to be sent; more wait in the check, which then pauses.
const FINDINGS_AHEAD: usize = 64;

/// The handlers.
pub struct AdminService(Services);

impl AdminService {
    pub(super) fn new(services: Services) -> AdminService {
        AdminService(services)
    }

    /// The shard by id, whoever owns it; or by name among the caller's.
    fn any_shard(
        &self,
        metadata: &MetadataMap,
        selector: Selector,
    ) -> impl Future<Output = Result<(shardfs_proto::types::ClientId, Selector)>> + Send {
        let client = caller(metadata);
        async move {
            match selector {
                Selector::Name(_) => Ok((client?, selector)),
                Selector::Id(id) => {
                    let all = self.0.catalog.list_all_shards(true).await?;
                    let info = all.into_iter().find(|info| info.id == id).ok_or_else(|| {
                        Error::new(Reason::ShardNotFound, format!("there is no shard {id}")).with_shard(id)
                    })?;
                    Ok((info.owner, selector))
                }
            }
        }
    }
}

#[tonic::async_trait]
impl Admin for AdminService {
    async fn get_status(
        &self,
        request: Request<wire::GetStatusRequest>,
    ) -> Result<Response<wire::NodeStatus>, Status> {
        let call = async {
            caller(request.metadata())?;
            Ok(convert::node_status_to_wire(&self.0.catalog.status().await?))
        };
        self.0.unary("Admin/GetStatus", call).await
    }

    async fn list_nodes(
        &self,
        request: Request<wire::ListNodesRequest>,
    ) -> Result<Response<wire::ListNodesReply>, Status> {
        let call = async {
            caller(request.metadata())?;
            let nodes = self.0.catalog.list_nodes().await?;
            Ok(wire::ListNodesReply { nodes: nodes.iter().map(convert::node_info_to_wire).collect() })
        };
        self.0.unary("Admin/ListNodes", call).await
    }

    async fn list_volumes(
        &self,
        request: Request<wire::ListVolumesRequest>,
    ) -> Result<Response<wire::ListVolumesReply>, Status> {
        let call = async {
            caller(request.metadata())?;
            let volumes = self.0.catalog.list_volumes().await?;
            Ok(wire::ListVolumesReply { volumes: volumes.iter().map(convert::volume_info_to_wire).collect() })
        };
        self.0.unary("Admin/ListVolumes", call).await
    }

    async fn promote_volume(
        &self,
        request: Request<wire::PromoteVolumeRequest>,
    ) -> Result<Response<wire::Volume>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let (volume, node) = (VolumeId::new(r.volume_id)?, NodeId::new(r.node_id)?);
            let patience = match r.timeout_ms {
                0 => PROMOTE_WAIT_DEFAULT,
                ms => Duration::from_millis(ms.into()).min(PROMOTE_WAIT_MAX),
            };
            let moved = self.0.catalog.promote(&volume, &node, patience).await?;
            Ok(convert::volume_info_to_wire(&moved))
        };
        self.0.unary("Admin/PromoteVolume", call).await
    }

    async fn add_volume(
        &self,
        request: Request<wire::AddVolumeRequest>,
    ) -> Result<Response<wire::Volume>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let added = self.0.catalog.add_volume(convert::new_volume_from_wire(r)?).await?;
            Ok(convert::volume_info_to_wire(&added))
        };
        self.0.unary("Admin/AddVolume", call).await
    }

    async fn publish_views(
        &self,
        request: Request<wire::PublishViewsRequest>,
    ) -> Result<Response<wire::PublishViewsReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            if r.shard_ids.len() > PUBLISH_SHARDS_MAX {
                return Err(Error::new(
                    Reason::TooLarge,
                    format!("{} shards in one call; the limit is {PUBLISH_SHARDS_MAX}", r.shard_ids.len()),
                ));
            }
            let volume = VolumeId::new(r.volume_id)?;
            let shards: Vec<ShardId> = r.shard_ids.into_iter().map(ShardId::new).collect::<Result<_>>()?;
            let max_age = Duration::from_millis(r.max_age_ms.into());
            let young = self.0.catalog.publish_views(&volume, Epoch::new(r.epoch), &shards, max_age).await?;
            Ok(wire::PublishViewsReply { shard_ids: young.into_iter().map(ShardId::get).collect() })
        };
        self.0.unary("Admin/PublishViews", call).await
    }

    async fn drain_node(
        &self,
        request: Request<wire::DrainNodeRequest>,
    ) -> Result<Response<wire::Node>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let node = self.0.catalog.drain(&NodeId::new(r.node_id)?, r.drain).await?;
            Ok(convert::node_info_to_wire(&node))
        };
        self.0.unary("Admin/DrainNode", call).await
    }

    type ListAllShardsStream = Answer<wire::Shard>;

    async fn list_all_shards(
        &self,
        request: Request<wire::ListAllShardsRequest>,
    ) -> Result<Response<Self::ListAllShardsStream>, Status> {
        self.0
            .streaming("Admin/ListAllShards", async |observation| {
                caller(request.metadata())?;
                let mut shards = self.0.catalog.list_all_shards(request.get_ref().include_deleted).await?;
                shards.sort_by_key(|info| info.id);
                Ok(stream::ready(shards.iter().map(convert::shard_info_to_wire).collect(), observation))
            })
            .await
    }

    type CheckShardStream = Answer<wire::CheckReply>;

    async fn check_shard(
        &self,
        request: Request<wire::CheckShardRequest>,
    ) -> Result<Response<Self::CheckShardStream>, Status> {
        self.0
            .streaming(CHECK, async |observation| {
                let (metadata, _, r) = request.into_parts();
                caller(&metadata)?;
                let selector = convert::selector_from_wire(r.shard)?;
                let (owner, selector) = self.any_shard(&metadata, selector).await?;
                let shard = self.0.shard(&owner, &selector, 0).await?;
                let permit = self.0.checks.clone().try_acquire_owned().map_err(|_| {
                    Error::new(
                        Reason::Busy,
                        "the node checks as many shards as it may at a time: try again later",
                    )
                    .with_retry_after_ms(1_000)
                })?;
                let id = shard.id();
                let view = about(id, shard.read_view(None).await)?;
                let damage = Arc::clone(self.0.catalog.damage());
                let (sender, receiver) = mpsc::channel(FINDINGS_AHEAD);
                tokio::task::spawn_blocking(move || {
                    let _permit = permit;
                    let send = |item: CheckItem| {
                        if let CheckItem::Summary(summary) = &item {
                            match summary.findings {
                                0 if r.read_data => damage.mended(id),
                                0 => {}
                                n => damage.note(id, CHECK, &format!("fsck found {n} things that are wrong")),
                            }
                        }
                        let gone =
                            sender.blocking_send(Ok(vec![convert::check_item_to_wire(&item)])).is_err();
                        if gone { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                    };
                    let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                        check::check(&view, r.read_data, &mut |item| send(item))
                    }))
                    .unwrap_or_else(|_| Err(super::panicked(CHECK)));
                    if let Err(error) = about(id, checked) {
                        // A client that went away has nobody to tell.
                        let _ = sender.blocking_send(Err(error));
                    }
                });
                Ok(stream::fed(receiver, observation))
            })
            .await
    }
}
