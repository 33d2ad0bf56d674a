//! etcd's requests and answers from and to domain types. Answers are checked here: what a server should not send is an
//! error, never a panic.

use bytes::Bytes;
use etcd_client::proto::{PbEvent, PbKeyValue, PbTxnOpResponse, PbTxnResponse};
use etcd_client::{
    Compare as EtcdCompare, CompareOp, DeleteOptions, GetOptions, PutOptions, Txn as EtcdTxn, TxnOp,
};

use super::pool::Connection;
use crate::cluster::store::{
    Compare, Demand, Event, KeyRange, KeyValue, LeaseId, Op, Revision, StoreError, StoreResult, Txn,
    TxnAnswer, check_range,
};

/// etcd's number of an event that is a put; see `mvccpb.Event.EventType`.
const EVENT_PUT: i32 = 0;
/// The same of a deletion.
const EVENT_DELETE: i32 = 1;

/// A number as etcd takes it.
pub(super) fn signed(number: u64) -> StoreResult<i64> {
    i64::try_from(number)
        .map_err(|_| StoreError::Invalid(format!("the number {number} is too large for etcd")))
}

fn unsigned(number: i64) -> StoreResult<u64> {
    u64::try_from(number).map_err(|_| malformed("a negative number"))
}

pub(super) fn malformed(what: &str) -> StoreError {
    StoreError::Failed(format!("etcd sent {what}"))
}

/// First key and end of a range. To etcd an empty end means one key and a NUL all that follow; neither is what a
/// range of ours means by it.
pub(super) fn range_bounds(range: &KeyRange) -> StoreResult<(Vec<u8>, Option<Vec<u8>>)> {
    check_range(range)?;
    let end = range.end().map(|end| end.to_vec());
    if end.as_ref().is_some_and(|end| end[..] <= range.start()[..]) {
        return Err(StoreError::Invalid("a range that ends before it begins".into()));
    }
    Ok((range.start().to_vec(), end))
}

/// A page of a range.
pub(super) fn get_options(end: Option<Vec<u8>>, limit: i64) -> GetOptions {
    let options = GetOptions::new().with_limit(limit);
    match end {
        Some(end) => options.with_range(end),
        None => options,
    }
}

pub(super) fn key_value(kv: PbKeyValue) -> StoreResult<KeyValue> {
    Ok(KeyValue {
        key: kv.key.into(),
        value: kv.value.into(),
        created: Revision::new(unsigned(kv.create_revision)?),
        modified: Revision::new(unsigned(kv.mod_revision)?),
        version: unsigned(kv.version)?,
        lease: LeaseId::new(unsigned(kv.lease)?),
    })
}

pub(super) fn key_values(kvs: Vec<PbKeyValue>) -> StoreResult<Vec<KeyValue>> {
    kvs.into_iter().map(key_value).collect()
}

/// An event and the revision that it belongs to.
pub(super) fn event(event: PbEvent) -> StoreResult<(Revision, Event)> {
    let kv = event.kv.ok_or_else(|| malformed("an event without a key"))?;
    let revision = Revision::new(unsigned(kv.mod_revision)?);
    match event.r#type {
        EVENT_PUT => Ok((revision, Event::Put(key_value(kv)?))),
        EVENT_DELETE => Ok((revision, Event::Delete(Bytes::from(kv.key)))),
        other => Err(malformed(&format!("an event of the unknown kind {other}"))),
    }
}

fn compare(compare: &Compare) -> StoreResult<EtcdCompare> {
    let key = compare.key.to_vec();
    Ok(match &compare.demand {
        Demand::Absent => EtcdCompare::create_revision(key, CompareOp::Equal, 0),
        Demand::Modified(revision) => {
            EtcdCompare::mod_revision(key, CompareOp::Equal, signed(revision.get())?)
        }
        Demand::Version(version) => EtcdCompare::version(key, CompareOp::Equal, signed(*version)?),
        Demand::Value(value) => EtcdCompare::value(key, CompareOp::Equal, value.to_vec()),
    })
}

