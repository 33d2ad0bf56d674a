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
use tokio::task::JoinSet;

use super::Client;
use super::locks::Locks;
use super::retry::Target;
use super::unsynced::Unsynced;
use crate::types::limits::{SESSION_TTL, SESSION_WINDOW};
use crate::types::{Error, InodeNo, ReadFrom, Reason, Result, SessionId, ShardId, clock};
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
    /// The client was closed: who gets a slot's lock from then on begins no session, so that none outlives the close.
    closed: AtomicBool,
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
    /// Held by who keeps the session alive, and by who syncs for it: one of each at a time.
    keeping: Arc<tokio::sync::Mutex<()>>,
    syncing: Arc<tokio::sync::Mutex<()>>,
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
                keeping: Arc::default(),
                syncing: Arc::default(),
            })
        };
        self.table.lock().entry(shard).or_insert_with(new).clone()
    }

    /// Fails if no session may begin any more. The caller holds the lock of the session's slot.
    fn check_open(&self) -> Result<()> {
        match self.closed.load(Ordering::SeqCst) {
            true => Err(Error::unavailable("the client was closed")),
            false => Ok(()),
        }
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
        self.inner.sessions.check_open()?;
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
        SessionId::new(id).ok_or_else(|| Error::internal("the node answered session 0"))
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
        self.inner.sessions.check_open()?;
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
        let Some(keeper) = &self.keeper else { return };
        let mut task = keeper.task.lock();
        if task.is_some() {
            return;
        }
        let weak = Arc::downgrade(&self.inner);
        let upgraded =
            move || weak.upgrade().map(|inner| Client { inner, reads: ReadFrom::Primary, keeper: None });
        let nodes = {
            let upgraded = upgraded.clone();
            async move {
                loop {
                    tokio::time::sleep(KEEPER_PERIOD).await;
                    let Some(client) = upgraded() else { return };
                    client.keep_nodes().await;
                }
            }
        };
        let sessions = async move {
            // What is in it ends with the keeper.
            let mut tasks = JoinSet::new();
            loop {
                tokio::time::sleep(KEEPER_PERIOD).await;
                while tasks.try_join_next().is_some() {}
                let Some(client) = upgraded() else { return };
                client.keep_sessions(&mut tasks);
            }
        };
        *task = Some(tokio::spawn(async move {
            futures::future::join(nodes, sessions).await;
        }));
    }

    /// Starts what sessions need now, each in a task of its own. Its calls may wait for ever: those for a shard that is away hold up
    /// no other one, whose session would end with its locks, and a sync that waits does not hold up its own session.
    fn keep_sessions(&self, tasks: &mut JoinSet<()>) {
        let slots: Vec<(ShardId, Arc<Slot>)> =
            self.inner.sessions.table.lock().iter().map(|(shard, slot)| (*shard, slot.clone())).collect();
        for (shard, slot) in slots {
            let Some(session) = slot.current.try_lock().ok().and_then(|current| current.clone()) else {
                continue;
            };
            if session.unsynced.mark().is_some()
                && let Ok(alone) = slot.syncing.clone().try_lock_owned()
            {
                let client = self.clone();
                tasks.spawn(async move {
                    // A node syncs by itself within some seconds, but only an answer frees what is kept here.
                    if let Err(error) = client.make_durable(shard).await {
                        tracing::debug!(%shard, %error, "cannot sync: later");
                    }
                    drop(alone);
                });
            }
            let suspect = slot.suspect.load(Ordering::Relaxed);
            let due = *session.due.lock() <= clock::monotonic();
            if (suspect || due)
                && let Ok(alone) = slot.keeping.clone().try_lock_owned()
            {
                let client = self.clone();
                tasks.spawn(async move {
                    client.keep_session(shard, &slot, &session, suspect).await;
                    drop(alone);
                });
            }
        }
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

    /// Ends the sessions, so that what they held is freed at once, and begins no others. Bounded in time; errors are left to
    /// expiry.
    pub async fn close(&self) {
        self.inner.sessions.closed.store(true, Ordering::SeqCst);
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
    use super::super::ClientConfig;
    use super::super::unsynced::Answered;
    use super::*;
    use crate::types::{ClientId, Version};

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

    /// A client of a node that is away, which has a session that is due with each shard.
    fn with_sessions(shards: &[ShardId]) -> Client {
        let endpoints = vec!["unix:/nonexistent/shardfs.sock".to_owned()];
        let client = Client::new(ClientConfig::new(endpoints, ClientId::new("test").unwrap())).unwrap();
        for shard in shards {
            let slot = client.inner.sessions.slot(*shard);
            let session = Arc::new(Session::new(SessionId::new(shard.get()).unwrap()));
            *session.due.lock() = clock::monotonic();
            let mut current = slot.current.try_lock().unwrap();
            client.inner.sessions.set(*shard, &slot, &mut current, Some(session));
        }
        client
    }

    #[tokio::test]
    async fn a_session_is_kept_alive_while_the_call_for_another_waits() {
        let shards = [ShardId::new(1).unwrap(), ShardId::new(2).unwrap()];
        let client = with_sessions(&shards);
        let second = client.inner.sessions.current(shards[1]).unwrap();
        *second.due.lock() = next_keeping();
        let mut tasks = JoinSet::new();
        client.keep_sessions(&mut tasks);
        assert_eq!(tasks.len(), 1);
        tokio::task::yield_now().await;
        // The first one's node has not answered.
        *second.due.lock() = clock::monotonic();
        client.keep_sessions(&mut tasks);
        assert_eq!(tasks.len(), 2);
        client.keep_sessions(&mut tasks);
        assert_eq!(tasks.len(), 2, "a call a session");
        // Nor does a sync that waits hold up its own session.
        second.unsynced.keep(Answered {
            epoch: 1,
            sequence: 1,
            inode: 7,
            version: Version::new(1),
            operation: wire::Operation::default(),
            data_bytes: 1,
        });
        client.keep_sessions(&mut tasks);
        client.keep_sessions(&mut tasks);
        assert_eq!(tasks.len(), 3);
    }

    #[tokio::test]
    async fn the_keeper_ends_with_the_client_whatever_it_waits_for() {
        let client = with_sessions(&[ShardId::new(1).unwrap()]);
        client.start_keeper();
        let inner = Arc::downgrade(&client.inner);
        // Until a call is under way, which goes on for as long as a session is tried to be kept.
        while inner.strong_count() == 1 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        drop(client);
        let gone = async {
            while inner.strong_count() > 0 {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(KEEP_ALIVE_PERIOD / 2, gone).await.expect("the keeper keeps its client");
    }

    #[tokio::test]
    async fn no_session_begins_once_the_client_is_closed() {
        let client = with_sessions(&[]);
        let shard = ShardId::new(1).unwrap();
        let lost = Arc::new(Session::new(SessionId::new(1).unwrap()));
        client.close().await;
        // Without asking the node, for which a call would wait.
        for begun in [client.session(shard).await, client.replace_session(shard, &lost).await] {
            let error = begun.err().expect("a session has begun");
            assert_eq!((error.reason(), error.message()), (Reason::Unavailable, "the client was closed"));
        }
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
