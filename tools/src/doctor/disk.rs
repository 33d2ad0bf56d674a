//! How long a sync takes in a folder: what every durable write waits for.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shardfs_proto::types::clock;

use super::{Check, ms, quantile};

/// Syncs that are timed.
const SYNCS: usize = 50;
/// Bytes that each makes durable.
const BYTES: usize = 4096;
/// Slower ones are felt at every file that is closed with fsync.
const SLOW: Duration = Duration::from_millis(20);

/// Tries; makes a file and removes it.
pub fn check(folder: &Path) -> Check {
    const NAME: &str = "disk sync";
    match times(folder) {
        Ok(times) => judge(NAME, folder, times),
        Err(e) => Check::fail(
            NAME,
            format!("{}: {e}", folder.display()),
            "name a folder that can be written: --folder",
        ),
    }
}

/// Removed when it is dropped.
struct Scratch(PathBuf);

impl Drop for Scratch {
    fn drop(&mut self) {
        // There is nobody to tell; it is named after what made it.
        let _ = fs::remove_file(&self.0);
    }
}

fn times(folder: &Path) -> std::io::Result<Vec<Duration>> {
    let path = folder.join(format!(".shardfs-doctor.{:016x}", fastrand::u64(..)));
    let file = File::create_new(&path)?;
    let _scratch = Scratch(path);
    let mut times = Vec::with_capacity(SYNCS);
    for n in 0..SYNCS {
        let begun = clock::monotonic();
        file.write_all_at(&[n as u8; BYTES], (n * BYTES) as u64)?;
        file.sync_data()?;
        times.push(begun.elapsed());
    }
    Ok(times)
}

fn judge(name: &str, folder: &Path, mut times: Vec<Duration>) -> Check {
    times.sort_unstable();
    let (median, worst) = (quantile(&times, 0.5), quantile(&times, 0.95));
    let detail = format!(
        "{}: 4 KiB and fdatasync take {}, 1 of 20 more than {}",
        folder.display(),
        ms(median),
        ms(worst)
    );
    if median > SLOW {
        return Check::warn(name, detail, "use a faster disk, or one with power-loss protection");
    }
    Check::ok(name, detail)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn slow_disks_are_told() {
        let folder = Path::new("/x");
        assert_eq!(judge("n", folder, vec![Duration::from_micros(300); 50]).outcome, Outcome::Ok);
        assert_eq!(judge("n", folder, vec![Duration::from_millis(30); 50]).outcome, Outcome::Warn);
    }

    #[test]
    fn it_leaves_nothing_behind() {
        let dir = tempfile::tempdir().unwrap();
        assert_ne!(check(dir.path()).outcome, Outcome::Fail);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        assert_eq!(check(&dir.path().join("none")).outcome, Outcome::Fail);
    }
}
