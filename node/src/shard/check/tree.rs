//! Invariants 1, 2, 3 (its first half), 6 (its second half) and 7: names, links, directories, access control lists.
//!
//! One merge over `inode`, `parent`, `dirent` and `cookie`, which all begin with the inode or directory
//! that they are about. What an entry says about another place is looked up in batches.

use std::collections::HashSet;

use bytes::Bytes;
use shardfs_proto::types::acl::{ACCESS_ACL, DEFAULT_ACL, PERMISSION_BITS};
use shardfs_proto::types::attr::MODE_BITS;
use shardfs_proto::types::limits::FILE_BYTES_MAX;
use shardfs_proto::types::name::quoted;
use shardfs_proto::types::{Acl, Cookie, FileKind, InodeNo, Result};

use super::content::Window;
use super::cursor::Cursor;
use super::{Checker, FindingKind};
use crate::shard::keys::{self, Cf};
use crate::shard::list::NESTING_MAX;
use crate::shard::records::{Content, CookieEntry, Dirent, INLINE_BYTES_MAX, InodeRecord};
use crate::shard::store::Reader;

/// Entries that are looked up together.
const BATCH: usize = 256;
/// Directories that are remembered as reachable: 16 MiB or so.
const REACHABLE_MAX: usize = 1 << 20;

/// A directory entry to compare with its inode, cookie and parent entries.
struct Named {
    directory: InodeNo,
    name: Vec<u8>,
    entry: Dirent,
}

/// What is looked up in batches.
#[derive(Default)]
struct Pending {
    names: Vec<Named>,
    cookies: Vec<(InodeNo, Cookie, CookieEntry)>,
    parents: Vec<(InodeNo, InodeNo, Vec<u8>)>,
}

/// What the merge has seen about one inode.
#[derive(Default)]
struct Seen {
    names: u64,
    named_in: Option<InodeNo>,
    entries: u64,
    subdirectories: u64,
    cookies: u64,
}

/// Runs the pass; notes what has chunks in `window`.
pub(super) fn check(c: &mut Checker<'_>, window: &mut Window) {
    let view = c.view;
    let mut inodes = Cursor::new(view, Cf::Inode);
    let mut parents = Cursor::range(view, Cf::Parent, true, Vec::new(), None);
    let mut dirents = Cursor::new(view, Cf::Dirent);
    let mut cookies = Cursor::new(view, Cf::Cookie);
    let mut pending = Pending::default();
    let mut reachable = HashSet::from([InodeNo::ROOT]);
    let mut root_seen = false;
    while !c.stopped {
        let heads = [
            head(c, &mut inodes, Cf::Inode, keys::parse_inode),
            head(c, &mut parents, Cf::Parent, |key| keys::parse_parent(key).map(|(inode, _, _)| inode)),
            head(c, &mut dirents, Cf::Dirent, |key| keys::parse_dirent(key).map(|(directory, _)| directory)),
            head(c, &mut cookies, Cf::Cookie, |key| keys::parse_cookie(key).map(|(directory, _)| directory)),
        ];
        let Some(inode) = heads.iter().flatten().min().copied() else { break };
        let record = match heads[0] == Some(inode) {
            true => inodes.pop().map(|entry| InodeRecord::decode(inode, &entry.value)),
            false => None,
        };
        let mut seen = Seen::default();
        while next_is(&mut parents, inode) && !c.stopped {
            let Some(entry) = parents.pop() else { break };
            if let Ok((_, parent, name)) = keys::parse_parent(&entry.key) {
                seen.names += 1;
                seen.named_in = Some(parent);
                pending.parents.push((inode, parent, name.to_vec()));
                if pending.parents.len() >= BATCH {
                    compare_parents(c, &mut pending.parents);
                }
            } else {
                c.finding(FindingKind::BadKey, format!("family parent: {}", quoted(&entry.key)));
            }
        }
        while next_is(&mut dirents, inode) && !c.stopped {
            let Some(entry) = dirents.pop() else { break };
            c.summary.dirents += 1;
            seen.entries += 1;
            let Ok((directory, name)) = keys::parse_dirent(&entry.key) else { continue };
            let what = format!("entry {} of directory {directory}", quoted(name));
            let Some(decoded) = c.decoded(&what, Dirent::decode(&entry.value)) else { continue };
            if decoded.kind == FileKind::Directory {
                seen.subdirectories += 1;
            }
            c.greatest.id = c.greatest.id.max(decoded.cookie.get());
            pending.names.push(Named { directory, name: name.to_vec(), entry: decoded });
            if pending.names.len() >= BATCH {
                compare_names(c, &mut pending.names);
            }
        }
        while next_is(&mut cookies, inode) && !c.stopped {
            let Some(entry) = cookies.pop() else { break };
            seen.cookies += 1;
            let Ok((directory, cookie)) = keys::parse_cookie(&entry.key) else { continue };
            let what = format!("cookie {cookie} of directory {directory}");
            let Some(decoded) = c.decoded(&what, CookieEntry::decode(&entry.value)) else { continue };
            c.greatest.id = c.greatest.id.max(cookie.get());
            pending.cookies.push((directory, cookie, decoded));
            if pending.cookies.len() >= BATCH {
                compare_cookies(c, &mut pending.cookies);
            }
        }
        root_seen |= inode == InodeNo::ROOT && record.is_some();
        match record {
            Some(record) => {
                c.summary.inodes += 1;
                c.greatest.inode = c.greatest.inode.max(inode.get());
                if let Some(record) = c.decoded(format!("inode {inode}"), record) {
                    judge(c, inode, &record, &seen, &mut reachable);
                    window.note(inode, &record);
                }
            }
            None => {
                c.finding(
                    FindingKind::LostEntry,
                    format!(
                        "inode {inode} is not there, but has {} names, {} entries and {} cookies",
                        seen.names, seen.entries, seen.cookies
                    ),
                );
            }
        }
    }
    compare_parents(c, &mut pending.parents);
    compare_names(c, &mut pending.names);
    compare_cookies(c, &mut pending.cookies);
    if !root_seen && inodes.failed.is_none() {
        c.finding(FindingKind::LostInode, "the root directory is not there");
    }
    for failed in [inodes.failed, parents.failed, dirents.failed, cookies.failed].into_iter().flatten() {
        c.finding(FindingKind::Unreadable, failed);
    }
}

