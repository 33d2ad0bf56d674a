//! A client and a node of different versions, as far as one version can show it: messages on real connections have fields that this
//! version does not know, as those of a later minor version may.

use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use shardfs_proto::wire::{self, CLIENT_ID_METADATA};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::{Code, Request, Status};

use super::support::{Node, reason};
use super::{Reason, get, put};

/// Numbers that no message has; those of a later version are lower, but none is given twice.
const LATER_FIELDS: std::ops::Range<u32> = 2000..2003;

/// Fields of a later version: a number, a text, a message.
fn later(mut message: Vec<u8>) -> Bytes {
    let [number, text, inner] = [0, 1, 2].map(|n| LATER_FIELDS.start + n);
    prost::encoding::uint64::encode(number, &7, &mut message);
    prost::encoding::string::encode(text, &"later".to_owned(), &mut message);
    prost::encoding::message::encode(inner, &wire::ShardSelector::default(), &mut message);
    Bytes::from(message)
}

/// Messages as bytes.
struct Raw;

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }
    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        to.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(from.copy_to_bytes(from.remaining())))
    }
}

async fn call(node: &Node, path: &'static str, message: Bytes) -> Result<Bytes, Status> {
    let mut client = tonic::client::Grpc::new(node.channel());
    client.ready().await.unwrap();
    let mut request = Request::new(message);
    request.metadata_mut().insert(CLIENT_ID_METADATA, "tests".parse().unwrap());
    // What a later client may say about a call.
    request.metadata_mut().insert("shardfs-later", "yes".parse().unwrap());
    let path = tonic::codegen::http::uri::PathAndQuery::from_static(path);
    client.unary(request, path, Raw).await.map(tonic::Response::into_inner)
}

/// Calls as a later client does; the answer is read as if a later node had given it.
async fn skewed<A: Message + Default + PartialEq>(
    node: &Node,
    path: &'static str,
    message: impl Message,
) -> Result<A, Status> {
    let answer = call(node, path, later(message.encode_to_vec())).await?;
    let read = A::decode(answer.clone()).unwrap();
    assert!(A::decode(later(answer.to_vec())).unwrap() == read, "{path}: more fields change what is read");
    Ok(read)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_later_version_adds_is_passed_over() {
    let node = Node::start().await;
    let new = wire::NewShardRequest { name: "s".into(), ..Default::default() };
    let shard: wire::Shard = skewed(&node, "/shardfs.v1.Storage/NewShard", new).await.unwrap();
    let done: wire::PutReply =
        skewed(&node, "/shardfs.v1.Storage/Put", put(shard.id, "a/b", &b"value"[..])).await.unwrap();
    let got: wire::GetReply = skewed(&node, "/shardfs.v1.Storage/Get", get(shard.id, "a/b")).await.unwrap();
    assert_eq!(&got.value[..], b"value");
    let version = |meta: Option<wire::ObjectMeta>| meta.unwrap().attr.unwrap().version;
    assert_eq!(version(got.meta), version(done.meta));

    let header = wire::CallHeader { shard_id: shard.id, ..Default::default() };
    let open = wire::OpenSessionRequest { header: Some(header), label: "later".into() };
    let session: wire::OpenSessionReply = skewed(&node, "/shardfs.v1.Files/OpenSession", open).await.unwrap();
    assert_ne!(session.session_id, 0);
    let status: wire::NodeStatus =
        skewed(&node, "/shardfs.v1.Admin/GetStatus", wire::GetStatusRequest::default()).await.unwrap();
    assert!(!status.version.is_empty(), "which version a node has is told");

    // What this version does not have is refused by name, and the connection goes on.
    let refused = call(&node, "/shardfs.v1.Storage/Later", Bytes::new()).await.unwrap_err();
    assert_eq!((refused.code(), reason(&refused)), (Code::Unimplemented, Reason::Unsupported));
    let mut odd = put(shard.id, "c", &b"v"[..]);
    odd.durability = 77;
    let refused = skewed::<wire::PutReply>(&node, "/shardfs.v1.Storage/Put", odd).await.unwrap_err();
    assert_eq!(reason(&refused), Reason::InvalidArgument, "a later choice is not taken for one of today");
    let again = node.storage().get(get(shard.id, "a/b")).await.unwrap().into_inner();
    assert_eq!(&again.value[..], b"value");
    node.stop().await;
}
