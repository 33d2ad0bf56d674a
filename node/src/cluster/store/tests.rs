//! One suite for every implementation of [`MetaStore`]: each test is written against the trait and a
//! [`Bench`] that can restart the server. All implementations run it below.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;

use super::*;
use crate::cluster::embedded::EmbeddedStore;
use crate::cluster::embedded_server::{Handle, serve};
use crate::cluster::etcd::EtcdStore;
use crate::cluster::etcd::testing::Etcd;
use crate::net::ListenAddr;

/// How long a test waits for something that must come.
const PATIENCE: Duration = Duration::from_secs(90);

/// How long the clients of the suite repeat a call.
const RETRY_MAX: Duration = Duration::from_secs(60);

/// A server of one kind and a client of it.
struct Bench {
    server: Server,
    store: Arc<dyn MetaStore>,
}

enum Server {
    Embedded { dir: tempfile::TempDir, address: ListenAddr, handle: Option<Handle> },
    Etcd(Etcd),
}

impl Bench {
    async fn embedded(tcp: bool) -> Bench {
        let dir = tempfile::tempdir().unwrap();
        let listen =
            if tcp { "127.0.0.1:0".parse().unwrap() } else { ListenAddr::Unix(dir.path().join("meta.sock")) };
        let handle = serve(dir.path().join("meta.redb"), listen).await.unwrap();
        let server = Server::Embedded { dir, address: handle.address().clone(), handle: Some(handle) };
        Bench { store: server.client(RETRY_MAX), server }
    }

    async fn etcd() -> Bench {
        let server = Server::Etcd(Etcd::start());
        Bench { store: server.client(RETRY_MAX), server }
    }

    /// Stops the server; `clean`: as asked to, else as a crash would.
    async fn stop(&mut self, clean: bool) {
        match &mut self.server {
            Server::Embedded { handle, .. } => {
                let handle = handle.take().unwrap();
                if clean { handle.shutdown().await.unwrap() } else { handle.kill().await.unwrap() }
            }
            Server::Etcd(etcd) => tokio::task::block_in_place(|| etcd.stop(clean)),
        }
    }

    async fn start(&mut self) {
        match &mut self.server {
            Server::Embedded { dir, address, handle } => {
                *handle = Some(serve(dir.path().join("meta.redb"), address.clone()).await.unwrap());
            }
            Server::Etcd(etcd) => tokio::task::block_in_place(|| etcd.restart()),
        }
    }

    async fn restart(&mut self, clean: bool) {
        self.stop(clean).await;
        self.start().await;
    }
}

impl Server {
    /// A client of its own.
    fn client(&self, retry_max: Duration) -> Arc<dyn MetaStore> {
        match self {
            Server::Embedded { address, .. } => {
                Arc::new(EmbeddedStore::with_retry(&address.to_string(), retry_max).unwrap())
            }
            Server::Etcd(etcd) => Arc::new(EtcdStore::with_retry(etcd.settings(), retry_max)),
        }
    }
}

async fn put(store: &dyn MetaStore, key: &str, value: &str) -> Revision {
    store.txn(Txn::new().put(key.to_owned(), value.to_owned())).await.unwrap().revision
}

async fn value(store: &dyn MetaStore, key: &str) -> Option<String> {
    let (_, kv) = get(store, key.to_owned()).await.unwrap();
    kv.map(|kv| String::from_utf8(kv.value.to_vec()).unwrap())
}

/// The next batch that has events.
async fn next(watch: &mut WatchStream) -> StoreResult<WatchBatch> {
    let wait = async {
        loop {
            match watch.next().await.expect("a watch does not end by itself") {
                Ok(batch) if batch.events.is_empty() => {}
                other => return other,
            }
        }
    };
    tokio::time::timeout(PATIENCE, wait).await.expect("the watch is silent")
}

