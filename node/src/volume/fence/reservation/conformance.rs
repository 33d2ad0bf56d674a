//! Whether a device keeps its promises: the reservation commands that the fence relies on, tried from two paths.
//!
//! It registers with both, reserves with one, writes with both, preempts with the other, writes again, and gives
//! everything back. What is written is what was there before: the last block of the device, as it was read when the check began.
//! Nobody else may be using the device.
//!
//! Invariants: a reservation of somebody else is left alone unless the caller says otherwise; whatever happens, the
//! registrations that were made here are taken back; every command has a bound in time.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use shardfs_proto::types::{Error, Reason, Result, clock};

use super::super::bounded::bounded;
use super::{ATTEMPTS_MAX, Bounds, Commands, Outcome, Refusal, device, probe};

mod block;

/// Keys of the check, for its two paths. Their epoch is 0, which no primary's is: primaries take them for strangers' and
/// preempt them.
const KEYS: [u64; 2] = [0x00D0_C701 << 40, 0x00D0_C702 << 40];
/// Bounds of a check, which has more time than a failover.
const BOUNDS: Bounds =
    Bounds { call: Duration::from_secs(10), abort: Duration::from_secs(3), drain: Duration::ZERO };

/// What became of a step.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// As it must be.
    Ok,
    /// The fence does without it.
    Poor,
    /// A fence by this device would not hold.
    Broken,
}

/// One step of the check.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Step {
    /// Its name, of a closed set.
    pub name: &'static str,
    /// What became of it.
    pub verdict: Verdict,
    /// What was seen.
    pub detail: String,
}

/// What a device says of its reservation.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Held {
    /// The kernel cannot ask (SCSI before Linux 6.19).
    Unknown,
    /// By nobody.
    No,
    /// Under this key.
    By(u64),
}

/// One path to a device. Each call may block for ever.
trait Side: Commands {
    /// Writes the check's block as it was.
    fn write(&self) -> Outcome<()>;
    /// Reads it.
    fn read(&self) -> Outcome<()>;
}

/// Whether a device has reservations at all, and who holds it. Changes nothing.
pub fn capability(device: &Path) -> Result<Held> {
    let commands: Arc<dyn Commands> = Arc::new(device::Device::new(device));
    let reading = commands.clone();
    if let Some(Ok(holder)) = call("reading the reservation", BOUNDS.call, move || reading.holder())? {
        return Ok(holder.map_or(Held::No, |holder| Held::By(holder.key)));
    }
    match call("asking for reservations", BOUNDS.call, move || probe(commands.as_ref()))? {
        Some(Ok(())) => Ok(Held::Unknown),
        Some(Err(refusal)) => Err(Error::new(Reason::Unsupported, said(&refusal))),
        None => Err(Error::new(Reason::Deadline, "the device does not answer")),
    }
}

/// Tries all of it. `force`: a reservation that somebody holds, and all registrations, are removed first. Blocks.
pub fn check(first: &Path, second: &Path, force: bool) -> Result<Vec<Step>> {
    let block = block::read_last(first)?;
    let side = |path: &Path| -> Arc<dyn Side> { Arc::new(block::Path::new(path, block.clone())) };
    Ok(Check::new([side(first), side(second)], BOUNDS).run(force))
}

/// The check is over: a step has failed without which the others say nothing.
struct Over;

struct Check {
    sides: [Arc<dyn Side>; 2],
    bounds: Bounds,
    steps: Vec<Step>,
}

const FIRST: usize = 0;
const SECOND: usize = 1;
const NAMES: [&str; 2] = ["the first path", "the second path"];

impl Check {
    fn new(sides: [Arc<dyn Side>; 2], bounds: Bounds) -> Check {
        Check { sides, bounds, steps: Vec::new() }
    }

    fn run(mut self, force: bool) -> Vec<Step> {
        // Whether all steps were taken shows in the steps.
        let _over = self.steps_in_order(force);
        self.give_back();
        self.steps
    }

