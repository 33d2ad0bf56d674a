//! The root of the mount: directories are shards.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{Reason, ShardName};
use shardfs_tests::cluster::read_json;
use shardfs_tests::{Cluster, block_on, sh, sh_fails};

fn errno(result: std::io::Result<impl Sized>) -> i32 {
    match result {
        Ok(_) => panic!("should have failed"),
        Err(error) => error.raw_os_error().unwrap(),
    }
}

#[test]
fn mkdir_makes_a_shard_and_rmdir_deletes_an_empty_one() {
    let cluster = Cluster::shared();
    let path = cluster.shard("made-by-mkdir");
    assert_eq!(fs::metadata(&path).unwrap().nlink(), 2);
    assert_eq!(errno(fs::create_dir(&path)), libc::EEXIST);
    let name = ShardName::new("made-by-mkdir").unwrap();
    let id = block_on(async {
        let info = cluster.client().shard_by_name(&name).await.unwrap();
        assert_eq!(info.state, ShardState::Active);
        info.id
    });

    fs::write(path.join("key"), "value").unwrap();
    assert_eq!(errno(fs::remove_dir(&path)), libc::ENOTEMPTY);
    assert_eq!(fs::read(path.join("key")).unwrap(), b"value", "a refused rmdir changes nothing");
    fs::remove_file(path.join("key")).unwrap();
    fs::remove_dir(&path).unwrap();
    assert_eq!(errno(fs::metadata(&path)), libc::ENOENT);

    // The name is free again; the id is not.
    cluster.shard("made-by-mkdir");
    block_on(async {
        let client = cluster.client();
        assert!(client.shard_by_name(&name).await.unwrap().id > id);
        assert_eq!(
            client.get_attr(id, shardfs_proto::types::InodeNo::ROOT).await.unwrap_err().reason(),
            Reason::ShardDeleted
        );
    });
}

#[test]
fn mv_renames_a_shard() {
    let cluster = Cluster::shared();
    let old = cluster.shard("old-name");
    let other = cluster.shard("taken-name");
    fs::write(old.join("key"), "value").unwrap();
    let ino = fs::metadata(old.join("key")).unwrap().ino();
    let new = cluster.mount().join("new-name");
    sh(cluster.mount(), "mv old-name new-name");
    assert_eq!(fs::metadata(new.join("key")).unwrap().ino(), ino);
    assert_eq!(errno(fs::metadata(&old)), libc::ENOENT);
    assert_eq!(cluster.cli_run(&["get", "new-name/key", "-"]), "value");

    // A shard never takes another's place.
    assert!(fs::rename(&new, &other).is_err());
    assert_eq!(fs::read(new.join("key")).unwrap(), b"value");
}

#[test]
fn files_are_not_made_at_the_root() {
    let cluster = Cluster::shared();
    let mount = cluster.mount();
    assert_eq!(errno(fs::write(mount.join("file"), "")), libc::EPERM);
    assert_eq!(errno(std::os::unix::fs::symlink("x", mount.join("link"))), libc::EPERM);
    sh_fails(&mount, "mkfifo fifo");
    // What is in a shard does not become something at the root.
    let shard = cluster.shard("not-a-root-file");
    fs::write(shard.join("f"), "").unwrap();
    fs::create_dir(shard.join("d")).unwrap();
    for name in ["f", "d"] {
        let code = errno(fs::rename(shard.join(name), mount.join(name)));
        assert!([libc::EPERM, libc::EXDEV].contains(&code), "{name}: {code}");
    }
    for bad in [".shardfs", "with\ttab", "line\nfeed"] {
        assert!(fs::create_dir(mount.join(bad)).is_err(), "{bad:?}");
    }
    assert_eq!(errno(fs::create_dir(mount.join("x".repeat(256)))), libc::ENAMETOOLONG);
}

