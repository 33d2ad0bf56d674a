//! What sessions do to a shard: begin and end, hold files open, stage contents, close the shard.

use bytes::Bytes;
use shardfs_proto::types::limits::{SESSION_LABEL_BYTES_MAX, SESSIONS_PER_SHARD_MAX};
use shardfs_proto::types::op::ShardState;
use shardfs_proto::types::{Attr, Error, InodeNo, Reason, Result, SessionId};

use super::Apply;
use crate::shard::keys::{self, Cf, ContentId};
use crate::shard::records::{Header, SessionRecord, Staged};
use crate::shard::session::{Effect, StagedContent};

impl Apply<'_, '_> {
    /// Begins a session.
    pub fn open_session(&mut self, label: &str) -> Result<SessionId> {
        if label.len() > SESSION_LABEL_BYTES_MAX {
            return Err(Error::invalid(format!(
                "a session's label has {} bytes; the limit is {SESSION_LABEL_BYTES_MAX}",
                label.len()
            )));
        }
        if self.live.session_count() >= SESSIONS_PER_SHARD_MAX {
            return Err(Error::new(
                Reason::Busy,
                format!("shard {} has {SESSIONS_PER_SHARD_MAX} sessions, the limit", self.header.id),
            ));
        }
        let session = self.txn.new_session();
        let record = SessionRecord { opened: self.now, label: label.to_owned() };
        self.txn.put(Cf::Sys, keys::session(session), record.encode());
        self.effects.push(Effect::Begin(session));
        Ok(session)
    }

    /// Ends a session whose result slots are `slots`; what it alone held is freed, what it had locked is not any more.
    pub fn end_session(&mut self, session: SessionId, slots: &[u16]) -> Result<()> {
        self.txn.delete(Cf::Sys, keys::session(session));
        for slot in slots {
            self.txn.delete(Cf::Sys, keys::result(session, *slot));
        }
        // First: what is freed below takes all its locks along.
        self.drop_locks_of(session);
        for ino in self.live.orphans_of(session) {
            self.let_go(session, ino)?;
        }
        self.effects.push(Effect::End(session));
        Ok(())
    }

    /// Takes a session off an orphan's holders, if it is one.
    fn let_go(&mut self, session: SessionId, ino: InodeNo) -> Result<()> {
        let Some(holders) = self.live.orphan(ino) else { return Ok(()) };
        if !holders.contains(&session) {
            return Ok(());
        }
        let left = holders.iter().copied().filter(|holder| *holder != session).collect();
        self.set_holders(ino, left)
    }

    /// Sets an orphan's holders; without any it is freed.
    pub fn set_holders(&mut self, ino: InodeNo, holders: Vec<SessionId>) -> Result<()> {
        if !holders.is_empty() {
            self.set_orphan(ino, holders);
            return Ok(());
        }
        self.txn.delete(Cf::Sys, keys::orphan(ino));
        self.effects.push(Effect::Orphan(ino, Vec::new()));
        match self.txn.inode(ino)? {
            Some(record) => self.free(ino, &record),
            None => Ok(()),
        }
    }

    /// Registers an open.
    pub fn register_open(&mut self, ino: InodeNo) -> Result<Attr> {
        let session = self.asking()?;
        self.live.check_open(session)?;
        let record = self.inode(ino)?;
        if record.nlink == 0 {
            let mut holders = self.live.orphan(ino).map(<[SessionId]>::to_vec).unwrap_or_default();
            if !holders.contains(&session) {
                holders.push(session);
                holders.sort_unstable();
                self.set_orphan(ino, holders);
            }
        }
        self.effects.push(Effect::Opens(session, ino, 1));
        Ok(self.attr(ino, &record))
    }

    /// Takes back one open for each inode listed.
    pub fn release(&mut self, inodes: &[InodeNo]) -> Result<()> {
        let session = self.asking()?;
        let mut counts = std::collections::BTreeMap::<InodeNo, u64>::new();
        for ino in inodes {
            *counts.entry(*ino).or_default() += 1;
        }
        for (ino, count) in counts {
            let held = self.live.opens(session, ino);
            let change = count.min(held);
            if change > 0 {
                self.effects.push(Effect::Opens(session, ino, -(change as i64)));
            }
            // A session that has not said what it holds may hold it still.
            if change == held && (held > 0 || !self.live.wants_resume(session)) {
                self.let_go(session, ino)?;
            }
        }
        Ok(())
    }

    /// A session says what it holds open. Opens that it registered since the shard was opened stay.
    pub fn resume(&mut self, open: &[InodeNo]) -> Result<()> {
        let session = self.asking()?;
        let mut counts = std::collections::BTreeMap::<InodeNo, u64>::new();
        for ino in open {
            *counts.entry(*ino).or_default() += 1;
        }
        if counts.values().sum::<u64>() > crate::shard::session::OPENS_PER_SESSION_MAX {
            return Err(Error::new(Reason::TooLarge, "a session lists more open files than it may hold"));
        }
        for (ino, count) in &counts {
            // What never was or is gone takes no memory.
            if self.txn.inode(*ino)?.is_none() {
                continue;
            }
            let more = count.saturating_sub(self.live.opens(session, *ino));
            if more > 0 {
                self.effects.push(Effect::Opens(session, *ino, more as i64));
            }
        }
        for ino in self.live.orphans_of(session) {
            if !counts.contains_key(&ino) && self.live.opens(session, ino) == 0 {
                self.let_go(session, ino)?;
            }
        }
        self.effects.push(Effect::Resumed(session));
        Ok(())
    }

    /// Begins a staged content.
    pub fn stage(&mut self) -> Result<ContentId> {
        let content = self.txn.new_content();
        let record = Staged { session: self.session, begun: self.now };
        self.txn.put(Cf::Sys, keys::staged(content), record.encode());
        self.effects.push(Effect::Staged(content, Some(StagedContent::default())));
        Ok(content)
    }

    /// Appends whole chunks to a staged content; only the last of all may be short.
    pub fn stage_chunks(&mut self, content: ContentId, chunks: &[Bytes]) -> Result<()> {
        let mut staged = self
            .live
            .staged(content)
            .ok_or_else(|| Error::internal(format!("content {} is not staged", content.get())))?;
        let bytes: u64 = chunks.iter().map(|chunk| chunk.len() as u64).sum();
        let used = self.txn.counters().charged_bytes();
        self.check_limit(used.saturating_add(bytes), used, self.live.staged_bytes())?;
        for chunk in chunks {
            let number = u32::try_from(staged.chunks)
                .map_err(|_| Error::new(Reason::FileTooLarge, "a value has at most 16 TiB"))?;
            self.txn.put_chunk(content, number, chunk.clone());
            staged.chunks += 1;
        }
        staged.bytes += bytes;
        self.txn.grow(bytes);
        self.effects.push(Effect::Staged(content, Some(staged)));
        self.check_growth()
    }

    /// Removes a staged content, of which any number of chunks may be there.
    pub fn unstage(&mut self, content: ContentId, chunks: u32) {
        self.txn.delete_chunks(content, 0, chunks);
        self.txn.delete(Cf::Sys, keys::staged(content));
        self.effects.push(Effect::Staged(content, None));
    }

    /// Closes the shard for good; the header as it is then.
    pub fn close_shard(&mut self) -> Header {
        let header = Header { state: ShardState::ReadOnly, ..self.header.clone() };
        self.txn.put(Cf::Sys, keys::HEADER, header.encode());
        header
    }
}
