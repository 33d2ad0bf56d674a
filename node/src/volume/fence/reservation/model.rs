//! A device with persistent reservations as SPC-4 has them, in memory, for the tests of the algorithm.
//!
//! A nexus is a path from one initiator to the device: what registers, holds and is refused. The model also has
//! what SPC-4 leaves to chance: commands under way, a power cut that forgets, aborts that hang, kernels that
//! cannot read.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};

use super::{Commands, Holder, Outcome, Refusal, WRITE_EXCLUSIVE};

pub(super) type Nexus = u32;

/// What PREEMPT AND ABORT does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Abort {
    Works,
    /// Takes effect except for the aborting, and never ends.
    HangsAfter,
    /// Takes effect when [`Target::let_go`] is called.
    HangsBefore,
    Unsupported,
    /// Must not be asked for.
    Harmful,
}

#[derive(Default)]
struct State {
    registered: BTreeMap<Nexus, u64>,
    reservation: Option<(Nexus, u32)>,
    under_way: Vec<(Nexus, &'static str)>,
    media: Vec<&'static str>,
    commands: u32,
    let_go: bool,
}

/// The device.
pub(super) struct Target {
    state: Mutex<State>,
    changed: Condvar,
    pub(super) abort: Abort,
    pub(super) readable: bool,
    /// What is reserved, released or cleared from a path that is not registered is refused as Linux's target does it: with
    /// an error that does not say that it is a conflict.
    pub(super) vague: bool,
}

/// What happens before a command.
pub(super) type Hook = Box<dyn Fn(u32) -> Option<Refusal> + Send + Sync>;

/// One path to it.
pub(super) struct Path {
    pub(super) target: Arc<Target>,
    pub(super) nexus: Nexus,
    /// Told the number of the command, from 0; may refuse it or never come back.
    pub(super) before: Option<Hook>,
}

impl Target {
    pub(super) fn new(abort: Abort, readable: bool) -> Arc<Target> {
        Target::with(abort, readable, false)
    }

    pub(super) fn with(abort: Abort, readable: bool, vague: bool) -> Arc<Target> {
        Arc::new(Target {
            state: Mutex::new(State::default()),
            changed: Condvar::new(),
            abort,
            readable,
            vague,
        })
    }

    pub(super) fn path(self: &Arc<Target>, nexus: Nexus) -> Path {
        Path { target: self.clone(), nexus, before: None }
    }

    /// A write that arrives now and stays under way until [`Target::complete`].
    pub(super) fn write(&self, nexus: Nexus, data: &'static str) -> Outcome<()> {
        let mut state = self.state.lock();
        if state.reservation.is_some_and(|(holder, _)| holder != nexus) {
            return Err(Refusal::Conflict);
        }
        state.under_way.push((nexus, data));
        Ok(())
    }

    /// All commands under way end.
    pub(super) fn complete(&self) {
        let mut state = self.state.lock();
        let done: Vec<_> = state.under_way.drain(..).map(|(_, data)| data).collect();
        state.media.extend(done);
    }

    pub(super) fn media(&self) -> Vec<&'static str> {
        self.state.lock().media.clone()
    }

    pub(super) fn holder_key(&self) -> Option<u64> {
        let state = self.state.lock();
        state.reservation.and_then(|(nexus, _)| state.registered.get(&nexus).copied())
    }

    pub(super) fn registered_keys(&self) -> Vec<u64> {
        self.state.lock().registered.values().copied().collect()
    }

    /// Power fails, on a target that does not keep registrations through it.
    pub(super) fn forget(&self) {
        let mut state = self.state.lock();
        state.registered.clear();
        state.reservation = None;
    }

    /// Hanging aborts go on.
    pub(super) fn let_go(&self) {
        self.state.lock().let_go = true;
        self.changed.notify_all();
    }
}

impl State {
    fn check(&self, nexus: Nexus, key: u64) -> Outcome<()> {
        if self.registered.get(&nexus) == Some(&key) { Ok(()) } else { Err(Refusal::Conflict) }
    }

