//! The protocol on the supervisor's socket: one request and one reply a connection, each a line of JSON.
//!
//! The socket lies in a folder that only the cluster's owner can enter; there is no other protection.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

use super::process::Identity;
use crate::failure::{Failure, OrFail, Result};

/// Bytes of a line: a status of [`super::state::NODES_MAX`] nodes with room to spare.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Time for a reply: stopping everything, with nodes that have to be killed, is the longest.
const REPLY_TIMEOUT: Duration = Duration::from_secs(180);

/// A signal that `dev kill` sends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "UPPERCASE")]
#[value(rename_all = "UPPER")]
pub enum KillSignal {
    /// End at once, with no chance to say good-bye
    Kill,
    /// Freeze; `dev start` thaws
    Stop,
    /// Stop in order
    Term,
}

/// What the supervisor can be asked.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "kebab-case")]
pub enum Request {
    /// How is everybody?
    Status,
    /// Signals a node, or the mount; answered when it is dead (KILL, TERM) or frozen (STOP).
    Kill {
        /// A member's name.
        member: String,
        /// The signal.
        signal: KillSignal,
    },
    /// Starts (or thaws) a node, or the mount; answered when it serves.
    Start {
        /// A member's name.
        member: String,
    },
    /// Stops everything, then the supervisor.
    Down {
        /// Even if the mount is in use.
        force: bool,
    },
}

/// The answer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "kebab-case")]
pub enum Reply {
    /// To [`Request::Status`].
    Status(Box<ClusterStatus>),
    /// Done; a sentence for people.
    Done {
        /// The sentence.
        message: String,
    },
    /// Not done.
    Failed {
        /// Why.
        message: String,
        /// What to do about it.
        hint: Option<String>,
    },
}

impl Reply {
    /// Of a result.
    pub fn of(result: Result<String>) -> Reply {
        match result {
            Ok(message) => Reply::Done { message },
            Err(failure) => Reply::Failed {
                message: failure.message().to_owned(),
                hint: failure.hint_text().map(str::to_owned),
            },
        }
    }
}

/// How a dev cluster is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ClusterStatus {
    /// Its folder.
    pub dir: PathBuf,
    /// The supervisor; absent: none runs.
    pub supervisor: Option<Identity>,
    /// Milliseconds since the supervisor started.
    pub uptime_ms: u64,
    /// Where the metadata store listens.
    pub meta: String,
    /// Nodes, then the mount.
    pub members: Vec<MemberStatus>,
    /// Where the cluster is mounted.
    pub mount: Option<PathBuf>,
}

/// How one process is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct MemberStatus {
    /// `node-1` ... or `mount`.
    pub name: String,
    /// running, starting, frozen, stopped, restarting, failed.
    pub state: String,
    /// If it runs.
    pub pid: Option<u32>,
    /// Milliseconds since it was started.
    pub uptime_ms: Option<u64>,
    /// gRPC addresses.
    pub endpoints: Vec<String>,
    /// Metrics and health.
    pub http: Option<String>,
    /// Times that it was restarted after an unexpected end.
    pub restarts: u32,
    /// How it ended last.
    pub last_end: Option<String>,
    /// What it says.
    pub log: PathBuf,
}

/// Sends a request; `None` if nobody listens.
pub async fn call(socket: &Path, request: &Request) -> Result<Option<Reply>> {
    let stream = match UnixStream::connect(socket).await {
        Ok(stream) => stream,
        Err(e) if matches!(e.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
            return Ok(None);
        }
        Err(e) => return Err(Failure::new(format!("{}: {e}", socket.display()))),
    };
    let (read, mut write) = stream.into_split();
    let words = || format!("the supervisor at {}", socket.display());
    write.write_all(&line(request)).await.with_context(words)?;
    let reply = tokio::time::timeout(REPLY_TIMEOUT, read_line(read))
        .await
        .map_err(|_| Failure::new("no answer in time").context(words()))?
        .with_context(words)?;
    serde_json::from_str(&reply)
        .map(Some)
        .map_err(|e| Failure::new(format!("not understood: {e}")).context(words()))
}

/// Like [`call`], for requests that a person waits for: a failure of the supervisor is one here.
pub async fn ask(socket: &Path, request: &Request) -> Result<Option<String>> {
    match call(socket, request).await? {
        None => Ok(None),
        Some(Reply::Done { message }) => Ok(Some(message)),
        Some(Reply::Failed { message, hint }) => Err(Failure::told(message, hint)),
        Some(Reply::Status(_)) => Err(Failure::new("the supervisor answered something else")),
    }
}

/// A value as one line.
pub fn line(value: &impl Serialize) -> Vec<u8> {
    let mut line = serde_json::to_vec(value).expect("requests and replies have string keys only");
    line.push(b'\n');
    line
}

/// One line of a connection.
pub async fn read_line(read: OwnedReadHalf) -> io::Result<String> {
    let mut line = String::new();
    BufReader::new(read.take(LINE_BYTES_MAX)).read_line(&mut line).await?;
    if line.ends_with('\n') { Ok(line) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_stable() {
        let text = |value: &Request| String::from_utf8(line(value)).unwrap();
        assert_eq!(text(&Request::Status), "{\"op\":\"status\"}\n");
        let kill = Request::Kill { member: "node-1".into(), signal: KillSignal::Stop };
        assert_eq!(text(&kill), "{\"op\":\"kill\",\"member\":\"node-1\",\"signal\":\"STOP\"}\n");
        assert_eq!(serde_json::from_str::<Request>(&text(&kill)).unwrap(), kill);
    }

    #[tokio::test]
    async fn nobody_listens() {
        let temp = tempfile::tempdir().unwrap();
        let socket = temp.path().join("s");
        assert!(call(&socket, &Request::Status).await.unwrap().is_none());
        drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
        assert!(call(&socket, &Request::Status).await.unwrap().is_none());
    }
}
