//! The one writer of a shard: a bounded queue, group commit, exactly-once answers.
//!
//! The first command that comes to an empty queue schedules a drain on the blocking pool; a drain takes
//! groups until the queue is empty and ends: an idle shard holds no thread. A group's commands run one
//! after another on one [`Txn`]; what they changed is one batch, one log record, and one sync if anyone
//! wants it; then all are answered.
//!
//! Invariants: memory (counters, [`Live`], the cache) changes with the batch: effects of a group that could
//! not be written are taken back. A command that fails or panics contributes nothing. A mutation's
//! result is in the batch of its change. An answer that shows what another session did waits for its
//! sync.
//!
//! Must not: know what operations mean (`ops`), or be called from a thread that may not block
//! ([`Executor::drain`]).

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, RwLock};
use shardfs_proto::types::limits::{COPY_BYTES_MAX, LOCK_SILENCE_MAX};
use shardfs_proto::types::op::{AllocateMode, Durability, OpResult, Operation, Repetition};
use shardfs_proto::types::{Attr, Error, FileLock, InodeNo, Reason, Result, Sequence, SessionId, clock};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::cache::InodeCache;
use super::fingerprint::Fingerprint;
use super::group::Group;
use super::keys::{self, Cf, ContentId};
use super::locks::{Waits, Wanted};
use super::ops::{Apply, SET_ASIDE_CHUNKS_MAX, StagedPut};
use super::records::{Counters, Header};
use super::session::{Live, reused};
use super::store::{Batch, Store};
use super::sync_log::SyncLog;
use super::txn::{POINT_DELETES_MAX, Txn};
use super::{Room, Usage};

/// Commands and bytes that may wait: some groups' worth; more makes callers wait, not go faster.
const QUEUE_OPS_MAX: usize = 4096;
const QUEUE_KIB_MAX: usize = 64 << 10;
/// What a caller waits for a place in the queue.
const QUEUE_WAIT_MAX: Duration = Duration::from_secs(10);
/// Commands and bytes of one group: bounds how long the first waits for the last.
const GROUP_OPS_MAX: usize = 1024;
const GROUP_BYTES_MAX: usize = 8 << 20;
/// Pauses between attempts to make writes possible again.
const RESUME_PAUSE_MIN: Duration = Duration::from_millis(100);
const RESUME_PAUSE_MAX: Duration = Duration::from_secs(2);
/// Attempts that failed with an error of the device after which the shard asks to be opened anew.
const RESUMES_MAX: u32 = 5;
/// With less room than this a shard flushes what it has in memory before it takes more, if that is worth it:
/// flushing frees the log.
const ROOM_SHORT_BYTES: u64 = 64 << 20;
pub const FLUSH_WORTH_BYTES: u64 = 4 << 20;

/// By how much versions jump when a shard is opened: more than operations can have been answered and lost before. So a
/// version that was given since is greater than any that was given before, lost or not.
pub const VERSION_GAP: u64 = 1 << 24;

/// What is asked of the executor.
pub enum Command {
    /// An operation or a streamed Put's end; with its exactly-once identity.
    Mutate { session: Option<SessionId>, numbered: Option<Numbered>, work: Work },
    /// Begin a session.
    OpenSession { label: String },
    /// Keep a session alive; with what it holds open.
    KeepSession { session: SessionId, resume: Option<Vec<InodeNo>> },
    /// End a session; one that is unknown has ended already.
    EndSession { session: SessionId },
    /// End the sessions that were silent too long.
    Expire { silent: Duration },
    /// Register an open.
    RegisterOpen { session: SessionId, inode: InodeNo },
    /// Take back opens.
    Release { session: SessionId, inodes: Vec<InodeNo> },
    /// Who keeps a lock from its owner.
    TestLock { wanted: Wanted },
    /// Whether a lock has to be waited for.
    CheckWait { wanted: Wanted },
    /// Begin a staged content.
    Stage { session: Option<SessionId> },
    /// Append to it.
    StageChunks { content: ContentId, chunks: Vec<bytes::Bytes> },
    /// Remove it, if it is still staged.
    Unstage { content: ContentId },
    /// Close the shard for good.
    CloseShard,
}

/// A mutation's number in its session.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Numbered {
    /// The number.
    pub sequence: Sequence,
    /// What was done under it.
    pub fingerprint: Fingerprint,
}

