//! The folders of views on a volume.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use shardfs_proto::types::{Error, Result, ShardId};

use crate::catalog::serving::blocking;
use crate::cluster::records::views::ViewName;
use crate::volume::views::views_dir;

/// Makes the folder that the views of a shard are made in.
pub(super) async fn make_folder(shard_dir: &Path) -> Result<()> {
    let folder = views_dir(shard_dir);
    blocking(move || {
        std::fs::create_dir_all(&folder).map_err(|e| Error::io(format!("making {}: {e}", folder.display())))
    })
    .await
}

/// The views whose folders are below a volume's root. What is no whole view's folder is removed.
pub(super) fn found(root: &Path) -> Result<BTreeMap<ShardId, BTreeSet<ViewName>>> {
    let mut found = BTreeMap::new();
    for (name, dir) in list(root)? {
        let Some(shard) = name.strip_prefix("shard-").and_then(|id| id.parse().ok()) else { continue };
        let Ok(shard) = ShardId::new(shard) else { continue };
        let mut names = BTreeSet::new();
        for (name, path) in list(&views_dir(&dir))? {
            match ViewName::from_str(&name) {
                Ok(name) => drop(names.insert(name)),
                Err(_) => remove(&path)?,
            }
        }
        if !names.is_empty() {
            found.insert(shard, names);
        }
    }
    Ok(found)
}

pub(super) fn list(folder: &Path) -> Result<Vec<(String, PathBuf)>> {
    let failed = |e: std::io::Error| Error::io(format!("listing {}: {e}", folder.display()));
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(failed(e)),
    };
    entries
        .map(|entry| {
            let entry = entry.map_err(failed)?;
            Ok((entry.file_name().to_string_lossy().into_owned(), entry.path()))
        })
        .collect()
}

pub(super) fn remove(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::io(format!("removing {}: {e}", folder.display())))
        }
        _gone => Ok(()),
    }
}
