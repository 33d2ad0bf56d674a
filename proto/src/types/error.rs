//! The one domain error: what happened, in a closed set, and a sentence that says what to do.
//!
//! It knows nothing of errno or gRPC codes; `status` (gRPC) and the daemon's `errno` map it, each in one
//! exhaustive match.

use std::fmt;

use super::ids::{Epoch, NodeId, ShardId, VolumeId};

/// Result with the domain error.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What happened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum Reason {
    /// No such key, name or inode.
    NotFound,
    /// No such shard (or it is not the caller's to know of).
    ShardNotFound,
    /// The shard was deleted.
    ShardDeleted,
    /// No such extended attribute.
    NoAttribute,
    /// The name or key is there already.
    AlreadyExists,
    /// The client id has a shard of that name.
    ShardExists,
    /// The request makes no sense.
    InvalidArgument,
    /// A name or key is too long.
    NameTooLong,
    /// A value, batch or range is larger than one message may carry.
    TooLarge,
    /// Link or rename from one shard to another.
    CrossShard,
    /// A component of the path, or the inode, is no directory.
    NotDirectory,
    /// It is a directory.
    IsDirectory,
    /// The directory is not empty.
    NotEmpty,
    /// The operation does not fit the inode's kind.
    WrongKind,
    /// The shard is closed.
    ShardReadOnly,
    /// The shard is not empty.
    ShardNotEmpty,
    /// The shard has snapshots.
    ShardHasSnapshots,
    /// Not allowed here, whoever asks.
    NotPermitted,
    /// The inode has as many names as it may have.
    TooManyLinks,
    /// The shard does not know the session.
    SessionUnknown,
    /// The sequence number's slot was taken by a later one.
    SequenceStale,
    /// The extended attributes would not fit.
    AttributeTooLarge,
    /// The shard belongs to another client id.
    WrongOwner,
    /// The call names no client id.
    NoClientId,
    /// The shard's limit is reached.
    ShardFull,
    /// The volume has no room.
    VolumeFull,
    /// A queue is full.
    Busy,
    /// Larger than a file may be.
    FileTooLarge,
    /// No shard ids or inode numbers are left.
    IdsExhausted,
    /// A file or the shard has as many locks as it may have.
    LocksExhausted,
    /// A version condition does not hold.
    VersionMismatch,
    /// Somebody else holds a lock that excludes this one.
    LockConflict,
    /// Who waits for the lock would wait for somebody who waits for him.
    Deadlock,
    /// The shard is served by another node.
    NotPrimary,
    /// The caller's epoch is old.
    StaleEpoch,
    /// Not at the moment: starting, stopping, unreachable.
    Unavailable,
    /// A record or file does not pass its checks.
    Corrupt,
    /// The device or the system failed.
    Io,
    /// A bug: an invariant does not hold.
    Internal,
    /// Not implemented for this case.
    Unsupported,
    /// The deadline passed; the outcome may be unknown.
    Deadline,
}

impl Reason {
    /// Whether the same call may succeed when it is repeated.
    pub fn is_retryable(self) -> bool {
        match self {
            Reason::Busy | Reason::NotPrimary | Reason::StaleEpoch | Reason::Unavailable => true,
            Reason::NotFound
            | Reason::ShardNotFound
            | Reason::ShardDeleted
            | Reason::NoAttribute
            | Reason::AlreadyExists
            | Reason::ShardExists
            | Reason::InvalidArgument
            | Reason::NameTooLong
            | Reason::TooLarge
            | Reason::CrossShard
            | Reason::NotDirectory
            | Reason::IsDirectory
            | Reason::NotEmpty
            | Reason::WrongKind
            | Reason::ShardReadOnly
            | Reason::ShardNotEmpty
            | Reason::ShardHasSnapshots
            | Reason::NotPermitted
            | Reason::TooManyLinks
            | Reason::SessionUnknown
            | Reason::SequenceStale
            | Reason::AttributeTooLarge
            | Reason::WrongOwner
            | Reason::NoClientId
            | Reason::ShardFull
            | Reason::VolumeFull
            | Reason::FileTooLarge
            | Reason::IdsExhausted
            | Reason::LocksExhausted
            | Reason::VersionMismatch
            | Reason::LockConflict
            | Reason::Deadlock
            | Reason::Corrupt
            | Reason::Io
            | Reason::Internal
            | Reason::Unsupported
            | Reason::Deadline => false,
        }
    }
}

