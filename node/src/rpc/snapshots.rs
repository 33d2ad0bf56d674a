//! What the Storage service does about snapshots: decode, one call of the catalog, encode.

use shardfs_proto::convert;
use shardfs_proto::types::cluster::CloneShard;
use shardfs_proto::types::{Result, ShardName};
use shardfs_proto::wire;
use tonic::Request;

use super::{Services, caller};

pub(super) async fn snapshot(
    services: &Services,
    request: Request<wire::SnapshotShardRequest>,
) -> Result<wire::Shard> {
    let (metadata, _, r) = request.into_parts();
    let client = caller(&metadata)?;
    let selector = convert::selector_from_wire(r.shard)?;
    let name = ShardName::new(r.name)?;
    let info = services.catalog.snapshot_shard(&client, &selector, name, r.request_id).await?;
    Ok(convert::shard_info_to_wire(&info))
}

pub(super) async fn list(
    services: &Services,
    request: Request<wire::ListSnapshotsRequest>,
) -> Result<Vec<wire::Shard>> {
    let (metadata, _, r) = request.into_parts();
    let client = caller(&metadata)?;
    let selector = convert::selector_from_wire(r.shard)?;
    let name = if r.name.is_empty() { None } else { Some(ShardName::new(r.name)?) };
    let infos = services.catalog.list_snapshots(&client, &selector, name.as_ref()).await?;
    Ok(infos.iter().map(convert::shard_info_to_wire).collect())
}

pub(super) async fn roll_back(
    services: &Services,
    request: Request<wire::RollbackShardRequest>,
) -> Result<wire::Shard> {
    let (metadata, _, r) = request.into_parts();
    let client = caller(&metadata)?;
    let selector = convert::selector_from_wire(r.shard)?;
    let snapshot = ShardName::new(r.snapshot)?;
    let info = services.catalog.rollback_shard(&client, &selector, snapshot, r.request_id).await?;
    Ok(convert::shard_info_to_wire(&info))
}

pub(super) async fn clone(
    services: &Services,
    request: Request<wire::CloneShardRequest>,
) -> Result<wire::Shard> {
    let (metadata, _, r) = request.into_parts();
    let client = caller(&metadata)?;
    let new = CloneShard {
        source: convert::selector_from_wire(r.source)?,
        name: ShardName::new(r.name)?,
        limit_bytes: (r.limit_bytes != 0).then_some(r.limit_bytes),
        request_id: r.request_id,
    };
    let info = services.catalog.clone_shard(&client, new).await?;
    Ok(convert::shard_info_to_wire(&info))
}
