//! The actions that change something, checked as EC2 checks them.

use std::time::{Instant, SystemTime};

use super::describe::ATTACHMENTS;
use super::faults::Moment;
use super::model::*;
use super::query::{Parameters, Refusal, invalid, refuse};
use super::state::State;
use super::types::{checked_iops, checked_size};
use super::xml::Xml;

/// Instances that a volume may be at.
const INSTANCES_PER_VOLUME: usize = 16;
const TAGS_PER_RESOURCE: usize = 50;

type Done = Result<Xml, Refusal>;

impl State {
    /// Does an action that changes something.
    pub(super) fn act(&mut self, action: &str, parameters: &Parameters<'_>, key: &str, now: Instant) -> Done {
        match action {
            "CreateVolume" => self.create_volume(parameters, now),
            "AttachVolume" => self.attach_volume(parameters, key, now),
            "DetachVolume" => self.detach_volume(parameters, key, now),
            "DeleteVolume" => self.delete_volume(parameters, now),
            "ModifyVolume" => self.modify_volume(parameters, now),
            "CreateSnapshot" => self.create_snapshot(parameters, now),
            "DeleteSnapshot" => self.delete_snapshot(parameters),
            "CreateTags" => self.create_tags(parameters),
            _ => {
                let message = format!("The action {action} is not valid for this web service.");
                Err(refuse("InvalidAction", message))
            }
        }
    }

    fn create_volume(&mut self, parameters: &Parameters<'_>, now: Instant) -> Done {
        let zone = parameters.required("AvailabilityZone")?.to_owned();
        let volume_type = parameters.optional("VolumeType").unwrap_or("gp2").to_owned();
        let (size, iops) = (parameters.number("Size")?, parameters.number("Iops")?);
        let multi_attach = parameters.boolean("MultiAttachEnabled")?;
        let encrypted = parameters.boolean("Encrypted")?;
        let kms_key_id = parameters.optional("KmsKeyId").map(str::to_owned);
        let from = parameters.optional("SnapshotId").filter(|id| !id.is_empty());
        let token = parameters.optional("ClientToken").map(str::to_owned);
        let tags = parameters.tag_specifications("volume")?;
        if zone.strip_prefix(&self.options.region).is_none_or(|letter| letter.len() != 1) {
            return Err(refuse("InvalidZone.NotFound", format!("The zone '{zone}' does not exist.")));
        }
        if kms_key_id.is_some() && !encrypted {
            let message = "The parameter KmsKeyId requires the parameter Encrypted to be set.";
            return Err(refuse("InvalidParameterDependency", message));
        }
        if multi_attach && !matches!(volume_type.as_str(), "io1" | "io2") {
            let message =
                format!("The parameter MultiAttachEnabled is not supported for {volume_type} volumes.");
            return Err(refuse("InvalidParameterCombination", message));
        }
        let snapshot = from.map(|id| self.world.snapshot(id)).transpose()?;
        let Some(size_gib) = size.or(snapshot.map(|s| s.size_gib)) else {
            let message = "The request must contain the parameter size/snapshot";
            return Err(refuse("MissingParameter", message));
        };
        checked_size(&volume_type, size_gib)?;
        let iops = checked_iops(&volume_type, size_gib, iops)?;
        if let Some(snapshot) = snapshot {
            if !snapshot.completed {
                let message = format!("Snapshot {} is not in completed state", snapshot.id);
                return Err(refuse("IncorrectState", message));
            }
            if size_gib < snapshot.size_gib {
                return Err(invalid(format!(
                    "Volume of size {size_gib}GiB is smaller than snapshot '{}', expect size >= {}GiB",
                    snapshot.id, snapshot.size_gib
                )));
            }
        }
        checked_tags(&tags)?;
        if token.as_ref().is_some_and(|token| token.len() > 64) {
            return Err(invalid("Client tokens have at most 64 characters"));
        }
        parameters.finish()?;

        let mut xml = Xml::default();
        if let Some((given, volume)) = token.as_ref().and_then(|token| self.tokens.get(token)) {
            if given != parameters.all() {
                let message = "Arguments on this idempotent request are inconsistent with arguments used in \
                               previous request(s).";
                return Err(refuse("IdempotentParameterMismatch", message));
            }
            xml.volume(self.world.volume(volume)?);
            return Ok(xml);
        }
        let snapshot_id = from.map(str::to_owned);
        let encrypted = encrypted || snapshot.is_some_and(|s| s.encrypted);
        let kms_key_id = kms_key_id.or_else(|| snapshot?.kms_key_id.clone());
        let volume = Volume {
            id: new_id("vol-"),
            size_gib,
            volume_type,
            iops,
            multi_attach,
            encrypted,
            kms_key_id,
            snapshot_id,
            zone,
            created: SystemTime::now(),
            tags,
            attachments: Vec::new(),
            modification: None,
            stage: Stage::Creating,
            due: Some(now + self.options.delays.create),
        };
        self.blocks.create(&volume.id, size_gib, from);
        xml.volume(&volume);
        if let Some(token) = token {
            self.tokens.insert(token, (parameters.all().clone(), volume.id.clone()));
        }
        self.volumes_ever += 1;
        self.world.volumes.insert(volume.id.clone(), volume);
        Ok(xml)
    }

