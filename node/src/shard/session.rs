//! What lives beside the records while a shard is open: sessions, result slots, who holds what open,
//! orphans, locks, staged contents.
//!
//! Sessions, slots, orphans and locks are copies of `sys` records; what is held open is known in memory alone.
//! After an open of the shard no session has said what it holds: until it has (`resumed`), it counts as
//! a holder of everything.
//!
//! Invariants: only the executor changes it, through [`Effect`]s of operations that succeeded; each
//! effect gives its [`Undo`], which is applied, last first, when the group's batch cannot be written.
//!
//! Must not: write to the store.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use shardfs_proto::types::limits::SESSION_WINDOW;
use shardfs_proto::types::{Error, FileLock, InodeNo, Reason, Result, Sequence, SessionId, clock};

use super::fingerprint::Fingerprint;
use super::keys::{self, Cf, ContentId};
use super::records::{LocksRecord, Orphan, SessionRecord, Slot};
use super::store::Reader;

/// Opens that one session may hold: what the kernel's own limit on open files allows a busy machine.
pub const OPENS_PER_SESSION_MAX: u64 = 1 << 20;

/// More than there is between two commands of a shard that is open: silent sessions are looked for more often.
const ATTENDED_PAUSE_MAX: Duration = Duration::from_secs(30);

/// The slot of a sequence number.
pub fn slot_of(sequence: Sequence) -> u16 {
    (sequence.get() % SESSION_WINDOW) as u16
}

/// What the shard knows of a sequence number.
pub enum Seen {
    /// Never seen: apply it.
    New,
    /// Its answer is in the store.
    Answered,
    /// It, or another under its number, failed with this.
    Failed(Fingerprint, Error),
}

/// How a mutation failed.
struct Failure {
    sequence: Sequence,
    fingerprint: Fingerprint,
    error: Error,
}

struct Session {
    last_seen: Instant,
    /// Whether it has said what it holds since the shard was opened.
    resumed: bool,
    /// Sum of its opens.
    opens: u64,
    /// The sequence in each slot, 0 = none; read from the store at the first need.
    slots: Option<Box<[u64]>>,
    /// Failures by slot: at most as many as there are slots.
    failures: HashMap<u16, Failure>,
}

impl Session {
    fn new(now: Instant, resumed: bool) -> Session {
        Session { last_seen: now, resumed, opens: 0, slots: None, failures: HashMap::new() }
    }
}

/// A streamed Put that is under way.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StagedContent {
    /// Bytes so far.
    pub bytes: u64,
    /// Chunks so far.
    pub chunks: u64,
}

/// A change of [`Live`] that an operation makes when it succeeds.
#[derive(Clone, Debug)]
pub enum Effect {
    /// A session begins.
    Begin(SessionId),
    /// A session ends, with its opens.
    End(SessionId),
    /// A session has said what it holds.
    Resumed(SessionId),
    /// A session's opens of an inode change by this.
    Opens(SessionId, InodeNo, i64),
    /// The holders of an orphan; none: it is gone.
    Orphan(InodeNo, Vec<SessionId>),
    /// A staged content; `None`: it is gone.
    Staged(ContentId, Option<StagedContent>),
    /// The locks of an inode; `loosened`: who could not have one before may now.
    Locks { inode: InodeNo, locks: Vec<FileLock>, loosened: bool },
}

/// How to take an [`Effect`] back.
pub enum Undo {
    /// Apply these.
    Effects(Vec<Effect>),
    /// Put a session back, with its opens.
    Session(SessionId, Box<Ended>),
}

/// A session that ended.
pub struct Ended {
    session: Session,
    held: Vec<(InodeNo, u64)>,
}

/// See the module.
#[derive(Default)]
pub struct Live {
    sessions: HashMap<SessionId, Session>,
    unresumed: BTreeSet<SessionId>,
    held: HashMap<InodeNo, BTreeMap<SessionId, u64>>,
    orphans: BTreeMap<InodeNo, Vec<SessionId>>,
    staged: HashMap<ContentId, StagedContent>,
    staged_bytes: u64,
    /// By first bytes; none is empty.
    locks: HashMap<InodeNo, Vec<FileLock>>,
    lock_count: usize,
    /// Inodes whose locks were loosened since that was last asked for.
    loosened: HashSet<InodeNo>,
    /// When commands were last looked at, and since when they are without a long pause.
    attended: Option<(Instant, Instant)>,
}

