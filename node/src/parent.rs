//! The parent process of a node: it sees the node's end and records it, which ends the node's lease at once.
//!
//! `shardfs-node` starts itself once more as its child, which is the node, and does nothing but wait. A process that was
//! reaped has left the kernel: none of its threads is in a system call any more. So the record is true when it is
//! written, and others need not wait for the lease's term.
//!
//! Invariants: signals to end, and the one to read the settings again, are passed on, also those that the child may have got itself (it takes two at once for
//! one); the parent ends as its child did; a child never outlives its parent,
//! because then nobody would record its end: the kernel kills it.
//!
//! Must not: do anything that may block or fail before the child's end, or hold what is the child's (data directory,
//! sockets, volumes, the descriptor on which it says that it serves).

use std::fs::File;
use std::io::Read;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::{ExitCode, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};
use shardfs_proto::types::NodeId;
use tokio::signal::unix::SignalKind;

use crate::cluster::records::{self, DeathRecord, FORMAT};
use crate::cluster::store::{MetaStore, Txn};
use crate::config::NodeConfig;

/// In the child's environment: what it is called among all processes of this node, now and before.
const INCARNATION: &str = "SHARDFS_NODE_INCARNATION";
/// In the child's environment: the descriptor that it closes when it has registered.
const REGISTERED_FD: &str = "SHARDFS_NODE_REGISTERED_FD";
/// How long the record of a death is tried; later the lease's own end tells as much.
const RECORD_WAIT_MAX: Duration = Duration::from_secs(3);
/// Pause between attempts.
const RECORD_PAUSE: Duration = Duration::from_millis(20);

/// What a node has of its parent.
#[derive(Debug)]
pub struct Child {
    /// Its incarnation.
    pub incarnation: String,
    registered: Option<File>,
}

impl Child {
    /// Of the environment; `None`: this process is the parent, or has none.
    ///
    /// Call it before any other thread exists: it takes the variables out of the environment.
    pub fn of_environment() -> Option<Child> {
        let incarnation = std::env::var(INCARNATION).ok()?;
        let number = std::env::var(REGISTERED_FD).ok().and_then(|fd| fd.parse::<RawFd>().ok());
        // SAFETY: no other thread exists yet.
        unsafe {
            std::env::remove_var(INCARNATION);
            std::env::remove_var(REGISTERED_FD);
        }
        let registered = number.filter(|fd| *fd > libc::STDERR_FILENO).map(|fd| {
            // SAFETY: the parent made this descriptor for this process, and nothing else here knows its number.
            File::from(unsafe { OwnedFd::from_raw_fd(fd) })
        });
        Some(Child { incarnation, registered })
    }

    /// A node without a parent: of a test, or of another program.
    pub fn orphan() -> Child {
        Child { incarnation: crate::cluster::bootstrap::random_id(), registered: None }
    }

    /// The node's record names this incarnation now: its end is worth a record.
    pub fn has_registered(&mut self) {
        if let Some(mut pipe) = self.registered.take() {
            // A parent that is gone takes this process along.
            let _ = std::io::Write::write_all(&mut pipe, b"r");
        }
    }
}

/// Starts the node as a child with the same arguments, and waits for its end. Ends as the child did.
pub fn run(config: &NodeConfig) -> Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let status = runtime.block_on(watch(config))?;
    if let Some(signal) = status.signal() {
        end_by(signal);
    }
    Ok(status.code().and_then(|code| u8::try_from(code).ok()).map_or(ExitCode::FAILURE, ExitCode::from))
}

