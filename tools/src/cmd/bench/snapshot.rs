//! Snapshots and clones of a shard while somebody writes to it: how long the call takes, and how long the writer waits meanwhile.
//!
//! A shard is filled; a writer overwrites its values, one after the other, each synced. Then, again and again: a snapshot, a
//! clone of it, a clone of the shard as it is. Each copy must hold the value that was put last before the call.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use serde::Serialize;
use shardfs_proto::client::Client;
use shardfs_proto::types::cluster::{CloneShard, Selector, ShardInfo};
use shardfs_proto::types::op::{Durability, PutOptions};
use shardfs_proto::types::{Key, ShardId, ShardName, clock};

use super::args::SnapshotArgs;
use super::environment::Environment;
use super::progress::Progress;
use super::report;
use super::stats::quantile;
use super::workspace::{self, Stop};
use crate::context::Context;
use crate::size;

/// Bytes of the values that fill the shard, and how many are put at a time.
const FILL_VALUE_BYTES: u64 = 1 << 20;
const FILL_JOBS: usize = 4;
/// How long the writer writes before the first copy.
const WARM_UP: Duration = Duration::from_secs(2);
/// Pause between runs, in which the files of the last copies go.
const PAUSE: Duration = Duration::from_millis(500);
/// How long the writer may take for one value before the benchmark gives up.
const WRITE_WAIT_MAX: Duration = Duration::from_secs(30);

/// One run: ms.
#[derive(Clone, Copy, Debug, Serialize)]
struct Run {
    /// A snapshot of the shard.
    snapshot: f64,
    /// The writer's longest Put that was under way during it.
    snapshot_writer: f64,
    /// A clone of that snapshot.
    clone_of_snapshot: f64,
    /// A clone of the shard itself.
    clone: f64,
    /// The writer's longest Put that was under way during that.
    clone_writer: f64,
    /// The writer's longest Put in as long a time without any copy.
    alone_writer: f64,
}