#[test]
fn chmod_without_w_closes_a_shard_for_good() {
    let cluster = Cluster::shared();
    let path = cluster.shard("to-close");
    fs::write(path.join("key"), "value").unwrap();
    let open = fs::OpenOptions::new().append(true).open(path.join("key")).unwrap();
    sh(cluster.mount(), "chmod a-w to-close");

    assert_eq!(fs::read(path.join("key")).unwrap(), b"value");
    assert_eq!(errno(fs::write(path.join("new"), "x")), libc::EROFS);
    assert_eq!(errno(fs::OpenOptions::new().append(true).open(path.join("key"))), libc::EROFS);
    assert_eq!(errno(fs::remove_file(path.join("key"))), libc::EROFS);
    let late = std::io::Write::write(&mut &open, b"late").and_then(|_| open.sync_all());
    assert_eq!(errno(late), libc::EROFS);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o222, 0);

    // It stays closed.
    let _ = fs::set_permissions(&path, fs::Permissions::from_mode(0o755));
    assert_eq!(errno(fs::write(path.join("new"), "x")), libc::EROFS);
    block_on(async {
        let client = cluster.client();
        let info = client.shard_by_name(&ShardName::new("to-close").unwrap()).await.unwrap();
        assert_eq!(info.state, ShardState::ReadOnly);
    });
    assert_eq!(cluster.cli_run(&["get", "to-close/key", "-"]), "value");
    cluster.assert_clean("to-close");
}

#[test]
fn moving_between_shards_copies() {
    let cluster = Cluster::shared();
    let (a, b) = (cluster.shard("mv-a"), cluster.shard("mv-b"));
    fs::create_dir(a.join("dir")).unwrap();
    fs::write(a.join("dir/file"), "content").unwrap();
    assert_eq!(errno(fs::rename(a.join("dir"), b.join("dir"))), libc::EXDEV);
    assert_eq!(errno(fs::hard_link(a.join("dir/file"), b.join("file"))), libc::EXDEV);
    sh(cluster.mount(), "mv mv-a/dir mv-b/");
    assert_eq!(fs::read(b.join("dir/file")).unwrap(), b"content");
    assert!(!a.join("dir").exists());
    assert_ne!(
        fs::metadata(a).unwrap().ino(),
        fs::metadata(b).unwrap().ino(),
        "inode numbers are unique over the mount"
    );
}

#[test]
fn the_virtual_directory_holds_json_and_is_not_listed() {
    let cluster = Cluster::shared();
    cluster.shard("seen-in-json");
    let folder = cluster.mount().join(".shardfs");
    let listed = sh(cluster.mount(), "ls -a");
    assert!(listed.lines().any(|l| l == "seen-in-json"), "{listed}");
    assert!(!listed.contains(".shardfs"), "{listed}");
    let files = sh(&folder, "ls");
    for name in ["nodes", "shards", "status", "volumes"] {
        assert!(files.lines().any(|l| l == name), "{name} in {files}");
        let value = read_json(&folder.join(name));
        assert!(value.is_object() || value.is_array(), "{name}: {value}");
        assert!(fs::write(folder.join(name), "x").is_err(), "{name} is read-only");
    }
    assert!(fs::write(folder.join("new"), "x").is_err());
    assert!(fs::remove_dir(&folder).is_err());

    let text = |name: &str| fs::read_to_string(folder.join(name)).unwrap();
    assert!(text("shards").contains("seen-in-json"));
    for node in ["node-1", "node-2", "node-3"] {
        assert!(text("nodes").contains(node));
    }
    let volumes = read_json(&folder.join("volumes"));
    let volumes = volumes.get("volumes").unwrap_or(&volumes).as_array().unwrap().clone();
    assert_eq!(volumes.len(), 3);
    assert!(volumes.iter().all(|v| v["provider"] == "loop"));
}

#[test]
fn inode_numbers_differ_over_shards() {
    let cluster = Cluster::shared();
    let mut inodes = std::collections::BTreeSet::new();
    for number in 0..6 {
        let path = cluster.shard(&format!("inodes-{number}"));
        fs::write(path.join("f"), "x").unwrap();
        assert!(inodes.insert(fs::metadata(&path).unwrap().ino()));
        assert!(inodes.insert(fs::metadata(path.join("f")).unwrap().ino()));
    }
    assert!(inodes.iter().all(|i| *i <= i64::MAX as u64));
}
