//! Snapshots, rollbacks and clones as programs meet them: on a mount, by the command line, under load, over a failover.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::{DirEntryExt, FileExt, MetadataExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use shardfs_proto::client::Client;
use shardfs_proto::types::op::{Durability, PutOptions};
use shardfs_proto::types::{Key, ReadFrom, ShardId, ShardName};
use shardfs_tests::cluster::Options;
use shardfs_tests::mounted::mapped;
use shardfs_tests::tree::{assert_same, generate, listing};
use shardfs_tests::{Cluster, Shell, block_on, sh, sh_fails};

const PATIENCE: Duration = Duration::from_secs(90);

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn errno(outcome: std::io::Result<impl Sized>) -> i32 {
    outcome.map(|_| ()).unwrap_err().raw_os_error().unwrap()
}

fn snapshot_id(cluster: &Cluster, shard: &str, name: &str) -> ShardId {
    let found = cluster.cli_json(&["shard", "show", &format!("{shard}/.snap/{name}")]);
    ShardId::new(found["id"].as_u64().unwrap()).unwrap()
}

async fn put_synced(client: &Client, shard: ShardId, key: &Key, value: &'static str) {
    let options = PutOptions::default();
    client.put(shard, key.clone(), value.into(), options, Durability::Sync).await.unwrap();
}

#[test]
fn a_snapshot_is_a_directory_that_stays_as_the_shard_was() {
    let cluster = Cluster::shared();
    let photos = cluster.shard("photos");
    let copy = cluster.scratch("photos-then");
    generate(&photos, 300, 11);
    // A copy taken of a quiet tree is what the snapshot has to be.
    Shell::new(cluster.root()).run("cp -a mnt/photos/. photos-then/");
    fs::create_dir(photos.join(".snap/monday")).unwrap();
    let monday = photos.join(".snap/monday");
    assert_same(&monday, &copy);

    // The shard goes on.
    sh(&photos, "find . -type f -name '*[0-4]*' -delete; echo new > new");
    generate(&photos.join("more"), 50, 12);
    assert_same(&monday, &copy);
    sh(cluster.root(), "diff -r --no-dereference mnt/photos/.snap/monday photos-then");
    sh_fails(cluster.root(), "diff -r --no-dereference mnt/photos photos-then");
    sh(&photos, "mkdir .snap/tuesday");
    assert_eq!(names(&photos.join(".snap")), ["monday", "tuesday"]);

    // It is found, and not listed: what walks the shard does not go there.
    assert!(!names(&photos).contains(&".snap".to_owned()));
    assert_eq!(sh(&photos, "find . -name monday | wc -l").trim(), "0");
    assert_eq!(sh(&photos, "ls -A | grep -c snap || true").trim(), "0");
    // Numbers and ways up.
    let (of_shard, of_snapshot) = (photos.join("new"), photos.join(".snap/tuesday/new"));
    let (a, b) = (fs::metadata(&of_shard).unwrap(), fs::metadata(&of_snapshot).unwrap());
    assert_eq!(fs::read(&of_shard).unwrap(), fs::read(&of_snapshot).unwrap());
    assert!(a.ino() != b.ino() && a.dev() == b.dev());
    let snap = fs::metadata(photos.join(".snap")).unwrap();
    let up = sh(&monday, "ls -aid .. | awk '{print $1}'; cd ..; ls; cd ..; ls -id . | awk '{print $1}'");
    let root = fs::metadata(&photos).unwrap().ino();
    assert_eq!(up, format!("{}\nmonday\ntuesday\n{root}\n", snap.ino()));
    let listed = fs::read_dir(photos.join(".snap")).unwrap().map(|e| e.unwrap());
    for entry in listed {
        assert_eq!(entry.ino(), fs::metadata(entry.path()).unwrap().ino(), "{entry:?}");
    }
    assert_eq!(errno(fs::metadata(monday.join(".snap"))), libc::ENOENT, "a snapshot has none of its own");
    assert_eq!(errno(fs::metadata(photos.join(".snap/none"))), libc::ENOENT);

    // Nothing in it changes.
    let file = names(&monday).into_iter().map(|n| monday.join(n)).find(|p| p.is_file()).unwrap();
    for outcome in [
        fs::write(monday.join("x"), "x"),
        fs::OpenOptions::new().write(true).open(&file).map(drop),
        fs::create_dir(monday.join("x")),
        fs::remove_file(&file),
        fs::rename(&file, monday.join("x")),
        fs::write(photos.join(".snap/x"), "x"),
        fs::rename(&monday, photos.join(".snap/x")),
    ] {
        assert_eq!(errno(outcome), libc::EROFS);
    }
    assert_eq!(errno(fs::hard_link(&file, photos.join("x"))), libc::EXDEV);
    assert_eq!(errno(fs::create_dir(&monday)), libc::EEXIST);
    assert_eq!(errno(fs::create_dir(photos.join(".snap"))), libc::EEXIST);
    assert_eq!(errno(fs::remove_dir(photos.join(".snap"))), libc::EPERM);
    assert_eq!(errno(fs::create_dir(photos.join(".snap").join("x".repeat(256)))), libc::ENAMETOOLONG);
    assert_same(&monday, &copy);

    // The command line sees the same.
    let listed = cluster.cli_json(&["shard", "snapshots", "photos"]);
    let listed: Vec<&str> = listed.as_array().unwrap().iter().map(|s| s["name"].as_str().unwrap()).collect();
    assert_eq!(listed, ["monday", "tuesday"]);
    assert_eq!(cluster.cli_run(&["get", "photos/.snap/tuesday/new", "-"]), "new\n");
    assert_eq!(cluster.cli_run(&["get", "photos@tuesday/new", "-"]), "new\n");
    let fetched = cluster.scratch("fetched");
    cluster.cli_run(&["get", "-r", "photos/.snap/monday/", fetched.to_str().unwrap()]);
    assert_eq!(sh(&fetched, "find . -type f | wc -l"), sh(&copy, "find . -type f | wc -l"));
    assert!(cluster.cli_run(&["ls", "photos/.snap/tuesday"]).contains("new\n"));
    cluster.cli_run(&["fsck", "--read-data", "photos/.snap/monday", "photos/.snap/tuesday", "photos"]);
    let refused = cluster.cli_fails(&["rm", "photos/.snap/tuesday/new"]);
    assert!(refused.contains("read-only"), "{refused}");
    assert!(!cluster.cli_run(&["shard", "list"]).contains("monday"));
    assert!(cluster.cli_run(&["shard", "list", "-a"]).contains("/.snap/monday"));

    // rm -rf takes the shard's content and leaves the snapshots, and with them the shard.
    sh(&photos, "find . -mindepth 1 -delete");
    assert_same(&monday, &copy);
    assert_eq!(errno(fs::remove_dir(&photos)), libc::ENOTEMPTY);
    let refused = cluster.cli_fails(&["shard", "delete", "photos", "--force", "--yes"]);
    assert!(refused.contains("2 snapshots") && refused.contains("shard snapshots"), "{refused}");
    fs::remove_dir(&monday).unwrap();
    assert_eq!(names(&photos.join(".snap")), ["tuesday"]);
    assert_eq!(errno(fs::metadata(&monday)), libc::ENOENT);
    cluster.cli_run(&["shard", "delete", "photos/.snap/tuesday", "--yes"]);
    assert!(names(&photos.join(".snap")).is_empty());
    fs::remove_dir(&photos).unwrap();
}

