//! The Storage service: shards and values by key.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use prost::Message;
use shardfs_proto::convert;
use shardfs_proto::status::detail_to_wire;
use shardfs_proto::types::attr::MODE_BITS;
use shardfs_proto::types::cluster::{NewShard, ShardInfo};
use shardfs_proto::types::limits::{BATCH_BYTES_MAX, BATCH_ITEMS_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX};
use shardfs_proto::types::op::{Durability, ObjectMeta, OpResult, Operation, PutItem, ShardState};
use shardfs_proto::types::{Error, InodeNo, Key, Reason, Result, ShardName};
use shardfs_proto::wire::{self, list_entry, put_stream_request, storage_server::Storage};
use tonic::{Request, Response, Status, Streaming};

use super::snapshots;
use super::source::Source;
use super::stream::{self, Answer, Producer, Turn};
use super::{INLINE_READ_BYTES_MAX, Services, about, caller, on_view, storage_mutation, storage_write_id};
use crate::shard::list::{ListQuery, Listed, Listing, Step, WalkKey};
use crate::shard::{Mutation, PutStreamStart, ReadView, Shard, read};

/// Lines of one message of a List.
const LIST_BATCH_ENTRIES_MAX: usize = 512;
/// Bytes of keys after which a message of a List is sent.
const LIST_BATCH_BYTES_MAX: usize = 256 << 10;
/// How long a streamed Put waits for its next message.
const STREAM_IDLE_MAX: Duration = Duration::from_secs(60);
/// Keys of a BatchGet that are looked up together.
const GET_GROUP_KEYS: usize = 128;
/// Bytes of values after which a turn of a BatchGet ends.
const GET_TURN_BYTES_MAX: usize = 2 << 20;
/// Bytes of a NewShard's request id.
const REQUEST_ID_BYTES_MAX: usize = 64;
/// Permission bits of a new shard's root directory.
const ROOT_MODE_DEFAULT: u32 = 0o755;
/// Components of a key above which its walk runs on the blocking pool.
const INLINE_COMPONENTS_MAX: usize = 64;

/// The handlers.
pub struct StorageService(Services);

impl StorageService {
    pub(super) fn new(services: Services) -> StorageService {
        StorageService(services)
    }

    async fn open(
        &self,
        metadata: &tonic::metadata::MetadataMap,
        shard: Option<wire::ShardSelector>,
        epoch: u64,
    ) -> Result<Arc<Shard>> {
        let client = caller(metadata)?;
        self.0.shard(&client, &convert::selector_from_wire(shard)?, epoch).await
    }

    async fn source(
        &self,
        metadata: &tonic::metadata::MetadataMap,
        shard: Option<wire::ShardSelector>,
        epoch: u64,
        wish: (i32, u32),
    ) -> Result<Source> {
        let client = caller(metadata)?;
        self.0.source(&client, &convert::selector_from_wire(shard)?, epoch, None, wish).await
    }

    /// Nothing of this service is made again by its session.
    async fn mutate(&self, shard: &Shard, mut mutation: Mutation) -> Result<OpResult> {
        mutation.durability = self.0.lasting(shard.id(), mutation.durability);
        about(shard.id(), shard.mutate(mutation).await)
    }

