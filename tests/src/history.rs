//! What was done to a shard, in which order, and whether what is found after a crash is a prefix of it.
//!
//! The load runs in *lanes*: each does one change after another, to names of its own, and notes when it was issued
//! and answered, by one counter for all. So the order within a lane is known, and between lanes it is known of
//! changes that did not overlap. A crash leaves of every lane its first `n` changes; [`History::check`] finds each `n` and
//! holds it against what every prefix of the shard's order must obey:
//!
//! - nothing is there that had not been issued when the crash was over;
//! - what was durable when the crash began is there, and with it everything that had been answered before it was issued;
//! - if a change is there, so is every change of any lane that had been answered before it was issued.
//!
//! A lane refuses a change that leads back to a state which it had before, so `n` is never ambiguous.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::hash::{Hash, Hasher};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

/// Names with their content.
pub type State = BTreeMap<String, Vec<u8>>;

/// Names that a message shows.
const SHOWN: usize = 8;

/// One operation of a shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// Names get contents, all at once.
    Put(Vec<(String, Vec<u8>)>),
    /// A name goes.
    Remove(String),
    /// A name becomes another, and takes its place if there is one.
    Rename(String, String),
    /// Bytes at a place of a file; what lies between its end and them is zeros.
    Write(String, usize, Vec<u8>),
    /// A file gets a length.
    Truncate(String, usize),
}

impl Change {
    /// Applies it. Panics if it names what is not there: the load knows what it has made.
    pub fn apply(&self, state: &mut State) {
        fn there<'a>(state: &'a mut State, name: &str) -> &'a mut Vec<u8> {
            state.get_mut(name).unwrap_or_else(|| panic!("{name} is changed and is not there"))
        }
        match self {
            Change::Put(items) => state.extend(items.iter().cloned()),
            Change::Remove(name) => {
                there(state, name);
                state.remove(name);
            }
            Change::Rename(from, to) => {
                there(state, from);
                let content = state.remove(from).unwrap_or_default();
                state.insert(to.clone(), content);
            }
            Change::Write(name, offset, bytes) => {
                let content = there(state, name);
                content.resize(content.len().max(offset + bytes.len()), 0);
                content[*offset..offset + bytes.len()].copy_from_slice(bytes);
            }
            Change::Truncate(name, length) => there(state, name).resize(*length, 0),
        }
    }
}

#[derive(Debug)]
struct Done {
    change: Change,
    issued: u64,
    answered: Option<u64>,
    /// The answer said that it is on the device.
    durable: bool,
}

#[derive(Debug, Default)]
struct LaneState {
    done: Vec<Done>,
    /// As it is when all of them have happened.
    last: State,
    /// Its digest.
    digest: u64,
    /// Digests of all states so far.
    seen: HashMap<u64, usize>,
}

/// A moment, on the history's own counter.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Moment(u64);

/// All lanes of one shard.
#[derive(Debug)]
pub struct History {
    clock: AtomicU64,
    lanes: Vec<(String, Mutex<LaneState>)>,
    /// Barriers that were answered: when they were issued and answered.
    barriers: Mutex<Vec<(u64, u64)>>,
}

/// A change that was issued and is not answered yet.
#[derive(Debug)]
#[must_use]
pub struct Issued {
    number: usize,
}

impl History {
    /// With lanes of these names; each owns the names in the shard that begin with its own and a slash.
    pub fn new(lanes: &[&str]) -> History {
        let lane = |name: &&str| {
            let seen = HashMap::from([(digest(&State::new()), 0)]);
            ((*name).to_owned(), Mutex::new(LaneState { seen, ..LaneState::default() }))
        };
        History {
            clock: AtomicU64::new(1),
            lanes: lanes.iter().map(lane).collect(),
            barriers: Mutex::default(),
        }
    }

    /// Now.
    pub fn now(&self) -> Moment {
        Moment(self.clock.fetch_add(1, Ordering::SeqCst))
    }

    /// A lane's name.
    pub fn lane_name(&self, lane: usize) -> &str {
        &self.lanes[lane].0
    }

    /// What the lane holds when everything that was issued has happened.
    pub fn last(&self, lane: usize) -> State {
        self.lanes[lane].1.lock().unwrap().last.clone()
    }

    /// The names that it holds then.
    pub fn names(&self, lane: usize) -> Vec<String> {
        self.lanes[lane].1.lock().unwrap().last.keys().cloned().collect()
    }

    /// Changes of every lane that had been answered at a moment.
    pub fn answered_by(&self, moment: Moment) -> Vec<usize> {
        self.lanes.iter().map(|(_, lane)| lane.lock().unwrap().answered_by(moment.0)).collect()
    }

