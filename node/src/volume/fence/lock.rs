//! The fence of folders: an flock on the folder that the primary holds for as long as it lives.
//!
//! A lock goes with the last thread of the processes that hold it, and a thread ends outside of system calls
//! only: once the lock is ours, the process that had it will write nothing more. (The pages that it left
//! belong to the filesystem below, which the new primary shares.) A process that lives, stopped or not, keeps its
//! lock: nothing takes it away, and the volume has to wait for its end.

use std::fs;
use std::io::{ErrorKind, Write};
use std::time::Duration;

use shardfs_proto::types::{Error, Reason, Result};

use super::{Action, Deadline, Fence, FenceKey, FenceKind, Fenced, Journal, Takeover, stale};
use crate::volume::{VolumeSpec, io_error, try_lock};

/// The file in the folder that names the last winner's key.
const KEY_FILE: &str = ".shardfs-fence";
/// Pause between attempts.
const PAUSE: Duration = Duration::from_millis(5);

/// The fence of the provider `dir`.
pub struct LockFence;

impl Fence for LockFence {
    fn capability(&self, spec: &VolumeSpec) -> Result<FenceKind> {
        match fs::metadata(&spec.source) {
            Ok(meta) if meta.is_dir() => Ok(FenceKind::Lock),
            Ok(_) => Err(Error::invalid(format!("{} is no folder", spec.source.display()))),
            Err(e) => Err(io_error(&format!("looking at {}", spec.source.display()), &e)),
        }
    }

    fn acquire(&self, spec: &VolumeSpec, takeover: &Takeover) -> Result<Fenced> {
        let mut journal = Journal::new();
        let deadline = Deadline::after(takeover.bound);
        let hold = loop {
            if let Some(hold) = try_lock(&spec.source)? {
                break hold;
            }
            if deadline.is_over() {
                return Err(Error::unavailable(format!(
                    "volume {}: a process that lives, perhaps stopped, has {} for writing, and dir volumes have \
                     no device fence: it must end first (`lslocks` names it); it is tried again",
                    spec.id,
                    spec.source.display()
                )));
            }
            deadline.pause(PAUSE);
        };
        journal.note(Action::Locked, spec.source.display());
        fail::fail_point!("fence::lock::locked", |_| Err(Error::unavailable("failpoint")));
        if let Some(found) = read_key(spec)?
            && found != takeover.key
            && found.epoch() >= takeover.key.epoch()
        {
            return Err(stale(&spec.id, takeover.key, found));
        }
        write_key(spec, takeover.key)?;
        journal.note(Action::Claimed, takeover.key);
        let mut fenced = journal.done(FenceKind::Lock, takeover.key);
        fenced.hold = Some(hold);
        Ok(fenced)
    }

    fn still_held(&self, spec: &VolumeSpec, key: FenceKey) -> Result<bool> {
        Ok(read_key(spec)? == Some(key))
    }

    fn release(&self, _spec: &VolumeSpec, _key: FenceKey) -> Result<()> {
        // The lock went with the attachment; the key stays, so that older winners see it.
        Ok(())
    }
}

fn read_key(spec: &VolumeSpec) -> Result<Option<FenceKey>> {
    let path = spec.source.join(KEY_FILE);
    match fs::read_to_string(&path) {
        Ok(text) => {
            let raw = text.trim().strip_prefix("0x").and_then(|hex| u64::from_str_radix(hex, 16).ok());
            raw.and_then(FenceKey::from_raw).map(Some).ok_or_else(|| {
                Error::corrupt(format!("{} holds no key: remove it while no node runs", path.display()))
            })
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(io_error(&format!("reading {}", path.display()), &e)),
    }
}

/// Renamed into place: a reader sees the old key or the new one, also after a power cut.
fn write_key(spec: &VolumeSpec, key: FenceKey) -> Result<()> {
    let (path, fresh) = (spec.source.join(KEY_FILE), spec.source.join(format!("{KEY_FILE}.new")));
    let write = || -> std::io::Result<()> {
        let mut file = fs::File::create(&fresh)?;
        file.write_all(format!("{key}\n").as_bytes())?;
        file.sync_all()?;
        fs::rename(&fresh, &path)
    };
    write().map_err(|e| match e.kind() {
        ErrorKind::ReadOnlyFilesystem => Error::new(Reason::NotPermitted, format!("{}: {e}", path.display())),
        _other => io_error(&format!("writing {}", path.display()), &e),
    })
}

#[cfg(test)]
mod tests;
