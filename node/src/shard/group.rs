//! A group of commands at work: each in a layer of its own, with its effects and its result slot.
//!
//! Invariant: what [`Group::apply`] returned `Ok` for is in the transaction and in [`Live`], with a way
//! back; what it returned `Err` for is in neither.

use std::collections::HashSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use prost::Message;
use shardfs_proto::types::op::{OpResult, Operation, ShardState};
use shardfs_proto::types::{
    Error, InodeNo, LockKind, LockOwner, LockRange, Reason, Result, SessionId, Timestamp, clock,
};
use shardfs_proto::{convert, wire};

use super::executor::{Answer, Command, Numbered, Work};
use super::keys::{self, Cf};
use super::locks::{self, Waits, Wanted};
use super::ops::Apply;
use super::records::{Header, Slot};
use super::session::{Effect, Live, Seen, Undo, reused, slot_of};
use super::store::Store;
use super::txn::Txn;

/// See the module.
pub struct Group<'a> {
    txn: Txn<'a>,
    live: &'a mut Live,
    store: &'a dyn Store,
    header: &'a Header,
    room_bytes: u64,
    waits: &'a Waits,
    /// A session that is silent for longer ends when somebody else wants what it has locked.
    lock_silence: Duration,
    now: Timestamp,
    undo: Vec<Undo>,
    /// Files whose locks as they were before the group are in `undo`. What they were in between, thousands of them maybe, after each
    /// command, nobody needs.
    relocked: HashSet<InodeNo>,
    /// The header, if the shard was closed by this group.
    closed: Option<Header>,
}

impl<'a> Group<'a> {
    /// Begins. `room_bytes`: by how much the volume may become fuller.
    pub fn new(
        txn: Txn<'a>,
        live: &'a mut Live,
        store: &'a dyn Store,
        header: &'a Header,
        room_bytes: u64,
        (waits, lock_silence): (&'a Waits, Duration),
    ) -> Group<'a> {
        Group {
            txn,
            live,
            store,
            header,
            room_bytes,
            waits,
            lock_silence,
            now: clock::now(),
            undo: Vec::new(),
            relocked: HashSet::new(),
            closed: None,
        }
    }

    /// What is to be written, how to take the effects back, and the header if the shard was closed.
    pub fn finish(self) -> (Txn<'a>, Vec<Undo>, Option<Header>) {
        (self.txn, self.undo, self.closed)
    }

    /// Runs one command.
    pub fn apply(&mut self, command: &Command) -> Result<Answer> {
        let depth = self.txn.depth();
        let outcome = catch_unwind(AssertUnwindSafe(|| self.dispatch(command)));
        outcome.unwrap_or_else(|_| {
            self.txn.unwind(depth);
            Err(Error::internal(format!(
                "shard {}: an operation failed unexpectedly and changed nothing: please report this with the log",
                self.header.id
            )))
        })
        .map_err(|error| if error.shard().is_some() { error } else { error.with_shard(self.header.id) })
    }