/// A row's name, and its figure of a run.
type Row = (&'static str, fn(&Run) -> f64);

const ROWS: [Row; 6] = [
    ("snapshot", |r| r.snapshot),
    ("  writer's longest Put", |r| r.snapshot_writer),
    ("clone of a snapshot", |r| r.clone_of_snapshot),
    ("clone of the shard", |r| r.clone),
    ("  writer's longest Put", |r| r.clone_writer),
    ("longest Put without", |r| r.alone_writer),
];

#[derive(Serialize)]
struct Document {
    environment: Environment,
    shard_bytes: u64,
    write_bytes: usize,
    writes_per_second: f64,
    runs_ms: Vec<Run>,
}

/// What the writer tells.
#[derive(Default)]
struct Written {
    values: AtomicU64,
    /// The longest Put that ended since somebody looked, microseconds.
    longest_us: AtomicU64,
    stop: AtomicBool,
}

/// Runs the command.
pub async fn run(args: &SnapshotArgs, context: &Context, stop: &Stop, progress: &Progress) -> Result<()> {
    let client = context.client()?;
    let name = workspace::unique_name();
    let shard = workspace::new_shard(&client, &name).await?;
    let measured = measure(args, &client, &shard, stop, progress).await;
    progress.phase("cleaning up");
    let cleaned = clean(&client, &shard, &name).await;
    progress.finish();
    let document = measured?;
    cleaned.with_context(|| format!("cannot delete shards named {name}*: delete them yourself"))?;
    let json = || serde_json::to_string_pretty(&document).context("the report as JSON");
    report::write(args.json.as_deref(), json, || text(&document))
}

/// Deletes the shard with its snapshots, and its clones.
async fn clean(client: &Client, shard: &ShardInfo, name: &str) -> Result<()> {
    for snapshot in client.snapshots(shard.id).await? {
        client.delete_shard(snapshot.id, false).await?;
    }
    for info in client.list_shards().await?.iter().filter(|info| info.name.as_str().starts_with(name)) {
        client.delete_shard(info.id, false).await?;
    }
    Ok(())
}

async fn measure(
    args: &SnapshotArgs,
    client: &Client,
    shard: &ShardInfo,
    stop: &Stop,
    progress: &Progress,
) -> Result<Document> {
    progress.phase("filling the shard");
    let count = args.size.div_ceil(FILL_VALUE_BYTES).max(1);
    let puts = (0..count).map(|number| put(client, shard.id, number, FILL_VALUE_BYTES as usize, 0));
    futures::stream::iter(puts)
        .buffer_unordered(FILL_JOBS)
        .try_for_each(async |()| stop.check())
        .await
        .context("filling the shard")?;
    let written = Arc::new(Written::default());
    let writer = tokio::spawn(write(client.clone(), shard.id, count, args.write_size, written.clone()));
    let begun = Instant::now();
    let runs = async {
        tokio::time::sleep(WARM_UP).await;
        let mut runs = Vec::new();
        for number in 0..args.runs {
            stop.check()?;
            progress.phase(&format!("run {} of {}", number + 1, args.runs));
            runs.push(one(client, shard, number, &written).await.with_context(|| format!("run {number}"))?);
        }
        anyhow::Ok(runs)
    }
    .await;
    written.stop.store(true, Ordering::SeqCst);
    let wrote = writer.await.context("the writer panicked")?;
    let runs_ms = runs?;
    wrote.context("the writer")?;
    Ok(Document {
        environment: Environment::look(clock::now()),
        shard_bytes: count * FILL_VALUE_BYTES,
        write_bytes: args.write_size,
        writes_per_second: written.values.load(Ordering::SeqCst) as f64 / begun.elapsed().as_secs_f64(),
        runs_ms,
    })
}

fn fill_key(number: u64) -> Result<Key> {
    Ok(Key::new(format!("d{}/v{number}", number % 16))?)
}

async fn put(client: &Client, shard: ShardId, number: u64, bytes: usize, round: u64) -> Result<()> {
    let mut value = vec![0; bytes];
    fastrand::Rng::with_seed(number ^ (round << 32)).fill(&mut value);
    client.put(shard, fill_key(number)?, value.into(), PutOptions::default(), Durability::Sync).await?;
    Ok(())
}

/// Overwrites values until it is told to stop.
async fn write(
    client: Client,
    shard: ShardId,
    count: u64,
    bytes: usize,
    written: Arc<Written>,
) -> Result<()> {
    for round in 1.. {
        if written.stop.load(Ordering::SeqCst) {
            break;
        }
        let begun = Instant::now();
        put(&client, shard, fastrand::u64(..count), bytes, round).await?;
        written.longest_us.fetch_max(begun.elapsed().as_micros() as u64, Ordering::SeqCst);
        written.values.fetch_add(1, Ordering::SeqCst);
    }
    Ok(())
}

impl Written {
    /// Waits until the writer has ended a Put that was begun after this was called.
    async fn one_more(&self) -> Result<()> {
        let (begun, before) = (Instant::now(), self.values.load(Ordering::SeqCst));
        while self.values.load(Ordering::SeqCst) < before + 2 {
            if begun.elapsed() > WRITE_WAIT_MAX {
                bail!("the writer does not get on");
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok(())
    }

    /// The longest Put that was under way during some work, and how long that took: ms.
    async fn during<T>(
        &self,
        work: impl Future<Output = shardfs_proto::types::Result<T>>,
    ) -> Result<(T, f64, f64)> {
        self.one_more().await?;
        self.longest_us.store(0, Ordering::SeqCst);
        let begun = Instant::now();
        let value = work.await?;
        let took = begun.elapsed().as_secs_f64() * 1e3;
        self.one_more().await?;
        Ok((value, took, self.longest_us.load(Ordering::SeqCst) as f64 / 1e3))
    }
}

async fn one(client: &Client, shard: &ShardInfo, number: u32, written: &Written) -> Result<Run> {
    let name = |what: &str| ShardName::new(format!("{}-{what}-{number}", shard.name));
    let of = |source| -> Result<CloneShard> {
        let what = if source == shard.id { "clone" } else { "of-snapshot" };
        let source = Selector::Id(source);
        Ok(CloneShard { source, name: name(what)?, limit_bytes: None, request_id: String::new() })
    };
    mark(client, shard.id, number).await?;
    let (snapshot, snapshot_ms, snapshot_writer) =
        written.during(client.snapshot_shard(shard.id, &name("snap")?)).await?;
    let new = of(snapshot.id)?;
    let (of_snapshot, clone_of_snapshot, _) = written.during(client.clone_shard(&new)).await?;
    let new = of(shard.id)?;
    let (cloned, clone, clone_writer) = written.during(client.clone_shard(&new)).await?;
    for copy in [&snapshot, &of_snapshot, &cloned] {
        check(client, copy.id, number).await.with_context(|| format!("what {} holds", copy.name))?;
        client.delete_shard(copy.id, false).await?;
    }
    tokio::time::sleep(PAUSE).await;
    let alone = async {
        tokio::time::sleep(Duration::from_secs_f64(snapshot_ms / 1e3)).await;
        Ok(())
    };
    let ((), _, alone_writer) = written.during(alone).await?;
    Ok(Run { snapshot: snapshot_ms, snapshot_writer, clone_of_snapshot, clone, clone_writer, alone_writer })
}

fn marker(number: u32) -> Bytes {
    Bytes::from(format!("run {number}"))
}

async fn mark(client: &Client, shard: ShardId, number: u32) -> Result<()> {
    let key = Key::new("marker")?;
    client.put(shard, key, marker(number), PutOptions::default(), Durability::Sync).await?;
    Ok(())
}

async fn check(client: &Client, shard: ShardId, number: u32) -> Result<()> {
    let (_, value) = client.get(shard, &Key::new("marker")?).await?;
    if value != marker(number) {
        bail!("the value of another run: this is a bug");
    }
    Ok(())
}

fn text(document: &Document) -> String {
    let mut text = format!(
        "{}\na shard of {}, a writer of {} values, {:.0} a second: {} runs; ms\n{:24}{:>9}{:>9}{:>9}{:>9}\n",
        document.environment.line(),
        size::human(document.shard_bytes),
        size::human(document.write_bytes as u64),
        document.writes_per_second,
        document.runs_ms.len(),
        "",
        "min",
        "median",
        "p90",
        "max"
    );
    for (name, of) in ROWS {
        let mut values: Vec<f64> = document.runs_ms.iter().map(of).collect();
        values.sort_unstable_by(f64::total_cmp);
        let [min, median, p90, max] = [0.0, 0.5, 0.9, 1.0].map(|share| quantile(&values, share));
        text += &format!("{name:24}{min:9.1}{median:9.1}{p90:9.1}{max:9.1}\n");
    }
    text
}
