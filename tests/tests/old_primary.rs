//! An old primary that was stopped with everything dirty that can be dirty, and is resumed after another node has taken its
//! volume: it changes no byte.
//!
//! Dirty are: the log and memtables of shards under load from clients that have not synced; flushes and compactions; the
//! journal of ext4; pages of plain files, written and mapped.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::process::Signal;
use shardfs_tests::cluster::eventually;
use shardfs_tests::load::{self, ShardLoad};
use shardfs_tests::{Cluster, Options, process, sh};

const SHARD: &str = "taken";
const VOLUME_BYTES: u64 = 2 << 30;
/// What a step of the cluster may take on a busy machine.
const STEP_MAX: Duration = Duration::from_secs(120);
/// Bytes of the files whose pages are dirty.
const PLAIN_BYTES: usize = 4 << 20;

/// Plain files on the volume of the old primary, with pages that are dirty and a journal that has work.
struct Plain {
    folder: PathBuf,
    written: File,
    direct: File,
    map: Mapped,
}

impl Plain {
    fn new(volume: &Path) -> Plain {
        let folder = volume.join("plain");
        fs::create_dir(&folder).unwrap();
        let filled = |name: &str| {
            let mut file =
                OpenOptions::new().create_new(true).read(true).write(true).open(folder.join(name)).unwrap();
            // Blocks that are there: writing them again needs no journal.
            file.write_all(&vec![b'o'; PLAIN_BYTES]).unwrap();
            file.sync_all().unwrap();
            file
        };
        let (written, mapped) = (filled("written"), filled("mapped"));
        let direct =
            OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(folder.join("written")).unwrap();
        Plain { map: Mapped::of(&mapped), folder, written, direct }
    }

    /// Keeps everything dirty until a call fails; what it said.
    fn dirty(&mut self, stop: &AtomicBool) -> Option<i32> {
        self.map.fill(b'M');
        for round in 0.. {
            if stop.load(Ordering::SeqCst) {
                return None;
            }
            let page = round % (PLAIN_BYTES / 4096);
            let again = self.written.write_all_at(&[b'W'; 4096], (page * 4096) as u64);
            let path = self.folder.join(format!("n{}", round % 500));
            let new = fs::write(&path, vec![b'n'; 20_000]).and_then(|()| match round % 3 {
                0 => fs::rename(&path, path.with_extension("renamed")),
                1 => fs::remove_file(&path),
                _ => Ok(()),
            });
            if let Err(error) = again.and(new) {
                return error.raw_os_error();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        None
    }

    /// Tries every way to write once more; the names of those that were not refused.
    fn not_refused(&self) -> Vec<&'static str> {
        let aligned = vec![b'X'; 8192];
        let offset = aligned.as_ptr().align_offset(4096);
        let block = &aligned[offset..offset + 4096];
        let attempts = [
            ("write", self.written.write_all_at(b"X", 4096)),
            ("direct write", self.direct.write_all_at(block, 0)),
            ("fsync", self.written.sync_all()),
            ("fdatasync", self.written.sync_data()),
            ("truncate", self.written.set_len(1)),
            ("create", File::create_new(self.folder.join("new")).map(drop)),
            ("mkdir", fs::create_dir(self.folder.join("folder"))),
            ("rename", fs::rename(self.folder.join("written"), self.folder.join("other"))),
            ("unlink", fs::remove_file(self.folder.join("mapped"))),
            ("link", fs::hard_link(self.folder.join("mapped"), self.folder.join("linked"))),
        ];
        attempts.into_iter().filter(|(_, outcome)| outcome.is_ok()).map(|(name, _)| name).collect()
    }
}

/// A file's pages in memory.
struct Mapped {
    at: *mut libc::c_void,
}

// SAFETY: the mapping is this value's alone; it is written through `&mut self` only.
unsafe impl Send for Mapped {}

impl Mapped {
    fn of(file: &File) -> Mapped {
        // SAFETY: maps a file of this length; the kernel chooses where.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                PLAIN_BYTES,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
        Mapped { at }
    }

