//! Access control lists: what keeps them and permission bits in step, and who inherits them.

use bytes::Bytes;
use shardfs_proto::types::acl::{ACCESS_ACL, AclEntry, DEFAULT_ACL, Subject};
use shardfs_proto::types::op::{NewInode, Operation, PutOptions, SetAttr};
use shardfs_proto::types::{Acl, Attr, FileKind, InodeNo, Reason};

use super::harness::*;
use crate::shard::read;

const ROOT: InodeNo = InodeNo::ROOT;

fn acl(entries: &[(Subject, u8)]) -> Acl {
    Acl::new(entries.iter().map(|&(subject, permissions)| AclEntry { subject, permissions }).collect())
        .unwrap()
}

/// Owner, a named user, the group, the mask, others.
fn named(owner: u8, user: u8, group: u8, mask: u8, other: u8) -> Acl {
    acl(&[
        (Subject::Owner, owner),
        (Subject::User(1001), user),
        (Subject::OwningGroup, group),
        (Subject::Mask, mask),
        (Subject::Other, other),
    ])
}

fn set_value(inode: InodeNo, name: &'static [u8], value: Bytes) -> Operation {
    let name = Bytes::from_static(name);
    Operation::SetXattr {
        inode,
        name,
        value,
        create_only: false,
        replace_only: false,
        kill_set_group_id: false,
    }
}

fn set(inode: InodeNo, name: &'static [u8], acl: &Acl) -> Operation {
    set_value(inode, name, acl.encode())
}

fn chmod(inode: InodeNo, mode: u32) -> Operation {
    Operation::SetAttr { inode, set: SetAttr { mode: Some(mode), ..SetAttr::default() } }
}

fn make(parent: InodeNo, n: &str, kind: FileKind, mode: u32, unmasked_mode: Option<u32>) -> Operation {
    let inode = NewInode { mode, uid: 1, gid: 2, unmasked_mode };
    let name = name(n);
    match kind {
        FileKind::Directory => Operation::MakeDirectory { parent, name, inode },
        FileKind::Symlink => {
            Operation::MakeSymlink { parent, name, target: Bytes::from_static(b"somewhere"), inode }
        }
        kind => Operation::Create { parent, name, kind, inode, rdev: 0, existing_ok: false, open: false },
    }
}

async fn attr(world: &World, operation: Operation) -> Attr {
    world.run(operation).await.unwrap().attr.unwrap()
}

async fn reason(world: &World, operation: Operation) -> Reason {
    world.run(operation).await.unwrap_err().reason()
}

