//! What a backup says of itself, on the volume that it is of: enough to make use of an image when the metadata store is lost.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::{Deserialize, Serialize};
use shardfs_proto::types::{ClientId, Error, Reason, Result, ShardId, ShardName, Timestamp, VolumeId};

use crate::catalog::make::origin_of;
use crate::cluster::records::backups::BackupRecord;
use crate::cluster::records::{ShardRecord, StateWord};
use crate::shard::check_creation;

/// Its name at the volume's root.
const MANIFEST_FILE: &str = ".shardfs-backup.json";
/// The most that is read of it: some hundred thousand shards.
const MANIFEST_BYTES_MAX: u64 = 64 << 20;
/// The format that is written.
const MANIFEST_FORMAT: u32 = 1;

/// What is on a volume when a backup of it is taken.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Manifest {
    /// Format.
    pub(super) v: u32,
    /// The backup's id.
    pub(super) backup: String,
    /// The volume.
    pub(super) volume: VolumeId,
    /// The cluster's id.
    pub(super) cluster: String,
    /// When the backup was begun.
    pub(super) begun: Timestamp,
    /// In order of their ids.
    pub(super) shards: Vec<Entry>,
}

/// A shard or snapshot.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) id: ShardId,
    #[serde(with = "crate::cluster::records::name_as_text")]
    pub(super) name: ShardName,
    pub(super) owner: ClientId,
    pub(super) state: StateWord,
    #[serde(default)]
    pub(super) limit_bytes: Option<u64>,
    #[serde(default)]
    pub(super) snapshot_of: Option<ShardId>,
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) created: Timestamp,
    /// The request that made it; `None`: written by a version that did not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) request_id: Option<String>,
}

impl Entry {
    /// Fails if the shard's folder is another one's than the manifest says.
    pub(super) fn check(&self, folder: &Path) -> Result<()> {
        let Some(request) = &self.request_id else { return Ok(()) };
        check_folder(folder, self.id, &origin_of(self.created, &self.owner, request))
    }
}

/// Fails if the folder of an image holds a shard of another creation than that one.
pub(super) fn check_folder(folder: &Path, id: ShardId, origin: &str) -> Result<()> {
    check_creation(folder, id, origin).map_err(|e| match e.reason() {
        Reason::AlreadyExists => Error::corrupt(format!(
            "the shard {id} in the image is of another creation than the shard {id} that was backed up: the image is another one's, or \
             the metadata store was restored to an older state"
        ))
        .with_shard(id),
        _other => e,
    })
}

impl Manifest {
    pub(super) fn of<'a>(
        backup: &BackupRecord,
        cluster_id: &str,
        shards: impl Iterator<Item = &'a ShardRecord>,
    ) -> Manifest {
        let entry = |record: &ShardRecord| Entry {
            id: record.id,
            name: record.name.clone(),
            owner: record.owner.clone(),
            state: record.state,
            limit_bytes: record.limit_bytes,
            snapshot_of: record.snapshot_of,
            mode: record.mode,
            uid: record.uid,
            gid: record.gid,
            created: record.created,
            request_id: Some(record.request_id.clone()),
        };
        let mut shards: Vec<Entry> = shards.map(entry).collect();
        shards.sort_by_key(|entry| entry.id);
        Manifest {
            v: MANIFEST_FORMAT,
            backup: backup.id.clone(),
            volume: backup.volume.clone(),
            cluster: cluster_id.to_owned(),
            begun: backup.begun,
            shards,
        }
    }

    /// Durable when it returns.
    pub(super) fn write(&self, root: &Path) -> Result<()> {
        let bytes = serde_json::to_vec(self).expect("a manifest is plain data");
        let (path, fresh) = (root.join(MANIFEST_FILE), root.join(format!("{MANIFEST_FILE}.new")));
        let write = || -> std::io::Result<()> {
            let mut file = File::create(&fresh)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&fresh, &path)?;
            File::open(root)?.sync_all()
        };
        write().map_err(|e| {
            let reason = match e.kind() {
                std::io::ErrorKind::StorageFull => Reason::VolumeFull,
                _other => Reason::Io,
            };
            Error::new(reason, format!("writing {}: {e}", path.display()))
        })
    }

    /// That of a backup of this cluster, from an image of it.
    pub(super) fn read(root: &Path, backup: &BackupRecord, cluster_id: &str) -> Result<Manifest> {
        #[derive(Deserialize)]
        struct Format {
            v: u32,
        }
        let path = root.join(MANIFEST_FILE);
        let damaged = |e: &dyn std::fmt::Display| {
            Error::corrupt(format!(
                "{MANIFEST_FILE} of the backup {}: {e}: the image is another one's, or damaged",
                backup.id
            ))
        };
        let bytes = read_regular(&path).map_err(|e| damaged(&e))?;
        let Format { v } = serde_json::from_slice(&bytes).map_err(|e| damaged(&e))?;
        if v > MANIFEST_FORMAT {
            return Err(Error::new(
                Reason::Unsupported,
                format!(
                    "the backup {} has a manifest of format {v}; this version of ShardFS reads up to format {MANIFEST_FORMAT}: update it",
                    backup.id
                ),
            ));
        }
        let manifest: Manifest = serde_json::from_slice(&bytes).map_err(|e| damaged(&e))?;
        if (&manifest.backup, &manifest.volume, manifest.cluster.as_str())
            != (&backup.id, &backup.volume, cluster_id)
        {
            return Err(damaged(&format_args!(
                "it is of the backup {} of {} of the cluster {}",
                manifest.backup, manifest.volume, manifest.cluster
            )));
        }
        // Whoever goes through them relies on it.
        let ascend = manifest.shards.windows(2).all(|pair| pair[0].id < pair[1].id);
        let is_shard =
            |id: ShardId| manifest.shards.iter().any(|entry| entry.id == id && entry.snapshot_of.is_none());
        if !ascend || !manifest.shards.iter().filter_map(|entry| entry.snapshot_of).all(is_shard) {
            return Err(damaged(&"its shards are in no order, or snapshots of what is not there"));
        }
        Ok(manifest)
    }
}

