//! Every service driven through the generated clients, against a whole node over a `dir` volume: real
//! sockets, a real metadata store, a real RocksDB.

// A failed unwrap is a failed test.
#![allow(clippy::unwrap_used)]

#[path = "rpc/locks.rs"]
mod locks;
#[path = "rpc/sessions.rs"]
mod sessions;
#[path = "rpc/skew.rs"]
mod skew;
#[path = "rpc/snapshots.rs"]
mod snapshots;
mod support;

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use shardfs_proto::types::Reason;
use shardfs_proto::wire::{
    self, batch_get_reply, check_reply, list_entry, operation, put_result, put_stream_request,
};
use tonic::Code;

use support::{Node, reason, selector};

const VALUE_BYTES_MAX: usize = 4 << 20;

fn put(shard: u64, key: &str, value: impl Into<Bytes>) -> wire::PutRequest {
    wire::PutRequest {
        shard: selector(shard),
        key: Bytes::copy_from_slice(key.as_bytes()),
        value: value.into(),
        ..Default::default()
    }
}

fn get(shard: u64, key: &str) -> wire::GetRequest {
    wire::GetRequest {
        shard: selector(shard),
        key: Bytes::copy_from_slice(key.as_bytes()),
        ..Default::default()
    }
}

fn delete(shard: u64, key: &str) -> wire::DeleteRequest {
    wire::DeleteRequest {
        shard: selector(shard),
        key: Bytes::copy_from_slice(key.as_bytes()),
        ..Default::default()
    }
}

fn attr(meta: &Option<wire::ObjectMeta>) -> wire::Attr {
    meta.clone().and_then(|meta| meta.attr).expect("an answer has attributes")
}

/// The lines of a listing: keys, and common prefixes with a `*`.
async fn list(node: &Node, request: wire::ListRequest) -> Vec<String> {
    let mut stream = node.storage().list(request).await.unwrap().into_inner();
    let mut lines = Vec::new();
    while let Some(reply) = stream.next().await {
        for entry in reply.unwrap().entries {
            lines.push(match entry.entry.unwrap() {
                list_entry::Entry::Key(key) => String::from_utf8_lossy(&key).into_owned(),
                list_entry::Entry::CommonPrefix(common) => format!("{}*", String::from_utf8_lossy(&common)),
            });
        }
    }
    lines
}

