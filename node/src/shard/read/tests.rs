//! Reads against a small tree in memory.
