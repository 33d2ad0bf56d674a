//! `shardfs volume`: the cluster's volumes.

use std::collections::HashMap;
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};
use shardfs_proto::types::cluster::{NewVolume, VolumeInfo, VolumeStatus};
use shardfs_proto::types::{NodeId, VolumeId};

use super::status::{Nodes, ask_nodes};
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output::{Align, Out, Table};
use crate::size;

/// A volume with less room than this is full: a value of one message may not fit.
const FULL_BELOW_BYTES: u64 = 4 << 20;

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
    /// Add a volume to the cluster
    ///
    /// The first of its nodes makes and serves it, the others stand by and take over. Kinds: `device`, a whole block device
    /// that all its nodes attach, fenced by persistent reservations (`shardfs doctor` says whether it can be); `loop`, a file
    /// that all its nodes reach; `dir`, a folder. A device that holds anything is refused, not formatted.
    #[command(after_help = "Examples:
  shardfs volume add vol-9 --source /dev/disk/by-id/nvme-vol0a1b --nodes node-1,node-2
  shardfs volume add vol-9 --kind loop --source /srv/vol-9.img --size 10GiB --nodes node-1

A node on which a device has another path is told so: shardfs-node --device vol-9=/dev/sdb")]
    Add {
        /// Its id, new in the cluster
        volume: VolumeId,
        /// What it is
        #[arg(long, value_enum, default_value = "device")]
        kind: Kind,
        /// The device, file or folder, as its nodes know it
        #[arg(long, value_name = "PATH")]
        source: PathBuf,
        /// Bytes of a file that is to be made, such as 10GiB
        #[arg(long, value_name = "BYTES", value_parser = size::parse, default_value = "0", hide_default_value = true)]
        size: u64,
        /// Its nodes; the first one serves it at first
        #[arg(long, value_name = "NODE,...", value_delimiter = ',', required = true)]
        nodes: Vec<NodeId>,
        /// Serve it even if nothing keeps an old primary from writing to it, which can destroy it
        #[arg(long)]
        allow_unfenced: bool,
    },
    /// Have a volume served by one of its backups
    ///
    /// Its primary flushes, stops serving and hands over; programs on mounts see a short pause. Ends when the node serves it,
    /// or with what keeps it from that. The volume stays where it was put: only a failure moves it again.
    #[command(after_help = "Example:\n  shardfs volume promote vol-1 node-2")]
    Promote {
        /// Which (see `shardfs volume list`)
        volume: VolumeId,
        /// By which node
        node: NodeId,
    },
}

/// Kinds of volumes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Kind {
    /// A whole block device
    Device,
    /// A file, which nodes attach as a loop device
    Loop,
    /// A folder
    Dir,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Kind::Device => "device",
            Kind::Loop => "loop",
            Kind::Dir => "dir",
        }
    }
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let client = context.client()?;
    let json = match args.command {
        Command::List { json } => json,
        Command::Add { volume, kind, source, size, nodes, allow_unfenced } => {
            let source = source
                .into_os_string()
                .into_string()
                .map_err(|source| Failure::usage(format!("--source {}: not UTF-8", source.display())))?;
            let provider = kind.as_str().to_owned();
            let new = NewVolume { id: volume, provider, source, size_bytes: size, nodes, allow_unfenced };
            let added = client.add_volume(&new).await?;
            let mut out = Out::new();
            out.line(format!(
                "{} is a volume of the cluster, epoch {}; `shardfs volume list` shows when it is served",
                added.id, added.epoch
            ))?;
            return out.flush();
        }
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
                Some(s) if is_full(s) => "full".to_owned(),
                Some(s) if s.trouble.is_empty() => "served".to_owned(),
                Some(s) => s.trouble.clone(),
                None => "not served".to_owned(),
            },
        ]);
    }
    table.render()
}

/// Whether it is served, and has no room that shards could use.
pub fn is_full(status: &VolumeStatus) -> bool {
    status.trouble.is_empty() && status.total_bytes > 0 && status.free_bytes < FULL_BELOW_BYTES
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
