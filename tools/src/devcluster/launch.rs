//! `dev up` and `dev down` from the outside: what is asked for against what is there, checks before anything is
//! touched, and the supervisor in a process of its own.
//!
//! The supervisor's process tells the one that waits for it how far it is, as lines of JSON on its standard output
//! ([`Report`]), until it is up or has given up.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shardfs_node::cluster::bootstrap;
use shardfs_node::cluster::connect::MetaSettings;
use shardfs_proto::types::ClientId;
use tokio::signal::unix::SignalKind;
use tracing::info;

use super::cleanup;
use super::control::{self, ClusterStatus, Reply, Request};
use super::lock;
use super::meta;
use super::process::{self, Identity};
use super::state::{
    self, EtcdMeta, Layout, NODES_MAX, Ports, Processes, Recorded, Settings, VOLUMES_PER_NODE_MAX, VolumeKind,
};
use super::supervisor::{Programs, Supervisor};
use crate::failure::{Failure, OrFail, Result};
use crate::system::{self, MountHealth};

/// Nodes unless `--nodes` says otherwise.
const NODES_DEFAULT: u32 = 3;
/// Size of a loop volume unless `--volume-size` says otherwise (sparse).
const VOLUME_BYTES_DEFAULT: u64 = 4 << 30;
/// A volume holds a file system, its reserve and at least one RocksDB.
const VOLUME_BYTES_MIN: u64 = 256 << 20;
/// How long a supervisor that was told to stop may take to let go of its lock.
const LOCK_WAIT: Duration = Duration::from_secs(5);

/// What `dev up` was asked for; what is `None` is as it was, or the default.
#[derive(Clone, Debug, Default)]
pub struct Wanted {
    /// Where to mount.
    pub mount: Option<PathBuf>,
    /// Not mounted any more.
    pub no_mount: bool,
    /// Number of nodes.
    pub nodes: Option<u32>,
    /// The metadata store.
    pub meta: Option<WantedMeta>,
    /// Kind of volumes.
    pub volumes: Option<VolumeKind>,
    /// Bytes of a volume.
    pub volume_size_bytes: Option<u64>,
    /// Volumes of a node.
    pub volumes_per_node: Option<u32>,
    /// The mount's client id.
    pub client_id: Option<ClientId>,
    /// Limit of new shards.
    pub default_limit_bytes: Option<u64>,
    /// Options for the mount.
    pub mount_options: Vec<String>,
}

/// A metadata store that is asked for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WantedMeta {
    /// The supervisor's own.
    Embedded,
    /// An etcd.
    Etcd(MetaSettings),
}

