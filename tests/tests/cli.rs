//! The command line against a real cluster: round trips, prefixes, JSON, exit codes.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;
use shardfs_tests::cluster::{bin_dir, eventually};
use shardfs_tests::{Cluster, Options, mounted, sh, tree};

/// A field of a JSON value that must be there, by path.
fn field<'a>(value: &'a Value, path: &str) -> &'a Value {
    let found = value.pointer(path).unwrap_or(&Value::Null);
    assert!(!found.is_null(), "{path} in {value:#}");
    found
}

/// The list of objects in an answer, whether bare or under a name.
fn rows(value: Value, name: &str) -> Vec<Value> {
    let list = value.get(name).cloned().unwrap_or(value);
    list.as_array().unwrap_or_else(|| panic!("a list of {name}: {list:#}")).clone()
}

fn piped(cluster: &Cluster, input: &[u8], arguments: &[&str]) -> Vec<u8> {
    let mut child =
        cluster.cli().args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "shardfs {arguments:?}: {}", output.status);
    output.stdout
}

/// The command line with nothing but these arguments.
fn shardfs(arguments: &[&str]) -> Command {
    let mut command = Command::new(bin_dir().join("shardfs"));
    command.args(arguments).stdin(Stdio::null()).env("NO_COLOR", "1");
    command
}