    /// Notes that a change is going to be asked for. `None`: it would lead back to an earlier state; do another one.
    pub fn issue(&self, lane: usize, change: Change) -> Option<Issued> {
        let (name, state) = &self.lanes[lane];
        let mut state = state.lock().unwrap();
        let state = &mut *state;
        assert!(state.done.last().is_none_or(|d| d.answered.is_some()), "{name} does one thing at a time");
        let names: BTreeSet<String> = names_of(&change).into_iter().map(str::to_owned).collect();
        assert!(names.iter().all(|key| lane_of(key) == name), "{name} keeps to names of its own: {names:?}");
        let before: Vec<_> = names.iter().map(|name| (name, state.last.get(name).cloned())).collect();
        let digest_before = state.digest;
        let part = |last: &State| {
            let entries = names.iter().filter_map(|name| last.get_key_value(name));
            entries.map(|(name, content)| entry_digest(name, content)).fold(0, u64::wrapping_add)
        };
        state.digest = state.digest.wrapping_sub(part(&state.last));
        change.apply(&mut state.last);
        state.digest = state.digest.wrapping_add(part(&state.last));
        if state.seen.contains_key(&state.digest) {
            state.digest = digest_before;
            for (name, content) in before {
                match content {
                    Some(content) => drop(state.last.insert(name.clone(), content)),
                    None => drop(state.last.remove(name)),
                }
            }
            return None;
        }
        state.done.push(Done { change, issued: self.now().0, answered: None, durable: false });
        state.seen.insert(state.digest, state.done.len());
        Some(Issued { number: state.done.len() - 1 })
    }

    /// Notes that it was answered as done; `durable`: and that it is on the device.
    pub fn answered(&self, lane: usize, issued: Issued, durable: bool) {
        let mut state = self.lanes[lane].1.lock().unwrap();
        let done = &mut state.done[issued.number];
        done.answered = Some(self.now().0);
        done.durable = durable;
    }

    /// Notes that a sync of everything before was answered; `issued`: taken before it was asked for.
    pub fn synced(&self, issued: Moment) {
        let answered = self.now().0;
        self.barriers.lock().unwrap().push((issued.0, answered));
    }

    /// Holds what was found after a crash against the history. `began`: taken before it, `over`: taken after it. Answers how
    /// many changes each lane has left, or what is wrong.
    pub fn check(&self, found: &State, began: Moment, over: Moment) -> Result<Vec<usize>, String> {
        let lanes: Vec<_> = self.lanes.iter().map(|(name, state)| (name, state.lock().unwrap())).collect();
        let mut parts: HashMap<&str, State> = HashMap::new();
        for (key, content) in found {
            let Some(name) = lanes.iter().map(|(name, _)| *name).find(|name| lane_of(key) == *name) else {
                return Err(format!("{key:?} is there, and nobody has made it"));
            };
            parts.entry(name.as_str()).or_default().insert(key.clone(), content.clone());
        }
        let mut counts = Vec::new();
        for (name, lane) in &lanes {
            let part = parts.remove(name.as_str()).unwrap_or_default();
            match lane.seen.get(&digest(&part)) {
                Some(count) if lane.replay(*count) == part => counts.push(*count),
                _ => {
                    return Err(format!(
                        "lane {name} holds no state that it ever had:\n{}",
                        lane.closest(&part)
                    ));
                }
            }
        }
        // The latest sync that was acknowledged before the crash, by when it was asked for.
        let mut synced = 0;
        for (issued, answered) in self.barriers.lock().unwrap().iter() {
            if *answered < began.0 {
                synced = synced.max(*issued);
            }
        }
        for (_, lane) in &lanes {
            let durable = |d: &&Done| d.durable && d.answered.is_some_and(|a| a < began.0);
            synced = synced.max(lane.done.iter().rev().find(durable).map_or(0, |d| d.issued));
        }
        for ((name, lane), count) in lanes.iter().zip(&counts) {
            let own = lane.done.iter().rposition(|d| d.durable && d.answered.is_some_and(|a| a < began.0));
            let least = lane.answered_by(synced).max(own.map_or(0, |at| at + 1));
            if *count < least {
                return Err(format!(
                    "lane {name} has {count} changes, and {least} were durable before the crash: the next, {:?}, is lost",
                    brief(&lane.done[*count].change)
                ));
            }
            let most = lane.done.partition_point(|d| d.issued < over.0);
            if *count > most {
                return Err(format!("lane {name} has {count} changes, and only {most} had been asked for"));
            }
        }
        for ((name, lane), count) in lanes.iter().zip(&counts) {
            let Some(last) = count.checked_sub(1) else { continue };
            let issued = lane.done[last].issued;
            for ((other, other_lane), other_count) in lanes.iter().zip(&counts) {
                let before = other_lane.answered_by(issued);
                if *other_count < before {
                    return Err(format!(
                        "change {count} of {name} is there, and change {} of {other}, {:?}, which was answered before \
                         that was asked for, is not",
                        other_count + 1,
                        brief(&other_lane.done[*other_count].change)
                    ));
                }
            }
        }
        Ok(counts)
    }

