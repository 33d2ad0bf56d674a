//! `shardfs volume`: the cluster's volumes.

use std::collections::HashMap;
use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};
use serde_json::{Value, json};
use shardfs_proto::types::cluster::{NewVolume, VolumeInfo, VolumeStatus};
use shardfs_proto::types::{NodeId, VolumeId};

use super::backup;
use super::status::{Nodes, ask_nodes};
use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output::{Align, Out, Table};
use crate::size;

mod policy;
mod strays;

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
    /// Show one volume: where it is, who stands by, how much room it has
    #[command(after_help = "Example:\n  shardfs volume show vol-1")]
    Show {
        /// Which (see `shardfs volume list`)
        volume: VolumeId,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Add a volume to the cluster
    ///
    /// The first of its nodes makes and serves it, the others stand by and take over. Kinds: `device`, a whole block device
    /// that all its nodes attach, fenced by persistent reservations (`shardfs doctor` says whether it can be); `aws`, an EBS io2 volume
    /// that is made, and attached to the nodes' instances; `loop`, a file that all its nodes reach; `dir`, a folder. A device that holds
    /// anything is refused, not formatted.
    #[command(visible_alias = "create")]
    #[command(after_help = "Examples:
  shardfs volume add vol-9 --kind aws --size 200GiB --iops 6000 --nodes node-1,node-2,node-3
  shardfs volume add vol-9 --source /dev/disk/by-id/wwn-0x6001405aa0001 --nodes node-1,node-2
  shardfs volume add vol-9 --kind loop --source /srv/vol-9.img --size 10GiB --nodes node-1

A node on which a device has another path is told so: shardfs-node --device vol-9=/dev/sdb")]
    Add {
        /// Its id, new in the cluster
        volume: VolumeId,
        /// What it is
        #[arg(long, value_enum, default_value = "device")]
        kind: Kind,
        /// The device, file or folder, as its nodes know it; of kind aws: an EBS volume that is there (vol-...), else one is made
        #[arg(long, value_name = "PATH", required_unless_present_any = ["iops", "size"])]
        source: Option<PathBuf>,
        /// Bytes of a file or EBS volume that is to be made, such as 10GiB
        #[arg(long, value_name = "BYTES", value_parser = size::parse, default_value = "0", hide_default_value = true)]
        size: u64,
        /// Its nodes; the first one serves it at first
        #[arg(long, value_name = "NODE,...", value_delimiter = ',', required = true)]
        nodes: Vec<NodeId>,
        /// Serve it even if nothing keeps an old primary from writing to it, which can destroy it
        #[arg(long)]
        allow_unfenced: bool,
        /// Of an EBS volume that is to be made: reads and writes a second [default: 10 for every GiB, at least 3000]
        #[arg(long, value_name = "N", default_value = "0", hide_default_value = true)]
        iops: u32,
        /// Encrypt an EBS volume that is to be made, with the account's default key [default: as the account has it]
        #[arg(long)]
        encrypted: bool,
        /// Encrypt it with this key: its id, ARN, or alias/NAME
        #[arg(long, value_name = "KEY")]
        kms_key: Option<String>,
    },
    /// Give a volume of kind `aws` other IOPS while it is used
    ///
    /// EBS allows the next change of a volume, also of its size, after six hours.
    #[command(after_help = "Example:\n  shardfs volume iops vol-1 10000")]
    Iops {
        /// Which (see `shardfs volume list`)
        volume: VolumeId,
        /// Reads and writes a second: 100 to 256000, and 1000 for each GiB at most
        iops: u32,
    },
    /// List what the cloud has of this cluster and no volume accounts for
    ///
    /// Disks of no volume, volumes whose making was cut off, and machines that have a disk but are no node of its volume or do not run.
    /// Nothing of it is removed by itself; `--remove` removes one. A disk that is deleted takes its content with it.
    #[command(after_help = "Examples:
  shardfs volume strays
  shardfs volume strays --remove vol-0a1b2c3d4e5f60718
  shardfs volume strays --remove vol-0a1b2c3d4e5f60718=i-0a1b2c3d4e5f60718 --force   # its machine is dead for certain")]
    Strays {
        /// Remove this one: DISK deletes a disk, DISK=MACHINE detaches it from a machine, VOLUME gives up one whose making was cut off
        #[arg(long, value_name = "STRAY")]
        remove: Option<String>,
        /// Detach although the machine does not let go: only if it can write no more
        #[arg(long, requires = "remove")]
        force: bool,
        /// Print JSON
        #[arg(long, conflicts_with = "remove")]
        json: bool,
    },
    /// Have another node stand by for a volume
    ///
    /// From then on it takes the volume over when its primary fails, and can be promoted.
    #[command(after_help = "Example:\n  shardfs volume attach vol-1 node-4")]
    Attach {
        /// Which (see `shardfs volume list`)
        volume: VolumeId,
        /// The node; it must reach what the volume is made of
        node: NodeId,
    },
    /// Have a node stand by for a volume no more
    ///
    /// The node that serves it cannot be detached: `shardfs volume promote` gives it to another one first.
    #[command(after_help = "Example:\n  shardfs volume detach vol-1 node-3")]
    Detach {
        /// Which (see `shardfs volume list`)
        volume: VolumeId,
        /// The node
        node: NodeId,
    },
    /// Make a volume larger while it is used
    ///
    /// Of kind `loop` and `aws`: to the size given. Of kind `device`: to the size that the device has by now, so enlarge that first. Volumes
    /// never shrink. May be repeated: what was cut off goes on.
    #[command(after_help = "Examples:
  shardfs volume grow vol-9 --size 200GiB
  shardfs volume grow vol-1                   # a device that was enlarged")]
    Grow {
        /// Which (see `shardfs volume list`)
        volume: VolumeId,
        /// The new size of a volume of kind `loop` or `aws`, such as 200GiB
        #[arg(long, value_name = "BYTES", value_parser = size::parse, default_value = "0", hide_default_value = true)]
        size: u64,
    },
    /// Take a snapshot of a whole volume while it is used; the same as `shardfs backup create`
    #[command(after_help = "Example:\n  shardfs volume snapshot vol-1")]
    Snapshot(backup::CreateArgs),
    /// Make a volume of such a snapshot; the same as `shardfs backup restore`
    #[command(after_help = "Examples:
  shardfs volume restore 20261129T195900Z-1f3a5c7e9b2d4f60 --volume vol-9 --nodes node-2,node-3
  shardfs volume restore 20261129T195900Z-1f3a5c7e9b2d4f60 --in-place")]
    Restore(backup::RestoreArgs),
    /// Take a volume without shards out of the cluster
    ///
    /// Its nodes let go of it. The backing file of a volume of kind `loop` and the EBS volume of one of kind `aws` are deleted; devices and
    /// folders are left as they are.
    #[command(after_help = "Examples:
  shardfs volume delete vol-9
  shardfs volume delete vol-9 --keep          # and leave its file where it is")]
    Delete {
        /// Which (see `shardfs volume list`)
        volume: VolumeId,
        /// Leave the backing file or EBS volume where it is
        #[arg(long)]
        keep: bool,
    },
    /// Have the cluster add volumes of kind `aws` by itself when it runs out of room
    ///
    /// Without a command: shows the policy, what it would do now, and why.
    #[command(after_help = policy::EXAMPLES)]
    Policy(policy::Args),
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
    /// An EBS volume (io2 with Multi-Attach)
    Aws,
}

