//! What a cloud is asked for: disks that several machines attach at once, and snapshots of them.
//!
//! [`Cloud`] is what the rest of this program knows of it; `aws` is the one that there is. Everything here may be
//! repeated: a disk is made once for a token, attaching what is attached is no error, deleting what has gone neither.
//!
//! What belongs to a cluster bears its tags from the moment that it is made: so what a cut-off step has left is found by
//! them, and nothing else is ever changed or deleted.

use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use shardfs_proto::types::{Error, Result, Timestamp, VolumeId};

/// The tag that names the cluster; policies allow what has it (deploy/iam-policy.json).
pub const TAG_CLUSTER: &str = "shardfs:cluster";
/// The tag that holds the cluster's random id: two clusters may share a name.
pub const TAG_CLUSTER_ID: &str = "shardfs:cluster-id";
/// The tag that names the volume.
pub const TAG_VOLUME: &str = "shardfs:volume";
/// The tag that names the backup that a snapshot is.
pub const TAG_BACKUP: &str = "shardfs:backup";
/// The tag that holds the token that something was made for. Clouds forget tokens after a while, or know none.
pub const TAG_TOKEN: &str = "shardfs:token";

/// GiB of a disk that several machines can attach.
pub const DISK_GIB: RangeInclusive<u32> = 4..=65_536;
/// Reads and writes a second that it can be made for.
pub const DISK_IOPS: RangeInclusive<u32> = 100..=256_000;
/// How many of them for each GiB at most.
pub const DISK_IOPS_PER_GIB_MAX: u32 = 1000;
/// Machines that can attach one disk at once.
pub const DISK_MACHINES_MAX: usize = 16;
/// Characters of a token.
pub const TOKEN_CHARS_MAX: usize = 64;

/// The cloud's id of a disk, such as `vol-0a1b2c3d4e5f60718`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DiskId(String);

impl DiskId {
    /// `vol-` and hex digits.
    pub fn new(text: impl Into<String>) -> Result<DiskId> {
        let text = text.into();
        match text.strip_prefix("vol-") {
            Some(digits) if is_hex(digits) => Ok(DiskId(text)),
            _ => Err(Error::invalid(format!(
                "{text:?} is no id of a disk: expected vol- and hex digits, such as vol-0a1b2c3d4e5f60718"
            ))),
        }
    }

    /// As the cloud writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for DiskId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for DiskId {
    type Error = Error;

    fn try_from(text: String) -> Result<DiskId> {
        DiskId::new(text)
    }
}

impl From<DiskId> for String {
    fn from(id: DiskId) -> String {
        id.0
    }
}

fn is_hex(digits: &str) -> bool {
    (8..=32).contains(&digits.len())
        && digits.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
}

/// The cloud's id of a snapshot of a disk, such as `snap-0a1b2c3d4e5f60718`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotId(String);

impl SnapshotId {
    /// `snap-` and hex digits.
    pub fn new(text: impl Into<String>) -> Result<SnapshotId> {
        let text = text.into();
        match text.strip_prefix("snap-") {
            Some(digits) if is_hex(digits) => Ok(SnapshotId(text)),
            _ => Err(Error::invalid(format!(
                "{text:?} is no id of a snapshot: expected snap- and hex digits, such as snap-0a1b2c3d4e5f60718"
            ))),
        }
    }

    /// As the cloud writes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SnapshotId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for SnapshotId {
    type Error = Error;

    fn try_from(text: String) -> Result<SnapshotId> {
        SnapshotId::new(text)
    }
}

impl From<SnapshotId> for String {
    fn from(id: SnapshotId) -> String {
        id.0
    }
}

/// The machine that this process runs on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Machine {
    /// Its id, such as `i-0a1b2c3d4e5f60718`.
    pub id: String,
    /// The availability zone: a disk is attached to machines of its own only.
    pub zone: String,
    /// The region.
    pub region: String,
}

/// How large and how fast a disk is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskSize {
    /// GiB.
    pub gib: u32,
    /// Reads and writes a second that it is made for.
    pub iops: u32,
}