#[test]
fn a_snapshot_under_load_holds_what_was_synced_before_and_nothing_begun_after() {
    let cluster = Cluster::shared();
    let busy = cluster.shard("busy");
    let (begun, synced, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for n in 1.. {
                if stop.load(Ordering::SeqCst) {
                    break;
                }
                begun.store(n, Ordering::SeqCst);
                let folder = busy.join(format!("d{}", n % 7));
                fs::create_dir_all(&folder).unwrap();
                let mut file = fs::File::create(folder.join(format!("f{n}"))).unwrap();
                file.write_all(&vec![n as u8; 1 + (n as usize * 911) % 40_000]).unwrap();
                file.sync_all().unwrap();
                synced.store(n, Ordering::SeqCst);
            }
        });
        for snapshot in 0..5 {
            std::thread::sleep(Duration::from_millis(300));
            let due = synced.load(Ordering::SeqCst);
            let path = busy.join(format!(".snap/s{snapshot}"));
            fs::create_dir(&path).unwrap();
            let at_most = begun.load(Ordering::SeqCst);
            // Everything up to some number, the last perhaps in part; of all others nothing.
            let found = sh(&path, "find . -type f -printf '%f %s\\n' | sed s/^f// | sort -n");
            let found: Vec<(u64, usize)> = found
                .lines()
                .map(|line| line.split_once(' ').unwrap())
                .map(|(n, size)| (n.parse().unwrap(), size.parse().unwrap()))
                .collect();
            let last = found.len() as u64;
            assert!(due <= last && last <= at_most, "s{snapshot}: {last} is not in {due}..={at_most}");
            for (at, (n, size)) in found.iter().enumerate() {
                assert_eq!(*n, at as u64 + 1);
                assert!(
                    *n == last || *size == 1 + (*n as usize * 911) % 40_000,
                    "s{snapshot}: f{n} has {size}"
                );
            }
            cluster.cli_run(&["fsck", "--read-data", &format!("busy/.snap/s{snapshot}")]);
        }
        stop.store(true, Ordering::SeqCst);
        writer.join().unwrap();
    });
    cluster.assert_clean("busy");
}