async fn check(node: &Node, shard: u64) -> wire::CheckSummary {
    let request = wire::CheckShardRequest { shard: selector(shard), read_data: true };
    let mut stream = node.admin().check_shard(request).await.unwrap().into_inner();
    let mut summary = None;
    while let Some(reply) = stream.next().await {
        match reply.unwrap().part.unwrap() {
            check_reply::Part::Finding(finding) => panic!("{}: {}", finding.kind, finding.detail),
            check_reply::Part::Summary(last) => summary = Some(last),
        }
    }
    summary.expect("a check ends with a summary")
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_must_say_who_they_are_and_own_what_they_use() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let missing = node.storage_as(None).get(get(shard, "k")).await.unwrap_err();
    assert_eq!((missing.code(), reason(&missing)), (Code::Unauthenticated, Reason::NoClientId));
    let bad = node.storage_as(Some("no spaces")).get(get(shard, "k")).await.unwrap_err();
    assert_eq!((bad.code(), reason(&bad)), (Code::InvalidArgument, Reason::InvalidArgument));
    let other = node.storage_as(Some("somebody-else")).get(get(shard, "k")).await.unwrap_err();
    assert_eq!((other.code(), reason(&other)), (Code::PermissionDenied, Reason::WrongOwner));
    let other = node.storage_as(Some("somebody-else")).put(put(shard, "k", "v")).await.unwrap_err();
    assert_eq!(reason(&other), Reason::WrongOwner);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn values_are_put_got_and_deleted() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut storage = node.storage();
    let made = storage.put(put(shard, "a/b/c", "hello")).await.unwrap().into_inner();
    let first = attr(&made.meta);
    assert_eq!((first.size, first.mode, first.nlink), (5, 0o644, 1));
    let got = storage.get(get(shard, "a/b/c")).await.unwrap().into_inner();
    assert_eq!((&got.value[..], attr(&got.meta)), (&b"hello"[..], first));
    let part = wire::GetRequest { offset: 1, length: Some(3), ..get(shard, "a/b/c") };
    assert_eq!(storage.get(part).await.unwrap().into_inner().value, "ell");
    let past = wire::GetRequest { offset: 5, ..get(shard, "a/b/c") };
    assert_eq!(storage.get(past).await.unwrap().into_inner().value, "");
    let head = wire::GetRequest { meta_only: true, ..get(shard, "a/b/c") };
    let head = storage.get(head).await.unwrap().into_inner();
    assert_eq!((&head.value[..], attr(&head.meta)), (&b""[..], first));

    // Over what is there, with options and conditions.
    let options = wire::PutOptions {
        mode: Some(0o600),
        uid: Some(7),
        indexes: vec![wire::Index {
            name: "colour".into(),
            value: Some(wire::IndexValue { value: Some(wire::index_value::Value::Text("red".into())) }),
        }],
        if_version: first.version,
        ..Default::default()
    };
    let again = wire::PutRequest { options: Some(options.clone()), ..put(shard, "a/b/c", "hello there") };
    let second = storage.put(again.clone()).await.unwrap().into_inner().meta;
    assert_eq!(second.as_ref().unwrap().indexes.len(), 1);
    let second = attr(&second);
    assert_eq!((second.mode, second.inode, second.size), (0o600, first.inode, 11));
    assert!(second.version > first.version);
    let stale = storage.put(again).await.unwrap_err();
    assert_eq!((stale.code(), reason(&stale)), (Code::Aborted, Reason::VersionMismatch));
    let pinned = wire::GetRequest { if_version: first.version, ..get(shard, "a/b/c") };
    assert_eq!(reason(&storage.get(pinned).await.unwrap_err()), Reason::VersionMismatch);
    let absent = wire::PutOptions { if_absent: true, ..Default::default() };
    let absent = wire::PutRequest { options: Some(absent), ..put(shard, "a/b/c", "x") };
    let there = storage.put(absent).await.unwrap_err();
    assert_eq!((there.code(), reason(&there)), (Code::AlreadyExists, Reason::AlreadyExists));

    // What is in the way.
    assert_eq!(reason(&storage.put(put(shard, "a/b", "x")).await.unwrap_err()), Reason::IsDirectory);
    assert_eq!(reason(&storage.put(put(shard, "a/b/c/d", "x")).await.unwrap_err()), Reason::NotDirectory);
    assert_eq!(reason(&storage.get(get(shard, "a/b")).await.unwrap_err()), Reason::IsDirectory);
    assert_eq!(reason(&storage.delete(delete(shard, "a")).await.unwrap_err()), Reason::IsDirectory);
    for bad in ["", "/a", "a/", "a//b", "../a", "a\0"] {
        assert_eq!(
            reason(&storage.get(get(shard, bad)).await.unwrap_err()),
            Reason::InvalidArgument,
            "{bad:?}"
        );
        assert_eq!(reason(&storage.put(put(shard, bad, "x")).await.unwrap_err()), Reason::InvalidArgument);
    }

    let gone = storage.delete(delete(shard, "a/b/c")).await.unwrap().into_inner();
    assert_eq!((attr(&gone.meta).version, gone.pruned_directories), (second.version, 2));
    let missing = storage.get(get(shard, "a/b/c")).await.unwrap_err();
    assert_eq!((missing.code(), reason(&missing)), (Code::NotFound, Reason::NotFound));
    assert_eq!(reason(&storage.delete(delete(shard, "a/b/c")).await.unwrap_err()), Reason::NotFound);
    assert_eq!(check(&node, shard).await.inodes, 1);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn batches_answer_each_item_in_order() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut storage = node.storage();
    let item =
        |key: String, value: String| wire::PutItem { key: key.into(), value: value.into(), options: None };
    let mut items: Vec<_> =
        (0..1000).map(|i| item(format!("d{}/k{i:04}", i % 7), format!("value {i}"))).collect();
    items.push(item("d0".into(), "in the way of a directory".into()));
    let batch =
        |items, atomic| wire::BatchPutRequest { shard: selector(shard), items, atomic, ..Default::default() };
    let failed = storage.batch_put(batch(items.clone(), true)).await.unwrap_err();
    assert_eq!(reason(&failed), Reason::IsDirectory);
    assert_eq!(
        list(&node, wire::ListRequest { shard: selector(shard), ..Default::default() }).await.len(),
        0
    );
    let malformed = [0, 1, 500, 1004];
    for at in malformed {
        items.insert(at, item("/bad".into(), String::new()));
    }
    let failed = storage.batch_put(batch(items.clone(), true)).await.unwrap_err();
    assert_eq!(reason(&failed), Reason::InvalidArgument);
    let results = storage.batch_put(batch(items.clone(), false)).await.unwrap().into_inner().results;
    assert_eq!(results.len(), 1005);
    for (i, result) in results.into_iter().enumerate() {
        match result.outcome.unwrap() {
            put_result::Outcome::Meta(meta) => {
                assert_eq!(attr(&Some(meta)).size as usize, items[i].value.len())
            }
            put_result::Outcome::Error(detail) if malformed.contains(&i) => {
                assert_eq!(detail.reason(), wire::ErrorReason::InvalidArgument);
            }
            put_result::Outcome::Error(detail) => {
                assert_eq!(i, 1003);
                assert_eq!(detail.reason(), wire::ErrorReason::IsDirectory);
            }
        }
    }

    let mut keys: Vec<Bytes> = (0..1000).rev().map(|i| format!("d{}/k{i:04}", i % 7).into()).collect();
    keys.insert(500, Bytes::from_static(b"not/there"));
    keys.insert(700, Bytes::from_static(b"/bad"));
    keys.insert(900, Bytes::from_static(b"d0"));
    let request = wire::BatchGetRequest { shard: selector(shard), keys: keys.clone(), ..Default::default() };
    let mut stream = storage.batch_get(request).await.unwrap().into_inner();
    let mut next = 0;
    while let Some(reply) = stream.next().await {
        let reply = reply.unwrap();
        assert_eq!(reply.index, next);
        match (next, reply.outcome.unwrap()) {
            (500, batch_get_reply::Outcome::Error(e)) => assert_eq!(e.reason(), wire::ErrorReason::NotFound),
            (700, batch_get_reply::Outcome::Error(e)) => {
                assert_eq!(e.reason(), wire::ErrorReason::InvalidArgument)
            }
            (900, batch_get_reply::Outcome::Error(e)) => {
                assert_eq!(e.reason(), wire::ErrorReason::IsDirectory)
            }
            (at, batch_get_reply::Outcome::Found(found)) => {
                let number: u32 = String::from_utf8_lossy(&keys[at as usize][4..]).parse().unwrap();
                assert_eq!(found.value, format!("value {number}"));
            }
            (at, batch_get_reply::Outcome::Error(e)) => panic!("key {at}: {e:?}"),
        }
        next += 1;
    }
    assert_eq!(next as usize, keys.len());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_too_large_is_refused_with_advice() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut storage = node.storage();
    let too_large = |status: tonic::Status| {
        assert_eq!((status.code(), reason(&status)), (Code::InvalidArgument, Reason::TooLarge), "{status}");
    };
    too_large(storage.put(put(shard, "k", vec![0; VALUE_BYTES_MAX + 1])).await.unwrap_err());
    storage.put(put(shard, "k", vec![7; VALUE_BYTES_MAX])).await.unwrap();
    assert_eq!(storage.get(get(shard, "k")).await.unwrap().into_inner().value.len(), VALUE_BYTES_MAX);
    let long = wire::GetRequest { length: Some(VALUE_BYTES_MAX as u64 + 1), ..get(shard, "k") };
    too_large(storage.get(long).await.unwrap_err());
    let keys = vec![Bytes::from_static(b"k"); 16_385];
    let request = wire::BatchGetRequest { shard: selector(shard), keys, ..Default::default() };
    too_large(storage.batch_get(request).await.unwrap_err());
    let item = wire::PutItem { key: Bytes::from_static(b"k"), ..Default::default() };
    let request =
        wire::BatchPutRequest { shard: selector(shard), items: vec![item; 16_385], ..Default::default() };
    too_large(storage.batch_put(request).await.unwrap_err());
    let item = wire::PutItem {
        key: Bytes::from_static(b"k"),
        value: vec![0; VALUE_BYTES_MAX].into(),
        ..Default::default()
    };
    let request =
        wire::BatchPutRequest { shard: selector(shard), items: vec![item; 5], ..Default::default() };
    too_large(storage.batch_put(request).await.unwrap_err());
    // Refused by the transport, before a handler sees it.
    too_large(storage.put(put(shard, "k", vec![0; 32 << 20])).await.unwrap_err());
    // The connection and the shard are as good as before.
    assert_eq!(storage.get(get(shard, "k")).await.unwrap().into_inner().value.len(), VALUE_BYTES_MAX);
    node.stop().await;
}

