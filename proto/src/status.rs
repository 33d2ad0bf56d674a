//! The domain error <-> gRPC status, both ways, exhaustively.
//!
//! A status carries the machine-readable detail as a google.rpc.Status with one `Any` in the trailer
//! `grpc-status-details-bin`, which is where every gRPC library looks for it.

use bytes::Bytes;
use prost::Message;
use tonic::Code;

use crate::convert;
use crate::types::{Error, Reason, ShardId};
use crate::wire;

const DETAIL_TYPE_URL: &str = "type.googleapis.com/shardfs.v1.ErrorDetail";

/// google.rpc.Status.
#[derive(Clone, PartialEq, prost::Message)]
struct RpcStatus {
    #[prost(int32, tag = "1")]
    code: i32,
    #[prost(string, tag = "2")]
    message: String,
    #[prost(message, repeated, tag = "3")]
    details: Vec<prost_types::Any>,
}

/// How a generic client should behave.
pub fn code(reason: Reason) -> Code {
    match reason {
        Reason::NotFound | Reason::ShardNotFound | Reason::ShardDeleted | Reason::NoAttribute => {
            Code::NotFound
        }
        Reason::AlreadyExists | Reason::ShardExists => Code::AlreadyExists,
        Reason::InvalidArgument | Reason::NameTooLong | Reason::TooLarge | Reason::CrossShard => {
            Code::InvalidArgument
        }
        Reason::NotDirectory
        | Reason::IsDirectory
        | Reason::NotEmpty
        | Reason::WrongKind
        | Reason::ShardReadOnly
        | Reason::ShardNotEmpty
        | Reason::ShardHasSnapshots
        | Reason::NotPermitted
        | Reason::TooManyLinks
        | Reason::SessionUnknown
        | Reason::SequenceStale
        | Reason::AttributeTooLarge
        | Reason::Deadlock => Code::FailedPrecondition,
        Reason::WrongOwner => Code::PermissionDenied,
        Reason::NoClientId => Code::Unauthenticated,
        Reason::ShardFull
        | Reason::VolumeFull
        | Reason::Busy
        | Reason::FileTooLarge
        | Reason::IdsExhausted
        | Reason::LocksExhausted => Code::ResourceExhausted,
        Reason::VersionMismatch | Reason::LockConflict => Code::Aborted,
        Reason::NotPrimary | Reason::StaleEpoch | Reason::Unavailable => Code::Unavailable,
        Reason::Corrupt => Code::DataLoss,
        Reason::Io | Reason::Internal => Code::Internal,
        Reason::Unsupported => Code::Unimplemented,
        Reason::Deadline => Code::DeadlineExceeded,
    }
}

fn reason_to_wire(reason: Reason) -> wire::ErrorReason {
    use wire::ErrorReason as W;
    match reason {
        Reason::NotFound => W::NotFound,
        Reason::ShardNotFound => W::ShardNotFound,
        Reason::ShardDeleted => W::ShardDeleted,
        Reason::NoAttribute => W::NoAttribute,
        Reason::AlreadyExists => W::AlreadyExists,
        Reason::ShardExists => W::ShardExists,
        Reason::InvalidArgument => W::InvalidArgument,
        Reason::NameTooLong => W::NameTooLong,
        Reason::TooLarge => W::TooLarge,
        Reason::CrossShard => W::CrossShard,
        Reason::NotDirectory => W::NotDirectory,
        Reason::IsDirectory => W::IsDirectory,
        Reason::NotEmpty => W::NotEmpty,
        Reason::WrongKind => W::WrongKind,
        Reason::ShardReadOnly => W::ShardReadOnly,
        Reason::ShardNotEmpty => W::ShardNotEmpty,
        Reason::ShardHasSnapshots => W::ShardHasSnapshots,
        Reason::NotPermitted => W::NotPermitted,
        Reason::TooManyLinks => W::TooManyLinks,
        Reason::SessionUnknown => W::SessionUnknown,
        Reason::SequenceStale => W::SequenceStale,
        Reason::AttributeTooLarge => W::AttributeTooLarge,
        Reason::WrongOwner => W::WrongOwner,
        Reason::NoClientId => W::NoClientId,
        Reason::ShardFull => W::ShardFull,
        Reason::VolumeFull => W::VolumeFull,
        Reason::Busy => W::Busy,
        Reason::FileTooLarge => W::FileTooLarge,
        Reason::IdsExhausted => W::IdsExhausted,
        Reason::LocksExhausted => W::LocksExhausted,
        Reason::VersionMismatch => W::VersionMismatch,
        Reason::LockConflict => W::LockConflict,
        Reason::Deadlock => W::Deadlock,
        Reason::NotPrimary => W::NotPrimary,
        Reason::StaleEpoch => W::StaleEpoch,
        Reason::Unavailable => W::Unavailable,
        Reason::Corrupt => W::Corrupt,
        Reason::Io => W::Io,
        Reason::Internal => W::Internal,
        Reason::Unsupported => W::Unsupported,
        Reason::Deadline => W::Deadline,
    }
}

