//! The Admin service: what an operator asks of a node. Covers all owners.

use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::convert;
use shardfs_proto::types::cluster::{CheckItem, CheckSummary, Selector};
use shardfs_proto::types::limits::PUBLISH_SHARDS_MAX;
use shardfs_proto::types::{Epoch, Error, NodeId, Reason, Result, ShardId, VolumeId};
use shardfs_proto::wire::{self, admin_server::Admin};
use tokio::runtime::Handle;
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::stream::{self, Answer};
use super::{Services, about, caller};
use crate::shard::{ReadView, Shard, check};

/// How long a volume that leaves is waited for if the caller does not say, and at most.
const REMOVE_WAIT_DEFAULT: Duration = Duration::from_secs(30);
/// See [`REMOVE_WAIT_DEFAULT`].
const REMOVE_WAIT_MAX: Duration = Duration::from_secs(300);
/// How long a promotion is waited for unless the caller says, and at most.
const PROMOTE_WAIT_DEFAULT: Duration = Duration::from_secs(30);
const PROMOTE_WAIT_MAX: Duration = Duration::from_secs(300);
const CHECK: &str = "Admin/CheckShard";
/// Findings of a check that wait to be sent; more wait in the check, which then pauses.
const FINDINGS_AHEAD: usize = 64;
/// How long a check waits for its client to take a finding: it holds a place among few, and what the shard has deleted since.
const FINDING_WAIT_MAX: Duration = Duration::from_secs(300);

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

    async fn attach_volume(
        &self,
        request: Request<wire::AttachVolumeRequest>,
    ) -> Result<Response<wire::Volume>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let (volume, node) = (VolumeId::new(r.volume_id)?, NodeId::new(r.node_id)?);
            Ok(convert::volume_info_to_wire(&self.0.catalog.attach_volume(&volume, &node).await?))
        };
        self.0.unary("Admin/AttachVolume", call).await
    }

    async fn detach_volume(
        &self,
        request: Request<wire::DetachVolumeRequest>,
    ) -> Result<Response<wire::Volume>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let (volume, node) = (VolumeId::new(r.volume_id)?, NodeId::new(r.node_id)?);
            Ok(convert::volume_info_to_wire(&self.0.catalog.detach_volume(&volume, &node).await?))
        };
        self.0.unary("Admin/DetachVolume", call).await
    }

    async fn grow_volume(
        &self,
        request: Request<wire::GrowVolumeRequest>,
    ) -> Result<Response<wire::Volume>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let volume = VolumeId::new(r.volume_id)?;
            Ok(convert::volume_info_to_wire(&self.0.catalog.grow_volume(&volume, r.size_bytes).await?))
        };
        self.0.unary("Admin/GrowVolume", call).await
    }

    async fn set_volume_iops(
        &self,
        request: Request<wire::SetVolumeIopsRequest>,
    ) -> Result<Response<wire::Volume>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let volume = VolumeId::new(r.volume_id)?;
            Ok(convert::volume_info_to_wire(&self.0.catalog.set_iops(&volume, r.iops).await?))
        };
        self.0.unary("Admin/SetVolumeIops", call).await
    }

    async fn list_strays(
        &self,
        request: Request<wire::ListStraysRequest>,
    ) -> Result<Response<wire::ListStraysReply>, Status> {
        let call = async {
            caller(request.metadata())?;
            let strays = self.0.catalog.strays().await?;
            Ok(wire::ListStraysReply { strays: strays.iter().map(convert::stray_to_wire).collect() })
        };
        self.0.unary("Admin/ListStrays", call).await
    }

    async fn remove_stray(
        &self,
        request: Request<wire::RemoveStrayRequest>,
    ) -> Result<Response<wire::RemoveStrayReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            self.0.catalog.remove_stray(&r.volume_id, &r.disk, &r.machine, r.force).await?;
            Ok(wire::RemoveStrayReply {})
        };
        self.0.unary("Admin/RemoveStray", call).await
    }

    async fn remove_volume(
        &self,
        request: Request<wire::RemoveVolumeRequest>,
    ) -> Result<Response<wire::RemoveVolumeReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let patience = match r.timeout_ms {
                0 => REMOVE_WAIT_DEFAULT,
                ms => Duration::from_millis(ms.into()).min(REMOVE_WAIT_MAX),
            };
            let volume = VolumeId::new(r.volume_id)?;
            let left = self.0.catalog.remove_volume(&volume, r.delete_content, patience).await?;
            Ok(wire::RemoveVolumeReply { left: left.unwrap_or_default() })
        };
        self.0.unary("Admin/RemoveVolume", call).await
    }

    async fn set_provisioning(
        &self,
        request: Request<wire::SetProvisioningRequest>,
    ) -> Result<Response<wire::Provisioning>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            caller(&metadata)?;
            let policy = r.policy.map(convert::policy_from_wire).transpose()?;
            Ok(convert::provisioning_to_wire(&self.0.catalog.set_provisioning(policy).await?))
        };
        self.0.unary("Admin/SetProvisioning", call).await
    }

    async fn get_provisioning(
        &self,
        request: Request<wire::GetProvisioningRequest>,
    ) -> Result<Response<wire::Provisioning>, Status> {
        let call = async {
            caller(request.metadata())?;
            let here = request.get_ref().here;
            Ok(convert::provisioning_to_wire(&self.0.catalog.provisioning(here).await?))
        };
        self.0.unary("Admin/GetProvisioning", call).await
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
                let summed_up = move |summary: &CheckSummary| match summary.findings {
                    0 if r.read_data => damage.mended(id),
                    0 => {}
                    n => damage.note(id, CHECK, &format!("fsck found {n} things that are wrong")),
                };
                Ok(stream::fed(run_check(shard, view, r.read_data, permit, summed_up), observation))
            })
            .await
    }
}