#[test]
fn a_rollback_is_exact_and_the_mount_goes_on() {
    let cluster = Cluster::shared();
    let work = cluster.shard("work");
    generate(&work, 200, 21);
    fs::write(work.join("open"), "before").unwrap();
    cluster.cli_run(&["shard", "snapshot", "work", "good"]);
    let before = listing(&work);
    // What must not be there afterwards, in as many ways as there are.
    generate(&work.join("since"), 60, 22);
    fs::write(work.join("since/held"), "held").unwrap();
    sh(&work, "for f in file-1*; do echo changed > $f; done; find . -maxdepth 2 -name 'file-2*' -delete");
    sh(&work, "chmod 700 .; mv open opened; ln opened again");
    assert_ne!(listing(&work), before);
    let mut held = fs::OpenOptions::new().read(true).write(true).open(work.join("opened")).unwrap();
    let only_since = fs::File::open(work.join("since/held")).unwrap();

    let unsure = cluster.cli_fails(&["shard", "rollback", "work", "good"]);
    assert!(unsure.contains("loses") && unsure.contains("--yes"), "{unsure}");
    assert_ne!(listing(&work), before);
    let said = cluster.cli_run(&["shard", "rollback", "work", "good", "--yes"]);
    assert!(said.contains("work is as it was in good"), "{said}");
    assert_eq!(listing(&work), before);
    cluster.assert_clean("work");
    // A file that is there again is written through the descriptor of before; one that is not is stale.
    held.write_all(b"after!").unwrap();
    held.sync_all().unwrap();
    assert_eq!(fs::read_to_string(work.join("open")).unwrap(), "after!");
    let stale = errno(std::io::copy(&mut &only_since, &mut std::io::sink()));
    assert_eq!(stale, libc::ESTALE);
    // New numbers are new: what is made now is not taken for what was there.
    fs::write(work.join("made-now"), "x").unwrap();
    assert_eq!(fs::read_to_string(work.join("made-now")).unwrap(), "x");
    assert_eq!(errno(std::io::copy(&mut &only_since, &mut std::io::sink())), libc::ESTALE);
    // The snapshot stays, and brings it back once more.
    cluster.cli_run(&["shard", "rollback", "work", "good", "--yes"]);
    assert_eq!(listing(&work), before);
    assert_eq!(listing(&work.join(".snap/good")), before);
    let none = cluster.cli_fails(&["shard", "rollback", "work", "bad", "--yes"]);
    assert!(none.contains("no snapshot"), "{none}");
    cluster.assert_clean("work");
}

