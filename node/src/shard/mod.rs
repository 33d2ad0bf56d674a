//! One shard: a directory tree with its files, on one store, with one writer.
//!
//! See ARCHITECTURE.md, "Inside a shard". Arrows: `manager -> shard -> executor -> ops -> txn -> store`;
//! `read`, `list` and `check` build on a [`ReadView`] and never write.

pub mod check;
pub mod chunk;
pub mod keys;
pub mod list;
pub mod mem;
pub mod read;
pub mod records;
pub mod rocks;
pub mod store;
pub mod session;
pub mod txn;
mod cache;
mod ops;
mod view;

pub use view::ReadView;
