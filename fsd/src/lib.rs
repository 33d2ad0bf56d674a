//! shardfsd: a ShardFS cluster as a mount.
//!
//! `fuse`, `errno` and `session` are the only modules that know fuser: they decode, call and reply. What
//! the mount means stands in `fs`, which calls the cluster through the client of shardfs-proto and is
//! tested without a kernel. [`run`] is the whole daemon.

pub mod background;
pub mod cli;
pub mod config;
pub mod errno;
pub mod failure;
pub mod fs;
pub mod fuse;
pub mod handles;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod mounts;
pub mod options;
pub mod session;

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use shardfs_proto::client::{Client, ClientConfig};
use tokio::signal::unix::{Signal, SignalKind, signal};

use background::Waiting;
use config::Settings;
use fs::{Fs, FsSettings};
use fuse::{Fuse, Negotiation};
use metrics::Metrics;
use rustix::mount::MountFlags;

/// How long leaving may take once the mount is gone: syncing, giving back what is open, ending sessions.
const LEAVE_MAX: Duration = Duration::from_secs(10);

/// Mounts as `args` say. In the foreground, returns when the mount is gone; else when it is usable, and a
/// process in the background serves it.
///
/// # Errors
/// In words for people; nothing is mounted then.
pub fn run(args: cli::Args) -> Result<()> {
    let parent = background::parent_pipe();
    if parent.is_none() && !args.foreground {
        // Mistakes are told before anything is started.
        let settings = Settings::load(args)?;
        mounts::usable(&settings.mount_point, settings.replace_dead)?;
        return background::start();
    }
    let mut waiting = Waiting::new(parent.or(args.ready_fd))?;
    let outcome = serve(args, parent.is_none(), &mut waiting);
    if let Err(error) = &outcome {
        tracing::error!(error = %format!("{error:#}"), "failed");
        waiting.failed(error);
    }
    outcome
}

fn serve(args: cli::Args, foreground: bool, waiting: &mut Waiting) -> Result<()> {
    let mut settings = Settings::load(args)?;
    logging::start(&settings, foreground)?;
    settings.mount_point = mounts::usable(&settings.mount_point, settings.replace_dead)?;
    // A daemon keeps no directory busy.
    std::env::set_current_dir("/").context("/")?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .thread_name("shardfsd")
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let outcome = runtime.block_on(serve_on(&settings, waiting));
    // What still waits for a node is not waited for.
    runtime.shutdown_background();
    outcome
}

async fn serve_on(settings: &Settings, waiting: &mut Waiting) -> Result<()> {
    let mut signals = Signals::new()?;
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
    if !client.reachable(settings.connect_timeout).await {
        bail!(
            "no node answers at {} within {:?}: is the cluster up, and are these its addresses?",
            settings.endpoints.join(", "),
            settings.connect_timeout
        );
    }
    let fs = Arc::new(Fs::new(client, fs_settings(settings)));
    let metrics = Arc::new(Metrics::default());
    if let Some(listener) = http {
        tokio::spawn(http::serve(listener, metrics.clone(), fs.clone()));
    }
    let negotiation = Negotiation { readdirplus: settings.readdirplus };
    let fuse = Fuse::new(fs.clone(), tokio::runtime::Handle::current(), metrics, negotiation);
    let mut mounted = session::mount(&settings.mount_point, settings, fuse)?;
    if let Err(error) = mounted.answers().await {
        mounted.unmount(std::future::ready(())).await;
        return Err(error);
    }
    tracing::info!(
        mount_point = %settings.mount_point.display(),
        client_id = %settings.client_id,
        endpoints = settings.endpoints.join(","),
        version = env!("CARGO_PKG_VERSION"),
        "mounted"
    );
    waiting.ready();

    let outcome = tokio::select! {
        ended = mounted.ended() => {
            tracing::info!("unmounted from outside");
            ended
        }
        name = signals.next() => {
            tracing::info!(signal = name, "unmounting");
            let ending = mounted.unmount(async { signals.next().await; }).await;
            tracing::info!(?ending, "left the mount point");
            Ok(())
        }
    };
    fs.shut_down(LEAVE_MAX).await;
    outcome
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

/// The signals that unmount.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hang_up: Signal,
}

impl Signals {
    fn new() -> Result<Signals> {
        let on = |kind| signal(kind).context("waiting for signals");
        Ok(Signals {
            terminate: on(SignalKind::terminate())?,
            interrupt: on(SignalKind::interrupt())?,
            hang_up: on(SignalKind::hangup())?,
        })
    }

    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hang_up.recv() => "SIGHUP",
        }
    }
}
