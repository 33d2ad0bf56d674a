//! Loop devices, on which loop volumes stand.

use std::fs::OpenOptions;
use std::io::ErrorKind;

use super::Check;

/// Looks. That one works, and does direct I/O, is seen by [`super::ext4`].
pub fn check() -> Check {
    const NAME: &str = "loop devices";
    match OpenOptions::new().read(true).write(true).open("/dev/loop-control") {
        Ok(_) => {
            let used = crate::system::loop_devices().map_or(0, |devices| devices.len());
            Check::ok(NAME, format!("/dev/loop-control can be opened; {used} in use"))
        }
        Err(e) if e.kind() == ErrorKind::NotFound => Check::fail(
            NAME,
            "/dev/loop-control is missing: there are no loop volumes",
            "modprobe loop, or use volumes of kind device or dir",
        ),
        Err(e) => Check::fail(
            NAME,
            format!("/dev/loop-control cannot be opened: {e}"),
            "run as root, or use volumes of kind dir",
        ),
    }
}
