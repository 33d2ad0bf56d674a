//! Time without service when a volume moves, in the phases that it is made of.
//!
//! A writer puts one value after the other, each synced, into a shard. Its node is killed, frozen or told to hand the volume
//! over; the time without service is the longest that the writer went without an answer. The phases in between are read
//! from the new primary's status, whose clock must be this machine's: the cluster is one of `dev up`.
//!
//! Every shard of the volume has a value, which is read at the end: none may be missing.
//!
//! What a run did to a node is undone before the next one, also if it fails. A fault after which the volume cannot move is refused
//! before anything is done.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use futures::StreamExt;
use serde::Serialize;
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::{ShardInfo, VolumeInfo};
use shardfs_proto::types::op::{Durability, PutOptions};
use shardfs_proto::types::{Key, NodeId, ShardId, VolumeId, clock};

use super::args::{FailoverArgs, Fault};
use super::environment::Environment;
use super::progress::Progress;
use super::report;
use super::stats::quantile;
use super::workspace::{self, Stop};
use crate::context::Context;
use crate::devcluster::control::{KillSignal, Request};
use crate::devcluster::launch;
use crate::devcluster::state::{Layout, VolumeKind};
use crate::failure::Failure;

/// How long the writer writes before a fault.
const WARM_UP: Duration = Duration::from_millis(400);
/// How long everything may take to be in order again.
const ORDER_WAIT_MAX: Duration = Duration::from_secs(60);
/// How long all is left alone once it is in order: backups attach volumes then.
const SETTLE: Duration = Duration::from_millis(1500);
/// How often is looked.
const LOOK_PAUSE: Duration = Duration::from_millis(20);
/// The same while nothing is measured: every look asks every node for everything.
const ORDER_LOOK_PAUSE: Duration = Duration::from_millis(250);
/// A frozen node stays so for that long after the volume is served again.
const FROZEN_AFTER: Duration = Duration::from_millis(300);
/// How often a run is made anew that something else came into.
const ATTEMPTS_MAX: u32 = 5;
/// Shards that are made, or read, at a time.
const MAKING_MAX: usize = 8;
/// Bytes of a value.
const VALUE_BYTES: usize = 100;
/// Width of a histogram's bars.
const BAR_CHARS: usize = 40;

/// One run: ms.
#[derive(Clone, Copy, Debug, Serialize)]
struct Run {
    /// The writer went without an answer.
    total: f64,
    /// From the last answer until a backup began to take the volume.
    detection: f64,
    /// Until the records said that it is the backup's.
    election: f64,
    /// Until the old primary could certainly not write any more.
    fence: f64,
    /// Until it was mounted.
    mount: f64,
    /// Until the shard was open: its log replayed.
    open: f64,
    /// Until the writer had its answer.
    first_write: f64,
}

/// A phase's name, and its figure of a run.
type Phase = (&'static str, fn(&Run) -> f64);

const PHASES: [Phase; 7] = [
    ("time without service", |r| r.total),
    ("  detection", |r| r.detection),
    ("  election", |r| r.election),
    ("  fence", |r| r.fence),
    ("  mount", |r| r.mount),
    ("  open", |r| r.open),
    ("  first write", |r| r.first_write),
];

#[derive(Serialize)]
struct Series {
    fault: &'static str,
    shards_on_volume: u32,
    runs_ms: Vec<Run>,
}

#[derive(Serialize)]
struct Document {
    environment: Environment,
    metadata_store: String,
    series: Vec<Series>,
}

/// The cluster under test.
struct Bench<'a> {
    layout: Layout,
    client: Client,
    shard: ShardId,
    volume: VolumeId,
    stop: &'a Stop,
}

