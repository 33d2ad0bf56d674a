//! Volumes that are added to a running cluster. A loop device stands for a whole block device; it has no reservations, which
//! shows: such a volume is refused unless it is allowed to be without. `make test-vm` has the rest.

#![allow(clippy::unwrap_used)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use serde_json::Value;
use shardfs_tests::cluster::eventually;
use shardfs_tests::{Cluster, Options, sh};

/// How long a volume may take to be made and served.
const SERVED_MAX: Duration = Duration::from_secs(120);

/// A loop device over a file, detached when it is dropped: after the cluster that uses it.
struct Loop(PathBuf);

impl Loop {
    fn new(folder: &Path, name: &str) -> Loop {
        File::create(folder.join(name)).unwrap().set_len(96 << 20).unwrap();
        Loop(sh(folder, &format!("losetup --find --show {name}")).trim().into())
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let detached = Command::new("losetup").arg("--detach").arg(&self.0).status();
        if !detached.is_ok_and(|status| status.success()) {
            eprintln!("cleaning up: {} stays", self.0.display());
        }
    }
}

fn volume(cluster: &Cluster, id: &str) -> Value {
    let volumes = cluster.cli_json(&["volume", "list"]);
    let found = volumes.as_array().unwrap().iter().find(|volume| volume["id"] == id);
    found.unwrap_or_else(|| panic!("{id} in {volumes:#}")).clone()
}

fn is_served(cluster: &Cluster, id: &str) {
    eventually(SERVED_MAX, || {
        let served = volume(cluster, id)["served"].clone();
        let well = served.is_object() && served["trouble"].is_null();
        if well { Ok(()) } else { Err(format!("{id}: {served}")) }
    });
}

#[test]
fn devices_and_files_become_volumes_of_a_running_cluster() {
    let folder = tempfile::tempdir_in("/var/tmp").unwrap();
    let (device, refused) = (Loop::new(folder.path(), "one"), Loop::new(folder.path(), "two"));
    let cluster = Cluster::start(&Options { nodes: 2, ..Options::default() });
    let device_path = device.0.to_str().unwrap();

    let add = ["volume", "add", "dev-1", "--source", device_path, "--nodes", "node-1", "--allow-unfenced"];
    cluster.cli_run(&add);
    is_served(&cluster, "dev-1");
    assert_eq!(volume(&cluster, "dev-1")["served"]["device"], device_path);
    // To say it twice is harmless; to say something else is an error.
    cluster.cli_run(&add);
    let other = cluster.cli_fails(&[
        "volume",
        "add",
        "dev-1",
        "--source",
        "/dev/null",
        "--nodes",
        "node-1",
        "--allow-unfenced",
    ]);
    assert!(other.contains("choose another id"), "{other}");

    let label = sh("/", &format!("dumpe2fs -h {device_path} 2>/dev/null | grep 'volume name'"));
    assert!(label.contains("sfs-dev-1"), "{label}");

    let refused_path = refused.0.to_str().unwrap();
    cluster.cli_run(&["volume", "add", "dev-2", "--source", refused_path, "--nodes", "node-2"]);
    let trouble = eventually(SERVED_MAX, || {
        let said = volume(&cluster, "dev-2")["served"]["trouble"].as_str().map(str::to_owned);
        said.filter(|said| said.contains("no working fence")).ok_or("no trouble yet".to_owned())
    });
    assert!(trouble.contains("allow_unfenced"), "{trouble}");
    assert_eq!(sh(folder.path(), "tr -d '\\0' <two | wc -c").trim(), "0", "it was not formatted");

    let image = folder.path().join("three");
    let image = image.to_str().unwrap();
    cluster.cli_run(&[
        "volume",
        "add",
        "file-1",
        "--kind",
        "loop",
        "--source",
        image,
        "--size",
        "64MiB",
        "--nodes",
        "node-2,node-1",
    ]);
    is_served(&cluster, "file-1");
    cluster.cli_run(&["volume", "promote", "file-1", "node-1"]);
    is_served(&cluster, "file-1");
    assert_eq!(volume(&cluster, "file-1")["primary"], "node-1");

    for (arguments, said) in [
        (&["x-1", "--source", "/x", "--nodes", "node-9"][..], "no node node-9"),
        (&["x-1", "--source", "/x", "--nodes", "node-1,node-1"], "twice"),
        (&["x-1", "--source", "x", "--nodes", "node-1"], "absolute"),
        (&["x-1", "--source", "/x", "--nodes", "node-1", "--size", "1GiB"], "size 0"),
    ] {
        let failure = cluster.cli_fails(&[&["volume", "add"], arguments].concat());
        assert!(failure.contains(said), "{failure}");
    }
    // Its devices are free again, and can be detached.
    drop(cluster);
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    assert!(!mounts.contains(&format!("{device_path} ")), "{mounts}");
}
