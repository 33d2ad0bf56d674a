//! Programs of two versions in one cluster: which ones each node and the mount start with may change while it runs.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

/// Where the programs of the minor version before this one are.
const PREVIOUS_VARIABLE: &str = "SHARDFS_PREVIOUS_BIN_DIR";
/// The mount, as `dev kill` calls it.
pub const MOUNT: &str = "mount";

/// The folder of the programs of the minor version before this one; `None`, and a word about it: they are not there.
pub fn previous() -> Option<PathBuf> {
    let Some(folder) = std::env::var_os(PREVIOUS_VARIABLE).filter(|folder| !folder.is_empty()) else {
        eprintln!(
            "skipped: {PREVIOUS_VARIABLE} does not say where an earlier version's programs are (`make test-skew` builds them)"
        );
        return None;
    };
    let folder = PathBuf::from(folder);
    for program in ["shardfs", "shardfs-node", "shardfsd"] {
        let path = folder.join(program);
        assert!(path.is_file(), "{PREVIOUS_VARIABLE}: {} is missing", path.display());
    }
    Some(folder)
}

/// The programs of a cluster's members.
#[derive(Debug)]
pub struct Programs {
    /// Holds a link to the folder of each member's programs, and what starts them.
    folder: PathBuf,
}

impl Programs {
    /// All members of the cluster in `root`, nodes 1 to `nodes` and the mount, start with the programs in `bin`.
    pub fn new(root: &Path, nodes: u32, bin: &Path) -> Programs {
        let folder = root.join("programs");
        fs::create_dir(&folder).unwrap();
        let programs = Programs { folder };
        for node in 1..=nodes {
            programs.choose(&format!("node-{node}"), bin);
        }
        programs.choose(MOUNT, bin);
        let folder = programs.folder.display();
        // Its id is among a node's arguments.
        let node = format!(
            r#"#!/bin/bash
set -eu
arguments=("$@")
while [ "$1" != --id ]; do
    shift
done
exec {folder}/"$2"/shardfs-node "${{arguments[@]}}"
"#
        );
        // `dev up` of this version wants a daemon without a parent; that of 0.1 has none, and does not know the word.
        let daemon = format!(
            r#"#!/bin/bash
set -eu
daemon={folder}/{MOUNT}/shardfsd
arguments=()
for argument in "$@"; do
    [ "$argument" = --no-restart ] && ! grep -q -- "$argument" <<<"$("$daemon" --help)" || arguments+=("$argument")
done
exec "$daemon" "${{arguments[@]}}"
"#
        );
        for (name, script) in [("shardfs-node", node), ("shardfsd", daemon)] {
            let path = programs.folder.join(name);
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
        programs
    }

    /// From its next start on a member (`node-1`, [`MOUNT`]) runs the programs in this folder.
    pub fn choose(&self, member: &str, bin: &Path) {
        let (link, fresh) = (self.folder.join(member), self.folder.join("fresh"));
        symlink(bin, &fresh).unwrap();
        fs::rename(fresh, link).unwrap();
    }

    /// For the environment of `dev up`.
    pub fn environment(&self) -> [(&'static str, PathBuf); 2] {
        [
            ("SHARDFS_NODE_BIN", self.folder.join("shardfs-node")),
            ("SHARDFSD_BIN", self.folder.join("shardfsd")),
        ]
    }
}
