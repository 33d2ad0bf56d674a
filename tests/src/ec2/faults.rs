//! Ways in which EC2 fails, that tests ask for.

use std::time::Duration;

use super::model::World;
use super::query::Refusal;

/// What goes wrong.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Kind {
    /// `RequestLimitExceeded`, 503; not done.
    Throttle,
    /// `InternalError`, 500; not done.
    ServerError,
    /// `InternalError`, 500, although it is done.
    ServerErrorAfterSuccess,
    /// `Unavailable`, 503; not done.
    Unavailable,
    /// `UnauthorizedOperation`, 403; not done.
    Unauthorized,
    /// Any other refusal; not done.
    Refused {
        /// HTTP status.
        status: u16,
        /// EC2's code.
        code: String,
        /// EC2's message.
        message: String,
    },
    /// Not done; the connection is closed without an answer after this time.
    TimeoutBefore(Duration),
    /// Done; the connection is closed without an answer after this time. Calls that are refused are answered.
    TimeoutAfterSuccess(Duration),
    /// Descriptions are of the state of this long ago. Named for another action: that does not find volumes and snapshots which
    /// were not there then.
    StaleReads(Duration),
    /// Attachments that are begun stay `attaching` until the faults are cleared.
    StuckAttach,
    /// Those whose end is asked for stay `detaching` until it is forced, or the faults are cleared.
    StuckDetach,
}

/// When something goes wrong.
#[derive(Clone, Debug)]
pub struct Fault {
    /// What goes wrong.
    pub kind: Kind,
    /// The only action with which it does.
    pub action: Option<String>,
    /// The only access key with which it does.
    pub key: Option<String>,
    /// How often it still does.
    pub times: Option<u32>,
    /// How likely it does at a call.
    pub probability: f64,
}

impl Fault {
    /// One that happens at every call of every action.
    pub fn of(kind: Kind) -> Fault {
        Fault { kind, action: None, key: None, times: None, probability: 1.0 }
    }

    /// With this action only.
    pub fn on(mut self, action: &str) -> Fault {
        self.action = Some(action.to_owned());
        self
    }

    /// With this access key only.
    pub fn by(mut self, key: &str) -> Fault {
        self.key = Some(key.to_owned());
        self
    }

    /// This often at most.
    pub fn times(mut self, times: u32) -> Fault {
        self.times = Some(times);
        self
    }

    /// At this share of the calls.
    pub fn probability(mut self, probability: f64) -> Fault {
        self.probability = probability;
        self
    }
}

/// What part of a call a kind of fault concerns.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Moment {
    Before,
    After,
    Reading,
    Attaching,
    Detaching,
}

impl Kind {
    fn moment(&self) -> Moment {
        match self {
            Kind::Throttle
            | Kind::ServerError
            | Kind::Unavailable
            | Kind::Unauthorized
            | Kind::Refused { .. }
            | Kind::TimeoutBefore(_) => Moment::Before,
            Kind::ServerErrorAfterSuccess | Kind::TimeoutAfterSuccess(_) => Moment::After,
            Kind::StaleReads(_) => Moment::Reading,
            Kind::StuckAttach => Moment::Attaching,
            Kind::StuckDetach => Moment::Detaching,
        }
    }
}

/// The faults that are set.
#[derive(Debug)]
pub(super) struct Faults {
    set: Vec<Fault>,
    random: fastrand::Rng,
}

impl Faults {
    pub(super) fn new(seed: u64) -> Faults {
        Faults { set: Vec::new(), random: fastrand::Rng::with_seed(seed) }
    }

    pub(super) fn add(&mut self, fault: Fault) {
        self.set.push(fault);
    }

    pub(super) fn clear(&mut self) {
        self.set.clear();
    }

    /// The fault that happens at this moment of a call, if one does; it has then happened.
    pub(super) fn strike(&mut self, moment: Moment, action: &str, key: &str) -> Option<Kind> {
        for fault in &mut self.set {
            let concerned = fault.kind.moment() == moment
                && fault.times != Some(0)
                && fault.action.as_deref().is_none_or(|only| only == action)
                && fault.key.as_deref().is_none_or(|only| only == key)
                && (moment != Moment::Reading || fault.action.is_some() || action.starts_with("Describe"));
            if concerned && (fault.probability >= 1.0 || self.random.f64() < fault.probability) {
                fault.times = fault.times.map(|times| times - 1);
                return Some(fault.kind.clone());
            }
        }
        None
    }
}

/// The refusal that a kind of fault is, as far as it is one.
pub(super) fn refusal(kind: &Kind, denied: impl FnOnce() -> String) -> Option<Refusal> {
    let (status, code, message) = match kind {
        Kind::Throttle => (503, "RequestLimitExceeded", "Request limit exceeded."),
        Kind::ServerError | Kind::ServerErrorAfterSuccess => {
            (500, "InternalError", "An internal error has occurred")
        }
        Kind::Unavailable => (503, "Unavailable", "The server is overloaded and can't handle the request."),
        Kind::Unauthorized => {
            return Some(Refusal {
                status: 403,
                code: "UnauthorizedOperation".to_owned(),
                message: denied(),
            });
        }
        Kind::Refused { status, code, message } => (*status, code.as_str(), message.as_str()),
        _ => return None,
    };
    Some(Refusal { status, code: code.to_owned(), message: message.to_owned() })
}

/// Lets go what faults hold, now that they are cleared.
pub(super) fn release(world: &mut World, due: std::time::Instant) {
    for attachment in world.volumes.values_mut().flat_map(|v| &mut v.attachments) {
        if std::mem::take(&mut attachment.stuck) {
            attachment.due = Some(due);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_happens_as_often_as_it_is_asked_to() {
        let mut faults = Faults::new(1);
        faults.add(Fault::of(Kind::Throttle).on("AttachVolume").by("K").times(2));
        assert_eq!(faults.strike(Moment::Before, "DetachVolume", "K"), None);
        assert_eq!(faults.strike(Moment::Before, "AttachVolume", "L"), None);
        assert_eq!(faults.strike(Moment::After, "AttachVolume", "K"), None);
        let hits = (0..5).filter(|_| faults.strike(Moment::Before, "AttachVolume", "K").is_some()).count();
        assert_eq!(hits, 2);
    }

    #[test]
    fn a_seed_gives_the_same_faults_again() {
        let pattern = |seed| {
            let mut faults = Faults::new(seed);
            faults.add(Fault::of(Kind::ServerError).probability(0.5));
            (0..64).map(|_| faults.strike(Moment::Before, "X", "").is_some()).collect::<Vec<_>>()
        };
        assert_eq!(pattern(7), pattern(7));
        assert_ne!(pattern(7), pattern(8));
    }
}
