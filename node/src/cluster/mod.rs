//! What the nodes know about each other: the metadata store and the records in it.
//!
//! `store` is the trait, `embedded` and `embedded_server` its implementation for one machine, `etcd` the one for
//! many; `connect` makes one from an address. `records` is what is kept in it, `view` a watched copy in memory,
//! `heartbeat` how nodes show that they live and `lease` what follows from it, `plan` who should serve what, `elect`
//! how that is made so, `bootstrap` how a cluster begins and ends. Nothing here knows shards' content, volumes' devices
//! or the gRPC services of ShardFS itself.

pub mod bootstrap;
pub mod connect;
pub mod elect;
pub mod embedded;
pub mod embedded_server;
pub mod etcd;
pub mod heartbeat;
pub mod lease;
pub mod pins;
pub mod plan;
pub mod records;
mod retry;
pub mod store;
pub mod view;
mod wire;
