//! A real cluster in a temporary folder: `shardfs dev up` with node processes, volumes and a mount.
//!
//! Layout of the folder: `c/` is the cluster's own (`--dir`), `mnt/` the mount point; everything else
//! belongs to tests. Tests share one cluster a test program where they can ([`Cluster::shared`]) and keep
//! out of each other's way by shards of their own.

use std::fs;
use std::future::Future;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use serde_json::Value;
use shardfs_proto::client::{Client, ClientConfig};
use shardfs_proto::types::{ClientId, Location, NodeId, ShardName, VolumeId};

use crate::etcd::Etcd;
use crate::guard::Guard;
use crate::mounted;
use crate::network::Network;
use crate::process::{self, Process};
use crate::programs::{MOUNT, Programs};
use crate::run::described;

/// How long a member that is stopped may take to end, and whatever else is on its way to be so.
const END_MAX: Duration = Duration::from_secs(120);
/// How long `dev up` may take.
const UP_MAX: Duration = Duration::from_secs(240);

/// What `dev up` is asked for.
#[derive(Clone, Debug)]
pub struct Options {
    /// Node processes.
    pub nodes: u32,
    /// `loop` or `dir`.
    pub volumes: &'static str,
    /// Bytes of a loop volume; `None`: the default of `dev up`.
    pub volume_bytes: Option<u64>,
    /// Further variables for `dev up` and what it starts.
    pub environment: Vec<(&'static str, String)>,
}

impl Default for Options {
    fn default() -> Options {
        Options { nodes: 3, volumes: "loop", volume_bytes: None, environment: Vec::new() }
    }
}

/// A running cluster.
#[derive(Debug)]
pub struct Cluster {
    root: PathBuf,
    guard: Option<Guard>,
    /// There is no cluster: the "mount" is a folder of a local file system.
    control: bool,
    /// Its nodes are in network namespaces of their own.
    network: Option<Network>,
    /// Its members may be of different versions.
    programs: Option<Programs>,
}

/// When set, [`Cluster::shared`] is a plain folder: `posix` and `real_use` then show what the local file
/// system does, as a control of the tests themselves. Tests that need more than a mount fail (and, on ext4,
/// the one that stores an attribute of 64 KiB).
const CONTROL_VARIABLE: &str = "SHARDFS_TEST_CONTROL";

impl Cluster {
    /// The cluster that all tests of this program share; taken down when the program ends.
    pub fn shared() -> &'static Cluster {
        static SHARED: OnceLock<Cluster> = OnceLock::new();
        SHARED.get_or_init(|| {
            if std::env::var_os(CONTROL_VARIABLE).is_some() {
                return Cluster::control();
            }
            let mut cluster = Cluster::start(&Options::default());
            cluster.guard.take().expect("just started").at_exit();
            cluster
        })
    }

    fn control() -> Cluster {
        let root = temporary_root();
        fs::create_dir(root.join("mnt")).unwrap();
        Guard::start(&root, Path::new("/nonexistent"), Path::new("")).at_exit();
        Cluster { root, guard: None, control: true, network: None, programs: None }
    }

    /// A cluster of the test's own; taken down when it is dropped.
    pub fn start(options: &Options) -> Cluster {
        let (cluster, output) = Cluster::try_start(options, &[]);
        assert!(output.status.success(), "{}", described("shardfs dev up", &output));
        cluster
    }

    /// Tries to start one, with further arguments for `dev up`.
    pub fn try_start(options: &Options, arguments: &[&str]) -> (Cluster, Output) {
        let cluster = Cluster::prepare();
        let output = cluster.up(options, arguments);
        (cluster, output)
    }

    /// The folder, and the guard over it; nothing runs yet.
    fn prepare() -> Cluster {
        let root = temporary_root();
        fs::create_dir(root.join("mnt")).unwrap();
        let guard = Guard::start(&root, &bin_dir(), &bin_dir().join("../test-logs"));
        Cluster { root, guard: Some(guard), control: false, network: None, programs: None }
    }

    /// A cluster whose nodes are in network namespaces of their own, with links that can be cut, on an etcd of three members.
    pub fn start_in_namespaces(options: &Options) -> (Cluster, Etcd) {
        let mut cluster = Cluster::prepare();
        let network = Network::new(&cluster.root, options.nodes);
        let etcd = Etcd::start_members(3, &network.store_hosts());
        network.wrap_programs(&bin_dir(), &etcd);
        cluster.network = Some(network);
        let output = cluster.up(options, &["--meta", &etcd.address()]);
        assert!(output.status.success(), "{}", described("shardfs dev up", &output));
        (cluster, etcd)
    }

