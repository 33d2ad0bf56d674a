//! What is typed, configured or damaged wrongly is refused with words that help, and harms nothing else.

#![allow(clippy::unwrap_used)]

use std::fs::{self, OpenOptions};
use std::net::TcpListener;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use bytes::Bytes;
use shardfs_proto::types::op::{Durability, PutOptions};
use shardfs_proto::types::{Key, Reason, ShardName};
use shardfs_tests::cluster::{bin_dir, eventually};
use shardfs_tests::{Cluster, Options, block_on, mounted, sh};

/// Within this something is told, on a busy machine.
const TOLD_MAX: Duration = Duration::from_secs(60);
/// Values of the shard that is damaged.
const KEYS: usize = 600;

/// A node that must not start; what it said.
fn node_fails(arguments: &[&str]) -> String {
    let output = Command::new("timeout")
        .args(["--kill-after=5", "120"])
        .arg(bin_dir().join("shardfs-node"))
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    refused(&format!("shardfs-node {}", arguments.join(" ")), &output)
}

/// A program that must have failed by itself, without a panic; what it said.
fn refused(what: &str, output: &Output) -> String {
    let said =
        format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    let code = output.status.code();
    assert!(code != Some(0) && code != Some(124) && code != Some(137), "{what}: {code:?}\n{said}");
    assert!(!said.contains("panicked"), "{what}: {said}");
    said
}

#[test]
fn bad_keys_and_names() {
    let cluster = Cluster::shared();
    cluster.shard("bad-names");
    for bad in ["bad-names//a", "bad-names/../a", "bad-names/./a", "/", ""] {
        let said = cluster.cli_fails(&["put", "/etc/hostname", bad]);
        assert!(said.starts_with("error:"), "{bad:?}: {said}");
        assert_eq!(
            cluster.cli_output(&["put", "/etc/hostname", bad]).status.code(),
            Some(2),
            "{bad:?}: a usage error"
        );
    }
    let long = format!("bad-names/{}", "x".repeat(256));
    assert!(cluster.cli_fails(&["put", "/etc/hostname", &long]).contains("255"));
    for bad in ["a/b", "..", ".shardfs", "tab\there"] {
        let said = cluster.cli_fails(&["shard", "create", bad]);
        assert!(said.starts_with("error:"), "{bad:?}: {said}");
    }
    assert!(cluster.cli_fails(&["get", "no-such-shard/k", "-"]).contains("no-such-shard"));
    assert!(cluster.cli_fails(&["put", "/no/such/file", "bad-names/k"]).contains("/no/such/file"));
    let said = cluster.cli_fails(&["shard", "create", "limit", "--limit", "2XB"]);
    assert!(said.contains("2XB"), "{said}");
    assert!(cluster.cli_fails(&["dev", "kill", "node-99"]).contains("node-99"));
}

#[test]
fn bad_flags_and_configuration_of_the_command_line() {
    let cluster = Cluster::shared();
    let config = cluster.root().join("bad.yaml");
    fs::write(&config, "endpoint: [\"http://127.0.0.1:1\"]\n").unwrap();
    let config = config.to_str().unwrap();
    let shardfs = |arguments: &[&str]| {
        let output = Command::new(bin_dir().join("shardfs"))
            .args(arguments)
            .current_dir("/")
            .stdin(Stdio::null())
            .env_remove("SHARDFS_DIR")
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        refused(&arguments.join(" "), &output)
    };
    let said = shardfs(&["--config", config, "ls"]);
    assert!(
        said.contains("endpoint") && said.contains("bad.yaml"),
        "the unknown field and the file are named: {said}"
    );
    assert!(shardfs(&["--config", "/no/such.yaml", "ls"]).contains("/no/such.yaml"));
    assert!(shardfs(&["ls", "--no-such-flag"]).contains("--no-such-flag"));
    assert!(shardfs(&["--endpoints", "nonsense", "ls"]).contains("nonsense"));
    assert!(shardfs(&["--client-id", "a b", "ls"]).contains("a b"));
    assert!(shardfs(&["--dir", "/usr", "ls"]).contains("/usr"));
    assert!(shardfs(&["ls"]).contains("no cluster"));
}

