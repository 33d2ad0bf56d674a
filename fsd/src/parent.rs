//! The parent process of a daemon: when the daemon dies, it starts the next one at the same mount point.
//!
//! `shardfsd` starts itself once more as its child, which is the daemon, and does nothing but wait: it has one thread, no runtime, no
//! connection, and nothing of the mount open. A daemon that ends in order (unmounted, asked to end, refused before it had
//! mounted) takes its parent along. One that dies (by a signal, a panic, or because it could not go on) leaves a dead mount; the
//! next takes that away as late as it can, so that nothing is written to the directory below meanwhile, and mounts in its place.
//!
//! Invariants: a signal to end, and the one to read the settings again, is passed on once; a child never outlives its parent by more than it
//! takes to unmount in order, since the kernel sends it SIGTERM then; a mount that somebody took away does not come back; of
//! what is mounted at the path only a dead mount that a child has made is touched (`records::Place`).

mod signals;

use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::process::{Child as Process, Command, ExitCode, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::io::FdFlags;
use rustix::process::{Pid, Signal};
use shardfs_proto::types::clock;

use crate::background::{READY_VARIABLE, Waiting};
use crate::cli::Args;
use crate::config::{Refused, Settings};
use crate::logging::{self, Log};
use crate::records::{self, Place, Records};
use crate::{notify, session};
use signals::Signals;

/// In the child's environment: the descriptor of the records, the one that waits for the mount or `-`, and how often it was restarted.
const CHILD: &str = "SHARDFSD_CHILD";
/// Pause before the second restart in a row; the first has none, each further one twice as long.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// The longest pause.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Restarts in a row after which the mount is given up: some 20 s of trying.
const RESTARTS_IN_A_ROW_MAX: u32 = 10;
/// A daemon that lived for so long has recovered: the restarts before it do not count.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// What a daemon has of its parent.
pub struct Child {
    /// What it tells, and what the daemon before it has left.
    pub records: Arc<Records>,
    /// Where to say that the mount is usable.
    pub ready: Option<RawFd>,
    /// How often this mount's daemon was started again; 0: it is the first.
    pub restarts: u32,
}

impl Child {
    /// Of the environment; `None`: this process is no parent's child.
    pub fn of_environment() -> Result<Option<Child>> {
        let Ok(words) = std::env::var(CHILD) else { return Ok(None) };
        let mut words = words.split(',');
        let mut number = || words.next().and_then(|word| word.parse::<RawFd>().ok());
        let (file, ready, restarts) = (number(), number(), number());
        // An inherited variable without its descriptor means nothing.
        let Some(file) = file.filter(|fd| is_records(*fd)) else { return Ok(None) };
        // SAFETY: the parent made it for this process, and nothing else here knows its number, which was just looked at.
        let file = unsafe { OwnedFd::from_raw_fd(file) };
        // Nothing that is started here shall have it.
        rustix::io::fcntl_setfd(&file, FdFlags::CLOEXEC).context("what the parent knows")?;
        Ok(Some(Child {
            records: Arc::new(Records::taken_over(file)?),
            ready,
            restarts: restarts.and_then(|n| u32::try_from(n).ok()).unwrap_or(0),
        }))
    }

    /// The mount of the daemon that died.
    pub fn left(&self) -> Option<Place> {
        (self.restarts > 0).then(|| self.records.told().place).flatten()
    }
}

fn is_records(fd: RawFd) -> bool {
    let link = std::fs::read_link(format!("/proc/self/fd/{fd}"));
    let prefix = format!("/memfd:{}", records::NAME);
    fd > libc::STDERR_FILENO
        && link.is_ok_and(|target| target.to_str().is_some_and(|target| target.starts_with(&prefix)))
}

/// Starts the daemon as a child with the same arguments, and again when it dies. Returns as the last one ended.
///
/// # Errors
/// In words for people: the daemon could not be started, or died too often.
pub fn run(args: Args, foreground: bool, waiting: &mut Waiting) -> Result<ExitCode> {
    let settings = Settings::load(args)?;
    let log = logging::start(&settings, foreground)?;
    let parent = Parent {
        // Before the child exists, so that none is lost.
        signals: Signals::block().context("waiting for signals")?,
        records: Records::create()?,
        folder: std::env::current_dir().ok().and_then(|f| CString::new(OsString::from(f).into_vec()).ok()),
        log,
        replace_dead: settings.replace_dead,
    };
    // It keeps no directory busy; its children begin where it was begun.
    std::env::set_current_dir("/").context("/")?;
    let outcome = parent.keep_up(waiting);
    if let Err(error) = &outcome {
        notify::died(&format!("{error:#}"));
    }
    outcome
}

struct Parent {
    signals: Signals,
    records: Records,
    /// Where relative paths of the arguments lead from.
    folder: Option<CString>,
    log: Log,
    /// Whoever starts this program again has it take away what is left.
    replace_dead: bool,
}

/// How a child ended.
struct End {
    status: ExitStatus,
    lived: Duration,
    /// Somebody wants the parent to end.
    asked: bool,
}

/// What follows from that.
#[derive(PartialEq, Eq, Debug)]
enum Next {
    /// To end, with this status.
    End(u8),
    /// The same, and it has to be told why.
    Fail(String),
    /// The same, since the settings are refused.
    Refuse(String),
    /// To start the next; why.
    Again(String),
}

impl Parent {
    fn keep_up(&self, waiting: &mut Waiting) -> Result<ExitCode> {
        let mut restarts = Restarts::default();
        let mut mounted = false;
        loop {
            self.records.begin_anew()?;
            let (next, lived) = match self.start(waiting, restarts.total) {
                Ok(child) => {
                    // The child has it; a copy here would hide the child's end from whoever reads.
                    *waiting = Waiting::default();
                    let end = self.wait(child)?;
                    let told = self.records.told();
                    mounted |= told.place.as_ref().is_some_and(|place| place.mount.is_some());
                    (next(&end, &told, mounted, still_there(told.place.as_ref())?), end.lived)
                }
                Err(error) if mounted => (Next::Again(format!("{error:#}")), Duration::ZERO),
                Err(error) => return Err(error),
            };
            let place = self.records.told().place;
            let why = match next {
                Next::End(code) => {
                    if code != 0 {
                        self.leave(place.as_ref());
                    }
                    return Ok(ExitCode::from(code));
                }
                Next::Fail(why) => {
                    self.leave(place.as_ref());
                    bail!("{why}");
                }
                Next::Refuse(why) => {
                    self.leave(place.as_ref());
                    return Err(Refused(why).into());
                }
                Next::Again(why) => why,
            };
            let Some(pause) = restarts.next(lived) else {
                self.leave(place.as_ref());
                bail!(
                    "the daemon died {RESTARTS_IN_A_ROW_MAX} times in a row, the last time by: {why}; the mount is given up"
                );
            };
            tracing::error!(
                why,
                restarts = restarts.total,
                pause_ms = pause.as_millis() as u64,
                "the daemon died: it is started again"
            );
            notify::died(&format!("the daemon died ({why}) and is started again"));
            if self.pause(pause) {
                self.leave(place.as_ref());
                return Ok(ExitCode::SUCCESS);
            }
            if !still_there(place.as_ref())? {
                tracing::info!("the mount was taken away meanwhile: the daemon is not started again");
                return Ok(ExitCode::SUCCESS);
            }
        }
    }

    fn start(&self, waiting: &Waiting, restarts: u32) -> Result<Process> {
        let (records, ready) = (self.records.as_fd().as_raw_fd(), waiting.descriptor());
        let shown = ready.map_or_else(|| "-".to_owned(), |fd| fd.to_string());
        let mut words = std::env::args_os();
        let program = words.next().unwrap_or_else(|| "shardfsd".into());
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0(program)
            .args(words)
            .env(CHILD, format!("{records},{shown},{restarts}"))
            .env_remove(READY_VARIABLE)
            // It names this process; the signs of life are the child's.
            .env_remove("WATCHDOG_PID")
            // Ctrl-C in a terminal reaches the parent, which passes it on.
            .process_group(0);
        let parent = rustix::process::getpid();
        let (folder, mask) = (self.folder.clone(), self.signals.before());
        // SAFETY: the closure makes system calls only, which are async-signal-safe, and allocates nothing.
        unsafe {
            command.pre_exec(move || {
                // This thread, the parent's only one, lives as long as the parent does.
                rustix::process::set_parent_process_death_signal(Some(Signal::TERM))?;
                if rustix::process::getppid() != Some(parent) {
                    return Err(std::io::Error::from_raw_os_error(libc::ESRCH));
                }
                if let Some(folder) = &folder {
                    // One that is gone is of no use to the first child either; a later one knows its mount point.
                    libc::chdir(folder.as_ptr());
                }
                for fd in [Some(records), ready].into_iter().flatten() {
                    if libc::fcntl(fd, libc::F_SETFD, 0) < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                signals::restore(&mask)
            });
        }
        command.spawn().context("starting the daemon")
    }

    /// Waits for a child's end, and passes on what is said to this process meanwhile.
    fn wait(&self, mut child: Process) -> Result<End> {
        let started = clock::monotonic();
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("the daemon's number")?;
        // It is reaped by this thread only, so that the number is its own until then.
        let pass_on = |signal: Signal| {
            if let Err(error) = rustix::process::kill_process(pid, signal) {
                tracing::warn!(%error, ?signal, "cannot pass a signal on");
            }
        };
        let mut asked = false;
        loop {
            if let Some(status) = child.try_wait().context("waiting for the daemon")? {
                return Ok(End { status, lived: started.elapsed(), asked });
            }
            match self.signals.next(None) {
                Some(libc::SIGTERM) => {
                    asked = true;
                    pass_on(Signal::TERM);
                }
                Some(libc::SIGINT) => {
                    asked = true;
                    pass_on(Signal::INT);
                }
                Some(libc::SIGHUP) => {
                    self.reopen_log();
                    pass_on(Signal::HUP);
                }
                // The service manager's, when the daemon gives no sign of life; it starts this program again itself.
                Some(libc::SIGABRT) => {
                    asked = true;
                    pass_on(Signal::ABORT);
                    // One that was stopped takes no signal but this one.
                    pass_on(Signal::CONT);
                }
                // The child's, which is looked at above.
                Some(_) | None => {}
            }
        }
    }

    /// Waits for so long; whether somebody wants the parent to end.
    fn pause(&self, pause: Duration) -> bool {
        let end = clock::monotonic() + pause;
        loop {
            let left = end.saturating_duration_since(clock::monotonic());
            match self.signals.next(Some(left)) {
                Some(libc::SIGTERM | libc::SIGINT | libc::SIGABRT) => return true,
                Some(libc::SIGHUP) => self.reopen_log(),
                Some(_) => {}
                None if left.is_zero() => return false,
                None => {}
            }
        }
    }

    fn reopen_log(&self) {
        if let Err(error) = self.log.reopen() {
            tracing::error!(error = %format!("{error:#}"), "the log goes on in the old file");
        }
    }

    /// Leaves no dead mount behind, unless whoever starts this program again sees to that: until then what programs write
    /// fails, instead of landing in the directory below.
    fn leave(&self, place: Option<&Place>) {
        let Some(place) = place.filter(|_| !self.replace_dead) else { return };
        if let Err(error) = session::clear(place) {
            tracing::error!(error = %format!("{error:#}"), "the dead mount stays");
        }
    }
}

/// Whether the mount of a child that died is there, as far as it is known which it is.
fn still_there(place: Option<&Place>) -> Result<bool> {
    match place {
        Some(place) if place.mount.is_some() => place.is_there(),
        Some(_) | None => Ok(true),
    }
}

/// `mounted`: this child or one before it had mounted. `there`: its mount was not taken away.
fn next(end: &End, told: &records::Told, mounted: bool, there: bool) -> Next {
    let code = end.status.code().and_then(|code| u8::try_from(code).ok());
    if code == Some(0) {
        return Next::End(0);
    }
    let failed = told.failed.as_ref();
    let why = match failed {
        Some(failed) => format!("{}: {}", end.status, failed.words),
        None => end.status.to_string(),
    };
    match code {
        // It has said itself why.
        Some(code) if failed.is_some() && (end.asked || !mounted || !there) => Next::End(code),
        _ if end.asked => Next::End(1),
        _ if !mounted => Next::Fail(format!("the daemon ended before the mount was usable: {why}")),
        // Somebody had unmounted it, maybe lazily.
        _ if !there => Next::End(0),
        Some(_) if failed.is_some_and(|failed| failed.refused) => Next::Refuse(format!(
            "the daemon died, and is not started again, since its settings are refused now: {why}"
        )),
        _ => Next::Again(why),
    }
}

/// Counts restarts.
#[derive(Default, Debug)]
struct Restarts {
    total: u32,
    in_a_row: u32,
}

impl Restarts {
    /// The pause before the next, after a daemon that has lived for so long; `None`: there were too many.
    fn next(&mut self, lived: Duration) -> Option<Duration> {
        if lived >= HEALTHY_AFTER {
            self.in_a_row = 0;
        }
        if self.in_a_row >= RESTARTS_IN_A_ROW_MAX {
            return None;
        }
        let pause = match self.in_a_row {
            0 => Duration::ZERO,
            n => (BACKOFF_FIRST * 2u32.pow(n - 1)).min(BACKOFF_MAX),
        };
        self.in_a_row += 1;
        self.total = self.total.saturating_add(1);
        Some(pause)
    }
}

#[cfg(test)]
mod tests;
