//! Reads against trees made record by record in memory, without the executor.

use std::sync::Arc;

use shardfs_proto::types::op::{IndexValue, Indexes, ShardState};
use shardfs_proto::types::{ClientId, Sequence, SessionId, ShardId, Timestamp};

use super::*;
use crate::shard::keys::ContentId;
use crate::shard::list::{ListQuery, Listed, Listing, Step};
use crate::shard::mem::MemStore;
use crate::shard::records::{Counters, Header, INLINE_BYTES_MAX, Orphan, SessionRecord, Slot, Staged};
use crate::shard::store::{Batch, Change, Store};

/// Bytes of a chunk in these trees.
pub(crate) const CHUNK: usize = 4096;

/// A tree whose records are written directly: whole unless a test breaks it.
pub(crate) struct Fixture {
    pub(crate) store: MemStore,
    next_ino: u64,
    next_id: u64,
    op_seq: u64,
    next_session: u64,
}

pub(crate) fn ino(number: u64) -> InodeNo {
    InodeNo::new(number).unwrap()
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::new(seconds, 0).unwrap()
}

impl Fixture {
    pub(crate) fn new() -> Fixture {
        let mut f =
            Fixture { store: MemStore::default(), next_ino: 2, next_id: 1, op_seq: 0, next_session: 1 };
        f.put(Cf::Sys, keys::HEADER, f.header().encode());
        let mut root = f.blank(FileKind::Directory);
        root.nlink = 2;
        root.parent = Some(InodeNo::ROOT);
        f.set(InodeNo::ROOT, &root);
        f
    }

    pub(crate) fn header(&self) -> Header {
        Header {
            id: ShardId::new(7).unwrap(),
            owner: ClientId::new("tests").unwrap(),
            state: ShardState::Active,
            limit_bytes: None,
            chunk_bytes: CHUNK as u32,
            created: at(1),
        }
    }

    pub(crate) fn put(&self, cf: Cf, key: &[u8], value: Bytes) {
        let changes = vec![(cf, Bytes::copy_from_slice(key), Change::Put(value))];
        self.store.write(&Batch { chunk_ranges: vec![], changes }, false).unwrap();
    }

    pub(crate) fn delete(&self, cf: Cf, key: &[u8]) {
        let changes = vec![(cf, Bytes::copy_from_slice(key), Change::Delete)];
        self.store.write(&Batch { chunk_ranges: vec![], changes }, false).unwrap();
    }

    pub(crate) fn blank(&mut self, kind: FileKind) -> InodeRecord {
        self.op_seq += 1;
        InodeRecord {
            kind,
            flags: 0,
            mode: 0o644,
            uid: 1,
            gid: 2,
            nlink: 1,
            rdev: 0,
            size: 0,
            entries: 0,
            version: Version::new(self.op_seq),
            atime: at(10),
            mtime: at(11),
            ctime: at(12),
            btime: at(13),
            parent: None,
            content: Content::EMPTY,
            target: Bytes::new(),
            xattrs: Default::default(),
            indexes: Indexes::new(),
        }
    }

    pub(crate) fn set(&self, inode: InodeNo, record: &InodeRecord) {
        self.put(Cf::Inode, &keys::inode(inode), record.encode());
    }

    pub(crate) fn get(&self, inode: InodeNo) -> InodeRecord {
        record(&self.bare_view(), inode).unwrap()
    }

    /// Gives an inode a name.
    pub(crate) fn link(&mut self, parent: InodeNo, name: &[u8], inode: InodeNo, kind: FileKind) -> Cookie {
        let cookie = Cookie::new(self.id());
        self.put(Cf::Dirent, &keys::dirent(parent, name), Dirent { inode, kind, cookie }.encode());
        let entry = CookieEntry { inode, kind, name: Bytes::copy_from_slice(name) };
        self.put(Cf::Cookie, &keys::cookie(parent, cookie), entry.encode());
        self.put(Cf::Parent, &keys::parent(inode, parent, name), Bytes::new());
        let mut directory = self.get(parent);
        directory.entries += 1;
        directory.nlink += u32::from(kind == FileKind::Directory);
        self.set(parent, &directory);
        cookie
    }

