//! What EC2 knows: volumes, attachments, snapshots, instances, and the states that these pass through.
//!
//! A `World` is only data and cheap to copy: descriptions can be answered from an old one.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::{Instant, SystemTime};

/// Tags of a resource.
pub type Tags = BTreeMap<String, String>;

/// Everything that descriptions are made from.
#[derive(Clone, Default, Debug)]
pub(super) struct World {
    pub(super) volumes: BTreeMap<String, Volume>,
    pub(super) snapshots: BTreeMap<String, Snapshot>,
    pub(super) instances: BTreeMap<String, InstanceState>,
}

/// A volume.
#[derive(Clone, Debug)]
pub struct Volume {
    /// `vol-` and 17 hexadecimal digits.
    pub id: String,
    /// In GiB as the API has it, whatever the backing file holds.
    pub size_gib: u64,
    /// `io2`, `gp3`...
    pub volume_type: String,
    /// Given or by default; types without have none.
    pub iops: Option<u64>,
    /// Whether several instances may have it.
    pub multi_attach: bool,
    /// As asked for; nothing is encrypted.
    pub encrypted: bool,
    /// As asked for.
    pub kms_key_id: Option<String>,
    /// The snapshot that it was made from.
    pub snapshot_id: Option<String>,
    /// Availability zone.
    pub zone: String,
    /// When it was asked for.
    pub created: SystemTime,
    /// Its tags.
    pub tags: Tags,
    /// The instances that have it, or are about to, or had it.
    pub attachments: Vec<Attachment>,
    /// The last modification.
    pub modification: Option<Modification>,
    pub(super) stage: Stage,
    /// When the stage ends by itself.
    pub(super) due: Option<Instant>,
}

/// Where a volume is in its life.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Stage {
    Creating,
    Usable,
    Deleting,
    /// Its content is lost.
    Error,
}

impl Volume {
    /// As `DescribeVolumes` answers: `creating`, `available`, `in-use`, `deleting` or `error`.
    pub fn status(&self) -> &'static str {
        match self.stage {
            Stage::Creating => "creating",
            Stage::Usable if self.attachments.is_empty() => "available",
            Stage::Usable => "in-use",
            Stage::Deleting => "deleting",
            Stage::Error => "error",
        }
    }

    /// Its attachment to an instance.
    pub fn attachment(&self, instance: &str) -> Option<&Attachment> {
        self.attachments.iter().find(|a| a.instance == instance)
    }
}

/// A volume at an instance.
#[derive(Clone, Debug)]
pub struct Attachment {
    /// The instance.
    pub instance: String,
    /// The device name that was asked for; what the instance shows is a link in its folder.
    pub device: String,
    /// Where it is.
    pub status: AttachmentStatus,
    /// When it was asked for.
    pub since: SystemTime,
    /// When the status changes; one that is stuck has no such time.
    pub(super) due: Option<Instant>,
    /// A fault holds it in its status.
    pub(super) stuck: bool,
}

/// State of an attachment; one that is detached is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttachmentStatus {
    /// Asked for.
    Attaching,
    /// The instance has it.
    Attached,
    /// The instance still has it.
    Detaching,
}

impl AttachmentStatus {
    /// As the API has it.
    pub fn name(self) -> &'static str {
        match self {
            AttachmentStatus::Attaching => "attaching",
            AttachmentStatus::Attached => "attached",
            AttachmentStatus::Detaching => "detaching",
        }
    }
}

/// A change of a volume's size or IOPS.
#[derive(Clone, Debug)]
pub struct Modification {
    /// Where it is.
    pub state: ModificationState,
    /// Size before and after, in GiB.
    pub size_gib: (u64, u64),
    /// IOPS before and after.
    pub iops: (Option<u64>, Option<u64>),
    /// When it was asked for.
    pub started: SystemTime,
    /// When it was completed.
    pub ended: Option<SystemTime>,
    pub(super) started_at: Instant,
    pub(super) due: Option<Instant>,
}

/// State of a modification.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ModificationState {
    /// Asked for; the volume is as it was.
    Modifying,
    /// The volume has its new size; another modification is still refused.
    Optimizing,
    /// Done.
    Completed,
}

impl ModificationState {
    /// As the API has it.
    pub fn name(self) -> &'static str {
        match self {
            ModificationState::Modifying => "modifying",
            ModificationState::Optimizing => "optimizing",
            ModificationState::Completed => "completed",
        }
    }

    pub(super) fn progress(self) -> u32 {
        match self {
            ModificationState::Modifying => 0,
            ModificationState::Optimizing => 50,
            ModificationState::Completed => 100,
        }
    }
}

/// A snapshot.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// `snap-` and 17 hexadecimal digits.
    pub id: String,
    /// The volume that it was made of.
    pub volume_id: String,
    /// Size of the volume at that time, in GiB.
    pub size_gib: u64,
    /// As asked for.
    pub description: String,
    /// Whether the volume was.
    pub encrypted: bool,
    /// Key of the volume.
    pub kms_key_id: Option<String>,
    /// The moment whose content it has.
    pub started: SystemTime,
    /// Its tags.
    pub tags: Tags,
    /// Whether it is completed.
    pub completed: bool,
    pub(super) due: Option<Instant>,
}

impl Snapshot {
    /// As `DescribeSnapshots` answers: `pending` or `completed`.
    pub fn status(&self) -> &'static str {
        if self.completed { "completed" } else { "pending" }
    }
}

/// An instance as EC2 knows it.
#[derive(Clone, Debug)]
pub struct InstanceState {
    /// `i-` and 17 hexadecimal digits.
    pub id: String,
    /// Availability zone.
    pub zone: String,
    /// `r7i.xlarge`...
    pub instance_type: String,
    /// Whether it runs.
    pub power: Power,
    /// When it was made.
    pub launched: SystemTime,
    /// Its tags.
    pub tags: Tags,
    /// Its folder of links to devices.
    pub(super) links: PathBuf,
    /// Whether its metadata service answers.
    pub(super) imds_answers: bool,
    /// The access key that its metadata service gives away.
    pub(super) access_key: String,
}

/// State of an instance; changes take no time.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Power {
    /// It runs.
    Running,
    /// It can be started again.
    Stopped,
    /// It is gone for good; descriptions still show it.
    Terminated,
}

impl Power {
    /// Name and code as the API has them.
    pub fn name(self) -> (&'static str, u32) {
        match self {
            Power::Running => ("running", 16),
            Power::Stopped => ("stopped", 80),
            Power::Terminated => ("terminated", 48),
        }
    }
}

/// Families on the Xen hypervisor: they know nothing of multi-attach, and show volumes by device names.
const XEN: [&str; 23] = [
    "t1", "t2", "m1", "m2", "m3", "m4", "c1", "c3", "c4", "r3", "r4", "i2", "i3", "d2", "h1", "f1", "g2",
    "g3", "g3s", "p2", "p3", "x1", "x1e",
];

/// What is known of an instance type from its name.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Hypervisor {
    Nitro,
    Xen,
    /// On the Nitro system without a hypervisor.
    None,
}

/// The hypervisor of a type; none of a name that is no type's.
pub(super) fn hypervisor(instance_type: &str) -> Option<Hypervisor> {
    let (family, size) = instance_type.split_once('.')?;
    let plain = |text: &str, more: &[u8]| {
        !text.is_empty()
            && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || more.contains(&b))
    };
    if !plain(family, b"-") || !plain(size, b"-") || !family.bytes().any(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(match () {
        () if size.starts_with("metal") => Hypervisor::None,
        () if XEN.contains(&family) => Hypervisor::Xen,
        () => Hypervisor::Nitro,
    })
}