    async fn put_stream_inner(
        &self,
        request: Request<Streaming<wire::PutStreamRequest>>,
    ) -> Result<wire::PutReply> {
        use put_stream_request::Part;
        let Ok(_place) = Arc::clone(&self.0.put_streams).try_acquire_owned() else {
            return Err(Error::new(Reason::Busy, "too many streamed Puts are under way: try again")
                .with_retry_after_ms(200));
        };
        let (metadata, _, mut parts) = request.into_parts();
        let header = match next_part(&mut parts).await? {
            Some(Part::Header(header)) => header,
            Some(Part::Data(_)) | None => {
                return Err(Error::invalid("the first message of a PutStream is its header"));
            }
        };
        let (session, sequence) = storage_write_id(header.write_id)?;
        let mut start = PutStreamStart {
            key: Key::new(header.key)?,
            options: convert::put_options_from_wire(header.options)?,
            durability: convert::durability_from_wire(header.durability, Durability::Sync)?,
            session,
            sequence,
            size: header.size,
        };
        let shard = self.open(&metadata, header.shard, header.epoch).await?;
        let id = shard.id();
        start.durability = self.0.lasting(id, start.durability);
        // Dropped anywhere before its commit, also within an append, the writer leaves nothing behind.
        let mut writer = about(id, shard.put_content(start).await)?;
        let coming = async {
            while let Some(part) = next_part(&mut parts).await? {
                let Part::Data(data) = part else {
                    return Err(Error::invalid("a second header in a PutStream"));
                };
                if data.is_empty() {
                    return Err(Error::invalid("an empty piece of data in a PutStream"));
                }
                about(id, writer.append(convert::value_from_wire(data)?).await)?;
            }
            Ok::<(), Error>(())
        };
        tokio::select! {
            // What has come as a whole is stored.
            biased;
            came = coming => came?,
            () = shard.wanted_back() => {
                let why = "the shard is being handed over or opened anew, which broke the stream off: send it anew";
                return about(id, Err(Error::unavailable(why).with_retry_after_ms(20)));
            }
        }
        // The commit goes on if the client goes away now: it is one mutation, done or not done.
        let commit = tokio::spawn(async move { writer.commit().await });
        let meta = commit.await.unwrap_or_else(|_| Err(super::panicked("Storage/PutStream")));
        Ok(wire::PutReply { meta: Some(convert::meta_to_wire(&about(id, meta)?)) })
    }
}

async fn next_part(
    parts: &mut Streaming<wire::PutStreamRequest>,
) -> Result<Option<put_stream_request::Part>> {
    let next = tokio::time::timeout(STREAM_IDLE_MAX, parts.next()).await.map_err(|_| {
        let seconds = STREAM_IDLE_MAX.as_secs();
        Error::new(Reason::Deadline, format!("nothing came for {seconds} s: the stream is broken off"))
    })?;
    match next {
        None => Ok(None),
        Some(Ok(message)) => match message.part {
            Some(part) => Ok(Some(part)),
            None => Err(Error::invalid("a message of a PutStream has neither header nor data")),
        },
        // The transport's own words: a message too large, a connection lost.
        Some(Err(status)) => Err(shardfs_proto::status::from_status(&status).context("reading the stream")),
    }
}

/// The metadata that an operation of this service always answers.
fn meta_of(result: &OpResult) -> Result<wire::ObjectMeta> {
    result
        .meta
        .as_ref()
        .map(convert::meta_to_wire)
        .ok_or_else(|| Error::internal("the operation answered no metadata"))
}

fn get_reply(meta: ObjectMeta, value: Bytes, view: Option<wire::ViewLabel>) -> wire::GetReply {
    wire::GetReply { meta: Some(convert::meta_to_wire(&meta)), value, view }
}

