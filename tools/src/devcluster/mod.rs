//! A whole cluster on one machine: node processes and a mount, supervised by one process that also holds the
//! metadata store.
//!
//! | file | owns |
//! |---|---|
//! | [`state`] | where things lie in the cluster's folder; the settings and the list of processes, on disk |
//! | [`process`] | processes by (pid, start time, boot): start, watch, signal, never a wrong one |
//! | [`control`] | the protocol on the supervisor's socket; [`listen`]: its side of it |
//! | [`housekeeping`] | logs that stay bounded, ports that stay the same |
//! | [`supervisor`] | the one loop that starts, watches and restarts |
//! | [`lock`] | one supervisor a folder |
//! | [`meta`] | the metadata store and what it is filled with |
//! | [`member`] | one supervised process: its command line, its states, its backoff |
//! | [`cleanup`] | mounts and loop devices that a killed process left behind: only this cluster's |
//! | [`launch`] | `dev up` and `dev down` from the outside |
//!
//! Invariants:
//! - One supervisor a folder: it holds a lock on `run/lock` for its life.
//! - Nodes and the mount are processes of their own and outlive a supervisor that is killed. The next `dev up` adopts
//!   those that still run the same program with the same arguments, so that a mount with open files survives, and replaces the
//!   others. Only `dev down` ends them.
//! - A process is identified by pid, start time and boot id; a reused pid is never signalled.
//! - What is unmounted or detached by force lies inside the cluster's folder, or is the dead mount that it made.

pub mod cleanup;
pub mod control;
pub mod housekeeping;
pub mod launch;
pub mod listen;
pub mod lock;
pub mod member;
pub mod meta;
pub mod process;
pub mod state;
pub mod supervisor;