    fn attach_volume(&mut self, parameters: &Parameters<'_>, key: &str, now: Instant) -> Done {
        let volume = self.world.volume(parameters.required("VolumeId")?)?;
        let instance = self.world.instance(parameters.required("InstanceId")?)?;
        let device = parameters.required("Device")?;
        checked_device(device)?;
        if volume.stage != Stage::Usable {
            return Err(refuse("IncorrectState", format!("{} is not 'available'.", volume.id)));
        }
        if instance.power != Power::Running {
            return Err(refuse("IncorrectState", format!("Instance '{}' is not 'running'.", instance.id)));
        }
        if volume.zone != instance.zone {
            let message = format!(
                "The volume '{}' is not in the same availability zone as instance '{}'",
                volume.id, instance.id
            );
            return Err(refuse("InvalidVolume.ZoneMismatch", message));
        }
        if volume.attachment(&instance.id).is_some()
            || (!volume.multi_attach && !volume.attachments.is_empty())
        {
            let message = format!("{} is already attached to an instance", volume.id);
            return Err(refuse("VolumeInUse", message));
        }
        if volume.multi_attach && hypervisor(&instance.instance_type) == Some(Hypervisor::Xen) {
            let message = format!(
                "Multi-Attach enabled volumes can be attached to Nitro-based instances only; {} is a {}.",
                instance.id, instance.instance_type
            );
            return Err(refuse("UnsupportedOperation", message));
        }
        if volume.attachments.len() >= INSTANCES_PER_VOLUME {
            let message = format!("{} has the maximum of {INSTANCES_PER_VOLUME} attachments.", volume.id);
            return Err(refuse("AttachmentLimitExceeded", message));
        }
        let others: Vec<&Attachment> =
            self.world.volumes.values().filter_map(|v| v.attachment(&instance.id)).collect();
        if others.iter().any(|a| a.device == device) {
            return Err(invalid(format!(
                "Invalid value '{device}' for unixDevice. Attachment point {device} is already in use"
            )));
        }
        if others.len() >= ATTACHMENTS {
            let message = format!("{} has the maximum of {ATTACHMENTS} attachments.", instance.id);
            return Err(refuse("AttachmentLimitExceeded", message));
        }
        if volume.modification.as_ref().is_some_and(|m| m.state == ModificationState::Modifying) {
            let message =
                format!("Cannot attach volume {} when it is in modification state: MODIFYING", volume.id);
            return Err(refuse("OperationNotPermitted", message));
        }
        parameters.finish()?;

        let stuck = self.faults.strike(Moment::Attaching, "AttachVolume", key).is_some();
        let due = (!stuck).then_some(now + self.options.delays.attach);
        let attachment = Attachment {
            instance: instance.id.clone(),
            device: device.to_owned(),
            status: AttachmentStatus::Attaching,
            since: SystemTime::now(),
            due,
            stuck,
        };
        let id = volume.id.clone();
        let volume = self.world.volumes.get_mut(&id).expect("it was there");
        let mut xml = Xml::default();
        xml.attachment(volume, &attachment, "attaching");
        volume.attachments.push(attachment);
        Ok(xml)
    }

