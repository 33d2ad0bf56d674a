//! `shardfs status`: the whole cluster on one screen.

use std::time::Duration;

use serde_json::json;
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::{NodeInfo, NodeStatus, ShardInfo};
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{self, Reason};

use super::{node, volume};
use crate::context::{Cluster, Context};
use crate::failure::{Failure, Result};
use crate::output::{Align, Out, Table, duration_text};
use crate::size;

/// How long a node is waited for: who asks how the cluster is wants to know that nobody answers.
const ANSWER_WAIT_MAX: Duration = Duration::from_secs(5);

/// `shardfs status`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  shardfs status
  shardfs status --json | jq .healthy")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Nodes with what each says of itself.
pub type Nodes = Vec<(NodeInfo, types::Result<NodeStatus>)>;

/// Asks every node for its status, at the same time.
pub async fn ask_nodes(client: &Client, nodes: Vec<NodeInfo>) -> Nodes {
    let ask = nodes.into_iter().map(|node| async move {
        let status = client.node_status(&node.endpoints).await;
        (node, status)
    });
    futures::future::join_all(ask).await
}

fn damaged(status: &NodeStatus) -> Vec<serde_json::Value> {
    status.damaged_shards.iter().map(|d| json!({ "id": d.id.get(), "error": d.error })).collect()
}

/// Reads from backups.
fn views(figures: &types::ViewFigures) -> serde_json::Value {
    json!({
        "published": figures.published,
        "publish_failures": figures.publish_failures,
        "opened": figures.opened,
        "open": figures.open,
        "answers": figures.answers,
        "refused_stale": figures.refused_stale,
        "refused_lost": figures.refused_lost,
        "refused_unreadable": figures.refused_unreadable,
        "devices_retired": figures.devices_retired,
        "sectors_written": figures.sectors_written,
    })
}

/// No node has answered.
fn nobody_answers(error: types::Error, cluster: &Cluster) -> Failure {
    let nobody = matches!(error.reason(), Reason::Unavailable | Reason::Deadline);
    let failure = Failure::from(error);
    match (&cluster.dir, nobody) {
        (_, false) => failure,
        (Some(dir), true) => failure.context("no node of the cluster answers").hint(format!(
            "`shardfs --dir {0} dev status` shows its processes, `shardfs --dir {0} dev start NODE` starts one",
            dir.display()
        )),
        (None, true) => failure
            .context("no node of the cluster answers")
            .hint("see whether shardfs-node runs at these addresses, and what its log says"),
    }
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let cluster = context.cluster()?;
    let client = context.client_within(ANSWER_WAIT_MAX)?;
    let (nodes, volumes, shards) = tokio::join!(client.nodes(), client.volumes(), client.all_shards(false));
    let nodes = nodes.map_err(|error| nobody_answers(error, &cluster))?;
    let (nodes, volumes, shards) = (ask_nodes(&client, nodes).await, volumes?, shards?);
    let served = volume::served(&nodes);
    let cluster_id =
        nodes.iter().find_map(|(_, s)| s.as_ref().ok().map(|s| s.cluster_id.clone())).unwrap_or_default();

    let mut troubles = Vec::new();
    for (info, status) in &nodes {
        match status {
            Err(e) => troubles.push(format!("{}: {e}", info.id)),
            Ok(status) if !status.store_reachable => {
                troubles.push(format!("{}: does not reach the metadata store", info.id));
            }
            Ok(_) if !info.alive => troubles.push(format!("{}: its heartbeat stands still", info.id)),
            Ok(_) => {}
        }
        for damaged in status.iter().flat_map(|s| &s.damaged_shards) {
            let what =
                damaged.error.strip_prefix(&format!("shard {}: ", damaged.id)).unwrap_or(&damaged.error);
            troubles.push(format!("{}: shard {} is damaged: {what}", info.id, damaged.id));
        }
    }
    for v in &volumes {
        match served.get(&v.id) {
            None => troubles.push(format!("{}: no node serves it", v.id)),
            Some(s) if !s.trouble.is_empty() => troubles.push(format!("{}: {}", v.id, s.trouble)),
            Some(s) if volume::is_full(s) => troubles.push(format!(
                "{}: full: writes are refused until something is deleted, or its shards are elsewhere",
                v.id
            )),
            Some(_) => {}
        }
    }
    let count = |state: ShardState| shards.iter().filter(|s: &&ShardInfo| s.state == state).count();

    let mut out = Out::new();
    if args.json {
        let nodes = nodes.iter().map(|(info, status)| {
            let mut value = node::to_json(info);
            value["status"] = match status {
                Ok(s) => json!({
                    "uptime_ms": s.uptime_ms,
                    "open_shards": s.open_shards,
                    "open_shards_max": s.open_shards_max,
                    "block_cache_used_bytes": s.block_cache_used_bytes,
                    "block_cache_capacity_bytes": s.block_cache_capacity_bytes,
                    "write_buffer_used_bytes": s.write_buffer_used_bytes,
                    "store_reachable": s.store_reachable,
                    "damaged_shards": damaged(s),
                    "views": views(&s.views),
                }),
                Err(e) => json!({ "error": e.message() }),
            };
            value
        });
        out.json(&json!({
            "healthy": troubles.is_empty(),
            "troubles": troubles,
            "cluster_id": cluster_id,
            "nodes": nodes.collect::<Vec<_>>(),
            "volumes": volumes.iter().map(|v| volume::to_json(v, served.get(&v.id).copied())).collect::<Vec<_>>(),
            "shards": {
                "active": count(ShardState::Active),
                "read_only": count(ShardState::ReadOnly),
                "creating": count(ShardState::Creating),
            },
        }))?;
        return out.flush();
    }
    let (active, closed) = (count(ShardState::Active), count(ShardState::ReadOnly));
    let answering = nodes.iter().filter(|(_, s)| s.is_ok()).count();
    out.line(format!("cluster   {cluster_id} ({})", cluster.found_by))?;
    out.line(format!("health    {}", if troubles.is_empty() { "in order" } else { "IN TROUBLE" }))?;
    for trouble in &troubles {
        out.line(format!("          {trouble}"))?;
    }
    out.line(format!("nodes     {answering} of {} answer", nodes.len()))?;
    out.line(format!("shards    {active} active, {closed} closed"))?;
    out.line("")?;
    let mut table = Table::new(&[
        ("NODE", Align::Left),
        ("STATE", Align::Left),
        ("UP", Align::Left),
        ("OPEN SHARDS", Align::Right),
        ("BLOCK CACHE", Align::Right),
        ("ADDRESS", Align::Left),
    ]);
    for (info, status) in &nodes {
        let address = info.endpoints.first().cloned().unwrap_or_default();
        match status {
            Ok(s) => table.row(vec![
                info.id.to_string(),
                node::state(info).to_owned(),
                duration_text(s.uptime_ms),
                format!("{} of {}", s.open_shards, s.open_shards_max),
                format!(
                    "{} of {}",
                    size::human(s.block_cache_used_bytes),
                    size::human(s.block_cache_capacity_bytes)
                ),
                address,
            ]),
            Err(_) => {
                table.row(vec![
                    info.id.to_string(),
                    "down".into(),
                    "-".into(),
                    "-".into(),
                    "-".into(),
                    address,
                ]);
            }
        }
    }
    out.bytes(table.render().as_bytes())?;
    out.line("")?;
    out.bytes(volume::table(&volumes, &served).as_bytes())?;
    out.flush()
}