/// `None` for what this version does not know: the gRPC code decides then.
fn reason_from_wire(reason: wire::ErrorReason) -> Option<Reason> {
    use wire::ErrorReason as W;
    Some(match reason {
        W::Unspecified => return None,
        W::NotFound => Reason::NotFound,
        W::ShardNotFound => Reason::ShardNotFound,
        W::ShardDeleted => Reason::ShardDeleted,
        W::NoAttribute => Reason::NoAttribute,
        W::AlreadyExists => Reason::AlreadyExists,
        W::ShardExists => Reason::ShardExists,
        W::InvalidArgument => Reason::InvalidArgument,
        W::NameTooLong => Reason::NameTooLong,
        W::TooLarge => Reason::TooLarge,
        W::CrossShard => Reason::CrossShard,
        W::NotDirectory => Reason::NotDirectory,
        W::IsDirectory => Reason::IsDirectory,
        W::NotEmpty => Reason::NotEmpty,
        W::WrongKind => Reason::WrongKind,
        W::ShardReadOnly => Reason::ShardReadOnly,
        W::ShardNotEmpty => Reason::ShardNotEmpty,
        W::ShardHasSnapshots => Reason::ShardHasSnapshots,
        W::NotPermitted => Reason::NotPermitted,
        W::TooManyLinks => Reason::TooManyLinks,
        W::SessionUnknown => Reason::SessionUnknown,
        W::SequenceStale => Reason::SequenceStale,
        W::AttributeTooLarge => Reason::AttributeTooLarge,
        W::WrongOwner => Reason::WrongOwner,
        W::NoClientId => Reason::NoClientId,
        W::ShardFull => Reason::ShardFull,
        W::VolumeFull => Reason::VolumeFull,
        W::Busy => Reason::Busy,
        W::FileTooLarge => Reason::FileTooLarge,
        W::IdsExhausted => Reason::IdsExhausted,
        W::LocksExhausted => Reason::LocksExhausted,
        W::VersionMismatch => Reason::VersionMismatch,
        W::LockConflict => Reason::LockConflict,
        W::Deadlock => Reason::Deadlock,
        W::NotPrimary => Reason::NotPrimary,
        W::StaleEpoch => Reason::StaleEpoch,
        W::Unavailable => Reason::Unavailable,
        W::Corrupt => Reason::Corrupt,
        W::Io => Reason::Io,
        W::Internal => Reason::Internal,
        W::Unsupported => Reason::Unsupported,
        W::Deadline => Reason::Deadline,
    })
}

