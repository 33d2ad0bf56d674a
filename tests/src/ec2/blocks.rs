//! The content of volumes: sparse files on a filesystem with reflinks, and the loop devices by which instances have them.
//!
//! Loop devices read and write past the page cache, so a file holds exactly what reached its devices. Only devices that were made
//! here are touched: programs under test make others over the same files.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use crate::disk::{Xfs, copy_at_once};
use crate::run::described;

/// The files and devices.
#[derive(Debug)]
pub(super) struct Blocks {
    // Before the filesystem that they are on.
    devices: Vec<Device>,
    disk: Xfs,
    bytes_per_gib: u64,
}

/// Name of a volume's link: NVMe serial numbers have no hyphen.
pub(super) fn link_name(volume: &str) -> String {
    format!("nvme-Amazon_Elastic_Block_Store_{}", volume.replacen('-', "", 1))
}

/// A volume at an instance.
#[derive(Debug)]
struct Device {
    volume: String,
    instance: String,
    /// `/dev/loopN`.
    node: PathBuf,
    link: PathBuf,
    /// When the link appears.
    link_due: Option<Instant>,
    /// When it takes the new size of its file.
    capacity_due: Option<Instant>,
}

impl Blocks {
    /// With a filesystem of its own in `root`.
    pub(super) fn new(root: &Path, disk_bytes: u64, bytes_per_gib: u64) -> Blocks {
        let at = root.join("volumes");
        fs::create_dir(&at).unwrap_or_else(|e| panic!("{}: {e}", at.display()));
        let disk = Xfs::mounted(&root.join("disk.img"), &at, disk_bytes);
        Blocks { devices: Vec::new(), disk, bytes_per_gib }
    }

    /// The file of a volume or of a snapshot.
    pub(super) fn file(&self, id: &str) -> PathBuf {
        self.disk.at().join(format!("{id}.img"))
    }

    /// Makes the file of a volume, with the content of a snapshot.
    pub(super) fn create(&self, volume: &str, gib: u64, snapshot: Option<&str>) {
        let path = self.file(volume);
        match snapshot {
            Some(snapshot) => copy_at_once(&self.file(snapshot), &path),
            None => drop(File::create_new(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))),
        }
        self.resize(volume, gib * self.bytes_per_gib);
    }

    fn resize(&self, volume: &str, bytes: u64) {
        let path = self.file(volume);
        let file = OpenOptions::new().write(true).open(&path);
        file.and_then(|file| file.set_len(bytes)).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    }

    /// Makes the file of a snapshot: what reached the volume's devices until now.
    pub(super) fn snapshot(&self, volume: &str, snapshot: &str) {
        copy_at_once(&self.file(volume), &self.file(snapshot));
    }

    /// Enlarges a volume; its devices take the new size when it is `due`.
    pub(super) fn enlarge(&mut self, volume: &str, gib: u64, due: Instant) {
        self.resize(volume, gib * self.bytes_per_gib);
        for device in self.devices.iter_mut().filter(|d| d.volume == volume) {
            device.capacity_due = Some(due);
        }
    }

    /// Removes the file of a volume or of a snapshot.
    pub(super) fn remove(&self, id: &str) {
        let path = self.file(id);
        match fs::remove_file(&path) {
            // A volume that was destroyed has none.
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => panic!("{}: {e}", path.display()),
            _ => {}
        }
    }

    /// Loses the content of a volume: what has it open reads errors where nothing is written anew.
    pub(super) fn destroy(&self, volume: &str) {
        self.resize(volume, 0);
        self.remove(volume);
    }

    /// Makes the device of a volume at an instance; its link in the folder `links` appears when it is `due`.
    pub(super) fn plug(&mut self, volume: &str, instance: &str, links: &Path, due: Instant) {
        let file = self.file(volume);
        let shown = losetup(&["--find", "--show", "--direct-io=on"], &file);
        let node = PathBuf::from(shown.trim());
        // The flag outlives whoever used the number before, if that was a node that was killed after a fence.
        let writable =
            Command::new("blockdev").arg("--setrw").arg(&node).status().expect("blockdev is there");
        assert!(writable.success(), "blockdev --setrw {}: {writable}", node.display());
        self.devices.push(Device {
            volume: volume.to_owned(),
            instance: instance.to_owned(),
            node,
            link: links.join(link_name(volume)),
            link_due: Some(due),
            capacity_due: None,
        });
    }

    /// Takes the device of a volume from an instance, if it is there. Programs that have it open keep it.
    pub(super) fn unplug(&mut self, volume: &str, instance: &str) {
        let gone = self.devices.extract_if(.., |d| d.volume == volume && d.instance == instance);
        gone.for_each(|device| device.remove());
    }

    /// Takes all devices from an instance.
    pub(super) fn unplug_all(&mut self, instance: &str) {
        self.devices.extract_if(.., |d| d.instance == instance).for_each(|device| device.remove());
    }

    /// The device of a volume at an instance.
    pub(super) fn device(&self, volume: &str, instance: &str) -> Option<PathBuf> {
        let mut devices = self.devices.iter();
        devices.find(|d| d.volume == volume && d.instance == instance).map(|d| d.node.clone())
    }

    /// Does what is due.
    pub(super) fn advance(&mut self, now: Instant) {
        let is_due = |due: &mut Instant| *due <= now;
        for device in &mut self.devices {
            if device.link_due.take_if(is_due).is_some() {
                std::os::unix::fs::symlink(&device.node, &device.link)
                    .unwrap_or_else(|e| panic!("{}: {e}", device.link.display()));
            }
            if device.capacity_due.take_if(is_due).is_some() {
                losetup(&["--set-capacity"], &device.node);
            }
        }
    }
}

impl Drop for Blocks {
    fn drop(&mut self) {
        self.devices.drain(..).for_each(|device| device.remove());
    }
}

impl Device {
    fn remove(self) {
        // It may not have appeared yet.
        let _ = fs::remove_file(&self.link);
        // Devices are also removed while a test fails.
        let output = Command::new("losetup").arg("--detach").arg(&self.node).output();
        if !output.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("detaching {}, the device of {}: {output:?}", self.node.display(), self.volume);
        }
        // Who fences a volume makes the devices over its file read-only, and that would meet whoever uses the number next.
        let output = Command::new("blockdev").arg("--setrw").arg(&self.node).output();
        if !output.as_ref().is_ok_and(|output| output.status.success()) {
            eprintln!("making {} writable again: {output:?}", self.node.display());
        }
    }
}

fn losetup(arguments: &[&str], file: &Path) -> String {
    let output = Command::new("losetup").args(arguments).arg(file).output().expect("losetup is there");
    let what = || format!("losetup {arguments:?} {}", file.display());
    assert!(output.status.success(), "{}", described(&what(), &output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}
