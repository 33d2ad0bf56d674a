//! The command line against a real cluster: round trips, prefixes, JSON, exit codes.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::process::Stdio;

use serde_json::Value;
use shardfs_tests::{Cluster, sh, tree};

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
    let page = fs::read_to_string(pages.join("shardfs-put.1")).unwrap();
    assert!(page.contains(".TH"), "{page}");
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