    /// A cluster whose nodes and mount run the programs in `bin`, until others are chosen for some of them.
    pub fn start_with_programs(options: &Options, arguments: &[&str], bin: &Path) -> Cluster {
        let mut cluster = Cluster::prepare();
        cluster.programs = Some(Programs::new(&cluster.root, options.nodes, bin));
        let output = cluster.up(options, arguments);
        assert!(output.status.success(), "{}", described("shardfs dev up", &output));
        cluster
    }

    /// Stops a member (`node-1`, `mount`) in order and starts it with the programs in `bin`.
    pub fn restart_with(&self, member: &str, bin: &Path) {
        let old = if member == MOUNT { self.daemon() } else { self.node(member) };
        self.cli_run(&["dev", "kill", member, "--signal", "TERM"]);
        eventually(END_MAX, || if old.is_alive() { Err(format!("{member} runs")) } else { Ok(()) });
        self.programs.as_ref().expect("the cluster was started with programs").choose(member, bin);
        self.cli_run(&["dev", "start", member]);
    }

    /// The version that each node says it has, in order of their ids.
    pub fn versions(&self) -> Vec<String> {
        let nodes = self.cli_json(&["node", "list"]);
        let nodes = nodes.as_array().expect("a list of nodes");
        nodes.iter().map(|node| node["version"].as_str().expect("a version").to_owned()).collect()
    }

    /// Waits until every node serves what it should.
    pub fn in_order(&self, within: Duration) {
        eventually(within, || {
            let status = self.cli_json(&["status"]);
            if status["healthy"] == true { Ok(()) } else { Err(status["troubles"].to_string()) }
        });
    }

    /// The links of its nodes.
    pub fn network(&self) -> &Network {
        self.network.as_ref().expect("the cluster was started in namespaces")
    }

    /// `dev up`, also of a cluster that was taken down before.
    pub fn up(&self, options: &Options, arguments: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        let seconds = patient(UP_MAX).as_secs().to_string();
        command.args(["--kill-after=5", &seconds]).arg(bin_dir().join("shardfs")).args(["dev", "up"]);
        command.arg("--dir").arg(self.dir()).arg("--mount").arg(self.mount());
        command.args(["--nodes", &options.nodes.to_string(), "--volumes", options.volumes]);
        if let Some(bytes) = options.volume_bytes {
            command.args(["--volume-size", &bytes.to_string()]);
        }
        command.args(arguments).envs(options.environment.iter().map(|(name, value)| (name, value)));
        if let Some(network) = &self.network {
            command.envs(network.programs());
        }
        if let Some(programs) = &self.programs {
            command.envs(programs.environment());
        }
        self.finish(command)
    }

    /// The folder that holds everything of this cluster and test.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The cluster's own folder.
    pub fn dir(&self) -> PathBuf {
        self.root.join("c")
    }

    /// The mount point.
    pub fn mount(&self) -> PathBuf {
        self.root.join("mnt")
    }

    /// A folder on the local disk, for what is compared with the mount.
    pub fn scratch(&self, name: &str) -> PathBuf {
        let path = self.root.join(name);
        fs::create_dir_all(&path).unwrap();
        path
    }

    /// Makes a shard by `mkdir` and returns its folder on the mount.
    pub fn shard(&self, name: &str) -> PathBuf {
        let path = self.mount().join(name);
        fs::create_dir(&path).unwrap_or_else(|e| panic!("mkdir {}: {e}", path.display()));
        path
    }

    /// The command line, pointed at this cluster. No terminal, no input, no colours.
    pub fn cli(&self) -> Command {
        self.cli_of(&bin_dir())
    }

    /// The same of the programs in another folder.
    pub fn cli_of(&self, bin: &Path) -> Command {
        let mut command = Command::new(bin.join("shardfs"));
        command.arg("--dir").arg(self.dir()).stdin(Stdio::null()).env("NO_COLOR", "1");
        command
    }

    /// Runs a command of the command line, whatever its outcome.
    pub fn cli_output(&self, arguments: &[&str]) -> Output {
        let mut command = match &self.network {
            // Its nodes have no unix sockets, by which `--dir` would reach them.
            Some(_) if arguments.first() != Some(&"dev") => {
                let mut command = Command::new(bin_dir().join("shardfs"));
                command.args(["--endpoints", &self.endpoints().join(",")]).env("NO_COLOR", "1");
                command
            }
            _ => self.cli(),
        };
        command.args(arguments);
        self.finish(command)
    }

