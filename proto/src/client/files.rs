//! The POSIX operations, by inode number.

use std::future::Future;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use super::Client;
use super::retry::{ATTEMPT_MAX, Attempt, Target};
use super::session::{Session, header};
use super::unsynced::{Answered, Fill};
use crate::convert;
use crate::types::cluster::ShardStat;
use crate::types::op::{Durability, OpResult, Operation, SeekFor, Sought};
use crate::types::{Attr, Cookie, Error, FileKind, InodeNo, Reason, Result, ShardId};
use crate::wire;

/// One entry of a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirectoryEntry {
    /// Its name: 1..=255 bytes.
    pub name: Bytes,
    /// The inode that it names.
    pub inode: InodeNo,
    /// That inode's kind.
    pub kind: FileKind,
    /// Its place in the directory's order; keeps its value while the entry stays.
    pub cookie: Cookie,
    /// If asked for.
    pub attr: Option<Attr>,
}

/// A piece of a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirectoryPage {
    /// In cookie order, without `.` and `..`.
    pub entries: Vec<DirectoryEntry>,
    /// Nothing comes after.
    pub end: bool,
    /// The directory that holds this one; the root's is the root.
    pub parent: InodeNo,
}

impl Client {
    /// Applies one operation, once.
    ///
    /// # Errors
    /// Those of the operation; `Deadline` if the cluster did not answer in time: then the outcome is not
    /// known.
    pub async fn mutate(
        &self,
        shard: ShardId,
        operation: Operation,
        durability: Durability,
    ) -> Result<OpResult> {
        self.mutate_through(shard, operation, durability, None).await
    }

    /// The same, for somebody who has a file open, and had seen so many losses of locks when it opened it.
    ///
    /// # Errors
    /// Also `Io` if locks of the file were lost since.
    pub async fn mutate_through(
        &self,
        shard: ShardId,
        operation: Operation,
        durability: Durability,
        seen_lock_losses: Option<u64>,
    ) -> Result<OpResult> {
        let file = operation.changed_inode().zip(seen_lock_losses);
        let check = |session: &Session| match file {
            Some((inode, seen)) => session.locks.check(inode, seen),
            None => Ok(()),
        };
        let opens = matches!(operation, Operation::Create { open: true, .. });
        let kept_bytes =
            (durability == Durability::Buffered && operation.is_replayable()).then(|| match &operation {
                Operation::Write { data, .. } => data.len(),
                Operation::SetXattr { value, .. } => value.len(),
                _ => 0,
            });
        let operation = convert::operation_to_wire(&operation);
        let operation = &operation;
        let fill = Mutex::new(Fill::Low);
        let result = self
            .numbered_if(shard, opens, check, async |attempt, session, sequence| {
                let epoch = attempt.epoch;
                let request = wire::MutateRequest {
                    header: Some(header(shard, attempt.epoch, Some(session.id))),
                    sequence,
                    operation: Some(operation.clone()),
                    durability: convert::durability_to_wire(durability).into(),
                    repetition: None,
                };
                let reply = attempt.node.files().mutate(attempt.node.request(request)).await?.into_inner();
                let result =
                    reply.result.ok_or_else(|| tonic::Status::internal("the answer has no result"))?;
                let result =
                    convert::op_result_from_wire(result).map_err(|e| crate::status::to_status(&e))?;
                if opens && let Some(attr) = &result.attr {
                    session.opened(attr.inode);
                }
                match (&result.attr, kept_bytes) {
                    (Some(attr), Some(data_bytes)) => {
                        *fill.lock() = session.unsynced.keep(Answered {
                            epoch,
                            sequence,
                            inode: attr.inode.get(),
                            version: attr.version,
                            operation: operation.clone(),
                            data_bytes,
                        });
                    }
                    (Some(attr), None) => session.unsynced.note(epoch, attr.inode.get(), attr.version),
                    (None, None) => {}
                    (None, Some(_)) => return Err(tonic::Status::internal("the answer has no attributes")),
                }
                Ok(result)
            })
            .await?;
        match fill.into_inner() {
            Fill::Low => {}
            Fill::Half => {
                let client = self.clone();
                // Its failure shows at the next sync, which somebody waits for.
                tokio::spawn(async move { drop(client.make_durable(shard).await) });
            }
            Fill::Full => self.make_durable(shard).await?,
        }
        Ok(result)
    }