    fn dispatch(&mut self, command: &Command) -> Result<Answer> {
        match command {
            Command::Mutate { session, numbered, work } => self.mutate(*session, *numbered, work),
            Command::OpenSession { label } => {
                self.step(None, |apply| apply.open_session(label)).map(Answer::Session)
            }
            Command::KeepSession { session, resume } => {
                self.live.touch(*session)?;
                if let Some(open) = resume {
                    self.step(Some(*session), |apply| apply.resume(open))?;
                }
                Ok(Answer::Keep { resume_wanted: self.live.wants_resume(*session) })
            }
            Command::EndSession { session } => {
                if self.live.is_known(*session) {
                    self.end_session(*session)?;
                }
                Ok(Answer::Done)
            }
            Command::Expire { silent } => self.expire(*silent),
            Command::RegisterOpen { session, inode } => {
                self.live.touch(*session)?;
                self.step(Some(*session), |apply| apply.register_open(*inode)).map(Answer::Attr)
            }
            Command::Release { session, inodes } => {
                self.live.touch(*session)?;
                self.step(Some(*session), |apply| apply.release(inodes)).map(|()| Answer::Done)
            }
            Command::TestLock { wanted } => {
                self.live.touch(wanted.owner.session)?;
                let locks = self.live.locks(wanted.inode);
                let held = locks::conflict(locks, wanted.owner, wanted.range, wanted.kind);
                Ok(Answer::Lock(held.copied()))
            }
            Command::CheckWait { wanted } => self.check_wait(wanted),
            Command::Stage { session } => {
                self.check_active()?;
                self.step(*session, |apply| apply.stage()).map(Answer::Content)
            }
            Command::StageChunks { content, chunks } => {
                self.check_active()?;
                self.step(None, |apply| apply.stage_chunks(*content, chunks)).map(|()| Answer::Done)
            }
            Command::Unstage { content } => {
                if let Some(staged) = self.live.staged(*content) {
                    let chunks = u32::try_from(staged.chunks).unwrap_or(u32::MAX);
                    self.step(None, |apply| {
                        apply.unstage(*content, chunks);
                        Ok(())
                    })?;
                }
                Ok(Answer::Done)
            }
            Command::CloseShard => {
                if self.closed.is_none() && self.header.state != ShardState::ReadOnly {
                    self.closed = Some(self.step(None, |apply| Ok(apply.close_shard()))?);
                }
                Ok(Answer::Done)
            }
        }
    }

    /// Runs something in a layer of its own, which is kept with its effects if it succeeds.
    fn step<T>(
        &mut self,
        session: Option<SessionId>,
        run: impl FnOnce(&mut Apply<'_, 'a>) -> Result<T>,
    ) -> Result<T> {
        let mut effects: Vec<Effect> = Vec::new();
        self.txn.push();
        let outcome = run(&mut Apply {
            txn: &mut self.txn,
            live: self.live,
            effects: &mut effects,
            session,
            now: self.now,
            header: self.header,
            room_bytes: self.room_bytes,
        });
        match outcome {
            Ok(value) => {
                self.txn.keep();
                for effect in effects {
                    let is_covered = match &effect {
                        Effect::Locks { inode, .. } => !self.relocked.insert(*inode),
                        _ => false,
                    };
                    let undo = self.live.apply(effect);
                    if !is_covered {
                        self.undo.push(undo);
                    }
                }
                Ok(value)
            }
            Err(error) => {
                self.txn.drop_layer();
                Err(error)
            }
        }
    }

    fn check_active(&self) -> Result<()> {
        if self.closed.is_none() && self.header.state == ShardState::Active {
            return Ok(());
        }
        Err(Error::new(
            Reason::ShardReadOnly,
            format!("shard {} is closed (read-only): its content never changes again", self.header.id),
        ))
    }

    fn mutate(
        &mut self,
        session: Option<SessionId>,
        numbered: Option<Numbered>,
        work: &Work,
    ) -> Result<Answer> {
        if let Some(session) = session {
            self.live.touch(session)?;
        }
        let id = match (session, numbered) {
            (Some(session), Some(numbered)) => Some((session, numbered)),
            (None, Some(_)) => return Err(Error::invalid("a sequence number needs a session")),
            (_, None) => None,
        };
        if let Some((session, numbered)) = id {
            match self.live.seen(self.store, session, numbered.sequence)? {
                Seen::New => {}
                Seen::Answered => return self.answer_again(session, numbered),
                Seen::Failed(of, error) if of == numbered.fingerprint => return Err(error),
                Seen::Failed(..) => return Err(reused(session, numbered.sequence)),
            }
        }
        self.check_active()?;
        if let (Some(session), Work::Operation(operation)) = (session, work)
            && let Operation::SetLock { inode, owner, range, kind: Some(kind), .. } = operation
        {
            self.end_silent_holders(*inode, LockOwner { session, number: *owner }, *range, *kind)?;
        }
        let outcome = self.step(session, |apply| {
            let result = match work {
                Work::Operation(operation) => apply.run(operation)?,
                Work::Repeated(operation, repetition) => {
                    apply.check_repetition(operation, *repetition)?;
                    apply.run(operation)?
                }
                Work::Staged(put) => apply.put_staged(put)?,
            };
            if let Some((session, Numbered { sequence, fingerprint })) = id {
                let encoded = convert::op_result_to_wire(&result).encode_to_vec();
                let slot = Slot { sequence, fingerprint: Some(fingerprint), result: encoded.into() };
                apply.txn.put(Cf::Sys, keys::result(session, slot_of(sequence)), slot.encode());
            }
            Ok(result)
        });
        if let Some((session, Numbered { sequence, fingerprint })) = id {
            match &outcome {
                Ok(_) => self.live.note_answered(session, sequence),
                // What may pass is not this mutation's fate.
                Err(error) if error.is_retryable() => {}
                Err(error) => self.live.note_failed(session, sequence, fingerprint, error.clone()),
            }
        }
        outcome.map(Answer::Result)
    }