    pub(crate) fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    pub(crate) fn inode(&mut self, record: &InodeRecord) -> InodeNo {
        let inode = ino(self.next_ino);
        self.next_ino += 1;
        self.set(inode, record);
        inode
    }

    pub(crate) fn directory(&mut self, parent: InodeNo, name: &[u8]) -> InodeNo {
        let mut record = self.blank(FileKind::Directory);
        record.nlink = 2;
        record.parent = Some(parent);
        let inode = self.inode(&record);
        self.link(parent, name, inode, FileKind::Directory);
        inode
    }

    /// A regular file; chunks that are all zeros become holes.
    pub(crate) fn file(&mut self, parent: InodeNo, name: &[u8], bytes: &[u8]) -> InodeNo {
        let mut record = self.blank(FileKind::Regular);
        self.fill(&mut record, bytes);
        let inode = self.inode(&record);
        self.link(parent, name, inode, FileKind::Regular);
        inode
    }

    pub(crate) fn fill(&mut self, record: &mut InodeRecord, bytes: &[u8]) {
        record.size = bytes.len() as u64;
        if bytes.len() <= INLINE_BYTES_MAX {
            record.content = Content::Inline(Bytes::copy_from_slice(bytes));
            return;
        }
        let id = ContentId::new(self.id()).unwrap();
        let mut count = 0;
        for (number, chunk) in bytes.chunks(CHUNK).enumerate() {
            // What a chunk lacks is zeros.
            let end = chunk.iter().rposition(|b| *b != 0).map_or(0, |at| at + 1);
            if end > 0 {
                self.put(Cf::Chunk, &keys::chunk(id, number as u32), Bytes::copy_from_slice(&chunk[..end]));
                count += 1;
            }
        }
        record.content = Content::Chunks { id, count };
    }

    pub(crate) fn special(&mut self, parent: InodeNo, name: &[u8], kind: FileKind) -> InodeNo {
        let mut record = self.blank(kind);
        if kind == FileKind::Symlink {
            record.target = Bytes::from_static(b"some/where");
        }
        let inode = self.inode(&record);
        self.link(parent, name, inode, kind);
        inode
    }

    pub(crate) fn session(&mut self) -> SessionId {
        let session = SessionId::new(self.next_session).unwrap();
        self.next_session += 1;
        let record = SessionRecord { opened: at(5), label: "test".into() };
        self.put(Cf::Sys, &keys::session(session), record.encode());
        let slot = Slot { sequence: Sequence::new(1025).unwrap(), fingerprint: None, result: Bytes::new() };
        self.put(Cf::Sys, &keys::result(session, 1), slot.encode());
        session
    }

    /// A file without a name that a session holds.
    pub(crate) fn orphan(&mut self, holder: SessionId) -> InodeNo {
        let mut record = self.blank(FileKind::Regular);
        record.nlink = 0;
        self.fill(&mut record, &[7; 3 * CHUNK]);
        let inode = self.inode(&record);
        self.put(Cf::Sys, &keys::orphan(inode), Orphan { holders: vec![holder] }.encode());
        inode
    }

    /// A content of a streamed Put that is under way.
    pub(crate) fn staged(&mut self) -> ContentId {
        let id = ContentId::new(self.id()).unwrap();
        self.put(Cf::Sys, &keys::staged(id), Staged { session: None, begun: at(6) }.encode());
        self.put(Cf::Chunk, &keys::chunk(id, 0), Bytes::from_static(b"staged"));
        id
    }

    pub(crate) fn index(&mut self, inode: InodeNo, name: &str, value: IndexValue) {
        let mut record = self.get(inode);
        self.put(Cf::Index, &keys::index(name, &value, inode), Bytes::new());
        record.indexes.insert(name.to_owned(), value);
        self.set(inode, &record);
    }

