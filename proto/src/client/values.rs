//! Values by key.

use std::time::Duration;

use bytes::Bytes;
use futures::{Stream, StreamExt};

use super::Client;
use super::retry::{ATTEMPT_MAX, Backoff, Target};
use super::session::header as call_header;
use super::shards::selected;
use crate::convert;
use crate::types::limits::VALUE_BYTES_MAX;
use crate::types::op::{Durability, ObjectMeta, PutItem, PutOptions};
use crate::types::{Error, FileKind, Key, Reason, Result, ShardId, Version, ViewLabel};
use crate::wire;

/// A batch may take longer than a single call.
const BATCH_ATTEMPT_MAX: Duration = Duration::from_secs(60);
/// Messages of a streamed Put that are on their way.
const STREAM_MESSAGES: usize = 4;
/// Times that a listing or batch is taken up again without having got any further.
const RESUMPTIONS_MAX: u32 = 20;

/// What to list.
#[derive(Clone, Debug, Default)]
pub struct ListOptions {
    /// Only keys that begin with this.
    pub prefix: Bytes,
    /// Roll up keys that contain this after the prefix; empty: do not.
    pub delimiter: Bytes,
    /// Only what comes after this key.
    pub start_after: Bytes,
    /// At most so many; 0: all.
    pub limit: u64,
    /// Without metadata.
    pub keys_only: bool,
    /// Also directories, as keys that end with `/`.
    pub include_directories: bool,
}

/// A value, and of which view it is; `None`: from the primary's present.
pub type Labelled = (ObjectMeta, Bytes, Option<ViewLabel>);

/// One item of a listing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ListItem {
    /// A key (of a directory: ending with `/`).
    Key {
        /// The key.
        key: Bytes,
        /// What it is.
        kind: FileKind,
        /// Unless `keys_only`.
        meta: Option<ObjectMeta>,
    },
    /// What several keys have in common, up to and including the delimiter.
    CommonPrefix(Bytes),
}

impl ListItem {
    /// The key or prefix, by which a listing can be taken up again.
    pub fn position(&self) -> &Bytes {
        match self {
            ListItem::Key { key, .. } => key,
            ListItem::CommonPrefix(prefix) => prefix,
        }
    }
}

impl Client {
    /// Stores a value of at most 4 MiB.
    pub async fn put(
        &self,
        shard: ShardId,
        key: Key,
        value: Bytes,
        options: PutOptions,
        durability: Durability,
    ) -> Result<ObjectMeta> {
        convert::value_from_wire(value.clone())?;
        let item = convert::put_item_to_wire(&PutItem { key, value, options });
        let item = &item;
        let reply = self
            .numbered(shard, false, async |attempt, session, sequence| {
                let request = wire::PutRequest {
                    shard: selected(shard),
                    key: item.key.clone(),
                    value: item.value.clone(),
                    options: item.options.clone(),
                    durability: convert::durability_to_wire(durability).into(),
                    write_id: Some(wire::WriteId { session_id: session.id.get(), sequence }),
                    epoch: attempt.epoch,
                };
                attempt.node.storage().put(attempt.node.request(request)).await
            })
            .await?;
        meta(reply.into_inner().meta)
    }

    /// Stores a value of any size from a stream of pieces. The stream cannot be repeated, so a node that
    /// fails in the middle fails the call (`Unavailable`); nothing is left behind then.
    pub async fn put_stream<S>(
        &self,
        shard: ShardId,
        key: Key,
        options: PutOptions,
        durability: Durability,
        size: Option<u64>,
        data: S,
    ) -> Result<ObjectMeta>
    where
        S: Stream<Item = std::io::Result<Bytes>> + Send + 'static,
    {
        let session = self.session(shard).await?;
        let numbered = session.number().await;
        let (node, epoch) = self.live_route(shard).await?;
        let header = wire::PutStreamHeader {
            shard: selected(shard),
            key: Bytes::copy_from_slice(key.as_bytes()),
            options: Some(convert::put_options_to_wire(&options)),
            durability: convert::durability_to_wire(durability).into(),
            write_id: Some(wire::WriteId { session_id: session.id.get(), sequence: numbered.sequence }),
            epoch,
            size,
        };
        let (sender, receiver) = tokio::sync::mpsc::channel(STREAM_MESSAGES);
        let part = |part| wire::PutStreamRequest { part: Some(part) };
        let feeder = tokio::spawn(async move {
            let header = part(wire::put_stream_request::Part::Header(header));
            if sender.send(header).await.is_err() {
                return Ok(());
            }
            let mut data = std::pin::pin!(data);
            while let Some(piece) = data.next().await {
                let mut piece = piece?;
                while !piece.is_empty() {
                    let data = piece.split_to(piece.len().min(VALUE_BYTES_MAX));
                    if sender.send(part(wire::put_stream_request::Part::Data(data))).await.is_err() {
                        return Ok(());
                    }
                }
            }
            // The end of the stream is what makes the value visible: only an explicit end marker may do
            // that, or a source that failed would look complete. See `Ended`.
            Ok::<(), std::io::Error>(())
        });
        let (ended, stream) = Ended::new(receiver, feeder);
        let reply = node.storage().put_stream(node.request(stream)).await;
        if let Some(error) = ended.failure() {
            return Err(Error::io(format!("reading the data to store: {error}")));
        }
        let reply = reply.map_err(|status| crate::status::from_status(&status))?;
        meta(reply.into_inner().meta)
    }

