//! The fence of whole SCSI and NVMe devices: a persistent reservation of type Write Exclusive.
//!
//! Only the holder writes; whoever else tries fails with EBADE, in the device, whatever its kernel believes.
//! Registrations give no right to write with this type, and are made by the winner when it needs one.
//!
//! The device is taken by RESERVE if it is free, and by PREEMPT AND ABORT if it is held, which also ends the
//! commands of the old holder that are under way. Targets are known on which the abort never ends. So each call
//! is bounded in time; then a plain PREEMPT follows, from another descriptor. It leaves the old holder's commands
//! in the device, as does taking a free device: they get [`Bounds::drain`] to end in. If the kernel cannot tell
//! who holds the reservation (SCSI before Linux 6.19), the keys of known predecessors are tried, and then CLEAR, after
//! which the device is as free as it was before any reservation, and is reserved.
//!
//! What comes late does no harm. A command carries the key under which its sender is registered; the winner's key
//! holds its epoch; so a preemption that executes after a later winner has removed our registration conflicts. A winner
//! of an older epoch that is resumed sees the later epoch in the holder's key and gives up. (Where the kernel
//! cannot read it may clear the device and reserve it: then the later winner's writes fail, and not a byte is
//! written by two. It costs an election.)
//!
//! Registrations are made to persist through power loss, which is not true of every target: a reservation that is gone
//! is seen by [`Fence::still_held`], and acquired again.

use std::os::unix::fs::FileTypeExt;
use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::types::{Error, Reason, Result, VolumeId};

use super::bounded::bounded;
use super::{Action, Deadline, Fence, FenceKey, FenceKind, Fenced, Journal, Takeover, stale, unfenced};
use crate::volume::{VolumeSpec, io_error};

pub mod conformance;
mod device;
mod nvme;

/// Type Write Exclusive, of linux/pr.h and SPC-4 alike.
const WRITE_EXCLUSIVE: u32 = 1;
/// How often a command is repeated that failed for a passing reason: a target reports resets and others'
/// preemptions by failing the next command once.
const ATTEMPTS_MAX: u32 = 3;
/// How often the reservation may turn out to be somebody else's after all.
const ROUNDS_MAX: u32 = 8;
/// Registrations that are swept: more would be no cluster of ours.
const SWEEP_MAX: usize = 64;

/// Bounds in time.
#[derive(Clone, Copy, Debug)]
pub struct Bounds {
    /// Of one command. A device that takes longer does not serve either.
    pub call: Duration,
    /// Of PREEMPT AND ABORT: aborting what is under way takes a working target milliseconds.
    pub abort: Duration,
    /// What commands of the old holder get that were under way and not aborted: they were accepted before the
    /// preemption, and a device that works completes what it has accepted within a fraction of a second.
    pub drain: Duration,
}

impl Bounds {
    /// What a failover can afford.
    pub const DEFAULT: Bounds = Bounds {
        call: Duration::from_secs(2),
        abort: Duration::from_millis(500),
        drain: Duration::from_secs(1),
    };
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds::DEFAULT
    }
}

/// Why a command did not succeed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Refusal {
    /// RESERVATION CONFLICT: not registered with this key, held by another, or no such key to preempt.
    Conflict,
    /// Device or kernel have no such command.
    Unsupported(String),
    /// It failed, and may succeed when it is repeated.
    Passing(String),
    /// It failed.
    Failed(String),
}

type Outcome<T> = std::result::Result<T, Refusal>;

/// Whether the device knows reservations; changes nothing. A preemption under a key that nobody has conflicts on every device
/// that does. (Linux's own SCSI target answers RESERVE, RELEASE and CLEAR from a path that is not registered with an error that
/// says nothing: NOT READY, logical unit communication failure.)
fn probe(commands: &(impl Commands + ?Sized)) -> Outcome<()> {
    match commands.preempt(u64::MAX, u64::MAX, false) {
        Ok(()) | Err(Refusal::Conflict) => Ok(()),
        Err(refusal) => Err(refusal),
    }
}

/// Who holds a reservation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Holder {
    pub(crate) key: u64,
    pub(crate) kind: u32,
}

/// The reservation commands of one path to one device. Each may block for ever.
pub(crate) trait Commands: Send + Sync {
    /// REGISTER AND IGNORE EXISTING KEY; 0: unregister.
    fn register(&self, key: u64) -> Outcome<()>;
    /// RESERVE, Write Exclusive. Good if it is ours already.
    fn reserve(&self, key: u64) -> Outcome<()>;
    /// RELEASE, Write Exclusive. Good if it is not ours.
    fn release(&self, key: u64) -> Outcome<()>;
    /// Whether PREEMPT AND ABORT may be given at all.
    fn aborts(&self) -> bool {
        true
    }
    /// PREEMPT or PREEMPT AND ABORT. Conflicts if the victim's key is not registered.
    fn preempt(&self, own: u64, victim: u64, abort: bool) -> Outcome<()>;
    /// CLEAR: removes the reservation and all registrations.
    fn clear(&self, own: u64) -> Outcome<()>;
    /// READ RESERVATION.
    fn holder(&self) -> Outcome<Option<Holder>>;
    /// READ KEYS.
    fn keys(&self) -> Outcome<Vec<u64>>;
}

