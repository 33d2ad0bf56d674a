//! The supervisor: holds the metadata store (unless that is an etcd), starts nodes and the mount, watches them, answers the control socket.
//!
//! One loop owns all state; tasks (one for each process's end, one for each start, one for each connection) only
//! send it events through a bounded channel. A process that ends unexpectedly is started again after a growing
//! wait; one that was ended by `dev kill` stays down until `dev start`. Losing the supervisor loses none of
//! the processes: they are written down before anything else happens with them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use shardfs_node::cluster::embedded_server;
use shardfs_proto::types::clock;
use tokio::signal::unix::SignalKind;
use tokio::sync::{mpsc, oneshot};
use tracing::{error, info, warn};

use super::cleanup;
use super::control::{ClusterStatus, KillSignal, Reply, Request};
use super::housekeeping::{absent_is_fine, choose_ports, move_log};
use super::listen::{self, Asked};
use super::member::{MOUNT, Member, Phase};
use super::process::{self, Identity, Watched};
use super::state::{self, Layout, ProcessRecord, Processes, Settings};
use crate::failure::{Failure, Result};
use crate::system::{self, MountHealth};

/// Events on their way to the loop.
const EVENTS_MAX: usize = 256;
/// Requests on their way to the loop.
const REQUESTS_MAX: usize = 16;
/// How long a process may take to serve: a node replays its logs and makes file systems.
const READY_MAX: Duration = Duration::from_secs(90);
/// How often logs are looked at.
const LOG_INTERVAL: Duration = Duration::from_secs(10);
/// Lines of a log that an error shows.
const TAIL_LINES: usize = 8;
/// On SIGTERM nobody is there to be told that the mount is busy: it is detached.
const TERM_FORCES: bool = true;

/// The programs that a supervisor starts.
#[derive(Clone, Debug)]
pub struct Programs {
    /// `shardfs-node`.
    pub node: PathBuf,
    /// `shardfsd`.
    pub daemon: PathBuf,
}

impl Programs {
    /// Beside this program, in PATH, or named by SHARDFS_NODE_BIN and SHARDFSD_BIN.
    pub fn find() -> Result<Programs> {
        Ok(Programs {
            node: system::find_program("shardfs-node", "SHARDFS_NODE_BIN")?,
            daemon: system::find_program("shardfsd", "SHARDFSD_BIN")?,
        })
    }
}

enum Event {
    Ready { name: String, generation: u64, outcome: Result<()> },
    Ended { name: String, generation: u64, status: Option<ExitStatus> },
    Retry { name: String, generation: u64 },
}

/// The supervisor of one cluster.
pub struct Supervisor {
    layout: Layout,
    settings: Settings,
    processes: Processes,
    members: BTreeMap<String, Member>,
    events: mpsc::Sender<Event>,
    inbox: mpsc::Receiver<Event>,
    requests: (mpsc::Sender<Asked>, mpsc::Receiver<Asked>),
    started: Instant,
    /// While false, a member that fails is no reason to try again but one to give up the start.
    up: bool,
    /// Whose start failed, and why.
    startup_failure: Option<(String, Failure)>,
    /// Why the cluster is up without its mount.
    mount_failure: Option<Failure>,
    /// Held for life; released by the kernel when the process ends, however it ends.
    _lock: File,
    /// The embedded metadata store, if it is that one.
    _meta: Option<embedded_server::Handle>,
}

