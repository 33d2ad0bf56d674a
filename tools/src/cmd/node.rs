//! `shardfs node`: the cluster's nodes.

use std::time::Duration;

use clap::Subcommand;
use serde_json::{Value, json};
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::NodeInfo;
use shardfs_proto::types::{NodeId, VolumeId, clock};

use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output::{Align, Out, Table, time_json, time_text};

/// How long a drained node's volumes are waited for, and how often is looked.
const DRAIN_WAIT_MAX: Duration = Duration::from_secs(30);
const DRAIN_PAUSE: Duration = Duration::from_millis(100);

/// `shardfs node`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// List the nodes
    #[command(visible_alias = "ls")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Hand the volumes of a node over to others, and give it none
    ///
    /// For maintenance: the node goes on running and stands by. `--undo` lets it serve again.
    #[command(after_help = "Examples:\n  shardfs node drain node-1\n  shardfs node drain node-1 --undo")]
    Drain {
        /// Which (see `shardfs node list`)
        node: NodeId,
        /// Let it serve again
        #[arg(long)]
        undo: bool,
    },
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let client = context.client()?;
    let json = match args.command {
        Command::List { json } => json,
        Command::Drain { node, undo } => return drain(&client, &node, !undo).await,
    };
    let nodes = client.nodes().await?;
    let mut out = Out::new();
    if json {
        out.json(&nodes.iter().map(to_json).collect::<Vec<_>>())?;
        return out.flush();
    }
    let mut table = Table::new(&[
        ("NODE", Align::Left),
        ("STATE", Align::Left),
        ("STARTED", Align::Left),
        ("VERSION", Align::Left),
        ("ADDRESSES", Align::Left),
        ("HTTP", Align::Left),
    ]);
    for node in &nodes {
        table.row(vec![
            node.id.to_string(),
            state(node).to_owned(),
            time_text(node.started),
            node.version.clone(),
            node.endpoints.join(" "),
            node.http_address.clone(),
        ]);
    }
    out.bytes(table.render().as_bytes())?;
    out.flush()
}

async fn drain(client: &Client, node: &NodeId, drain: bool) -> Result<()> {
    client.drain_node(node, drain).await?;
    let mut out = Out::new();
    if !drain {
        out.line(format!("{node} may serve again"))?;
        return out.flush();
    }
    let deadline = clock::monotonic() + DRAIN_WAIT_MAX;
    let mut told = false;
    loop {
        let left: Vec<VolumeId> = client
            .volumes()
            .await?
            .into_iter()
            .filter(|v| v.primary.as_ref() == Some(node))
            .map(|v| v.id)
            .collect();
        if left.is_empty() {
            out.line(format!(
                "{node} serves nothing and gets nothing; `shardfs node drain {node} --undo` ends that"
            ))?;
            return out.flush();
        }
        if clock::monotonic() >= deadline {
            let left: Vec<&str> = left.iter().map(VolumeId::as_str).collect();
            return Err(Failure::new(format!(
                "{node} is drained, and still serves {}: nobody else can take it",
                left.join(", ")
            ))
            .hint(format!(
                "it is handed over as soon as one of its backups is alive and not drained (`shardfs volume list`); `shardfs node \
                 drain {node} --undo` lets {node} keep it"
            )));
        }
        if !told {
            told = true;
            crate::output::note(format!(
                "{node} hands over {}",
                crate::output::count(left.len() as u64, "volume")
            ));
        }
        tokio::time::sleep(DRAIN_PAUSE).await;
    }
}

/// In a word.
pub fn state(node: &NodeInfo) -> &'static str {
    match (node.alive, node.dead, node.draining) {
        (_, true, _) => "dead",
        (false, false, _) => "silent",
        (true, false, true) => "draining",
        (true, false, false) => "alive",
    }
}

/// As JSON.
pub fn to_json(node: &NodeInfo) -> Value {
    json!({
        "id": node.id,
        "alive": node.alive,
        "dead": node.dead,
        "draining": node.draining,
        "endpoints": node.endpoints,
        "http_address": node.http_address,
        "version": node.version,
        "heartbeat": node.heartbeat,
        "started": time_json(node.started),
    })
}