#[tonic::async_trait]
impl Storage for StorageService {
    async fn put(&self, request: Request<wire::PutRequest>) -> Result<Response<wire::PutReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let item = PutItem {
                key: Key::new(r.key)?,
                value: convert::value_from_wire(r.value)?,
                options: convert::put_options_from_wire(r.options)?,
            };
            let mutation = storage_mutation(r.write_id, r.durability, Operation::PutValue { item })?;
            let shard = self.open(&metadata, r.shard, r.epoch).await?;
            let result = self.mutate(&shard, mutation).await?;
            Ok(wire::PutReply { meta: Some(meta_of(&result)?) })
        };
        self.0.unary("Storage/Put", call).await
    }

    async fn put_stream(
        &self,
        request: Request<Streaming<wire::PutStreamRequest>>,
    ) -> Result<Response<wire::PutReply>, Status> {
        self.0.unary("Storage/PutStream", self.put_stream_inner(request)).await
    }

    async fn batch_put(
        &self,
        request: Request<wire::BatchPutRequest>,
    ) -> Result<Response<wire::BatchPutReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            check_items(r.items.len(), "items")?;
            let bytes: usize = r.items.iter().map(|item| item.key.len() + item.value.len()).sum();
            if bytes > BATCH_BYTES_MAX {
                return Err(Error::new(
                    Reason::TooLarge,
                    format!(
                        "the batch has {bytes} bytes of keys and values; the limit is {BATCH_BYTES_MAX}: send several"
                    ),
                ));
            }
            // Malformed items of a batch that is not atomic fail like any other item; which they are
            // depends on the request alone, so a retry finds the same ones.
            let (items, malformed) = if r.atomic {
                (convert::put_items_from_wire(r.items)?, Vec::new())
            } else {
                split_malformed(r.items)
            };
            let operation = Operation::PutValues { items, atomic: r.atomic };
            let mutation = storage_mutation(r.write_id, r.durability, operation)?;
            let shard = self.open(&metadata, r.shard, r.epoch).await?;
            let results = self.mutate(&shard, mutation).await?.results;
            let results: Vec<_> =
                merge(results, malformed).into_iter().map(|result| about(shard.id(), result)).collect();
            Ok(wire::BatchPutReply { results: results.iter().map(convert::put_result_to_wire).collect() })
        };
        self.0.unary("Storage/BatchPut", call).await
    }

    async fn get(&self, request: Request<wire::GetRequest>) -> Result<Response<wire::GetReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let key = Key::new(r.key)?;
            if let Some(length) = r.length.filter(|length| *length > VALUE_BYTES_MAX as u64 && !r.meta_only) {
                return Err(Error::new(
                    Reason::TooLarge,
                    format!(
                        "a range of {length} bytes was asked for; one answer carries at most {VALUE_BYTES_MAX}: \
                         read several ranges, pinned with if_version"
                    ),
                ));
            }
            let wish = (r.read_preference, r.max_staleness_ms);
            let source = self.source(&metadata, r.shard, r.epoch, wish).await?;
            let view = source.view.clone();
            let deep = key.components().count() > INLINE_COMPONENTS_MAX;
            let found = async {
                let found = on_view("Storage/Get", view.clone(), deep, move |view| {
                    let value = read::find_value(view, &key)?;
                    value.check_version(&key, convert::version_condition(r.if_version))?;
                    let bytes = if r.meta_only { 0 } else { value.answer_bytes(&key, r.offset, r.length)? };
                    Ok((value, bytes))
                });
                let (value, bytes) = found.await?;
                let meta = value.record.meta(value.inode, view.chunk_bytes());
                let content = on_view("Storage/Get", view, bytes > INLINE_READ_BYTES_MAX, move |view| {
                    read::content(view, &value.record, r.offset, bytes)
                });
                Ok(get_reply(meta, content.await?, source.label()))
            };
            let found = found.await;
            source.finish(found)
        };
        self.0.unary("Storage/Get", call).await
    }

    type BatchGetStream = Answer<wire::BatchGetReply>;

    async fn batch_get(
        &self,
        request: Request<wire::BatchGetRequest>,
    ) -> Result<Response<Self::BatchGetStream>, Status> {
        self.0
            .streaming("Storage/BatchGet", async |observation| {
                let (metadata, _, r) = request.into_parts();
                check_items(r.keys.len(), "keys")?;
                let wish = (r.read_preference, r.max_staleness_ms);
                let source = self.source(&metadata, r.shard, r.epoch, wish).await?;
                let gets = Gets {
                    source,
                    keys: r.keys,
                    next: 0,
                    meta_only: r.meta_only,
                    found: Vec::new().into_iter(),
                };
                Ok(stream::answer("Storage/BatchGet", gets, observation))
            })
            .await
    }

    async fn delete(
        &self,
        request: Request<wire::DeleteRequest>,
    ) -> Result<Response<wire::DeleteReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let operation = Operation::DeleteValue {
                key: Key::new(r.key)?,
                if_version: convert::version_condition(r.if_version),
            };
            let mutation = storage_mutation(r.write_id, r.durability, operation)?;
            let shard = self.open(&metadata, r.shard, r.epoch).await?;
            let result = self.mutate(&shard, mutation).await?;
            Ok(wire::DeleteReply {
                meta: Some(meta_of(&result)?),
                pruned_directories: result.pruned_directories,
            })
        };
        self.0.unary("Storage/Delete", call).await
    }

    type ListStream = Answer<wire::ListReply>;

    async fn list(&self, request: Request<wire::ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        self.0
            .streaming("Storage/List", async |observation| {
                let (metadata, _, r) = request.into_parts();
                for (what, bytes) in
                    [("prefix", &r.prefix), ("delimiter", &r.delimiter), ("start_after", &r.start_after)]
                {
                    // A key that the mount made may be longer than one over gRPC, and so may where to resume.
                    if bytes.len() > LIST_POSITION_BYTES_MAX {
                        return Err(Error::new(
                            Reason::NameTooLong,
                            format!(
                                "{what} has {} bytes; the limit is {LIST_POSITION_BYTES_MAX}",
                                bytes.len()
                            ),
                        ));
                    }
                }
                let query = ListQuery {
                    prefix: r.prefix,
                    delimiter: r.delimiter,
                    start_after: r.start_after,
                    limit: (r.limit != 0).then_some(r.limit),
                    include_directories: r.include_directories,
                };
                let wish = (r.read_preference, r.max_staleness_ms);
                let source = self.source(&metadata, r.shard, r.epoch, wish).await?;
                let lines = Lines { source, query: Some(query), listing: None, keys_only: r.keys_only };
                Ok(stream::answer("Storage/List", lines, observation))
            })
            .await
    }

    async fn new_shard(
        &self,
        request: Request<wire::NewShardRequest>,
    ) -> Result<Response<wire::Shard>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let client = caller(&metadata)?;
            let info = self.0.catalog.new_shard(&client, new_shard_from_wire(r)?).await?;
            Ok(convert::shard_info_to_wire(&info))
        };
        self.0.unary("Storage/NewShard", call).await
    }

    async fn close_shard(
        &self,
        request: Request<wire::CloseShardRequest>,
    ) -> Result<Response<wire::Shard>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let client = caller(&metadata)?;
            let info = self.0.catalog.close_shard(&client, &convert::selector_from_wire(r.shard)?).await?;
            Ok(convert::shard_info_to_wire(&info))
        };
        self.0.unary("Storage/CloseShard", call).await
    }

    async fn rename_shard(
        &self,
        request: Request<wire::RenameShardRequest>,
    ) -> Result<Response<wire::Shard>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let client = caller(&metadata)?;
            let selector = convert::selector_from_wire(r.shard)?;
            let info = self.0.catalog.rename_shard(&client, &selector, ShardName::new(r.new_name)?).await?;
            Ok(convert::shard_info_to_wire(&info))
        };
        self.0.unary("Storage/RenameShard", call).await
    }

    async fn delete_shard(
        &self,
        request: Request<wire::DeleteShardRequest>,
    ) -> Result<Response<wire::Shard>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let client = caller(&metadata)?;
            let selector = convert::selector_from_wire(r.shard)?;
            let info = self.0.catalog.delete_shard(&client, &selector, r.only_if_empty).await?;
            Ok(convert::shard_info_to_wire(&info))
        };
        self.0.unary("Storage/DeleteShard", call).await
    }

    type ListShardsStream = Answer<wire::Shard>;

    async fn list_shards(
        &self,
        request: Request<wire::ListShardsRequest>,
    ) -> Result<Response<Self::ListShardsStream>, Status> {
        self.0
            .streaming("Storage/ListShards", async |observation| {
                let (metadata, _, r) = request.into_parts();
                let client = caller(&metadata)?;
                let mut shards = self.0.catalog.list_shards(&client, r.include_deleted).await?;
                shards.sort_by(|a, b| a.name.cmp(&b.name).then(a.id.cmp(&b.id)));
                Ok(stream::ready(shards.iter().map(convert::shard_info_to_wire).collect(), observation))
            })
            .await
    }

    async fn get_shard(
        &self,
        request: Request<wire::GetShardRequest>,
    ) -> Result<Response<wire::Shard>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let client = caller(&metadata)?;
            let selector = convert::selector_from_wire(r.shard)?;
            let mut info: ShardInfo = self.0.catalog.get_shard(&client, &selector).await?;
            match info.state {
                ShardState::Active | ShardState::ReadOnly => {
                    // Only the primary knows the usage; elsewhere the answer goes without it.
                    if self.0.catalog.local_shard(&client, &selector, None).is_ok() {
                        let usage = self.0.shard(&client, &selector, 0).await?.usage();
                        info.used_bytes = Some(usage.used_bytes);
                        info.inodes = Some(usage.inodes);
                    }
                }
                ShardState::Creating | ShardState::Deleted => {}
            }
            Ok(convert::shard_info_to_wire(&info))
        };
        self.0.unary("Storage/GetShard", call).await
    }

    async fn snapshot_shard(
        &self,
        request: Request<wire::SnapshotShardRequest>,
    ) -> Result<Response<wire::Shard>, Status> {
        self.0.unary("Storage/SnapshotShard", snapshots::snapshot(&self.0, request)).await
    }

    type ListSnapshotsStream = Answer<wire::Shard>;

    async fn list_snapshots(
        &self,
        request: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListSnapshotsStream>, Status> {
        self.0
            .streaming("Storage/ListSnapshots", async |observation| {
                Ok(stream::ready(snapshots::list(&self.0, request).await?, observation))
            })
            .await
    }

    async fn rollback_shard(
        &self,
        request: Request<wire::RollbackShardRequest>,
    ) -> Result<Response<wire::Shard>, Status> {
        self.0.unary("Storage/RollbackShard", snapshots::roll_back(&self.0, request)).await
    }

    async fn clone_shard(
        &self,
        request: Request<wire::CloneShardRequest>,
    ) -> Result<Response<wire::Shard>, Status> {
        self.0.unary("Storage/CloneShard", snapshots::clone(&self.0, request)).await
    }
}