impl Live {
    /// Reads what the store has. All sessions are unresumed and their time begins anew.
    pub fn load(reader: &dyn Reader) -> Result<Live> {
        let now = clock::monotonic();
        let mut live = Live::default();
        reader.scan_prefix(Cf::Sys, keys::SESSIONS, &mut |key, value| {
            let id = keys::parse_session(key)?;
            SessionRecord::decode(value).map_err(|e| e.context(format!("session {id}")))?;
            live.sessions.insert(id, Session::new(now, false));
            live.unresumed.insert(id);
            Ok(ControlFlow::Continue(()))
        })?;
        reader.scan_prefix(Cf::Sys, keys::ORPHANS, &mut |key, value| {
            let ino = keys::parse_orphan(key)?;
            let orphan = Orphan::decode(value).map_err(|e| e.context(format!("orphan {ino}")))?;
            live.orphans.insert(ino, orphan.holders);
            Ok(ControlFlow::Continue(()))
        })?;
        reader.scan_prefix(Cf::Sys, keys::LOCKS_ALL, &mut |key, value| {
            let ino = keys::parse_locks(key)?;
            let record =
                LocksRecord::decode(value).map_err(|e| e.context(format!("locks of inode {ino}")))?;
            live.lock_count += record.locks.len();
            live.locks.insert(ino, record.locks);
            Ok(ControlFlow::Continue(()))
        })?;
        Ok(live)
    }

    /// Sessions.
    pub fn session_count(&self) -> usize {
        self.sessions.len()
    }

    /// Whether there is such a session.
    pub fn is_known(&self, session: SessionId) -> bool {
        self.sessions.contains_key(&session)
    }

    /// Notes that a session is alive. An error if there is no such session.
    pub fn touch(&mut self, session: SessionId) -> Result<()> {
        match self.sessions.get_mut(&session) {
            Some(s) => {
                s.last_seen = clock::monotonic();
                Ok(())
            }
            None => Err(unknown(session)),
        }
    }

    /// Sessions that were silent for longer.
    pub fn silent_for(&self, ttl: Duration) -> Vec<SessionId> {
        let now = clock::monotonic();
        let silent = |s: &Session| now.saturating_duration_since(s.last_seen) > ttl;
        self.sessions.iter().filter(|(_, s)| silent(s)).map(|(id, _)| *id).collect()
    }

    /// Whether a session has yet to say what it holds.
    pub fn wants_resume(&self, session: SessionId) -> bool {
        self.unresumed.contains(&session)
    }

    /// Opens that a session holds of an inode, as far as it has said.
    pub fn opens(&self, session: SessionId, ino: InodeNo) -> u64 {
        self.held.get(&ino).and_then(|holders| holders.get(&session)).copied().unwrap_or(0)
    }

    /// Fails if a session may not open one more.
    pub fn check_open(&self, session: SessionId) -> Result<()> {
        let s = self.sessions.get(&session).ok_or_else(|| unknown(session))?;
        if s.opens >= OPENS_PER_SESSION_MAX {
            return Err(Error::new(
                Reason::Busy,
                format!("session {session} holds {OPENS_PER_SESSION_MAX} files open, the limit: close some"),
            ));
        }
        Ok(())
    }

    /// The sessions that hold an inode open, or may: ascending.
    pub fn holders(&self, ino: InodeNo) -> Vec<SessionId> {
        let mut holders = self.unresumed.clone();
        if let Some(held) = self.held.get(&ino) {
            holders.extend(held.keys());
        }
        holders.into_iter().collect()
    }

    /// The holders of an orphan; `None`: the inode is none.
    pub fn orphan(&self, ino: InodeNo) -> Option<&[SessionId]> {
        self.orphans.get(&ino).map(Vec::as_slice)
    }

    /// Orphans that a session holds.
    pub fn orphans_of(&self, session: SessionId) -> Vec<InodeNo> {
        self.orphans.iter().filter(|(_, holders)| holders.contains(&session)).map(|(ino, _)| *ino).collect()
    }

    /// Orphans with a holder that is no session any more.
    pub fn stale_orphans(&self) -> Vec<(InodeNo, Vec<SessionId>)> {
        let alive = |holders: &[SessionId]| -> Vec<SessionId> {
            holders.iter().copied().filter(|s| self.sessions.contains_key(s)).collect()
        };
        self.orphans
            .iter()
            .map(|(ino, holders)| (*ino, holders.len(), alive(holders)))
            .filter(|(_, before, now)| now.len() < *before)
            .map(|(ino, _, now)| (ino, now))
            .collect()
    }

