//! Full shards and full volumes: refused cleanly, read on, usable again after deletes.

#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::types::op::{Durability, PutOptions};
use shardfs_proto::types::{Key, Reason, ShardName};
use shardfs_tests::cluster::eventually;
use shardfs_tests::volumes::{find, is_served};
use shardfs_tests::{Cluster, Options, block_on};

const LIMIT: u64 = 4 << 20;

/// Writes and syncs, so that nothing is still on its way when it returns.
fn write_synced(path: &Path, content: &[u8]) -> std::io::Result<()> {
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).open(path)?;
    file.write_all(content)?;
    file.sync_all()
}

#[test]
fn a_shards_limit_is_enforced_and_deletes_free_space() {
    let cluster = Cluster::shared();
    cluster.cli_run(&["shard", "create", "limited", "--limit", &LIMIT.to_string()]);
    let mount = cluster.mount().join("limited");
    let piece = vec![3u8; 1 << 20];
    let mut written = 0;
    let error = loop {
        match write_synced(&mount.join(format!("f{written}")), &piece) {
            Ok(()) => written += 1,
            Err(error) => break error,
        }
        assert!(written < 10, "the limit is not enforced");
    };
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    assert!((2..=4).contains(&written), "{written} MiB fitted into 4");
    let space = rustix::fs::statvfs(&mount).unwrap();
    assert!(space.f_blocks * space.f_frsize <= LIMIT && space.f_bavail * space.f_frsize < 1 << 20);
    // What was acknowledged is whole.
    for number in 0..written {
        assert_eq!(fs::read(mount.join(format!("f{number}"))).unwrap(), piece);
    }
    let _ = fs::remove_file(mount.join(format!("f{written}")));
    block_on(async {
        let client = cluster.client();
        let shard = client.shard_by_name(&ShardName::new("limited").unwrap()).await.unwrap().id;
        let put = |name: &str, bytes: usize| {
            let (client, key) = (client.clone(), Key::new(name.to_owned()).unwrap());
            async move {
                client
                    .put(shard, key, Bytes::from(vec![5u8; bytes]), PutOptions::default(), Durability::Sync)
                    .await
            }
        };
        let error = put("big", 3 << 20).await.unwrap_err();
        assert_eq!(
            (error.reason(), error.shard(), error.is_retryable()),
            (Reason::ShardFull, Some(shard), false)
        );
        assert_eq!(
            client.head(shard, &Key::new("big").unwrap()).await.unwrap_err().reason(),
            Reason::NotFound
        );
        // Writing over what is there takes no room.
        for _ in 0..10 {
            put("f0", 1 << 20).await.unwrap();
        }
        for number in 0..written {
            client.delete(shard, &Key::new(format!("f{number}")).unwrap(), Durability::Sync).await.unwrap();
        }
        put("big", 3 << 20).await.unwrap();
        let usage = client.shard(shard).await.unwrap();
        assert_eq!(usage.limit_bytes, Some(LIMIT));
        assert!(usage.used_bytes.unwrap() >= 3 << 20 && usage.used_bytes.unwrap() <= LIMIT);
    });
    cluster.assert_clean("limited");
}

#[test]
fn a_full_volume_refuses_writes_reads_on_and_recovers() {
    let cluster = Cluster::start(&Options { nodes: 1, volume_bytes: Some(512 << 20), ..Options::default() });
    let mount = cluster.shard("filler");
    let keep = cluster.shard("bystander");
    fs::write(keep.join("k"), "v").unwrap();
    let piece: Vec<u8> = (0..4u32 << 20).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    let mut whole = 0;
    let error = loop {
        match write_synced(&mount.join(format!("f{whole}")), &piece) {
            Ok(()) => whole += 1,
            Err(error) => break error,
        }
        assert!(whole < 512 / 4, "more than the volume holds");
    };
    println!("{} MiB fitted into a volume of 512 MiB", whole * 4);
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
    assert!(whole > 20, "{whole}");

    // Still full for others, still readable for all.
    block_on(async {
        let client = cluster.client();
        let shard = client.shard_by_name(&ShardName::new("filler").unwrap()).await.unwrap().id;
        let value = Bytes::from(piece.clone());
        let error = client
            .put(shard, Key::new("more").unwrap(), value, PutOptions::default(), Durability::Sync)
            .await
            .unwrap_err();
        assert_eq!(error.reason(), Reason::VolumeFull, "{error}");
    });
    eventually(Duration::from_secs(60), || {
        let status = cluster.cli_json(&["status"]);
        let told = status["troubles"].to_string().contains("full: writes are refused");
        if told && status["healthy"] == false { Ok(()) } else { Err(status.to_string()) }
    });
    assert!(cluster.cli_run(&["volume", "list"]).contains(" full"));
    for number in 0..whole {
        assert!(fs::read(mount.join(format!("f{number}"))).unwrap() == piece, "f{number}");
    }
    assert_eq!(fs::read(keep.join("k")).unwrap(), b"v");

    // Deletes work on a full volume, and their room can be used again.
    let _ = fs::remove_file(mount.join(format!("f{whole}")));
    for number in 0..whole {
        fs::remove_file(mount.join(format!("f{number}"))).unwrap();
    }
    eventually(Duration::from_secs(120), || {
        write_synced(&mount.join("again"), &piece).map_err(|e| e.to_string())
    });
    for number in 0..10 {
        eventually(Duration::from_secs(60), || {
            write_synced(&mount.join(format!("g{number}")), &piece).map_err(|e| e.to_string())
        });
        assert!(fs::read(mount.join(format!("g{number}"))).unwrap() == piece);
    }
    write_synced(&keep.join("k2"), b"v2").unwrap();
    cluster.assert_clean("filler");
    cluster.assert_clean("bystander");
}

