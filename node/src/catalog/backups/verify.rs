//! Verifies a backup: a copy of its image is made and mounted, its filesystem is checked, every shard of its manifest is opened and checked.
//!
//! The copy is no volume: it lies under a name of its own, is mounted where no volume is, and its shards are opened by a manager of their own,
//! so that living shards with the same ids are not touched. It goes when the check is over; what a killed process leaves goes with this node's
//! next check.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures::future::BoxFuture;
use shardfs_proto::types::backups::VerifyItem;
use shardfs_proto::types::cluster::{CheckItem, CheckSummary};
use shardfs_proto::types::limits::ID_CHARS_MAX;
use shardfs_proto::types::{Error, Reason, Result, ShardId, VolumeId};
use tokio::sync::mpsc;

use super::manifest::{Entry, Manifest};
use crate::catalog::Catalog;
use crate::catalog::serving::blocking;
use crate::cluster::bootstrap::random_id;
use crate::cluster::records::backups::BackupRecord;
use crate::shard::{Room, ShardManager, ShardSettings, check};
use crate::volume::cloud::DiskId;
use crate::volume::ebs::VERIFY_PREFIX;
use crate::volume::images::{self, PrivateMount};
use crate::volume::room::VolumeRoom;
use crate::volume::{AWS, VolumeSpec};

/// One check is made at a time on a node.
const ATTEMPT: &str = "copy";
/// Findings of one shard that are passed on.
const FINDINGS_MAX: usize = 64;
/// Memory for the check's blocks, and for what opening shards writes.
const CHECK_CACHE_BYTES: usize = 32 << 20;

/// The room of a copy that nobody else uses.
struct CopyRoom(VolumeRoom);

impl Room for CopyRoom {
    fn growth_bytes(&self) -> u64 {
        self.0.growth_bytes()
    }

    fn wrote(&self, bytes: u64) {
        self.0.wrote(bytes);
    }

    fn unflushed(&self, before: u64, now: u64) {
        self.0.unflushed(before, now);
    }

    fn look_again(&self) {
        self.0.look_again();
    }

    fn total_bytes(&self) -> u64 {
        self.0.total_bytes()
    }

    fn free_bytes(&self) -> u64 {
        self.0.free_bytes()
    }

    fn confirm(&self) -> Option<BoxFuture<'_, Result<()>>> {
        None
    }
}

/// Nobody listens any more.
struct Gone;

impl From<Gone> for Error {
    fn from(_: Gone) -> Error {
        Error::new(Reason::Deadline, "the caller went away")
    }
}

async fn tell(items: &mpsc::Sender<VerifyItem>, item: VerifyItem) -> std::result::Result<(), Gone> {
    items.send(item).await.map_err(|_| Gone)
}

impl Catalog {
    /// Checks a backup, and sends what there is to say of it; the summary last. `quick`: the content of files is not read.
    pub async fn verify_backup(
        self: Arc<Self>,
        id: String,
        quick: bool,
        items: mpsc::Sender<VerifyItem>,
    ) -> Result<()> {
        let record = self.usable_backup(&id).await?;
        // One that is there and damaged is a finding.
        if !Path::new(&record.image).exists() {
            self.check_image(&record).await?;
        }
        let _one = self.backups.copying.try_lock().map_err(|_| {
            Error::new(
                Reason::Busy,
                "this node restores or verifies another backup: try again when that is over",
            )
            .with_retry_after_ms(1_000)
        })?;
        tell(&items, VerifyItem::Step("making a copy of the image".into())).await?;
        let spec = self.copy_spec(&record).await?;
        let at = self.image_mount("verify");
        let verified = self.verify_copy(&record, &spec, &at, quick, &items).await;
        let (providers, name) = (self.parts.providers.clone(), record.provider.clone());
        let cleaned = blocking(move || {
            images::clean(&at)?;
            providers.get(&name)?.images()?.discard(&spec)
        });
        match (verified, cleaned.await) {
            (Err(error), Err(worse)) => {
                tracing::warn!(backup = id, %worse, "a copy that was verified stays until the next one is");
                Err(error)
            }
            (verified, cleaned) => verified.and(cleaned),
        }
    }

    /// Where a copy of an image is mounted, on this node.
    pub(super) fn image_mount(&self, what: &str) -> PathBuf {
        self.parts.data_dir.join("images").join(what)
    }

    /// What the copy is. A disk of it is made; one that an earlier check has left is deleted first.
    async fn copy_spec(&self, record: &BackupRecord) -> Result<VolumeSpec> {
        let me = &self.parts.node_id;
        let mut spec = VolumeSpec {
            id: record.volume.clone(),
            cluster_id: self.parts.cluster_id.clone(),
            // One a node and volume: what a check that was cut off has left is found by the next one.
            source: Path::new(&record.image).with_file_name(format!("{}.verify-{me}", record.volume)),
            size_bytes: record.bytes,
            formatted: true,
            mount_point: self.image_mount("unused"),
            allow_unfenced: false,
        };
        if record.provider != AWS {
            return Ok(spec);
        }
        // By its tags, the disk is of this.
        let mut name = format!("{VERIFY_PREFIX}{me}");
        if name.len() > ID_CHARS_MAX {
            // Two nodes whose names begin alike.
            name = format!("{VERIFY_PREFIX}{:08x}", crc32c::crc32c(me.as_str().as_bytes()));
        }
        spec.id = VolumeId::new(name)?;
        let volumes = self.parts.view.volumes();
        let is_volume = |disk: &DiskId| volumes.iter().any(|kept| kept.record.source == disk.as_str());
        let left = self.disks_tagged(&spec.id).await?.into_iter().map(|disk| disk.id);
        let left: Vec<DiskId> = left.filter(|disk| !is_volume(disk)).collect();
        let (providers, old) = (self.parts.providers.clone(), spec.clone());
        blocking(move || {
            let images = providers.get(AWS)?.images()?;
            left.into_iter().try_for_each(|disk| {
                images.discard(&VolumeSpec { source: PathBuf::from(disk.to_string()), ..old.clone() })
            })
        })
        .await?;
        spec.source =
            self.disk_of_image(record, &spec.id, random_id(), record.bytes).await?.to_string().into();
        Ok(spec)
    }

