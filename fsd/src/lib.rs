//! shardfsd: a ShardFS cluster as a mount.
//!
//! `fuse`, `errno` and `session` are the only modules that know fuser: they decode, call and reply. What
//! the mount means stands in `fs`, which calls the cluster through the client of shardfs-proto and is
//! tested without a kernel. [`run`] is the whole daemon: one process that waits in front of it in the foreground or goes
//! to the background (`background`), the parent (`parent`), and its child, which is the daemon.

pub mod background;
pub mod cli;
pub mod config;
pub mod credentials;
pub mod errno;
pub mod failure;
pub mod fs;
pub mod fuse;
pub mod handles;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod mounts;
pub mod notify;
pub mod options;
pub mod parent;
pub mod probe;
pub mod records;
pub mod reload;
pub mod session;

use std::io::IsTerminal;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use futures::StreamExt;
use shardfs_proto::client::{Client, ClientConfig, SessionWatcher};
use shardfs_proto::types::{SessionId, ShardId};
use tokio::signal::unix::{Signal, SignalKind, signal};

use background::Waiting;
use config::Settings;
use fs::{Fs, FsSettings};
use fuse::{Fuse, Negotiation};
use metrics::Metrics;
use parent::Child;
use records::{Place, Records};
use reload::Reload;
use rustix::mount::MountFlags;

/// How long syncing and giving back what is open may take once the mount is gone. Then the sessions are ended, which takes some
/// seconds at most.
const LEAVE_MAX: Duration = Duration::from_secs(7);
/// Sessions of a dead daemon that are ended at a time: a shard that does not answer holds up few others.
const ENDINGS_MAX: usize = 16;

/// Mounts as `args` say. In the foreground, returns when the mount is gone; else when it is usable, and a
/// process in the background serves it. The exit status is that of the daemon.
///
/// To be called before any other thread exists.
///
/// # Errors
/// In words for people; nothing is mounted then.
pub fn run(args: cli::Args) -> Result<ExitCode> {
    let child = Child::of_environment()?;
    let pipe = if child.is_none() { background::parent_pipe() } else { None };
    let foreground = args.foreground;
    if child.is_none() && pipe.is_none() && !foreground {
        // Mistakes are told before anything is started.
        let settings = Settings::load(args)?;
        mounts::usable(&settings.mount_point, settings.replace_dead)?;
        return background::start().map(|()| ExitCode::SUCCESS);
    }
    let ready = match &child {
        Some(child) => child.ready,
        None => pipe.or(args.ready_fd),
    };
    let mut waiting = Waiting::new(ready)?;
    let outcome = if child.is_some() || args.no_restart {
        serve(args, foreground, &mut waiting, child.as_ref()).map(|()| ExitCode::SUCCESS)
    } else {
        parent::run(args, foreground, &mut waiting)
    };
    if let Err(error) = &outcome {
        tracing::error!(error = %format!("{error:#}"), "failed");
        waiting.failed(error);
    }
    outcome
}

fn serve(args: cli::Args, foreground: bool, waiting: &mut Waiting, child: Option<&Child>) -> Result<()> {
    let mut refused = true;
    let load = || {
        let settings = Settings::load(args.clone())?;
        let log = logging::start(&settings, foreground)?;
        anyhow::Ok((settings, log))
    };
    let outcome = load().and_then(|(settings, log)| {
        refused = false;
        serve_with(settings, log, args.clone(), foreground, waiting, child)
    });
    if let (Err(error), Some(child)) = (&outcome, child)
        && let Err(untold) = child.records.note_failure(error, refused)
    {
        tracing::warn!(error = %format!("{untold:#}"), "the parent is not told why the daemon ends");
    }
    outcome
}

fn serve_with(
    mut settings: Settings,
    log: logging::Log,
    args: cli::Args,
    foreground: bool,
    waiting: &mut Waiting,
    child: Option<&Child>,
) -> Result<()> {
    // They are read again from another folder.
    let config = args.config.as_ref().map(std::path::absolute).transpose().context("--config")?;
    let args = cli::Args { config, ..args };
    // Someone sits before a terminal: what is shown there ends with it.
    let on_terminal = foreground && std::io::stderr().is_terminal();
    let reload = (!on_terminal).then(|| Reload::new(args, log));
    let left = child.and_then(Child::left);
    if let Some(left) = &left {
        // The same mount, wherever a relative path leads by now.
        settings.mount_point = left.path();
    }
    let replace = settings.replace_dead || left.as_ref().map_or(Ok(false), Place::is_on_top)?;
    settings.mount_point = mounts::usable(&settings.mount_point, replace)?;
    // A daemon keeps no directory busy.
    std::env::set_current_dir("/").context("/")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("shardfsd")
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let outcome = runtime.block_on(serve_on(settings, waiting, reload.as_ref(), child));
    // What still waits for a node is not waited for.
    runtime.shutdown_background();
    outcome
}

