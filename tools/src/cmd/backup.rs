//! `shardfs backup`: images of whole volumes: taken, restored, verified, and taken again and again.

use clap::Subcommand;
use serde_json::{Value, json};
use shardfs_proto::client::Client;
use shardfs_proto::types::backups::{BackupInfo, BackupState, RestoreTo, Restored};
use shardfs_proto::types::{NodeId, VolumeId};

use crate::context::Context;
use crate::failure::{Failure, Result};
use crate::output::{self, Align, Out, Table, note, printable, time_json, time_text};
use crate::size;

mod schedules;
mod verify;

/// `shardfs backup`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

/// Of what a backup is taken.
#[derive(clap::Args, Debug)]
pub struct CreateArgs {
    /// Which (see `shardfs volume list`)
    volume: VolumeId,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What becomes of a backup.
#[derive(clap::Args, Debug)]
pub struct RestoreArgs {
    /// Which (see `shardfs backup list`)
    #[arg(value_name = "BACKUP")]
    id: String,
    /// Into a new volume with this id
    #[arg(long, conflicts_with = "in_place", required_unless_present = "in_place", requires = "nodes")]
    volume: Option<VolumeId>,
    /// The new volume's nodes; the first one makes and serves it
    #[arg(long, value_name = "NODE,...", value_delimiter = ',', requires = "volume")]
    nodes: Vec<NodeId>,
    /// The new volume's file, as its nodes know it [default: VOLUME.img beside that of the backup's volume]
    #[arg(long, value_name = "PATH", requires = "volume")]
    source: Option<String>,
    /// What is put behind the names of the new volume's shards
    #[arg(long, value_name = "TEXT", default_value = ".restored", requires = "volume")]
    suffix: String,
    /// Into the volume that the backup is of, which was lost
    #[arg(long)]
    in_place: bool,
    /// Delete the shards that were made since the backup; else calls on them fail, until they are deleted
    #[arg(long, requires = "in_place")]
    drop_missing: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Take a backup of a volume while it is used
    ///
    /// An image of the whole volume as it was at one moment: everything that was acknowledged as durable before is in it, of every shard. Nobody
    /// waits for it but for the moment in which blocks are shared. Volumes of kind `loop` whose files lie on an XFS or Btrfs, and of kind `aws`
    /// (an EBS snapshot). It lies beside the volume's file: against a loss of that disk, copy it away.
    #[command(after_help = "Examples:
  shardfs backup create vol-1
  shardfs backup verify 20261129T195900Z-1f3a5c7e9b2d4f60")]
    Create(CreateArgs),
    /// List backups, oldest first
    #[command(visible_alias = "ls")]
    List {
        /// Only those of this volume
        volume: Option<VolumeId>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show one backup: what it is of, where its image is, what went wrong
    Show {
        /// Which (see `shardfs backup list`)
        #[arg(value_name = "BACKUP")]
        id: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Delete a backup with its image, also one that failed
    Delete {
        /// Which (see `shardfs backup list`)
        #[arg(value_name = "BACKUP")]
        id: String,
    },
    /// Make a volume of a backup
    ///
    /// With --volume a new one, beside the one that the backup is of: its shards get new ids, and `.restored` behind their names (and a number, if
    /// that is taken); snapshots come with their shards. With --in-place the volume itself, whose file or disk was lost: shards keep ids and
    /// names. What was written since the backup is lost then, so it is refused while a node serves the volume; what is there is set aside, not
    /// deleted. Programs on mounts should open their files anew after that, and mounts be made anew. Cut off, the same command goes on;
    /// `shardfs volume delete` gives a new volume up.
    #[command(after_help = "Examples:
  shardfs backup restore 20261129T195900Z-1f3a5c7e9b2d4f60 --volume vol-9 --nodes node-2,node-3
  shardfs backup restore 20261129T195900Z-1f3a5c7e9b2d4f60 --in-place")]
    Restore(RestoreArgs),
    /// Restore a backup into something that goes away again, and check everything
    ///
    /// A node makes a copy of the image, replays its journal, runs e2fsck, opens every shard and checks it as `shardfs fsck --read-data` does. The
    /// volume itself is not touched. Exit code 1 if anything was found, or if the backup could not be checked.
    #[command(after_help = "Examples:
  shardfs backup verify 20261129T195900Z-1f3a5c7e9b2d4f60
  shardfs backup verify 20261129T195900Z-1f3a5c7e9b2d4f60 --quick --json")]
    Verify {
        /// Which (see `shardfs backup list`)
        #[arg(value_name = "BACKUP")]
        id: String,
        /// Do not read the content of files: their checksums are not verified
        #[arg(long)]
        quick: bool,
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Have backups of a volume taken again and again
    ///
    /// By whichever node serves the volume. Of those that the schedule has taken so many are kept; others stay until they are deleted. One that
    /// fails is tried again after a quarter of an hour.
    #[command(after_help = "Examples:
  shardfs backup schedule vol-1 --every 1d --keep 7
  shardfs backup schedule vol-1 --off")]
    Schedule {
        /// Which (see `shardfs volume list`)
        volume: VolumeId,
        /// Time between two, such as 6h or 1d; 10s at least
        #[arg(long, value_name = "TIME", value_parser = schedules::parse_every, required_unless_present = "off", requires = "keep")]
        every: Option<u64>,
        /// How many are kept, 1 to 1000
        #[arg(long, value_name = "N", requires = "every")]
        keep: Option<u32>,
        /// Take no more; those that there are stay
        #[arg(long, conflicts_with = "every")]
        off: bool,
    },
    /// List the schedules
    Schedules {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

impl Args {
    /// Whether something in the cluster is changed.
    pub fn changes(&self) -> bool {
        match &self.command {
            Command::Create(_) | Command::Delete { .. } | Command::Restore(_) | Command::Schedule { .. } => {
                true
            }
            Command::List { .. }
            | Command::Show { .. }
            | Command::Verify { .. }
            | Command::Schedules { .. } => false,
        }
    }
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let client = context.client()?;
    match args.command {
        Command::Create(args) => create(&client, args).await,
        Command::List { volume, json } => list(&client, volume.as_ref(), json).await,
        Command::Show { id, json } => show(&client, &id, json).await,
        Command::Delete { id } => {
            let backup = find(&client, &id).await?;
            client.delete_backup(&backup).await?;
            say(format!("{id} is deleted"))
        }
        Command::Restore(args) => restore_as(&client, args).await,
        Command::Verify { id, quick, json } => {
            let backup = find(&client, &id).await?;
            verify::run(&client, backup, quick, json).await
        }
        Command::Schedule { volume, every, keep, off: _ } => {
            schedules::set(&client, &volume, every.unwrap_or(0), keep.unwrap_or(0)).await
        }
        Command::Schedules { json } => schedules::list(&client, json).await,
    }
}

fn say(text: String) -> Result<()> {
    let mut out = Out::new();
    out.line(text)?;
    out.flush()
}

async fn find(client: &Client, id: &str) -> Result<BackupInfo> {
    client.backup(id).await.map_err(|e| Failure::from(e).hint("`shardfs backup list` shows which there are"))
}

/// Makes a volume of a backup.
pub async fn restore_as(client: &Client, args: RestoreArgs) -> Result<()> {
    let RestoreArgs { id, volume, nodes, source, suffix, in_place: _, drop_missing, json } = args;
    let to = match volume {
        Some(volume) => {
            RestoreTo::NewVolume { volume, nodes, source: source.unwrap_or_default(), name_suffix: suffix }
        }
        None => RestoreTo::InPlace { drop_missing },
    };
    restore(client, &id, &to, json).await
}

/// Takes a backup.
pub async fn create(client: &Client, args: CreateArgs) -> Result<()> {
    let CreateArgs { volume, json } = args;
    let backup = client.create_backup(&volume).await?;
    if json {
        let mut out = Out::new();
        out.json(&to_json(&backup))?;
        return out.flush();
    }
    say(format!(
        "{} of {volume}: {}, in {}",
        backup.id,
        output::count(backup.shards.into(), "shard"),
        backup.image
    ))
}

async fn list(client: &Client, volume: Option<&VolumeId>, json: bool) -> Result<()> {
    let backups = client.backups(volume).await?;
    let mut out = Out::new();
    if json {
        out.json(&backups.iter().map(to_json).collect::<Vec<_>>())?;
        return out.flush();
    }
    if backups.is_empty() && out.is_terminal() {
        note("there are no backups: `shardfs backup create VOLUME` takes one");
        return out.flush();
    }
    let mut table = Table::new(&[
        ("BACKUP", Align::Left),
        ("VOLUME", Align::Left),
        ("BEGUN", Align::Left),
        ("BY", Align::Left),
        ("SHARDS", Align::Right),
        ("STATE", Align::Left),
        ("IMAGE", Align::Left),
    ]);
    for backup in &backups {
        table.row(vec![
            backup.id.clone(),
            backup.volume.to_string(),
            time_text(backup.begun),
            by(backup).to_owned(),
            backup.shards.to_string(),
            state(backup),
            backup.image.clone(),
        ]);
    }
    out.bytes(table.render().as_bytes())?;
    out.flush()
}

async fn show(client: &Client, id: &str, json: bool) -> Result<()> {
    let backup = find(client, id).await?;
    let mut out = Out::new();
    if json {
        out.json(&to_json(&backup))?;
        return out.flush();
    }
    let lines = [
        ("backup", backup.id.clone()),
        ("volume", format!("{}, of kind {}, {}", backup.volume, backup.provider, size::human(backup.bytes))),
        ("begun", format!("{} UTC", time_text(backup.begun))),
        ("taken by", by(&backup).to_owned()),
        ("shards", backup.shards.to_string()),
        ("state", state(&backup)),
        ("image", backup.image.clone()),
    ];
    for (name, value) in lines.iter().filter(|(_, value)| !value.is_empty()) {
        out.line(format!("{name:<10}{value}"))?;
    }
    out.flush()
}

async fn restore(client: &Client, id: &str, to: &RestoreTo, json: bool) -> Result<()> {
    let backup = find(client, id).await?;
    let restored = client.restore_backup(&backup, to).await?;
    let mut out = Out::new();
    if json {
        out.json(&restored_json(&restored))?;
        return out.flush();
    }
    let volume = &restored.volume.id;
    out.line(format!(
        "{volume} is as it was when {id} was taken, with {}; `shardfs volume list` shows when it is served",
        output::count(restored.shards.len() as u64, "shard")
    ))?;
    if !matches!(to, RestoreTo::InPlace { .. }) {
        let mut table = Table::new(&[
            ("WAS", Align::Right),
            ("ID", Align::Right),
            ("OWNER", Align::Left),
            ("NAME", Align::Left),
        ]);
        for shard in &restored.shards {
            let name = printable(shard.name.as_str().as_bytes());
            let name = match shard.snapshot_of {
                Some(of) => format!("@{of}/.snap/{name}"),
                None => name,
            };
            table.row(vec![shard.old.to_string(), shard.id.to_string(), shard.owner.to_string(), name]);
        }
        out.bytes(table.render().as_bytes())?;
    }
    if !restored.set_aside.is_empty() {
        out.line(format!("what was there before is {}: delete it if it is of no use", restored.set_aside))?;
    }
    out.flush()?;
    for shard in &restored.missing {
        let fate = match to {
            RestoreTo::InPlace { drop_missing: true } => "deleted",
            RestoreTo::InPlace { drop_missing: false } => "its calls fail until it is deleted",
            RestoreTo::NewVolume { .. } => "left out",
        };
        note(format!(
            "shard {} (id {}) of {} is not in the backup: {fate}",
            printable(shard.name.as_str().as_bytes()),
            shard.old,
            shard.owner
        ));
    }
    Ok(())
}

fn by(backup: &BackupInfo) -> &'static str {
    if backup.scheduled { "schedule" } else { "hand" }
}

fn state(backup: &BackupInfo) -> String {
    match (backup.state, backup.why.as_str()) {
        (BackupState::Failed, why) if !why.is_empty() => format!("failed: {why}"),
        (state, _) => state.as_str().to_owned(),
    }
}

fn to_json(backup: &BackupInfo) -> Value {
    json!({
        "id": backup.id,
        "volume": backup.volume,
        "provider": backup.provider,
        "image": backup.image,
        "begun": time_json(backup.begun),
        "bytes": backup.bytes,
        "shards": backup.shards,
        "state": backup.state.as_str(),
        "why": (!backup.why.is_empty()).then_some(&backup.why),
        "scheduled": backup.scheduled,
    })
}

fn restored_json(restored: &Restored) -> Value {
    let shards = |shards: &[shardfs_proto::types::backups::RestoredShard]| -> Vec<Value> {
        let one = |shard: &shardfs_proto::types::backups::RestoredShard| {
            json!({
                "old_id": shard.old,
                "id": shard.id,
                "name": shard.name.as_str(),
                "owner": shard.owner,
                "snapshot_of": shard.snapshot_of,
            })
        };
        shards.iter().map(one).collect()
    };
    json!({
        "volume": restored.volume.id,
        "shards": shards(&restored.shards),
        "missing": shards(&restored.missing),
        "set_aside": (!restored.set_aside.is_empty()).then_some(&restored.set_aside),
    })
}
