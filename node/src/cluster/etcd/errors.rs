//! What etcd's errors mean for the trait: above all, of which of them it is certain that nothing happened.
//!
//! etcd tells its errors apart by their text; the codes are those of `api/v3rpc/rpctypes` (the same in 3.4 to
//! 3.6). What is not known here counts as unknown.

use etcd_client::Error;
use tonic::{Code, ConnectError, Status};

use crate::cluster::retry::chain;
use crate::cluster::store::StoreError;

/// The texts of etcd begin with this; those of gRPC do not.
const ETCD: &str = "etcdserver: ";
/// What is told of [`is_no_space`].
pub(super) const NO_SPACE: &str = "etcd's quota is used up (alarm NOSPACE) and it refuses changes: compact it (`etcdctl compact REVISION`) and defragment it \
     (`etcdctl defrag --cluster`), or start it with a larger --quota-backend-bytes; then `etcdctl alarm disarm`. With \
     --auto-compaction-retention=1h it compacts by itself";

/// The meaning of a call that failed after it was made.
pub(super) fn error(error: Error) -> StoreError {
    match error {
        Error::GRpcStatus(status) => status_error(&status),
        // Its own word for an answer with a term of 0.
        Error::LeaseKeepAliveError(why) if why == "lease not found" => StoreError::LeaseUnknown,
        Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => {
            StoreError::Invalid(error.to_string())
        }
        Error::IoError(_)
        | Error::TransportError(_)
        | Error::WatchError(_)
        | Error::Utf8Error(_)
        | Error::LeaseKeepAliveError(_)
        | Error::ElectError(_)
        | Error::EndpointError(_)
        | Error::EndpointsNotManaged
        | Error::Internal(_) => StoreError::OutcomeUnknown(error.to_string()),
    }
}

/// Whether this side refused an answer because it is larger than it takes. etcd's own errors of this code name
/// themselves.
pub(super) fn is_answer_too_large(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status)
        if status.code() == Code::OutOfRange && !status.message().starts_with(ETCD))
}

/// Whether etcd refused a change because its quota is used up. That mends itself when somebody makes room; too many
/// requests, which have the same code, do in a moment.
pub(super) fn is_no_space(error: &Error) -> bool {
    matches!(error, Error::GRpcStatus(status) if no_space(status))
}

fn no_space(status: &Status) -> bool {
    let etcd = status.message().strip_prefix(ETCD).unwrap_or_default();
    status.code() == Code::ResourceExhausted && etcd.ends_with("database space exceeded")
}

/// Why the connection failed or ended before an answer; `None`: the error is an answer.
pub(super) fn connection_ended(error: &Error) -> Option<String> {
    match error {
        Error::GRpcStatus(status) => std::error::Error::source(status).map(transport_cause),
        Error::TransportError(error) => Some(transport_cause(error)),
        Error::IoError(error) => Some(error.to_string()),
        _ => None,
    }
}

