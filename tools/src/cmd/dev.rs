//! `shardfs dev`: a whole cluster on this machine. What is typed and what is said; the work is in [`devcluster`].
//!
//! [`devcluster`]: crate::devcluster

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use shardfs_node::cluster::connect::MetaSettings;
use shardfs_proto::client::{Client, ClientConfig};
use shardfs_proto::types::cluster::NewVolume;
use shardfs_proto::types::{NodeId, VolumeId, clock};

use crate::context::{Context, DEV_FOLDER};
use crate::devcluster::control::{ClusterStatus, KillSignal, Request};
use crate::devcluster::launch::{self, Outcome, Wanted, WantedMeta};
use crate::devcluster::member::MOUNT;
use crate::devcluster::meta;
use crate::devcluster::state::{Layout, Settings, VolumeKind};
use crate::failure::{Failure, Result};
use crate::meta_flags::MetaFlags;
use crate::output::{self, Align, Out, Table, duration_text};
use crate::size;
use crate::system;

/// How long the nodes are asked about their volumes.
const CHECK_MAX: std::time::Duration = std::time::Duration::from_secs(5);

/// How long volumes in a cloud may take to be attached and formatted.
const CLOUD_VOLUMES_MAX: std::time::Duration = std::time::Duration::from_secs(60);
/// Pause between two looks.
const CLOUD_LOOK_PAUSE: std::time::Duration = std::time::Duration::from_millis(200);

/// `shardfs dev`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "Everything of a cluster lies in one folder: --dir DIR, or SHARDFS_DIR, or the nearest .shardfs above the working directory, or \
.shardfs in it. The nodes are processes of their own: killing one is real.

Examples:
  shardfs dev up --mount ./mnt
  shardfs dev kill node-2              as if its power was cut; `dev start node-2` brings it back
  shardfs dev kill node-2 --signal STOP
  shardfs dev status
  shardfs dev down                     the data stays; `dev up` goes on with it"
)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Start a cluster: nodes, metadata store, mount
    Up(Box<UpArgs>),
    /// Stop it, in order; the data stays
    Down {
        /// Even if the mount is in use: it is detached. With --delete, even if the etcd with its records does not answer
        #[arg(long, short)]
        force: bool,
        /// Then delete the cluster and everything in it; from an etcd its own records, and no other cluster's
        #[arg(long)]
        delete: bool,
        /// Do not ask (with --delete)
        #[arg(long, short, requires = "delete")]
        yes: bool,
    },
    /// Show its processes
    Status {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Kill, freeze or stop a node (or `mount`); it stays so until `dev start`
    Kill {
        /// node-1, node-2, ... or mount
        member: String,
        /// What to send
        #[arg(long, short, value_enum, ignore_case = true, default_value = "KILL")]
        signal: KillSignal,
    },
    /// Start or thaw a node (or `mount`) again
    Start {
        /// node-1, node-2, ... or mount
        member: String,
    },
    /// The supervisor itself
    #[command(hide = true)]
    Supervise,
}

#[derive(clap::Args, Debug)]
#[command(
    after_help = "The number of nodes and what the volumes are is chosen once, when the cluster is made; `dev up` without flags starts it again as \
it was. Volumes that were grown, given to other nodes or deleted since stay so. A cluster that runs is left as it is. A process that ends unexpectedly is started again; one that `dev kill` ended stays \
down until `dev start`. If the supervisor itself was killed, or the machine was restarted, `dev up` recovers: processes that \
still run are taken over, what they left behind is cleaned up.

Logs: DIR/logs/. Programs: shardfs-node and shardfsd beside this one, in PATH, or SHARDFS_NODE_BIN and SHARDFSD_BIN.

