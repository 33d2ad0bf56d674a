//! Values over gRPC: Put, Get, BatchPut and BatchGet against a cluster, by the client that everything uses.
//!
//! All callers share one client, as the tasks of one program would. Every value that is read is compared; after the
//! timed rows of a run the keys are counted by a listing. A run uses a shard of its own, deleted at the end,
//! or, if it was given one, keys below a prefix of its own, deleted at the end.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use bytes::Bytes;
use futures::StreamExt as _;
use shardfs_proto::client::{Client, ListItem, ListOptions};
use shardfs_proto::types::op::{Durability, PutItem, PutOptions};
use shardfs_proto::types::{InodeNo, Key, Reason, ShardId, clock};
use tokio::task::JoinSet;

use super::content::{Content, mix};
use super::progress::Progress;
use super::report::Sample;
use super::stats::{Latencies, Unit, per_second};
use super::workspace::{self, Stop};
use crate::cmd::remote::find_shard;
use crate::paths::ShardRef;

/// Deletes at a time when a given shard is cleaned.
const CLEANING_CALLERS: usize = 64;

/// What to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// A shard to use; else one is made.
    pub shard: Option<ShardRef>,
    /// Bytes of a value.
    pub size: usize,
    /// Callers at a time of the single calls, one series each.
    pub callers: Vec<usize>,
    /// Callers at a time of the batches, one series each.
    pub batch_callers: Vec<usize>,
    /// Values of a batch.
    pub batch: usize,
    /// How long each row takes at most.
    pub row_time: Duration,
    /// Values that a row puts at most.
    pub values_max: u64,
}

/// Where a run puts its keys.
pub struct Place {
    client: Client,
    shard: ShardId,
    /// Stands before every key of this run.
    prefix: String,
    made: bool,
}

impl Place {
    /// Makes the shard, or finds the given one.
    pub async fn prepare(client: Client, given: Option<&ShardRef>) -> Result<Place> {
        let name = workspace::unique_name();
        let (shard, prefix, made) = match given {
            Some(shard) => {
                let found = find_shard(&client, shard).await;
                let found = found.map_err(|failure| failure.context(format!("shard {shard}")))?;
                (found.id, format!("{name}/"), false)
            }
            None => {
                let made = workspace::new_shard(&client, &name).await?;
                (made.id, String::new(), true)
            }
        };
        Ok(Place { client, shard, prefix, made })
    }

    /// Removes what the run put.
    pub async fn clean(self) -> Result<()> {
        if self.made {
            return self
                .client
                .delete_shard(self.shard, false)
                .await
                .with_context(|| format!("cannot delete shard {}: delete it yourself", self.shard));
        }
        let options = ListOptions {
            prefix: Bytes::from(self.prefix.clone()),
            keys_only: true,
            ..ListOptions::default()
        };
        let keys = pin!(self.client.list(self.shard, options));
        let mut deletes = pin!(
            keys.map(|item| async {
                let key = Key::new(item?.position().clone())?;
                match self.client.delete(self.shard, &key, Durability::Buffered).await {
                    Ok(_) => Ok(()),
                    Err(error) if error.reason() == Reason::NotFound => Ok(()),
                    Err(error) => Err(error),
                }
            })
            .buffer_unordered(CLEANING_CALLERS)
        );
        while let Some(deleted) = deletes.next().await {
            deleted.with_context(|| {
                format!("cannot delete every key below {}: delete them yourself", self.prefix)
            })?;
        }
        self.client.sync(self.shard).await.context("sync after the deletes")
    }
}

/// Runs all rows once. `run` tells its keys from those of other runs.
pub async fn run(
    place: &Place,
    settings: &Settings,
    run: u32,
    seed: u64,
    stop: &Stop,
    progress: &Progress,
) -> Result<Vec<Sample>> {
    let mut bench = Bench {
        shared: Arc::new(Shared {
            client: place.client.clone(),
            shard: place.shard,
            prefix: format!("{}run{run}", place.prefix),
            content: Content::new(seed),
            size: settings.size,
            stop: stop.clone(),
        }),
        settings,
        progress,
        seed,
        stored: Arc::new(Vec::new()),
        samples: Vec::new(),
    };
    for &callers in &settings.callers {
        bench.round_trips(callers).await?;
        bench.puts("put sync", callers, 1, Durability::Sync).await?;
        bench.puts("put buffered", callers, 1, Durability::Buffered).await?;
        bench.gets(callers).await?;
    }
    for &callers in &settings.batch_callers {
        bench.puts("batch put sync", callers, settings.batch, Durability::Sync).await?;
        bench.puts("batch put buffered", callers, settings.batch, Durability::Buffered).await?;
        bench.batch_gets(callers).await?;
    }
    bench.count().await?;
    Ok(bench.samples)
}

