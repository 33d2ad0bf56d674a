//! Nodes and clients of two minor versions in one cluster: real programs of the version before, which `make test-skew` builds from
//! history. Without them (`SHARDFS_PREVIOUS_BIN_DIR`) these tests say that they are skipped.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use shardfs_tests::cluster::{bin_dir, eventually};
use shardfs_tests::etcd::Etcd;
use shardfs_tests::load::{self, ShardLoad};
use shardfs_tests::programs::{MOUNT, previous};
use shardfs_tests::run::described;
use shardfs_tests::tree::{assert_same, generate, listing};
use shardfs_tests::{Cluster, Options, sh};

/// All is in order within this on a busy machine.
const BACK_MAX: Duration = Duration::from_secs(120);
/// What each lane goes on by in every state of the cluster.
const CHANGES: u64 = 15;
const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];
/// A command that has not ended by then hangs.
const COMMAND_SECONDS: &str = "100";

/// The program that a process runs lies in this folder.
fn assert_runs_from(pid: u32, bin: &Path) {
    let program = fs::read_link(format!("/proc/{pid}/exe")).unwrap();
    assert_eq!(program.parent().unwrap(), fs::canonicalize(bin).unwrap(), "{}", program.display());
}

/// The command line of one version, whatever its outcome; it must not hang.
fn command(cluster: &Cluster, bin: &Path, arguments: &[&str], input: &[u8]) -> Output {
    let cli = cluster.cli_of(bin);
    let mut bounded = Command::new("timeout");
    bounded.args(["--kill-after=5", COMMAND_SECONDS]).arg(cli.get_program()).args(cli.get_args());
    bounded.args(arguments).env("NO_COLOR", "1");
    bounded.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = bounded.spawn().unwrap();
    // One that fails early does not read it.
    let _ = child.stdin.take().unwrap().write_all(input);
    let output = child.wait_with_output().unwrap();
    let code = output.status.code();
    assert!(
        code.is_some_and(|code| code != 124 && code < 128),
        "{}",
        described(&format!("{arguments:?} hangs"), &output)
    );
    output
}

/// One that must succeed; its standard output.
fn run(cluster: &Cluster, bin: &Path, arguments: &[&str], input: &[u8]) -> Vec<u8> {
    let output = command(cluster, bin, arguments, input);
    assert!(output.status.success(), "{}", described(&format!("shardfs {arguments:?}"), &output));
    output.stdout
}

/// One that must be refused; what it says.
fn refused(cluster: &Cluster, bin: &Path, arguments: &[&str]) -> String {
    let output = command(cluster, bin, arguments, b"");
    let told = described(&format!("should be refused: shardfs {arguments:?}"), &output);
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !said.is_empty() && !said.contains("panicked"), "{told}");
    said
}

fn errno(outcome: std::io::Result<impl Sized>) -> i32 {
    outcome.map(|_| ()).unwrap_err().raw_os_error().unwrap()
}

/// What a database does that keeps a journal: each transaction is a journal that is synced, pages that are written in place and synced,
/// and the journal's end.
fn transact(folder: &Path, number: u64) {
    let page = [number as u8; 4096];
    let journal = folder.join("data-journal");
    let mut file = File::create_new(&journal).unwrap();
    file.write_all(&page).unwrap();
    file.sync_all().unwrap();
    let data = OpenOptions::new().create(true).truncate(false).write(true).open(folder.join("data")).unwrap();
    data.write_all_at(&page, number % 64 * 4096).unwrap();
    data.write_all_at(&number.to_le_bytes(), 0).unwrap();
    data.sync_data().unwrap();
    fs::remove_file(&journal).unwrap();
    File::open(folder).unwrap().sync_all().unwrap();
}

/// What `transact` has left after all numbers below this one.
fn transacted(numbers: u64) -> Vec<u8> {
    let mut data = Vec::new();
    for number in 0..numbers {
        let at = (number % 64 * 4096) as usize;
        data.resize(data.len().max(at + 4096), 0);
        data[at..at + 4096].fill(number as u8);
        data[..8].copy_from_slice(&number.to_le_bytes());
    }
    data
}

