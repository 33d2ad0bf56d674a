//! `shardfs shard snapshot`, `snapshots`, `rollback`, `clone`.

use serde_json::json;
use shardfs_proto::types::ShardName;
use shardfs_proto::types::cluster::{CloneShard, Selector};

use super::{place, to_json};
use crate::cmd::remote::find_shard;
use crate::context::Context;
use crate::failure::{Failure, OrFail, Result};
use crate::output::{self, Align, Out, Table, time_text};
use crate::paths::{ShardRef, info_text};

pub(super) const SNAPSHOT_HELP: &str = "\
It holds everything that was answered before, and is durable when the command ends. Writers do not wait for it. It costs room \
only as the shard changes: what the shard no longer needs stays until the snapshot is deleted.

On the mount: mkdir SHARD/.snap/NAME makes one, rmdir removes it, ls and diff -r read it. `.snap` is not listed, so that cp and rm \
of a shard leave it alone.

Examples:
  shardfs shard snapshot photos monday
  shardfs get -r photos/.snap/monday/2026 .
  shardfs shard snapshots photos";

pub(super) const ROLLBACK_HELP: &str = "\
Everything that was written to the shard since the snapshot is lost, for good. Take a snapshot first if it may be wanted. The shard \
keeps its name, id, limit and snapshots. Programs on the mount see a pause; files that were open and are not in the snapshot \
are stale (ESTALE).

Example:
  shardfs shard snapshot photos before && shardfs shard rollback photos monday --yes";

pub(super) const CLONE_HELP: &str = "\
Both share their blocks until one of them changes; a change of one does not show in the other. The clone lies on the same volume.

Examples:
  shardfs shard clone photos/.snap/monday photos-monday
  shardfs shard clone photos photos-test --limit 2GiB";

pub(super) async fn take(context: &Context, shard: &ShardRef, name: &ShardName, json: bool) -> Result<()> {
    let client = context.client()?;
    let of = find_shard(&client, shard).await?;
    let info = client.snapshot_shard(of.id, name).await.with_context(|| shard.to_string())?;
    let mut out = Out::new();
    if json {
        out.json(&to_json(&info))?;
    } else {
        out.line(format!("{shard}/.snap/{} (id {}) on {}", info.name, info.id, place(&info)))?;
    }
    out.flush()
}

pub(super) async fn list(context: &Context, shard: &ShardRef, json: bool) -> Result<()> {
    let client = context.client()?;
    let of = find_shard(&client, shard).await?;
    let snapshots = client.snapshots(of.id).await.with_context(|| shard.to_string())?;
    let mut out = Out::new();
    if json {
        out.json(&json!(snapshots.iter().map(to_json).collect::<Vec<_>>()))?;
        return out.flush();
    }
    if snapshots.is_empty() && out.is_terminal() {
        output::note(format!("{shard} has no snapshots: `shardfs shard snapshot {shard} NAME`"));
        return out.flush();
    }
    let mut table = Table::new(&[("ID", Align::Right), ("NAME", Align::Left), ("CREATED", Align::Left)]);
    for info in &snapshots {
        let name = output::printable(info.name.as_str().as_bytes());
        table.row(vec![info.id.to_string(), name, time_text(info.created)]);
    }
    out.bytes(table.render().as_bytes())?;
    out.flush()
}

pub(super) async fn roll_back(
    context: &Context,
    shard: &ShardRef,
    snapshot: &ShardName,
    yes: bool,
) -> Result<()> {
    let client = context.client()?;
    let of = find_shard(&client, shard).await?;
    let to = client.snapshot_by_name(of.id, snapshot).await.with_context(|| shard.to_string())?;
    if !yes {
        return Err(Failure::usage(format!(
            "a rollback loses, for good, everything that was written to {shard} since {} UTC, when {snapshot} was made",
            time_text(to.created)
        ))
        .hint("add --yes if that is meant; `shardfs shard clone` makes a shard of a snapshot and loses nothing"));
    }
    let info = client.rollback_shard(of.id, snapshot).await.with_context(|| shard.to_string())?;
    let mut out = Out::new();
    out.line(format!("{} is as it was in {snapshot}, made {} UTC", info_text(&info), time_text(to.created)))?;
    out.flush()
}

pub(super) async fn clone(
    context: &Context,
    source: &ShardRef,
    name: ShardName,
    limit: Option<u64>,
    json: bool,
) -> Result<()> {
    let client = context.client()?;
    let from = find_shard(&client, source).await?;
    let new = CloneShard {
        source: Selector::Id(from.id),
        name,
        limit_bytes: limit.filter(|limit| *limit > 0),
        request_id: format!("{:032x}", fastrand::u128(..)),
    };
    let info = client.clone_shard(&new).await.with_context(|| source.to_string())?;
    let mut out = Out::new();
    if json {
        out.json(&to_json(&info))?;
    } else {
        out.line(format!("{} (id {}) on {}, from {source}", info.name, info.id, place(&info)))?;
    }
    out.flush()
}