impl Numbered {
    /// Of this work.
    pub fn of(sequence: Sequence, work: &Work) -> Numbered {
        Numbered { sequence, fingerprint: Fingerprint::of(work) }
    }
}

/// What a mutation does.
pub enum Work {
    /// This.
    Operation(Operation),
    /// The same, if it was lost and nobody else has changed its inode since.
    Repeated(Operation, Repetition),
    /// Name a staged content.
    Staged(StagedPut),
}

/// What a command brings.
#[derive(Clone)]
pub enum Answer {
    /// Of a mutation.
    Result(OpResult),
    /// A new session.
    Session(SessionId),
    /// Whether the session should say what it holds.
    Keep { resume_wanted: bool },
    /// Of a registered open.
    Attr(Attr),
    /// A staged content.
    Content(ContentId),
    /// A lock that somebody holds, if so.
    Lock(Option<FileLock>),
    /// Whether it has to be waited for.
    Blocked(bool),
    /// Nothing else to say.
    Done,
}

impl Command {
    /// Whose command it is; `None`: the shard's own, which shows nobody anything.
    fn asker(&self) -> Option<Option<SessionId>> {
        match self {
            Command::Mutate { session, .. } => Some(*session),
            Command::RegisterOpen { session, .. } => Some(Some(*session)),
            Command::TestLock { wanted } => Some(Some(wanted.owner.session)),
            Command::OpenSession { .. }
            | Command::KeepSession { .. }
            | Command::EndSession { .. }
            | Command::Expire { .. }
            | Command::Release { .. }
            | Command::CheckWait { .. }
            | Command::Stage { .. }
            | Command::StageChunks { .. }
            | Command::Unstage { .. }
            | Command::CloseShard => None,
        }
    }

    /// Bytes that its group holds for it until it is written: what it brings, copies or makes, at most.
    pub(super) fn size_bytes(&self, chunk_bytes: u32) -> usize {
        const BASE: usize = 512;
        // A chunk that is set aside or removed: a key, without bytes.
        const KEY: usize = 256;
        BASE + match self {
            Command::Mutate { work: Work::Operation(operation) | Work::Repeated(operation, _), .. } => {
                match operation {
                    Operation::Write { data, .. } => data.len(),
                    Operation::SetXattr { value, .. } => value.len(),
                    Operation::PutValue { item } => item.value.len(),
                    Operation::PutValues { items, .. } => items.iter().map(|i| i.value.len() + BASE).sum(),
                    // A slice of a chunk keeps all of it: so do the first and the last one of the source.
                    Operation::CopyRange { length, .. } => {
                        (*length).min(COPY_BYTES_MAX) as usize + 2 * chunk_bytes as usize
                    }
                    Operation::Allocate { length, mode, .. } => {
                        let keys_max: u64 = match mode {
                            AllocateMode::PunchHole => POINT_DELETES_MAX.into(),
                            AllocateMode::Allocate { .. } | AllocateMode::ZeroRange { .. } => {
                                SET_ASIDE_CHUNKS_MAX
                            }
                        };
                        // And two that lie in the range in part.
                        let keys = (length / u64::from(chunk_bytes)).min(keys_max) + 2;
                        keys as usize * KEY
                    }
                    _ => 0,
                }
            }
            Command::StageChunks { chunks, .. } => chunks.iter().map(bytes::Bytes::len).sum(),
            _ => 0,
        }
    }
}

type Reply = oneshot::Sender<Result<Answer>>;

struct Job {
    command: Command,
    durability: Durability,
    bytes: usize,
    reply: Reply,
    _places: Option<[OwnedSemaphorePermit; 2]>,
}

struct Joined {
    fingerprint: Fingerprint,
    replies: Vec<Reply>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Callers that repeat a mutation which is queued or running: they get its answer.
    joined: HashMap<(SessionId, Sequence), Joined>,
    draining: bool,
}

/// What the executor keeps in memory.
struct Core {
    counters: Counters,
    live: Live,
    cache: InodeCache,
    trouble: Option<Trouble>,
    /// A version given since the shard was opened is on the device: those given after another opening are greater than all of
    /// this one.
    gap_is_durable: bool,
}

/// Writes do not work at the moment.
struct Trouble {
    error: Error,
    next_try: Instant,
    pause: Duration,
    attempts: u32,
}