/// What a command that must fail with this code says on standard error.
fn fails_with(code: i32, output: &Output) -> String {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{said}");
    said
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn put_get_ls_stat_rm() {
    let cluster = Cluster::shared();
    let local = cluster.scratch("local-cli");
    cluster.cli_run(&["shard", "create", "cli"]);
    fs::write(local.join("small"), "hello\n").unwrap();
    sh(&local, "head -c 10000000 /dev/urandom >large");
    let at = |name: &str| local.join(name).to_str().unwrap().to_owned();

    cluster.cli_run(&["put", &at("small"), "cli/a/small"]);
    cluster.cli_run(&["put", &at("large"), "cli/a/"]);
    assert_eq!(cluster.cli_run(&["get", "cli/a/small", "-"]), "hello\n");
    cluster.cli_run(&["get", "cli/a/large", &at("back")]);
    sh(&local, "cmp large back");
    // Standard input and output, also larger than one message.
    let large = fs::read(local.join("large")).unwrap();
    piped(cluster, &large, &["put", "-", "cli/from-stdin"]);
    assert!(piped(cluster, b"", &["get", "cli/from-stdin", "-"]) == large);
    assert_eq!(fs::read(cluster.mount().join("cli/from-stdin")).unwrap(), large);

    let listed = cluster.cli_run(&["ls", "cli"]);
    assert!(listed.contains("a/") && listed.contains("from-stdin") && !listed.contains("small"), "{listed}");
    let deep = cluster.cli_run(&["ls", "-R", "cli"]);
    assert!(deep.contains("a/large") && deep.contains("a/small"), "{deep}");
    assert!(cluster.cli_run(&["ls"]).contains("cli"));
    let long = cluster.cli_run(&["ls", "-l", "cli/a/"]);
    assert!(long.contains("-rw-r--r--"), "{long}");

    let stat = cluster.cli_json(&["stat", "cli/a/small"]);
    assert_eq!(field(&stat, "/size"), 6);
    assert!(cluster.cli_run(&["stat", "cli/a/small"]).contains('6'));

    cluster.cli_run(&["rm", "cli/a/small"]);
    let said = cluster.cli_fails(&["get", "cli/a/small", "-"]);
    assert!(said.contains("error:") && said.contains("a/small"), "{said}");
    cluster.cli_fails(&["rm", "cli/a/small"]);
    cluster.cli_run(&["rm", "-f", "cli/a/small"]);
    cluster.cli_fails(&["rm", "cli/a"]);
    cluster.cli_run(&["rm", "-r", "cli/a"]);
    assert!(!cluster.mount().join("cli/a").exists());
    cluster.assert_clean("cli");
}

#[test]
fn whole_directories() {
    let cluster = Cluster::shared();
    let local = cluster.scratch("local-tree");
    cluster.cli_run(&["shard", "create", "cli-tree"]);
    let made = tree::generate(&local.join("tree"), 500, 7);
    println!("{made:?}");
    // Files and directories travel; links are for the mount.
    sh(&local, "find tree -type l -delete && find tree -type d -empty -delete");
    cluster.cli_run(&["put", "-r", local.join("tree").to_str().unwrap(), "cli-tree/up"]);
    sh(cluster.mount(), &format!("diff -r {}/tree cli-tree/up", local.display()));
    cluster.cli_run(&["get", "-r", "cli-tree/up", local.join("down").to_str().unwrap()]);
    sh(&local, "diff -r tree down");
    let keys = cluster.cli_run(&["ls", "-R", "-0", "cli-tree"]).matches('\0').count();
    let files: usize = sh(&local, "find tree -type f -printf x | wc -c").trim().parse().unwrap();
    assert!(keys >= files, "{keys} keys, {files} files");
    cluster.cli_run(&["rm", "-r", "cli-tree/up"]);
    assert_eq!(cluster.cli_run(&["ls", "-R", "cli-tree"]), "");
}

#[test]
fn shards_nodes_volumes_and_status() {
    let cluster = Cluster::shared();
    cluster.cli_run(&["shard", "create", "cli-shard", "--limit", "1GiB", "--mode", "0700"]);
    let shown = cluster.cli_json(&["shard", "show", "cli-shard"]);
    assert_eq!(field(&shown, "/name"), "cli-shard");
    assert_eq!(field(&shown, "/limit_bytes"), 1 << 30);
    assert_eq!(field(&shown, "/state"), "active");
    assert!(cluster.cli_run(&["shard", "list"]).contains("cli-shard"));
    cluster.cli_run(&["put", "/etc/hostname", "cli-shard/h"]);
    cluster.cli_run(&["shard", "rename", "cli-shard", "cli-renamed"]);
    cluster.cli_run(&["shard", "close", "cli-renamed"]);
    assert_eq!(field(&cluster.cli_json(&["shard", "show", "cli-renamed"]), "/state"), "read-only");
    let said = cluster.cli_fails(&["put", "/etc/hostname", "cli-renamed/i"]);
    assert!(said.contains("closed") || said.contains("read-only"), "{said}");
    // Without a terminal, nothing is deleted unasked.
    cluster.cli_fails(&["shard", "delete", "cli-renamed"]);
    cluster.cli_run(&["shard", "delete", "cli-renamed", "--force", "--yes"]);
    cluster.cli_fails(&["shard", "show", "cli-renamed"]);

    let nodes = rows(cluster.cli_json(&["node", "list"]), "nodes");
    assert_eq!(nodes.len(), 3);
    assert!(nodes.iter().all(|n| n["alive"] == true), "{nodes:?}");
    assert_eq!(rows(cluster.cli_json(&["volume", "list"]), "volumes").len(), 3);
    for command in [["node", "list"], ["volume", "list"]] {
        let text = cluster.cli_run(&command);
        assert!(text.lines().count() >= 4 && text.contains("node-2"), "{text}");
    }
    let status = cluster.cli_run(&["status"]);
    assert!(status.contains("node-1") && status.contains("node-3"), "{status}");
    assert!(cluster.cli_json(&["status"]).is_object());
    assert!(cluster.cli_json(&["dev", "status"]).is_object());
    assert!(cluster.cli_run(&["dev", "status"]).contains("node-1"));
    let checked = cluster.cli_run(&["fsck", "--read-data", "--json"]);
    for line in checked.lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        assert_eq!(field(&value, "/findings"), 0, "{value}");
    }
}

