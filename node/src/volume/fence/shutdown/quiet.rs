//! Whether anything of a filesystem that was shut down can still write.
//!
//! ext4 looks at the shutdown when a call enters it, so no call that begins later writes. What was inside already is
//! waited for:
//!
//! | who | how it is seen to have left |
//! |---|---|
//! | write, truncate and other changing calls, page faults; writeback | a freeze of the filesystem waits for all of them; on one that was shut down it then fails, which is what is wanted |
//! | fsync and the like, which a freeze does not wait for | every thread of a process that has a file of it open was seen asleep, stopped or ended: nothing between the look at the shutdown and the submission of a write sleeps interruptibly. One that never sleeps was seen to have run for [`RUN_ENOUGH`], while the device stood still |
//! | the journal's thread | it was seen asleep: the shutdown woke it, and it sleeps when all transactions are over |
//! | commands on their way | the device's count of what is in flight |

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shardfs_proto::types::{Error, Result, clock};

use super::{Deadline, reach, within};
use crate::volume::io_error;
use crate::volume::loopdev::sys::LoopDevice;

/// How long the device's counters stand still, with nothing in flight. Everything that could write was seen to have
/// ended: this is the guard, some hundred times what a submission takes.
const STILL: Duration = Duration::from_millis(20);
/// Pause between looks.
const PAUSE: Duration = Duration::from_millis(1);
/// From ext4's look at the shutdown to the submission of the write are microseconds of work.
const RUN_ENOUGH: Duration = Duration::from_millis(10);

// From linux/fs.h.
const FIFREEZE: libc::c_ulong = 0xC004_5877;
const FITHAW: libc::c_ulong = 0xC004_5878;

/// Waits until what was inside the filesystem when it was shut down has left it.
pub(super) fn settle(device: &LoopDevice, filesystem: File, deadline: Deadline) -> Result<()> {
    within("waiting for the calls inside the old filesystem", deadline, move || barrier(&filesystem))??;
    let (device, threads_deadline) = (device.clone(), deadline);
    within("waiting for the threads of the old primary", deadline, move || {
        threads_left(&device, threads_deadline)
    })?
}

fn barrier(filesystem: &File) -> Result<()> {
    // SAFETY: the calls take no argument that is used.
    let frozen = unsafe { libc::ioctl(filesystem.as_raw_fd(), FIFREEZE as _, 0) };
    let error = std::io::Error::last_os_error();
    // Never left frozen, by us now or by an attempt that was cut off; EINVAL if it was not.
    // SAFETY: as above.
    unsafe { libc::ioctl(filesystem.as_raw_fd(), FITHAW as _, 0) };
    match (frozen, error.raw_os_error()) {
        // EIO, EROFS, ESHUTDOWN: it got past the calls, and then found that there is no journal any more. EBUSY:
        // somebody else has it frozen, which took the same wait.
        (0, _) | (_, Some(libc::EIO | libc::EROFS | libc::ESHUTDOWN | libc::EBUSY)) => Ok(()),
        _other => Err(io_error("freezing the old filesystem", &error)),
    }
}

/// A thread, by its folder in /proc.
type Thread = PathBuf;

fn threads_left(device: &LoopDevice, deadline: Deadline) -> Result<()> {
    // The processor time that each of those had that are not seen to have left yet.
    let mut inside: BTreeMap<Thread, Option<Duration>> = BTreeMap::new();
    for process in reach::users(device.number) {
        for thread in fs::read_dir(process.join("task")).into_iter().flatten().flatten() {
            let had = run_time(&thread.path());
            inside.insert(thread.path(), had);
        }
    }
    let journal = format!("jbd2/{}-", device.name);
    let is_journal = |process: &PathBuf| {
        fs::read_to_string(process.join("comm")).is_ok_and(|name| name.starts_with(&journal))
    };
    let kernel_threads = reach::processes().into_iter().filter(is_journal).map(|process| (process, None));
    inside.extend(kernel_threads);
    let own = fs::canonicalize("/proc/self").unwrap_or_default();
    // We hold a descriptor ourselves.
    inside.retain(|thread, _| !thread.starts_with(&own));
    loop {
        inside.retain(|thread, had| {
            let at_rest = state(thread).is_none_or(is_at_rest);
            let ran = had.is_some_and(|had| run_time(thread).is_some_and(|now| now >= had + RUN_ENOUGH));
            !at_rest && !ran
        });
        let Some(thread) = inside.keys().next() else { return Ok(()) };
        if deadline.is_over() {
            return Err(Error::unavailable(format!(
                "{} of {} that use the old filesystem have not been seen outside of it, {} first",
                inside.len(),
                device.path.display(),
                thread.display()
            )));
        }
        deadline.pause(PAUSE);
    }
}