#[test]
fn an_unreachable_cluster_is_said_so() {
    let output = Command::new("timeout")
        .args(["--kill-after=5", "60"])
        .arg(bin_dir().join("shardfs"))
        .args(["--endpoints", "http://127.0.0.1:1", "--deadline", "2", "ls"])
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = refused("ls", &output);
    assert!(said.contains("127.0.0.1:1"), "{said}");
}

#[test]
fn bad_flags_and_configuration_of_a_node() {
    let cluster = Cluster::shared();
    let scratch = cluster.scratch("bad-node");
    let path = |name: &str| scratch.join(name).to_str().unwrap().to_owned();
    fs::write(path("unknown.yaml"), "id: node-9\ndata_dirr: /x\n").unwrap();
    let said = node_fails(&["--config", &path("unknown.yaml")]);
    assert!(said.contains("data_dirr") && said.contains("unknown.yaml"), "{said}");
    fs::write(path("broken.yaml"), "id: [\n").unwrap();
    assert!(node_fails(&["--config", &path("broken.yaml")]).contains("broken.yaml"));
    assert!(node_fails(&["--config", &path("absent.yaml")]).contains("absent.yaml"));
    assert!(node_fails(&["--no-such-flag"]).contains("--no-such-flag"));
    let said = node_fails(&["--id", "node 9", "--data-dir", &path("d"), "--meta", "http://127.0.0.1:1"]);
    assert!(said.contains("node 9"), "{said}");
}

#[test]
fn a_port_in_use_is_named() {
    let cluster = Cluster::shared();
    let scratch = cluster.scratch("port");
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let meta = format!("unix:{}/meta.sock", cluster.settings()["sockets"].as_str().unwrap());
    let data = scratch.to_str().unwrap();
    let said = node_fails(&["--id", "node-9", "--data-dir", data, "--meta", &meta, "--listen", &address]);
    assert!(said.contains(&address), "{said}");
}

#[test]
fn an_id_that_is_taken_is_refused_and_its_node_serves_on() {
    let cluster = Cluster::shared();
    let shard = cluster.shard("taken-id");
    let node = cluster.node("node-1").pid;
    let scratch = cluster.scratch("taken");
    let meta = format!("unix:{}/meta.sock", cluster.settings()["sockets"].as_str().unwrap());
    let data = scratch.to_str().unwrap();
    let said =
        node_fails(&["--id", "node-1", "--data-dir", data, "--meta", &meta, "--listen", "127.0.0.1:0"]);
    assert!(said.contains("node-1 is running already"), "{said}");
    fs::write(shard.join("k"), "v").unwrap();
    assert_eq!(cluster.node("node-1").pid, node);
}

#[test]
fn a_mount_point_that_cannot_be_used_is_explained() {
    let cluster = Cluster::shared();
    let file = cluster.root().join("a-file");
    fs::write(&file, "").unwrap();
    assert!(cluster.cli_fails(&["mount", file.to_str().unwrap()]).contains("a-file"));
    assert!(cluster.cli_fails(&["mount", "/no/such/folder"]).contains("/no/such/folder"));
    let said = cluster.cli_fails(&["umount", cluster.scratch("not-mounted").to_str().unwrap()]);
    assert!(said.contains("not-mounted"), "{said}");
}

#[test]
fn a_stale_mount_is_explained_and_umount_mends_it() {
    let cluster = Cluster::shared();
    cluster.shard("on-second-mount");
    let point = cluster.scratch("second-mount");
    let point_text = point.to_str().unwrap();
    cluster.cli_run(&["mount", point_text]);
    assert!(point.join("on-second-mount").is_dir());
    mounted::kill(&point);
    let shown = cluster.cli_output(&["mount", point_text]);
    if !shown.status.success() {
        let said = refused("mount on a stale mount", &shown);
        assert!(said.contains("umount") && said.contains("second-mount"), "says what to do: {said}");
        cluster.cli_run(&["umount", point_text]);
        cluster.cli_run(&["mount", point_text]);
    }
    assert!(point.join("on-second-mount").is_dir());
    cluster.cli_run(&["umount", point_text]);
    assert_eq!(fs::read_dir(&point).unwrap().count(), 0, "unmounted");
    assert!(cluster.mount().join("on-second-mount").is_dir(), "the other mount is not touched");
}

