//! Backups of volumes, their schedules, and restores that are under way.
//!
//! A [`BackupRecord`] is written before its image is taken, so that what a crash leaves is found by it; a [`RestoringRecord`] before anything
//! is made of an image, so that whoever goes on with it makes the same.

use serde::{Deserialize, Serialize};
use shardfs_proto::types::{Error, NodeId, Result, ShardId, Timestamp, VolumeId, clock};

use super::PREFIX;

/// Before every [`BackupRecord`]'s key.
pub const BACKUPS: &str = "shardfs/backups/";
/// Before every [`ScheduleRecord`]'s key.
pub const SCHEDULES: &str = "shardfs/backup-schedules/";
/// Before every [`RestoringRecord`]'s key.
pub const RESTORING: &str = "shardfs/restoring/";

/// An image of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BackupRecord {
    /// Format.
    pub v: u32,
    /// Its id; see [`new_id`].
    pub id: String,
    /// The volume that it is of.
    pub volume: VolumeId,
    /// That volume's kind.
    pub provider: String,
    /// Where the image is: a file, or the id of a snapshot; empty: not known yet.
    #[serde(default)]
    pub image: String,
    /// The volume's source when it was taken.
    pub source: String,
    /// When it was begun.
    pub begun: Timestamp,
    /// Bytes of the volume.
    #[serde(default)]
    pub bytes: u64,
    /// Shards and snapshots in it.
    #[serde(default)]
    pub shards: u32,
    /// How far it is.
    pub state: BackupWord,
    /// Of one that failed: why.
    #[serde(default)]
    pub why: String,
    /// A schedule has it taken, and deletes it.
    #[serde(default)]
    pub scheduled: bool,
    /// Who takes it.
    pub node: NodeId,
    /// Its process: when that has ended, one that is `making` has failed.
    pub incarnation: String,
}

/// How far a backup is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum BackupWord {
    /// Its image may be there or not.
    Making,
    /// It can be restored.
    Done,
    /// Of no use; its image may be there.
    Failed,
    /// It is being deleted; its image may be gone.
    Deleting,
}

/// Backups that are taken again and again, by whoever serves the volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScheduleRecord {
    /// Format.
    pub v: u32,
    /// Of which volume.
    pub volume: VolumeId,
    /// Seconds between two.
    pub every_s: u64,
    /// How many of them are kept.
    pub keep: u32,
    /// When the last attempt began.
    #[serde(default)]
    pub last: Option<Timestamp>,
}

/// A volume that is being made of a backup, or was.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RestoringRecord {
    /// Format.
    pub v: u32,
    /// The volume.
    pub volume: VolumeId,
    /// Of this backup.
    pub backup: String,
    /// It is the backup's own volume.
    pub in_place: bool,
    /// The volume's nodes, the first of which serves it.
    pub nodes: Vec<NodeId>,
    /// Where it comes to: a backing file, or the id of a disk; empty: a disk that is not made yet.
    pub source: String,
    /// Behind the names of its shards.
    #[serde(default)]
    pub name_suffix: String,
    /// The first of the ids of its shards, in the order of their old ids.
    #[serde(default)]
    pub first_id: Option<ShardId>,
    /// How many ids there are.
    #[serde(default)]
    pub ids: u64,
    /// Another one for every attempt in place: whoever has begun it anew is the only one who goes on.
    #[serde(default)]
    pub attempt: String,
    /// By which a cloud makes one disk, however often it is asked.
    pub token: String,
    /// Who is at it: another node may not go on with a disk that this one has.
    pub node: NodeId,
    /// When it was begun.
    pub since: Timestamp,
    /// In place: the copy has taken the backing's place, which is called this now; empty: there was none.
    #[serde(default)]
    pub set_aside: Option<String>,
    /// It is over.
    #[serde(default)]
    pub done: bool,
}

/// The key of a backup's record.
pub fn backup_key(volume: &VolumeId, id: &str) -> String {
    format!("{BACKUPS}{volume}/{id}")
}

/// Before the keys of a volume's backups.
pub fn backups_of(volume: &VolumeId) -> String {
    format!("{BACKUPS}{volume}/")
}

/// The key of a volume's schedule.
pub fn schedule_key(volume: &VolumeId) -> String {
    format!("{SCHEDULES}{volume}")
}

/// The key of a volume's restore.
pub fn restoring_key(volume: &VolumeId) -> String {
    format!("{RESTORING}{volume}")
}