type Findings = Result<Vec<wire::CheckReply>>;

/// Checks a shard on a thread of its own and hands on what it finds. `summed_up` sees the summary. The shard is let go of as soon as it
/// is wanted back, and the permit when the check has ended, whether or not the client reads.
fn run_check(
    shard: Arc<Shard>,
    view: ReadView,
    read_data: bool,
    permit: OwnedSemaphorePermit,
    summed_up: impl Fn(&CheckSummary) + Send + 'static,
) -> mpsc::Receiver<Findings> {
    let (sender, receiver) = mpsc::channel::<Findings>(FINDINGS_AHEAD);
    let runtime = Handle::current();
    tokio::task::spawn_blocking(move || {
        let (id, view) = (shard.id(), view.leaving());
        let mut cut_off = None;
        let mut report = |item: CheckItem| {
            if let CheckItem::Summary(summary) = &item {
                summed_up(summary);
            }
            let flow = match sender.try_send(Ok(vec![convert::check_item_to_wire(&item)])) {
                Ok(()) => Ok(ControlFlow::Continue(())),
                Err(TrySendError::Closed(_)) => Ok(ControlFlow::Break(())),
                Err(TrySendError::Full(finding)) => {
                    runtime.block_on(hand_on(&sender, finding, shard.wanted_back()))
                }
            };
            flow.unwrap_or_else(|error| {
                cut_off = Some(error);
                ControlFlow::Break(())
            })
        };
        let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            check::check(&view, read_data, &mut report)
        }))
        .unwrap_or_else(|_| Err(super::panicked(CHECK)));
        drop((view, shard, permit));
        if let Err(error) = about(id, cut_off.map_or(checked, Err)) {
            // The client may take its time; one that went away has nobody to tell.
            runtime.spawn(async move { sender.send(Err(error)).await });
        }
    });
    receiver
}

