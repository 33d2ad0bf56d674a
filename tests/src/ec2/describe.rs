//! The actions that only read.

use super::model::{Hypervisor, InstanceState, Snapshot, Tags, Volume, World, hypervisor};
use super::query::{Parameters, Refusal, checked_id, invalid, matches, refuse};
use super::xml::{ACCOUNT, Xml};

/// Most that one answer holds.
const PAGE: usize = 1000;
/// Volumes that an instance may have.
pub(super) const ATTACHMENTS: usize = 27;

const VOLUME_FILTERS: [&str; 12] = [
    "volume-id",
    "status",
    "availability-zone",
    "volume-type",
    "size",
    "snapshot-id",
    "encrypted",
    "multi-attach-enabled",
    "attachment.instance-id",
    "attachment.device",
    "attachment.status",
    "tag-key",
];
const MODIFICATION_FILTERS: [&str; 2] = ["volume-id", "modification-state"];
const SNAPSHOT_FILTERS: [&str; 6] =
    ["snapshot-id", "volume-id", "status", "description", "owner-id", "tag-key"];
const INSTANCE_FILTERS: [&str; 5] =
    ["instance-id", "instance-state-name", "instance-type", "availability-zone", "tag-key"];

type Described = Result<Xml, Refusal>;

impl World {
    /// A volume that is there.
    pub(super) fn volume(&self, id: &str) -> Result<&Volume, Refusal> {
        checked_id(id, "vol-")?;
        let missing = || refuse("InvalidVolume.NotFound", format!("The volume '{id}' does not exist."));
        self.volumes.get(id).ok_or_else(missing)
    }

    /// A snapshot that is there.
    pub(super) fn snapshot(&self, id: &str) -> Result<&Snapshot, Refusal> {
        checked_id(id, "snap-")?;
        let missing = || refuse("InvalidSnapshot.NotFound", format!("The snapshot '{id}' does not exist."));
        self.snapshots.get(id).ok_or_else(missing)
    }

    /// An instance that is there.
    pub(super) fn instance(&self, id: &str) -> Result<&InstanceState, Refusal> {
        checked_id(id, "i-")?;
        let missing =
            || refuse("InvalidInstanceID.NotFound", format!("The instance ID '{id}' does not exist"));
        self.instances.get(id).ok_or_else(missing)
    }

    /// The answer to an action that only reads; none of another.
    pub(super) fn describe(
        &self,
        action: &str,
        parameters: &Parameters<'_>,
        page_limit: Option<usize>,
    ) -> Option<Described> {
        let limit = page_limit.unwrap_or(PAGE);
        Some(match action {
            "DescribeVolumes" => self.describe_volumes(parameters, limit),
            "DescribeVolumesModifications" => self.describe_modifications(parameters, limit),
            "DescribeSnapshots" => self.describe_snapshots(parameters, limit),
            "DescribeInstances" => self.describe_instances(parameters, limit),
            "DescribeInstanceTypes" => describe_instance_types(parameters),
            _ => return None,
        })
    }

    fn describe_volumes(&self, parameters: &Parameters<'_>, limit: usize) -> Described {
        let ids = parameters.list("VolumeId");
        let all = select(&ids, self.volumes.values(), |id| self.volume(id))?;
        let found = filtered(all, parameters, &VOLUME_FILTERS, |volume, name, value| {
            let attachments =
                |of: fn(&super::Attachment) -> &str| volume.attachments.iter().any(|a| matches(value, of(a)));
            match name {
                "volume-id" => matches(value, &volume.id),
                "status" => matches(value, volume.status()),
                "availability-zone" => matches(value, &volume.zone),
                "volume-type" => matches(value, &volume.volume_type),
                "size" => matches(value, &volume.size_gib.to_string()),
                "snapshot-id" => volume.snapshot_id.as_ref().is_some_and(|id| matches(value, id)),
                "encrypted" => matches(value, &volume.encrypted.to_string()),
                "multi-attach-enabled" => matches(value, &volume.multi_attach.to_string()),
                "attachment.instance-id" => attachments(|a| &a.instance),
                "attachment.device" => attachments(|a| &a.device),
                "attachment.status" => attachments(|a| a.status.name()),
                _ => tagged(&volume.tags, name, value),
            }
        })?;
        let (page, next) = page(parameters, &ids, found, |v| &v.id, limit)?;
        let mut xml = Xml::default();
        xml.items("volumeSet", page, Xml::volume).some("nextToken", next);
        Ok(xml)
    }