Examples:
  shardfs dev up --mount ./mnt                       three nodes, in ./.shardfs
  shardfs dev up --dir /srv/c --nodes 5 --mount /mnt/c
  shardfs dev up --volumes dir --nodes 1             no root needed; not mounted
  shardfs dev up --meta etcd://127.0.0.1:2379        its records in an etcd that runs already"
)]
struct UpArgs {
    /// Where to mount it (made if it is not there) [default: as before; a new cluster: nowhere]
    #[arg(long, value_name = "FOLDER")]
    mount: Option<PathBuf>,
    /// Do not mount it, now and in future, though it was mounted before
    #[arg(long, conflicts_with_all = ["mount", "options"])]
    no_mount: bool,
    /// Number of node processes [default: 3]
    #[arg(long, value_name = "N")]
    nodes: Option<u32>,
    /// What the volumes are [default: loop as root, else dir]
    #[arg(long, value_enum)]
    volumes: Option<VolumeKind>,
    /// The metadata store: embedded (held by the supervisor), or etcd://HOST:PORT[,HOST:PORT...], or etcds://... for an etcd
    /// with TLS; one etcd holds one cluster [default: as before; a new cluster: embedded]
    #[arg(long, value_name = "STORE")]
    meta: Option<String>,
    #[command(flatten)]
    meta_flags: MetaFlags,
    /// Size of each loop volume, sparse, 256MiB at least [default: 4GiB]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    volume_size: Option<u64>,
    /// Volumes of each node [default: 1]
    #[arg(long, value_name = "N")]
    volumes_per_node: Option<u32>,
    /// Limit of shards that ask for none, e.g. 2GiB [default: the volume's room]
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    default_limit: Option<u64>,
    /// Options for the mount, as for `shardfs mount`
    #[arg(short = 'o', value_name = "OPTION,...")]
    options: Vec<String>,
    /// Supervise in this process until Ctrl-C
    #[arg(long)]
    foreground: bool,
}

/// Runs.
pub async fn run(args: Args, context: &Context) -> Result<()> {
    let dir = cluster_dir(context)?;
    let layout = Layout::new(&dir);
    match args.command {
        Command::Up(args) => up(&layout, *args, context).await,
        Command::Down { force, delete, yes } => down(&layout, force, delete, yes).await,
        Command::Status { json } => {
            let status = launch::status(&layout).await?;
            let mut out = Out::new();
            if json {
                out.json(&status)?;
            } else {
                out.bytes(describe(&status).as_bytes())?;
            }
            out.flush()
        }
        Command::Kill { member, signal } => {
            say(launch::ask(&layout, &Request::Kill { member, signal }).await?)
        }
        Command::Start { member } => say(launch::ask(&layout, &Request::Start { member }).await?),
        Command::Supervise => launch::supervise(&layout).await,
    }
}

/// The cluster's folder with symlinks resolved: it is stored in records and compared with the kernel's tables.
fn cluster_dir(context: &Context) -> Result<PathBuf> {
    let dir = context.dev_dir()?;
    if let Ok(resolved) = std::fs::canonicalize(&dir) {
        return Ok(resolved);
    }
    match (dir.parent().map(std::fs::canonicalize), dir.file_name()) {
        (Some(Ok(parent)), Some(name)) => Ok(parent.join(name)),
        _ => Ok(dir),
    }
}

fn say(text: String) -> Result<()> {
    let mut out = Out::new();
    out.line(text)?;
    out.flush()
}