#[test]
fn another_client_id_has_shards_of_its_own() {
    let cluster = Cluster::shared();
    cluster.cli_run(&["shard", "create", "mine"]);
    cluster.cli_run(&["put", "/etc/hostname", "mine/k"]);
    let said = cluster.cli_fails(&["--client-id", "stranger", "get", "mine/k", "-"]);
    assert!(said.contains("mine"), "{said}");
    cluster.cli_run(&["--client-id", "stranger", "shard", "create", "mine"]);
    let said = cluster.cli_fails(&["--client-id", "stranger", "get", "mine/k", "-"]);
    assert!(said.contains('k'), "{said}");
    let all = cluster.cli_json(&["shard", "list", "--all-owners"]);
    assert!(all.to_string().contains("stranger"), "{all}");
    let id = field(&cluster.cli_json(&["shard", "show", "mine"]), "/id").to_string();
    let said = cluster.cli_fails(&[
        "--client-id",
        "stranger",
        "shard",
        "delete",
        &format!("@{id}"),
        "--force",
        "--yes",
    ]);
    assert!(said.contains("client id") || said.contains("belongs"), "{said}");
    assert!(cluster.mount().join("mine/k").exists());
}

#[test]
fn completions_and_man_pages() {
    let cluster = Cluster::shared();
    for shell in ["bash", "zsh", "fish"] {
        let script = cluster.cli_run(&["completions", shell]);
        assert!(script.contains("shardfs") && script.len() > 1000, "{shell}");
        if shell == "bash" {
            fs::write(cluster.root().join("completion"), &script).unwrap();
            sh(cluster.root(), "bash -n completion");
        }
    }
    let pages = cluster.scratch("man");
    cluster.cli_run(&["man", "--man-dir", pages.to_str().unwrap()]);
    let page = |name: &str| fs::read_to_string(pages.join(name)).unwrap();
    assert!(page("shardfs-put.1").contains(".TH") && page("shardfs-put.1").contains("SRC..."));
    assert!(page("shardfsd.1").contains("MOUNTPOINT"));
    assert!(page("shardfs-node.1").contains("data"), "the daemon, not the command");
    assert!(cluster.cli_run(&["--help"]).contains("dev up"));
    for command in ["put", "get", "ls", "rm", "stat", "shard", "fsck", "mount", "umount", "bench", "dev"] {
        assert!(cluster.cli_run(&[command, "--help"]).contains("Usage"), "{command}");
    }
}

#[test]
fn readers_that_go_away_are_no_error_to_shout_about() {
    let cluster = Cluster::shared();
    let shard = cluster.shard("cli-pipe");
    sh(&shard, "for i in $(seq 500); do : >file-with-a-rather-long-name-$i; done");
    let program = cluster.cli().get_program().to_str().unwrap().to_owned();
    let said = sh(
        cluster.root(),
        &format!(
            "set +o pipefail; {program} --dir {} ls cli-pipe 2>&1 >/dev/full | head -c 300; {program} --dir {} ls -l cli-pipe 2>err | head -n1 >/dev/null; cat err",
            cluster.dir().display(),
            cluster.dir().display()
        ),
    );
    assert!(!said.contains("panicked") && !said.contains("Broken pipe"), "{said}");
}

#[test]
fn a_folder_with_somebodys_files_is_no_place_for_a_cluster() {
    let scratch = Cluster::shared().scratch("somebodys");
    let (dir, file) = (scratch.join("d"), scratch.join("d/logs/app.log"));
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    fs::write(&file, "mine").unwrap();
    let up = ["--dir", text(&dir), "dev", "up", "--nodes", "1", "--volumes", "dir"];
    let said = fails_with(2, &shardfs(&up).output().unwrap());
    assert!(said.contains("not empty and no cluster") && said.contains("an empty or a new folder"), "{said}");
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing was made");
    assert_eq!(fs::read_to_string(&file).unwrap(), "mine");
    // A file is no mount point.
    let other = scratch.join("e");
    let mut up = shardfs(&["--dir", text(&other), "dev", "up", "--nodes", "1", "--volumes", "dir"]);
    let said = fails_with(2, &up.args(["--mount", text(&file)]).output().unwrap());
    assert!(said.contains("app.log is a file; a folder is needed"), "{said}");
}