#[test]
fn a_rollback_of_what_this_mount_has_overwritten_shows_on_it() {
    let cluster = Cluster::shared();
    let rb = cluster.shard("rb");
    let f = rb.join("f");
    let overwrite = || sh(&rb, "printf NEW | dd of=f conv=notrunc status=none");
    let roll_back = || {
        cluster.cli_run(&["shard", "rollback", "rb", "s", "--yes"]);
        // Whatever the mount shows, this is in the shard.
        assert_eq!(cluster.cli_run(&["get", "rb/f", "-"]), "OLD-OLD-OLD\n");
    };
    assert_eq!(sh(&rb, "echo OLD-OLD-OLD > f; cat f; mkdir .snap/s"), "OLD-OLD-OLD\n");

    // Nobody asks for attributes between the write and the rollback.
    overwrite();
    roll_back();
    assert_eq!(sh(&rb, "cat f"), "OLD-OLD-OLD\n");
    assert_eq!(mapped(&f), b"OLD-OLD-OLD\n");

    overwrite();
    roll_back();
    assert_eq!(mapped(&f), b"OLD-OLD-OLD\n", "a mapping first");

    // The one who asks may get the old pages while the kernel is told to drop them.
    let held = fs::File::open(&f).unwrap();
    let read = || {
        let mut content = [0; 12];
        held.read_exact_at(&mut content, 0).unwrap();
        content
    };
    assert_eq!(read(), *b"OLD-OLD-OLD\n");
    fs::OpenOptions::new().write(true).open(&f).unwrap().write_all(b"NEW").unwrap();
    roll_back();
    let deadline = Instant::now() + PATIENCE;
    while read() != *b"OLD-OLD-OLD\n" {
        assert!(Instant::now() < deadline, "the descriptor shows {:?}", read().escape_ascii().to_string());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert_eq!(sh(&rb, "cat f"), "OLD-OLD-OLD\n");
    assert_eq!(mapped(&f), b"OLD-OLD-OLD\n");
    cluster.assert_clean("rb");
}

#[test]
fn a_clone_goes_its_own_way() {
    let cluster = Cluster::shared();
    let origin = cluster.shard("origin");
    generate(&origin, 150, 31);
    let copy = cluster.scratch("origin-then");
    Shell::new(cluster.root()).run("cp -a mnt/origin/. origin-then/");
    cluster.cli_run(&["shard", "snapshot", "origin", "v1"]);
    sh(&origin, "echo 2 > second");
    cluster.cli_run(&["shard", "clone", "origin/.snap/v1", "one"]);
    cluster.cli_run(&["shard", "clone", "origin@v1", "one-again", "--limit", "64MiB"]);
    cluster.cli_run(&["shard", "clone", "origin", "two"]);
    let mount = cluster.mount();
    assert_same(&mount.join("one"), &copy);
    assert_same(&mount.join("one-again"), &copy);
    assert_eq!(cluster.cli_json(&["shard", "show", "one-again"])["limit_bytes"], 64 << 20);
    assert_eq!(fs::read_to_string(mount.join("two/second")).unwrap(), "2\n");
    sh(
        &mount,
        "rm -rf one/d-* ; echo mine > one/mine; echo other > two/second; find origin -mindepth 1 -delete",
    );
    assert_same(&mount.join("one-again"), &copy);
    assert_same(&origin.join(".snap/v1"), &copy);
    assert_eq!(fs::read_to_string(mount.join("one/mine")).unwrap(), "mine\n");
    assert_eq!(fs::read_to_string(mount.join("two/second")).unwrap(), "other\n");
    assert!(names(&origin).is_empty());
    // Shards that share blocks go one after the other, in whichever order.
    cluster.cli_run(&["shard", "delete", "origin/.snap/v1", "--yes"]);
    cluster.cli_run(&["shard", "delete", "origin", "--force", "--yes"]);
    cluster.cli_run(&["shard", "delete", "one", "--force", "--yes"]);
    assert_same(&mount.join("one-again"), &copy);
    for shard in ["one-again", "two"] {
        cluster.assert_clean(shard);
    }
    // A name with an @ in it is a name first.
    cluster.cli_run(&["shard", "snapshot", "two", "x"]);
    cluster.cli_run(&["shard", "create", "two@x"]);
    assert_eq!(cluster.cli_json(&["shard", "show", "two@x"])["snapshot_of"], serde_json::Value::Null);
    assert!(cluster.cli_json(&["shard", "show", "two/.snap/x"])["snapshot_of"].is_u64());
}

#[test]
fn snapshots_survive_a_failover_and_are_read_from_backups() {
    let cluster = Cluster::start(&Options::default());
    let moving = cluster.shard("moving");
    generate(&moving, 120, 41);
    let copy = cluster.scratch("moving-then");
    Shell::new(cluster.root()).run("cp -a mnt/moving/. moving-then/");
    block_on(async {
        let client = cluster.client();
        let shard = client.shard_by_name(&ShardName::new("moving").unwrap()).await.unwrap().id;
        let key = Key::new("marker").unwrap();
        let put = async |value: &'static str| put_synced(&client, shard, &key, value).await;
        put("then").await;
        fs::write(copy.join("marker"), "then").unwrap();
        cluster.cli_run(&["shard", "snapshot", "moving", "s"]);
        put("now").await;
        let snapshot = snapshot_id(&cluster, "moving", "s");
        let primary = async || client.shard(shard).await.unwrap().location.node.unwrap();
        let old = primary().await;
        // Any node that has the volume answers, the primary or not.
        let reader = client.with_reads(ReadFrom::Backup { max_staleness: Duration::from_millis(1) });
        let deadline = Instant::now() + PATIENCE;
        loop {
            let (_, value, label) = reader.get_labelled(snapshot, &key).await.unwrap();
            assert_eq!(value, "then");
            if let Some(label) = label {
                assert!(label.last && label.node != old, "{label:?}");
                break;
            }
            assert!(Instant::now() < deadline, "no backup answers");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        cluster.cli_run(&["dev", "kill", old.as_str()]);
        assert_eq!(reader.get(snapshot, &key).await.unwrap().1, "then");
        assert_eq!(client.get(shard, &key).await.unwrap().1, "now");
        assert_ne!(primary().await, old);
        cluster.cli_run(&["dev", "start", old.as_str()]);
    });
    // What it holds is the same, on the new primary, which makes more of it.
    sh(cluster.root(), "diff -r --no-dereference mnt/moving/.snap/s moving-then");
    cluster.cli_run(&["shard", "clone", "moving/.snap/s", "cloned"]);
    sh(cluster.root(), "diff -r --no-dereference mnt/cloned moving-then");
    cluster.cli_run(&["shard", "rollback", "moving", "s", "--yes"]);
    sh(cluster.root(), "diff -r --no-dereference mnt/moving moving-then");
    // A rolled back shard and a clone move as others do.
    let primary = cluster.primary_of("moving");
    cluster.cli_run(&["dev", "kill", &primary]);
    sh(cluster.root(), "diff -r --no-dereference mnt/moving moving-then");
    sh(cluster.root(), "diff -r --no-dereference mnt/cloned moving-then");
    sh(cluster.root(), "diff -r --no-dereference mnt/moving/.snap/s moving-then");
    cluster.cli_run(&["dev", "start", &primary]);
    for shard in ["moving", "cloned", "moving/.snap/s"] {
        cluster.assert_clean(shard);
    }
}

#[test]
fn a_rollback_takes_views_from_their_readers_first() {
    let cluster = Cluster::start(&Options::default());
    cluster.shard("viewed");
    block_on(async {
        let client = cluster.client();
        let shard = client.shard_by_name(&ShardName::new("viewed").unwrap()).await.unwrap().id;
        let key = Key::new("k").unwrap();
        let put = async |value: &'static str| put_synced(&client, shard, &key, value).await;
        put("then").await;
        client.snapshot_shard(shard, &ShardName::new("s").unwrap()).await.unwrap();
        put("now").await;
        // Readers of the shard on both backups, that do not stop.
        let stop = AtomicBool::new(false);
        let (of_views, seen_again) = (AtomicU64::new(0), AtomicBool::new(false));
        let rolled_back = AtomicBool::new(false);
        let staleness = Duration::from_secs(10);
        let read = async || {
            let reader = cluster.client().with_reads(ReadFrom::Backup { max_staleness: staleness });
            let (mut last, mut after) = (0, None);
            while !stop.load(Ordering::SeqCst) {
                let was_rolled_back = rolled_back.load(Ordering::SeqCst);
                let (meta, value, label) = reader.get_labelled(shard, &key).await.unwrap();
                assert!(value == "then" || value == "now" || value == "after", "{value:?}");
                if let Some(label) = label {
                    of_views.fetch_add(1, Ordering::SeqCst);
                    last = last.max(label.sequence);
                }
                if was_rolled_back && value == "after" {
                    after.get_or_insert(meta.attr.version);
                    seen_again.store(true, Ordering::SeqCst);
                }
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            assert!(last > 0);
        };
        let work = async {
            let deadline = Instant::now() + PATIENCE;
            while of_views.load(Ordering::SeqCst) < 20 {
                assert!(Instant::now() < deadline, "no reads from views");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            client.rollback_shard(shard, &ShardName::new("s").unwrap()).await.unwrap();
            assert_eq!(client.get(shard, &key).await.unwrap().1, "then");
            put("after").await;
            rolled_back.store(true, Ordering::SeqCst);
            let before = of_views.load(Ordering::SeqCst);
            let deadline = Instant::now() + PATIENCE;
            while of_views.load(Ordering::SeqCst) < before + 20 || !seen_again.load(Ordering::SeqCst) {
                assert!(Instant::now() < deadline, "no reads from views after the rollback");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
            stop.store(true, Ordering::SeqCst);
        };
        tokio::join!(work, read(), read());
    });
    cluster.assert_clean("viewed");
}