/// What a supervisor tells its parent while it starts.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Report {
    /// What it does now.
    Progress(String),
    /// The nodes serve, and the mount if there is to be one.
    Up,
    /// The nodes serve, but the mount does not.
    UpUnmounted {
        /// Why.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
    /// It has given up, and stopped what it had started.
    Failed {
        /// Why.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
}

/// The settings for a start: those that are stored, with what may change changed; or new ones.
pub fn plan(layout: &Layout, stored: Option<Settings>, wanted: &Wanted, root: bool) -> Result<Settings> {
    let check = |what: &str, value: u32, max: u32| {
        if value == 0 || value > max {
            return Err(Failure::usage(format!("{value} {what}: choose 1 to {max}")));
        }
        Ok(value)
    };
    let Some(mut settings) = stored else {
        let volumes = wanted.volumes.unwrap_or(if root { VolumeKind::Loop } else { VolumeKind::Dir });
        let size = wanted.volume_size_bytes.unwrap_or(VOLUME_BYTES_DEFAULT);
        if volumes == VolumeKind::Loop && size < VOLUME_BYTES_MIN {
            return Err(Failure::usage(format!(
                "a volume of {} is too small: the least is {}",
                crate::size::human(size),
                crate::size::human(VOLUME_BYTES_MIN)
            )));
        }
        let client_id = match &wanted.client_id {
            Some(id) => id.clone(),
            None => ClientId::new(crate::context::DEFAULT_CLIENT_ID)?,
        };
        return Ok(Settings {
            nodes: check("nodes", wanted.nodes.unwrap_or(NODES_DEFAULT), NODES_MAX)?,
            volumes,
            volume_size_bytes: size,
            volumes_per_node: check(
                "volumes per node",
                wanted.volumes_per_node.unwrap_or(1),
                VOLUMES_PER_NODE_MAX,
            )?,
            client_id,
            etcd: match &wanted.meta {
                None | Some(WantedMeta::Embedded) => None,
                Some(WantedMeta::Etcd(reached)) => Some(EtcdMeta {
                    reached: reached.clone(),
                    cluster_id: bootstrap::random_id(),
                    recorded: Recorded::No,
                }),
            },
            mount: wanted.mount.clone(),
            default_limit_bytes: wanted.default_limit_bytes,
            sockets: layout.choose_sockets(&runtime_dir(root)),
            ports: Ports::default(),
            mount_options: wanted.mount_options.clone(),
            mount_that_worked: None,
        });
    };
    let fixed = |what: &str, is: String, asked: Option<String>| match asked {
        Some(asked) if asked != is => Err(Failure::usage(format!(
            "the cluster in {} was made with {what} {is}, not {asked}",
            layout.dir().display()
        ))
        .hint("this is chosen once: leave the flag out, or make another cluster in another --dir")),
        _ => Ok(()),
    };
    fixed("--nodes", settings.nodes.to_string(), wanted.nodes.map(|n| n.to_string()))?;
    fixed("--volumes", settings.volumes.as_str().to_owned(), wanted.volumes.map(|v| v.as_str().to_owned()))?;
    fixed(
        "--volumes-per-node",
        settings.volumes_per_node.to_string(),
        wanted.volumes_per_node.map(|n| n.to_string()),
    )?;
    let embedded = || "embedded".to_owned();
    match (&mut settings.etcd, &wanted.meta) {
        (_, None) | (None, Some(WantedMeta::Embedded)) => {}
        // Members come and go; it is the same etcd if it holds this cluster.
        (Some(etcd), Some(WantedMeta::Etcd(reached))) => etcd.reached = reached.clone(),
        (None, Some(WantedMeta::Etcd(reached))) => {
            fixed("--meta", embedded(), Some(reached.address.clone()))?
        }
        (Some(etcd), Some(WantedMeta::Embedded)) => {
            fixed("--meta", etcd.reached.address.clone(), Some(embedded()))?;
        }
    }
    let human = crate::size::human;
    fixed("--volume-size", human(settings.volume_size_bytes), wanted.volume_size_bytes.map(human))?;
    let limit = |bytes: u64| human(bytes);
    fixed(
        "--default-limit",
        settings.default_limit_bytes.map_or_else(|| "none".to_owned(), limit),
        wanted.default_limit_bytes.map(limit),
    )?;
    if let Some(id) = &wanted.client_id {
        settings.client_id = id.clone();
    }
    if wanted.no_mount {
        settings.set_mount_place(None);
        settings.mount_that_worked = None;
    }
    if let Some(mount) = &wanted.mount {
        settings.mount = Some(mount.clone());
    }
    if !wanted.mount_options.is_empty() {
        settings.mount_options = wanted.mount_options.clone();
    }
    Ok(settings)
}

/// Where short paths for sockets are made.
fn runtime_dir(root: bool) -> PathBuf {
    if root {
        return PathBuf::from("/run");
    }
    match std::env::var_os("XDG_RUNTIME_DIR") {
        Some(dir) if !dir.is_empty() => PathBuf::from(dir),
        _ => PathBuf::from("/tmp"),
    }
}

/// What `dev up` found or did.
#[derive(Debug)]
pub enum Outcome {
    /// It ran already.
    WasUp(Box<ClusterStatus>),
    /// It is up now.
    Started {
        /// Why it is not mounted, though it should be.
        mount_failure: Option<Failure>,
    },
    /// It ran in the foreground and is down again.
    Ended,
}

/// Told that the nodes serve, and where the cluster is mounted.
pub type OnUp<'a> = dyn FnMut(&Settings, Option<&Path>) + 'a;

/// Brings a cluster up: checks, then a supervisor; `progress` is told what happens.
pub async fn up(
    layout: &Layout,
    wanted: &Wanted,
    foreground: bool,
    progress: &mut dyn FnMut(&str),
    on_up: &mut OnUp<'_>,
) -> Result<Outcome> {
    let root = system::is_root();
    let stored = layout.read_settings()?;
    let fresh = stored.is_none();
    if let Some(settings) = &stored
        && let Some(Reply::Status(status)) =
            control::call(&Layout::control_socket(settings), &Request::Status).await?
    {
        let planned = plan(layout, stored.clone(), wanted, root)?;
        if planned != *settings {
            return Err(Failure::usage(format!(
                "the cluster in {} runs with other settings",
                layout.dir().display()
            ))
            .hint(format!(
                "`shardfs dev down --dir {}` first, then `dev up` with the new ones",
                layout.dir().display()
            )));
        }
        return Ok(Outcome::WasUp(status));
    }
    let settings = plan(layout, stored.clone(), wanted, root)?;
    let programs = Programs::find()?;
    if settings.volumes == VolumeKind::Loop && !root {
        return Err(
            Failure::new("loop volumes need root").hint("--volumes dir needs none; or run it as root")
        );
    }
    if fresh {
        layout.check_new(settings.mount.as_deref())?;
    }
    // Before anything is made or written down.
    meta::check_new(layout, stored.as_ref(), &settings).await?;
    let mount_was_there = settings.mount.as_deref().is_none_or(Path::exists);
    let unmake_mount = || {
        if let Some(mount) = settings.mount.as_deref().filter(|_| !mount_was_there) {
            // If it is empty, and not in use after all.
            let _ = std::fs::remove_dir(mount);
        }
    };
    if let Some(mount) = &settings.mount {
        let checked = check_mount_point(layout, mount).await;
        // Remembered from an earlier start: nobody typed it now.
        checked.map_err(|failure| match &wanted.mount {
            Some(_) => failure,
            None => failure.hint_first("`dev up --no-mount` starts the cluster without it"),
        })?;
    }
    let made = layout.create().and_then(|()| {
        state::make_private(&settings.sockets)?;
        state::check_private(&settings.sockets)
    });
    if let Err(failure) = made {
        if fresh
            && let Ok(Some(_lock)) = lock::take(layout)
            && layout.read_settings().is_ok_and(|there| there.is_none())
        {
            // As far as it came; nobody else is at work in it.
            if let Err(e) = cleanup::delete(layout, &settings, false) {
                info!("what a refused start has made stays: {e}");
            }
            unmake_mount();
        }
        return Err(failure);
    }
    let Some(lock) = lock::take(layout)? else {
        return Err(Failure::new(format!(
            "another `dev up` or `dev down` is at work in {}",
            layout.dir().display()
        ))
        .hint("wait for it, then try again"));
    };
    layout.write_settings(&settings)?;
    let result = if foreground {
        info!("supervising in the foreground");
        run_foreground(layout, settings.clone(), programs, lock, progress, on_up).await
    } else {
        spawn_supervisor(layout, lock, progress).await.map(|mount_failure| {
            let mount = settings.mount.as_deref().filter(|_| mount_failure.is_none());
            on_up(&settings, mount);
            Outcome::Started { mount_failure }
        })
    };
    if result.is_err()
        && fresh
        && let Ok(Some(_lock)) = lock::take(layout)
    {
        // It is nobody else's by now, and nothing was stored in it yet. Its logs stay: they say why. What is in etcd is known by
        // the settings, which the supervisor has written.
        unmake_mount();
        let settings = layout.read_settings().ok().flatten().unwrap_or(settings);
        if let Err(e) = meta::delete(&settings).await {
            crate::output::note(format!("warning: {e}"));
        }
        if let Err(e) = cleanup::delete(layout, &settings, true) {
            crate::output::note(format!("warning: {e}"));
        }
    }
    result
}

async fn run_foreground(
    layout: &Layout,
    settings: Settings,
    programs: Programs,
    lock: File,
    progress: &mut dyn FnMut(&str),
    on_up: &mut OnUp<'_>,
) -> Result<Outcome> {
    let shown = settings.clone();
    let mut supervisor = start_or_stop(layout, settings, programs, lock, progress).await?;
    let mount_failure = supervisor.take_mount_failure();
    on_up(&shown, shown.mount.as_deref().filter(|_| mount_failure.is_none()));
    if let Some(failure) = mount_failure {
        crate::output::note(failure.render().trim_end());
    }
    supervisor.run().await?;
    Ok(Outcome::Ended)
}

/// Starts; a signal meanwhile stops what was started.
async fn start_or_stop(
    layout: &Layout,
    settings: Settings,
    programs: Programs,
    lock: File,
    progress: &mut dyn FnMut(&str),
) -> Result<Supervisor> {
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt())?;
    let stop = settings.clone();
    let interrupted = tokio::select! {
        result = Supervisor::start(layout.clone(), settings, programs, lock, progress) => return result,
        _ = terminate.recv() => Failure::terminated(),
        _ = interrupt.recv() => Failure::interrupted(),
    };
    cleanup::stop_everything(layout, &stop, &layout.read_processes()?, true).await?;
    Err(interrupted)
}