    /// Runs a mutation under a sequence number of the shard's session. If the shard does not know the
    /// session any more, and no attempt can have taken effect, it runs under a new one.
    pub(super) async fn numbered<T, F, Fut>(&self, shard: ShardId, registers: bool, attempt: F) -> Result<T>
    where
        F: Fn(Attempt, Arc<Session>, u64) -> Fut,
        Fut: Future<Output = Result<T, tonic::Status>>,
    {
        self.numbered_if(shard, registers, |_| Ok(()), attempt).await
    }

    /// The same, unless a check of the session under which it would run fails.
    pub(super) async fn numbered_if<T, C, F, Fut>(
        &self,
        shard: ShardId,
        registers: bool,
        check: C,
        attempt: F,
    ) -> Result<T>
    where
        C: Fn(&Session) -> Result<()>,
        F: Fn(Attempt, Arc<Session>, u64) -> Fut,
        Fut: Future<Output = Result<T, tonic::Status>>,
    {
        let mut session = self.session(shard).await?;
        loop {
            check(&session).map_err(|error| error.with_shard(shard))?;
            let _registering = if registers { Some(session.registering().await) } else { None };
            let numbered = session.number().await;
            let sequence = numbered.sequence;
            let mut attempts = 0;
            let attempt = &attempt;
            let outcome = self
                .call(Target::Shard(shard), |a| {
                    attempts = a.number + 1;
                    attempt(a, session.clone(), sequence)
                })
                .await;
            drop(numbered);
            match outcome {
                Err(error) if error.reason() == Reason::SessionUnknown => {
                    let next = self.replace_session(shard, &session).await?;
                    if attempts > 1 {
                        return Err(Error::new(
                            Reason::SessionUnknown,
                            "the session expired while the operation was repeated: whether it took effect is not known",
                        )
                        .with_shard(shard));
                    }
                    drop(_registering);
                    session = next;
                }
                outcome => return outcome,
            }
        }
    }

    /// Returns when everything that this client's session with the shard did before is on the device.
    ///
    /// # Errors
    /// Also if something that was answered before it was durable is lost for good, and nobody was told of it yet.
    pub async fn sync(&self, shard: ShardId) -> Result<()> {
        self.make_durable(shard).await?;
        self.check_untold_losses(shard)
    }

    /// The same, without telling what was lost: [`Client::check_losses`] does.
    pub async fn make_durable(&self, shard: ShardId) -> Result<()> {
        let session = self.inner.sessions.current(shard);
        let mark = session.as_ref().and_then(|session| session.unsynced.mark());
        let epoch = self
            .call(Target::Shard(shard), async |attempt| {
                let request = wire::SyncRequest { header: Some(header(shard, attempt.epoch, None)) };
                attempt.node.files().sync(attempt.node.request(request)).await?;
                Ok(attempt.epoch)
            })
            .await?;
        if let (Some(session), Some(mark)) = (session, mark) {
            session.unsynced.synced(mark, epoch);
        }
        Ok(())
    }

    /// Finds a name in a directory; `.` and `..` are names here as well.
    pub async fn lookup(&self, shard: ShardId, parent: InodeNo, name: &[u8]) -> Result<Attr> {
        let name = Bytes::copy_from_slice(name);
        let reply = self
            .read_call(shard, async |attempt, header| {
                let request = wire::LookupRequest { header, parent: parent.get(), name: name.clone() };
                attempt.node.files().lookup(attempt.node.request(request)).await
            })
            .await?;
        attr(reply.attr)
    }

    /// The attributes of an inode.
    pub async fn get_attr(&self, shard: ShardId, inode: InodeNo) -> Result<Attr> {
        let reply = self
            .read_call(shard, async |attempt, header| {
                let request = wire::GetAttrRequest { header, inode: inode.get() };
                attempt.node.files().get_attr(attempt.node.request(request)).await
            })
            .await?;
        attr(reply.attr)
    }

