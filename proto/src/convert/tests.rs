//! What goes over the wire comes back the same; what is not valid does not come in.

use super::*;
use crate::types::limits::FILE_BYTES_MAX;
use crate::types::op::{AllocateMode, NewInode, Operation, SeekFor, SetAttr, SetTime, Sought};
use crate::types::{FileName, LockKind, LockRange};

fn name(n: &str) -> FileName {
    FileName::new(Bytes::copy_from_slice(n.as_bytes())).unwrap()
}

fn ino(n: u64) -> InodeNo {
    InodeNo::new(n).unwrap()
}

fn every_operation() -> Vec<Operation> {
    let inode = NewInode { mode: 0o644, uid: 1, gid: 2, unmasked_mode: Some(0o666) };
    let time = Timestamp::new(-5, 7).unwrap();
    let item = PutItem {
        key: Key::new("a/b").unwrap(),
        value: Bytes::from_static(b"v"),
        options: PutOptions {
            mode: Some(0o600),
            uid: Some(3),
            gid: None,
            mtime: Some(time),
            indexes: Indexes::from([
                ("t".into(), IndexValue::Text("x".into())),
                ("n".into(), IndexValue::Integer(-3)),
                ("w".into(), IndexValue::Time(time)),
            ]),
            if_absent: true,
            if_version: Some(Version::new(9)),
        },
    };
    let mut all = vec![
        Operation::Create {
            parent: ino(1),
            name: name("f"),
            kind: FileKind::CharDevice,
            inode,
            rdev: 5,
            existing_ok: true,
            open: true,
        },
        Operation::MakeDirectory { parent: ino(1), name: name("d"), inode },
        Operation::MakeSymlink {
            parent: ino(1),
            name: name("s"),
            target: Bytes::from_static(b"../x"),
            inode,
        },
        Operation::Link { inode: ino(7), new_parent: ino(1), new_name: name("l") },
        Operation::Unlink { parent: ino(1), name: name("f") },
        Operation::RemoveDirectory { parent: ino(1), name: name("d") },
        Operation::Rename {
            parent: ino(1),
            name: name("a"),
            new_parent: ino(2),
            new_name: name("b"),
            no_replace: false,
            exchange: true,
        },
        Operation::SetAttr {
            inode: ino(3),
            set: SetAttr {
                mode: Some(0o7777),
                uid: Some(0),
                gid: Some(u32::MAX - 1),
                size: Some(FILE_BYTES_MAX),
                atime: Some(SetTime::Now),
                mtime: Some(SetTime::At(time)),
                kill_set_id: true,
            },
        },
        Operation::Write {
            inode: ino(3),
            offset: 17,
            data: Bytes::from_static(b"data"),
            append: false,
            kill_set_id: true,
        },
        Operation::SetXattr {
            inode: ino(3),
            name: Bytes::from_static(b"user.x"),
            value: Bytes::from_static(b""),
            create_only: true,
            replace_only: false,
            kill_set_group_id: true,
        },
        Operation::RemoveXattr { inode: ino(3), name: Bytes::from_static(b"user.x") },
        Operation::PutValue { item: item.clone() },
        Operation::PutValues { items: vec![item.clone(), item], atomic: true },
        Operation::DeleteValue { key: Key::new("k").unwrap(), if_version: None },
        Operation::CopyRange {
            source: ino(3),
            source_offset: 1,
            destination: ino(4),
            destination_offset: 2,
            length: u64::MAX,
            kill_set_id: true,
        },
    ];
    for kind in [None, Some(LockKind::Read), Some(LockKind::Write)] {
        let range = LockRange::new(7, u64::MAX).unwrap();
        all.push(Operation::SetLock { inode: ino(3), owner: u64::MAX, pid: 9, range, kind });
    }
    for mode in [
        AllocateMode::Allocate { keep_size: false },
        AllocateMode::Allocate { keep_size: true },
        AllocateMode::PunchHole,
        AllocateMode::ZeroRange { keep_size: false },
        AllocateMode::ZeroRange { keep_size: true },
    ] {
        all.push(Operation::Allocate { inode: ino(3), offset: 4096, length: 1, mode, kill_set_id: true });
    }
    all
}

#[test]
fn operations_survive_the_wire() {
    for operation in every_operation() {
        let wire = operation_to_wire(&operation);
        assert_eq!(operation_from_wire(Some(wire)).unwrap(), operation);
    }
}