/// All that programs do on a mount, over the death of a node and of the mount; every byte is compared with a local copy.
fn use_mount(cluster: &Cluster, daemon: &Path) {
    let folder = cluster.shard("tree");
    let primary = cluster.primary_of("tree");
    let copy = cluster.scratch("tree-copy");
    generate(&folder, 300, 7);
    let both = |script: &str| {
        for folder in [&folder, &copy] {
            // They are not written at the same time.
            sh(folder, &format!("{script}; find . ! -type d -exec touch -hd @1600000000.5 {{}} +"));
        }
    };
    sh(cluster.root(), "cp -a mnt/tree/. tree-copy/");
    both(
        "mkdir -p moved/deep; echo one > a; echo two > b; mv a moved/deep/c; mv b moved/deep/c; ln moved/deep/c hard; ln -s hard soft; \
         truncate -s 100000 hole; printf tail >> hole; setfattr -n user.k -v v hole; mv moved/deep moved/shallow; chmod 600 hole",
    );
    assert_same(&folder, &copy);

    let (stop, done) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let folder = cluster.shard("database");
            while !stop.load(Ordering::SeqCst) {
                transact(&folder, done.load(Ordering::SeqCst));
                done.fetch_add(1, Ordering::SeqCst);
            }
        });
        let goes_on = || {
            let before = done.load(Ordering::SeqCst);
            eventually(BACK_MAX, || {
                assert!(!writer.is_finished(), "the database saw an error, see above");
                let now = done.load(Ordering::SeqCst);
                if now >= before + CHANGES { Ok(()) } else { Err(format!("{before}, {now}")) }
            });
        };
        let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            goes_on();
            let database = cluster.primary_of("database");
            cluster.cli_run(&["dev", "kill", &database]);
            goes_on();
            cluster.cli_run(&["dev", "start", &database]);
            cluster.in_order(BACK_MAX);
            goes_on();
        }));
        stop.store(true, Ordering::SeqCst);
        outcome.unwrap_or_else(|reason| std::panic::resume_unwind(reason));
    });
    let data = cluster.mount().join("database/data");
    assert!(fs::read(&data).unwrap() == transacted(done.load(Ordering::SeqCst)), "the database is damaged");
    // The tree's own primary, with the mount still on.
    cluster.cli_run(&["dev", "kill", &primary]);
    assert_same(&folder, &copy);
    both("echo after > after; mv after after2");
    cluster.cli_run(&["dev", "start", &primary]);
    cluster.in_order(BACK_MAX);

    cluster.restart_with(MOUNT, daemon);
    assert_runs_from(cluster.daemon().pid, daemon);
    assert_same(&folder, &copy);
    assert!(fs::read(&data).unwrap() == transacted(done.load(Ordering::SeqCst)), "the database is damaged");
    assert_eq!(errno(fs::create_dir(&folder)), libc::EEXIST);
    sh(cluster.root(), "mkdir mnt/closed; echo x > mnt/closed/x; chmod a-w mnt/closed");
    assert_eq!(errno(fs::write(cluster.mount().join("closed/y"), "y")), libc::EROFS);
    sh(
        cluster.root(),
        "mkdir mnt/short; rmdir mnt/short; mkdir mnt/named; mv mnt/named mnt/renamed; ls mnt/renamed",
    );
    for shard in ["tree", "database", "closed"] {
        cluster.assert_clean(shard);
    }
}

/// The commands that both versions have.
fn use_commands(cluster: &Cluster, bin: &Path) {
    let shard = "commands";
    run(cluster, bin, &["shard", "create", shard], b"");
    let large = vec![7; 6 << 20];
    for (key, value) in [("a/small", &b"value"[..]), ("a/large", &large)] {
        let path = format!("{shard}/{key}");
        run(cluster, bin, &["put", "-", &path], value);
        assert!(run(cluster, bin, &["get", &path, "-"], b"") == value, "{path}");
    }
    let listed = String::from_utf8(run(cluster, bin, &["ls", &format!("{shard}/a")], b"")).unwrap();
    assert!(listed.contains("small") && listed.contains("large"), "{listed}");
    run(cluster, bin, &["rm", &format!("{shard}/a/small")], b"");
    refused(cluster, bin, &["get", &format!("{shard}/a/small"), "-"]);
    let from_backup = ["get", "--read-from", "backup", &format!("{shard}/a/large"), "-"];
    assert!(run(cluster, bin, &from_backup, b"") == large);
    for arguments in [&["status"][..], &["node", "list"], &["volume", "list"], &["shard", "list", "-a"]] {
        run(cluster, bin, arguments, b"");
    }
    run(cluster, bin, &["fsck", "--read-data", shard], b"");
    run(cluster, bin, &["shard", "close", shard], b"");
    assert!(refused(cluster, bin, &["put", "-", &format!("{shard}/x")]).contains("read-only"));
    run(cluster, bin, &["shard", "delete", "--force", "--yes", shard], b"");
}