/// Waits until a client takes a finding. `Break`: it went away. Fails once the shard is wanted back, or the client has taken nothing
/// for too long.
async fn hand_on<T>(
    findings: &mpsc::Sender<T>,
    finding: T,
    wanted_back: impl Future<Output = ()>,
) -> Result<ControlFlow<()>> {
    tokio::select! {
        biased;
        sent = findings.send(finding) => Ok(match sent {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }),
        () = wanted_back => Err(Error::unavailable(
            "the shard is being handed over or opened anew, which broke the check off: run it again",
        )),
        () = tokio::time::sleep(FINDING_WAIT_MAX) => Err(Error::new(
            Reason::Deadline,
            format!("no finding was taken for {} s: the check is broken off", FINDING_WAIT_MAX.as_secs()),
        )),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Instant;

    use bytes::Bytes;
    use shardfs_proto::types::ClientId;

    use super::*;
    use crate::shard::keys::Cf;
    use crate::shard::rocks::{RocksShared, RocksStore};
    use crate::shard::store::{Batch, Change, Store};
    use crate::shard::{Room, ShardInit, ShardManager, ShardSettings};

    #[tokio::test]
    async fn findings_wait_for_their_client_but_not_when_the_shard_is_wanted_back() {
        let (sender, mut receiver) = mpsc::channel(1);
        let never = std::future::pending::<()>;
        let now = || std::future::ready(());
        assert!(hand_on(&sender, 1, now()).await.unwrap().is_continue(), "there is a place");
        let cut = hand_on(&sender, 2, now()).await.unwrap_err();
        assert!(cut.reason() == Reason::Unavailable && cut.is_retryable(), "{cut}");
        let (sent, taken) = tokio::join!(hand_on(&sender, 3, never()), receiver.recv());
        assert!(sent.unwrap().is_continue());
        assert_eq!((taken, receiver.recv().await), (Some(1), Some(3)));
        drop(receiver);
        assert!(hand_on(&sender, 4, never()).await.unwrap().is_break());
    }

    struct Endless;

    impl Room for Endless {
        fn growth_bytes(&self) -> u64 {
            1 << 40
        }
        fn wrote(&self, _: u64) {}
        fn unflushed(&self, _: u64, _: u64) {}
        fn look_again(&self) {}
        fn total_bytes(&self) -> u64 {
            1 << 40
        }
        fn free_bytes(&self) -> u64 {
            1 << 40
        }
    }

    /// Puts records into a closed shard that are wrong, each of them.
    fn spoil(dir: &Path, id: ShardId, records: usize) {
        let store = RocksStore::open(&RocksShared::new(8 << 20, 32 << 20), id, dir).unwrap();
        let bad = |n: usize| (Cf::Index, Bytes::from(format!("no index {n:06}")), Change::Put(Bytes::new()));
        let changes = (0..records).map(bad).collect();
        store.write(&Batch { chunk_ranges: Vec::new(), changes }, true).unwrap();
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_check_whose_client_reads_nothing_lets_its_shard_be_closed() {
        const BAD: usize = 10 * FINDINGS_AHEAD;
        let root = tempfile::tempdir().unwrap();
        let (id, dir) = (ShardId::new(7).unwrap(), root.path().join("shard-7"));
        let manager = ShardManager::new(ShardSettings {
            block_cache_bytes: 8 << 20,
            write_buffer_bytes: 32 << 20,
            ..ShardSettings::default()
        });
        let init = ShardInit {
            id,
            owner: ClientId::new("tests").unwrap(),
            limit_bytes: None,
            chunk_bytes: crate::shard::chunk::CHUNK_BYTES,
            mode: 0o755,
            uid: 0,
            gid: 0,
        };
        manager.create(&dir, &init).unwrap();
        spoil(&dir, id, BAD);
        let permits = Arc::new(tokio::sync::Semaphore::new(1));
        let begin = async || {
            let shard = manager.open(id, &dir, Arc::new(Endless)).await.unwrap();
            let view = shard.read_view(None).await.unwrap();
            let permit = permits.clone().try_acquire_owned().expect("no other check holds a place");
            run_check(shard, view, false, permit, |_| {})
        };

        let mut unread = begin().await;
        while unread.len() < FINDINGS_AHEAD {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let begun = Instant::now();
        manager.close(id).await.unwrap();
        // Those who hold it are waited for longer than that.
        assert!(begun.elapsed() < Duration::from_secs(8), "closing took {:?}", begun.elapsed());
        let (mut findings, mut cut) = (0, None);
        while let Some(taken) = unread.recv().await {
            match taken {
                Ok(some) => findings += some.len(),
                Err(error) => cut = Some(error),
            }
        }
        let cut = cut.expect("its end must not look like that of a whole check");
        assert_eq!((findings, cut.reason(), cut.shard()), (FINDINGS_AHEAD, Reason::Unavailable, Some(id)));

        let mut read = begin().await;
        let mut replies = Vec::new();
        while let Some(some) = read.recv().await {
            replies.extend(some.unwrap());
        }
        assert_eq!(replies.len(), BAD + 1, "all findings and the summary");
        drop(read);
        manager.close_all().await.unwrap();
    }
}
