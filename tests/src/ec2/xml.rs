//! Answers as EC2 writes them.

use std::fmt::Display;
use std::time::{SystemTime, UNIX_EPOCH};

use super::model::{Attachment, InstanceState, Modification, Snapshot, Tags, Volume};
use super::query::Refusal;

/// The account that owns everything.
pub(super) const ACCOUNT: &str = "123456789012";
const HEAD: &str = "<?xml version=\"1.0\" encoding=\"UTF-8\"?>\n";

/// Text of an answer, or of a part of one.
#[derive(Default, Debug)]
pub(super) struct Xml(String);

impl Xml {
    /// An element with a text.
    pub(super) fn text(&mut self, name: &str, value: impl Display) -> &mut Xml {
        let value = value.to_string().replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;");
        self.0 += &format!("<{name}>{value}</{name}>");
        self
    }

    /// An element with a text, if there is one.
    pub(super) fn some(&mut self, name: &str, value: Option<impl Display>) -> &mut Xml {
        if let Some(value) = value {
            self.text(name, value);
        }
        self
    }

    /// An element with elements.
    pub(super) fn element(&mut self, name: &str, content: impl FnOnce(&mut Xml)) -> &mut Xml {
        self.0 += &format!("<{name}>");
        content(self);
        self.0 += &format!("</{name}>");
        self
    }

    /// An element with an `item` for each.
    pub(super) fn items<T>(
        &mut self,
        name: &str,
        each: impl IntoIterator<Item = T>,
        write: impl Fn(&mut Xml, T),
    ) -> &mut Xml {
        self.element(name, |xml| {
            for one in each {
                xml.element("item", |xml| write(xml, one));
            }
        })
    }

    fn tags(&mut self, tags: &Tags) -> &mut Xml {
        self.items("tagSet", tags, |xml, (key, value)| {
            xml.text("key", key).text("value", value);
        })
    }

    pub(super) fn volume(&mut self, volume: &Volume) {
        self.text("volumeId", &volume.id)
            .text("size", volume.size_gib)
            .text("snapshotId", volume.snapshot_id.as_deref().unwrap_or_default())
            .text("availabilityZone", &volume.zone)
            .text("status", volume.status())
            .text("createTime", iso8601(volume.created))
            .items("attachmentSet", &volume.attachments, |xml, attachment| {
                xml.attachment(volume, attachment, attachment.status.name());
            })
            .tags(&volume.tags)
            .text("volumeType", &volume.volume_type)
            .some("iops", volume.iops)
            .text("encrypted", volume.encrypted)
            .some("kmsKeyId", volume.kms_key_id.as_ref())
            .text("multiAttachEnabled", volume.multi_attach);
    }

    pub(super) fn attachment(&mut self, volume: &Volume, attachment: &Attachment, status: &str) {
        self.text("volumeId", &volume.id)
            .text("instanceId", &attachment.instance)
            .text("device", &attachment.device)
            .text("status", status)
            .text("attachTime", iso8601(attachment.since))
            .text("deleteOnTermination", false);
    }

    pub(super) fn modification(&mut self, volume: &Volume, modification: &Modification) {
        self.text("volumeId", &volume.id)
            .text("modificationState", modification.state.name())
            .text("targetSize", modification.size_gib.1)
            .some("targetIops", modification.iops.1)
            .text("targetVolumeType", &volume.volume_type)
            .text("targetMultiAttachEnabled", volume.multi_attach)
            .text("originalSize", modification.size_gib.0)
            .some("originalIops", modification.iops.0)
            .text("originalVolumeType", &volume.volume_type)
            .text("originalMultiAttachEnabled", volume.multi_attach)
            .text("progress", modification.state.progress())
            .text("startTime", iso8601(modification.started))
            .some("endTime", modification.ended.map(iso8601));
    }

    pub(super) fn snapshot(&mut self, snapshot: &Snapshot) {
        self.text("snapshotId", &snapshot.id)
            .text("volumeId", &snapshot.volume_id)
            .text("status", snapshot.status())
            .text("startTime", iso8601(snapshot.started))
            .text("progress", if snapshot.completed { "100%" } else { "0%" })
            .text("ownerId", ACCOUNT)
            .text("volumeSize", snapshot.size_gib)
            .text("description", &snapshot.description)
            .text("encrypted", snapshot.encrypted)
            .some("kmsKeyId", snapshot.kms_key_id.as_ref())
            .text("storageTier", "standard")
            .tags(&snapshot.tags);
    }

    /// An instance, and the volumes that are at it.
    pub(super) fn instance(&mut self, instance: &InstanceState, volumes: &[&Volume]) {
        let (name, code) = instance.power.name();
        let attachments = volumes.iter().filter_map(|v| Some((v, v.attachment(&instance.id)?)));
        self.text("instanceId", &instance.id)
            .text("imageId", "ami-0123456789abcdef0")
            .element("instanceState", |xml| {
                xml.text("code", code).text("name", name);
            })
            .text("privateDnsName", format!("{}.ec2.internal", instance.id))
            .text("instanceType", &instance.instance_type)
            .text("launchTime", iso8601(instance.launched))
            .element("placement", |xml| {
                xml.text("availabilityZone", &instance.zone).text("groupName", "").text("tenancy", "default");
            })
            .text("rootDeviceType", "ebs")
            .text("rootDeviceName", "/dev/xvda")
            .items("blockDeviceMapping", attachments, |xml, (volume, attachment)| {
                xml.text("deviceName", &attachment.device).element("ebs", |xml| {
                    xml.text("volumeId", &volume.id)
                        .text("status", attachment.status.name())
                        .text("attachTime", iso8601(attachment.since))
                        .text("deleteOnTermination", false);
                });
            })
            // EC2 says so of Nitro too; only DescribeInstanceTypes tells.
            .text("hypervisor", "xen")
            .tags(&instance.tags);
    }
}

/// A whole answer.
pub(super) fn answer(action: &str, request: &str, content: &Xml) -> String {
    let namespace = "http://ec2.amazonaws.com/doc/2016-11-15/";
    let mut head = Xml::default();
    head.text("requestId", request);
    format!("{HEAD}<{action}Response xmlns=\"{namespace}\">{}{}</{action}Response>", head.0, content.0)
}

/// The answer to a call that is not done.
pub(super) fn error(request: &str, refusal: &Refusal) -> String {
    let mut xml = Xml::default();
    xml.element("Response", |xml| {
        xml.element("Errors", |xml| {
            xml.element("Error", |xml| {
                xml.text("Code", &refusal.code).text("Message", &refusal.message);
            });
        })
        .text("RequestID", request);
    });
    format!("{HEAD}{}", xml.0)
}

/// `2024-02-29T12:34:56.789Z`.
pub(super) fn iso8601(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Years begin in March, so that a leap day is a year's last (Hinnant's civil_from_days).
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:03}Z", since.subsec_millis())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn times_are_written_as_iso_8601() {
        let at = |seconds: u64, millis| {
            iso8601(UNIX_EPOCH + Duration::from_secs(seconds) + Duration::from_millis(millis))
        };
        assert_eq!(at(0, 0), "1970-01-01T00:00:00.000Z");
        assert_eq!(at(1_709_210_096, 789), "2024-02-29T12:34:56.789Z");
        assert_eq!(at(4_102_444_799, 0), "2099-12-31T23:59:59.000Z");
    }

    #[test]
    fn texts_are_escaped() {
        let mut xml = Xml::default();
        xml.text("value", "a<b>&c");
        assert_eq!(xml.0, "<value>a&lt;b&gt;&amp;c</value>");
    }
}
