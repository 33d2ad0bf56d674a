//! `shardfs node`: the cluster's nodes.

use clap::Subcommand;
use serde_json::{Value, json};
use shardfs_proto::types::cluster::NodeInfo;

use crate::context::Context;
use crate::failure::Result;
use crate::output::{Align, Out, Table, time_json, time_text};

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
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let Command::List { json } = args.command;
    let nodes = context.client()?.nodes().await?;
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

/// `alive` or `silent`.
pub fn state(node: &NodeInfo) -> &'static str {
    if node.alive { "alive" } else { "silent" }
}

/// As JSON.
pub fn to_json(node: &NodeInfo) -> Value {
    json!({
        "id": node.id,
        "alive": node.alive,
        "endpoints": node.endpoints,
        "http_address": node.http_address,
        "version": node.version,
        "heartbeat": node.heartbeat,
        "started": time_json(node.started),
    })
}
