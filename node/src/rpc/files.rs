//! The Files service: the POSIX operations, by inode number.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::convert;
use shardfs_proto::types::cluster::{Selector, ShardStat};
use shardfs_proto::types::limits::{
    LOCK_WAIT_MAX, READDIR_ENTRIES_MAX, SESSION_LABEL_BYTES_MAX, SESSION_TTL, VALUE_BYTES_MAX,
    XATTR_NAME_BYTES_MAX,
};
use shardfs_proto::types::op::{Durability, Operation};
use shardfs_proto::types::{
    Cookie, Epoch, Error, InodeNo, LockOwner, LockRange, Reason, Result, SessionId, ShardId,
};
use shardfs_proto::wire::{self, files_server::Files};
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use super::source::Source;
use super::{INLINE_READ_BYTES_MAX, Services, about, caller, on_view, write_id};
use crate::shard::{Mutation, Shard, Wanted, read, seek};

/// Entries of a directory that are read on an async thread; more go to the blocking pool.
const INLINE_ENTRIES_MAX: u32 = 128;
/// Inodes of one Release, or of a resume: far more than a process may have open.
const OPEN_INODES_MAX: usize = 1 << 20;

/// The handlers.
pub struct FilesService(Services);

/// A call's shard, opened, and its session.
struct Target {
    shard: Arc<Shard>,
    session: Option<SessionId>,
}

impl Target {
    fn id(&self) -> ShardId {
        self.shard.id()
    }

    fn session(&self) -> Result<SessionId> {
        in_session(self.session)
    }
}

fn header(header: Option<wire::CallHeader>) -> Result<wire::CallHeader> {
    header.ok_or_else(|| Error::invalid("the call's header is missing"))
}

fn in_session(session: Option<SessionId>) -> Result<SessionId> {
    session.ok_or_else(|| {
        Error::invalid("the call needs a session: open one with Files.OpenSession and name it in the header")
    })
}

impl FilesService {
    pub(super) fn new(services: Services) -> FilesService {
        FilesService(services)
    }

    async fn target(&self, metadata: &MetadataMap, header: Option<wire::CallHeader>) -> Result<Target> {
        let client = caller(metadata)?;
        let header = self::header(header)?;
        let selector = Selector::Id(ShardId::new(header.shard_id)?);
        let shard = self.0.shard(&client, &selector, header.epoch).await?;
        Ok(Target { shard, session: SessionId::new(header.session_id) })
    }

    /// What a read reads from.
    async fn source(&self, metadata: &MetadataMap, header: Option<wire::CallHeader>) -> Result<Source> {
        let client = caller(metadata)?;
        let header = self::header(header)?;
        let selector = Selector::Id(ShardId::new(header.shard_id)?);
        let session = SessionId::new(header.session_id);
        let wish = (header.read_preference, header.max_staleness_ms);
        self.0.source(&client, &selector, header.epoch, session, wish).await
    }

    /// The epoch under which the shard is served.
    fn epoch(&self, metadata: &MetadataMap, shard: ShardId) -> Result<u64> {
        let local = self.0.catalog.local_shard(&caller(metadata)?, &Selector::Id(shard), None)?;
        Ok(local.epoch.get())
    }
}

fn ttl_ms() -> u32 {
    u32::try_from(SESSION_TTL.as_millis()).unwrap_or(u32::MAX)
}

fn inodes(numbers: Vec<u64>) -> Result<Vec<InodeNo>> {
    if numbers.len() > OPEN_INODES_MAX {
        return Err(Error::new(
            Reason::TooLarge,
            format!("{} inodes in one call; the limit is {OPEN_INODES_MAX}", numbers.len()),
        ));
    }
    numbers.into_iter().map(InodeNo::new).collect()
}

fn check_xattr_name(name: &Bytes) -> Result<()> {
    if name.is_empty() || name.len() > XATTR_NAME_BYTES_MAX || name.contains(&0) {
        return Err(Error::invalid(format!(
            "an extended attribute's name has 1..={XATTR_NAME_BYTES_MAX} bytes and no NUL"
        )));
    }
    Ok(())
}

