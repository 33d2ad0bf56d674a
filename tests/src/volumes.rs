//! Volumes of a cluster, as its command line lists them.

use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::cluster::{Cluster, eventually};

/// How long a volume may take to be made, served, or let go of.
pub const SERVED_MAX: Duration = Duration::from_secs(120);

/// A volume, as it is listed.
pub fn find(cluster: &Cluster, id: &str) -> Option<Value> {
    let volumes = cluster.cli_json(&["volume", "list"]);
    volumes.as_array().unwrap().iter().find(|volume| volume["id"] == id).cloned()
}

/// Waits until a volume is served, and has no trouble.
pub fn is_served(cluster: &Cluster, id: &str) -> Value {
    eventually(SERVED_MAX, || {
        let volume = find(cluster, id).ok_or("not there")?;
        let well = volume["served"].is_object() && volume["served"]["trouble"].is_null();
        if well { Ok(volume) } else { Err(format!("{volume}")) }
    })
}

/// Whether the nodes may enlarge a filesystem that is mounted; says so if not. Containers often may not, `make test-vm` may.
pub fn may_enlarge() -> bool {
    const CAP_SYS_RESOURCE: u32 = 24;
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:")).unwrap();
    let may = u64::from_str_radix(effective.trim(), 16).unwrap() & (1 << CAP_SYS_RESOURCE) != 0;
    if !may {
        eprintln!("left out: enlarging needs CAP_SYS_RESOURCE (`make test-vm` has it)");
    }
    may
}
