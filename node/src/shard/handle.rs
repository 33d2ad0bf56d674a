//! An open shard, as the rest of the node uses it.
//!
//! Owns the async face of the executor: every call queues a command or takes a snapshot. A [`Shard`] is
//! shared by its callers; whoever holds it keeps it open.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

use shardfs_proto::types::op::{Durability, OpResult, Operation, Repetition, ShardState};
use shardfs_proto::types::{Attr, Error, FileLock, InodeNo, Result, Sequence, SessionId, ShardId, clock};
use tokio::runtime::Handle;
use tokio::sync::Notify;

use super::content::{ContentWriter, PutStreamStart};
use super::executor::{Answer, Command, Executor, Numbered, Work};
use super::keys::{self, Cf};
use super::locks::Wanted;
use super::records::{Counters, Header};
use super::store::{Reader, Store, StoreProperties};
use super::{ReadView, Room, Usage};

/// A mutation: an operation, by whom, and when it is answered.
#[derive(Clone, Debug)]
pub struct Mutation {
    /// The session, if any.
    pub session: Option<SessionId>,
    /// With a session: makes the mutation exactly-once.
    pub sequence: Option<Sequence>,
    /// When it is answered.
    pub durability: Durability,
    /// What changes.
    pub operation: Operation,
}

/// What a session that stays alive learns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct KeepAnswer {
    /// The shard was opened anew since the session said what it holds open: say it again.
    pub resume_wanted: bool,
}

/// An open shard.
pub struct Shard {
    id: ShardId,
    executor: Executor,
    runtime: Handle,
    me: Weak<Shard>,
    /// It is to be closed: who holds it for long lets go.
    wanted_back: Arc<AtomicBool>,
    /// Wakes who waits for that.
    asked_back: Notify,
}

impl Shard {
    /// Opens a shard on its store: reads the header and counters, frees what a crash left behind. Blocks.
    pub fn open(
        id: ShardId,
        store: Arc<dyn Store>,
        room: Arc<dyn Room>,
        runtime: Handle,
    ) -> Result<Arc<Shard>> {
        let opened = Self::open_parts(id, store, room).map_err(|e| e.with_shard(id))?;
        Ok(Arc::new_cyclic(|me| Shard {
            id,
            executor: opened,
            runtime,
            me: Weak::clone(me),
            wanted_back: Arc::default(),
            asked_back: Notify::new(),
        }))
    }

    fn open_parts(id: ShardId, store: Arc<dyn Store>, room: Arc<dyn Room>) -> Result<Executor> {
        let (header, counters) = read_head(&*store, id)?;
        Executor::new(store, header, counters, room)
    }

    /// Its id.
    pub fn id(&self) -> ShardId {
        self.id
    }

    /// Its header.
    pub fn header(&self) -> Arc<Header> {
        self.executor.header()
    }

    /// Figures as of the last group of operations. Cheap.
    pub fn usage(&self) -> Usage {
        self.executor.usage()
    }

    /// Figures of the store, for metrics.
    pub fn properties(&self) -> StoreProperties {
        self.executor.store().properties()
    }

    /// Whether it must be opened anew before it can be written; see `ShardManager::open`.
    pub fn is_broken(&self) -> bool {
        self.executor.is_broken()
    }

    /// Asks those who hold it for long to let go, ends a reclaim and lets none begin; or takes that back.
    pub(super) fn want_back(&self, wanted: bool) {
        self.wanted_back.store(wanted, Ordering::Release);
        if wanted {
            self.asked_back.notify_waiters();
        }
        self.stop_reclaiming(wanted);
    }

    /// Ends once the shard is wanted back. Whoever waits for a client, and holds the shard meanwhile, waits for this as well, and
    /// lets go. It may be dropped at any time.
    pub async fn wanted_back(&self) {
        loop {
            // Before the look: it hears all that is told from here on.
            let asked = self.asked_back.notified();
            if self.wanted_back.load(Ordering::Acquire) {
                return;
            }
            asked.await;
        }
    }

