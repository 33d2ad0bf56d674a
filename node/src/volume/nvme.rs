//! NVMe devices: which of them is a cloud's disk, and what reservations it offers.
//!
//! On EC2 a disk's id, without its hyphen, is the serial number of the controller that it is attached as. udev makes a
//! link of it, some time after the attachment. Names like nvme1n1 are given in the order of attachment, and again to others
//! after a detachment: so a link may be stale, and the serial decides.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shardfs_proto::types::{Error, Result, clock};

use super::cloud::DiskId;
use super::io_error;

pub(in crate::volume) mod sys;

/// Where udev makes the links.
const BY_ID: &str = "/dev/disk/by-id";
/// What they begin with, on EC2; then comes the serial.
const LINK_PREFIX: &str = "nvme-Amazon_Elastic_Block_Store_";
/// Pause between looks at a device that is not there yet.
const WAIT_PAUSE: Duration = Duration::from_millis(100);

/// Where disks are found. Everything that it says may change at any time: a device that was found is looked at again
/// by whoever writes to it.
#[derive(Clone, Debug)]
pub struct Links {
    links: PathBuf,
    sys: PathBuf,
    dev: PathBuf,
}

impl Default for Links {
    fn default() -> Links {
        Links::new(BY_ID)
    }
}

/// What a look came to.
struct Look {
    found: Option<PathBuf>,
    /// What was looked at, for people.
    seen: Vec<String>,
}

impl Links {
    /// This machine's disks, with links in this folder.
    pub fn new(links: impl Into<PathBuf>) -> Links {
        Links::with_roots(links, "/sys", "/dev")
    }

    /// With other roots than /sys and /dev, for tests.
    pub fn with_roots(links: impl Into<PathBuf>, sys: impl Into<PathBuf>, dev: impl Into<PathBuf>) -> Links {
        Links { links: links.into(), sys: sys.into(), dev: dev.into() }
    }

    /// The whole device that this disk is on this machine; `None`: it is not there, or not yet.
    pub fn find(&self, id: &DiskId) -> Result<Option<PathBuf>> {
        Ok(self.look(id)?.found)
    }

    /// Waits until it is there. Blocks.
    pub fn wait_for(&self, id: &DiskId, at_most: Duration) -> Result<PathBuf> {
        let begun = clock::monotonic();
        loop {
            let Look { found, seen } = self.look(id)?;
            if let Some(device) = found {
                return Ok(device);
            }
            let left = at_most.saturating_sub(begun.elapsed());
            if left.is_zero() {
                return Err(Error::not_found(format!(
                    "{id}: no device of this machine after {} ms: {}; is the disk attached to this machine, and this machine a \
                     Nitro instance (they alone have disks as NVMe)? `lsblk -o NAME,SERIAL` says what there is: {} is looked for",
                    at_most.as_millis(),
                    seen.join(", "),
                    serial(id),
                )));
            }
            std::thread::sleep(left.min(WAIT_PAUSE));
        }
    }

    fn look(&self, id: &DiskId) -> Result<Look> {
        let serial = serial(id);
        let mut seen = Vec::new();
        let found = match self.by_link(&serial, &mut seen)? {
            Some(device) => Some(device),
            None => self.by_serial(&serial, &mut seen)?,
        };
        Ok(Look { found, seen })
    }

    fn by_link(&self, serial: &str, seen: &mut Vec<String>) -> Result<Option<PathBuf>> {
        let link = self.links.join(format!("{LINK_PREFIX}{serial}"));
        let device = match fs::canonicalize(&link) {
            Ok(device) => device,
            // There is none, or it leads nowhere.
            Err(e) if e.kind() == ErrorKind::NotFound => {
                seen.push(format!("{} is not there", link.display()));
                return Ok(None);
            }
            Err(e) => return Err(io_error(&format!("following {}", link.display()), &e)),
        };
        let name = name_of(&device);
        // Emulators have these: nothing but the link says whose they are.
        if is_loop(&name) && self.links != Path::new(BY_ID) {
            return Ok(Some(device));
        }
        if is_namespace(&name) {
            match self.serial_of(&name)? {
                Some(other) if other == serial => return Ok(Some(device)),
                Some(other) => seen.push(format!("{} leads to {name}, which is {other}", link.display())),
                None => seen.push(format!("{} leads to {name}, which has no serial", link.display())),
            }
        } else {
            seen.push(format!("{} leads to {name}, which is no whole NVMe device", link.display()));
        }
        Ok(None)
    }

    fn by_serial(&self, serial: &str, seen: &mut Vec<String>) -> Result<Option<PathBuf>> {
        let folder = self.sys.join("class/nvme");
        let mut devices = BTreeSet::new();
        let mut others = Vec::new();
        for controller in names_in(&folder)? {
            let at = folder.join(&controller);
            match read_trimmed(&at.join("serial"))? {
                Some(own) if own == serial => {}
                // Also one that has just gone.
                own => {
                    others.push(format!("{controller} is {}", own.as_deref().unwrap_or("nothing")));
                    continue;
                }
            }
            for name in names_in(&at)? {
                let Some(name) = block_device(&name) else { continue };
                let device = self.dev.join(&name);
                // A name that is not a path's but the subsystem's is only derived.
                if self.serial_of(&name)?.is_none_or(|own| own == serial) && device.exists() {
                    devices.insert(device);
                }
            }
            if devices.is_empty() {
                seen.push(format!("{controller} is {serial}, and has no block device"));
            }
        }
        if devices.len() > 1 {
            let names: Vec<String> = devices.iter().map(|device| device.display().to_string()).collect();
            return Err(Error::invalid(format!(
                "{} all have the serial {serial}: which of them is the disk cannot be told; see `lsblk -o NAME,SERIAL`",
                names.join(" and ")
            )));
        }
        match others.as_slice() {
            [] => seen.push(format!("{} has no other controller", folder.display())),
            _ => seen.push(others.join(", ")),
        }
        Ok(devices.pop_first())
    }

