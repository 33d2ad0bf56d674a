//! What the kernel's reservation ioctls (linux/pr.h) cannot say to an NVMe namespace, as commands of NVMe's own.
//!
//! Registering: the ioctl sends Register for a new key, which NVMe refuses with a conflict to a host that has another key
//! already; SCSI's REGISTER AND IGNORE EXISTING KEY is NVMe's Replace with Ignore Existing Key. And the ioctl has no Unregister
//! at all. Without both, a node that wins twice in a row could not take its own device again, and would stay registered for ever.
//!
//! Reading back: before Linux 6.19 no ioctl does it; the command Reservation Report does.
//!
//! NVMe registers hosts, SCSI paths: all controllers that know a host by one identifier share its registration, and the report has
//! an entry for each of them, with the same key. A type that has one holder has entries of one host marked, of a single
//! key. On EC2 a machine has one controller for each disk, and the cloud gives the identifiers.

use crate::volume::nvme::sys::{IoCommand, Namespace, Status};

use super::{Holder, Outcome, Refusal};

const RESERVATION_REGISTER: u8 = 0x0D;
const RESERVATION_REPORT: u8 = 0x0E;

/// Of Reservation Register, in its dword 10.
const REGISTER: u32 = 0;
const UNREGISTER: u32 = 1;
const REPLACE: u32 = 2;
const IGNORE_EXISTING_KEY: u32 = 1 << 3;
/// Registrations and reservations are to persist through power loss; 0 in both bits leaves that as it is.
const PERSIST: u32 = 3 << 30;
/// Of Reservation Report, in its dword 11: entries with host identifiers of 128 bits.
const EXTENDED: u32 = 1;

/// How often a registration is tried that another host removes between two commands: each time somebody else has preempted us.
const REGISTER_ROUNDS_MAX: u32 = 3;
/// The first buffer for a report: room for 63 entries, which is more than a disk of EC2 may have machines (16).
const REPORT_BYTES_FIRST: usize = 4096;
/// The largest buffer for a report: any controller transfers that much at once. More entries are not those of a cluster of ours.
const REPORT_BYTES_MAX: usize = 64 << 10;
/// How often a report may have grown when it is read again.
const REPORT_ROUNDS_MAX: u32 = 4;
/// Types of reservation, of which the last two are held by every registrant. The numbers are linux/pr.h's too.
const TYPES: std::ops::RangeInclusive<u8> = 1..=6;
const TYPES_OF_ALL: std::ops::RangeInclusive<u8> = 5..=6;

/// What sends an I/O command to a namespace.
pub(super) trait Sender {
    /// With this data, or for it. What the device answers, whatever it is, is no error.
    fn send(&self, command: IoCommand, data: &mut [u8]) -> std::io::Result<Status>;
}

impl Sender for Namespace {
    fn send(&self, command: IoCommand, data: &mut [u8]) -> std::io::Result<Status> {
        self.io(command, data)
    }
}

/// Sends a command, and understands its answer; `Ok` of the status code: success, or one that the caller knows.
fn send(to: &impl Sender, command: IoCommand, data: &mut [u8], known: &[u16]) -> Outcome<u16> {
    let status = to.send(command, data).map_err(|e| match e.raw_os_error() {
        Some(libc::ENOTTY | libc::EOPNOTSUPP) => Refusal::Unsupported(e.to_string()),
        Some(libc::EINTR | libc::EAGAIN) => Refusal::Passing(e.to_string()),
        Some(libc::EACCES | libc::EPERM) => Refusal::Failed(format!("{e}: NVMe commands need root")),
        _other => Refusal::Failed(e.to_string()),
    })?;
    let code = status.code();
    if code == Status::SUCCESS || known.contains(&code) {
        return Ok(code);
    }
    Err(match code {
        Status::CONFLICT => Refusal::Conflict,
        Status::INVALID_OPCODE => Refusal::Unsupported("the device has no such command".into()),
        // A device may leave the bit clear whatever it refuses; then it is repeated in vain, a few times.
        _passing if status.may_pass() => {
            Refusal::Passing(format!("the device answered with status {code:#x}"))
        }
        _other => Refusal::Failed(format!("the device answered with status {code:#x}")),
    })
}

