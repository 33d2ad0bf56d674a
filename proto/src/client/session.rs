//! Sessions: what makes a mutation happen once, and what holds unlinked files that are open.
//!
//! One session a shard, opened by the first call that needs one. Invariants:
//! - a sequence number is given to one mutation only, and no number is given out while the one that is a
//!   whole window older is unanswered (the node keeps one result slot for both);
//! - what the session has locked is lost with it, and is not locked again (`locks`);
//! - what the session holds open is known here, so that it can be listed to a node that has restarted;
//!   that list and a registration never cross (`opens`: registrations share it, the list takes it alone).

use std::collections::{BTreeSet, HashMap};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::Notify;

use super::Client;
use super::DEADLINE_DEFAULT;
use super::locks::Locks;
use super::retry::Target;
use super::unsynced::Unsynced;
use crate::types::limits::{SESSION_TTL, SESSION_WINDOW};
use crate::types::{InodeNo, ReadFrom, Reason, Result, SessionId, ShardId, clock};
use crate::wire;

/// How often sessions are looked after.
const KEEPER_PERIOD: Duration = Duration::from_secs(1);
/// A session is kept alive at least this often.
const KEEP_ALIVE_PERIOD: Duration = Duration::from_secs(20);
/// An attempt of a call that costs a node next to nothing.
pub(super) const CONTROL_ATTEMPT_MAX: Duration = Duration::from_secs(3);
/// What closing a client may take.
const CLOSE_MAX: Duration = Duration::from_secs(3);

/// Is told of a client's sessions, so that somebody else can end them ([`Client::end_session`]) should the client's process die.
pub trait SessionWatcher: Send + Sync {
    /// A session with a shard has begun; nothing was done in it yet.
    fn began(&self, shard: ShardId, session: SessionId);
    /// It has ended, or is of no use any more.
    fn ended(&self, shard: ShardId, session: SessionId);
}

/// The sessions of a client, at most one a shard.
#[derive(Default)]
pub(super) struct Sessions {
    table: Mutex<HashMap<ShardId, Arc<Slot>>>,
    watcher: OnceLock<Arc<dyn SessionWatcher>>,
}

/// A shard's session, or the place where it will be.
struct Slot {
    /// Held while a session is opened, so that one is.
    current: tokio::sync::Mutex<Option<Arc<Session>>>,
    /// The same for those who do not wait: also while the next is being opened, and while others look.
    known: Mutex<Option<Arc<Session>>>,
    /// The node may have restarted: list what is open at the next occasion.
    suspect: AtomicBool,
    /// The shard is closed for good and takes no sessions; reading needs none.
    closed: AtomicBool,
}

/// One session.
pub(super) struct Session {
    pub(super) id: SessionId,
    sequences: Mutex<Sequences>,
    answered: Notify,
    opens: tokio::sync::RwLock<()>,
    open_inodes: Mutex<HashMap<InodeNo, u32>>,
    /// When it is kept alive next.
    due: Mutex<Instant>,
    pub(super) unsynced: Unsynced,
    pub(super) locks: Locks,
}

struct Sequences {
    next: u64,
    unanswered: BTreeSet<u64>,
}

/// A sequence number, given back as answered when dropped.
pub(super) struct Numbered {
    pub(super) session: Arc<Session>,
    pub(super) sequence: u64,
}

impl Drop for Numbered {
    fn drop(&mut self) {
        self.session.sequences.lock().unanswered.remove(&self.sequence);
        self.session.answered.notify_waiters();
    }
}

impl Session {
    fn new(id: SessionId) -> Session {
        Session {
            id,
            sequences: Mutex::new(Sequences { next: 1, unanswered: BTreeSet::new() }),
            answered: Notify::new(),
            opens: tokio::sync::RwLock::new(()),
            open_inodes: Mutex::default(),
            due: Mutex::new(next_keeping()),
            unsynced: Unsynced::default(),
            locks: Locks::default(),
        }
    }

    /// Takes the next sequence number; waits while the window is full.
    pub(super) async fn number(self: &Arc<Self>) -> Numbered {
        loop {
            let answered = self.answered.notified();
            tokio::pin!(answered);
            answered.as_mut().enable();
            {
                let mut sequences = self.sequences.lock();
                let next = sequences.next;
                let oldest = sequences.unanswered.first().copied().unwrap_or(next);
                if next - oldest < SESSION_WINDOW {
                    sequences.next += 1;
                    sequences.unanswered.insert(next);
                    return Numbered { session: self.clone(), sequence: next };
                }
            }
            answered.await;
        }
    }