/// Bytes of a place in a listing. The key of what the mount made and moved to the greatest depth with the longest
/// names is longer than one over gRPC may be.
const LIST_POSITION_BYTES_MAX: usize = 256 * (shardfs_proto::types::limits::MOVED_DEPTH_MAX + 1);

/// The items that are well-formed, and the errors of the others at their positions, ascending.
fn split_malformed(items: Vec<wire::PutItem>) -> (Vec<PutItem>, Vec<(usize, Error)>) {
    let (mut good, mut bad) = (Vec::with_capacity(items.len()), Vec::new());
    for (position, item) in items.into_iter().enumerate() {
        match convert::put_item_from_wire(item) {
            Ok(item) => good.push(item),
            Err(error) => bad.push((position, error)),
        }
    }
    (good, bad)
}

/// The results of all items: those of [`split_malformed`]'s errors in their places among the others.
fn merge(results: Vec<Result<ObjectMeta>>, malformed: Vec<(usize, Error)>) -> Vec<Result<ObjectMeta>> {
    let mut merged = Vec::with_capacity(results.len() + malformed.len());
    let mut results = results.into_iter();
    for (position, error) in malformed {
        merged.extend(results.by_ref().take(position - merged.len()));
        merged.push(Err(error));
    }
    merged.extend(results);
    merged
}

