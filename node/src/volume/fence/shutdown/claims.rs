//! Which epochs have claimed a backing file, as extended attributes of it: they go with the inode that loop
//! devices are known by, leave no file behind, and need no lock that a stopped process could hold.
//!
//! `trusted.shardfs.fence.{epoch, 13 digits}` = the key in hexadecimal. A winner first sets its own attribute and then
//! lists: of two that do, at least one sees the other, and the older one gives way. Older ones are removed by
//! the winner; an older one that is set later still meets the later one.
//!
//! Not synced: a power cut ends every process and mount that a claim keeps out.

use std::io::ErrorKind;
use std::path::Path;

use rustix::fs::XattrFlags;
use rustix::io::Errno;
use shardfs_proto::types::{Error, Reason, Result};

use crate::volume::fence::{FenceKey, stale};
use crate::volume::{VolumeSpec, io_error};

const PREFIX: &str = "trusted.shardfs.fence.";
/// Bytes of all names: some dozens would be many.
const NAMES_BYTES_MAX: usize = 64 << 10;

fn name(key: FenceKey) -> String {
    format!("{PREFIX}{:013}", key.epoch())
}

fn error(doing: &str, source: &Path, errno: Errno) -> Error {
    match errno {
        Errno::OPNOTSUPP => Error::new(
            Reason::Unsupported,
            format!("the filesystem of {} keeps no trusted extended attributes", source.display()),
        ),
        errno => io_error(&format!("{doing} {}", source.display()), &errno.into()),
    }
}

/// Whether claims can be kept there.
pub(super) fn check(source: &Path) -> Result<()> {
    list(source).map(drop)
}

fn list(source: &Path) -> Result<Vec<FenceKey>> {
    let mut names = vec![0u8; NAMES_BYTES_MAX];
    let length = rustix::fs::listxattr(source, names.as_mut_slice())
        .map_err(|e| error("listing the claims of", source, e))?;
    names.truncate(length);
    let mut keys = Vec::new();
    for name in names.split(|b| *b == 0).filter(|name| name.starts_with(PREFIX.as_bytes())) {
        let mut value = [0u8; 32];
        let length = match rustix::fs::getxattr(source, name, value.as_mut_slice()) {
            Ok(length) => length,
            // Removed in between, by somebody with a later one, which is listed or will be met.
            Err(Errno::NODATA) => continue,
            Err(e) => return Err(error("reading the claims of", source, e)),
        };
        let text = std::str::from_utf8(&value[..length]).ok().and_then(|text| text.strip_prefix("0x"));
        let key = text.and_then(|hex| u64::from_str_radix(hex, 16).ok()).and_then(FenceKey::from_raw);
        keys.push(key.ok_or_else(|| {
            Error::corrupt(format!("{}: the attribute {} is damaged", source.display(), name.escape_ascii()))
        })?);
    }
    Ok(keys)
}

/// The latest claim.
pub(super) fn latest(source: &Path) -> Result<Option<FenceKey>> {
    Ok(list(source)?.into_iter().max_by_key(|key| key.epoch()))
}

/// Fails unless this is the latest claim.
pub(super) fn check_latest(spec: &VolumeSpec, key: FenceKey) -> Result<()> {
    match latest(&spec.source)? {
        Some(found) if found == key => Ok(()),
        Some(found) => Err(stale(&spec.id, key, found)),
        None => Err(Error::unavailable(format!("volume {}: the claim {key} was taken away", spec.id))),
    }
}

/// Claims; fails if a later epoch has, or the same for another node.
pub(super) fn take(spec: &VolumeSpec, key: FenceKey) -> Result<()> {
    let source = &spec.source;
    let set = |flags| rustix::fs::setxattr(source, name(key), key.to_string().as_bytes(), flags);
    match set(XattrFlags::CREATE) {
        Ok(()) => {}
        // An earlier attempt of ours, or the same epoch for another node: the list tells.
        Err(Errno::EXIST) => {}
        Err(e) => return Err(error("claiming", source, e)),
    }
    let found = list(source)?;
    if let Some(later) = found.iter().find(|other| **other != key && other.epoch() >= key.epoch()) {
        if later.epoch() > key.epoch() {
            remove(source, key)?;
        }
        return Err(stale(&spec.id, key, *later));
    }
    found.into_iter().filter(|other| *other != key).try_for_each(|older| remove(source, older))
}

fn remove(source: &Path, key: FenceKey) -> Result<()> {
    match rustix::fs::removexattr(source, name(key)) {
        Ok(()) | Err(Errno::NODATA) => Ok(()),
        Err(e) if std::io::Error::from(e).kind() == ErrorKind::NotFound => Ok(()),
        Err(e) => Err(error("removing an older claim of", source, e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shardfs_proto::types::{Epoch, NodeId, VolumeId};

    fn key(node: &str, epoch: u64) -> FenceKey {
        FenceKey::new(&NodeId::new(node).unwrap(), Epoch::new(epoch).unwrap()).unwrap()
    }

    #[test]
    fn the_latest_epoch_stays() {
        let dir = tempfile::tempdir().unwrap();
        let spec = VolumeSpec {
            id: VolumeId::new("vol-1").unwrap(),
            cluster_id: "c1".into(),
            source: dir.path().join("backing"),
            size_bytes: 0,
            formatted: false,
            mount_point: dir.path().join("volumes/vol-1"),
            allow_unfenced: false,
        };
        std::fs::write(&spec.source, "").unwrap();
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: trusted attributes need root");
            return;
        }
        if let Err(error) = check(&spec.source) {
            eprintln!("skipped: {error}");
            return;
        }
        assert_eq!(latest(&spec.source).unwrap(), None);
        take(&spec, key("a", 1)).unwrap();
        take(&spec, key("a", 1)).unwrap();
        take(&spec, key("b", 9)).unwrap();
        take(&spec, key("a", 10)).unwrap();
        assert_eq!(list(&spec.source).unwrap(), [key("a", 10)]);
        assert_eq!(take(&spec, key("b", 9)).unwrap_err().reason(), Reason::StaleEpoch);
        assert_eq!(take(&spec, key("b", 10)).unwrap_err().reason(), Reason::StaleEpoch);
        assert_eq!(list(&spec.source).unwrap(), [key("a", 10)]);
        check_latest(&spec, key("a", 10)).unwrap();
        assert!(check_latest(&spec, key("b", 9)).is_err());
        // The file under another name is the same file.
        let moved = dir.path().join("moved");
        std::fs::rename(&spec.source, &moved).unwrap();
        assert_eq!(latest(&moved).unwrap(), Some(key("a", 10)));
    }
}