    fn describe_modifications(&self, parameters: &Parameters<'_>, limit: usize) -> Described {
        let ids = parameters.list("VolumeId");
        let all = select(&ids, self.volumes.values(), |id| self.volume(id))?;
        if let Some(id) = ids.iter().find(|id| self.volumes[**id].modification.is_none()) {
            let message = format!("Modification for volume '{id}' does not exist.");
            return Err(refuse("InvalidVolumeModification.NotFound", message));
        }
        let all = all.into_iter().filter(|volume| volume.modification.is_some()).collect();
        let found = filtered(all, parameters, &MODIFICATION_FILTERS, |volume, name, value| {
            let state = volume.modification.as_ref().map_or("", |m| m.state.name());
            match name {
                "volume-id" => matches(value, &volume.id),
                _ => matches(value, state),
            }
        })?;
        let (page, next) = page(parameters, &ids, found, |v| &v.id, limit)?;
        let modified = page.into_iter().filter_map(|v| Some((v, v.modification.as_ref()?)));
        let mut xml = Xml::default();
        xml.items("volumeModificationSet", modified, |xml, (volume, modification)| {
            xml.modification(volume, modification);
        })
        .some("nextToken", next);
        Ok(xml)
    }

    fn describe_snapshots(&self, parameters: &Parameters<'_>, limit: usize) -> Described {
        let ids = parameters.list("SnapshotId");
        let mut all = select(&ids, self.snapshots.values(), |id| self.snapshot(id))?;
        let owners = parameters.list("Owner");
        all.retain(|_| owners.is_empty() || owners.iter().any(|o| *o == "self" || *o == ACCOUNT));
        let found = filtered(all, parameters, &SNAPSHOT_FILTERS, |snapshot, name, value| match name {
            "snapshot-id" => matches(value, &snapshot.id),
            "volume-id" => matches(value, &snapshot.volume_id),
            "status" => matches(value, snapshot.status()),
            "description" => matches(value, &snapshot.description),
            "owner-id" => matches(value, ACCOUNT),
            _ => tagged(&snapshot.tags, name, value),
        })?;
        let (page, next) = page(parameters, &ids, found, |s| &s.id, limit)?;
        let mut xml = Xml::default();
        xml.items("snapshotSet", page, Xml::snapshot).some("nextToken", next);
        Ok(xml)
    }

    fn describe_instances(&self, parameters: &Parameters<'_>, limit: usize) -> Described {
        let ids = parameters.list("InstanceId");
        let all = select(&ids, self.instances.values(), |id| self.instance(id))?;
        let found = filtered(all, parameters, &INSTANCE_FILTERS, |instance, name, value| match name {
            "instance-id" => matches(value, &instance.id),
            "instance-state-name" => matches(value, instance.power.name().0),
            "instance-type" => matches(value, &instance.instance_type),
            "availability-zone" => matches(value, &instance.zone),
            _ => tagged(&instance.tags, name, value),
        })?;
        let (page, next) = page(parameters, &ids, found, |i| &i.id, limit)?;
        let volumes: Vec<&Volume> = self.volumes.values().collect();
        let mut xml = Xml::default();
        xml.items("reservationSet", page, |xml, instance| {
            xml.text("reservationId", instance.id.replacen('i', "r", 1))
                .text("ownerId", ACCOUNT)
                .items("groupSet", [(); 0], |_, ()| {})
                .items("instancesSet", [instance], |xml, instance| xml.instance(instance, &volumes));
        })
        .some("nextToken", next);
        Ok(xml)
    }
}

