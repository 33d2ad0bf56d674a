//! Why a member of an etcd cannot be used: said with what to check, logged, and kept for whoever asks.
//!
//! Callers may have less patience than it takes to find out: a heartbeat waits for one second. So nobody has to wait for
//! a reason: the task that connects notes it here, which logs it, and it stays until the member answers.
//!
//! What is suggested are guesses from how far an attempt came ([`Stage`]) and how it ended ([`Cut`]): a peer that speaks another
//! protocol, or that does not like a certificate, mostly just ends the connection.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use shardfs_proto::types::clock;

use super::settings::EtcdSettings;

/// A reason that lasts is logged again after this long.
const TELL_AGAIN: Duration = Duration::from_secs(30);
/// The least time between two lines of the log about one member, whose reasons may alternate.
const TELL_PAUSE: Duration = Duration::from_secs(5);
/// So often in a row a member must have ended its connection before an answer for the settings to be blamed: one that is
/// just being stopped ends it as well, but refuses the next.
const MISFITS: u32 = 2;

/// To plain HTTP/2 an etcd with TLS answers with the end of the connection.
const WANTS_TLS: &str = "if this etcd uses TLS, write etcds:// instead of etcd://, with --meta-ca-file";
/// An etcd without TLS takes no notice of a handshake, or ends the connection.
const HAS_NO_TLS: &str = "if this etcd uses no TLS, write etcd:// instead of etcds://";
const OTHER_CA: &str = "--meta-ca-file must hold the CA that has signed this etcd's certificate";
const NO_CA: &str =
    "this machine does not trust who has signed this etcd's certificate: name the CA with --meta-ca-file";
const OTHER_NAME: &str = "this etcd's certificate must name the host as the address does";
const OTHER_TIME: &str = "see whether this etcd's certificate is still valid, and this machine's clock right";
const NO_CERTIFICATE: &str =
    "this etcd may want to see a certificate: give one with --meta-cert-file and --meta-key-file";
const OTHER_CERTIFICATE: &str =
    "this etcd may not accept the certificate of --meta-cert-file: its --trusted-ca-file must hold its CA";

/// How far an attempt to connect has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(super) enum Stage {
    /// A TCP connection is being made.
    #[default]
    Tcp,
    /// It is there; TLS, if any, is being begun.
    Session,
    /// The member has been asked how it is.
    Question,
}

/// Where an attempt stands; known also when it is given up.
#[derive(Clone, Debug, Default)]
pub(super) struct Progress(Arc<Mutex<Stage>>);

impl Progress {
    /// It has come so far.
    pub(super) fn reach(&self, stage: Stage) {
        *self.0.lock() = stage;
    }

    /// How far it has come.
    pub(super) fn stage(&self) -> Stage {
        *self.0.lock()
    }
}

/// How an attempt ended without an answer of etcd's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Cut {
    /// Nothing was heard for so long.
    TimedOut(Duration),
    /// The connection failed or was ended: why.
    Broken(String),
}

/// What the settings give, as far as suggestions depend on it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Given {
    tls: bool,
    ca: bool,
    certificate: bool,
}

impl Given {
    /// Of these settings.
    pub(super) fn of(settings: &EtcdSettings) -> Given {
        let tls = settings.tls.as_ref();
        Given {
            tls: tls.is_some(),
            ca: tls.is_some_and(|files| files.ca.is_some()),
            certificate: tls.is_some_and(|files| files.client.is_some()),
        }
    }
}

/// Why there is no connection, with what to check.
pub(super) fn tell(given: Given, stage: Stage, cut: &Cut) -> String {
    let what = match (stage, cut) {
        (Stage::Tcp, Cut::Broken(why)) => format!("not connected: {why}"),
        (Stage::Tcp, Cut::TimedOut(within)) => format!("not connected within {within:?}"),
        (Stage::Session, Cut::Broken(why)) if given.tls => format!("the TLS handshake failed: {why}"),
        (Stage::Session, Cut::TimedOut(within)) if given.tls => {
            format!("connected, but no answer to the TLS handshake within {within:?}")
        }
        (Stage::Session | Stage::Question, Cut::Broken(why)) => {
            format!("connected, but not answered: {why}")
        }
        (Stage::Session | Stage::Question, Cut::TimedOut(within)) => {
            format!("connected, but no answer within {within:?}")
        }
    };
    match hint(given, stage, cut) {
        Some(hint) => format!("{what} ({hint})"),
        None => what,
    }
}

/// Whether it looks as if the settings do not fit the member: it is there, and ends the connection.
pub(super) fn is_misfit(stage: Stage, cut: &Cut) -> bool {
    matches!((stage, cut), (Stage::Session | Stage::Question, Cut::Broken(_)))
}

