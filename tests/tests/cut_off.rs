//! Time without service when the machine of a primary is cut off from the network: nobody hears of it, and it hears of nobody,
//! while its processes go on. `shardfs bench failover` kills and freezes nodes; it has no links that could be cut.
//!
//! Prints figures, and asserts no time: only that every value that was put is there.

#![allow(clippy::unwrap_used)]

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures::StreamExt;
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::VolumeInfo;
use shardfs_proto::types::op::{Durability, PutOptions};
use shardfs_proto::types::{Key, ShardId, ShardName, VolumeId, clock};
use shardfs_tests::cluster::eventually;
use shardfs_tests::{Cluster, Options, block_on};

/// Says how often, if it is set.
const RUNS_VARIABLE: &str = "SHARDFS_CUT_RUNS";
/// How often if it is not.
const RUNS: usize = 10;
/// How often a run is made anew that something else came into.
const ATTEMPTS_MAX: u32 = 5;
/// How long the writer writes before a cut.
const WARM_UP: Duration = Duration::from_millis(400);
/// How long all is left alone once it is in order: backups attach volumes then.
const SETTLE: Duration = Duration::from_millis(1500);
/// How long it may take until the volume is served again, or everything in order.
const RECOVERY_MAX: Duration = Duration::from_secs(60);
/// How often is looked.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// Bytes of a value.
const VALUE_BYTES: usize = 100;
/// Values that are read at a time.
const BATCH: usize = 1000;
/// Width of a histogram's bars.
const BAR_CHARS: usize = 40;

/// A moment, by both clocks.
#[derive(Clone, Copy, Debug)]
struct Moment {
    at: Instant,
    wall_ns: u64,
}

impl Moment {
    fn now() -> Moment {
        let wall = clock::now();
        let wall_ns = u64::try_from(wall.seconds()).unwrap() * 1_000_000_000 + u64::from(wall.nanos());
        Moment { at: Instant::now(), wall_ns }
    }
}

/// The writer's longest wait: the answers between which it was.
#[derive(Clone, Copy, Debug)]
struct Gap {
    from: Moment,
    to: Moment,
}

impl Gap {
    fn length(&self) -> Duration {
        self.to.at - self.from.at
    }
}

/// One cut: ms.
#[derive(Clone, Copy, Debug)]
struct Run {
    /// The writer went without an answer.
    total: f64,
    /// From its last answer until a backup began to take the volume.
    detection: f64,
    /// From then until it had its next one.
    takeover: f64,
}

/// A phase's name, and its figure of a run.
type Phase = (&'static str, fn(&Run) -> f64);

/// What is being measured.
struct Bench<'a> {
    cluster: &'a Cluster,
    client: Client,
    shard: ShardId,
    volume: VolumeId,
    /// Values that were put and acknowledged: 0, 1, and so on.
    acknowledged: Arc<AtomicU64>,
}

fn key(number: u64) -> Key {
    Key::new(format!("k{number}")).unwrap()
}

fn value(number: u64) -> Bytes {
    format!("{number:0>VALUE_BYTES$}").into()
}

/// Puts one value after the other until it is told to stop. Every one succeeds.
async fn write(client: Client, shard: ShardId, acknowledged: Arc<AtomicU64>, stop: Arc<AtomicBool>) -> Gap {
    let mut last: Option<Moment> = None;
    let mut longest: Option<Gap> = None;
    while !stop.load(Ordering::SeqCst) {
        let number = acknowledged.load(Ordering::SeqCst);
        let put = client.put(shard, key(number), value(number), PutOptions::default(), Durability::Sync);
        put.await.unwrap_or_else(|e| panic!("Put {number}: {e}"));
        acknowledged.fetch_add(1, Ordering::SeqCst);
        let now = Moment::now();
        if let Some(last) = last {
            let gap = Gap { from: last, to: now };
            if longest.is_none_or(|longest| gap.length() > longest.length()) {
                longest = Some(gap);
            }
        }
        last = Some(now);
    }
    longest.expect("more than one value was put")
}

fn in_order(cluster: &Cluster) {
    eventually(RECOVERY_MAX, || {
        let status = cluster.cli_json(&["status"]);
        if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
    });
}

