//! The same content over gRPC and on the mount, and what gRPC promises beyond files.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use shardfs_proto::client::{Client, ListItem, ListOptions};
use shardfs_proto::types::cluster::NewShard;
use shardfs_proto::types::limits::{BATCH_BYTES_MAX, BATCH_ITEMS_MAX, VALUE_BYTES_MAX};
use shardfs_proto::types::op::{Durability, IndexValue, ObjectMeta, PutItem, PutOptions, ShardState};
use shardfs_proto::types::{Error, Key, Reason, ShardId, ShardName};
use shardfs_tests::process::mib;
use shardfs_tests::{Cluster, block_on, sh};

fn key(text: &str) -> Key {
    Key::new(text.to_owned()).unwrap()
}

fn new_shard(name: &str) -> NewShard {
    NewShard {
        name: ShardName::new(name).unwrap(),
        limit_bytes: None,
        mode: 0o755,
        uid: 0,
        gid: 0,
        request_id: String::new(),
    }
}

/// What `batch_get` yields.
type Answer = Result<(usize, Result<(ObjectMeta, Bytes), Error>), Error>;

async fn shard_id(client: &Client, name: &str) -> ShardId {
    client.shard_by_name(&ShardName::new(name).unwrap()).await.unwrap().id
}

async fn put(client: &Client, shard: ShardId, name: &str, value: impl Into<Bytes>) {
    client.put(shard, key(name), value.into(), PutOptions::default(), Durability::Sync).await.unwrap();
}

async fn listed(client: &Client, shard: ShardId, options: ListOptions) -> Vec<String> {
    client
        .list(shard, options)
        .map(|item| match item.unwrap() {
            ListItem::Key { key, .. } => String::from_utf8(key.to_vec()).unwrap(),
            ListItem::CommonPrefix(prefix) => format!("{}*", String::from_utf8(prefix.to_vec()).unwrap()),
        })
        .collect()
        .await
}

#[test]
fn a_file_is_a_key_and_a_key_is_a_file() {
    let cluster = Cluster::shared();
    let mount = cluster.shard("both");
    let local = cluster.scratch("local-both");
    sh(&local, "head -c 300000 /dev/urandom >big && printf small >small");
    sh(&local, &format!("mkdir -p {0}/a/b && cp big small {0}/a/b/", mount.display()));
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "both").await;
        let (meta, value) = client.get(shard, &key("a/b/big")).await.unwrap();
        assert_eq!((&value[..], meta.attr.size), (&fs::read(local.join("big")).unwrap()[..], 300_000));
        assert_eq!(client.get(shard, &key("a/b/small")).await.unwrap().1, "small");
        assert_eq!(listed(&client, shard, ListOptions::default()).await, ["a/b/big", "a/b/small"]);

        // A Put shows at once, over what the kernel knew as well.
        for round in 0..100 {
            let text = format!("round {round}");
            put(&client, shard, "a/b/small", text.clone()).await;
            assert_eq!(fs::read_to_string(mount.join("a/b/small")).unwrap(), text);
            let name = format!("new/{round}/key");
            assert!(!mount.join(&name).exists());
            put(&client, shard, &name, text.clone()).await;
            assert_eq!(fs::read_to_string(mount.join(&name)).unwrap(), text);
            assert_eq!(fs::metadata(mount.join(&name)).unwrap().len(), text.len() as u64);
        }
        // And a write of the mount is the value as soon as it is answered.
        for round in 0..100 {
            let text = format!("{round}");
            fs::write(mount.join("a/b/small"), &text).unwrap();
            assert_eq!(client.get(shard, &key("a/b/small")).await.unwrap().1, text);
        }

        // Delete takes the directories that Put made, and no others.
        let (_, pruned) = client.delete(shard, &key("new/0/key"), Durability::Sync).await.unwrap();
        assert_eq!(pruned, 1);
        assert!(!mount.join("new/0").exists() && mount.join("new").exists());
        for name in ["a/b/big", "a/b/small"] {
            assert_eq!(client.delete(shard, &key(name), Durability::Sync).await.unwrap().1, 0);
        }
        assert!(mount.join("a/b").exists());
        assert_eq!(client.get(shard, &key("a/b/big")).await.unwrap_err().reason(), Reason::NotFound);
    });
    cluster.assert_clean("both");
}