#[test]
fn a_mount_that_never_worked_is_forgotten() {
    let options = Options { nodes: 1, volumes: "dir", ..Options::default() };
    let (cluster, output) = Cluster::try_start(&options, &["-o", "no_such_option=1"]);
    let said = fails_with(1, &output);
    assert!(said.contains("the nodes are up") && said.contains("no_such_option"), "{said}");
    assert!(said.contains(&format!("mount {}", cluster.mount().display())), "says what to do: {said}");
    assert_eq!(cluster.settings()["mount"], Value::Null);
    // What it says to do works.
    cluster.cli_run(&["mount", text(&cluster.mount())]);
    fs::write(cluster.shard("s").join("k"), "v").unwrap();
    cluster.cli_run(&["umount", text(&cluster.mount())]);
    // Neither the mount nor its options come back.
    cluster.cli_run(&["dev", "down"]);
    cluster.cli_run(&["dev", "up"]);
    assert_eq!(cluster.cli_run(&["get", "s/k", "-"]), "v");

    // One that worked is remembered, until it is not wanted any more.
    cluster.cli_run(&["dev", "down"]);
    assert!(cluster.up(&options, &[]).status.success());
    cluster.cli_run(&["dev", "down"]);
    cluster.cli_run(&["dev", "up"]);
    assert!(cluster.mount().join("s/k").exists());
    cluster.cli_run(&["dev", "down"]);
    for flags in [&["--no-mount"][..], &[]] {
        cluster.cli_run(&[&["dev", "up"], flags].concat());
        assert!(!cluster.mount().join("s").exists());
        cluster.cli_run(&["dev", "down"]);
    }

    // It takes only its own with it.
    fs::write(cluster.dir().join("logs/notes"), "mine").unwrap();
    let said = cluster.cli_run(&["dev", "down", "--delete", "--yes"]);
    assert!(said.contains("stays"), "{said}");
    let left = sh(cluster.root(), "find c -mindepth 1 | sort");
    assert_eq!(left, "c/logs\nc/logs/notes\n");
}

#[test]
fn a_lost_supervisor_is_called_so() {
    let cluster = Cluster::start(&Options { nodes: 1, volumes: "dir", ..Options::default() });
    let status = cluster.cli_json(&["dev", "status"]);
    let pid = field(&status, "/supervisor/pid").as_i64().unwrap();
    // SAFETY: a signal to this cluster's supervisor, by number.
    unsafe { libc::kill(pid as i32, libc::SIGKILL) };
    eventually(Duration::from_secs(60), || {
        let said = cluster.cli_fails(&["dev", "kill", "node-1"]);
        if said.contains("gone, with processes left running") { Ok(()) } else { Err(said) }
    });
    assert!(cluster.cli_fails(&["dev", "start", "node-1"]).contains("dev up"));
    cluster.cli_run(&["dev", "up"]);
    cluster.cli_run(&["dev", "kill", "node-1"]);
    cluster.cli_run(&["dev", "start", "node-1"]);
}