async fn keys_versions_and_ranges(bench: Bench) {
    let store = &*bench.store;
    let first = put(store, "a/1", "x").await;
    let second = put(store, "a/1", "y").await;
    assert!(second > first);
    let (revision, kv) = get(store, "a/1").await.unwrap();
    let kv = kv.unwrap();
    assert_eq!((kv.created, kv.modified, kv.version, &kv.value[..]), (first, second, 2, &b"y"[..]));
    assert!(revision >= second);
    put(store, "a/2", "").await;
    put(store, "b/1", "z").await;
    let found = store.range(KeyRange::prefix("a/"), 0).await.unwrap();
    assert_eq!(found.kvs.iter().map(|kv| &kv.key[..]).collect::<Vec<_>>(), [b"a/1", b"a/2"]);
    assert!(!found.more);
    let found = store.range(KeyRange::between("a", "z"), 2).await.unwrap();
    assert!(found.more && found.kvs.len() == 2);
    // Deleted and made again: a new life.
    let gone = store.txn(Txn::new().delete("a/1")).await.unwrap();
    assert_eq!(gone.results[0][0].value, "y");
    assert_eq!(get(store, "a/1").await.unwrap().1, None);
    let third = put(store, "a/1", "z").await;
    let kv = get(store, "a/1").await.unwrap().1.unwrap();
    assert_eq!((kv.created, kv.version), (third, 1));
    // Deleting nothing is no change.
    let before = get(store, "a/1").await.unwrap().0;
    let answer = store.txn(Txn::new().delete("nothing")).await.unwrap();
    assert_eq!(answer.revision, before);
    // Whole prefixes, and what a transaction sees of itself.
    let txn = Txn {
        success: vec![
            Op::Put { key: "b/2".into(), value: "n".into(), lease: None },
            Op::Delete(KeyRange::prefix("a/")),
            Op::Range(KeyRange::prefix("a/")),
            Op::Range(KeyRange::prefix("b/")),
        ],
        ..Txn::new()
    };
    let answer = store.txn(txn).await.unwrap();
    assert_eq!(answer.results.iter().map(Vec::len).collect::<Vec<_>>(), [0, 2, 0, 2]);
    assert_eq!(
        (&answer.results[3][1].value[..], answer.results[3][1].modified),
        (&b"n"[..], answer.revision)
    );
    assert_eq!(value(store, "b/1").await.as_deref(), Some("z"));
}

async fn long_ranges_come_in_pages(bench: Bench) {
    let store = &*bench.store;
    let value = vec![7u8; VALUE_BYTES_MAX];
    for i in 0..10 {
        store.txn(Txn::new().put(format!("page/{i}"), value.clone())).await.unwrap();
    }
    let page = store.range(KeyRange::prefix("page/"), 0).await.unwrap();
    assert!(page.more && page.kvs.len() < 10);
    let whole = range_all(store, KeyRange::prefix("page/")).await.unwrap();
    assert_eq!(whole.kvs.len(), 10);
    assert!(whole.kvs.iter().all(|kv| kv.value == value));
}

async fn compares_decide(bench: Bench) {
    let store = &*bench.store;
    let made = store.txn(Txn::new().when("k", Demand::Absent).put("k", "1").or_read("k")).await.unwrap();
    assert!(made.succeeded);
    let again = store.txn(Txn::new().when("k", Demand::Absent).put("k", "2").or_read("k")).await.unwrap();
    assert!(!again.succeeded);
    assert_eq!(again.results[0][0].value, "1");
    for (demand, holds) in [
        (Demand::Modified(made.revision), true),
        (Demand::Modified(made.revision.next()), false),
        (Demand::Version(1), true),
        (Demand::Version(2), false),
        (Demand::Value("1".into()), true),
        (Demand::Value("2".into()), false),
        (Demand::Absent, false),
    ] {
        let answer = store.txn(Txn::new().when("k", demand.clone())).await.unwrap();
        assert_eq!(answer.succeeded, holds, "{demand:?}");
    }
    // All compares together or nothing.
    let both = Txn::new().when("k", Demand::Version(1)).when("other", Demand::Version(1)).put("k", "3");
    assert!(!store.txn(both).await.unwrap().succeeded);
    assert_eq!(value(store, "k").await.as_deref(), Some("1"));
}

