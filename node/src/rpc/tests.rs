//! The parts of the services that need no cluster; whole calls: tests/rpc.rs.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use futures::StreamExt;
use parking_lot::Mutex;

use super::stream::{Producer, Turn};
use super::*;

#[derive(Default)]
struct Seen(Mutex<Vec<(&'static str, Code)>>);

impl CallObserver for Seen {
    fn call_finished(&self, method: &'static str, code: Code, _: Duration) {
        self.0.lock().push((method, code));
    }
}

fn reason<T>(outcome: Result<T>) -> Reason {
    outcome.map(|_| ()).unwrap_err().reason()
}

#[test]
fn callers_are_read_from_the_metadata() {
    let mut metadata = MetadataMap::new();
    assert_eq!(reason(caller(&metadata)), Reason::NoClientId);
    metadata.insert(CLIENT_ID_METADATA, "tests".parse().unwrap());
    assert_eq!(caller(&metadata).unwrap(), ClientId::new("tests").unwrap());
    for bad in ["", "a b", "-a", &"x".repeat(65)] {
        metadata.insert(CLIENT_ID_METADATA, bad.parse().unwrap());
        assert_eq!(reason(caller(&metadata)), Reason::InvalidArgument, "{bad:?}");
    }
    metadata.insert(CLIENT_ID_METADATA, tonic::metadata::MetadataValue::try_from(&b"\xff"[..]).unwrap());
    assert_eq!(reason(caller(&metadata)), Reason::InvalidArgument);
}

#[test]
fn write_ids_are_whole() {
    assert_eq!(write_id(0, 0).unwrap(), (None, None));
    assert_eq!(write_id(3, 4).unwrap(), (SessionId::new(3), Sequence::new(4)));
    assert_eq!(write_id(3, 0).unwrap(), (SessionId::new(3), None));
    assert_eq!(reason(write_id(0, 4)), Reason::InvalidArgument);
    assert_eq!(storage_write_id(None).unwrap(), (None, None));
    for (session_id, sequence) in [(0, 4), (3, 0)] {
        let half = Some(wire::WriteId { session_id, sequence });
        assert_eq!(reason(storage_write_id(half)), Reason::InvalidArgument);
    }
}

#[test]
fn errors_name_their_shard_once() {
    let (one, two) = (ShardId::new(1).unwrap(), ShardId::new(2).unwrap());
    let error = about::<()>(one, Err(Error::io("x"))).unwrap_err();
    assert_eq!(error.shard(), Some(one));
    assert_eq!(about::<()>(two, Err(error)).unwrap_err().shard(), Some(one));
}

#[tokio::test]
async fn panics_become_errors() {
    let outcome: Result<()> = guarded("Test/Panic", async { panic!("on purpose") }).await;
    assert_eq!(reason(outcome), Reason::Internal);
}

#[tokio::test]
async fn every_call_is_observed_once() {
    let seen = Arc::new(Seen::default());
    let begin = |method| Observation::begin(seen.clone(), None, method);
    begin("ok").end(&Ok(()));
    begin("failed").end::<()>(&Err(Error::not_found("x")));
    drop(begin("gone"));
    // The first end counts, and the last clone reports.
    let shared = begin("shared");
    shared.clone().end_with(Code::DataLoss);
    assert_eq!(seen.0.lock().len(), 3);
    shared.end(&Ok(()));
    let expected =
        [("ok", Code::Ok), ("failed", Code::NotFound), ("gone", Code::Cancelled), ("shared", Code::DataLoss)];
    assert_eq!(*seen.0.lock(), expected);
}

/// Counts up; does what it is told at a number.
struct Count {
    next: u32,
    turns: Arc<AtomicUsize>,
    end: u32,
    fail_at: u32,
    panic_at: u32,
    wanted_back: Arc<AtomicBool>,
}

impl Count {
    fn to(end: u32) -> Count {
        Count {
            next: 0,
            turns: Arc::default(),
            end,
            fail_at: u32::MAX,
            panic_at: u32::MAX,
            wanted_back: Arc::default(),
        }
    }
}

impl Producer for Count {
    type Message = u32;

    fn wanted_back(&self) -> bool {
        self.wanted_back.load(Ordering::SeqCst)
    }

    fn turn(&mut self, out: &mut Vec<u32>) -> Result<Turn> {
        self.turns.fetch_add(1, Ordering::SeqCst);
        for _ in 0..10 {
            if self.next == self.end {
                return Ok(Turn::Done);
            }
            if self.next == self.fail_at {
                return Err(Error::corrupt("on purpose"));
            }
            assert!(self.next != self.panic_at, "on purpose");
            out.push(self.next);
            self.next += 1;
        }
        Ok(Turn::More)
    }
}

async fn collect(count: Count) -> (Vec<u32>, Option<Code>, Vec<(&'static str, Code)>) {
    let seen = Arc::new(Seen::default());
    let answer = stream::answer("Test/Count", count, Observation::begin(seen.clone(), None, "Test/Count"));
    let messages: Vec<Result<u32, Status>> = answer.collect().await;
    let code = messages.iter().find_map(|message| message.as_ref().err().map(Status::code));
    let seen = seen.0.lock().clone();
    (messages.into_iter().flatten().collect(), code, seen)
}

#[tokio::test]
async fn streams_carry_everything_in_order() {
    for end in [0, 1, 10, 11, 95] {
        let (messages, code, seen) = collect(Count::to(end)).await;
        assert_eq!(messages, (0..end).collect::<Vec<_>>());
        assert_eq!((code, seen), (None, vec![("Test/Count", Code::Ok)]));
    }
}

#[tokio::test]
async fn streams_end_with_their_error() {
    let (messages, code, seen) = collect(Count { fail_at: 25, ..Count::to(50) }).await;
    assert_eq!(messages, (0..25).collect::<Vec<_>>());
    assert_eq!((code, seen), (Some(Code::DataLoss), vec![("Test/Count", Code::DataLoss)]));
    let (messages, code, seen) = collect(Count { panic_at: 25, ..Count::to(50) }).await;
    assert_eq!(messages, (0..20).collect::<Vec<_>>());
    assert_eq!((code, seen), (Some(Code::Internal), vec![("Test/Count", Code::Internal)]));
}

#[tokio::test]
async fn streams_wait_for_their_reader_and_stop_without_one() {
    const AHEAD_MAX: usize = 4;
    let count = Count::to(u32::MAX);
    let turns = count.turns.clone();
    let seen = Arc::new(Seen::default());
    let mut answer =
        stream::answer("Test/Count", count, Observation::begin(seen.clone(), None, "Test/Count"));
    assert_eq!(answer.next().await.unwrap().unwrap(), 0);
    tokio::time::sleep(Duration::from_millis(200)).await;
    let ahead = turns.load(Ordering::SeqCst);
    assert!(ahead <= AHEAD_MAX, "{ahead} batches were made for a reader that takes none");
    drop(answer);
    while seen.0.lock().is_empty() {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(turns.load(Ordering::SeqCst) <= AHEAD_MAX + 1);
    assert_eq!(*seen.0.lock(), [("Test/Count", Code::Cancelled)]);
}

#[tokio::test]
async fn what_is_wanted_back_is_let_go_of_though_nobody_reads() {
    let count = Count::to(u32::MAX);
    let (held, wanted_back) = (count.turns.clone(), count.wanted_back.clone());
    let seen = Arc::new(Seen::default());
    let mut answer =
        stream::answer("Test/Count", count, Observation::begin(seen.clone(), None, "Test/Count"));
    assert_eq!(answer.next().await.unwrap().unwrap(), 0);
    wanted_back.store(true, Ordering::SeqCst);
    while Arc::strong_count(&held) > 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // What was made comes still, without a gap, and then why there is no more.
    let mut next = 1;
    let error = loop {
        match answer.next().await.unwrap() {
            Ok(number) => {
                assert_eq!(number, next);
                next += 1;
            }
            Err(status) => break status,
        }
    };
    assert_eq!(error.code(), Code::Unavailable);
    assert!(answer.next().await.is_none());
}
