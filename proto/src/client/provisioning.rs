//! What the cluster adds by itself.

use std::time::Duration;

use super::Client;
use super::retry::Target;
use crate::convert;
use crate::types::provisioning::{Policy, Provisioning};
use crate::types::{Error, Result};
use crate::wire;

/// One certain node is not asked for longer: it asks the others how much room they have, a few seconds at most.
const NODE_ATTEMPT_MAX: Duration = Duration::from_secs(5);

impl Client {
    /// When the cluster adds volumes by itself, what it would do now, and why.
    pub async fn provisioning(&self) -> Result<Provisioning> {
        let reply = self
            .call(Target::Any, async |attempt| {
                let request = wire::GetProvisioningRequest { here: false };
                attempt.node.admin().get_provisioning(attempt.node.request(request)).await
            })
            .await?;
        convert::provisioning_from_wire(reply.into_inner())
    }

    /// Says when the cluster adds volumes by itself; `None`: it does not.
    pub async fn set_provisioning(&self, policy: Option<&Policy>) -> Result<Provisioning> {
        let policy = policy.map(convert::policy_to_wire);
        let reply = self
            .call(Target::Any, async |attempt| {
                let request = wire::SetProvisioningRequest { policy: policy.clone() };
                attempt.node.admin().set_provisioning(attempt.node.request(request)).await
            })
            .await?;
        convert::provisioning_from_wire(reply.into_inner())
    }

    /// The same as [`Client::provisioning`], from the node at one of these addresses. Asked once.
    pub async fn provisioning_at(&self, endpoints: &[String]) -> Result<Provisioning> {
        let node = self.node_at(endpoints)?;
        let mut admin = node.admin();
        let call = admin.get_provisioning(node.request(wire::GetProvisioningRequest { here: true }));
        match tokio::time::timeout(NODE_ATTEMPT_MAX, call).await {
            Ok(Ok(reply)) => convert::provisioning_from_wire(reply.into_inner()),
            Ok(Err(status)) => Err(crate::status::from_status(&status)),
            Err(_) => Err(Error::unavailable(format!("{} did not answer", node.endpoint))),
        }
    }
}
