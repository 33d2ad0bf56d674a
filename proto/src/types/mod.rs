//! Domain types: valid by construction, free of wire, disk and transport.

pub mod attr;
pub mod clock;
pub mod cluster;
pub mod error;
pub mod ids;
pub mod limits;
pub mod name;
pub mod op;
pub mod reads;

pub use attr::{Attr, FileKind, Timestamp};
pub use error::{Backup, Error, Location, Reason, Result};
pub use ids::{
    ClientId, Cookie, Epoch, GlobalInode, InodeNo, NodeId, Sequence, SessionId, ShardId, Version, VolumeId,
};
pub use name::{FileName, Key, ShardName};
pub use reads::{ReadFrom, ViewFigures, ViewLabel};
