//! Which epochs have claimed a backing file, as extended attributes of it: they go with the inode that loop
//! devices are known by, leave no file behind, and need no lock that a stopped process could hold.
//!
//! `trusted.shardfs.fence.{epoch, 13 digits}` = the key in hexadecimal. A winner first sets its own attribute and then
//! lists: of two that do, at least one sees the other, and the older one gives way. Older ones are removed by
//! the winner; an older one that is set later still meets the later one.
//!
//! Nor does a claim overwrite an older one, or come after its removal: two attributes at a time are needed, for which a full
//! disk has no room. So a third one, the spare, means nothing and keeps that room: it is set while there is room, gives way if
//! there is none, and is set again in the place of the older claims. Its value is random: ext4 lets files share a block of
//! attributes that are the same, and needs a new one to change it.
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
/// Its name does not begin as those of claims do.
const SPARE: &str = "trusted.shardfs.fence-spare";
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
    let claim = || rustix::fs::setxattr(source, name(key), key.to_string().as_bytes(), XattrFlags::CREATE);
    let mut claimed = claim();
    if matches!(claimed, Err(Errno::NOSPC | Errno::DQUOT)) && rustix::fs::removexattr(source, SPARE).is_ok() {
        claimed = claim();
    }
    match claimed {
        Ok(()) => {}
        // An earlier attempt of ours, or the same epoch for another node: the list tells.
        Err(Errno::EXIST) => {}
        Err(Errno::NOSPC | Errno::DQUOT) => {
            return Err(Error::new(
                Reason::VolumeFull,
                format!(
                    "volume {}: no room for the claim of {}: the filesystem that the file lies on is full: free some KiB there",
                    spec.id,
                    source.display()
                ),
            ));
        }
        Err(e) => return Err(error("claiming", source, e)),
    }
    let found = list(source)?;
    if let Some(later) = found.iter().find(|other| **other != key && other.epoch() >= key.epoch()) {
        if later.epoch() > key.epoch() {
            remove(source, key)?;
        }
        return Err(stale(&spec.id, key, *later));
    }
    found.into_iter().filter(|other| *other != key).try_for_each(|older| remove(source, older))?;
    keep_spare(source);
    Ok(())
}

/// Keeps room for the next claim, as far as there is any.
fn keep_spare(source: &Path) {
    // No smaller than a claim.
    let value = format!("{:032x}", fastrand::u128(..));
    match rustix::fs::setxattr(source, SPARE, value.as_bytes(), XattrFlags::CREATE) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(error) => {
            tracing::debug!(source = %source.display(), %error, "no room is kept for the next claim")
        }
    }
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
    use std::os::unix::fs::FileExt;

    use shardfs_proto::types::{Epoch, NodeId, VolumeId};

    use super::*;
    use crate::volume::VolumeProvider;
    use crate::volume::loopdev::LoopProvider;
    use crate::volume::mounts::MountsGuard;

    fn key(node: &str, epoch: u64) -> FenceKey {
        FenceKey::new(&NodeId::new(node).unwrap(), Epoch::new(epoch).unwrap()).unwrap()
    }

    fn spec(id: &str, dir: &Path, source: &Path) -> VolumeSpec {
        VolumeSpec {
            id: VolumeId::new(id).unwrap(),
            cluster_id: "c1".into(),
            source: source.to_owned(),
            size_bytes: 96 << 20,
            formatted: false,
            mount_point: dir.join("volumes").join(id),
            allow_unfenced: false,
        }
    }

    #[test]
    fn a_full_disk_keeps_nobody_from_claiming() {
        if !rustix::process::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            eprintln!("skipped: loop devices need root and /dev/loop-control");
            return;
        }
        let _mounts = MountsGuard::shared();
        let dir = tempfile::tempdir().unwrap();
        // A volume is the disk that a backing file lies on.
        let disk = spec("disk", dir.path(), &dir.path().join("disk.img"));
        LoopProvider.create(&disk).unwrap();
        let attached = LoopProvider.attach(&disk).unwrap();
        let claims = || {
            let file = spec("vol-1", dir.path(), &attached.root.join("vol-1.img"));
            std::fs::write(&file.source, "x").unwrap();
            take(&file, key("a", 1)).unwrap();
            let filler = std::fs::File::create(attached.root.join("filler")).unwrap();
            let mut at = 0;
            for bytes in [1 << 20, 4096] {
                let piece = vec![7u8; bytes];
                // Synced: what is not on the disk yet has no blocks.
                while filler.write_all_at(&piece, at).and_then(|()| filler.sync_data()).is_ok() {
                    at += bytes as u64;
                }
            }
            for epoch in 2..10 {
                take(&file, key(if epoch % 2 == 0 { "b" } else { "a" }, epoch)).unwrap();
                assert_eq!(list(&file.source).unwrap().len(), 1);
            }
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(claims));
        LoopProvider.detach(&disk, attached).unwrap();
        outcome.unwrap();
    }

    #[test]
    fn the_latest_epoch_stays() {
        let dir = tempfile::tempdir().unwrap();
        let spec = spec("vol-1", dir.path(), &dir.path().join("backing"));
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