/// Where a shard is served.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Location {
    /// Its volume.
    pub volume: VolumeId,
    /// The volume's primary, if it has one.
    pub node: Option<NodeId>,
    /// Addresses of that node, preferred first: `unix:/path` or `http://host:port`.
    pub endpoints: Vec<String>,
    /// The epoch under which that node is primary.
    pub epoch: Epoch,
    /// Nodes that stand by and live: they may be asked for reads from views.
    pub backups: Vec<Backup>,
}

/// A node that stands by for a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backup {
    /// The node.
    pub node: NodeId,
    /// Its addresses, preferred first.
    pub endpoints: Vec<String>,
}

/// What went wrong.
#[derive(Clone, Debug)]
pub struct Error(Box<Inner>);

#[derive(Clone, Debug)]
struct Inner {
    reason: Reason,
    message: String,
    shard: Option<ShardId>,
    location: Option<Location>,
    retry_after_ms: u32,
}

impl Error {
    /// An error with a sentence for people.
    pub fn new(reason: Reason, message: impl Into<String>) -> Error {
        Error(Box::new(Inner {
            reason,
            message: message.into(),
            shard: None,
            location: None,
            retry_after_ms: 0,
        }))
    }

    /// [`Reason::InvalidArgument`].
    pub fn invalid(message: impl Into<String>) -> Error {
        Error::new(Reason::InvalidArgument, message)
    }

    /// [`Reason::NotFound`].
    pub fn not_found(message: impl Into<String>) -> Error {
        Error::new(Reason::NotFound, message)
    }

    /// [`Reason::Unavailable`].
    pub fn unavailable(message: impl Into<String>) -> Error {
        Error::new(Reason::Unavailable, message)
    }

    /// [`Reason::Corrupt`].
    pub fn corrupt(message: impl Into<String>) -> Error {
        Error::new(Reason::Corrupt, message)
    }

    /// [`Reason::Internal`].
    pub fn internal(message: impl Into<String>) -> Error {
        Error::new(Reason::Internal, message)
    }

    /// [`Reason::Io`].
    pub fn io(message: impl Into<String>) -> Error {
        Error::new(Reason::Io, message)
    }

    /// Says about which shard it is.
    pub fn with_shard(mut self, shard: ShardId) -> Error {
        self.0.shard = Some(shard);
        self
    }

    /// Says where the shard lives.
    pub fn with_location(mut self, location: Location) -> Error {
        self.0.location = Some(location);
        self
    }

    /// Says when a retry makes sense.
    pub fn with_retry_after_ms(mut self, ms: u32) -> Error {
        self.0.retry_after_ms = ms;
        self
    }

    /// Puts words before the message.
    pub fn context(mut self, words: impl fmt::Display) -> Error {
        self.0.message = format!("{words}: {}", self.0.message);
        self
    }

    /// What happened.
    pub fn reason(&self) -> Reason {
        self.0.reason
    }

    /// The sentence.
    pub fn message(&self) -> &str {
        &self.0.message
    }

    /// The shard it is about.
    pub fn shard(&self) -> Option<ShardId> {
        self.0.shard
    }

    /// Where the shard lives now.
    pub fn location(&self) -> Option<&Location> {
        self.0.location.as_ref()
    }

    /// Milliseconds to wait before a retry; 0: no advice.
    pub fn retry_after_ms(&self) -> u32 {
        self.0.retry_after_ms
    }

    /// See [`Reason::is_retryable`].
    pub fn is_retryable(&self) -> bool {
        self.0.reason.is_retryable()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)
    }
}

impl std::error::Error for Error {}