/// Runs the command.
pub async fn run(args: &FailoverArgs, context: &Context, stop: &Stop, progress: &Progress) -> Result<()> {
    let layout = Layout::new(&context.dev_dir()?);
    let status = launch::status(&layout)
        .await
        .context("`bench failover` kills nodes: it wants a cluster of `shardfs dev up`, named by --dir")?;
    let client = context.client()?;
    let volumes = client.volumes().await.context("cannot look at the volumes")?;
    if let Some(refusal) = refusal(&args.fault, &volumes) {
        bail!(refusal);
    }
    progress.phase("making shards");
    let mut made = Vec::new();
    let measured = async {
        let (volume, there) = make_shards(&client, args.shards, stop, &mut made).await?;
        let (shard, idle) = there.split_first().context("no shard was made")?;
        let bench = Bench { layout, client: client.clone(), shard: *shard, volume, stop };
        let mut series = Vec::new();
        for fault in &args.fault {
            let mut runs = Vec::new();
            for number in 0..args.runs {
                stop.check()?;
                progress.phase(&format!("{}: run {} of {}", word(*fault), number + 1, args.runs));
                runs.push(bench.run(*fault).await.with_context(|| format!("{} run {number}", word(*fault)))?);
            }
            series.push(Series { fault: word(*fault), shards_on_volume: args.shards, runs_ms: runs });
        }
        progress.phase("reading what was written before");
        read_back(&client, idle).await?;
        anyhow::Ok(series)
    }
    .await;
    progress.phase("cleaning up");
    let deleting = made.iter().map(|shard| client.delete_shard(*shard, false));
    let deleted: Vec<_> = futures::stream::iter(deleting).buffer_unordered(MAKING_MAX).collect().await;
    progress.finish();
    let series = measured?;
    for outcome in deleted {
        outcome.with_context(|| {
            format!("cannot delete a shard named {}*: delete it yourself", workspace::NAME_PREFIX)
        })?;
    }
    let document =
        Document { environment: Environment::look(clock::now()), metadata_store: status.meta, series };
    let json = || serde_json::to_string_pretty(&document).context("the report as JSON");
    report::write(args.json.as_deref(), json, || text(&document))
}

/// Why a fault cannot be measured, if that is so. A folder is fenced by a lock, which a process keeps as long as it lives: one that
/// is frozen keeps it for good. A shard may come onto any of the volumes.
fn refusal(faults: &[Fault], volumes: &[VolumeInfo]) -> Option<Failure> {
    let folder = volumes.iter().find(|volume| volume.provider == VolumeKind::Dir.as_str())?;
    faults.contains(&Fault::Freeze).then(|| {
        Failure::usage(format!(
            "volume {} is of kind dir: a node that is frozen cannot be fenced from it, so no other node would take it, and the run \
             would wait in vain",
            folder.id
        ))
        .hint("leave that fault out with `--fault kill,promote`, or use a cluster that `shardfs dev up --volumes loop` made")
    })
}

/// Makes shards until one volume has as many as asked for, and puts a value into each of those; answers them. `made` has all, those
/// on other volumes too.
async fn make_shards(
    client: &Client,
    count: u32,
    stop: &Stop,
    made: &mut Vec<ShardId>,
) -> Result<(VolumeId, Vec<ShardId>)> {
    let name = workspace::unique_name();
    let new = |number: usize| {
        let name = format!("{name}-{number}");
        async move { workspace::new_shard(client, &name).await }
    };
    let first: ShardInfo = new(0).await?;
    made.push(first.id);
    let volume = first.location.volume.clone();
    let mut there = vec![first.id];
    while there.len() < count as usize {
        stop.check()?;
        // All of them are waited for, so that all are known and go again.
        let numbers = made.len()..made.len() + MAKING_MAX;
        let making = futures::future::join_all(numbers.map(new)).await;
        let shards: Vec<ShardInfo> = making.into_iter().filter_map(|shard| shard.ok()).collect();
        made.extend(shards.iter().map(|shard| shard.id));
        if shards.len() < MAKING_MAX {
            bail!("not all shards could be made: see `shardfs status`");
        }
        for shard in shards.iter().filter(|shard| shard.location.volume == volume) {
            put(client, shard.id, 0).await?;
            there.push(shard.id);
        }
    }
    Ok((volume, there))
}