    /// Commands are looked at now. After a pause (the process was stopped, or its device hung) signs of life may wait behind what is
    /// looked at first.
    pub fn attend(&mut self, now: Instant) {
        self.attended = match self.attended {
            Some((last, since)) if now.saturating_duration_since(last) < ATTENDED_PAUSE_MAX => {
                Some((now, since))
            }
            Some(_) | None => Some((now, now)),
        };
    }

    /// Whether a session was silent for longer, and would have been heard; one that is unknown was.
    pub fn is_silent_for(&self, session: SessionId, limit: Duration, now: Instant) -> bool {
        let Some(session) = self.sessions.get(&session) else { return true };
        let since = self.attended.map_or(session.last_seen, |(_, since)| since.max(session.last_seen));
        now.saturating_duration_since(since) > limit
    }

    /// An inode's locks, by first bytes.
    pub fn locks(&self, ino: InodeNo) -> &[FileLock] {
        self.locks.get(&ino).map_or(&[], Vec::as_slice)
    }

    /// The locks of all inodes that have some.
    pub fn all_locks(&self) -> impl Iterator<Item = (InodeNo, &[FileLock])> {
        self.locks.iter().map(|(ino, locks)| (*ino, locks.as_slice()))
    }

    /// Locks of all inodes.
    pub fn lock_count(&self) -> usize {
        self.lock_count
    }

    /// Inodes with locks of a session, and what they have without those.
    pub fn locks_without(&self, session: SessionId) -> Vec<(InodeNo, Vec<FileLock>)> {
        let has = |locks: &[FileLock]| locks.iter().any(|lock| lock.owner.session == session);
        let others = |locks: &[FileLock]| -> Vec<FileLock> {
            locks.iter().copied().filter(|lock| lock.owner.session != session).collect()
        };
        self.all_locks().filter(|(_, locks)| has(locks)).map(|(ino, locks)| (ino, others(locks))).collect()
    }

    /// The inodes whose locks were loosened since the last call.
    pub fn take_loosened(&mut self) -> HashSet<InodeNo> {
        std::mem::take(&mut self.loosened)
    }

    /// A staged content.
    pub fn staged(&self, content: ContentId) -> Option<StagedContent> {
        self.staged.get(&content).copied()
    }

    /// Bytes of all staged contents.
    pub fn staged_bytes(&self) -> u64 {
        self.staged_bytes
    }

    /// Slots of a session that hold a result.
    pub fn used_slots(&mut self, reader: &dyn Reader, session: SessionId) -> Result<Vec<u16>> {
        let slots = self.slots(reader, session)?;
        Ok((0u16..).zip(slots.iter()).filter(|(_, sequence)| **sequence != 0).map(|(slot, _)| slot).collect())
    }

    fn slots(&mut self, reader: &dyn Reader, session: SessionId) -> Result<&mut [u64]> {
        let s = self.sessions.get_mut(&session).ok_or_else(|| unknown(session))?;
        if s.slots.is_none() {
            let mut slots = vec![0; SESSION_WINDOW as usize].into_boxed_slice();
            reader.scan_prefix(Cf::Sys, &keys::results(session), &mut |key, value| {
                let (_, slot) = keys::parse_result(key)?;
                let sequence =
                    Slot::decode(value).map_err(|e| e.context(format!("session {session}")))?.sequence;
                let place = slots.get_mut(usize::from(slot)).ok_or_else(|| {
                    Error::corrupt(format!("session {session}: slot {slot} is not below {SESSION_WINDOW}"))
                })?;
                *place = sequence.get();
                Ok(ControlFlow::Continue(()))
            })?;
            s.slots = Some(slots);
        }
        Ok(s.slots.as_deref_mut().expect("filled above"))
    }

    /// What is known of a mutation.
    pub fn seen(&mut self, reader: &dyn Reader, session: SessionId, sequence: Sequence) -> Result<Seen> {
        let slot = slot_of(sequence);
        let stored = self.slots(reader, session)?[usize::from(slot)];
        if stored == sequence.get() {
            return Ok(Seen::Answered);
        }
        let failed = self.sessions.get(&session).and_then(|s| s.failures.get(&slot));
        let newest = stored.max(failed.map_or(0, |f| f.sequence.get()));
        if newest > sequence.get() {
            return Err(Error::new(
                Reason::SequenceStale,
                format!(
                    "session {session}: mutation {sequence} is older than {newest}, which took its slot: it was \
                     answered long ago, or more than {SESSION_WINDOW} are outstanding"
                ),
            ));
        }
        match failed {
            Some(f) if f.sequence == sequence => Ok(Seen::Failed(f.fingerprint, f.error.clone())),
            Some(_) | None => Ok(Seen::New),
        }
    }