#[test]
fn an_open_file_keeps_its_content_when_put_replaces_it_whole() {
    let cluster = Cluster::shared();
    let mount = cluster.shard("atomic-put");
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "atomic-put").await;
        // Readers see one whole value or the other, never a mixture.
        let (a, b) = (vec![b'a'; 1 << 20], vec![b'b'; 700_000]);
        put(&client, shard, "k", a.clone()).await;
        let writer = tokio::spawn({
            let (client, a, b) = (client.clone(), a.clone(), b.clone());
            async move {
                for round in 0..30 {
                    put(&client, shard, "k", if round % 2 == 0 { b.clone() } else { a.clone() }).await;
                }
            }
        });
        while !writer.is_finished() {
            let value = client.get(shard, &key("k")).await.unwrap().1;
            assert!(value == a || value == b, "{} bytes, a mixture", value.len());
        }
        writer.await.unwrap();
        assert_eq!(fs::read(mount.join("k")).unwrap(), a);
    });
}

#[test]
fn metadata_comes_with_the_value() {
    let cluster = Cluster::shared();
    let mount = cluster.shard("metadata");
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "metadata").await;
        let mut options =
            PutOptions { mode: Some(0o600), uid: Some(7), gid: Some(8), ..PutOptions::default() };
        options.indexes.insert("colour".into(), IndexValue::Text("red".into()));
        options.indexes.insert("year".into(), IndexValue::Integer(-2026));
        let made = client.put(shard, key("k"), "v".into(), options.clone(), Durability::Sync).await.unwrap();
        assert_eq!(made.indexes, options.indexes);
        let on_mount = fs::metadata(mount.join("k")).unwrap();
        assert_eq!((on_mount.mode() & 0o7777, on_mount.uid(), on_mount.gid()), (0o600, 7, 8));
        let head = client.head(shard, &key("k")).await.unwrap();
        assert_eq!(head, made);
        // The mount's changes show in it.
        fs::set_permissions(mount.join("k"), fs::Permissions::from_mode(0o640)).unwrap();
        let after = client.head(shard, &key("k")).await.unwrap();
        assert_eq!(after.attr.mode, 0o640);
        assert!(after.attr.version > head.attr.version);
        // Conditions.
        let stale = PutOptions { if_version: Some(head.attr.version), ..PutOptions::default() };
        let error = client.put(shard, key("k"), "w".into(), stale, Durability::Sync).await.unwrap_err();
        assert_eq!(error.reason(), Reason::VersionMismatch);
        let absent = PutOptions { if_absent: true, ..PutOptions::default() };
        let error = client.put(shard, key("k"), "w".into(), absent, Durability::Sync).await.unwrap_err();
        assert_eq!(error.reason(), Reason::AlreadyExists);
        let fresh = PutOptions { if_version: Some(after.attr.version), ..PutOptions::default() };
        client.put(shard, key("k"), "w".into(), fresh, Durability::Sync).await.unwrap();
        assert_eq!(fs::read(mount.join("k")).unwrap(), b"w");
    });
}