#[test]
fn limits_of_listings_count_what_is_printed() {
    let cluster = Cluster::shared();
    let shard = cluster.shard("cli-limit");
    sh(&shard, "mkdir d d/e; touch d/e/z; for i in 1 2 3 4 5; do : >d/f$i; : >t$i; done");
    let lines = |arguments: &[&str]| {
        let text = cluster.cli_run(&[&["ls"], arguments].concat());
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    };
    for (arguments, expected) in [
        (&["--limit", "3", "cli-limit"][..], &["d/", "t1", "t2"][..]),
        (&["--limit", "3", "cli-limit/d"], &["e/", "f1", "f2"]),
        (&["--limit", "3", "cli-limit/d/"], &["e/", "f1", "f2"]),
        (&["--limit", "3", "-R", "cli-limit/d"], &["d/e/", "d/e/z", "d/f1"]),
        (&["--limit", "2", "--prefix", "cli-limit/d/"], &["e/", "f1"]),
        (&["--limit", "1", "--prefix", "cli-limit/d/f"], &["f1"]),
        (&["--limit", "2", "--start-after", "d/f3", "cli-limit/d"], &["f4", "f5"]),
        (&["--limit", "0", "cli-limit/d"], &[]),
        (&["--limit", "99", "cli-limit/d"], &["e/", "f1", "f2", "f3", "f4", "f5"]),
    ] {
        assert_eq!(lines(arguments), expected, "ls {arguments:?}");
    }
    // Shards, too.
    for name in ["cli-limit-a", "cli-limit-b", "cli-limit-c"] {
        cluster.shard(name);
    }
    assert_eq!(lines(&["--start-after", "cli-limit-a", "--limit", "2"]), ["cli-limit-b/", "cli-limit-c/"]);
    assert_eq!(lines(&["--start-after", "cli-limit-b/", "--limit", "1"]), ["cli-limit-c/"]);
    assert_eq!(lines(&["--start-after", "~"]), [""; 0]);
    for flag in ["--prefix", "-R"] {
        assert!(cluster.cli_fails(&["ls", flag]).contains("PATH"));
    }
}

#[test]
fn permission_bits_travel() {
    let cluster = Cluster::shared();
    let shard = cluster.shard("cli-modes");
    let local = cluster.scratch("local-modes");
    sh(&local, "mkdir d; echo 1 >d/private; echo 2 >d/program; head -c 300000 /dev/zero >d/large");
    for (name, mode) in [("private", 0o600), ("program", 0o755), ("large", 0o640)] {
        fs::set_permissions(local.join("d").join(name), fs::Permissions::from_mode(mode)).unwrap();
    }
    let mode = |name: &str| format!("{:o}", fs::metadata(shard.join(name)).unwrap().mode() & 0o7777);
    cluster.cli_run(&["put", "-r", text(&local.join("d")), "cli-modes/"]);
    assert_eq!([mode("d/private"), mode("d/program"), mode("d/large")], ["600", "755", "640"]);
    cluster.cli_run(&["put", text(&local.join("d/private")), "cli-modes/one"]);
    cluster.cli_run(&["put", "--mode", "604", text(&local.join("d/private")), "cli-modes/given"]);
    piped(cluster, b"x", &["put", "-", "cli-modes/input"]);
    assert_eq!([mode("one"), mode("given"), mode("input")], ["600", "604", "644"]);
    assert!(cluster.cli_run(&["put", "--help"]).contains("permission bits (rwx) of its file"));
}

#[test]
fn an_at_and_a_number_is_an_id() {
    let cluster = Cluster::shared();
    cluster.cli_run(&["shard", "create", "cli-id"]);
    cluster.cli_run(&["put", "/etc/hostname", "cli-id/k"]);
    let id = field(&cluster.cli_json(&["shard", "show", "cli-id"]), "/id").to_string();
    assert_eq!(cluster.cli_run(&["ls", &format!("@{id}")]), "k\n");
    assert_eq!(field(&cluster.cli_json(&["shard", "show", &format!("@{id}")]), "/name"), "cli-id");
    assert!(cluster.cli_run(&["stat", &format!("@{id}/k")]).contains("file"));
    for name in ["@40", "@1"] {
        let said = cluster.cli_fails(&["shard", "create", name]);
        assert!(said.contains(name), "{said}");
    }
}

