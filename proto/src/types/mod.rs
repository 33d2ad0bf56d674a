//! Domain types: valid by construction, free of wire, disk and transport.

pub mod acl;
pub mod attr;
pub mod backups;
pub mod clock;
pub mod cluster;
pub mod error;
pub mod ids;
pub mod limits;
pub mod locks;
pub mod name;
pub mod op;
pub mod provisioning;
pub mod reads;

pub use acl::Acl;
pub use attr::{Attr, FileKind, Timestamp};
pub use error::{Backup, Error, Location, Reason, Result};
pub use ids::{
    ClientId, Cookie, Epoch, GlobalInode, InodeNo, NodeId, Sequence, SessionId, ShardId, Version, VolumeId,
};
pub use locks::{FileLock, LockKind, LockOwner, LockRange};
pub use name::{FileName, Key, ShardName};
pub use reads::{ReadFrom, ViewFigures, ViewLabel};
