//! `shardfs fsck`: checks shards against the invariants of their records, from a snapshot, while they serve.

use futures::StreamExt;
use serde_json::json;
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::{CheckItem, CheckSummary, ShardInfo};
use shardfs_proto::types::op::ShardState;

use super::remote::find_shard;
use crate::context::Context;
use crate::failure::{EXIT_FAILURE, Failure, Result};
use crate::output::{self, Out, note};
use crate::paths::{ShardRef, info_text, shard_ref};
use crate::size;

/// `shardfs fsck`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Checks that names, link counts, content, counters and indexes agree. Changes nothing. Exit code 1 if anything was found, \
or if a shard could not be checked.

Examples:
  shardfs fsck                      every shard of every owner
  shardfs fsck photos --read-data   also reads all content, so that checksums are verified"
)]
pub struct Args {
    /// Shards, by name or @ID, and snapshots, as SHARD/.snap/NAME [default: all]
    #[arg(value_name = "SHARD", value_parser = shard_ref)]
    shards: Vec<ShardRef>,
    /// Also read all content, so that its checksums are verified
    #[arg(long)]
    read_data: bool,
    /// One JSON object a line
    #[arg(long)]
    json: bool,
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let client = context.client()?;
    let mut shards = Vec::new();
    for name in &args.shards {
        shards.push(find_shard(&client, name).await?);
    }
    if args.shards.is_empty() {
        shards = client.all_shards(false).await?;
    }
    shards.retain(|s| matches!(s.state, ShardState::Active | ShardState::ReadOnly));
    let mut out = Out::new();
    let (mut findings, mut unchecked, mut total) = (0, 0, CheckSummary::default());
    for shard in &shards {
        match check(&client, shard, &args, &mut out).await {
            Ok(summary) => {
                findings += summary.findings;
                total.inodes += summary.inodes;
                total.bytes += summary.bytes;
            }
            Err(failure) if failure.reason().is_none() => return Err(failure),
            Err(failure) => {
                unchecked += 1;
                if args.json {
                    out.json_line(&json!({
                        "shard": shard.name.as_str(), "shard_id": shard.id, "snapshot_of": shard.snapshot_of,
                        "error": failure.message()
                    }))?;
                } else {
                    out.flush()?;
                    note(format!("{} (id {}): not checked: {failure}", info_text(shard), shard.id));
                }
            }
        }
        out.flush()?;
    }
    if !args.json && shards.len() != 1 {
        out.line(format!(
            "{}, {}, {}: {}",
            output::count(shards.len() as u64, "shard"),
            output::count(total.inodes, "inode"),
            size::human(total.bytes),
            if findings == 0 { "clean".to_owned() } else { format!("{findings} findings") }
        ))?;
    }
    out.flush()?;
    match (findings, unchecked) {
        (0, 0) => Ok(()),
        (0, _) => Err(Failure::new(format!("{unchecked} of {} shards could not be checked", shards.len()))
            .hint("`shardfs status` shows damaged shards and nodes that are away")),
        _ if args.json => Err(Failure::silent(EXIT_FAILURE)),
        _ => Err(Failure::new(format!("{findings} findings"))),
    }
}

async fn check(client: &Client, shard: &ShardInfo, args: &Args, out: &mut Out) -> Result<CheckSummary> {
    let name = info_text(shard);
    let mut items = std::pin::pin!(client.check_shard(shard.id, args.read_data));
    while let Some(item) = items.next().await {
        match item? {
            CheckItem::Finding { kind, detail } => {
                if args.json {
                    out.json_line(&json!({
                        "shard": shard.name.as_str(), "shard_id": shard.id, "snapshot_of": shard.snapshot_of,
                        "finding": kind, "detail": detail
                    }))?;
                } else {
                    out.line(format!("{name}: {kind}: {detail}"))?;
                }
            }
            CheckItem::Summary(s) => {
                if args.json {
                    out.json_line(&json!({
                        "shard": shard.name.as_str(), "shard_id": shard.id, "snapshot_of": shard.snapshot_of,
                        "inodes": s.inodes, "dirents": s.dirents,
                        "chunks": s.chunks, "bytes": s.bytes, "findings": s.findings
                    }))?;
                } else {
                    let verdict =
                        if s.findings == 0 { "clean".to_owned() } else { format!("{} FINDINGS", s.findings) };
                    out.line(format!(
                        "{name} (id {}): {verdict}: {} inodes, {} names, {} chunks, {}",
                        shard.id,
                        s.inodes,
                        s.dirents,
                        s.chunks,
                        size::human(s.bytes)
                    ))?;
                }
                return Ok(s);
            }
        }
    }
    Err(shardfs_proto::types::Error::unavailable("the check broke off before its summary").into())
}
