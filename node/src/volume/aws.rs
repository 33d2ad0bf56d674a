//! Disks of EC2: io2 volumes of EBS that several instances attach at once.
//!
//! Answers get lost, and descriptions are behind by seconds. So every change is a loop: look, ask for what is missing, look again;
//! what was asked for and does not show is asked for anew after a while, in a way that cannot be done twice. Volumes are made
//! with a client token, snapshots, for which EC2 has none, are looked for by a tag before each attempt.
//!
//! - `ec2`: the calls, and all that is of the SDK;
//! - `failure`: what EC2's errors mean;
//! - `waiting`: the loops; `names`: device names.

use std::collections::BTreeSet;
use std::time::Duration;

use shardfs_proto::types::{Error, Reason, Result};
use tokio::runtime::{Builder, Runtime};
use tokio::time::Instant;

use super::cloud::{
    AttachmentState, BackupTags, Cloud, DISK_MACHINES_MAX, Disk, DiskId, DiskSize, DiskState, Machine,
    MachineState, NewDisk, Snapshot, SnapshotId, TAG_BACKUP, TAG_CLUSTER, TAG_CLUSTER_ID, TAG_TOKEN,
    TAG_VOLUME, check_size, check_token,
};
use ec2::{Ec2, Instance, Progress, VolumeToMake};
use failure::{Class, Failure};
use waiting::{Absence, CERTAIN_AFTER, Step, Trouble, until};

mod ec2;
mod failure;
mod names;
mod waiting;

/// A description.
const LOOK_MAX: Duration = Duration::from_secs(45);
/// A new disk, until it can be attached.
const CREATE_MAX: Duration = Duration::from_secs(120);
/// An attachment. Those who wait for a volume's failover wait for this.
const ATTACH_MAX: Duration = Duration::from_secs(25);
/// The end of one.
const DETACH_MAX: Duration = Duration::from_secs(60);
/// A change, until the new size can be used.
const MODIFY_MAX: Duration = Duration::from_secs(600);
/// The end of a disk or a snapshot.
const DELETE_MAX: Duration = Duration::from_secs(60);
/// A snapshot, until its content is fixed.
const SNAPSHOT_MAX: Duration = Duration::from_secs(90);
/// When the last attempt at it may begin: what became of that one is looked for before the time is over.
const SNAPSHOT_LAST_ATTEMPT: Duration = Duration::from_secs(60);
/// What was asked for and does not show is asked for again after this.
const ASK_AGAIN_AFTER: Duration = Duration::from_secs(8);
/// Characters of a tag's value, and of a description.
const TEXT_CHARS_MAX: usize = 255;
/// How often in a row EC2 must show a disk without an attachment, and take no more requests to end it, until that is believed.
const GONE_LOOKS: u32 = 3;

/// Where this machine is, as far as it is not to be asked of the metadata service, and what it works for.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct AwsSettings {
    /// The region.
    pub region: Option<String>,
    /// The availability zone.
    pub zone: Option<String>,
    /// The id of this instance.
    pub instance_id: Option<String>,
    /// URL of EC2; `None`: that of the region.
    pub endpoint: Option<String>,
    /// URL of the metadata service, also for credentials; `None`: where it is on EC2.
    pub imds_endpoint: Option<String>,
    /// The value of the tag [`TAG_CLUSTER`]: the cluster's name in the role's policy.
    pub cluster_tag: String,
}

/// EC2, as this instance uses it.
#[derive(Debug)]
pub struct Aws {
    /// Calls are driven by the threads that make them; its one worker serves their sockets and timers. `None` while it is dropped.
    runtime: Option<Runtime>,
    machine: Machine,
    cluster_tag: String,
    ec2: Ec2,
}

