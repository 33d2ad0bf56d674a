//! The ShardFS storage node: it attaches volumes, keeps shards, serves gRPC, and publishes itself in the
//! metadata store.
//!
//! Arrows: `rpc -> {catalog, shard}`, `catalog -> {cluster, shard, volume}`, `shard -> store`. No file
//! operation calls the metadata store.

pub mod catalog;
pub mod clouds;
pub mod cluster;
pub mod config;
pub mod control;
pub mod http;
pub mod logging;
pub mod metrics;
pub mod net;
pub mod node;
pub mod notify;
pub mod parent;
pub mod reload;
pub mod rpc;
pub mod run;
pub mod shard;
pub mod volume;

pub use node::Node;
pub use run::run;
