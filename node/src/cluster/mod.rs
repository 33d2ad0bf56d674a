//! What the nodes know about each other: the metadata store and the records in it.
//!
//! `store` is the trait, `embedded` and `embedded_server` its first implementation, `records` what is
//! kept in it, `view` a watched copy in memory, `heartbeat` how nodes show that they live and `lease` what
//! follows from it, `plan` who should serve what, `elect` how that is
//! made so, `bootstrap` how a cluster begins. Nothing here knows shards' content, volumes' devices or the gRPC services of
//! ShardFS itself.

pub mod bootstrap;
pub mod elect;
pub mod embedded;
pub mod embedded_server;
pub mod heartbeat;
pub mod lease;
pub mod plan;
pub mod records;
pub mod store;
pub mod view;
mod wire;
