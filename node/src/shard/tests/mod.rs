//! Shards on both stores: against a reference model, and one behaviour at a time.

mod acls;
mod copies;
#[cfg(feature = "failpoints")]
mod failpoints;
mod harness;
mod limits;
mod locks;
mod manager;
mod model;
mod posix;
mod random;
mod sessions;
mod space;
mod sparse;
mod speed;
mod values;
mod views;
