//! `shardfs volume`: the cluster's volumes.

use std::collections::HashMap;

use clap::Subcommand;
use serde_json::{Value, json};
use shardfs_proto::types::cluster::{VolumeInfo, VolumeStatus};
use shardfs_proto::types::{NodeId, VolumeId};

use super::status::{Nodes, ask_nodes};
use crate::context::Context;
use crate::failure::Result;
use crate::output::{Align, Out, Table};
use crate::size;

/// `shardfs volume`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// List the volumes
    #[command(visible_alias = "ls")]
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Have a volume served by one of its backups
    ///
    /// Its primary flushes, stops serving and hands over; programs on mounts see a short pause. The volume stays
    /// where it was put: only a failure moves it again.
    #[command(after_help = "Example:\n  shardfs volume promote vol-1 node-2")]
    Promote {
        /// Which (see `shardfs volume list`)
        volume: VolumeId,
        /// By which node
        node: NodeId,
    },
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let client = context.client()?;
    let json = match args.command {
        Command::List { json } => json,
        Command::Promote { volume, node } => {
            let moved = client.promote_volume(&volume, &node).await?;
            let mut out = Out::new();
            out.line(format!("{volume} is served by {node} under epoch {}", moved.epoch))?;
            return out.flush();
        }
    };
    let (volumes, nodes) = tokio::join!(client.volumes(), client.nodes());
    let (volumes, nodes) = (volumes?, ask_nodes(&client, nodes?).await);
    let served = served(&nodes);
    let mut out = Out::new();
    if json {
        out.json(&volumes.iter().map(|v| to_json(v, served.get(&v.id).copied())).collect::<Vec<_>>())?;
    } else {
        out.bytes(table(&volumes, &served).as_bytes())?;
    }
    out.flush()
}

/// What the nodes that serve them say of the volumes.
pub fn served(nodes: &Nodes) -> HashMap<VolumeId, &VolumeStatus> {
    nodes
        .iter()
        .filter_map(|(_, status)| status.as_ref().ok())
        .flat_map(|s| &s.volumes)
        .map(|v| (v.id.clone(), v))
        .collect()
}

/// For people.
pub fn table(volumes: &[VolumeInfo], served: &HashMap<VolumeId, &VolumeStatus>) -> String {
    let mut table = Table::new(&[
        ("VOLUME", Align::Left),
        ("KIND", Align::Left),
        ("PRIMARY", Align::Left),
        ("BACKUPS", Align::Left),
        ("EPOCH", Align::Right),
        ("SHARDS", Align::Right),
        ("USED", Align::Right),
        ("SIZE", Align::Right),
        ("STATE", Align::Left),
    ]);
    for volume in volumes {
        let status = served.get(&volume.id);
        let (used, total) = match status {
            Some(s) => (size::human(s.total_bytes.saturating_sub(s.free_bytes)), size::human(s.total_bytes)),
            None => (
                "-".to_owned(),
                if volume.size_bytes == 0 { "-".to_owned() } else { size::human(volume.size_bytes) },
            ),
        };
        table.row(vec![
            volume.id.to_string(),
            volume.provider.clone(),
            volume.primary.as_ref().map_or_else(|| "-".to_owned(), ToString::to_string),
            if volume.backups.is_empty() {
                "-".to_owned()
            } else {
                volume.backups.iter().map(NodeId::as_str).collect::<Vec<_>>().join(" ")
            },
            volume.epoch.to_string(),
            volume.shards.to_string(),
            used,
            total,
            match status {
                Some(s) if s.trouble.is_empty() => "served".to_owned(),
                Some(s) => s.trouble.clone(),
                None => "not served".to_owned(),
            },
        ]);
    }
    table.render()
}

/// As JSON.
pub fn to_json(volume: &VolumeInfo, status: Option<&VolumeStatus>) -> Value {
    json!({
        "id": volume.id,
        "provider": volume.provider,
        "source": volume.source,
        "size_bytes": volume.size_bytes,
        "primary": volume.primary,
        "backups": volume.backups,
        "epoch": volume.epoch,
        "target": volume.target,
        "shards": volume.shards,
        "served": status.map(|s| json!({
            "total_bytes": s.total_bytes,
            "free_bytes": s.free_bytes,
            "device": s.source,
            "mount_point": s.mount_point,
            "trouble": (!s.trouble.is_empty()).then_some(&s.trouble),
        })),
    })
}