impl Bench<'_> {
    async fn volume(&self) -> VolumeInfo {
        let volumes = self.client.volumes().await.unwrap();
        volumes.into_iter().find(|volume| volume.id == self.volume).unwrap()
    }

    /// One cut, measured; anew if the volume moved for another reason meanwhile.
    async fn run(&self) -> Run {
        for _ in 0..ATTEMPTS_MAX {
            if let Some(run) = self.attempt().await {
                return run;
            }
        }
        panic!("the volume moved {ATTEMPTS_MAX} times while it was measured");
    }

    async fn attempt(&self) -> Option<Run> {
        in_order(self.cluster);
        tokio::time::sleep(SETTLE).await;
        let stop = Arc::new(AtomicBool::new(false));
        let writer =
            tokio::spawn(write(self.client.clone(), self.shard, self.acknowledged.clone(), stop.clone()));
        tokio::time::sleep(WARM_UP).await;
        let before = self.volume().await;
        let victim = before.primary.clone().expect("the volume has a primary");
        let network = self.cluster.network();
        network.cut_off(victim.as_str());
        let cut = Instant::now();
        // What is answered once the volume has moved is answered by the new primary.
        let mut moved: Option<(VolumeInfo, u64)> = None;
        let after = loop {
            assert!(cut.elapsed() < RECOVERY_MAX, "the volume is not served within {RECOVERY_MAX:?}");
            assert!(!writer.is_finished(), "the writer has failed");
            let count = self.acknowledged.load(Ordering::SeqCst);
            match moved {
                Some((after, then)) if count > then => break after,
                Some(_) => {}
                None => {
                    let volume = self.volume().await;
                    if volume.epoch != before.epoch {
                        moved = Some((volume, self.acknowledged.load(Ordering::SeqCst)));
                    }
                }
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        };
        stop.store(true, Ordering::SeqCst);
        let gap = writer.await.unwrap();
        network.reconnect(victim.as_str());
        let winner = after.primary.clone().expect("the volume has a primary");
        let nodes = self.client.nodes().await.unwrap();
        let winner = nodes.into_iter().find(|node| node.id == winner).unwrap();
        let status = self.client.node_status(&winner.endpoints).await.unwrap();
        let served = status.volumes.into_iter().find(|v| v.id == self.volume && v.epoch == after.epoch);
        let begun_ns = served.and_then(|volume| volume.takeover)?.begun_ns;
        // It moved before the cut, or an earlier hiccup was longer than the cut.
        if after.epoch != before.epoch.next()
            || gap.from.at > cut
            || gap.to.at < cut
            || !(gap.from.wall_ns..=gap.to.wall_ns).contains(&begun_ns)
        {
            return None;
        }
        let ms = |from: u64, to: u64| (to - from) as f64 / 1e6;
        Some(Run {
            total: gap.length().as_secs_f64() * 1e3,
            detection: ms(gap.from.wall_ns, begun_ns),
            takeover: ms(begun_ns, gap.to.wall_ns),
        })
    }

    /// Every value that was acknowledged is there.
    async fn check(&self) {
        let count = self.acknowledged.load(Ordering::SeqCst);
        let numbers: Vec<u64> = (0..count).collect();
        for numbers in numbers.chunks(BATCH) {
            let keys = numbers.iter().copied().map(key).collect();
            let mut answers = std::pin::pin!(self.client.batch_get(self.shard, keys));
            let mut found = 0;
            while let Some(answer) = answers.next().await {
                let (at, outcome) = answer.unwrap();
                let number = numbers[at];
                let (_, data) = outcome.unwrap_or_else(|e| panic!("value {number} was acknowledged: {e}"));
                assert!(data == value(number), "value {number}: other bytes");
                found += 1;
            }
            assert_eq!(found, numbers.len());
        }
        println!("{count} values put and found");
    }
}

/// The value below which a share of the others lie.
fn quantile(sorted: &[f64], share: f64) -> f64 {
    sorted[(share * (sorted.len() - 1) as f64).round() as usize]
}

/// In the form of `shardfs bench failover`.
fn print(runs: &[Run]) {
    println!("\nprimary cut off: {} runs, 1 shards on the volume; ms", runs.len());
    println!("{:24}{:>9}{:>9}{:>9}{:>9}", "", "min", "median", "p90", "max");
    let sorted = |of: fn(&Run) -> f64| {
        let mut values: Vec<f64> = runs.iter().map(of).collect();
        values.sort_unstable_by(f64::total_cmp);
        values
    };
    let phases: [Phase; 3] = [
        ("time without service", |run| run.total),
        ("  detection", |run| run.detection),
        ("  takeover, first write", |run| run.takeover),
    ];
    for (name, of) in phases {
        let values = sorted(of);
        let [min, median, p90, max] = [0.0, 0.5, 0.9, 1.0].map(|share| quantile(&values, share));
        println!("{name:24}{min:9.0}{median:9.0}{p90:9.0}{max:9.0}");
    }
    let totals = sorted(|run| run.total);
    let max = quantile(&totals, 1.0);
    let widths = [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0];
    let width = widths.into_iter().find(|width| max / width <= 15.0).unwrap_or(max / 15.0);
    let mut counts = vec![0usize; (max / width) as usize + 1];
    for total in &totals {
        counts[(total / width) as usize] += 1;
    }
    let most = counts.iter().copied().max().unwrap();
    let bars = counts.iter().enumerate().skip_while(|(_, count)| **count == 0);
    for (number, count) in bars {
        let from = number as f64 * width;
        let bar = "#".repeat((count * BAR_CHARS).div_ceil(most));
        println!("{from:>7.0} - {:>5.0} ms {count:>4} {bar}", from + width);
    }
}

#[test]
#[ignore = "two minutes, prints figures: SHARDFS_CUT_RUNS says how often (10)"]
fn time_without_service_when_a_primary_is_cut_off() {
    let runs = std::env::var(RUNS_VARIABLE).map_or(RUNS, |runs| match runs.parse::<usize>() {
        Ok(runs) if runs > 0 => runs,
        _ => panic!("{RUNS_VARIABLE}={runs}: expected a number of runs, 1 or more"),
    });
    let (cluster, _etcd) = Cluster::start_in_namespaces(&Options::default());
    cluster.shard("cut-off");
    block_on(async {
        let client = cluster.client();
        let info = client.shard_by_name(&ShardName::new("cut-off").unwrap()).await.unwrap();
        let bench = Bench {
            cluster: &cluster,
            client,
            shard: info.id,
            volume: info.location.volume,
            acknowledged: Arc::default(),
        };
        let mut measured = Vec::new();
        for number in 0..runs {
            let run = bench.run().await;
            println!("{number:3}: {:.0} ms, of which detection {:.0}", run.total, run.detection);
            measured.push(run);
        }
        in_order(&cluster);
        bench.check().await;
        print(&measured);
        bench.client.close().await;
    });
    cluster.assert_clean("cut-off");
}