    /// What the counters must be.
    pub(crate) fn counters(&self) -> Counters {
        let (mut used_bytes, mut inodes) = (0, 0);
        self.store
            .scan(Cf::Inode, &[], None, &mut |key, value| {
                let inode = keys::parse_inode(key)?;
                let record = InodeRecord::decode(inode, &Bytes::copy_from_slice(value))?;
                used_bytes += record.used_bytes(CHUNK as u32);
                inodes += 1;
                Ok(ControlFlow::Continue(()))
            })
            .unwrap();
        Counters {
            used_bytes,
            inodes,
            next_ino: self.next_ino,
            next_id: self.next_id,
            op_seq: self.op_seq,
            next_session: self.next_session,
        }
    }

    fn bare_view(&self) -> ReadView {
        ReadView::new(self.store.snapshot().unwrap(), Arc::new(self.header()), None)
    }

    /// A view in which the counters are right.
    pub(crate) fn view(&self) -> ReadView {
        self.put(Cf::Sys, keys::COUNTERS, self.counters().encode());
        self.bare_view()
    }

    /// A view of what is there, counters included.
    pub(crate) fn view_as_it_is(&self) -> ReadView {
        self.bare_view()
    }
}

fn key(text: &str) -> Key {
    Key::new(Bytes::copy_from_slice(text.as_bytes())).unwrap()
}

fn reason<T: std::fmt::Debug>(outcome: Result<T>) -> Reason {
    outcome.unwrap_err().reason()
}

#[test]
fn names_are_looked_up() {
    let mut f = Fixture::new();
    let a = f.directory(InodeNo::ROOT, b"a");
    let b = f.directory(a, b"b");
    let file = f.file(b, b"f", b"hello");
    let view = f.view();
    assert_eq!(lookup(&view, b, b"f").unwrap().inode, file);
    assert_eq!(lookup(&view, b, b".").unwrap().inode, b);
    assert_eq!(lookup(&view, b, b"..").unwrap().inode, a);
    assert_eq!(lookup(&view, InodeNo::ROOT, b"..").unwrap().inode, InodeNo::ROOT);
    assert_eq!(reason(lookup(&view, b, b"g")), Reason::NotFound);
    assert_eq!(reason(lookup(&view, file, b"g")), Reason::NotDirectory);
    assert_eq!(reason(lookup(&view, file, b"..")), Reason::NotDirectory);
    assert_eq!(reason(lookup(&view, ino(99), b"g")), Reason::NotFound);
    assert_eq!(reason(lookup(&view, b, &[b'x'; 256])), Reason::NameTooLong);
    assert_eq!(reason(lookup(&view, b, b"")), Reason::InvalidArgument);
    f.delete(Cf::Inode, &keys::inode(file));
    assert_eq!(reason(lookup(&f.view_as_it_is(), b, b"f")), Reason::Corrupt);
}

#[test]
fn ranges_of_files_equal_the_model() {
    let seed = fastrand::u64(..1 << 32);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut f = Fixture::new();
    for size in [0, 1, 4095, 4096, 4097, 2 * CHUNK, 5 * CHUNK + 77, 40 * CHUNK] {
        let mut bytes: Vec<u8> = (0..size).map(|_| rng.u8(1..)).collect();
        for chunk in bytes.chunks_mut(CHUNK) {
            match rng.u8(..3) {
                // A hole, a chunk with a zero tail, a full one.
                0 => chunk.fill(0),
                1 => {
                    let from = rng.usize(..chunk.len());
                    chunk[from..].fill(0);
                }
                _ => {}
            }
        }
        let inode = f.file(InodeNo::ROOT, format!("f{size}").as_bytes(), &bytes);
        let view = f.view();
        for _ in 0..200 {
            let offset = rng.usize(..=size + 10);
            let length = rng.usize(..=size + 10);
            let expected = &bytes[offset.min(size)..(offset + length).min(size).max(offset.min(size))];
            let found = read(&view, inode, offset as u64, length as u32).unwrap();
            assert!(found == expected, "seed {seed} size {size} offset {offset} length {length}");
        }
        assert_eq!(read(&view, inode, u64::MAX, 5).unwrap(), Bytes::new());
    }
}