/// A value that was put.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stored {
    row: u16,
    caller: u16,
    number: u32,
}

struct Shared {
    client: Client,
    shard: ShardId,
    prefix: String,
    content: Content,
    size: usize,
    stop: Stop,
}

impl Shared {
    fn key(&self, value: Stored) -> Key {
        Key::new(format!("{}/{:02}/{:03}/{:07}", self.prefix, value.row, value.caller, value.number))
            .expect("a short path of digits below a checked prefix is a key")
    }

    /// The same value has other bytes in another run.
    fn content_id(&self, value: Stored) -> u64 {
        u64::from(value.row) << 48 | u64::from(value.caller) << 32 | u64::from(value.number)
    }

    fn item(&self, value: Stored) -> PutItem {
        let mut bytes = vec![0; self.size];
        self.content.fill(&mut bytes, self.content_id(value), 0, 0);
        PutItem { key: self.key(value), value: Bytes::from(bytes), options: PutOptions::default() }
    }

    fn check(&self, value: Stored, got: &[u8]) -> Result<()> {
        if got.len() != self.size {
            bail!("WRONG CONTENT: {} has {} bytes, expected {}", self.key(value), got.len(), self.size);
        }
        self.content
            .check(got, self.content_id(value), 0, 0)
            .with_context(|| format!("key {}", self.key(value)))
    }
}

struct Bench<'a> {
    shared: Arc<Shared>,
    settings: &'a Settings,
    progress: &'a Progress,
    seed: u64,
    /// Every value that this run put.
    stored: Arc<Vec<Stored>>,
    samples: Vec<Sample>,
}

/// What one caller did.
struct Done {
    values: u64,
    latencies: Latencies,
    stored: Vec<Stored>,
}