impl Aws {
    /// Finds out where this runs; asks nothing of EC2. Blocking; call from a blocking thread.
    pub fn connect(settings: AwsSettings) -> Result<Aws> {
        if !(1..=TEXT_CHARS_MAX).contains(&settings.cluster_tag.chars().count()) {
            return Err(Error::invalid(format!(
                "{:?} cannot be the value of the tag {TAG_CLUSTER}: give the cluster's name, of 1 to {TEXT_CHARS_MAX} \
                 characters",
                settings.cluster_tag
            )));
        }
        let mut runtime = Builder::new_multi_thread();
        runtime.worker_threads(1).max_blocking_threads(4).thread_name("aws").enable_all();
        let runtime = runtime.build().map_err(|e| Error::io(format!("starting a thread for EC2: {e}")))?;
        let connected = runtime.block_on(Ec2::connect(&settings));
        // In an async context a runtime must not be dropped in any other way.
        let (ec2, machine) = match connected {
            Ok(connected) => connected,
            Err(error) => {
                runtime.shutdown_background();
                return Err(error);
            }
        };
        Ok(Aws { runtime: Some(runtime), machine, cluster_tag: settings.cluster_tag, ec2 })
    }

    fn block<T>(&self, work: impl Future<Output = Result<T>>) -> Result<T> {
        match &self.runtime {
            Some(runtime) => runtime.block_on(work),
            None => Err(Error::internal("EC2 is asked for something while its client is dropped")),
        }
    }

    async fn create_disk(&self, new: &NewDisk) -> Result<DiskId> {
        check_size(new.size)?;
        check_token(&new.token)?;
        let tags = [
            (TAG_CLUSTER, self.cluster_tag.clone()),
            (TAG_CLUSTER_ID, new.cluster_id.clone()),
            (TAG_VOLUME, new.volume.to_string()),
            (TAG_TOKEN, new.token.clone()),
            ("Name", bounded(format!("shardfs {} {}", self.cluster_tag, new.volume))),
        ];
        let volume = VolumeToMake {
            zone: &self.machine.zone,
            size: new.size,
            token: &new.token,
            kms_key: new.kms_key.as_deref(),
            from: new.from.as_ref(),
            tags: &tags,
        };
        let what = format!("making a disk for volume {}", new.volume);
        let (mut made, mut seen) = (None, false);
        let (mut absence, mut source_absence) = (Absence::default(), Absence::default());
        until(&what, CREATE_MAX, async || {
            let id = match &made {
                Some(id) => id,
                None => match self.made_before(new).await? {
                    Some(id) => made.insert(id),
                    None => match self.ec2.create_volume(&volume).await {
                        Ok(id) => made.insert(id),
                        // A snapshot that was just made; or there is none.
                        Err(failure) if failure.code == "InvalidSnapshot.NotFound" => {
                            return missing(failure, &mut source_absence);
                        }
                        Err(failure) if failure.class == Class::State => {
                            return Ok(Step::Wait(failure.to_string()));
                        }
                        Err(failure) => return Err(failure.into()),
                    },
                },
            };
            let Some(disk) = self.ec2.disk(id).await? else {
                if seen && absence.is_certain() {
                    return Err(given_up(id).into());
                }
                return Ok(Step::Wait(format!("EC2 does not know {id} yet")));
            };
            (seen, absence) = (true, Absence::default());
            match disk.state {
                DiskState::Ready => Ok(Step::Done(id.clone())),
                DiskState::Making => Ok(Step::Wait(format!("EC2 still makes {id}"))),
                DiskState::Failed => Err(failed(id).into()),
                DiskState::Leaving => Err(given_up(id).into()),
            }
        })
        .await
    }

    /// The disk of a token: EC2 forgets tokens after a day or so, the tag stays.
    async fn made_before(&self, new: &NewDisk) -> Result<Option<DiskId>, Trouble> {
        let wanted = [(TAG_CLUSTER_ID, new.cluster_id.as_str()), (TAG_TOKEN, new.token.as_str())];
        let found = self.ec2.disks(&wanted).await?;
        let Some(disk) = found.into_iter().find(|disk| disk.state != DiskState::Leaving) else {
            return Ok(None);
        };
        // As far as descriptions tell; the key and the snapshot EC2 itself compares, while it remembers.
        let is_encrypted_as_asked = disk.encrypted || new.kms_key.is_none();
        if disk.size != new.size || disk.volume != new.volume.as_str() || !is_encrypted_as_asked {
            return Err(Trouble::Final(Error::invalid(format!(
                "{} was made for the token {} before, for volume {}, with {} GiB and {} IOPS, {}: ask for the same, or \
                 use another token",
                disk.id,
                new.token,
                disk.volume,
                disk.size.gib,
                disk.size.iops,
                if disk.encrypted { "encrypted" } else { "not encrypted" }
            ))));
        }
        Ok(Some(disk.id))
    }