    /// Before the filesystem is shut down: afterwards a write to a clean page is a SIGBUS.
    fn fill(&mut self, byte: u8) {
        // SAFETY: the mapping has this length, and nobody else reads or writes it.
        unsafe { std::ptr::write_bytes(self.at.cast::<u8>(), byte, PLAIN_BYTES) };
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: made by `of` with this length, and not used again.
        unsafe { libc::munmap(self.at, PLAIN_BYTES) };
    }
}

/// The highest number of a table in a shard's folder: it grows with every flush and compaction.
fn last_table(shard: &Path) -> u64 {
    let names = fs::read_dir(shard).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let numbers = names.filter_map(|name| name.strip_suffix(".sst")?.parse().ok());
    numbers.max().unwrap_or(0)
}

fn checksum(file: &Path) -> String {
    sh("/", &format!("sha256sum < {}", file.display()))
}

/// Writes out whatever any kernel cache of this machine still wants to write.
fn write_everything_back() {
    rustix::fs::sync();
}

fn is_mounted(at: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    mounts.lines().any(|line| line.split(' ').nth(1) == at.to_str())
}

/// `resumed_for`: how long the old primary runs before the bytes are compared.
fn an_old_primary_changes_nothing(resumed_for: Duration) {
    let options = Options {
        volume_bytes: Some(VOLUME_BYTES),
        environment: vec![("SHARDFS_WRITE_BUFFER", "8MiB".to_owned())],
        ..Options::default()
    };
    let cluster = Cluster::start(&options);
    cluster.shard(SHARD);
    let loads = [ShardLoad::new(SHARD, &[2], 2, true)];
    let (old, at, source) =
        (cluster.primary_of(SHARD), cluster.volume_mount(SHARD), cluster.volume_source(SHARD));
    let shard = cluster.shard_dir(SHARD);
    let mut plain = Plain::new(&at);
    let stop = AtomicBool::new(false);
    load::run(&cluster, &loads, load::seed(), |progress| {
        progress.wait_for(20, STEP_MAX);
        std::thread::scope(|scope| {
            let dirtying = scope.spawn(|| plain.dirty(&stop));
            let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let before = last_table(&shard);
                eventually(STEP_MAX, || match last_table(&shard) {
                    now if now > before + 4 => Ok(()),
                    now => Err(format!("table {now} after {before}: it is not flushed")),
                });
                cluster.freeze(&old);
                eventually(STEP_MAX, || match cluster.primary_of(SHARD) {
                    now if now != old => Ok(()),
                    now => Err(format!("still served by {now}")),
                });
                progress.wait_for(30, STEP_MAX);
            }));
            stop.store(true, Ordering::SeqCst);
            let error = dirtying.join().unwrap();
            failed.unwrap_or_else(|reason| std::panic::resume_unwind(reason));
            assert!(error.is_some(), "nobody has fenced the old mount");
        });
    });
    let found = load::contents(&cluster, SHARD);
    loads[0].history().check_all(&found).unwrap();

    // Everybody else leaves in order, so that nobody but the old primary has the volume.
    let new = cluster.primary_of(SHARD);
    let third = ["node-1", "node-2", "node-3"].into_iter().find(|n| *n != new && *n != old).unwrap();
    for node in [third, &new] {
        cluster.cli_run(&["dev", "kill", node, "--signal", "TERM"]);
    }
    // Without the metadata store it cannot become primary again, which would be its right now.
    let named = |program: &str, argument: &str| -> Vec<process::Process> {
        let mut all = process::naming(cluster.root());
        all.retain(|p| p.program() == program && p.arguments.iter().any(|a| a == argument));
        all
    };
    let supervisor = named("shardfs", "supervise").pop().unwrap();
    supervisor.stop();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let before = checksum(&source);
        // Its process stands still; its kernel does not.
        assert!(is_mounted(&at), "files are open on {}", at.display());
        assert_eq!(plain.not_refused(), [""; 0], "ways to write to the old mount");
        write_everything_back();
        assert_eq!(checksum(&source), before, "what was dirty on the old mount was written to the volume");
        drop(plain);
        let processes = named("shardfs-node", &old);
        assert_eq!(processes.len(), 2, "the node and its parent: {processes:?}");
        processes.iter().for_each(|p| p.signal(Signal::CONT));
        // It finds out by itself, and lets go of the volume.
        eventually(STEP_MAX, || match is_mounted(&at) {
            true => Err(format!("the old primary keeps {} mounted", at.display())),
            false => Ok(()),
        });
        std::thread::sleep(resumed_for);
        write_everything_back();
        assert_eq!(checksum(&source), before, "the old primary has written to the volume");
        assert_eq!(named("shardfs-node", &old).len(), 2, "it lives");
    }));
    supervisor.signal(Signal::CONT);
    outcome.unwrap_or_else(|reason| std::panic::resume_unwind(reason));

    for node in [&new, third] {
        cluster.cli_run(&["dev", "start", node]);
    }
    eventually(STEP_MAX, || {
        let status = cluster.cli_json(&["status"]);
        if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
    });
    cluster.assert_clean(SHARD);
    assert!(
        load::contents(&cluster, SHARD) == found,
        "the shard holds what the new primary's operations made of it"
    );
    cluster.cli_run(&["dev", "down"]);
    sh("/", &format!("e2fsck -fn {}", source.display()));
}

#[test]
fn an_old_primary_that_is_resumed_changes_no_byte() {
    an_old_primary_changes_nothing(Duration::from_secs(4));
}

/// The kernel writes dirty pages back after 30 s.
#[test]
#[ignore = "long: run by make test-long"]
fn an_old_primary_changes_no_byte_in_a_minute() {
    an_old_primary_changes_nothing(Duration::from_secs(60));
}