async fn races_have_one_winner(bench: Bench) {
    const WORKERS: usize = 8;
    const ROUNDS: usize = 50;
    put(&*bench.store, "counter", "0").await;
    let worker = |_| {
        let store = bench.store.clone();
        tokio::spawn(async move {
            let mut done = 0;
            while done < ROUNDS {
                let kv = get(&*store, "counter").await.unwrap().1.unwrap();
                let count: usize = std::str::from_utf8(&kv.value).unwrap().parse().unwrap();
                let txn = Txn::new()
                    .when("counter", Demand::Modified(kv.modified))
                    .put("counter", (count + 1).to_string());
                done += usize::from(store.txn(txn).await.unwrap().succeeded);
            }
        })
    };
    for worker in (0..WORKERS).map(worker).collect::<Vec<_>>() {
        worker.await.unwrap();
    }
    assert_eq!(value(&*bench.store, "counter").await.unwrap(), (WORKERS * ROUNDS).to_string());
}

async fn limits_are_kept(bench: Bench) {
    let store = &*bench.store;
    let refused = async |txn: Txn| {
        let outcome = store.txn(txn).await;
        assert!(matches!(outcome, Err(StoreError::Invalid(_))), "{outcome:?}");
    };
    refused(Txn::new().put("k", vec![0; VALUE_BYTES_MAX + 1])).await;
    refused(Txn::new().put(vec![b'k'; KEY_BYTES_MAX + 1], "")).await;
    refused(Txn::new().put("", "")).await;
    refused((0..=TXN_OPS_MAX).fold(Txn::new(), |txn, i| txn.put(format!("k{i}"), ""))).await;
    refused((0..5).fold(Txn::new(), |txn, i| txn.put(format!("k{i}"), vec![0; VALUE_BYTES_MAX]))).await;
    refused((0..=TXN_OPS_MAX).fold(Txn::new(), |txn, _| txn.when("k", Demand::Absent))).await;
    // One change of a key in one revision.
    refused(Txn::new().put("k", "1").put("k", "2")).await;
    refused(Txn::new().put("k", "1").delete("k")).await;
    refused(Txn { failure: Txn::new().delete("k").put("k", "1").success, ..Txn::new() }).await;
    assert_eq!(store.range(KeyRange::prefix("k"), 0).await.unwrap().kvs, []);
    let most = (0..TXN_OPS_MAX).fold(Txn::new(), |txn, i| txn.put(format!("k{i}"), ""));
    assert!(store.txn(most).await.unwrap().succeeded);
    let large = Txn::new().put(vec![b'k'; KEY_BYTES_MAX], vec![1; VALUE_BYTES_MAX]);
    assert!(store.txn(large).await.unwrap().succeeded);
    assert!(matches!(store.range(KeyRange::key(""), 0).await, Err(StoreError::Invalid(_))));
}

async fn a_watch_sees_whole_revisions_of_its_range(bench: Bench) {
    let store = &*bench.store;
    let before = put(store, "w/a", "0").await;
    let mut watch = store.watch(KeyRange::prefix("w/"), before.next());
    let first = watch.next().await.unwrap().unwrap();
    assert_eq!((first.revision, first.events.len()), (before, 0));
    put(store, "other", "0").await;
    let both = store.txn(Txn::new().put("w/b", "1").delete("w/a").put("other", "1")).await.unwrap().revision;
    let batch = next(&mut watch).await.unwrap();
    assert_eq!(batch.revision, both);
    assert_eq!(batch.events.len(), 2);
    assert!(batch.events.iter().any(|e| *e == Event::Delete("w/a".into())));
    assert!(
        batch.events.iter().any(|e| matches!(e, Event::Put(kv) if kv.key == "w/b" && kv.modified == both))
    );
    // From an older revision: what happened is told again, and no more.
    let mut again = store.watch(KeyRange::prefix("w/"), before);
    let batches = [next(&mut again).await.unwrap(), next(&mut again).await.unwrap()];
    assert_eq!(batches.each_ref().map(|b| b.revision), [before, both]);
    // Without events it says in a while where it stands.
    let now = put(store, "other", "2").await;
    let told = tokio::time::timeout(PATIENCE, async {
        while watch.next().await.unwrap().unwrap().revision < now {}
    });
    told.await.expect("no sign of life");
}