impl Supervisor {
    /// Starts everything, adopting what still runs. When it fails, everything is stopped again; the nodes need no mount,
    /// though, and stay when only that fails ([`Supervisor::take_mount_failure`]).
    pub async fn start(
        layout: Layout,
        mut settings: Settings,
        programs: Programs,
        lock: File,
        progress: &mut dyn FnMut(&str),
    ) -> Result<Supervisor> {
        let old = layout.read_processes()?;
        choose_ports(&mut settings, &old);
        layout.write_settings(&settings)?;

        match &settings.etcd {
            Some(etcd) => progress(&format!("looking into {}", etcd.reached.address)),
            None => progress("starting the metadata store"),
        }
        let listener = listen::bind(&Layout::control_socket(&settings))?;
        let meta = super::meta::serve(&layout, &settings).await?;
        super::meta::bootstrap(&layout, &mut settings).await?;

        let (events, inbox) = mpsc::channel(EVENTS_MAX);
        let mut supervisor = Supervisor {
            processes: Processes {
                supervisor: Identity::of(std::process::id()),
                members: old.members.clone(),
            },
            layout,
            settings,
            members: BTreeMap::new(),
            inbox,
            requests: mpsc::channel(REQUESTS_MAX),
            started: clock::monotonic(),
            up: false,
            startup_failure: None,
            mount_failure: None,
            _lock: lock,
            _meta: meta,
            events,
        };
        supervisor.save()?;
        match supervisor.bring_up(&programs, &old, progress).await {
            Ok(()) => {
                tokio::spawn(listen::accept(listener, supervisor.requests.0.clone()));
                supervisor.up = true;
                Ok(supervisor)
            }
            Err(failure) => {
                error!("the start failed, stopping everything: {failure}");
                if let Err(e) = supervisor.stop_everything(true).await {
                    warn!("cleaning up: {e}");
                }
                Err(failure)
            }
        }
    }

    async fn bring_up(
        &mut self,
        programs: &Programs,
        old: &Processes,
        progress: &mut dyn FnMut(&str),
    ) -> Result<()> {
        let nodes = self.settings.node_names();
        let mut members: Vec<Member> = nodes
            .iter()
            .map(|node| Member::node(&self.layout, &self.settings, node, programs.node.clone()))
            .collect();
        if let Some(mount) = &self.settings.mount {
            members.push(Member::mount(&self.layout, &self.settings, mount, programs.daemon.clone()));
        }
        for member in members {
            let name = member.name.clone();
            self.members.insert(name.clone(), member);
            self.adopt_or_end(&name, old.members.get(&name)).await?;
        }
        // A mount that is no longer wanted, or nodes of a broken state file.
        for (name, record) in old.members.iter().filter(|(name, _)| !self.members.contains_key(*name)) {
            info!("stopping {name}, which is no longer part of the cluster");
            cleanup::stop_process(record, READY_MAX).await?;
            self.processes.members.remove(name);
        }

        let adopted: Vec<&str> =
            self.members.values().filter(|m| m.phase == Phase::Running).map(|m| m.name.as_str()).collect();
        if !adopted.is_empty() {
            progress(&format!("taking over what still runs: {}", adopted.join(", ")));
        }
        let missing: Vec<String> =
            nodes.into_iter().filter(|n| self.members[n].phase == Phase::Stopped).collect();
        if !missing.is_empty() {
            progress(&format!("starting {}", missing.join(", ")));
        }
        for node in &missing {
            self.launch(node)?;
        }
        self.settle().await.map_err(|(_, failure)| failure)?;
        let Some(mount) = self.settings.mount.clone() else { return Ok(()) };
        if self.members[MOUNT].phase == Phase::Stopped {
            progress(&format!("mounting on {}", mount.display()));
            let started = match self.launch(MOUNT) {
                Ok(()) => self.settle().await,
                Err(failure) => Err((MOUNT.to_owned(), failure)),
            };
            match started {
                Ok(()) => {}
                Err((name, failure)) if name == MOUNT => return self.go_unmounted(programs, failure).await,
                Err((_, failure)) => return Err(failure),
            }
        }
        self.settings.mount_that_worked = self.settings.mount_place();
        self.layout.write_settings(&self.settings)
    }

    /// Handles events until nothing starts any more; the first failure is the answer, with whose it is.
    async fn settle(&mut self) -> std::result::Result<(), (String, Failure)> {
        while self.members.values().any(|m| m.phase == Phase::Starting) {
            self.handle_next().await;
            if let Some(failure) = self.startup_failure.take() {
                return Err(failure);
            }
        }
        Ok(())
    }

    async fn handle_next(&mut self) {
        let event = self.inbox.recv().await.expect("this supervisor holds a sender");
        self.handle(event);
    }