async fn up(layout: &Layout, args: UpArgs, context: &Context) -> Result<()> {
    let meta = wanted_meta(&args)?;
    let mount = match &args.mount {
        Some(mount) => {
            if let Some(parent) = std::path::absolute(mount).ok().and_then(|m| m.parent().map(Path::to_owned))
            {
                system::make_folder(&parent)?;
            }
            Some(system::mount_point_path(mount)?)
        }
        None => None,
    };
    let wanted = Wanted {
        mount,
        no_mount: args.no_mount,
        nodes: args.nodes,
        meta,
        volumes: args.volumes,
        volume_size_bytes: args.volume_size,
        volumes_per_node: args.volumes_per_node,
        client_id: context.globals().client_id.clone(),
        default_limit_bytes: args.default_limit.filter(|l| *l > 0),
        mount_options: args.options,
    };
    let began = clock::monotonic();
    let spinner = std::io::stderr().is_terminal().then(spinner);
    let mut progress = |what: &str| match &spinner {
        Some(spinner) => spinner.set_message(what.to_owned()),
        None => output::note(what),
    };
    let foreground = args.foreground;
    let mut on_up = |settings: &Settings, mount: Option<&Path>| {
        if let Some(spinner) = &spinner {
            spinner.finish_and_clear();
        }
        let text = welcome(layout, settings, mount, began, foreground);
        // A closed stdout must not end what has just started.
        let _ = Out::new().bytes(text.as_bytes());
    };
    let outcome = launch::up(layout, &wanted, foreground, &mut progress, &mut on_up).await;
    if let Some(spinner) = &spinner {
        spinner.finish_and_clear();
    }
    match outcome? {
        Outcome::WasUp(status) => {
            let mut out = Out::new();
            out.line(format!("The cluster in {} is up already.", layout.dir().display()))?;
            out.bytes(describe(&status).as_bytes())?;
            out.flush()?;
            let unmounted = status.members.iter().any(|m| m.name == MOUNT && m.pid.is_none());
            if wanted.mount.is_some() && unmounted {
                say(launch::ask(layout, &Request::Start { member: MOUNT.to_owned() }).await?)?;
            }
            // Those in a cloud are added after the start, which may have been cut off in between.
            if layout.volumes_were_added()? {
                return check_volumes(layout).await;
            }
            add_cloud_volumes(layout).await
        }
        Outcome::Started { mount_failure } => {
            mount_failure.map_or(Ok(()), Err)?;
            add_cloud_volumes(layout).await
        }
        Outcome::Ended => say("stopped".to_owned()),
    }
}

/// The metadata store that is asked for, with absolute paths: the processes that use them start elsewhere.
fn wanted_meta(args: &UpArgs) -> Result<Option<WantedMeta>> {
    let Some(address) = &args.meta else { return Ok(None) };
    let settings = args.meta_flags.settings(address)?;
    if address == "embedded" {
        if settings != MetaSettings::of("embedded") {
            return Err(Failure::usage(
                "--meta embedded takes none of the other --meta flags: they are for an etcd",
            ));
        }
        return Ok(Some(WantedMeta::Embedded));
    }
    if !settings.is_etcd() {
        return Err(Failure::usage(format!(
            "--meta {address:?}: there are embedded, etcd://HOST:PORT[,HOST:PORT...] and etcds://..."
        )));
    }
    settings.check().map_err(|e| Failure::usage(format!("--meta: {e:#}")))?;
    Ok(Some(WantedMeta::Etcd(settings)))
}

/// Has the nodes make the volumes that are disks of a cloud, unless that was done once: one that is missing then was deleted. Fails
/// if a volume is not served.
async fn add_cloud_volumes(layout: &Layout) -> Result<()> {
    let settings = launch::settings_of(layout)?;
    if settings.volumes != VolumeKind::Aws {
        return check_volumes(layout).await;
    }
    if !layout.volumes_were_added()? {
        let client =
            Client::new(ClientConfig::new(layout.node_endpoints(&settings), settings.client_id.clone()))?;
        let there = client.volumes().await?;
        for (number, (volume, node)) in settings.volume_names().into_iter().enumerate() {
            let id = VolumeId::new(volume)?;
            if there.iter().any(|info| info.id == id) {
                continue;
            }
            let mut nodes = vec![NodeId::new(node.clone())?];
            nodes.extend(meta::backups(&settings, &node, number)?);
            let new = NewVolume {
                id,
                provider: VolumeKind::Aws.as_str().to_owned(),
                source: String::new(),
                size_bytes: settings.volume_size_bytes,
                nodes,
                allow_unfenced: false,
                iops: 0,
                kms_key: None,
            };
            client.add_volume(&new).await?;
        }
        layout.note_volumes_added()?;
    }
    let begun = clock::monotonic();
    loop {
        match check_volumes(layout).await {
            Err(_) if begun.elapsed() < CLOUD_VOLUMES_MAX => tokio::time::sleep(CLOUD_LOOK_PAUSE).await,
            checked => return checked,
        }
    }
}