fn check_items(items: usize, what: &str) -> Result<()> {
    if items > BATCH_ITEMS_MAX {
        return Err(Error::new(
            Reason::TooLarge,
            format!("the batch has {items} {what}; the limit is {BATCH_ITEMS_MAX}: send several"),
        ));
    }
    Ok(())
}

fn new_shard_from_wire(r: wire::NewShardRequest) -> Result<NewShard> {
    let mode = r.mode.unwrap_or(ROOT_MODE_DEFAULT);
    if mode & !MODE_BITS != 0 {
        return Err(Error::invalid(format!("mode {mode:o}: only the bits 7777 are permission bits")));
    }
    if r.request_id.len() > REQUEST_ID_BYTES_MAX {
        return Err(Error::invalid(format!(
            "request_id has {} bytes; the limit is {REQUEST_ID_BYTES_MAX}",
            r.request_id.len()
        )));
    }
    Ok(NewShard {
        name: ShardName::new(r.name)?,
        limit_bytes: (r.limit_bytes != 0).then_some(r.limit_bytes),
        mode,
        uid: r.uid,
        gid: r.gid,
        request_id: r.request_id,
    })
}

/// The answers to a BatchGet, in request order.
struct Gets {
    source: Source,
    keys: Vec<Bytes>,
    next: usize,
    meta_only: bool,
    /// Looked up and not answered yet: the keys before `next`.
    found: std::vec::IntoIter<(usize, Key, Result<read::Value>)>,
}

