//! What the end-to-end tests share: real clusters in temporary folders, real mounts, real programs.
//!
//! - [`aws`]: clusters whose nodes are instances of an emulated AWS;
//! - [`cluster`]: starts `shardfs dev up`, and gives its mount, its command line and a client;
//! - [`ec2`]: an emulator of Amazon EC2: volumes that instances have as devices;
//! - [`etcd`]: a metadata store of its own for a cluster;
//! - [`history`], [`load`]: what was done to a shard, and whether what is found later is a prefix of it;
//! - [`differential`]: the same operations on a mount and on a local filesystem;
//! - [`disk`]: a disk for volumes whose content can be copied at one moment, and ways to lose it;
//! - [`failovers`]: work that goes on while the nodes die that it is done on;
//! - [`guard`]: takes a cluster down again, whatever becomes of the test;
//! - [`linear`]: whether a history of operations is linearisable;
//! - [`network`]: nodes in network namespaces, whose links can be cut;
//! - [`ports`]: where programs may listen;
//! - [`postgres`]: a PostgreSQL whose data is on a mount;
//! - [`programs`]: which version's programs a cluster runs;
//! - [`run`]: other programs, with deadlines and readable failures;
//! - [`volumes`]: volumes as they are listed;
//! - [`tree`]: trees of files that look like real ones;
//! - [`process`]: memory and identity of processes.
//!
//! Panics are how tests fail: nothing here returns an error that a test would only unwrap.

#![allow(clippy::unwrap_used)]

pub mod aws;
pub mod cluster;
pub mod differential;
pub mod disk;
pub mod ec2;
pub mod etcd;
pub mod failovers;
pub mod guard;
pub mod history;
pub mod linear;
pub mod load;
pub mod mounted;
pub mod network;
pub mod ports;
pub mod postgres;
pub mod process;
pub mod programs;
pub mod run;
pub mod tree;
pub mod volumes;

pub use cluster::{Cluster, Options, block_on};
pub use run::{Shell, sh, sh_fails};
