//! Byte-range locks: what the owners of a session have locked, and what becomes of those who relied on a lock that is lost.
//!
//! A session that a shard has ended (it was silent while somebody else wanted what it had locked) takes its locks along. Who had the
//! file open then may go on as if nothing had happened, and must not: everything that it does to the file from then on fails, until it opens the
//! file anew. So who opens a file notes how many such losses there were ([`Client::lock_losses`]), and says so with each change; it is
//! compared with those of the very session under which the change is made.
//!
//! Invariants: what an owner may have locked is noted before the node is asked; changes of one owner's locks of a file are made one after the
//! other.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;

use super::Client;
use super::retry::{ATTEMPT_MAX, Target};
use super::session::{Session, header};
use crate::convert;
use crate::types::op::Operation;
use crate::types::{Error, FileLock, InodeNo, LockKind, LockRange, Reason, Result, ShardId};
use crate::wire;

/// How long one call waits for a lock: then it is asked for again, by which its holder's silence is noticed.
const WAIT: Duration = Duration::from_secs(5);
/// Calls that wait for locks at a time: each is a stream of a connection, of which other calls need some.
pub(super) const WAITS_MAX: usize = 256;
/// How often a lock is asked for when there are as many.
const POLL: Duration = Duration::from_millis(200);

/// What an owner asks for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LockRequest {
    /// The file.
    pub inode: InodeNo,
    /// The owner's number within this client.
    pub owner: u64,
    /// Its process, for people.
    pub pid: u32,
    /// Which bytes.
    pub range: LockRange,
    /// [`Client::lock_losses`] when it opened the file.
    pub seen_losses: u64,
}

/// The locks of a session, and what was lost with sessions before it.
#[derive(Default)]
pub(super) struct Locks {
    /// Files, and owners who may have locked something in them.
    held: Mutex<HashSet<(InodeNo, u64)>>,
    losses: u64,
    /// Files that were open when locks of theirs were lost, and which loss was the last.
    lost: HashMap<InodeNo, u64>,
}

impl Locks {
    /// Of the session that takes a lost one's place.
    pub(super) fn after(last: &Locks, is_open: impl Fn(InodeNo) -> bool) -> Locks {
        let held = last.held.lock();
        let losses = last.losses + u64::from(!held.is_empty());
        let mut lost = last.lost.clone();
        lost.extend(held.iter().map(|(inode, _)| (*inode, losses)));
        lost.retain(|inode, _| is_open(*inode));
        Locks { held: Mutex::default(), losses, lost }
    }

    /// Fails if locks of a file were lost that somebody may rely on who has seen so many losses.
    pub(super) fn check(&self, inode: InodeNo, seen_losses: u64) -> Result<()> {
        if self.lost.get(&inode).is_none_or(|loss| *loss <= seen_losses) {
            return Ok(());
        }
        Err(Error::io(format!(
            "inode {inode}: the locks that were held on it are lost, as this client was cut off while somebody else wanted them: \
             open the file anew"
        )))
    }

    /// Notes that an owner may have locked something; whether that is news.
    fn note(&self, inode: InodeNo, owner: u64) -> bool {
        self.held.lock().insert((inode, owner))
    }

    fn forget(&self, inode: InodeNo, owner: u64) {
        self.held.lock().remove(&(inode, owner));
    }

    fn has(&self, inode: InodeNo, owner: u64) -> bool {
        self.held.lock().contains(&(inode, owner))
    }
}

type TurnKey = (ShardId, InodeNo, u64);

/// Whose turn it is to change an owner's locks.
#[derive(Default)]
pub(super) struct Turns {
    table: Mutex<HashMap<TurnKey, Arc<tokio::sync::Mutex<()>>>>,
}

/// A place in the queue of those who change an owner's locks.
struct Turn<'a> {
    turns: &'a Turns,
    key: TurnKey,
    lock: Arc<tokio::sync::Mutex<()>>,
}

impl Turns {
    fn queue(&self, key: TurnKey) -> Turn<'_> {
        let lock = self.table.lock().entry(key).or_default().clone();
        Turn { turns: self, key, lock }
    }

    fn is_taken(&self, key: TurnKey) -> bool {
        self.table.lock().contains_key(&key)
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut table = self.turns.table.lock();
        // The table's and this one.
        if Arc::strong_count(&self.lock) == 2 {
            table.remove(&self.key);
        }
    }
}

impl Client {
    /// How often sessions with locks in a shard were lost: for who opens a file now.
    pub fn lock_losses(&self, shard: ShardId) -> u64 {
        self.inner.sessions.current(shard).map_or(0, |session| session.locks.losses)
    }

    /// Fails if locks of a file were lost that somebody may rely on who has seen so many losses.
    pub fn check_locks(&self, shard: ShardId, inode: InodeNo, seen_losses: u64) -> Result<()> {
        self.inner.sessions.current(shard).map_or(Ok(()), |session| session.locks.check(inode, seen_losses))
    }

