//! Finds what to store: a walk over local trees, in bounded memory.

use std::collections::VecDeque;
use std::ffi::{OsStr, OsString};
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use shardfs_proto::types::Key;
use tokio::sync::mpsc;

use crate::failure::{Failure, OrFail, Result};

/// Files that are found ahead of their transfer.
const AHEAD: usize = 2048;

/// Something to store.
pub enum Found {
    /// A regular file, or what a root is that is no directory.
    #[allow(missing_docs)]
    File { path: PathBuf, key: Key, meta: Metadata },
    /// A directory with nothing in it; others come into being with their content.
    #[allow(missing_docs)]
    EmptyDirectory { key: Key, mode: u32 },
    /// A symlink.
    #[allow(missing_docs)]
    Symlink { path: PathBuf, key: Key },
    /// What cannot be stored.
    Problem(Failure),
}

/// Finds what to store, in a thread of its own, depth first, each directory's names in order.
pub fn walk(roots: Vec<(PathBuf, Option<Key>, Metadata)>) -> mpsc::Receiver<Found> {
    let (send, receive) = mpsc::channel(AHEAD);
    tokio::task::spawn_blocking(move || {
        for (path, key, meta) in roots {
            let sent = if meta.is_dir() {
                walk_directory(path, key, &meta, &send)
            } else {
                let Some(key) = key else { continue };
                send.blocking_send(Found::File { path, key, meta }).is_ok()
            };
            if !sent {
                return;
            }
        }
    });
    receive
}

/// False when nobody listens any more. Holds the names of the directories on the way down, not of the whole tree.
fn walk_directory(root: PathBuf, prefix: Option<Key>, meta: &Metadata, send: &mpsc::Sender<Found>) -> bool {
    let mut stack: Vec<(PathBuf, Option<Key>, VecDeque<OsString>)> = Vec::new();
    let mut enter = Some((root, prefix, meta.mode()));
    loop {
        if let Some((path, key, mode)) = enter.take() {
            match sorted_names(&path) {
                Ok(names) if names.is_empty() => {
                    if let Some(key) = key
                        && send.blocking_send(Found::EmptyDirectory { key, mode: mode & 0o7777 }).is_err()
                    {
                        return false;
                    }
                }
                Ok(names) => stack.push((path, key, names)),
                Err(failure) => {
                    if send.blocking_send(Found::Problem(failure)).is_err() {
                        return false;
                    }
                }
            }
        }
        let Some((path, key, names)) = stack.last_mut() else { return true };
        let Some(name) = names.pop_front() else {
            stack.pop();
            continue;
        };
        let child = path.join(&name);
        let found =
            match child_key(key.as_ref(), &name).and_then(|key| Ok((key, fs::symlink_metadata(&child)?))) {
                Err(failure) => Found::Problem(failure.context(child.display())),
                Ok((key, meta)) if meta.is_dir() => {
                    enter = Some((child, Some(key), meta.mode()));
                    continue;
                }
                Ok((key, meta)) if meta.is_file() => Found::File { path: child, key, meta },
                Ok((key, meta)) if meta.is_symlink() => Found::Symlink { path: child, key },
                Ok(_) => Found::Problem(Failure::new(format!(
                    "{}: skipped: no file, directory or symlink",
                    child.display()
                ))),
            };
        if send.blocking_send(found).is_err() {
            return false;
        }
    }
}

fn sorted_names(dir: &Path) -> Result<VecDeque<OsString>> {
    let read =
        || -> io::Result<Vec<OsString>> { fs::read_dir(dir)?.map(|e| e.map(|e| e.file_name())).collect() };
    let mut names = read().with_context(|| dir.display().to_string())?;
    names.sort_unstable();
    Ok(names.into())
}

fn child_key(parent: Option<&Key>, name: &OsStr) -> Result<Key> {
    let mut bytes = parent.map(|k| k.as_bytes().to_vec()).unwrap_or_default();
    if !bytes.is_empty() {
        bytes.push(b'/');
    }
    bytes.extend_from_slice(name.as_bytes());
    Key::new(bytes).map_err(Failure::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn walks_find_everything_in_order() {
        let temp = tempfile::tempdir().unwrap();
        let root = temp.path().join("r");
        fs::create_dir_all(root.join("b/empty")).unwrap();
        fs::write(root.join("b/x"), "12").unwrap();
        fs::write(root.join("a"), "1").unwrap();
        std::os::unix::fs::symlink("a", root.join("l")).unwrap();
        let meta = fs::metadata(&root).unwrap();
        let mut found = walk(vec![(root, Some(Key::new("p").unwrap()), meta)]);
        let mut words = Vec::new();
        while let Some(item) = found.recv().await {
            words.push(match item {
                Found::File { key, meta, .. } => format!("file {key} {}", meta.len()),
                Found::EmptyDirectory { key, .. } => format!("dir {key}"),
                Found::Symlink { key, .. } => format!("link {key}"),
                Found::Problem(failure) => failure.to_string(),
            });
        }
        assert_eq!(words, ["file \"p/a\" 1", "dir \"p/b/empty\"", "file \"p/b/x\" 2", "link \"p/l\""]);
    }
}