/// The content of a file that may be anything: it is waited for nothing, and no link is followed.
fn read_regular(path: &Path) -> std::io::Result<Vec<u8>> {
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_CLOEXEC;
    let file = fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    if !file.metadata()?.is_file() {
        return Err(std::io::Error::other("it is no regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MANIFEST_BYTES_MAX + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MANIFEST_BYTES_MAX {
        return Err(std::io::Error::other("it is too large"));
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use shardfs_proto::types::NodeId;

    use super::*;
    use crate::cluster::records::backups::BackupWord;

    fn backup(id: &str) -> BackupRecord {
        BackupRecord {
            v: 1,
            id: id.into(),
            volume: VolumeId::new("vol-1").unwrap(),
            provider: "loop".into(),
            image: String::new(),
            source: String::new(),
            begun: Timestamp::new(5, 0).unwrap(),
            bytes: 0,
            shards: 0,
            state: BackupWord::Making,
            why: String::new(),
            scheduled: false,
            node: NodeId::new("n").unwrap(),
            incarnation: String::new(),
        }
    }

    #[test]
    fn a_manifest_is_read_as_it_was_written_and_only_of_its_backup() {
        let root = tempfile::tempdir().unwrap();
        let mut manifest = Manifest::of(&backup("a"), "c", std::iter::empty());
        let entry = |id, snapshot_of: Option<u64>| Entry {
            id: ShardId::new(id).unwrap(),
            name: ShardName::new("a b").unwrap(),
            owner: ClientId::new("me").unwrap(),
            state: StateWord::ReadOnly,
            limit_bytes: Some(1),
            snapshot_of: snapshot_of.map(|of| ShardId::new(of).unwrap()),
            mode: 0o755,
            uid: 1,
            gid: 2,
            created: Timestamp::new(6, 7).unwrap(),
            request_id: None,
        };
        manifest.shards = vec![entry(3, None), entry(7, Some(3))];
        assert!(Manifest::read(root.path(), &backup("a"), "c").is_err());
        for _ in 0..2 {
            manifest.write(root.path()).unwrap();
        }
        assert_eq!(Manifest::read(root.path(), &backup("a"), "c").unwrap(), manifest);
        assert_eq!(Manifest::read(root.path(), &backup("b"), "c").unwrap_err().reason(), Reason::Corrupt);
        let of_another = BackupRecord { volume: VolumeId::new("vol-2").unwrap(), ..backup("a") };
        assert_eq!(Manifest::read(root.path(), &of_another, "c").unwrap_err().reason(), Reason::Corrupt);
        assert_eq!(Manifest::read(root.path(), &backup("a"), "d").unwrap_err().reason(), Reason::Corrupt);
        // What nobody has written so.
        for wrong in [
            vec![entry(7, None), entry(3, None)],
            vec![entry(3, None), entry(3, None)],
            vec![entry(7, Some(3))],
            vec![entry(7, Some(7))],
        ] {
            Manifest { shards: wrong, ..manifest.clone() }.write(root.path()).unwrap();
            assert_eq!(Manifest::read(root.path(), &backup("a"), "c").unwrap_err().reason(), Reason::Corrupt);
        }
        let path = root.path().join(MANIFEST_FILE);
        fs::rename(&path, root.path().join("elsewhere")).unwrap();
        std::os::unix::fs::symlink("elsewhere", &path).unwrap();
        assert!(Manifest::read(root.path(), &backup("a"), "c").is_err(), "no link is followed");
        fs::remove_file(&path).unwrap();
        rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, rustix::fs::Mode::RUSR, 0)
            .unwrap();
        let refused = Manifest::read(root.path(), &backup("a"), "c").unwrap_err();
        assert!(refused.message().contains("no regular file"), "nobody writes into it: {refused}");
        fs::remove_file(&path).unwrap();
        // As large as may be, and one byte more.
        manifest.write(root.path()).unwrap();
        let mut text = fs::read(&path).unwrap();
        text.resize(MANIFEST_BYTES_MAX as usize, b' ');
        fs::write(&path, &text).unwrap();
        assert_eq!(Manifest::read(root.path(), &backup("a"), "c").unwrap(), manifest);
        text.push(b' ');
        fs::write(&path, &text).unwrap();
        assert_eq!(Manifest::read(root.path(), &backup("a"), "c").unwrap_err().reason(), Reason::Corrupt);
        let newer = Manifest { v: 2, ..manifest };
        newer.write(root.path()).unwrap();
        assert_eq!(Manifest::read(root.path(), &backup("a"), "c").unwrap_err().reason(), Reason::Unsupported);
    }
}
