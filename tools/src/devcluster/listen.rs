//! The supervisor's side of the control socket: connections become requests in a bounded channel.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tracing::warn;

use super::control::{self, Reply, Request};
use crate::failure::{Failure, OrFail, Result};

/// Control connections at a time.
const CONNECTIONS_MAX: usize = 64;
/// How long a control connection may take to say what it wants.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Wait after a connection could not be accepted.
const ACCEPT_PAUSE: Duration = Duration::from_millis(10);

/// A request, and where its answer goes.
pub struct Asked {
    /// What is asked.
    pub request: Request,
    /// Whoever asked may be gone.
    pub reply: oneshot::Sender<Reply>,
}

/// A socket file without a listener is left over: whoever holds the lock may replace it.
pub fn bind(path: &Path) -> Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(e).with_context(|| path.display().to_string());
        }
        _ => {}
    }
    UnixListener::bind(path).with_context(|| path.display().to_string())
}

/// Answers connections until the process ends; each request goes through `requests`.
pub async fn accept(listener: UnixListener, requests: mpsc::Sender<Asked>) {
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let permit = connections.clone().acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let requests = requests.clone();
                tokio::spawn(async move {
                    let _permit = permit;
                    if let Err(e) = serve(stream, requests).await {
                        warn!("a control connection failed: {e}");
                    }
                });
            }
            Err(e) => {
                warn!("cannot accept a control connection: {e}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve(stream: UnixStream, requests: mpsc::Sender<Asked>) -> Result<()> {
    let (read, mut write) = stream.into_split();
    let line = tokio::time::timeout(REQUEST_TIMEOUT, control::read_line(read))
        .await
        .map_err(|_| Failure::new("nothing was asked in time"))?;
    // Somebody only looked whether we are here.
    let Ok(line) = line else { return Ok(()) };
    let reply = match serde_json::from_str(&line) {
        Ok(request) => {
            let (send, receive) = oneshot::channel();
            let gone = || Failure::new("the supervisor is ending");
            requests.send(Asked { request, reply: send }).await.map_err(|_| gone())?;
            receive.await.unwrap_or_else(|_| Reply::of(Err(gone())))
        }
        Err(e) => Reply::of(Err(Failure::new(format!("not understood: {e}")))),
    };
    write.write_all(&control::line(&reply)).await.map_err(Failure::from)
}
