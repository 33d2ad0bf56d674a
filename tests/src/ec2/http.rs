//! The endpoints: requests over HTTP, and connections that end without an answer.

use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use axum::Router;
use axum::body::Bytes;
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, State};
use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::serve::{IncomingStream, Listener};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};

use super::Shared;
use super::query::decode_form;
use super::state::{Reply, unsigned};

/// Binds a port that is free; its address.
pub(super) fn bind(host: IpAddr) -> (std::net::TcpListener, SocketAddr) {
    let bound = std::net::TcpListener::bind((host, 0)).and_then(|listener| {
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        Ok((listener, address))
    });
    bound.unwrap_or_else(|e| panic!("the EC2 emulator cannot listen on {host}: {e}"))
}

/// Answers on a port for as long as the runtime lives.
pub(super) async fn serve(listener: std::net::TcpListener, routes: Router) {
    let lines = Lines(TcpListener::from_std(listener).expect("a runtime runs this"));
    // It ends with the runtime only.
    let _ = axum::serve(lines, routes.into_make_service_with_connect_info::<Cut>()).await;
}

/// The endpoint of EC2.
pub(super) fn ec2(shared: Arc<Shared>) -> Router {
    Router::new().fallback(answer).with_state(shared)
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    ConnectInfo(cut): ConnectInfo<Cut>,
    headers: HeaderMap,
    uri: Uri,
    body: Bytes,
) -> Response {
    let form = if body.is_empty() { uri.query().unwrap_or_default().as_bytes() } else { &body };
    let reply = match access_key(&headers) {
        Some(key) => shared.lock().call(&key, decode_form(form)),
        None => unsigned(),
    };
    match reply {
        Reply::Answer { status, body } => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::BAD_REQUEST);
            (status, [(header::CONTENT_TYPE, "text/xml;charset=UTF-8")], body).into_response()
        }
        Reply::Cut(hold) => cut.after(hold).await,
    }
}

/// The key of a signature, which nobody checks.
fn access_key(headers: &HeaderMap) -> Option<String> {
    let authorization = headers.get(header::AUTHORIZATION)?.to_str().ok()?;
    let (_, credential) = authorization.split_once("Credential=")?;
    credential.split(['/', ',']).next().map(str::to_owned)
}

/// Closes a connection instead of answering.
#[derive(Clone, Default, Debug)]
pub(super) struct Cut(Arc<AtomicBool>);

impl Cut {
    /// After this time; what it returns is not sent.
    pub(super) async fn after(&self, hold: Duration) -> Response {
        tokio::time::sleep(hold).await;
        self.0.store(true, Ordering::Release);
        StatusCode::NO_CONTENT.into_response()
    }
}

impl Connected<IncomingStream<'_, Lines>> for Cut {
    fn connect_info(stream: IncomingStream<'_, Lines>) -> Cut {
        stream.io().cut.clone()
    }
}

/// Takes connections that can be cut.
struct Lines(TcpListener);

impl Listener for Lines {
    type Io = Line;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Line, SocketAddr) {
        loop {
            match self.0.accept().await {
                Ok((stream, address)) => return (Line { stream, cut: Cut::default() }, address),
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.0.local_addr()
    }
}

/// A connection on which nothing is sent once it is cut.
struct Line {
    stream: TcpStream,
    cut: Cut,
}

impl AsyncRead for Line {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for Line {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<std::io::Result<usize>> {
        if self.cut.0.load(Ordering::Acquire) {
            return Poll::Ready(Err(std::io::ErrorKind::ConnectionReset.into()));
        }
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<std::io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}