/// The inode that a family's next entry is about; malformed keys are findings and skipped.
fn head(
    c: &mut Checker<'_>,
    cursor: &mut Cursor<'_>,
    cf: Cf,
    parse: impl Fn(&[u8]) -> Result<InodeNo>,
) -> Option<InodeNo> {
    loop {
        match parse(&cursor.peek()?.key) {
            Ok(inode) => return Some(inode),
            Err(_) => {
                let key = cursor.pop()?.key;
                c.finding(FindingKind::BadKey, format!("family {}: {}", cf.name(), quoted(&key)));
            }
        }
    }
}

/// Whether a cursor's next key begins with an inode's number.
fn next_is(cursor: &mut Cursor<'_>, inode: InodeNo) -> bool {
    cursor.peek().is_some_and(|entry| entry.key.starts_with(&keys::inode(inode)))
}

fn judge(
    c: &mut Checker<'_>,
    inode: InodeNo,
    record: &InodeRecord,
    seen: &Seen,
    reachable: &mut HashSet<InodeNo>,
) {
    c.summary.bytes += record.used_bytes(c.view.chunk_bytes());
    c.greatest.version = c.greatest.version.max(record.version.get());
    if record.mode & !MODE_BITS != 0 {
        c.finding(FindingKind::BadRecord, format!("inode {inode}: mode {:o}", record.mode));
    }
    if record.size > FILE_BYTES_MAX {
        c.finding(FindingKind::BadRecord, format!("inode {inode}: size {} is above the limit", record.size));
    }
    match &record.content {
        Content::Inline(bytes) => {
            if bytes.len() > INLINE_BYTES_MAX {
                let length = bytes.len();
                c.finding(FindingKind::BadRecord, format!("inode {inode}: {length} bytes are in its record"));
            }
        }
        Content::Chunks { id, .. } => c.greatest.id = c.greatest.id.max(id.get()),
    }
    for (name, value) in &record.indexes {
        let there = c.view.contains(Cf::Index, &keys::index(name, value, inode));
        if c.readable(format!("index {name:?} of inode {inode}"), there) == Some(false) {
            c.finding(FindingKind::Index, format!("inode {inode} is not in its index {name:?}"));
        }
    }
    if let Some(why) = acl_fault(record) {
        c.finding(FindingKind::Acl, format!("inode {inode}: {why}"));
    }
    let root = inode == InodeNo::ROOT;
    if seen.names == 0 && !root {
        let orphan = c.view.contains(Cf::Sys, &keys::orphan(inode));
        if c.readable(format!("orphan record of inode {inode}"), orphan) == Some(false) {
            c.finding(FindingKind::LostInode, format!("inode {inode} has no name, and nobody holds it open"));
        }
    }
    let is_directory = record.kind == FileKind::Directory;
    if !is_directory {
        if root {
            c.finding(FindingKind::BadRecord, "the root is not a directory");
        }
        if u64::from(record.nlink) != seen.names {
            c.finding(
                FindingKind::LinkCount,
                format!("inode {inode} has {} names, but says {}", seen.names, record.nlink),
            );
        }
        if seen.entries + seen.cookies != 0 {
            c.finding(
                FindingKind::LostEntry,
                format!("inode {inode} is no directory, but has {} entries", seen.entries.max(seen.cookies)),
            );
        }
        return;
    }
    let links = if seen.names == 0 && !root { 0 } else { 2 + seen.subdirectories };
    if u64::from(record.nlink) != links {
        c.finding(
            FindingKind::LinkCount,
            format!("directory {inode} has {links} links, but says {}", record.nlink),
        );
    }
    if record.entries != seen.entries {
        c.finding(
            FindingKind::EntryCount,
            format!("directory {inode} has {} entries, but says {}", seen.entries, record.entries),
        );
    }
    if seen.cookies != seen.entries {
        c.finding(
            FindingKind::DirentCookie,
            format!("directory {inode} has {} entries and {} cookies", seen.entries, seen.cookies),
        );
    }
    let names_max = if root { 0 } else { 1 };
    if seen.names > names_max {
        c.finding(FindingKind::DirectoryParent, format!("directory {inode} has {} names", seen.names));
    }
    let parent = if root { Some(InodeNo::ROOT) } else { seen.named_in };
    if parent.is_some() && record.parent != parent {
        c.finding(
            FindingKind::DirectoryParent,
            format!(
                "directory {inode} says that its parent is {}, but its name is in {}",
                record.parent.map_or(0, InodeNo::get),
                parent.map_or(0, InodeNo::get)
            ),
        );
    }
    if seen.names > 0 && !is_reachable(c, inode, record, reachable) {
        c.finding(FindingKind::Unreachable, format!("directory {inode} is not below the root"));
    }
}

