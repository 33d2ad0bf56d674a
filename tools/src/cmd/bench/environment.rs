//! What a figure depends on beside the program: machine, kernel, filesystems, date, version.

use std::os::linux::fs::MetadataExt;
use std::path::Path;

use anyhow::{Context as _, Result};
use serde::Serialize;
use shardfs_proto::types::Timestamp;

/// The head of a report.
#[derive(Clone, Debug, Serialize)]
pub struct Environment {
    /// Version of this program.
    pub version: String,
    /// When the run began, UTC.
    pub started: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory, bytes.
    pub memory_bytes: u64,
    /// Release of the kernel.
    pub kernel: String,
}

impl Environment {
    /// Of here and now.
    pub fn look(now: Timestamp) -> Environment {
        let info = rustix::system::sysinfo();
        Environment {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            started: utc(now),
            cpus: std::thread::available_parallelism().map_or(1, |n| n.get()),
            memory_bytes: info.totalram as u64 * u64::from(info.mem_unit),
            kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        }
    }

    /// One line for people.
    pub fn line(&self) -> String {
        format!(
            "shardfs {} on {} CPUs, {} GiB, Linux {}, {}",
            self.version,
            self.cpus,
            (self.memory_bytes as f64 / f64::from(1 << 30)).round(),
            self.kernel,
            self.started
        )
    }
}

/// The type of the filesystem that holds `path`, as /proc/self/mountinfo has it.
pub fn filesystem_type(path: &Path) -> Result<String> {
    let device =
        std::fs::metadata(path).with_context(|| format!("cannot look at {}", path.display()))?.st_dev();
    let table =
        std::fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let canonical = path.canonicalize().with_context(|| format!("cannot resolve {}", path.display()))?;
    Ok(type_in(&table, rustix::fs::major(device), rustix::fs::minor(device), &canonical)
        .unwrap_or("unknown")
        .to_owned())
}

/// By device number, as two mounts may lie upon each other; by the longest mount point for filesystems whose
/// files have another device number than their mount.
fn type_in<'a>(table: &'a str, major: u32, minor: u32, path: &Path) -> Option<&'a str> {
    let device = format!("{major}:{minor}");
    let mut by_path: Option<(usize, &str)> = None;
    for line in table.lines() {
        let mut halves = line.splitn(2, " - ");
        let (Some(left), Some(right)) = (halves.next(), halves.next()) else { continue };
        let mut fields = left.split(' ').skip(2);
        let (Some(number), Some(_root), Some(point)) = (fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        let Some(kind) = right.split(' ').next() else { continue };
        if number == device {
            return Some(kind);
        }
        if path.starts_with(unescape(point)) && by_path.is_none_or(|(length, _)| length <= point.len()) {
            by_path = Some((point.len(), kind));
        }
    }
    by_path.map(|(_, kind)| kind)
}

/// mountinfo writes blanks and backslashes as three octal digits.
fn unescape(point: &str) -> String {
    let mut text = String::new();
    let mut rest = point;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        match rest.get(at + 1..at + 4).and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) => {
                text.push(char::from(byte));
                rest = &rest[at + 4..];
            }
            None => {
                text.push('\\');
                rest = &rest[at + 1..];
            }
        }
    }
    text + rest
}

/// `2026-11-21T02:30:00Z`; days to a date by counting eras of 400 years from 1 March.
fn utc(time: Timestamp) -> String {
    let (days, second) = (time.seconds().div_euclid(86_400), time.seconds().rem_euclid(86_400));
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", second / 3_600, second / 60 % 60, second % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_228_200, "2026-11-21T02:30:00Z"),
            (-1, "1969-12-31T23:59:59Z"),
        ] {
            assert_eq!(utc(Timestamp::new(seconds, 0).unwrap()), text);
        }
    }

    #[test]
    fn mountinfo() {
        let table = "21 1 254:0 / / rw,relatime - ext4 /dev/vda rw\n\
                     22 21 0:20 / /proc rw - proc proc rw\n\
                     90 21 0:77 / /mnt/with\\040blank rw shared:3 - fuse.shardfs shardfs rw\n\
                     91 21 0:80 / /mnt/b rw - btrfs /dev/vdb rw\n";
        assert_eq!(type_in(table, 254, 0, Path::new("/etc")), Some("ext4"));
        assert_eq!(type_in(table, 0, 77, Path::new("/mnt/with blank/x")), Some("fuse.shardfs"));
        assert_eq!(type_in(table, 0, 99, Path::new("/mnt/with blank/x")), Some("fuse.shardfs"));
        assert_eq!(type_in(table, 0, 99, Path::new("/mnt/b/c")), Some("btrfs"));
        assert_eq!(type_in("garbage\n", 0, 99, Path::new("/mnt/b/c")), None);
    }

    #[test]
    fn this_machine() {
        let here = Environment::look(shardfs_proto::types::clock::now());
        assert!(here.cpus > 0 && here.memory_bytes > 0 && !here.kernel.is_empty());
        assert_eq!(filesystem_type(Path::new("/proc")).unwrap(), "proc");
    }
}