/// Registers this host with a key, whichever it has now; 0: unregisters it, which conflicts if it is not registered.
pub(super) fn register(to: &impl Sender, key: u64) -> Outcome<()> {
    if key == 0 {
        return registering(to, UNREGISTER | IGNORE_EXISTING_KEY, 0);
    }
    let mut rounds = 0;
    loop {
        rounds += 1;
        // A conflict of the first: registered with another key. Of the second: not registered any more.
        for action in [REGISTER, REPLACE | IGNORE_EXISTING_KEY] {
            match persistently(to, action, key) {
                Err(Refusal::Conflict) => {}
                done => return done,
            }
        }
        if rounds == REGISTER_ROUNDS_MAX {
            return Err(Refusal::Conflict);
        }
    }
}

/// To persist through power loss, if the device offers that.
fn persistently(to: &impl Sender, action: u32, key: u64) -> Outcome<()> {
    let (mut data, cdw10) = (register_data(key), action | PERSIST);
    let command = IoCommand { opcode: RESERVATION_REGISTER, cdw10, cdw11: 0 };
    match send(to, command, &mut data, &[Status::INVALID_FIELD])? {
        Status::INVALID_FIELD => registering(to, action, key),
        _success => Ok(()),
    }
}

fn registering(to: &impl Sender, cdw10: u32, key: u64) -> Outcome<()> {
    let command = IoCommand { opcode: RESERVATION_REGISTER, cdw10, cdw11: 0 };
    send(to, command, &mut register_data(key), &[]).map(drop)
}

/// The current key, which is ignored or not needed, and the new one.
fn register_data(key: u64) -> [u8; 16] {
    let mut data = [0; 16];
    data[8..].copy_from_slice(&key.to_le_bytes());
    data
}

/// Who holds the reservation; `None`: nobody.
pub(super) fn holder(from: &impl Sender) -> Outcome<Option<Holder>> {
    report(from)?.holder().map_err(Refusal::Failed)
}

/// The keys of all registrants.
pub(super) fn keys(from: &impl Sender) -> Outcome<Vec<u64>> {
    let mut keys: Vec<u64> = report(from)?.registrants.iter().map(|registrant| registrant.key).collect();
    keys.sort_unstable();
    keys.dedup();
    keys.retain(|key| *key != 0);
    Ok(keys)
}

/// Asks with the layout that fits the host's identifier: the device refuses the other one.
fn report(from: &impl Sender) -> Outcome<Report> {
    match report_as(from, Layout::Extended)? {
        Some(report) => Ok(report),
        None => report_as(from, Layout::Basic)?
            .ok_or_else(|| Refusal::Failed("the device gives a report in neither layout".into())),
    }
}

/// `None`: the device does not give one in this layout.
fn report_as(from: &impl Sender, layout: Layout) -> Outcome<Option<Report>> {
    let mut bytes = REPORT_BYTES_FIRST;
    for _round in 0..REPORT_ROUNDS_MAX {
        let mut data = vec![0; bytes];
        let command = IoCommand {
            opcode: RESERVATION_REPORT,
            // In dwords, counted from 0.
            cdw10: (bytes / 4 - 1) as u32,
            cdw11: if layout == Layout::Extended { EXTENDED } else { 0 },
        };
        // Devices before NVMe 1.3 do not know the extended one.
        match send(from, command, &mut data, &[Status::HOST_ID_FORMAT, Status::INVALID_FIELD])? {
            Status::SUCCESS => {}
            _refused => return Ok(None),
        }
        match parse(&data, layout) {
            Ok(report) => return Ok(Some(report)),
            Err(Unread::Cut { needed }) if needed <= REPORT_BYTES_MAX => bytes = needed,
            Err(why) => return Err(Refusal::Failed(why.to_string())),
        }
    }
    Err(Refusal::Passing("the reservation report grows while it is read".into()))
}