#[tonic::async_trait]
impl Files for FilesService {
    async fn open_session(
        &self,
        request: Request<wire::OpenSessionRequest>,
    ) -> Result<Response<wire::OpenSessionReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            if r.label.len() > SESSION_LABEL_BYTES_MAX {
                return Err(Error::invalid(format!(
                    "the session's label has {} bytes; the limit is {SESSION_LABEL_BYTES_MAX}",
                    r.label.len()
                )));
            }
            let target = self.target(&metadata, r.header).await?;
            let session = about(target.id(), target.shard.open_session(r.label).await)?;
            let epoch = self.epoch(&metadata, target.id())?;
            Ok(wire::OpenSessionReply { session_id: session.get(), ttl_ms: ttl_ms(), epoch })
        };
        self.0.unary("Files/OpenSession", call).await
    }

    async fn keep_session(
        &self,
        request: Request<wire::KeepSessionRequest>,
    ) -> Result<Response<wire::KeepSessionReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            if !r.resume && !r.open_inodes.is_empty() {
                return Err(Error::invalid("open_inodes without resume"));
            }
            let resume = r.resume.then(|| inodes(r.open_inodes)).transpose()?;
            let header = header(r.header)?;
            let selector = Selector::Id(ShardId::new(header.shard_id)?);
            let session = in_session(SessionId::new(header.session_id))?;
            let (local, shard) =
                self.0.catalog.opened_shard(&caller(&metadata)?, &selector, Epoch::new(header.epoch))?;
            // Sessions of a shard that is not open do not age, and hold everything once it is: clients keep their sessions with
            // all shards, and those that nobody uses would be opened for nothing else.
            let Some(shard) = shard else {
                let epoch = local.epoch.get();
                return Ok(wire::KeepSessionReply { ttl_ms: ttl_ms(), epoch, resume_wanted: false });
            };
            let kept = about(local.id, shard.keep_session(session, resume).await)?;
            let epoch = self.epoch(&metadata, local.id)?;
            Ok(wire::KeepSessionReply { ttl_ms: ttl_ms(), epoch, resume_wanted: kept.resume_wanted })
        };
        self.0.unary("Files/KeepSession", call).await
    }

    async fn close_session(
        &self,
        request: Request<wire::CloseSessionRequest>,
    ) -> Result<Response<wire::CloseSessionReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let target = self.target(&metadata, r.header).await?;
            about(target.id(), target.shard.close_session(target.session()?).await)?;
            Ok(wire::CloseSessionReply {})
        };
        self.0.unary("Files/CloseSession", call).await
    }

    async fn mutate(
        &self,
        request: Request<wire::MutateRequest>,
    ) -> Result<Response<wire::MutateReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let operation = convert::operation_from_wire(r.operation)?;
            let durability = convert::durability_from_wire(r.durability, Durability::Buffered)?;
            let target = self.target(&metadata, r.header).await?;
            let (session, sequence) = write_id(target.session.map_or(0, SessionId::get), r.sequence)?;
            let repetition = r.repetition.map(convert::repetition_from_wire);
            if repetition.is_some() && (sequence.is_none() || !operation.is_replayable()) {
                return Err(Error::invalid(
                    "a repetition is of a numbered Write, SetAttr, Allocate or SetXattr that was answered before it was durable",
                ));
            }
            if matches!(operation, Operation::Create { open: true, .. }) {
                target.session()?;
            }
            let durability = match &operation {
                // Whoever holds a lock relies on it, and whoever gave one back on its being gone, whatever fails.
                Operation::SetLock { .. } => {
                    target.session()?;
                    Durability::Sync
                }
                operation if operation.is_replayable() => durability,
                _ => self.0.lasting(target.id(), durability),
            };
            let mutation = Mutation { session, sequence, durability, operation };
            let result = about(target.id(), target.shard.mutate_again(mutation, repetition).await)?;
            Ok(wire::MutateReply { result: Some(convert::op_result_to_wire(&result)) })
        };
        self.0.unary("Files/Mutate", call).await
    }

    async fn sync(&self, request: Request<wire::SyncRequest>) -> Result<Response<wire::SyncReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let target = self.target(&metadata, r.header).await?;
            about(target.id(), target.shard.sync().await)?;
            Ok(wire::SyncReply {})
        };
        self.0.unary("Files/Sync", call).await
    }

    async fn lookup(
        &self,
        request: Request<wire::LookupRequest>,
    ) -> Result<Response<wire::LookupReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let parent = InodeNo::new(r.parent)?;
            let source = self.source(&metadata, r.header).await?;
            let attr = source.read(|view| read::lookup(view, parent, &r.name))?;
            Ok(wire::LookupReply { attr: Some(convert::attr_to_wire(&attr)), view: source.label() })
        };
        self.0.unary("Files/Lookup", call).await
    }

    async fn get_attr(
        &self,
        request: Request<wire::GetAttrRequest>,
    ) -> Result<Response<wire::GetAttrReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let inode = InodeNo::new(r.inode)?;
            let source = self.source(&metadata, r.header).await?;
            let attr = source.read(|view| read::get_attr(view, inode))?;
            Ok(wire::GetAttrReply { attr: Some(convert::attr_to_wire(&attr)), view: source.label() })
        };
        self.0.unary("Files/GetAttr", call).await
    }

    async fn open(&self, request: Request<wire::OpenRequest>) -> Result<Response<wire::OpenReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let inode = InodeNo::new(r.inode)?;
            let target = self.target(&metadata, r.header).await?;
            let attr = about(target.id(), target.shard.register_open(target.session()?, inode).await)?;
            Ok(wire::OpenReply { attr: Some(convert::attr_to_wire(&attr)) })
        };
        self.0.unary("Files/Open", call).await
    }

    async fn release(
        &self,
        request: Request<wire::ReleaseRequest>,
    ) -> Result<Response<wire::ReleaseReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let inodes = inodes(r.inodes)?;
            let target = self.target(&metadata, r.header).await?;
            about(target.id(), target.shard.release(target.session()?, &inodes).await)?;
            Ok(wire::ReleaseReply {})
        };
        self.0.unary("Files/Release", call).await
    }

    async fn read(&self, request: Request<wire::ReadRequest>) -> Result<Response<wire::ReadReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let inode = InodeNo::new(r.inode)?;
            if r.length as usize > VALUE_BYTES_MAX {
                return Err(Error::new(
                    Reason::TooLarge,
                    format!("a read of {} bytes; one answer carries at most {VALUE_BYTES_MAX}", r.length),
                ));
            }
            let source = self.source(&metadata, r.header).await?;
            let content = async {
                let record = read::regular(&source.view, inode)?;
                let length = u64::from(r.length).min(record.size.saturating_sub(r.offset));
                let heavy = length > INLINE_READ_BYTES_MAX;
                on_view("Files/Read", source.view.clone(), heavy, move |view| {
                    read::content(view, &record, r.offset, length)
                })
                .await
            };
            let content = content.await;
            Ok(wire::ReadReply { data: source.finish(content)?, view: source.label() })
        };
        self.0.unary("Files/Read", call).await
    }

    async fn seek(&self, request: Request<wire::SeekRequest>) -> Result<Response<wire::SeekReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let inode = InodeNo::new(r.inode)?;
            let what = convert::seek_for_from_wire(r.what)?;
            let source = self.source(&metadata, r.header).await?;
            let sought = on_view("Files/Seek", source.view.clone(), true, move |view| {
                seek::seek(view, inode, r.offset, what)
            });
            let sought = sought.await;
            Ok(convert::sought_to_wire(source.finish(sought)?, source.label()))
        };
        self.0.unary("Files/Seek", call).await
    }

    async fn read_link(
        &self,
        request: Request<wire::ReadLinkRequest>,
    ) -> Result<Response<wire::ReadLinkReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let inode = InodeNo::new(r.inode)?;
            let source = self.source(&metadata, r.header).await?;
            let target = source.read(|view| read::read_link(view, inode))?;
            Ok(wire::ReadLinkReply { target, view: source.label() })
        };
        self.0.unary("Files/ReadLink", call).await
    }

    async fn read_directory(
        &self,
        request: Request<wire::ReadDirectoryRequest>,
    ) -> Result<Response<wire::ReadDirectoryReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let inode = InodeNo::new(r.inode)?;
            if r.limit == 0 || r.limit > READDIR_ENTRIES_MAX {
                return Err(Error::invalid(format!(
                    "a limit of {} entries is not in 1..={READDIR_ENTRIES_MAX}",
                    r.limit
                )));
            }
            let source = self.source(&metadata, r.header).await?;
            let (view, heavy) = (source.view.clone(), r.limit > INLINE_ENTRIES_MAX);
            let page = on_view("Files/ReadDirectory", view, heavy, move |view| {
                read::read_directory(view, inode, Cookie::new(r.after_cookie), r.limit, r.attributes)
            });
            let page = page.await;
            let page = source.finish(page)?;
            let entries = page.entries.into_iter().map(|entry| wire::DirectoryEntry {
                name: entry.name,
                inode: entry.inode.get(),
                kind: convert::kind_to_wire(entry.kind).into(),
                cookie: entry.cookie.get(),
                attr: entry.attr.as_ref().map(convert::attr_to_wire),
            });
            Ok(wire::ReadDirectoryReply {
                entries: entries.collect(),
                end: page.end,
                parent: page.parent.get(),
                view: source.label(),
            })
        };
        self.0.unary("Files/ReadDirectory", call).await
    }

    async fn get_xattr(
        &self,
        request: Request<wire::GetXattrRequest>,
    ) -> Result<Response<wire::GetXattrReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let inode = InodeNo::new(r.inode)?;
            check_xattr_name(&r.name)?;
            let source = self.source(&metadata, r.header).await?;
            let value = source.read(|view| read::get_xattr(view, inode, &r.name))?;
            Ok(wire::GetXattrReply { value, view: source.label() })
        };
        self.0.unary("Files/GetXattr", call).await
    }

    async fn list_xattrs(
        &self,
        request: Request<wire::ListXattrsRequest>,
    ) -> Result<Response<wire::ListXattrsReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let inode = InodeNo::new(r.inode)?;
            let source = self.source(&metadata, r.header).await?;
            let names = source.read(|view| read::list_xattrs(view, inode))?;
            Ok(wire::ListXattrsReply { names, view: source.label() })
        };
        self.0.unary("Files/ListXattrs", call).await
    }

    async fn get_lock(
        &self,
        request: Request<wire::GetLockRequest>,
    ) -> Result<Response<wire::GetLockReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let (inode, range) = (InodeNo::new(r.inode)?, LockRange::new(r.start, r.end)?);
            let kind = convert::lock_kind_from_wire(r.kind)?;
            let target = self.target(&metadata, r.header).await?;
            let owner = LockOwner { session: target.session()?, number: r.owner };
            let held =
                about(target.id(), target.shard.test_lock(Wanted { owner, inode, range, kind }).await)?;
            Ok(wire::GetLockReply { conflict: held.as_ref().map(convert::file_lock_to_wire) })
        };
        self.0.unary("Files/GetLock", call).await
    }

    async fn wait_lock(
        &self,
        request: Request<wire::WaitLockRequest>,
    ) -> Result<Response<wire::WaitLockReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let (inode, range) = (InodeNo::new(r.inode)?, LockRange::new(r.start, r.end)?);
            let kind = convert::lock_kind_from_wire(r.kind)?;
            let within = Duration::from_millis(r.wait_ms.into()).min(LOCK_WAIT_MAX);
            let target = self.target(&metadata, r.header).await?;
            let owner = LockOwner { session: target.session()?, number: r.owner };
            let wanted = Wanted { owner, inode, range, kind };
            about(target.id(), target.shard.wait_lock(wanted, within).await)?;
            Ok(wire::WaitLockReply {})
        };
        self.0.unary("Files/WaitLock", call).await
    }

    async fn stat_shard(
        &self,
        request: Request<wire::StatShardRequest>,
    ) -> Result<Response<wire::StatShardReply>, Status> {
        let call = async {
            let (metadata, _, r) = request.into_parts();
            let header = r.header.ok_or_else(|| Error::invalid("the call's header is missing"))?;
            let client = caller(&metadata)?;
            let selector = Selector::Id(ShardId::new(header.shard_id)?);
            let room = self.0.catalog.local_shard(&client, &selector, Epoch::new(header.epoch))?.room;
            let usage = self.0.shard(&client, &selector, header.epoch).await?.usage();
            let growth = room.growth_bytes();
            let (total_bytes, free_bytes) = match usage.limit_bytes {
                Some(limit) => (limit, limit.saturating_sub(usage.used_bytes)),
                None => (room.total_bytes(), growth),
            };
            Ok(convert::shard_stat_to_wire(&ShardStat {
                total_bytes,
                free_bytes,
                available_bytes: free_bytes.min(growth),
                inodes_used: usage.inodes,
                used_bytes: usage.used_bytes,
                state: usage.state,
            }))
        };
        self.0.unary("Files/StatShard", call).await
    }
}