#[test]
fn listings_are_in_byte_order_with_prefix_delimiter_and_limit() {
    let cluster = Cluster::shared();
    cluster.shard("listing");
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "listing").await;
        let keys = ["a", "a-b", "a.c/x", "b/1", "b/2/3", "b/2/4", "b0", "c/\u{e4}/\u{1f600}"];
        for name in ["b/2/4", "a-b", "c/\u{e4}/\u{1f600}", "b0", "a", "b/1", "a.c/x", "b/2/3"] {
            put(&client, shard, name, "v").await;
        }
        let list = |options: ListOptions| listed(&client, shard, options);
        let all = ListOptions::default();
        assert_eq!(list(all.clone()).await, keys);
        assert_eq!(list(ListOptions { keys_only: true, ..all.clone() }).await, keys);
        assert_eq!(
            list(ListOptions { prefix: "b".into(), ..all.clone() }).await,
            ["b/1", "b/2/3", "b/2/4", "b0"]
        );
        assert_eq!(list(ListOptions { prefix: "b/2".into(), ..all.clone() }).await, ["b/2/3", "b/2/4"]);
        assert_eq!(
            list(ListOptions { delimiter: "/".into(), ..all.clone() }).await,
            ["a", "a-b", "a.c/*", "b/*", "b0", "c/*"]
        );
        let deeper = ListOptions { prefix: "b/".into(), delimiter: "/".into(), ..all.clone() };
        assert_eq!(list(deeper).await, ["b/1", "b/2/*"]);
        assert_eq!(
            list(ListOptions { start_after: "b/1".into(), limit: 2, ..all.clone() }).await,
            ["b/2/3", "b/2/4"]
        );
        // Page by page gives the whole.
        let mut pages: Vec<String> = Vec::new();
        loop {
            let after: Bytes = pages.last().cloned().unwrap_or_default().into();
            let page = list(ListOptions { start_after: after, limit: 3, ..all.clone() }).await;
            if page.is_empty() {
                break;
            }
            pages.extend(page);
        }
        assert_eq!(pages, keys);
        let with = list(ListOptions { prefix: "b".into(), include_directories: true, ..all }).await;
        assert_eq!(with, ["b/", "b/1", "b/2/", "b/2/3", "b/2/4", "b0"]);
    });
}

#[test]
fn batches() {
    let cluster = Cluster::shared();
    cluster.shard("batches");
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "batches").await;
        let item = |name: &str, value: &str| PutItem {
            key: key(name),
            value: Bytes::from(value.to_owned()),
            options: PutOptions::default(),
        };
        let many: Vec<PutItem> =
            (0..5_000).map(|i| item(&format!("dir-{}/key-{i}", i % 7), &format!("value {i}"))).collect();
        let results = client.batch_put(shard, many, false, Durability::Sync).await.unwrap();
        assert!(results.len() == 5_000 && results.iter().all(Result::is_ok));

        let keys: Vec<Key> = (0..5_010).rev().map(|i| key(&format!("dir-{}/key-{i}", i % 7))).collect();
        let answers: Vec<Answer> = client.batch_get(shard, keys).collect().await;
        assert_eq!(answers.len(), 5_010);
        for (at, answer) in answers.into_iter().enumerate() {
            let (index, outcome) = answer.unwrap();
            let number = 5_009 - at;
            assert_eq!(index, at);
            match outcome {
                Ok((_, value)) => assert_eq!(value, format!("value {number}")),
                Err(error) => {
                    assert!(number >= 5_000 && error.reason() == Reason::NotFound, "{number}: {error}")
                }
            }
        }

        // Not atomic: each item for itself. Atomic: all or none.
        let mixed = || vec![item("fresh", "1"), item("dir-0", "is a directory"), item("fresh-2", "2")];
        let error = client.batch_put(shard, mixed(), true, Durability::Sync).await.unwrap_err();
        assert_eq!(error.reason(), Reason::IsDirectory);
        assert_eq!(client.head(shard, &key("fresh")).await.unwrap_err().reason(), Reason::NotFound);
        let results = client.batch_put(shard, mixed(), false, Durability::Sync).await.unwrap();
        let reasons: Vec<_> = results.iter().map(|r| r.as_ref().err().map(|e| e.reason())).collect();
        assert_eq!(reasons, [None, Some(Reason::IsDirectory), None]);
        client.head(shard, &key("fresh-2")).await.unwrap();

        let too_many: Vec<PutItem> = (0..=BATCH_ITEMS_MAX).map(|i| item(&format!("t/{i}"), "")).collect();
        let error = client.batch_put(shard, too_many, false, Durability::Sync).await.unwrap_err();
        assert_eq!(error.reason(), Reason::TooLarge);
    });
    cluster.assert_clean("batches");
}

