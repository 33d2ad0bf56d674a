//! Each invariant broken on purpose, and found; whole trees, and nothing found.

use std::collections::BTreeSet;

use bytes::Bytes;
use shardfs_proto::types::acl::{ACCESS_ACL, AclEntry, DEFAULT_ACL, Subject};
use shardfs_proto::types::op::IndexValue;
use shardfs_proto::types::{
    Cookie, FileKind, FileLock, InodeNo, LockKind, LockOwner, LockRange, Sequence, SessionId,
};

use super::*;
use crate::shard::keys::{self, Cf, ContentId};
use crate::shard::read::tests::{CHUNK, Fixture, ino};
use crate::shard::records::{Content, CookieEntry, Dirent, LocksRecord, Orphan, Slot};

/// A whole tree with one of everything.
struct Tree {
    f: Fixture,
    directory: InodeNo,
    inner: InodeNo,
    small: InodeNo,
    large: InodeNo,
    large_content: ContentId,
    orphan: InodeNo,
    session: SessionId,
    staged: ContentId,
}

fn tree() -> Tree {
    let mut f = Fixture::new();
    let directory = f.directory(InodeNo::ROOT, b"directory");
    let inner = f.directory(directory, b"inner");
    f.directory(inner, b"empty");
    let small = f.file(directory, b"small", b"hello");
    let mut bytes = vec![9; 4 * CHUNK + 100];
    bytes[CHUNK..2 * CHUNK].fill(0);
    let large = f.file(inner, b"large", &bytes);
    f.special(inner, b"link", FileKind::Symlink);
    f.special(inner, b"fifo", FileKind::Fifo);
    let mut twice = f.get(small);
    twice.nlink = 2;
    f.set(small, &twice);
    f.link(InodeNo::ROOT, b"small too", small, FileKind::Regular);
    f.index(small, "colour", IndexValue::Text("red".into()));
    f.index(small, "size", IndexValue::Integer(-5));
    let session = f.session();
    let orphan = f.orphan(session);
    let staged = f.staged();
    let Content::Chunks { id: large_content, .. } = f.get(large).content else { panic!("it is in chunks") };
    f.view();
    Tree { f, directory, inner, small, large, large_content, orphan, session, staged }
}

fn kinds(tree: &Tree, read_data: bool) -> BTreeSet<String> {
    let (findings, summary) = check_all(&tree.f.view_as_it_is(), read_data).unwrap();
    assert_eq!(summary.findings, findings.len() as u64);
    for (kind, detail) in &findings {
        println!("{kind}: {detail}");
    }
    findings.into_iter().map(|(kind, _)| kind).collect()
}

/// Breaks a whole tree, and expects exactly these kinds of findings.
#[track_caller]
fn broken(expected: &[FindingKind], damage: impl FnOnce(&mut Tree)) {
    let mut t = tree();
    damage(&mut t);
    let expected: BTreeSet<String> = expected.iter().map(|kind| kind.as_str().to_owned()).collect();
    assert_eq!(kinds(&t, false), expected);
}

#[test]
fn a_whole_tree_has_no_finding() {
    let t = tree();
    assert_eq!(kinds(&t, true), BTreeSet::new());
    let (_, summary) = check_all(&t.f.view_as_it_is(), true).unwrap();
    // Root, three directories, two files, two specials, the orphan.
    assert_eq!((summary.inodes, summary.dirents), (9, 8));
    // Four of the large file (one is a hole), three of the orphan, one staged.
    assert_eq!(summary.chunks, 8);
    assert_eq!(summary.bytes, t.f.counters().used_bytes);
}

#[test]
fn random_whole_trees_have_no_finding() {
    for _ in 0..30 {
        let seed = fastrand::u64(..1 << 32);
        println!("seed {seed}");
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut f = Fixture::new();
        let mut directories = vec![InodeNo::ROOT];
        for i in 0..rng.usize(..700) {
            let parent = *rng.choice(&directories).unwrap();
            let name = format!("{i}");
            match rng.u8(..5) {
                0 => directories.push(f.directory(parent, name.as_bytes())),
                1 => {
                    f.special(parent, name.as_bytes(), FileKind::Socket);
                }
                _ => {
                    let bytes = vec![rng.u8(..2); rng.usize(..5 * CHUNK)];
                    f.file(parent, name.as_bytes(), &bytes);
                }
            }
        }
        let (findings, _) = check_all(&f.view(), true).unwrap();
        assert_eq!(findings, [], "seed {seed}");
    }
}