fn describe_instance_types(parameters: &Parameters<'_>) -> Described {
    let names = parameters.list("InstanceType");
    parameters.finish()?;
    if names.is_empty() {
        return Err(refuse("MissingParameter", "The emulator describes only instance types that are named"));
    }
    if let Some(name) = names.iter().find(|name| hypervisor(name).is_none()) {
        let message = format!("The following supplied instance types do not exist: [{name}]");
        return Err(refuse("InvalidInstanceType", message));
    }
    let mut xml = Xml::default();
    let types = names.iter().filter_map(|name| Some((name, hypervisor(name)?)));
    xml.items("instanceTypeSet", types, |xml, (name, hypervisor)| {
        let nitro = hypervisor != Hypervisor::Xen;
        xml.text("instanceType", name)
            .text("currentGeneration", nitro)
            .text("bareMetal", hypervisor == Hypervisor::None)
            .some(
                "hypervisor",
                match hypervisor {
                    Hypervisor::Nitro => Some("nitro"),
                    Hypervisor::Xen => Some("xen"),
                    Hypervisor::None => None,
                },
            )
            .element("ebsInfo", |xml| {
                xml.text("ebsOptimizedSupport", if nitro { "default" } else { "supported" })
                    .text("encryptionSupport", "supported")
                    .text("nvmeSupport", if nitro { "required" } else { "unsupported" })
                    .text("maximumEbsAttachments", ATTACHMENTS);
            });
    });
    Ok(xml)
}

/// Those that are named, or all.
fn select<'a, T>(
    ids: &[&str],
    all: impl Iterator<Item = &'a T>,
    get: impl Fn(&str) -> Result<&'a T, Refusal>,
) -> Result<Vec<&'a T>, Refusal> {
    if ids.is_empty() {
        return Ok(all.collect());
    }
    let mut ids = ids.to_vec();
    ids.sort_unstable();
    ids.dedup();
    ids.into_iter().map(get).collect()
}

/// Those that every filter lets through by one of its values.
fn filtered<'a, T>(
    mut all: Vec<&'a T>,
    parameters: &Parameters<'_>,
    names: &[&str],
    test: impl Fn(&T, &str, &str) -> bool,
) -> Result<Vec<&'a T>, Refusal> {
    for (name, values) in parameters.filters()? {
        // Those whose tags can be asked for have both kinds of filters.
        let known = if name.starts_with("tag:") { "tag-key" } else { name };
        if !names.contains(&known) {
            return Err(invalid(format!("The filter '{name}' is invalid")));
        }
        all.retain(|one| values.iter().any(|value| test(one, name, value)));
    }
    Ok(all)
}

/// The filters `tag:KEY` and `tag-key`.
fn tagged(tags: &Tags, name: &str, value: &str) -> bool {
    match name.strip_prefix("tag:") {
        Some(key) => tags.get(key).is_some_and(|tag| matches(value, tag)),
        None => tags.keys().any(|key| matches(value, key)),
    }
}

/// One page, in the order of the ids, and the token of the next.
fn page<'a, T>(
    parameters: &Parameters<'_>,
    named: &[&str],
    mut found: Vec<&'a T>,
    id: impl Fn(&T) -> &String,
    limit: usize,
) -> Result<(Vec<&'a T>, Option<String>), Refusal> {
    let most = parameters.number("MaxResults")?;
    let token = parameters.optional("NextToken");
    parameters.finish()?;
    if !named.is_empty() && most.is_some() {
        let message = "The parameter idSet cannot be used with the parameter maxResults";
        return Err(refuse("InvalidParameterCombination", message));
    }
    if let Some(most) = most.filter(|most| !(5..=PAGE as u64).contains(most)) {
        let message = format!(
            "Value ( {most} ) for parameter maxResults is invalid. Expecting a value between 5 and {PAGE}."
        );
        return Err(invalid(message));
    }
    if let Some(token) = token {
        let bad = || refuse("InvalidNextToken", "The specified NextToken is not valid.");
        let last = token.strip_prefix("after-").ok_or_else(bad)?;
        found.retain(|one| id(one).as_str() > last);
    }
    let size = most.map_or(limit, |most| limit.min(most as usize));
    let more = found.len() > size;
    found.truncate(size);
    let next = found.last().filter(|_| more).map(|last| format!("after-{}", id(last)));
    Ok((found, next))
}
