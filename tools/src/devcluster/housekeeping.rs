//! Small upkeep of a dev cluster: logs that stay bounded, ports that stay the same.

use std::fs::File;
use std::path::Path;

use super::member::MOUNT;
use super::state::{Processes, Settings};

/// Bytes of a log before it is moved aside (to NAME.log.1, over the previous one).
const LOG_BYTES_MAX: u64 = 32 << 20;
/// Ports to choose from: below those that the kernel gives to connections, of which one could have a node's while it is down.
const PORTS: std::ops::Range<u16> = 10_240..32_000;
/// How many of them are tried before any port will do.
const PORTS_TRIED_MAX: usize = 100;

/// Keeps a log bounded: its content goes to NAME.log.1 and the file, which its writer appends to, is emptied. A
/// line written in between is lost.
pub fn move_log(log: &Path) -> std::io::Result<()> {
    match std::fs::metadata(log) {
        Ok(m) if m.len() > LOG_BYTES_MAX => {}
        Ok(_) => return Ok(()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    }
    std::fs::copy(log, log.with_extension("log.1"))?;
    File::options().write(true).open(log)?.set_len(0)
}

/// A removal of what is not there is done.
pub fn absent_is_fine(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Ports of processes that run keep; the others are tried, and replaced if something else has taken them.
pub fn choose_ports(settings: &mut Settings, old: &Processes) {
    let free = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
    // Held until all are chosen, so that none is given twice.
    let mut held = Vec::new();
    let mut any = || {
        let listen = |port: u16| std::net::TcpListener::bind(("127.0.0.1", port)).ok();
        let listener = (0..PORTS_TRIED_MAX).find_map(|_| listen(fastrand::u16(PORTS))).or_else(|| listen(0));
        // 0 when the machine has none left: the process then takes any, or says so itself.
        let port = listener.as_ref().and_then(|l| l.local_addr().ok()).map_or(0, |a| a.port());
        held.extend(listener);
        port
    };
    let nodes = settings.node_names();
    let runs = |name: &str| old.members.get(name).is_some_and(|r| r.identity.is_running());
    let ports = &mut settings.ports;
    let wanted = nodes
        .iter()
        .flat_map(|n| [(true, n.as_str()), (false, n.as_str())])
        .chain([(false, MOUNT)])
        .collect::<Vec<_>>();
    for (grpc, name) in wanted {
        let map = if grpc { &mut ports.grpc } else { &mut ports.http };
        let keep = map.get(name).is_some_and(|port| *port != 0 && (runs(name) || free(*port)));
        if !keep {
            map.insert(name.to_owned(), any());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devcluster::launch::{self, Wanted};
    use crate::devcluster::state::Layout;

    #[test]
    fn ports_are_kept_and_differ() {
        let layout = Layout::new(Path::new("/srv/c"));
        let mut settings = launch::plan(&layout, None, &Wanted::default(), true).unwrap();
        choose_ports(&mut settings, &Processes::default());
        let mut all: Vec<u16> =
            settings.ports.grpc.values().chain(settings.ports.http.values()).copied().collect();
        assert_eq!(all.len(), 7, "3 nodes with two each, the mount with one");
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), 7);
        let first = settings.ports.clone();
        let taken = std::net::TcpListener::bind(("127.0.0.1", first.grpc["node-2"])).unwrap();
        choose_ports(&mut settings, &Processes::default());
        assert_ne!(settings.ports.grpc["node-2"], first.grpc["node-2"], "somebody else listens there");
        drop(taken);
        assert_eq!(settings.ports.grpc["node-1"], first.grpc["node-1"]);
    }

    #[test]
    fn long_logs_are_moved_aside() {
        let temp = tempfile::tempdir().unwrap();
        let log = temp.path().join("node-1.log");
        move_log(&log).unwrap();
        std::fs::write(&log, "short").unwrap();
        move_log(&log).unwrap();
        assert_eq!(std::fs::read(&log).unwrap(), b"short");
        File::options().write(true).open(&log).unwrap().set_len(LOG_BYTES_MAX + 1).unwrap();
        move_log(&log).unwrap();
        assert_eq!(std::fs::metadata(&log).unwrap().len(), 0);
        assert_eq!(std::fs::metadata(temp.path().join("node-1.log.1")).unwrap().len(), LOG_BYTES_MAX + 1);
    }
}
