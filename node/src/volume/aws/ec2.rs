//! The calls of EC2, one function each, and the metadata service of the instance. All types of the SDK stay in this file.

use std::error::Error as StdError;
use std::fmt::Display;
use std::time::Duration;

use aws_config::BehaviorVersion;
use aws_config::default_provider::credentials::DefaultCredentialsChain;
use aws_config::imds;
use aws_config::provider_config::ProviderConfig;
use aws_credential_types::provider::error::CredentialsError;
use aws_sdk_ec2::config::retry::RetryConfig;
use aws_sdk_ec2::config::timeout::TimeoutConfig;
use aws_sdk_ec2::config::{Region, SharedHttpClient};
use aws_sdk_ec2::error::{DisplayErrorContext, ProvideErrorMetadata, SdkError};
use aws_sdk_ec2::primitives::DateTime;
use aws_sdk_ec2::types::{self, Filter, InstanceType, ResourceType, Tag, TagSpecification, VolumeType};
use aws_smithy_http_client::tls::{Provider, rustls_provider::CryptoMode};
use shardfs_proto::types::{Error, Reason, Result, Timestamp};
use tokio::time::timeout;

use super::AwsSettings;
use super::failure::{Class, Failure};
use crate::volume::cloud::{
    Attachment, AttachmentState, Disk, DiskId, DiskSize, DiskState, Machine, Snapshot, SnapshotId,
    TAG_BACKUP, TAG_CLUSTER_ID, TAG_TOKEN, TAG_VOLUME,
};

/// One attempt of a call.
const ATTEMPT_MAX: Duration = Duration::from_secs(10);
/// A connection to EC2.
const CONNECT_MAX: Duration = Duration::from_secs(3);
/// Attempts of a call while EC2 throttles or fails; those who wait for something begin more calls.
const ATTEMPTS: u32 = 4;
/// Pause before the second attempt; it doubles.
const BACKOFF_MIN: Duration = Duration::from_millis(300);
/// The longest.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// The metadata service answers from the machine's own hypervisor, or not at all.
const IMDS_MAX: Duration = Duration::from_secs(5);
/// A connection to it, and an answer of it.
const IMDS_STEP_MAX: Duration = Duration::from_secs(1);
/// What one page of a list is asked to hold.
const PAGE_ITEMS: i32 = 500;
/// What a list may hold: a cluster has far fewer.
const LIST_ITEMS_MAX: usize = 100_000;
/// Values in the filters of one call, and types of instances; EC2 takes 200 and 100.
pub(super) const NAMES_MAX: usize = 100;

type Called<T> = std::result::Result<T, Failure>;

/// The client.
#[derive(Debug)]
pub(super) struct Ec2 {
    sdk: aws_sdk_ec2::Client,
}

/// An instance.
#[derive(Clone, Debug)]
pub(super) struct Instance {
    pub(super) id: String,
    pub(super) zone: String,
    pub(super) kind: String,
    /// As EC2 names it, such as `running`.
    pub(super) state: String,
    /// The names of its volumes.
    pub(super) devices: Vec<String>,
}

/// How far the last change of a volume is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Progress {
    /// Begun: the volume is as it was.
    Modifying,
    /// The new size can be used.
    Usable,
    Failed,
}

/// The last change of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Modification {
    /// GiB that it is to have; `None`: as before. So for the other.
    pub(super) gib: Option<u32>,
    pub(super) iops: Option<u32>,
    pub(super) progress: Progress,
    pub(super) begun: Timestamp,
    /// EC2's words about a failure.
    pub(super) message: String,
}

impl Modification {
    /// Whether this is what it makes a volume.
    pub(super) fn leads_to(&self, size: DiskSize) -> bool {
        self.gib.is_none_or(|gib| gib == size.gib) && self.iops.is_none_or(|iops| iops == size.iops)
    }
}

/// What a volume is made as.
#[derive(Debug)]
pub(super) struct VolumeToMake<'a> {
    pub(super) zone: &'a str,
    pub(super) size: DiskSize,
    pub(super) token: &'a str,
    pub(super) kms_key: Option<&'a str>,
    pub(super) from: Option<&'a SnapshotId>,
    pub(super) tags: &'a [(&'a str, String)],
}