/// The supervisor's process: what `dev up` starts, and what nobody types. Reports on standard output.
pub async fn supervise(layout: &Layout) -> Result<()> {
    // A session of its own: the terminal's Ctrl-C and hang-up are not for us. Fails only for a session leader.
    let _ = rustix::process::setsid();
    let result = async {
        let settings = layout.read_settings()?.ok_or_else(|| Failure::new("no settings"))?;
        let lock = lock::inherited(layout)?;
        let mut progress = |what: &str| report(&Report::Progress(what.to_owned()));
        start_or_stop(layout, settings, Programs::find()?, lock, &mut progress).await
    }
    .await;
    let mut supervisor = match result {
        Ok(supervisor) => supervisor,
        Err(failure) => {
            let hint = failure.hint_text().map(str::to_owned);
            report(&Report::Failed { message: failure.message().to_owned(), hint });
            return Err(failure);
        }
    };
    report(&match supervisor.take_mount_failure() {
        None => Report::Up,
        Some(failure) => {
            let hint = failure.hint_text().map(str::to_owned);
            Report::UpUnmounted { message: failure.message().to_owned(), hint }
        }
    });
    // Nothing more is written to standard output, whose reader goes away now.
    supervisor.run().await
}

/// The parent may be gone; the start goes on all the same.
fn report(report: &Report) {
    let mut stdout = std::io::stdout();
    let _ = stdout.write_all(&control::line(report)).and_then(|()| stdout.flush());
}

