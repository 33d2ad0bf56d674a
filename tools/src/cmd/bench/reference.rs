//! A filesystem to compare with: ext4 on a loop device over a sparse file with direct I/O, as the cluster's `loop`
//! volumes are, made for one run and taken away after it. Needs root.
//!
//! Nothing outlives the run, even a killed one: the backing file loses its name as soon as the loop device holds it,
//! and the loop device is told to go with its last user as soon as it is mounted. What `kill -9` leaves is one mount,
//! and its `umount` frees all.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use shardfs_proto::types::clock;

use super::workspace::Workspace;

/// How long an unmount is tried before it is left to happen when the last user goes.
const UNMOUNT_MAX: Duration = Duration::from_secs(10);
const UNMOUNT_PAUSE: Duration = Duration::from_millis(100);

/// A mounted reference filesystem. [`Reference::remove`] it to hear of errors; dropping it removes it as well and
/// prints them.
pub struct Reference {
    /// Holds the backing file while it has a name, and the mount point.
    workspace: Option<Workspace>,
    mount: PathBuf,
    mounted: bool,
}

impl Reference {
    /// Makes an ext4 of `size` bytes whose backing file lies on the filesystem of `dir`.
    pub fn ext4(dir: &Path, size: u64) -> Result<Reference> {
        if !rustix::process::geteuid().is_root() {
            bail!(
                "--reference ext4 needs root, for a loop device and a mount; give a directory on ext4 instead"
            );
        }
        let workspace = Workspace::new(dir)?;
        let image = workspace.path().join("image");
        let mount = workspace.path().join("mount");
        std::fs::create_dir(&mount).with_context(|| format!("mkdir {}", mount.display()))?;
        let file =
            std::fs::File::create_new(&image).with_context(|| format!("create {}", image.display()))?;
        file.set_len(size)
            .with_context(|| format!("cannot make {} sparse with {size} bytes", image.display()))?;
        drop(file);
        // All of the filesystem is initialised now: a kernel thread that does it later would run during the measurement.
        run(Command::new("mkfs.ext4")
            .args(["-q", "-F", "-b", "4096", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"])
            .arg(&image))?;
        let device = run(Command::new("losetup").args(["--find", "--show", "--direct-io=on"]).arg(&image))?;
        let device = device.trim().to_owned();
        if !device.starts_with("/dev/") {
            bail!("losetup named no device but {device:?}");
        }
        let mounted = std::fs::remove_file(&image)
            .with_context(|| format!("remove {}", image.display()))
            // A device keeps the read-only flag that somebody gave it, over every detach.
            .and_then(|()| run(Command::new("blockdev").args(["--setrw", &device])))
            .and_then(|_| {
                run(Command::new("mount").args(["-t", "ext4", "-o", "noatime", &device]).arg(&mount))
            });
        // From now on the device goes with its last user; at once if there is none.
        let detached = run(Command::new("losetup").args(["--detach", &device]));
        let reference = Reference { workspace: Some(workspace), mount, mounted: mounted.is_ok() };
        mounted.with_context(|| format!("cannot mount {device}"))?;
        detached
            .with_context(|| format!("cannot let go of {device}: `losetup -d {device}` does it later"))?;
        Ok(reference)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount
    }

    /// Unmounts and removes everything.
    pub fn remove(mut self) -> Result<()> {
        self.take_away()
    }

    fn take_away(&mut self) -> Result<()> {
        if self.mounted {
            self.mounted = false;
            unmount(&self.mount, clock::monotonic() + UNMOUNT_MAX)?;
        }
        match self.workspace.take() {
            Some(workspace) => workspace.remove(),
            None => Ok(()),
        }
    }
}

impl Drop for Reference {
    fn drop(&mut self) {
        if let Err(error) = self.take_away() {
            eprintln!("shardfs bench: {error:#}");
            if let Some(workspace) = self.workspace.take() {
                eprintln!("shardfs bench: left behind: {}", workspace.path().display());
            }
        }
    }
}

fn unmount(mount: &Path, deadline: Instant) -> Result<()> {
    loop {
        match rustix::mount::unmount(mount, rustix::mount::UnmountFlags::empty()) {
            Ok(()) => return Ok(()),
            Err(rustix::io::Errno::BUSY) if clock::monotonic() < deadline => {
                std::thread::sleep(UNMOUNT_PAUSE)
            }
            Err(rustix::io::Errno::BUSY) => {
                eprintln!("shardfs bench: {} is still used: it goes when its user does", mount.display());
                return rustix::mount::unmount(mount, rustix::mount::UnmountFlags::DETACH)
                    .with_context(|| format!("cannot detach {}", mount.display()));
            }
            Err(error) => return Err(error).with_context(|| format!("cannot unmount {}", mount.display())),
        }
    }
}

/// Runs a program to its end and answers what it printed.
fn run(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("cannot run {program}: is it installed?"))?;
    if !output.status.success() {
        bail!("{program} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ext4_comes_and_goes() {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: needs root and loop devices");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let reference = Reference::ext4(dir.path(), 64 << 20).unwrap();
        let mount = reference.path().to_owned();
        assert_eq!(super::super::environment::filesystem_type(&mount).unwrap(), "ext4");
        std::fs::write(mount.join("x"), vec![7; 1 << 20]).unwrap();
        reference.remove().unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(dir.path().to_str().unwrap()), "{mounts}");
    }

    #[test]
    fn a_program_that_fails_is_named() {
        let error = run(Command::new("sh").args(["-c", "echo broken >&2; exit 3"])).unwrap_err().to_string();
        assert!(error.contains("sh failed") && error.contains("broken"), "{error}");
        assert!(run(&mut Command::new("/nonexistent/program")).is_err());
    }
}