    /// Held while a call registers or releases open inodes.
    pub(super) async fn registering(&self) -> tokio::sync::RwLockReadGuard<'_, ()> {
        self.opens.read().await
    }

    pub(super) fn opened(&self, inode: InodeNo) {
        *self.open_inodes.lock().entry(inode).or_insert(0) += 1;
    }

    pub(super) fn released(&self, inode: InodeNo) {
        let mut open = self.open_inodes.lock();
        if let Some(count) = open.get_mut(&inode) {
            *count -= 1;
            if *count == 0 {
                open.remove(&inode);
            }
        }
    }

    fn listed(&self) -> Vec<u64> {
        let open = self.open_inodes.lock();
        open.iter().flat_map(|(inode, count)| std::iter::repeat_n(inode.get(), *count as usize)).collect()
    }
}

impl Sessions {
    fn slot(&self, shard: ShardId) -> Arc<Slot> {
        let new = || {
            Arc::new(Slot {
                current: tokio::sync::Mutex::new(None),
                known: Mutex::new(None),
                suspect: AtomicBool::new(false),
                closed: AtomicBool::new(false),
            })
        };
        self.table.lock().entry(shard).or_insert_with(new).clone()
    }

    /// Notes that the shard's node may have restarted.
    pub(super) fn suspect(&self, shard: ShardId) {
        if let Some(slot) = self.table.lock().get(&shard) {
            slot.suspect.store(true, Ordering::Relaxed);
        }
    }

    /// The session with a shard, if there is one. Never misses one that is there: what it has not made durable would not be
    /// made again.
    pub(super) fn current(&self, shard: ShardId) -> Option<Arc<Session>> {
        let slot = self.table.lock().get(&shard).cloned()?;
        let known = slot.known.lock();
        known.clone()
    }

    /// Forgets what is known of a shard that is gone.
    pub(super) fn forget(&self, shard: ShardId) {
        let slot = self.table.lock().remove(&shard);
        if let Some(slot) = slot {
            let known = slot.known.lock();
            self.tell(shard, known.as_ref(), None);
        }
    }

    /// Puts a session, or none, in the place of the one of before. `current`: the slot's, whose lock the caller holds.
    fn set(
        &self,
        shard: ShardId,
        slot: &Slot,
        current: &mut Option<Arc<Session>>,
        session: Option<Arc<Session>>,
    ) {
        self.tell(shard, current.as_ref(), session.as_ref());
        slot.known.lock().clone_from(&session);
        *current = session;
    }

    fn tell(&self, shard: ShardId, last: Option<&Arc<Session>>, next: Option<&Arc<Session>>) {
        let Some(watcher) = self.watcher.get() else { return };
        if let Some(next) = next {
            watcher.began(shard, next.id);
        }
        if let Some(last) = last {
            watcher.ended(shard, last.id);
        }
    }
}

impl Client {
    /// The session with a shard; opened if there is none.
    pub(super) async fn session(&self, shard: ShardId) -> Result<Arc<Session>> {
        let slot = self.inner.sessions.slot(shard);
        let mut current = slot.current.lock().await;
        if let Some(session) = &*current {
            return Ok(session.clone());
        }
        let session = Arc::new(Session::new(self.open_session(shard).await?));
        self.inner.sessions.set(shard, &slot, &mut current, Some(session.clone()));
        drop(current);
        self.start_keeper();
        Ok(session)
    }

