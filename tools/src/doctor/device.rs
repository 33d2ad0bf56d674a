//! A block device that is to become a volume: what it is, what it holds, who uses it; and, if a second path to it is named,
//! whether it keeps its reservations.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use shardfs_node::volume::device::{self, Holds, Inspection};
use shardfs_node::volume::fence::reservation::conformance::{self, Held, Step, Verdict};
use shardfs_node::volume::nvme::{self, Rescap};
use shardfs_node::volume::{LOOP_BYTES_MIN, mounts};
use shardfs_proto::types::{Reason, Result};

use super::Check;
use crate::size;

/// What the check of two paths may do.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// Try a device that holds something: what is written is what was there, but somebody may be using it.
    pub content: bool,
    /// Remove all reservations and registrations that are there, whoever has them.
    pub clear: bool,
}

/// Looks at a device. Changes nothing.
pub fn checks(path: &Path) -> Vec<Check> {
    let name = path.display().to_string();
    let seen = match device::inspect(path) {
        Ok(seen) => seen,
        Err(error) => {
            return vec![Check::fail(
                &name,
                error.to_string(),
                "give a whole block device, such as /dev/sdb",
            )];
        }
    };
    let mut checks = vec![what(&name, &seen), users(&name, &seen.device)];
    checks.extend(offers(&name, nvme::rescap(&seen.device)));
    checks.push(reservations(&name, path));
    checks
}

fn what(name: &str, seen: &Inspection) -> Check {
    let detail = format!("{}, {}", size::human(seen.size_bytes), said(&seen.holds));
    if seen.size_bytes < LOOP_BYTES_MIN {
        return Check::fail(name, detail, format!("a volume has {} at least", size::human(LOOP_BYTES_MIN)));
    }
    match seen.holds {
        Holds::Nothing | Holds::HalfMade | Holds::Volume(_) => Check::ok(name, detail),
        Holds::OtherExt4(_) | Holds::Unknown => Check::warn(
            name,
            detail,
            "no volume is ever made over it; if it is of no use, `wipefs --all` and zeros over its first MiB",
        ),
    }
}

fn said(holds: &Holds) -> String {
    match holds {
        Holds::Nothing => "empty".into(),
        Holds::HalfMade => "holds a volume whose making was cut off".into(),
        Holds::Volume(label) => format!("holds the volume {label}"),
        Holds::OtherExt4(label) => format!("holds an ext4 labelled {label:?}"),
        Holds::Unknown => "holds something unknown".into(),
    }
}

/// Who has it open for itself, on this machine.
fn users(name: &str, device: &Path) -> Check {
    let name = format!("{name} users");
    match in_use(device) {
        Ok(None) => Check::ok(&name, "none on this machine"),
        Ok(Some(by)) => {
            Check::warn(&name, by, "if that is a node that serves it, all is well; nobody else may")
        }
        Err(e) => Check::warn(&name, e.to_string(), "run as root"),
    }
}

/// `None`: nobody.
fn in_use(device: &Path) -> std::io::Result<Option<String>> {
    let number = fs::metadata(device)?.rdev();
    let number = (rustix::fs::major(number), rustix::fs::minor(number));
    let mounted = mounts::list().map_err(|e| std::io::Error::other(e.to_string()))?;
    if let Some(mount) = mounted.into_iter().find(|mount| mount.device == number) {
        return Ok(Some(format!("is mounted at {}", mount.at.display())));
    }
    // Of a partition too, another mount namespace, md, dm: whatever claims it.
    match fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(device) {
        Ok(_) => Ok(None),
        Err(e) if e.kind() == ErrorKind::ResourceBusy => {
            Ok(Some("is in use: a partition of it, RAID, LVM, or a mount in another namespace".into()))
        }
        Err(e) => Err(e),
    }
}