    /// The serial of a namespace's controller, or of the subsystem if that is what it belongs to.
    fn serial_of(&self, name: &str) -> Result<Option<String>> {
        read_trimmed(&self.sys.join("class/block").join(name).join("device/serial"))
    }
}

/// The id as the controller has it.
fn serial(id: &DiskId) -> String {
    id.as_str().replacen('-', "", 1)
}

fn name_of(path: &Path) -> String {
    path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default()
}

/// The names in a folder, in order; none if it is not there.
fn names_in(folder: &Path) -> Result<BTreeSet<String>> {
    let doing = || format!("reading {}", folder.display());
    match fs::read_dir(folder) {
        Ok(entries) => entries
            .map(|entry| {
                Ok(entry.map_err(|e| io_error(&doing(), &e))?.file_name().to_string_lossy().into_owned())
            })
            .collect(),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(BTreeSet::new()),
        Err(e) => Err(io_error(&doing(), &e)),
    }
}

/// An attribute of sysfs; `None`: there is none, or its device has gone.
fn read_trimmed(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text.trim().to_owned()).filter(|text| !text.is_empty())),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => Ok(None),
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(io_error(&format!("reading {}", path.display()), &e)),
    }
}

/// The decimal number that a text begins with, as text, and what follows it.
fn number(text: &str) -> Option<(&str, &str)> {
    let end = text.bytes().position(|b| !b.is_ascii_digit()).unwrap_or(text.len());
    (end > 0).then(|| text.split_at(end))
}

/// The block device of what sysfs calls a namespace: nvme1n1 is one; nvme0c1n1 is a path of the kernel's own multipath, and
/// nvme0n1 the device over its paths. Anything else, such as partitions and character devices, is none.
fn block_device(name: &str) -> Option<String> {
    let (subsystem, rest) = number(name.strip_prefix("nvme")?)?;
    let rest = match rest.strip_prefix('c') {
        Some(path) => number(path)?.1,
        None => rest,
    };
    match number(rest.strip_prefix('n')?)? {
        (namespace, "") => Some(format!("nvme{subsystem}n{namespace}")),
        _more => None,
    }
}

/// Whether this is the name of a namespace's block device, the whole of it.
fn is_namespace(name: &str) -> bool {
    block_device(name).is_some_and(|device| device == name)
}

fn is_loop(name: &str) -> bool {
    name.strip_prefix("loop").and_then(number).is_some_and(|(_, rest)| rest.is_empty())
}

/// What a namespace offers of reservations: its RESCAP, by Identify Namespace. `None`: the device is no NVMe namespace.
/// [`Rescap`] says what it means.
pub fn rescap(device: &Path) -> Result<Option<u8>> {
    let doing = || format!("asking {} what it is", device.display());
    let Some(namespace) = sys::Namespace::open(device).map_err(|e| io_error(&doing(), &e))? else {
        return Ok(None);
    };
    let mut identified = [0; sys::IDENTIFY_BYTES];
    let status = namespace.identify(&mut identified).map_err(|e| io_error(&doing(), &e))?;
    if status.code() != sys::Status::SUCCESS {
        return Err(Error::io(format!("{}: the device answered with status {:#x}", doing(), status.code())));
    }
    Ok(Some(rescap_in(&identified)))
}

fn rescap_in(identified: &[u8; sys::IDENTIFY_BYTES]) -> u8 {
    const AT: usize = 31;
    identified[AT]
}

/// The Reservation Capabilities of a namespace.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rescap(pub u8);

impl Rescap {
    /// Of its bits.
    const NAMES: [&str; 8] = [
        "Persist Through Power Loss",
        "Write Exclusive",
        "Exclusive Access",
        "Write Exclusive Registrants Only",
        "Exclusive Access Registrants Only",
        "Write Exclusive All Registrants",
        "Exclusive Access All Registrants",
        "Ignore Existing Key as of NVMe 1.3",
    ];

    fn has(self, bit: u8) -> bool {
        self.0 & (1 << bit) != 0
    }

    /// No reservations at all.
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// Registrations can be kept through a loss of power.
    pub fn persists(self) -> bool {
        self.has(0)
    }

    /// The type that the fence needs.
    pub fn write_exclusive(self) -> bool {
        self.has(1)
    }

    /// A host can replace its key without knowing it.
    pub fn ignores_existing_key(self) -> bool {
        self.has(7)
    }

    /// What is offered, for people.
    pub fn offered(self) -> Vec<&'static str> {
        (0..8).zip(Rescap::NAMES).filter(|(bit, _)| self.has(*bit)).map(|(_, name)| name).collect()
    }
}

#[cfg(test)]
mod tests;
