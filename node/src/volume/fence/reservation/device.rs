//! The reservation commands as ioctls of a block device (linux/pr.h).
//!
//! Each call opens the device anew, so that one that hangs holds up no other. What the device answers is told apart
//! here and nowhere else: a return below 0 is the kernel's error, one above 0 the device's status, and means
//! failure all the same. What these ioctls cannot say to an NVMe namespace, [`nvme`] does.

use std::fs::{File, OpenOptions};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use super::{Commands, Holder, Outcome, Refusal, WRITE_EXCLUSIVE, nvme};
use crate::volume::nvme::{rescap, sys::Namespace};

const IGNORE_EXISTING_KEY: u32 = 1;
/// What disks of Linux's own SCSI target call themselves. PREEMPT AND ABORT ends in a deadlock there (seen on 6.1 with
/// tcm_loop): its work in the target waits for itself to end. It never does, and whatever is sent from the same processor
/// afterwards hangs too, by any process, until the target's machine is restarted.
const LIO_VENDOR: &str = "LIO-ORG";
/// Registrations that are read at once.
const KEYS_MAX: usize = 1024;

/// `enum pr_status`, SCSI's RESERVATION CONFLICT.
const STATUS_CONFLICT: i32 = 0x18;
/// Kernels before 6.4 pass on the whole result of a SCSI command, of which this is the device's status; above it stands what
/// the host and the SCSI layer made of it (seen on 6.1: 0x118).
const SCSI_STATUS_MASK: i32 = 0xFF;
/// `enum pr_status`, SCSI's CHECK CONDITION; also how a target reports a reset, once.
const STATUS_CHECK: i32 = 0x2;
/// `enum pr_status`: the path failed for now.
const STATUS_RETRY_PATH: i32 = 0xE_0000;
/// NVMe's Reservation Conflict, as kernels before 6.5 pass it on; below the bits More and Do Not Retry.
const NVME_CONFLICT: i32 = 0x83;
/// NVMe's Invalid Command Opcode, likewise: the device has no reservations. No status of SCSI is odd.
const NVME_INVALID_OPCODE: i32 = 0x01;
const NVME_STATUS_MASK: i32 = 0x7FF;

#[repr(C)]
struct Registration {
    old_key: u64,
    new_key: u64,
    flags: u32,
    pad: u32,
}

#[repr(C)]
struct Reservation {
    key: u64,
    kind: u32,
    flags: u32,
}

/// The names are the kernel's and mislead: `old_key` is the caller's own, `new_key` the victim's.
#[repr(C)]
struct Preemption {
    old_key: u64,
    new_key: u64,
    kind: u32,
    flags: u32,
}

#[repr(C)]
struct Clearing {
    key: u64,
    flags: u32,
    pad: u32,
}

#[repr(C)]
struct ReadKeys {
    generation: u32,
    num_keys: u32,
    keys_ptr: u64,
}

#[repr(C)]
#[derive(Default)]
struct ReadReservation {
    key: u64,
    generation: u32,
    kind: u32,
}

const WRITES: u32 = 1;
const READS: u32 = 2;

/// `_IOC(direction, 'p', number, size)`.
const fn code(direction: u32, number: u32, size: usize) -> libc::c_ulong {
    ((direction << 30) | ((size as u32) << 16) | ((b'p' as u32) << 8) | number) as libc::c_ulong
}

const IOC_PR_REGISTER: libc::c_ulong = code(WRITES, 200, size_of::<Registration>());
const IOC_PR_RESERVE: libc::c_ulong = code(WRITES, 201, size_of::<Reservation>());
const IOC_PR_RELEASE: libc::c_ulong = code(WRITES, 202, size_of::<Reservation>());
const IOC_PR_PREEMPT: libc::c_ulong = code(WRITES, 203, size_of::<Preemption>());
const IOC_PR_PREEMPT_ABORT: libc::c_ulong = code(WRITES, 204, size_of::<Preemption>());
const IOC_PR_CLEAR: libc::c_ulong = code(WRITES, 205, size_of::<Clearing>());
/// From Linux 6.19.
const IOC_PR_READ_KEYS: libc::c_ulong = code(READS | WRITES, 206, size_of::<ReadKeys>());
/// From Linux 6.19.
const IOC_PR_READ_RESERVATION: libc::c_ulong = code(READS, 207, size_of::<ReadReservation>());