#[test]
fn reads_are_refused_where_they_make_no_sense() {
    let mut f = Fixture::new();
    let d = f.directory(InodeNo::ROOT, b"d");
    let s = f.special(InodeNo::ROOT, b"s", FileKind::Symlink);
    let p = f.special(InodeNo::ROOT, b"p", FileKind::Fifo);
    let file = f.file(InodeNo::ROOT, b"f", b"x");
    let view = f.view();
    assert_eq!(reason(read(&view, d, 0, 1)), Reason::IsDirectory);
    assert_eq!(reason(read(&view, s, 0, 1)), Reason::WrongKind);
    assert_eq!(reason(read(&view, p, 0, 1)), Reason::WrongKind);
    assert_eq!(reason(read(&view, file, 0, VALUE_BYTES_MAX as u32 + 1)), Reason::TooLarge);
    assert_eq!(read_link(&view, s).unwrap(), "some/where");
    assert_eq!(reason(read_link(&view, file)), Reason::WrongKind);
}

#[test]
fn directories_are_paged_by_cookie() {
    let mut f = Fixture::new();
    let d = f.directory(InodeNo::ROOT, b"d");
    let mut cookies = Vec::new();
    for i in 0..300 {
        let inode = f.file(InodeNo::ROOT, format!("other{i}").as_bytes(), b"");
        cookies.push(f.link(d, format!("n{:03}", 299 - i).as_bytes(), inode, FileKind::Regular));
    }
    let view = f.view();
    let mut after = Cookie::new(0);
    let mut seen = Vec::new();
    loop {
        let page = read_directory(&view, d, after, 7, true).unwrap();
        assert_eq!(page.parent, InodeNo::ROOT);
        assert!(page.entries.len() == 7 || page.end);
        for entry in &page.entries {
            assert_eq!(entry.attr.as_ref().unwrap().inode, entry.inode);
            seen.push(entry.cookie);
            after = entry.cookie;
        }
        if page.end {
            break;
        }
    }
    assert_eq!(seen, cookies);
    let all = read_directory(&view, d, Cookie::new(0), 300, false).unwrap();
    assert!(all.end && all.entries.iter().all(|entry| entry.attr.is_none()));
    assert!(!read_directory(&view, d, Cookie::new(0), 299, false).unwrap().end);
    assert!(read_directory(&view, d, Cookie::new(u64::MAX), 1, false).unwrap().end);
    assert_eq!(reason(read_directory(&view, d, Cookie::new(0), 0, false)), Reason::InvalidArgument);
    let file = all.entries[0].inode;
    assert_eq!(reason(read_directory(&view, file, Cookie::new(0), 1, false)), Reason::NotDirectory);
}