/// Before the keys of what is announced of a volume's shards.
pub fn views_of(volume: &VolumeId) -> String {
    format!("{PREFIX}views/{volume}/")
}

/// Random digits of an id: so many that no two are equal.
const ID_DIGITS: usize = 16;
/// Those of ids that older versions have given.
const ID_DIGITS_OLD: usize = 4;

/// An id of a backup, which sorts by its moment: `20261129T195900Z-1f3a5c7e9b2d4f60`.
pub fn new_id(moment: Timestamp, random: u64) -> String {
    let (year, month, day, second) = clock::civil(moment.seconds());
    let (hour, minute) = (second / 3600, second / 60 % 60);
    format!("{year:04}{month:02}{day:02}T{hour:02}{minute:02}{:02}Z-{random:0ID_DIGITS$x}", second % 60)
}

/// Fails unless a text has the form of an id: it becomes a part of file names.
pub fn check_id(id: &str) -> Result<()> {
    let fits = |(byte, form): (u8, u8)| match form {
        b'0' => byte.is_ascii_digit(),
        other => byte == other,
    };
    let is_random = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    let form = "00000000T000000Z-";
    if let Some((moment, random)) = id.as_bytes().split_at_checked(form.len())
        && moment.iter().copied().zip(form.bytes()).all(fits)
        && [ID_DIGITS, ID_DIGITS_OLD].contains(&random.len())
        && random.iter().copied().all(is_random)
    {
        return Ok(());
    }
    Err(Error::invalid(format!(
        "{id:?} is no id of a backup, such as 20261129T195900Z-1f3a5c7e9b2d4f60: `shardfs backup list` shows which there are"
    )))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::records::{FORMAT, decode, encode};

    #[test]
    fn ids_tell_their_moment_and_sort_by_it() {
        let id = |seconds, random| new_id(Timestamp::new(seconds, 5).unwrap(), random);
        assert_eq!(id(0, 0), "19700101T000000Z-0000000000000000");
        assert_eq!(id(1_795_982_340, 0x1f3a), "20261129T195900Z-0000000000001f3a");
        assert!(id(1_795_982_340, u64::MAX) < id(1_795_982_341, 0));
        for good in [id(0, 0), id(1_795_982_340, u64::MAX), "20261129T195900Z-1f3a".to_owned()] {
            check_id(&good).unwrap();
        }
        for bad in [
            "",
            "20261129T195900Z-1F3A",
            "20261129T195900Z-1f3",
            "../../../../etc/pass",
            "20261129T195900Z-1f3a/",
            "20261129T195900Z-1f3a5c7e9b2d4f6",
            "20261129T195900Z-1f3a5c7e9b2d4f601",
            "20261129T195900Z-1f3a5c7e9b2d4/60",
            "2026112 T195900Z-1f3a5c7e9b2d4f60",
            "20261129T195900Z-",
            "20261129T195900Zä",
        ] {
            assert!(check_id(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn records_have_this_form() {
        let volume = VolumeId::new("vol-1").unwrap();
        let backup = BackupRecord {
            v: FORMAT,
            id: "20261129T195900Z-1f3a".into(),
            volume: volume.clone(),
            provider: "loop".into(),
            image: "/b/x".into(),
            source: "/b/vol-1.img".into(),
            begun: Timestamp::new(5, 6).unwrap(),
            bytes: 7,
            shards: 8,
            state: BackupWord::Done,
            why: String::new(),
            scheduled: true,
            node: NodeId::new("n").unwrap(),
            incarnation: "i".into(),
        };
        let text = String::from_utf8(encode(&backup).to_vec()).unwrap();
        assert!(text.contains(r#""state":"done""#), "{text}");
        assert_eq!(decode::<BackupRecord>(b"k", text.as_bytes()).unwrap(), backup);
        assert_eq!(backup_key(&volume, &backup.id), "shardfs/backups/vol-1/20261129T195900Z-1f3a");
        let newer = text.replace(r#""v":1"#, r#""v":3"#);
        assert!(decode::<BackupRecord>(b"k", newer.as_bytes()).is_err());
        let schedule = ScheduleRecord { v: FORMAT, volume, every_s: 60, keep: 3, last: None };
        assert_eq!(decode::<ScheduleRecord>(b"k", &encode(&schedule)).unwrap(), schedule);
    }
}