#[test]
fn names_without_their_other_halves_are_found() {
    use FindingKind::*;
    // A dirent whose inode is gone; what the inode had is lost with it.
    broken(&[DanglingDirent, LostEntry, LostChunk, Usage, InodeCount], |t| {
        t.f.delete(Cf::Inode, &keys::inode(t.large));
    });
    broken(&[DirentCookie, DirentParent, LostInode, LinkCount, EntryCount], |t| {
        t.f.delete(Cf::Dirent, &keys::dirent(t.inner, b"large"));
        // Its parent entry too: the inode has no name at all.
        t.f.delete(Cf::Parent, &keys::parent(t.large, t.inner, b"large"));
        t.f.put(Cf::Parent, &keys::parent(t.small, t.inner, b"large"), Bytes::new());
    });
    broken(&[DirentParent, LinkCount], |t| {
        t.f.delete(Cf::Parent, &keys::parent(t.small, t.directory, b"small"));
    });
    broken(&[WrongKind, DirentCookie], |t| {
        let key = keys::dirent(t.inner, b"large");
        let cookie = cookie_of(t, t.inner, b"large");
        let entry = Dirent { inode: t.large, kind: FileKind::Fifo, cookie };
        t.f.put(Cf::Dirent, &key, entry.encode());
    });
    broken(&[DirentCookie], |t| {
        let cookie = cookie_of(t, t.inner, b"large");
        t.f.delete(Cf::Cookie, &keys::cookie(t.inner, cookie));
    });
    broken(&[DirentCookie], |t| {
        let cookie = cookie_of(t, t.inner, b"large");
        let entry =
            CookieEntry { inode: t.large, kind: FileKind::Regular, name: Bytes::from_static(b"other") };
        t.f.put(Cf::Cookie, &keys::cookie(t.inner, cookie), entry.encode());
    });
    // Entries of a file, and of nothing.
    broken(&[LostEntry, LinkCount], |t| {
        t.f.link(t.inner, b"x", t.small, FileKind::Regular);
        let mut small = t.f.get(t.small);
        small.nlink += 1;
        t.f.set(t.small, &small);
        let cookie = Cookie::new(t.f.id());
        let entry = Dirent { inode: t.small, kind: FileKind::Regular, cookie };
        t.f.put(Cf::Dirent, &keys::dirent(t.large, b"y"), entry.encode());
        let entry = CookieEntry { inode: t.small, kind: FileKind::Regular, name: Bytes::from_static(b"y") };
        t.f.put(Cf::Cookie, &keys::cookie(t.large, cookie), entry.encode());
        t.f.put(Cf::Parent, &keys::parent(t.small, t.large, b"y"), Bytes::new());
        t.f.view();
    });
    broken(&[LostEntry, DirentCookie, DirentParent], |t| {
        t.f.put(Cf::Cookie, &keys::cookie(ino(500), Cookie::new(1)), {
            CookieEntry { inode: t.small, kind: FileKind::Regular, name: Bytes::from_static(b"z") }.encode()
        });
        t.f.put(Cf::Parent, &keys::parent(ino(500), t.inner, b"z"), Bytes::new());
    });
}

fn cookie_of(t: &Tree, directory: InodeNo, name: &[u8]) -> Cookie {
    t.f.view_as_it_is().dirent(directory, name).unwrap().unwrap().cookie
}

#[test]
fn wrong_links_and_parents_are_found() {
    use FindingKind::*;
    // Further names are counted.
    broken(&[LinkCount, Usage], |t| {
        let mut record = t.f.get(t.small);
        record.nlink = 7;
        t.f.set(t.small, &record);
    });
    broken(&[LinkCount], |t| {
        let mut record = t.f.get(t.directory);
        record.nlink = 2;
        t.f.set(t.directory, &record);
    });
    broken(&[EntryCount], |t| {
        let mut record = t.f.get(t.directory);
        record.entries = 1;
        t.f.set(t.directory, &record);
    });
    broken(&[DirectoryParent], |t| {
        let mut record = t.f.get(t.inner);
        record.parent = Some(InodeNo::ROOT);
        t.f.set(t.inner, &record);
    });
    // A second name of a directory.
    broken(&[DirectoryParent], |t| {
        t.f.link(InodeNo::ROOT, b"again", t.directory, FileKind::Directory);
        t.f.view();
    });
    // A loop: everything agrees, but there is no way to the root.
    broken(&[Unreachable], |t| {
        let (inner, directory) = (t.inner, t.directory);
        let cookie = cookie_of(t, InodeNo::ROOT, b"directory");
        t.f.delete(Cf::Dirent, &keys::dirent(InodeNo::ROOT, b"directory"));
        t.f.delete(Cf::Cookie, &keys::cookie(InodeNo::ROOT, cookie));
        t.f.delete(Cf::Parent, &keys::parent(directory, InodeNo::ROOT, b"directory"));
        let mut root = t.f.get(InodeNo::ROOT);
        root.nlink -= 1;
        root.entries -= 1;
        t.f.set(InodeNo::ROOT, &root);
        t.f.link(inner, b"loop", directory, FileKind::Directory);
        let mut record = t.f.get(directory);
        record.parent = Some(inner);
        t.f.set(directory, &record);
        t.f.view();
    });
}

