//! Processes that must not be mistaken for others: a pid alone is reused, so a process is its pid, its start time
//! and the boot it runs in. Signals go through a pidfd that was checked after it was opened.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions};
use serde::{Deserialize, Serialize};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncReadExt, Interest};

use crate::failure::{Failure, Result};

/// By which a node is told of its metadata store, apart from its arguments.
const META_VARIABLES: [&str; 6] = [
    "SHARDFS_META",
    "SHARDFS_META_CA_FILE",
    "SHARDFS_META_CERT_FILE",
    "SHARDFS_META_KEY_FILE",
    "SHARDFS_META_USER",
    "SHARDFS_META_PASSWORD_FILE",
];
/// By which a service is told of its manager: what is started here is not that service, which `dev up` may be part of.
const SERVICE_VARIABLES: [&str; 3] = ["NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"];

/// Who a process is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Identity {
    /// Its pid.
    pub pid: u32,
    /// Clock ticks between the boot and its start (field 22 of /proc/PID/stat).
    pub start_ticks: u64,
    /// The boot's id.
    pub boot_id: String,
}

impl Identity {
    /// Of a running process; `None` if there is none, or only its corpse.
    pub fn of(pid: u32) -> Option<Identity> {
        let (state, identity) = Identity::with_state(pid)?;
        (!matches!(state, b'Z' | b'X')).then_some(identity)
    }

    fn with_state(pid: u32) -> Option<(u8, Identity)> {
        let stat = fs::read(format!("/proc/{pid}/stat")).ok()?;
        let (state, start_ticks) = parse_stat(&stat)?;
        Some((state, Identity { pid, start_ticks, boot_id: boot_id()? }))
    }

    /// Whether that very process still runs.
    pub fn is_running(&self) -> bool {
        Identity::of(self.pid).as_ref() == Some(self)
    }

    /// Whether it is stopped by a signal.
    pub fn is_stopped(&self) -> bool {
        fs::read(format!("/proc/{}/stat", self.pid))
            .ok()
            .and_then(|stat| parse_stat(&stat))
            .is_some_and(|(state, start)| state == b'T' && start == self.start_ticks)
    }

    /// Milliseconds since it was started.
    pub fn age_ms(&self) -> u64 {
        /// USER_HZ, in which /proc counts, on every architecture that we run on.
        const TICKS_PER_SECOND: u64 = 100;
        let boot = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
        let now_ms = boot.tv_sec as u64 * 1000 + boot.tv_nsec as u64 / 1_000_000;
        now_ms.saturating_sub(self.start_ticks * (1000 / TICKS_PER_SECOND))
    }

    /// The program it runs; `None` if unreadable, or if the file was replaced since.
    pub fn program(&self) -> Option<PathBuf> {
        let exe = fs::read_link(format!("/proc/{}/exe", self.pid)).ok()?;
        (!exe.to_string_lossy().ends_with(" (deleted)")).then_some(exe)
    }
}

/// State letter and start time. The command's name, in parentheses, may contain anything.
fn parse_stat(stat: &[u8]) -> Option<(u8, u64)> {
    let after = stat.iter().rposition(|b| *b == b')')? + 1;
    let mut fields = std::str::from_utf8(&stat[after..]).ok()?.split_ascii_whitespace();
    let state = *fields.next()?.as_bytes().first()?;
    // The state is field 3; the start time field 22.
    let start = fields.nth(22 - 3 - 1)?.parse().ok()?;
    Some((state, start))
}

fn boot_id() -> Option<String> {
    Some(fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned())
}

/// A process that is watched: a child, or one that an earlier supervisor started.
pub struct Watched {
    identity: Identity,
    pidfd: AsyncFd<OwnedFd>,
}

impl Watched {
    /// Watches a process that runs; `None` if it does not (any more). Needs a tokio runtime.
    pub fn new(identity: Identity) -> io::Result<Option<Watched>> {
        let Some(pidfd) = open(identity.pid)? else { return Ok(None) };
        // Checked after the pidfd holds the process: the pid cannot have changed hands since.
        if !identity.is_running() {
            return Ok(None);
        }
        Watched::register(identity, pidfd).map(Some)
    }