    fn detach_volume(&mut self, parameters: &Parameters<'_>, key: &str, now: Instant) -> Done {
        let volume = self.world.volume(parameters.required("VolumeId")?)?;
        let instance = parameters.optional("InstanceId").map(|id| self.world.instance(id)).transpose()?;
        let device = parameters.optional("Device");
        let force = parameters.boolean("Force")?;
        if volume.attachments.is_empty() {
            let message = format!("Volume '{}' is in the '{}' state.", volume.id, volume.status());
            return Err(refuse("IncorrectState", message));
        }
        if instance.is_none() && volume.multi_attach {
            let message = format!(
                "The parameter InstanceId must be specified to detach {}, which is Multi-Attach enabled.",
                volume.id
            );
            return Err(refuse("InvalidParameterCombination", message));
        }
        let wanted = |a: &Attachment| {
            instance.is_none_or(|i| i.id == a.instance) && device.is_none_or(|device| device == a.device)
        };
        let Some(place) = volume.attachments.iter().position(wanted) else {
            let message = format!("Volume '{}' is not attached as specified.", volume.id);
            return Err(refuse("InvalidAttachment.NotFound", message));
        };
        if volume.attachments[place].status == AttachmentStatus::Detaching && !force {
            let message = format!("Volume '{}' is in the 'detaching' state.", volume.id);
            return Err(refuse("IncorrectState", message));
        }
        parameters.finish()?;

        let stuck = !force && self.faults.strike(Moment::Detaching, "DetachVolume", key).is_some();
        let due = (!stuck).then_some(now + self.options.delays.detach);
        let id = volume.id.clone();
        let volume = self.world.volumes.get_mut(&id).expect("it was there");
        let attachment = &mut volume.attachments[place];
        (attachment.status, attachment.stuck, attachment.due) = (AttachmentStatus::Detaching, stuck, due);
        let mut xml = Xml::default();
        xml.attachment(volume, &volume.attachments[place], "detaching");
        Ok(xml)
    }

    fn delete_volume(&mut self, parameters: &Parameters<'_>, now: Instant) -> Done {
        let volume = self.world.volume(parameters.required("VolumeId")?)?;
        if let Some(attachment) = volume.attachments.first() {
            let message = format!("Volume {} is currently attached to {}", volume.id, attachment.instance);
            return Err(refuse("VolumeInUse", message));
        }
        if matches!(volume.stage, Stage::Creating | Stage::Deleting) {
            let message = format!("The volume '{}' is '{}'.", volume.id, volume.status());
            return Err(refuse("IncorrectState", message));
        }
        parameters.finish()?;

        let id = volume.id.clone();
        let volume = self.world.volumes.get_mut(&id).expect("it was there");
        (volume.stage, volume.due) = (Stage::Deleting, Some(now + self.options.delays.delete));
        let mut xml = Xml::default();
        xml.text("return", true);
        Ok(xml)
    }

    fn modify_volume(&mut self, parameters: &Parameters<'_>, now: Instant) -> Done {
        let volume = self.world.volume(parameters.required("VolumeId")?)?;
        let (size, iops) = (parameters.number("Size")?, parameters.number("Iops")?);
        if size.is_none() && iops.is_none() {
            let message = "The request must contain the parameter size, iops, or volumeType";
            return Err(refuse("MissingParameter", message));
        }
        if volume.stage != Stage::Usable {
            let message = format!("The volume '{}' is '{}'.", volume.id, volume.status());
            return Err(refuse("IncorrectState", message));
        }
        let size_gib = size.unwrap_or(volume.size_gib);
        if size_gib < volume.size_gib {
            let message = format!("New size cannot be smaller than existing size of {}GiB", volume.size_gib);
            return Err(invalid(message));
        }
        checked_size(&volume.volume_type, size_gib)?;
        // Types whose IOPS nobody can give have those that follow from the size.
        let kept = volume.iops.filter(|_| matches!(volume.volume_type.as_str(), "io1" | "io2" | "gp3"));
        let iops_after = checked_iops(&volume.volume_type, size_gib, iops.or(kept))?;
        if let Some(last) = &volume.modification {
            if last.state != ModificationState::Completed {
                let message = format!(
                    "Cannot modify volume {}. Volume is currently in modification state: {}",
                    volume.id,
                    last.state.name().to_uppercase()
                );
                return Err(refuse("IncorrectModificationState", message));
            }
            if now < last.started_at + self.options.modification_cooldown {
                let message = "You've reached the maximum modification rate per volume limit. Wait at least 6 \
                               hours between modifications per EBS volume.";
                return Err(refuse("VolumeModificationRateExceeded", message));
            }
        }
        parameters.finish()?;

        let modification = Modification {
            state: ModificationState::Modifying,
            size_gib: (volume.size_gib, size_gib),
            iops: (volume.iops, iops_after),
            started: SystemTime::now(),
            ended: None,
            started_at: now,
            due: Some(now + self.options.delays.modify),
        };
        let id = volume.id.clone();
        let volume = self.world.volumes.get_mut(&id).expect("it was there");
        let mut xml = Xml::default();
        xml.element("volumeModification", |xml| xml.modification(volume, &modification));
        volume.modification = Some(modification);
        Ok(xml)
    }

