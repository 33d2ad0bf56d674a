//! The client of an etcd as metadata store.
//!
//! | file | owns |
//! |---|---|
//! | [`settings`] | members, TLS, user: how it is reached |
//! | `pool` | the connection to one member at a time |
//! | `convert` | requests and answers, checked |
//! | `errors` | what etcd's errors mean; of which it is certain that nothing happened |
//! | `trouble` | why a member cannot be used, and what to check |
//! | `watch` | watches that resume |
//! | [`health`] | what an etcd says of itself, for people |
//!
//! Invariants are those of [`MetaStore`]. Reads are repeated (bounded, with jitter), at another member if one does not
//! answer; a transaction only if it is certain that nothing happened. All calls require a member that has a leader.
//! Two things are not repeated, so that callers with little patience get to know them: that the settings do not fit any
//! member, and that etcd's quota is used up. Both mend themselves when somebody mends them, and are `Unavailable`.
//! Where etcd differs: all keys are durable, also those under `VOLATILE_PREFIX`; terms of leases are whole
//! seconds and at least etcd's own minimum (2 s as it is installed); a request has at most etcd's `--max-request-bytes`.
//!
//! Nothing else in this crate knows the crate `etcd_client`.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;

use super::retry::{self, RETRY_MAX};
use super::store::{
    KeyRange, KeyValue, LEASE_TTL_MAX, LEASE_TTL_MIN, LeaseId, MetaStore, Op, RANGE_BYTES_MAX, RangeAnswer,
    Revision, StoreError, StoreResult, Txn, TxnAnswer, WatchStream,
};
use pool::{Connection, Pool, Unconnected};
use settings::EtcdSettings;

mod convert;
mod errors;
pub mod health;
mod pool;
pub mod settings;
#[cfg(test)]
pub(crate) mod testing;
mod trouble;
mod watch;

/// How long one read may take at one member: an election takes a second or two.
const READ_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a change may take: a commit on slow devices, and an election before it.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(5);
/// Keys of one page of a range; fewer if they turn out to be large.
const PAGE_KEYS_MAX: usize = 1024;

/// A client. Cheap to clone.
#[derive(Clone)]
pub struct EtcdStore {
    pool: Arc<Pool>,
    retry_max: Duration,
}

/// What one member answered to a range.
enum Page {
    Answer(RangeAnswer),
    TooLarge,
}

/// What one member answered to a change. Both are answers of a member that is well.
enum Change<T> {
    Made(T),
    /// The quota is used up: what the caller is told.
    NoSpace(StoreError),
}

impl<T> Change<T> {
    fn made(self) -> StoreResult<T> {
        match self {
            Change::Made(answer) => Ok(answer),
            Change::NoSpace(error) => Err(error),
        }
    }
}

impl EtcdStore {
    /// No I/O.
    pub fn new(settings: EtcdSettings) -> EtcdStore {
        EtcdStore::with_retry(settings, RETRY_MAX)
    }

    /// The same, with a bound on how long calls are repeated.
    pub fn with_retry(settings: EtcdSettings, retry_max: Duration) -> EtcdStore {
        EtcdStore { pool: Arc::new(Pool::new(settings)), retry_max }
    }

    /// Each member that could not be used when it was tried last, and why; `None`: none is known. For those whose patience ends
    /// before a call does.
    pub fn troubles(&self) -> Option<String> {
        self.pool.troubles()
    }

