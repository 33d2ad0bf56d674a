//! Ends what runs and takes away what was left: the one way down, with or without a supervisor.
//!
//! Order: the mount (so that nothing writes any more), its daemon, the nodes, then volumes that a killed node left
//! mounted and their loop devices. What is touched by force lies inside the cluster's folder. Every step
//! is idempotent: a `down` that was cut off is repeated.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;

use super::housekeeping::absent_is_fine;
use super::member::MOUNT;
use super::process::Watched;
use super::state::{Layout, ProcessRecord, Processes, Settings};
use crate::failure::{Failure, OrFail, Result};
use crate::system::{self, UnmountError};

/// How long a node may take to stop in order: it flushes its shards.
const NODE_STOP_MAX: Duration = Duration::from_secs(30);
/// How long the mount daemon may take after its mount is gone.
const MOUNT_STOP_MAX: Duration = Duration::from_secs(10);
/// The same with `force`: while a detached mount is in use, its daemon waits for the last user, for ever.
const MOUNT_STOP_FORCED_MAX: Duration = Duration::from_millis(500);
/// How long the kernel may take to unmount before it counts as hanging.
const UNMOUNT_MAX: Duration = Duration::from_secs(20);
/// A mount that is busy for shorter is no news: an indexer, a shell's prompt.
const BUSY_GRACE: Duration = Duration::from_secs(1);
/// Between two looks.
const POLL: Duration = Duration::from_millis(50);

/// Stops everything that the records name. The mount first: if that is refused, nothing else has happened.
pub async fn stop_everything(
    layout: &Layout,
    settings: &Settings,
    processes: &Processes,
    force: bool,
) -> Result<()> {
    let daemon = processes.members.get(MOUNT);
    if let Some(mount) = &settings.mount {
        take_mount_away(mount, daemon, force).await?;
    }
    let nodes = processes.members.iter().filter(|(name, _)| *name != MOUNT);
    let stops = nodes.map(|(name, record)| async move {
        stop_process(record, NODE_STOP_MAX).await.with_context(|| format!("cannot stop {name}"))
    });
    futures::future::try_join_all(stops).await?;
    let layout = layout.clone();
    tokio::task::spawn_blocking(move || leftovers(&layout)).await.map_err(|e| Failure::new(e.to_string()))?
}

/// Unmounts the cluster and ends the daemon.
async fn take_mount_away(mount: &Path, daemon: Option<&ProcessRecord>, force: bool) -> Result<()> {
    let running = daemon.filter(|d| d.identity.is_running());
    // Of a daemon that runs nothing is asked: with its nodes gone it does not answer, and who waits for it keeps the mount in use.
    if running.is_none() {
        system::mend_stale_mount(mount).await.or_else(|e| if force { Ok(false) } else { Err(e) })?;
    }
    // A live mount there that is not our daemon's is somebody else's.
    if let Some(daemon) = running {
        let ours = system::mount_at(mount)?.is_some_and(|m| m.fs_type.starts_with("fuse"));
        if ours {
            // A frozen daemon could not answer the unmount.
            if let Some(process) = watch(daemon)? {
                process.signal(Signal::CONT)?;
            }
            match unmount_in_time(mount).await {
                Ok(()) | Err(UnmountError::NotMounted) => {}
                Err(_) if force => detach(mount).await?,
                Err(other) => return Err(other.into_failure(mount)),
            }
        }
        // It ends by itself when its mount is gone.
        let patience = if force { MOUNT_STOP_FORCED_MAX } else { MOUNT_STOP_MAX };
        if !ends_within(daemon, patience).await? {
            stop_process(daemon, patience).await.context("cannot stop the mount daemon")?;
        }
        system::mend_stale_mount(mount).await?;
    }
    Ok(())
}

async fn unmount_in_time(mount: &Path) -> std::result::Result<(), UnmountError> {
    let deadline = tokio::time::Instant::now() + BUSY_GRACE;
    loop {
        let path = mount.to_owned();
        let attempt = tokio::task::spawn_blocking(move || system::unmount(&path, false));
        let result = match tokio::time::timeout(UNMOUNT_MAX, attempt).await {
            Ok(Ok(result)) => result,
            Ok(Err(e)) => Err(UnmountError::Other(Failure::new(e.to_string()))),
            Err(_) => Err(UnmountError::Other(
                Failure::new(format!(
                    "{} does not unmount: something waits for a node that does not answer",
                    mount.display()
                ))
                .hint("--force detaches it"),
            )),
        };
        match result {
            Err(UnmountError::Busy) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(POLL).await
            }
            other => return other,
        }
    }
}

async fn detach(mount: &Path) -> Result<()> {
    let path = mount.to_owned();
    let result = tokio::task::spawn_blocking(move || system::unmount(&path, true)).await;
    match result.map_err(|e| Failure::new(e.to_string()))? {
        Ok(()) | Err(UnmountError::NotMounted) => Ok(()),
        Err(other) => Err(other.into_failure(mount)),
    }
}