    async fn look(&self, id: &DiskId) -> Result<Option<Disk>> {
        let mut absence = Absence::default();
        until(&format!("looking at disk {id}"), LOOK_MAX, async || match self.ec2.disk(id).await? {
            Some(disk) => Ok(Step::Done(Some(disk))),
            None if absence.is_certain() => Ok(Step::Done(None)),
            None => Ok(Step::Wait(format!("EC2 does not know {id}"))),
        })
        .await
    }

    async fn attach_disk(&self, id: &DiskId) -> Result<()> {
        let me = &self.machine;
        let mut absence = Absence::default();
        let mut names_taken = BTreeSet::new();
        let mut asked: Option<Instant> = None;
        until(&format!("attaching disk {id} to this machine, {}", me.id), ATTACH_MAX, async || {
            let Some(disk) = self.ec2.disk(id).await? else {
                return match absence.is_certain() {
                    true => Err(no_disk(id).into()),
                    false => Ok(Step::Wait(format!("EC2 does not know {id}"))),
                };
            };
            absence.over();
            match disk.state {
                DiskState::Ready => {}
                DiskState::Making => return Ok(Step::Wait("EC2 still makes it".to_owned())),
                DiskState::Failed => return Err(failed(id).into()),
                DiskState::Leaving => return Err(Error::not_found("it is being deleted").into()),
            }
            check_shareable(&disk, me)?;
            match state_at(&disk, &me.id) {
                Some(AttachmentState::Attached) => return Ok(Step::Done(())),
                Some(AttachmentState::Attaching) => {
                    let hint = "EC2 is still at it; if it stays so, detach it by force, or stop and start this machine";
                    return Ok(Step::Wait(hint.to_owned()));
                }
                Some(AttachmentState::Detaching) => {
                    asked = None;
                    return Ok(Step::Wait("it is still being detached from this machine".to_owned()));
                }
                None if asked.is_some_and(|at| at.elapsed() < ASK_AGAIN_AFTER) => {
                    return Ok(Step::Wait("EC2 does not show the attachment yet".to_owned()));
                }
                None => {}
            }
            if disk.attachments.len() >= DISK_MACHINES_MAX {
                return Err(Error::new(Reason::Unsupported, too_many(&disk)).into());
            }
            let name = self.free_name(&names_taken).await?;
            match self.ec2.attach_volume(id, &me.id, &name).await {
                Ok(()) => {
                    asked = Some(Instant::now());
                    Ok(Step::Wait("EC2 does not show the attachment yet".to_owned()))
                }
                // As often as there are names.
                Err(failure) if failure.is_name_taken() => {
                    names_taken.insert(name);
                    Ok(Step::AtOnce)
                }
                // Also if an earlier attempt was done and its answer was lost.
                Err(failure) if matches!(failure.class, Class::State | Class::Missing) => {
                    Ok(Step::Wait(failure.to_string()))
                }
                Err(failure) => Err(failure.into()),
            }
        })
        .await
    }

    async fn free_name(&self, taken: &BTreeSet<String>) -> Result<String, Trouble> {
        let mut taken = taken.clone();
        let here = self.ec2.instances(std::slice::from_ref(&self.machine.id)).await?;
        taken.extend(here.into_iter().flat_map(|instance| instance.devices));
        names::free(&taken).ok_or_else(|| {
            let text = "this machine has no device name left: detach another disk from it".to_owned();
            Trouble::Final(Error::new(Reason::Unsupported, text))
        })
    }

