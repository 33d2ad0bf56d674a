//! Takes a cluster down, whatever becomes of the test program.
//!
//! A guard is a process of its own that waits for the end of a pipe whose other end only the test program
//! holds. So the clean-up runs once, in one place, whether a test passes, panics, or is killed.
//!
//! Invariants: the guard touches nothing outside its root folder, no process whose command line does not
//! name that folder, and no loop device whose backing file lies elsewhere.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, Once};

/// Guards whose clusters nobody dropped: those of shared clusters.
static AT_EXIT: Mutex<Vec<Child>> = Mutex::new(Vec::new());

/// Takes a cluster down when it is dropped or the program ends.
#[derive(Debug)]
pub struct Guard {
    child: Option<Child>,
}

impl Guard {
    /// Starts watching over `root`, whose cluster is `root/c`. `bin` holds the programs; copies of the logs
    /// go to `logs`.
    pub fn start(root: &Path, bin: &Path, logs: &Path) -> Guard {
        let child = Command::new("setsid")
            .args(["bash", "-c", include_str!("guard.sh"), "shardfs-test-guard"])
            .env("SHARDFS_TEST_ROOT", root)
            .env("SHARDFS_TEST_BIN", bin)
            .env("SHARDFS_TEST_LOGS", logs)
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("setsid and bash are there");
        Guard { child: Some(child) }
    }

    /// Leaves the clean-up to the end of the program.
    pub fn at_exit(mut self) {
        static REGISTERED: Once = Once::new();
        if let Some(child) = self.child.take() {
            AT_EXIT.lock().unwrap().push(child);
        }
        REGISTERED.call_once(|| {
            // SAFETY: the handler is a plain function that takes no arguments and does not unwind: it only
            // waits for processes.
            unsafe { libc::atexit(finish_all) };
        });
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            finish(child);
        }
    }
}

/// Closes the pipe and waits until the guard has done its work.
fn finish(mut child: Child) {
    drop(child.stdin.take());
    if let Err(error) = child.wait() {
        eprintln!("waiting for the guard of a test cluster: {error}");
    }
}

extern "C" fn finish_all() {
    let children = match AT_EXIT.lock() {
        Ok(mut children) => std::mem::take(&mut *children),
        Err(_) => return,
    };
    children.into_iter().for_each(finish);
}
