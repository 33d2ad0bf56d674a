//! Whether the mount answers, asked by a process of its own.
//!
//! Invariant: once it is mounted, the daemon makes no call into its own mount. When a request was taken from the kernel and is not
//! answered, no signal ends the call that made it, SIGKILL neither; and a thread of the daemon's that waits in one keeps /dev/fuse open,
//! whose close would end it: such a daemon could not be killed. A process beside it has nothing of the daemon open, and waits no
//! longer than the daemon lives.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::{ExitCode, Stdio};

use rustix::fs::{AtFlags, CWD, StatxFlags, statx};
use tokio::process::Command;

/// What the program is called when it is to ask.
const NAME: &str = "shardfsd-probe";
/// Its status when the answer was an error whose number is none of a status.
const EXIT_OTHER: u8 = 255;

/// Whether this name of the program asks for a probe.
pub fn is_probe(program: &OsString) -> bool {
    Path::new(program).file_name().is_some_and(|name| name == NAME)
}

/// The probe: asks for the attributes of a path, and ends with the number of the error, or 0.
pub fn run(words: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Some(path) = words.into_iter().next().map(PathBuf::from) else { return ExitCode::from(EXIT_OTHER) };
    // What `ps` and `pidof` show; it stays what it is if it cannot be set.
    let _ = rustix::thread::set_name(c"shardfsd-probe");
    // Not from the kernel's memory.
    match statx(CWD, path, AtFlags::STATX_FORCE_SYNC, StatxFlags::BASIC_STATS) {
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => ExitCode::from(u8::try_from(error.raw_os_error()).unwrap_or(EXIT_OTHER)),
    }
}

/// What the path answered, when it has.
///
/// # Errors
/// It cannot be asked.
pub async fn answer(path: &Path) -> std::io::Result<std::io::Result<()>> {
    // The program itself, whatever is at its path by now.
    let mut command = Command::new("/proc/self/exe");
    command.arg0(NAME).arg(path).env_clear().kill_on_drop(true);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let status = command.status().await?;
    match status.code() {
        Some(0) => Ok(Ok(())),
        Some(number) => Ok(Err(std::io::Error::from_raw_os_error(number))),
        None => Err(std::io::Error::other(format!("the probe ended by {status}"))),
    }
}