#[test]
fn lost_inodes_and_wrong_orphans_are_found() {
    use FindingKind::*;
    broken(&[LostInode], |t| t.f.delete(Cf::Sys, &keys::orphan(t.orphan)));
    broken(&[Orphan], |t| {
        let record = orphan_record(vec![]);
        t.f.put(Cf::Sys, &keys::orphan(t.orphan), record);
    });
    broken(&[Orphan], |t| {
        let record = orphan_record(vec![t.session, SessionId::new(99).unwrap()]);
        t.f.put(Cf::Sys, &keys::orphan(t.orphan), record);
        // The counter is right about it.
        let mut counters = t.f.counters();
        counters.next_session = 100;
        t.f.put(Cf::Sys, keys::COUNTERS, counters.encode());
    });
    broken(&[Orphan], |t| t.f.put(Cf::Sys, &keys::orphan(t.small), orphan_record(vec![t.session])));
    broken(&[Orphan], |t| t.f.put(Cf::Sys, &keys::orphan(ino(300)), orphan_record(vec![t.session])));
    // The session goes: its slot and its orphan are left behind.
    broken(&[Orphan, Session], |t| t.f.delete(Cf::Sys, &keys::session(t.session)));
    broken(&[Session], |t| {
        let slot = Slot { sequence: Sequence::new(3).unwrap(), fingerprint: None, result: Bytes::new() };
        t.f.put(Cf::Sys, &keys::result(t.session, 4), slot.encode());
    });
}

#[test]
fn wrong_locks_are_found() {
    use FindingKind::*;
    // An owner's number, the first and last byte, the kind.
    type Held = (u64, u64, u64, LockKind);
    fn put(t: &mut Tree, inode: u64, session: SessionId, held: &[Held]) {
        let lock = |(number, start, end, kind): &Held| FileLock {
            owner: LockOwner { session, number: *number },
            pid: 1,
            range: LockRange::new(*start, *end).unwrap(),
            kind: *kind,
        };
        let locks = held.iter().map(lock).collect();
        t.f.put(Cf::Sys, &keys::locks(ino(inode)), LocksRecord { locks }.encode());
    }
    fn of_small(t: &mut Tree, held: &[Held]) {
        let (small, session) = (t.small.get(), t.session);
        put(t, small, session, held);
    }
    let (read, write) = (LockKind::Read, LockKind::Write);
    broken(&[], |t| of_small(t, &[(1, 0, 5, read), (2, 0, u64::MAX, read), (1, 7, 9, read)]));
    broken(&[Locks], |t| of_small(t, &[]));
    broken(&[Locks], |t| {
        let session = t.session;
        put(t, 300, session, &[(1, 0, 5, read)]);
    });
    broken(&[Locks, Counter], |t| {
        let small = t.small.get();
        put(t, small, SessionId::new(1 << 40).unwrap(), &[(1, 0, 5, read)]);
    });
    broken(&[Locks], |t| of_small(t, &[(1, 0, 5, read), (2, 5, 5, write)]));
    broken(&[Locks], |t| of_small(t, &[(1, 0, 5, read), (1, 5, 6, read)]));
    broken(&[Locks], |t| of_small(t, &[(1, 7, 8, read), (1, 5, 6, read)]));
    broken(&[BadRecord], |t| t.f.put(Cf::Sys, &keys::locks(t.small), Bytes::from_static(b"\x01short")));
    broken(&[BadKey], |t| t.f.put(Cf::Sys, b"Lshort", LocksRecord { locks: vec![] }.encode()));
}

fn orphan_record(holders: Vec<SessionId>) -> Bytes {
    Orphan { holders }.encode()
}

