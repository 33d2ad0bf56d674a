//! /metrics and /healthz over HTTP, beside the requests of the kernel.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use tokio::net::TcpListener;

use crate::fs::Fs;
use crate::metrics::Metrics;

/// How long /healthz waits for a node.
const HEALTH_WAIT_MAX: Duration = Duration::from_secs(2);
/// What Prometheus is told that /metrics is.
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Listens; to be called before mounting, so that a port in use is told early.
pub async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("--http {address}: cannot listen there"))
}

/// Serves until the runtime ends.
pub async fn serve(listener: TcpListener, metrics: Arc<Metrics>, fs: Arc<Fs>) {
    let app = Router::new()
        .route("/metrics", get(show_metrics).with_state((metrics, fs.clone())))
        .route("/healthz", get(health).with_state(fs));
    if let Err(error) = axum::serve(listener, app).await {
        tracing::warn!(%error, "HTTP has ended");
    }
}

async fn show_metrics(State((metrics, fs)): State<(Arc<Metrics>, Arc<Fs>)>) -> Response {
    metrics.set_reads(fs.read_counts());
    ([(header::CONTENT_TYPE, OPEN_METRICS)], metrics.text()).into_response()
}

/// 200 while a node answers, else 503.
async fn health(State(fs): State<Arc<Fs>>) -> Response {
    if fs.reachable(HEALTH_WAIT_MAX).await {
        (StatusCode::OK, "ok\n").into_response()
    } else {
        (StatusCode::SERVICE_UNAVAILABLE, "no node answers\n").into_response()
    }
}
