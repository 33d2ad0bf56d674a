//! The one error of the command line: a sentence, perhaps a hint, an exit code.
//!
//! `main` prints it in one place as `error: ...` and `hint: ...`. Exit codes: [`EXIT_FAILURE`] for whatever
//! went wrong, [`EXIT_USAGE`] for what was typed wrong, [`EXIT_INTERRUPTED`] after Ctrl-C, [`EXIT_TERMINATED`] after SIGTERM.

use std::fmt;
use std::io;

use shardfs_proto::types::{Error, Reason};

/// Something failed, or was found to be wrong.
pub const EXIT_FAILURE: u8 = 1;
/// The command line or the config file makes no sense.
pub const EXIT_USAGE: u8 = 2;
/// Ctrl-C: 128 + SIGINT, as shells count.
pub const EXIT_INTERRUPTED: u8 = 130;
/// SIGTERM: 128 + SIGTERM, as shells count.
pub const EXIT_TERMINATED: u8 = 143;
/// Whoever read our output went away: 128 + SIGPIPE, as shells count.
pub const EXIT_BROKEN_PIPE: u8 = 141;

/// Result of a command.
pub type Result<T> = std::result::Result<T, Failure>;

/// Why a command failed.
#[derive(Debug, Clone)]
pub struct Failure {
    message: String,
    hint: Option<String>,
    code: u8,
    reason: Option<Reason>,
}

impl Failure {
    /// A failure with a sentence.
    pub fn new(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), hint: None, code: EXIT_FAILURE, reason: None }
    }

    /// What was typed makes no sense.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure { message: message.into(), hint: None, code: EXIT_USAGE, reason: None }
    }

    /// Everything that had to be said was printed already; only the exit code is left.
    pub fn silent(code: u8) -> Failure {
        Failure { message: String::new(), hint: None, code, reason: None }
    }

    /// What another process of ours said about its failure.
    pub fn told(message: String, hint: Option<String>) -> Failure {
        Failure { hint, ..Failure::new(message) }
    }

    /// Ctrl-C.
    pub fn interrupted() -> Failure {
        Failure { code: EXIT_INTERRUPTED, ..Failure::new("interrupted") }
    }

    /// SIGTERM.
    pub fn terminated() -> Failure {
        Failure { code: EXIT_TERMINATED, ..Failure::new("terminated") }
    }

    /// Says what to do about it; replaces an earlier hint.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Failure {
        self.hint = Some(hint.into());
        self
    }

    /// Says one more thing to do about it, before what was said already.
    #[must_use]
    pub fn hint_first(mut self, hint: impl fmt::Display) -> Failure {
        self.hint = Some(match self.hint {
            Some(more) => format!("{hint}; {more}"),
            None => hint.to_string(),
        });
        self
    }

    /// Puts words before the sentence.
    #[must_use]
    pub fn context(mut self, words: impl fmt::Display) -> Failure {
        if !self.message.is_empty() {
            self.message = format!("{words}: {}", self.message);
        }
        self
    }

    /// Puts words after the sentence.
    #[must_use]
    pub fn addition(mut self, words: impl fmt::Display) -> Failure {
        if !self.message.is_empty() {
            self.message = format!("{}{words}", self.message);
        }
        self
    }

    /// The sentence; empty for [`Failure::silent`].
    pub fn message(&self) -> &str {
        &self.message
    }

    /// What to do about it.
    pub fn hint_text(&self) -> Option<&str> {
        self.hint.as_deref()
    }

    /// What the cluster said had happened, if the failure comes from it.
    pub fn reason(&self) -> Option<Reason> {
        self.reason
    }

    /// The process's exit code.
    pub fn code(&self) -> u8 {
        self.code
    }

    /// What `main` prints on stderr; empty for [`Failure::silent`].
    pub fn render(&self) -> String {
        if self.message.is_empty() {
            return String::new();
        }
        match &self.hint {
            Some(hint) => format!("error: {}\nhint: {hint}\n", self.message),
            None => format!("error: {}\n", self.message),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        let failure = Failure { reason: Some(error.reason()), ..Failure::new(error.message()) };
        match hint_for(error.reason()) {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }
}

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Failure {
        match error.downcast::<Failure>() {
            Ok(failure) => failure,
            Err(error) => match error.downcast::<Error>() {
                Ok(error) => error.into(),
                Err(error) => Failure::new(format!("{error:#}")),
            },
        }
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        if error.kind() == io::ErrorKind::BrokenPipe {
            return Failure::silent(EXIT_BROKEN_PIPE);
        }
        Failure::new(error.to_string())
    }
}