/// How the entries of a report look: by the length of host identifiers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Layout {
    /// 64 bits.
    Basic,
    /// 128 bits.
    Extended,
}

impl Layout {
    const fn header_bytes(self) -> usize {
        match self {
            Layout::Basic => 24,
            Layout::Extended => 64,
        }
    }

    const fn entry_bytes(self) -> usize {
        match self {
            Layout::Basic => 24,
            Layout::Extended => 64,
        }
    }

    /// Where in an entry the key stands.
    const fn key_at(self) -> usize {
        match self {
            Layout::Basic => 16,
            Layout::Extended => 8,
        }
    }
}

/// A controller of a registered host.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Registrant {
    key: u64,
    holds: bool,
}

/// The Reservation Status data structure.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Report {
    /// 0: there is no reservation.
    kind: u8,
    registrants: Vec<Registrant>,
}

/// Why a report could not be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Unread {
    /// It is of so many bytes, in dwords, and there are less.
    Cut { needed: usize },
    /// Not even its header is there.
    NoHeader { bytes: usize },
    /// Of no type that there is.
    Type(u8),
}

impl std::fmt::Display for Unread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Unread::Cut { needed } => write!(
                f,
                "the device has a reservation report of {needed} bytes; at most {REPORT_BYTES_MAX} are read: too many hosts are \
                 registered (`nvme resv-report` tells; CLEAR removes them)"
            ),
            Unread::NoHeader { bytes } => write!(f, "the reservation report has only {bytes} bytes"),
            Unread::Type(kind) => {
                write!(f, "the device has a reservation of type {kind}, which there is not")
            }
        }
    }
}

/// Reads a report. Every byte of it may be wrong.
fn parse(bytes: &[u8], layout: Layout) -> Result<Report, Unread> {
    const KIND_AT: usize = 4;
    const ENTRIES_AT: usize = 5;
    const HOLDS_AT: usize = 2;
    const HOLDS: u8 = 1;
    let Some((header, entries)) = bytes.split_at_checked(layout.header_bytes()) else {
        return Err(Unread::NoHeader { bytes: bytes.len() });
    };
    let kind = header[KIND_AT];
    if kind != 0 && !TYPES.contains(&kind) {
        return Err(Unread::Type(kind));
    }
    let count = usize::from(u16::from_le_bytes([header[ENTRIES_AT], header[ENTRIES_AT + 1]]));
    let length = count * layout.entry_bytes();
    let Some(entries) = entries.get(..length) else {
        return Err(Unread::Cut { needed: layout.header_bytes() + length });
    };
    let registrants = entries
        .chunks_exact(layout.entry_bytes())
        .map(|entry| {
            let mut key = [0; 8];
            key.copy_from_slice(&entry[layout.key_at()..layout.key_at() + 8]);
            Registrant { key: u64::from_le_bytes(key), holds: entry[HOLDS_AT] & HOLDS != 0 }
        })
        .collect();
    Ok(Report { kind, registrants })
}

impl Report {
    /// An error if it contradicts itself: then nobody is preempted because of it.
    fn holder(&self) -> Result<Option<Holder>, String> {
        let mut keys = self.registrants.iter().filter(|registrant| registrant.holds).map(|r| r.key);
        let (first, kind) = (keys.next(), self.kind);
        match first {
            None if kind == 0 => Ok(None),
            None => Err(format!(
                "the device has a reservation of type {kind}, and says of nobody that he holds it"
            )),
            Some(key) if kind == 0 => {
                Err(format!("the device has no reservation, and says that {key:#018x} holds it"))
            }
            Some(0) => Err("the device says that its reservation is held under no key".into()),
            Some(key) if TYPES_OF_ALL.contains(&kind) || keys.all(|other| other == key) => {
                Ok(Some(Holder { key, kind: u32::from(kind) }))
            }
            Some(_) => Err(format!(
                "the device has a reservation of type {kind}, and says of several that they hold it"
            )),
        }
    }
}

#[cfg(test)]
mod tests;
