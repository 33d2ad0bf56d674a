//! NVMe namespaces as the kernel has them: the ioctls of linux/nvme_ioctl.h that send a command as it is.
//!
//! Nothing here decides anything but whether a device is a namespace. What a command's completion says is handed on as it
//! is: a status, of which 0 alone is success.

use std::fs::{self, File};
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// Bytes of what Identify returns.
pub(in crate::volume) const IDENTIFY_BYTES: usize = 4096;

/// Admin command Identify. Its CNS 0 is the namespace that is named.
const IDENTIFY: u8 = 0x06;

/// `struct nvme_passthru_cmd`. Its `timeout_ms` stays 0, the kernel's own: a shorter one would have the kernel reset the
/// controller under whoever else uses it.
#[repr(C)]
#[derive(Default)]
struct PassthruCmd {
    opcode: u8,
    flags: u8,
    rsvd1: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

const READS_AND_WRITES: u32 = 3;

/// `_IOC(direction, 'N', number, size)`.
const fn code(direction: u32, number: u32, size: usize) -> libc::c_ulong {
    ((direction << 30) | ((size as u32) << 16) | ((b'N' as u32) << 8) | number) as libc::c_ulong
}

const NVME_IOCTL_ID: libc::c_ulong = code(0, 0x40, 0);
const NVME_IOCTL_ADMIN_CMD: libc::c_ulong = code(READS_AND_WRITES, 0x41, size_of::<PassthruCmd>());
const NVME_IOCTL_IO_CMD: libc::c_ulong = code(READS_AND_WRITES, 0x43, size_of::<PassthruCmd>());

/// How a command was completed: status code type and code, and the bits More and Do Not Retry above them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::volume) struct Status(u16);

impl Status {
    const CODE_MASK: u16 = 0x7FF;
    const DO_NOT_RETRY: u16 = 0x4000;

    pub(in crate::volume) const SUCCESS: u16 = 0x00;
    pub(in crate::volume) const INVALID_OPCODE: u16 = 0x01;
    pub(in crate::volume) const INVALID_FIELD: u16 = 0x02;
    /// Host Identifier Inconsistent Format: the host has one of 64 bits, or of 128, and the command is of the other kind.
    pub(in crate::volume) const HOST_ID_FORMAT: u16 = 0x18;
    pub(in crate::volume) const CONFLICT: u16 = 0x83;

    pub(in crate::volume) const fn new(raw: u16) -> Status {
        Status(raw)
    }

    /// Status code type and code.
    pub(in crate::volume) const fn code(self) -> u16 {
        self.0 & Status::CODE_MASK
    }

    /// The same command may succeed if it is sent again.
    pub(in crate::volume) const fn may_pass(self) -> bool {
        self.0 & Status::DO_NOT_RETRY == 0
    }
}

/// An I/O command to a namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(in crate::volume) struct IoCommand {
    /// Its bits 0 and 1 say which way the data goes.
    pub(in crate::volume) opcode: u8,
    pub(in crate::volume) cdw10: u32,
    pub(in crate::volume) cdw11: u32,
}

/// An open namespace.
pub(in crate::volume) struct Namespace {
    file: File,
    nsid: u32,
}

impl Namespace {
    /// `None`: the device is no NVMe namespace. Other devices are not asked anything: what a driver makes of another's
    /// ioctl is its own affair.
    pub(in crate::volume) fn open(device: &Path) -> Result<Option<Namespace>> {
        if !is_nvme(device)? {
            return Ok(None);
        }
        // Not for writing: the last close of a descriptor that can write makes udev look at the device.
        let file = File::open(device)?;
        // SAFETY: this one has no argument.
        let nsid = unsafe { libc::ioctl(file.as_raw_fd(), NVME_IOCTL_ID as _) };
        match nsid {
            1.. => Ok(Some(Namespace { file, nsid: nsid as u32 })),
            0 => Err(Error::other("the kernel says that it is namespace 0, which there is not")),
            _negative => Err(Error::last_os_error()),
        }
    }

    /// What the controller says of the namespace.
    pub(in crate::volume) fn identify(&self, into: &mut [u8; IDENTIFY_BYTES]) -> Result<Status> {
        self.send(NVME_IOCTL_ADMIN_CMD, IoCommand { opcode: IDENTIFY, cdw10: 0, cdw11: 0 }, into)
    }

    /// Sends an I/O command with this data, or for it.
    pub(in crate::volume) fn io(&self, command: IoCommand, data: &mut [u8]) -> Result<Status> {
        self.send(NVME_IOCTL_IO_CMD, command, data)
    }

    fn send(&self, ioctl: libc::c_ulong, command: IoCommand, data: &mut [u8]) -> Result<Status> {
        let mut argument = PassthruCmd {
            opcode: command.opcode,
            nsid: self.nsid,
            addr: data.as_mut_ptr() as u64,
            data_len: u32::try_from(data.len()).map_err(|_| Error::from(ErrorKind::InvalidInput))?,
            cdw10: command.cdw10,
            cdw11: command.cdw11,
            ..PassthruCmd::default()
        };
        // SAFETY: the codes are of this structure, whose size is in them. The kernel reads or writes `data_len` bytes at
        // `addr`, which are the slice's, and waits for the command's end.
        let answer =
            unsafe { libc::ioctl(self.file.as_raw_fd(), ioctl as _, std::ptr::from_mut(&mut argument)) };
        match u16::try_from(answer) {
            Ok(status) => Ok(Status::new(status)),
            Err(_) if answer < 0 => Err(Error::last_os_error()),
            Err(_) => Err(Error::other(format!("the kernel answered {answer:#x}, which is no status"))),
        }
    }
}

/// By the name that the kernel has for it, whatever path leads to it.
fn is_nvme(device: &Path) -> Result<bool> {
    let meta = fs::metadata(device)?;
    if !meta.file_type().is_block_device() {
        return Ok(false);
    }
    let (major, minor) = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
    let at = fs::canonicalize(format!("/sys/dev/block/{major}:{minor}"))?;
    Ok(at.file_name().and_then(|name| name.to_str()).is_some_and(super::is_namespace))
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use super::*;

    #[test]
    fn codes_and_structures_are_the_kernels() {
        assert_eq!(size_of::<PassthruCmd>(), 72);
        assert_eq!(NVME_IOCTL_ID, 0x4E40);
        assert_eq!(NVME_IOCTL_ADMIN_CMD, 0xC048_4E41);
        assert_eq!(NVME_IOCTL_IO_CMD, 0xC048_4E43);
        let offsets = [
            offset_of!(PassthruCmd, nsid),
            offset_of!(PassthruCmd, metadata),
            offset_of!(PassthruCmd, addr),
            offset_of!(PassthruCmd, data_len),
            offset_of!(PassthruCmd, cdw10),
            offset_of!(PassthruCmd, timeout_ms),
            offset_of!(PassthruCmd, result),
        ];
        assert_eq!(offsets, [4, 16, 24, 36, 40, 64, 68]);
    }

    #[test]
    fn a_status_is_taken_apart() {
        let refused = Status::new(0x4083);
        assert_eq!((refused.code(), refused.may_pass()), (Status::CONFLICT, false));
        let aborted = Status::new(0x2007);
        assert_eq!((aborted.code(), aborted.may_pass()), (0x07, true));
        assert_eq!(Status::new(0x371).code(), 0x371);
    }

    #[test]
    fn what_is_no_block_device_is_no_namespace() {
        assert!(Namespace::open(Path::new("/dev/null")).unwrap().is_none());
        assert!(Namespace::open(Path::new("/dev/no-such-device")).is_err());
    }
}