    /// Whether an owner may have locked something in a file, or is about to. Asks nobody.
    pub fn may_hold_locks(&self, shard: ShardId, inode: InodeNo, owner: u64) -> bool {
        let held = self.inner.sessions.current(shard).is_some_and(|session| session.locks.has(inode, owner));
        held || self.inner.turns.is_taken((shard, inode, owner))
    }

    /// Locks or (`None`) unlocks, once. What was locked for somebody who does not want it any more (`wanted`) is unlocked before this
    /// returns, with an error.
    ///
    /// # Errors
    /// `LockConflict` if somebody else has it; `LocksExhausted`; `Io` if locks were lost that this owner may rely on; `Unsupported` if the node is
    /// too old.
    pub async fn set_lock(
        &self,
        shard: ShardId,
        request: LockRequest,
        kind: Option<LockKind>,
        wanted: impl Fn() -> bool + Send + Sync,
    ) -> Result<()> {
        let turn = self.inner.turns.queue((shard, request.inode, request.owner));
        let _mine = turn.lock.lock().await;
        if kind.is_none() {
            return self.unlock_in_turn(shard, request).await;
        }
        self.change_lock(shard, request, kind).await?;
        if wanted() {
            return Ok(());
        }
        self.unlock_in_turn(shard, request).await?;
        Err(Error::new(Reason::LockConflict, "nobody wants the lock any more"))
    }

    /// Unlocks all that an owner has locked in a file; asks nobody if that is nothing.
    pub async fn drop_locks(&self, shard: ShardId, inode: InodeNo, owner: u64) -> Result<()> {
        let turn = self.inner.turns.queue((shard, inode, owner));
        let _mine = turn.lock.lock().await;
        if !self.inner.sessions.current(shard).is_some_and(|session| session.locks.has(inode, owner)) {
            return Ok(());
        }
        let request = LockRequest { inode, owner, pid: 0, range: LockRange::ALL, seen_losses: u64::MAX };
        self.unlock_in_turn(shard, request).await
    }

    async fn unlock_in_turn(&self, shard: ShardId, request: LockRequest) -> Result<()> {
        match self.change_lock(shard, request, None).await {
            // What is gone has no locks, and who is unknown holds none.
            Err(error)
                if matches!(
                    error.reason(),
                    Reason::NotFound
                        | Reason::ShardNotFound
                        | Reason::ShardDeleted
                        | Reason::ShardReadOnly
                        | Reason::SessionUnknown
                ) =>
            {
                if request.range == LockRange::ALL
                    && let Some(session) = self.inner.sessions.current(shard)
                {
                    session.locks.forget(request.inode, request.owner);
                }
                Ok(())
            }
            outcome => outcome,
        }
    }

    async fn change_lock(&self, shard: ShardId, request: LockRequest, kind: Option<LockKind>) -> Result<()> {
        let LockRequest { inode, owner, pid, range, seen_losses } = request;
        let operation = convert::operation_to_wire(&Operation::SetLock { inode, owner, pid, range, kind });
        let operation = &operation;
        let is_news = &AtomicBool::new(false);
        let is_repeated = &AtomicBool::new(false);
        let noted: &Mutex<Option<Arc<Session>>> = &Mutex::new(None);
        let check = |session: &Session| match kind {
            Some(_) => session.locks.check(inode, seen_losses),
            None => Ok(()),
        };
        let outcome = self
            .numbered_if(shard, false, check, async |attempt, session, sequence| {
                if kind.is_some() && session.locks.note(inode, owner) {
                    is_news.store(true, Ordering::Relaxed);
                }
                if attempt.number > 0 {
                    is_repeated.store(true, Ordering::Relaxed);
                }
                let request = wire::MutateRequest {
                    header: Some(header(shard, attempt.epoch, Some(session.id))),
                    sequence,
                    operation: Some(operation.clone()),
                    durability: wire::Durability::Sync.into(),
                    repetition: None,
                };
                *noted.lock() = Some(session);
                attempt.node.files().mutate(attempt.node.request(request)).await.map(drop)
            })
            .await;
        let noted = noted.lock().take();
        let (is_news, is_repeated) = (is_news.load(Ordering::Relaxed), is_repeated.load(Ordering::Relaxed));
        let nothing_is_held = match &outcome {
            Ok(()) => kind.is_none() && range == LockRange::ALL,
            Err(error) => is_news && locks_nothing(error, is_repeated),
        };
        if nothing_is_held && let Some(session) = noted {
            session.locks.forget(inode, owner);
        }
        outcome.map_err(|error| match error.reason() {
            // What is asked for is valid: the node does not know this operation.
            Reason::InvalidArgument => too_old(&error),
            _ => error,
        })
    }