    /// Runs a command that must succeed; its standard output.
    pub fn cli_run(&self, arguments: &[&str]) -> String {
        let output = self.cli_output(arguments);
        assert!(
            output.status.success(),
            "{}",
            described(&format!("shardfs {}", arguments.join(" ")), &output)
        );
        String::from_utf8(output.stdout).expect("the command line prints UTF-8")
    }

    /// Runs a command that must fail; what it says on standard error.
    pub fn cli_fails(&self, arguments: &[&str]) -> String {
        let output = self.cli_output(arguments);
        assert!(
            !output.status.success(),
            "{}",
            described(&format!("should have failed: shardfs {}", arguments.join(" ")), &output)
        );
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!said.contains("panicked"), "{said}");
        said
    }

    /// Runs a command with `--json`; what it printed.
    pub fn cli_json(&self, arguments: &[&str]) -> Value {
        let mut all = arguments.to_vec();
        all.push("--json");
        let text = self.cli_run(&all);
        serde_json::from_str(&text).unwrap_or_else(|e| panic!("shardfs {}: {e}\n{text}", all.join(" ")))
    }

    /// A client for client id `default`; to be made inside the runtime that uses it.
    pub fn client(&self) -> Client {
        self.client_as("default")
    }

    /// A client for another client id.
    pub fn client_as(&self, client_id: &str) -> Client {
        Client::new(ClientConfig::new(self.endpoints(), ClientId::new(client_id).unwrap())).unwrap()
    }

    /// What `dev up` remembers of the cluster.
    pub fn settings(&self) -> Value {
        read_json(&self.dir().join("cluster.json"))
    }

    /// The unix socket of every node; its TCP address if it is in a namespace.
    pub fn endpoints(&self) -> Vec<String> {
        if let Some(network) = &self.network {
            return network.endpoints();
        }
        let settings = self.settings();
        let sockets = settings["sockets"].as_str().expect("a folder of sockets").to_owned();
        let nodes = settings["nodes"].as_u64().expect("a number of nodes");
        (1..=nodes).map(|n| format!("unix:{sockets}/node-{n}.sock")).collect()
    }

    /// The TCP address of every node, `127.0.0.1:PORT`.
    pub fn tcp_addresses(&self) -> Vec<String> {
        let settings = self.settings();
        let ports = settings["ports"]["grpc"].as_object().expect("ports by node").clone();
        ports.values().map(|port| format!("127.0.0.1:{port}")).collect()
    }

    /// The HTTP address of a process (`node-1`, `mount`).
    pub fn http_address(&self, name: &str) -> String {
        format!("127.0.0.1:{}", self.settings()["ports"]["http"][name])
    }

    /// The node processes, not their parents, in order of their ids: those that are alive.
    pub fn nodes(&self) -> Vec<Process> {
        let mut nodes = process::naming(&self.dir());
        nodes.retain(|p| p.program() == "shardfs-node" && !p.has_children());
        let mut nodes = process::without_doubles(nodes);
        nodes.sort_by_key(|p| p.arguments.iter().find(|a| a.starts_with("node-")).cloned());
        nodes
    }

    /// The process of one node.
    pub fn node(&self, id: &str) -> Process {
        // One that was killed may not be gone when the next one is there.
        eventually(END_MAX, || {
            let mut nodes = self.nodes();
            nodes.retain(|p| p.arguments.iter().any(|a| a == id));
            match &nodes[..] {
                [node] => Ok(node.clone()),
                _ => Err(format!("processes of {id}: {nodes:?}")),
            }
        })
    }

    /// Stops a node's processes, as a machine that hangs; answers once they stand still, so that nothing is answered any more.
    pub fn freeze(&self, node: &str) {
        let process = self.node(node);
        self.cli_run(&["dev", "kill", node, "--signal", "STOP"]);
        eventually(END_MAX, || if process.is_stopped() { Ok(()) } else { Err(format!("{node} runs on")) });
    }

    /// The daemon that serves the mount.
    pub fn daemon(&self) -> Process {
        // A test may have mounts of its own besides.
        eventually(END_MAX, || match &process::without_doubles(mounted::processes(&self.mount()))[..] {
            [daemon] => Ok(daemon.clone()),
            daemons => Err(format!("daemons: {daemons:?}")),
        })
    }

    /// The node that serves a shard.
    pub fn primary_of(&self, shard: &str) -> String {
        self.served_at(shard).0.as_str().to_owned()
    }

    /// Where its primary has a shard's volume mounted.
    pub fn volume_mount(&self, shard: &str) -> PathBuf {
        let (node, volume) = self.served_at(shard);
        self.dir().join("nodes").join(node.as_str()).join("volumes").join(volume.as_str())
    }

    /// The backing file of a shard's loop volume.
    pub fn volume_source(&self, shard: &str) -> PathBuf {
        self.dir().join("volumes").join(format!("{}.img", self.location_of(shard).volume.as_str()))
    }

    /// The node that serves a shard, once there is one, and the volume.
    fn served_at(&self, shard: &str) -> (NodeId, VolumeId) {
        eventually(END_MAX, || {
            let Location { node, volume, .. } = self.location_of(shard);
            node.map(|node| (node, volume)).ok_or_else(|| format!("nobody serves {shard}"))
        })
    }

    fn location_of(&self, shard: &str) -> Location {
        block_on(async { self.client().shard_by_name(&ShardName::new(shard).unwrap()).await.unwrap() })
            .location
    }

    /// The folder of a shard's RocksDB.
    pub fn shard_dir(&self, shard: &str) -> PathBuf {
        let info =
            block_on(async { self.client().shard_by_name(&ShardName::new(shard).unwrap()).await.unwrap() });
        let name = format!("shard-{}", info.id);
        let volume = info.location.volume.as_str().to_owned();
        let found = crate::sh(self.dir(), &format!("find . -type d -path '*/{volume}/{name}'"));
        let found: Vec<&str> = found.lines().collect();
        assert_eq!(found.len(), 1, "folders of shard {shard}: {found:?}");
        self.dir().join(found[0])
    }

    /// Checks a shard; panics with the findings. A volume that moves back meanwhile breaks a check off: then again.
    pub fn assert_clean(&self, shard: &str) {
        if self.control {
            return;
        }
        let arguments = ["fsck", "--read-data", shard];
        let output = eventually(CHECKED_MAX, || {
            let output = self.cli_output(&arguments);
            let said = String::from_utf8_lossy(&output.stderr);
            if said.contains("run it again") { Err(said.into_owned()) } else { Ok(output) }
        });
        assert!(output.status.success(), "{}", described(&format!("shardfs {arguments:?}"), &output));
    }

    fn finish(&self, mut command: Command) -> Output {
        command.stdin(Stdio::null()).output().unwrap_or_else(|e| panic!("{command:?}: {e}"))
    }
}