    /// One attempt of one call. `Ok(Err(_))`: another one at once would be in vain.
    async fn attempt<T, F, Fut>(&self, timeout: Duration, call: &F) -> StoreResult<StoreResult<T>>
    where
        F: Fn(Arc<Connection>) -> Fut,
        Fut: Future<Output = StoreResult<T>>,
    {
        let connection = match self.pool.connection().await {
            Ok(connection) => connection,
            Err(Unconnected { error, lasting: true }) => return Ok(Err(error)),
            Err(Unconnected { error, lasting: false }) => return Err(error),
        };
        let patience = self.pool.patience(connection.clone());
        let outcome = match tokio::time::timeout(timeout, call(connection.clone())).await {
            Ok(outcome) => outcome,
            Err(_) => Err(StoreError::OutcomeUnknown(format!("no answer within {timeout:?}"))),
        };
        patience.end();
        self.pool.judge(&connection, &outcome);
        outcome.map(Ok).map_err(|error| match error {
            StoreError::Unavailable(why) => {
                StoreError::Unavailable(format!("{}: {why}", connection.member()))
            }
            StoreError::OutcomeUnknown(why) => {
                StoreError::OutcomeUnknown(format!("{}: {why}", connection.member()))
            }
            error => error,
        })
    }

    /// Attempts until one succeeds, fails for good, or time is up. `repeatable`: a call may be made twice.
    async fn repeat<T, F, Fut>(&self, repeatable: bool, timeout: Duration, call: F) -> StoreResult<T>
    where
        F: Fn(Arc<Connection>) -> Fut,
        Fut: Future<Output = StoreResult<T>>,
    {
        retry::repeat(repeatable, self.retry_max, || self.attempt(timeout, &call)).await?
    }
}

/// A change was refused because the quota is used up. While the alarm stands, etcd makes no change that takes room. The member
/// that raises it may do so when it applies a change, and then it has made that one. `certain`: the alarm stood before, or
/// the call was to change nothing (which etcd before 3.4.20 and 3.5.7 refuses as well). An alarm that is disarmed between two
/// calls and raised again by the second is taken for the first: that takes a quota which is exceeded anew within that very call.
fn no_space(certain: bool) -> StoreError {
    let why = errors::NO_SPACE.to_owned();
    if certain { StoreError::Unavailable(why) } else { StoreError::OutcomeUnknown(why) }
}

/// Cuts an answer at [`RANGE_BYTES_MAX`], but leaves one key at least.
fn cut(mut kvs: Vec<KeyValue>, revision: Revision, more: bool) -> RangeAnswer {
    let mut bytes = 0;
    let fits = kvs.iter().take_while(|kv| {
        bytes += kv.key.len() + kv.value.len();
        bytes <= RANGE_BYTES_MAX
    });
    let keep = fits.count().max(1);
    let cut = keep < kvs.len();
    kvs.truncate(keep);
    RangeAnswer { revision, kvs, more: more || cut }
}