    fn steps_in_order(&mut self, force: bool) -> std::result::Result<(), Over> {
        for side in [FIRST, SECOND] {
            let done = self.command(side, "registering", move |s| s.register(KEYS[side]));
            self.must("register", done, format!("{} is registered", NAMES[side]))?;
        }
        self.be_free(force)?;
        self.writes("unreserved", FIRST)?;
        self.writes("unreserved", SECOND)?;

        let done = self.command(FIRST, "reserving", |s| s.reserve(KEYS[FIRST]));
        self.must("reserve", done, "the first path holds the device, Write Exclusive".into())?;
        self.writes("reserve", FIRST)?;
        self.refused("conflict", SECOND)?;
        let done = self.command(SECOND, "reading", |s| s.read());
        self.must("conflict", done, "the second path reads".into())?;
        let done = self.command(SECOND, "reserving", |s| s.reserve(KEYS[SECOND]));
        self.must_conflict("conflict", done, "the second path cannot reserve")?;

        self.preempt()?;
        self.refused("late write", FIRST)?;
        self.writes("late write", SECOND)?;
        let done = self.command(FIRST, "reserving", |s| s.reserve(KEYS[FIRST]));
        // Not every target calls that a conflict: the path is registered no longer.
        let done = match done {
            Some(Err(Refusal::Passing(_))) => Some(Err(Refusal::Conflict)),
            done => done,
        };
        self.must_conflict("late write", done, "the first path, preempted, cannot reserve")?;
        self.tells_holder();

        let done = self.command(SECOND, "releasing", |s| s.release(KEYS[SECOND]));
        self.must("release", done, "the second path has released".into())?;
        self.writes("release", FIRST)?;
        Ok(())
    }

    /// Nobody may hold it when the check begins.
    fn be_free(&mut self, force: bool) -> std::result::Result<(), Over> {
        const NAME: &str = "free";
        if force {
            let done = self.command(FIRST, "clearing", |s| s.clear(KEYS[FIRST]));
            self.must(NAME, done, "all reservations and registrations were removed".into())?;
            for side in [FIRST, SECOND] {
                let done = self.command(side, "registering", move |s| s.register(KEYS[side]));
                self.must(NAME, done, format!("{} is registered again", NAMES[side]))?;
            }
            return Ok(());
        }
        // Ours, of a check that was killed: it goes with its registration.
        match self.command(FIRST, "reserving", |s| s.reserve(KEYS[FIRST])) {
            Some(Ok(())) => {
                let done = self.command(FIRST, "releasing", |s| s.release(KEYS[FIRST]));
                self.must(NAME, done, "nobody holds the device".into())
            }
            Some(Err(Refusal::Conflict)) => {
                let key = match self.command(FIRST, "reading the reservation", |s| s.holder()) {
                    Some(Ok(Some(holder))) => format!("under the key {:#018x}", holder.key),
                    _unreadable => "under a key that this kernel cannot read".into(),
                };
                self.note(
                    NAME,
                    Verdict::Broken,
                    format!("somebody holds the device, {key}: a node may be using it"),
                );
                Err(Over)
            }
            done => self.must(NAME, done, String::new()),
        }
    }

    fn preempt(&mut self) -> std::result::Result<(), Over> {
        const NAME: &str = "preempt and abort";
        if !self.sides[SECOND].aborts() {
            let detail = "not tried: this is Linux's own SCSI target, which hangs after it; the fence uses a plain preempt and \
                          waits for what is under way";
            self.note(NAME, Verdict::Poor, detail.to_owned());
            return self.preempt_plainly();
        }
        let begun = clock::monotonic();
        let (side, bound) = (self.sides[SECOND].clone(), self.bounds.abort);
        let aborting = call("preempting", bound, move || side.preempt(KEYS[SECOND], KEYS[FIRST], true));
        let poor = match aborting {
            Ok(Some(Ok(()))) => {
                let ms = begun.elapsed().as_millis();
                self.note(NAME, Verdict::Ok, format!("the second path has taken the device, in {ms} ms"));
                return Ok(());
            }
            Ok(Some(Err(refusal))) => said(&refusal),
            Ok(None) => format!("it does not end within {} ms", bound.as_millis()),
            Err(error) => error.message().to_owned(),
        };
        let detail = format!("{poor}: the fence uses a plain preempt and waits for what is under way");
        self.note(NAME, Verdict::Poor, detail);
        self.preempt_plainly()
    }

    fn preempt_plainly(&mut self) -> std::result::Result<(), Over> {
        let done = self.command(SECOND, "preempting", |s| s.preempt(KEYS[SECOND], KEYS[FIRST], false));
        match done {
            // The abort took effect, and only its end is missing.
            Some(Err(Refusal::Conflict)) => {
                let done = self.command(SECOND, "reserving", |s| s.reserve(KEYS[SECOND]));
                self.must("preempt", done, "the second path has taken the device".into())
            }
            done => self.must("preempt", done, "the second path has taken the device".into()),
        }
    }