#[test]
fn clients_of_the_version_before_work_on_these_nodes() {
    let Some(before) = previous() else { return };
    let cluster = Cluster::start_with_programs(&Options::default(), &[], &bin_dir());
    cluster.restart_with(MOUNT, &before);
    assert_runs_from(cluster.daemon().pid, &before);
    cluster.nodes().iter().for_each(|node| assert_runs_from(node.pid, &bin_dir()));
    use_mount(&cluster, &before);
    use_commands(&cluster, &before);

    // What that version does not know is not in its way.
    let album = cluster.shard("album");
    cluster.cli_run(&["shard", "snapshot", "album", "monday"]);
    cluster.cli_run(&["shard", "clone", "tree", "cloned"]);
    assert_eq!(listing(&cluster.mount().join("cloned")), listing(&cluster.mount().join("tree")));
    assert!(!sh(cluster.mount(), "ls -A").contains("monday"));
    assert_eq!(errno(fs::metadata(album.join(".snap"))), libc::ENOENT);
    let monday = cluster.shard("monday");
    fs::write(monday.join("x"), "its own").unwrap();
    // A shard with snapshots stays.
    errno(fs::remove_dir(&album));
    let said = refused(&cluster, &before, &["shard", "delete", "--force", "--yes", "album"]);
    assert!(said.contains("snapshots"), "{said}");
    assert_eq!(fs::read_dir(&album).unwrap().count(), 0);
}

#[test]
fn clients_of_this_version_work_on_nodes_of_the_version_before() {
    let Some(before) = previous() else { return };
    let cluster = Cluster::start_with_programs(&Options::default(), &[], &before);
    cluster.restart_with(MOUNT, &bin_dir());
    assert_runs_from(cluster.daemon().pid, &bin_dir());
    cluster.nodes().iter().for_each(|node| assert_runs_from(node.pid, &before));
    use_mount(&cluster, &bin_dir());
    use_commands(&cluster, &bin_dir());

    // What those nodes do not know is refused by name, and nothing hangs or is half done.
    let folder = cluster.shard("album");
    fs::write(folder.join("x"), "x").unwrap();
    assert_eq!(errno(fs::create_dir(folder.join(".snap/monday"))), libc::EOPNOTSUPP);
    errno(fs::read_dir(folder.join(".snap")).and_then(Iterator::collect::<std::io::Result<Vec<_>>>));
    errno(fs::metadata(folder.join(".snap/monday")));
    let image = "20261129T195900Z-1f3a";
    for arguments in [
        &["shard", "snapshot", "album", "monday"][..],
        &["shard", "snapshots", "album"],
        &["shard", "rollback", "album", "monday", "--yes"],
        &["shard", "clone", "album", "cloned"],
        &["backup", "create", "vol-1"],
        &["backup", "list"],
        &["backup", "delete", image],
        &["backup", "restore", image, "--volume", "vol-9", "--nodes", "node-1"],
        &["backup", "verify", image],
        &["backup", "schedules"],
        &["volume", "policy"],
        &["volume", "strays"],
    ] {
        let said = refused(&cluster, &bin_dir(), arguments);
        assert!(said.contains("does not know this call"), "{arguments:?}: {said}");
    }
    assert_eq!(fs::read_to_string(folder.join("x")).unwrap(), "x");
    assert!(!sh(cluster.mount(), "ls -A").contains("cloned"));
    sh(cluster.mount(), "rm -r album");
    cluster.in_order(BACK_MAX);
}

/// Small values by the command line of either version: each is there, whoever asks.
struct Values<'a> {
    cluster: &'a Cluster,
    programs: [PathBuf; 2],
    made: Vec<String>,
}

impl Values<'_> {
    fn put_and_get(&mut self) {
        for bin in &self.programs {
            let key = format!("values/v{}", self.made.len());
            run(self.cluster, bin, &["put", "-", &key], key.as_bytes());
            self.made.push(key);
        }
        for bin in &self.programs {
            let last = self.made.iter().rev().take(4);
            last.for_each(|key| {
                assert!(run(self.cluster, bin, &["get", key, "-"], b"") == key.as_bytes(), "{key}")
            });
        }
    }
}