    /// Holds what is found after everything was answered against the history: all of it must be there. For loads whose
    /// clients live on.
    pub fn check_all(&self, found: &State) -> Result<(), String> {
        let now = self.now();
        let counts = self.check(found, now, now)?;
        for ((name, lane), count) in self.lanes.iter().zip(counts) {
            let lane = lane.lock().unwrap();
            if count != lane.done.len() {
                let lost = brief(&lane.done[count].change);
                return Err(format!("lane {name}: {count} of {} changes; {lost:?} is lost", lane.done.len()));
            }
        }
        Ok(())
    }
}

impl LaneState {
    fn answered_by(&self, moment: u64) -> usize {
        // In order of time: one follows the other.
        self.done.partition_point(|d| d.answered.is_some_and(|answered| answered < moment))
    }

    fn replay(&self, count: usize) -> State {
        let mut state = State::new();
        self.done[..count].iter().for_each(|d| d.change.apply(&mut state));
        state
    }

    /// How a state that never was differs from the one that is most like it, for people.
    fn closest(&self, found: &State) -> String {
        let mut state = State::new();
        let unlike = |state: &State| {
            let differ = |(name, content): &(&String, &Vec<u8>)| found.get(*name) != Some(*content);
            state.iter().filter(differ).count() + found.keys().filter(|k| !state.contains_key(*k)).count()
        };
        let mut best = (unlike(&state), 0);
        for (at, done) in self.done.iter().enumerate() {
            done.change.apply(&mut state);
            best = best.min((unlike(&state), at + 1));
        }
        let state = self.replay(best.1);
        let mut said = format!("  most like the one after {} of {} changes\n", best.1, self.done.len());
        let names: BTreeSet<&String> = state.keys().chain(found.keys()).collect();
        let differing = names.into_iter().filter(|name| state.get(*name) != found.get(*name));
        for name in differing.take(SHOWN) {
            let (want, have) = (state.get(name), found.get(name));
            let length = |content: Option<&Vec<u8>>| {
                content.map_or_else(|| "nothing".to_owned(), |c| format!("{} bytes", c.len()))
            };
            let at = match (want, have) {
                (Some(want), Some(have)) => want.iter().zip(have).position(|(a, b)| a != b),
                _ => None,
            };
            let place = at.map_or_else(String::new, |at| format!(", other from byte {at}"));
            said.push_str(&format!("  {name}: {} expected, {} found{place}\n", length(want), length(have)));
            let touched =
                self.done.iter().enumerate().filter(|(_, d)| names_of(&d.change).contains(&name.as_str()));
            for (at, done) in touched.collect::<Vec<_>>().into_iter().rev().take(3) {
                said.push_str(&format!(
                    "    change {}: {:?}, durable: {}\n",
                    at + 1,
                    brief(&done.change),
                    done.durable
                ));
            }
        }
        said
    }
}

fn names_of(change: &Change) -> Vec<&str> {
    match change {
        Change::Put(items) => items.iter().map(|(name, _)| name.as_str()).collect(),
        Change::Remove(name) | Change::Write(name, ..) | Change::Truncate(name, _) => vec![name],
        Change::Rename(from, to) => vec![from, to],
    }
}

/// A change without its bytes.
fn brief(change: &Change) -> String {
    match change {
        Change::Put(items) => {
            let names: Vec<&str> = items.iter().map(|(name, _)| name.as_str()).take(SHOWN).collect();
            format!("put {}", names.join(", "))
        }
        Change::Remove(name) => format!("remove {name}"),
        Change::Rename(from, to) => format!("rename {from} {to}"),
        Change::Write(name, offset, bytes) => format!("write {name} {offset}+{}", bytes.len()),
        Change::Truncate(name, length) => format!("truncate {name} {length}"),
    }
}

fn lane_of(key: &str) -> &str {
    key.split('/').next().unwrap_or(key)
}

/// Equal states have equal ones; others hardly ever, and they are compared as well.
fn digest(state: &State) -> u64 {
    state.iter().map(|(name, content)| entry_digest(name, content)).fold(0, u64::wrapping_add)
}

fn entry_digest(name: &str, content: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (name, content).hash(&mut hasher);
    hasher.finish()
}

#[cfg(test)]
mod tests;
