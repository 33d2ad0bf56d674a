//! Each invariant broken on purpose, and found.