#[test]
fn a_cluster_of_the_version_before_is_upgraded_under_load_without_an_error() {
    let Some(before) = previous() else { return };
    let etcd = Etcd::start();
    let cluster = Cluster::start_with_programs(&Options::default(), &["--meta", &etcd.address()], &before);
    let old_version = cluster.versions()[0].clone();
    let new_mount = cluster.scratch("new-mount");
    cluster.cli_run(&["mount", new_mount.to_str().unwrap()]);
    // Shards go to the volumes in turn: each node serves one of them. The clients over gRPC are of this version.
    let loads: Vec<ShardLoad> = vec![
        ShardLoad::new("one", &[2, 1], 1, true),
        ShardLoad::new("two", &[2, 1], 1, true).on_mount(&new_mount),
        ShardLoad::new("three", &[1], 2, true),
        ShardLoad::new("four", &[], 2, true).on_mount(&new_mount),
    ];
    for load in &loads {
        cluster.shard(load.shard());
    }
    cluster.shard("values");
    cluster.in_order(BACK_MAX);
    let mut values = Values { cluster: &cluster, programs: [before.clone(), bin_dir()], made: Vec::new() };
    let done = load::run(&cluster, &loads, load::seed(), |progress| {
        progress.wait_for(CHANGES, BACK_MAX);
        for (at, node) in NODES.into_iter().enumerate() {
            values.put_and_get();
            // On a node of either version, while there is one of the version before.
            let said = refused(&cluster, &bin_dir(), &["shard", "snapshot", "values", "early"]);
            assert!(said.contains(&old_version) || said.contains("does not know"), "{said}");
            cluster.restart_with(node, &bin_dir());
            assert_runs_from(cluster.node(node).pid, &bin_dir());
            cluster.in_order(BACK_MAX);
            progress.wait_for(CHANGES, BACK_MAX);
            let of_before = cluster.versions().iter().filter(|version| **version == old_version).count();
            assert_eq!(of_before, NODES.len() - 1 - at);
        }
        values.put_and_get();
        // Every node serves again.
        eventually(BACK_MAX, || {
            let volumes = cluster.cli_json(&["volume", "list"]);
            let serves =
                |node: &&str| volumes.as_array().unwrap().iter().any(|volume| volume["primary"] == **node);
            if NODES.iter().all(serves) { Ok(()) } else { Err(volumes.to_string()) }
        });
        progress.wait_for(CHANGES, BACK_MAX);
        progress.counts()
    });
    println!("changes that were answered, by shard and lane: {done:?}");

    // The clients go last.
    cluster.cli_run(&["umount", new_mount.to_str().unwrap()]);
    cluster.restart_with(MOUNT, &bin_dir());
    assert_runs_from(cluster.daemon().pid, &bin_dir());
    for load in &loads {
        for found in
            [load::contents(&cluster, load.shard()), load::contents_on(&cluster.mount().join(load.shard()))]
        {
            load.history().check_all(&found).unwrap_or_else(|e| panic!("shard {}: {e}", load.shard()));
        }
        cluster.assert_clean(load.shard());
    }
    for key in &values.made {
        assert_eq!(fs::read_to_string(cluster.mount().join(key)).unwrap(), *key);
    }
    // And what is new is there.
    fs::create_dir(cluster.mount().join("values/.snap/after")).unwrap();
    assert_eq!(fs::read_dir(cluster.mount().join("values/.snap/after")).unwrap().count(), values.made.len());
}

/// The id of a shard or snapshot.
fn id_of(cluster: &Cluster, name: &str) -> String {
    format!("@{}", cluster.cli_json(&["shard", "show", name])["id"])
}

