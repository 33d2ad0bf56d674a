//! The old primary of the tests: a process of its own, which is this test program run again.
//!
//! It writes and syncs file after file and says so, until a call fails; then it tries every other way to write
//! and says what came of each. Beside that it keeps pages dirty that nobody syncs.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use shardfs_proto::types::{Epoch, NodeId, VolumeId};

use super::*;
use crate::volume::loopdev::LoopProvider;
use crate::volume::{Attached, VolumeProvider};

const DIR: &str = "SHARDFS_TEST_OLD_PRIMARY_DIR";
const MODE: &str = "SHARDFS_TEST_OLD_PRIMARY_MODE";
pub(super) const BOUND: Duration = Duration::from_secs(10);
/// It does, and the kernel does with what it has left, what is waited for within this.
pub(super) const ANSWERED_MAX: Duration = Duration::from_secs(90);

/// What it does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Mode {
    /// Writes until it cannot; then keeps its files open.
    Write,
    /// Writes until it cannot; then becomes a backup.
    WriteThenDemote,
    /// Acquires the fence, stops itself, and mounts once it is resumed.
    StopBeforeMount,
}

pub(super) fn spec(dir: &Path, node: &str) -> VolumeSpec {
    VolumeSpec {
        id: VolumeId::new("vol-fence").unwrap(),
        cluster_id: "c1".into(),
        source: dir.join("vol-fence.img"),
        size_bytes: 96 << 20,
        formatted: false,
        mount_point: dir.join(node).join("volumes/vol-fence"),
        allow_unfenced: false,
    }
}

pub(super) fn key(node: &str, epoch: u64) -> FenceKey {
    FenceKey::new(&NodeId::new(node).unwrap(), Epoch::new(epoch).unwrap()).unwrap()
}

/// What file `i` of a writer holds.
pub(super) fn content(writer: &str, i: usize) -> Vec<u8> {
    let mut bytes = format!("{writer}-{i};").into_bytes().repeat(1 + (i * 131) % 1200);
    bytes.truncate(12_000);
    bytes
}

pub(super) fn name(writer: &str, i: usize) -> String {
    format!("{writer}-{i:06}")
}

/// The running process.
pub(super) struct OldPrimary {
    child: Child,
    dir: PathBuf,
}

impl OldPrimary {
    /// `before`: a program that runs it, such as unshare.
    pub(super) fn start(dir: &Path, mode: Mode, before: &[&str]) -> OldPrimary {
        let program = std::env::current_exe().unwrap();
        let arguments =
            ["volume::fence::shutdown::old_primary::process", "--exact", "--nocapture", "--test-threads=1"];
        let mut command = match before {
            [] => Command::new(program),
            [first, rest @ ..] => {
                let mut command = Command::new(first);
                command.args(rest).arg(program);
                command
            }
        };
        let log = File::create(dir.join("old.log")).unwrap();
        let child = command
            .args(arguments)
            .env(DIR, dir)
            .env(MODE, format!("{mode:?}"))
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        OldPrimary { child, dir: dir.to_owned() }
    }