async fn serve_on(
    mut current: Settings,
    waiting: &mut Waiting,
    reload: Option<&Reload>,
    child: Option<&Child>,
) -> Result<()> {
    let settings = &current.clone();
    let mut signals = Signals::new(reload.is_some())?;
    let http = match settings.http {
        Some(address) => Some(http::listen(address).await?),
        None => None,
    };
    let client = Client::new(ClientConfig {
        endpoints: settings.endpoints.clone(),
        client_id: settings.client_id.clone(),
        deadline: settings.deadline,
        label: label(settings),
    })?
    .with_reads(settings.reads);
    let restarts = child.map_or(0, |child| child.restarts);
    // Programs wait for a mount that was there before: it comes back first, and its nodes may come later.
    if restarts == 0 && !client.reachable(settings.connect_timeout).await {
        bail!(
            "no node answers at {} within {:?}: is the cluster up, and are these its addresses?",
            settings.endpoints.join(", "),
            settings.connect_timeout
        );
    }
    let records = child.map(|child| child.records.clone());
    let dead = records.as_ref().map(|records| records.sessions()).unwrap_or_default();
    if let Some(records) = &records {
        client.watch_sessions(records.clone());
    }
    let fs = Arc::new(Fs::new(client.clone(), fs_settings(settings)));
    let metrics = Arc::new(Metrics::default());
    metrics.set_restarts(restarts);
    if let Some(listener) = http {
        tokio::spawn(http::serve(listener, metrics.clone(), fs.clone()));
    }
    let negotiation = Negotiation { readdirplus: settings.readdirplus, posix_locks: settings.posix_locks };
    let fuse = Fuse::new(fs.clone(), tokio::runtime::Handle::current(), metrics, negotiation);
    let mut mounted = session::mount(&settings.mount_point, settings, records.as_deref(), fuse)?;
    if let Err(error) = mounted.answers().await {
        mounted.unmount(std::future::ready(())).await;
        fs.shut_down(LEAVE_MAX).await;
        return Err(error);
    }
    tracing::info!(
        mount_point = %settings.mount_point.display(),
        client_id = %settings.client_id,
        endpoints = settings.endpoints.join(","),
        version = env!("CARGO_PKG_VERSION"),
        restarts,
        "mounted"
    );
    waiting.ready();
    notify::ready(&settings.mount_point);
    // Ends with the runtime.
    tokio::spawn(notify::keep_alive(settings.mount_point.clone()));
    if let Some(records) = records {
        tokio::spawn(end_sessions(client, records, dead));
    }

    let outcome = loop {
        tokio::select! {
            ended = mounted.ended() => {
                notify::stopping();
                if ended.is_ok() {
                    tracing::info!("unmounted from outside");
                    mounted.clear_up().await;
                }
                break ended;
            }
            heard = signals.heard() => match (heard, reload) {
                (Heard::Reload, Some(reload)) => {
                    notify::reloading();
                    reload.again(&mut current);
                    notify::ready(&settings.mount_point);
                }
                (Heard::Reload, None) => {}
                (Heard::Unmount(name), _) => {
                    tracing::info!(signal = name, "unmounting");
                    notify::stopping();
                    let ending = mounted.unmount(async { signals.next().await; }).await;
                    tracing::info!(?ending, "left the mount point");
                    break Ok(());
                }
            },
        }
    };
    fs.shut_down(LEAVE_MAX).await;
    outcome
}

/// Ends what a dead daemon has left with the shards: what it held open, and only it, is freed.
async fn end_sessions(client: Client, records: Arc<Records>, dead: Vec<(ShardId, SessionId)>) {
    if !dead.is_empty() {
        tracing::info!(sessions = dead.len(), "ending the sessions of the daemon that died");
    }
    let ends = dead.into_iter().map(|(shard, session)| {
        let (client, records) = (&client, &records);
        async move {
            match client.end_session(shard, session).await {
                Ok(()) => tracing::debug!(%shard, %session, "ended"),
                Err(error) => tracing::warn!(%shard, %error, "a session is left to end by itself"),
            }
            records.ended(shard, session);
        }
    });
    futures::stream::iter(ends).buffer_unordered(ENDINGS_MAX).collect::<()>().await;
}

fn fs_settings(settings: &Settings) -> FsSettings {
    FsSettings {
        mount_point: settings.mount_point.clone(),
        client_id: settings.client_id.clone(),
        endpoints: settings.endpoints.clone(),
        attr_ttl: settings.attr_ttl,
        entry_ttl: settings.entry_ttl,
        root_mode: settings.root_mode,
        uid: rustix::process::geteuid().as_raw(),
        gid: rustix::process::getegid().as_raw(),
        sync_changes: settings.flags.intersects(MountFlags::SYNCHRONOUS | MountFlags::DIRSYNC),
    }
}

/// Who holds a session, for people.
fn label(settings: &Settings) -> String {
    let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
    let mut label = format!("{host}:{} mount {}", std::process::id(), settings.mount_point.display());
    let limit = shardfs_proto::types::limits::SESSION_LABEL_BYTES_MAX;
    while label.len() > limit {
        label.pop();
    }
    label
}

/// What a signal asks for.
enum Heard {
    /// To leave, by the signal of that name.
    Unmount(&'static str),
    /// To read the settings again.
    Reload,
}

/// The signals that unmount, and SIGHUP, which does if nothing can be read again.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
    reloads: bool,
}

impl Signals {
    fn new(reloads: bool) -> Result<Signals> {
        let on = |kind| signal(kind).context("waiting for signals");
        Ok(Signals {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hang_up: on(SignalKind::hangup())?,
            reloads,
        })
    }

    async fn heard(&mut self) -> Heard {
        tokio::select! {
            _ = self.terminate.recv() => Heard::Unmount("SIGTERM"),
            _ = self.interrupt.recv() => Heard::Unmount("SIGINT"),
            _ = self.hang_up.recv() => if self.reloads { Heard::Reload } else { Heard::Unmount("SIGHUP") },
        }
    }

    /// The next one that unmounts.
    async fn next(&mut self) -> &'static str {
        loop {
            if let Heard::Unmount(name) = self.heard().await {
                return name;
            }
        }
    }
}