/// The state letter of a thread; `None`: it is gone.
fn state(thread: &Path) -> Option<u8> {
    parse_state(&fs::read(thread.join("stat")).ok()?)
}

/// `pid (name) state ...`; the name may hold anything.
fn parse_state(stat: &[u8]) -> Option<u8> {
    let after = stat.iter().rposition(|b| *b == b')')? + 2;
    stat.get(after).copied()
}

/// Asleep interruptibly, idle, stopped, traced, ended: not within a write. Running, waiting for a processor (R) and
/// asleep uninterruptibly (D) tell nothing.
fn is_at_rest(state: u8) -> bool {
    matches!(state, b'S' | b'I' | b'T' | b't' | b'Z' | b'X' | b'x')
}

/// Processor time of a thread, if the kernel counts it.
fn run_time(thread: &Path) -> Option<Duration> {
    let text = fs::read_to_string(thread.join("schedstat")).ok()?;
    Some(Duration::from_nanos(text.split_ascii_whitespace().next()?.parse().ok()?))
}

/// Waits until the device's write counters stand still with nothing in flight.
pub(super) fn still(device: &LoopDevice, deadline: Deadline) -> Result<()> {
    let path = Path::new("/sys/block").join(&device.name).join("stat");
    let read = || -> Result<Counters> {
        let text =
            fs::read_to_string(&path).map_err(|e| io_error(&format!("reading {}", path.display()), &e))?;
        Counters::parse(&text).ok_or_else(|| Error::internal(format!("{}: {text:?}", path.display())))
    };
    let mut last = read()?;
    let mut since = clock::monotonic();
    loop {
        deadline.pause(PAUSE);
        let now = read()?;
        if now != last || now.in_flight != 0 {
            (last, since) = (now, clock::monotonic());
        } else if since.elapsed() >= STILL {
            return Ok(());
        }
        if deadline.is_over() {
            return Err(Error::unavailable(format!("{} does not come to rest", device.path.display())));
        }
    }
}

/// What `/sys/block/DEVICE/stat` says about changes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Counters {
    pub(super) write_sectors: u64,
    pub(super) writes: u64,
    pub(super) discards: u64,
    pub(super) in_flight: u64,
}

impl Counters {
    /// The fields stand in the kernel's Documentation/block/stat.rst; discards came with Linux 4.18.
    pub(super) fn parse(text: &str) -> Option<Counters> {
        let fields: Vec<u64> = text.split_ascii_whitespace().map_while(|field| field.parse().ok()).collect();
        Some(Counters {
            writes: *fields.get(4)?,
            write_sectors: *fields.get(6)?,
            in_flight: *fields.get(8)?,
            discards: fields.get(11).copied().unwrap_or(0),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_and_counters_are_understood() {
        assert_eq!(parse_state(b"12 (a) b) S) T 1 2"), Some(b'T'));
        assert_eq!(parse_state(b"12 (x) R 1"), Some(b'R'));
        assert_eq!(parse_state(b"12 (x)"), None);
        assert_eq!(parse_state(b""), None);
        assert!(is_at_rest(b'S') && is_at_rest(b'T') && !is_at_rest(b'R') && !is_at_rest(b'D'));
        let text = "  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16 17\n";
        let counters = Counters { writes: 5, write_sectors: 7, in_flight: 9, discards: 12 };
        assert_eq!(Counters::parse(text), Some(counters));
        assert_eq!(Counters::parse("1 2 3"), None);
    }

    #[test]
    fn this_thread_runs_and_is_counted() {
        let thread = Path::new("/proc/thread-self");
        assert_eq!(state(thread), Some(b'R'));
        if thread.join("schedstat").exists() {
            assert!(run_time(thread).is_some());
        }
    }
}
