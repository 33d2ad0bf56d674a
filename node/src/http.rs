//! /metrics and /healthz over HTTP: for monitoring, off the path of calls.
//!
//! /healthz answers 200 while the node serves all its volumes and reaches the metadata store, else 503;
//! the body says what is wrong. A damaged shard is told but is no 503: the others are served, and a restart mends nothing. Reading either asks the shards and volumes for figures in memory only.

use std::future::Future;
use std::sync::Arc;

use axum::Router;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use shardfs_proto::types::cluster::NodeStatus;
use tokio::net::TcpListener;

use crate::metrics::Metrics;

/// Says how the node is at the moment.
pub type StatusSource = Arc<dyn Fn() -> NodeStatus + Send + Sync>;

/// Serves until `shutdown` ends.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    status: StatusSource,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    let for_health = status.clone();
    let router = Router::new()
        .route(
            "/metrics",
            get(move || async move {
                let content_type = "application/openmetrics-text; version=1.0.0; charset=utf-8";
                ([(header::CONTENT_TYPE, content_type)], metrics.render(&status()))
            }),
        )
        .route("/healthz", get(move || async move { health(&for_health()) }));
    axum::serve(listener, router).with_graceful_shutdown(shutdown).await
}

fn health(status: &NodeStatus) -> impl IntoResponse + use<> {
    let mut wrong: Vec<String> = Vec::new();
    if !status.store_reachable {
        wrong.push("the metadata store does not answer".to_owned());
    }
    for volume in status.volumes.iter().filter(|volume| !volume.trouble.is_empty()) {
        wrong.push(format!("volume {}: {}", volume.id, volume.trouble));
    }
    let code = if wrong.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    if wrong.is_empty() {
        wrong.push("ok".to_owned());
    }
    for shard in &status.damaged_shards {
        wrong.push(format!("shard {} is damaged: {}", shard.id, shard.error));
    }
    (code, wrong.join("\n") + "\n")
}
