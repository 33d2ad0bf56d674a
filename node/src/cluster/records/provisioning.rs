//! What the cluster adds by itself when it runs out of room, and how far it is with that.
//!
//! One record, so that one compare-and-set decides who acts: whoever adds a volume first writes here which one and who is at it.

use serde::{Deserialize, Serialize};
use shardfs_proto::types::provisioning::Policy;
use shardfs_proto::types::{NodeId, VolumeId};

use super::{FORMAT, PREFIX};
use crate::volume::cloud::DiskSize;

/// The key of the [`ProvisioningRecord`].
pub const PROVISIONING: &str = "shardfs/provisioning";

/// What is added by itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProvisioningRecord {
    /// Format.
    pub v: u32,
    /// `None`: nothing. What is being made is then given up.
    #[serde(default)]
    pub policy: Option<Policy>,
    /// The volume that is being made: there is one at a time.
    #[serde(default)]
    pub making: Option<MakingByPolicy>,
    /// The number of the next one's name: none is given twice, as a disk may have been kept that bears it.
    #[serde(default)]
    pub next: u64,
    /// Attempts in a row that failed.
    #[serde(default)]
    pub failures: u32,
    /// What the last of them said, for people.
    #[serde(default)]
    pub last_error: String,
}

/// A volume that is being made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MakingByPolicy {
    /// The volume.
    pub volume: VolumeId,
    /// How large.
    pub size: DiskSize,
    /// How it is encrypted.
    #[serde(default)]
    pub kms_key: Option<String>,
    /// Who is at it.
    pub by: NodeId,
    /// Which process of that node: [`NodeRecord::incarnation`](super::NodeRecord::incarnation).
    pub incarnation: String,
}

impl Default for ProvisioningRecord {
    fn default() -> ProvisioningRecord {
        ProvisioningRecord {
            v: FORMAT,
            policy: None,
            making: None,
            next: 1,
            failures: 0,
            last_error: String::new(),
        }
    }
}

impl ProvisioningRecord {
    /// Nothing is being made any more, and it ended well.
    pub fn settle(&mut self) {
        self.making = None;
        self.failures = 0;
        self.last_error = String::new();
    }

    /// An attempt has failed.
    pub fn note_failure(&mut self, error: &str) {
        self.failures = self.failures.saturating_add(1);
        self.last_error = error.to_owned();
    }
}

const _: () = assert!(PREFIX.len() < PROVISIONING.len());

#[cfg(test)]
mod tests {
    use shardfs_proto::types::provisioning::Prices;

    use super::super::{decode, encode};
    use super::*;

    #[test]
    fn a_policy_has_this_record() {
        let mut record = ProvisioningRecord {
            policy: Some(Policy {
                min_free_bytes: 100,
                gib: 200,
                iops: 6_000,
                kms_key: None,
                volumes_max: 12,
                cost_max: "2000".parse().unwrap(),
                prices: Prices::LIST,
                nodes: vec![NodeId::new("a").unwrap()],
            }),
            making: Some(MakingByPolicy {
                volume: VolumeId::new("auto-3").unwrap(),
                size: DiskSize { gib: 200, iops: 6_000 },
                kms_key: Some(String::new()),
                by: NodeId::new("a").unwrap(),
                incarnation: "x".into(),
            }),
            next: 4,
            failures: 0,
            last_error: String::new(),
            ..ProvisioningRecord::default()
        };
        let golden = concat!(
            r#"{"v":1,"policy":{"min_free_bytes":100,"gib":200,"iops":6000,"kms_key":null,"volumes_max":12,"#,
            r#""cost_max":2000000000,"prices":{"gib":125000,"iops":[65000,45500,32000]},"nodes":["a"]},"#,
            r#""making":{"volume":"auto-3","size":{"gib":200,"iops":6000},"kms_key":"","by":"a","incarnation":"x"},"#,
            r#""next":4,"failures":0,"last_error":""}"#
        );
        assert_eq!(encode(&record), golden);
        assert_eq!(decode::<ProvisioningRecord>(b"k", golden.as_bytes()).unwrap(), record);
        record.note_failure("no");
        record.note_failure("no quota");
        assert_eq!((record.failures, record.last_error.as_str()), (2, "no quota"));
        record.settle();
        assert_eq!((record.making, record.failures, record.next), (None, 0, 4));
        assert!(record.policy.is_some() && record.last_error.is_empty());
    }
}
