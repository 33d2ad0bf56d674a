//! `shardfs shard`: shards as such.

use std::collections::HashSet;

use clap::Subcommand;
use serde_json::{Value, json};
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::{NewShard, ShardInfo};
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{Reason, ShardName};

use super::remote::find_shard;
use super::status::ask_nodes;
use crate::context::Context;
use crate::failure::{Failure, OrFail, Result};
use crate::output::{self, Align, Out, Table, time_json, time_text};
use crate::paths::{ShardRef, info_text, shard_name, shard_ref};
use crate::size;

mod snapshots;

/// Shards whose usage is asked for at a time.
const USAGE_JOBS: usize = 16;

/// How long a usage is waited for.
const USAGE_MAX: std::time::Duration = std::time::Duration::from_secs(5);

/// `shardfs shard`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  shardfs shard create photos --limit 2GiB
  shardfs shard list
  shardfs shard close photos          nothing in it changes ever again
  shardfs shard delete photos --force

  shardfs shard snapshot photos monday          keeps photos as it is now
  shardfs ls photos/.snap/monday                reads it; on the mount as well
  shardfs shard rollback photos monday --yes    photos is as it was then
  shardfs shard clone photos/.snap/monday old   a shard of its own, to write to
  shardfs shard delete photos/.snap/monday

SHARD is a name, or @ID. A snapshot is SHARD/.snap/NAME; SHARD@NAME does too, unless a shard has that very name.")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