    /// The session to read under; none for a closed shard.
    pub(super) async fn reading_session(&self, shard: ShardId) -> Result<Option<Arc<Session>>> {
        // What a backup shows, no session has changed or holds open.
        if self.reads.prefers_backup() {
            return Ok(None);
        }
        let slot = self.inner.sessions.slot(shard);
        if slot.closed.load(Ordering::Relaxed) {
            return Ok(None);
        }
        match self.session(shard).await {
            Ok(session) => Ok(Some(session)),
            Err(error) if error.reason() == Reason::ShardReadOnly => {
                slot.closed.store(true, Ordering::Relaxed);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    async fn open_session(&self, shard: ShardId) -> Result<SessionId> {
        let label = &self.inner.config.label;
        let reply = self
            .call(Target::Shard(shard), async |attempt| {
                let request = wire::OpenSessionRequest {
                    header: Some(header(shard, attempt.epoch, None)),
                    label: label.clone(),
                };
                attempt.node.files().open_session(attempt.node.request(request)).await
            })
            .await?;
        let id = reply.into_inner().session_id;
        SessionId::new(id).ok_or_else(|| crate::types::Error::internal("the node answered session 0"))
    }

    /// Puts a new session in the place of one that the shard does not know any more. What was open under
    /// the old one is listed to it, so that later unlinks hold it; what was freed meanwhile is gone.
    pub(super) async fn replace_session(&self, shard: ShardId, lost: &Arc<Session>) -> Result<Arc<Session>> {
        let slot = self.inner.sessions.slot(shard);
        let mut current = slot.current.lock().await;
        if let Some(session) = &*current
            && !Arc::ptr_eq(session, lost)
        {
            return Ok(session.clone());
        }
        tracing::warn!(%shard, session = %lost.id, "the shard does not know the session any more: opening another");
        // Before anything is asked: it would be made again first, in vain.
        lost.unsynced.give_up();
        let mut session = Session::new(self.open_session(shard).await?);
        session.unsynced.inherit(&lost.unsynced);
        let open_inodes = std::mem::take(&mut *lost.open_inodes.lock());
        session.locks = Locks::after(&lost.locks, |inode| open_inodes.contains_key(&inode));
        *session.open_inodes.lock() = open_inodes;
        let session = Arc::new(session);
        self.inner.sessions.set(shard, &slot, &mut current, Some(session.clone()));
        slot.suspect.store(true, Ordering::Relaxed);
        Ok(session)
    }

    fn start_keeper(&self) {
        let mut keeper = self.inner.keeper.lock();
        if keeper.is_some() {
            return;
        }
        let weak = Arc::downgrade(&self.inner);
        *keeper = Some(tokio::spawn(async move {
            loop {
                tokio::time::sleep(KEEPER_PERIOD).await;
                let Some(inner) = weak.upgrade() else { return };
                let client = Client { inner, reads: ReadFrom::Primary };
                // Sessions with a shard that moves may take as long as a call may: addresses are wanted just then.
                futures::future::join(client.keep_sessions(), client.keep_nodes()).await;
            }
        }));
    }

    async fn keep_sessions(&self) {
        let slots: Vec<(ShardId, Arc<Slot>)> =
            self.inner.sessions.table.lock().iter().map(|(shard, slot)| (*shard, slot.clone())).collect();
        let due = slots.into_iter().map(|(shard, slot)| async move {
            let Some(session) = slot.current.try_lock().ok().and_then(|current| current.clone()) else {
                return;
            };
            let suspect = slot.suspect.load(Ordering::Relaxed);
            let due = *session.due.lock() <= clock::monotonic();
            if session.unsynced.mark().is_some() {
                // A node syncs by itself within some seconds, but only an answer frees what is kept here. A client that waits
                // for ever must not have its other sessions wait for that one.
                match tokio::time::timeout(DEADLINE_DEFAULT, self.make_durable(shard)).await {
                    Ok(Ok(())) => {}
                    Ok(Err(error)) => tracing::debug!(%shard, %error, "cannot sync: later"),
                    Err(_) => tracing::debug!(%shard, "no sync within {DEADLINE_DEFAULT:?}: later"),
                }
            }
            if suspect || due {
                self.keep_session(shard, &slot, &session, suspect).await;
            }
        });
        futures::future::join_all(due).await;
    }

    async fn keep_session(&self, shard: ShardId, slot: &Slot, session: &Arc<Session>, mut resume: bool) {
        for _ in 0..2 {
            let _alone = if resume { Some(session.opens.write().await) } else { None };
            let open_inodes = if resume { session.listed() } else { Vec::new() };
            let open_inodes = &open_inodes;
            let kept = self
                .call_within(Target::Shard(shard), KEEP_ALIVE_PERIOD, CONTROL_ATTEMPT_MAX, async |attempt| {
                    let request = wire::KeepSessionRequest {
                        header: Some(header(shard, attempt.epoch, Some(session.id))),
                        resume,
                        open_inodes: open_inodes.clone(),
                    };
                    attempt.node.files().keep_session(attempt.node.request(request)).await
                })
                .await;
            match kept {
                Ok(reply) => {
                    *session.due.lock() = next_keeping();
                    if resume {
                        slot.suspect.store(false, Ordering::Relaxed);
                    }
                    if !reply.into_inner().resume_wanted {
                        return;
                    }
                    resume = true;
                }
                Err(error) if error.reason() == Reason::SessionUnknown => {
                    if let Err(error) = self.replace_session(shard, session).await {
                        tracing::warn!(%shard, %error, "no new session");
                    }
                    return;
                }
                Err(error) if matches!(error.reason(), Reason::ShardNotFound | Reason::ShardDeleted) => {
                    self.inner.sessions.forget(shard);
                    return;
                }
                Err(error) => {
                    tracing::debug!(%shard, %error, "session not kept");
                    return;
                }
            }
        }
    }

    /// Ends the sessions, so that what they held is freed at once. Bounded in time; errors are left to
    /// expiry.
    pub async fn close(&self) {
        let slots: Vec<(ShardId, Arc<Slot>)> = self.inner.sessions.table.lock().drain().collect();
        let all = slots.into_iter().map(|(shard, slot)| async move {
            let mut current = slot.current.lock().await;
            let Some(session) = current.clone() else { return };
            slot.known.lock().take();
            *current = None;
            drop(current);
            match self.close_session(shard, session.id, CLOSE_MAX).await {
                Ok(()) => self.inner.sessions.tell(shard, Some(&session), None),
                Err(error) => tracing::debug!(%shard, %error, "session not closed"),
            }
        });
        let _ = tokio::time::timeout(CLOSE_MAX, futures::future::join_all(all)).await;
    }

    /// Has every session of this client told from now on, to one watcher; another one is not taken.
    pub fn watch_sessions(&self, watcher: Arc<dyn SessionWatcher>) {
        let _ = self.inner.sessions.watcher.set(watcher);
    }

    /// Ends a session of a client whose process is dead, so that what it held is freed. Tries for as long as the shard would keep
    /// the session by itself. One that is gone already is no error.
    pub async fn end_session(&self, shard: ShardId, session: SessionId) -> Result<()> {
        match self.close_session(shard, session, SESSION_TTL).await {
            Err(error)
                if matches!(
                    error.reason(),
                    Reason::SessionUnknown
                        | Reason::ShardNotFound
                        | Reason::ShardDeleted
                        | Reason::ShardReadOnly
                ) =>
            {
                Ok(())
            }
            other => other,
        }
    }

    async fn close_session(&self, shard: ShardId, session: SessionId, within: Duration) -> Result<()> {
        let closed = self.call_within(Target::Shard(shard), within, CLOSE_MAX, async |attempt| {
            let request =
                wire::CloseSessionRequest { header: Some(header(shard, attempt.epoch, Some(session))) };
            attempt.node.files().close_session(attempt.node.request(request)).await
        });
        closed.await.map(drop)
    }
}

/// When a session that was kept alive now is kept alive again: not all of those that began together at the same moment.
fn next_keeping() -> Instant {
    clock::monotonic() + KEEP_ALIVE_PERIOD.mul_f64(1.0 - fastrand::f64() / 4.0)
}

/// What every call about a shard's inodes begins with.
pub(super) fn header(shard: ShardId, epoch: u64, session: Option<SessionId>) -> wire::CallHeader {
    wire::CallHeader {
        shard_id: shard.get(),
        epoch,
        session_id: session.map_or(0, SessionId::get),
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_window_is_not_overrun() {
        let session = Arc::new(Session::new(SessionId::new(1).unwrap()));
        let first = session.number().await;
        let mut rest = Vec::new();
        for _ in 1..SESSION_WINDOW {
            rest.push(session.number().await);
        }
        drop(rest);
        // Number 1 is unanswered, so number 1 + window must wait, although only one is out.
        let waiting = tokio::time::timeout(Duration::from_millis(50), session.number()).await;
        assert!(waiting.is_err());
        drop(first);
        assert_eq!(session.number().await.sequence, SESSION_WINDOW + 1);
    }

    #[tokio::test]
    async fn a_session_is_known_while_somebody_looks_at_it_or_opens_the_next() {
        let (sessions, shard) = (Sessions::default(), ShardId::new(3).unwrap());
        let slot = sessions.slot(shard);
        let mut current = slot.current.lock().await;
        assert!(sessions.current(shard).is_none());
        sessions.set(shard, &slot, &mut current, Some(Arc::new(Session::new(SessionId::new(1).unwrap()))));
        // The lock is held still.
        assert_eq!(sessions.current(shard).map(|session| session.id), SessionId::new(1));
        sessions.set(shard, &slot, &mut current, None);
        assert!(sessions.current(shard).is_none());
    }

    #[derive(Default)]
    struct Told(Mutex<Vec<(&'static str, u64)>>);

    impl SessionWatcher for Told {
        fn began(&self, _shard: ShardId, session: SessionId) {
            self.0.lock().push(("began", session.get()));
        }

        fn ended(&self, _shard: ShardId, session: SessionId) {
            self.0.lock().push(("ended", session.get()));
        }
    }

    #[tokio::test]
    async fn every_session_is_told_and_the_next_before_the_last_has_ended() {
        let (sessions, shard) = (Sessions::default(), ShardId::new(3).unwrap());
        let told = Arc::new(Told::default());
        assert!(sessions.watcher.set(told.clone()).is_ok());
        let slot = sessions.slot(shard);
        let mut current = slot.current.lock().await;
        for id in [1, 2] {
            let session = Arc::new(Session::new(SessionId::new(id).unwrap()));
            sessions.set(shard, &slot, &mut current, Some(session));
        }
        drop(current);
        sessions.forget(shard);
        sessions.forget(shard);
        assert_eq!(*told.0.lock(), [("began", 1), ("began", 2), ("ended", 1), ("ended", 2)]);
    }

    #[test]
    fn opens_are_counted() {
        let session = Session::new(SessionId::new(1).unwrap());
        let inode = InodeNo::new(5).unwrap();
        session.opened(inode);
        session.opened(inode);
        assert_eq!(session.listed(), [5, 5]);
        session.released(inode);
        session.released(inode);
        session.released(inode);
        assert!(session.listed().is_empty());
    }
}