    pub(super) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(super) fn state(&self) -> Option<char> {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).ok()?;
        stat[stat.rfind(')')? + 2..].chars().next()
    }

    /// How many files it has synced and said so.
    pub(super) fn acknowledged(&self) -> usize {
        fs::metadata(self.dir.join("acks")).map_or(0, |m| m.len() as usize)
    }

    /// Its last words, name and result of each attempt, once they are complete.
    pub(super) fn report(&mut self) -> Vec<(String, String)> {
        let begun = clock::monotonic();
        loop {
            if let Ok(text) = fs::read_to_string(self.dir.join("report")) {
                return text
                    .lines()
                    .filter_map(|line| line.split_once('='))
                    .map(|(a, b)| (a.to_owned(), b.to_owned()))
                    .collect();
            }
            let ended = self.child.try_wait().unwrap();
            assert!(
                begun.elapsed() < ANSWERED_MAX && ended.is_none(),
                "the old primary says nothing ({ended:?}): {}",
                fs::read_to_string(self.dir.join("old.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    pub(super) fn wait_until(&mut self, what: &str, ready: impl Fn(&OldPrimary) -> bool) {
        let begun = clock::monotonic();
        while !ready(self) {
            let ended = self.child.try_wait().unwrap();
            assert!(
                begun.elapsed() < ANSWERED_MAX && ended.is_none(),
                "waiting for {what} ({ended:?}): {}",
                fs::read_to_string(self.dir.join("old.log")).unwrap_or_default()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn kill(&mut self) {
        // Both fail if it is gone, which is as well.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for OldPrimary {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Not a test of its own: what [`OldPrimary::start`] runs.
#[test]
fn process() {
    let (Ok(dir), Ok(mode)) = (std::env::var(DIR), std::env::var(MODE)) else { return };
    // It ends with whoever started it, stopped or not.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).unwrap();
    let dir = PathBuf::from(dir);
    let spec = spec(&dir, "old");
    let standby = LoopProvider.attach_backup(&spec).unwrap();
    let fenced = ShutdownFence.acquire(&spec, &Takeover::new(key("old", 1), BOUND)).unwrap();
    if mode == "StopBeforeMount" {
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP).unwrap();
        let promoted = LoopProvider.promote(&spec, standby, fenced);
        say(&dir, &[("promote".into(), promoted.map_or_else(|e| e.to_string(), |_| "ok".into()))]);
        std::thread::sleep(Duration::from_secs(600));
        return;
    }
    let attached = LoopProvider.promote(&spec, standby, fenced).unwrap();
    let report = write_until_it_fails(&dir, &attached);
    if mode == "WriteThenDemote" {
        let mut results = report.results;
        drop(report.held);
        let demoted = LoopProvider.demote(&spec, attached);
        let standby = demoted.map_err(|e| e.to_string());
        results.push(("demote".into(), standby.as_ref().map_or_else(String::clone, |_| "ok".into())));
        say(&dir, &results);
        std::thread::sleep(Duration::from_secs(600));
        return;
    }
    say(&dir, &report.results);
    std::thread::sleep(Duration::from_secs(600));
}

fn say(dir: &Path, results: &[(String, String)]) {
    let text: String = results.iter().map(|(name, result)| format!("{name}={result}\n")).collect();
    fs::write(dir.join("report.new"), text).unwrap();
    fs::rename(dir.join("report.new"), dir.join("report")).unwrap();
}

/// What it tried, and the files that it keeps open.
struct Report {
    results: Vec<(String, String)>,
    held: Vec<File>,
}

fn write_until_it_fails(dir: &Path, attached: &Attached) -> Report {
    let (root, device) = (attached.root.as_path(), attached.device.as_str());
    let witness = attached.witness().unwrap();
    let create = |name: &str| {
        OpenOptions::new().read(true).write(true).create(true).truncate(true).open(root.join(name)).unwrap()
    };
    // Blocks that are allocated and written: writing them again needs no journal.
    let held = create("held");
    let direct_buffered = create("direct");
    for file in [&held, &direct_buffered] {
        file.write_all_at(&vec![b'o'; 256 << 10], 0).unwrap();
        file.sync_all().unwrap();
    }
    let direct =
        OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(root.join("direct")).unwrap();
    let mut acks = OpenOptions::new().append(true).create(true).open(dir.join("acks")).unwrap();
    let dirty_root = root.to_owned();
    let dirtying = std::thread::spawn(move || {
        // New files that nobody syncs, and old blocks over and over.
        for round in 0.. {
            let new = fs::write(dirty_root.join(format!("dirty-{}", round % 64)), vec![b'd'; 40_000]);
            let again = File::options()
                .write(true)
                .open(dirty_root.join("held"))
                .and_then(|file| file.write_all_at(&[b'D'; 4096], (round % 64) << 12));
            if new.is_err() || again.is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    let mut first = String::new();
    for i in 0.. {
        let synced = File::create_new(root.join(name("old", i))).and_then(|mut file| {
            file.write_all(&content("old", i))?;
            file.sync_all()
        });
        // As a primary does before it answers.
        let seen = || witness.glance().unwrap_or_else(|| witness.check());
        let synced = synced.and_then(|()| seen().map_err(|_| rustix::io::Errno::IO.into()));
        if let Err(error) = synced {
            first = outcome(Err(error));
            break;
        }
        // A byte a file.
        acks.write_all(b".").unwrap();
    }
    dirtying.join().unwrap();
    let mut results = vec![("synced write".to_owned(), first)];
    let mut attempt = |name: &str, result: std::io::Result<()>| results.push((name.into(), outcome(result)));
    attempt("overwrite", held.write_all_at(&[b'X'; 8192], 0));
    attempt("fsync", held.sync_all());
    attempt("fdatasync", held.sync_data());
    // A block's worth, aligned.
    let buffer = vec![b'X'; 8192];
    let offset = buffer.as_ptr().align_offset(4096);
    attempt("direct write", direct.write_all_at(&buffer[offset..offset + 4096], 0));
    attempt("create", File::create_new(root.join("new")).map(drop));
    attempt("rename", fs::rename(root.join("held"), root.join("renamed")));
    attempt("unlink", fs::remove_file(root.join("direct")));
    attempt("truncate", held.set_len(1));
    attempt("mkdir", fs::create_dir(root.join("folder")));
    attempt("link", fs::hard_link(root.join("held"), root.join("linked")));
    // Before the fence is through with the device this would be written, and destroy the filesystem.
    while !is_read_only(device) {
        std::thread::sleep(Duration::from_millis(1));
    }
    let past = File::options().write(true).open(device);
    attempt("device", past.and_then(|device| device.write_all_at(&[b'X'; 4096], 48 << 20)));
    Report { results, held: vec![held, direct, direct_buffered] }
}

fn is_read_only(device: &str) -> bool {
    let name = device.rsplit('/').next().unwrap_or(device);
    fs::read_to_string(format!("/sys/block/{name}/ro")).unwrap().trim() == "1"
}

fn outcome(result: std::io::Result<()>) -> String {
    match result {
        Ok(()) => "ok".into(),
        Err(e) => e.raw_os_error().map_or_else(|| e.to_string(), |errno| errno.to_string()),
    }
}
