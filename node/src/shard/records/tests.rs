//! Golden bytes of every record, round trips, and decoding of anything.

use proptest::prelude::*;
use shardfs_proto::types::op::{IndexValue, ShardState};
use shardfs_proto::types::{
    ClientId, FileLock, LockKind, LockOwner, LockRange, Reason, SessionId, ShardId, Timestamp, Version,
};

use super::*;
use crate::shard::fingerprint::Fingerprint;
use crate::shard::keys::ContentId;

fn ino(n: u64) -> InodeNo {
    InodeNo::new(n).unwrap()
}

fn at(seconds: i64, nanos: u32) -> Timestamp {
    Timestamp::new(seconds, nanos).unwrap()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn sample() -> InodeRecord {
    InodeRecord {
        kind: FileKind::Regular,
        flags: 0,
        mode: 0o644,
        uid: 1000,
        gid: 100,
        nlink: 2,
        rdev: 0,
        size: 2,
        entries: 0,
        version: Version::new(7),
        atime: at(1, 2),
        mtime: at(-1, 3),
        ctime: at(4, 5),
        btime: at(6, 7),
        parent: None,
        content: Content::Inline(Bytes::from_static(b"hi")),
        target: Bytes::new(),
        xattrs: [(Bytes::from_static(b"user.a"), Bytes::from_static(b"v"))].into(),
        indexes: [
            ("i".to_owned(), IndexValue::Integer(-2)),
            ("t".to_owned(), IndexValue::Text("x".to_owned())),
            ("z".to_owned(), IndexValue::Time(at(8, 9))),
        ]
        .into(),
    }
}

#[test]
fn inode_records_are_the_golden_bytes() {
    let fixed = concat!(
        "0101",
        "0000",
        "000001a4",
        "000003e8",
        "00000064",
        "00000002",
        "00000000",
        "0000000000000002",
        "0000000000000007",
        "000000000000000100000002",
        "ffffffffffffffff00000003",
        "000000000000000400000005",
        "000000000000000600000007",
        "0000000000000000",
        "0000000000000000",
        "000000026869",
    );
    let tail = concat!(
        "0001",
        "06757365722e61",
        "0000000176",
        "0003",
        "016902fffffffffffffffe",
        "0174010000000178",
        "017a03000000000000000800000009",
    );
    assert_eq!(hex(&sample().encode()), format!("{fixed}{tail}"));

    let directory = InodeRecord {
        kind: FileKind::Directory,
        flags: INODE_FLAG_AUTO,
        size: 0,
        entries: 3,
        parent: Some(ino(9)),
        content: Content::EMPTY,
        xattrs: Default::default(),
        indexes: Default::default(),
        ..sample()
    };
    let encoded = hex(&directory.encode());
    assert!(encoded.starts_with("01020001"), "{encoded}");
    assert!(encoded.ends_with(concat!("0000000000000009", "0000000000000000", "00000000", "0000", "0000")));
    assert_eq!(&encoded[48..64], "0000000000000003");

    let chunked = InodeRecord {
        size: 100_000,
        content: Content::Chunks { id: ContentId::new(0xabcd).unwrap(), count: 2 },
        xattrs: Default::default(),
        indexes: Default::default(),
        ..sample()
    };
    let encoded = hex(&chunked.encode());
    assert!(encoded.ends_with(concat!("000000000000abcd", "0000000000000002", "00000000", "0000", "0000")));
}

#[test]
fn small_records_are_the_golden_bytes() {
    let dirent = Dirent { inode: ino(2), kind: FileKind::Symlink, cookie: Cookie::new(3) };
    assert_eq!(hex(&dirent.encode()), "010000000000000002030000000000000003");
    let entry = CookieEntry { inode: ino(2), kind: FileKind::Fifo, name: Bytes::from_static(b"ab") };
    assert_eq!(hex(&entry.encode()), "010000000000000002046162");
    let header = Header {
        id: ShardId::new(5).unwrap(),
        owner: ClientId::new("me").unwrap(),
        state: ShardState::ReadOnly,
        limit_bytes: Some(1 << 31),
        chunk_bytes: 65536,
        created: at(1, 2),
    };
    assert_eq!(
        hex(&header.encode()),
        concat!(
            "01",
            "0000000000000005",
            "02",
            "0000000080000000",
            "00010000",
            "000000000000000100000002",
            "026d65"
        )
    );
    let counters = Counters { used_bytes: 1, inodes: 2, next_ino: 3, next_id: 4, op_seq: 5, next_session: 6 };
    assert_eq!(
        hex(&counters.encode()),
        concat!(
            "01",
            "0000000000000001",
            "0000000000000002",
            "0000000000000003",
            "0000000000000004",
            "0000000000000005",
            "0000000000000006"
        )
    );
    let session = SessionRecord { opened: at(1, 2), label: "ab".into() };
    assert_eq!(hex(&session.encode()), "01000000000000000100000002026162");
    let slot = Slot {
        sequence: shardfs_proto::types::Sequence::new(9).unwrap(),
        fingerprint: Some(Fingerprint::from_stored(0x0102_0304)),
        result: Bytes::from_static(b"\x0a"),
    };
    assert_eq!(hex(&slot.encode()), "020000000000000009010203040a");
    let bare = Slot { fingerprint: None, ..slot.clone() };
    assert_eq!(hex(&bare.encode()), "0100000000000000090a");
    assert_eq!(Slot::decode(&bare.encode()).unwrap(), bare);
    let orphan = Orphan { holders: vec![SessionId::new(1).unwrap(), SessionId::new(2).unwrap()] };
    assert_eq!(hex(&orphan.encode()), "0100000000000000010000000000000002");
    let lock = FileLock {
        owner: LockOwner { session: SessionId::new(1).unwrap(), number: 2 },
        pid: 3,
        range: LockRange::new(4, u64::MAX).unwrap(),
        kind: LockKind::Write,
    };
    let locks = LocksRecord { locks: vec![lock] };
    assert_eq!(
        hex(&locks.encode()),
        "0100000000000000010000000000000002000000030000000000000004ffffffffffffffff02"
    );
    let staged = Staged { session: SessionId::new(4), begun: at(1, 2) };
    assert_eq!(hex(&staged.encode()), "010000000000000004000000000000000100000002");

    assert_eq!(Dirent::decode(&dirent.encode()).unwrap(), dirent);
    assert_eq!(CookieEntry::decode(&entry.encode()).unwrap(), entry);
    assert_eq!(Header::decode(&header.encode()).unwrap(), header);
    assert_eq!(Counters::decode(&counters.encode()).unwrap(), counters);
    assert_eq!(SessionRecord::decode(&session.encode()).unwrap(), session);
    assert_eq!(Slot::decode(&slot.encode()).unwrap(), slot);
    assert_eq!(Orphan::decode(&orphan.encode()).unwrap(), orphan);
    assert_eq!(Staged::decode(&staged.encode()).unwrap(), staged);
    assert_eq!(LocksRecord::decode(&locks.encode()).unwrap(), locks);
}

#[test]
fn a_newer_shard_is_refused_by_its_format() {
    let error = Header::decode(b"\x02whatever").unwrap_err();
    assert_eq!(error.reason(), Reason::Unsupported, "nothing is damaged");
    assert!(error.message().contains("format 2"), "{error}");
    let error = InodeRecord::decode(ino(77), &Bytes::from_static(b"\x09")).unwrap_err();
    assert!(error.message().contains("inode 77") && error.message().contains("format 9"), "{error}");
}

fn times() -> impl Strategy<Value = Timestamp> {
    (any::<i64>(), 0u32..1_000_000_000).prop_map(|(s, n)| at(s, n))
}

fn index_values() -> impl Strategy<Value = IndexValue> {
    prop_oneof![
        ".{0,20}".prop_map(IndexValue::Text),
        any::<i64>().prop_map(IndexValue::Integer),
        times().prop_map(IndexValue::Time),
    ]
}

fn records() -> impl Strategy<Value = InodeRecord> {
    let kinds = prop_oneof![
        Just(FileKind::Regular),
        Just(FileKind::Directory),
        Just(FileKind::Symlink),
        Just(FileKind::Fifo),
        Just(FileKind::Socket),
        Just(FileKind::CharDevice),
        Just(FileKind::BlockDevice),
    ];
    let bytes = |max: usize| prop::collection::vec(any::<u8>(), 0..max).prop_map(Bytes::from);
    let numbers = (any::<u16>(), any::<[u32; 5]>(), any::<[u64; 4]>());
    let maps = (
        prop::collection::btree_map(bytes(30), bytes(60), 0..4),
        prop::collection::btree_map("[a-z]{1,8}", index_values(), 0..4),
    );
    (kinds, numbers, [times(), times(), times(), times()], bytes(200), any::<bool>(), maps).prop_map(
        |(kind, (flags, n, big), t, body, inline, (xattrs, indexes))| {
            let mut record = InodeRecord {
                kind,
                flags,
                mode: n[0],
                uid: n[1],
                gid: n[2],
                nlink: n[3],
                rdev: n[4],
                size: 0,
                entries: 0,
                version: Version::new(big[0]),
                atime: t[0],
                mtime: t[1],
                ctime: t[2],
                btime: t[3],
                parent: None,
                content: Content::EMPTY,
                target: Bytes::new(),
                xattrs,
                indexes,
            };
            match kind {
                FileKind::Regular if inline => {
                    record.size = body.len() as u64;
                    record.content = Content::Inline(body);
                }
                FileKind::Regular => {
                    record.size = big[1];
                    record.content =
                        Content::Chunks { id: ContentId::new(big[2].max(1)).unwrap(), count: big[3] };
                }
                FileKind::Directory => {
                    record.entries = big[1];
                    record.parent = Some(ino(big[2] % InodeNo::MAX.get() + 1));
                }
                FileKind::Symlink => record.target = body,
                _ => {}
            }
            record
        },
    )
}

proptest! {
    #[test]
    fn inode_records_round_trip(record in records()) {
        prop_assert_eq!(InodeRecord::decode(ino(1), &record.encode()).unwrap(), record);
    }

    #[test]
    fn damaged_inode_records_never_panic(
        record in records(), at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>()
    ) {
        let mut bytes = record.encode().to_vec();
        let place = at.index(bytes.len());
        bytes[place] = byte;
        let _ = InodeRecord::decode(ino(1), &bytes.clone().into());
        bytes.truncate(cut.index(bytes.len()));
        prop_assert_eq!(InodeRecord::decode(ino(1), &bytes.into()).unwrap_err().reason(), Reason::Corrupt);
    }

    #[test]
    fn anything_decodes_or_is_corrupt(bytes in prop::collection::vec(any::<u8>(), 0..80)) {
        let _ = Dirent::decode(&bytes);
        let _ = CookieEntry::decode(&bytes);
        let _ = Header::decode(&bytes);
        let _ = Counters::decode(&bytes);
        let _ = SessionRecord::decode(&bytes);
        let _ = Slot::decode(&bytes);
        let _ = Orphan::decode(&bytes);
        let _ = Staged::decode(&bytes);
        let _ = LocksRecord::decode(&bytes);
    }
}
