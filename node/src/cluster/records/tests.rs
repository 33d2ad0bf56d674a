//! Records are what they were, byte for byte, and what 0.1 wrote is read.

use super::*;

fn shard() -> ShardRecord {
    ShardRecord {
        v: FORMAT,
        id: ShardId::new(7).unwrap(),
        name: ShardName::new("a b").unwrap(),
        owner: ClientId::new("me").unwrap(),
        volume: VolumeId::new("vol-1").unwrap(),
        state: StateWord::ReadOnly,
        limit_bytes: None,
        created: Timestamp::new(5, 6).unwrap(),
        request_id: "r".into(),
        mode: 0o755,
        uid: 1,
        gid: 2,
        purged: false,
        snapshot_of: None,
        copy_of: None,
        rollback: None,
    }
}

#[test]
fn a_shard_has_this_record() {
    let golden = concat!(
        r#"{"v":1,"id":7,"name":"a b","owner":"me","volume":"vol-1","state":"read-only","limit_bytes":null,"#,
        r#""created":{"seconds":5,"nanos":6},"request_id":"r","mode":493,"uid":1,"gid":2,"purged":false}"#
    );
    assert_eq!(encode(&shard()), golden);
    assert_eq!(decode::<ShardRecord>(b"k", golden.as_bytes()).unwrap(), shard());
}