    /// Notes that a mutation was applied.
    pub fn note_answered(&mut self, session: SessionId, sequence: Sequence) {
        if let Some(s) = self.sessions.get_mut(&session)
            && let Some(slots) = s.slots.as_deref_mut()
        {
            slots[usize::from(slot_of(sequence))] = sequence.get();
        }
    }

    /// Notes that a mutation failed for good.
    pub fn note_failed(
        &mut self,
        session: SessionId,
        sequence: Sequence,
        fingerprint: Fingerprint,
        error: Error,
    ) {
        if let Some(s) = self.sessions.get_mut(&session) {
            s.failures.insert(slot_of(sequence), Failure { sequence, fingerprint, error });
        }
    }

    /// Forgets that a mutation failed.
    pub fn forget_failed(&mut self, session: SessionId, sequence: Sequence) {
        if let Some(s) = self.sessions.get_mut(&session)
            && s.failures.get(&slot_of(sequence)).is_some_and(|f| f.sequence == sequence)
        {
            s.failures.remove(&slot_of(sequence));
        }
    }

    /// Forgets copies of result slots: they are read from the store again.
    pub fn forget_slots(&mut self) {
        for s in self.sessions.values_mut() {
            s.slots = None;
        }
    }

    /// Applies an effect.
    pub fn apply(&mut self, effect: Effect) -> Undo {
        match effect {
            Effect::Begin(session) => {
                self.sessions.insert(session, Session::new(clock::monotonic(), true));
                Undo::Effects(vec![Effect::End(session)])
            }
            Effect::End(session) => self.end(session),
            Effect::Resumed(session) => {
                self.unresumed.remove(&session);
                if let Some(s) = self.sessions.get_mut(&session) {
                    s.resumed = true;
                }
                // Nothing to take back: a session that spoke has spoken.
                Undo::Effects(Vec::new())
            }
            Effect::Opens(session, ino, change) => {
                self.change_opens(session, ino, change);
                Undo::Effects(vec![Effect::Opens(session, ino, -change)])
            }
            Effect::Orphan(ino, holders) => {
                let before = if holders.is_empty() {
                    self.orphans.remove(&ino)
                } else {
                    self.orphans.insert(ino, holders)
                };
                Undo::Effects(vec![Effect::Orphan(ino, before.unwrap_or_default())])
            }
            Effect::Staged(content, staged) => {
                let before = match staged {
                    Some(staged) => self.staged.insert(content, staged),
                    None => self.staged.remove(&content),
                };
                let bytes = |staged: Option<StagedContent>| staged.map_or(0, |s| s.bytes);
                self.staged_bytes = self.staged_bytes + bytes(staged) - bytes(before);
                Undo::Effects(vec![Effect::Staged(content, before)])
            }
            Effect::Locks { inode, locks, loosened } => {
                self.lock_count += locks.len();
                let before = if locks.is_empty() {
                    self.locks.remove(&inode)
                } else {
                    self.locks.insert(inode, locks)
                };
                let before = before.unwrap_or_default();
                self.lock_count -= before.len();
                if loosened {
                    self.loosened.insert(inode);
                }
                // What is taken back may have kept somebody waiting.
                Undo::Effects(vec![Effect::Locks { inode, locks: before, loosened: true }])
            }
        }
    }

    /// Takes an effect back.
    pub fn undo(&mut self, undo: Undo) {
        match undo {
            Undo::Effects(effects) => {
                for effect in effects {
                    self.apply(effect);
                }
            }
            Undo::Session(id, ended) => {
                for (ino, count) in ended.held {
                    self.held.entry(ino).or_default().insert(id, count);
                }
                if !ended.session.resumed {
                    self.unresumed.insert(id);
                }
                self.sessions.insert(id, ended.session);
            }
        }
    }

    fn end(&mut self, id: SessionId) -> Undo {
        let Some(session) = self.sessions.remove(&id) else { return Undo::Effects(Vec::new()) };
        self.unresumed.remove(&id);
        let mut held = Vec::new();
        self.held.retain(|ino, holders| {
            if let Some(count) = holders.remove(&id) {
                held.push((*ino, count));
            }
            !holders.is_empty()
        });
        Undo::Session(id, Box::new(Ended { session, held }))
    }