/// See the module.
pub struct Executor {
    store: Arc<dyn Store>,
    header: RwLock<Arc<Header>>,
    room: Arc<dyn Room>,
    queue: Mutex<Queue>,
    places: Arc<Semaphore>,
    kib: Arc<Semaphore>,
    core: Mutex<Core>,
    log: SyncLog,
    usage: Mutex<Usage>,
    waits: Waits,
    lock_silence: Mutex<Duration>,
    broken: AtomicBool,
    /// The last operation that was applied; raised before it is answered.
    sequence: AtomicU64,
    freed_bytes: AtomicU64,
    reclaiming: AtomicBool,
    /// What the room was told last.
    unflushed_bytes: Mutex<u64>,
}

impl Executor {
    /// Of a store whose header and counters have been read; frees what a crash left behind.
    pub fn new(
        store: Arc<dyn Store>,
        header: Header,
        counters: Counters,
        room: Arc<dyn Room>,
    ) -> Result<Executor> {
        let counters = Counters { op_seq: counters.op_seq + VERSION_GAP, ..counters };
        let live = Live::load(&*store)?;
        let usage = usage(&header, &counters);
        let executor = Executor {
            store,
            header: RwLock::new(Arc::new(header)),
            room,
            queue: Mutex::default(),
            places: Arc::new(Semaphore::new(QUEUE_OPS_MAX)),
            kib: Arc::new(Semaphore::new(QUEUE_KIB_MAX)),
            core: Mutex::new(Core {
                counters,
                live,
                cache: InodeCache::default(),
                trouble: None,
                gap_is_durable: false,
            }),
            log: SyncLog::default(),
            usage: Mutex::new(usage),
            waits: Waits::default(),
            lock_silence: Mutex::new(LOCK_SILENCE_MAX),
            broken: AtomicBool::new(false),
            sequence: counters.op_seq.into(),
            freed_bytes: 0.into(),
            reclaiming: AtomicBool::new(false),
            unflushed_bytes: Mutex::new(0),
        };
        executor.recover()?;
        executor.note_unflushed();
        Ok(executor)
    }

    /// The store.
    pub fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// The volume.
    pub fn room(&self) -> &Arc<dyn Room> {
        &self.room
    }

    /// The header as it is now.
    pub fn header(&self) -> Arc<Header> {
        Arc::clone(&self.header.read())
    }

    /// What is unsynced.
    pub fn log(&self) -> &SyncLog {
        &self.log
    }

    /// Who waits for locks.
    pub fn waits(&self) -> &Waits {
        &self.waits
    }

    /// Ends holders of locks earlier than [`LOCK_SILENCE_MAX`] says.
    #[cfg(test)]
    pub fn set_lock_silence(&self, silence: Duration) {
        *self.lock_silence.lock() = silence;
    }

    /// Figures as of the last group.
    pub fn usage(&self) -> Usage {
        *self.usage.lock()
    }

    /// The last operation that was applied.
    pub fn sequence(&self) -> u64 {
        self.sequence.load(Ordering::Acquire)
    }

