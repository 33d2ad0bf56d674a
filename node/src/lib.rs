//! The ShardFS storage node: it attaches volumes, keeps shards, serves gRPC, and publishes itself in the
//! metadata store.
//!
//! Arrows: `rpc -> {catalog, shard}`, `catalog -> {cluster, shard, volume}`, `shard -> store`. No file
//! operation calls the metadata store.

pub mod catalog;
pub mod cluster;
pub mod config;
pub mod http;
pub mod metrics;
pub mod net;
pub mod node;
pub mod parent;
pub mod rpc;
pub mod shard;
pub mod volume;

pub use node::{Node, run};