/// What a status without a detail of ours means: it comes from the transport, a proxy, or another
/// version.
fn reason_from_code(code: Code) -> Reason {
    match code {
        Code::NotFound => Reason::NotFound,
        Code::AlreadyExists => Reason::AlreadyExists,
        Code::InvalidArgument | Code::OutOfRange => Reason::InvalidArgument,
        Code::FailedPrecondition => Reason::NotPermitted,
        Code::PermissionDenied => Reason::WrongOwner,
        Code::Unauthenticated => Reason::NoClientId,
        Code::ResourceExhausted => Reason::TooLarge,
        Code::Aborted => Reason::VersionMismatch,
        // A connection that breaks shows as Unavailable, Unknown (h2) or Cancelled (GOAWAY).
        Code::Unavailable | Code::Unknown | Code::Cancelled => Reason::Unavailable,
        Code::DataLoss => Reason::Corrupt,
        Code::Unimplemented => Reason::Unsupported,
        Code::DeadlineExceeded => Reason::Deadline,
        Code::Internal | Code::Ok => Reason::Internal,
    }
}

/// The machine-readable detail of an error.
pub fn detail_to_wire(error: &Error) -> wire::ErrorDetail {
    wire::ErrorDetail {
        reason: reason_to_wire(error.reason()).into(),
        message: error.message().to_owned(),
        shard_id: error.shard().map_or(0, ShardId::get),
        location: error.location().map(convert::location_to_wire),
        retryable: error.is_retryable(),
        retry_after_ms: error.retry_after_ms(),
    }
}

/// The error behind a detail.
pub fn detail_from_wire(detail: wire::ErrorDetail) -> Error {
    let reason = reason_from_wire(detail.reason()).unwrap_or(Reason::Internal);
    with_detail(reason, detail)
}

/// A node says nothing more of a call that it does not have.
const NO_SUCH_CALL: &str =
    "the node does not know this call: it has an earlier version than this program, update it";

fn with_detail(reason: Reason, mut detail: wire::ErrorDetail) -> Error {
    if reason == Reason::Unsupported && detail.message.is_empty() {
        detail.message = NO_SUCH_CALL.to_owned();
    }
    let mut error = Error::new(reason, detail.message).with_retry_after_ms(detail.retry_after_ms);
    if let Ok(shard) = ShardId::new(detail.shard_id) {
        error = error.with_shard(shard);
    }
    if let Some(Ok(location)) = detail.location.map(convert::location_from_wire) {
        error = error.with_location(location);
    }
    error
}

/// The status that an error becomes.
pub fn to_status(error: &Error) -> tonic::Status {
    let code = code(error.reason());
    let details = RpcStatus {
        code: code as i32,
        message: error.message().to_owned(),
        details: vec![prost_types::Any {
            type_url: DETAIL_TYPE_URL.to_owned(),
            value: detail_to_wire(error).encode_to_vec(),
        }],
    };
    tonic::Status::with_details(code, error.message(), Bytes::from(details.encode_to_vec()))
}

/// The error behind a status.
pub fn from_status(status: &tonic::Status) -> Error {
    said_by_node(status).unwrap_or_else(|| transport_error(status))
}

/// The error that a node itself has answered. `None` if the status has no detail of ours: then it says how the call
/// travelled, and nothing of what became of it.
pub fn said_by_node(status: &tonic::Status) -> Option<Error> {
    let rpc = RpcStatus::decode(status.details()).ok()?;
    let any = rpc.details.into_iter().find(|any| any.type_url == DETAIL_TYPE_URL)?;
    let detail = wire::ErrorDetail::decode(any.value.as_slice()).ok()?;
    let reason = reason_from_wire(detail.reason()).unwrap_or_else(|| reason_from_code(status.code()));
    Some(with_detail(reason, detail))
}

/// The error behind a status that no node has [said](said_by_node).
pub fn transport_error(status: &tonic::Status) -> Error {
    let reason = match status.code() {
        // The connection's end, not the node's answer: one that is closed in order shows as Internal.
        Code::Internal | Code::ResourceExhausted if std::error::Error::source(status).is_some() => {
            Reason::Unavailable
        }
        code => reason_from_code(code),
    };
    Error::new(reason, transport_message(status))
}