/// The folder of the programs under test: `SHARDFS_BIN_DIR`, else the one this program was built into.
pub fn bin_dir() -> PathBuf {
    let folder = match std::env::var_os("SHARDFS_BIN_DIR") {
        Some(folder) => PathBuf::from(folder),
        None => {
            let this = std::env::current_exe().unwrap();
            this.parent().and_then(Path::parent).expect("target/release/deps/PROGRAM").to_path_buf()
        }
    };
    for program in ["shardfs", "shardfs-node", "shardfsd"] {
        assert!(
            folder.join(program).is_file(),
            "{} is missing: `cargo build --release` comes first (make test does)",
            folder.join(program).display()
        );
    }
    folder
}

/// A folder of this test's own, short enough for unix sockets and open to other users (whom some tests
/// become).
pub fn temporary_root() -> PathBuf {
    let base = std::env::var_os("SHARDFS_TEST_DIR").map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let root = tempfile::Builder::new().prefix("shardfs-test.").tempdir_in(base).unwrap().keep();
    fs::set_permissions(&root, fs::Permissions::from_mode(0o755)).unwrap();
    root
}

/// Runs a future on a runtime of its own.
pub fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// A file's JSON.
pub fn read_json(path: &Path) -> Value {
    let text = fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{}: {e}\n{text}", path.display()))
}

/// A shard can be checked whole within this.
const CHECKED_MAX: Duration = Duration::from_secs(300);
/// How many times as long everything may take as on a machine of today: for such as are emulated.
const PATIENCE_VARIABLE: &str = "SHARDFS_TEST_PATIENCE";

/// As long as that is on this machine.
fn patient(within: Duration) -> Duration {
    within * std::env::var(PATIENCE_VARIABLE).map_or(1, |times| times.parse().unwrap())
}

/// Tries until it succeeds; panics with the last reason when the time is over.
pub fn eventually<T>(within: Duration, mut attempt: impl FnMut() -> Result<T, String>) -> T {
    let (start, within) = (Instant::now(), patient(within));
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(reason) if start.elapsed() > within => panic!("not within {within:?}: {reason}"),
            Err(_) => std::thread::sleep(Duration::from_millis(50)),
        }
    }
}