fn op(op: &Op) -> StoreResult<TxnOp> {
    Ok(match op {
        Op::Put { key, value, lease } => {
            let options = lease
                .map(|lease| Ok::<_, StoreError>(PutOptions::new().with_lease(signed(lease.get())?)))
                .transpose()?;
            TxnOp::put(key.to_vec(), value.to_vec(), options)
        }
        Op::Delete(range) => {
            let (start, end) = range_bounds(range)?;
            let options = DeleteOptions::new().with_prev_key();
            let options = match end {
                Some(end) => options.with_range(end),
                None => options,
            };
            TxnOp::delete(start, Some(options))
        }
        Op::Range(range) => {
            let (start, end) = range_bounds(range)?;
            TxnOp::get(start, Some(get_options(end, 0)))
        }
    })
}

/// A transaction for etcd.
pub(super) fn txn(txn: &Txn) -> StoreResult<EtcdTxn> {
    let ops = |ops: &[Op]| ops.iter().map(op).collect::<StoreResult<Vec<_>>>();
    let compares = txn.compares.iter().map(compare).collect::<StoreResult<Vec<_>>>()?;
    Ok(EtcdTxn::new().when(compares).and_then(ops(&txn.success)?).or_else(ops(&txn.failure)?))
}

/// What etcd answered to a transaction.
pub(super) fn txn_answer(
    connection: &Connection,
    asked: &Txn,
    reply: PbTxnResponse,
) -> StoreResult<TxnAnswer> {
    let revision = connection.revision(reply.header.as_ref())?;
    let branch = if reply.succeeded { &asked.success } else { &asked.failure };
    if reply.responses.len() != branch.len() {
        return Err(malformed("another number of results than a transaction has operations"));
    }
    let result = |(op, response): (&Op, Option<PbTxnOpResponse>)| match (op, response) {
        (Op::Put { .. }, Some(PbTxnOpResponse::ResponsePut(_))) => Ok(Vec::new()),
        (Op::Delete(_), Some(PbTxnOpResponse::ResponseDeleteRange(gone))) => key_values(gone.prev_kvs),
        (Op::Range(_), Some(PbTxnOpResponse::ResponseRange(found))) => key_values(found.kvs),
        _ => Err(malformed("a result of another kind than the operation")),
    };
    let responses = reply.responses.into_iter().map(|r| r.response);
    let results = branch.iter().zip(responses).map(result).collect::<StoreResult<_>>()?;
    Ok(TxnAnswer { revision, succeeded: reply.succeeded, results })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_mean_to_etcd_what_they_mean_to_us() {
        assert_eq!(range_bounds(&KeyRange::key("a")).unwrap(), (b"a".to_vec(), None));
        assert_eq!(range_bounds(&KeyRange::prefix("a/")).unwrap(), (b"a/".to_vec(), Some(b"a0".to_vec())));
        for wrong in [KeyRange::between("a", ""), KeyRange::between("a", "\0"), KeyRange::between("b", "a")] {
            assert!(matches!(range_bounds(&wrong), Err(StoreError::Invalid(_))), "{wrong:?}");
        }
    }

    #[test]
    fn what_a_server_should_not_send_is_an_error() {
        let kv = PbKeyValue { key: b"k".to_vec(), mod_revision: 3, ..PbKeyValue::default() };
        let of = |kind, kv| event(PbEvent { r#type: kind, kv, prev_kv: None });
        assert_eq!(
            of(EVENT_DELETE, Some(kv.clone())).unwrap(),
            (Revision::new(3), Event::Delete("k".into()))
        );
        assert!(matches!(of(7, Some(kv.clone())), Err(StoreError::Failed(_))));
        assert!(matches!(of(EVENT_PUT, None), Err(StoreError::Failed(_))));
        let negative = PbKeyValue { version: -1, ..kv };
        assert!(matches!(of(EVENT_PUT, Some(negative)), Err(StoreError::Failed(_))));
        assert!(signed(u64::MAX).is_err());
    }
}