/// The fence of volumes that are whole devices.
#[derive(Clone, Copy, Default, Debug)]
pub struct ReservationFence {
    /// Bounds in time.
    pub bounds: Bounds,
}

impl ReservationFence {
    fn device(&self, spec: &VolumeSpec) -> Result<Reserver> {
        let meta = std::fs::metadata(&spec.source)
            .map_err(|e| io_error(&format!("looking at {}", spec.source.display()), &e))?;
        if !meta.file_type().is_block_device() {
            return Err(Error::new(
                Reason::Unsupported,
                format!("{} is no block device: it knows no reservations", spec.source.display()),
            ));
        }
        Ok(Reserver {
            volume: spec.id.clone(),
            bounds: self.bounds,
            commands: Arc::new(device::Device::new(&spec.source)),
        })
    }
}

impl Fence for ReservationFence {
    fn capability(&self, spec: &VolumeSpec) -> Result<FenceKind> {
        self.device(spec)?.capability()?;
        Ok(FenceKind::Reservation)
    }

    fn acquire(&self, spec: &VolumeSpec, takeover: &Takeover) -> Result<Fenced> {
        let device = self.device(spec)?;
        match device.capability() {
            Err(error) if error.reason() == Reason::Unsupported && spec.allow_unfenced => {
                Ok(unfenced(takeover.key))
            }
            Err(error) => Err(error),
            Ok(()) => device.acquire(takeover),
        }
    }

    fn still_held(&self, spec: &VolumeSpec, key: FenceKey) -> Result<bool> {
        self.device(spec)?.still_held(key)
    }

    fn release(&self, spec: &VolumeSpec, key: FenceKey) -> Result<()> {
        self.device(spec)?.release(key)
    }
}

/// The algorithm, on a device.
struct Reserver {
    volume: VolumeId,
    bounds: Bounds,
    commands: Arc<dyn Commands>,
}

/// How a bounded command ended.
enum Ended<T> {
    Done(Outcome<T>),
    Hung,
}

/// What one attempt at the holder came to.
enum Taken {
    /// The holder's commands were aborted with it.
    Aborted,
    /// The holder's commands may be under way.
    Plainly,
    /// The holder was gone already, or we were: look again.
    Conflicted,
}