/// The supervisor gets the lock as its standard input: it is never free in between. `Some`: the nodes serve, and this is
/// why the mount does not.
async fn spawn_supervisor(
    layout: &Layout,
    lock: File,
    progress: &mut dyn FnMut(&str),
) -> Result<Option<Failure>> {
    let log_path = layout.log(state::SUPERVISOR);
    let log = File::options().create(true).append(true).open(&log_path);
    let log = log.with_context(|| log_path.display().to_string())?;
    let exe = std::env::current_exe().context("cannot find this program")?;
    let mut command = Command::new(exe);
    process::inherit_only_stdio(&mut command);
    let mut child = command
        .args(["dev", "supervise", "--dir"])
        .arg(layout.dir())
        .current_dir("/")
        .stdin(lock)
        .stdout(Stdio::piped())
        .stderr(log)
        .spawn()
        .context("cannot start the supervisor")?;
    let identity = Identity::of(child.id());
    let stdout = child.stdout.take().expect("stdout is piped");
    let (send, mut reports) = tokio::sync::mpsc::channel(16);
    tokio::task::spawn_blocking(move || {
        for line in BufReader::new(stdout).lines().map_while(std::result::Result::ok) {
            let Ok(report) = serde_json::from_str::<Report>(&line) else { continue };
            if send.blocking_send(report).is_err() {
                return;
            }
        }
    });
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt())?;
    let mut signal = async || {
        tokio::select! {
            _ = terminate.recv() => Failure::terminated(),
            _ = interrupt.recv() => Failure::interrupted(),
        }
    };
    let mut was_interrupted = None;
    loop {
        let report = tokio::select! {
            report = reports.recv() => report,
            failure = signal() => {
                was_interrupted = Some(failure);
                progress("interrupted: stopping what was started");
                // It stops what it has started, says so and ends.
                if let Some(process) = identity.clone().and_then(|i| process::Watched::new(i).ok().flatten()) {
                    process.signal(rustix::process::Signal::TERM)?;
                }
                continue;
            }
        };
        match report {
            Some(Report::Progress(what)) => progress(&what),
            Some(Report::Up) => return Ok(None),
            Some(Report::UpUnmounted { message, hint }) => return Ok(Some(Failure::told(message, hint))),
            Some(Report::Failed { message, hint }) => {
                if let Some(failure) = was_interrupted {
                    return Err(failure);
                }
                // Its last words are said; it is ended when its lock is free.
                let _ = tokio::task::spawn_blocking(move || child.wait()).await;
                return Err(Failure::told(message, hint));
            }
            None => {
                let mut message = "the supervisor ended before the cluster was up".to_owned();
                for line in process::log_tail(&log_path, 8) {
                    message.push_str(&format!("\n  {line}"));
                }
                return Err(Failure::new(message).hint(format!("the whole log: {}", log_path.display())));
            }
        }
    }
}