    async fn verify_copy(
        &self,
        record: &BackupRecord,
        spec: &VolumeSpec,
        at: &Path,
        quick: bool,
        items: &mpsc::Sender<VerifyItem>,
    ) -> Result<()> {
        let (providers, name, image) =
            (self.parts.providers.clone(), record.provider.clone(), self.image_of(record));
        let laying = spec.clone();
        let bare = blocking(move || {
            let images = providers.get(&name)?.images()?;
            images.make_place(&laying, ATTEMPT)?;
            images.lay_down(&laying, &image, ATTEMPT)
        })
        .await?;
        // A disk of it has tags of its own.
        let spec = &VolumeSpec { id: record.volume.clone(), ..spec.clone() };
        let (mut shards, mut bytes, mut findings) = (0, 0, 0);
        let wrong = |kind: &str, detail: String| VerifyItem::Finding { kind: kind.to_owned(), detail };
        tell(items, VerifyItem::Step("replaying the journal, and checking the filesystem".into())).await?;
        let replayed = mount(&bare, at).await.map(PrivateMount::close);
        match replayed {
            Ok(closed) => closed?,
            Err(error) if error.reason() == Reason::Corrupt => {
                tell(items, wrong("image", error.message().to_owned())).await?;
                tell(items, VerifyItem::Summary { shards, bytes, findings: 1 }).await?;
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        let checking = bare.clone();
        for line in blocking(move || images::check_filesystem(&checking)).await? {
            findings += 1;
            tell(items, wrong("filesystem", line)).await?;
        }
        let mounted = mount(&bare, at).await?;
        if let Err(error) = images::check_identity(mounted.root(), spec) {
            findings += 1;
            tell(items, wrong("image", error.message().to_owned())).await?;
        }
        match Manifest::read(mounted.root(), record, &self.parts.cluster_id) {
            Ok(manifest) => {
                let total = manifest.shards.len();
                tell(items, VerifyItem::Step(format!("checking {total} shards and snapshots"))).await?;
                // One of its own: shards with these ids may be open.
                let manager = ShardManager::new(ShardSettings {
                    block_cache_bytes: CHECK_CACHE_BYTES,
                    write_buffer_bytes: CHECK_CACHE_BYTES,
                    open_shards_max: 1,
                    ..ShardSettings::default()
                });
                let room: Arc<dyn Room> = Arc::new(CopyRoom(VolumeRoom::new(mounted.root().to_owned())));
                for entry in manifest.shards {
                    let dir = mounted.root().join(format!("shard-{}", entry.id));
                    let checked = match entry.check(&dir) {
                        Ok(()) => check_shard(&manager, &dir, entry.id, &room, quick).await,
                        Err(error) => Err(error),
                    };
                    let (found, summary) = checked.unwrap_or_else(|error| {
                        let summary = CheckSummary { findings: 1, ..CheckSummary::default() };
                        (vec![("unreadable".to_owned(), error.message().to_owned())], summary)
                    });
                    shards += 1;
                    bytes += summary.bytes;
                    findings += summary.findings;
                    let Entry { id, name, owner, snapshot_of, .. } = entry;
                    let told = VerifyItem::Shard { id, name, owner, snapshot_of, findings: found, summary };
                    tell(items, told).await?;
                }
            }
            Err(error) => {
                findings += 1;
                tell(items, wrong("manifest", error.message().to_owned())).await?;
            }
        }
        blocking(move || mounted.close()).await?;
        tell(items, VerifyItem::Summary { shards, bytes, findings }).await?;
        Ok(())
    }
}

async fn mount(bare: &Path, at: &Path) -> Result<PrivateMount> {
    let (bare, at) = (bare.to_owned(), at.to_owned());
    blocking(move || PrivateMount::open(&bare, &at)).await
}

/// What is wrong with a shard in a folder, some of it in words. It is closed again.
async fn check_shard(
    manager: &Arc<ShardManager>,
    dir: &Path,
    id: ShardId,
    room: &Arc<dyn Room>,
    quick: bool,
) -> Result<(Vec<(String, String)>, CheckSummary)> {
    let checked = async {
        let shard = manager.open(id, dir, room.clone()).await?;
        let view = shard.read_view(None).await?;
        blocking(move || {
            let _open = shard;
            let (mut findings, mut summary) = (Vec::new(), CheckSummary::default());
            check::check(&view, !quick, &mut |item| {
                match item {
                    CheckItem::Finding { kind, detail } if findings.len() < FINDINGS_MAX => {
                        findings.push((kind, detail));
                    }
                    CheckItem::Finding { .. } => {}
                    CheckItem::Summary(last) => summary = last,
                }
                ControlFlow::Continue(())
            })?;
            Ok((findings, summary))
        })
        .await
    };
    let checked = checked.await;
    manager.close(id).await?;
    checked
}
