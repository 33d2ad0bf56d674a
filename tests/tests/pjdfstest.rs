//! pjdfstest (crates.io) on a mount, as root, with its table for SEMANTICS.md.
//!
//! `make test` and `make pjdfstest` install the program and name it in `PJDFSTEST`. No case may fail, and none may be skipped
//! but [`KNOWN_SKIPS`].

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::process::Output;

use shardfs_tests::cluster::bin_dir;
use shardfs_tests::{Cluster, Shell};

/// Test cases that cannot be run, for reasons that SEMANTICS.md gives.
const KNOWN_SKIPS: &[&str] = &["link::link_count_max"];

#[test]
fn pjdfstest() {
    let program = std::env::var("PJDFSTEST")
        .expect("PJDFSTEST names the program: run make test or make pjdfstest, which install it");
    let cluster = Cluster::shared();
    let shard = cluster.shard("pjdfstest");
    // Other users must be able to walk to the files; the second file system is for EXDEV.
    for folder in [cluster.root(), &cluster.mount(), &shard] {
        assert_eq!(fs::metadata(folder).unwrap().permissions().mode() & 0o005, 0o005, "{}", folder.display());
    }
    let other = cluster.shard("pjdfstest-other");
    let local = cluster.scratch("local-pjdfstest");
    let shell = Shell::new(&local)
        .with("PROGRAM", &program)
        .with("M", &shard)
        .with("OTHER", &other)
        .with("RUST_BACKTRACE", "0")
        .with("BIN", bin_dir());
    let config = |name: &str, remount: bool| {
        // Users that every Debian has.
        let text = format!(
            "[features]\nposix_fallocate = {{}}\nutimensat = {{}}\nutime_now = {{}}\nrename_ctime = {{}}\n\
             [settings]\nnaptime = 0.01\nallow_remount = {remount}\n\
             [dummy_auth]\nentries = [[\"nobody\", \"nogroup\"], [\"daemon\", \"daemon\"]]\n"
        );
        fs::write(local.join(name), text).unwrap();
    };
    config("config.toml", false);
    config("remount.toml", true);
    let mut cases = outcomes(&shell.output(r#""$PROGRAM" -c config.toml -p "$M" -s "$OTHER""#));
    // A remount needs that nobody has anything open for writing, and other cases leave that behind in their process: so, on any file
    // system, those that remount have one of their own. The helper of mount(8) is in /usr/sbin in a mount namespace of the script's own.
    let remounted = outcomes(&shell.output(
        r#"exec unshare --mount --propagation private bash -euo pipefail -c '
             mkdir overlay
             mount -t tmpfs tmpfs overlay
             mkdir overlay/upper overlay/work
             mount -t overlay overlay -o lowerdir=/usr/sbin,upperdir=overlay/upper,workdir=overlay/work /usr/sbin
             ln -s "$BIN/shardfsd" /usr/sbin/mount.fuse.shardfs
             exec "$PROGRAM" -c remount.toml -p "$M" -s "$OTHER" erofs'"#,
    ));
    assert!(remounted.len() > 10, "these are not all that remount: {remounted:?}");
    cases.extend(remounted);

    let mut groups: BTreeMap<&str, [u32; 3]> = BTreeMap::new();
    let mut of = [const { BTreeMap::new() }; 3];
    for (case, (column, why)) in &cases {
        let group = case.split("::").next().unwrap();
        groups.entry(group).or_default()[*column] += 1;
        of[*column].insert(case.as_str(), why.as_str());
    }
    let [passed, failed, skipped] = of;
    println!("\n| group | passed | failed | skipped |\n|---|---|---|---|");
    for (group, [passed, failed, skipped]) in &groups {
        println!("| {group} | {passed} | {failed} | {skipped} |");
    }
    println!("\n{} passed, {} failed, {} skipped\n", passed.len(), failed.len(), skipped.len());
    cluster.assert_clean("pjdfstest");

    assert!(groups.len() > 10, "this is not all of it: {groups:?}");
    assert_eq!(failed, BTreeMap::new());
    let skipped: Vec<&str> = skipped.into_keys().collect();
    assert_eq!(skipped, KNOWN_SKIPS, "skipped");
}

/// What a run says of each case: 0 passed, 1 failed, 2 skipped, and what it gives as the reason.
fn outcomes(output: &Output) -> BTreeMap<String, (usize, String)> {
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(text.lines().any(|line| line.starts_with("Summary:")), "{output:?}");
    let mut found = BTreeMap::new();
    let mut lines = text.lines().peekable();
    while let Some(line) = lines.next() {
        let Some((case, outcome)) = line.rsplit_once(' ') else { continue };
        let column = match outcome {
            "ok" => 0,
            "FAILED" => 1,
            "skipped" => 2,
            _ => continue,
        };
        if case.contains("::") {
            let why = lines.peek().map(|line| line.trim().to_owned()).unwrap_or_default();
            found.insert(case.trim_end().to_owned(), (column, why));
        }
    }
    found
}