#[test]
fn large_messages_are_refused_and_the_connection_lives() {
    let cluster = Cluster::shared();
    cluster.shard("messages");
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "messages").await;
        let largest = Bytes::from(vec![1u8; VALUE_BYTES_MAX]);
        put(&client, shard, "largest", largest.clone()).await;
        assert_eq!(client.get(shard, &key("largest")).await.unwrap().1, largest);
        let over = Bytes::from(vec![1u8; VALUE_BYTES_MAX + 1]);
        let error =
            client.put(shard, key("over"), over, PutOptions::default(), Durability::Sync).await.unwrap_err();
        assert_eq!(error.reason(), Reason::TooLarge);
        let full: Vec<PutItem> = (0..BATCH_BYTES_MAX / VALUE_BYTES_MAX + 2)
            .map(|i| PutItem {
                key: key(&format!("b/{i}")),
                value: largest.clone(),
                options: PutOptions::default(),
            })
            .collect();
        assert!(client.batch_put(shard, full, false, Durability::Sync).await.is_err());
        put(&client, shard, "after", "v").await;
    });
}

#[test]
fn shards_over_grpc() {
    let cluster = Cluster::shared();
    block_on(async {
        let client = cluster.client();
        let made = client
            .new_shard(&NewShard { mode: 0o750, uid: 5, gid: 6, ..new_shard("by-grpc") })
            .await
            .unwrap();
        let on_mount = fs::metadata(cluster.mount().join("by-grpc")).unwrap();
        assert_eq!((on_mount.mode() & 0o7777, on_mount.uid(), on_mount.gid()), (0o750, 5, 6));
        let error = client.new_shard(&new_shard("by-grpc")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::ShardExists);
        // The same request again is answered with the same shard.
        let request = NewShard { request_id: "once".into(), ..new_shard("by-request") };
        let (one, two) =
            (client.new_shard(&request).await.unwrap(), client.new_shard(&request).await.unwrap());
        assert_eq!(one.id, two.id);
        assert!(one.id > made.id, "ids grow");

        put(&client, made.id, "k", "v").await;
        let error = client.delete_shard(made.id, true).await.unwrap_err();
        assert_eq!(error.reason(), Reason::ShardNotEmpty);
        let usage = client.shard(made.id).await.unwrap();
        assert!(usage.used_bytes.unwrap() > 0 && usage.inodes.unwrap() >= 2);

        let closed = client.close_shard(made.id).await.unwrap();
        assert_eq!(closed.state, ShardState::ReadOnly);
        client.close_shard(made.id).await.unwrap();
        let error = client
            .put(made.id, key("k"), "w".into(), PutOptions::default(), Durability::Sync)
            .await
            .unwrap_err();
        assert_eq!((error.reason(), error.shard()), (Reason::ShardReadOnly, Some(made.id)));
        assert_eq!(client.get(made.id, &key("k")).await.unwrap().1, "v");

        client.delete_shard(made.id, false).await.unwrap();
        let error = client.delete_shard(made.id, false).await.unwrap_err();
        assert_eq!(error.reason(), Reason::ShardDeleted);
        let error = client.get(made.id, &key("k")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::ShardDeleted);
        assert!(!cluster.mount().join("by-grpc").exists());
        let error = client.get(ShardId::new(4_000_000).unwrap(), &key("k")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::ShardNotFound);

        // Another tenant neither sees nor touches it, and has names of its own.
        let other = cluster.client_as("other");
        let error = other.get(one.id, &key("k")).await.unwrap_err();
        assert!([Reason::WrongOwner, Reason::ShardNotFound].contains(&error.reason()), "{error}");
        let error = other.delete_shard(one.id, false).await.unwrap_err();
        assert!([Reason::WrongOwner, Reason::ShardNotFound].contains(&error.reason()), "{error}");
        let theirs = other.new_shard(&new_shard("by-request")).await.unwrap();
        assert_ne!(theirs.id, one.id);
        let names = |shards: Vec<shardfs_proto::types::cluster::ShardInfo>| -> Vec<String> {
            shards.into_iter().map(|s| s.name.as_str().to_owned()).collect()
        };
        assert_eq!(names(other.list_shards().await.unwrap()), ["by-request"]);
        assert!(names(client.list_shards().await.unwrap()).contains(&"by-request".to_owned()));
    });
}