impl Gets {
    fn look_up(&mut self) -> Result<()> {
        let end = self.keys.len().min(self.next + GET_GROUP_KEYS);
        let checked: Vec<(usize, Result<Key>)> =
            (self.next..end).map(|at| (at, Key::new(std::mem::take(&mut self.keys[at])))).collect();
        self.next = end;
        let good: Vec<Key> = checked.iter().filter_map(|(_, key)| key.as_ref().ok().cloned()).collect();
        let mut values = read::find_values(&self.source.view, &good)?.into_iter();
        let found: Vec<_> = checked
            .into_iter()
            .map(|(at, key)| match key {
                Ok(key) => {
                    let value =
                        values.next().unwrap_or_else(|| Err(Error::internal("fewer values than keys")));
                    (at, key, value)
                }
                // Only the error is looked at.
                Err(error) => (at, placeholder(), Err(error)),
            })
            .collect();
        self.found = found.into_iter();
        Ok(())
    }
}

fn placeholder() -> Key {
    Key::new(Bytes::from_static(b"-")).expect("`-` is a key")
}

impl Producer for Gets {
    type Message = wire::BatchGetReply;

    fn wanted_back(&self) -> bool {
        self.source.view.is_wanted_back()
    }

    fn turn(&mut self, out: &mut Vec<wire::BatchGetReply>) -> Result<Turn> {
        let turn = self.turn_inner(out);
        self.source.finish_some(turn, out)
    }
}

impl Gets {
    fn turn_inner(&mut self, out: &mut Vec<wire::BatchGetReply>) -> Result<Turn> {
        let mut bytes = 0;
        while bytes < GET_TURN_BYTES_MAX && out.len() < GET_GROUP_KEYS {
            let Some((at, key, value)) = self.found.next() else {
                if self.next == self.keys.len() {
                    return Ok(Turn::Done);
                }
                self.look_up()?;
                continue;
            };
            let outcome = value.and_then(|value| {
                let length = if self.meta_only { 0 } else { value.answer_bytes(&key, 0, None)? };
                let view = &self.source.view;
                let content = read::content(view, &value.record, 0, length)?;
                let meta = value.record.meta(value.inode, view.chunk_bytes());
                Ok(get_reply(meta, content, self.source.label()))
            });
            let outcome = match outcome {
                // Not of this key alone: the device fails, or is another node's.
                Err(error) if error.reason() == Reason::Io => return Err(error),
                Ok(reply) => {
                    bytes += reply.value.len();
                    wire::batch_get_reply::Outcome::Found(reply)
                }
                Err(error) if self.source.may_be_elsewhere(error.reason()) => return Err(error),
                Err(error) => wire::batch_get_reply::Outcome::Error(detail_to_wire(
                    &about::<()>(self.source.shard_id(), Err(error)).expect_err("it is an error"),
                )),
            };
            let index = u32::try_from(at).expect("a batch has a bounded number of keys");
            out.push(wire::BatchGetReply { index, outcome: Some(outcome) });
        }
        Ok(Turn::More)
    }
}