    async fn detach_disk(&self, id: &DiskId, machine: &str, force: bool) -> Result<()> {
        let mut absence = Absence::default();
        let mut asked: Option<Instant> = None;
        // What tells that it is over: EC2 says that there is nothing to detach, or no look shows the attachment any more.
        let (mut is_refused, mut looks_without) = (false, 0);
        let what = format!("detaching disk {id} from machine {machine}");
        let done = until(&what, DETACH_MAX, async || {
            let mut odd = None;
            // First of all, and to be told that it is over: what descriptions say may be older than the attachment.
            if asked.is_none_or(|at| at.elapsed() >= ASK_AGAIN_AFTER) {
                is_refused = false;
                match self.ec2.detach_volume(id, machine, force).await {
                    Ok(()) => looks_without = 0,
                    Err(failure) if failure.is_not_attached() => is_refused = true,
                    // It has begun already, or cannot yet.
                    Err(failure) if failure.class == Class::State => looks_without = 0,
                    Err(failure) if failure.class == Class::Refused => odd = Some(failure),
                    Err(failure) => return Err(failure.into()),
                }
                asked = Some(Instant::now());
            }
            let Some(disk) = self.ec2.disk(id).await? else {
                return match is_refused && absence.is_certain() {
                    true => Ok(Step::Done(())),
                    false => Ok(Step::Wait(format!("EC2 does not know {id}"))),
                };
            };
            absence.over();
            if state_at(&disk, machine).is_some() {
                looks_without = 0;
                return match odd {
                    Some(failure) => Err(failure.into()),
                    None => Ok(Step::Wait("the machine does not let go of it".to_owned())),
                };
            }
            looks_without += 1;
            if is_refused || looks_without >= GONE_LOOKS {
                return Ok(Step::Done(()));
            }
            asked = None;
            Ok(Step::Wait("EC2 does not say yet what became of the attachment".to_owned()))
        });
        let hint = if force {
            "look at the machine in EC2, and stop it"
        } else {
            "unmount it there; if the machine hangs or is not reachable, stop it, or repeat this with `--force`, which is \
             allowed only when nothing on that machine writes to the disk any more"
        };
        done.await.map_err(|error| match error.reason() {
            Reason::Unavailable => Error::unavailable(format!("{}: {hint}", error.message())),
            _ => error,
        })
    }

    async fn modify_disk(&self, id: &DiskId, size: DiskSize) -> Result<()> {
        check_size(size)?;
        let disk = self.look(id).await?.ok_or_else(|| no_disk(id))?;
        if size.gib < disk.size.gib {
            return Err(Error::invalid(format!(
                "disk {id} has {} GiB, and cannot be made smaller: give at least that",
                disk.size.gib
            )));
        }
        // The change that was the last one before this asked for one.
        let (mut before, mut is_asked) = (None, false);
        let mut refused_since: Option<Instant> = None;
        let mut absence = Absence::default();
        let what = format!("changing disk {id} to {} GiB and {} IOPS", size.gib, size.iops);
        until(&what, MODIFY_MAX, async || {
            let Some(disk) = self.ec2.disk(id).await? else {
                return match absence.is_certain() {
                    true => Err(no_disk(id).into()),
                    false => Ok(Step::Wait(format!("EC2 does not know {id}"))),
                };
            };
            absence.over();
            let last = self.ec2.modification(id).await?;
            let begun = last.as_ref().map(|last| last.begun);
            match &last {
                Some(last) if last.progress == Progress::Modifying => {
                    return Ok(Step::Wait("EC2 is still at it; that goes on, whoever waits".to_owned()));
                }
                // The one that was asked for; what descriptions say of the disk may be older.
                Some(last) if last.leads_to(size) && is_asked && begun != before => {
                    return match last.progress {
                        Progress::Failed => {
                            Err(Error::io(format!("EC2 failed: {}; repeat it", last.message)).into())
                        }
                        _ => Ok(Step::Done(())),
                    };
                }
                _ if disk.size == size => return Ok(Step::Done(())),
                _ if is_asked => return Ok(Step::Wait("EC2 does not show the change yet".to_owned())),
                _ => before = begun,
            }
            let gib = (disk.size.gib != size.gib).then_some(size.gib);
            let iops = (disk.size.iops != size.iops).then_some(size.iops);
            match self.ec2.modify_volume(id, gib, iops).await {
                Ok(()) => {
                    is_asked = true;
                    Ok(Step::Wait("EC2 does not show the change yet".to_owned()))
                }
                Err(failure) if failure.class == Class::Missing => Ok(Step::Wait(failure.to_string())),
                // What is in the way may be the change itself, asked for by an attempt whose answer was lost.
                Err(failure) if matches!(failure.class, Class::State | Class::Later) => {
                    match refused_since.get_or_insert_with(Instant::now).elapsed() < CERTAIN_AFTER {
                        true => Ok(Step::Wait(failure.to_string())),
                        false => Err(Trouble::Call(Failure { class: Class::Later, ..failure })),
                    }
                }
                Err(failure) => Err(failure.into()),
            }
        })
        .await
    }

