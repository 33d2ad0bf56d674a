//! A whole node in this process: metadata store, one `dir` volume, gRPC over TCP. Everything lies in a
//! temporary folder and goes with it.

use std::path::PathBuf;

use shardfs_node::cluster::bootstrap::{VolumeSpec, ensure_volume};
use shardfs_node::cluster::embedded::EmbeddedStore;
use shardfs_node::cluster::embedded_server;
use shardfs_node::config::{Args, NodeConfig};
use shardfs_node::net::ListenAddr;
use shardfs_node::node;
use shardfs_node::parent::Child;
use shardfs_proto::types::limits::{MESSAGE_BYTES_MAX, REPLY_BYTES_MAX};
use shardfs_proto::types::{NodeId, Reason, VolumeId};
use shardfs_proto::wire::admin_client::AdminClient;
use shardfs_proto::wire::files_client::FilesClient;
use shardfs_proto::wire::storage_client::StorageClient;
use shardfs_proto::wire::{self, CLIENT_ID_METADATA};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// The node's id.
pub const NODE_ID: &str = "node-1";
const CLIENT_ID: &str = "tests";

/// Says for whom a call is made.
#[derive(Clone)]
pub struct Identity(Option<String>);

impl Interceptor for Identity {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(id) = &self.0 {
            request.metadata_mut().insert(CLIENT_ID_METADATA, id.parse().expect("an ASCII client id"));
        }
        Ok(request)
    }
}

type Called = InterceptedService<Channel, Identity>;

/// A node and its metadata store.
pub struct Node {
    node: node::Node,
    store: embedded_server::Handle,
    channel: Channel,
    dir: tempfile::TempDir,
}

impl Node {
    /// Starts both.
    pub async fn start() -> Node {
        let dir = tempfile::tempdir().unwrap();
        let volume = dir.path().join("volume");
        std::fs::create_dir(&volume).unwrap();
        let listen = ListenAddr::Unix(dir.path().join("meta.sock"));
        let store = embedded_server::serve(dir.path().join("meta.redb"), listen).await.unwrap();
        let spec = VolumeSpec {
            id: VolumeId::new("vol-1").unwrap(),
            provider: "dir".into(),
            source: volume.to_str().unwrap().into(),
            size_bytes: 0,
            iops: 0,
            primary: NodeId::new(NODE_ID).unwrap(),
            backups: vec![],
            allow_unfenced: false,
        };
        ensure_volume(&EmbeddedStore::new(&store.address().to_string()).unwrap(), &spec).await.unwrap();
        let (node, channel) = run(&dir, &store).await;
        Node { node, store, channel, dir }
    }

    /// Ends the node in order and starts it again.
    pub async fn restart(mut self) -> Node {
        drop(self.channel);
        self.node.shutdown().await.unwrap();
        (self.node, self.channel) = run(&self.dir, &self.store).await;
        self
    }

    /// Stops both in order.
    pub async fn stop(self) {
        drop(self.channel);
        self.node.shutdown().await.unwrap();
        self.store.shutdown().await.unwrap();
    }

    /// A connection without an identity.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    fn called(&self, id: Option<&str>) -> Called {
        InterceptedService::new(self.channel.clone(), Identity(id.map(str::to_owned)))
    }

    /// The Storage service.
    pub fn storage(&self) -> StorageClient<Called> {
        self.storage_as(Some(CLIENT_ID))
    }

    /// The Storage service for somebody else, or nobody.
    pub fn storage_as(&self, id: Option<&str>) -> StorageClient<Called> {
        StorageClient::new(self.called(id))
            .max_decoding_message_size(REPLY_BYTES_MAX)
            .max_encoding_message_size(2 * MESSAGE_BYTES_MAX)
    }

    /// The Files service.
    pub fn files(&self) -> FilesClient<Called> {
        FilesClient::new(self.called(Some(CLIENT_ID))).max_decoding_message_size(REPLY_BYTES_MAX)
    }

    /// The Admin service.
    pub fn admin(&self) -> AdminClient<Called> {
        AdminClient::new(self.called(Some(CLIENT_ID)))
    }

    /// Makes a shard.
    pub async fn new_shard(&self, name: &str) -> u64 {
        let request = wire::NewShardRequest { name: name.into(), ..Default::default() };
        self.storage().new_shard(request).await.unwrap().into_inner().id
    }

    /// Opens a session with a shard.
    pub async fn open_session(&self, shard: u64) -> u64 {
        let header =
            Some(wire::CallHeader { shard_id: shard, epoch: 0, session_id: 0, ..Default::default() });
        let request = wire::OpenSessionRequest { header, label: "a test".into() };
        self.files().open_session(request).await.unwrap().into_inner().session_id
    }
}

async fn run(dir: &tempfile::TempDir, store: &embedded_server::Handle) -> (node::Node, Channel) {
    let args = Args {
        id: Some(NODE_ID.into()),
        data_dir: Some(PathBuf::from(dir.path()).join("node-1")),
        listen: Some("127.0.0.1:0".into()),
        meta: Some(store.address().to_string()),
        shutdown_seconds: Some(5),
        ..Args::default()
    };
    let node = node::Node::start(NodeConfig::load(args).unwrap(), Child::orphan()).await.unwrap();
    let endpoint = node.addresses().endpoints[0].clone();
    let channel = Channel::from_shared(endpoint).unwrap().connect().await.unwrap();
    (node, channel)
}

/// A shard by its id.
pub fn selector(id: u64) -> Option<wire::ShardSelector> {
    Some(wire::ShardSelector { by: Some(wire::shard_selector::By::Id(id)) })
}

/// What happened, from an error's detail.
pub fn reason(status: &Status) -> Reason {
    shardfs_proto::status::from_status(status).reason()
}
