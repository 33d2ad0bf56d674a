//! Volumes of kind `loop` for the catalog's tests: real files on a real XFS, which shares blocks.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::Bench;
use crate::volume::mounts::MountsGuard;

/// Of a volume, sparse.
pub(super) const VOLUME_BYTES: u64 = 512 << 20;

/// A filesystem that shares blocks, in a sparse file; taken down with all that lies on it.
pub(super) struct Disk {
    below: PathBuf,
    at: PathBuf,
    _mounts: MountsGuard,
}

impl Disk {
    /// `None`, and says so, where there can be none.
    fn new(below: &Path) -> Option<Disk> {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: loop devices need root and /dev/loop-control");
            return None;
        }
        let disk =
            Disk { below: below.to_owned(), at: below.join("backing"), _mounts: MountsGuard::shared() };
        std::fs::create_dir(&disk.at).unwrap();
        // The read-only flag of a device outlives whoever used the number before.
        let made = disk.run(
            "truncate -s 8G $BELOW/disk && mkfs.xfs -q -m reflink=1 $BELOW/disk && device=$(losetup --find --show $BELOW/disk) &&
             blockdev --setrw $device && { mount -o noatime $device $AT; mounted=$?; losetup --detach $device; exit $mounted; }",
        );
        assert!(made, "an XFS is made and mounted");
        Some(disk)
    }

    fn run(&self, script: &str) -> bool {
        let search = std::env::var("PATH").unwrap_or_default();
        let mut command = Command::new("bash");
        command
            .env("PATH", format!("{search}:/usr/sbin:/sbin"))
            .env("BELOW", &self.below)
            .env("AT", &self.at);
        command.args(["-c", script]).status().unwrap().success()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let gone = self.run(
            r#"cut -d" " -f5 /proc/self/mountinfo | grep "^$BELOW/" | grep -vx "$AT" | while read -r at; do umount "$at" || umount -l "$at"; done
               losetup --list --noheadings --output NAME,BACK-FILE | while read -r name file; do
                   case $file in "$AT"/*) losetup --detach "$name" ;; esac
               done
               umount "$AT" || umount -l "$AT""#,
        );
        if !gone {
            eprintln!("cleaning up a test: {} stays mounted", self.at.display());
        }
    }
}

impl Bench {
    /// With the volume `vol-1`, of kind `loop`; `None`: not on this machine.
    pub(in crate::catalog) async fn on_disk(node: &str, backups: &[&str]) -> Option<Bench> {
        let dir = tempfile::tempdir().unwrap();
        let disk = Disk::new(dir.path())?;
        Some(Bench::make_in(dir, Some(disk), &[("vol-1", node)], backups).await)
    }

    /// The file of a loop volume.
    pub(in crate::catalog) fn volume_file(&self, volume: &str) -> PathBuf {
        self.dir.path().join(format!("backing/{volume}.img"))
    }

    /// What lies beside the volumes' files, with those, but for what belongs to their fence.
    pub(in crate::catalog) fn files(&self) -> BTreeSet<String> {
        let disk = self.disk.as_ref().expect("its volumes are files");
        let names = std::fs::read_dir(&disk.at).unwrap().map(|entry| entry.unwrap().file_name());
        names.map(|name| name.into_string().unwrap()).filter(|name| name.contains(".img")).collect()
    }

    /// Where the nodes have something mounted that is no volume.
    #[cfg(feature = "failpoints")]
    pub(in crate::catalog) fn private_mounts(&self) -> Vec<PathBuf> {
        let mounts = crate::volume::mounts::list().unwrap().into_iter().map(|mount| mount.at);
        mounts
            .filter(|at| at.starts_with(self.dir.path()) && at.iter().any(|part| part == "images"))
            .collect()
    }
}