/// Fails unless each of these shards, which nobody has written to since they were made, has its value.
async fn read_back(client: &Client, shards: &[ShardId]) -> Result<()> {
    let reading = shards.iter().map(|shard| async move {
        let (_, value) =
            client.get(*shard, &Key::new("k0")?).await.with_context(|| format!("shard {shard}"))?;
        anyhow::ensure!(value[..] == [0; VALUE_BYTES], "shard {shard}: its value is another one");
        anyhow::Ok(())
    });
    let read: Vec<Result<()>> =
        futures::stream::iter(reading.collect::<Vec<_>>()).buffer_unordered(MAKING_MAX).collect().await;
    read.into_iter().collect::<Result<()>>().context("what was written before the runs is not there")
}

async fn put(client: &Client, shard: ShardId, number: u64) -> Result<()> {
    let key = Key::new(format!("k{}", number % 64))?;
    let value = Bytes::from(vec![number as u8; VALUE_BYTES]);
    client.put(shard, key, value, PutOptions::default(), Durability::Sync).await?;
    Ok(())
}

/// The writer's longest wait: when it began (of the wall clock as well) and ended.
struct Gap {
    length: Duration,
    begun_ns: u64,
    ended_ns: u64,
}

/// Puts values until it is told to stop.
async fn write(client: Client, shard: ShardId, stop: Arc<AtomicBool>) -> Result<Gap> {
    put(&client, shard, 0).await?;
    let (mut last, mut last_ns) = (Instant::now(), now_ns());
    let mut gap = Gap { length: Duration::ZERO, begun_ns: last_ns, ended_ns: last_ns };
    for number in 1.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        put(&client, shard, number).await?;
        let (now, ns) = (Instant::now(), now_ns());
        if now - last > gap.length {
            gap = Gap { length: now - last, begun_ns: last_ns, ended_ns: ns };
        }
        (last, last_ns) = (now, ns);
    }
    Ok(gap)
}