#[test]
fn new_shards_come_to_volumes_that_have_room() {
    let cluster = Cluster::start(&Options { nodes: 3, volume_bytes: Some(512 << 20), ..Options::default() });
    let volume_of =
        |shard: &str| cluster.cli_json(&["shard", "show", shard])["volume"].as_str().unwrap().to_owned();
    let free = |id: &str| find(&cluster, id).unwrap()["served"]["free_bytes"].as_u64().unwrap();
    // By something that is no shard, and so far that what shards give back makes no room.
    let fill = |id: &str| {
        let primary = find(&cluster, id).unwrap()["primary"].as_str().unwrap().to_owned();
        let path = cluster.dir().join("nodes").join(primary).join("volumes").join(id).join("filler");
        let file = fs::File::create(&path).unwrap();
        let bytes = free(id) + (32 << 20);
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, bytes).unwrap();
        file.sync_all().unwrap();
        eventually(Duration::from_secs(60), || match free(id) {
            0 => Ok(()),
            left => Err(format!("{left} bytes are free")),
        });
        path
    };
    for id in ["vol-1", "vol-2", "vol-3"] {
        is_served(&cluster, id);
    }
    cluster.shard("first");
    let full = volume_of("first");
    fill(&full);
    for number in 0..20 {
        let name = format!("next-{number}");
        fs::create_dir(cluster.mount().join(&name)).unwrap();
        assert_ne!(volume_of(&name), full, "{name}");
    }
    // No room anywhere.
    let others: Vec<String> = (1..=3).map(|n| format!("vol-{n}")).filter(|id| *id != full).collect();
    let fillers: Vec<_> = others.iter().map(|id| fill(id)).collect();
    let refused = fs::create_dir(cluster.mount().join("none")).unwrap_err();
    assert_eq!(refused.raw_os_error(), Some(libc::ENOSPC), "{refused}");
    let refused = cluster.cli_fails(&["shard", "create", "none"]);
    assert!(refused.contains("have no room"), "{refused}");
    fs::remove_file(&fillers[1]).unwrap();
    eventually(Duration::from_secs(60), || match free(&others[1]) {
        0 => Err("no room yet".to_owned()),
        _ => Ok(()),
    });
    cluster.cli_run(&["shard", "create", "last"]);
    assert_eq!(volume_of("last"), others[1]);
}

#[test]
fn several_busy_shards_fill_a_small_volume_and_nothing_breaks() {
    const WRITERS: usize = 6;
    let cluster = Cluster::start(&Options { nodes: 1, volume_bytes: Some(384 << 20), ..Options::default() });
    let shards: Vec<_> = (0..WRITERS).map(|n| cluster.shard(&format!("busy-{n}"))).collect();
    let piece = |shard: usize, number: usize| -> Vec<u8> {
        let seed = (shard * 1000 + number) as u32;
        (0..1u32 << 20).map(|i| ((i ^ seed).wrapping_mul(2_654_435_761) >> 11) as u8).collect()
    };
    // None of them syncs before it is full: as much as possible waits in memory.
    let whole: Vec<usize> = std::thread::scope(|scope| {
        let writers: Vec<_> = shards
            .iter()
            .enumerate()
            .map(|(shard, dir)| {
                scope.spawn(move || {
                    let mut number = 0;
                    let error = loop {
                        match fs::write(dir.join(format!("f{number}")), piece(shard, number)) {
                            Ok(()) => number += 1,
                            Err(error) => break error,
                        }
                        assert!(number < 384, "more than the volume holds");
                    };
                    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC), "{error}");
                    fs::File::open(dir).unwrap().sync_all().unwrap();
                    number
                })
            })
            .collect();
        writers.into_iter().map(|writer| writer.join().unwrap()).collect()
    });
    println!("{whole:?} MiB fitted into a volume of 384 MiB");
    assert!(whole.iter().sum::<usize>() > 100, "{whole:?}");
    let check = || {
        for (shard, dir) in shards.iter().enumerate() {
            for number in 0..whole[shard] {
                assert!(fs::read(dir.join(format!("f{number}"))).unwrap() == piece(shard, number));
            }
        }
    };
    check();
    // Full as it is, the volume can be opened again by a node that was killed.
    cluster.cli_run(&["dev", "kill", "node-1"]);
    cluster.cli_run(&["dev", "start", "node-1"]);
    check();
    for (shard, dir) in shards.iter().enumerate() {
        for number in 0..=whole[shard] {
            let _ = fs::remove_file(dir.join(format!("f{number}")));
        }
    }
    for (shard, dir) in shards.iter().enumerate() {
        eventually(Duration::from_secs(120), || {
            write_synced(&dir.join("again"), &piece(shard, 7)).map_err(|e| e.to_string())
        });
        assert!(fs::read(dir.join("again")).unwrap() == piece(shard, 7));
        cluster.assert_clean(&format!("busy-{shard}"));
    }
}
