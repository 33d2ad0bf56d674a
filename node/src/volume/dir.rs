//! Volumes that are folders, for clusters without root and for tests. An flock on a file in the folder
//! stands for the write attachment: the kernel gives it back when its holder dies.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};

use parking_lot::Mutex;
use rustix::fs::FlockOperation;
use shardfs_proto::types::{Error, Result};

use super::{Attachment, Description, Provider, VolumeSpec, identity, io_error};

/// The name in volume records.
pub const NAME: &str = "dir";
/// The file whose lock is the attachment.
pub(super) const LOCK_FILE: &str = ".attached";

/// Folders.
pub struct DirProvider;

struct DirAttachment {
    source: PathBuf,
    mount_point: PathBuf,
    lock: Mutex<Option<File>>,
}

impl Provider for DirProvider {
    fn name(&self) -> &'static str {
        NAME
    }

    fn create(&self, spec: &VolumeSpec) -> Result<()> {
        fs::create_dir_all(&spec.source).map_err(io_error(format!("making {}", spec.source.display())))
    }

    fn attach(&self, spec: &VolumeSpec) -> Result<Box<dyn Attachment>> {
        self.create(spec)?;
        let lock = lock(spec)?;
        identity::check_or_mark(&spec.source, &spec.id)?;
        link(spec)?;
        Ok(Box::new(DirAttachment {
            source: spec.source.clone(),
            mount_point: spec.mount_point.clone(),
            lock: Mutex::new(Some(lock)),
        }))
    }

    fn describe(&self, spec: &VolumeSpec) -> Result<Description> {
        let mounted = fs::read_link(&spec.mount_point).is_ok_and(|target| target == spec.source);
        Ok(Description { exists: spec.source.is_dir(), size_bytes: 0, device: None, mounted })
    }

    fn delete(&self, spec: &VolumeSpec) -> Result<()> {
        if !spec.source.exists() {
            return Ok(());
        }
        let _lock = lock(spec)?;
        fs::remove_dir_all(&spec.source).map_err(io_error(format!("removing {}", spec.source.display())))
    }
}

fn lock(spec: &VolumeSpec) -> Result<File> {
    let path = spec.source.join(LOCK_FILE);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(io_error(format!("opening {}", path.display())))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::unavailable(format!(
            "volume {} is attached by another process (lock on {})",
            spec.id,
            path.display()
        ))),
        Err(error) => Err(Error::io(format!("locking {}: {error}", path.display()))),
    }
}

/// Shows the folder under the mount point, where shards of every volume are looked for.
fn link(spec: &VolumeSpec) -> Result<()> {
    let at = &spec.mount_point;
    if at == &spec.source {
        return Ok(());
    }
    let make = || -> std::io::Result<()> {
        if let Some(parent) = at.parent() {
            fs::create_dir_all(parent)?;
        }
        match fs::read_link(at) {
            Ok(target) if target == spec.source => return Ok(()),
            Ok(_) => fs::remove_file(at)?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            // A folder where a loop volume was mounted; removed only if empty.
            Err(_) => fs::remove_dir(at)?,
        }
        std::os::unix::fs::symlink(&spec.source, at)
    };
    make().map_err(io_error(format!("linking {} to {}", at.display(), spec.source.display())))
}

impl Attachment for DirAttachment {
    fn root(&self) -> &Path {
        &self.mount_point
    }

    fn source(&self) -> String {
        self.source.display().to_string()
    }

    fn detach(&self) -> Result<()> {
        self.lock.lock().take();
        Ok(())
    }
}