    fn register(identity: Identity, pidfd: OwnedFd) -> io::Result<Watched> {
        // SAFETY: an `OwnedFd` keeps its descriptor open and the same for as long as it lives, and lives in the `AsyncFd`.
        let pidfd = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE)? };
        Ok(Watched { identity, pidfd })
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Sends a signal; one to a process that is gone is no error.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(self.pidfd.get_ref().as_fd(), signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// The process that it started to do its work: a node's parent has one, a daemon none.
    pub fn worker(&self) -> Option<Identity> {
        let pid = worker_pid(self.identity.pid)?;
        self.identity.is_running().then(|| Identity::of(pid)).flatten()
    }

    /// Sends a signal to the process that does the work: the worker, or this one.
    pub fn signal_worker(&self, signal: Signal) -> io::Result<()> {
        if let Some(pid) = worker_pid(self.identity.pid)
            && let Some(pidfd) = open(pid)?
            // Checked after the pidfd holds the process.
            && worker_pid(self.identity.pid) == Some(pid)
        {
            return match rustix::process::pidfd_send_signal(pidfd.as_fd(), signal) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
                Err(e) => Err(e.into()),
            };
        }
        self.signal(signal)
    }

    /// Sends a signal to both.
    pub fn signal_all(&self, signal: Signal) -> io::Result<()> {
        self.signal_worker(signal)?;
        self.signal(signal)
    }

    /// Whether it, or its worker, is stopped by a signal.
    pub fn is_stopped(&self) -> bool {
        self.identity.is_stopped() || self.worker().is_some_and(|worker| worker.is_stopped())
    }

    /// Waits for its end. `None`: it was not our child, so its status is not known. Cancel-safe.
    pub async fn ended(&self) -> io::Result<Option<ExitStatus>> {
        // A pidfd is readable from the process's end on, for ever.
        let _ready = self.pidfd.readable().await?;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(self.pidfd.get_ref().as_fd()), options) {
            Ok(Some(status)) => {
                let raw = match (status.exit_status(), status.terminating_signal()) {
                    (Some(code), _) => (code & 0xff) << 8,
                    (None, Some(signal)) => signal & 0x7f,
                    (None, None) => return Ok(None),
                };
                Ok(Some(ExitStatus::from_raw(raw)))
            }
            Ok(None) | Err(rustix::io::Errno::CHILD) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }
}

fn worker_pid(parent: u32) -> Option<u32> {
    let children = fs::read_to_string(format!("/proc/{parent}/task/{parent}/children")).ok()?;
    children.split_ascii_whitespace().next()?.parse().ok()
}

fn open(pid: u32) -> io::Result<Option<OwnedFd>> {
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return Ok(None) };
    match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
        Ok(fd) => Ok(Some(fd)),
        Err(rustix::io::Errno::SRCH) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

/// Starts a program with its output at the end of `log` and `ready` as its standard input: the daemons are told
/// `--ready-fd 0`. It gets a process group of its own, so that Ctrl-C in a terminal does not reach it. Needs a tokio
/// runtime.
pub fn start(program: &Path, args: &[String], log: &Path, ready: impl Into<Stdio>) -> io::Result<Watched> {
    let log = File::options().create(true).append(true).open(log)?;
    let mut command = Command::new(program);
    command.args(args).stdin(ready).stdout(log.try_clone()?).stderr(log).process_group(0);
    // What a node is to know of its metadata store stands in its arguments; what was left in the environment would add
    // to it. The password stands nowhere else.
    for variable in META_VARIABLES.iter().chain(&SERVICE_VARIABLES) {
        command.env_remove(variable);
    }
    inherit_only_stdio(&mut command);
    // Dropping the handle neither kills nor reaps: `Watched` does the latter.
    let child = command.spawn()?;
    // Nobody else reaps our child: even if it has ended already, its pid is still its own.
    match (open(child.id())?, Identity::with_state(child.id())) {
        (Some(pidfd), Some((_, identity))) => Watched::register(identity, pidfd),
        _ => Err(io::Error::other("ended, and was reaped by somebody else")),
    }
}

/// A process writes `ready` when it serves; why not, if it can say that; and closes the pipe when it ends.
pub async fn says_ready(reader: OwnedFd) -> Result<()> {
    const LINE_BYTES_MAX: u64 = 64 << 10;
    let pipe = tokio::net::unix::pipe::Receiver::from_owned_fd(reader)?;
    let mut line = Vec::new();
    let mut pipe = pipe.take(LINE_BYTES_MAX);
    let mut buffer = [0; 1024];
    while !line.contains(&b'\n') {
        match pipe.read(&mut buffer).await? {
            0 => return Err(Failure::new("did not start")),
            n => line.extend_from_slice(&buffer[..n]),
        }
    }
    if line.starts_with(b"ready") || line.starts_with(b"{") {
        Ok(())
    } else {
        // It says why not.
        Err(Failure::new(format!("did not start: {}", String::from_utf8_lossy(&line).trim())))
    }
}