    async fn delete_disk(&self, id: &DiskId) -> Result<()> {
        let mut absence = Absence::default();
        until(&format!("deleting disk {id}"), DELETE_MAX, async || {
            let refused = match self.ec2.delete_volume(id).await {
                Ok(()) => return Ok(Step::Done(())),
                Err(failure) if matches!(failure.class, Class::Missing | Class::State) => failure,
                Err(failure) => return Err(failure.into()),
            };
            let Some(disk) = self.ec2.disk(id).await? else {
                return match refused.class == Class::Missing && absence.is_certain() {
                    true => Ok(Step::Done(())),
                    false => Ok(Step::Wait(refused.to_string())),
                };
            };
            absence.over();
            let has = |a: &&super::cloud::Attachment| a.state != AttachmentState::Detaching;
            let holders: Vec<&str> =
                disk.attachments.iter().filter(has).map(|a| a.machine.as_str()).collect();
            if disk.state == DiskState::Leaving {
                Ok(Step::Done(()))
            } else if refused.code == "VolumeInUse" && !holders.is_empty() {
                let text = format!("it is attached to {}: detach it there first", holders.join(", "));
                Err(Error::new(Reason::InvalidArgument, text).into())
            } else {
                Ok(Step::Wait(refused.to_string()))
            }
        })
        .await
    }

    async fn make_snapshot(&self, disk: &DiskId, backup: &BackupTags, token: &str) -> Result<SnapshotId> {
        check_token(token)?;
        let tags = [
            (TAG_CLUSTER, self.cluster_tag.clone()),
            (TAG_CLUSTER_ID, backup.cluster_id.clone()),
            (TAG_VOLUME, backup.volume.to_string()),
            (TAG_BACKUP, backup.backup.clone()),
            (TAG_TOKEN, token.to_owned()),
            ("Name", bounded(format!("shardfs {} {} {}", self.cluster_tag, backup.volume, backup.backup))),
        ];
        let description = bounded(format!(
            "ShardFS cluster {}: volume {} of backup {}",
            self.cluster_tag, backup.volume, backup.backup
        ));
        let wanted = [(TAG_CLUSTER_ID, backup.cluster_id.as_str()), (TAG_TOKEN, token)];
        let begun = Instant::now();
        let mut made: Option<(SnapshotId, Instant)> = None;
        let mut lost: Option<Instant> = None;
        let mut absence = Absence::default();
        until(&format!("taking a snapshot of disk {disk}"), SNAPSHOT_MAX, async || {
            let found = self.ec2.snapshots(&wanted).await?;
            // Of two, which there are only if a process was cut off between an attempt and its answer, the same one every time.
            let found = found.into_iter().filter(|s| !s.failed).min_by_key(|s| (s.taken, s.id.clone()));
            if let Some(found) = found {
                return Ok(Step::Done(found.id));
            }
            // Shown before this returns: whoever asks for it once more is to find it.
            if let Some((id, at)) = &made {
                return match at.elapsed() < CERTAIN_AFTER {
                    true => Ok(Step::Wait(format!("EC2 does not show {id} yet"))),
                    false => Ok(Step::Done(SnapshotId::clone(id))),
                };
            }
            if lost.is_some_and(|at| at.elapsed() < CERTAIN_AFTER) || begun.elapsed() > SNAPSHOT_LAST_ATTEMPT
            {
                return Ok(Step::Wait("EC2 did not answer, and shows no snapshot yet; repeat it".to_owned()));
            }
            match self.ec2.create_snapshot(disk, &description, &tags).await {
                Ok(id) => {
                    made = Some((id, Instant::now()));
                    Ok(Step::AtOnce)
                }
                Err(failure) => {
                    if failure.class == Class::Unknown {
                        lost = Some(Instant::now());
                    }
                    match failure.class {
                        Class::Missing => missing(failure, &mut absence),
                        Class::State => Ok(Step::Wait(failure.to_string())),
                        _ => Err(failure.into()),
                    }
                }
            }
        })
        .await
    }