/// Adds words and hints to results whose error can become a [`Failure`].
pub trait OrFail<T> {
    /// Puts words before the sentence.
    fn context(self, words: impl fmt::Display) -> Result<T>;
    /// Puts words before the sentence; they are made only when needed.
    fn with_context<D: fmt::Display>(self, words: impl FnOnce() -> D) -> Result<T>;
    /// Says what to do about it.
    fn or_hint(self, hint: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<Failure>> OrFail<T> for std::result::Result<T, E> {
    fn context(self, words: impl fmt::Display) -> Result<T> {
        self.map_err(|e| e.into().context(words))
    }

    fn with_context<D: fmt::Display>(self, words: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| e.into().context(words()))
    }

    fn or_hint(self, hint: impl Into<String>) -> Result<T> {
        self.map_err(|e| e.into().hint(hint))
    }
}

/// What a person can do about an error of the cluster, where a command knows nothing better.
fn hint_for(reason: Reason) -> Option<&'static str> {
    match reason {
        Reason::ShardNotFound => Some(
            "`shardfs shard list` shows the shards of your client id; `shardfs shard create NAME` makes one",
        ),
        Reason::ShardDeleted => Some("`shardfs shard list` shows the shards that are there"),
        Reason::ShardExists => Some("choose another name, or use the shard that is there"),
        Reason::ShardReadOnly => {
            Some("a closed shard stays closed; write to another one (`shardfs shard create NAME`)")
        }
        Reason::ShardHasSnapshots => Some(
            "`shardfs shard snapshots SHARD` lists them, `shardfs shard delete SHARD/.snap/NAME` deletes one",
        ),
        Reason::WrongOwner => {
            Some("the shard belongs to another client id: give the right one with --client-id")
        }
        Reason::NoClientId => Some("give a client id with --client-id or SHARDFS_CLIENT_ID"),
        Reason::ShardFull => Some(
            "delete something in the shard, or use one with a higher limit (`shardfs shard create --limit`)",
        ),
        Reason::VolumeFull => Some("delete something, or add a volume; `shardfs status` shows the room"),
        Reason::Busy => {
            Some("the node has more work than it may queue: try again in a moment, or with fewer --jobs")
        }
        Reason::NotPrimary | Reason::StaleEpoch | Reason::Unavailable => Some(
            "`shardfs status` shows which nodes are there; on this machine `shardfs dev status` says more",
        ),
        Reason::Deadline => {
            Some("`shardfs status` shows which node does not answer; --deadline gives more time")
        }
        Reason::IsDirectory => Some("`-r` works on a directory and everything in it"),
        Reason::Corrupt => {
            Some("`shardfs fsck --read-data SHARD` tells what is damaged; other shards are not touched by it")
        }
        Reason::Io => Some("the node's log says more"),
        Reason::Internal => Some("this is a bug: please report it with the node's log"),
        Reason::VersionMismatch => Some("somebody changed it meanwhile: read it again"),
        Reason::NotFound
        | Reason::NoAttribute
        | Reason::AlreadyExists
        | Reason::InvalidArgument
        | Reason::NameTooLong
        | Reason::TooLarge
        | Reason::CrossShard
        | Reason::NotDirectory
        | Reason::NotEmpty
        | Reason::ShardNotEmpty
        | Reason::WrongKind
        | Reason::NotPermitted
        | Reason::TooManyLinks
        | Reason::SessionUnknown
        | Reason::SequenceStale
        | Reason::AttributeTooLarge
        | Reason::FileTooLarge
        | Reason::IdsExhausted
        | Reason::LocksExhausted
        | Reason::LockConflict
        | Reason::Deadlock
        | Reason::Unsupported => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renders_error_and_hint() {
        let failure = Failure::new("no room").context("put photos/a").hint("delete something");
        assert_eq!(failure.render(), "error: put photos/a: no room\nhint: delete something\n");
        assert_eq!(failure.code(), EXIT_FAILURE);
        assert_eq!(Failure::usage("what?").code(), EXIT_USAGE);
        assert_eq!(Failure::silent(7).context("x").render(), "");
    }

    #[test]
    fn keeps_its_nature_through_anyhow() {
        let failure = Failure::usage("bad").hint("good");
        let back = Failure::from(anyhow::Error::from(failure));
        assert_eq!((back.code(), back.hint_text()), (EXIT_USAGE, Some("good")));
        let domain = Error::new(Reason::IsDirectory, "a directory of things");
        let back = Failure::from(anyhow::Error::from(domain));
        assert_eq!(back.message(), "a directory of things");
        assert!(back.hint_text().is_some_and(|h| h.contains("-r")));
    }

    #[test]
    fn a_reader_that_went_away_is_silent() {
        let failure = Failure::from(io::Error::from(io::ErrorKind::BrokenPipe));
        assert_eq!((failure.code(), failure.render().as_str()), (EXIT_BROKEN_PIPE, ""));
    }
}