impl Reserver {
    fn call<T: Send + 'static>(
        &self,
        what: &'static str,
        bound: Duration,
        command: impl Fn(&dyn Commands) -> Outcome<T> + Send + Sync + Clone + 'static,
    ) -> Result<Ended<T>> {
        let mut attempt = 1;
        loop {
            let (commands, command) = (self.commands.clone(), command.clone());
            let ended = bounded(what, bound, move || command(commands.as_ref()))?;
            match ended {
                None => return Ok(Ended::Hung),
                Some(Err(Refusal::Passing(_))) if attempt < ATTEMPTS_MAX => attempt += 1,
                Some(outcome) => return Ok(Ended::Done(outcome)),
            }
        }
    }

    /// A command that has to end, with conflicts told apart.
    fn must<T: Send + 'static>(
        &self,
        what: &'static str,
        deadline: Option<Deadline>,
        command: impl Fn(&dyn Commands) -> Outcome<T> + Send + Sync + Clone + 'static,
    ) -> Result<std::result::Result<T, Conflict>> {
        let bound = deadline.map_or(self.bounds.call, |d| d.left().min(self.bounds.call));
        match self.call(what, bound, command)? {
            Ended::Done(Ok(value)) => Ok(Ok(value)),
            Ended::Done(Err(Refusal::Conflict)) => Ok(Err(Conflict)),
            Ended::Done(Err(refusal)) => Err(self.error(what, &refusal)),
            Ended::Hung => Err(self.hung(what, bound)),
        }
    }

    /// The same for a command that a path may give which is no longer registered: there, not every target answers with a
    /// conflict (see [`probe`]).
    fn must_or_conflict(
        &self,
        what: &'static str,
        deadline: Option<Deadline>,
        command: impl Fn(&dyn Commands) -> Outcome<()> + Send + Sync + Clone + 'static,
    ) -> Result<std::result::Result<(), Conflict>> {
        let bound = deadline.map_or(self.bounds.call, |d| d.left().min(self.bounds.call));
        match self.call(what, bound, command)? {
            Ended::Done(Ok(())) => Ok(Ok(())),
            Ended::Done(Err(Refusal::Conflict | Refusal::Passing(_))) => Ok(Err(Conflict)),
            Ended::Done(Err(refusal)) => Err(self.error(what, &refusal)),
            Ended::Hung => Err(self.hung(what, bound)),
        }
    }

    fn hung(&self, what: &str, bound: Duration) -> Error {
        let (volume, ms) = (&self.volume, bound.as_millis());
        Error::new(
            Reason::Deadline,
            format!("volume {volume}: {what}: the device has not answered for {ms} ms"),
        )
    }

    fn error(&self, what: &str, refusal: &Refusal) -> Error {
        let volume = &self.volume;
        match refusal {
            Refusal::Conflict => Error::unavailable(format!("volume {volume}: {what}: reservation conflict")),
            Refusal::Unsupported(why) => {
                Error::new(Reason::Unsupported, format!("volume {volume}: {what}: no reservations: {why}"))
            }
            Refusal::Passing(why) | Refusal::Failed(why) => {
                Error::io(format!("volume {volume}: {what}: {why}"))
            }
        }
    }

    /// Who holds it; `None`: the kernel cannot tell.
    fn holder(&self, deadline: Option<Deadline>) -> Result<Option<Option<Holder>>> {
        let bound = deadline.map_or(self.bounds.call, |d| d.left().min(self.bounds.call));
        match self.call("reading the reservation", bound, |c| c.holder())? {
            Ended::Done(Ok(holder)) => Ok(Some(holder)),
            // Whatever the reason, the rest can be done without.
            Ended::Done(Err(_)) | Ended::Hung => Ok(None),
        }
    }

    fn capability(&self) -> Result<()> {
        let bound = self.bounds.call;
        if let Ended::Done(Ok(_)) = self.call("reading the reservation", bound, |c| c.holder())? {
            return Ok(());
        }
        let what = "asking for reservations";
        match self.call(what, bound, |c| probe(c))? {
            Ended::Done(Ok(())) => Ok(()),
            // Not passing at all: the device does not understand the command.
            Ended::Done(Err(Refusal::Passing(why))) => Err(self.error(what, &Refusal::Unsupported(why))),
            Ended::Done(Err(refusal)) => Err(self.error(what, &refusal)),
            Ended::Hung => Err(self.hung(what, bound)),
        }
    }

    fn acquire(&self, takeover: &Takeover) -> Result<Fenced> {
        let deadline = Deadline::after(takeover.bound);
        let mut journal = Journal::new();
        let own = takeover.key;
        let mut drain = !takeover.handed_over;
        let mut untried = takeover.predecessors.clone();
        let mut rounds = 0;
        self.register(own, deadline)?;
        journal.note(Action::Registered, own);
        loop {
            rounds += 1;
            if rounds > ROUNDS_MAX || deadline.is_over() {
                return Err(Error::unavailable(format!(
                    "volume {}: the reservation could not be taken in {} rounds and {} ms",
                    self.volume,
                    rounds - 1,
                    takeover.bound.as_millis()
                )));
            }
            if self.must("reserving", Some(deadline), move |c| c.reserve(own.get()))?.is_ok() {
                journal.note(Action::Reserved, own);
                break;
            }
            let victim = match self.holder(Some(deadline))? {
                Some(Some(holder)) => {
                    if let Some(other) = FenceKey::from_raw(holder.key)
                        && other.epoch() > own.epoch()
                    {
                        self.unregister(own);
                        return Err(stale(&self.volume, own, other));
                    }
                    Some(holder.key)
                }
                // Free, and yet a conflict: our registration is gone, or the holder is.
                Some(None) => {
                    self.register(own, deadline)?;
                    continue;
                }
                None if untried.is_empty() => None,
                None => Some(untried.remove(0).get()),
            };
            match victim {
                Some(victim) => {
                    match self.preempt(own, victim, quiet(takeover, victim), deadline, &mut journal)? {
                        Taken::Aborted => drain = false,
                        Taken::Plainly => drain = !quiet(takeover, victim),
                        Taken::Conflicted => {
                            drain = true;
                            self.register(own, deadline)?;
                        }
                    }
                }
                None => {
                    // Everybody may write now, as before there was a reservation, and nobody has mounted yet.
                    if self.must("clearing", Some(deadline), move |c| c.clear(own.get()))?.is_ok() {
                        journal.note(Action::Cleared, own);
                    }
                    drain = true;
                    self.register(own, deadline)?;
                }
            }
        }
        fail::fail_point!("fence::reservation::reserved", |_| Err(Error::unavailable("failpoint")));
        if drain {
            if deadline.left() < self.bounds.drain {
                return Err(Error::new(
                    Reason::Deadline,
                    format!(
                        "volume {}: reserved, but no time is left to let the old holder's commands end",
                        self.volume
                    ),
                ));
            }
            deadline.pause(self.bounds.drain);
            journal.note(Action::Waited, self.bounds.drain.as_millis());
        }
        self.sweep(own, deadline, &mut journal)?;
        if !self.is_ours(own, Some(deadline))? {
            return Err(Error::unavailable(format!(
                "volume {}: another node took the reservation right away",
                self.volume
            )));
        }
        journal.note(Action::Verified, own);
        Ok(journal.done(FenceKind::Reservation, own))
    }

    fn register(&self, own: FenceKey, deadline: Deadline) -> Result<()> {
        match self.must("registering", Some(deadline), move |c| c.register(own.get()))? {
            Ok(()) => Ok(()),
            Err(Conflict) => Err(self.error("registering", &Refusal::Conflict)),
        }
    }

    /// Best effort: a registration gives no right to write.
    fn unregister(&self, own: FenceKey) {
        if let Err(error) = self.must("unregistering", None, |c| c.register(0)) {
            tracing::debug!(volume = %self.volume, key = %own, %error, "a registration stays");
        }
    }

    /// `quiet`: nothing of the victim is under way, so there is nothing to abort.
    fn preempt(
        &self,
        own: FenceKey,
        victim: u64,
        quiet: bool,
        deadline: Deadline,
        journal: &mut Journal,
    ) -> Result<Taken> {
        if !quiet
            && self.commands.aborts()
            && let Some(taken) = self.preempt_aborting(own, victim, deadline, journal)?
        {
            return Ok(taken);
        }
        match self.must("preempting", Some(deadline), move |c| c.preempt(own.get(), victim, false))? {
            Ok(()) => {
                journal.note(Action::Preempted, format!("{victim:#018x}"));
                Ok(Taken::Plainly)
            }
            Err(Conflict) => Ok(Taken::Conflicted),
        }
    }

    /// `None`: the device does not do it.
    fn preempt_aborting(
        &self,
        own: FenceKey,
        victim: u64,
        deadline: Deadline,
        journal: &mut Journal,
    ) -> Result<Option<Taken>> {
        let target = format!("{victim:#018x}");
        let bound = self.bounds.abort.min(deadline.left());
        match self.call("preempting and aborting", bound, move |c| c.preempt(own.get(), victim, true))? {
            Ended::Done(Ok(())) => {
                journal.note(Action::PreemptedAborting, target);
                return Ok(Some(Taken::Aborted));
            }
            Ended::Done(Err(Refusal::Conflict)) => return Ok(Some(Taken::Conflicted)),
            Ended::Done(Err(refusal)) => {
                tracing::warn!(volume = %self.volume, why = ?refusal, "the device does not abort commands");
            }
            // The call may end at any time, or have taken effect: then the plain one conflicts.
            Ended::Hung => journal.note(Action::AbortHung, target),
        }
        Ok(None)
    }

    /// Removes registrations of older epochs: what their owners have half done conflicts from now on.
    fn sweep(&self, own: FenceKey, deadline: Deadline, journal: &mut Journal) -> Result<()> {
        let bound = self.bounds.call.min(deadline.left());
        let Ended::Done(Ok(keys)) = self.call("reading the keys", bound, |c| c.keys())? else {
            return Ok(());
        };
        let older = |key: &u64| FenceKey::from_raw(*key).is_some_and(|key| key.epoch() < own.epoch());
        for key in keys.into_iter().filter(older).take(SWEEP_MAX) {
            let swept = self.must("sweeping", Some(deadline), move |c| c.preempt(own.get(), key, false))?;
            if swept.is_ok() {
                journal.note(Action::Swept, format!("{key:#018x}"));
            }
        }
        Ok(())
    }

    /// The holder alone can reserve again.
    fn is_ours(&self, own: FenceKey, deadline: Option<Deadline>) -> Result<bool> {
        if let Some(holder) = self.holder(deadline)? {
            return Ok(holder == Some(Holder { key: own.get(), kind: WRITE_EXCLUSIVE }));
        }
        Ok(self.must_or_conflict("reserving", deadline, move |c| c.reserve(own.get()))?.is_ok())
    }

    fn still_held(&self, key: FenceKey) -> Result<bool> {
        self.is_ours(key, None)
    }

    fn release(&self, key: FenceKey) -> Result<()> {
        if self.must_or_conflict("releasing", None, move |c| c.release(key.get()))?.is_ok() {
            self.unregister(key);
        }
        // A conflict: not registered with this key (any more), so nothing of it is left.
        Ok(())
    }
}

/// Whether nothing of this holder is under way.
fn quiet(takeover: &Takeover, holder: u64) -> bool {
    takeover.handed_over && takeover.predecessors.first().is_some_and(|key| key.get() == holder)
}

/// The device said RESERVATION CONFLICT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Conflict;

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
