//! `shardfs umount`: takes a ShardFS mount away, also a dead one.

use std::path::PathBuf;
use std::time::Duration;

use crate::failure::{Failure, Result};
use crate::output::note;
use crate::system::{self, MountHealth, UnmountError};

/// A mount that is busy for shorter is no news.
const BUSY_GRACE: Duration = Duration::from_secs(1);
/// Between two tries.
const POLL: Duration = Duration::from_millis(50);

/// `shardfs umount`.
#[derive(clap::Args, Debug)]
#[command(
    after_help = "A mount whose daemon was killed answers \"Transport endpoint is not connected\" to everything; this takes it away, whatever \
still has files open there. A live mount that is in use is not touched, and you are told by whom; --force detaches it: who \
uses it can go on until they close their files, and nobody else finds it.

Examples:
  shardfs umount ./mnt
  shardfs umount --force ./mnt"
)]
pub struct Args {
    /// The mount point
    mount_point: PathBuf,
    /// Even if it is in use
    #[arg(long, short)]
    force: bool,
}

/// Runs.
pub async fn run(args: Args) -> Result<()> {
    let mount_point = system::mount_point_path(&args.mount_point)?;
    let Some(entry) = system::mount_at(&mount_point)? else {
        return Err(Failure::new(format!("nothing is mounted on {}", mount_point.display())));
    };
    if !entry.fs_type.starts_with("fuse.shardfs") {
        return Err(Failure::new(format!(
            "{} is no ShardFS mount but {}",
            mount_point.display(),
            entry.fs_type
        ))
        .hint("use umount(8)"));
    }
    if system::mend_stale_mount(&mount_point).await? {
        note(format!("{} was dead (its daemon is gone): unmounted", mount_point.display()));
        return Ok(());
    }
    if !args.force && system::probe(&mount_point).await? == MountHealth::Hanging {
        return Err(Failure::new(format!("{} does not answer: it waits for a node", mount_point.display()))
            .hint("bring the nodes back, or detach it with --force"));
    }
    let deadline = tokio::time::Instant::now() + BUSY_GRACE;
    loop {
        let path = mount_point.clone();
        let attempt = tokio::task::spawn_blocking(move || system::unmount(&path, args.force)).await;
        match attempt.map_err(|e| Failure::new(e.to_string()))? {
            Ok(()) => return Ok(()),
            Err(UnmountError::Busy) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(POLL).await
            }
            Err(other) => return Err(other.into_failure(&mount_point)),
        }
    }
}
