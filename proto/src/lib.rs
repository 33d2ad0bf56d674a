//! The ShardFS wire contract, domain types and client.
//!
//! Three layers that never mix: generated wire types ([`wire`]), domain types ([`types`]) whose values
//! are valid by construction, and the one conversion between them ([`convert`], [`status`]), which is
//! where wire data is validated. [`client`] is the only client: routing, retries, exactly-once sessions.

pub mod client;
pub mod convert;
pub mod status;
pub mod types;

/// Generated code: messages, gRPC clients and servers.
pub mod wire {
    #[allow(missing_docs, clippy::all)]
    mod generated {
        tonic::include_proto!("shardfs.v1");
    }
    pub use generated::*;

    /// The metadata store's protocol.
    #[allow(missing_docs, clippy::all)]
    pub mod meta {
        tonic::include_proto!("shardfs.meta.v1");
    }

    /// The compiled descriptors of all services, for gRPC reflection.
    pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("shardfs_descriptor");

    /// The gRPC metadata entry that says for which client id a call is made.
    pub const CLIENT_ID_METADATA: &str = "shardfs-client-id";
}