    fn change_opens(&mut self, id: SessionId, ino: InodeNo, change: i64) {
        let Some(session) = self.sessions.get_mut(&id) else { return };
        let holders = self.held.entry(ino).or_default();
        let count = holders.entry(id).or_default();
        let before = *count;
        *count = before.saturating_add_signed(change);
        session.opens = session.opens - before + *count;
        if *count == 0 {
            holders.remove(&id);
            if holders.is_empty() {
                self.held.remove(&ino);
            }
        }
    }
}

/// The error of a number that came with two mutations.
pub fn reused(session: SessionId, sequence: Sequence) -> Error {
    Error::invalid(format!(
        "session {session}: number {sequence} was given to another mutation before: give each its own"
    ))
}

/// The error of a session that the shard does not know.
pub fn unknown(session: SessionId) -> Error {
    Error::new(
        Reason::SessionUnknown,
        format!(
            "the shard does not know session {session}: it was closed or silent too long; open a new one"
        ),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    /// Sessions and a clock of their own.
    struct Heard {
        live: Live,
        start: Instant,
    }

    impl Heard {
        /// Sessions that were heard at the start.
        fn at_the_start(sessions: &[SessionId]) -> Heard {
            let mut heard = Heard { live: Live::default(), start: clock::monotonic() };
            for session in sessions {
                heard.live.apply(Effect::Begin(*session));
                heard.hear(*session, 0);
            }
            heard
        }

        fn at(&self, second: u64) -> Instant {
            self.start + Duration::from_secs(second)
        }

        fn hear(&mut self, session: SessionId, second: u64) {
            let when = self.at(second);
            self.live.sessions.get_mut(&session).unwrap().last_seen = when;
        }

        /// Commands are looked at, of whomever.
        fn attend(&mut self, seconds: impl IntoIterator<Item = u64>) {
            for second in seconds {
                self.live.attend(self.at(second));
            }
        }

        fn is_silent(&self, session: SessionId, second: u64) -> bool {
            self.live.is_silent_for(session, LIMIT, self.at(second))
        }
    }

    fn id(number: u64) -> SessionId {
        SessionId::new(number).unwrap()
    }

    #[test]
    fn who_is_not_heard_while_others_are_is_silent() {
        let mut heard = Heard::at_the_start(&[id(1), id(2)]);
        heard.attend((0..=60).step_by(10));
        heard.hear(id(2), 50);
        assert!(!heard.is_silent(id(1), 60));
        heard.attend([61]);
        assert!(heard.is_silent(id(1), 61));
        assert!(!heard.is_silent(id(2), 61) && !heard.is_silent(id(2), 110));
        heard.attend((80..=111).step_by(10));
        assert!(heard.is_silent(id(2), 111));
        // A sign of life at the last moment counts as any other.
        heard.hear(id(1), 111);
        assert!(!heard.is_silent(id(1), 111));
        assert!(heard.is_silent(id(3), 0), "one that is unknown says nothing");
    }

    #[test]
    fn nobody_is_silent_while_commands_are_not_looked_at() {
        let mut heard = Heard::at_the_start(&[id(1), id(2)]);
        heard.attend([0, 10]);
        // A pause: signs of life may have come in it, and wait behind the first command after it.
        heard.attend([300]);
        assert!(!heard.is_silent(id(1), 300));
        heard.attend((300..=360).step_by(10));
        heard.hear(id(2), 310);
        assert!(!heard.is_silent(id(1), 360));
        assert!(heard.is_silent(id(1), 361) && !heard.is_silent(id(2), 361), "it had its time since");
        // Another pause, another time.
        heard.attend([360 + ATTENDED_PAUSE_MAX.as_secs()]);
        assert!(!heard.is_silent(id(1), 361 + ATTENDED_PAUSE_MAX.as_secs()));
    }

    #[test]
    fn short_pauses_excuse_nobody() {
        let mut heard = Heard::at_the_start(&[id(1)]);
        let longest = ATTENDED_PAUSE_MAX.as_secs() - 1;
        heard.attend((0..=3).map(|n| n * longest));
        assert!(heard.is_silent(id(1), 3 * longest));
    }

    #[test]
    fn silence_is_not_looked_for_before_the_first_command() {
        let mut heard = Heard::at_the_start(&[id(1)]);
        // The shard was opened, and nobody came for long.
        heard.attend([500]);
        assert!(!heard.is_silent(id(1), 560));
        heard.attend((510..=560).step_by(10));
        assert!(heard.is_silent(id(1), 561));
    }
}
