//! Shards on both stores: against a reference model, and one behaviour at a time.

#[cfg(feature = "failpoints")]
mod failpoints;
mod harness;
mod limits;
mod manager;
mod model;
mod posix;
mod random;
mod sessions;
mod space;
mod speed;
mod values;
mod views;