impl Bench<'_> {
    async fn volume(&self) -> Result<VolumeInfo> {
        let volumes = self.client.volumes().await?;
        volumes.into_iter().find(|v| v.id == self.volume).context("the volume has gone")
    }

    /// Waits until every node is alive and serves what is its own.
    async fn in_order(&self) -> Result<()> {
        let begun = Instant::now();
        loop {
            self.stop.check()?;
            if self.is_in_order().await.unwrap_or(false) {
                break;
            }
            if begun.elapsed() > ORDER_WAIT_MAX {
                bail!(
                    "not all nodes are alive and in order after {} s: see `shardfs status`",
                    ORDER_WAIT_MAX.as_secs()
                );
            }
            tokio::time::sleep(ORDER_LOOK_PAUSE).await;
        }
        tokio::time::sleep(SETTLE).await;
        Ok(())
    }

    async fn is_in_order(&self) -> Result<bool> {
        for node in self.client.nodes().await? {
            if !node.alive {
                return Ok(false);
            }
            let status = self.client.node_status(&node.endpoints).await?;
            if status.volumes.iter().any(|v| !v.trouble.is_empty() || v.takeover.is_none()) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    async fn ask(&self, request: Request) -> Result<()> {
        launch::ask(&self.layout, &request).await?;
        Ok(())
    }

    /// One fault, measured; anew if the volume moved for another reason meanwhile.
    async fn run(&self, fault: Fault) -> Result<Run> {
        for _ in 0..ATTEMPTS_MAX {
            if let Some(run) = self.attempt(fault).await? {
                return Ok(run);
            }
        }
        bail!("the volume moved {ATTEMPTS_MAX} times while it was measured")
    }

    async fn attempt(&self, fault: Fault) -> Result<Option<Run>> {
        self.in_order().await?;
        let before = self.volume().await?;
        let victim = before.primary.clone().context("the volume has no primary")?;
        let stop = Arc::new(AtomicBool::new(false));
        let writer = tokio::spawn(write(self.client.clone(), self.shard, stop.clone()));
        tokio::time::sleep(WARM_UP).await;
        let moved = self.inflict(fault, &before, &victim).await;
        stop.store(true, Ordering::SeqCst);
        let gap = writer.await.context("the writer panicked")?;
        let undone = match fault {
            Fault::Kill | Fault::Freeze => self.ask(Request::Start { member: victim.to_string() }).await,
            Fault::Promote => Ok(()),
        };
        let after = moved?;
        let gap = gap.context("the writer")?;
        undone?;
        if after.epoch.get() != before.epoch.get() + 1 {
            return Ok(None);
        }
        let winner = after.primary.context("the volume has no primary")?;
        let nodes = self.client.nodes().await?;
        let node = nodes.iter().find(|n| n.id == winner).context("the new primary has gone")?;
        let status = self.client.node_status(&node.endpoints).await?;
        let times = status.volumes.iter().find(|v| v.id == self.volume && v.epoch == after.epoch);
        // It may have moved on since: the next attempt tells.
        let Some(times) = times.and_then(|v| v.takeover) else { return Ok(None) };
        // An earlier hiccup was longer than the move.
        if !(gap.begun_ns..=gap.ended_ns).contains(&times.mounted_ns) {
            return Ok(None);
        }
        let ms = |from: u64, to: u64| (to as f64 - from as f64).max(0.0) / 1e6;
        Ok(Some(Run {
            total: gap.length.as_secs_f64() * 1e3,
            detection: ms(gap.begun_ns, times.begun_ns),
            election: ms(times.begun_ns, times.elected_ns),
            fence: ms(times.elected_ns, times.fenced_ns),
            mount: ms(times.fenced_ns, times.mounted_ns),
            open: ms(times.mounted_ns, times.opened_ns),
            first_write: ms(times.opened_ns.max(times.mounted_ns), gap.ended_ns),
        }))
    }

    /// Does it; answers when the writer was answered by the new primary.
    async fn inflict(&self, fault: Fault, before: &VolumeInfo, victim: &NodeId) -> Result<VolumeInfo> {
        let member = victim.to_string();
        match fault {
            Fault::Kill => self.ask(Request::Kill { member, signal: KillSignal::Kill }).await?,
            Fault::Freeze => self.ask(Request::Kill { member, signal: KillSignal::Stop }).await?,
            Fault::Promote => {
                let to = before.backups.first().context("the volume has no backup")?;
                self.client.promote_volume(&self.volume, to).await?;
            }
        }
        let begun = Instant::now();
        let after = loop {
            if let Ok(volume) = self.volume().await
                && volume.epoch != before.epoch
            {
                break volume;
            }
            if begun.elapsed() > ORDER_WAIT_MAX {
                bail!("the volume has not moved within {} s", ORDER_WAIT_MAX.as_secs());
            }
            tokio::time::sleep(LOOK_PAUSE).await;
        };
        // Served again: a call is answered. The writer, whose own wait is measured, has its answer soon.
        put(&self.client, self.shard, 0).await?;
        tokio::time::sleep(FROZEN_AFTER).await;
        Ok(after)
    }
}

fn now_ns() -> u64 {
    let now = clock::now();
    u64::try_from(now.seconds()).unwrap_or(0).saturating_mul(1_000_000_000) + u64::from(now.nanos())
}

fn word(fault: Fault) -> &'static str {
    match fault {
        Fault::Kill => "killed",
        Fault::Freeze => "frozen",
        Fault::Promote => "promoted",
    }
}