/// What an NVMe namespace says that it offers; nothing of other devices.
fn offers(name: &str, rescap: Result<Option<u8>>) -> Option<Check> {
    const EBS: &str = "use a namespace with Write Exclusive. On EC2: an io2 volume with Multi-Attach enabled, at a Nitro instance; AWS \
                       offers reservations for volumes made after September 18, 2023, and for older ones once they were detached from \
                       all instances and attached again. Cross-check: nvme id-ns -H DEVICE";
    let name = format!("{name} NVMe");
    let rescap = match rescap {
        Ok(None) => return None,
        Ok(Some(byte)) => Rescap(byte),
        Err(error) => {
            return Some(Check::warn(&name, error.to_string(), "run as root; see the kernel's log"));
        }
    };
    if rescap.is_none() {
        return Some(Check::fail(&name, "the namespace offers no reservations", EBS));
    }
    let offered = rescap.offered().join(", ");
    if !rescap.write_exclusive() {
        return Some(Check::fail(&name, format!("no Write Exclusive among what is offered: {offered}"), EBS));
    }
    let mut detail = format!("offers {offered}");
    if !rescap.persists() {
        detail.push_str(
            "; reservations end with a loss of the device's power: nodes notice that and take them again",
        );
    }
    if rescap.ignores_existing_key() {
        return Some(Check::ok(&name, detail));
    }
    Some(Check::warn(
        &name,
        format!("{detail}; not Ignore Existing Key as of NVMe 1.3, with which a node changes its key"),
        "try it before you rely on it: DEPLOYMENT.md, \"What to check first on real EBS\", the step with another key",
    ))
}

fn reservations(name: &str, path: &Path) -> Check {
    let name = format!("{name} reservations");
    match conformance::capability(path) {
        Ok(Held::No) => Check::ok(&name, "are known; nobody holds the device"),
        Ok(Held::By(key)) => {
            Check::ok(&name, format!("are known; the device is held under the key {key:#018x}"))
        }
        Ok(Held::Unknown) => Check::ok(&name, "are known; this kernel cannot tell who holds the device"),
        Err(error) if error.reason() == Reason::Unsupported => Check::fail(
            &name,
            error.to_string(),
            "use a device with persistent reservations (EBS io2, SCSI, NVMe), or `volume add --allow-unfenced`, which lets an \
             old primary destroy the volume",
        ),
        Err(error) => Check::fail(&name, error.to_string(), "run as root; see the kernel's log"),
    }
}

/// Tries the reservations from two paths.
pub fn conforms(first: &Path, second: &Path, allowed: Allowed) -> Vec<Check> {
    const NAME: &str = "two paths";
    if let Err(refused) = may_be_tried(first, second, allowed) {
        return vec![refused];
    }
    match conformance::check(first, second, allowed.clear) {
        Ok(steps) => rows(&steps),
        Err(error) => vec![Check::fail(NAME, error.to_string(), "run as root; see the kernel's log")],
    }
}

fn may_be_tried(first: &Path, second: &Path, allowed: Allowed) -> Result<(), Check> {
    const NAME: &str = "two paths";
    let inspected = |path: &Path| {
        device::inspect(path).map_err(|error| {
            Check::fail(
                NAME,
                error.to_string(),
                "give two whole block devices, such as /dev/sdb and /dev/sdc",
            )
        })
    };
    let (one, other) = (inspected(first)?, inspected(second)?);
    if one.device == other.device {
        return Err(Check::fail(
            NAME,
            format!("{} and {} are one path", first.display(), second.display()),
            "name a path of another initiator to the same disk",
        ));
    }
    if let (Some(a), Some(b)) = (wwid(&one.device), wwid(&other.device))
        && a != b
    {
        return Err(Check::fail(
            NAME,
            format!("{} is {a}, {} is {b}: two disks", first.display(), second.display()),
            "name a second path to the same disk",
        ));
    }
    for seen in [&one, &other] {
        match in_use(&seen.device) {
            Ok(None) => {}
            Ok(Some(by)) => {
                return Err(Check::fail(
                    NAME,
                    format!("{} {by}: not tried", seen.device.display()),
                    "stop what uses it; a device in use is never tried",
                ));
            }
            Err(e) => {
                return Err(Check::fail(NAME, format!("{}: {e}", seen.device.display()), "run as root"));
            }
        }
    }
    if one.holds != Holds::Nothing && !allowed.content {
        return Err(Check::fail(
            NAME,
            format!(
                "{} {}: not tried, for another machine may be using it",
                first.display(),
                said(&one.holds)
            ),
            "stop the nodes that have it and give --force; nothing of its content is changed",
        ));
    }
    Ok(())
}