    /// Returns when a lock may be had, or after some seconds: it is to be asked for again then. Its owner is taken to wait for it until this
    /// returns or is dropped.
    ///
    /// # Errors
    /// `Deadlock` if its holder waits for the owner.
    pub async fn wait_lock(&self, shard: ShardId, request: LockRequest, kind: LockKind) -> Result<()> {
        let Ok(_place) = self.inner.lock_waits.try_acquire() else {
            tokio::time::sleep(POLL).await;
            return Ok(());
        };
        let session = self.session(shard).await?.id;
        let deadline = self.inner.config.deadline;
        let wait = WAIT.min(deadline / 2);
        let wait_ms = u32::try_from(wait.as_millis()).unwrap_or(u32::MAX);
        let waited = self
            .call_waiting(Target::Shard(shard), deadline, (ATTEMPT_MAX, wait), async |attempt| {
                let request = wire::WaitLockRequest {
                    header: Some(header(shard, attempt.epoch, Some(session))),
                    inode: request.inode.get(),
                    owner: request.owner,
                    start: request.range.start(),
                    end: request.range.end(),
                    kind: convert::lock_kind_to_wire(kind).into(),
                    wait_ms,
                };
                attempt.node.files().wait_lock(attempt.node.request(request)).await
            })
            .await;
        match waited {
            Ok(_) => Ok(()),
            // Asking for the lock opens another one.
            Err(error) if error.reason() == Reason::SessionUnknown => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// The first lock that keeps an owner from having one.
    pub async fn get_lock(
        &self,
        shard: ShardId,
        request: LockRequest,
        kind: LockKind,
    ) -> Result<Option<FileLock>> {
        let mut session = self.session(shard).await?;
        loop {
            let id = session.id;
            let asked = self
                .call(Target::Shard(shard), async |attempt| {
                    let request = wire::GetLockRequest {
                        header: Some(header(shard, attempt.epoch, Some(id))),
                        inode: request.inode.get(),
                        owner: request.owner,
                        start: request.range.start(),
                        end: request.range.end(),
                        kind: convert::lock_kind_to_wire(kind).into(),
                    };
                    attempt.node.files().get_lock(attempt.node.request(request)).await
                })
                .await;
            match asked {
                Ok(reply) => {
                    return reply.into_inner().conflict.map(convert::file_lock_from_wire).transpose();
                }
                Err(error) if error.reason() == Reason::SessionUnknown => {
                    session = self.replace_session(shard, &session).await?;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

/// Whether a request for a lock that failed so has certainly locked nothing.
fn locks_nothing(error: &Error, is_repeated: bool) -> bool {
    match error.reason() {
        Reason::LockConflict => true,
        // The node knows no locks. One that was asked before it may have given this one, and its answer be lost.
        Reason::InvalidArgument | Reason::Unsupported => !is_repeated,
        _ => false,
    }
}

fn too_old(error: &Error) -> Error {
    Error::new(Reason::Unsupported, format!("the node knows no locks: update it ({})", error.message()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ino(number: u64) -> InodeNo {
        InodeNo::new(number).unwrap()
    }

    #[test]
    fn who_relied_on_a_lost_lock_is_told_until_it_opens_the_file_anew() {
        let first = Locks::default();
        assert!(first.note(ino(2), 1) && !first.note(ino(2), 1) && first.note(ino(3), 1));
        first.forget(ino(3), 1);
        assert!(first.has(ino(2), 1) && !first.has(ino(3), 1));
        let second = Locks::after(&first, |_| true);
        assert_eq!((second.losses, second.has(ino(2), 1)), (1, false));
        assert!(second.check(ino(2), 0).is_err(), "open since before");
        assert!(second.check(ino(2), 1).is_ok(), "opened since");
        assert!(second.check(ino(3), 0).is_ok(), "nothing was locked in it");
        // Another session that is lost, without locks, changes nothing; one with locks of another file adds to it.
        let third = Locks::after(&second, |_| true);
        assert_eq!(third.losses, 1);
        third.note(ino(4), 9);
        let fourth = Locks::after(&third, |inode| inode != ino(2));
        assert!(fourth.check(ino(4), 1).is_err() && fourth.check(ino(4), 2).is_ok());
        assert!(fourth.check(ino(2), 0).is_ok(), "nobody had it open any more");
    }

    #[test]
    fn what_an_older_node_has_refused_is_not_held() {
        let locks_nothing = |reason, is_repeated| locks_nothing(&Error::new(reason, "x"), is_repeated);
        for reason in [Reason::InvalidArgument, Reason::Unsupported] {
            assert!(locks_nothing(reason, false));
            assert!(!locks_nothing(reason, true), "a newer node may have given it before");
        }
        assert!(locks_nothing(Reason::LockConflict, false) && locks_nothing(Reason::LockConflict, true));
        for reason in [Reason::Deadline, Reason::SessionUnknown, Reason::Unavailable] {
            assert!(!locks_nothing(reason, false), "{reason:?}: its outcome is not known");
        }
    }

    #[tokio::test]
    async fn turns_are_taken_one_by_one_and_leave_nothing() {
        let turns = Turns::default();
        let key = (ShardId::new(1).unwrap(), ino(2), 3);
        let first = turns.queue(key);
        let mine = first.lock.lock().await;
        let second = turns.queue(key);
        assert!(second.lock.try_lock().is_err() && turns.is_taken(key));
        drop(mine);
        drop(first);
        assert!(second.lock.try_lock().is_ok() && turns.is_taken(key));
        drop(second);
        assert!(!turns.is_taken(key));
    }
}