#[test]
fn wrong_contents_are_found() {
    use FindingKind::*;
    broken(&[ChunkCount], |t| t.f.delete(Cf::Chunk, &keys::chunk(t.large_content, 0)));
    broken(&[ChunkCount, ChunkPastSize], |t| {
        t.f.put(Cf::Chunk, &keys::chunk(t.large_content, 5), Bytes::from_static(b"x"));
    });
    broken(&[LostChunk], |t| {
        let id = ContentId::new(t.f.id()).unwrap();
        t.f.put(Cf::Chunk, &keys::chunk(id, 0), Bytes::from_static(b"x"));
        t.f.view();
    });
    broken(&[LostChunk], |t| t.f.delete(Cf::Sys, &keys::staged(t.staged)));
    // Two inodes with one content; an inode with a staged content.
    broken(&[SharedContent], |t| {
        let mut record = t.f.blank(FileKind::Regular);
        record.content = t.f.get(t.large).content;
        record.size = t.f.get(t.large).size;
        let inode = t.f.inode(&record);
        t.f.link(t.inner, b"twin", inode, FileKind::Regular);
        t.f.view();
    });
    broken(&[SharedContent], |t| {
        let mut record = t.f.blank(FileKind::Regular);
        record.content = Content::Chunks { id: t.staged, count: 1 };
        record.size = CHUNK as u64;
        let inode = t.f.inode(&record);
        t.f.link(t.inner, b"early", inode, FileKind::Regular);
        t.f.view();
    });
    // All chunks of a file gone: it is the last content, after every chunk there is.
    broken(&[ChunkCount], |t| {
        let mut record = t.f.blank(FileKind::Regular);
        record.content = Content::Chunks { id: ContentId::new(t.f.id()).unwrap(), count: 3 };
        record.size = 3 * CHUNK as u64;
        let inode = t.f.inode(&record);
        t.f.link(t.inner, b"hollow", inode, FileKind::Regular);
        t.f.view();
    });
}

#[test]
fn bad_data_is_found_when_it_is_read() {
    let t = tree();
    t.f.put(Cf::Chunk, &keys::chunk(t.large_content, 4), Bytes::from(vec![1; 101]));
    assert_eq!(kinds(&t, false), BTreeSet::new());
    assert_eq!(kinds(&t, true), BTreeSet::from(["chunk-past-size".to_owned()]));
    t.f.put(Cf::Chunk, &keys::chunk(t.large_content, 4), Bytes::from(vec![1; CHUNK + 1]));
    assert_eq!(kinds(&t, true), BTreeSet::from(["bad-record".to_owned()]));
}

#[test]
fn wrong_counters_are_found() {
    use FindingKind::*;
    broken(&[Usage, InodeCount], |t| {
        let mut counters = t.f.counters();
        counters.used_bytes += 1;
        counters.inodes -= 1;
        t.f.put(Cf::Sys, keys::COUNTERS, counters.encode());
    });
    for field in 0..4 {
        broken(&[Counter], |t| {
            let mut counters = t.f.counters();
            match field {
                0 => counters.next_ino -= 1,
                1 => counters.next_id -= 1,
                2 => counters.next_session -= 1,
                _ => counters.op_seq -= 1,
            }
            t.f.put(Cf::Sys, keys::COUNTERS, counters.encode());
        });
    }
    broken(&[Header], |t| t.f.delete(Cf::Sys, keys::COUNTERS));
    broken(&[Header], |t| t.f.delete(Cf::Sys, keys::HEADER));
    broken(&[Header], |t| {
        let mut header = t.f.header();
        header.id = shardfs_proto::types::ShardId::new(8).unwrap();
        t.f.put(Cf::Sys, keys::HEADER, header.encode());
    });
}

#[test]
fn wrong_indexes_are_found() {
    use FindingKind::*;
    let red = IndexValue::Text("red".into());
    broken(&[Index], |t| t.f.delete(Cf::Index, &keys::index("colour", &red, t.small)));
    broken(&[Index], |t| t.f.put(Cf::Index, &keys::index("colour", &red, t.large), Bytes::new()));
    broken(&[Index], |t| t.f.put(Cf::Index, &keys::index("colour", &red, ino(400)), Bytes::new()));
    broken(&[Index], |t| {
        t.f.put(Cf::Index, &keys::index("colour", &IndexValue::Text("blue".into()), t.small), Bytes::new());
    });
}

