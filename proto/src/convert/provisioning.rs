//! What the cluster adds by itself.

use super::missing;
use crate::types::provisioning::{Money, Policy, Prices, Provisioning};
use crate::types::{Error, NodeId, Result, VolumeId};
use crate::wire;

/// A policy.
pub fn policy_to_wire(p: &Policy) -> wire::ProvisioningPolicy {
    wire::ProvisioningPolicy {
        min_free_bytes: p.min_free_bytes,
        gib: p.gib,
        iops: p.iops,
        encrypted: p.kms_key.is_some(),
        kms_key: p.kms_key.clone().unwrap_or_default(),
        volumes_max: p.volumes_max,
        cost_max_micros: p.cost_max.micros(),
        prices: Some(wire::ProvisioningPrices {
            gib_micros: p.prices.gib.micros(),
            iops_micros: p.prices.iops.iter().map(|price| price.micros()).collect(),
        }),
        nodes: p.nodes.iter().map(|node| node.as_str().to_owned()).collect(),
    }
}

/// A policy.
pub fn policy_from_wire(p: wire::ProvisioningPolicy) -> Result<Policy> {
    Ok(Policy {
        min_free_bytes: p.min_free_bytes,
        gib: p.gib,
        iops: p.iops,
        kms_key: (p.encrypted || !p.kms_key.is_empty()).then_some(p.kms_key),
        volumes_max: p.volumes_max,
        cost_max: Money::from_micros(p.cost_max_micros),
        prices: p.prices.map(prices_from_wire).transpose()?.unwrap_or_default(),
        nodes: p.nodes.into_iter().map(NodeId::new).collect::<Result<_>>()?,
    })
}

fn prices_from_wire(p: wire::ProvisioningPrices) -> Result<Prices> {
    let iops: Vec<Money> = p.iops_micros.into_iter().map(Money::from_micros).collect();
    let iops = <[Money; 3]>::try_from(iops)
        .map_err(|given| Error::invalid(format!("IOPS have three prices, by tiers, not {}", given.len())))?;
    Ok(Prices { gib: Money::from_micros(p.gib_micros), iops })
}

/// What is done by policy.
pub fn provisioning_to_wire(p: &Provisioning) -> wire::Provisioning {
    let id = |volume: &Option<VolumeId>| volume.as_ref().map(|v| v.as_str().to_owned()).unwrap_or_default();
    let (roomiest, bytes) = p.roomiest.clone().map_or((None, 0), |(volume, bytes)| (Some(volume), bytes));
    wire::Provisioning {
        policy: p.policy.as_ref().map(policy_to_wire),
        acting: p.acting.as_ref().map(|node| node.as_str().to_owned()).unwrap_or_default(),
        volumes: p.volumes,
        monthly_micros: p.monthly.micros(),
        roomiest_volume: id(&roomiest),
        roomiest_bytes: bytes,
        making: id(&p.making),
        adds: id(&p.adds),
        verdict: p.verdict.clone(),
        failures: p.failures,
        last_error: p.last_error.clone(),
    }
}

/// What is done by policy.
pub fn provisioning_from_wire(p: wire::Provisioning) -> Result<Provisioning> {
    let id = |text: String| if text.is_empty() { Ok(None) } else { VolumeId::new(text).map(Some) };
    if p.verdict.is_empty() {
        return Err(missing("what would be done"));
    }
    Ok(Provisioning {
        policy: p.policy.map(policy_from_wire).transpose()?,
        acting: if p.acting.is_empty() { None } else { Some(NodeId::new(p.acting)?) },
        volumes: p.volumes,
        monthly: Money::from_micros(p.monthly_micros),
        roomiest: id(p.roomiest_volume)?.map(|volume| (volume, p.roomiest_bytes)),
        making: id(p.making)?,
        adds: id(p.adds)?,
        verdict: p.verdict,
        failures: p.failures,
        last_error: p.last_error,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_comes_back_as_it_was() {
        let volume = |id: &str| VolumeId::new(id).unwrap();
        let mut policy = Policy {
            min_free_bytes: 100 << 30,
            gib: 200,
            iops: 6_000,
            kms_key: Some(String::new()),
            volumes_max: 12,
            cost_max: "2000".parse().unwrap(),
            prices: Prices::LIST,
            nodes: vec![NodeId::new("node-1").unwrap()],
        };
        for kms_key in [None, Some(String::new()), Some("alias/k".to_owned())] {
            policy.kms_key = kms_key;
            assert_eq!(policy_from_wire(policy_to_wire(&policy)).unwrap(), policy);
        }
        let bare = wire::ProvisioningPolicy { prices: None, ..policy_to_wire(&policy) };
        assert_eq!(policy_from_wire(bare).unwrap().prices, Prices::LIST);
        let two = wire::ProvisioningPrices { gib_micros: 1, iops_micros: vec![1, 2] };
        let wrong = wire::ProvisioningPolicy { prices: Some(two), ..policy_to_wire(&policy) };
        assert!(policy_from_wire(wrong).unwrap_err().message().contains("three prices"));
        let mut state = Provisioning {
            policy: Some(policy),
            acting: NodeId::new("node-1").ok(),
            volumes: 3,
            monthly: "1245".parse().unwrap(),
            roomiest: Some((volume("vol-1"), 7)),
            making: Some(volume("auto-1")),
            adds: Some(volume("auto-2")),
            verdict: "nothing".into(),
            failures: 2,
            last_error: "no".into(),
        };
        assert_eq!(provisioning_from_wire(provisioning_to_wire(&state)).unwrap(), state);
        (state.policy, state.acting, state.roomiest, state.making, state.adds) =
            (None, None, None, None, None);
        assert_eq!(provisioning_from_wire(provisioning_to_wire(&state)).unwrap(), state);
    }
}