#[test]
fn a_snapshot_says_of_what_and_has_a_name_below_it() {
    let of = ShardId::new(3).ok();
    let snapshot = ShardRecord { snapshot_of: of, copy_of: of, ..shard() };
    assert_eq!(snapshot.name_key(), "shardfs/snapshots/0000000003/a b");
    assert_eq!(shard().name_key(), "shardfs/names/me/a b");
    let text = String::from_utf8(encode(&snapshot).to_vec()).unwrap();
    assert!(text.ends_with(r#""purged":false,"snapshot_of":3,"copy_of":3}"#), "{text}");
    assert_eq!(decode::<ShardRecord>(b"k", text.as_bytes()).unwrap(), snapshot);
    let rollback = |done| Rollback { snapshot: ShardId::new(9).unwrap(), request_id: "q".into(), done };
    let begun = ShardRecord { rollback: Some(rollback(false)), ..shard() };
    assert!(begun.is_rolling_back() && !shard().is_rolling_back());
    let text = String::from_utf8(encode(&begun).to_vec()).unwrap();
    assert!(text.ends_with(r#""rollback":{"snapshot":9,"request_id":"q","done":false}}"#), "{text}");
    assert!(!ShardRecord { rollback: Some(rollback(true)), ..shard() }.is_rolling_back());
}

#[test]
fn unknown_fields_pass_and_newer_formats_do_not() {
    let more =
        String::from_utf8(encode(&shard()).to_vec()).unwrap().replace(r#""v":1"#, r#""v":1,"later":true"#);
    assert_eq!(decode::<ShardRecord>(b"k", more.as_bytes()).unwrap(), shard());
    let newer = more.replace(r#""v":1"#, r#""v":3"#);
    let error = decode::<ShardRecord>(b"k", newer.as_bytes()).unwrap_err();
    assert_eq!(error.reason(), shardfs_proto::types::Reason::Unsupported);
    assert!(error.message().contains("format 3") && error.message().contains("update"), "{error}");
    assert!(decode::<ShardRecord>(b"k", b"{}").is_err());
    assert!(decode::<ShardRecord>(b"k", b"\xff").is_err());
}

#[test]
fn volumes_of_before_have_no_predecessors_and_need_a_fence() {
    let before =
        br#"{"v":1,"id":"vol-1","provider":"loop","source":"/x","size_bytes":7,"primary":"a","epoch":3}"#;
    let mut record: VolumeRecord = decode(b"k", before).unwrap();
    assert!(!record.allow_unfenced && !record.handed_over && !record.unmounted);
    assert!(record.predecessors.is_empty());
    for epoch in 4..20 {
        record.predecessors = record.predecessors_of_next();
        record.epoch = Epoch::new(epoch).unwrap();
    }
    assert_eq!(record.predecessors.len(), PREDECESSORS_MAX);
    let latest = Predecessor { node: NodeId::new("a").unwrap(), epoch: Epoch::new(18).unwrap() };
    assert_eq!(record.predecessors[0], latest);
    record.primary = None;
    assert_eq!(record.predecessors_of_next(), record.predecessors);
}

#[test]
fn keys_sort_as_ids_and_heartbeats_are_volatile() {
    assert!(shard_key(ShardId::new(9).unwrap()) < shard_key(ShardId::new(10).unwrap()));
    assert_eq!(HEARTBEATS.as_bytes(), VOLATILE_PREFIX);
}

/// Keys and records as version 0.1.0 wrote them.
const OF_0_1: &str = include_str!("0.1.0.json");

/// Reads a record of 0.1.0's and writes it again. That version reads it still: what it knows is there and as it was.
fn reread<T: Serialize + DeserializeOwned>(key: &str, written: &serde_json::Value) -> T {
    let bytes = serde_json::to_vec(written).unwrap();
    let record: T = decode(key.as_bytes(), &bytes).unwrap_or_else(|e| panic!("{e}"));
    let again: serde_json::Value = serde_json::from_slice(&encode(&record)).unwrap();
    for (field, value) in written.as_object().unwrap() {
        assert_eq!(again.get(field), Some(value), "{key}: {field}");
    }
    record
}

#[test]
fn what_0_1_wrote_is_read_and_written_so_that_0_1_reads_it() {
    let all: serde_json::Map<String, serde_json::Value> = serde_json::from_str(OF_0_1).unwrap();
    let mut shards = Vec::new();
    for (key, written) in &all {
        let place = key.strip_prefix(PREFIX).unwrap().split('/').next().unwrap();
        let own_key = match place {
            "cluster" => {
                reread::<ClusterRecord>(key, written);
                CLUSTER_KEY.to_owned()
            }
            "nodes" => {
                let record: NodeRecord = reread(key, written);
                assert!(!record.cloud, "it uses no cloud");
                node_key(&record.id)
            }
            "deaths" => {
                reread::<DeathRecord>(key, written);
                death_key(&NodeId::new("node-2").unwrap())
            }
            "volumes" => {
                let record: VolumeRecord = reread(key, written);
                assert!(record.iops == 0 && !record.retired && record.predecessors.len() == 2);
                volume_key(&record.id)
            }
            "shards" => {
                let record: ShardRecord = reread(key, written);
                assert_eq!((record.snapshot_of, record.copy_of, &record.rollback), (None, None, &None));
                assert_eq!(record.clone().with_format(), record, "its format stays");
                shards.push(record.state);
                shard_key(record.id)
            }
            "views" => {
                let record: views::ViewRecord = reread(key, written);
                views::view_key(&record.volume, record.shard)
            }
            "pins" => {
                let record: views::PinRecord = reread(key, written);
                views::pin_key(&record.volume, &record.node)
            }
            other => panic!("what is {other}?"),
        };
        assert_eq!(key, &own_key);
    }
    assert_eq!(all.len(), 9);
    assert_eq!(shards, [StateWord::Active, StateWord::ReadOnly, StateWord::Deleted]);
}

#[test]
fn what_0_1_would_misread_has_a_format_that_it_does_not_know() {
    let of = ShardId::new(3).ok();
    let format = |record: ShardRecord| record.with_format().v;
    let copy = |state| ShardRecord { state, copy_of: of, ..shard() };
    for state in [StateWord::Creating, StateWord::ReadOnly, StateWord::Deleted] {
        assert_eq!(format(ShardRecord { snapshot_of: of, ..copy(state) }), 2, "a snapshot");
    }
    assert_eq!(format(copy(StateWord::Creating)), 2, "made later it would be empty");
    for state in [StateWord::Active, StateWord::ReadOnly, StateWord::Deleted] {
        assert_eq!(format(copy(state)), 1, "a clone is a shard like others");
    }
    let begun = Rollback { snapshot: ShardId::new(9).unwrap(), request_id: "q".into(), done: false };
    assert_eq!(
        format(ShardRecord { rollback: Some(begun), ..shard() }),
        1,
        "it holds the one content or the other"
    );
    let snapshot = ShardRecord { snapshot_of: of, ..copy(StateWord::ReadOnly) }.with_format();
    assert_eq!(decode::<ShardRecord>(b"k", &encode(&snapshot)).unwrap(), snapshot);
}