impl Bench<'_> {
    /// The cheapest call that reaches a shard: what every other call pays as well.
    async fn round_trips(&mut self, callers: usize) -> Result<()> {
        let deadline = self.settings.row_time;
        self.row("round trip (GetAttr of the root)", callers, move |shared, _caller| async move {
            let mut done = Done { values: 0, latencies: Latencies::new(), stored: Vec::new() };
            let began = clock::monotonic();
            while began.elapsed() < deadline {
                shared.stop.check()?;
                let call = clock::monotonic();
                shared.client.get_attr(shared.shard, InodeNo::ROOT).await?;
                done.latencies.record(call.elapsed());
                done.values += 1;
            }
            Ok(done)
        })
        .await
    }

    async fn puts(&mut self, name: &str, callers: usize, batch: usize, durability: Durability) -> Result<()> {
        let row = self.samples.len() as u16;
        let deadline = self.settings.row_time;
        let values_max = self.settings.values_max.div_ceil(callers as u64);
        self.row(name, callers, move |shared, caller| async move {
            let mut done = Done { values: 0, latencies: Latencies::new(), stored: Vec::new() };
            let began = clock::monotonic();
            while began.elapsed() < deadline && done.values < values_max {
                shared.stop.check()?;
                let first = done.values as u32;
                let values =
                    (first..first + batch as u32).map(|number| Stored { row, caller: caller as u16, number });
                let mut items: Vec<PutItem> = values.clone().map(|value| shared.item(value)).collect();
                let call;
                if batch == 1 {
                    let PutItem { key, value, options } = items.remove(0);
                    call = clock::monotonic();
                    shared.client.put(shared.shard, key, value, options, durability).await?;
                } else {
                    call = clock::monotonic();
                    let results = shared.client.batch_put(shared.shard, items, false, durability).await?;
                    for result in results {
                        result?;
                    }
                }
                done.latencies.record(call.elapsed());
                done.values += batch as u64;
                done.stored.extend(values);
            }
            Ok(done)
        })
        .await
    }

    async fn gets(&mut self, callers: usize) -> Result<()> {
        let (deadline, stored, seed) = (self.settings.row_time, self.stored.clone(), self.seed);
        self.row("get", callers, move |shared, caller| {
            let stored = stored.clone();
            async move {
                let mut done = Done { values: 0, latencies: Latencies::new(), stored: Vec::new() };
                let mut random = fastrand::Rng::with_seed(mix(seed ^ caller as u64));
                let began = clock::monotonic();
                while began.elapsed() < deadline {
                    shared.stop.check()?;
                    let value = *random.choice(stored.iter()).context("nothing was put before")?;
                    let key = shared.key(value);
                    let call = clock::monotonic();
                    let (_meta, got) = shared.client.get(shared.shard, &key).await?;
                    done.latencies.record(call.elapsed());
                    shared.check(value, &got)?;
                    done.values += 1;
                }
                Ok(done)
            }
        })
        .await
    }

    async fn batch_gets(&mut self, callers: usize) -> Result<()> {
        let (deadline, batch) = (self.settings.row_time, self.settings.batch);
        let (stored, seed) = (self.stored.clone(), self.seed);
        self.row("batch get", callers, move |shared, caller| {
            let stored = stored.clone();
            async move {
                let mut done = Done { values: 0, latencies: Latencies::new(), stored: Vec::new() };
                let mut random = fastrand::Rng::with_seed(mix(seed ^ caller as u64));
                let began = clock::monotonic();
                while began.elapsed() < deadline {
                    shared.stop.check()?;
                    let values: Vec<Stored> =
                        (0..batch).filter_map(|_| random.choice(stored.iter()).copied()).collect();
                    let keys = values.iter().map(|value| shared.key(*value)).collect();
                    let call = clock::monotonic();
                    let mut answers = pin!(shared.client.batch_get(shared.shard, keys));
                    let mut got = 0;
                    while let Some(answer) = answers.next().await {
                        let (position, result) = answer?;
                        let value = *values.get(position).context("an answer without a request")?;
                        shared.check(value, &result?.1)?;
                        got += 1;
                    }
                    done.latencies.record(call.elapsed());
                    if got != batch {
                        bail!("WRONG CONTENT: {got} answers to a batch of {batch} keys");
                    }
                    done.values += batch as u64;
                }
                Ok(done)
            }
        })
        .await
    }

    /// Runs one row by all its callers.
    async fn row<W, F>(&mut self, name: &str, callers: usize, work: W) -> Result<()>
    where
        W: Fn(Arc<Shared>, usize) -> F,
        F: Future<Output = Result<Done>> + Send + 'static,
    {
        self.progress.phase(&format!("{name}, {callers} callers"));
        let mut tasks = JoinSet::new();
        let began = clock::monotonic();
        for caller in 0..callers {
            tasks.spawn(work(self.shared.clone(), caller));
        }
        let mut all = Latencies::new();
        let mut values = 0;
        let mut stored = Vec::new();
        while let Some(done) = tasks.join_next().await {
            let done = done.context("a caller panicked: this is a bug of the benchmark")?;
            let done = done.with_context(|| format!("{name}, {callers} callers"))?;
            values += done.values;
            all.add(&done.latencies);
            stored.extend(done.stored);
        }
        let took = began.elapsed();
        Arc::make_mut(&mut self.stored).extend(stored);
        self.samples.push(Sample {
            name: name.to_owned(),
            workers: callers,
            unit: Unit::PerSecond,
            value: per_second(values, took),
            latencies: Some(all),
        });
        Ok(())
    }

    /// Compares the keys of this run with what was put.
    async fn count(&self) -> Result<()> {
        self.progress.phase("counting the keys");
        let mut expected: Vec<Key> = self.stored.iter().map(|value| self.shared.key(*value)).collect();
        expected.sort_unstable();
        let prefix = Bytes::from(format!("{}/", self.shared.prefix));
        let options = ListOptions { prefix, keys_only: true, ..ListOptions::default() };
        let mut keys = pin!(self.shared.client.list(self.shared.shard, options));
        let mut found = 0;
        while let Some(item) = keys.next().await {
            self.shared.stop.check()?;
            let ListItem::Key { key, .. } = item? else {
                bail!("WRONG CONTENT: a listing without delimiter rolled up")
            };
            let want = expected.get(found);
            if want.is_none_or(|want| want.as_bytes() != &key[..]) {
                bail!("WRONG CONTENT: key {found} of the listing is {key:?}, expected {want:?}");
            }
            found += 1;
        }
        if found != expected.len() {
            bail!("WRONG CONTENT: the listing has {found} keys, {} were put", expected.len());
        }
        Ok(())
    }
}
