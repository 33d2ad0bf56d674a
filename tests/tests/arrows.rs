//! The arrows of ARCHITECTURE.md: which crate may know which, and where each big dependency has its home.
//!
//! Reads the manifests and the sources as text; what it cannot see by `use` lines it sees by paths
//! (`rocksdb::`).

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// Names under `[dependencies]` (not dev- or build-dependencies).
fn dependencies(folder: &str) -> BTreeSet<String> {
    let text = fs::read_to_string(workspace().join(folder).join("Cargo.toml")).unwrap();
    let mut inside = false;
    let mut names = BTreeSet::new();
    for line in text.lines().map(str::trim) {
        if line.starts_with('[') {
            inside = line == "[dependencies]";
        } else if inside && !line.is_empty() && !line.starts_with('#') {
            let name = line.split(['.', '=', ' ']).next().unwrap();
            names.insert(name.to_owned());
        }
    }
    assert!(!names.is_empty(), "{folder}/Cargo.toml has dependencies");
    names
}

/// Sources of a crate, with paths relative to the workspace.
fn sources(folder: &str) -> Vec<(String, String)> {
    fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, into);
            } else if path.extension().is_some_and(|e| e == "rs") {
                into.push(path);
            }
        }
    }
    let mut paths = Vec::new();
    walk(&workspace().join(folder).join("src"), &mut paths);
    assert!(!paths.is_empty());
    paths
        .into_iter()
        .map(|path| {
            let relative = path.strip_prefix(workspace()).unwrap().to_str().unwrap().to_owned();
            (relative, fs::read_to_string(path).unwrap())
        })
        .collect()
}

/// Whether code (not a comment) names a crate or module: `use name`, `name::`, `extern crate name`.
fn names(text: &str, what: &str) -> bool {
    text.lines().map(|line| line.split("//").next().unwrap()).any(|code| {
        code.match_indices(what).any(|(at, _)| {
            let before = code[..at].chars().next_back();
            let free = before.is_none_or(|c| !c.is_alphanumeric() && c != '_');
            let after = &code[at + what.len()..];
            free && (after.starts_with("::")
                || (code.trim_start().starts_with("use ") && after.starts_with(';')))
        })
    })
}

/// Files of a crate that name something, except those where it has its home.
fn strays(folder: &str, what: &str, homes: &[&str]) -> Vec<String> {
    sources(folder)
        .into_iter()
        .filter(|(path, text)| !homes.iter().any(|home| path.starts_with(home)) && names(text, what))
        .map(|(path, _)| path)
        .collect()
}

#[test]
fn crates_depend_only_downwards() {
    let ours = ["shardfs-proto", "shardfs-node", "shardfsd", "shardfs", "shardfs-tests"];
    for (folder, allowed) in [
        ("proto", &[][..]),
        ("node", &["shardfs-proto"][..]),
        ("fsd", &["shardfs-proto"]),
        ("tools", &["shardfs-proto", "shardfs-node", "shardfsd"]),
        ("tests", &["shardfs-proto", "shardfs-node", "shardfsd", "shardfs"]),
    ] {
        for name in dependencies(folder).iter().filter(|n| ours.contains(&n.as_str())) {
            assert!(allowed.contains(&name.as_str()), "{folder}/ must not depend on {name}");
        }
    }
}

#[test]
fn big_dependencies_have_one_crate() {
    for (name, home) in [
        ("rocksdb", "node"),
        ("fuser", "fsd"),
        ("redb", "node"),
        ("etcd-client", "node"),
        ("indicatif", "tools"),
    ] {
        for folder in ["proto", "node", "fsd", "tools", "tests"] {
            assert!(
                folder == home || !dependencies(folder).contains(name),
                "{name} belongs to {home}/, not {folder}/"
            );
        }
        assert!(dependencies(home).contains(name), "{home}/ has {name}: else this test looks for nothing");
    }
}

#[test]
fn rocksdb_stays_in_its_file() {
    let homes = ["node/src/shard/rocks.rs", "node/src/shard/rocks/"];
    assert_eq!(strays("node", "rocksdb", &homes), [""; 0]);
    assert!(
        sources("node")
            .iter()
            .any(|(path, text)| path.starts_with("node/src/shard/rocks") && names(text, "rocksdb"))
    );
}

#[test]
fn fuser_stays_in_its_files() {
    let homes = ["fsd/src/fuse.rs", "fsd/src/fuse/", "fsd/src/errno.rs", "fsd/src/session.rs"];
    assert_eq!(strays("fsd", "fuser", &homes), [""; 0]);
}

#[test]
fn redb_stays_in_the_embedded_store() {
    assert_eq!(strays("node", "redb", &["node/src/cluster/embedded_server"]), [""; 0]);
}

#[test]
fn etcd_stays_in_its_store() {
    let home = "node/src/cluster/etcd";
    assert_eq!(strays("node", "etcd_client", &[home]), [""; 0]);
    assert!(sources("node").iter().any(|(path, text)| path.starts_with(home) && names(text, "etcd_client")));
}

#[test]
fn generated_types_stay_at_the_edges() {
    let proto = ["proto/src/lib.rs", "proto/src/convert", "proto/src/status", "proto/src/client/"];
    assert_eq!(strays("proto", "wire", &proto), [""; 0]);
    // group.rs stores the answers of exactly-once mutations in their wire form.
    let node =
        ["node/src/rpc/", "node/src/cluster/embedded", "node/src/cluster/wire.rs", "node/src/shard/group.rs"];
    assert_eq!(strays("node", "wire", &node), [""; 0]);
    assert_eq!(strays("fsd", "wire", &[]), [""; 0]);
    assert_eq!(strays("tools", "wire", &[]), [""; 0]);
}

#[test]
fn inside_the_node_the_shard_knows_no_rpc_and_no_cluster() {
    for forbidden in ["crate::rpc", "crate::catalog", "crate::cluster", "tonic"] {
        let found: Vec<String> = sources("node")
            .into_iter()
            .filter(|(path, text)| path.starts_with("node/src/shard/") && names(text, forbidden))
            .map(|(path, _)| path)
            .collect();
        assert_eq!(found, [""; 0], "{forbidden} in node/src/shard");
    }
}

#[test]
fn the_system_clock_has_one_user() {
    for folder in ["proto", "node", "fsd", "tools"] {
        assert_eq!(strays(folder, "SystemTime", &["proto/src/types/clock.rs"]), [""; 0], "{folder}");
    }
}

#[test]
fn every_file_says_what_it_is() {
    for folder in ["proto", "node", "fsd", "tools", "tests"] {
        for (path, text) in sources(folder) {
            assert!(text.starts_with("//!"), "{path} does not open with //!");
        }
    }
}