/// tonic says "transport error" and keeps the cause in the chain.
fn transport_message(status: &tonic::Status) -> String {
    let mut message = status.message().to_owned();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        let words = cause.to_string();
        if !message.contains(&words) {
            if !message.is_empty() {
                message.push_str(": ");
            }
            message.push_str(&words);
        }
        source = cause.source();
    }
    if message.is_empty() { status.code().description().to_owned() } else { message }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::{Epoch, Location, NodeId, VolumeId};

    #[test]
    fn errors_survive_the_wire() {
        let error = Error::new(Reason::NotPrimary, "shard 7 is served by node-2")
            .with_shard(ShardId::new(7).unwrap())
            .with_location(Location {
                volume: VolumeId::new("vol-1").unwrap(),
                node: Some(NodeId::new("node-2").unwrap()),
                endpoints: vec!["unix:/run/x".into()],
                epoch: Epoch::FIRST,
                backups: vec![crate::types::Backup {
                    node: NodeId::new("node-3").unwrap(),
                    endpoints: vec!["unix:/run/y".into()],
                }],
            })
            .with_retry_after_ms(20);
        let status = to_status(&error);
        assert_eq!(status.code(), Code::Unavailable);
        let back = from_status(&status);
        assert_eq!(back.reason(), error.reason());
        assert_eq!(back.message(), error.message());
        assert_eq!(back.shard(), error.shard());
        assert_eq!(back.location(), error.location());
        assert_eq!(back.retry_after_ms(), 20);
    }

    #[test]
    fn every_reason_survives_the_wire() {
        for number in 0..=200 {
            if let Ok(wire) = wire::ErrorReason::try_from(number)
                && let Some(reason) = reason_from_wire(wire)
            {
                assert_eq!(reason_to_wire(reason), wire);
            }
        }
    }

    #[test]
    fn a_connection_that_ends_is_no_answer() {
        let mut ended = tonic::Status::internal("h2 protocol error: http2 error");
        assert_eq!(from_status(&ended).reason(), Reason::Internal, "from a peer");
        ended.set_source(std::sync::Arc::new(std::io::Error::other("connection error received")));
        let error = from_status(&ended);
        assert_eq!(error.reason(), Reason::Unavailable);
        assert!(error.is_retryable() && error.message().contains("connection error received"), "{error}");
    }

    #[test]
    fn a_call_that_a_node_does_not_have_is_told_in_words() {
        let silent = to_status(&Error::new(Reason::Unsupported, ""));
        assert!(from_status(&silent).message().contains("does not know this call"));
        let told = to_status(&Error::new(Reason::Unsupported, "not here"));
        assert_eq!(from_status(&told).message(), "not here");
    }

    #[test]
    fn a_foreign_status_is_understood() {
        assert_eq!(
            from_status(&tonic::Status::unavailable("connection refused")).reason(),
            Reason::Unavailable
        );
    }

    #[test]
    fn only_our_detail_is_a_nodes_word() {
        let ours = to_status(&Error::io("the device failed"));
        assert_eq!(said_by_node(&ours).unwrap().reason(), Reason::Io);
        let type_url = "type.googleapis.com/google.rpc.RetryInfo".to_owned();
        let any = prost_types::Any { type_url, value: Vec::new() };
        let foreign = RpcStatus { code: 13, message: "upstream".into(), details: vec![any] };
        for details in [Bytes::new(), Bytes::from(foreign.encode_to_vec()), Bytes::from_static(b"\xff")] {
            let status = tonic::Status::with_details(Code::Internal, "upstream", details);
            assert!(said_by_node(&status).is_none());
            assert_eq!(from_status(&status).message(), "upstream");
        }
    }
}