    fn preempt(&mut self, nexus: Nexus, own: u64, victim: u64, abort: bool) -> Outcome<()> {
        self.check(nexus, own)?;
        let victims: Vec<Nexus> =
            self.registered.iter().filter(|(_, key)| **key == victim).map(|(nexus, _)| *nexus).collect();
        if victims.is_empty() {
            return Err(Refusal::Conflict);
        }
        let held = self.reservation.is_some_and(|(holder, _)| victims.contains(&holder));
        for gone in victims.iter().filter(|gone| **gone != nexus) {
            self.registered.remove(gone);
        }
        if held {
            self.reservation = Some((nexus, WRITE_EXCLUSIVE));
        }
        if abort {
            self.under_way.retain(|(from, _)| !victims.contains(from));
        }
        Ok(())
    }
}

impl Path {
    /// Whether a command may be given under this key from here.
    fn check(&self, state: &State, key: u64) -> Outcome<()> {
        if self.target.vague && !state.registered.contains_key(&self.nexus) {
            return Err(Refusal::Passing("status 0x2".into()));
        }
        state.check(self.nexus, key)
    }

    fn begin(&self) -> Outcome<parking_lot::MutexGuard<'_, State>> {
        let mut state = self.target.state.lock();
        let number = state.commands;
        state.commands += 1;
        drop(state);
        if let Some(refusal) = self.before.as_ref().and_then(|before| before(number)) {
            return Err(refusal);
        }
        Ok(self.target.state.lock())
    }

    fn hang(&self) {
        let mut state = self.target.state.lock();
        while !state.let_go {
            // A bound, so that a test that fails does not hang.
            if self.target.changed.wait_for(&mut state, Duration::from_secs(30)).timed_out() {
                return;
            }
        }
    }
}

impl Commands for Path {
    fn register(&self, key: u64) -> Outcome<()> {
        let mut state = self.begin()?;
        if key != 0 {
            state.registered.insert(self.nexus, key);
            return Ok(());
        }
        state.registered.remove(&self.nexus);
        if state.reservation.is_some_and(|(holder, _)| holder == self.nexus) {
            state.reservation = None;
        }
        Ok(())
    }

    fn reserve(&self, key: u64) -> Outcome<()> {
        let mut state = self.begin()?;
        self.check(&state, key)?;
        match state.reservation {
            None => state.reservation = Some((self.nexus, WRITE_EXCLUSIVE)),
            Some(held) if held == (self.nexus, WRITE_EXCLUSIVE) => {}
            Some(_) => return Err(Refusal::Conflict),
        }
        Ok(())
    }

    fn release(&self, key: u64) -> Outcome<()> {
        let mut state = self.begin()?;
        self.check(&state, key)?;
        if state.reservation.is_some_and(|(holder, _)| holder == self.nexus) {
            state.reservation = None;
        }
        Ok(())
    }

    fn aborts(&self) -> bool {
        self.target.abort != Abort::Harmful
    }

    fn preempt(&self, own: u64, victim: u64, abort: bool) -> Outcome<()> {
        let mut state = self.begin()?;
        match self.target.abort {
            _plain if !abort => state.preempt(self.nexus, own, victim, false),
            Abort::Works => state.preempt(self.nexus, own, victim, true),
            Abort::Harmful => panic!("an abort was asked for"),
            Abort::Unsupported => Err(Refusal::Failed("status 0x2".into())),
            Abort::HangsAfter => {
                state.preempt(self.nexus, own, victim, false)?;
                drop(state);
                self.hang();
                Ok(())
            }
            Abort::HangsBefore => {
                drop(state);
                self.hang();
                self.target.state.lock().preempt(self.nexus, own, victim, true)
            }
        }
    }

    fn clear(&self, own: u64) -> Outcome<()> {
        let mut state = self.begin()?;
        self.check(&state, own)?;
        state.registered.clear();
        state.reservation = None;
        Ok(())
    }

    fn holder(&self) -> Outcome<Option<Holder>> {
        let state = self.begin()?;
        if !self.target.readable {
            return Err(Refusal::Unsupported("ENOTTY".into()));
        }
        Ok(state.reservation.map(|(nexus, kind)| Holder { key: state.registered[&nexus], kind }))
    }

    fn keys(&self) -> Outcome<Vec<u64>> {
        let state = self.begin()?;
        if !self.target.readable {
            return Err(Refusal::Unsupported("ENOTTY".into()));
        }
        Ok(state.registered.values().copied().collect())
    }
}