impl Ec2 {
    /// Asks the metadata service for what the settings leave open; nothing is asked of EC2.
    pub(super) async fn connect(settings: &AwsSettings) -> Result<(Ec2, Machine)> {
        let http = http_client();
        let provider = ProviderConfig::without_region().with_http_client(http.clone());
        let machine = machine(settings, &provider).await?;
        let region = Region::new(machine.region.clone());

        // The chain for the keys has a client of its own, which is more patient.
        let imds = imds_client(settings, &provider)?.build();
        let provider = provider.with_region(Some(region.clone()));
        let chain =
            DefaultCredentialsChain::builder().region(region.clone()).configure(provider).imds_client(imds);
        let timeouts = TimeoutConfig::builder()
            .connect_timeout(CONNECT_MAX)
            .operation_attempt_timeout(ATTEMPT_MAX)
            .build();
        let retries = RetryConfig::standard()
            .with_max_attempts(ATTEMPTS)
            .with_initial_backoff(BACKOFF_MIN)
            .with_max_backoff(BACKOFF_MAX);
        let common = aws_config::defaults(BehaviorVersion::v2026_01_12())
            .http_client(http)
            .region(region)
            .credentials_provider(chain.build().await)
            .timeout_config(timeouts)
            .retry_config(retries)
            .load()
            .await;
        let mut config = aws_sdk_ec2::config::Builder::from(&common);
        if let Some(endpoint) = &settings.endpoint {
            config = config.endpoint_url(endpoint);
        }
        Ok((Ec2 { sdk: aws_sdk_ec2::Client::from_conf(config.build()) }, machine))
    }

    /// A repetition with the same token makes no second one, for as long as EC2 remembers it.
    pub(super) async fn create_volume(&self, new: &VolumeToMake<'_>) -> Called<DiskId> {
        let made = self
            .sdk
            .create_volume()
            .availability_zone(new.zone)
            .volume_type(VolumeType::Io2)
            .multi_attach_enabled(true)
            .size(number(new.size.gib))
            .iops(number(new.size.iops))
            .client_token(new.token)
            .set_encrypted(new.kms_key.map(|_| true))
            .set_kms_key_id(new.kms_key.filter(|key| !key.is_empty()).map(str::to_owned))
            .set_snapshot_id(new.from.map(|id| id.as_str().to_owned()))
            .tag_specifications(tag_specification(ResourceType::Volume, new.tags))
            .send()
            .await
            .map_err(failed("ec2:CreateVolume"))?;
        known("ec2:CreateVolume", DiskId::new(made.volume_id().unwrap_or_default()))
    }