/// The messages of a List.
struct Lines {
    source: Source,
    /// Taken at the first turn, which begins the listing where it may block.
    query: Option<ListQuery>,
    listing: Option<Listing<ReadView>>,
    keys_only: bool,
}

impl Lines {
    fn message(&self, batch: Vec<Listed>) -> Result<wire::ListReply> {
        let inodes: Vec<InodeNo> = match self.keys_only {
            true => Vec::new(),
            false => batch
                .iter()
                .filter_map(|line| match line {
                    Listed::Key(found) => Some(found.inode),
                    Listed::CommonPrefix(_) => None,
                })
                .collect(),
        };
        let mut metas = read::metas(&self.source.view, &inodes)?.into_iter();
        let entries = batch.into_iter().map(|line| {
            Ok(match line {
                Listed::Key(WalkKey { key, kind, .. }) => wire::ListEntry {
                    entry: Some(list_entry::Entry::Key(key)),
                    kind: convert::kind_to_wire(kind).into(),
                    meta: metas.next().transpose()?.as_ref().map(convert::meta_to_wire),
                },
                Listed::CommonPrefix(common) => wire::ListEntry {
                    entry: Some(list_entry::Entry::CommonPrefix(common)),
                    kind: wire::FileKind::Unspecified.into(),
                    meta: None,
                },
            })
        });
        Ok(wire::ListReply { entries: entries.collect::<Result<_>>()?, view: self.source.label() })
    }

    fn turn_inner(&mut self, out: &mut Vec<wire::ListReply>) -> Result<Turn> {
        let listing = match (&mut self.listing, self.query.take()) {
            (Some(listing), _) => listing,
            (none, query) => none.insert(Listing::new(
                self.source.view.clone(),
                InodeNo::ROOT,
                &query.unwrap_or_default(),
            )?),
        };
        let mut batch = Vec::new();
        let mut bytes = 0;
        let mut turn = Turn::More;
        while batch.len() < LIST_BATCH_ENTRIES_MAX && bytes < LIST_BATCH_BYTES_MAX {
            match listing.step()? {
                Step::Item(line) => {
                    bytes += match &line {
                        Listed::Key(found) => found.key.len(),
                        Listed::CommonPrefix(common) => common.len(),
                    };
                    batch.push(line);
                }
                Step::Pause => break,
                Step::End => {
                    turn = Turn::Done;
                    break;
                }
            }
        }
        if !batch.is_empty() {
            split(self.message(batch)?, out);
        }
        Ok(turn)
    }
}

/// Cuts a message whose metadata is large.
fn split(message: wire::ListReply, out: &mut Vec<wire::ListReply>) {
    let (mut entries, mut bytes) = (Vec::new(), 0);
    for entry in message.entries {
        bytes += entry.encoded_len();
        entries.push(entry);
        if bytes >= LIST_BATCH_BYTES_MAX {
            out.push(wire::ListReply { entries: std::mem::take(&mut entries), view: message.view.clone() });
            bytes = 0;
        }
    }
    if !entries.is_empty() {
        out.push(wire::ListReply { entries, view: message.view });
    }
}

impl Producer for Lines {
    type Message = wire::ListReply;

    fn wanted_back(&self) -> bool {
        self.source.view.is_wanted_back()
    }

    fn turn(&mut self, out: &mut Vec<wire::ListReply>) -> Result<Turn> {
        let turn = self.turn_inner(out);
        self.source.finish_some(turn, out)
    }
}

// Keys over gRPC and places in listings: a list can always be resumed at what it gave out.
const _: () = assert!(LIST_POSITION_BYTES_MAX >= KEY_BYTES_MAX);
