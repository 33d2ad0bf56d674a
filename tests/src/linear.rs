//! Whether a history of concurrent operations on one key is linearisable: whether each operation can be given one moment
//! between its call and its return, so that the results are those of a single register that does them one after the other.
//!
//! The search is that of Wing and Gong with Lowe's memory of what was tried: the earliest calls are tried first, an operation
//! that has returned must be placed before its return is passed, and a set of placed operations that was reached with
//! the same value before is not searched again. Keys are checked one by one: a history is linearisable if it is for each key.

use std::collections::HashSet;
use std::fmt::Write;

/// Moments, in ns of one clock.
pub type Moment = u64;

/// What was asked, and what was answered.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Call {
    /// The value was stored.
    Put(u64),
    /// The value is stored if the key is absent; whether it was.
    Create(u64, bool),
    /// The key is removed; whether it was there.
    Delete(bool),
    /// This was read; `None`: absent.
    Get(Option<u64>),
}

/// One operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operation {
    /// Who did it, for messages.
    pub client: u32,
    /// When it was called.
    pub called: Moment,
    /// When its answer came. `None`: it never did, so it may have happened at any later moment, or not at all; what `call` says
    /// of its result does not count.
    pub returned: Option<Moment>,
    /// What it was.
    pub call: Call,
}

impl Operation {
    /// The register after it, or `None` if its result does not fit.
    fn apply(&self, value: Option<u64>) -> Option<Option<u64>> {
        let known = self.returned.is_some();
        match self.call {
            Call::Put(new) => Some(Some(new)),
            Call::Create(new, made) if made == value.is_none() || !known => Some(value.or(Some(new))),
            Call::Delete(found) if found == value.is_some() || !known => Some(None),
            Call::Get(seen) if seen == value || !known => Some(value),
            Call::Create(..) | Call::Delete(_) | Call::Get(_) => None,
        }
    }
}

/// Which operations were placed.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Placed(Box<[u64]>);

impl Placed {
    fn set(&mut self, at: usize, on: bool) {
        let bit = 1 << (at % 64);
        if on { self.0[at / 64] |= bit } else { self.0[at / 64] &= !bit }
    }

    fn has(&self, at: usize) -> bool {
        self.0[at / 64] & (1 << (at % 64)) != 0
    }
}

/// Calls and returns in order of time, as a list from which pairs are taken out and put back.
struct Events {
    /// Of event `i`: its operation, and whether it is the call. 0 is the head, which is none.
    of: Vec<(usize, bool)>,
    next: Vec<usize>,
    previous: Vec<usize>,
    /// The event of an operation's return.
    return_of: Vec<usize>,
}

const END: usize = usize::MAX;

impl Events {
    fn new(history: &[Operation]) -> Events {
        let mut moments: Vec<(Moment, bool, usize)> = Vec::with_capacity(history.len() * 2);
        for (at, operation) in history.iter().enumerate() {
            // Of equal moments the call comes first: they overlap.
            moments.push((operation.called, false, at));
            moments.push((operation.returned.unwrap_or(Moment::MAX), true, at));
        }
        moments.sort_unstable();
        let mut of = vec![(END, false)];
        let mut return_of = vec![END; history.len()];
        for (_, is_return, at) in moments {
            if is_return {
                return_of[at] = of.len();
            }
            of.push((at, !is_return));
        }
        let next = (1..of.len()).chain([END]).collect();
        let previous = [END].into_iter().chain(0..of.len() - 1).collect();
        Events { of, next, previous, return_of }
    }

    fn take(&mut self, event: usize) {
        let (before, after) = (self.previous[event], self.next[event]);
        self.next[before] = after;
        if after != END {
            self.previous[after] = before;
        }
    }

    /// Undoes the last [`Events::take`] that was not undone.
    fn put_back(&mut self, event: usize) {
        let (before, after) = (self.previous[event], self.next[event]);
        self.next[before] = event;
        if after != END {
            self.previous[after] = event;
        }
    }
}

