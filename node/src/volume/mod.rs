//! Volumes: block devices or folders that a node attaches, mounts and keeps shards on.
//!
//! Owns: making, attaching, mounting, unmounting, and the room that is left. A [`Provider`] does it for
//! one kind of volume: [`loopdev::LoopProvider`] (an ext4 on a loop device over a sparse file; every node that
//! attaches it has a device of its own) and [`dir::DirProvider`] (a folder; an flock stands for the
//! attachment). [`provider`] picks one by the name in the volume's record.
//!
//! Invariants: `attach` is idempotent and first clears away what a killed process of this node left; it
//! never formats a device that bears anything but zeros, and never serves a volume whose identity file
//! names another; an [`Attachment`] that is dropped without [`Attachment::detach`] (a crash) loses nothing.
//!
//! Must not: know shards or the metadata store. All of it blocks: call it from a blocking thread.

pub mod dir;
mod identity;
mod ioctl;
pub mod loopdev;
mod mounts;
pub mod room;

use std::path::{Path, PathBuf};

use shardfs_proto::types::{Error, NodeId, Result, VolumeId};

pub use room::VolumeRoom;

/// What a provider needs to know of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VolumeSpec {
    /// Its id.
    pub id: VolumeId,
    /// The node that attaches it.
    pub node: NodeId,
    /// The backing file (`loop`) or folder (`dir`).
    pub source: PathBuf,
    /// Bytes of a new backing file; 0 for `dir`.
    pub size_bytes: u64,
    /// Where this node shows it: `{data-dir}/volumes/{id}`.
    pub mount_point: PathBuf,
}

/// What a provider finds without changing anything.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Description {
    /// Whether the backing file or folder is there.
    pub exists: bool,
    /// Its size; 0 for a folder.
    pub size_bytes: u64,
    /// The device by which this node has it attached.
    pub device: Option<PathBuf>,
    /// Whether it is mounted at the mount point.
    pub mounted: bool,
}

/// One kind of volume.
pub trait Provider: Send + Sync {
    /// The name in volume records: `loop`, `dir`.
    fn name(&self) -> &'static str;

    /// Makes the backing file or folder if it is not there. Idempotent.
    ///
    /// # Errors
    /// `InvalidArgument` for a size that makes no sense, `Io`.
    fn create(&self, spec: &VolumeSpec) -> Result<()>;

    /// Attaches and mounts the volume for writing.
    ///
    /// # Errors
    /// `Unavailable` if somebody else has it, `Corrupt` if it is not this volume, `Io`.
    fn attach(&self, spec: &VolumeSpec) -> Result<Box<dyn Attachment>>;

    /// What is there.
    fn describe(&self, spec: &VolumeSpec) -> Result<Description>;

    /// Removes the backing file or what the folder holds; it must not be attached.
    fn delete(&self, spec: &VolumeSpec) -> Result<()>;
}

/// A volume that this process has attached for writing.
pub trait Attachment: Send + Sync {
    /// The folder in which shards lie.
    fn root(&self) -> &Path;

    /// Device or folder, for people.
    fn source(&self) -> String;

    /// Unmounts and detaches. Nothing may have files open on it.
    ///
    /// # Errors
    /// `Unavailable` if it stays busy; the attachment is then as it was.
    fn detach(&self) -> Result<()>;
}

/// The provider of that name.
///
/// # Errors
/// `InvalidArgument`, with the names that there are.
pub fn provider(name: &str) -> Result<Box<dyn Provider>> {
    match name {
        loopdev::NAME => Ok(Box::new(loopdev::LoopProvider)),
        dir::NAME => Ok(Box::new(dir::DirProvider)),
        _ => Err(Error::invalid(format!("volume provider {name:?} is unknown: there are `loop` and `dir`"))),
    }
}

/// An IO error with what was being done.
fn io_error(what: impl std::fmt::Display) -> impl FnOnce(std::io::Error) -> Error {
    move |error| Error::io(format!("{what}: {error}"))
}

#[cfg(test)]
mod tests;