#[test]
fn wrong_access_control_lists_are_found() {
    use FindingKind::*;
    let acl = |entries: &[(Subject, u8)]| {
        let entries = entries.iter().map(|&(subject, permissions)| AclEntry { subject, permissions });
        shardfs_proto::types::Acl::new(entries.collect()).unwrap().encode()
    };
    let minimal = acl(&[(Subject::Owner, 6), (Subject::OwningGroup, 4), (Subject::Other, 4)]);
    let masked =
        acl(&[(Subject::Owner, 6), (Subject::OwningGroup, 7), (Subject::Mask, 4), (Subject::Other, 4)]);
    let with = |inode: InodeNo, mode: u32, name: &'static [u8], value: &Bytes, t: &mut Tree| {
        let mut record = t.f.get(inode);
        record.mode = mode;
        record.xattrs.insert(Bytes::from_static(name), value.clone());
        t.f.set(inode, &record);
    };
    // The usage is not kept up here: whole lists are no finding of their own.
    broken(&[Usage], |t| with(t.small, 0o4644, ACCESS_ACL, &masked, t));
    broken(&[Usage], |t| with(t.directory, 0o700, DEFAULT_ACL, &minimal, t));
    broken(&[Usage, Acl], |t| with(t.small, 0o674, ACCESS_ACL, &masked, t));
    broken(&[Usage, Acl], |t| with(t.small, 0o644, ACCESS_ACL, &minimal, t));
    broken(&[Usage, Acl], |t| with(t.small, 0o644, DEFAULT_ACL, &masked, t));
    broken(&[Usage, Acl], |t| with(t.directory, 0o644, ACCESS_ACL, &masked.slice(..20), t));
    broken(&[Usage, Acl], |t| with(t.directory, 0o755, DEFAULT_ACL, &masked.slice(..4), t));
}

#[test]
fn bad_records_and_keys_are_findings_and_the_check_goes_on() {
    use FindingKind::*;
    for cf in Cf::ALL {
        broken(&[BadKey], |t| t.f.put(cf, b"\xff\xff", Bytes::new()));
        broken(&[BadKey], |t| t.f.put(cf, b"\0", Bytes::new()));
    }
    // The inode cannot be decoded: what it counted for is missing from the sums.
    broken(&[BadRecord, LostChunk, Usage], |t| {
        t.f.put(Cf::Inode, &keys::inode(t.large), Bytes::from_static(b"\x01\x01garbage"));
    });
    broken(&[BadRecord, DirentCookie, DirentParent], |t| {
        t.f.put(Cf::Dirent, &keys::dirent(t.inner, b"large"), Bytes::from_static(b"?"));
    });
    broken(&[BadRecord, DirentCookie], |t| {
        let cookie = cookie_of(t, t.inner, b"large");
        t.f.put(Cf::Cookie, &keys::cookie(t.inner, cookie), Bytes::new());
    });
    for key in
        [&keys::session(tree().session)[..], &keys::result(tree().session, 1), &keys::staged(tree().staged)]
    {
        broken(&[BadRecord], |t| t.f.put(Cf::Sys, key, Bytes::from_static(b"?")));
    }
    broken(&[BadRecord], |t| {
        let mut record = t.f.get(t.small);
        record.mode = 0o100644;
        t.f.set(t.small, &record);
    });
    broken(&[LostEntry, LostInode, InodeCount, DirectoryParent], |t| {
        t.f.delete(Cf::Inode, &keys::inode(InodeNo::ROOT));
        // And a parent that is not there.
        let mut record = t.f.get(t.directory);
        record.parent = Some(ino(999));
        t.f.set(t.directory, &record);
    });
}

#[test]
fn contents_in_several_windows_are_all_matched() {
    let mut f = Fixture::new();
    for i in 0..200 {
        f.file(InodeNo::ROOT, format!("{i}").as_bytes(), &vec![1; 2 * CHUNK]);
    }
    let lost = ContentId::new(f.id()).unwrap();
    f.put(Cf::Chunk, &keys::chunk(lost, 0), Bytes::from_static(b"x"));
    let view = f.view();
    for capacity in [1, 7, 64, 199, 200, 1000] {
        let mut findings = Vec::new();
        let mut report = |item| {
            if let CheckItem::Finding { kind, .. } = item {
                findings.push(kind);
            }
            ControlFlow::Continue(())
        };
        let mut checker = Checker {
            view: &view,
            read_data: true,
            report: &mut report,
            summary: CheckSummary::default(),
            greatest: Greatest::default(),
            stopped: false,
        };
        let mut window = content::Window::starting(0, capacity);
        tree::check(&mut checker, &mut window);
        content::check(&mut checker, window);
        assert_eq!(checker.summary.chunks, 401, "capacity {capacity}");
        assert_eq!(findings, ["lost-chunk"], "capacity {capacity}");
    }
}

#[test]
fn a_check_ends_when_nobody_listens() {
    let t = tree();
    for i in 0..1000 {
        t.f.put(Cf::Inode, &keys::inode(ino(1000 + i)), Bytes::from_static(b"?"));
    }
    let mut items = 0;
    check(&t.f.view_as_it_is(), true, &mut |_| {
        items += 1;
        ControlFlow::Break(())
    })
    .unwrap();
    assert_eq!(items, 1);
}