    /// Goes on without the mount, whose start failed. One that never worked is forgotten for the last one that did:
    /// it must not fail every start from now on.
    async fn go_unmounted(&mut self, programs: &Programs, failure: Failure) -> Result<()> {
        while let Some(process) = self.members.get(MOUNT).and_then(|m| m.process.clone()) {
            process.signal(Signal::KILL)?;
            self.handle_next().await;
            if let Some((name, failure)) = self.startup_failure.take()
                && name != MOUNT
            {
                return Err(failure);
            }
        }
        let failed = self.settings.mount_place();
        let place = failed.as_ref().map(|p| p.path.display().to_string()).unwrap_or_default();
        let dir = self.layout.dir().display().to_string();
        let what_to_do = if failed == self.settings.mount_that_worked {
            format!(
                "`shardfs --dir {dir} dev start mount` tries again; `dev up --no-mount` starts without it"
            )
        } else {
            self.settings.set_mount_place(self.settings.mount_that_worked.clone());
            self.layout.write_settings(&self.settings)?;
            if let Some(old) = self.members.remove(MOUNT)
                && let Some(mount) = &self.settings.mount
            {
                let mut member = Member::mount(&self.layout, &self.settings, mount, programs.daemon.clone());
                // Events about the process that failed may still come.
                member.generation = old.generation;
                self.members.insert(MOUNT.to_owned(), member);
            }
            format!(
                "when the reason is mended, `shardfs --dir {dir} mount {place}` mounts the running cluster"
            )
        };
        self.mount_failure =
            Some(failure.context("the nodes are up, but nothing is mounted").hint_first(what_to_do));
        self.save()
    }

    /// Why the cluster is up without its mount, if that is so; told once.
    pub fn take_mount_failure(&mut self) -> Option<Failure> {
        self.mount_failure.take()
    }

    /// A process of an earlier supervisor: kept if it is just what would be started now, else ended.
    async fn adopt_or_end(&mut self, name: &str, record: Option<&ProcessRecord>) -> Result<()> {
        let Some(record) = record.filter(|r| r.identity.is_running()) else { return Ok(()) };
        let member = self.members.get_mut(name).expect("members are made before they are adopted");
        let same =
            record.args == member.args && record.identity.program().as_deref() == Some(&member.program);
        let usable = match (&self.settings.mount, name) {
            // A daemon whose mount is gone or dead is of no use.
            (Some(mount), MOUNT) => {
                system::mount_at(mount)?.is_some_and(|m| m.fs_type.starts_with("fuse"))
                    && !matches!(system::probe(mount).await, Ok(MountHealth::Dead) | Err(_))
            }
            _ => true,
        };
        if same
            && usable
            && let Some(process) = Watched::new(record.identity.clone())?
        {
            info!("{name} still runs (pid {}): adopting it", record.identity.pid);
            // It may have been frozen.
            process.signal_all(Signal::CONT)?;
            let process = Arc::new(process);
            let generation = member.note_start(process.clone());
            member.phase = Phase::Running;
            self.watch(name, generation, process);
            return Ok(());
        }
        info!("{name} still runs (pid {}) as something else: replacing it", record.identity.pid);
        if name == MOUNT
            && let Some(mount) = &self.settings.mount
            && system::mount_at(mount)?.is_some_and(|m| m.fs_type.starts_with("fuse"))
        {
            // What uses it would hang on a daemon that is told to end: it is detached, not refused.
            let _ = system::unmount(mount, true);
        }
        cleanup::stop_process(record, READY_MAX).await
    }