    /// Whether the shard must be opened anew before it can be written.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::Acquire)
    }

    /// Takes no more writes and syncs nothing: the volume is another node's.
    pub fn give_up(&self) {
        self.broken.store(true, Ordering::Release);
    }

    /// Logical bytes freed since the last call.
    pub fn take_freed_bytes(&self) -> u64 {
        self.freed_bytes.swap(0, Ordering::Relaxed)
    }

    /// Notes bytes as freed, again.
    pub fn note_freed_bytes(&self, bytes: u64) {
        self.freed_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether the caller may reclaim: nobody else does.
    pub fn begin_reclaim(&self) -> bool {
        !self.reclaiming.swap(true, Ordering::AcqRel)
    }

    /// Ends it.
    pub fn end_reclaim(&self) {
        self.reclaiming.store(false, Ordering::Release);
    }

    /// Logical bytes freed since they were last taken.
    pub fn freed_bytes(&self) -> u64 {
        self.freed_bytes.load(Ordering::Relaxed)
    }

    /// Tells the volume what of the shard a flush will write.
    pub fn note_unflushed(&self) -> u64 {
        let mut told = self.unflushed_bytes.lock();
        let now = self.store.unflushed_bytes();
        self.room.unflushed(*told, now);
        *told = now;
        now
    }

    /// Flushes if the volume has less room than `short` and it is worth it: the log goes, and with it
    /// the risk that the flush finds no room later. Blocks.
    pub fn flush_if_short(&self, short: u64) {
        if self.room.growth_bytes() >= short || self.note_unflushed() < FLUSH_WORTH_BYTES {
            return;
        }
        if let Err(error) = self.store.flush() {
            tracing::warn!(shard = %self.header().id, %error, "a flush for want of room failed");
        }
        self.note_unflushed();
        self.room.look_again();
    }

    /// Queues a command and waits for its answer. `schedule` is called when a drain must be started.
    pub async fn submit(
        &self,
        command: Command,
        durability: Durability,
        schedule: impl FnOnce(),
    ) -> Result<Answer> {
        let bytes = command.size_bytes(self.header().chunk_bytes);
        let kib = (bytes.div_ceil(1024)).min(QUEUE_KIB_MAX) as u32;
        let places = async {
            let place = Arc::clone(&self.places).acquire_owned().await;
            let kib = Arc::clone(&self.kib).acquire_many_owned(kib).await;
            (place, kib)
        };
        let places = match tokio::time::timeout(QUEUE_WAIT_MAX, places).await {
            Ok((Ok(place), Ok(kib))) => [place, kib],
            Ok(_) => return Err(Error::unavailable("the shard is closing")),
            Err(_) => {
                return Err(Error::new(
                    Reason::Busy,
                    format!("shard {}: its queue is full; try again", self.header().id),
                )
                .with_retry_after_ms(100));
            }
        };
        let (reply, answer) = oneshot::channel();
        if self.enqueue(Job { command, durability, bytes, reply, _places: Some(places) }) {
            schedule();
        }
        answer.await.map_err(|_| {
            Error::unavailable(format!(
                "shard {}: the operation was cut off; its outcome is unknown",
                self.header().id
            ))
        })?
    }

    /// Queues a command that nobody waits for, in the shard's own interest.
    pub fn submit_detached(&self, command: Command, schedule: impl FnOnce()) {
        // Takes no place: such commands are few, at most one for each streamed Put, and small.
        let (reply, _) = oneshot::channel();
        let bytes = command.size_bytes(self.header().chunk_bytes);
        let job = Job { command, durability: Durability::Buffered, bytes, reply, _places: None };
        if self.enqueue(job) {
            schedule();
        }
    }

    /// Whether a drain must be started.
    fn enqueue(&self, job: Job) -> bool {
        let mut queue = self.queue.lock();
        if let Command::Mutate { session: Some(session), numbered: Some(numbered), .. } = &job.command {
            let id = (*session, numbered.sequence);
            match queue.joined.get_mut(&id) {
                Some(joined) if joined.fingerprint == numbered.fingerprint => {
                    joined.replies.push(job.reply);
                    return false;
                }
                Some(_) => {
                    // A caller that has left needs no answer.
                    let _ = job.reply.send(Err(reused(id.0, id.1).with_shard(self.header().id)));
                    return false;
                }
                None => {
                    let fingerprint = numbered.fingerprint;
                    queue.joined.insert(id, Joined { fingerprint, replies: Vec::new() });
                }
            }
        }
        queue.jobs.push_back(job);
        !std::mem::replace(&mut queue.draining, true)
    }

    /// Runs groups until the queue is empty.
    pub fn drain(&self) {
        loop {
            let group = {
                let mut queue = self.queue.lock();
                if queue.jobs.is_empty() {
                    queue.draining = false;
                    return;
                }
                let mut bytes = 0;
                let mut group = Vec::new();
                while let Some(job) = queue.jobs.front() {
                    if !group.is_empty()
                        && (group.len() >= GROUP_OPS_MAX || bytes + job.bytes > GROUP_BYTES_MAX)
                    {
                        break;
                    }
                    bytes += job.bytes;
                    group.extend(queue.jobs.pop_front());
                }
                group
            };
            let ids: Vec<_> = group.iter().filter_map(Job::identity).collect();
            if catch_unwind(AssertUnwindSafe(|| self.run_group(group))).is_err() {
                // Between batch and memory anything may have happened: only a new open tells.
                tracing::error!(shard = %self.header().id, "the executor panicked; the shard will be opened anew");
                self.broken.store(true, Ordering::Release);
                let mut queue = self.queue.lock();
                ids.iter().for_each(|id| {
                    queue.joined.remove(id);
                });
            }
        }
    }

    fn run_group(&self, group: Vec<Job>) {
        let mut core = self.core.lock();
        let core = &mut *core;
        let header = self.header();
        if let Err(error) = self.check_writable(core) {
            group.into_iter().for_each(|job| self.answer(job, &Err(error.clone())));
            return;
        }
        self.flush_if_short(ROOM_SHORT_BYTES);
        core.live.attend(clock::monotonic());
        let Core { counters, live, cache, gap_is_durable, .. } = core;
        let txn = Txn::new(&*self.store, cache, header.chunk_bytes, *counters);
        let locking = (&self.waits, *self.lock_silence.lock());
        let mut run = Group::new(txn, live, &*self.store, &header, self.room.growth_bytes(), locking);
        let mut outcomes = Vec::with_capacity(group.len());
        let mut changed_by: Vec<Option<SessionId>> = Vec::new();
        let mut sync = false;
        for job in &group {
            let outcome = run.apply(&job.command);
            if outcome.is_ok() {
                sync |= job.durability == Durability::Sync;
            }
            if let Some(asker) = job.command.asker() {
                sync |= self.log.of_others(asker).is_some();
                if !changed_by.contains(&asker) {
                    changed_by.push(asker);
                }
            }
            outcomes.push(outcome);
        }
        sync |= changed_by.len() > 1;
        let (txn, undo, closed) = run.finish();
        let written = match txn.finish() {
            None if sync => self.log.sync_blocking(&*self.store, &*self.room).map(|()| None),
            None => Ok(None),
            // Else all that is answered from here on might be lost, and its versions be given again, to others.
            Some(done) => {
                let sync = sync || !*gap_is_durable;
                self.write(&done.batch, changed_by.into_iter(), sync).map(|()| Some(done))
            }
        };
        match written {
            Ok(None) => {}
            Ok(Some(done)) => {
                let bytes = done.batch.size_bytes();
                self.room.wrote(bytes);
                let mut told = self.unflushed_bytes.lock();
                self.room.unflushed(*told, *told + bytes);
                *told += bytes;
                drop(told);
                let freed = core.counters.charged_bytes().saturating_sub(done.counters.charged_bytes());
                self.note_freed_bytes(freed);
                core.gap_is_durable = true;
                core.counters = done.counters;
                self.sequence.store(core.counters.op_seq, Ordering::Release);
                for (ino, record) in done.inodes {
                    match record {
                        Some(record) => core.cache.put(ino, record),
                        None => core.cache.remove(ino),
                    }
                }
                if let Some(header) = closed {
                    *self.header.write() = Arc::new(header);
                }
                *self.usage.lock() = usage(&self.header.read(), &core.counters);
            }
            Err(error) => {
                tracing::warn!(shard = %header.id, %error, "a write failed; the group was taken back");
                undo.into_iter().rev().for_each(|undo| core.live.undo(undo));
                core.live.forget_slots();
                core.cache.clear();
                let next_try = clock::monotonic() + RESUME_PAUSE_MIN;
                core.trouble =
                    Some(Trouble { error: error.clone(), next_try, pause: RESUME_PAUSE_MIN, attempts: 0 });
                // Those that failed may have failed on what is taken back.
                for (job, outcome) in group.iter().zip(&mut outcomes) {
                    if let Some((session, sequence)) = job.identity() {
                        core.live.forget_failed(session, sequence);
                    }
                    *outcome = Err(error.clone());
                }
            }
        }
        for (job, outcome) in group.into_iter().zip(outcomes) {
            self.answer(job, &outcome);
        }
        let loosened = core.live.take_loosened();
        self.waits.tell(&loosened, |ino| core.live.locks(ino));
    }

    fn write(&self, batch: &Batch, by: impl Iterator<Item = Option<SessionId>>, sync: bool) -> Result<()> {
        fail::fail_point!("shard::commit::before_write");
        fail::fail_point!("shard::commit::write_fails", |_| Err(Error::new(
            Reason::VolumeFull,
            "the volume has no room (failpoint)"
        )));
        let group = self.log.begin(by);
        self.store.write(batch, sync)?;
        if sync {
            self.room.synced();
        }
        self.log.written(group, sync);
        fail::fail_point!("shard::commit::after_write");
        Ok(())
    }

    /// Fails while writes do not work; tries to mend that, now and then.
    fn check_writable(&self, core: &mut Core) -> Result<()> {
        if self.is_broken() {
            return Err(Error::unavailable(format!("shard {} is being opened anew", self.header().id))
                .with_retry_after_ms(200));
        }
        let Some(trouble) = &mut core.trouble else { return Ok(()) };
        let now = clock::monotonic();
        if now < trouble.next_try {
            let wait = trouble.next_try - now;
            return Err(trouble.error.clone().with_retry_after_ms(wait.as_millis() as u32 + 1));
        }
        match self.store.resume() {
            Ok(()) => {
                tracing::info!(shard = %self.header().id, "writes work again");
                core.trouble = None;
                Ok(())
            }
            Err(error) => {
                // Want of room and a recovery under way pass; a database that is in error does not.
                trouble.attempts += u32::from(matches!(error.reason(), Reason::Io | Reason::Corrupt));
                trouble.pause = (trouble.pause * 2).min(RESUME_PAUSE_MAX);
                trouble.next_try = clock::monotonic() + trouble.pause;
                trouble.error = error.clone();
                if trouble.attempts >= RESUMES_MAX {
                    self.broken.store(true, Ordering::Release);
                }
                Err(error)
            }
        }
    }

    fn answer(&self, job: Job, outcome: &Result<Answer>) {
        let waiting = job.identity().and_then(|id| self.queue.lock().joined.remove(&id));
        for reply in waiting.into_iter().flat_map(|joined| joined.replies).chain([job.reply]) {
            // A caller that has left needs no answer.
            let _ = reply.send(outcome.clone());
        }
    }

    /// Frees staged contents that a crash left behind, orphans whose sessions are gone, and locks whose sessions or files are: a node of
    /// an earlier version knows of none.
    fn recover(&self) -> Result<()> {
        let mut staged = Vec::new();
        self.store.scan_prefix(Cf::Sys, keys::STAGED_ALL, &mut |key, _| {
            staged.push(keys::parse_staged(key)?);
            Ok(std::ops::ControlFlow::Continue(()))
        })?;
        let mut core = self.core.lock();
        let Core { counters, live, cache, gap_is_durable, .. } = &mut *core;
        let stale = live.stale_orphans();
        let mut stale_locks = Vec::new();
        for (ino, locks) in live.all_locks() {
            let there = self.store.contains(Cf::Inode, &keys::inode(ino))?;
            let left = locks.iter().copied().filter(|lock| there && live.is_known(lock.owner.session));
            let left: Vec<FileLock> = left.collect();
            if left.len() < locks.len() {
                stale_locks.push((ino, left));
            }
        }
        if staged.is_empty() && stale.is_empty() && stale_locks.is_empty() {
            return Ok(());
        }
        let header = self.header();
        let mut txn = Txn::new(&*self.store, cache, header.chunk_bytes, *counters);
        let mut effects = Vec::new();
        let mut apply = Apply {
            txn: &mut txn,
            live,
            effects: &mut effects,
            session: None,
            now: clock::now(),
            header: &header,
            room_bytes: u64::MAX,
        };
        for content in staged {
            apply.unstage(content, u32::MAX);
        }
        for (ino, left) in stale_locks {
            apply.put_locks(ino, left, true);
        }
        for (ino, holders) in stale {
            apply.set_holders(ino, holders)?;
        }
        if let Some(done) = txn.finish() {
            self.store.write(&done.batch, true)?;
            for effect in effects {
                live.apply(effect);
            }
            *gap_is_durable = true;
            *counters = done.counters;
            self.sequence.store(counters.op_seq, Ordering::Release);
            cache.clear();
            *self.usage.lock() = usage(&header, counters);
        }
        Ok(())
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // Closing flushes nothing, but what is opened again is counted again.
        self.room.unflushed(*self.unflushed_bytes.lock(), 0);
    }
}

impl Job {
    fn identity(&self) -> Option<(SessionId, Sequence)> {
        match &self.command {
            Command::Mutate { session: Some(session), numbered: Some(numbered), .. } => {
                Some((*session, numbered.sequence))
            }
            _ => None,
        }
    }
}

fn usage(header: &Header, counters: &Counters) -> Usage {
    Usage {
        used_bytes: counters.charged_bytes(),
        inodes: counters.inodes,
        limit_bytes: header.limit_bytes,
        state: header.state,
    }
}
