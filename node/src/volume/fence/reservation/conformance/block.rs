//! The block that the check writes: the last one of the device, as it was, past every cache.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;

use shardfs_proto::types::{Error, Result};

use super::super::{Commands, Holder, Outcome, Refusal, device::Device};
use super::Side;
use crate::volume::io_error;

/// Bytes of a block: what every device writes directly.
const BLOCK_BYTES: usize = 4096;

/// A block's content, aligned as direct I/O wants it.
#[repr(C, align(4096))]
struct Content([u8; BLOCK_BYTES]);

/// A block, and where it lies.
#[derive(Clone)]
pub(super) struct Block {
    content: Arc<Content>,
    at: u64,
}

/// Reads the last block of a device.
pub(super) fn read_last(device: &std::path::Path) -> Result<Block> {
    let doing = |e: std::io::Error| io_error(&format!("reading {}", device.display()), &e);
    let file = direct(device, false).map_err(doing)?;
    let bytes = rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|e| doing(e.into()))?;
    let block = BLOCK_BYTES as u64;
    let at = (bytes / block)
        .checked_sub(1)
        .map(|last| last * block)
        .ok_or_else(|| Error::invalid(format!("{} has only {bytes} bytes", device.display())))?;
    let mut content = Box::new(Content([0; BLOCK_BYTES]));
    file.read_exact_at(&mut content.0, at).map_err(doing)?;
    Ok(Block { content: Arc::from(content), at })
}

fn direct(device: &std::path::Path, write: bool) -> std::io::Result<File> {
    OpenOptions::new().read(true).write(write).custom_flags(libc::O_DIRECT | libc::O_CLOEXEC).open(device)
}

/// A path to a device.
pub(super) struct Path {
    path: PathBuf,
    commands: Device,
    block: Block,
}

impl Path {
    pub(super) fn new(path: &std::path::Path, block: Block) -> Path {
        Path { path: path.to_owned(), commands: Device::new(path), block }
    }
}

/// What a read or a write came to.
fn understand(done: std::io::Result<()>) -> Outcome<()> {
    done.map_err(|e| match e.raw_os_error() {
        Some(libc::EBADE) => Refusal::Conflict,
        _ => Refusal::Failed(e.to_string()),
    })
}

impl Side for Path {
    fn write(&self) -> Outcome<()> {
        understand(
            direct(&self.path, true).and_then(|file| file.write_all_at(&self.block.content.0, self.block.at)),
        )
    }

    fn read(&self) -> Outcome<()> {
        let mut content = Box::new(Content([0; BLOCK_BYTES]));
        understand(
            direct(&self.path, false).and_then(|file| file.read_exact_at(&mut content.0, self.block.at)),
        )
    }
}

impl Commands for Path {
    fn register(&self, key: u64) -> Outcome<()> {
        self.commands.register(key)
    }

    fn reserve(&self, key: u64) -> Outcome<()> {
        self.commands.reserve(key)
    }

    fn release(&self, key: u64) -> Outcome<()> {
        self.commands.release(key)
    }

    fn aborts(&self) -> bool {
        self.commands.aborts()
    }

    fn preempt(&self, own: u64, victim: u64, abort: bool) -> Outcome<()> {
        self.commands.preempt(own, victim, abort)
    }

    fn clear(&self, own: u64) -> Outcome<()> {
        self.commands.clear(own)
    }

    fn holder(&self) -> Outcome<Option<Holder>> {
        self.commands.holder()
    }

    fn keys(&self) -> Outcome<Vec<u64>> {
        self.commands.keys()
    }
}