    /// Registers the inode as open, so that it outlives its last name, and returns its attributes.
    pub async fn open(&self, shard: ShardId, inode: InodeNo) -> Result<Attr> {
        let Some(mut session) = self.reading_session(shard).await? else {
            return self.get_attr(shard, inode).await;
        };
        loop {
            let registering = session.registering().await;
            let id = session.id;
            let opened = self
                .call(Target::Shard(shard), async |attempt| {
                    let header = Some(header(shard, attempt.epoch, Some(id)));
                    let request = wire::OpenRequest { header, inode: inode.get() };
                    attempt.node.files().open(attempt.node.request(request)).await
                })
                .await;
            match opened {
                Ok(reply) => {
                    session.opened(inode);
                    return attr(reply.into_inner().attr);
                }
                Err(error) if error.reason() == Reason::SessionUnknown => {
                    drop(registering);
                    session = self.replace_session(shard, &session).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Takes back registrations of [`Client::open`], one each. Not repeated when it fails: the next list
    /// of what is open mends it.
    pub async fn release(&self, shard: ShardId, inodes: Vec<InodeNo>) -> Result<()> {
        let Some(session) = self.reading_session(shard).await? else { return Ok(()) };
        let _registering = session.registering().await;
        for inode in &inodes {
            session.released(*inode);
        }
        let raw: Vec<u64> = inodes.iter().map(|inode| inode.get()).collect();
        let raw = &raw;
        let id = session.id;
        let released = self
            .call_within(
                Target::Shard(shard),
                super::session::CONTROL_ATTEMPT_MAX,
                super::session::CONTROL_ATTEMPT_MAX,
                async |attempt| {
                    if attempt.number > 0 {
                        // A second release of the same registration would take somebody else's.
                        return Err(tonic::Status::cancelled("a release is not repeated"));
                    }
                    let header = Some(header(shard, attempt.epoch, Some(id)));
                    let request = wire::ReleaseRequest { header, inodes: raw.clone() };
                    attempt.node.files().release(attempt.node.request(request)).await
                },
            )
            .await;
        if released.is_err() {
            self.inner.sessions.suspect(shard);
        }
        released.map(drop)
    }

    /// Content from `offset`; shorter than `length` only at the end of the file. At most 4 MiB.
    pub async fn read(&self, shard: ShardId, inode: InodeNo, offset: u64, length: u32) -> Result<Bytes> {
        let reply = self
            .read_call(shard, async |attempt, header| {
                let request = wire::ReadRequest { header, inode: inode.get(), offset, length };
                attempt.node.files().read(attempt.node.request(request)).await
            })
            .await?;
        Ok(reply.data)
    }

    /// Looks for the next data or hole at or after `offset`, by pages of 4096 bytes; `None` if the offset is at or past the
    /// file's end, or no data follows.
    ///
    /// # Errors
    /// `Unsupported` from a node that does not know the call.
    pub async fn seek(
        &self,
        shard: ShardId,
        inode: InodeNo,
        offset: u64,
        what: SeekFor,
    ) -> Result<Option<u64>> {
        let mut at = offset;
        loop {
            let reply = self
                .read_call(shard, async |attempt, header| {
                    let what = convert::seek_for_to_wire(what);
                    let request = wire::SeekRequest { header, inode: inode.get(), offset: at, what };
                    attempt.node.files().seek(attempt.node.request(request)).await
                })
                .await?;
            match convert::sought_from_wire(&reply)? {
                Sought::Found(found) => return Ok(Some(found)),
                Sought::Continue(next) if next > at => at = next,
                Sought::Continue(_) => return Err(Error::internal("a seek makes no progress")),
                // Looking for a hole there is always the file's end, unless it was cut meanwhile.
                Sought::Nothing if at > offset && what == SeekFor::Hole => return Ok(Some(at)),
                Sought::Nothing => return Ok(None),
            }
        }
    }

    /// A symlink's target.
    pub async fn read_link(&self, shard: ShardId, inode: InodeNo) -> Result<Bytes> {
        let reply = self
            .read_call(shard, async |attempt, header| {
                let request = wire::ReadLinkRequest { header, inode: inode.get() };
                attempt.node.files().read_link(attempt.node.request(request)).await
            })
            .await?;
        Ok(reply.target)
    }

    /// Entries after a cookie, at most `limit`.
    pub async fn read_directory(
        &self,
        shard: ShardId,
        inode: InodeNo,
        after: Cookie,
        limit: u32,
        attributes: bool,
    ) -> Result<DirectoryPage> {
        let reply = self
            .read_call(shard, async |attempt, header| {
                let request = wire::ReadDirectoryRequest {
                    header,
                    inode: inode.get(),
                    after_cookie: after.get(),
                    limit,
                    attributes,
                };
                attempt.node.files().read_directory(attempt.node.request(request)).await
            })
            .await?;
        let entry = |e: wire::DirectoryEntry| {
            Ok(DirectoryEntry {
                inode: InodeNo::new(e.inode)?,
                kind: convert::kind_from_wire(e.kind)?,
                cookie: Cookie::new(e.cookie),
                attr: e.attr.map(convert::attr_from_wire).transpose()?,
                name: e.name,
            })
        };
        Ok(DirectoryPage {
            entries: reply.entries.into_iter().map(entry).collect::<Result<_>>()?,
            end: reply.end,
            parent: InodeNo::new(reply.parent)?,
        })
    }

    /// An extended attribute.
    ///
    /// # Errors
    /// `NoAttribute`.
    pub async fn get_xattr(&self, shard: ShardId, inode: InodeNo, name: &[u8]) -> Result<Bytes> {
        let name = Bytes::copy_from_slice(name);
        let reply = self
            .read_call(shard, async |attempt, header| {
                let request = wire::GetXattrRequest { header, inode: inode.get(), name: name.clone() };
                attempt.node.files().get_xattr(attempt.node.request(request)).await
            })
            .await?;
        Ok(reply.value)
    }

    /// The names of an inode's extended attributes.
    pub async fn list_xattrs(&self, shard: ShardId, inode: InodeNo) -> Result<Vec<Bytes>> {
        let reply = self
            .read_call(shard, async |attempt, header| {
                let request = wire::ListXattrsRequest { header, inode: inode.get() };
                attempt.node.files().list_xattrs(attempt.node.request(request)).await
            })
            .await?;
        Ok(reply.names)
    }

    /// The shard's space.
    pub async fn stat_shard(&self, shard: ShardId) -> Result<ShardStat> {
        let session = self.reading_session(shard).await?.map(|session| session.id);
        let reply = self
            .call(Target::Shard(shard), async |attempt| {
                let request = wire::StatShardRequest { header: Some(header(shard, attempt.epoch, session)) };
                attempt.node.files().stat_shard(attempt.node.request(request)).await
            })
            .await?;
        convert::shard_stat_from_wire(reply.into_inner())
    }

    /// A read by the shard's session: it sees its own unsynced operations without a sync. Or one that a backup answers.
    async fn read_call<T, F, Fut>(&self, shard: ShardId, attempt: F) -> Result<T>
    where
        F: Fn(Attempt, Option<wire::CallHeader>) -> Fut,
        Fut: Future<Output = Result<tonic::Response<T>, tonic::Status>>,
    {
        let session = self.reading_session(shard).await?.map(|session| session.id);
        let attempt = &attempt;
        let bounds = (self.inner.config.deadline, ATTEMPT_MAX);
        let reply = self
            .read_at(shard, bounds, |a, from| {
                let (read_preference, max_staleness_ms) = convert::read_from_to_wire(from);
                let header = header(shard, a.epoch, session);
                attempt(a, Some(wire::CallHeader { read_preference, max_staleness_ms, ..header }))
            })
            .await?;
        Ok(reply.into_inner())
    }
}

fn attr(attr: Option<wire::Attr>) -> Result<Attr> {
    convert::attr_from_wire(attr.ok_or_else(|| Error::internal("the answer has no attributes"))?)
}