/// Fails if a volume is not served, though its node is up.
async fn check_volumes(layout: &Layout) -> Result<()> {
    let settings = launch::settings_of(layout)?;
    let client = Client::new(ClientConfig {
        endpoints: layout.node_endpoints(&settings),
        client_id: settings.client_id.clone(),
        deadline: CHECK_MAX,
        label: "shardfs dev up".to_owned(),
    })?;
    let mut troubles = Vec::new();
    for endpoint in layout.node_endpoints(&settings) {
        // A node that was killed on purpose is no news.
        let Ok(status) = client.node_status(&[endpoint]).await else { continue };
        let volumes = status.volumes.into_iter().filter(|volume| !volume.trouble.is_empty());
        troubles.extend(volumes.map(|volume| format!("{}: {}", volume.id, volume.trouble)));
    }
    if troubles.is_empty() {
        return Ok(());
    }
    Err(Failure::new(format!("not every volume is served:\n  {}", troubles.join("\n  ")))
        .hint("the shards of the other volumes are served; `shardfs status` shows when it is mended"))
}

fn spinner() -> ProgressBar {
    let spinner = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg}") {
        spinner.set_style(style);
    }
    spinner.enable_steady_tick(std::time::Duration::from_millis(100));
    spinner
}

/// What `dev up` says at the end: what there is, and what to try.
fn welcome(
    layout: &Layout,
    settings: &Settings,
    mount: Option<&Path>,
    began: Instant,
    foreground: bool,
) -> String {
    let volumes = u64::from(settings.nodes * settings.volumes_per_node);
    let what = match settings.volumes {
        VolumeKind::Loop => format!(
            "{} of {}",
            output::count(volumes, "loop volume"),
            size::human(settings.volume_size_bytes)
        ),
        VolumeKind::Dir => format!("{} as volumes", output::count(volumes, "folder")),
        VolumeKind::Aws => {
            format!("{} of {}", output::count(volumes, "EBS volume"), size::human(settings.volume_size_bytes))
        }
    };
    let place = match mount {
        Some(mount) => format!("mounted on {}", mount.display()),
        None => "not mounted".to_owned(),
    };
    let took = began.elapsed().as_secs_f64();
    let mut text = format!(
        "ShardFS is up: {}, {what}, {place} ({took:.1} s).\n",
        output::count(u64::from(settings.nodes), "node")
    );
    let program = std::env::args().next().unwrap_or_else(|| "shardfs".to_owned());
    // Commands that are typed here find .shardfs by themselves.
    let here = std::env::current_dir().ok().and_then(|d| std::fs::canonicalize(d).ok());
    let found = here.is_some_and(|h| h.ancestors().any(|a| a.join(DEV_FOLDER) == layout.dir()));
    let dir = if found { String::new() } else { format!(" --dir {}", layout.dir().display()) };
    text.push_str("Try:\n");
    let mut lines = Vec::new();
    match mount {
        Some(mount) => {
            let mount = relative(mount);
            lines.push((format!("mkdir {mount}/photos"), "a directory at the top is a shard"));
            lines.push((format!("cp -r /usr/share/doc {mount}/photos/"), "files are its keys"));
        }
        None => lines.push((format!("{program}{dir} shard create photos"), "a shard")),
    }
    lines.push((format!("echo hello | {program}{dir} put - photos/greeting"), "the same bytes over gRPC"));
    lines.push((format!("{program}{dir} ls -l photos"), ""));
    lines.push((format!("{program}{dir} status"), ""));
    lines.push((format!("{program}{dir} dev kill node-1"), "then: dev start node-1"));
    if foreground {
        lines.push(("Ctrl-C".to_owned(), "stops it; the data stays"));
    } else {
        lines.push((format!("{program}{dir} dev down"), "stops it; the data stays"));
    }
    let width = lines.iter().map(|(c, _)| c.chars().count()).max().unwrap_or(0);
    for (command, why) in lines {
        let line =
            if why.is_empty() { format!("  {command}") } else { format!("  {command:width$}   # {why}") };
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// A path as one would type it here.
fn relative(path: &Path) -> String {
    let here = std::env::current_dir().ok().and_then(|d| std::fs::canonicalize(d).ok());
    match here.and_then(|h| path.strip_prefix(h).ok().map(Path::to_owned)) {
        Some(short) if short.components().next().is_some() => short.display().to_string(),
        _ => path.display().to_string(),
    }
}

async fn down(layout: &Layout, force: bool, delete: bool, yes: bool) -> Result<()> {
    if delete && !yes {
        launch::settings_of(layout)?;
        let question = format!("Stop the cluster in {} and delete everything in it?", layout.dir().display());
        match output::confirm(&question)? {
            Some(true) => {}
            Some(false) => return Err(Failure::new("nothing was done")),
            None => return Err(Failure::usage("--delete destroys data: confirm it with --yes")),
        }
    }
    let ran = launch::down(layout, force).await?;
    if delete {
        launch::delete(layout, force).await?;
        let dir = layout.dir().display();
        return say(if layout.dir().exists() {
            format!("stopped and deleted the cluster in {dir}; what else is in that folder stays")
        } else {
            format!("stopped and deleted {dir}")
        });
    }
    say(if ran {
        format!("stopped; the data stays in {}", layout.dir().display())
    } else {
        format!("the cluster in {} was down already", layout.dir().display())
    })
}

/// The processes of a cluster, for people.
fn describe(status: &ClusterStatus) -> String {
    let mut text = match &status.supervisor {
        Some(supervisor) => {
            format!("supervisor  pid {}, up {}\n", supervisor.pid, duration_text(status.uptime_ms))
        }
        None if status.members.iter().any(|m| m.pid.is_some()) => {
            "supervisor  GONE, with processes left running: `dev up` takes them over, `dev down` ends them\n"
                .to_owned()
        }
        None => "the cluster is down: `dev up` starts it\n".to_owned(),
    };
    text.push_str(&format!("folder      {}\n", status.dir.display()));
    if let Some(mount) = &status.mount {
        text.push_str(&format!("mount       {}\n", mount.display()));
    }
    // The embedded store is nobody's business.
    if status.meta.starts_with("etcd") {
        text.push_str(&format!("metadata    {}\n", status.meta));
    }
    text.push('\n');
    let mut table = Table::new(&[
        ("PROCESS", Align::Left),
        ("STATE", Align::Left),
        ("PID", Align::Right),
        ("UP", Align::Left),
        ("RESTARTS", Align::Right),
        ("ADDRESS", Align::Left),
        ("LAST END", Align::Left),
    ]);
    for member in &status.members {
        table.row(vec![
            if member.name == MOUNT { "mount".to_owned() } else { member.name.clone() },
            member.state.clone(),
            member.pid.map_or_else(|| "-".to_owned(), |p| p.to_string()),
            member.uptime_ms.map_or_else(|| "-".to_owned(), duration_text),
            member.restarts.to_string(),
            member
                .endpoints
                .last()
                .cloned()
                .or_else(|| member.http.as_ref().map(|h| format!("http://{h}/metrics")))
                .unwrap_or_default(),
            member.last_end.clone().unwrap_or_default(),
        ]);
    }
    text.push_str(&table.render());
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devcluster::control::MemberStatus;

    #[test]
    fn statuses_read_well() {
        let member = |name: &str, state: &str, pid: Option<u32>| MemberStatus {
            name: name.to_owned(),
            state: state.to_owned(),
            pid,
            uptime_ms: pid.map(|_| 5_000),
            endpoints: vec!["unix:/s".to_owned(), "http://127.0.0.1:1".to_owned()],
            http: None,
            restarts: 1,
            last_end: pid.is_none().then(|| "killed by signal 9 (KILL)".to_owned()),
            log: PathBuf::from("/c/logs/x.log"),
        };
        let status = ClusterStatus {
            dir: PathBuf::from("/c"),
            supervisor: None,
            uptime_ms: 0,
            meta: String::new(),
            members: vec![member("node-1", "running", Some(42)), member("node-2", "stopped", None)],
            mount: Some(PathBuf::from("/mnt")),
        };
        let expected = "\
supervisor  GONE, with processes left running: `dev up` takes them over, `dev down` ends them
folder      /c
mount       /mnt

PROCESS  STATE    PID  UP   RESTARTS  ADDRESS             LAST END
node-1   running   42  5 s         1  http://127.0.0.1:1
node-2   stopped    -  -           1  http://127.0.0.1:1  killed by signal 9 (KILL)
";
        assert_eq!(describe(&status), expected);
    }
}