#[test]
fn values_are_found_by_key() {
    let mut f = Fixture::new();
    let a = f.directory(InodeNo::ROOT, b"a");
    let file = f.file(a, b"f", b"hello");
    f.special(a, b"s", FileKind::Symlink);
    let big = f.file(a, b"big", &vec![1; VALUE_BYTES_MAX + 1]);
    let view = f.view();
    let version = get_attr(&view, file).unwrap().version;
    assert_eq!(get_value(&view, &key("a/f"), 0, None, None).unwrap().1, "hello");
    assert_eq!(get_value(&view, &key("a/f"), 1, Some(3), Some(version)).unwrap().1, "ell");
    assert_eq!(get_value(&view, &key("a/f"), 5, Some(3), None).unwrap().1, "");
    assert_eq!(get_value(&view, &key("a/f"), 99, None, None).unwrap().1, "");
    let other = Some(Version::new(version.get() + 1));
    assert_eq!(reason(get_value(&view, &key("a/f"), 0, None, other)), Reason::VersionMismatch);
    assert_eq!(reason(get_value(&view, &key("a"), 0, None, None)), Reason::IsDirectory);
    assert_eq!(reason(get_value(&view, &key("a/s"), 0, None, None)), Reason::WrongKind);
    assert_eq!(reason(get_value(&view, &key("a/f/g"), 0, None, None)), Reason::NotDirectory);
    assert_eq!(reason(get_value(&view, &key("b/f"), 0, None, None)), Reason::NotFound);
    assert_eq!(reason(get_value(&view, &key("a/g"), 0, None, None)), Reason::NotFound);
    let too_large = get_value(&view, &key("a/big"), 0, None, None).unwrap_err();
    assert_eq!(too_large.reason(), Reason::TooLarge);
    assert!(too_large.message().contains("by ranges"), "{too_large}");
    assert_eq!(get_value(&view, &key("a/big"), 1, None, None).unwrap().1.len(), VALUE_BYTES_MAX);
    assert_eq!(object_meta(&view, &key("a/big")).unwrap().attr.inode, big);
}

#[test]
fn many_values_are_found_as_one_by_one() {
    let mut f = Fixture::new();
    let a = f.directory(InodeNo::ROOT, b"a");
    let b = f.directory(a, b"b");
    for i in 0..20 {
        f.file(b, format!("f{i}").as_bytes(), format!("value {i}").as_bytes());
    }
    f.special(a, b"s", FileKind::Fifo);
    let view = f.view();
    let names = ["a/b/f1", "a/b", "a/s", "x/y", "a/b/f19", "a/b/nope", "a/s/z", "x/z", "a/b/f1", "a/b/f2"];
    let wanted: Vec<Key> = names.iter().map(|name| key(name)).collect();
    let many = find_values(&view, &wanted).unwrap();
    for (key, found) in wanted.iter().zip(many) {
        match (find_value(&view, key), found) {
            (Ok(one), Ok(other)) => assert_eq!((one.inode, one.record), (other.inode, other.record)),
            (Err(one), Err(other)) => {
                assert_eq!(one.reason(), other.reason(), "{key}");
                assert!(other.message().contains(&key.to_string()), "{other} does not name {key}");
            }
            (one, other) => panic!("{key}: {one:?} but {other:?}"),
        }
    }
}

#[test]
fn attributes_are_read() {
    let mut f = Fixture::new();
    let file = f.file(InodeNo::ROOT, b"f", b"x");
    let mut record = f.get(file);
    record.xattrs.insert(Bytes::from_static(b"user.a"), Bytes::from_static(b"1"));
    record.xattrs.insert(Bytes::from_static(b"user.b"), Bytes::new());
    f.set(file, &record);
    let view = f.view();
    assert_eq!(get_xattr(&view, file, b"user.a").unwrap(), "1");
    assert_eq!(get_xattr(&view, file, b"user.b").unwrap(), "");
    assert_eq!(reason(get_xattr(&view, file, b"user.c")), Reason::NoAttribute);
    assert_eq!(list_xattrs(&view, file).unwrap(), ["user.a", "user.b"]);
}

#[test]
fn listings_run_over_a_view() {
    let mut f = Fixture::new();
    let a = f.directory(InodeNo::ROOT, b"a");
    f.file(a, b"x", b"1");
    f.file(InodeNo::ROOT, b"a-b", b"2");
    f.file(InodeNo::ROOT, b"a0", b"3");
    f.file(a, &[0xff], b"4");
    let mut listing = Listing::new(f.view(), InodeNo::ROOT, &ListQuery::default()).unwrap();
    let mut found = Vec::new();
    while let Step::Item(Listed::Key(line)) = listing.step().unwrap() {
        found.push(line.key);
    }
    assert_eq!(found, [&b"a-b"[..], b"a/x", b"a/\xff", b"a0"]);
}