impl Kind {
    fn as_str(self) -> &'static str {
        match self {
            Kind::Device => "device",
            Kind::Loop => "loop",
            Kind::Dir => "dir",
            Kind::Aws => "aws",
        }
    }
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let client = context.client()?;
    let (only, json) = match args.command {
        Command::List { json } => (None, json),
        Command::Show { volume, json } => (Some(volume), json),
        Command::Attach { volume, node } => {
            client.attach_volume(&volume, &node).await?;
            return say(format!("{node} stands by for {volume}"));
        }
        Command::Detach { volume, node } => {
            client.detach_volume(&volume, &node).await?;
            return say(format!("{node} does not stand by for {volume} any more"));
        }
        Command::Grow { volume, size } => {
            let grown = client.grow_volume(&volume, size).await?;
            let nodes = ask_nodes(&client, client.nodes().await?).await;
            let room = served(&nodes).get(&volume).map(|status| {
                format!(
                    ": {}, of which {} are free",
                    size::human(status.total_bytes),
                    size::human(status.free_bytes)
                )
            });
            return say(format!("{} has grown{}", grown.id, room.unwrap_or_default()));
        }
        Command::Delete { volume, keep } => {
            let before = client.volumes().await?.into_iter().find(|info| info.id == volume);
            let why = client.remove_volume(&volume, !keep).await?;
            let left = match (before, why) {
                (Some(info), _)
                    if keep || ![Kind::Loop, Kind::Aws].iter().any(|kind| info.provider == kind.as_str()) =>
                {
                    format!("; {} is left as it is", info.source)
                }
                (Some(info), Some(why)) if why.is_empty() => {
                    format!("; the node's answer was lost: see whether {} is deleted", info.source)
                }
                (Some(info), Some(why)) => format!("; {} is left as it is: {why}", info.source),
                (Some(info), None) => format!("; {} is deleted", info.source),
                (None, _) => String::new(),
            };
            return say(format!("{volume} is no volume of the cluster any more{left}"));
        }
        Command::Add { volume, kind, source, size, nodes, allow_unfenced, iops, encrypted, kms_key } => {
            if source.is_none() && kind != Kind::Aws {
                let what = kind.as_str();
                return Err(Failure::usage(format!("a volume of kind {what} needs --source"))
                    .hint("only EBS volumes (--kind aws) are made from nothing"));
            }
            let source = source
                .unwrap_or_default()
                .into_os_string()
                .into_string()
                .map_err(|source| Failure::usage(format!("--source {}: not UTF-8", source.display())))?;
            let provider = kind.as_str().to_owned();
            let kms_key = kms_key.or_else(|| encrypted.then(String::new));
            let new = NewVolume {
                id: volume,
                provider,
                source,
                size_bytes: size,
                nodes,
                allow_unfenced,
                iops,
                kms_key,
            };
            let added = client.add_volume(&new).await?;
            return say(format!(
                "{} is a volume of the cluster, epoch {}; `shardfs volume list` shows when it is served",
                added.id, added.epoch
            ));
        }
        Command::Iops { volume, iops } => {
            let changed = client.set_volume_iops(&volume, iops).await?;
            return say(format!("{} has {} IOPS", changed.id, changed.iops));
        }
        Command::Snapshot(args) => return backup::create(&client, args).await,
        Command::Restore(args) => return backup::restore_as(&client, args).await,
        Command::Strays { remove: None, json, .. } => return strays::list(&client, json).await,
        Command::Strays { remove: Some(which), force, .. } => {
            return strays::remove(&client, &which, force).await;
        }
        Command::Policy(args) => return policy::run(&client, args).await,
        Command::Promote { volume, node } => {
            let moved = client.promote_volume(&volume, &node).await?;
            return say(format!("{volume} is served by {node} under epoch {}", moved.epoch));
        }
    };
    let (volumes, nodes) = tokio::join!(client.volumes(), client.nodes());
    let (volumes, nodes) = (volumes?, ask_nodes(&client, nodes?).await);
    let served = served(&nodes);
    let mut out = Out::new();
    if let Some(id) = only {
        let volume = volumes.iter().find(|info| info.id == id);
        let volume = volume.ok_or_else(|| {
            Failure::new(format!("there is no volume {id}"))
                .hint("`shardfs volume list` shows which there are")
        })?;
        let status = served.get(&id).copied();
        match json {
            true => out.json(&to_json(volume, status))?,
            false => out.bytes(details(volume, status).as_bytes())?,
        }
    } else if json {
        out.json(&volumes.iter().map(|v| to_json(v, served.get(&v.id).copied())).collect::<Vec<_>>())?;
    } else {
        out.bytes(table(&volumes, &served).as_bytes())?;
    }
    out.flush()
}

