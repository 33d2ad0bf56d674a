//! Locks over gRPC.

use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::types::Reason;
use shardfs_proto::wire::{self, LockKind, operation};
use tonic::Code;

use super::support::{Node, reason};

const TO_THE_END: u64 = u64::MAX;

fn header(shard: u64, session: u64) -> Option<wire::CallHeader> {
    Some(wire::CallHeader { shard_id: shard, epoch: 0, session_id: session, ..Default::default() })
}

fn mutate(header: Option<wire::CallHeader>, sequence: u64, kind: operation::Kind) -> wire::MutateRequest {
    wire::MutateRequest {
        header,
        sequence,
        operation: Some(wire::Operation { kind: Some(kind) }),
        durability: wire::Durability::Buffered.into(),
        repetition: None,
    }
}

fn set(inode: u64, start: u64, end: u64, kind: LockKind) -> operation::Kind {
    operation::Kind::SetLock(wire::SetLock { inode, owner: 7, pid: 42, start, end, kind: kind.into() })
}

#[tokio::test(flavor = "multi_thread")]
async fn locks_are_held_told_waited_for_and_kept_over_a_restart() {
    let mut node = Node::start().await;
    let shard = node.new_shard("s").await;
    let (a, b) = (node.open_session(shard).await, node.open_session(shard).await);
    let create = operation::Kind::Create(wire::Create {
        parent: 1,
        name: Bytes::from_static(b"f"),
        kind: wire::FileKind::Regular.into(),
        inode: Some(wire::NewInode { mode: 0o600, ..Default::default() }),
        ..Default::default()
    });
    let made = node.files().mutate(mutate(header(shard, a), 1, create)).await.unwrap().into_inner();
    let file = made.result.unwrap().attr.unwrap().inode;
    let all = |kind| set(file, 0, TO_THE_END, kind);
    node.files().mutate(mutate(header(shard, a), 2, all(LockKind::Write))).await.unwrap();
    node = node.restart().await;

    let refused = node.files().mutate(mutate(header(shard, b), 1, all(LockKind::Read))).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused)), (Code::Aborted, Reason::LockConflict));
    let get = wire::GetLockRequest {
        header: header(shard, b),
        inode: file,
        owner: 7,
        start: 5,
        end: 5,
        kind: LockKind::Read.into(),
    };
    let held = node.files().get_lock(get).await.unwrap().into_inner().conflict.unwrap();
    let expected = wire::FileLock {
        session_id: a,
        owner: 7,
        pid: 42,
        start: 0,
        end: TO_THE_END,
        kind: LockKind::Write.into(),
    };
    assert_eq!(held, expected);
    // Its own lock keeps nobody from it.
    let own = wire::GetLockRequest { header: header(shard, a), ..get };
    assert_eq!(node.files().get_lock(own).await.unwrap().into_inner().conflict, None);

    let wait = wire::WaitLockRequest {
        header: header(shard, b),
        inode: file,
        owner: 7,
        start: 5,
        end: 5,
        kind: LockKind::Read.into(),
        wait_ms: 60_000,
    };
    let waiting = tokio::spawn({
        let (mut files, wait) = (node.files(), wait);
        async move { files.wait_lock(wait).await }
    });
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert!(!waiting.is_finished());
    let unlock = set(file, 0, 9, LockKind::Unlock);
    node.files().mutate(mutate(header(shard, a), 3, unlock)).await.unwrap();
    waiting.await.unwrap().unwrap();
    let lock = set(file, 0, 9, LockKind::Write);
    node.files().mutate(mutate(header(shard, b), 2, lock)).await.unwrap();
    assert!(node.files().get_lock(get).await.unwrap().into_inner().conflict.is_none());

    let bad = mutate(header(shard, 0), 0, all(LockKind::Read));
    assert_eq!(reason(&node.files().mutate(bad).await.unwrap_err()), Reason::InvalidArgument);
    let bad = wire::WaitLockRequest { kind: LockKind::Unlock.into(), ..wait };
    assert_eq!(reason(&node.files().wait_lock(bad).await.unwrap_err()), Reason::InvalidArgument);
    let bad = wire::WaitLockRequest { start: 9, end: 8, ..wait };
    assert_eq!(reason(&node.files().wait_lock(bad).await.unwrap_err()), Reason::InvalidArgument);
    let unknown = wire::WaitLockRequest { header: header(shard, 1 << 40), ..wait };
    assert_eq!(reason(&node.files().wait_lock(unknown).await.unwrap_err()), Reason::SessionUnknown);

    // A session that ends takes its locks along.
    let close = wire::CloseSessionRequest { header: header(shard, a) };
    node.files().close_session(close).await.unwrap();
    node.files().mutate(mutate(header(shard, b), 3, all(LockKind::Write))).await.unwrap();
    node.stop().await;
}
