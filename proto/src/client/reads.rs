//! Reads that a backup may answer.
//!
//! A handle with [`ReadFrom::Backup`] asks one backup of the shard's volume, always the same one while it answers, so that what one
//! program reads does not jump to and fro; what the backup does not answer (no view that is young enough, one that
//! cannot be read, no connection) is asked of the primary, and counted. Of a closed shard any node is asked by every handle.

use std::collections::HashMap;
use std::future::Future;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::Client;
use super::channel::Node;
use super::retry::{Attempt, Target};
use crate::types::cluster::Selector;
use crate::types::{Backup, ReadFrom, Reason, Result, ShardId, clock};

/// How long a backup is waited for: it opens a view at the first read.
const BACKUP_ATTEMPT_MAX: Duration = Duration::from_secs(3);
/// How long a backup that did not answer is not asked for the shard again.
const AVOID: Duration = Duration::from_secs(1);
/// Backups that are avoided at a time; beyond it all of them are forgiven.
const AVOIDED_MAX: usize = 4096;

/// Who answered the reads of a client's handles that prefer backups.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ReadCounts {
    /// A backup.
    pub backup: u64,
    /// The primary, because no backup could.
    pub primary_instead: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    backup: AtomicU64,
    primary_instead: AtomicU64,
}

/// Which backups are not asked for the moment, and a number that spreads clients over backups.
pub(super) struct Avoided {
    until: HashMap<(ShardId, String), Instant>,
    seed: u64,
}

impl Avoided {
    pub(super) fn new(seed: u64) -> Avoided {
        Avoided { until: HashMap::new(), seed }
    }

    pub(super) fn note(&mut self, shard: ShardId, endpoint: &str, now: Instant) {
        if self.until.len() >= AVOIDED_MAX {
            self.until.clear();
        }
        self.until.insert((shard, endpoint.to_owned()), now + AVOID);
    }

    /// Which of so many candidates to ask; the first is this client's own, then the others in turn.
    fn choose(
        &mut self,
        shard: ShardId,
        candidates: usize,
        now: Instant,
        endpoint: impl Fn(usize) -> Option<String>,
    ) -> Option<String> {
        let first = (self.seed ^ shard.get().wrapping_mul(0x9E37_79B9_7F4A_7C15)) as usize;
        (0..candidates).map(|step| first.wrapping_add(step) % candidates).find_map(|at| {
            let endpoint = endpoint(at)?;
            let key = (shard, endpoint);
            match self.until.get(&key) {
                Some(until) if *until > now => None,
                Some(_) => {
                    self.until.remove(&key);
                    Some(key.1)
                }
                None => Some(key.1),
            }
        })
    }
}

impl Client {
    /// A handle whose reads may be answered so; it shares everything else with this one.
    pub fn with_reads(&self, from: ReadFrom) -> Client {
        Client { reads: from, ..self.clone() }
    }

    /// Who answered the reads so far, of all handles of this client that prefer backups.
    pub fn read_counts(&self) -> ReadCounts {
        let counters = &self.inner.read_counters;
        ReadCounts {
            backup: counters.backup.load(Ordering::Relaxed),
            primary_instead: counters.primary_instead.load(Ordering::Relaxed),
        }
    }

    /// Runs a read at a backup, if this handle or the shard allows it; else, or if that does not answer, at the primary.
    pub(super) async fn read_at<T, F, Fut>(
        &self,
        shard: ShardId,
        (deadline, attempt_max): (Duration, Duration),
        mut attempt: F,
    ) -> Result<T>
    where
        F: FnMut(Attempt, ReadFrom) -> Fut,
        Fut: Future<Output = Result<T, tonic::Status>>,
    {
        let counters = &self.inner.read_counters;
        if let Some(node) = self.backup_of(shard).await {
            let endpoint = node.endpoint.clone();
            // What is known to be closed is to be answered as it is for good.
            let closed = self.inner.routes.is_closed(shard);
            let from = if closed { ReadFrom::Primary } else { self.reads };
            // A backup serves views of whichever epoch.
            let call = attempt(Attempt { node, epoch: 0, number: 0 }, from);
            let outcome = tokio::time::timeout(BACKUP_ATTEMPT_MAX, call).await;
            match outcome.map(|answer| answer.map_err(|status| crate::status::from_status(&status))) {
                Ok(Ok(answer)) => {
                    counters.backup.fetch_add(1, Ordering::Relaxed);
                    return Ok(answer);
                }
                Ok(Err(error)) if is_answer(error.reason()) => {
                    counters.backup.fetch_add(1, Ordering::Relaxed);
                    return Err(error);
                }
                Ok(Err(error)) => tracing::debug!(%shard, %endpoint, %error, "asking the primary instead"),
                Err(_) => tracing::debug!(%shard, %endpoint, "silent: asking the primary instead"),
            }
            self.inner.routes.avoid(shard, &endpoint);
        }
        if self.reads.prefers_backup() {
            counters.primary_instead.fetch_add(1, Ordering::Relaxed);
        }
        let at_primary = |a| attempt(a, ReadFrom::Primary);
        self.call_within(Target::Shard(shard), deadline, attempt_max, at_primary).await
    }