fn sorted(runs: &[Run], of: fn(&Run) -> f64) -> Vec<f64> {
    let mut values: Vec<f64> = runs.iter().map(of).collect();
    values.sort_unstable_by(f64::total_cmp);
    values
}

fn text(document: &Document) -> String {
    let mut text = format!("{}; metadata store: {}\n", document.environment.line(), document.metadata_store);
    for series in &document.series {
        text += &format!(
            "\nprimary {}: {} runs, {} shards on the volume; ms\n{:24}{:>9}{:>9}{:>9}{:>9}\n",
            series.fault,
            series.runs_ms.len(),
            series.shards_on_volume,
            "",
            "min",
            "median",
            "p90",
            "max"
        );
        for (name, of) in PHASES {
            let values = sorted(&series.runs_ms, of);
            let [min, median, p90, max] = [0.0, 0.5, 0.9, 1.0].map(|share| quantile(&values, share));
            text += &format!("{name:24}{min:9.0}{median:9.0}{p90:9.0}{max:9.0}\n");
        }
        text += &histogram(&sorted(&series.runs_ms, |r| r.total));
    }
    text
}

/// Bars for intervals of equal length.
fn histogram(sorted: &[f64]) -> String {
    let Some(max) = sorted.last() else { return String::new() };
    let widths = [10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1000.0, 2000.0, 5000.0];
    let width = widths.into_iter().find(|width| max / width <= 15.0).unwrap_or(max / 15.0);
    let mut counts = vec![0usize; (max / width) as usize + 1];
    for value in sorted {
        counts[(value / width) as usize] += 1;
    }
    let most = counts.iter().copied().max().unwrap_or(1);
    let first = counts.iter().position(|count| *count > 0).unwrap_or(0);
    let bar = |(number, count): (usize, &usize)| {
        let from = number as f64 * width;
        let bar = "#".repeat((count * BAR_CHARS).div_ceil(most));
        format!("{:>7.0} - {:>5.0} ms {count:>4} {bar}\n", from, from + width)
    };
    counts.iter().enumerate().skip(first).map(bar).collect()
}

#[cfg(test)]
mod tests {
    use shardfs_proto::types::Epoch;

    use super::*;

    #[test]
    fn what_cannot_be_fenced_is_not_frozen() {
        let volume = |id: &str, provider: &str| VolumeInfo {
            id: VolumeId::new(id).unwrap(),
            provider: provider.into(),
            source: String::new(),
            size_bytes: 0,
            primary: None,
            backups: Vec::new(),
            epoch: Epoch::FIRST,
            shards: 0,
            target: None,
            leaving: false,
            iops: 0,
        };
        let (loops, folders) = ([volume("vol-1", "loop")], [volume("vol-1", "loop"), volume("vol-2", "dir")]);
        let all = [Fault::Kill, Fault::Freeze, Fault::Promote];
        assert!(refusal(&all, &loops).is_none());
        assert!(refusal(&[Fault::Kill, Fault::Promote], &folders).is_none());
        let refused = refusal(&all, &folders).unwrap();
        assert!(refused.message().contains("vol-2"), "{refused}");
        assert!(refused.hint_text().unwrap().contains("--fault kill,promote"), "{refused:?}");
    }

    #[test]
    fn figures_are_medians_and_bars() {
        let values: Vec<f64> = (1..=11).map(f64::from).collect();
        assert_eq!([0.0, 0.5, 0.9, 1.0].map(|share| quantile(&values, share)), [1.0, 6.0, 10.0, 11.0]);
        assert_eq!(quantile(&[], 0.5), 0.0);
        let bars = histogram(&[5.0, 12.0, 12.0, 149.0]);
        let lines: Vec<&str> = bars.lines().collect();
        assert_eq!(lines.len(), 15);
        assert!(lines[1].contains("10 -    20 ms    2 ####"), "{bars}");
        assert!(lines[14].ends_with("1 ####################"), "{bars}");
    }
}
