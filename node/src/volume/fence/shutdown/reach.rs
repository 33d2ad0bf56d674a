//! A way into a filesystem that is mounted on a device: any open file or folder of it will do to shut it down.
//!
//! Looks only. Every path is checked against the device's number after it was opened: another mount may cover it.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags};
use shardfs_proto::types::Result;

use crate::volume::mounts;

/// By the mounts of this process's mount namespace.
pub(super) fn by_own_mounts(device: (u32, u32)) -> Result<Option<File>> {
    let mounted = mounts::list()?.into_iter().filter(|mount| mount.device == device);
    Ok(mounted.into_iter().find_map(|mount| open(&mount.at, device)))
}

/// By the mounts of other processes' mount namespaces, and by what processes have open: mounts that were detached
/// lazily are in no table. Sees the processes of this process's PID namespace.
pub(super) fn by_processes(device: (u32, u32)) -> Option<File> {
    let mut seen = BTreeSet::new();
    let processes = processes();
    for process in &processes {
        let Ok(namespace) = fs::read_link(process.join("ns/mnt")) else { continue };
        if !seen.insert(namespace) {
            continue;
        }
        // Paths of the table are those of that process, below its root.
        for mount in mounts::list_in(&process.join("mountinfo")).unwrap_or_default() {
            if mount.device == device
                && let Ok(below) = mount.at.strip_prefix("/")
                && let Some(file) = open(&process.join("root").join(below), device)
            {
                return Some(file);
            }
        }
    }
    processes.iter().find_map(|process| {
        descriptors(process)
            .into_iter()
            .find_map(|path| is_open_on(&path, device).then(|| open(&path, device)).flatten())
    })
}

/// The processes with an open file, folder or pipe of the filesystem.
pub(super) fn users(device: (u32, u32)) -> Vec<PathBuf> {
    processes()
        .into_iter()
        .filter(|process| descriptors(process).iter().any(|path| is_open_on(path, device)))
        .collect()
}

/// `/proc/N` of every process and kernel thread.
pub(super) fn processes() -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let is_number = |path: &PathBuf| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().iter().all(u8::is_ascii_digit))
    };
    entries.flatten().map(|entry| entry.path()).filter(is_number).collect()
}

fn descriptors(process: &Path) -> Vec<PathBuf> {
    // Gone by now, or a kernel thread.
    let Ok(entries) = fs::read_dir(process.join("fd")) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).collect()
}

/// Asks the kernel only, no daemon or server that a file may belong to: those hang.
fn is_open_on(path: &Path, device: (u32, u32)) -> bool {
    rustix::fs::statx(CWD, path, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).is_ok_and(|found| {
        (found.stx_dev_major, found.stx_dev_minor) == device
            && matches!(
                FileType::from_raw_mode(found.stx_mode.into()),
                FileType::RegularFile | FileType::Directory
            )
    })
}

fn open(path: &Path, device: (u32, u32)) -> Option<File> {
    let file =
        OpenOptions::new().read(true).custom_flags(libc::O_CLOEXEC | libc::O_NONBLOCK).open(path).ok()?;
    let found = file.metadata().ok()?.dev();
    ((rustix::fs::major(found), rustix::fs::minor(found)) == device).then_some(file)
}