    /// Says that a stream of a read broke off at a backup: what is left is asked elsewhere.
    pub(super) fn read_broke_off(&self, shard: ShardId, endpoint: &str) {
        self.inner.routes.avoid(shard, endpoint);
    }

    /// A backup to ask for the shard.
    async fn backup_of(&self, shard: ShardId) -> Option<Node> {
        if !self.reads.prefers_backup() && !self.inner.routes.is_closed(shard) {
            return None;
        }
        // Learns where the shard is, if need be; that there is no primary keeps nobody from asking a backup.
        let _ = self.route(shard).await;
        let chosen = self.choose_backup(shard);
        if chosen.is_some() || !self.reads.prefers_backup() || !self.inner.routes.is_old(shard) {
            return chosen;
        }
        // What fails leaves the primary to be asked.
        let _ = self.ask_shard(&self.any_node().ok()?, &Selector::Id(shard)).await;
        self.choose_backup(shard)
    }

    fn choose_backup(&self, shard: ShardId) -> Option<Node> {
        let prefers = self.reads.prefers_backup();
        let now = clock::monotonic();
        let endpoint = self.inner.routes.with_backups(shard, |backups: &[Backup], avoided| {
            // The primary of a closed shard is one of the candidates: it stands for the last place.
            let candidates = backups.len() + usize::from(!prefers);
            avoided.choose(shard, candidates, now, |at| {
                let backup = backups.get(at)?;
                self.inner.channels.usable(&backup.endpoints).map(str::to_owned)
            })
        })?;
        self.inner.channels.node(&endpoint).ok()
    }
}

/// Whether what a backup said is what the view holds, and no trouble of the backup's.
fn is_answer(reason: Reason) -> bool {
    match reason {
        Reason::NotFound
        | Reason::NoAttribute
        | Reason::InvalidArgument
        | Reason::NameTooLong
        | Reason::TooLarge
        | Reason::NotDirectory
        | Reason::IsDirectory
        | Reason::WrongKind
        | Reason::WrongOwner
        | Reason::NoClientId => true,
        // The primary may have the version, or the shard, that the backup does not know yet.
        Reason::VersionMismatch
        | Reason::ShardNotFound
        | Reason::ShardDeleted
        | Reason::NotPrimary
        | Reason::StaleEpoch
        | Reason::Unavailable
        | Reason::Corrupt
        | Reason::Io
        | Reason::Internal
        | Reason::Unsupported
        | Reason::Deadline
        | Reason::Busy
        | Reason::AlreadyExists
        | Reason::ShardExists
        | Reason::CrossShard
        | Reason::NotEmpty
        | Reason::ShardReadOnly
        | Reason::ShardNotEmpty
        | Reason::ShardHasSnapshots
        | Reason::NotPermitted
        | Reason::TooManyLinks
        | Reason::SessionUnknown
        | Reason::SequenceStale
        | Reason::AttributeTooLarge
        | Reason::ShardFull
        | Reason::VolumeFull
        | Reason::FileTooLarge
        | Reason::IdsExhausted
        | Reason::LocksExhausted
        | Reason::LockConflict
        | Reason::Deadlock => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_backup_is_kept_to_until_it_refuses() {
        let shard = ShardId::new(7).unwrap();
        let now = clock::monotonic();
        let names = ["a", "b", "c"];
        let name = |at: usize| names.get(at).map(|name| (*name).to_owned());
        let mut avoided = Avoided::new(5);
        let first = avoided.choose(shard, 3, now, name).unwrap();
        assert_eq!(avoided.choose(shard, 3, now, name).unwrap(), first);
        avoided.note(shard, &first, now);
        let second = avoided.choose(shard, 3, now, name).unwrap();
        assert_ne!(second, first);
        // Other shards have no quarrel with it.
        let other = ShardId::new(8).unwrap();
        let all: Vec<String> = (0..3)
            .map(|_| {
                let chosen = avoided.choose(other, 3, now, name).unwrap();
                avoided.note(other, &chosen, now);
                chosen
            })
            .collect();
        assert!(all.contains(&first));
        avoided.note(shard, &second, now);
        let third = avoided.choose(shard, 3, now, name).unwrap();
        avoided.note(shard, &third, now);
        assert_eq!(avoided.choose(shard, 3, now, name), None);
        assert_eq!(avoided.choose(shard, 3, now + AVOID, name).unwrap(), first);
        assert_eq!(avoided.choose(shard, 0, now, name), None);
    }
}