#[test]
fn the_inode_that_an_operation_changes_is_known() {
    for operation in every_operation() {
        let changed = operation.changed_inode();
        match &operation {
            Operation::CopyRange { destination, .. } => assert_eq!(changed, Some(*destination)),
            operation if operation.is_replayable() => assert_eq!(changed, Some(ino(3)), "{operation:?}"),
            Operation::Unlink { .. } | Operation::PutValue { .. } => assert_eq!(changed, None),
            _ => {}
        }
    }
}

#[test]
fn bad_operations_are_refused() {
    let bad = |kind| operation_from_wire(Some(wire::Operation { kind: Some(kind) })).unwrap_err().reason();
    use wire::operation::Kind as W;
    assert_eq!(operation_from_wire(None).unwrap_err().reason(), Reason::InvalidArgument);
    assert_eq!(bad(W::Unlink(wire::Unlink { parent: 0, name: "x".into() })), Reason::InvalidArgument);
    assert_eq!(bad(W::Unlink(wire::Unlink { parent: 1, name: "..".into() })), Reason::InvalidArgument);
    assert_eq!(bad(W::Unlink(wire::Unlink { parent: 1, name: vec![b'x'; 256].into() })), Reason::NameTooLong);
    let write = wire::Write { inode: 1, offset: u64::MAX, data: "x".into(), ..Default::default() };
    assert_eq!(bad(W::Write(write)), Reason::FileTooLarge);
    let write = wire::Write { inode: 1, data: vec![0; VALUE_BYTES_MAX + 1].into(), ..Default::default() };
    assert_eq!(bad(W::Write(write)), Reason::TooLarge);
    let set = wire::SetAttr { inode: 1, mode: Some(0o10000), ..Default::default() };
    assert_eq!(bad(W::SetAttr(set)), Reason::InvalidArgument);
    let new = wire::NewInode { unmasked_mode: Some(0o10000), ..Default::default() };
    let directory = wire::MakeDirectory { parent: 1, name: "d".into(), inode: Some(new) };
    assert_eq!(bad(W::MakeDirectory(directory)), Reason::InvalidArgument);
    let symlink = wire::MakeSymlink {
        parent: 1,
        name: "s".into(),
        target: Bytes::new(),
        inode: Some(wire::NewInode::default()),
    };
    let lock = wire::SetLock { inode: 1, start: 5, end: 4, kind: 1, ..Default::default() };
    assert_eq!(bad(W::SetLock(lock)), Reason::InvalidArgument);
    let lock = wire::SetLock { inode: 1, kind: 9, ..Default::default() };
    assert_eq!(bad(W::SetLock(lock)), Reason::InvalidArgument);
    assert_eq!(bad(W::MakeSymlink(symlink)), Reason::InvalidArgument);
    let both = wire::Rename {
        parent: 1,
        name: "a".into(),
        new_parent: 1,
        new_name: "b".into(),
        no_replace: true,
        exchange: true,
    };
    assert_eq!(bad(W::Rename(both)), Reason::InvalidArgument);
}

#[test]
fn what_is_sought_survives_the_wire() {
    for what in [SeekFor::Data, SeekFor::Hole] {
        assert_eq!(seek_for_from_wire(seek_for_to_wire(what)).unwrap(), what);
    }
    assert_eq!(seek_for_from_wire(0).unwrap_err().reason(), Reason::InvalidArgument);
    assert_eq!(seek_for_from_wire(7).unwrap_err().reason(), Reason::InvalidArgument);
    for sought in [Sought::Found(5), Sought::Continue(6), Sought::Nothing] {
        assert_eq!(sought_from_wire(&sought_to_wire(sought, None)).unwrap(), sought);
    }
    assert!(sought_from_wire(&wire::SeekReply::default()).is_err());
}

#[test]
fn batches_are_bounded() {
    let item = wire::PutItem { key: "k".into(), value: Bytes::new(), options: None };
    let many = vec![item.clone(); BATCH_ITEMS_MAX + 1];
    assert_eq!(put_items_from_wire(many).unwrap_err().reason(), Reason::TooLarge);
    let large = wire::PutItem { value: vec![0; VALUE_BYTES_MAX].into(), ..item };
    assert_eq!(put_items_from_wire(vec![large; 5]).unwrap_err().reason(), Reason::TooLarge);
}

#[test]
fn a_twofold_index_is_refused() {
    let index = wire::Index {
        name: "i".into(),
        value: Some(wire::IndexValue { value: Some(wire::index_value::Value::Integer(1)) }),
    };
    assert!(indexes_from_wire(vec![index.clone()]).is_ok());
    assert!(indexes_from_wire(vec![index.clone(), index]).is_err());
}