impl MetaStore for EtcdStore {
    fn range(&self, range: KeyRange, limit: usize) -> BoxFuture<'_, StoreResult<RangeAnswer>> {
        Box::pin(async move {
            let (start, end) = convert::range_bounds(&range)?;
            let mut keys = if limit == 0 { PAGE_KEYS_MAX } else { limit.min(PAGE_KEYS_MAX) };
            loop {
                let call = |connection: Arc<Connection>| {
                    let (start, options) = (start.clone(), convert::get_options(end.clone(), keys as i64));
                    async move {
                        let reply = match connection.pages().get(start, Some(options)).await {
                            Ok(reply) => reply.0,
                            Err(error) if errors::is_answer_too_large(&error) => return Ok(Page::TooLarge),
                            Err(error) => return Err(errors::error(error)),
                        };
                        let revision = connection.revision(reply.header.as_ref())?;
                        Ok(Page::Answer(cut(convert::key_values(reply.kvs)?, revision, reply.more)))
                    }
                };
                match self.repeat(true, READ_TIMEOUT, call).await? {
                    Page::Answer(answer) => return Ok(answer),
                    Page::TooLarge if keys > 1 => keys = keys.div_ceil(8),
                    Page::TooLarge => {
                        return Err(StoreError::Failed(format!(
                            "the value of a key at or after {} is too large",
                            range.start().escape_ascii()
                        )));
                    }
                }
            }
        })
    }

    fn txn(&self, txn: Txn) -> BoxFuture<'_, StoreResult<TxnAnswer>> {
        Box::pin(async move {
            txn.check()?;
            let request = convert::txn(&txn)?;
            let repeatable = txn.only_reads();
            let timeout = if repeatable { READ_TIMEOUT } else { CHANGE_TIMEOUT };
            let takes_room = txn.success.iter().chain(&txn.failure).any(|op| matches!(op, Op::Put { .. }));
            let (txn, pool) = (&txn, &self.pool);
            let call = |connection: Arc<Connection>| {
                let request = request.clone();
                async move {
                    // As it was before the call: that it raised the alarm itself is no certainty.
                    let known = pool.has_no_space();
                    let reply = match connection.transactions().txn(request).await {
                        Ok(reply) => reply.0,
                        Err(error) if errors::is_no_space(&error) => {
                            pool.note_no_space(&connection);
                            return Ok(Change::NoSpace(no_space(known || repeatable)));
                        }
                        Err(error) => return Err(errors::error(error)),
                    };
                    if takes_room {
                        pool.note_space();
                    }
                    convert::txn_answer(&connection, txn, reply).map(Change::Made)
                }
            };
            let outcome = self.repeat(repeatable, timeout, call).await.and_then(Change::made);
            outcome.map_err(|error| match error {
                // Only a watch can be too old.
                StoreError::Compacted => StoreError::Failed("etcd calls a transaction compacted".into()),
                error => error,
            })
        })
    }

    fn watch(&self, range: KeyRange, from: Revision) -> WatchStream {
        watch::follow(self.pool.clone(), range, from)
    }

    fn lease_grant(&self, ttl: Duration) -> BoxFuture<'_, StoreResult<LeaseId>> {
        Box::pin(async move {
            if !(LEASE_TTL_MIN..=LEASE_TTL_MAX).contains(&ttl) {
                return Err(StoreError::Invalid(format!(
                    "a lease of {ttl:?}; the limits are {LEASE_TTL_MIN:?} and {LEASE_TTL_MAX:?}"
                )));
            }
            let seconds = ttl.as_millis().div_ceil(1000) as i64;
            // Granting twice is harmless: a lease that nobody keeps alive ends.
            let pool = &self.pool;
            let call = |connection: Arc<Connection>| async move {
                let reply = match connection.leases().grant(seconds, None).await {
                    Ok(reply) => reply.0,
                    Err(error) if errors::is_no_space(&error) => {
                        pool.note_no_space(&connection);
                        // If it was granted, nobody knows it.
                        return Ok(Change::NoSpace(no_space(true)));
                    }
                    Err(error) => return Err(errors::error(error)),
                };
                connection.revision(reply.header.as_ref())?;
                Ok(Change::Made(reply.id))
            };
            let id = self.repeat(true, CHANGE_TIMEOUT, call).await.and_then(Change::made)?;
            u64::try_from(id)
                .ok()
                .and_then(LeaseId::new)
                .ok_or_else(|| convert::malformed("a lease without number"))
        })
    }

    fn lease_keep_alive(&self, lease: LeaseId) -> BoxFuture<'_, StoreResult<()>> {
        Box::pin(async move {
            let id = convert::signed(lease.get())?;
            let call = |connection: Arc<Connection>| async move {
                // Waits for the first answer; the stream ends with its handle.
                connection.leases().keep_alive(id).await.map(drop).map_err(errors::error)
            };
            self.repeat(true, READ_TIMEOUT, call).await
        })
    }

    fn lease_revoke(&self, lease: LeaseId) -> BoxFuture<'_, StoreResult<()>> {
        Box::pin(async move {
            let id = convert::signed(lease.get())?;
            let call = |connection: Arc<Connection>| async move {
                connection.leases().revoke(id).await.map(drop).map_err(errors::error)
            };
            self.repeat(false, CHANGE_TIMEOUT, call).await
        })
    }

    fn reachable(&self) -> bool {
        self.pool.reachable()
    }
}

#[cfg(test)]
mod tests;