/// Checks the history of one key, which is absent at first.
///
/// # Errors
/// What could not be placed, with what happened around it.
pub fn check(history: &[Operation]) -> Result<(), String> {
    let mut events = Events::new(history);
    let mut placed = Placed(vec![0; history.len().div_ceil(64)].into());
    let mut seen: HashSet<(Placed, Option<u64>)> = HashSet::new();
    let mut steps: Vec<(usize, Option<u64>)> = Vec::new();
    let mut value = None;
    let mut open = history.iter().filter(|operation| operation.returned.is_some()).count();
    let mut furthest: (usize, Placed, Option<u64>, usize) = (0, placed.clone(), None, END);
    let mut event = events.next[0];
    while open > 0 {
        let (at, is_call) = events.of[event];
        let operation = &history[at];
        if is_call {
            if let Some(after) = operation.apply(value) {
                placed.set(at, true);
                if seen.insert((placed.clone(), after)) {
                    steps.push((event, value));
                    value = after;
                    open -= usize::from(operation.returned.is_some());
                    events.take(event);
                    events.take(events.return_of[at]);
                    event = events.next[0];
                    continue;
                }
                placed.set(at, false);
            }
            event = events.next[event];
            continue;
        }
        // It has returned and has found no place: what was placed last was wrong.
        if steps.len() >= furthest.0 {
            furthest = (steps.len(), placed.clone(), value, at);
        }
        let Some((last, before)) = steps.pop() else {
            return Err(explain(history, &furthest));
        };
        let (taken, _) = events.of[last];
        events.put_back(events.return_of[taken]);
        events.put_back(last);
        placed.set(taken, false);
        open += usize::from(history[taken].returned.is_some());
        value = before;
        event = events.next[last];
    }
    Ok(())
}

