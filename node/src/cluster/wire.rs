//! The embedded store's messages to and from domain types; errors to and from gRPC codes. Wire data is
//! checked here and nowhere else.

use bytes::Bytes;
use shardfs_proto::wire::meta as wire;
use tonic::{Code, Status};

use super::store::{
    Compare, Demand, Event, KeyRange, KeyValue, LeaseId, Op, RangeAnswer, Revision, StoreError, StoreResult,
    Txn, TxnAnswer, WatchBatch,
};

pub(super) fn range_from_wire(key: Bytes, range_end: Bytes) -> KeyRange {
    if range_end.is_empty() { KeyRange::key(key) } else { KeyRange::between(key, range_end) }
}

pub(super) fn range_to_wire(range: &KeyRange) -> (Bytes, Bytes) {
    (range.start().clone(), range.end().cloned().unwrap_or_default())
}

pub(super) fn kv_from_wire(kv: wire::KeyValue) -> KeyValue {
    KeyValue {
        key: kv.key,
        value: kv.value,
        created: Revision::new(kv.create_revision),
        modified: Revision::new(kv.mod_revision),
        version: kv.version,
        lease: LeaseId::new(kv.lease_id),
    }
}

pub(super) fn kv_to_wire(kv: KeyValue) -> wire::KeyValue {
    wire::KeyValue {
        key: kv.key,
        value: kv.value,
        create_revision: kv.created.get(),
        mod_revision: kv.modified.get(),
        version: kv.version,
        lease_id: kv.lease.map_or(0, LeaseId::get),
    }
}

pub(super) fn range_answer_from_wire(reply: wire::RangeReply) -> RangeAnswer {
    RangeAnswer {
        revision: Revision::new(reply.revision),
        kvs: reply.kvs.into_iter().map(kv_from_wire).collect(),
        more: reply.more,
    }
}

pub(super) fn range_answer_to_wire(answer: RangeAnswer) -> wire::RangeReply {
    wire::RangeReply {
        revision: answer.revision.get(),
        kvs: answer.kvs.into_iter().map(kv_to_wire).collect(),
        more: answer.more,
    }
}

fn op_from_wire(op: wire::Op) -> StoreResult<Op> {
    match op.kind {
        Some(wire::op::Kind::Put(put)) => {
            Ok(Op::Put { key: put.key, value: put.value, lease: LeaseId::new(put.lease_id) })
        }
        Some(wire::op::Kind::Delete(delete)) => Ok(Op::Delete(range_from_wire(delete.key, delete.range_end))),
        Some(wire::op::Kind::Range(range)) => Ok(Op::Range(range_from_wire(range.key, range.range_end))),
        None => Err(StoreError::Invalid("an operation without a kind".into())),
    }
}

fn op_to_wire(op: Op) -> wire::Op {
    let kind = match op {
        Op::Put { key, value, lease } => {
            wire::op::Kind::Put(wire::PutOp { key, value, lease_id: lease.map_or(0, LeaseId::get) })
        }
        Op::Delete(range) => {
            let (key, range_end) = range_to_wire(&range);
            wire::op::Kind::Delete(wire::DeleteOp { key, range_end })
        }
        Op::Range(range) => {
            let (key, range_end) = range_to_wire(&range);
            wire::op::Kind::Range(wire::RangeRequest { key, range_end, limit: 0 })
        }
    };
    wire::Op { kind: Some(kind) }
}

fn compare_from_wire(compare: wire::Compare) -> StoreResult<Compare> {
    let demand = match compare.target {
        Some(wire::compare::Target::ModRevision(0)) => Demand::Absent,
        Some(wire::compare::Target::ModRevision(revision)) => Demand::Modified(Revision::new(revision)),
        Some(wire::compare::Target::Version(0)) => Demand::Absent,
        Some(wire::compare::Target::Version(version)) => Demand::Version(version),
        Some(wire::compare::Target::Value(value)) => Demand::Value(value),
        None => return Err(StoreError::Invalid("a compare without a target".into())),
    };
    Ok(Compare { key: compare.key, demand })
}