    /// Runs until `dev down` or a signal. Everything is stopped when it returns `Ok`.
    pub async fn run(mut self) -> Result<()> {
        let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
        let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt())?;
        // The terminal that started it may go.
        let _hangup = tokio::signal::unix::signal(SignalKind::hangup())?;
        let mut logs = tokio::time::interval(LOG_INTERVAL);
        loop {
            let asked = tokio::select! {
                event = self.inbox.recv() => {
                    self.handle(event.expect("this supervisor holds a sender"));
                    continue;
                }
                asked = self.requests.1.recv() => asked.expect("this supervisor holds a sender"),
                _ = terminate.recv() => return self.stop_everything(TERM_FORCES).await,
                _ = interrupt.recv() => return self.stop_everything(TERM_FORCES).await,
                _ = logs.tick() => {
                    self.move_logs();
                    continue;
                }
            };
            let Asked { request, reply } = asked;
            if let Request::Down { force } = request {
                match self.stop_everything(force).await {
                    Ok(()) => {
                        // Whoever asked may be gone.
                        let _ = reply.send(Reply::of(Ok("stopped".to_owned())));
                        // The connection's task writes the answer.
                        tokio::time::sleep(Duration::from_millis(50)).await;
                        return Ok(());
                    }
                    Err(failure) => {
                        let _ = reply.send(Reply::of(Err(failure)));
                    }
                }
                continue;
            }
            self.on_request(request, reply);
        }
    }

    fn handle(&mut self, event: Event) {
        match event {
            Event::Ready { name, generation, outcome } => self.on_ready(&name, generation, outcome),
            Event::Ended { name, generation, status } => self.on_ended(&name, generation, status),
            Event::Retry { name, generation } => {
                let due = self
                    .members
                    .get(&name)
                    .is_some_and(|m| m.generation == generation && m.phase == Phase::Restarting);
                if due && let Err(failure) = self.launch(&name) {
                    error!("cannot start {name}: {failure}");
                    self.retry_later(&name, &failure);
                }
            }
        }
    }

    fn on_ready(&mut self, name: &str, generation: u64, outcome: Result<()>) {
        let up = self.up;
        let Some(member) = self.members.get_mut(name) else { return };
        if member.generation != generation || member.phase != Phase::Starting {
            return;
        }
        match outcome {
            Ok(()) => {
                member.phase = Phase::Running;
                info!("{name} serves");
                for waiter in member.start_waiters.drain(..) {
                    let _ = waiter.send(Reply::of(Ok(format!("{name} serves"))));
                }
            }
            // Its end is reported as an event of its own; before that, it must end.
            Err(failure) => {
                warn!("{failure}");
                if !up {
                    self.startup_failure.get_or_insert((name.to_owned(), failure));
                } else if let Some(process) = &member.process
                    && let Err(e) = process.signal(Signal::KILL)
                {
                    error!("cannot end {name}: {e}");
                }
            }
        }
    }

    fn on_ended(&mut self, name: &str, generation: u64, status: Option<ExitStatus>) {
        let Some(member) = self.members.get_mut(name).filter(|m| m.generation == generation) else { return };
        let end = process::describe(status);
        member.last_end = Some(end.clone());
        member.process = None;
        let asked = std::mem::take(&mut member.asked_to_end);
        for waiter in member.end_waiters.drain(..) {
            let _ = waiter
                .send(Reply::of(Ok(format!("{name} {end}; `shardfs dev start {name}` starts it again"))));
        }
        self.processes.members.remove(name);
        if asked {
            info!("{name} {end}, as asked");
            member.phase = Phase::Stopped;
        } else if name == MOUNT && self.up && status.is_some_and(|s| s.success()) {
            // Somebody unmounted it: that is respected.
            info!("{name} was unmounted; `dev start {name}` mounts again");
            member.last_end = Some("unmounted".to_owned());
            member.phase = Phase::Stopped;
        } else if !self.up {
            let failure = failed_start(name, &end, &member.log);
            member.phase = Phase::Failed;
            self.startup_failure.get_or_insert((name.to_owned(), failure));
        } else {
            let failure = failed_start(name, &end, &member.log);
            self.retry_later(name, &failure);
        }
        self.save_or_warn();
    }

    fn retry_later(&mut self, name: &str, failure: &Failure) {
        let Some(member) = self.members.get_mut(name) else { return };
        let end = member.last_end.clone().unwrap_or_default();
        for waiter in member.start_waiters.drain(..) {
            let _ = waiter.send(Reply::of(Err(failure.clone())));
        }
        match member.note_failure() {
            Some(wait) => {
                warn!("{name} {end}: starting it again in {} ms", wait.as_millis());
                let (events, name, generation) = (self.events.clone(), name.to_owned(), member.generation);
                tokio::spawn(async move {
                    tokio::time::sleep(wait).await;
                    // The loop is gone when the supervisor ends.
                    let _ = events.send(Event::Retry { name, generation }).await;
                });
            }
            None => error!("{name} {end}: it failed too often, giving up until `dev start {name}`"),
        }
    }

    fn on_request(&mut self, request: Request, reply: oneshot::Sender<Reply>) {
        match request {
            Request::Status => {
                // Whoever asked may be gone; so for the other answers.
                let _ = reply.send(Reply::Status(Box::new(self.status())));
            }
            Request::Kill { member, signal } => {
                if let Err((reply, failure)) = self.kill(&member, signal, reply) {
                    let _ = reply.send(Reply::of(Err(failure)));
                }
            }
            Request::Start { member } => {
                if let Err((reply, failure)) = self.start_member(&member, reply) {
                    let _ = reply.send(Reply::of(Err(failure)));
                }
            }
            Request::Down { .. } => {
                let _ = reply.send(Reply::of(Err(Failure::new("handled by `run`"))));
            }
        }
    }

    fn kill(
        &mut self,
        name: &str,
        signal: KillSignal,
        reply: oneshot::Sender<Reply>,
    ) -> std::result::Result<(), (oneshot::Sender<Reply>, Failure)> {
        let unknown = self.unknown(name);
        let Some(member) = self.members.get_mut(name) else { return Err((reply, unknown)) };
        let Some(process) = member.process.clone() else {
            if member.phase == Phase::Restarting {
                member.phase = Phase::Stopped;
            }
            let _ = reply.send(Reply::of(Ok(format!("{name} does not run"))));
            return Ok(());
        };
        let pid = process.worker().map_or(process.identity().pid, |worker| worker.pid);
        let sent = match signal {
            // As a machine that hangs: a node's parent cannot tell of it either.
            KillSignal::Stop => process.signal_all(Signal::STOP),
            // The parent sees the end, and ends as well; a frozen one when it goes on.
            KillSignal::Kill => {
                process.signal_worker(Signal::KILL).and_then(|()| process.signal(Signal::CONT))
            }
            // A frozen process takes its TERM when it goes on.
            KillSignal::Term => process.signal(Signal::TERM).and_then(|()| process.signal_all(Signal::CONT)),
        };
        if let Err(e) = sent {
            return Err((reply, Failure::new(format!("cannot signal {name} (pid {pid}): {e}"))));
        }
        if signal == KillSignal::Stop {
            let _ = reply.send(Reply::of(Ok(format!(
                "{name} (pid {pid}) is frozen; `shardfs dev start {name}` thaws it"
            ))));
            return Ok(());
        }
        member.asked_to_end = true;
        member.end_waiters.push(reply);
        Ok(())
    }

    fn start_member(
        &mut self,
        name: &str,
        reply: oneshot::Sender<Reply>,
    ) -> std::result::Result<(), (oneshot::Sender<Reply>, Failure)> {
        let unknown = self.unknown(name);
        let Some(member) = self.members.get_mut(name) else { return Err((reply, unknown)) };
        member.forget_failures();
        if let Some(process) = &member.process {
            if process.identity().is_stopped() {
                if let Err(e) = process.signal_all(Signal::CONT) {
                    return Err((reply, Failure::new(format!("cannot thaw {name}: {e}"))));
                }
                let _ = reply.send(Reply::of(Ok(format!("{name} goes on"))));
            } else if member.phase == Phase::Running {
                let _ = reply.send(Reply::of(Ok(format!("{name} runs already"))));
            } else {
                member.start_waiters.push(reply);
            }
            return Ok(());
        }
        member.start_waiters.push(reply);
        if let Err(failure) = self.launch(name) {
            let member = self.members.get_mut(name).expect("it was there above");
            for waiter in member.start_waiters.drain(..) {
                let _ = waiter.send(Reply::of(Err(failure.clone())));
            }
        }
        Ok(())
    }

    fn unknown(&self, name: &str) -> Failure {
        let names: Vec<&str> = self.members.keys().map(String::as_str).collect();
        Failure::usage(format!("there is no {name:?} here")).hint(format!("one of: {}", names.join(", ")))
    }

    /// Starts a member's process and the tasks that tell how it goes.
    fn launch(&mut self, name: &str) -> Result<()> {
        let member = self.members.get_mut(name).expect("only members are launched");
        let (reader, writer) = std::io::pipe()?;
        if let Err(e) = move_log(&member.log) {
            warn!("cannot move {} aside: {e}", member.log.display());
        }
        let process = process::start(&member.program, &member.args, &member.log, OwnedFd::from(writer))
            .map_err(|e| failed_start(name, &e.to_string(), &member.log))?;
        let identity = process.identity().clone();
        let process = Arc::new(process);
        let record = ProcessRecord {
            identity: identity.clone(),
            program: member.program.clone(),
            args: member.args.clone(),
        };
        self.processes.members.insert(name.to_owned(), record);
        let generation = member.note_start(process.clone());
        info!("{name} started (pid {})", identity.pid);

        let (events, task_name, log) = (self.events.clone(), name.to_owned(), member.log.clone());
        tokio::spawn(async move {
            let wait = process::says_ready(OwnedFd::from(reader));
            let outcome = match tokio::time::timeout(READY_MAX, wait).await {
                Ok(outcome) => outcome,
                Err(_) => Err(Failure::new(format!("does not serve after {} s", READY_MAX.as_secs()))),
            };
            let outcome = outcome.map_err(|f| failed_start(&task_name, f.message(), &log));
            let _ = events.send(Event::Ready { name: task_name, generation, outcome }).await;
        });
        self.watch(name, generation, process);
        self.save()
    }

    fn watch(&self, name: &str, generation: u64, process: Arc<Watched>) {
        let (events, name) = (self.events.clone(), name.to_owned());
        tokio::spawn(async move {
            let status = process.ended().await.unwrap_or_else(|e| {
                error!("cannot watch {name}: {e}");
                None
            });
            let _ = events.send(Event::Ended { name, generation, status }).await;
        });
    }

    async fn stop_everything(&mut self, force: bool) -> Result<()> {
        info!("stopping everything");
        super::meta::note_stopping(&self.settings).await;
        cleanup::stop_everything(&self.layout, &self.settings, &self.processes, force).await?;
        self.processes = Processes::default();
        self.save()?;
        absent_is_fine(std::fs::remove_file(Layout::control_socket(&self.settings)))?;
        info!("everything is stopped");
        Ok(())
    }

    fn status(&self) -> ClusterStatus {
        // "mount" sorts before "node-1"; people look for the nodes first.
        let nodes = self.settings.node_names();
        let order = nodes.iter().map(String::as_str).chain([MOUNT]);
        ClusterStatus {
            dir: self.layout.dir().to_owned(),
            supervisor: self.processes.supervisor.clone(),
            uptime_ms: self.started.elapsed().as_millis() as u64,
            meta: self.settings.meta().address,
            members: order.filter_map(|name| self.members.get(name)).map(Member::status).collect(),
            mount: self.settings.mount.clone(),
        }
    }

    fn save(&self) -> Result<()> {
        self.layout.write_processes(&self.processes)
    }

    fn save_or_warn(&self) {
        if let Err(e) = self.save() {
            warn!("{e}");
        }
    }

    fn move_logs(&self) {
        let supervisor = self.layout.log(state::SUPERVISOR);
        for log in self.members.values().map(|m| &m.log).chain([&supervisor]) {
            if let Err(e) = move_log(log) {
                warn!("cannot move {} aside: {e}", log.display());
            }
        }
    }
}

/// "node-1 exited with status 1", with the end of its log.
fn failed_start(name: &str, why: &str, log: &Path) -> Failure {
    let mut message = format!("{name} {why}");
    // A reason that it gave itself is in its log as well: once is enough.
    if !why.contains(": ") {
        for line in process::log_tail(log, TAIL_LINES) {
            message.push_str(&format!("\n  {line}"));
        }
    }
    Failure::new(message).hint(format!("the whole log: {}", log.display()))
}