/// Keeps descriptors that this process was given (a shell's `3>file`) from a program that it starts: one that runs for
/// long would hold them open, and with them perhaps the very mount that it serves.
pub fn inherit_only_stdio(command: &mut Command) -> &mut Command {
    let mark = || {
        // SAFETY: takes no pointers. It is async-signal-safe, as what runs between fork and exec must be.
        let result = unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) };
        // Kernels before 5.11 do not know it; what leaks there is a nuisance, no danger.
        match io::Error::last_os_error().raw_os_error() {
            Some(code) if result != 0 && !matches!(code, libc::ENOSYS | libc::EINVAL) => {
                Err(io::Error::from_raw_os_error(code))
            }
            _ => Ok(()),
        }
    };
    // SAFETY: the closure makes one system call and allocates nothing.
    unsafe { command.pre_exec(mark) }
}

/// "exited with status 1", "killed by signal 9 (KILL)".
pub fn describe(status: Option<ExitStatus>) -> String {
    match status {
        None => "ended".to_owned(),
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("exited with status {code}"),
            (None, Some(signal)) => format!("killed by signal {signal}{}", signal_word(signal)),
            (None, None) => "ended".to_owned(),
        },
    }
}

fn signal_word(signal: i32) -> &'static str {
    match signal {
        libc::SIGKILL => " (KILL)",
        libc::SIGTERM => " (TERM)",
        libc::SIGSEGV => " (SEGV)",
        libc::SIGABRT => " (ABRT)",
        libc::SIGINT => " (INT)",
        libc::SIGBUS => " (BUS)",
        _ => "",
    }
}

/// The last lines of a log, at most `lines` and 8 KiB.
pub fn log_tail(log: &Path, lines: usize) -> Vec<String> {
    use std::io::{Read, Seek, SeekFrom};
    const TAIL_BYTES: u64 = 8 << 10;
    let read = || -> io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let size = file.metadata()?.len();
        file.seek(SeekFrom::Start(size.saturating_sub(TAIL_BYTES)))?;
        let mut bytes = Vec::new();
        file.take(TAIL_BYTES).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let all: Vec<&str> = text.lines().filter(|l| !l.trim().is_empty()).collect();
    all[all.len().saturating_sub(lines)..].iter().map(|l| (*l).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stat_lines_parse() {
        let line = b"42 (a) b) (c) T 1 42 42 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 987654 10 20 30";
        assert_eq!(parse_stat(line), Some((b'T', 987_654)));
        assert_eq!(parse_stat(b"42 (x"), None);
        assert_eq!(parse_stat(b"42 (x) R 1 2"), None);
    }

    #[test]
    fn a_reused_pid_is_another_process() {
        let me = Identity::of(std::process::id()).unwrap();
        assert!(me.is_running());
        assert!(me.age_ms() < 3_600_000, "{}", me.age_ms());
        let other = Identity { start_ticks: me.start_ticks + 1, ..me.clone() };
        assert!(!other.is_running());
        let earlier = Identity { boot_id: "another boot".into(), ..me };
        assert!(!earlier.is_running());
    }

    #[tokio::test]
    async fn descriptors_stay_behind() {
        use std::os::fd::AsRawFd;
        let temp = tempfile::tempdir().unwrap();
        let leak = File::create(temp.path().join("leak")).unwrap();
        // Descriptors of ours close on exec; a shell's do not.
        rustix::io::fcntl_setfd(&leak, rustix::io::FdFlags::empty()).unwrap();
        let log = temp.path().join("log");
        let args = ["-c".to_owned(), format!("test -e /proc/self/fd/{}", leak.as_raw_fd())];
        let watched = start(Path::new("/bin/sh"), &args, &log, Stdio::null()).unwrap();
        assert_eq!(watched.ended().await.unwrap().unwrap().code(), Some(1));
    }

    #[tokio::test]
    async fn ends_are_seen_with_their_status() {
        let temp = tempfile::tempdir().unwrap();
        let log = temp.path().join("log");
        let args = |script: &str| vec!["-c".to_owned(), script.to_owned()];
        let watched =
            start(Path::new("/bin/sh"), &args("echo hello; sleep 0.2; exit 7"), &log, Stdio::null()).unwrap();
        let run = watched.identity().clone();
        assert_eq!(watched.ended().await.unwrap().unwrap().code(), Some(7));
        assert_eq!(log_tail(&log, 3), ["hello"]);
        assert!(!run.is_running());
        assert!(Watched::new(run).unwrap().is_none());

        // One that ends before it is looked at has a status as well.
        let brief = start(Path::new("/bin/false"), &[], &log, Stdio::null()).unwrap();
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(brief.ended().await.unwrap().unwrap().code(), Some(1));

        let watched = start(Path::new("/bin/sleep"), &["100".to_owned()], &log, Stdio::null()).unwrap();
        let sleeper = watched.identity().clone();
        watched.signal(Signal::STOP).unwrap();
        while !sleeper.is_stopped() {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
        watched.signal(Signal::KILL).unwrap();
        let status = watched.ended().await.unwrap();
        assert_eq!(describe(status), "killed by signal 9 (KILL)");
        watched.signal(Signal::KILL).unwrap();
    }
}