    fn create_snapshot(&mut self, parameters: &Parameters<'_>, now: Instant) -> Done {
        let volume = self.world.volume(parameters.required("VolumeId")?)?;
        let description = parameters.optional("Description").unwrap_or_default().to_owned();
        let tags = parameters.tag_specifications("snapshot")?;
        checked_tags(&tags)?;
        if volume.stage != Stage::Usable {
            let message = format!("The volume '{}' is '{}'.", volume.id, volume.status());
            return Err(refuse("IncorrectState", message));
        }
        parameters.finish()?;

        let snapshot = Snapshot {
            id: new_id("snap-"),
            volume_id: volume.id.clone(),
            size_gib: volume.size_gib,
            description,
            encrypted: volume.encrypted,
            kms_key_id: volume.kms_key_id.clone(),
            started: SystemTime::now(),
            tags,
            completed: false,
            due: Some(now + self.options.delays.snapshot),
        };
        self.blocks.snapshot(&volume.id, &snapshot.id);
        let mut xml = Xml::default();
        xml.snapshot(&snapshot);
        self.world.snapshots.insert(snapshot.id.clone(), snapshot);
        Ok(xml)
    }

    fn delete_snapshot(&mut self, parameters: &Parameters<'_>) -> Done {
        let id = self.world.snapshot(parameters.required("SnapshotId")?)?.id.clone();
        parameters.finish()?;
        self.world.snapshots.remove(&id);
        self.blocks.remove(&id);
        let mut xml = Xml::default();
        xml.text("return", true);
        Ok(xml)
    }

    fn create_tags(&mut self, parameters: &Parameters<'_>) -> Done {
        let (resources, tags) = (parameters.list("ResourceId"), parameters.tags("Tag")?);
        if resources.is_empty() || tags.is_empty() {
            let message = "The request must contain the parameters resourceId and tag";
            return Err(refuse("MissingParameter", message));
        }
        // All of them or none.
        let mut changed = Vec::new();
        for id in resources {
            let old = match id.split('-').next() {
                Some("vol") => &self.world.volume(id)?.tags,
                Some("snap") => &self.world.snapshot(id)?.tags,
                Some("i") => &self.world.instance(id)?.tags,
                _ => return Err(refuse("InvalidID", format!("The ID '{id}' is not valid"))),
            };
            let mut all = old.clone();
            all.extend(tags.clone());
            checked_tags(&all)?;
            changed.push((id, all));
        }
        parameters.finish()?;

        let World { volumes, snapshots, instances } = &mut self.world;
        for (id, all) in changed {
            let tags = volumes.get_mut(id).map(|v| &mut v.tags);
            let tags = tags.or_else(|| snapshots.get_mut(id).map(|s| &mut s.tags));
            let tags = tags.or_else(|| instances.get_mut(id).map(|i| &mut i.tags));
            *tags.expect("it was there") = all;
        }
        let mut xml = Xml::default();
        xml.text("return", true);
        Ok(xml)
    }
}

/// An identifier that nothing has.
pub(super) fn new_id(prefix: &str) -> String {
    format!("{prefix}0{:016x}", fastrand::u64(..))
}

fn checked_tags(tags: &Tags) -> Result<(), Refusal> {
    if tags.len() > TAGS_PER_RESOURCE {
        let message = "The maximum number of tags for a resource has been reached.";
        return Err(refuse("TagLimitExceeded", message));
    }
    Ok(())
}

/// `/dev/sdf`, `/dev/xvdba`...; `sda1` and `xvda` are the root's.
fn checked_device(device: &str) -> Result<(), Refusal> {
    let name = device.strip_prefix("/dev/").unwrap_or(device);
    let letters = name.strip_prefix("xvd").or_else(|| name.strip_prefix("sd")).unwrap_or_default();
    match letters.as_bytes() {
        [b'b'..=b'z'] | [b'a'..=b'd', b'a'..=b'z'] => Ok(()),
        _ => Err(invalid(format!(
            "Value ({device}) for parameter device is invalid. {device} is not a valid EBS device name."
        ))),
    }
}