fn compare_to_wire(compare: Compare) -> wire::Compare {
    let target = match compare.demand {
        Demand::Absent => wire::compare::Target::ModRevision(0),
        Demand::Modified(revision) => wire::compare::Target::ModRevision(revision.get()),
        Demand::Version(version) => wire::compare::Target::Version(version),
        Demand::Value(value) => wire::compare::Target::Value(value),
    };
    wire::Compare { key: compare.key, target: Some(target) }
}

pub(super) fn txn_from_wire(request: wire::TxnRequest) -> StoreResult<Txn> {
    let txn = Txn {
        compares: request.compares.into_iter().map(compare_from_wire).collect::<StoreResult<_>>()?,
        success: request.success.into_iter().map(op_from_wire).collect::<StoreResult<_>>()?,
        failure: request.failure.into_iter().map(op_from_wire).collect::<StoreResult<_>>()?,
    };
    txn.check()?;
    Ok(txn)
}

pub(super) fn txn_to_wire(txn: Txn) -> wire::TxnRequest {
    wire::TxnRequest {
        compares: txn.compares.into_iter().map(compare_to_wire).collect(),
        success: txn.success.into_iter().map(op_to_wire).collect(),
        failure: txn.failure.into_iter().map(op_to_wire).collect(),
    }
}

pub(super) fn txn_answer_to_wire(answer: TxnAnswer) -> wire::TxnReply {
    wire::TxnReply {
        revision: answer.revision.get(),
        succeeded: answer.succeeded,
        replies: answer
            .results
            .into_iter()
            .map(|kvs| wire::OpReply { kvs: kvs.into_iter().map(kv_to_wire).collect() })
            .collect(),
    }
}

pub(super) fn txn_answer_from_wire(reply: wire::TxnReply) -> TxnAnswer {
    TxnAnswer {
        revision: Revision::new(reply.revision),
        succeeded: reply.succeeded,
        results: reply.replies.into_iter().map(|r| r.kvs.into_iter().map(kv_from_wire).collect()).collect(),
    }
}

pub(super) fn batch_to_wire(batch: WatchBatch) -> wire::WatchReply {
    let event = |event| match event {
        Event::Put(kv) => wire::Event { key: kv.key.clone(), kv: Some(kv_to_wire(kv)) },
        Event::Delete(key) => wire::Event { key, kv: None },
    };
    wire::WatchReply { revision: batch.revision.get(), events: batch.events.into_iter().map(event).collect() }
}

pub(super) fn batch_from_wire(reply: wire::WatchReply) -> WatchBatch {
    let event = |event: wire::Event| match event.kv {
        Some(kv) => Event::Put(kv_from_wire(kv)),
        None => Event::Delete(event.key),
    };
    WatchBatch {
        revision: Revision::new(reply.revision),
        events: reply.events.into_iter().map(event).collect(),
    }
}

/// `Unavailable` becomes ABORTED, which no transport makes up: only the server itself can say that
/// nothing happened.
pub(super) fn error_to_status(error: StoreError) -> Status {
    let code = match &error {
        StoreError::Unavailable(_) => Code::Aborted,
        StoreError::OutcomeUnknown(_) => Code::Unavailable,
        StoreError::Compacted => Code::OutOfRange,
        StoreError::LeaseUnknown => Code::NotFound,
        StoreError::Invalid(_) => Code::InvalidArgument,
        StoreError::Failed(_) => Code::DataLoss,
    };
    Status::new(code, error.to_string())
}

/// For a call that was sent: what the transport does not say counts as unknown.
pub(super) fn error_from_status(status: &Status) -> StoreError {
    let message = status.message().to_owned();
    match status.code() {
        Code::Aborted => StoreError::Unavailable(message),
        Code::OutOfRange => StoreError::Compacted,
        Code::NotFound => StoreError::LeaseUnknown,
        Code::InvalidArgument | Code::Unimplemented | Code::PermissionDenied | Code::Unauthenticated => {
            StoreError::Invalid(message)
        }
        Code::DataLoss => StoreError::Failed(message),
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::AlreadyExists
        | Code::FailedPrecondition
        | Code::ResourceExhausted
        | Code::Internal
        | Code::Unavailable => StoreError::OutcomeUnknown(message),
    }
}
