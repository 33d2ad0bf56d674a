//! The daemons as services: what they tell the service manager, and when they do not; settings that are read again; the rights that the
//! units leave them.

#![allow(clippy::unwrap_used)]

use std::collections::VecDeque;
use std::fs;
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use shardfs_tests::cluster::{Cluster, Options, bin_dir, eventually};
use shardfs_tests::etcd::Etcd;
use shardfs_tests::process::{Process, naming};
use shardfs_tests::sh;

/// Within this something is told, on a busy machine.
const TOLD_MAX: Duration = Duration::from_secs(120);
/// The patience of this manager. A sign of life comes every half of it.
const WATCHDOG: Duration = Duration::from_secs(4);
/// When that goes on, the next sign of life comes within this on a machine that is slow for everybody.
const SIGN_MAX: Duration = Duration::from_secs(20);

/// A service manager: it listens, and starts one program.
struct Manager {
    socket: UnixDatagram,
    path: PathBuf,
    told: VecDeque<String>,
    child: Option<Child>,
}

impl Manager {
    fn new(dir: &Path) -> Manager {
        let path = dir.join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        Manager { socket, path, told: VecDeque::new(), child: None }
    }

    /// Starts a program as systemd does: the process that it watches is named in WATCHDOG_PID.
    fn start(&mut self, program: &str, arguments: &[&str], log: &Path) {
        let log = fs::File::options().create(true).append(true).open(log).unwrap();
        let child = Command::new("sh")
            .args(["-c", r#"WATCHDOG_PID=$$ exec "$0" "$@""#])
            .arg(bin_dir().join(program))
            .args(arguments)
            .env("NOTIFY_SOCKET", &self.path)
            .env("WATCHDOG_USEC", WATCHDOG.as_micros().to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    fn main(&self) -> Process {
        Process { pid: self.child.as_ref().unwrap().id(), arguments: Vec::new() }
    }

    /// The next line that begins so; those before it are dropped.
    fn hears(&mut self, begins: &str, within: Duration) -> Option<String> {
        let end = Instant::now() + within;
        loop {
            while let Some(line) = self.told.pop_front() {
                if line.starts_with(begins) {
                    return Some(line);
                }
            }
            let left = end.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
            self.socket.set_read_timeout(Some(left)).unwrap();
            let mut bytes = [0; 4096];
            let Ok(length) = self.socket.recv(&mut bytes) else { continue };
            self.told.extend(String::from_utf8_lossy(&bytes[..length]).lines().map(str::to_owned));
        }
    }

    fn must_hear(&mut self, begins: &str) -> String {
        self.hears(begins, TOLD_MAX).unwrap_or_else(|| panic!("{begins} was not told within {TOLD_MAX:?}"))
    }

    /// Waits until each of these lines was told, in whatever order; other lines are dropped.
    fn must_hear_all(&mut self, lines: &[&str]) {
        let mut missing = lines.to_vec();
        while !missing.is_empty() {
            let line = self.hears("", TOLD_MAX);
            let line = line.unwrap_or_else(|| panic!("{missing:?} were not told within {TOLD_MAX:?}"));
            missing.retain(|wanted| *wanted != line);
        }
    }

    /// Waits for the line about its state that says this; earlier ones are dropped.
    fn must_hear_status(&mut self, says: &str) -> String {
        let mut status = String::new();
        while !status.contains(says) {
            let next = self.hears("STATUS=", TOLD_MAX);
            status = next.unwrap_or_else(|| panic!("{says:?} was not told after {status:?}"));
        }
        status
    }

    /// What was told up to now is no news.
    fn forget(&mut self) {
        self.told.clear();
        self.socket.set_nonblocking(true).unwrap();
        let mut bytes = [0; 4096];
        while self.socket.recv(&mut bytes).is_ok() {}
        self.socket.set_nonblocking(false).unwrap();
    }

    /// Waits for the program's end.
    fn ended(&mut self) -> std::process::ExitStatus {
        let mut child = self.child.take().unwrap();
        eventually(TOLD_MAX, || match child.try_wait().unwrap() {
            Some(status) => Ok(status),
            None => Err("the program runs on".to_owned()),
        })
    }
}

impl Drop for Manager {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            // The node goes with its parent.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// The process that is the node, or the daemon: the child of the one that the manager started.
fn worker_of(parent: &Process) -> Process {
    eventually(TOLD_MAX, || {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", parent.pid)).unwrap();
        let pid = children.split_whitespace().next().and_then(|pid| pid.parse().ok());
        pid.map(|pid| Process { pid, arguments: Vec::new() }).ok_or_else(|| "no child".to_owned())
    })
}

/// A node's settings in a file, whose log has JSON lines.
fn write_settings(path: &Path, etcd: &Etcd, more: &str) {
    let data = path.with_file_name("data");
    let text = format!(
        "id: n\ndata_dir: {}\nlisten: 127.0.0.1:0\nmeta: {}\nlog_format: json\n{more}\n",
        data.display(),
        etcd.address()
    );
    fs::write(path, text).unwrap();
}

/// The lines of a log that is there, as far as they are whole; every one must be an object.
fn objects(log: &Path) -> Vec<serde_json::Value> {
    let text = fs::read_to_string(log).unwrap_or_default();
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let of = |line: &str| -> serde_json::Value {
        serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
    };
    whole.lines().map(of).collect()
}

/// Those that say this.
fn lines(log: &Path, message: &str) -> Vec<serde_json::Value> {
    objects(log).into_iter().filter(|line| line["message"] == message).collect()
}

/// Waits until so many lines say this; the last of them.
fn logged(log: &Path, message: &str, count: usize) -> serde_json::Value {
    eventually(TOLD_MAX, || match lines(log, message) {
        mut lines if lines.len() == count => Ok(lines.pop().expect("at least one")),
        _ => Err(format!("{message}: {}", fs::read_to_string(log).unwrap_or_default())),
    })
}

fn reload(manager: &mut Manager, log: &Path, message: &str) -> serde_json::Value {
    let before = lines(log, message).len();
    manager.forget();
    manager.main().signal(Signal::HUP);
    manager.must_hear("RELOADING=1");
    manager.must_hear("READY=1");
    logged(log, message, before + 1)
}

#[test]
fn a_node_tells_its_manager_how_it_is() {
    let mut etcd = Etcd::start();
    let dir = tempfile::tempdir().unwrap();
    let (file, log) = (dir.path().join("node.yaml"), dir.path().join("log"));
    write_settings(&file, &etcd, "");
    let mut manager = Manager::new(dir.path());
    etcd.kill();
    manager.start("shardfs-node", &["--config", file.to_str().unwrap()], &log);
    assert_eq!(manager.must_hear("STATUS="), "STATUS=waiting for the metadata store");
    assert_eq!(manager.hears("READY=1", Duration::from_secs(2)), None, "it serves nothing yet");
    etcd.restart();
    manager.must_hear_all(&["READY=1", "STATUS=serves 0 volumes, 0 shards open"]);
    manager.must_hear("WATCHDOG=1");

    // An outage of the store is no reason for a restart.
    etcd.kill();
    manager.must_hear_status("IN TROUBLE: the metadata store does not answer");
    manager.forget();
    for _ in 0..3 {
        assert!(manager.hears("WATCHDOG=1", SIGN_MAX).is_some(), "it lives without its store");
    }
    etcd.restart();
    while manager.must_hear("STATUS=").contains("TROUBLE") {}

    // A node that stands still gives no sign; one that goes on does again.
    let (parent, node) = (manager.main(), worker_of(&manager.main()));
    node.stop();
    manager.forget();
    assert_eq!(manager.hears("WATCHDOG=1", 2 * WATCHDOG), None, "its parent lives, and says nothing for it");
    node.signal(Signal::CONT);
    manager.must_hear("WATCHDOG=1");

    // What systemd does when the signs fail to come.
    node.stop();
    parent.signal(Signal::ABORT);
    // It ends although it was stopped: its parent wakes it.
    assert_eq!(manager.ended().signal(), Some(libc::SIGABRT));
    assert!(!node.is_alive());
    assert_eq!(etcd.keys("shardfs/deaths/"), ["shardfs/deaths/n"], "so nobody waits for its lease to end");

    manager.start("shardfs-node", &["--config", file.to_str().unwrap()], &log);
    manager.must_hear("READY=1");
    manager.main().signal(Signal::TERM);
    manager.must_hear("STOPPING=1");
    assert!(manager.ended().success());
    assert_eq!(etcd.keys("shardfs/deaths/"), [""; 0]);
}

#[test]
fn a_node_reads_its_settings_again_and_refuses_bad_ones() {
    let etcd = Etcd::start();
    let dir = tempfile::tempdir().unwrap();
    let (file, log) = (dir.path().join("node.yaml"), dir.path().join("log"));
    write_settings(&file, &etcd, "log_level: info");
    let mut manager = Manager::new(dir.path());
    manager.start("shardfs-node", &["--config", file.to_str().unwrap()], &log);
    manager.must_hear("READY=1");
    let node = worker_of(&manager.main());

    write_settings(&file, &etcd, "log_level: debug\nblock_cache: 64MiB");
    let told = reload(&mut manager, &log, "the settings are read again");
    assert_eq!(
        (told["changed"].as_str(), told["need_restart"].as_str()),
        (Some("log_level"), Some("block_cache"))
    );
    // A signal that comes twice is told at that level.
    let at = |log: &Path, levels: &[&str]| {
        objects(log).iter().filter(|line| levels.iter().any(|level| line["level"] == *level)).count()
    };
    let debug = |log: &Path| at(log, &["DEBUG"]);
    eventually(TOLD_MAX, || if debug(&log) > 0 { Ok(()) } else { Err("nothing of level debug".to_owned()) });

    write_settings(&file, &etcd, "log_level: info\ncolour: red");
    let told = reload(&mut manager, &log, "the settings are refused, those of before go on");
    assert!(told["error"].as_str().unwrap().contains("colour"), "{told}");
    assert_eq!(told["level"], "ERROR");
    let before = debug(&log);
    eventually(TOLD_MAX, || {
        if debug(&log) > before { Ok(()) } else { Err("no more of level debug".to_owned()) }
    });

    write_settings(&file, &etcd, "log_level: warn");
    manager.main().signal(Signal::HUP);
    manager.must_hear("RELOADING=1");
    manager.must_hear("READY=1");
    // What was being said when the level changed may come still; what is worth a warning on a slow machine is said.
    eventually(TOLD_MAX, || {
        let before = at(&log, &["DEBUG", "INFO"]);
        std::thread::sleep(Duration::from_secs(2));
        match at(&log, &["DEBUG", "INFO"]) - before {
            0 => Ok(()),
            more => Err(format!("{more} more lines below the level of warnings")),
        }
    });
    assert_eq!(worker_of(&manager.main()).pid, node.pid, "it is the same process");
    manager.main().signal(Signal::TERM);
    assert!(manager.ended().success());
}

#[test]
fn a_mount_tells_its_manager_how_it_is_and_its_log_can_be_rotated() {
    let cluster = Cluster::start(&Options::default());
    let dir = cluster.scratch("service");
    let point = cluster.scratch("service-point");
    let (log, output) = (dir.join("log"), dir.join("output"));
    let mut manager = Manager::new(&dir);
    let endpoints = cluster.endpoints().join(",");
    let config = dir.join("shardfsd.yaml");
    fs::write(&config, "log_level: info\nlog_format: json\n").unwrap();
    let arguments = ["--foreground", "--endpoints", &endpoints, "--config", config.to_str().unwrap()];
    // Whoever waits for the nodes does so for as long as they are away here.
    let more = ["-o", "soft=600", "--log-file", log.to_str().unwrap(), point.to_str().unwrap()];
    manager.start("shardfsd", &[&arguments[..], &more].concat(), &output);
    manager.must_hear("READY=1");
    assert_eq!(manager.must_hear("STATUS="), format!("STATUS=mounted at {}", point.display()));
    assert!(fs::metadata(point.join(".shardfs/README")).is_ok(), "it is usable");

    // A cluster that is away is no reason for a restart, which would fail what the mount's programs wait for.
    for node in ["node-1", "node-2", "node-3"] {
        cluster.freeze(node);
    }
    // Names that are looked up meanwhile wait, and make each other wait.
    let waiting: Vec<_> = (0..4)
        .map(|n| point.join(format!("name-{n}")))
        .map(|path| std::thread::spawn(move || fs::metadata(path).map(drop)))
        .collect();
    std::thread::sleep(Duration::from_secs(1));
    manager.forget();
    for _ in 0..4 {
        assert!(manager.hears("WATCHDOG=1", SIGN_MAX).is_some(), "it lives without its cluster");
    }
    assert!(waiting.iter().any(|thread| !thread.is_finished()), "nobody has waited");
    for node in ["node-1", "node-2", "node-3"] {
        cluster.cli_run(&["dev", "start", node]);
    }
    for thread in waiting {
        assert_eq!(thread.join().unwrap().map_err(|e| e.kind()), Err(std::io::ErrorKind::NotFound));
    }
    let (parent, daemon) = (manager.main(), worker_of(&manager.main()));
    daemon.stop();
    manager.forget();
    assert_eq!(manager.hears("WATCHDOG=1", 2 * WATCHDOG), None, "its parent lives, and says nothing for it");
    daemon.signal(Signal::CONT);
    manager.must_hear("WATCHDOG=1");

    fs::rename(&log, dir.join("log.1")).unwrap();
    fs::write(&config, "log_level: debug\nlog_format: json\nthreads: 2\n").unwrap();
    manager.forget();
    parent.signal(Signal::HUP);
    manager.must_hear("RELOADING=1");
    manager.must_hear("READY=1");
    let told = logged(&log, "the settings are read again", 1);
    assert_eq!((told["log_level"].as_str(), told["need_restart"].as_bool()), (Some("debug"), Some(true)));
    fs::write(&config, "log_level: '==='\n").unwrap();
    parent.signal(Signal::HUP);
    logged(&log, "the settings are refused, those of before go on", 1);

    // One that dies is started again without the manager, which is told.
    fs::write(&config, "log_level: info\nlog_format: json\n").unwrap();
    manager.forget();
    daemon.signal(Signal::KILL);
    let status = manager.must_hear_status("started again");
    assert!(status.contains("SIGKILL"), "{status}");
    manager.must_hear("READY=1");
    manager.must_hear("WATCHDOG=1");
    assert_ne!(worker_of(&parent).pid, daemon.pid);
    assert!(fs::metadata(point.join(".shardfs/README")).is_ok(), "it is usable");
    // In the file that is there now.
    logged(&log, "the daemon died: it is started again", 1);

    // What systemd does when the signs of life fail to come: it starts the next one itself.
    let daemon = worker_of(&parent);
    daemon.stop();
    parent.signal(Signal::ABORT);
    assert!(!manager.ended().success());
    assert!(!daemon.is_alive());
    manager.start("shardfsd", &[&arguments[..], &["--replace-dead"], &more].concat(), &output);
    manager.must_hear("READY=1");
    manager.main().signal(Signal::TERM);
    manager.must_hear("STOPPING=1");
    assert!(manager.ended().success());
    assert_eq!(fs::read_dir(&point).unwrap().count(), 0, "unmounted");
}

/// Whether the daemon, or a process that it has started, is asking for attributes at the moment.
fn asks(daemon: &Process) -> bool {
    let tasks = |pid: u32| -> Vec<PathBuf> {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Vec::new() };
        tasks.flatten().map(|task| task.path()).collect()
    };
    let own = tasks(daemon.pid);
    let children = own.iter().filter_map(|task| fs::read_to_string(task.join("children")).ok());
    let children: String = children.collect::<Vec<_>>().join(" ");
    let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    own.into_iter().chain(children.flat_map(tasks)).any(|task| {
        let call = fs::read_to_string(task.join("syscall")).unwrap_or_default();
        call.split(' ').next().and_then(|number| number.parse().ok()) == Some(libc::SYS_statx)
    })
}

/// What asks whether the mount answers must not keep the daemon when it does not.
#[test]
fn a_daemon_whose_mount_hangs_can_be_killed() {
    let cluster = Cluster::start(&Options::default());
    let dir = cluster.scratch("hanging");
    let point = cluster.scratch("hanging-point");
    let mut manager = Manager::new(&dir);
    let endpoints = cluster.endpoints().join(",");
    // Without a parent, which would start another one.
    let arguments = ["--foreground", "--no-restart", "--endpoints", &endpoints, point.to_str().unwrap()];
    manager.start("shardfsd", &arguments, &dir.join("output"));
    manager.must_hear("READY=1");
    // While no node answers, the mount takes its moment to.
    for node in ["node-1", "node-2", "node-3"] {
        cluster.freeze(node);
    }
    let daemon = manager.main();
    eventually(TOLD_MAX, || {
        if !asks(&daemon) {
            return Err("the mount is not asked whether it answers".to_owned());
        }
        // The daemon has taken the question by then, and answers it no more.
        std::thread::sleep(Duration::from_millis(100));
        daemon.stop();
        if asks(&daemon) {
            return Ok(());
        }
        daemon.signal(Signal::CONT);
        Err("it was answered".to_owned())
    });
    daemon.signal(Signal::KILL);
    assert_eq!(manager.ended().signal(), Some(libc::SIGKILL));
    let dead = fs::read_dir(&point).unwrap_err();
    assert_eq!(dead.raw_os_error(), Some(libc::ENOTCONN), "{dead}");
    sh(&dir, &format!("umount {}", point.display()));
    eventually(TOLD_MAX, || {
        let left: Vec<Process> = naming(cluster.root())
            .into_iter()
            .filter(|process| process.arguments.iter().any(|argument| *argument == point.to_str().unwrap()))
            .collect();
        if left.is_empty() { Ok(()) } else { Err(format!("{left:?}")) }
    });
    for node in ["node-1", "node-2", "node-3"] {
        cluster.cli_run(&["dev", "start", node]);
    }
}

/// The settings of a unit, in their order.
fn unit(name: &str, setting: &str) -> Vec<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/systemd").join(name);
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let values = text.lines().filter_map(|line| line.strip_prefix(setting)?.strip_prefix('='));
    values.map(str::to_owned).collect()
}

/// A program under the bounding set and the limits of privileges that a unit sets.
fn as_of_unit(name: &str, program: &Path) -> String {
    let capabilities = unit(name, "CapabilityBoundingSet").join(" ");
    assert!(!capabilities.is_empty(), "{name} bounds the capabilities");
    let kept =
        capabilities.to_lowercase().replace("cap_", "+").split_whitespace().collect::<Vec<_>>().join(",");
    assert_eq!(unit(name, "NoNewPrivileges"), ["yes"]);
    format!(
        "#!/bin/sh\nexec setpriv --bounding-set=-all,{kept} --inh-caps=-all --no-new-privs {} \"$@\"\n",
        program.display()
    )
}

/// Volumes on loop devices, mounts, fences, views and FUSE: all that takes rights.
#[test]
fn what_the_units_leave_of_roots_rights_is_enough() {
    let folder = tempfile::tempdir().unwrap();
    let mut environment = Vec::new();
    for (unit, program, variable) in [
        ("shardfs-node.service", "shardfs-node", "SHARDFS_NODE_BIN"),
        ("shardfsd@.service", "shardfsd", "SHARDFSD_BIN"),
    ] {
        let path = folder.path().join(program);
        fs::write(&path, as_of_unit(unit, &bin_dir().join(program))).unwrap();
        fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        environment.push((variable, path.to_str().unwrap().to_owned()));
    }
    let cluster = Cluster::start(&Options { environment, ..Options::default() });
    for process in cluster.nodes().iter().chain([&cluster.daemon()]) {
        let status = fs::read_to_string(format!("/proc/{}/status", process.pid)).unwrap();
        assert!(status.contains("NoNewPrivs:\t1"), "{status}");
    }
    let shard = cluster.shard("rights");
    fs::write(shard.join("k"), "v").unwrap();
    let primary = cluster.primary_of("rights");
    cluster.cli_run(&["get", "--read-from", "backup", "rights/k", "-"]);
    cluster.cli_run(&["dev", "kill", &primary]);
    fs::write(shard.join("k"), "w").unwrap();
    cluster.cli_run(&["dev", "start", &primary]);
    eventually(TOLD_MAX, || {
        let status = cluster.cli_json(&["status"]);
        if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
    });
    // One that is frozen is fenced through /proc, and unmounts by itself what it may.
    let primary = cluster.primary_of("rights");
    cluster.freeze(&primary);
    fs::write(shard.join("k"), "x").unwrap();
    cluster.cli_run(&["dev", "start", &primary]);
    assert_eq!(fs::read_to_string(shard.join("k")).unwrap(), "x");
    cluster.assert_clean("rights");
}
