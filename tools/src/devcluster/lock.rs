//! The cluster's lock: one supervisor, or one `dev down`, a folder. An flock, so that it ends with its holder, however that ends.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;

use super::state::Layout;
use crate::failure::{Failure, OrFail, Result};

/// Takes the cluster's lock; `None`: a supervisor has it.
pub fn take(layout: &Layout) -> Result<Option<File>> {
    let path = layout.lock();
    let file = File::options().create(true).truncate(false).write(true).open(&path);
    let file = file.with_context(|| path.display().to_string())?;
    match file.try_lock() {
        Ok(()) => Ok(Some(file)),
        Err(std::fs::TryLockError::WouldBlock) => Ok(None),
        Err(std::fs::TryLockError::Error(e)) => Err(Failure::new(format!("{}: {e}", path.display()))),
    }
}

/// The lock that this process was started with as its standard input; if it was not, the lock by the usual way.
pub fn inherited(layout: &Layout) -> Result<File> {
    let stdin = File::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let (given, wanted) = (stdin.metadata()?, std::fs::metadata(layout.lock()).context("the lock")?);
    if (given.dev(), given.ino()) == (wanted.dev(), wanted.ino()) && stdin.try_lock().is_ok() {
        return Ok(stdin);
    }
    take(layout)?.ok_or_else(|| Failure::new("another supervisor has the lock"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_has_it() {
        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::new(temp.path());
        layout.create().unwrap();
        let first = take(&layout).unwrap().unwrap();
        assert!(take(&layout).unwrap().is_none());
        assert!(inherited(&layout).is_err(), "our standard input is something else");
        drop(first);
        assert!(take(&layout).unwrap().is_some());
    }
}