#[test]
fn failures_name_the_shard_and_say_what_is_meant() {
    let cluster = Cluster::shared();
    let shard = cluster.shard("cli-words");
    fs::create_dir(shard.join("src")).unwrap();
    let said = cluster.cli_fails(&["put", "/etc/hostname", "cli-words/src"]);
    assert!(said.contains("put cli-words/src: ") && said.contains("`cli-words/src/` puts"), "{said}");
    assert!(!said.contains("-r"), "{said}");
    let said = cluster.cli_fails(&["shard", "delete", "--yes", "cli-words"]);
    assert!(said.contains("is not empty") && said.contains("`--force` deletes"), "{said}");
    // Nobody listens there; the environment says how long that is believed.
    let begun = Instant::now();
    let output =
        shardfs(&["--endpoints", "127.0.0.1:1", "ls"]).env("SHARDFS_DEADLINE", "1").output().unwrap();
    let said = fails_with(1, &output);
    assert!(begun.elapsed() < Duration::from_secs(50), "not by the default of 60 s: {:?}", begun.elapsed());
    assert!(said.contains("within 1 s") && !said.contains("change may"), "{said}");
    let mut create = shardfs(&["--endpoints", "127.0.0.1:1", "--deadline", "0.5", "shard", "create", "x"]);
    let said = fails_with(1, &create.env("SHARDFS_DEADLINE", "50").output().unwrap());
    assert!(said.contains("change may have been made"), "{said}");
    let output =
        shardfs(&["--endpoints", "127.0.0.1:1", "ls"]).env("SHARDFS_DEADLINE", "soon").output().unwrap();
    assert!(fails_with(2, &output).contains("SHARDFS_DEADLINE"));
}

#[test]
fn signals_are_told_by_the_exit_code() {
    let cluster = Cluster::shared();
    cluster.cli_run(&["shard", "create", "cli-signals"]);
    for (signal, code, word) in [(libc::SIGTERM, 143, "terminated"), (libc::SIGINT, 130, "interrupted")] {
        let mut command = cluster.cli();
        command.args(["put", "-", "cli-signals/never"]);
        let mut child = command.stdin(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // More than one message: by then it reads, and has its signal handlers.
        child.stdin.as_mut().unwrap().write_all(&vec![0; 9 << 20]).unwrap();
        // SAFETY: a signal to our own child, which was not waited for.
        unsafe { libc::kill(child.id() as i32, signal) };
        let stdin = child.stdin.take();
        let said = fails_with(code, &child.wait_with_output().unwrap());
        drop(stdin);
        assert!(said.contains(word), "{said}");
    }
    cluster.cli_fails(&["stat", "cli-signals/never"]);
}

#[test]
fn who_may_not_unmount_is_told_so() {
    let cluster = Cluster::shared();
    let shard = cluster.shard("cli-umount");
    let scratch = cluster.scratch("umount-other");
    // The build's folder may be closed to others.
    fs::copy(bin_dir().join("shardfs"), scratch.join("shardfs")).unwrap();
    let point = scratch.join("mnt");
    fs::create_dir(&point).unwrap();
    let is_mounted = || {
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
        table.contains(&format!(" {} ", point.display()))
    };
    let by_other = || {
        let mut command = Command::new("setpriv");
        command.args(["--reuid=1", "--regid=1", "--clear-groups"]).arg(scratch.join("shardfs"));
        let output = command.arg("umount").arg(&point).current_dir("/").output().unwrap();
        let said = fails_with(1, &output);
        assert!(said.contains("permission denied: mounted by root") && said.contains("as root"), "{said}");
        assert!(is_mounted());
    };
    cluster.cli_run(&["mount", text(&point)]);
    by_other();
    assert!(shard.is_dir() && point.join("cli-umount").is_dir());
    // A dead one is not taken away by anybody either.
    mounted::kill(&point);
    by_other();
    cluster.cli_run(&["umount", text(&point)]);
    assert!(!is_mounted());
}
