//! Sessions over gRPC: what keeping them does.

use bytes::Bytes;
use shardfs_proto::types::Reason;
use shardfs_proto::wire::{self, operation};

use super::support::{Node, reason};

/// Clients keep their sessions with all shards: those that nobody uses would be opened for it.
#[tokio::test(flavor = "multi_thread")]
async fn sessions_are_kept_without_opening_their_shards() {
    let mut node = Node::start().await;
    let shard = node.new_shard("s").await;
    let session = node.open_session(shard).await;
    let call = wire::CallHeader { shard_id: shard, epoch: 0, session_id: session, ..Default::default() };
    let header = Some(call);
    let create = operation::Kind::Create(wire::Create {
        parent: 1,
        name: Bytes::from_static(b"f"),
        kind: wire::FileKind::Regular.into(),
        inode: Some(wire::NewInode { mode: 0o600, ..Default::default() }),
        open: true,
        ..Default::default()
    });
    let create = wire::MutateRequest {
        header,
        sequence: 1,
        operation: Some(wire::Operation { kind: Some(create) }),
        durability: wire::Durability::Sync.into(),
        repetition: None,
    };
    let made = node.files().mutate(create).await.unwrap().into_inner();
    let file = made.result.unwrap().attr.unwrap().inode;
    node = node.restart().await;
    let open_shards = async |node: &Node| {
        node.admin().get_status(wire::GetStatusRequest {}).await.unwrap().into_inner().open_shards
    };
    let keep = |resume: bool, open_inodes: Vec<u64>| wire::KeepSessionRequest { header, resume, open_inodes };
    for resume in [false, true] {
        let held = if resume { vec![file] } else { vec![] };
        let kept = node.files().keep_session(keep(resume, held)).await.unwrap().into_inner();
        assert!(kept.ttl_ms > 0 && kept.epoch > 0 && !kept.resume_wanted);
        assert_eq!(open_shards(&node).await, 0);
    }
    let sessionless = wire::CallHeader { session_id: 0, ..call };
    let nobodys = wire::KeepSessionRequest { header: Some(sessionless), ..keep(false, vec![]) };
    assert_eq!(reason(&node.files().keep_session(nobodys).await.unwrap_err()), Reason::InvalidArgument);

    // Once it is open nothing that was said before counts, and the file is held without a word.
    let unlink = operation::Kind::Unlink(wire::Unlink { parent: 1, name: Bytes::from_static(b"f") });
    let unlink = wire::MutateRequest {
        header,
        sequence: 2,
        operation: Some(wire::Operation { kind: Some(unlink) }),
        durability: wire::Durability::Sync.into(),
        repetition: None,
    };
    node.files().mutate(unlink).await.unwrap();
    assert_eq!(open_shards(&node).await, 1);
    assert!(node.files().keep_session(keep(false, vec![])).await.unwrap().into_inner().resume_wanted);
    node.files().get_attr(wire::GetAttrRequest { header, inode: file }).await.unwrap();
    assert!(!node.files().keep_session(keep(true, vec![])).await.unwrap().into_inner().resume_wanted);
    let gone = node.files().get_attr(wire::GetAttrRequest { header, inode: file }).await.unwrap_err();
    assert_eq!(reason(&gone), Reason::NotFound);
    node.stop().await;
}