    /// The answer that a mutation got before.
    fn answer_again(&self, session: SessionId, numbered: Numbered) -> Result<Answer> {
        let Numbered { sequence, fingerprint } = numbered;
        let lost =
            || Error::corrupt(format!("session {session}: the result of mutation {sequence} is not there"));
        let value = self.txn.get(Cf::Sys, &keys::result(session, slot_of(sequence)))?.ok_or_else(lost)?;
        let slot = Slot::decode(&value)?;
        if slot.sequence != sequence {
            return Err(lost());
        }
        if slot.fingerprint.is_some_and(|of| of != fingerprint) {
            return Err(reused(session, sequence));
        }
        let message = wire::OperationResult::decode(slot.result).map_err(|e| {
            Error::corrupt(format!("session {session}: the result of mutation {sequence}: {e}"))
        })?;
        let result: OpResult = convert::op_result_from_wire(message)?;
        Ok(Answer::Result(result))
    }

    /// Whether somebody who wants a lock has to wait for it. An error if he would wait for himself.
    fn check_wait(&mut self, wanted: &Wanted) -> Result<Answer> {
        self.live.touch(wanted.owner.session)?;
        if !wanted.is_blocked(self.live.locks(wanted.inode)) {
            return Ok(Answer::Blocked(false));
        }
        if self.waits.closes_a_circle(wanted, |ino| self.live.locks(ino)) {
            return Err(Error::new(
                Reason::Deadlock,
                format!("inode {}: who holds the lock waits for who wants it", wanted.inode),
            ));
        }
        Ok(Answer::Blocked(true))
    }

    /// Ends the sessions that keep a lock from an owner and were silent too long.
    fn end_silent_holders(
        &mut self,
        ino: InodeNo,
        owner: LockOwner,
        range: LockRange,
        kind: LockKind,
    ) -> Result<()> {
        let now = clock::monotonic();
        while let Some(silent) = self
            .live
            .locks(ino)
            .iter()
            .filter(|lock| lock.excludes(owner, range, kind))
            .map(|lock| lock.owner.session)
            .find(|holder| {
                *holder != owner.session && self.live.is_silent_for(*holder, self.lock_silence, now)
            })
        {
            tracing::warn!(
                shard = %self.header.id,
                session = %silent,
                "a session that holds a lock which another one wants was silent too long; it ends"
            );
            self.end_session(silent)?;
        }
        Ok(())
    }

    fn end_session(&mut self, session: SessionId) -> Result<()> {
        let slots = self.live.used_slots(self.store, session)?;
        self.step(None, |apply| apply.end_session(session, &slots))
    }

    fn expire(&mut self, silent: Duration) -> Result<Answer> {
        for session in self.live.silent_for(silent) {
            tracing::info!(shard = %self.header.id, %session, "a session was silent too long; it ends");
            self.end_session(session)?;
        }
        Ok(Answer::Done)
    }
}