impl Args {
    /// Whether it changes something in the cluster.
    pub fn changes(&self) -> bool {
        !matches!(self.command, Command::List { .. } | Command::Show { .. } | Command::Snapshots { .. })
    }
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Make a shard
    Create {
        /// Its name: 1 to 255 bytes without `/`
        #[arg(value_parser = shard_name)]
        name: ShardName,
        /// Limit on its bytes, e.g. 2GiB [default: the cluster's]
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        limit: Option<u64>,
        /// Permission bits of its root directory, octal
        #[arg(long, value_name = "MODE", default_value = "0755", value_parser = parse_mode)]
        mode: u32,
        /// Owner of its root directory [default: you]
        #[arg(long)]
        uid: Option<u32>,
        /// Group of its root directory [default: yours]
        #[arg(long)]
        gid: Option<u32>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List shards
    #[command(visible_alias = "ls")]
    List {
        /// Those of all client ids
        #[arg(long, short = 'a')]
        all_owners: bool,
        /// Also deleted ones
        #[arg(long)]
        deleted: bool,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one shard or snapshot
    Show {
        /// A name, or @ID, or SHARD/.snap/NAME
        #[arg(value_parser = shard_ref)]
        shard: ShardRef,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Close a shard for good: it can be read, and never changes again
    Close {
        /// A name, or @ID
        #[arg(value_parser = shard_ref)]
        shard: ShardRef,
    },
    /// Give a shard another name
    Rename {
        /// A name, or @ID
        #[arg(value_parser = shard_ref)]
        shard: ShardRef,
        /// The new name
        #[arg(value_parser = shard_name)]
        new_name: ShardName,
    },
    /// Delete a shard and everything in it, or a snapshot
    Delete {
        /// A name, or @ID, or SHARD/.snap/NAME
        #[arg(value_parser = shard_ref)]
        shard: ShardRef,
        /// Even if it is not empty; a snapshot needs no such word
        #[arg(long, short)]
        force: bool,
        /// Do not ask
        #[arg(long, short)]
        yes: bool,
    },
    /// Keep a shard as it is now, under a name: at once, and without a copy of its bytes
    #[command(after_help = snapshots::SNAPSHOT_HELP)]
    Snapshot {
        /// A name, or @ID
        #[arg(value_parser = shard_ref)]
        shard: ShardRef,
        /// The snapshot's name among the shard's
        #[arg(value_parser = shard_name)]
        name: ShardName,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// List a shard's snapshots
    Snapshots {
        /// A name, or @ID
        #[arg(value_parser = shard_ref)]
        shard: ShardRef,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Put a shard back to one of its snapshots: what was written since is lost
    #[command(after_help = snapshots::ROLLBACK_HELP)]
    Rollback {
        /// A name, or @ID
        #[arg(value_parser = shard_ref)]
        shard: ShardRef,
        /// One of its snapshots
        #[arg(value_parser = shard_name)]
        snapshot: ShardName,
        /// What was written since the snapshot may be lost
        #[arg(long, short)]
        yes: bool,
    },
    /// Make a shard with the content of another one or of a snapshot, sharing its blocks
    #[command(after_help = snapshots::CLONE_HELP)]
    Clone {
        /// A name, or @ID, or SHARD/.snap/NAME
        #[arg(value_parser = shard_ref)]
        source: ShardRef,
        /// The new shard's name
        #[arg(value_parser = shard_name)]
        new_name: ShardName,
        /// Limit on its bytes, e.g. 2GiB [default: as the source's]
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        limit: Option<u64>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

/// Permission bits in octal, with or without a leading 0.
pub fn parse_mode(text: &str) -> std::result::Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    match u32::from_str_radix(digits, 8) {
        Ok(mode) if mode <= 0o7777 => Ok(mode),
        _ => Err("write permission bits in octal, 0 to 7777, e.g. 0755".to_owned()),
    }
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    match args.command {
        Command::Create { name, limit, mode, uid, gid, json } => {
            let new = NewShard {
                name,
                limit_bytes: limit.filter(|l| *l > 0),
                mode,
                uid: uid.unwrap_or_else(|| rustix::process::geteuid().as_raw()),
                gid: gid.unwrap_or_else(|| rustix::process::getegid().as_raw()),
                request_id: format!("{:032x}", fastrand::u128(..)),
            };
            let info = context.client()?.new_shard(&new).await?;
            let mut out = Out::new();
            if json {
                out.json(&to_json(&info))?;
            } else {
                out.line(format!("{} (id {}) on {}", info.name, info.id, place(&info)))?;
            }
            out.flush()
        }
        Command::List { all_owners, deleted, json } => list(context, all_owners, deleted, json).await,
        Command::Show { shard, json } => show(context, &shard, json).await,
        Command::Close { shard } => {
            let client = context.client()?;
            let info = find_shard(&client, &shard).await?;
            let info = client.close_shard(info.id).await.with_context(|| shard.to_string())?;
            done(format!("{} is {}", info.name, info.state.as_str()))
        }
        Command::Rename { shard, new_name } => {
            let client = context.client()?;
            let info = find_shard(&client, &shard).await?;
            let old = info.name.clone();
            let info = client.rename_shard(info.id, &new_name).await.with_context(|| shard.to_string())?;
            done(format!("{old} is {} now", info.name))
        }
        Command::Delete { shard, force, yes } => delete(context, &shard, force, yes).await,
        Command::Snapshot { shard, name, json } => snapshots::take(context, &shard, &name, json).await,
        Command::Snapshots { shard, json } => snapshots::list(context, &shard, json).await,
        Command::Rollback { shard, snapshot, yes } => {
            snapshots::roll_back(context, &shard, &snapshot, yes).await
        }
        Command::Clone { source, new_name, limit, json } => {
            snapshots::clone(context, &source, new_name, limit, json).await
        }
    }
}

fn done(text: String) -> Result<()> {
    let mut out = Out::new();
    out.line(text)?;
    out.flush()
}

async fn list(context: &Context, all_owners: bool, deleted: bool, json: bool) -> Result<()> {
    use futures::StreamExt;
    let client = context.client()?;
    let shards =
        if all_owners { client.all_shards(deleted).await? } else { client.list_shards_with(deleted).await? };
    // Only primaries know the usage, and tell it to owners only. One that is down leaves a blank.
    let nodes = ask_nodes(&client, client.nodes().await.unwrap_or_default()).await;
    let answering: HashSet<_> = nodes.into_iter().filter(|(_, s)| s.is_ok()).map(|(n, _)| n.id).collect();
    let (client, answering) = (&client, &answering);
    let shards: Vec<ShardInfo> = futures::stream::iter(shards)
        .map(|info| async move {
            let usable = matches!(info.state, ShardState::Active | ShardState::ReadOnly);
            let reachable = info.location.node.as_ref().is_some_and(|n| answering.contains(n));
            let mine = info.owner == *client.client_id();
            if !(usable && reachable && mine) || info.used_bytes.is_some() {
                return info;
            }
            with_usage(client, info).await
        })
        .buffered(USAGE_JOBS)
        .collect()
        .await;
    let mut out = Out::new();
    if json {
        out.json(&shards.iter().map(to_json).collect::<Vec<_>>())?;
        return out.flush();
    }
    let mut columns = vec![("ID", Align::Right), ("NAME", Align::Left)];
    if all_owners {
        columns.push(("OWNER", Align::Left));
    }
    columns.extend([
        ("STATE", Align::Left),
        ("FILES", Align::Right),
        ("USED", Align::Right),
        ("LIMIT", Align::Right),
        ("ON", Align::Left),
        ("CREATED", Align::Left),
    ]);
    let mut table = Table::new(&columns);
    for info in &shards {
        let mut row = vec![info.id.to_string(), info_text(info)];
        if all_owners {
            row.push(info.owner.to_string());
        }
        row.extend([
            info.state.as_str().to_owned(),
            info.inodes.map_or_else(|| "-".to_owned(), |i| i.to_string()),
            info.used_bytes.map_or_else(|| "-".to_owned(), size::human),
            info.limit_bytes.map_or_else(|| "-".to_owned(), size::human),
            place(info),
            time_text(info.created),
        ]);
        table.row(row);
    }
    if shards.is_empty() && out.is_terminal() {
        output::note("no shards yet: `shardfs shard create NAME`, or mkdir at the top of the mount");
    } else {
        out.bytes(table.render().as_bytes())?;
    }
    out.flush()
}

/// With what its primary says it holds, if that answers soon.
async fn with_usage(client: &Client, info: ShardInfo) -> ShardInfo {
    match tokio::time::timeout(USAGE_MAX, client.shard(info.id)).await {
        Ok(Ok(used)) => used,
        Ok(Err(_)) | Err(_) => info,
    }
}

async fn show(context: &Context, shard: &ShardRef, json: bool) -> Result<()> {
    let client = context.client()?;
    let info = find_shard(&client, shard).await?;
    let info = with_usage(&client, info).await;
    let mut out = Out::new();
    if json {
        out.json(&to_json(&info))?;
        return out.flush();
    }
    out.line(format!("name      {}", output::printable(info.name.as_str().as_bytes())))?;
    out.line(format!("id        {}", info.id))?;
    if let Some(of) = info.snapshot_of {
        out.line(format!("snapshot  of shard {of}"))?;
    }
    out.line(format!("owner     {}", info.owner))?;
    out.line(format!("state     {}", info.state.as_str()))?;
    if let (Some(used), Some(inodes)) = (info.used_bytes, info.inodes) {
        out.line(format!("used      {} ({used} bytes) in {inodes} inodes", size::human(used)))?;
    }
    out.line(format!(
        "limit     {}",
        info.limit_bytes.map_or_else(|| "the volume's room".to_owned(), size::human)
    ))?;
    out.line(format!("created   {} UTC", time_text(info.created)))?;
    out.line(format!("on        {}, epoch {}", place(&info), info.location.epoch))?;
    for endpoint in &info.location.endpoints {
        out.line(format!("          {endpoint}"))?;
    }
    out.flush()
}

async fn delete(context: &Context, shard: &ShardRef, force: bool, yes: bool) -> Result<()> {
    let client = context.client()?;
    let info = find_shard(&client, shard).await?;
    let info = with_usage(&client, info).await;
    if !yes {
        let content = match (info.used_bytes, info.inodes) {
            (Some(used), Some(inodes)) => format!("{inodes} inodes, {}", size::human(used)),
            _ => "its content".to_owned(),
        };
        let question = if info.snapshot_of.is_some() {
            format!("Delete the snapshot {}?", info_text(&info))
        } else if force {
            format!("Delete the shard {} with {content}, for good?", info.name)
        } else {
            format!("Delete the shard {} if it is empty?", info.name)
        };
        if output::confirm(&question)? == Some(false) {
            return Err(Failure::new("nothing was deleted"));
        }
    }
    let only_if_empty = !force && info.snapshot_of.is_none();
    client.delete_shard(info.id, only_if_empty).await.map_err(|error| {
        let is_full = error.reason() == Reason::ShardNotEmpty;
        let failure = Failure::from(error).context(shard);
        // Said here alone: a volume that holds shards is not empty either, and nothing forces that.
        if is_full { failure.hint("`--force` deletes the shard with everything in it") } else { failure }
    })?;
    done(format!("{} is deleted", info_text(&info)))
}

/// "vol-1 (node-1)".
fn place(info: &ShardInfo) -> String {
    match &info.location.node {
        Some(node) => format!("{} ({node})", info.location.volume),
        None => format!("{} (no node)", info.location.volume),
    }
}

/// As JSON.
pub fn to_json(info: &ShardInfo) -> Value {
    json!({
        "id": info.id,
        "name": info.name.as_str(),
        "owner": info.owner,
        "state": info.state.as_str(),
        "snapshot_of": info.snapshot_of,
        "limit_bytes": info.limit_bytes,
        "used_bytes": info.used_bytes,
        "inodes": info.inodes,
        "created": time_json(info.created),
        "volume": info.location.volume,
        "node": info.location.node,
        "epoch": info.location.epoch,
        "endpoints": info.location.endpoints,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_parse() {
        assert_eq!(parse_mode("0755"), Ok(0o755));
        assert_eq!(parse_mode("644"), Ok(0o644));
        assert_eq!(parse_mode("0o7777"), Ok(0o7777));
        for bad in ["", "8", "10000", "rwx", "-1"] {
            assert!(parse_mode(bad).is_err(), "{bad:?}");
        }
    }
}
