//! Ports for programs that are told where to listen.

use std::collections::BTreeSet;
use std::net::TcpListener;
use std::sync::Mutex;

/// Below the ports that the kernel gives to connections: a port must be free again when a program that listened there is started anew.
const PORTS: std::ops::Range<u16> = 10_240..32_000;

/// A port of the local host where nobody listens, and that nobody else in this program was given.
pub fn free() -> u16 {
    static GIVEN: Mutex<BTreeSet<u16>> = Mutex::new(BTreeSet::new());
    loop {
        let port = fastrand::u16(PORTS);
        if TcpListener::bind(("127.0.0.1", port)).is_ok() && GIVEN.lock().unwrap().insert(port) {
            return port;
        }
    }
}