/// Writes while the server restarts, and compares what a watch and its resyncs tell with the store.
async fn a_watch_misses_and_repeats_nothing_over(mut bench: Bench, clean: bool) {
    let store = bench.store.clone();
    let start = put(&*store, "start", "").await;
    let follower = {
        let store = store.clone();
        tokio::spawn(async move {
            let mut seen: BTreeMap<Bytes, KeyValue> = BTreeMap::new();
            let mut last = start;
            'sync: loop {
                let mut watch = store.watch(KeyRange::prefix("w/"), last.next());
                loop {
                    let batch = match next(&mut watch).await {
                        Ok(batch) => batch,
                        Err(StoreError::Compacted) => {
                            let whole = range_all(&*store, KeyRange::prefix("w/")).await.unwrap();
                            assert_eq!(whole.first, whole.last);
                            seen = whole.kvs.into_iter().map(|kv| (kv.key.clone(), kv)).collect();
                            last = whole.last;
                            if seen.contains_key(&b"w/end"[..]) {
                                return seen;
                            }
                            continue 'sync;
                        }
                        Err(error) => panic!("{error}"),
                    };
                    assert!(batch.revision > last, "{:?} again after {last:?}", batch.revision);
                    last = batch.revision;
                    for event in batch.events {
                        match event {
                            Event::Put(kv) => {
                                assert_eq!(kv.modified, batch.revision);
                                // A gap would show as a jump of the version.
                                let version = seen.get(&kv.key).map_or(0, |kv| kv.version);
                                assert_eq!(kv.version, version + 1, "{kv:?}");
                                seen.insert(kv.key.clone(), kv);
                            }
                            Event::Delete(key) => assert!(seen.remove(&key).is_some(), "{key:?}"),
                        }
                    }
                    if seen.contains_key(&b"w/end"[..]) {
                        return seen;
                    }
                }
            }
        })
    };
    let writer = {
        let store = store.clone();
        tokio::spawn(async move {
            let mut acknowledged = BTreeMap::new();
            for i in 0..400usize {
                let key = format!("w/{}", i % 7);
                let txn = if i % 11 == 10 {
                    Txn::new().delete(key.clone())
                } else {
                    Txn::new().put(key.clone(), i.to_string())
                };
                // Volatile keys among the others make revisions that a crash may take back.
                put_volatile(&*store, i).await;
                loop {
                    match store.txn(txn.clone()).await {
                        Ok(_) => break,
                        Err(StoreError::OutcomeUnknown(_) | StoreError::Unavailable(_)) => {}
                        Err(error) => panic!("{error}"),
                    }
                }
                if i % 11 == 10 {
                    acknowledged.remove(&key);
                } else {
                    acknowledged.insert(key, i.to_string());
                }
            }
            acknowledged
        })
    };
    for _ in 0..3 {
        tokio::time::sleep(Duration::from_millis(100)).await;
        bench.restart(clean).await;
    }
    let acknowledged = writer.await.unwrap();
    put(&*store, "w/end", "").await;
    let mut seen = tokio::time::timeout(PATIENCE, follower).await.expect("the follower hangs").unwrap();
    let stored = range_all(&*store, KeyRange::prefix("w/")).await.unwrap();
    assert_eq!(seen.values().collect::<Vec<_>>(), stored.kvs.iter().collect::<Vec<_>>());
    seen.remove(&b"w/end"[..]);
    let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).unwrap();
    let seen: BTreeMap<String, String> = seen.iter().map(|(k, kv)| (text(k), text(&kv.value))).collect();
    assert_eq!(seen, acknowledged);
}

