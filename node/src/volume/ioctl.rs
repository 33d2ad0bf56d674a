//! The loop driver's ioctls (linux/loop.h), and nothing else: the only unsafe code of the volumes.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;

const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;

/// Reads and writes bypass the page cache of the filesystem below.
pub(super) const LO_FLAGS_DIRECT_IO: u32 = 16;
/// Bytes of a device's name, NUL included.
pub(super) const LO_NAME_SIZE: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct LoopInfo64 {
    pub(super) lo_device: u64,
    pub(super) lo_inode: u64,
    lo_rdevice: u64,
    lo_offset: u64,
    lo_sizelimit: u64,
    pub(super) lo_number: u32,
    lo_encrypt_type: u32,
    lo_encrypt_key_size: u32,
    pub(super) lo_flags: u32,
    lo_file_name: [u8; LO_NAME_SIZE],
    lo_crypt_name: [u8; LO_NAME_SIZE],
    lo_encrypt_key: [u8; 32],
    lo_init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo64,
    reserved: [u64; 8],
}

const ZERO_INFO: LoopInfo64 = LoopInfo64 {
    lo_device: 0,
    lo_inode: 0,
    lo_rdevice: 0,
    lo_offset: 0,
    lo_sizelimit: 0,
    lo_number: 0,
    lo_encrypt_type: 0,
    lo_encrypt_key_size: 0,
    lo_flags: 0,
    lo_file_name: [0; LO_NAME_SIZE],
    lo_crypt_name: [0; LO_NAME_SIZE],
    lo_encrypt_key: [0; 32],
    lo_init: [0; 2],
};

impl LoopInfo64 {
    /// The name that was given when it was configured.
    pub(super) fn name(&self) -> &[u8] {
        let end = self.lo_file_name.iter().position(|b| *b == 0).unwrap_or(LO_NAME_SIZE);
        &self.lo_file_name[..end]
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// The path of a loop device that is free at the moment.
pub(super) fn free_device() -> io::Result<PathBuf> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    // SAFETY: LOOP_CTL_GET_FREE takes no argument.
    let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) })?;
    Ok(PathBuf::from(format!("/dev/loop{number}")))
}

/// Binds a loop device to a file, with direct IO.
///
/// # Errors
/// EBUSY: somebody else took the device meanwhile.
pub(super) fn configure(device: &File, backing: &File, block_bytes: u32, name: &[u8]) -> io::Result<()> {
    let mut info = LoopInfo64 { lo_flags: LO_FLAGS_DIRECT_IO, ..ZERO_INFO };
    let length = name.len().min(LO_NAME_SIZE - 1);
    info.lo_file_name[..length].copy_from_slice(&name[..length]);
    let fd = u32::try_from(backing.as_raw_fd()).map_err(io::Error::other)?;
    let config = LoopConfig { fd, block_size: block_bytes, info, reserved: [0; 8] };
    // SAFETY: `config` has the layout of struct loop_config and lives through the call; the kernel only
    // reads it.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) }).map(drop)
}

/// How a loop device is bound; ENXIO: it is not.
pub(super) fn status(device: &File) -> io::Result<LoopInfo64> {
    let mut info = ZERO_INFO;
    // SAFETY: `info` has the layout of struct loop_info64 and is writable.
    check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64 as _, &raw mut info) })?;
    Ok(info)
}

/// Unbinds a loop device (when its last user closes it).
pub(super) fn clear(device: &File) -> io::Result<()> {
    let fd: RawFd = device.as_raw_fd();
    // SAFETY: LOOP_CLR_FD takes no argument.
    check(unsafe { libc::ioctl(fd, LOOP_CLR_FD as _, 0) }).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layouts_are_the_kernels() {
        assert_eq!(size_of::<LoopInfo64>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
