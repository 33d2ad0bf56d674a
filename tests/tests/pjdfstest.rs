//! pjdfstest (crates.io) on a mount, as root, with its table for SEMANTICS.md.
//!
//! `make pjdfstest` installs the program and names it in `PJDFSTEST`. Failures that are known stand in
//! [`KNOWN_FAILURES`]; anything else fails the test, and so does a known one that passes.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;

use shardfs_tests::{Cluster, Shell};

/// Test cases that fail for reasons that SEMANTICS.md gives.
const KNOWN_FAILURES: &[&str] = &[];

#[test]
#[ignore = "needs the pjdfstest program: run by make pjdfstest"]
fn pjdfstest() {
    let program = std::env::var("PJDFSTEST").expect("`make pjdfstest` names the program in PJDFSTEST");
    let cluster = Cluster::shared();
    let shard = cluster.shard("pjdfstest");
    // Other users must be able to walk to the files; the second file system is for EXDEV.
    for folder in [cluster.root(), &cluster.mount(), &shard] {
        assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o005, 0o005, "{}", folder.display());
    }
    let other = cluster.shard("pjdfstest-other");
    let local = cluster.scratch("local-pjdfstest");
    // Users that every Debian has.
    fs::write(
        local.join("config.toml"),
        "[features]\nposix_fallocate = {}\nutimensat = {}\nutime_now = {}\nrename_ctime = {}\n\
         [settings]\nnaptime = 0.01\nallow_remount = false\n\
         [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]\n",
    )
    .unwrap();
    let output = Shell::new(&local)
        .with("PROGRAM", &program)
        .with("M", &shard)
        .with("OTHER", &other)
        .with("RUST_BACKTRACE", "0")
        .output("\"$PROGRAM\" -c config.toml -p \"$M\" -s \"$OTHER\"");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let summary = text.lines().find(|l| l.starts_with("Summary:")).unwrap_or_else(|| panic!("{output:?}"));

    let mut groups: BTreeMap<String, [u32; 3]> = BTreeMap::new();
    let mut failed: BTreeMap<String, String> = BTreeMap::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let Some((case, outcome)) = line.rsplit_once(' ') else { continue };
        let case = case.trim_end();
        let column = match outcome {
            "ok" => 0,
            "FAILED" => 1,
            "skipped" => 2,
            _ => continue,
        };
        let Some((group, _)) = case.split_once("::") else { continue };
        groups.entry(group.to_owned()).or_default()[column] += 1;
        if column == 1 {
            let why = lines.peek().map(|l| l.trim().to_owned()).unwrap_or_default();
            failed.insert(case.to_owned(), why);
        }
    }
    println!("\n| group | passed | failed | skipped |\n|---|---|---|---|");
    for (group, [passed, failed, skipped]) in &groups {
        println!("| {group} | {passed} | {failed} | {skipped} |");
    }
    println!("\n{summary}\n");
    for (case, why) in &failed {
        println!("- `{case}`: {why}");
    }
    cluster.assert_clean("pjdfstest");

    let known: BTreeSet<&str> = KNOWN_FAILURES.iter().copied().collect();
    let failed: BTreeSet<&str> = failed.keys().map(String::as_str).collect();
    assert_eq!(failed.difference(&known).collect::<Vec<_>>(), [&""; 0], "new failures");
    assert_eq!(
        known.difference(&failed).collect::<Vec<_>>(),
        [&""; 0],
        "known failures that pass now: take them off"
    );
}