async fn put_volatile(store: &dyn MetaStore, i: usize) {
    let key = [VOLATILE_PREFIX, b"n"].concat();
    match store.txn(Txn::new().put(key, i.to_string())).await {
        Ok(_) | Err(StoreError::OutcomeUnknown(_) | StoreError::Unavailable(_)) => {}
        Err(error) => panic!("{error}"),
    }
}

async fn a_watch_that_saw_everything_goes_on_after_a_clean_restart(mut bench: Bench) {
    let store = bench.store.clone();
    let mut watch = store.watch(KeyRange::prefix("w/"), put(&*store, "start", "").await.next());
    for round in 0..5 {
        put_volatile(&*store, round).await;
        let revision = put(&*store, "w/k", &round.to_string()).await;
        // Not even `Compacted`: nothing was missed, and no revision went without being told.
        assert_eq!(next(&mut watch).await.unwrap().revision, revision);
        bench.restart(true).await;
    }
}

async fn a_watch_goes_on_over_clean_restarts(bench: Bench) {
    a_watch_misses_and_repeats_nothing_over(bench, true).await;
}

async fn a_watch_goes_on_over_crashes(bench: Bench) {
    a_watch_misses_and_repeats_nothing_over(bench, false).await;
}

async fn what_is_answered_survives_a_crash(mut bench: Bench) {
    let mut last = Revision::default();
    for round in 0..5 {
        for i in 0..20 {
            let revision = put(&*bench.store, &format!("d/{round}/{i}"), "v").await;
            assert!(revision > last, "revisions go on over crashes");
            last = revision;
            put_volatile(&*bench.store, i).await;
        }
        bench.restart(false).await;
    }
    let found = range_all(&*bench.store, KeyRange::prefix("d/")).await.unwrap();
    assert_eq!(found.kvs.len(), 100);
    assert!(found.last > last);
}

async fn leases_end(mut bench: Bench) {
    /// What is done with a lease before it ends is done within this.
    const TERM: Duration = Duration::from_secs(3);
    let store = bench.store.clone();
    let short = store.lease_grant(TERM).await.unwrap();
    let kept = store.lease_grant(TERM).await.unwrap();
    let long = store.lease_grant(Duration::from_secs(60)).await.unwrap();
    let mut watch = store.watch(KeyRange::prefix("l/"), Revision::default());
    watch.next().await.unwrap().unwrap();
    for (key, lease) in [("l/short", short), ("l/kept", kept), ("l/long", long)] {
        store.txn(Txn::new().put_leased(key, "v", lease)).await.unwrap();
        assert_eq!(next(&mut watch).await.unwrap().events.len(), 1);
    }
    // A put without it takes a key out of its lease.
    store.txn(Txn::new().put_leased("l/freed", "v", short)).await.unwrap();
    put(&*store, "l/freed", "w").await;
    let keeping = {
        let store = store.clone();
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(Duration::from_millis(80)).await;
                store.lease_keep_alive(kept).await.unwrap();
            }
        })
    };
    let mut gone = next(&mut watch).await.unwrap();
    while !matches!(gone.events[..], [Event::Delete(_)]) {
        gone = next(&mut watch).await.unwrap();
    }
    assert_eq!(gone.events, [Event::Delete("l/short".into())]);
    assert!(matches!(store.lease_keep_alive(short).await, Err(StoreError::LeaseUnknown)));
    let late = store.txn(Txn::new().put_leased("l/late", "v", short)).await;
    assert!(matches!(late, Err(StoreError::LeaseUnknown)), "{late:?}");
    assert_eq!(value(&*store, "l/freed").await.as_deref(), Some("w"));
    assert_eq!(value(&*store, "l/kept").await.as_deref(), Some("v"));
    keeping.abort();
    store.lease_revoke(long).await.unwrap();
    assert_eq!(value(&*store, "l/long").await, None);
    assert!(matches!(store.lease_revoke(long).await, Err(StoreError::LeaseUnknown)));
    // Over a restart a lease lives on, with its term anew, and ends then.
    let over = store.lease_grant(TERM).await.unwrap();
    store.txn(Txn::new().put_leased("l/over", "v", over)).await.unwrap();
    bench.restart(false).await;
    store.lease_keep_alive(over).await.unwrap();
    assert_eq!(value(&*store, "l/over").await.as_deref(), Some("v"));
    let ends = async {
        while value(&*store, "l/over").await.is_some() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(PATIENCE, ends).await.expect("the lease does not end");
    assert!(store.lease_grant(Duration::ZERO).await.is_err());
}