/// What a disk calls itself, on whichever path.
fn wwid(device: &Path) -> Option<String> {
    let folder = Path::new("/sys/block").join(device.file_name()?);
    let read = |file: &str| fs::read_to_string(folder.join(file)).ok();
    let text = read("device/wwid").or_else(|| read("wwid"))?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// One row for the steps of one name.
fn rows(steps: &[Step]) -> Vec<Check> {
    let mut rows: Vec<Check> = Vec::new();
    for step in steps {
        let row = row(step);
        match rows.last_mut() {
            Some(last) if last.check == row.check && last.outcome == row.outcome => {
                last.detail = format!("{}; {}", last.detail, row.detail);
            }
            _ => rows.push(row),
        }
    }
    rows
}

fn row(step: &Step) -> Check {
    let name = format!("reservations: {}", step.name);
    match step.verdict {
        Verdict::Ok => Check::ok(&name, &step.detail),
        // What a fence does without is nothing to mend.
        Verdict::Poor => Check::new(&name, super::Outcome::Warn, &step.detail, ""),
        Verdict::Broken if step.name == "free" => {
            Check::fail(&name, &step.detail, "stop the nodes; what is left of none is removed by --clear")
        }
        Verdict::Broken => Check::fail(
            &name,
            &step.detail,
            "do not use this device for a volume with more than one node; see the kernel's log and the target's settings",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn steps_become_rows() {
        let step = |name, verdict, detail: &str| Step { name, verdict, detail: detail.into() };
        let rows = rows(&[
            step("register", Verdict::Ok, "one"),
            step("register", Verdict::Ok, "two"),
            step("preempt and abort", Verdict::Poor, "hangs"),
            step("late write", Verdict::Broken, "taken"),
        ]);
        let seen: Vec<_> = rows.iter().map(|r| (r.check.as_str(), r.outcome, r.detail.as_str())).collect();
        assert_eq!(
            seen,
            [
                ("reservations: register", Outcome::Ok, "one; two"),
                ("reservations: preempt and abort", Outcome::Warn, "hangs"),
                ("reservations: late write", Outcome::Fail, "taken"),
            ]
        );
        assert!(!rows[2].advice.is_empty());
    }

    #[test]
    fn what_a_device_holds_is_judged() {
        let seen = |size_bytes, holds| Inspection { device: "/dev/x".into(), size_bytes, holds };
        assert_eq!(what("x", &seen(1 << 30, Holds::Nothing)).outcome, Outcome::Ok);
        assert_eq!(what("x", &seen(1 << 20, Holds::Nothing)).outcome, Outcome::Fail);
        assert_eq!(what("x", &seen(1 << 30, Holds::Unknown)).outcome, Outcome::Warn);
        assert_eq!(what("x", &seen(1 << 30, Holds::OtherExt4("root".into()))).outcome, Outcome::Warn);
        assert_eq!(what("x", &seen(1 << 30, Holds::Volume("sfs-vol-1".into()))).outcome, Outcome::Ok);
    }

    #[test]
    fn what_a_namespace_offers_is_judged() {
        let outcome = |byte| offers("x", Ok(Some(byte))).unwrap().outcome;
        assert_eq!(outcome(0xFF), Outcome::Ok);
        assert_eq!(outcome(0x82), Outcome::Ok);
        assert_eq!(outcome(0x03), Outcome::Warn);
        assert_eq!(outcome(0x80 | 0x7C), Outcome::Fail);
        let none = offers("x", Ok(Some(0))).unwrap();
        assert_eq!(none.outcome, Outcome::Fail);
        assert!(none.advice.contains("Multi-Attach"));
        assert_eq!(offers("x", Ok(None)), None);
        let unread = offers("x", Err(shardfs_proto::types::Error::io("no"))).unwrap();
        assert_eq!(unread.outcome, Outcome::Warn);
    }

    #[test]
    fn a_path_is_not_tried_against_itself() {
        let refused = conforms(Path::new("/dev/null"), Path::new("/dev/null"), Allowed::default());
        assert_eq!(refused[0].outcome, Outcome::Fail);
    }
}