/// Checks what a disk's size is to be.
pub fn check_size(size: DiskSize) -> Result<()> {
    let DiskSize { gib, iops } = size;
    let refused = |what: String| Err(Error::invalid(what));
    if !DISK_GIB.contains(&gib) {
        return refused(format!(
            "a disk of {gib} GiB cannot be shared: give {} to {} GiB",
            DISK_GIB.start(),
            DISK_GIB.end()
        ));
    }
    if !DISK_IOPS.contains(&iops) {
        return refused(format!(
            "a disk cannot be made for {iops} IOPS: give {} to {}",
            DISK_IOPS.start(),
            DISK_IOPS.end()
        ));
    }
    // The largest product is far below 2^32.
    let most = gib * DISK_IOPS_PER_GIB_MAX;
    if iops > most {
        return refused(format!(
            "{iops} IOPS are too many for {gib} GiB, for which {most} are the most: give fewer, or a larger disk"
        ));
    }
    Ok(())
}

/// Checks a token: of ASCII letters, digits and `-_.:/`.
pub fn check_token(token: &str) -> Result<()> {
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b"-_.:/".contains(&b);
    if token.is_empty() || token.len() > TOKEN_CHARS_MAX || !token.bytes().all(allowed) {
        return Err(Error::invalid(format!(
            "{token:?} is no token: expected 1 to {TOKEN_CHARS_MAX} ASCII letters, digits, and -_.:/"
        )));
    }
    Ok(())
}

/// A disk that is to be made.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NewDisk {
    /// Its cluster.
    pub cluster_id: String,
    /// Its volume.
    pub volume: VolumeId,
    /// Of one token there is one disk, however often it is asked for; see [`check_token`].
    pub token: String,
    /// Its size.
    pub size: DiskSize,
    /// Encrypted, with this key; empty: with the account's default key. `None`: as the account has it.
    pub kms_key: Option<String>,
    /// With this content; `None`: zeros.
    pub from: Option<SnapshotId>,
}

/// What a disk is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum DiskState {
    /// Being made.
    Making,
    /// There, attached or not.
    Ready,
    /// Being deleted, or deleted.
    Leaving,
    /// The cloud says that it failed.
    Failed,
}

/// What an attachment is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttachmentState {
    /// Begun.
    Attaching,
    /// The machine has it.
    Attached,
    /// The end has begun; `busy` of EC2 is this as well.
    Detaching,
}

/// A disk and a machine.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attachment {
    /// The machine's id.
    pub machine: String,
    /// How far it is.
    pub state: AttachmentState,
}

/// A disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disk {
    /// Its id.
    pub id: DiskId,
    /// What it is doing.
    pub state: DiskState,
    /// Its size.
    pub size: DiskSize,
    /// Its zone.
    pub zone: String,
    /// Several machines may attach it at once.
    pub multi_attach: bool,
    /// Encrypted.
    pub encrypted: bool,
    /// When it was made.
    pub created: Timestamp,
    /// By its tags: the cluster's id; empty: it has no such tag.
    pub cluster_id: String,
    /// By its tags: the volume; empty: it has no such tag.
    pub volume: String,
    /// By its tags: the token that it was made for; empty: it has no such tag.
    pub token: String,
    /// Who has it.
    pub attachments: Vec<Attachment>,
}

/// What a machine is doing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct MachineState {
    /// Its id.
    pub id: String,
    /// Its zone.
    pub zone: String,
    /// Its type, such as `r6i.large`.
    pub kind: String,
    /// It runs. One that does not writes nothing.
    pub running: bool,
}

/// A snapshot of a disk.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// The disk it was taken of.
    pub disk: String,
    /// GiB of that disk.
    pub gib: u32,
    /// By its tags: the volume.
    pub volume: String,
    /// By its tags: the backup; empty: it is none.
    pub backup: String,
    /// The moment whose content it has.
    pub taken: Timestamp,
    /// How far the copy is: 100 when it is there.
    pub percent: u8,
    /// The cloud says that it failed.
    pub failed: bool,
}