    /// Ends a reclaim that is under way, soon, and lets none begin; `false`: they may run again. Does not wait.
    pub(super) fn stop_reclaiming(&self, stopped: bool) {
        if !self.executor.store().stop_reclaims(stopped) {
            return;
        }
        // The shard, not only its store: who waits for the last holder to leave must not find the database open.
        if let Some(shard) = self.me.upgrade() {
            self.runtime.spawn_blocking(move || shard.executor.store().settle_reclaims());
        }
    }

    pub(super) fn runtime(&self) -> &Handle {
        &self.runtime
    }

    pub(super) async fn ask(&self, command: Command, durability: Durability) -> Result<Answer> {
        let me = Weak::clone(&self.me);
        let answer = self.executor.submit(command, durability, || self.schedule(me)).await;
        // Also a failure tells what was there.
        self.confirm().await?;
        answer
    }

    /// Fails if another process may have taken the volume before now.
    async fn confirm(&self) -> Result<()> {
        match self.executor.room().confirm() {
            None => Ok(()),
            Some(proof) => proof.await.map_err(|error| error.with_shard(self.id)),
        }
    }

    /// Queues a command without waiting; usable from `drop`.
    pub(super) fn tell(&self, command: Command) {
        let me = Weak::clone(&self.me);
        self.executor.submit_detached(command, || self.schedule(me));
    }

    fn schedule(&self, me: Weak<Shard>) {
        // The caller holds the shard, so there is something to upgrade.
        if let Some(shard) = me.upgrade() {
            self.runtime.spawn_blocking(move || shard.executor.drain());
        }
    }

    /// Applies a mutation; answered as its durability says.
    pub async fn mutate(&self, mutation: Mutation) -> Result<OpResult> {
        self.mutate_again(mutation, None).await
    }

    /// The same; with a repetition, one that may have been lost.
    pub async fn mutate_again(&self, mutation: Mutation, repetition: Option<Repetition>) -> Result<OpResult> {
        let Mutation { session, sequence, durability, operation } = mutation;
        let work = match repetition {
            None => Work::Operation(operation),
            Some(repetition) => Work::Repeated(operation, repetition),
        };
        let numbered = sequence.map(|sequence| Numbered::of(sequence, &work));
        let command = Command::Mutate { session, numbered, work };
        match self.ask(command, durability).await? {
            Answer::Result(result) => Ok(result),
            other => Err(wrong(&other)),
        }
    }

    /// Everything answered before the call is on the device when it returns.
    pub async fn sync(&self) -> Result<()> {
        self.executor.log().sync(self.executor.store(), self.executor.room()).await?;
        self.confirm().await
    }

    /// Closes the shard for good: durable when it returns; mutations fail from then on.
    pub async fn set_read_only(&self) -> Result<()> {
        self.ask(Command::CloseShard, Durability::Sync).await?;
        let store = Arc::clone(self.executor.store());
        let flushed = tokio::task::spawn_blocking(move || store.flush()).await;
        flushed.map_err(|e| Error::internal(format!("a flush was lost: {e}")))?
    }

    /// The last operation that was applied. Whatever was answered before the call is no later.
    pub fn sequence(&self) -> u64 {
        self.executor.sequence()
    }

    /// Makes a folder with the shard as it is at some moment during the call, of files that never change: those that the shard has
    /// now are shared. What is in it is durable once the volume's file system is synced.
    pub async fn checkpoint(&self, dir: PathBuf) -> Result<()> {
        let store = Arc::clone(self.executor.store());
        let made = tokio::task::spawn_blocking(move || store.checkpoint(&dir)).await;
        let made = made.map_err(|e| Error::internal(format!("a checkpoint was lost: {e}")))?;
        self.executor.note_unflushed();
        made
    }