/// A mount point must be an empty folder of its own; it is made if it is not there.
async fn check_mount_point(layout: &Layout, mount: &Path) -> Result<()> {
    if !Path::new("/dev/fuse").exists() {
        return Err(Failure::new("this machine has no /dev/fuse").hint("load the module (modprobe fuse), or give the container --device /dev/fuse; without --mount the cluster is reached over gRPC only"));
    }
    // One path must not hold the other: a cluster inside its own mount could not start, nor one that its mount hides.
    if mount.starts_with(layout.dir()) || layout.dir().starts_with(mount) {
        return Err(Failure::usage(format!(
            "the mount point {} and the cluster's folder {} lie within each other",
            mount.display(),
            layout.dir().display()
        ))
        .hint("choose a mount point beside the folder"));
    }
    if let Some(there) = system::mount_at(mount)? {
        let ours = layout
            .read_processes()?
            .members
            .get(super::member::MOUNT)
            .is_some_and(|daemon| daemon.identity.is_running());
        let dead = there.fs_type.starts_with("fuse") && system::probe(mount).await? == MountHealth::Dead;
        if dead {
            system::mend_stale_mount(mount).await?;
        } else if ours && there.fs_type.starts_with("fuse") {
            return Ok(());
        } else {
            return Err(Failure::new(format!(
                "something is mounted on {} already: {} ({})",
                mount.display(),
                there.source,
                there.fs_type
            ))
            .hint(if there.fs_type.starts_with("fuse.shardfs") {
                format!("`shardfs umount {}`, or choose another mount point", mount.display())
            } else {
                "choose another mount point".to_owned()
            }));
        }
    }
    system::make_folder(mount)?;
    let mut entries = std::fs::read_dir(mount).with_context(|| format!("mount point {}", mount.display()))?;
    if entries.next().is_some() {
        return Err(Failure::new(format!("the mount point {} is not empty", mount.display()))
            .hint("what is in it would be hidden: choose another, or move it away"));
    }
    Ok(())
}

/// How the cluster is: from its supervisor, or what can be seen without one.
pub async fn status(layout: &Layout) -> Result<ClusterStatus> {
    let settings = settings_of(layout)?;
    if let Some(Reply::Status(status)) =
        control::call(&Layout::control_socket(&settings), &Request::Status).await?
    {
        return Ok(*status);
    }
    let processes = layout.read_processes()?;
    let names = settings.node_names();
    let names =
        names.iter().map(String::as_str).chain(settings.mount.is_some().then_some(super::member::MOUNT));
    let members = names.map(|name| {
        let running = processes.members.get(name).map(|r| &r.identity).filter(|i| i.is_running());
        control::MemberStatus {
            name: name.to_owned(),
            state: if running.is_some() { "running" } else { "stopped" }.to_owned(),
            pid: running.map(|i| i.pid),
            uptime_ms: running.map(Identity::age_ms),
            endpoints: Vec::new(),
            http: None,
            restarts: 0,
            last_end: None,
            log: layout.log(name),
        }
    });
    Ok(ClusterStatus {
        dir: layout.dir().to_owned(),
        supervisor: None,
        uptime_ms: 0,
        meta: settings.meta().address,
        members: members.collect(),
        mount: settings.mount.clone(),
    })
}