/// What is wrong with an inode's access control lists.
fn acl_fault(record: &InodeRecord) -> Option<String> {
    for name in [ACCESS_ACL, DEFAULT_ACL] {
        let Some(value) = record.xattrs.get(name) else { continue };
        let acl = match Acl::decode(value) {
            Ok(Some(acl)) => acl,
            Ok(None) => return Some(format!("{}: a list without entries", quoted(name))),
            Err(error) => return Some(format!("{}: {error}", quoted(name))),
        };
        let may = match record.kind {
            FileKind::Directory => true,
            FileKind::Symlink => false,
            _ => name == ACCESS_ACL,
        };
        if !may {
            return Some(format!("{} of a {:?}", quoted(name), record.kind));
        }
        let bits = record.mode & PERMISSION_BITS;
        if name == ACCESS_ACL && (acl.is_mode() || acl.mode() != bits) {
            return Some(format!("its list says {:o}, its mode {bits:o}", acl.mode()));
        }
    }
    None
}

/// Whether the way up from a directory ends at the root. A break in it is another check's finding, at
/// the directory where it is; here only loops count.
fn is_reachable(
    c: &mut Checker<'_>,
    inode: InodeNo,
    record: &InodeRecord,
    reachable: &mut HashSet<InodeNo>,
) -> bool {
    let mut way = vec![inode];
    let mut above = record.parent;
    while let Some(at) = above {
        if reachable.contains(&at) {
            if reachable.len() + way.len() > REACHABLE_MAX {
                reachable.clear();
                reachable.insert(InodeNo::ROOT);
            }
            reachable.extend(way);
            return true;
        }
        if way.len() > NESTING_MAX {
            return false;
        }
        way.push(at);
        let value = c.view.get(Cf::Inode, &keys::inode(at)).ok().flatten();
        above = value.and_then(|value| InodeRecord::decode(at, &value).ok()).and_then(|record| record.parent);
    }
    true
}