    /// Stores many values of one shard; one result an item, or, if `atomic`, all or none.
    pub async fn batch_put(
        &self,
        shard: ShardId,
        items: Vec<PutItem>,
        atomic: bool,
        durability: Durability,
    ) -> Result<Vec<Result<ObjectMeta>>> {
        let count = items.len();
        let items: Vec<wire::PutItem> = items.iter().map(convert::put_item_to_wire).collect();
        let items = &items;
        let reply = self
            .numbered(shard, false, async |attempt, session, sequence| {
                let request = wire::BatchPutRequest {
                    shard: selected(shard),
                    items: items.clone(),
                    atomic,
                    durability: convert::durability_to_wire(durability).into(),
                    write_id: Some(wire::WriteId { session_id: session.id.get(), sequence }),
                    epoch: attempt.epoch,
                };
                attempt.node.storage().batch_put(attempt.node.request(request)).await
            })
            .await?;
        let results = reply.into_inner().results;
        if results.len() != count {
            return Err(Error::internal(format!("{} results for {count} items", results.len())));
        }
        results.into_iter().map(convert::put_result_from_wire).collect()
    }

    /// A value of at most 4 MiB.
    ///
    /// # Errors
    /// `NotFound`; `TooLarge` for a larger one: read it by [`Client::get_range`].
    pub async fn get(&self, shard: ShardId, key: &Key) -> Result<(ObjectMeta, Bytes)> {
        let (meta, value, _) = self.get_value(shard, key, 0, None, false, None).await?;
        Ok((meta, value))
    }

    /// The same, and of which view it is; `None`: from the primary's present.
    pub async fn get_labelled(&self, shard: ShardId, key: &Key) -> Result<Labelled> {
        self.get_value(shard, key, 0, None, false, None).await
    }

    /// A range of a value; at most 4 MiB. With a version: `VersionMismatch` if the value has another.
    pub async fn get_range(
        &self,
        shard: ShardId,
        key: &Key,
        offset: u64,
        length: u64,
        if_version: Option<Version>,
    ) -> Result<(ObjectMeta, Bytes)> {
        let (meta, value, _) = self.get_value(shard, key, offset, Some(length), false, if_version).await?;
        Ok((meta, value))
    }

    /// The same, and of which view it is.
    pub async fn get_range_labelled(
        &self,
        shard: ShardId,
        key: &Key,
        offset: u64,
        length: u64,
        if_version: Option<Version>,
    ) -> Result<Labelled> {
        self.get_value(shard, key, offset, Some(length), false, if_version).await
    }

    /// A value's metadata.
    pub async fn head(&self, shard: ShardId, key: &Key) -> Result<ObjectMeta> {
        Ok(self.get_value(shard, key, 0, None, true, None).await?.0)
    }

    async fn get_value(
        &self,
        shard: ShardId,
        key: &Key,
        offset: u64,
        length: Option<u64>,
        meta_only: bool,
        if_version: Option<Version>,
    ) -> Result<Labelled> {
        let key = Bytes::copy_from_slice(key.as_bytes());
        let key = &key;
        let bounds = (self.inner.config.deadline, ATTEMPT_MAX);
        let reply = self
            .read_at(shard, bounds, async |attempt, from| {
                let (read_preference, max_staleness_ms) = convert::read_from_to_wire(from);
                let request = wire::GetRequest {
                    shard: selected(shard),
                    key: key.clone(),
                    offset,
                    length,
                    meta_only,
                    if_version: if_version.map_or(0, Version::get),
                    epoch: attempt.epoch,
                    read_preference,
                    max_staleness_ms,
                };
                attempt.node.storage().get(attempt.node.request(request)).await
            })
            .await?;
        labelled(reply.into_inner())
    }

