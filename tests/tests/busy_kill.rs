//! Ordinary programs that are in the middle of their work on the mount when the primary is killed or stopped, twice: they
//! finish, and what they made is right.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shardfs_tests::cluster::eventually;
use shardfs_tests::load::seed;
use shardfs_tests::{Cluster, Shell, sh, tree};

/// The issue's number.
const TAR_FILES: usize = 10_000;
const GIT_FILES: usize = 3_000;
/// Shares of the work, in percent, after which the primary is struck.
const STRIKES: [u32; 2] = [15, 55];
/// A volume is served elsewhere within this, on a busy machine.
const MOVED_MAX: Duration = Duration::from_secs(30);
/// What a program may take, its pauses included.
const WORK_SECONDS: u32 = 900;

/// Runs a script and strikes the primary of a shard while it is at work; it must succeed all the same. `percent` tells how
/// far it is.
fn struck(
    cluster: &Cluster,
    shard: &str,
    signal: &str,
    shell: &Shell,
    script: &str,
    percent: impl Fn() -> u32,
) {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| shell.run(script));
        for at in STRIKES {
            eventually(Duration::from_secs(WORK_SECONDS.into()), || match percent() {
                _ if work.is_finished() => Ok(()),
                now if now >= at => Ok(()),
                now => Err(format!("{now} % of the work done")),
            });
            // Its error says more than this one.
            if work.is_finished() {
                break;
            }
            let primary = cluster.primary_of(shard);
            let done = percent();
            cluster.cli_run(&["dev", "kill", &primary, "--signal", signal]);
            assert!(!work.is_finished() && done < 100, "{shard}: it was over before the primary was struck");
            eventually(MOVED_MAX, || match cluster.primary_of(shard) {
                now if now != primary => Ok(()),
                now => Err(format!("still served by {now}")),
            });
            println!(
                "{shard}: {signal} of {primary} at {done} %, then served by {}",
                cluster.primary_of(shard)
            );
            // The next strike finds two backups again.
            cluster.cli_run(&["dev", "start", &primary]);
        }
        work.join().unwrap_or_else(|reason| std::panic::resume_unwind(reason));
    });
    cluster.assert_clean(shard);
}

/// A cluster, a shard's folder on its mount, a folder beside it, and a shell that knows them.
fn places(shard: &str) -> (Cluster, PathBuf, PathBuf, Shell) {
    let cluster = Cluster::start(&Default::default());
    let (mount, local) = (cluster.shard(shard), cluster.scratch("local"));
    let shell = Shell::new(&local).with("M", &mount).with("L", &local).deadline_seconds(WORK_SECONDS);
    (cluster, mount, local, shell)
}

fn untar_while_struck(signal: &str) {
    let (cluster, mount, local, shell) = places("tar");
    tree::generate(&local.join("tree"), TAR_FILES, seed());
    shell.run("tar --format=posix --sort=name -cf in.tar tree");
    // A checkpoint every 100 records of 512 bytes, 20 to a block.
    let blocks = fs::metadata(local.join("in.tar")).unwrap().len() / (20 * 512);
    let progress = local.join("progress");
    let percent = || {
        let said = fs::read_to_string(&progress).unwrap_or_default();
        let block: u64 = said.split_whitespace().next_back().and_then(|n| n.parse().ok()).unwrap_or(0);
        (block * 100 / blocks) as u32
    };
    let script =
        "tar --checkpoint=20 --checkpoint-action=exec='echo $TAR_CHECKPOINT >>$L/progress' -xf in.tar -C $M";
    struck(&cluster, "tar", signal, &shell, script, percent);
    tree::assert_same(&local.join("tree"), &mount.join("tree"));
}

#[test]
fn tar_goes_on_when_the_primary_is_killed() {
    untar_while_struck("KILL");
}

#[test]
#[ignore = "long: run by make test-long"]
fn tar_goes_on_when_the_primary_is_stopped() {
    untar_while_struck("STOP");
}

/// Names, kinds, modes and targets of a work tree, without git's own folder. (`diff` tells of content.)
fn work_tree(root: &Path) -> String {
    sh(root, r"find . -mindepth 1 -path ./.git -prune -o -printf '%P\t%y %m %l\0' | sort -z | tr '\0' '\n'")
}

fn clone_while_struck(signal: &str) {
    let (cluster, mount, local, shell) = places("git");
    tree::generate(&local.join("source"), GIT_FILES, seed());
    let shell = shell.with("HOME", &local).with("GIT_CONFIG_NOSYSTEM", "1");
    shell.run(
        r#"git config --global user.name Test
           git config --global user.email test@example.org
           git config --global init.defaultBranch main
           git config --global --add safe.directory '*'
           cd source
           git init -q
           git add -A
           git commit -q -m first
           for i in $(seq 20); do
               echo "$i" >>log
               git add -A
               git commit -q -m "commit $i"
           done"#,
    );
    shell.run("git clone -q --no-local source expected");
    let progress = local.join("progress");
    let percent = || {
        let said = fs::read(&progress).unwrap_or_default();
        let said = String::from_utf8_lossy(&said).into_owned();
        // "Receiving objects:  45% (2/5)", then "Updating files:  30% (1/4)".
        let of = |what: &str| -> u32 {
            let last = said.rfind(what).map(|at| &said[at + what.len()..]);
            last.and_then(|rest| rest.split('%').next()?.trim().parse().ok()).unwrap_or(0)
        };
        (of("Receiving objects:") + 3 * of("Updating files:")) / 4
    };
    struck(
        &cluster,
        "git",
        signal,
        &shell,
        "git clone --progress --no-local source $M/clone 2>progress",
        percent,
    );
    shell.run(
        r#"cd $M/clone
           git fsck --full --strict
           test -z "$(git status --porcelain)"
           test "$(git rev-parse HEAD)" = "$(git -C $L/source rev-parse HEAD)"
           diff -r --no-dereference --exclude=.git $L/expected $M/clone"#,
    );
    let same = work_tree(&local.join("expected")) == work_tree(&mount.join("clone"));
    assert!(same, "names, kinds, modes or targets differ between {} and the clone", local.display());
}

#[test]
fn git_clone_goes_on_when_the_primary_is_killed() {
    clone_while_struck("KILL");
}

#[test]
#[ignore = "long: run by make test-long"]
fn git_clone_goes_on_when_the_primary_is_stopped() {
    clone_while_struck("STOP");
}
