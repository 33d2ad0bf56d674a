//! Addresses to listen on, and binding them with errors that say what to do.
//!
//! A unix socket that a killed process left behind is removed; one that somebody answers on is not.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use tokio::net::{TcpListener, UnixListener};

/// Bytes of a unix socket's path: sun_path without its NUL.
const UNIX_PATH_BYTES_MAX: usize = 107;

/// Where to listen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ListenAddr {
    /// TCP; port 0: any that is free.
    Tcp(SocketAddr),
    /// A unix socket at this path.
    Unix(PathBuf),
}

impl FromStr for ListenAddr {
    type Err = String;

    /// `unix:/path`, `http://IP:PORT` or `IP:PORT`.
    fn from_str(text: &str) -> std::result::Result<ListenAddr, String> {
        if let Some(path) = text.strip_prefix("unix:") {
            return Ok(ListenAddr::Unix(PathBuf::from(path)));
        }
        let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
        address
            .parse()
            .map(ListenAddr::Tcp)
            .map_err(|_| format!("{text:?} is neither IP:PORT nor unix:/path"))
    }
}

impl fmt::Display for ListenAddr {
    /// As a client's endpoint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ListenAddr::Tcp(address) => write!(f, "http://{address}"),
            ListenAddr::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// A bound TCP address.
pub async fn bind_tcp(address: SocketAddr) -> Result<TcpListener> {
    match TcpListener::bind(address).await {
        Ok(listener) => Ok(listener),
        Err(e) if e.kind() == io::ErrorKind::AddrInUse => {
            bail!("{address} is in use by another process: stop it, or listen on another port (port 0: any)")
        }
        Err(e) => Err(e).with_context(|| format!("listening on {address}")),
    }
}

/// A bound unix socket.
pub fn bind_unix(path: &Path) -> Result<UnixListener> {
    if path.as_os_str().len() > UNIX_PATH_BYTES_MAX {
        bail!(
            "the socket path {} is longer than the {UNIX_PATH_BYTES_MAX} bytes that Linux allows",
            path.display()
        );
    }
    if let Ok(meta) = std::fs::symlink_metadata(path) {
        if !meta.file_type().is_socket() {
            bail!("{} exists and is no socket: choose another path", path.display());
        }
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            bail!("{} is in use by another process: stop it, or choose another path", path.display());
        }
        std::fs::remove_file(path)
            .with_context(|| format!("removing the stale socket {}", path.display()))?;
    }
    UnixListener::bind(path).with_context(|| format!("listening on {}", path.display()))
}
