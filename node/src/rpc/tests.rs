//! The parts of the services that need no cluster.