/// Sends a request that needs a running supervisor.
pub async fn ask(layout: &Layout, request: &Request) -> Result<String> {
    let settings = settings_of(layout)?;
    match control::ask(&Layout::control_socket(&settings), request).await? {
        Some(done) => Ok(done),
        None => Err(nobody_supervises(layout, &layout.read_processes()?)),
    }
}

/// What is to be said when nobody answers on the control socket: all is down, or the supervisor only.
fn nobody_supervises(layout: &Layout, processes: &Processes) -> Failure {
    let dir = layout.dir().display();
    if processes.members.values().any(|record| record.identity.is_running()) {
        return Failure::new(format!(
            "the supervisor of the cluster in {dir} is gone, with processes left running"
        ))
        .hint(format!("`shardfs dev up --dir {dir}` takes them over, `dev down` ends them"));
    }
    Failure::new(format!("the cluster in {dir} is down"))
        .hint(format!("`shardfs dev up --dir {dir}` starts it"))
}

/// Takes a cluster down, also one whose supervisor is gone; says whether anything ran.
pub async fn down(layout: &Layout, force: bool) -> Result<bool> {
    let settings = settings_of(layout)?;
    let request = Request::Down { force };
    let asked = control::ask(&Layout::control_socket(&settings), &request).await?.is_some();
    let deadline = tokio::time::Instant::now() + LOCK_WAIT;
    let _lock = loop {
        if let Some(lock) = lock::take(layout)? {
            break lock;
        }
        if tokio::time::Instant::now() > deadline {
            return Err(Failure::new(format!(
                "another `dev up` or `dev down` is at work in {}",
                layout.dir().display()
            ))
            .hint("wait for it, then try again"));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    };
    if asked {
        return Ok(true);
    }
    let processes = layout.read_processes()?;
    let ran = processes.members.values().any(|r| r.identity.is_running());
    cleanup::stop_everything(layout, &settings, &processes, force).await?;
    layout.write_processes(&Processes::default())?;
    Ok(ran)
}

/// Deletes a cluster that is down; its records in an etcd first, which `force` gives up if they cannot be reached.
pub async fn delete(layout: &Layout, force: bool) -> Result<()> {
    let settings = settings_of(layout)?;
    let Some(_lock) = lock::take(layout)? else {
        return Err(Failure::new("the cluster is being used"));
    };
    if let Err(failure) = meta::delete(&settings).await {
        if !force {
            return Err(
                failure.hint("`dev down --delete --force` deletes everything else, and leaves those records")
            );
        }
        crate::output::note(format!("warning: the cluster's records stay there: {failure}"));
    }
    cleanup::delete(layout, &settings, false)
}

/// The settings of a cluster that must be there.
pub fn settings_of(layout: &Layout) -> Result<Settings> {
    layout.read_settings()?.ok_or_else(|| {
        Failure::new(format!("there is no cluster in {}", layout.dir().display()))
            .hint("name its folder with --dir; `shardfs dev up --dir DIR --mount MNT` makes one")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_clusters_get_defaults() {
        let layout = Layout::new(Path::new("/srv/c"));
        let settings = plan(&layout, None, &Wanted::default(), true).unwrap();
        assert_eq!((settings.nodes, settings.volumes, settings.volumes_per_node), (3, VolumeKind::Loop, 1));
        assert_eq!((settings.volume_size_bytes, settings.client_id.as_str()), (4 << 30, "default"));
        assert_eq!((settings.mount, settings.default_limit_bytes), (None, None));
        assert_eq!(plan(&layout, None, &Wanted::default(), false).unwrap().volumes, VolumeKind::Dir);
    }

    #[test]
    fn no_mount_forgets_the_mount() {
        let layout = Layout::new(Path::new("/srv/c"));
        let wanted =
            Wanted { mount: Some("/mnt".into()), mount_options: vec!["ro".to_owned()], ..Wanted::default() };
        let mut stored = plan(&layout, None, &wanted, true).unwrap();
        stored.mount_that_worked = stored.mount_place();
        assert_eq!(plan(&layout, Some(stored.clone()), &Wanted::default(), true).unwrap(), stored);
        let wanted = Wanted { no_mount: true, ..Wanted::default() };
        let planned = plan(&layout, Some(stored), &wanted, true).unwrap();
        assert_eq!((planned.mount, planned.mount_that_worked), (None, None));
        assert!(planned.mount_options.is_empty());
    }

    #[test]
    fn a_lost_supervisor_is_no_cluster_that_is_down() {
        let layout = Layout::new(Path::new("/srv/c"));
        let failure = nobody_supervises(&layout, &Processes::default());
        assert_eq!(failure.message(), "the cluster in /srv/c is down");
        let identity = Identity::of(std::process::id()).unwrap();
        let record = state::ProcessRecord { identity, program: "/bin/x".into(), args: Vec::new() };
        let members = [("node-1".to_owned(), record)].into();
        let failure = nobody_supervises(&layout, &Processes { supervisor: None, members });
        assert!(failure.message().contains("is gone, with processes left running"), "{failure}");
        assert!(failure.hint_text().is_some_and(|h| h.contains("`shardfs dev up --dir /srv/c`")));
    }

    #[test]
    fn wrong_wishes_are_usage_errors() {
        let layout = Layout::new(Path::new("/srv/c"));
        for wanted in [
            Wanted { nodes: Some(0), ..Wanted::default() },
            Wanted { nodes: Some(NODES_MAX + 1), ..Wanted::default() },
            Wanted { volumes_per_node: Some(0), ..Wanted::default() },
            Wanted { volume_size_bytes: Some(1 << 20), ..Wanted::default() },
        ] {
            assert_eq!(
                plan(&layout, None, &wanted, true).unwrap_err().code(),
                crate::failure::EXIT_USAGE,
                "{wanted:?}"
            );
        }
    }

    #[test]
    fn an_etcd_stays_an_etcd() {
        let layout = Layout::new(Path::new("/srv/c"));
        let etcd = |address: &str| Wanted {
            meta: Some(WantedMeta::Etcd(MetaSettings::of(address))),
            ..Wanted::default()
        };
        let embedded = Wanted { meta: Some(WantedMeta::Embedded), ..Wanted::default() };
        let stored = plan(&layout, None, &etcd("etcd://a:1"), true).unwrap();
        let other = plan(&layout, None, &etcd("etcd://a:1"), true).unwrap();
        let id = |settings: &Settings| settings.etcd.as_ref().unwrap().cluster_id.clone();
        assert_ne!(id(&stored), id(&other), "every cluster has an id of its own");
        assert_eq!(stored.meta().address, "etcd://a:1");
        assert_eq!(plan(&layout, Some(stored.clone()), &Wanted::default(), true).unwrap(), stored);
        let moved = plan(&layout, Some(stored.clone()), &etcd("etcd://b:1"), true).unwrap();
        assert_eq!((id(&moved), moved.meta().address.as_str()), (id(&stored), "etcd://b:1"));
        let failure = plan(&layout, Some(stored), &embedded, true).unwrap_err();
        assert_eq!(failure.message(), "the cluster in /srv/c was made with --meta etcd://a:1, not embedded");
        let stored = plan(&layout, None, &embedded, true).unwrap();
        assert_eq!(stored.etcd, None);
        assert!(plan(&layout, Some(stored), &etcd("etcd://a:1"), true).is_err());
    }

    #[test]
    fn stored_clusters_keep_what_is_chosen_once() {
        let layout = Layout::new(Path::new("/srv/c"));
        let stored = plan(&layout, None, &Wanted::default(), true).unwrap();
        assert_eq!(plan(&layout, Some(stored.clone()), &Wanted::default(), true).unwrap(), stored);
        let again = Wanted { nodes: Some(3), mount: Some("/mnt".into()), ..Wanted::default() };
        let planned = plan(&layout, Some(stored.clone()), &again, true).unwrap();
        assert_eq!(planned.mount.as_deref(), Some(Path::new("/mnt")));
        let failure =
            plan(&layout, Some(stored), &Wanted { nodes: Some(5), ..Wanted::default() }, true).unwrap_err();
        assert_eq!(failure.message(), "the cluster in /srv/c was made with --nodes 3, not 5");
    }
}