/// A cloud, as one machine of it uses it. Blocking; call from a blocking thread. Every call has a bound of its own, survives
/// throttling and answers that are behind by seconds, and may be repeated after any error; errors of permission name what is missing.
pub trait Cloud: Send + Sync + fmt::Debug {
    /// The machine that asks.
    fn machine(&self) -> &Machine;
    /// Makes a disk in this machine's zone, and waits until it can be attached. Of one token there is one.
    fn create(&self, new: &NewDisk) -> Result<DiskId>;
    /// A disk; `None`: there is none, for certain.
    fn disk(&self, id: &DiskId) -> Result<Option<Disk>>;
    /// The disks that bear a cluster's tags, those that are being deleted left out. What was made in the last seconds may be missing.
    fn disks(&self, cluster_id: &str) -> Result<Vec<Disk>>;
    /// What is known of machines; those that are not known are left out.
    fn machines(&self, ids: &[String]) -> Result<Vec<MachineState>>;
    /// Fails unless all these machines run, are in this one's zone, and can share a disk; says which does not, and why.
    fn check_machines(&self, ids: &[String]) -> Result<()>;
    /// Has this machine have a disk, and waits until it does.
    fn attach(&self, disk: &DiskId) -> Result<()>;
    /// Has a machine not have a disk any more, and waits until that is so. `force`: although the machine does not let go of it, which
    /// it may use still; never for a disk that is written to.
    fn detach(&self, disk: &DiskId, machine: &str, force: bool) -> Result<()>;
    /// Makes a disk larger or faster while it is used; waits until the new size can be used.
    fn modify(&self, disk: &DiskId, size: DiskSize) -> Result<()>;
    /// Deletes a disk that nobody has any more.
    fn delete(&self, disk: &DiskId) -> Result<()>;
    /// Takes a snapshot: its content is that of this moment when this returns; the copy goes on after. Of one token there is one.
    fn snapshot(&self, disk: &DiskId, backup: &BackupTags, token: &str) -> Result<SnapshotId>;
    /// The snapshots that bear a cluster's tags. What was made in the last seconds may be missing.
    fn snapshots(&self, cluster_id: &str) -> Result<Vec<Snapshot>>;
    /// Waits until a snapshot's copy is complete.
    fn wait_for_snapshot(&self, id: &SnapshotId, at_most: Duration) -> Result<()>;
    /// Deletes a snapshot.
    fn delete_snapshot(&self, id: &SnapshotId) -> Result<()>;
}

/// What a snapshot is tagged with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct BackupTags {
    /// The cluster.
    pub cluster_id: String,
    /// The volume.
    pub volume: VolumeId,
    /// The backup's id.
    pub backup: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_bounded() {
        let check = |gib, iops| check_size(DiskSize { gib, iops });
        for (gib, iops) in [(4, 100), (4, 4000), (65_536, 256_000), (256, 256_000)] {
            check(gib, iops).unwrap();
        }
        for (gib, iops, named) in [
            (3, 100, "4 to 65536 GiB"),
            (65_537, 100, "4 to 65536 GiB"),
            (u32::MAX, 100, "4 to 65536 GiB"),
            (4, 99, "100 to 256000"),
            (65_536, 256_001, "100 to 256000"),
            (4, 4001, "4000 are the most"),
        ] {
            let error = check(gib, iops).unwrap_err();
            assert!(error.message().contains(named), "{error}");
        }
    }

    #[test]
    fn tokens_are_bounded() {
        check_token("volume-1.4:2/a_B").unwrap();
        check_token(&"x".repeat(64)).unwrap();
        for wrong in ["", "a b", "a*", "a?", "a\\", "ä", &"x".repeat(65)] {
            assert!(check_token(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ids_have_their_form() {
        assert_eq!(DiskId::new("vol-0a1b2c3d4e5f60718").unwrap().as_str(), "vol-0a1b2c3d4e5f60718");
        for wrong in [
            "",
            "vol-",
            "vol-1",
            "vol-0A1B2C3D4E5F60718",
            "snap-0a1b2c3d4e5f60718",
            "vol-0a1b/../c3d4e5f60718",
        ] {
            assert!(DiskId::new(wrong).is_err(), "{wrong}");
        }
        assert!(SnapshotId::new("snap-0a1b2c3d4e5f60718").is_ok());
        assert!(SnapshotId::new("vol-0a1b2c3d4e5f60718").is_err());
        assert!(serde_json::from_str::<DiskId>("\"vol-x\"").is_err());
    }
}
