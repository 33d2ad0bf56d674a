//! The cloud that a node's settings name, if any.

use anyhow::Result;

use crate::config::NodeConfig;
use crate::volume::Providers;

/// The kinds of volumes that a node with these settings can use, and its machine's id in its cloud; empty: not known.
#[cfg(not(feature = "aws"))]
pub async fn connect(config: &NodeConfig) -> Result<(Providers, String)> {
    Ok((Providers::default(), config.instance_id.clone().unwrap_or_default()))
}

/// The kinds of volumes that a node with these settings can use, and its machine's id in its cloud; empty: not known.
#[cfg(feature = "aws")]
pub async fn connect(config: &NodeConfig) -> Result<(Providers, String)> {
    use std::sync::Arc;

    use anyhow::Context;

    use crate::volume::aws::{Aws, AwsSettings};
    use crate::volume::cloud::Cloud;
    use crate::volume::ebs::EbsProvider;
    use crate::volume::nvme::Links;

    let Some(cluster) = &config.aws_cluster else {
        return Ok((Providers::default(), config.instance_id.clone().unwrap_or_default()));
    };
    let settings = AwsSettings {
        region: config.region.clone(),
        zone: config.zone.clone(),
        instance_id: config.instance_id.clone(),
        endpoint: config.aws_endpoint.clone(),
        imds_endpoint: config.aws_metadata.clone(),
        cluster_tag: cluster.clone(),
    };
    let aws = tokio::task::spawn_blocking(move || Aws::connect(settings))
        .await
        .context("connecting to EC2")?
        .map_err(|e| anyhow::anyhow!("--aws-cluster: {e}"))?;
    let machine = aws.machine().clone();
    tracing::info!(
        machine = machine.id,
        zone = machine.zone,
        region = machine.region,
        "EBS volumes can be used"
    );
    let links = config.device_links.clone().map_or_else(Links::default, Links::new);
    Ok((Providers::with_cloud(EbsProvider::new(Arc::new(aws), links)), machine.id))
}