/// Ends a process: TERM, and KILL if that does not help in time.
pub async fn stop_process(record: &ProcessRecord, patience: Duration) -> Result<()> {
    let Some(process) = watch(record)? else { return Ok(()) };
    process.signal(Signal::TERM)?;
    // A frozen process takes its TERM when it goes on.
    process.signal(Signal::CONT)?;
    if tokio::time::timeout(patience, process.ended()).await.is_err() {
        process.signal(Signal::KILL)?;
        process.ended().await?;
    }
    Ok(())
}

async fn ends_within(record: &ProcessRecord, patience: Duration) -> Result<bool> {
    let Some(process) = watch(record)? else { return Ok(true) };
    Ok(tokio::time::timeout(patience, process.ended()).await.is_ok())
}

fn watch(record: &ProcessRecord) -> Result<Option<Watched>> {
    Watched::new(record.identity.clone()).map_err(Failure::from)
}

/// Unmounts and detaches what killed nodes left behind. Blocking. All nodes must have ended.
fn leftovers(layout: &Layout) -> Result<()> {
    let Ok(dir) = std::fs::canonicalize(layout.dir()) else { return Ok(()) };
    let nodes = dir.join("nodes");
    // The latest first: what is mounted over or below something goes before it.
    for mount in system::mounts()?.into_iter().rev().filter(|m| m.mount_point.starts_with(&nodes)) {
        match system::unmount(&mount.mount_point, false) {
            Ok(()) | Err(UnmountError::NotMounted) => {}
            Err(other) => return Err(other.into_failure(&mount.mount_point)),
        }
    }
    let volumes = dir.join("volumes");
    for (device, _) in
        system::loop_devices()?.into_iter().filter(|(_, backing)| backing.starts_with(&volumes))
    {
        system::detach_loop(&device)?;
    }
    Ok(())
}

/// Deletes a cluster that is down: what it made, by name, and the folders that are empty then. What else lies there
/// stays. Refuses while anything is mounted below it. `keep_logs`: the logs stay, and with them the marker by which
/// the next start knows the folder.
pub fn delete(layout: &Layout, settings: &Settings, keep_logs: bool) -> Result<()> {
    let dir = std::fs::canonicalize(layout.dir()).with_context(|| layout.dir().display().to_string())?;
    if let Some(mount) = system::mounts()?.iter().find(|m| m.mount_point.starts_with(&dir)) {
        return Err(Failure::new(format!("{} is still mounted", mount.mount_point.display())));
    }
    let logs = if keep_logs { Vec::new() } else { layout.made_logs() };
    for path in layout.made(settings).iter().chain(&logs) {
        remove(path)?;
    }
    for folder in layout.made_folders().iter().chain([&settings.sockets]) {
        remove_if_empty(folder)?;
    }
    for path in layout.last_files(keep_logs) {
        remove(&path)?;
    }
    remove_if_empty(layout.dir())
}

/// Removes a file, or a folder with everything in it.
fn remove(path: &Path) -> Result<()> {
    let is_folder = std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_dir());
    let removed = if is_folder { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
    absent_is_fine(removed).with_context(|| format!("cannot delete {}", path.display()))
}

fn remove_if_empty(folder: &Path) -> Result<()> {
    match std::fs::remove_dir(folder) {
        Err(e) if e.kind() == std::io::ErrorKind::DirectoryNotEmpty => Ok(()),
        other => absent_is_fine(other).with_context(|| format!("cannot delete {}", folder.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devcluster::launch::{self, Wanted};
    use crate::devcluster::state::VolumeKind;

    #[test]
    fn only_what_the_cluster_made_is_deleted() {
        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::new(&std::fs::canonicalize(temp.path()).unwrap().join("c"));
        let settings = launch::plan(&layout, None, &Wanted::default(), true).unwrap();
        let make = || {
            layout.create().unwrap();
            layout.write_settings(&settings).unwrap();
            layout.write_processes(&Processes::default()).unwrap();
            for path in [
                layout.log("node-1"),
                layout.log("supervisor").with_extension("log.1"),
                layout.lock(),
                layout.meta().join("store.redb"),
                layout.volumes_added_file(),
                layout.volume_source(VolumeKind::Loop, "vol-3"),
            ] {
                std::fs::write(path, "x").unwrap();
            }
            std::fs::create_dir_all(layout.node_data("node-2").join("volumes/x")).unwrap();
        };
        make();
        delete(&layout, &settings, false).unwrap();
        assert!(!layout.dir().exists(), "nothing is left of it");

        // A start that failed leaves its logs, in a folder that is known.
        make();
        delete(&layout, &settings, true).unwrap();
        assert!(layout.log("node-1").exists() && layout.read_settings().unwrap().is_none());
        layout.check_new(None).unwrap();

        make();
        let foreign = ["logs/mine.log", "meta/notes", "volumes/other.img", ".gitignore", "run/x", "y"];
        for name in foreign {
            std::fs::write(layout.dir().join(name), "mine").unwrap();
        }
        delete(&layout, &settings, false).unwrap();
        for name in foreign {
            assert_eq!(std::fs::read_to_string(layout.dir().join(name)).unwrap(), "mine", "{name}");
        }
        assert!(!layout.log("node-1").exists() && !layout.nodes().exists());
        assert!(layout.read_settings().unwrap().is_none());
    }
}
