//! The ShardFS command line as a library: `main.rs` parses and wires, everything else is here.
//!
//! - [`cli`]: what can be typed; [`cmd`]: one file a command.
//! - [`context`]: how a command finds its cluster; [`devcluster`]: a whole cluster on one machine.
//! - [`doctor`]: whether a machine and its devices are fit.
//! - [`failure`]: the one error of the command line, with a hint and an exit code; [`output`]: what people and
//!   programs read.
//!
//! Talks to a cluster only through `shardfs_proto::client`; knows nothing of wire types.

pub mod cli;
pub mod cmd;
pub mod context;
pub mod devcluster;
pub mod doctor;
pub mod failure;
pub mod meta_flags;
pub mod output;
pub mod paths;
pub mod size;
pub mod system;