/// A path to a whole block device.
pub(super) struct Device {
    path: PathBuf,
}

impl Device {
    pub(super) fn new(path: &Path) -> Device {
        Device { path: path.to_owned() }
    }

    /// What the disk says who made it; a SCSI disk only.
    fn vendor(&self) -> Option<String> {
        let device = std::fs::canonicalize(&self.path).ok()?;
        let sys = Path::new("/sys/block").join(device.file_name()?).join("device/vendor");
        Some(std::fs::read_to_string(sys).ok()?.trim().to_owned())
    }

    fn open(&self) -> Outcome<File> {
        // Not for writing: the last close of a descriptor that can write makes udev look at the device.
        OpenOptions::new()
            .read(true)
            .open(&self.path)
            .map_err(|e| Refusal::Failed(format!("opening {}: {e}", self.path.display())))
    }

    /// `None`: the device is none of NVMe.
    fn namespace(&self) -> Outcome<Option<Namespace>> {
        Namespace::open(&self.path)
            .map_err(|e| Refusal::Failed(format!("opening {} as NVMe: {e}", self.path.display())))
    }

    /// Reads by NVMe's own command where the kernel has none, if the device is of NVMe.
    fn or_by_nvme<T>(&self, read: Outcome<T>, instead: impl FnOnce(&Namespace) -> Outcome<T>) -> Outcome<T> {
        match read {
            Err(Refusal::Unsupported(why)) => match self.namespace()? {
                Some(namespace) => instead(&namespace),
                None => Err(Refusal::Unsupported(why)),
            },
            read => read,
        }
    }

    fn command<T>(&self, code: libc::c_ulong, argument: &mut T) -> Outcome<()> {
        let file = self.open()?;
        // SAFETY: every code stands with the type of its argument above, whose size is in the code; the kernel
        // reads and writes no more than that, and what `ReadKeys` points to, which its caller keeps.
        let answer = unsafe { libc::ioctl(file.as_raw_fd(), code as _, std::ptr::from_mut(argument)) };
        let errno = std::io::Error::last_os_error().raw_os_error().unwrap_or(0);
        understand(answer, errno)
    }
}

/// What an ioctl's answer means.
fn understand(answer: i32, errno: i32) -> Outcome<()> {
    match answer {
        0 => Ok(()),
        1.. if answer & SCSI_STATUS_MASK == STATUS_CONFLICT || answer & NVME_STATUS_MASK == NVME_CONFLICT => {
            Err(Refusal::Conflict)
        }
        1.. if answer & NVME_STATUS_MASK == NVME_INVALID_OPCODE => {
            Err(Refusal::Unsupported("the device has no such command".into()))
        }
        STATUS_CHECK | STATUS_RETRY_PATH => {
            Err(Refusal::Passing(format!("the device answered with status {answer:#x}")))
        }
        1.. => Err(Refusal::Failed(format!("the device answered with status {answer:#x}"))),
        _negative => Err(match errno {
            libc::EBADE => Refusal::Conflict,
            libc::ENOTTY | libc::EOPNOTSUPP => {
                Refusal::Unsupported(std::io::Error::from_raw_os_error(errno).to_string())
            }
            libc::EPERM | libc::EINVAL => Refusal::Failed(format!(
                "{}: reservations need root and a whole device, not a partition",
                std::io::Error::from_raw_os_error(errno)
            )),
            _other => Refusal::Failed(std::io::Error::from_raw_os_error(errno).to_string()),
        }),
    }
}

impl Commands for Device {
    fn register(&self, key: u64) -> Outcome<()> {
        if let Some(namespace) = self.namespace()? {
            return nvme::register(&namespace, key);
        }
        let mut argument = Registration { old_key: 0, new_key: key, flags: IGNORE_EXISTING_KEY, pad: 0 };
        self.command(IOC_PR_REGISTER, &mut argument)
    }

    fn reserve(&self, key: u64) -> Outcome<()> {
        self.command(IOC_PR_RESERVE, &mut Reservation { key, kind: WRITE_EXCLUSIVE, flags: 0 })
    }