    async fn await_snapshot(&self, id: &SnapshotId, at_most: Duration) -> Result<()> {
        let mut absence = Absence::default();
        until(&format!("waiting for snapshot {id}"), at_most, async || {
            let Some(snapshot) = self.ec2.snapshot(id).await? else {
                return match absence.is_certain() {
                    true => Err(Error::not_found(format!(
                        "there is no snapshot {id}: check its id and the region"
                    ))
                    .into()),
                    false => Ok(Step::Wait(format!("EC2 does not know {id}"))),
                };
            };
            absence.over();
            match snapshot.percent {
                _ if snapshot.failed => {
                    Err(Error::io("EC2 says that it failed: delete it, and take another one").into())
                }
                100 => Ok(Step::Done(())),
                percent => Ok(Step::Wait(format!("{percent} % are copied; that goes on, whoever waits"))),
            }
        })
        .await
    }

    async fn remove_snapshot(&self, id: &SnapshotId) -> Result<()> {
        let mut absence = Absence::default();
        until(&format!("deleting snapshot {id}"), DELETE_MAX, async || {
            match self.ec2.delete_snapshot(id).await {
                Ok(()) => Ok(Step::Done(())),
                Err(failure) if failure.class == Class::Missing => match self.ec2.snapshot(id).await? {
                    None if absence.is_certain() => Ok(Step::Done(())),
                    _ => Ok(Step::Wait(failure.to_string())),
                },
                Err(failure) => Err(failure.into()),
            }
        })
        .await
    }

    async fn instances(&self, ids: &[String]) -> Result<Vec<Instance>> {
        until("looking at machines", LOOK_MAX, async || Ok(Step::Done(self.ec2.instances(ids).await?))).await
    }

    async fn check(&self, ids: &[String]) -> Result<()> {
        if ids.len() > DISK_MACHINES_MAX {
            return Err(Error::invalid(format!(
                "{} machines cannot share a disk: {DISK_MACHINES_MAX} are the most",
                ids.len()
            )));
        }
        let found = self.instances(ids).await?;
        let kinds: BTreeSet<String> = found.iter().map(|instance| instance.kind.clone()).collect();
        let kinds: Vec<String> = kinds.into_iter().collect();
        let nitro = until("looking at types of machines", LOOK_MAX, async || {
            Ok(Step::Done(self.ec2.nitro_kinds(&kinds).await?))
        })
        .await?;
        match unfit(ids, &found, &nitro, &self.machine.zone) {
            problems if problems.is_empty() => Ok(()),
            problems => Err(Error::invalid(problems.join("; "))),
        }
    }
}

