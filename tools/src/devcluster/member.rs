//! One supervised process: its command line, what state it is in, when it is started again.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use shardfs_proto::types::clock;
use tokio::sync::oneshot;

use super::control::{MemberStatus, Reply};
use super::process::Watched;
use super::state::{Layout, Settings};

/// The descriptor on which a process says that it serves: its standard input is the pipe (`process::start`).
const READY_FD: &str = "0";
/// The mount's name among the members.
pub const MOUNT: &str = "mount";
/// Wait before the first restart; doubles with every failure.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// The longest wait.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// Failures in a row after which a process is left alone: some 40 s of trying.
const FAILURES_MAX: u32 = 12;
/// A process that served for so long has recovered: its failures are forgotten.
const HEALTHY_AFTER: Duration = Duration::from_secs(30);

/// What state a member is in.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Phase {
    /// Started, not serving yet.
    Starting,
    /// Serving.
    Running,
    /// Ended because somebody asked for it (`dev kill`), or never started.
    Stopped,
    /// Ended by itself; waits to be started again.
    Restarting,
    /// Ended by itself too often.
    Failed,
}

/// A node or the mount.
pub struct Member {
    /// `node-1` ... or [`MOUNT`].
    pub name: String,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
    /// Where its output goes.
    pub log: PathBuf,
    /// gRPC addresses.
    pub endpoints: Vec<String>,
    /// Metrics and health.
    pub http: Option<String>,
    /// State.
    pub phase: Phase,
    /// The process while it runs.
    pub process: Option<Arc<Watched>>,
    /// Counts starts: events about an earlier process are ignored.
    pub generation: u64,
    /// Whether its next end was asked for.
    pub asked_to_end: bool,
    /// Those who wait for it to serve.
    pub start_waiters: Vec<oneshot::Sender<Reply>>,
    /// Those who wait for its end.
    pub end_waiters: Vec<oneshot::Sender<Reply>>,
    /// How it ended last.
    pub last_end: Option<String>,
    /// Unexpected ends since the supervisor started.
    pub restarts: u32,
    failures: u32,
    started: Instant,
}

impl Member {
    /// A node of a cluster.
    pub fn node(layout: &Layout, settings: &Settings, node: &str, program: PathBuf) -> Member {
        let socket = Layout::node_socket(settings, node).display().to_string();
        let grpc = settings.ports.grpc.get(node).copied().unwrap_or(0);
        let http = settings.ports.http.get(node).copied().unwrap_or(0);
        let mut args = vec![
            ("--id", node.to_owned()),
            ("--data-dir", layout.node_data(node).display().to_string()),
            ("--listen", format!("127.0.0.1:{grpc}")),
            ("--listen-unix", socket.clone()),
            ("--http", format!("127.0.0.1:{http}")),
        ];
        let meta = settings.meta();
        let file = |path: Option<std::path::PathBuf>| path.map(|path| path.display().to_string());
        let meta = [
            ("--meta", Some(meta.address)),
            ("--meta-ca-file", file(meta.ca_file)),
            ("--meta-cert-file", file(meta.cert_file)),
            ("--meta-key-file", file(meta.key_file)),
            ("--meta-user", meta.user),
            ("--meta-password-file", file(meta.password_file)),
        ];
        args.extend(meta.into_iter().filter_map(|(flag, value)| Some((flag, value?))));
        args.push(("--ready-fd", READY_FD.to_owned()));
        if let Some(bytes) = settings.default_limit_bytes {
            args.push(("--default-limit", bytes.to_string()));
        }
        Member {
            args: args.into_iter().flat_map(|(flag, value)| [flag.to_owned(), value]).collect(),
            endpoints: vec![format!("unix:{socket}"), format!("http://127.0.0.1:{grpc}")],
            http: Some(format!("127.0.0.1:{http}")),
            ..Member::new(layout, node, program)
        }
    }

