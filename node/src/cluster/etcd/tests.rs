//! What is etcd's alone; what all stores share is in `store/tests.rs`. Every test has real etcd processes of its own.

use std::time::Instant;

use etcd_client::{
    AlarmAction, AlarmOptions, AlarmType, CompactionOptions, Permission, RoleRevokePermissionOptions,
};
use futures::StreamExt;

use shardfs_proto::types::clock;

use super::settings::User;
use super::testing::{Certificates, Etcd};
use super::*;
use crate::cluster::store::{Demand, Event, VALUE_BYTES_MAX, WatchBatch, get, range_all};

/// How long a test waits for something that must come.
const PATIENCE: Duration = Duration::from_secs(90);

fn store(etcd: &Etcd) -> EtcdStore {
    EtcdStore::new(etcd.settings())
}

/// All members as one address.
fn settings(members: &[Etcd]) -> EtcdSettings {
    EtcdSettings { members: members.iter().map(Etcd::member).collect(), ..members[0].settings() }
}

async fn put(store: &EtcdStore, key: &str, value: &str) -> Revision {
    store.txn(Txn::new().put(key.to_owned(), value.to_owned())).await.unwrap().revision
}

/// Puts until it is certain that it happened.
async fn put_surely(store: &EtcdStore, key: &str, value: &str) -> Revision {
    let end = clock::monotonic() + PATIENCE;
    loop {
        match store.txn(Txn::new().put(key.to_owned(), value.to_owned())).await {
            Ok(answer) => return answer.revision,
            Err(StoreError::OutcomeUnknown(_) | StoreError::Unavailable(_)) if clock::monotonic() < end => {}
            Err(error) => panic!("{error}"),
        }
    }
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

/// The member that leads.
async fn leader(members: &[Etcd]) -> usize {
    let end = clock::monotonic() + PATIENCE;
    loop {
        for (i, member) in members.iter().enumerate() {
            let status = member.client().await.status().await.unwrap();
            if status.leader() != 0 && status.leader() == status.header().unwrap().member_id() {
                return i;
            }
        }
        assert!(clock::monotonic() < end, "nobody leads");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiet_watch_is_heard_every_second_and_moves_on() {
    const SIGNS: u32 = 8;
    let etcd = Etcd::start();
    let store = store(&etcd);
    let from = put(&store, "w/a", "0").await.next();
    let mut watch = store.watch(KeyRange::prefix("w/"), from);
    assert_eq!(watch.next().await.unwrap().unwrap().events, []);
    // Changes elsewhere, which the watch does not show but must come past.
    let last = put(&store, "elsewhere", "0").await;
    let begun = Instant::now();
    let mut position = Revision::default();
    for _ in 0..SIGNS {
        let batch = tokio::time::timeout(PATIENCE, watch.next()).await.unwrap().unwrap().unwrap();
        assert!(batch.events.is_empty() && batch.revision >= position);
        position = batch.revision;
    }
    // Five times as long on a machine that is slow; by itself etcd gives one in ten minutes.
    assert!(begun.elapsed() < SIGNS * Duration::from_secs(5), "{:?}", begun.elapsed());
    assert_eq!(position, last);
    assert!(store.reachable());
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_is_told_and_harms_no_watch_that_is_past_it() {
    let mut etcd = Etcd::start();
    let store = store(&etcd);
    let first = put(&store, "w/a", "1").await;
    let mut running = store.watch(KeyRange::prefix("w/"), first);
    next(&mut running).await.unwrap();
    let mut last = first;
    for i in 2..10 {
        last = put(&store, "w/a", &i.to_string()).await;
        next(&mut running).await.unwrap();
    }
    etcd.client().await.compact(last.get() as i64, None).await.unwrap();
    // Too old: at once, not in silence.
    let mut old = store.watch(KeyRange::prefix("w/"), first);
    let said = tokio::time::timeout(PATIENCE, async {
        loop {
            match old.next().await.expect("it says why it ends") {
                Ok(batch) => assert_eq!(batch.events, []),
                Err(error) => return error,
            }
        }
    });
    assert!(matches!(said.await.unwrap(), StoreError::Compacted));
    assert!(old.next().await.is_none());
    // What it should have seen is read anew, and followed from there.
    let whole = range_all(&store, KeyRange::prefix("w/")).await.unwrap();
    assert_eq!((whole.kvs[0].version, whole.last), (9, last));
    let mut fresh = store.watch(KeyRange::prefix("w/"), whole.last.next());
    // The one that ran is past it, and goes on over a restart as well.
    etcd.stop(false);
    etcd.restart();
    let revision = put_surely(&store, "w/a", "10").await;
    assert_eq!(next(&mut running).await.unwrap().revision, revision);
    assert_eq!(next(&mut fresh).await.unwrap().revision, revision);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_behind_a_compaction_that_it_missed_is_told() {
    let mut etcd = Etcd::start();
    let store = store(&etcd);
    let first = put(&store, "w/a", "1").await;
    let mut watch = store.watch(KeyRange::prefix("w/"), first.next());
    watch.next().await.unwrap().unwrap();
    etcd.stop(false);
    etcd.restart();
    // Before the watch is back: it is polled only below.
    let other = EtcdStore::new(etcd.settings());
    put_surely(&other, "w/a", "2").await;
    let last = put_surely(&other, "w/a", "3").await;
    etcd.client().await.compact(last.get() as i64, None).await.unwrap();
    assert!(matches!(next(&mut watch).await, Err(StoreError::Compacted)));
}

#[tokio::test(flavor = "multi_thread")]
async fn large_revisions_arrive_whole() {
    const KEYS: usize = 100;
    const ROUNDS: usize = 12;
    let etcd = Etcd::start();
    let store = store(&etcd);
    let mut revisions = Vec::new();
    for round in 0..ROUNDS {
        // 1.3 MB each: what a watch that begins before them gets is cut into many messages.
        let txn = (0..KEYS).fold(Txn::new(), |txn, i| txn.put(format!("w/{i}"), vec![round as u8; 13_000]));
        revisions.push(store.txn(txn).await.unwrap().revision);
    }
    let mut watch = store.watch(KeyRange::prefix("w/"), Revision::default());
    for (round, revision) in revisions.into_iter().enumerate() {
        let batch = next(&mut watch).await.unwrap();
        assert_eq!((batch.revision, batch.events.len()), (revision, KEYS));
        assert!(batch.events.iter().all(|e| matches!(e, Event::Put(kv) if kv.value[0] == round as u8)));
    }
    let gone = store
        .txn(Txn { success: vec![crate::cluster::store::Op::Delete(KeyRange::prefix("w/"))], ..Txn::new() });
    assert_eq!(gone.await.unwrap().results[0].len(), KEYS);
    assert_eq!(next(&mut watch).await.unwrap().events.len(), KEYS);
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_are_too_large_say_so() {
    let etcd = Etcd::start();
    let store = store(&etcd);
    for values in [2, 3] {
        let txn = (0..values).fold(Txn::new(), |txn, i| txn.put(format!("k{i}"), vec![0; VALUE_BYTES_MAX]));
        let said = store.txn(txn).await.unwrap_err();
        assert!(matches!(said, StoreError::Invalid(_)), "{said}");
        assert!(said.to_string().contains("--max-request-bytes"), "{said}");
    }
    assert!(store.txn(Txn::new().put("k", vec![0; VALUE_BYTES_MAX])).await.unwrap().succeeded);
    assert!(matches!(store.range(KeyRange::between("b", "a"), 0).await, Err(StoreError::Invalid(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_member_that_never_answers_is_noticed() {
    let etcd = Etcd::start();
    let store = EtcdStore::with_retry(etcd.settings(), Duration::from_secs(4));
    let before = put(&store, "w/a", "0").await;
    let mut watch = store.watch(KeyRange::prefix("w/"), before.next());
    watch.next().await.unwrap().unwrap();
    etcd.freeze();
    // Sent on a connection that was good: nobody knows.
    let begun = Instant::now();
    let outcome = store.txn(Txn::new().put("w/a", "1")).await;
    assert!(matches!(outcome, Err(StoreError::OutcomeUnknown(_))), "{outcome:?}");
    assert!(begun.elapsed() < Duration::from_secs(40), "{:?}", begun.elapsed());
    assert!(!store.reachable());
    // A connection that cannot be made: nothing happened.
    let begun = Instant::now();
    let outcome = store.txn(Txn::new().put("w/b", "1")).await;
    assert!(matches!(outcome, Err(StoreError::Unavailable(_))), "{outcome:?}");
    assert!(matches!(get(&store, "w/a").await, Err(StoreError::Unavailable(_))));
    assert!(begun.elapsed() < Duration::from_secs(100), "{:?}", begun.elapsed());
    // The watch waits in silence, and holds up nobody while it is not looked at.
    assert!(tokio::time::timeout(Duration::from_secs(4), next(&mut watch)).await.is_err());
    etcd.thaw();
    let revision = put_surely(&store, "w/end", "").await;
    let mut seen = next(&mut watch).await.unwrap().revision;
    while seen < revision {
        seen = next(&mut watch).await.unwrap().revision;
    }
    assert_eq!(get(&store, "w/b").await.unwrap().1, None, "what was not sent did not happen");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_member_of_three_may_die_or_freeze() {
    let mut members = Etcd::members(3, None);
    // Clients that begin at each member.
    let stores: Vec<EtcdStore> = (0..3)
        .map(|i| {
            let mut all = settings(&members);
            all.members.rotate_left(i);
            EtcdStore::new(all)
        })
        .collect();
    let start = put_surely(&stores[0], "w/a", "start").await;
    let mut watches: Vec<WatchStream> =
        stores.iter().map(|store| store.watch(KeyRange::prefix("w/"), start.next())).collect();
    for watch in &mut watches {
        watch.next().await.unwrap().unwrap();
    }
    let mut expected = start;
    for round in ["kill the leader", "freeze a follower", "freeze the leader"] {
        let leads = leader(&members).await;
        let (victim, kill) = match round {
            "kill the leader" => (leads, true),
            "freeze a follower" => ((leads + 1) % 3, false),
            _ => (leads, false),
        };
        if kill {
            tokio::task::block_in_place(|| members[victim].stop(false));
        } else {
            members[victim].freeze();
        }
        for (i, store) in stores.iter().enumerate() {
            let begun = Instant::now();
            // What a caller with the patience of a heartbeat gets.
            let impatient = async {
                loop {
                    let txn = Txn::new().put("beat", i.to_string());
                    if let Ok(Ok(_)) = tokio::time::timeout(Duration::from_secs(1), store.txn(txn)).await {
                        return;
                    }
                }
            };
            tokio::time::timeout(PATIENCE, impatient).await.unwrap_or_else(|_| panic!("{round}: {i}"));
            println!("{round}: client {i} writes after {:?}", begun.elapsed());
            get(store, "w/a").await.unwrap();
            let revision = put_surely(store, "w/a", &format!("{round} {i}")).await;
            for watch in &mut watches {
                let mut seen = expected;
                while seen < revision {
                    let batch = next(watch).await.unwrap();
                    assert!(batch.revision > seen, "{round}: {:?} after {seen:?}", batch.revision);
                    seen = batch.revision;
                }
                assert_eq!(seen, revision);
            }
            expected = revision;
        }
        if kill {
            tokio::task::block_in_place(|| members[victim].restart());
        } else {
            members[victim].thaw();
        }
    }
    // Two gone: no majority, no answer; bounded, and mended by itself.
    members[0].freeze();
    members[1].freeze();
    let impatient = EtcdStore::with_retry(settings(&members), Duration::from_secs(2));
    let begun = Instant::now();
    assert!(get(&impatient, "w/a").await.is_err());
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    members[0].thaw();
    members[1].thaw();
    let revision = put_surely(&stores[0], "w/a", "end").await;
    for watch in &mut watches {
        while next(watch).await.unwrap().revision < revision {}
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn another_etcd_is_not_taken_for_ours() {
    let one = Etcd::start();
    let other = Etcd::start();
    // Two that have nothing to do with each other in one address: the one that answered first is ours.
    let both = EtcdSettings { members: vec![one.member(), other.member()], ..one.settings() };
    let both = EtcdStore::with_retry(both, Duration::from_millis(500));
    put_surely(&both, "mixed", "v").await;
    let mut foreign = other;
    let mut kept = one;
    if get(&store(&kept), "mixed").await.unwrap().1.is_none() {
        std::mem::swap(&mut kept, &mut foreign);
    }
    kept.stop(false);
    let refused = async {
        loop {
            let outcome = both.txn(Txn::new().put("astray", "v")).await;
            let why = outcome.expect_err("nobody of ours is there").to_string();
            if why.contains("another etcd") {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, refused).await.unwrap();
    assert_eq!(get(&store(&foreign), "astray").await.unwrap().1, None);
    kept.restart();
    put_surely(&both, "mixed", "w").await;

    // One that was made anew at the same address: its revisions mean nothing.
    let mut one = Etcd::start();
    let ours = store(&one);
    let revision = put(&ours, "k", "v").await;
    let mut watch = ours.watch(KeyRange::key("k"), revision.next());
    watch.next().await.unwrap().unwrap();
    one.stop(false);
    one.wipe();
    one.restart();
    let refused = async {
        loop {
            match ours.txn(Txn::new().when("k", Demand::Absent).put("k", "v")).await {
                Err(StoreError::Failed(why)) => return why,
                Err(StoreError::OutcomeUnknown(_) | StoreError::Unavailable(_)) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    let why = tokio::time::timeout(PATIENCE, refused).await.unwrap();
    assert!(why.contains("gone back"), "{why}");
    assert_eq!(get(&store(&one), "k").await.unwrap().1, None, "it was asked before it was written to");
    let ended = tokio::time::timeout(PATIENCE, async {
        loop {
            match watch.next().await {
                Some(Ok(batch)) => assert_eq!(batch.events, []),
                Some(Err(error)) => return error,
                None => panic!("it says why it ends"),
            }
        }
    });
    assert!(matches!(ended.await.unwrap(), StoreError::Failed(_) | StoreError::Compacted));
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_with_client_certificates() {
    let certificates = Certificates::make();
    let mut etcd = Etcd::start_with_tls(&certificates);
    let store = store(&etcd);
    let revision = put(&store, "w/a", "1").await;
    let mut watch = store.watch(KeyRange::prefix("w/"), revision);
    assert_eq!(next(&mut watch).await.unwrap().revision, revision);
    etcd.stop(false);
    etcd.restart();
    let again = put_surely(&store, "w/a", "2").await;
    assert_eq!(next(&mut watch).await.unwrap().revision, again);
    let refused = async |settings: EtcdSettings| {
        let store = EtcdStore::with_retry(settings, Duration::from_secs(2));
        let outcome = get(&store, "w/a").await;
        let Err(StoreError::Unavailable(why)) = outcome else { panic!("{outcome:?}") };
        why
    };
    let files = certificates.client();
    let with = |tls| EtcdSettings { tls, ..etcd.settings() };
    let wrong_ca = settings::TlsFiles { ca: Some(certificates.file("other-ca.pem")), ..files.clone() };
    let why = refused(with(Some(wrong_ca))).await;
    assert!(why.contains("certificate"), "{why}");
    // Nobody we know, no certificate, no TLS.
    refused(with(Some(settings::TlsFiles { client: None, ..files }))).await;
    refused(with(None)).await;
    let garbage = settings::TlsFiles { ca: Some(certificates.file("ext")), client: None };
    let said = with(Some(garbage)).check_files();
    assert!(matches!(said, Err(StoreError::Invalid(_))), "{said:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_not_fit_is_said_to_whoever_has_little_patience() {
    // What a node gives its first call; the store's own patience is longer.
    const LITTLE: Duration = Duration::from_secs(3);
    let certificates = Certificates::make();
    let secure = Etcd::start_with_tls(&certificates);
    let plain = Etcd::start();
    let files = certificates.client();
    let other_ca = settings::TlsFiles { ca: Some(certificates.file("other-ca.pem")), ..files.clone() };
    let no_certificate = settings::TlsFiles { client: None, ..files.clone() };
    // Signed by somebody whom etcd does not know.
    let stranger = settings::TlsFiles {
        client: Some((certificates.file("other-ca.pem"), certificates.file("other-ca.key"))),
        ..files.clone()
    };
    for (what, etcd, tls, expected) in [
        ("another CA", &secure, Some(other_ca), "--meta-ca-file"),
        ("no certificate", &secure, Some(no_certificate), "--meta-cert-file"),
        ("a stranger's certificate", &secure, Some(stranger), "--meta-cert-file"),
        ("no TLS to TLS", &secure, None, "write etcds://"),
        ("TLS to no TLS", &plain, Some(files), "write etcd://"),
    ] {
        let store = EtcdStore::new(EtcdSettings { tls, ..etcd.settings() });
        assert_eq!(store.troubles(), None);
        // As a node does, until the machine was quick enough once.
        let end = clock::monotonic() + PATIENCE;
        let why = loop {
            let why = match tokio::time::timeout(LITTLE, get(&store, "w/a")).await {
                Ok(Err(StoreError::Unavailable(why))) => why,
                Ok(other) => panic!("{what}: {other:?}"),
                Err(_) => store.troubles().unwrap_or_default(),
            };
            if why.contains(expected) || clock::monotonic() > end {
                break why;
            }
        };
        println!("{what}: {why}");
        assert!(why.starts_with(&etcd.member()), "{what}: {why}");
        assert!(why.contains(expected), "{what}: {why}");
        // It is remembered as well.
        let kept = store.troubles().unwrap_or_default();
        assert!(kept.contains(expected), "{what}: {kept}");
        assert!(!store.reachable());
    }
    // One that is not there is waited for, and named.
    let absent = EtcdSettings { members: vec!["127.0.0.1:1".into()], ..plain.settings() };
    let absent = EtcdStore::new(absent);
    assert!(tokio::time::timeout(LITTLE, get(&absent, "w/a")).await.is_err(), "it is waited for");
    let kept = absent.troubles().unwrap();
    assert!(kept.starts_with("127.0.0.1:1: not connected: ") && kept.contains("refused"), "{kept}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reason_ends_when_the_member_answers() {
    let mut etcd = Etcd::start();
    let store = EtcdStore::with_retry(etcd.settings(), Duration::from_millis(300));
    put(&store, "k", "v").await;
    etcd.stop(false);
    assert!(get(&store, "k").await.is_err());
    let kept = store.troubles().unwrap();
    assert!(kept.contains(&etcd.member()), "{kept}");
    etcd.restart();
    put_surely(&store, "k", "w").await;
    assert_eq!(store.troubles(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_member_is_asked_for_itself() {
    let mut members = Etcd::members(3, None);
    let stranger = Etcd::start();
    let all = EtcdSettings {
        members: members.iter().chain([&stranger]).map(Etcd::member).collect(),
        ..members[0].settings()
    };
    let store = EtcdStore::new(all.clone());
    let dead = 1;
    members[dead].stop(false);
    // The others may have to elect a leader.
    let end = clock::monotonic() + PATIENCE;
    let asked = loop {
        let asked = store.members().await;
        let answers = asked.iter().filter(|(_, said)| said.is_ok()).count();
        if answers == 3 {
            break asked;
        }
        assert!(clock::monotonic() < end, "{asked:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(
        asked.iter().map(|(member, _)| member).collect::<Vec<_>>(),
        all.members.iter().collect::<Vec<_>>()
    );
    let ids: Vec<Option<u64>> = asked.iter().map(|(_, said)| said.as_ref().ok().map(|h| h.etcd_id)).collect();
    assert!(ids[0].is_some() && ids[0] == ids[2] && ids[dead].is_none(), "{ids:?}");
    assert!(ids[3].is_some() && ids[3] != ids[0], "{ids:?}");
    let Err(StoreError::Unavailable(why)) = &asked[dead].1 else { panic!("{asked:?}") };
    assert!(why.contains("not connected"), "{why}");
    let Ok(health) = &asked[0].1 else { panic!("{asked:?}") };
    assert_eq!((&health.member, health.out_of_space), (&members[0].member(), Some(false)));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quota_that_is_used_up_is_told_and_mends() {
    let etcd = Etcd::start_with(&["--quota-backend-bytes", "6000000"]);
    let store = store(&etcd);
    let first = put(&store, "w/small", "1").await;
    let mut watch = store.watch(KeyRange::prefix("w/"), first.next());
    watch.next().await.unwrap().unwrap();
    // Old values count until they are compacted.
    let mut refused = None;
    for _ in 0..20 {
        let txn = Txn::new().put("large", vec![7; VALUE_BYTES_MAX - 1024]);
        if let Err(error) = store.txn(txn).await {
            refused = Some(error);
            break;
        }
        // etcd knows the size of its database as of its last commit, every 100 ms.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    let refused = refused.expect("the quota is used up");
    // The first one may have been made.
    assert!(
        matches!(&refused, StoreError::OutcomeUnknown(why) if why.contains("quota is used up")),
        "{refused}"
    );
    // From then on nothing happens, it is said at once, and it is something that is worth another attempt.
    let begun = Instant::now();
    for _ in 0..3 {
        let refused = store.txn(Txn::new().put("w/small", "2")).await.unwrap_err();
        assert!(
            matches!(&refused, StoreError::Unavailable(why) if why.contains("alarm disarm")),
            "{refused}"
        );
        let told = shardfs_proto::types::Error::from(refused);
        assert_eq!(told.reason(), shardfs_proto::types::Reason::Unavailable);
    }
    let lease = store.lease_grant(Duration::from_secs(60)).await;
    assert!(matches!(lease, Err(StoreError::Unavailable(_))), "{lease:?}");
    assert!(begun.elapsed() < Duration::from_secs(15), "{:?}", begun.elapsed());
    // It is no trouble of the connection: what takes no room goes on.
    assert!(store.reachable());
    assert_eq!(store.troubles(), None);
    assert_eq!(get(&store, "w/small").await.unwrap().1.unwrap().version, 1, "nothing happened");
    assert_eq!(store.health().await.unwrap().out_of_space, Some(true));
    let revision = store.txn(Txn::new().delete("w/small")).await.unwrap().revision;
    let seen = next(&mut watch).await.unwrap();
    assert_eq!((seen.revision, seen.events), (revision, vec![Event::Delete("w/small".into())]));
    // As an operator mends it.
    let mut admin = etcd.client().await;
    let physical = CompactionOptions::new().with_physical();
    admin.compact(revision.get() as i64, Some(physical)).await.unwrap();
    admin.defragment().await.unwrap();
    let alarms = admin.alarm(AlarmAction::Get, AlarmType::None, None).await.unwrap().0.alarms;
    for alarm in alarms {
        let mut of_member = AlarmOptions::new();
        of_member.with_member(alarm.member_id);
        admin.alarm(AlarmAction::Deactivate, AlarmType::Nospace, Some(of_member)).await.unwrap();
    }
    let revision = put_surely(&store, "w/small", "3").await;
    assert_eq!(next(&mut watch).await.unwrap().revision, revision);
    put(&store, "w/small", "4").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn users_passwords_and_roles() {
    let mut etcd = Etcd::start();
    let mut admin = etcd.client().await;
    admin.user_add("root", "root-secret", None).await.unwrap();
    admin.user_grant_role("root", "root").await.unwrap();
    admin.user_add("shardfs", "geheim", None).await.unwrap();
    admin.role_add("shardfs").await.unwrap();
    let keys = Permission::read_write("shardfs/").with_range_end("shardfs0");
    admin.role_grant_permission("shardfs", keys).await.unwrap();
    admin.user_grant_role("shardfs", "shardfs").await.unwrap();

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "geheim\n").unwrap();
    let user = |password_file: &std::path::Path| {
        Some(User { name: "shardfs".into(), password_file: Some(password_file.to_owned()) })
    };
    let impatient =
        |user| EtcdStore::with_retry(EtcdSettings { user, ..etcd.settings() }, Duration::from_secs(5));
    let refused = async |store: EtcdStore, expected: &str| {
        let outcome = get(&store, "shardfs/cluster").await;
        let Err(StoreError::Invalid(why)) = outcome else { panic!("{outcome:?}") };
        assert!(why.contains(expected), "{why}");
    };
    // A user where none is wanted says what is wrong.
    refused(impatient(user(file.path())), "etcdctl auth enable").await;
    admin.auth_enable().await.unwrap();

    let store = EtcdStore::new(EtcdSettings { user: user(file.path()), ..etcd.settings() });
    let revision = put(&store, "shardfs/a", "1").await;
    let mut watch = store.watch(KeyRange::prefix("shardfs/"), revision);
    assert_eq!(next(&mut watch).await.unwrap().revision, revision);
    let lease = store.lease_grant(Duration::from_secs(60)).await.unwrap();
    store.txn(Txn::new().put_leased("shardfs/l", "1", lease)).await.unwrap();
    store.lease_keep_alive(lease).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().events.len(), 1);

    refused(impatient(None), "--meta-user").await;
    let wrong = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(wrong.path(), "falsch").unwrap();
    refused(impatient(user(wrong.path())), "--meta-password-file").await;
    // Other keys are not its own.
    let outcome = store.txn(Txn::new().put("other", "1")).await;
    assert!(matches!(&outcome, Err(StoreError::Invalid(why)) if why.contains("shardfs/*")), "{outcome:?}");
    let mut foreign = store.watch(KeyRange::prefix("other/"), revision);
    let ended = async {
        loop {
            match foreign.next().await.expect("it says why it ends") {
                Ok(batch) => assert_eq!(batch.events, []),
                Err(error) => return error,
            }
        }
    };
    let ended = tokio::time::timeout(PATIENCE, ended).await.unwrap();
    assert!(matches!(ended, StoreError::Invalid(_)), "{ended}");

    // A restart forgets the tokens that were given out; a new password is read when it is needed.
    etcd.stop(false);
    etcd.restart();
    let revision = put_surely(&store, "shardfs/a", "2").await;
    assert_eq!(next(&mut watch).await.unwrap().revision, revision);
    let options = etcd_client::ConnectOptions::new().with_user("root", "root-secret");
    let mut admin = etcd_client::Client::connect([etcd.member()], Some(options)).await.unwrap();
    std::fs::write(file.path(), "neu").unwrap();
    admin.user_change_password("shardfs", "neu").await.unwrap();
    etcd.stop(true);
    etcd.restart();
    let revision = put_surely(&store, "shardfs/a", "3").await;
    assert_eq!(next(&mut watch).await.unwrap().revision, revision);

    // A change of roles while it runs.
    let mut admin = etcd_client::Client::connect(
        [etcd.member()],
        Some(etcd_client::ConnectOptions::new().with_user("root", "root-secret")),
    )
    .await
    .unwrap();
    let options = RoleRevokePermissionOptions::new().with_range_end("shardfs0");
    admin.role_revoke_permission("shardfs", "shardfs/", Some(options)).await.unwrap();
    let outcome = get(&store, "shardfs/a").await;
    assert!(matches!(outcome, Err(StoreError::Invalid(_))), "{outcome:?}");
}