impl Drop for Aws {
    fn drop(&mut self) {
        // Also in an async context, where waiting for it would panic. Nothing is under way: calls borrow this.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Cloud for Aws {
    fn machine(&self) -> &Machine {
        &self.machine
    }

    fn create(&self, new: &NewDisk) -> Result<DiskId> {
        self.block(self.create_disk(new))
    }

    fn disk(&self, id: &DiskId) -> Result<Option<Disk>> {
        self.block(self.look(id))
    }

    fn disks(&self, cluster_id: &str) -> Result<Vec<Disk>> {
        let found = self.block(until("looking for the cluster's disks", LOOK_MAX, async || {
            Ok(Step::Done(self.ec2.disks(&[(TAG_CLUSTER_ID, cluster_id)]).await?))
        }))?;
        Ok(found.into_iter().filter(|disk| disk.state != DiskState::Leaving).collect())
    }

    fn machines(&self, ids: &[String]) -> Result<Vec<MachineState>> {
        let found = self.block(self.instances(ids))?;
        Ok(found.into_iter().map(machine_state).collect())
    }

    fn check_machines(&self, ids: &[String]) -> Result<()> {
        self.block(self.check(ids))
    }

    fn attach(&self, disk: &DiskId) -> Result<()> {
        self.block(self.attach_disk(disk))
    }

    fn detach(&self, disk: &DiskId, machine: &str, force: bool) -> Result<()> {
        self.block(self.detach_disk(disk, machine, force))
    }

    fn modify(&self, disk: &DiskId, size: DiskSize) -> Result<()> {
        self.block(self.modify_disk(disk, size))
    }

    fn delete(&self, disk: &DiskId) -> Result<()> {
        self.block(self.delete_disk(disk))
    }

    fn snapshot(&self, disk: &DiskId, backup: &BackupTags, token: &str) -> Result<SnapshotId> {
        self.block(self.make_snapshot(disk, backup, token))
    }

    fn snapshots(&self, cluster_id: &str) -> Result<Vec<Snapshot>> {
        self.block(until("looking for the cluster's snapshots", LOOK_MAX, async || {
            Ok(Step::Done(self.ec2.snapshots(&[(TAG_CLUSTER_ID, cluster_id)]).await?))
        }))
    }

    fn wait_for_snapshot(&self, id: &SnapshotId, at_most: Duration) -> Result<()> {
        self.block(self.await_snapshot(id, at_most))
    }

    fn delete_snapshot(&self, id: &SnapshotId) -> Result<()> {
        self.block(self.remove_snapshot(id))
    }
}

/// As much of it as a tag or a description holds.
fn bounded(text: String) -> String {
    text.chars().take(TEXT_CHARS_MAX).collect()
}

/// Waits for what EC2 may only not have heard of yet.
fn missing<T>(failure: Failure, absence: &mut Absence) -> Result<Step<T>, Trouble> {
    match absence.is_certain() {
        true => Err(failure.into()),
        false => Ok(Step::Wait(failure.to_string())),
    }
}

fn no_disk(id: &DiskId) -> Error {
    Error::not_found(format!("there is no disk {id}: check its id and the region"))
}

fn failed(id: &DiskId) -> Error {
    Error::io(format!(
        "EC2 says that disk {id} failed (state `error`): look at it in EC2; delete it if it is new"
    ))
}

/// The usual reason is a key that may not be used: EC2 takes the call, and drops the volume without a word.
fn given_up(id: &DiskId) -> Error {
    Error::not_found(format!(
        "EC2 has deleted disk {id}, which it made for this: check that the KMS key can be used, then use another token"
    ))
}

fn state_at(disk: &Disk, machine: &str) -> Option<AttachmentState> {
    disk.attachments.iter().find(|a| a.machine == machine).map(|a| a.state)
}

fn check_shareable(disk: &Disk, machine: &Machine) -> Result<()> {
    if !disk.multi_attach {
        return Err(Error::invalid(format!(
            "disk {} can be attached to one machine only: make one with multi-attach (io2)",
            disk.id
        )));
    }
    if disk.zone != machine.zone {
        return Err(Error::invalid(format!(
            "disk {} is in zone {}, this machine in {}: use machines of the disk's zone, or make a disk from a snapshot \
             of it here",
            disk.id, disk.zone, machine.zone
        )));
    }
    Ok(())
}

fn too_many(disk: &Disk) -> String {
    let machines: Vec<&str> = disk.attachments.iter().map(|a| a.machine.as_str()).collect();
    format!(
        "disk {} is attached to {} machines, which are the most: detach it from one of {}",
        disk.id,
        machines.len(),
        machines.join(", ")
    )
}

/// One that begins or ends may still write.
fn machine_state(instance: Instance) -> MachineState {
    let Instance { id, zone, kind, state, .. } = instance;
    MachineState { id, zone, kind, running: !matches!(state.as_str(), "stopped" | "terminated") }
}

/// Why machines cannot share a disk in this zone.
fn unfit(ids: &[String], found: &[Instance], nitro: &[String], zone: &str) -> Vec<String> {
    let problem = |id: &String| {
        let Some(instance) = found.iter().find(|instance| instance.id == *id) else {
            return Some(format!("there is no machine {id} in this region: check its id"));
        };
        let Instance { zone: its, kind, state, .. } = instance;
        if state != "running" {
            Some(format!("machine {id} is {state}: start it"))
        } else if its != zone {
            Some(format!("machine {id} is in zone {its}, not {zone}: disks are shared within a zone"))
        } else if !nitro.contains(kind) {
            Some(format!("machine {id} is of type {kind}, which is not built on Nitro: use a type that is"))
        } else {
            None
        }
    };
    ids.iter().filter_map(problem).collect()
}

#[cfg(test)]
mod tests;