    /// Knowing the holder saves a fence some guessing.
    fn tells_holder(&mut self) {
        const NAME: &str = "read keys";
        let step = match self.command(SECOND, "reading the reservation", |s| s.holder()) {
            Some(Ok(Some(holder))) if holder.key == KEYS[SECOND] => {
                (Verdict::Ok, "the kernel tells who holds the device".to_owned())
            }
            Some(Ok(other)) => {
                (Verdict::Broken, format!("the second path holds it, the device says {other:?}"))
            }
            Some(Err(_)) => {
                let why = "this kernel cannot tell who holds the device (Linux 6.19 can): known predecessors are tried";
                (Verdict::Poor, why.to_owned())
            }
            None => (Verdict::Poor, "the device does not say in time who holds it".to_owned()),
        };
        self.note(NAME, step.0, step.1);
    }

    /// Takes back whatever was registered; with the registration goes the reservation.
    fn give_back(&mut self) {
        for side in [FIRST, SECOND] {
            match self.command(side, "unregistering", |s| s.register(0)) {
                // A conflict: there was none.
                Some(Ok(()) | Err(Refusal::Conflict)) => {}
                Some(Err(refusal)) => self.left(side, &said(&refusal)),
                None => self.left(side, "the device does not answer"),
            }
        }
    }

    fn left(&mut self, side: usize, why: &str) {
        let detail = format!("the registration {:#018x} of {} stays: {why}", KEYS[side], NAMES[side]);
        self.note("give back", Verdict::Broken, detail);
    }

    fn writes(&mut self, name: &'static str, side: usize) -> std::result::Result<(), Over> {
        let done = self.command(side, "writing", |s| s.write());
        self.must(name, done, format!("{} writes", NAMES[side]))
    }

    fn refused(&mut self, name: &'static str, side: usize) -> std::result::Result<(), Over> {
        let done = self.command(side, "writing", |s| s.write());
        self.must_conflict(name, done, &format!("a write by {} is refused", NAMES[side]))
    }

    fn must(
        &mut self,
        name: &'static str,
        done: Option<Outcome<()>>,
        detail: String,
    ) -> std::result::Result<(), Over> {
        match done {
            Some(Ok(())) => {
                self.note(name, Verdict::Ok, detail);
                Ok(())
            }
            Some(Err(refusal)) => {
                self.note(name, Verdict::Broken, format!("not so: {detail}: {}", said(&refusal)));
                Err(Over)
            }
            None => {
                self.note(name, Verdict::Broken, format!("not so: {detail}: the device does not answer"));
                Err(Over)
            }
        }
    }

    fn must_conflict(
        &mut self,
        name: &'static str,
        done: Option<Outcome<()>>,
        detail: &str,
    ) -> std::result::Result<(), Over> {
        match done {
            Some(Err(Refusal::Conflict)) => {
                self.note(name, Verdict::Ok, detail.to_owned());
                Ok(())
            }
            Some(Ok(())) => {
                let why = "not refused: the paths lead to different disks, or look like one to the device, or it does not \
                           keep its reservations";
                self.note(name, Verdict::Broken, format!("not so: {detail}: {why}"));
                Err(Over)
            }
            other => self.must(name, other, detail.to_owned()),
        }
    }

    fn note(&mut self, name: &'static str, verdict: Verdict, detail: String) {
        self.steps.push(Step { name, verdict, detail });
    }

    /// `None`: it did not end in time.
    fn command<T: Send + 'static>(
        &self,
        side: usize,
        what: &'static str,
        command: impl Fn(&dyn Side) -> Outcome<T> + Send + Clone + 'static,
    ) -> Option<Outcome<T>> {
        let side = self.sides[side].clone();
        call(what, self.bounds.call, move || command(side.as_ref()))
            .unwrap_or_else(|error| Some(Err(Refusal::Failed(error.message().to_owned()))))
    }
}

/// Runs a command within a bound; what fails for a passing reason is repeated.
fn call<T: Send + 'static>(
    what: &'static str,
    bound: Duration,
    command: impl Fn() -> Outcome<T> + Send + 'static,
) -> Result<Option<Outcome<T>>> {
    bounded(what, bound, move || {
        let mut attempt = 1;
        loop {
            match command() {
                Err(Refusal::Passing(_)) if attempt < ATTEMPTS_MAX => attempt += 1,
                done => return done,
            }
        }
    })
}

fn said(refusal: &Refusal) -> String {
    match refusal {
        Refusal::Conflict => "reservation conflict".into(),
        Refusal::Unsupported(why) => format!("no reservations: {why}"),
        Refusal::Passing(why) | Refusal::Failed(why) => why.clone(),
    }
}

#[cfg(test)]
mod tests;
