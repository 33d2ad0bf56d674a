//! Mounts of a test's own beside that of its cluster, and programs that wait in a system call on one.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::mm::{MapFlags, ProtFlags};
use rustix::process::Signal;

use crate::cluster::{Cluster, bin_dir, eventually};
use crate::ports;
use crate::process::{self, Process};

/// How long a mount may take to be there, to come back, or to be gone: 30 s of an orderly end that programs hold up, and more.
pub const MOUNT_MAX: Duration = Duration::from_secs(90);

/// A mount by `shardfsd --foreground`; unmounted when it is dropped.
#[derive(Debug)]
pub struct Mounted {
    child: Child,
    parent: Process,
    point: PathBuf,
    log: PathBuf,
    http: String,
}

impl Mounted {
    /// Mounts a cluster at a folder of that name, with these further arguments.
    pub fn start(cluster: &Cluster, name: &str, arguments: &[&str]) -> Mounted {
        let point = cluster.scratch(name);
        let log = cluster.root().join(format!("{name}.log"));
        let http = format!("127.0.0.1:{}", ports::free());
        let output = fs::File::options().create(true).append(true).open(&log).unwrap();
        let child = Command::new(bin_dir().join("shardfsd"))
            .arg(&point)
            .args(["--foreground", "--endpoints", &cluster.endpoints().join(","), "--http", &http])
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output)
            .spawn()
            .unwrap();
        let parent = Process { pid: child.id(), arguments: Vec::new() };
        let mut mounted = Mounted { child, parent, point, log, http };
        eventually(MOUNT_MAX, || {
            assert!(mounted.child.try_wait().unwrap().is_none(), "shardfsd has ended: {}", mounted.log());
            mounted.usable()
        });
        mounted
    }

    /// The mount point.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// What it has written.
    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The process that was started.
    pub fn parent(&self) -> &Process {
        &self.parent
    }

    /// The process that serves the mount.
    pub fn daemon(&self) -> Process {
        eventually(MOUNT_MAX, || self.parent.children().pop().ok_or_else(|| "no daemon".to_owned()))
    }

    /// The lines of the mount table for the mount point: type, and device number.
    pub fn table(&self) -> Vec<(String, String)> {
        table(&self.point)
    }

    /// Whether programs can use it: it is the only mount there, and answers.
    pub fn usable(&self) -> Result<(), String> {
        let table = self.table();
        if !matches!(&table[..], [(kind, _)] if kind == "fuse.shardfs") {
            return Err(format!("mounted there: {table:?}"));
        }
        fs::read_to_string(self.point.join(".shardfs/README")).map(drop).map_err(|e| e.to_string())
    }

    /// The number of its connection to the kernel, as fusectl names it.
    pub fn connection(&self) -> u64 {
        let minor = |device: &str| device.rsplit(':').next().unwrap().parse().unwrap();
        self.table().pop().map(|(_, device)| minor(&device)).expect("it is mounted")
    }

    /// A number of its metrics.
    pub fn metric(&self, name: &str) -> Option<f64> {
        let output = Command::new("curl").args(["-sf", &format!("http://{}/metrics", self.http)]).output();
        let text = String::from_utf8(output.unwrap().stdout).unwrap();
        text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
    }

    /// Waits until its first process has ended, and nothing is mounted.
    pub fn ended(&mut self) -> ExitStatus {
        let status = within(&mut self.child, MOUNT_MAX).unwrap_or_else(|| panic!("runs on: {}", self.log()));
        assert_eq!(self.table(), [], "mounted still: {}", self.log());
        status
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.parent.signal(Signal::TERM);
            self.parent.signal(Signal::CONT);
            // The guard of the cluster sees to what is left.
            if within(&mut self.child, MOUNT_MAX).is_none() {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

/// The processes that keep up the mount at a path: a parent and its daemon, or a daemon alone.
pub fn processes(point: &Path) -> Vec<Process> {
    let mut found = process::naming(point.parent().expect("a folder of the test"));
    found.retain(|p| p.program() == "shardfsd" && p.arguments.iter().any(|a| Path::new(a) == point));
    found
}

/// The one of them that serves the mount.
pub fn daemon(point: &Path) -> Process {
    eventually(MOUNT_MAX, || {
        let all = processes(point);
        let Some(first) = process::without_doubles(all.clone()).pop() else {
            return Err(format!("nothing keeps up {}", point.display()));
        };
        if first.arguments.iter().any(|a| a == "--no-restart") {
            return Ok(first);
        }
        let started = first.children();
        let daemon = all.into_iter().find(|p| started.iter().any(|child| child.pid == p.pid));
        daemon.ok_or_else(|| format!("no daemon at {}", point.display()))
    })
}

/// Kills all that keeps up the mount at a path, so that the mount stays and is dead. A daemon whose parent dies unmounts, and a
/// parent whose daemon dies starts another one: so both stand still before one of them is killed. Nothing may use the mount meanwhile.
pub fn kill(point: &Path) {
    assert_ne!(processes(point).len(), 0, "nothing keeps up {}", point.display());
    eventually(MOUNT_MAX, || {
        let mut running = processes(point);
        running.retain(|p| !p.is_stopped());
        running.iter().for_each(|p| p.signal_if_there(Signal::STOP));
        if running.is_empty() { Ok(()) } else { Err(format!("not stopped: {running:?}")) }
    });
    // The daemon first, and its parent once it has ended: the kernel lets a stopped process go on (SIGHUP, SIGCONT) whose
    // parent's end leaves its process group an orphan.
    let all = processes(point);
    let parents: Vec<u32> = process::without_doubles(all.clone()).iter().map(|p| p.pid).collect();
    let (parents, daemons): (Vec<_>, Vec<_>) = all.into_iter().partition(|p| parents.contains(&p.pid));
    for these in [daemons, parents] {
        these.iter().for_each(Process::kill);
        eventually(MOUNT_MAX, || match these.iter().find(|p| p.is_alive()) {
            Some(alive) => Err(format!("{alive:?} lives")),
            None => Ok(()),
        });
    }
    is_dead(point);
}

/// Waits until the mount at a path has nobody who serves it.
pub fn is_dead(point: &Path) {
    eventually(MOUNT_MAX, || match fs::metadata(point).map_err(|e| e.raw_os_error()) {
        Err(Some(libc::ENOTCONN)) => Ok(()),
        other => Err(format!("{} is not dead: {other:?}", point.display())),
    });
}

/// The lines of the mount table for a path: type, and device number.
pub fn table(path: &Path) -> Vec<(String, String)> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let of = |line: &str| {
        let (fields, kind) = line.split_once(" - ")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let kind = kind.split(' ').next()?;
        (Path::new(fields[4]) == path).then(|| (kind.to_owned(), fields[2].to_owned()))
    };
    text.lines().filter_map(of).collect()
}

/// Reads a file through a mapping made anew.
pub fn mapped(path: &Path) -> Vec<u8> {
    let file = fs::File::open(path).unwrap();
    let length = file.metadata().unwrap().len() as usize;
    if length == 0 {
        return Vec::new();
    }
    // SAFETY: the mapping is looked at here only, within its length, and nobody cuts the file meanwhile.
    unsafe {
        let at = rustix::mm::mmap(std::ptr::null_mut(), length, ProtFlags::READ, MapFlags::SHARED, &file, 0)
            .unwrap();
        let content = std::slice::from_raw_parts(at.cast::<u8>(), length).to_vec();
        rustix::mm::munmap(at, length).unwrap();
        content
    }
}

/// Waits for a program's end; `None`: it runs on.
pub fn within(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    let started = Instant::now();
    loop {
        match child.try_wait().unwrap() {
            Some(status) => return Some(status),
            None if started.elapsed() > patience => return None,
            None => std::thread::sleep(Duration::from_millis(20)),
        }
    }
}

/// A program that makes one system call when it is told to, and ends with 0 or the number of its error.
#[derive(Debug)]
pub struct Waiter {
    child: Child,
    what: String,
}

/// What it runs. What comes before the call is done before it is told to go.
const WAITER: &str = r#"
import os, sys
what, path = sys.argv[1:]
if what == "read":
    f = os.open(path, os.O_RDONLY); call = lambda: os.pread(f, 4096, 0)
elif what == "write":
    f = os.open(path, os.O_WRONLY); call = lambda: os.pwrite(f, b"x", 0)
elif what == "fsync":
    f = os.open(path, os.O_WRONLY); os.pwrite(f, b"x", 0); call = lambda: os.fsync(f)
elif what == "readdir":
    entries = os.scandir(path); call = lambda: next(entries)
elif what == "stat":
    call = lambda: os.stat(path)
elif what == "open":
    call = lambda: os.open(path, os.O_RDONLY)
print("ready", flush=True)
sys.stdin.readline()
try:
    call()
except OSError as error:
    os._exit(error.errno)
os._exit(0)
"#;

/// The calls that it knows.
pub const CALLS: [&str; 6] = ["read", "write", "fsync", "readdir", "stat", "open"];

impl Waiter {
    /// Starts one, which waits to be told.
    pub fn start(what: &str, path: &Path) -> Waiter {
        let mut child = Command::new("python3")
            .args(["-c", WAITER, what])
            .arg(path)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "{what} {}", path.display());
        Waiter { child, what: format!("{what} {}", path.display()) }
    }

    /// Tells it to make its call.
    pub fn go(&mut self) {
        self.child.stdin.as_mut().unwrap().write_all(b"go\n").unwrap();
    }

    /// What it does.
    pub fn what(&self) -> &str {
        &self.what
    }

    /// Whether it has not ended.
    pub fn waits(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it is in its call, and no longer in the one that reads what it is told.
    pub fn calls(&mut self) {
        eventually(MOUNT_MAX, || {
            assert!(self.waits(), "{} has not waited", self.what);
            let call = fs::read_to_string(format!("/proc/{}/syscall", self.child.id()));
            let call = call.map_err(|e| e.to_string())?;
            match call.split(' ').next().and_then(|number| number.parse::<i64>().ok()) {
                Some(number) if number >= 0 && number != libc::SYS_read => Ok(()),
                _ => Err(format!("{} has not called: {call}", self.what)),
            }
        });
    }

    /// Kills it; the time until it is gone.
    pub fn kill(&mut self, patience: Duration) -> Duration {
        let started = Instant::now();
        self.child.kill().unwrap();
        let ended = within(&mut self.child, patience);
        assert!(ended.is_some(), "{}: not gone within {patience:?}", self.what);
        started.elapsed()
    }

    /// Waits for its end: 0, or the number of its error.
    pub fn outcome(&mut self, patience: Duration) -> i32 {
        let ended = within(&mut self.child, patience);
        ended.unwrap_or_else(|| panic!("{}: waits still after {patience:?}", self.what)).code().unwrap()
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let _ = self.child.kill();
        // One that cannot be killed must not hold up the test that found it.
        let _ = within(&mut self.child, Duration::from_secs(5));
    }
}