async fn watch(config: &NodeConfig) -> Result<ExitStatus> {
    use tokio::signal::unix::signal;
    // Before the child exists, so that no signal is lost.
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    // The service manager's, to this process alone, when the node gives no sign of life: its death is to be recorded.
    let mut abort = signal(SignalKind::from_raw(libc::SIGABRT))?;
    let incarnation = crate::cluster::bootstrap::random_id();
    let (told, tell) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).context("making a pipe")?;
    let mut child = {
        // The call between fork and exec duplicates it without the flag.
        let number = std::os::fd::AsRawFd::as_raw_fd(&tell);
        let mut command = std::process::Command::new("/proc/self/exe");
        command
            .arg0("shardfs-node")
            .args(std::env::args_os().skip(1))
            .env(INCARNATION, &incarnation)
            .env(REGISTERED_FD, number.to_string())
            // It names this process; the signs of life are the child's.
            .env_remove("WATCHDOG_PID")
            // Ctrl-C in a terminal reaches the parent, which passes it on.
            .process_group(0);
        let parent = rustix::process::getpid();
        // SAFETY: the closure makes system calls only, which are async-signal-safe, and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                // This thread, the parent's main one, lives as long as the parent does.
                rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
                if rustix::process::getppid() != Some(parent) {
                    return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
                }
                // SAFETY: the descriptor is open until exec; clearing its flag touches nothing else.
                if libc::fcntl(number, libc::F_SETFD, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
                Ok(())
            });
        }
        tokio::process::Command::from(command).spawn().context("starting the node")?
    };
    drop(tell);
    give_away_ready_fd(config.ready_fd);
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).and_then(Pid::from_raw);
    let pass_on = |signal: Signal| {
        if let Some(pid) = pid {
            // It may have ended, and is not reaped before this loop sees it: the pid is its own.
            let _ = rustix::process::kill_process(pid, signal);
        }
    };
    let store: Arc<dyn MetaStore> = config.meta.connect().context("--meta")?;
    // A connection that stands: what it takes to make one would delay the record.
    let warm = {
        let (store, key) = (store.clone(), records::death_key(&config.id));
        tokio::spawn(async move { drop(crate::cluster::store::get(&*store, key).await) })
    };
    let status = loop {
        tokio::select! {
            status = child.wait() => break status.context("waiting for the node")?,
            _ = terminate.recv() => pass_on(Signal::TERM),
            _ = interrupt.recv() => pass_on(Signal::INT),
            _ = hangup.recv() => pass_on(Signal::HUP),
            _ = abort.recv() => {
                pass_on(Signal::ABORT);
                // One that was stopped takes no signal but this one.
                pass_on(Signal::CONT);
            }
        }
    };
    warm.abort();
    if !status.success() && has_registered(told) {
        let record = DeathRecord { v: FORMAT, incarnation, how: status.to_string() };
        match tokio::time::timeout(RECORD_WAIT_MAX, record_death(&*store, &config.id, &record)).await {
            Ok(()) => tracing::warn!(node = %config.id, %status, "the node ended; its death is recorded"),
            Err(_) => {
                tracing::warn!(node = %config.id, %status, "the node ended; its death could not be recorded in time")
            }
        }
    }
    Ok(status)
}

/// Whether the child has written to the pipe; its end of it is closed.
fn has_registered(pipe: OwnedFd) -> bool {
    let mut byte = [0];
    File::from(pipe).read(&mut byte).is_ok_and(|read| read == 1)
}

async fn record_death(store: &dyn MetaStore, id: &NodeId, record: &DeathRecord) {
    // One that is late harms nobody: it names the incarnation. One that is made twice neither.
    let txn = Txn::new().put(records::death_key(id), records::encode(record));
    while let Err(error) = store.txn(txn.clone()).await {
        tracing::debug!(%error, "recording the node's death: once more");
        tokio::time::sleep(RECORD_PAUSE).await;
    }
}

/// The child has it; a copy here would hide its end from whoever reads.
fn give_away_ready_fd(number: Option<RawFd>) {
    let Some(number) = number.filter(|number| *number >= 0) else { return };
    if number > libc::STDERR_FILENO {
        // SAFETY: it was given to this process for the node, which has its own copy; nothing here uses the number.
        drop(unsafe { OwnedFd::from_raw_fd(number) });
    } else if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        // SAFETY: replaces one of the standard descriptors by another open file.
        unsafe {
            libc::dup2(std::os::fd::AsRawFd::as_raw_fd(&null), number);
        }
    }
}

/// Ends this process by the same signal, so that whoever waits for it hears how the node ended.
fn end_by(signal: i32) {
    let no_core = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: resets the signal and raises it in this process; the core, if any, is the child's.
    unsafe {
        libc::setrlimit(libc::RLIMIT_CORE, &raw const no_core);
        libc::signal(signal, libc::SIG_DFL);
        libc::raise(signal);
    }
}