/// Pieces of a value that can be checked at any offset without keeping it.
fn piece(number: u64) -> Bytes {
    const PIECE: usize = 1 << 20;
    let mut random = fastrand::Rng::with_seed(number);
    let block: Vec<u8> = (0..4096).map(|_| random.u8(..)).collect();
    Bytes::from(block.repeat(PIECE / 4096))
}

#[test]
fn a_gibibyte_streams_through_in_bounded_memory() {
    const PIECES: u64 = 1024;
    /// Above what the node had before: its write buffers, block cache and what is in flight.
    const NODE_GROWTH_MAX: u64 = 700 << 20;
    let cluster = Cluster::shared();
    let mount = cluster.shard("gibibyte");
    let node = cluster.node(&cluster.primary_of("gibibyte"));
    let before = node.resident_bytes();
    node.reset_peak();
    block_on(async {
        let client = cluster.client();
        let shard = shard_id(&client, "gibibyte").await;
        let data = futures::stream::iter((0..PIECES).map(|n| Ok(piece(n))));
        let meta = client
            .put_stream(shard, key("big"), PutOptions::default(), Durability::Sync, Some(PIECES << 20), data)
            .await
            .unwrap();
        assert_eq!(meta.attr.size, PIECES << 20);
        for number in 0..PIECES {
            let (_, value) = client
                .get_range(shard, &key("big"), number << 20, 1 << 20, Some(meta.attr.version))
                .await
                .unwrap();
            assert!(value == piece(number), "piece {number}");
        }
        let error = client.get(shard, &key("big")).await.unwrap_err();
        assert_eq!(error.reason(), Reason::TooLarge);

        // A stream that breaks off, or has another length than promised, leaves nothing.
        let broken =
            futures::stream::iter((0..20).map(|n| {
                if n < 19 { Ok(piece(n)) } else { Err(std::io::Error::other("the source failed")) }
            }));
        client
            .put_stream(shard, key("broken"), PutOptions::default(), Durability::Sync, None, broken)
            .await
            .unwrap_err();
        let short = futures::stream::iter((0..2).map(|n| Ok(piece(n))));
        client
            .put_stream(shard, key("short"), PutOptions::default(), Durability::Sync, Some(5), short)
            .await
            .unwrap_err();
        for name in ["broken", "short"] {
            assert_eq!(client.head(shard, &key(name)).await.unwrap_err().reason(), Reason::NotFound);
        }
    });
    assert_eq!(fs::metadata(mount.join("big")).unwrap().len(), PIECES << 20);
    sh(&mount, "cmp <(head -c 10485760 big) <(dd if=big bs=1M count=10 status=none)");
    let peak = node.peak_resident_bytes();
    println!("1 GiB put and got: node resident before {}, at most {}", mib(before), mib(peak));
    assert!(peak < before + NODE_GROWTH_MAX, "the node held {} more", mib(peak - before));

    // Its space comes back.
    fs::remove_file(mount.join("big")).unwrap();
    shardfs_tests::cluster::eventually(Duration::from_secs(120), || {
        let used = block_on(async {
            let client = cluster.client();
            client.shard(shard_id(&client, "gibibyte").await).await.unwrap().used_bytes.unwrap()
        });
        if used < 1 << 20 { Ok(()) } else { Err(format!("{} in use after the delete", mib(used))) }
    });
    cluster.assert_clean("gibibyte");
}

#[test]
fn metrics_and_health_over_http() {
    let cluster = Cluster::shared();
    cluster.shard("metrics");
    for process in ["node-1", "node-2", "node-3", "mount"] {
        let address = cluster.http_address(process);
        let get = |path: &str| {
            use std::io::{Read, Write};
            let mut stream = std::net::TcpStream::connect(&address).unwrap();
            write!(stream, "GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).unwrap();
            text
        };
        assert!(get("/healthz").starts_with("HTTP/1.1 200"), "{process}");
        let metrics = get("/metrics");
        assert!(metrics.contains("\nshardfs") && metrics.contains("# TYPE"), "{process}: {metrics}");
        assert!(get("/nothing").starts_with("HTTP/1.1 404"));
    }
}
