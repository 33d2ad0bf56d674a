//! Whether the kernel's pages of a file are still good: when it is opened again, and while it is open.
//!
//! They are good at an open if the file's version is the one that it had when it was opened last, and no other was seen between:
//! at that time the kernel had no older pages (or was told to drop them), and any change since, by anyone, has raised the version.
//! A rollback sets it back to what it was, so that a change which it has undone does not show in the version alone: what this mount
//! changed, or was shown, since the file was opened counts as well.
//!
//! The kernel itself drops the pages of an open file when it is shown another size or modification time. It learns neither from the
//! answer to a write, and so sees nothing if a rollback takes that write back before it has asked for attributes: then it is told.

use std::collections::HashMap;

use parking_lot::Mutex;
use shardfs_proto::types::{Attr, GlobalInode, Version};

/// Files that are remembered; when there are more, all are forgotten, which costs reading again (and those that are open
/// go by what the kernel sees).
const FILES_MAX: usize = 65_536;

struct File {
    /// Its version when it was opened last; `None`: the pages are of no one version.
    opened_at: Option<Version>,
    /// Version and size that it was known to have last.
    last: (Version, u64),
}

/// See the module's comment.
#[derive(Default)]
pub struct Pages {
    files: Mutex<HashMap<GlobalInode, File>>,
}

impl Pages {
    /// Whether the kernel may keep the pages of a file that is being opened with these attributes.
    pub fn keep(&self, ino: GlobalInode, attr: &Attr) -> bool {
        let mut files = self.files.lock();
        if files.len() >= FILES_MAX && !files.contains_key(&ino) {
            files.clear();
        }
        let opened = File { opened_at: Some(attr.version), last: (attr.version, attr.size) };
        files.insert(ino, opened).is_some_and(|before| before.opened_at == Some(attr.version))
    }

    /// This mount has changed the file; `None`: or tried to.
    pub fn changed(&self, ino: GlobalInode, attr: Option<&Attr>) {
        if let Some(file) = self.files.lock().get_mut(&ino) {
            match attr {
                // Answers to changes made at the same time come in any order.
                Some(attr) if attr.version >= file.last.0 => file.see(attr),
                Some(_) => {}
                None => file.opened_at = None,
            }
        }
    }

    /// The kernel is shown these attributes; whether it must be told to drop its pages, because the file is older than it was
    /// and does not differ in size, which the kernel would see.
    #[must_use]
    pub fn shown(&self, ino: GlobalInode, attr: &Attr) -> bool {
        let mut files = self.files.lock();
        let Some(file) = files.get_mut(&ino) else { return false };
        let (version, size) = file.last;
        file.see(attr);
        attr.version < version && attr.size == size
    }

    /// The kernel's pages are not what the file holds.
    pub fn forget(&self, ino: GlobalInode) {
        if let Some(file) = self.files.lock().get_mut(&ino) {
            file.opened_at = None;
        }
    }
}

impl File {
    fn see(&mut self, attr: &Attr) {
        if self.opened_at != Some(attr.version) {
            self.opened_at = None;
        }
        self.last = (attr.version, attr.size);
    }
}

#[cfg(test)]
mod tests {
    use shardfs_proto::types::{FileKind, InodeNo, Timestamp};

    use super::*;

    fn attr(version: u64, size: u64) -> Attr {
        let t = Timestamp::default();
        Attr {
            inode: InodeNo::ROOT,
            kind: FileKind::Regular,
            mode: 0o644,
            uid: 0,
            gid: 0,
            nlink: 1,
            size,
            blocks: 0,
            rdev: 0,
            atime: t,
            mtime: t,
            ctime: t,
            btime: t,
            version: Version::new(version),
            has_acl: None,
        }
    }

    #[test]
    fn pages_are_kept_while_the_version_stays() {
        let pages = Pages::default();
        let ino = GlobalInode::outside(100);
        assert!(!pages.keep(ino, &attr(1, 0)));
        assert!(pages.keep(ino, &attr(1, 0)));
        assert!(!pages.shown(ino, &attr(1, 0)));
        assert!(pages.keep(ino, &attr(1, 0)));
        assert!(!pages.keep(ino, &attr(2, 0)));
        assert!(pages.keep(ino, &attr(2, 0)));
        pages.forget(ino);
        assert!(!pages.keep(ino, &attr(2, 0)));
    }

    #[test]
    fn a_version_that_came_back_keeps_no_pages() {
        let pages = Pages::default();
        let ino = GlobalInode::outside(100);
        let between: [&dyn Fn(); 3] =
            [&|| pages.changed(ino, Some(&attr(2, 0))), &|| pages.changed(ino, None), &|| {
                assert!(!pages.shown(ino, &attr(2, 0)))
            }];
        for between in between {
            pages.keep(ino, &attr(1, 0));
            assert!(pages.keep(ino, &attr(1, 0)));
            between();
            assert!(!pages.keep(ino, &attr(1, 0)));
        }
    }

    #[test]
    fn the_kernel_is_told_once_of_a_file_that_is_older_than_it_was() {
        let pages = Pages::default();
        let ino = GlobalInode::outside(100);
        assert!(!pages.shown(ino, &attr(9, 0)), "no file that was opened");
        pages.keep(ino, &attr(1, 5));
        pages.changed(ino, Some(&attr(3, 5)));
        pages.changed(ino, Some(&attr(2, 5)));
        assert!(!pages.shown(ino, &attr(3, 5)));
        assert!(pages.shown(ino, &attr(1, 5)));
        assert!(!pages.shown(ino, &attr(1, 5)));
        assert!(!pages.keep(ino, &attr(1, 5)));
        pages.changed(ino, Some(&attr(4, 6)));
        assert!(!pages.shown(ino, &attr(1, 5)), "another size says it");
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let pages = Pages::default();
        for n in 1..=(FILES_MAX as u64 + 1) {
            pages.keep(GlobalInode::outside(n), &attr(1, 0));
        }
        assert!(pages.files.lock().len() <= FILES_MAX);
    }
}