    /// The mount of a cluster.
    pub fn mount(layout: &Layout, settings: &Settings, mount: &std::path::Path, program: PathBuf) -> Member {
        let http = settings.ports.http.get(MOUNT).copied().unwrap_or(0);
        // A dead mount stays until its successor is ready: what programs write meanwhile must fail, not land
        // in the directory below.
        let mut args =
            vec![mount.display().to_string(), "--foreground".to_owned(), "--replace-dead".to_owned()];
        // The supervisor starts it again, and `dev kill mount` means what it says.
        args.push("--no-restart".to_owned());
        args.extend(["--ready-fd".to_owned(), READY_FD.to_owned()]);
        args.extend(["--endpoints".to_owned(), layout.node_endpoints(settings).join(",")]);
        args.extend(["--client-id".to_owned(), settings.client_id.to_string()]);
        args.extend(["--http".to_owned(), format!("127.0.0.1:{http}")]);
        for option in &settings.mount_options {
            args.extend(["-o".to_owned(), option.clone()]);
        }
        Member { args, http: Some(format!("127.0.0.1:{http}")), ..Member::new(layout, MOUNT, program) }
    }

    fn new(layout: &Layout, name: &str, program: PathBuf) -> Member {
        Member {
            name: name.to_owned(),
            program,
            args: Vec::new(),
            log: layout.log(name),
            endpoints: Vec::new(),
            http: None,
            phase: Phase::Stopped,
            process: None,
            generation: 0,
            asked_to_end: false,
            start_waiters: Vec::new(),
            end_waiters: Vec::new(),
            last_end: None,
            restarts: 0,
            failures: 0,
            started: clock::monotonic(),
        }
    }

    /// Notes a start; returns its generation.
    pub fn note_start(&mut self, process: Arc<Watched>) -> u64 {
        self.generation += 1;
        self.phase = Phase::Starting;
        self.process = Some(process);
        self.asked_to_end = false;
        self.started = clock::monotonic();
        self.generation
    }

    /// Notes an unexpected end or a start that failed; the wait before the next try, or `None`: no more tries.
    pub fn note_failure(&mut self) -> Option<Duration> {
        if self.phase == Phase::Running && self.started.elapsed() >= HEALTHY_AFTER {
            self.failures = 0;
        }
        let wait = backoff(self.failures);
        self.failures += 1;
        self.restarts += 1;
        self.phase = if wait.is_some() { Phase::Restarting } else { Phase::Failed };
        wait
    }

    /// Somebody wants it to run: earlier failures do not count.
    pub fn forget_failures(&mut self) {
        self.failures = 0;
    }

    /// For people.
    pub fn status(&self) -> MemberStatus {
        let frozen = self.process.as_ref().is_some_and(|p| p.is_stopped());
        let state = match self.phase {
            _ if frozen => "frozen",
            Phase::Starting => "starting",
            Phase::Running => "running",
            Phase::Stopped => "stopped",
            Phase::Restarting => "restarting",
            Phase::Failed => "failed",
        };
        MemberStatus {
            name: self.name.clone(),
            state: state.to_owned(),
            pid: self.process.as_ref().map(|p| p.worker().map_or(p.identity().pid, |worker| worker.pid)),
            uptime_ms: self.process.as_ref().map(|p| p.identity().age_ms()),
            endpoints: self.endpoints.clone(),
            http: self.http.clone(),
            restarts: self.restarts,
            last_end: self.last_end.clone(),
            log: self.log.clone(),
        }
    }
}

/// The wait after so many failures in a row.
fn backoff(failures: u32) -> Option<Duration> {
    (failures < FAILURES_MAX).then(|| (BACKOFF_MIN * 2u32.pow(failures.min(10))).min(BACKOFF_MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_grows_and_ends() {
        let waits: Vec<u128> = (0..FAILURES_MAX).filter_map(backoff).map(|w| w.as_millis()).collect();
        assert_eq!(waits, [100, 200, 400, 800, 1600, 3200, 5000, 5000, 5000, 5000, 5000, 5000]);
        assert_eq!(backoff(FAILURES_MAX), None);
        assert_eq!(backoff(u32::MAX), None);
    }
}