fn explain(history: &[Operation], furthest: &(usize, Placed, Option<u64>, usize)) -> String {
    /// Neighbours that are shown.
    const AROUND: usize = 12;
    let (count, placed, value, stuck) = furthest;
    let mut order: Vec<usize> = (0..history.len()).collect();
    order.sort_by_key(|at| history[*at].called);
    let here = order.iter().position(|at| at == stuck).unwrap_or(0);
    let mut text = format!(
        "no order of {} operations explains the results: after {count} were placed, with the value {value:?},\n{:?}\nfits nowhere. \
         Around it (* was placed before):\n",
        history.len(),
        history[*stuck]
    );
    for at in &order[here.saturating_sub(AROUND)..(here + AROUND).min(order.len())] {
        let mark = if placed.has(*at) { '*' } else { ' ' };
        let _ = writeln!(text, "{mark} {:?}", history[*at]);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn operation(client: u32, called: Moment, returned: Moment, call: Call) -> Operation {
        Operation { client, called, returned: Some(returned), call }
    }

    fn unknown(client: u32, called: Moment, call: Call) -> Operation {
        Operation { client, called, returned: None, call }
    }

    #[test]
    fn one_after_the_other() {
        check(&[]).unwrap();
        let history = [
            operation(1, 0, 1, Call::Get(None)),
            operation(1, 2, 3, Call::Delete(false)),
            operation(1, 4, 5, Call::Create(1, true)),
            operation(1, 6, 7, Call::Create(2, false)),
            operation(1, 8, 9, Call::Get(Some(1))),
            operation(1, 10, 11, Call::Put(3)),
            operation(1, 12, 13, Call::Delete(true)),
            operation(1, 14, 15, Call::Get(None)),
        ];
        check(&history).unwrap();
        for at in 0..history.len() {
            let mut wrong = history;
            wrong[at].call = match wrong[at].call {
                Call::Put(_) => Call::Get(Some(9)),
                Call::Create(value, made) => Call::Create(value, !made),
                Call::Delete(found) => Call::Delete(!found),
                Call::Get(Some(_)) => Call::Get(None),
                Call::Get(None) => Call::Get(Some(1)),
            };
            check(&wrong).unwrap_err();
        }
    }

    #[test]
    fn reads_may_not_go_back() {
        let put = operation(1, 0, 100, Call::Put(1));
        let new_first = operation(2, 10, 20, Call::Get(Some(1)));
        check(&[put, new_first, operation(3, 15, 40, Call::Get(None))]).unwrap();
        let said = check(&[put, new_first, operation(3, 30, 40, Call::Get(None))]).unwrap_err();
        assert!(said.contains("client: 3"), "{said}");
    }

    #[test]
    fn what_was_answered_may_not_be_lost() {
        let history = [
            operation(1, 0, 10, Call::Put(1)),
            operation(1, 20, 30, Call::Put(2)),
            operation(2, 40, 50, Call::Get(Some(1))),
        ];
        check(&history).unwrap_err();
    }

    #[test]
    fn what_was_not_answered_may_have_happened_once() {
        let put = unknown(1, 0, Call::Put(1));
        let get = |at, seen| operation(2, at, at + 1, Call::Get(seen));
        check(&[put, get(10, None), get(20, None)]).unwrap();
        check(&[put, get(10, None), get(20, Some(1))]).unwrap();
        check(&[put, get(10, Some(1)), get(20, None)]).unwrap_err();
        // Not twice: the value comes back after another one.
        let other = operation(2, 12, 13, Call::Put(2));
        check(&[put, get(10, Some(1)), other, get(20, Some(1))]).unwrap_err();
        check(&[unknown(1, 0, Call::Create(1, false)), get(10, Some(1))]).unwrap();
        check(&[get(10, Some(1)), unknown(1, 20, Call::Put(1))]).unwrap_err();
    }

    /// A history of a real register: every operation happens at a random moment within its call.
    fn random_history(random: &mut fastrand::Rng, clients: u32, each: usize) -> Vec<Operation> {
        let mut spans: Vec<(Moment, Moment, Moment, u32)> = Vec::new();
        for client in 0..clients {
            let mut now = random.u64(..50);
            for _ in 0..each {
                let called = now;
                let happens = called + random.u64(1..60);
                let returned = happens + random.u64(1..60);
                spans.push((happens, called, returned, client));
                now = returned + random.u64(1..20);
            }
        }
        spans.sort_unstable();
        let mut value = None;
        let mut history = Vec::new();
        for (number, (_, called, returned, client)) in spans.into_iter().enumerate() {
            let fresh = number as u64;
            let call = match random.u8(..10) {
                0..3 => Call::Put(fresh),
                3 => Call::Create(fresh, value.is_none()),
                4 => Call::Delete(value.is_some()),
                _ => Call::Get(value),
            };
            // Few: each doubles what a search has to look at that finds nothing.
            let returned = (random.u8(..100) > 0).then_some(returned);
            let operation = Operation { client, called, returned, call };
            // One without an answer may not have happened.
            if returned.is_some() || random.bool() {
                value = operation.apply(value).unwrap();
            }
            history.push(operation);
        }
        history
    }

    #[test]
    fn histories_of_a_real_register_pass_and_damaged_ones_do_not() {
        for seed in 0..200 {
            let mut random = fastrand::Rng::with_seed(seed);
            let mut history = random_history(&mut random, 6, 40);
            check(&history).unwrap_or_else(|why| panic!("seed {seed}: {why}"));
            // A read of what was never written.
            let reads: Vec<usize> = (0..history.len())
                .filter(|at| matches!(history[*at].call, Call::Get(_)) && history[*at].returned.is_some())
                .collect();
            let damaged = reads[random.usize(..reads.len())];
            history[damaged].call = Call::Get(Some(u64::MAX));
            check(&history).expect_err("a value from nowhere");
        }
    }

    #[test]
    fn long_histories_are_checked() {
        let mut random = fastrand::Rng::with_seed(1);
        check(&random_history(&mut random, 8, 1_000)).unwrap();
    }
}