/// An error of the transport with its causes, without the words that only say that it is one.
pub(super) fn transport_cause(error: &(dyn std::error::Error + 'static)) -> String {
    match error.source() {
        Some(cause) if error.is::<tonic::transport::Error>() => chain(cause),
        Some(_) | None => chain(error),
    }
}

/// The meaning of a status.
pub(super) fn status_error(status: &Status) -> StoreError {
    let message = status.message();
    let whole = || match std::error::Error::source(status) {
        // The transport's, not etcd's.
        Some(cause) => transport_cause(cause),
        None if message.is_empty() => status.code().to_string(),
        None => message.to_owned(),
    };
    if never_sent(status) {
        return StoreError::Unavailable(whole());
    }
    let etcd = message.strip_prefix(ETCD).unwrap_or_default();
    match status.code() {
        // Said before the request is looked at: by a member that has lost its leader (we require one), that is starting, or
        // that has too much to do.
        Code::Unavailable if matches!(etcd, "no leader" | "not capable") => StoreError::Unavailable(whole()),
        Code::ResourceExhausted if etcd == "too many requests" => StoreError::Unavailable(whole()),
        // The member that finds its quota used up when it applies a change makes the change, and then says this. Whoever knows
        // that the alarm stood before knows more: see `EtcdStore::txn`.
        Code::ResourceExhausted if no_space(status) => StoreError::OutcomeUnknown(NO_SPACE.into()),
        // gRPC on etcd's side, before etcd sees the request.
        Code::ResourceExhausted if message.contains("received message larger than max") => {
            StoreError::Invalid(too_large(message))
        }
        Code::InvalidArgument if etcd == "request is too large" => StoreError::Invalid(too_large(message)),
        Code::InvalidArgument if etcd == "user name is empty" => StoreError::Invalid(format!(
            "{message}: etcd wants a user, give one with --meta-user and --meta-password-file"
        )),
        Code::InvalidArgument if etcd.starts_with("authentication failed") => {
            StoreError::Invalid(format!("{message}: see --meta-user and --meta-password-file"))
        }
        Code::FailedPrecondition if etcd == "authentication is not enabled" => {
            StoreError::Invalid(format!("{message}: leave --meta-user out, or run `etcdctl auth enable`"))
        }
        // A change of users or roles, or the end of a token, while the request was on its way: refused.
        Code::InvalidArgument if etcd == "revision of auth store is old" => StoreError::Unavailable(whole()),
        Code::Unauthenticated => StoreError::Unavailable(whole()),
        Code::PermissionDenied => StoreError::Invalid(format!(
            "{message}: the user needs read and write access to the keys shardfs/*"
        )),
        Code::NotFound if etcd == "requested lease not found" => StoreError::LeaseUnknown,
        Code::OutOfRange if etcd.ends_with("has been compacted") => StoreError::Compacted,
        Code::OutOfRange if !etcd.is_empty() => StoreError::Invalid(whole()),
        Code::InvalidArgument | Code::Unimplemented => StoreError::Invalid(whole()),
        Code::DataLoss => StoreError::Failed(whole()),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::NotFound
        | Code::AlreadyExists
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Internal
        | Code::Unavailable => StoreError::OutcomeUnknown(whole()),
    }
}

fn too_large(message: &str) -> String {
    format!("{message}: etcd takes requests of 1.5 MiB unless its --max-request-bytes says otherwise")
}

/// The connection had ended before, and no new one is made: the request has not left.
fn never_sent(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        if cause.is::<ConnectError>() {
            return true;
        }
        source = cause.source();
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_certainly_did_not_happen_may_be_repeated() {
        let meaning = |code, text: &str| status_error(&Status::new(code, text));
        for (code, text) in [
            (Code::Unavailable, "etcdserver: no leader"),
            (Code::Unavailable, "etcdserver: not capable"),
            (Code::ResourceExhausted, "etcdserver: too many requests"),
            (Code::Unauthenticated, "etcdserver: invalid auth token"),
        ] {
            assert!(matches!(meaning(code, text), StoreError::Unavailable(_)), "{text}");
        }
        for (code, text) in [
            (Code::Unavailable, "etcdserver: request timed out"),
            (Code::Unavailable, "etcdserver: request timed out, possibly due to previous leader failure"),
            (Code::Unavailable, "etcdserver: leader changed"),
            (Code::Unavailable, "etcdserver: server stopped"),
            (Code::Unavailable, "connection reset"),
            (Code::Unknown, "h2 protocol error"),
            (Code::Cancelled, ""),
            (
                Code::OutOfRange,
                "Error, decoded message length too large: found 5 bytes, the limit is: 4 bytes",
            ),
        ] {
            assert!(matches!(meaning(code, text), StoreError::OutcomeUnknown(_)), "{text}");
        }
    }

    #[test]
    fn a_quota_that_is_used_up_is_not_too_many_requests() {
        for (code, text, expected) in [
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded", true),
            (Code::ResourceExhausted, "etcdserver: too many requests", false),
            (Code::ResourceExhausted, "grpc: received message larger than max (3 vs. 2)", false),
            (Code::ResourceExhausted, "database space exceeded", false),
            (Code::Unavailable, "etcdserver: mvcc: database space exceeded", false),
        ] {
            assert_eq!(is_no_space(&Error::GRpcStatus(Status::new(code, text))), expected, "{code:?} {text}");
        }
        // The first to find it so may have made the change.
        let full = Status::resource_exhausted("etcdserver: mvcc: database space exceeded");
        assert!(matches!(status_error(&full), StoreError::OutcomeUnknown(_)));
        let busy = Status::resource_exhausted("etcdserver: too many requests");
        assert!(matches!(status_error(&busy), StoreError::Unavailable(_)));
    }

    #[test]
    fn an_answer_is_told_from_the_end_of_a_connection() {
        let answer = Error::GRpcStatus(Status::unavailable("etcdserver: no leader"));
        assert_eq!(connection_ended(&answer), None);
        let alert = std::io::Error::other("received fatal alert: BadCertificate");
        let ended = Error::GRpcStatus(Status::from_error(Box::new(alert)));
        assert!(connection_ended(&ended).unwrap().contains("BadCertificate"));
        assert!(matches!(error(ended), StoreError::OutcomeUnknown(why) if why.contains("BadCertificate")));
        let gone = ConnectError(Box::new(std::io::Error::other("the connection has ended")));
        let gone = Error::GRpcStatus(Status::from_error(Box::new(gone)));
        assert_eq!(connection_ended(&gone).unwrap(), "the connection has ended");
        assert!(
            matches!(error(gone), StoreError::Unavailable(why) if why == "the connection has ended"),
            "it was not sent"
        );
    }

    #[test]
    fn limits_and_settings_are_told_with_what_to_do() {
        let said = |code, text: &str| status_error(&Status::new(code, text)).to_string();
        let large = said(Code::InvalidArgument, "etcdserver: request is too large");
        assert!(large.contains("refused") && large.contains("--max-request-bytes"), "{large}");
        let larger = said(Code::ResourceExhausted, "grpc: received message larger than max (3 vs. 2)");
        assert!(larger.contains("--max-request-bytes"), "{larger}");
        let user = said(Code::InvalidArgument, "etcdserver: user name is empty");
        assert!(user.contains("--meta-user"), "{user}");
        let full = said(Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded");
        for word in ["quota is used up", "compact", "defrag", "--quota-backend-bytes", "alarm disarm"] {
            assert!(full.contains(word), "{full}");
        }
        let lease = status_error(&Status::not_found("etcdserver: requested lease not found"));
        assert!(matches!(lease, StoreError::LeaseUnknown));
        let old = Status::out_of_range("etcdserver: mvcc: required revision has been compacted");
        assert!(matches!(status_error(&old), StoreError::Compacted));
    }
}
