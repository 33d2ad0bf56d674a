//! shardfsd: a ShardFS cluster as a mount.
//!
//! `fuse`, `errno` and `session` are the only modules that know fuser: they decode, call and reply. What
//! the mount means stands in `fs`, which calls the cluster through the client of shardfs-proto and is
//! tested without a kernel.

pub mod errno;
pub mod failure;
pub mod fs;
pub mod fuse;
pub mod handles;
pub mod metrics;