fn stream_of(
    header: wire::PutStreamHeader,
    pieces: Vec<Bytes>,
) -> impl futures::Stream<Item = wire::PutStreamRequest> {
    let header = put_stream_request::Part::Header(header);
    let parts = std::iter::once(header).chain(pieces.into_iter().map(put_stream_request::Part::Data));
    futures::stream::iter(parts.map(|part| wire::PutStreamRequest { part: Some(part) }))
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_are_streamed_in_and_read_by_ranges() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut storage = node.storage();
    const SIZE: usize = 64 << 20;
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut bytes = vec![0u8; SIZE];
    rng.fill(&mut bytes);
    let bytes = Bytes::from(bytes);
    let mut pieces = Vec::new();
    let mut at = 0;
    while at < SIZE {
        let end = (at + rng.usize(1..=VALUE_BYTES_MAX)).min(SIZE);
        pieces.push(bytes.slice(at..end));
        at = end;
    }
    let header = wire::PutStreamHeader {
        shard: selector(shard),
        key: Bytes::from_static(b"big/value"),
        size: Some(SIZE as u64),
        ..Default::default()
    };
    let meta = storage.put_stream(stream_of(header.clone(), pieces)).await.unwrap().into_inner().meta;
    let made = attr(&meta);
    assert_eq!(made.size as usize, SIZE);
    let whole = storage.get(get(shard, "big/value")).await.unwrap_err();
    assert_eq!(reason(&whole), Reason::TooLarge);
    assert!(whole.message().contains("ranges"), "{whole}");
    let mut read = 0;
    while read < SIZE {
        let part = wire::GetRequest {
            offset: read as u64,
            length: Some(VALUE_BYTES_MAX as u64),
            if_version: made.version,
            ..get(shard, "big/value")
        };
        let value = storage.get(part).await.unwrap().into_inner().value;
        assert!(value == bytes[read..read + value.len()], "bytes at {read} differ (seed {seed})");
        assert!(!value.is_empty());
        read += value.len();
    }

    // Streams that break off or lie about their size leave the old value and nothing else.
    let piece = Bytes::from(vec![1; 1 << 20]);
    for size in [1, (3 << 20) + 1] {
        let header = wire::PutStreamHeader { size: Some(size), ..header.clone() };
        let wrong = storage.put_stream(stream_of(header, vec![piece.clone(); 3])).await.unwrap_err();
        assert_eq!(reason(&wrong), Reason::InvalidArgument, "{wrong}");
    }
    // A client that goes away races with what it sent before.
    for _ in 0..40 {
        let endless = stream_of(header.clone(), vec![piece.clone(); 3]).chain(futures::stream::pending());
        let patience = Duration::from_millis(rng.u64(1..30));
        let cut = tokio::time::timeout(patience, storage.put_stream(endless)).await;
        assert!(cut.is_err(), "a stream that has not ended was answered");
    }
    let no_header = futures::stream::iter([wire::PutStreamRequest {
        part: Some(put_stream_request::Part::Data(piece.clone())),
    }]);
    assert_eq!(reason(&storage.put_stream(no_header).await.unwrap_err()), Reason::InvalidArgument);
    let empty = stream_of(header.clone(), vec![Bytes::new()]);
    assert_eq!(reason(&storage.put_stream(empty).await.unwrap_err()), Reason::InvalidArgument);
    let head = wire::GetRequest { meta_only: true, ..get(shard, "big/value") };
    assert_eq!(attr(&storage.get(head).await.unwrap().into_inner().meta).version, made.version);
    // What the broken streams had staged is reclaimed soon.
    let mut chunks = 0;
    for _ in 0..1200 {
        chunks = check(&node, shard).await.chunks;
        if chunks == (SIZE as u64).div_ceil(64 << 10) {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(chunks, (SIZE as u64).div_ceil(64 << 10), "staged chunks were not reclaimed");
    let nothing = wire::PutStreamHeader { key: Bytes::from_static(b"nothing"), size: Some(0), ..header };
    let made = storage.put_stream(stream_of(nothing, vec![])).await.unwrap().into_inner();
    assert_eq!(attr(&made.meta).size, 0);
    node.stop().await;
}

/// Has a shard that is not empty closed and opened anew; how long that took.
async fn close_and_open(node: &Node, shard: u64) -> Duration {
    let begun = std::time::Instant::now();
    let request = wire::DeleteShardRequest { shard: selector(shard), only_if_empty: true };
    let kept = node.storage().delete_shard(request).await.unwrap_err();
    assert_eq!(reason(&kept), Reason::ShardNotEmpty, "{kept}");
    begun.elapsed()
}

/// Those who hold a shard that is to be closed are waited for longer than that.
const CLOSE_MAX: Duration = Duration::from_secs(8);

#[tokio::test(flavor = "multi_thread")]
async fn a_streamed_put_that_waits_for_its_client_lets_its_shard_go() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut storage = node.storage();
    storage.put(put(shard, "there", "value")).await.unwrap();
    let header = wire::PutStreamHeader {
        shard: selector(shard),
        key: Bytes::from_static(b"slow"),
        ..Default::default()
    };
    let pieces = vec![Bytes::from(vec![1; 1 << 20]); 3];
    let slow = stream_of(header.clone(), pieces.clone()).chain(futures::stream::pending());
    let mut slow_client = node.storage();
    let streamed = tokio::spawn(async move { slow_client.put_stream(slow).await });
    // Some of it is staged before the shard is wanted back.
    while check(&node, shard).await.chunks == 0 {
        assert!(!streamed.is_finished(), "a stream that has not ended was answered");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let took = close_and_open(&node, shard).await;
    assert!(took < CLOSE_MAX, "closing took {took:?}");
    let cut = streamed.await.unwrap().unwrap_err();
    assert_eq!((cut.code(), reason(&cut)), (Code::Unavailable, Reason::Unavailable), "{cut}");
    assert!(shardfs_proto::status::from_status(&cut).is_retryable());
    assert_eq!(reason(&storage.get(get(shard, "slow")).await.unwrap_err()), Reason::NotFound);
    let left = check(&node, shard).await;
    assert_eq!((left.inodes, left.chunks), (2, 0), "it left something behind");
    // Sent anew it is stored.
    let meta = storage.put_stream(stream_of(header, pieces)).await.unwrap().into_inner().meta;
    assert_eq!(attr(&meta).size, 3 << 20);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_check_lets_its_shard_go() {
    const KEYS: usize = 60_000;
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut storage = node.storage();
    for from in (0..KEYS).step_by(10_000) {
        let item = |i: usize| wire::PutItem { key: format!("d/{i:05}").into(), ..Default::default() };
        let batch = wire::BatchPutRequest {
            shard: selector(shard),
            items: (from..from + 10_000).map(item).collect(),
            atomic: true,
            durability: wire::Durability::Buffered.into(),
            ..Default::default()
        };
        storage.batch_put(batch).await.unwrap();
    }
    let request = wire::CheckShardRequest { shard: selector(shard), read_data: true };
    let mut unread = node.admin().check_shard(request).await.unwrap().into_inner();
    let took = close_and_open(&node, shard).await;
    assert!(took < CLOSE_MAX, "closing took {took:?}");
    let cut = unread.next().await.unwrap().unwrap_err();
    assert_eq!((cut.code(), reason(&cut)), (Code::Unavailable, Reason::Unavailable), "{cut}");
    assert!(cut.message().contains("again"), "{cut}");
    assert!(unread.next().await.is_none());
    assert_eq!(check(&node, shard).await.inodes as usize, KEYS + 2);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_follow_their_options() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut storage = node.storage();
    let keys = ["a/x", "a/y/z", "a-b", "a0", "b"];
    for key in keys {
        storage.put(put(shard, key, key)).await.unwrap();
    }
    let base = wire::ListRequest { shard: selector(shard), ..Default::default() };
    assert_eq!(list(&node, base.clone()).await, ["a-b", "a/x", "a/y/z", "a0", "b"]);
    let directories = wire::ListRequest { include_directories: true, ..base.clone() };
    assert_eq!(list(&node, directories).await, ["a-b", "a/", "a/x", "a/y/", "a/y/z", "a0", "b"]);
    let slash = wire::ListRequest { delimiter: Bytes::from_static(b"/"), ..base.clone() };
    assert_eq!(list(&node, slash.clone()).await, ["a-b", "a/*", "a0", "b"]);
    let below = wire::ListRequest { prefix: Bytes::from_static(b"a/"), ..slash.clone() };
    assert_eq!(list(&node, below).await, ["a/x", "a/y/*"]);
    let after = wire::ListRequest { start_after: Bytes::from_static(b"a/"), ..slash };
    assert_eq!(list(&node, after).await, ["a0", "b"]);
    let some = wire::ListRequest { start_after: Bytes::from_static(b"a-b"), limit: 2, ..base.clone() };
    assert_eq!(list(&node, some).await, ["a/x", "a/y/z"]);

    // Metadata comes with keys unless it is not wanted.
    for keys_only in [false, true] {
        let request = wire::ListRequest { keys_only, ..base.clone() };
        let mut stream = storage.list(request).await.unwrap().into_inner();
        while let Some(reply) = stream.next().await {
            for entry in reply.unwrap().entries {
                assert_eq!(entry.kind(), wire::FileKind::Regular);
                assert_eq!(entry.meta.is_none(), keys_only);
                if let (Some(meta), Some(list_entry::Entry::Key(key))) = (entry.meta, entry.entry) {
                    assert_eq!(attr(&Some(meta)).size as usize, key.len());
                }
            }
        }
    }

    // More than one message, and a stream that its client leaves.
    let item = |i: usize| wire::PutItem { key: format!("many/{i:05}").into(), ..Default::default() };
    let items = (0..5000).map(item).collect();
    let batch = wire::BatchPutRequest { shard: selector(shard), items, ..Default::default() };
    storage.batch_put(batch).await.unwrap();
    let many = wire::ListRequest { prefix: Bytes::from_static(b"many/"), ..base };
    let expected: Vec<_> = (0..5000).map(|i| format!("many/{i:05}")).collect();
    assert_eq!(list(&node, many.clone()).await, expected);
    let mut left = storage.list(many).await.unwrap().into_inner();
    left.next().await.unwrap().unwrap();
    drop(left);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn retries_get_the_first_answer() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut storage = node.storage();
    let session = node.open_session(shard).await;
    let write_id = |sequence| Some(wire::WriteId { session_id: session, sequence });
    let options = Some(wire::PutOptions { if_absent: true, ..Default::default() });
    let request = wire::PutRequest { options, write_id: write_id(1), ..put(shard, "k", "v") };
    let first = storage.put(request.clone()).await.unwrap().into_inner();
    assert_eq!(storage.put(request.clone()).await.unwrap().into_inner(), first);
    let other = wire::PutRequest { write_id: write_id(2), ..request.clone() };
    assert_eq!(reason(&storage.put(other).await.unwrap_err()), Reason::AlreadyExists);
    let gone = wire::DeleteRequest { write_id: write_id(3), ..delete(shard, "k") };
    let answer = storage.delete(gone.clone()).await.unwrap().into_inner();
    assert_eq!(storage.delete(gone).await.unwrap().into_inner(), answer);
    // The put's retry is still the first answer, although the key is gone.
    assert_eq!(storage.put(request.clone()).await.unwrap().into_inner(), first);
    assert_eq!(reason(&storage.get(get(shard, "k")).await.unwrap_err()), Reason::NotFound);

    let item = wire::PutItem { key: Bytes::from_static(b"b"), ..Default::default() };
    let batch = wire::BatchPutRequest {
        shard: selector(shard),
        items: vec![item],
        write_id: write_id(4),
        ..Default::default()
    };
    let answer = storage.batch_put(batch.clone()).await.unwrap().into_inner();
    assert_eq!(storage.batch_put(batch).await.unwrap().into_inner(), answer);

    let header = wire::PutStreamHeader {
        shard: selector(shard),
        key: Bytes::from_static(b"streamed"),
        write_id: write_id(5),
        ..Default::default()
    };
    let pieces = vec![Bytes::from(vec![3; 100_000]); 3];
    let streamed = storage.put_stream(stream_of(header.clone(), pieces.clone())).await.unwrap().into_inner();
    assert_eq!(storage.put_stream(stream_of(header, pieces)).await.unwrap().into_inner(), streamed);

    // Another mutation under a number that was given.
    let reused = wire::PutRequest { write_id: write_id(5), ..put(shard, "another", "v") };
    assert_eq!(reason(&storage.put(reused).await.unwrap_err()), Reason::InvalidArgument);
    assert_eq!(reason(&storage.get(get(shard, "another")).await.unwrap_err()), Reason::NotFound);

    // A later sequence took the slot of the first: its answer is no longer known.
    let later = wire::PutRequest { write_id: write_id(1 + 1024), ..put(shard, "l", "v") };
    storage.put(later).await.unwrap();
    let stale = storage.put(request.clone()).await.unwrap_err();
    assert_eq!((stale.code(), reason(&stale)), (Code::FailedPrecondition, Reason::SequenceStale));
    let unknown = Some(wire::WriteId { session_id: 999_999, sequence: 1 });
    let unknown = wire::PutRequest { write_id: unknown, ..request.clone() };
    assert_eq!(reason(&storage.put(unknown).await.unwrap_err()), Reason::SessionUnknown);
    let half = wire::PutRequest { write_id: Some(wire::WriteId { session_id: 0, sequence: 1 }), ..request };
    assert_eq!(reason(&storage.put(half).await.unwrap_err()), Reason::InvalidArgument);
    check(&node, shard).await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn shards_live_and_die() {
    let node = Node::start().await;
    let mut storage = node.storage();
    let new = wire::NewShardRequest { name: "photos".into(), request_id: "r1".into(), ..Default::default() };
    let made = storage.new_shard(new.clone()).await.unwrap().into_inner();
    assert_eq!((made.name.as_str(), made.state()), ("photos", wire::ShardState::Active));
    assert_eq!(storage.new_shard(new.clone()).await.unwrap().into_inner().id, made.id);
    let twice = wire::NewShardRequest { request_id: "r2".into(), ..new.clone() };
    let exists = storage.new_shard(twice).await.unwrap_err();
    assert_eq!((exists.code(), reason(&exists)), (Code::AlreadyExists, Reason::ShardExists));
    for bad in ["", ".", "a/b", ".shardfs"] {
        let bad = wire::NewShardRequest { name: bad.into(), ..Default::default() };
        assert_eq!(reason(&storage.new_shard(bad).await.unwrap_err()), Reason::InvalidArgument);
    }

    storage.put(put(made.id, "k", "value")).await.unwrap();
    let by_name = Some(wire::ShardSelector { by: Some(wire::shard_selector::By::Name("photos".into())) });
    let request = wire::GetRequest { shard: by_name.clone(), ..get(made.id, "k") };
    assert_eq!(storage.get(request).await.unwrap().into_inner().value, "value");
    let shown = storage.get_shard(wire::GetShardRequest { shard: by_name }).await.unwrap().into_inner();
    assert_eq!((shown.id, shown.used_bytes, shown.inodes), (made.id, Some(5 + 512), Some(2)));
    assert_eq!(shown.location.as_ref().unwrap().node_id, support::NODE_ID);

    let epoch = shown.location.unwrap().epoch;
    assert!(storage.get(wire::GetRequest { epoch, ..get(made.id, "k") }).await.is_ok());
    let stale = storage.get(wire::GetRequest { epoch: epoch + 1, ..get(made.id, "k") }).await.unwrap_err();
    assert_eq!((stale.code(), reason(&stale)), (Code::Unavailable, Reason::StaleEpoch));
    let location = shardfs_proto::status::from_status(&stale).location().cloned();
    assert_eq!(location.expect("it says where the shard lives").epoch.get(), epoch);

    let rename = wire::RenameShardRequest { shard: selector(made.id), new_name: "pictures".into() };
    assert_eq!(storage.rename_shard(rename).await.unwrap().into_inner().name, "pictures");
    let second = node.new_shard("audio").await;
    let listed = storage.list_shards(wire::ListShardsRequest::default()).await.unwrap().into_inner();
    let names: Vec<String> = listed.map(|shard| shard.unwrap().name).collect().await;
    assert_eq!(names, ["audio", "pictures"]);

    let close = wire::CloseShardRequest { shard: selector(made.id) };
    for _ in 0..2 {
        let closed = storage.close_shard(close.clone()).await.unwrap().into_inner();
        assert_eq!(closed.state(), wire::ShardState::ReadOnly);
    }
    let closed = storage.put(put(made.id, "k2", "x")).await.unwrap_err();
    assert_eq!((closed.code(), reason(&closed)), (Code::FailedPrecondition, Reason::ShardReadOnly));
    assert_eq!(storage.get(get(made.id, "k")).await.unwrap().into_inner().value, "value");

    let only_if_empty = |id| wire::DeleteShardRequest { shard: selector(id), only_if_empty: true };
    let full = storage.delete_shard(only_if_empty(made.id)).await.unwrap_err();
    assert_eq!(reason(&full), Reason::ShardNotEmpty);
    storage.delete_shard(only_if_empty(second)).await.unwrap();
    let request = wire::DeleteShardRequest { shard: selector(made.id), only_if_empty: false };
    assert_eq!(storage.delete_shard(request).await.unwrap().into_inner().state(), wire::ShardState::Deleted);
    let gone = storage.get(get(made.id, "k")).await.unwrap_err();
    assert!(matches!(reason(&gone), Reason::ShardDeleted | Reason::ShardNotFound), "{gone}");
    let never = storage.get(get(77_777, "k")).await.unwrap_err();
    assert_eq!((never.code(), reason(&never)), (Code::NotFound, Reason::ShardNotFound));
    let listed = storage.list_shards(wire::ListShardsRequest::default()).await.unwrap().into_inner();
    assert_eq!(listed.count().await, 0);
    // Ids are never used again, names are.
    assert!(node.new_shard("pictures").await > second);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn files_work_by_inode() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let session = node.open_session(shard).await;
    let mut files = node.files();
    let header =
        Some(wire::CallHeader { shard_id: shard, epoch: 0, session_id: session, ..Default::default() });
    let sequence = std::cell::Cell::new(0);
    let mutation = |kind: operation::Kind| {
        sequence.set(sequence.get() + 1);
        wire::MutateRequest {
            header,
            sequence: sequence.get(),
            operation: Some(wire::Operation { kind: Some(kind) }),
            durability: 0,
            repetition: None,
        }
    };
    let new_inode = Some(wire::NewInode { mode: 0o640, uid: 5, gid: 6, unmasked_mode: None });
    let make = operation::Kind::MakeDirectory(wire::MakeDirectory {
        parent: 1,
        name: Bytes::from_static(b"d"),
        inode: new_inode,
    });
    let made = files.mutate(mutation(make)).await.unwrap().into_inner().result.unwrap().attr.unwrap();
    assert_eq!((made.kind(), made.mode, made.uid, made.nlink), (wire::FileKind::Directory, 0o640, 5, 2));
    let create = operation::Kind::Create(wire::Create {
        parent: made.inode,
        name: Bytes::from_static(b"f"),
        kind: wire::FileKind::Regular.into(),
        inode: new_inode,
        open: true,
        ..Default::default()
    });
    let retry = mutation(create);
    let file = files.mutate(retry.clone()).await.unwrap().into_inner().result.unwrap();
    assert!(file.created);
    assert_eq!(files.mutate(retry).await.unwrap().into_inner().result.unwrap(), file);
    let file = file.attr.unwrap().inode;

    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut rng = fastrand::Rng::with_seed(seed);
    let mut model = vec![];
    for _ in 0..40 {
        let offset = rng.usize(..400_000);
        let data = vec![rng.u8(..); rng.usize(1..100_000)];
        let end = offset + data.len();
        if model.len() < end {
            model.resize(end, 0u8);
        }
        model[offset..end].copy_from_slice(&data);
        let write = operation::Kind::Write(wire::Write {
            inode: file,
            offset: offset as u64,
            data: data.into(),
            ..Default::default()
        });
        let answer = files.mutate(mutation(write)).await.unwrap().into_inner().result.unwrap();
        assert_eq!(answer.attr.unwrap().size as usize, model.len());
    }
    let mut read = Vec::new();
    while read.len() < model.len() {
        let request = wire::ReadRequest { header, inode: file, offset: read.len() as u64, length: 150_000 };
        read.extend_from_slice(&files.read(request).await.unwrap().into_inner().data);
    }
    assert!(read == model, "seed {seed}");
    let long = wire::ReadRequest { header, inode: file, offset: 0, length: (4 << 20) + 1 };
    assert_eq!(reason(&files.read(long).await.unwrap_err()), Reason::TooLarge);
    // The same bytes by key.
    let value = node.storage().get(get(shard, "d/f")).await.unwrap().into_inner().value;
    assert!(value == model);

    let symlink = operation::Kind::MakeSymlink(wire::MakeSymlink {
        parent: made.inode,
        name: Bytes::from_static(b"s"),
        target: Bytes::from_static(b"f"),
        inode: new_inode,
    });
    let symlink =
        files.mutate(mutation(symlink)).await.unwrap().into_inner().result.unwrap().attr.unwrap().inode;
    let request = wire::ReadLinkRequest { header, inode: symlink };
    assert_eq!(files.read_link(request).await.unwrap().into_inner().target, "f");
    let xattr = operation::Kind::SetXattr(wire::SetXattr {
        inode: file,
        name: Bytes::from_static(b"user.a"),
        value: Bytes::from_static(b"1"),
        ..Default::default()
    });
    files.mutate(mutation(xattr)).await.unwrap();
    let request = wire::GetXattrRequest { header, inode: file, name: Bytes::from_static(b"user.a") };
    assert_eq!(files.get_xattr(request.clone()).await.unwrap().into_inner().value, "1");
    let other = wire::GetXattrRequest { name: Bytes::from_static(b"user.b"), ..request };
    assert_eq!(reason(&files.get_xattr(other).await.unwrap_err()), Reason::NoAttribute);
    let names =
        files.list_xattrs(wire::ListXattrsRequest { header, inode: file }).await.unwrap().into_inner().names;
    assert_eq!(names, ["user.a"]);

    let lookup =
        |parent, name: &'static [u8]| wire::LookupRequest { header, parent, name: Bytes::from_static(name) };
    let found = files.lookup(lookup(made.inode, b"f")).await.unwrap().into_inner().attr.unwrap();
    assert_eq!(found.inode, file);
    let up = files.lookup(lookup(made.inode, b"..")).await.unwrap().into_inner().attr.unwrap();
    assert_eq!((up.inode, up.nlink), (1, 3));
    let same = files.get_attr(wire::GetAttrRequest { header, inode: file }).await.unwrap().into_inner().attr;
    assert_eq!(same, Some(found));
    let request = wire::ReadDirectoryRequest {
        header,
        inode: made.inode,
        after_cookie: 0,
        limit: 10,
        attributes: true,
    };
    let page = files.read_directory(request).await.unwrap().into_inner();
    let entries: Vec<_> = page.entries.iter().map(|e| (&e.name[..], e.inode)).collect();
    assert_eq!(entries, [(&b"f"[..], file), (b"s", symlink)]);
    assert!(page.end && page.parent == 1 && page.entries.iter().all(|entry| entry.attr.is_some()));

    // A file that is open lives on without its name, until it is released.
    let unlink = operation::Kind::Unlink(wire::Unlink { parent: made.inode, name: Bytes::from_static(b"f") });
    files.mutate(mutation(unlink)).await.unwrap();
    let request = wire::ReadRequest { header, inode: file, offset: 0, length: 10 };
    assert_eq!(files.read(request).await.unwrap().into_inner().data, model[..10]);
    let keep = wire::KeepSessionRequest { header, resume: true, open_inodes: vec![file] };
    let kept = files.keep_session(keep).await.unwrap().into_inner();
    assert!(kept.ttl_ms > 0 && kept.epoch > 0 && !kept.resume_wanted);
    check(&node, shard).await;
    files.release(wire::ReleaseRequest { header, inodes: vec![file] }).await.unwrap();
    assert_eq!(reason(&files.read(request).await.unwrap_err()), Reason::NotFound);
    files.sync(wire::SyncRequest { header }).await.unwrap();

    let stat = files.stat_shard(wire::StatShardRequest { header }).await.unwrap().into_inner();
    assert_eq!((stat.inodes_used, stat.state()), (3, wire::ShardState::Active));
    assert!(stat.total_bytes >= stat.free_bytes && stat.free_bytes > 0);
    assert_eq!(check(&node, shard).await.inodes, 3);

    let nobody = wire::GetAttrRequest { header, inode: 0 };
    assert_eq!(reason(&files.get_attr(nobody).await.unwrap_err()), Reason::InvalidArgument);
    let headless = wire::GetAttrRequest { header: None, inode: 1 };
    assert_eq!(reason(&files.get_attr(headless).await.unwrap_err()), Reason::InvalidArgument);
    let empty = wire::MutateRequest { header, sequence: 0, operation: None, durability: 0, repetition: None };
    assert_eq!(reason(&files.mutate(empty).await.unwrap_err()), Reason::InvalidArgument);
    files.close_session(wire::CloseSessionRequest { header }).await.unwrap();
    let open = wire::OpenRequest { header, inode: 1 };
    assert_eq!(reason(&files.open(open).await.unwrap_err()), Reason::SessionUnknown);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn operators_see_the_node() {
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut admin = node.admin();
    let status = admin.get_status(wire::GetStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.node_id.as_str(), status.store_reachable), (support::NODE_ID, true));
    assert_eq!(status.volumes.len(), 1);
    assert_eq!((status.volumes[0].shards, status.volumes[0].trouble.as_str()), (1, ""));
    let nodes = admin.list_nodes(wire::ListNodesRequest {}).await.unwrap().into_inner().nodes;
    assert_eq!(nodes.iter().map(|node| node.id.as_str()).collect::<Vec<_>>(), [support::NODE_ID]);
    let volumes = admin.list_volumes(wire::ListVolumesRequest {}).await.unwrap().into_inner().volumes;
    assert_eq!(volumes.iter().map(|v| v.primary.as_str()).collect::<Vec<_>>(), [support::NODE_ID]);

    let other = wire::NewShardRequest { name: "theirs".into(), ..Default::default() };
    let other = node.storage_as(Some("somebody-else")).new_shard(other).await.unwrap().into_inner().id;
    let all = admin.list_all_shards(wire::ListAllShardsRequest::default()).await.unwrap().into_inner();
    let owners: BTreeMap<u64, String> =
        all.map(|shard| shard.unwrap()).map(|s| (s.id, s.owner)).collect().await;
    assert_eq!(owners.keys().copied().collect::<Vec<_>>(), [shard, other]);
    assert_eq!(owners[&other], "somebody-else");
    // Any shard may be checked, whoever owns it.
    assert_eq!(check(&node, other).await.inodes, 1);
    let none = wire::CheckShardRequest { shard: selector(9_999), read_data: false };
    assert_eq!(reason(&admin.check_shard(none).await.unwrap_err()), Reason::ShardNotFound);
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_and_reflection_answer_without_a_client_id() {
    let node = Node::start().await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(node.channel());
    for service in ["", "shardfs.v1.Storage", "shardfs.v1.Files", "shardfs.v1.Admin", "shardfs.v1.Backups"] {
        let request = tonic_health::pb::HealthCheckRequest { service: service.into() };
        let status = health.check(request).await.unwrap().into_inner().status();
        assert_eq!(status, tonic_health::pb::health_check_response::ServingStatus::Serving, "{service}");
    }
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{ServerReflectionRequest, ServerReflectionResponse};
    let request = ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(node.channel())
        .server_reflection_info(futures::stream::iter([request]))
        .await
        .unwrap()
        .into_inner();
    let ServerReflectionResponse { message_response, .. } = answers.next().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(listed)) = message_response else { panic!("no list") };
    let names: Vec<_> = listed.service.into_iter().map(|service| service.name).collect();
    for service in [
        "shardfs.v1.Storage",
        "shardfs.v1.Files",
        "shardfs.v1.Admin",
        "shardfs.v1.Backups",
        "grpc.health.v1.Health",
    ] {
        assert!(names.iter().any(|name| name == service), "{service} is not in {names:?}");
    }
    assert!(!names.iter().any(|name| name.contains("meta")), "only what a node serves: {names:?}");
    node.stop().await;
}

/// Resident memory of this process, in MiB.
fn resident_mib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes a minute or so; for figures: --ignored --nocapture"]
async fn a_million_keys_are_listed_and_checked_in_bounded_memory() {
    const KEYS: usize = 1_000_000;
    let node = Node::start().await;
    let shard = node.new_shard("s").await;
    let mut storage = node.storage();
    let started = std::time::Instant::now();
    for from in (0..KEYS).step_by(10_000) {
        let item = |i: usize| wire::PutItem {
            key: format!("directory/name-{i:07}").into(),
            value: Bytes::from_static(b"0123456789"),
            options: None,
        };
        let batch = wire::BatchPutRequest {
            shard: selector(shard),
            items: (from..from + 10_000).map(item).collect(),
            atomic: true,
            durability: wire::Durability::Buffered.into(),
            ..Default::default()
        };
        storage.batch_put(batch).await.unwrap();
    }
    println!("put {KEYS} keys in {:?}; {} MiB resident", started.elapsed(), resident_mib());
    let before = resident_mib();
    for keys_only in [true, false] {
        let started = std::time::Instant::now();
        let request = wire::ListRequest { shard: selector(shard), keys_only, ..Default::default() };
        let mut stream = storage.list(request).await.unwrap().into_inner();
        let (mut count, mut last) = (0, Bytes::new());
        while let Some(reply) = stream.next().await {
            for entry in reply.unwrap().entries {
                let Some(list_entry::Entry::Key(key)) = entry.entry else { panic!("no key") };
                assert!(key > last);
                last = key;
                count += 1;
            }
        }
        assert_eq!(count, KEYS);
        println!("listed, keys only {keys_only}: {:?}; {} MiB resident", started.elapsed(), resident_mib());
    }
    let started = std::time::Instant::now();
    let summary = check(&node, shard).await;
    assert_eq!(summary.inodes as usize, KEYS + 2);
    println!("checked in {:?}; {} MiB resident", started.elapsed(), resident_mib());
    // The block cache (256 MiB) may fill; what lists and checks hold themselves is a few pages.
    let grown = resident_mib().saturating_sub(before);
    assert!(grown < 400, "memory grew by {grown} MiB");
    node.stop().await;
}
