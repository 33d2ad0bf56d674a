//! Which volume a mounted folder is: a small file at its root.
//!
//! Invariant: once written it never changes; a volume without it holds no shard.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;

use serde::{Deserialize, Serialize};
use shardfs_proto::types::{Error, Result, VolumeId};

use super::io_error;

/// The file's name.
const FILE: &str = "shardfs-volume.json";
/// The layout that this version writes, and the newest that it reads.
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
struct Identity {
    format: u32,
    volume: VolumeId,
}

/// Checks that `root` is that volume; marks it, durably, if it is a fresh one.
pub(super) fn check_or_mark(root: &Path, id: &VolumeId) -> Result<()> {
    let path = root.join(FILE);
    match fs::read(&path) {
        Ok(bytes) => check(&path, &bytes, id),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            refuse_foreign(root)?;
            mark(root, &path, id)
        }
        Err(error) => Err(io_error(format!("reading {}", path.display()))(error)),
    }
}

fn check(path: &Path, bytes: &[u8], id: &VolumeId) -> Result<()> {
    let found: Identity =
        serde_json::from_slice(bytes).map_err(|e| Error::corrupt(format!("{}: {e}", path.display())))?;
    if found.format > FORMAT {
        return Err(Error::corrupt(format!(
            "volume {id} has format {}; this version reads up to {FORMAT}: use a newer one",
            found.format
        )));
    }
    if found.volume != *id {
        return Err(Error::corrupt(format!(
            "{} says volume {}, not {id}: the volume's record names the wrong source",
            path.display(),
            found.volume
        )));
    }
    Ok(())
}

/// A folder that holds anything but what a fresh filesystem or an interrupted marking leaves is not ours.
fn refuse_foreign(root: &Path) -> Result<()> {
    let known = ["lost+found", FILE_NEW, super::dir::LOCK_FILE, super::room::BALLAST_FILE];
    for entry in fs::read_dir(root).map_err(io_error(format!("reading {}", root.display())))? {
        let entry = entry.map_err(io_error(format!("reading {}", root.display())))?;
        if !known.iter().any(|name| entry.file_name() == *name) {
            return Err(Error::corrupt(format!(
                "{} is no ShardFS volume but holds {:?}: name an empty one",
                root.display(),
                entry.file_name()
            )));
        }
    }
    Ok(())
}

const FILE_NEW: &str = "shardfs-volume.json.new";

fn mark(root: &Path, path: &Path, id: &VolumeId) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let new = root.join(FILE_NEW);
        let mut file = File::create(&new)?;
        let identity = Identity { format: FORMAT, volume: id.clone() };
        file.write_all(&serde_json::to_vec(&identity)?)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(root)?.sync_all()
    };
    write().map_err(io_error(format!("marking {}", root.display())))
}