/// Values of many keys; unreadable: a finding, and none.
fn look_up(c: &mut Checker<'_>, cf: Cf, keys: &[Vec<u8>]) -> Option<Vec<Option<Bytes>>> {
    let slices: Vec<&[u8]> = keys.iter().map(|key| &key[..]).collect();
    let found = c.view.multi_get(cf, &slices);
    c.readable(format!("family {}", cf.name()), found)
}

fn compare_names(c: &mut Checker<'_>, names: &mut Vec<Named>) {
    let names = std::mem::take(names);
    let inodes: Vec<_> = names.iter().map(|n| keys::inode(n.entry.inode).to_vec()).collect();
    let cookies: Vec<_> = names.iter().map(|n| keys::cookie(n.directory, n.entry.cookie).to_vec()).collect();
    let parents: Vec<_> = names.iter().map(|n| keys::parent(n.entry.inode, n.directory, &n.name)).collect();
    if let Some(found) = look_up(c, Cf::Inode, &inodes) {
        for (n, value) in names.iter().zip(found) {
            let Named { directory, name, entry } = n;
            match value.map(|value| InodeRecord::decode(entry.inode, &value)) {
                None => c.finding(
                    FindingKind::DanglingDirent,
                    format!(
                        "{} in directory {directory} names inode {}, which is not there",
                        quoted(name),
                        entry.inode
                    ),
                ),
                Some(Ok(record)) if record.kind != entry.kind => c.finding(
                    FindingKind::WrongKind,
                    format!(
                        "{} in directory {directory} is {:?}, its inode {} is {:?}",
                        quoted(name),
                        entry.kind,
                        entry.inode,
                        record.kind
                    ),
                ),
                // One that does not decode is a finding where the merge meets it.
                Some(Ok(_) | Err(_)) => {}
            }
        }
    }
    if let Some(found) = look_up(c, Cf::Cookie, &cookies) {
        for (n, value) in names.iter().zip(found) {
            let matches = value.and_then(|value| CookieEntry::decode(&value).ok()).is_some_and(|cookie| {
                cookie.inode == n.entry.inode && cookie.kind == n.entry.kind && cookie.name == n.name
            });
            if !matches {
                c.finding(
                    FindingKind::DirentCookie,
                    format!(
                        "{} in directory {}: cookie {} is not its own",
                        quoted(&n.name),
                        n.directory,
                        n.entry.cookie
                    ),
                );
            }
        }
    }
    if let Some(found) = look_up(c, Cf::Parent, &parents) {
        for (n, value) in names.iter().zip(found) {
            if value.is_none() {
                c.finding(
                    FindingKind::DirentParent,
                    format!("{} in directory {} has no entry by inode", quoted(&n.name), n.directory),
                );
            }
        }
    }
}

fn compare_cookies(c: &mut Checker<'_>, cookies: &mut Vec<(InodeNo, Cookie, CookieEntry)>) {
    let cookies = std::mem::take(cookies);
    let wanted: Vec<_> =
        cookies.iter().map(|(directory, _, entry)| keys::dirent(*directory, &entry.name)).collect();
    let Some(found) = look_up(c, Cf::Dirent, &wanted) else { return };
    for ((directory, cookie, entry), value) in cookies.iter().zip(found) {
        let dirent = value.and_then(|value| Dirent::decode(&value).ok());
        if dirent.is_none_or(|dirent| dirent.cookie != *cookie || dirent.inode != entry.inode) {
            c.finding(
                FindingKind::DirentCookie,
                format!(
                    "cookie {cookie} of directory {directory} stands for {}, which is not so",
                    quoted(&entry.name)
                ),
            );
        }
    }
}

fn compare_parents(c: &mut Checker<'_>, parents: &mut Vec<(InodeNo, InodeNo, Vec<u8>)>) {
    let parents = std::mem::take(parents);
    let wanted: Vec<_> = parents.iter().map(|(_, parent, name)| keys::dirent(*parent, name)).collect();
    let Some(found) = look_up(c, Cf::Dirent, &wanted) else { return };
    for ((inode, parent, name), value) in parents.iter().zip(found) {
        let dirent = value.and_then(|value| Dirent::decode(&value).ok());
        if dirent.is_none_or(|dirent| dirent.inode != *inode) {
            c.finding(
                FindingKind::DirentParent,
                format!(
                    "inode {inode} says that it is {} in directory {parent}, which is not so",
                    quoted(name)
                ),
            );
        }
    }
}