fn hint(given: Given, stage: Stage, cut: &Cut) -> Option<&'static str> {
    match (stage, cut) {
        (Stage::Tcp, _) => None,
        (Stage::Session | Stage::Question, Cut::Broken(_)) if !given.tls => Some(WANTS_TLS),
        (Stage::Session, Cut::TimedOut(_)) if given.tls => Some(HAS_NO_TLS),
        (Stage::Session, Cut::Broken(why)) => handshake_hint(given, why),
        // In TLS 1.3 a certificate is looked at after the handshake.
        (Stage::Question, Cut::Broken(_)) => Some(certificate_hint(given)),
        (Stage::Session | Stage::Question, Cut::TimedOut(_)) => None,
    }
}

fn handshake_hint(given: Given, why: &str) -> Option<&'static str> {
    let says = |words: &[&str]| words.iter().any(|word| why.contains(word));
    if says(&["fatal alert"]) {
        Some(certificate_hint(given))
    } else if says(&["invalid peer certificate"]) {
        Some(if says(&["not valid for name", "NotValidForName"]) {
            OTHER_NAME
        } else if says(&["expired", "Expired", "not valid yet", "NotValidYet"]) {
            OTHER_TIME
        } else if given.ca {
            OTHER_CA
        } else {
            NO_CA
        })
    } else if says(&["negotiated"]) {
        // Something that speaks TLS, but not HTTP/2: no etcd.
        None
    } else {
        Some(HAS_NO_TLS)
    }
}

fn certificate_hint(given: Given) -> &'static str {
    if given.certificate { OTHER_CERTIFICATE } else { NO_CERTIFICATE }
}

/// Members and why each cannot be used; a reason that several share is said once.
pub(super) fn list<'a>(reasons: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut groups: Vec<(&'a str, Vec<&'a str>)> = Vec::new();
    for (member, why) in reasons {
        match groups.iter_mut().find(|(known, _)| *known == why) {
            Some((_, members)) => members.push(member),
            None => groups.push((why, vec![member])),
        }
    }
    let told = groups.iter().map(|(why, members)| {
        // Some name the member themselves.
        if members.iter().any(|member| why.starts_with(*member)) {
            (*why).to_owned()
        } else {
            format!("{}: {why}", members.join(", "))
        }
    });
    told.collect::<Vec<_>>().join("; ")
}

/// Why the members that cannot be used cannot.
#[derive(Debug, Default)]
pub(super) struct Troubles(Mutex<BTreeMap<String, Trouble>>);

#[derive(Debug)]
struct Trouble {
    /// `None`: it answers again. What was logged is remembered: a member that fails every second is not told of every second.
    why: Option<String>,
    /// How often in a row the settings seemed not to fit.
    misfits: u32,
    /// What was logged last, and when.
    logged: String,
    logged_at: Instant,
    /// That it answers again was not logged since.
    open: bool,
}

impl Troubles {
    /// A member cannot be used. Answers whether another attempt at once would be in vain, because the settings do not
    /// fit; `misfit`: so it seems, see [`is_misfit`].
    pub(super) fn note(&self, member: &str, why: &str, misfit: bool) -> bool {
        let (log, lasting) = self.take_down(member, why, misfit, clock::monotonic());
        if log {
            tracing::warn!(member, why, "a member of the etcd cannot be used");
        }
        lasting
    }

    /// Answers whether it is to be logged, and whether it lasts.
    fn take_down(&self, member: &str, why: &str, misfit: bool, now: Instant) -> (bool, bool) {
        let mut members = self.0.lock();
        let Some(trouble) = members.get_mut(member) else {
            let fresh = Trouble {
                why: Some(why.to_owned()),
                misfits: u32::from(misfit),
                logged: why.to_owned(),
                logged_at: now,
                open: true,
            };
            members.insert(member.to_owned(), fresh);
            return (true, false);
        };
        trouble.misfits = if misfit { trouble.misfits.saturating_add(1) } else { 0 };
        let lasts = trouble.why.is_some() && trouble.logged == why;
        let pause = if lasts { TELL_AGAIN } else { TELL_PAUSE };
        let log = now.saturating_duration_since(trouble.logged_at) >= pause;
        if log {
            trouble.logged = why.to_owned();
            trouble.logged_at = now;
            trouble.open = true;
        }
        trouble.why = Some(why.to_owned());
        (log, trouble.misfits >= MISFITS)
    }

    /// A member answers.
    pub(super) fn end(&self, member: &str) {
        if self.take_back(member) {
            tracing::info!(member, "the member of the etcd answers again");
        }
    }

    /// Answers whether it is to be logged.
    fn take_back(&self, member: &str) -> bool {
        let mut members = self.0.lock();
        let Some(trouble) = members.get_mut(member) else { return false };
        trouble.why = None;
        trouble.misfits = 0;
        std::mem::take(&mut trouble.open)
    }