    /// Begins a session. `label` says who holds it, for people; at most 255 bytes.
    pub async fn open_session(&self, label: String) -> Result<SessionId> {
        match self.ask(Command::OpenSession { label }, Durability::Sync).await? {
            Answer::Session(session) => Ok(session),
            other => Err(wrong(&other)),
        }
    }

    /// Keeps a session alive. `resume`: every inode it holds open, as often as it does.
    pub async fn keep_session(&self, session: SessionId, resume: Option<Vec<InodeNo>>) -> Result<KeepAnswer> {
        match self.ask(Command::KeepSession { session, resume }, Durability::Buffered).await? {
            Answer::Keep { resume_wanted } => Ok(KeepAnswer { resume_wanted }),
            other => Err(wrong(&other)),
        }
    }

    /// Ends a session; what it alone held open is freed. One that is unknown has ended already.
    pub async fn close_session(&self, session: SessionId) -> Result<()> {
        self.ask(Command::EndSession { session }, Durability::Buffered).await.map(|_| ())
    }

    /// Registers an inode as open in a session.
    pub async fn register_open(&self, session: SessionId, inode: InodeNo) -> Result<Attr> {
        match self.ask(Command::RegisterOpen { session, inode }, Durability::Buffered).await? {
            Answer::Attr(attr) => Ok(attr),
            other => Err(wrong(&other)),
        }
    }

    /// Takes back registrations: one for each inode listed, which may repeat.
    pub async fn release(&self, session: SessionId, inodes: &[InodeNo]) -> Result<()> {
        let command = Command::Release { session, inodes: inodes.to_vec() };
        self.ask(command, Durability::Buffered).await.map(|_| ())
    }

    /// The first lock that keeps a wanted one from its owner.
    pub async fn test_lock(&self, wanted: Wanted) -> Result<Option<FileLock>> {
        match self.ask(Command::TestLock { wanted }, Durability::Buffered).await? {
            Answer::Lock(held) => Ok(held),
            other => Err(wrong(&other)),
        }
    }

    /// Returns when nobody may keep a wanted lock from its owner any more, or after `within`, or when the shard is to be closed. Its owner
    /// is taken to wait for it meanwhile; that ends when this is dropped.
    ///
    /// # Errors
    /// `Deadlock` if it would wait for itself.
    pub async fn wait_lock(&self, wanted: Wanted, within: Duration) -> Result<()> {
        // Before the look: it hears of all changes from here on, and of two that would wait for each other the later one sees the
        // other.
        let waiting = self.executor.waits().begin(wanted)?;
        match self.ask(Command::CheckWait { wanted }, Durability::Buffered).await? {
            Answer::Blocked(false) => return Ok(()),
            Answer::Blocked(true) => {}
            other => return Err(wrong(&other)),
        }
        tokio::select! {
            () = waiting.changed() => {}
            () = tokio::time::sleep(within) => {}
            () = self.wanted_back() => {}
        }
        Ok(())
    }

    /// Begins a streamed Put. Nothing is visible, and nothing stays, unless the writer commits.
    pub async fn put_content(&self, start: PutStreamStart) -> Result<ContentWriter> {
        let me = self.me.upgrade().ok_or_else(|| Error::unavailable("the shard is closing"))?;
        ContentWriter::new(me, start)
    }

    /// A consistent view. What it shows of other sessions is durable.
    pub async fn read_view(&self, session: Option<SessionId>) -> Result<ReadView> {
        // The snapshot first: what is written after the check is not in it.
        let snapshot = self.executor.store().snapshot()?;
        if let Some(group) = self.executor.log().of_others(session) {
            self.executor.log().sync_up_to(self.executor.store(), self.executor.room(), group).await?;
        }
        // What was the truth at the snapshot may be told at any later time.
        self.confirm().await?;
        let me = self.me.upgrade().ok_or_else(|| Error::unavailable("the shard is closing"))?;
        Ok(ReadView::new(snapshot, self.executor.header(), Some(me))
            .with_wanted_back(Arc::clone(&self.wanted_back)))
    }