/// The list that an inode has under a name.
async fn stored(world: &World, inode: InodeNo, name: &[u8]) -> Option<Acl> {
    match read::get_xattr(&world.view().await, inode, name) {
        Ok(value) => Some(Acl::decode(&value).unwrap().expect("a list without entries is not kept")),
        Err(error) => {
            assert_eq!(error.reason(), Reason::NoAttribute);
            None
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_list_and_permission_bits_say_the_same() {
    let world = World::rocks(None, 65536);
    let file = world.create(ROOT, "f").await;
    assert_eq!(file.has_acl, Some(false));
    let file = file.inode;
    world.run(chmod(file, 0o4640)).await.unwrap();
    let after = attr(&world, set(file, ACCESS_ACL, &named(7, 6, 5, 4, 1))).await;
    assert_eq!((after.mode, after.has_acl), (0o4741, Some(true)));
    assert_eq!(stored(&world, file, ACCESS_ACL).await, Some(named(7, 6, 5, 4, 1)));
    assert_eq!(read::list_xattrs(&world.view().await, file).unwrap(), [ACCESS_ACL]);

    // chmod changes the mask, and neither the group's entry nor named ones.
    assert_eq!(attr(&world, chmod(file, 0o623)).await.mode, 0o623);
    assert_eq!(stored(&world, file, ACCESS_ACL).await, Some(named(6, 6, 5, 2, 3)));
    // Other changes leave it alone.
    let owner = SetAttr { uid: Some(9), kill_set_id: true, ..SetAttr::default() };
    world.run(Operation::SetAttr { inode: file, set: owner }).await.unwrap();
    world.write(file, 0, b"x").await.unwrap();
    assert_eq!(stored(&world, file, ACCESS_ACL).await, Some(named(6, 6, 5, 2, 3)));

    // One that permission bits say is not kept.
    let minimal = acl(&[(Subject::Owner, 6), (Subject::OwningGroup, 4), (Subject::Other, 0)]);
    let after = attr(&world, set(file, ACCESS_ACL, &minimal)).await;
    assert_eq!((after.mode, after.has_acl), (0o640, Some(false)));
    assert_eq!(stored(&world, file, ACCESS_ACL).await, None);

    // One that is removed leaves the bits as they are.
    world.run(set(file, ACCESS_ACL, &named(7, 7, 7, 7, 0))).await.unwrap();
    let remove = Operation::RemoveXattr { inode: file, name: Bytes::from_static(ACCESS_ACL) };
    let after = attr(&world, remove.clone()).await;
    assert_eq!((after.mode, after.has_acl), (0o770, Some(false)));
    assert_eq!(reason(&world, remove).await, Reason::NoAttribute);
    world.run(set(file, ACCESS_ACL, &named(7, 7, 7, 7, 0))).await.unwrap();
    let after = attr(&world, set_value(file, ACCESS_ACL, Bytes::from_static(&[2, 0, 0, 0]))).await;
    assert_eq!((after.mode, after.has_acl), (0o770, Some(false)));
    world.check("lists came and went").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn lists_are_checked() {
    let world = World::mem(None, 65536);
    let file = world.create(ROOT, "f").await.inode;
    let directory = world.mkdir(ROOT, "d").await.inode;
    let link = attr(&world, make(ROOT, "l", FileKind::Symlink, 0o777, None)).await.inode;
    let list = named(7, 7, 7, 7, 7);
    assert_eq!(reason(&world, set(link, ACCESS_ACL, &list)).await, Reason::Unsupported);
    assert_eq!(reason(&world, set(file, DEFAULT_ACL, &list)).await, Reason::WrongKind);
    world.run(set_value(file, DEFAULT_ACL, Bytes::from_static(&[2, 0, 0, 0]))).await.unwrap();
    for name in [ACCESS_ACL, DEFAULT_ACL] {
        let bad = |value: &[u8]| set_value(directory, name, Bytes::copy_from_slice(value));
        assert_eq!(reason(&world, bad(b"")).await, Reason::InvalidArgument);
        assert_eq!(reason(&world, bad(&list.encode()[..20])).await, Reason::InvalidArgument);
        assert_eq!(reason(&world, bad(&[3, 0, 0, 0])).await, Reason::Unsupported);
        assert_eq!(stored(&world, directory, name).await, None);
    }
    for bad in [&b"system.x"[..], b"system.posix_acl_acces", b"btrfs.x", b"user"] {
        assert_eq!(reason(&world, set_value(file, bad, Bytes::new())).await, Reason::Unsupported);
    }
    for bad in [&b"user."[..], b"trusted.", b"security."] {
        assert_eq!(reason(&world, set_value(file, bad, Bytes::new())).await, Reason::InvalidArgument);
    }
    world.run(set_value(file, b"trusted.x", Bytes::new())).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_set_group_id_bit_goes_on_request() {
    let world = World::mem(None, 65536);
    for (n, kill_set_group_id, want) in [("kept", false, 0o6750), ("gone", true, 0o4750)] {
        let inode = world.create(ROOT, n).await.inode;
        world.run(chmod(inode, 0o6700)).await.unwrap();
        let Operation::SetXattr { inode, name, value, create_only, replace_only, .. } =
            set(inode, ACCESS_ACL, &named(7, 7, 7, 5, 0))
        else {
            unreachable!()
        };
        let operation =
            Operation::SetXattr { inode, name, value, create_only, replace_only, kill_set_group_id };
        assert_eq!(attr(&world, operation).await.mode, want);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_made_inherits_the_default() {
    let world = World::rocks(None, 65536);
    let top = world.mkdir(ROOT, "top").await.inode;
    world.run(chmod(top, 0o2775)).await.unwrap();
    let default = named(7, 7, 5, 7, 4);
    let before = attr(&world, set(top, DEFAULT_ACL, &default)).await;
    assert_eq!((before.mode, before.has_acl), (0o2775, Some(true)), "a default is nobody's permission");

    // The umask took bits of 0666, but counts for nothing here.
    let file = attr(&world, make(top, "f", FileKind::Regular, 0o600, Some(0o666))).await;
    assert_eq!((file.mode, file.gid, file.has_acl), (0o664, 2, Some(true)));
    assert_eq!(stored(&world, file.inode, ACCESS_ACL).await, Some(named(6, 7, 5, 6, 4)));
    assert_eq!(stored(&world, file.inode, DEFAULT_ACL).await, None);
    // Whoever does not tell what it was before the umask gets what is left.
    let masked = attr(&world, make(top, "m", FileKind::Fifo, 0o640, None)).await;
    assert_eq!(masked.mode, 0o640);
    assert_eq!(stored(&world, masked.inode, ACCESS_ACL).await, Some(named(6, 7, 5, 4, 0)));

    let sub = attr(&world, make(top, "sub", FileKind::Directory, 0o755, Some(0o777))).await;
    assert_eq!(sub.mode, 0o2774);
    assert_eq!(stored(&world, sub.inode, ACCESS_ACL).await, Some(named(7, 7, 5, 7, 4)));
    assert_eq!(stored(&world, sub.inode, DEFAULT_ACL).await, Some(default.clone()));

    let link = attr(&world, make(top, "l", FileKind::Symlink, 0o777, None)).await;
    assert_eq!((link.mode, link.has_acl), (0o777, Some(false)));

    // A default that permission bits can say leaves no list, but takes the umask's place.
    let plain = world.mkdir(ROOT, "plain").await.inode;
    let minimal = acl(&[(Subject::Owner, 7), (Subject::OwningGroup, 7), (Subject::Other, 0)]);
    world.run(set(plain, DEFAULT_ACL, &minimal)).await.unwrap();
    let file = attr(&world, make(plain, "f", FileKind::Regular, 0o644, Some(0o666))).await;
    assert_eq!((file.mode, file.has_acl), (0o660, Some(false)));
    // Without a default, the umask counts.
    let file = attr(&world, make(ROOT, "f", FileKind::Regular, 0o644, Some(0o666))).await;
    assert_eq!((file.mode, file.has_acl), (0o644, Some(false)));
    world.check("lists were inherited").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn values_by_key_inherit_and_keep() {
    let world = World::rocks(None, 65536);
    world.run(set(ROOT, DEFAULT_ACL, &named(7, 6, 5, 7, 1))).await.unwrap();
    let put = |mode: Option<u32>| {
        let mut item = item("d/k", b"v");
        item.options = PutOptions { mode, ..PutOptions::default() };
        Operation::PutValue { item }
    };
    let made = world.run(put(None)).await.unwrap().meta.unwrap().attr;
    assert_eq!(made.mode, 0o640);
    assert_eq!(stored(&world, made.inode, ACCESS_ACL).await, Some(named(6, 6, 5, 4, 0)));
    let directory = read::lookup(&world.view().await, ROOT, b"d").unwrap();
    assert_eq!(directory.mode, 0o751);
    assert_eq!(stored(&world, directory.inode, DEFAULT_ACL).await, Some(named(7, 6, 5, 7, 1)));
    // A put over it keeps the list; permission bits that are asked for are a chmod.
    let kept = world.run(put(None)).await.unwrap().meta.unwrap().attr;
    assert_eq!((kept.inode, kept.mode, kept.has_acl), (made.inode, 0o640, Some(true)));
    let changed = world.run(put(Some(0o604))).await.unwrap().meta.unwrap().attr;
    assert_eq!(changed.mode, 0o604);
    assert_eq!(stored(&world, made.inode, ACCESS_ACL).await, Some(named(6, 6, 5, 0, 4)));
    world.check("values in a directory with a default").await;
}

/// As the kernel takes a program's privileges when somebody changes it.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_changed_file_loses_its_capability() {
    let world = World::mem(None, 65536);
    let inode = world.create(ROOT, "f").await.inode;
    let has = async || {
        let names = read::list_xattrs(&world.view().await, inode).unwrap();
        assert!(names.contains(&Bytes::from_static(b"user.x")));
        names.contains(&Bytes::from_static(b"security.capability"))
    };
    world.run(set_value(inode, b"user.x", Bytes::new())).await.unwrap();
    let with = |set: SetAttr| Operation::SetAttr { inode, set };
    let none = SetAttr::default();
    let allocate = Operation::Allocate {
        inode,
        offset: 0,
        length: 9,
        mode: shardfs_proto::types::op::AllocateMode::Allocate { keep_size: false },
        kill_set_id: false,
    };
    for (operation, keeps) in [
        (write(inode, 0, b"x"), false),
        (write(inode, 0, b""), true),
        (with(SetAttr { size: Some(0), ..none }), false),
        (with(SetAttr { uid: Some(3), ..none }), false),
        (with(SetAttr { gid: Some(3), ..none }), false),
        (with(SetAttr { mode: Some(0o755), ..none }), true),
        (allocate, false),
        (put("f", b"new"), false),
    ] {
        world.run(set_value(inode, b"security.capability", Bytes::from_static(b"c"))).await.unwrap();
        world.run(operation.clone()).await.unwrap();
        assert_eq!(has().await, keeps, "{operation:?}");
    }
}
