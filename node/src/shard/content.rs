//! A streamed Put: takes a value of any size piece by piece and makes it visible as a whole.
//!
//! Pieces are gathered into chunks; a value that stays small becomes an ordinary Put. Otherwise chunks
//! are staged under a content id that no inode names; the commit gives them the key. A writer that is
//! dropped before leaves nothing; after a crash the next open of the shard removes what was staged.

use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use shardfs_proto::types::limits::FILE_BYTES_MAX;
use shardfs_proto::types::op::{Durability, ObjectMeta, Operation, PutItem, PutOptions};
use shardfs_proto::types::{Error, Key, Reason, Result, Sequence, SessionId};

use super::executor::{Answer, Command, Numbered, Work};
use super::handle::Shard;
use super::keys::ContentId;
use super::ops::StagedPut;

/// Bytes that are staged at a time; smaller values become ordinary Puts.
const STAGE_BYTES: usize = 1 << 20;

/// How a streamed Put begins.
#[derive(Clone, Debug)]
pub struct PutStreamStart {
    /// Where.
    pub key: Key,
    /// How.
    pub options: PutOptions,
    /// When the commit is answered.
    pub durability: Durability,
    /// The session, if any.
    pub session: Option<SessionId>,
    /// With a session: makes the commit exactly-once.
    pub sequence: Option<Sequence>,
    /// The bytes that must come; `None`: as many as do.
    pub size: Option<u64>,
}

/// See the module.
pub struct ContentWriter {
    shard: Arc<Shard>,
    start: PutStreamStart,
    /// Bytes in all.
    received: u64,
    /// Not staged yet; less than [`STAGE_BYTES`] between calls.
    buffer: BytesMut,
    staged: Option<Staged>,
}

/// A content that is staged until this is dropped. After a commit it is staged no more and the drop
/// does nothing; a repeated mutation that got its first answer leaves its content staged: it goes then.
struct Staged {
    shard: Arc<Shard>,
    content: ContentId,
}

impl Staged {
    async fn begin(shard: Arc<Shard>, session: Option<SessionId>) -> Result<Staged> {
        match shard.ask(Command::Stage { session }, Durability::Buffered).await? {
            Answer::Content(content) => Ok(Staged { shard, content }),
            _ => Err(Error::internal("the executor staged no content")),
        }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        self.shard.tell(Command::Unstage { content: self.content });
    }
}

impl ContentWriter {
    pub(super) fn new(shard: Arc<Shard>, start: PutStreamStart) -> Result<ContentWriter> {
        if let Some(size) = start.size.filter(|size| *size > FILE_BYTES_MAX) {
            return Err(Error::new(
                Reason::FileTooLarge,
                format!("key {}: {size} bytes announced; the limit is {FILE_BYTES_MAX}", start.key),
            ));
        }
        Ok(ContentWriter { shard, start, received: 0, buffer: BytesMut::new(), staged: None })
    }

    /// Takes the next bytes.
    pub async fn append(&mut self, data: Bytes) -> Result<()> {
        self.received += data.len() as u64;
        let limit = self.start.size.unwrap_or(FILE_BYTES_MAX);
        if self.received > limit {
            return Err(self.wrong_size());
        }
        self.buffer.extend_from_slice(&data);
        while self.buffer.len() >= STAGE_BYTES {
            let piece = self.buffer.split_to(STAGE_BYTES).freeze();
            self.stage(piece).await?;
        }
        Ok(())
    }

    fn wrong_size(&self) -> Error {
        match self.start.size {
            Some(size) => Error::invalid(format!(
                "key {}: the header announced {size} bytes, {} came",
                self.start.key, self.received
            )),
            None => Error::new(
                Reason::FileTooLarge,
                format!("key {}: a value has at most {FILE_BYTES_MAX} bytes", self.start.key),
            ),
        }
    }

    /// Stages bytes: whole chunks unless they are the last.
    async fn stage(&mut self, piece: Bytes) -> Result<()> {
        let content = match &self.staged {
            Some(staged) => staged.content,
            None => {
                // A task of its own: if this call is cancelled, what it staged is dropped with the task.
                let begin = Staged::begin(Arc::clone(&self.shard), self.start.session);
                let begun = self.shard.runtime().spawn(begin).await;
                let staged = begun.map_err(|e| Error::internal(format!("staging was lost: {e}")))??;
                self.staged.insert(staged).content
            }
        };
        let chunk_bytes = self.shard.header().chunk_bytes as usize;
        let cuts = (0..piece.len()).step_by(chunk_bytes);
        let chunks = cuts.map(|at| piece.slice(at..piece.len().min(at + chunk_bytes))).collect();
        let command = Command::StageChunks { content, chunks };
        self.shard.ask(command, Durability::Buffered).await.map(|_| ())
    }

    /// Makes the value visible, as a whole; its metadata.
    pub async fn commit(mut self) -> Result<ObjectMeta> {
        if self.start.size.is_some_and(|size| size != self.received) {
            return Err(self.wrong_size());
        }
        let rest = std::mem::take(&mut self.buffer).freeze();
        let work = match self.staged.as_ref().map(|staged| staged.content) {
            None => {
                let item =
                    PutItem { key: self.start.key.clone(), value: rest, options: self.start.options.clone() };
                Work::Operation(Operation::PutValue { item })
            }
            Some(content) => {
                if !rest.is_empty() {
                    self.stage(rest).await?;
                }
                Work::Staged(StagedPut {
                    key: self.start.key.clone(),
                    options: self.start.options.clone(),
                    content,
                })
            }
        };
        let PutStreamStart { session, sequence, durability, .. } = self.start;
        let numbered = sequence.map(|sequence| Numbered::of(sequence, &work));
        match self.shard.ask(Command::Mutate { session, numbered, work }, durability).await? {
            Answer::Result(result) => {
                result.meta.ok_or_else(|| Error::internal("a Put was answered without metadata"))
            }
            _ => Err(Error::internal("the executor answered a Put with something else")),
        }
    }
}