    /// Many values of one shard, in request order, each with its position. A node that fails in the
    /// middle is taken up again where it stopped.
    pub fn batch_get(
        &self,
        shard: ShardId,
        keys: Vec<Key>,
    ) -> impl Stream<Item = Result<(usize, Result<(ObjectMeta, Bytes)>)>> + Send + use<> {
        let items = self.batch_get_labelled(shard, keys);
        items.map(|item| {
            let (at, found) = item?;
            Ok((at, found.map(|(meta, value, _)| (meta, value))))
        })
    }

    /// The same, and of which view each is. All of one view are of one moment.
    pub fn batch_get_labelled(
        &self,
        shard: ShardId,
        keys: Vec<Key>,
    ) -> impl Stream<Item = Result<(usize, Result<Labelled>)>> + Send + use<> {
        let client = self.clone();
        let keys: Vec<Bytes> = keys.iter().map(|key| Bytes::copy_from_slice(key.as_bytes())).collect();
        async_stream::try_stream! {
            let mut done = 0;
            let mut resumptions = 0;
            let mut backoff = Backoff::new();
            while done < keys.len() {
                let rest = &keys[done..];
                let base = done;
                let bounds = (client.inner.config.deadline, BATCH_ATTEMPT_MAX);
                let (reply, asked) = client
                    .read_at(shard, bounds, async |attempt, from| {
                        let (read_preference, max_staleness_ms) = convert::read_from_to_wire(from);
                        let request = wire::BatchGetRequest {
                            shard: selected(shard),
                            keys: rest.to_vec(),
                            meta_only: false,
                            epoch: attempt.epoch,
                            read_preference,
                            max_staleness_ms,
                        };
                        let reply = attempt.node.storage().batch_get(attempt.node.request(request)).await?;
                        Ok((reply, attempt.node.endpoint))
                    })
                    .await?;
                let mut stream = reply.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(reply)) => {
                            use wire::batch_get_reply::Outcome;
                            let outcome = match reply.outcome {
                                Some(Outcome::Found(value)) => labelled(value),
                                Some(Outcome::Error(detail)) => Err(crate::status::detail_from_wire(detail)),
                                None => Err(Error::internal("an answer without outcome")),
                            };
                            if base + reply.index as usize != done {
                                Err(Error::internal("answers are not in request order"))?;
                            }
                            yield (done, outcome);
                            done += 1;
                            resumptions = 0;
                        }
                        Ok(None) if done == keys.len() => break,
                        Ok(None) => Err(Error::internal("the stream ended early"))?,
                        Err(status) => {
                            client.read_broke_off(shard, &asked);
                            client.resume(shard, &status, &mut resumptions, &mut backoff).await?;
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Removes a key; returns what its metadata was, and how many directories went with it.
    ///
    /// # Errors
    /// `NotFound`, `IsDirectory`.
    pub async fn delete(
        &self,
        shard: ShardId,
        key: &Key,
        durability: Durability,
    ) -> Result<(ObjectMeta, u32)> {
        let key = Bytes::copy_from_slice(key.as_bytes());
        let key = &key;
        let reply = self
            .numbered(shard, false, async |attempt, session, sequence| {
                let request = wire::DeleteRequest {
                    shard: selected(shard),
                    key: key.clone(),
                    durability: convert::durability_to_wire(durability).into(),
                    write_id: Some(wire::WriteId { session_id: session.id.get(), sequence }),
                    epoch: attempt.epoch,
                    if_version: 0,
                };
                attempt.node.storage().delete(attempt.node.request(request)).await
            })
            .await?
            .into_inner();
        Ok((meta(reply.meta)?, reply.pruned_directories))
    }

    /// Keys in byte order, in bounded memory. A node that fails in the middle is taken up again after the
    /// last key; what follows then comes from a newer snapshot.
    pub fn list(
        &self,
        shard: ShardId,
        options: ListOptions,
    ) -> impl Stream<Item = Result<ListItem>> + Send + use<> {
        self.list_labelled(shard, options).map(|item| item.map(|(item, _)| item))
    }

    /// The same, and of which view each is; `None`: of the primary's present. All of one view are of one moment.
    pub fn list_labelled(
        &self,
        shard: ShardId,
        options: ListOptions,
    ) -> impl Stream<Item = Result<(ListItem, Option<ViewLabel>)>> + Send + use<> {
        let client = self.clone();
        async_stream::try_stream! {
            let mut options = options;
            let mut resumptions = 0;
            let mut backoff = Backoff::new();
            'whole: loop {
                let wanted = &options;
                let bounds = (client.inner.config.deadline, ATTEMPT_MAX);
                let (reply, asked) = client
                    .read_at(shard, bounds, async |attempt, from| {
                        let (read_preference, max_staleness_ms) = convert::read_from_to_wire(from);
                        let request = wire::ListRequest {
                            shard: selected(shard),
                            prefix: wanted.prefix.clone(),
                            delimiter: wanted.delimiter.clone(),
                            start_after: wanted.start_after.clone(),
                            limit: wanted.limit,
                            keys_only: wanted.keys_only,
                            include_directories: wanted.include_directories,
                            epoch: attempt.epoch,
                            read_preference,
                            max_staleness_ms,
                        };
                        let reply = attempt.node.storage().list(attempt.node.request(request)).await?;
                        Ok((reply, attempt.node.endpoint))
                    })
                    .await?;
                let mut stream = reply.into_inner();
                loop {
                    match stream.message().await {
                        Ok(Some(reply)) => {
                            resumptions = 0;
                            let label = reply.view.map(convert::view_label_from_wire).transpose()?;
                            for entry in reply.entries {
                                let item = list_item(entry)?;
                                options.start_after = item.position().clone();
                                if options.limit != 0 {
                                    options.limit -= 1;
                                    if options.limit == 0 {
                                        yield (item, label);
                                        break 'whole;
                                    }
                                }
                                yield (item, label.clone());
                            }
                        }
                        Ok(None) => break 'whole,
                        Err(status) => {
                            client.read_broke_off(shard, &asked);
                            client.resume(shard, &status, &mut resumptions, &mut backoff).await?;
                            break;
                        }
                    }
                }
            }
        }
    }

    /// Decides whether a broken stream is taken up again, and waits.
    async fn resume(
        &self,
        shard: ShardId,
        status: &tonic::Status,
        resumptions: &mut u32,
        backoff: &mut Backoff,
    ) -> Result<()> {
        let error = crate::status::from_status(status);
        *resumptions += 1;
        if !error.is_retryable() || *resumptions > RESUMPTIONS_MAX {
            return Err(error);
        }
        match error.location() {
            Some(location) => self.inner.routes.learn(shard, location),
            None => self.forget_route(shard).await,
        }
        tokio::time::sleep(backoff.next(error.retry_after_ms())).await;
        Ok(())
    }

    async fn forget_route(&self, shard: ShardId) {
        if let Ok((node, _)) = self.route(shard).await {
            self.inner.routes.forget(shard, &node.endpoint);
        }
    }

    /// A route whose node has just answered about the shard.
    async fn live_route(&self, shard: ShardId) -> Result<(super::channel::Node, u64)> {
        self.call(Target::Shard(shard), async |attempt| {
            let request = wire::StatShardRequest { header: Some(call_header(shard, attempt.epoch, None)) };
            attempt.node.files().stat_shard(attempt.node.request(request)).await?;
            Ok((attempt.node, attempt.epoch))
        })
        .await
    }
}

/// The messages of a streamed Put, which break off (rather than end) when their source fails: a stream
/// that merely ended would be stored as if it were whole.
struct Ended {
    failure: std::sync::Arc<parking_lot::Mutex<Option<String>>>,
}

impl Ended {
    fn new(
        mut receiver: tokio::sync::mpsc::Receiver<wire::PutStreamRequest>,
        feeder: tokio::task::JoinHandle<std::io::Result<()>>,
    ) -> (Ended, impl Stream<Item = wire::PutStreamRequest> + Send + 'static) {
        let failure = std::sync::Arc::new(parking_lot::Mutex::new(None));
        let noted = failure.clone();
        let stream = async_stream::stream! {
            while let Some(message) = receiver.recv().await {
                yield message;
            }
            let failed = match feeder.await {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(error.to_string()),
                Err(error) => Some(format!("the source panicked or was cancelled: {error}")),
            };
            if failed.is_some() {
                *noted.lock() = failed;
                // A part that is neither header nor data: the node refuses the stream.
                yield wire::PutStreamRequest { part: None };
            }
        };
        (Ended { failure }, stream)
    }

    fn failure(&self) -> Option<String> {
        self.failure.lock().take()
    }
}

fn meta(meta: Option<wire::ObjectMeta>) -> Result<ObjectMeta> {
    convert::meta_from_wire(meta.ok_or_else(|| Error::new(Reason::Internal, "the answer has no metadata"))?)
}

fn labelled(reply: wire::GetReply) -> Result<Labelled> {
    let label = reply.view.map(convert::view_label_from_wire).transpose()?;
    Ok((meta(reply.meta)?, reply.value, label))
}

fn list_item(entry: wire::ListEntry) -> Result<ListItem> {
    use wire::list_entry::Entry;
    let kind = entry.kind;
    Ok(match entry.entry.ok_or_else(|| Error::internal("an entry without key"))? {
        Entry::CommonPrefix(prefix) => ListItem::CommonPrefix(prefix),
        Entry::Key(key) => ListItem::Key {
            key,
            kind: convert::kind_from_wire(kind)?,
            meta: entry.meta.map(convert::meta_from_wire).transpose()?,
        },
    })
}