    /// What must be done now and then; `unsynced_max`: the age at which buffered operations are synced.
    pub(super) async fn keep_up(&self, unsynced_max: Duration) -> Result<()> {
        if self.executor.log().age().is_some_and(|age| age >= unsynced_max) {
            self.sync().await?;
        }
        Ok(())
    }

    /// Ends the sessions that were silent for longer.
    pub(super) async fn expire_sessions(&self, silent: Duration) -> Result<()> {
        self.ask(Command::Expire { silent }, Durability::Buffered).await.map(|_| ())
    }

    pub(super) fn executor(&self) -> &Executor {
        &self.executor
    }
}

fn wrong(answer: &Answer) -> Error {
    let what = match answer {
        Answer::Result(_) => "a result",
        Answer::Session(_) => "a session",
        Answer::Keep { .. } => "a session's state",
        Answer::Attr(_) => "attributes",
        Answer::Content(_) => "a content",
        Answer::Lock(_) | Answer::Blocked(_) => "a lock",
        Answer::Done => "nothing",
    };
    Error::internal(format!("the executor answered another command with {what}"))
}

/// Header and counters of a store, which must be the shard's.
pub(super) fn read_head(store: &dyn Reader, id: ShardId) -> Result<(Header, Counters)> {
    let missing = |what: &str| Error::corrupt(format!("shard {id}: there is no {what} record"));
    let header = store.get(Cf::Sys, keys::HEADER)?.ok_or_else(|| missing("header"))?;
    let header = Header::decode(&header).map_err(|e| e.context(format!("shard {id}")))?;
    if header.id != id {
        return Err(Error::corrupt(format!("shard {id}: its files are those of shard {}", header.id)));
    }
    let counters = store.get(Cf::Sys, keys::COUNTERS)?.ok_or_else(|| missing("counters"))?;
    let counters = Counters::decode(&counters).map_err(|e| e.context(format!("shard {id}")))?;
    Ok((header, counters))
}

/// Writes the first records of a shard: header, counters, root directory. Durable when it returns.
pub fn initialize(store: &dyn Store, init: &super::ShardInit) -> Result<()> {
    use super::records::{Content, InodeRecord};
    use super::store::{Batch, Change};
    use bytes::Bytes;
    use shardfs_proto::types::{FileKind, Version, attr::MODE_BITS};

    let now = clock::now();
    let header = Header {
        id: init.id,
        owner: init.owner.clone(),
        state: ShardState::Active,
        limit_bytes: init.limit_bytes,
        chunk_bytes: init.chunk_bytes,
        created: now,
    };
    let root = InodeRecord {
        kind: FileKind::Directory,
        flags: 0,
        mode: init.mode & MODE_BITS,
        uid: init.uid,
        gid: init.gid,
        nlink: 2,
        rdev: 0,
        size: 0,
        entries: 0,
        version: Version::new(1),
        atime: now,
        mtime: now,
        ctime: now,
        btime: now,
        parent: Some(InodeNo::ROOT),
        content: Content::EMPTY,
        target: Bytes::new(),
        xattrs: Default::default(),
        indexes: Default::default(),
    };
    let counters = Counters { used_bytes: 0, inodes: 1, next_ino: 2, next_id: 1, op_seq: 1, next_session: 1 };
    let put = |cf: Cf, key: &[u8], value: Bytes| (cf, Bytes::copy_from_slice(key), Change::Put(value));
    let batch = Batch {
        chunk_ranges: Vec::new(),
        changes: vec![
            put(Cf::Sys, keys::HEADER, header.encode()),
            put(Cf::Sys, keys::COUNTERS, counters.encode()),
            put(Cf::Inode, &keys::inode(InodeNo::ROOT), root.encode()),
        ],
    };
    store.write(&batch, true)
}