    /// Each member that cannot be used and why; `None`: nothing is known against any.
    pub(super) fn told(&self) -> Option<String> {
        let members = self.0.lock();
        let mut reasons = members
            .iter()
            .filter_map(|(member, trouble)| Some((member.as_str(), trouble.why.as_deref()?)))
            .peekable();
        reasons.peek()?;
        Some(list(reasons))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Given = Given { tls: false, ca: false, certificate: false };
    const BARE: Given = Given { tls: true, ca: false, certificate: false };
    const CA: Given = Given { tls: true, ca: true, certificate: false };
    const WHOLE: Given = Given { tls: true, ca: true, certificate: true };

    #[test]
    fn what_to_check_follows_from_how_it_ended() {
        let broken = |why: &str| Cut::Broken(why.into());
        let silent = || Cut::TimedOut(Duration::from_millis(1500));
        let unknown = || broken("invalid peer certificate: UnknownIssuer");
        for (given, stage, cut, expected) in [
            (PLAIN, Stage::Tcp, broken("Connection refused (os error 111)"), None),
            (WHOLE, Stage::Tcp, silent(), None),
            (PLAIN, Stage::Session, broken("broken pipe"), Some(WANTS_TLS)),
            (PLAIN, Stage::Question, broken("connection reset"), Some(WANTS_TLS)),
            (PLAIN, Stage::Question, silent(), None),
            (CA, Stage::Session, broken("tls handshake eof"), Some(HAS_NO_TLS)),
            (CA, Stage::Session, broken("received corrupt message of type X"), Some(HAS_NO_TLS)),
            (CA, Stage::Session, silent(), Some(HAS_NO_TLS)),
            (CA, Stage::Session, unknown(), Some(OTHER_CA)),
            (BARE, Stage::Session, unknown(), Some(NO_CA)),
            (
                CA,
                Stage::Session,
                broken("invalid peer certificate: certificate not valid for name \"a\""),
                Some(OTHER_NAME),
            ),
            (
                CA,
                Stage::Session,
                broken("invalid peer certificate: certificate expired: ..."),
                Some(OTHER_TIME),
            ),
            (CA, Stage::Session, broken("received fatal alert: BadCertificate"), Some(NO_CERTIFICATE)),
            (WHOLE, Stage::Session, broken("received fatal alert: BadCertificate"), Some(OTHER_CERTIFICATE)),
            (CA, Stage::Question, broken("the connection has ended"), Some(NO_CERTIFICATE)),
            (WHOLE, Stage::Question, broken("the connection has ended"), Some(OTHER_CERTIFICATE)),
            (WHOLE, Stage::Question, silent(), None),
            (WHOLE, Stage::Session, broken("HTTP/2 was not negotiated."), None),
        ] {
            let said = tell(given, stage, &cut);
            assert_eq!(hint(given, stage, &cut), expected, "{said}");
            assert!(expected.is_none_or(|hint| said.contains(hint)), "{said}");
            if let Cut::Broken(why) = &cut {
                assert!(said.contains(why.as_str()), "{said}");
            }
            assert_eq!(
                is_misfit(stage, &cut),
                stage != Stage::Tcp && matches!(cut, Cut::Broken(_)),
                "{said}"
            );
        }
    }

    #[test]
    fn a_reason_is_kept_until_the_member_answers() {
        let troubles = Troubles::default();
        assert_eq!(troubles.told(), None);
        troubles.note("a:1", "x", false);
        troubles.note("b:1", "y", false);
        troubles.note("c:1", "y", false);
        troubles.note("b:1", "b:1 is another", false);
        assert_eq!(troubles.told().unwrap(), "a:1: x; b:1 is another; c:1: y");
        troubles.note("a:1", "y", false);
        assert_eq!(troubles.told().unwrap(), "a:1, c:1: y; b:1 is another");
        for member in ["a:1", "b:1", "c:1"] {
            troubles.end(member);
        }
        assert_eq!(troubles.told(), None);
    }

    #[test]
    fn settings_are_blamed_when_it_happens_twice_in_a_row() {
        let troubles = Troubles::default();
        let lasting = |misfit| troubles.note("a:1", "x", misfit);
        assert!(!lasting(true));
        assert!(!lasting(false));
        assert!(!lasting(true));
        assert!(lasting(true));
        assert!(lasting(true));
        troubles.end("a:1");
        assert!(!lasting(true));
    }

    #[test]
    fn the_log_is_told_what_is_new_and_sometimes_what_is_not() {
        let troubles = Troubles::default();
        let begun = clock::monotonic();
        let logged = |why: &str, seconds: u64| {
            troubles.take_down("a:1", why, false, begun + Duration::from_secs(seconds)).0
        };
        assert!(logged("x", 0));
        assert!(!logged("x", 4));
        assert!(!logged("y", 4), "too soon after another");
        assert!(logged("y", 5));
        assert!(!logged("y", 34));
        assert!(logged("y", 35));
        assert!(logged("x", 40));
        assert!(troubles.take_down("b:1", "x", false, begun).0, "members do not wait for each other");
        // One that comes and goes.
        assert!(troubles.take_back("a:1"));
        assert!(!logged("x", 44));
        assert!(!troubles.take_back("a:1"), "of what was not logged no end is");
        assert!(logged("x", 45), "it is another time");
        assert!(troubles.take_back("a:1") && !troubles.take_back("c:1"));
    }
}