fn say(text: String) -> Result<()> {
    let mut out = Out::new();
    out.line(text)?;
    out.flush()
}

/// One volume, for people.
fn details(volume: &VolumeInfo, status: Option<&VolumeStatus>) -> String {
    let none = || "none".to_owned();
    let mut lines = vec![
        ("volume", volume.id.to_string()),
        ("kind", volume.provider.clone()),
        ("source", volume.source.clone()),
        ("state", state(volume, status)),
        ("primary", volume.primary.as_ref().map_or_else(none, ToString::to_string)),
        (
            "backups",
            match volume.backups.as_slice() {
                [] => none(),
                nodes => nodes.iter().map(NodeId::as_str).collect::<Vec<_>>().join(" "),
            },
        ),
        ("epoch", volume.epoch.to_string()),
        ("shards", volume.shards.to_string()),
    ];
    if volume.iops != 0 {
        lines.push(("iops", volume.iops.to_string()));
    }
    if let Some(target) = &volume.target {
        lines.push(("placed on", target.to_string()));
    }
    if let Some(status) = status {
        lines.push(("size", size::human(status.total_bytes)));
        lines.push(("free", size::human(status.free_bytes)));
        lines.push(("device", status.source.clone()));
        lines.push(("mounted at", status.mount_point.clone()));
    }
    lines.retain(|(_, value)| !value.is_empty());
    lines.into_iter().map(|(name, value)| format!("{name:<11}{value}\n")).collect()
}

fn state(volume: &VolumeInfo, status: Option<&VolumeStatus>) -> String {
    match status {
        Some(s) if volume.leaving && !s.trouble.is_empty() => {
            format!("being taken out of the cluster: {}", s.trouble)
        }
        _ if volume.leaving => "being taken out of the cluster".to_owned(),
        Some(s) if is_full(s) => "full".to_owned(),
        Some(s) if s.trouble.is_empty() => "served".to_owned(),
        Some(s) => s.trouble.clone(),
        None => "not served".to_owned(),
    }
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
            state(volume, status.copied()),
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
        "leaving": volume.leaving,
        "iops": volume.iops,
        "served": status.map(|s| json!({
            "total_bytes": s.total_bytes,
            "free_bytes": s.free_bytes,
            "device": s.source,
            "mount_point": s.mount_point,
            "trouble": (!s.trouble.is_empty()).then_some(&s.trouble),
        })),
    })
}