async fn an_absent_store_is_told(mut bench: Bench) {
    put(&*bench.store, "k", "v").await;
    assert!(bench.store.reachable());
    bench.stop(false).await;
    let patient = bench.server.client(Duration::from_millis(300));
    let begun = shardfs_proto::types::clock::monotonic();
    assert!(matches!(get(&*patient, "k").await, Err(StoreError::Unavailable(_))));
    let outcome = patient.txn(Txn::new().put("k", "w")).await;
    assert!(matches!(outcome, Err(StoreError::Unavailable(_))), "nothing was sent: {outcome:?}");
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert!(!patient.reachable());
    // A call that waits is answered when the store is back.
    let waiting = {
        let store = bench.store.clone();
        tokio::spawn(async move { value(&*store, "k").await })
    };
    tokio::time::sleep(Duration::from_millis(300)).await;
    bench.start().await;
    assert_eq!(waiting.await.unwrap().as_deref(), Some("v"));
}

macro_rules! suite {
    ($kind:ident, $make:expr, $($test:ident),+ $(,)?) => {
        mod $kind {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 4)]
                async fn $test() {
                    super::$test($make.await).await;
                }
            )+
        }
    };
}

macro_rules! every_test {
    ($kind:ident, $make:expr) => {
        suite!(
            $kind,
            $make,
            keys_versions_and_ranges,
            long_ranges_come_in_pages,
            compares_decide,
            races_have_one_winner,
            limits_are_kept,
            a_watch_sees_whole_revisions_of_its_range,
            a_watch_that_saw_everything_goes_on_after_a_clean_restart,
            a_watch_goes_on_over_clean_restarts,
            a_watch_goes_on_over_crashes,
            what_is_answered_survives_a_crash,
            leases_end,
            an_absent_store_is_told,
        );
    };
}

every_test!(embedded_unix, super::Bench::embedded(false));
every_test!(embedded_tcp, super::Bench::embedded(true));
every_test!(etcd, super::Bench::etcd());

#[tokio::test]
async fn one_process_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("meta.redb");
    let first = serve(file.clone(), "127.0.0.1:0".parse().unwrap()).await.unwrap();
    let second = serve(file, "127.0.0.1:0".parse().unwrap()).await;
    let error = format!("{:#}", second.err().expect("refused"));
    assert!(error.contains("in use by another process"), "{error}");
    let third = serve(dir.path().join("other.redb"), first.address().clone()).await;
    let error = format!("{:#}", third.err().expect("refused"));
    assert!(error.contains("in use by another process"), "{error}");
}

#[test]
fn ranges_contain_and_go_on() {
    let range = KeyRange::prefix("a/");
    assert!(
        range.contains(b"a/") && range.contains(b"a/z") && !range.contains(b"a0") && !range.contains(b"a")
    );
    assert!(range.after(b"a/b").unwrap().contains(b"a/c"));
    assert!(!range.after(b"a/b").unwrap().contains(b"a/b"));
    assert_eq!(KeyRange::prefix(vec![b'a', 0xff]).end().unwrap(), &b"b"[..]);
    assert_eq!(KeyRange::key("a").after(b"a"), None);
    assert!(KeyRange::key("a").contains(b"a") && !KeyRange::key("a").contains(b"ab"));
}