    fn release(&self, key: u64) -> Outcome<()> {
        self.command(IOC_PR_RELEASE, &mut Reservation { key, kind: WRITE_EXCLUSIVE, flags: 0 })
    }

    fn aborts(&self) -> bool {
        self.vendor().is_none_or(|vendor| vendor != LIO_VENDOR)
    }

    fn preempt(&self, own: u64, victim: u64, abort: bool) -> Outcome<()> {
        let mut argument = Preemption { old_key: own, new_key: victim, kind: WRITE_EXCLUSIVE, flags: 0 };
        let done = self.command(if abort { IOC_PR_PREEMPT_ABORT } else { IOC_PR_PREEMPT }, &mut argument);
        match done {
            // From Linux 6.5 a command that the device does not know fails as an invalid argument does.
            Err(Refusal::Failed(why)) if matches!(rescap(&self.path), Ok(Some(0))) => {
                Err(Refusal::Unsupported(format!("{why}; it says of itself that it has none")))
            }
            done => done,
        }
    }

    fn clear(&self, own: u64) -> Outcome<()> {
        self.command(IOC_PR_CLEAR, &mut Clearing { key: own, flags: 0, pad: 0 })
    }

    fn holder(&self) -> Outcome<Option<Holder>> {
        let mut argument = ReadReservation::default();
        let read = self
            .command(IOC_PR_READ_RESERVATION, &mut argument)
            .map(|()| (argument.key != 0).then_some(Holder { key: argument.key, kind: argument.kind }));
        self.or_by_nvme(read, nvme::holder)
    }

    fn keys(&self) -> Outcome<Vec<u64>> {
        let mut keys = vec![0u64; KEYS_MAX];
        let mut argument =
            ReadKeys { generation: 0, num_keys: KEYS_MAX as u32, keys_ptr: keys.as_mut_ptr() as u64 };
        let read = self.command(IOC_PR_READ_KEYS, &mut argument).map(|()| {
            keys.truncate(argument.num_keys as usize);
            keys.retain(|key| *key != 0);
            keys
        });
        self.or_by_nvme(read, nvme::keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_are_the_kernels() {
        assert_eq!(IOC_PR_REGISTER, 0x4018_70C8);
        assert_eq!(IOC_PR_RESERVE, 0x4010_70C9);
        assert_eq!(IOC_PR_RELEASE, 0x4010_70CA);
        assert_eq!(IOC_PR_PREEMPT, 0x4018_70CB);
        assert_eq!(IOC_PR_PREEMPT_ABORT, 0x4018_70CC);
        assert_eq!(IOC_PR_CLEAR, 0x4010_70CD);
        assert_eq!(IOC_PR_READ_KEYS, 0xC010_70CE);
        assert_eq!(IOC_PR_READ_RESERVATION, 0x8010_70CF);
    }

    #[test]
    fn a_positive_answer_is_no_success() {
        assert_eq!(understand(0, 0), Ok(()));
        assert_eq!(understand(0x18, 0), Err(Refusal::Conflict));
        assert_eq!(understand(0x118, 0), Err(Refusal::Conflict));
        assert_eq!(understand(0x11_0018, 0), Err(Refusal::Conflict));
        assert_eq!(understand(0x4083, 0), Err(Refusal::Conflict));
        assert_eq!(understand(-1, libc::EBADE), Err(Refusal::Conflict));
        assert!(matches!(understand(0x4001, 0), Err(Refusal::Unsupported(_))));
        assert!(matches!(understand(0x2, 0), Err(Refusal::Passing(_))));
        assert!(matches!(understand(0xE_0000, 0), Err(Refusal::Passing(_))));
        assert!(matches!(understand(0x1_0000, 0), Err(Refusal::Failed(_))));
        assert!(matches!(understand(-1, libc::ENOTTY), Err(Refusal::Unsupported(_))));
        assert!(matches!(understand(-1, libc::EOPNOTSUPP), Err(Refusal::Unsupported(_))));
        assert!(matches!(understand(-1, libc::EIO), Err(Refusal::Failed(_))));
    }
}