    /// `None`: EC2 does not know it, or not yet.
    pub(super) async fn disk(&self, id: &DiskId) -> Called<Option<Disk>> {
        let action = "ec2:DescribeVolumes";
        let found = self.sdk.describe_volumes().volume_ids(id.as_str()).send().await;
        match found.map_err(failed(action)) {
            Ok(found) => found.volumes().first().map(|v| known(action, disk(v))).transpose(),
            Err(failure) if failure.class == Class::Missing => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// The disks with these tags.
    pub(super) async fn disks(&self, tags: &[(&str, &str)]) -> Called<Vec<Disk>> {
        let action = "ec2:DescribeVolumes";
        let request = self.sdk.describe_volumes().set_filters(Some(tag_filters(tags)));
        let mut pages = request.into_paginator().page_size(PAGE_ITEMS).items().send();
        let mut disks = Vec::new();
        while let Some(volume) = pages.next().await {
            disks.push(known(action, disk(&volume.map_err(failed(action))?))?);
            bounded(action, disks.len())?;
        }
        Ok(disks)
    }

    pub(super) async fn attach_volume(&self, disk: &DiskId, instance: &str, device: &str) -> Called<()> {
        let request = self.sdk.attach_volume().volume_id(disk.as_str()).instance_id(instance).device(device);
        request.send().await.map(drop).map_err(failed("ec2:AttachVolume"))
    }

    pub(super) async fn detach_volume(&self, disk: &DiskId, instance: &str, force: bool) -> Called<()> {
        let request = self.sdk.detach_volume().volume_id(disk.as_str()).instance_id(instance).force(force);
        request.send().await.map(drop).map_err(failed("ec2:DetachVolume"))
    }

    /// What is `None` stays as it is.
    pub(super) async fn modify_volume(
        &self,
        disk: &DiskId,
        gib: Option<u32>,
        iops: Option<u32>,
    ) -> Called<()> {
        let request = self.sdk.modify_volume().volume_id(disk.as_str());
        let request = request.set_size(gib.map(number)).set_iops(iops.map(number));
        request.send().await.map(drop).map_err(failed("ec2:ModifyVolume"))
    }

    /// The last change of a disk; `None`: there was none, or EC2 has not heard of it yet.
    pub(super) async fn modification(&self, disk: &DiskId) -> Called<Option<Modification>> {
        use types::VolumeModificationState as S;
        let found = self.sdk.describe_volumes_modifications().volume_ids(disk.as_str()).send().await;
        let found = match found.map_err(failed("ec2:DescribeVolumesModifications")) {
            Ok(found) => found,
            Err(failure) if failure.class == Class::Missing => return Ok(None),
            Err(failure) => return Err(failure),
        };
        let last = found.volumes_modifications().iter().max_by_key(|m| m.start_time().map(DateTime::secs));
        Ok(last.map(|m| Modification {
            gib: m.target_size().map(|gib| count(Some(gib))),
            iops: m.target_iops().map(|iops| count(Some(iops))),
            progress: match m.modification_state() {
                Some(S::Optimizing | S::Completed) => Progress::Usable,
                Some(S::Failed) => Progress::Failed,
                _ => Progress::Modifying,
            },
            begun: time(m.start_time()),
            message: m.status_message().unwrap_or_default().to_owned(),
        }))
    }

    pub(super) async fn delete_volume(&self, disk: &DiskId) -> Called<()> {
        let request = self.sdk.delete_volume().volume_id(disk.as_str());
        request.send().await.map(drop).map_err(failed("ec2:DeleteVolume"))
    }

    /// One attempt: every one that is done makes a snapshot.
    pub(super) async fn create_snapshot(
        &self,
        disk: &DiskId,
        description: &str,
        tags: &[(&str, String)],
    ) -> Called<SnapshotId> {
        let once = aws_sdk_ec2::config::Builder::new().retry_config(RetryConfig::disabled());
        let made = self
            .sdk
            .create_snapshot()
            .volume_id(disk.as_str())
            .description(description)
            .tag_specifications(tag_specification(ResourceType::Snapshot, tags))
            .customize()
            .config_override(once)
            .send()
            .await
            .map_err(failed("ec2:CreateSnapshot"))?;
        known("ec2:CreateSnapshot", SnapshotId::new(made.snapshot_id().unwrap_or_default()))
    }

    /// `None`: EC2 does not know it, or not yet.
    pub(super) async fn snapshot(&self, id: &SnapshotId) -> Called<Option<Snapshot>> {
        let action = "ec2:DescribeSnapshots";
        let found = self.sdk.describe_snapshots().snapshot_ids(id.as_str()).send().await;
        match found.map_err(failed(action)) {
            Ok(found) => found.snapshots().first().map(|s| known(action, snapshot(s))).transpose(),
            Err(failure) if failure.class == Class::Missing => Ok(None),
            Err(failure) => Err(failure),
        }
    }

    /// The account's own snapshots with these tags.
    pub(super) async fn snapshots(&self, tags: &[(&str, &str)]) -> Called<Vec<Snapshot>> {
        let action = "ec2:DescribeSnapshots";
        let request = self.sdk.describe_snapshots().owner_ids("self").set_filters(Some(tag_filters(tags)));
        let mut pages = request.into_paginator().page_size(PAGE_ITEMS).items().send();
        let mut snapshots = Vec::new();
        while let Some(found) = pages.next().await {
            snapshots.push(known(action, snapshot(&found.map_err(failed(action))?))?);
            bounded(action, snapshots.len())?;
        }
        Ok(snapshots)
    }

    pub(super) async fn delete_snapshot(&self, id: &SnapshotId) -> Called<()> {
        let request = self.sdk.delete_snapshot().snapshot_id(id.as_str());
        request.send().await.map(drop).map_err(failed("ec2:DeleteSnapshot"))
    }

    /// Those of these instances that there are. By a filter: one that is not there would fail the call for all of them.
    pub(super) async fn instances(&self, ids: &[String]) -> Called<Vec<Instance>> {
        let action = "ec2:DescribeInstances";
        let mut instances = Vec::new();
        for ids in ids.chunks(NAMES_MAX) {
            let values = ids.iter().map(|id| exactly(id)).collect();
            let filter = Filter::builder().name("instance-id").set_values(Some(values)).build();
            let request = self.sdk.describe_instances().filters(filter);
            let mut pages = request.into_paginator().page_size(PAGE_ITEMS).items().send();
            while let Some(reservation) = pages.next().await {
                let reservation = reservation.map_err(failed(action))?;
                instances.extend(reservation.instances().iter().map(instance));
            }
        }
        Ok(instances)
    }

    /// Those of these types of instances that are built on Nitro.
    pub(super) async fn nitro_kinds(&self, kinds: &[String]) -> Called<Vec<String>> {
        let action = "ec2:DescribeInstanceTypes";
        let mut nitro = Vec::new();
        for kinds in kinds.chunks(NAMES_MAX) {
            let kinds = kinds.iter().map(|kind| InstanceType::from(kind.as_str())).collect();
            let request = self.sdk.describe_instance_types().set_instance_types(Some(kinds));
            let mut pages = request.into_paginator().items().send();
            while let Some(kind) = pages.next().await {
                let kind = kind.map_err(failed(action))?;
                let hypervisor = kind.hypervisor() == Some(&types::InstanceTypeHypervisor::Nitro);
                // Bare metal has no hypervisor.
                if let Some(name) = kind.instance_type()
                    && (hypervisor || kind.bare_metal() == Some(true))
                {
                    nitro.push(name.as_str().to_owned());
                }
            }
        }
        Ok(nitro)
    }
}

fn http_client() -> SharedHttpClient {
    aws_smithy_http_client::Builder::new().tls_provider(Provider::Rustls(CryptoMode::Ring)).build_https()
}

fn imds_client(settings: &AwsSettings, provider: &ProviderConfig) -> Result<imds::client::Builder> {
    let builder = imds::Client::builder()
        .configure(provider)
        .connect_timeout(IMDS_STEP_MAX)
        .read_timeout(IMDS_STEP_MAX)
        .operation_attempt_timeout(IMDS_STEP_MAX)
        .operation_timeout(IMDS_MAX);
    match &settings.imds_endpoint {
        Some(endpoint) => builder.endpoint(endpoint).map_err(|e| {
            Error::invalid(format!(
                "{endpoint:?} is no address of a metadata service: {e}; expected http://HOST:PORT"
            ))
        }),
        None => Ok(builder),
    }
}

/// The machine that this runs on: by the settings, and by the metadata service where they say nothing.
async fn machine(settings: &AwsSettings, provider: &ProviderConfig) -> Result<Machine> {
    let imds = imds_client(settings, provider)?.max_attempts(2).build();
    let known_or_asked = async |given: &Option<String>, path: &str| -> Result<String> {
        if let Some(given) = given {
            return Ok(given.clone());
        }
        let none = |why: &dyn Display| {
            let hint = "not on EC2, or IMDS is switched off: give --region, --zone and --instance-id";
            Error::new(Reason::Unavailable, format!("the metadata service says no {path}: {hint} ({why})"))
        };
        match timeout(IMDS_MAX, imds.get(format!("/latest/meta-data/{path}"))).await {
            Ok(Ok(text)) => Ok(text.as_ref().trim().to_owned()),
            Ok(Err(e)) => Err(none(&DisplayErrorContext(&e))),
            Err(_elapsed) => Err(none(&format!("no answer within {} seconds", IMDS_MAX.as_secs()))),
        }
    };
    let machine = Machine {
        id: known_or_asked(&settings.instance_id, "instance-id").await?,
        zone: known_or_asked(&settings.zone, "placement/availability-zone").await?,
        region: known_or_asked(&settings.region, "placement/region").await?,
    };
    if !machine.id.starts_with("i-") {
        return Err(Error::invalid(format!(
            "{:?} is no id of an EC2 instance: expected i- and hex digits, such as i-0a1b2c3d4e5f60718",
            machine.id
        )));
    }
    if !machine.zone.starts_with(&machine.region) {
        return Err(Error::invalid(format!(
            "zone {} is not in region {}: give --zone and --region that fit",
            machine.zone, machine.region
        )));
    }
    Ok(machine)
}

/// What an error of the SDK means.
fn failed<E>(action: &'static str) -> impl Fn(SdkError<E>) -> Failure
where
    E: ProvideErrorMetadata + StdError + Send + Sync + 'static,
{
    move |error| {
        if let SdkError::ServiceError(answer) = &error {
            let status = answer.raw().status().as_u16();
            let code = answer.err().code().unwrap_or_default();
            return Failure::answered(action, status, code, answer.err().message().unwrap_or_default());
        }
        let class = match credentials_error(&error) {
            Some(CredentialsError::CredentialsNotLoaded(_) | CredentialsError::InvalidConfiguration(_)) => {
                Class::Credentials
            }
            // The service that gives them may answer the next time.
            Some(_) => Class::Unknown,
            None if matches!(error, SdkError::ConstructionFailure(_)) => Class::Refused,
            None => Class::Unknown,
        };
        Failure::unanswered(action, class, &DisplayErrorContext(&error).to_string())
    }
}

fn credentials_error<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a CredentialsError> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// EC2's answer lacks what the API promises.
fn known<T>(action: &'static str, found: Result<T>) -> Called<T> {
    found.map_err(|e| {
        Failure::unanswered(action, Class::Refused, &format!("an answer that makes no sense: {e}"))
    })
}

fn bounded(action: &'static str, items: usize) -> Called<()> {
    if items <= LIST_ITEMS_MAX {
        return Ok(());
    }
    Err(Failure::unanswered(
        action,
        Class::Refused,
        &format!("more than {LIST_ITEMS_MAX} have the cluster's tags"),
    ))
}

fn tag_specification(kind: ResourceType, tags: &[(&str, String)]) -> TagSpecification {
    let tags = tags.iter().map(|(key, value)| Tag::builder().key(*key).value(value).build()).collect();
    TagSpecification::builder().resource_type(kind).set_tags(Some(tags)).build()
}

fn tag_filters(tags: &[(&str, &str)]) -> Vec<Filter> {
    let filter = |(key, value): &(&str, &str)| {
        Filter::builder().name(format!("tag:{key}")).values(exactly(value)).build()
    };
    tags.iter().map(filter).collect()
}

/// A filter's value in which nothing stands for something else.
fn exactly(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        if matches!(c, '*' | '?' | '\\') {
            escaped.push('\\');
        }
        escaped.push(c);
    }
    escaped
}

fn tag(tags: &[Tag], key: &str) -> String {
    let found = tags.iter().find(|tag| tag.key() == Some(key));
    found.and_then(Tag::value).unwrap_or_default().to_owned()
}

fn disk(volume: &types::Volume) -> Result<Disk> {
    use types::VolumeState as S;
    Ok(Disk {
        id: DiskId::new(volume.volume_id().unwrap_or_default())?,
        state: match volume.state() {
            Some(S::Creating) => DiskState::Making,
            Some(S::Available | S::InUse) => DiskState::Ready,
            Some(S::Deleting | S::Deleted) => DiskState::Leaving,
            _ => DiskState::Failed,
        },
        size: DiskSize { gib: count(volume.size()), iops: count(volume.iops()) },
        zone: volume.availability_zone().unwrap_or_default().to_owned(),
        multi_attach: volume.multi_attach_enabled() == Some(true),
        encrypted: volume.encrypted() == Some(true),
        created: time(volume.create_time()),
        cluster_id: tag(volume.tags(), TAG_CLUSTER_ID),
        volume: tag(volume.tags(), TAG_VOLUME),
        token: tag(volume.tags(), TAG_TOKEN),
        attachments: volume.attachments().iter().filter_map(attachment).collect(),
    })
}

fn attachment(attachment: &types::VolumeAttachment) -> Option<Attachment> {
    use types::VolumeAttachmentState as S;
    let state = match attachment.state() {
        Some(S::Detached) => return None,
        Some(S::Attached) => AttachmentState::Attached,
        Some(S::Detaching | S::Busy) => AttachmentState::Detaching,
        _ => AttachmentState::Attaching,
    };
    Some(Attachment { machine: attachment.instance_id().unwrap_or_default().to_owned(), state })
}

fn snapshot(snapshot: &types::Snapshot) -> Result<Snapshot> {
    let state = snapshot.state();
    let complete = state == Some(&types::SnapshotState::Completed);
    let progress = snapshot.progress().and_then(|text| text.trim_end_matches('%').trim().parse::<u8>().ok());
    Ok(Snapshot {
        id: SnapshotId::new(snapshot.snapshot_id().unwrap_or_default())?,
        disk: snapshot.volume_id().unwrap_or_default().to_owned(),
        gib: count(snapshot.volume_size()),
        volume: tag(snapshot.tags(), TAG_VOLUME),
        backup: tag(snapshot.tags(), TAG_BACKUP),
        taken: time(snapshot.start_time()),
        percent: if complete { 100 } else { progress.unwrap_or(0).min(99) },
        failed: state == Some(&types::SnapshotState::Error),
    })
}

fn instance(instance: &types::Instance) -> Instance {
    let text = |text: Option<&str>| text.unwrap_or_default().to_owned();
    Instance {
        id: text(instance.instance_id()),
        zone: text(instance.placement().and_then(types::Placement::availability_zone)),
        kind: text(instance.instance_type().map(InstanceType::as_str)),
        state: text(instance.state().and_then(types::InstanceState::name).map(|name| name.as_str())),
        devices: instance.block_device_mappings().iter().map(|m| text(m.device_name())).collect(),
    }
}

/// The API counts in 31 bits; sizes are checked before.
fn number(value: u32) -> i32 {
    i32::try_from(value).unwrap_or(i32::MAX)
}

fn count(value: Option<i32>) -> u32 {
    value.and_then(|value| u32::try_from(value).ok()).unwrap_or(0)
}

fn time(time: Option<&DateTime>) -> Timestamp {
    time.and_then(|time| Timestamp::new(time.secs(), time.subsec_nanos()).ok()).unwrap_or_default()
}
