//! What the end-to-end tests share: real clusters in temporary folders, real mounts, real programs.
//!
//! - [`cluster`]: starts `shardfs dev up`, and gives its mount, its command line and a client;
//! - [`etcd`]: a metadata store of its own for a cluster;
//! - [`history`], [`load`]: what was done to a shard, and whether what is found later is a prefix of it;
//! - [`disk`]: a disk for volumes whose content can be copied at one moment, and ways to lose it;
//! - [`guard`]: takes a cluster down again, whatever becomes of the test;
//! - [`linear`]: whether a history of operations is linearisable;
//! - [`network`]: nodes in network namespaces, whose links can be cut;
//! - [`run`]: other programs, with deadlines and readable failures;
//! - [`tree`]: trees of files that look like real ones;
//! - [`process`]: memory and identity of processes.
//!
//! Panics are how tests fail: nothing here returns an error that a test would only unwrap.

#![allow(clippy::unwrap_used)]

pub mod cluster;
pub mod disk;
pub mod etcd;
pub mod guard;
pub mod history;
pub mod linear;
pub mod load;
pub mod network;
pub mod process;
pub mod run;
pub mod tree;

pub use cluster::{Cluster, Options, block_on};
pub use run::{Shell, sh, sh_fails};