#[test]
fn a_damaged_sst_names_shard_and_file_and_others_serve_on() {
    let cluster = Cluster::start(&Options { nodes: 1, ..Options::default() });
    let (bad, good) = (cluster.shard("damaged"), cluster.shard("healthy"));
    fs::write(good.join("k"), "fine").unwrap();
    let mut random = fastrand::Rng::with_seed(1);
    // Small contents lie in the inodes' records, so most of the largest SST are data blocks of theirs.
    for number in 0..KEYS {
        let value: Vec<u8> = (0..4000).map(|_| random.u8(..)).collect();
        fs::write(bad.join(format!("k{number}")), &value).unwrap();
    }
    // Closing writes everything into SSTs.
    cluster.cli_run(&["shard", "close", "damaged"]);
    let id = block_on(async {
        cluster.client().shard_by_name(&ShardName::new("damaged").unwrap()).await.unwrap().id
    });
    let folder = cluster.shard_dir("damaged");
    let largest = largest_sst(&folder);
    cluster.cli_run(&["dev", "kill", "node-1", "--signal", "TERM"]);
    let unmounted = !largest.exists();
    if unmounted {
        // A clean stop unmounts: bring it up, and damage the file under the running node before it is read.
        cluster.cli_run(&["dev", "start", "node-1"]);
    }
    let file = OpenOptions::new().read(true).write(true).open(&largest).unwrap();
    let middle = file.metadata().unwrap().len() / 2;
    let mut block = [0u8; 64];
    file.read_exact_at(&mut block, middle).unwrap();
    file.write_all_at(&block.map(|b| !b), middle).unwrap();
    file.sync_all().unwrap();
    drop(file);
    sh("/", "echo 1 >/proc/sys/vm/drop_caches");
    if !unmounted {
        cluster.cli_run(&["dev", "start", "node-1"]);
    }

    let name = largest.file_name().unwrap().to_str().unwrap().to_owned();
    block_on(async {
        let client = cluster.client();
        let mut damaged = 0;
        for number in 0..KEYS {
            if let Err(error) = client.get(id, &Key::new(format!("k{number}")).unwrap()).await {
                assert_eq!((error.reason(), error.shard()), (Reason::Corrupt, Some(id)), "{error}");
                assert!(error.message().contains(&name), "names the file {name}: {error}");
                damaged += 1;
            }
        }
        assert!((1..KEYS / 10).contains(&damaged), "{damaged} of {KEYS} keys: those of one block");
        let healthy = client.shard_by_name(&ShardName::new("healthy").unwrap()).await.unwrap().id;
        let key = Key::new("k2").unwrap();
        client
            .put(healthy, key, Bytes::from_static(b"v"), PutOptions::default(), Durability::Sync)
            .await
            .unwrap();
    });
    let errors: Vec<i32> =
        (0..KEYS).filter_map(|n| fs::read(bad.join(format!("k{n}"))).err()?.raw_os_error()).collect();
    assert!(!errors.is_empty() && errors.iter().all(|e| *e == libc::EIO), "{errors:?}");
    assert_eq!(fs::read(good.join("k")).unwrap(), b"fine");
    let output = cluster.cli_output(&["fsck", "--read-data", "damaged"]);
    let said = refused("fsck of a damaged shard", &output);
    assert!(said.contains(&name), "{said}");
    cluster.assert_clean("healthy");
    // Who looks at the cluster as a whole is told as well.
    let told = format!("shard {id} is damaged");
    eventually(TOLD_MAX, || {
        let status = cluster.cli_run(&["status"]);
        let is_told = status.contains("IN TROUBLE") && status.contains(&told) && status.contains(&name);
        if is_told { Ok(()) } else { Err(status) }
    });
    eventually(TOLD_MAX, || {
        let nodes = fs::read_to_string(cluster.mount().join(".shardfs/status")).map_err(|e| e.to_string())?;
        if nodes.contains("damaged_shards") && nodes.contains(&name) { Ok(()) } else { Err(nodes) }
    });
}

fn largest_sst(folder: &Path) -> std::path::PathBuf {
    let files = fs::read_dir(folder).unwrap().map(|e| e.unwrap().path());
    let ssts = files.filter(|p| p.extension().is_some_and(|e| e == "sst"));
    ssts.max_by_key(|p| fs::metadata(p).unwrap().len()).expect("a closed shard has SSTs")
}
