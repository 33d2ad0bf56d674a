//! Processes as the kernel shows them.

use std::fs;
use std::path::Path;
use std::time::Duration;

use crate::cluster::eventually;

/// A process that is stopped stands still within this.
const STOP_MAX: Duration = Duration::from_secs(60);

/// A running process.
#[derive(Clone, Debug)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Its arguments, the program first.
    pub arguments: Vec<String>,
}

impl Process {
    /// Name of its program without the folder.
    pub fn program(&self) -> &str {
        self.arguments.first().map_or("", |a| a.rsplit('/').next().unwrap_or(a))
    }

    /// Whether it still runs (a zombie does not).
    pub fn is_alive(&self) -> bool {
        fs::read_to_string(format!("/proc/{}/stat", self.pid))
            .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or("Z").starts_with('Z'))
    }

    /// Whether each of its threads is stopped.
    pub fn is_stopped(&self) -> bool {
        let Ok(tasks) = fs::read_dir(format!("/proc/{}/task", self.pid)) else { return false };
        tasks.flatten().all(|task| {
            // A thread that has ended meanwhile does nothing either.
            let Ok(stat) = fs::read_to_string(task.path().join("stat")) else { return true };
            stat.rsplit(") ").next().is_some_and(|state| state.starts_with('T'))
        })
    }

    /// Sends it a signal; it must be there.
    pub fn signal(&self, signal: rustix::process::Signal) {
        self.send(signal).unwrap_or_else(|e| panic!("signalling {self:?}: {e}"));
    }

    /// Stops it, and waits until it stands still.
    pub fn stop(&self) {
        self.signal(rustix::process::Signal::STOP);
        eventually(STOP_MAX, || if self.is_stopped() { Ok(()) } else { Err(format!("{self:?} runs on")) });
    }

    fn send(&self, signal: rustix::process::Signal) -> rustix::io::Result<()> {
        let pid = i32::try_from(self.pid).ok().and_then(rustix::process::Pid::from_raw).expect("a pid");
        rustix::process::kill_process(pid, signal)
    }

    /// Sends it a signal; one that has ended is no error.
    pub fn signal_if_there(&self, signal: rustix::process::Signal) {
        match self.send(signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => {}
            Err(e) => panic!("signalling {self:?}: {e}"),
        }
    }

    /// Whether its main thread has started processes that still run.
    pub fn has_children(&self) -> bool {
        fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid))
            .is_ok_and(|c| !c.trim().is_empty())
    }

    /// The processes that its main thread has started, and that it has not reaped.
    pub fn children(&self) -> Vec<Process> {
        let children =
            fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid)).unwrap_or_default();
        let pids = children.split_whitespace().filter_map(|pid| pid.parse().ok());
        pids.map(|pid| Process { pid, arguments: Vec::new() }).collect()
    }

    /// Who started it; it must be there.
    pub fn parent(&self) -> Process {
        Process { pid: self.parent_pid().expect("the process runs"), arguments: Vec::new() }
    }

    /// The number of who started it; `None`: it has ended.
    pub fn parent_pid(&self) -> Option<u32> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).ok()?;
        stat.rsplit(") ").next()?.split(' ').nth(1)?.parse().ok()
    }

    /// Kills it at once; one that has ended is no error.
    pub fn kill(&self) {
        self.signal_if_there(rustix::process::Signal::KILL);
    }

    /// The most memory it ever had resident, in bytes (VmHWM).
    pub fn peak_resident_bytes(&self) -> u64 {
        status_bytes(self.pid, "VmHWM:")
    }

    /// Memory resident now, in bytes (VmRSS).
    pub fn resident_bytes(&self) -> u64 {
        status_bytes(self.pid, "VmRSS:")
    }

    /// Starts the measurement of [`Self::peak_resident_bytes`] anew.
    pub fn reset_peak(&self) {
        fs::write(format!("/proc/{}/clear_refs", self.pid), "5").expect("root may reset VmHWM");
    }
}

/// A field of /proc/PID/status that is given in kB.
fn status_bytes(pid: u32, field: &str) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process runs");
    let line = status.lines().find(|l| l.starts_with(field)).expect("the kernel reports the field");
    let kib: u64 = line[field.len()..].trim().trim_end_matches(" kB").parse().expect("a number");
    kib << 10
}

/// Without those that another one of them has started: a program that is being started is its starter's double until it runs.
pub fn without_doubles(mut processes: Vec<Process>) -> Vec<Process> {
    let pids: Vec<u32> = processes.iter().map(|process| process.pid).collect();
    processes.retain(|process| process.parent_pid().is_some_and(|parent| !pids.contains(&parent)));
    processes
}

/// Processes whose arguments name something under `folder`.
pub fn naming(folder: &Path) -> Vec<Process> {
    let under = format!("{}/", folder.display());
    let mut found: Vec<Process> = fs::read_dir("/proc")
        .expect("/proc is mounted")
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter_map(|pid: u32| {
            let raw = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
            let arguments: Vec<String> =
                raw.split(|b| *b == 0).map(|a| String::from_utf8_lossy(a).into_owned()).collect();
            arguments.iter().any(|a| a.contains(&under)).then_some(Process { pid, arguments })
        })
        .collect();
    found.sort_by_key(|p| p.pid);
    found
}

/// Bytes as people read them in a test's output.
pub fn mib(bytes: u64) -> String {
    format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20))
}