/// What this version has written goes back to the version before, and comes again.
#[test]
fn a_cluster_of_this_version_goes_back_to_the_version_before() {
    let Some(before) = previous() else { return };
    let now = bin_dir();
    let cluster = Cluster::start_with_programs(&Options::default(), &[], &now);
    let (mount, kept) = (cluster.mount(), cluster.scratch("kept"));
    let keep = |name: &str| sh(cluster.root(), &format!("rm -rf kept/{name}; cp -a mnt/{name} kept/{name}"));
    let is_as_kept = |name: &str| assert_same(&mount.join(name), &kept.join(name));
    for name in ["plain", "photos", "undone", "album", "closed"] {
        generate(&cluster.shard(name), 60, name.len() as u64);
    }
    // Of a shard: a snapshot that differs from it, a clone that was used, and one that nobody has opened.
    keep("photos");
    sh(&kept, "mv photos monday");
    cluster.cli_run(&["shard", "snapshot", "photos", "monday"]);
    sh(mount.join("photos"), "echo later > later");
    cluster.cli_run(&["shard", "clone", "photos", "used"]);
    sh(mount.join("used"), "echo its own > its-own");
    cluster.cli_run(&["shard", "clone", "photos", "fresh"]);
    // The snapshot has the name of a shard.
    cluster.cli_run(&["shard", "snapshot", "plain", "photos"]);
    keep("undone");
    cluster.cli_run(&["shard", "snapshot", "undone", "then"]);
    sh(mount.join("undone"), "echo gone > gone");
    cluster.cli_run(&["shard", "rollback", "undone", "then", "--yes"]);
    keep("album");
    sh(&kept, "mv album june");
    cluster.cli_run(&["shard", "snapshot", "album", "june"]);
    cluster.cli_run(&["shard", "close", "closed"]);
    for name in ["plain", "photos", "used", "closed"] {
        keep(name);
    }
    is_as_kept("undone");
    sh(&kept, "cp -a photos fresh");
    assert!(cluster.shard_dir("fresh").join("adopt").is_file(), "nobody has opened it");
    let [monday, june] = ["photos/.snap/monday", "album/.snap/june"].map(|name| id_of(&cluster, name));

    for node in NODES {
        cluster.restart_with(node, &before);
        // The clone that nobody has opened is no trouble before it is asked for.
        cluster.in_order(BACK_MAX);
    }
    cluster.restart_with(MOUNT, &before);
    for node in cluster.nodes() {
        assert_runs_from(node.pid, &before);
    }
    for name in ["plain", "photos", "used", "undone", "closed"] {
        is_as_kept(name);
        run(&cluster, &before, &["fsck", "--read-data", name], b"");
    }
    // They are shards like others.
    for name in ["plain", "photos", "used", "undone"] {
        sh(mount.join(name), "echo by the version before > before; mkdir sub; mv before sub/");
        keep(name);
        is_as_kept(name);
    }
    assert_eq!(errno(fs::write(mount.join("closed/x"), "x")), libc::EROFS);
    // What that version cannot know is refused, and not taken for anything else.
    refused(&cluster, &before, &["ls", &monday]);
    refused(&cluster, &before, &["shard", "delete", "--force", "--yes", &monday]);
    let listed = String::from_utf8(run(&cluster, &before, &["shard", "list", "-a"], b"")).unwrap();
    assert!(!listed.contains("monday") && !listed.contains("june") && listed.contains("photos"), "{listed}");
    assert!(!refused(&cluster, &before, &["ls", "fresh"]).is_empty());
    assert_eq!(errno(fs::write(mount.join("fresh/x"), "x")), libc::EIO);
    // The name of a snapshot is free, and a shard's name is that shard's.
    fs::write(cluster.shard("monday").join("x"), "another").unwrap();
    sh(&mount, "mv photos moved; mv moved photos");
    is_as_kept("photos");
    // That version deletes a shard that has snapshots; they outlive it.
    run(&cluster, &before, &["shard", "delete", "--force", "--yes", "album"], b"");

    for node in NODES {
        cluster.restart_with(node, &now);
    }
    cluster.restart_with(MOUNT, &now);
    for name in ["plain", "photos", "used", "undone", "closed", "fresh"] {
        is_as_kept(name);
        cluster.assert_clean(name);
    }
    cluster.in_order(BACK_MAX);
    assert_same(&mount.join("photos/.snap/monday"), &kept.join("monday"));
    assert_eq!(fs::read_to_string(mount.join("monday/x")).unwrap(), "another");
    for (id, name) in [(&monday, "monday"), (&june, "june")] {
        let fetched = cluster.scratch(&format!("fetched-{name}"));
        cluster.cli_run(&["get", "-r", &format!("{id}/"), fetched.to_str().unwrap()]);
        let sums = |folder: &Path| sh(folder, "find . -type f -print0 | sort -z | xargs -0 sha256sum");
        assert_eq!(sums(&fetched), sums(&kept.join(name)), "{name}");
        cluster.cli_run(&["fsck", "--read-data", id]);
    }
    fs::remove_dir(mount.join("photos/.snap/monday")).unwrap();
    cluster.cli_run(&["shard", "delete", "--force", "--yes", &june]);
    cluster.cli_run(&["shard", "rollback", "undone", "then", "--yes"]);
    assert_eq!(errno(fs::metadata(mount.join("undone/sub"))), libc::ENOENT);
}
