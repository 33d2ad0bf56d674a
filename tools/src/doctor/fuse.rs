//! FUSE: the device, the helper that unmounts for users, and how large a request may be.

use std::fs::OpenOptions;
use std::io::ErrorKind;

use super::{Check, programs};

/// Pages of a request with which writes of a mebibyte are not cut.
const PAGES_WANTED: u64 = 256;

/// Looks.
pub fn checks() -> Vec<Check> {
    vec![
        device(),
        helper(),
        pages(std::fs::read_to_string("/proc/sys/fs/fuse/max_pages_limit").ok().as_deref()),
    ]
}

fn device() -> Check {
    const NAME: &str = "/dev/fuse";
    match OpenOptions::new().read(true).write(true).open(NAME) {
        Ok(_) => Check::ok(NAME, "can be opened"),
        Err(e) if e.kind() == ErrorKind::NotFound => Check::fail(
            NAME,
            "is missing: nothing can be mounted",
            "load the module: modprobe fuse (in a container: --device /dev/fuse --cap-add SYS_ADMIN)",
        ),
        Err(e) => Check::fail(
            NAME,
            format!("cannot be opened: {e}"),
            "run as root, or give this user access to /dev/fuse",
        ),
    }
}

fn helper() -> Check {
    const NAME: &str = "fusermount3";
    match programs::find(NAME) {
        Some(path) => Check::ok(NAME, path.display().to_string()),
        None => Check::warn(
            NAME,
            "is missing: only root can mount and unmount",
            "install it (Debian: apt-get install fuse3)",
        ),
    }
}

fn pages(limit: Option<&str>) -> Check {
    const NAME: &str = "fuse requests";
    match limit.and_then(|text| text.trim().parse::<u64>().ok()) {
        None => Check::ok(NAME, "1 MiB (this kernel has no limit to set)"),
        Some(pages) if pages >= PAGES_WANTED => Check::ok(NAME, format!("{pages} pages")),
        Some(pages) => Check::warn(
            NAME,
            format!("{pages} pages: large reads and writes are cut into smaller ones"),
            format!("sysctl fs.fuse.max_pages_limit={PAGES_WANTED}"),
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn limits_are_judged() {
        for (text, outcome) in [
            (None, Outcome::Ok),
            (Some("256\n"), Outcome::Ok),
            (Some("32\n"), Outcome::Warn),
            (Some("what"), Outcome::Ok),
        ] {
            assert_eq!(pages(text).outcome, outcome, "{text:?}");
        }
    }
}
