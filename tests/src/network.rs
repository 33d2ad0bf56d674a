//! Nodes in network namespaces of their own, each with two links to the machine: one for its clients, one for the metadata
//! store. A link that is cut loses everything in silence, as a switch does that has failed.
//!
//! A namespace lives as long as a process in it; the first is one that does nothing and is killed by the cluster's guard. Mounts are
//! shared with the machine: a node that takes a volume over must reach the mount of the one before it.

use std::fs;
use std::io::Write;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::cluster::eventually;
use crate::etcd::Etcd;
use crate::run::described;

/// An address that no interface has.
const NOBODY: &str = "02:00:00:00:00:01";
/// Where a node listens, in its namespace.
const PORT: u16 = 7400;
/// How long a namespace may take to be there.
const PATIENCE: Duration = Duration::from_secs(60);

/// One of a node's links.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Link {
    /// To those who use it.
    Clients,
    /// To the metadata store.
    Store,
}

/// The namespaces of a cluster's nodes.
#[derive(Debug)]
pub struct Network {
    folder: PathBuf,
    /// Third byte of all addresses, which are taken from the range that is set aside for tests (RFC 2544).
    subnet: u8,
    /// Processes that hold the namespaces.
    holders: Vec<u32>,
}

impl Network {
    /// Makes the namespaces of `node-1`...; `root` is a cluster's folder, whose guard removes them.
    pub fn new(root: &Path, nodes: u32) -> Network {
        let folder = root.join("network");
        fs::create_dir(&folder).unwrap();
        let hold = folder.join("hold");
        fs::write(&hold, "").unwrap();
        let mut network = Network { folder, subnet: fastrand::u8(1..255), holders: Vec::new() };
        let ours = fs::read_link("/proc/self/ns/net").unwrap();
        for node in 1..=nodes {
            let mut command = Command::new("unshare");
            command.args(["--net", "tail", "-f"]).arg(&hold).stdin(Stdio::null()).stdout(Stdio::null());
            let holder = command.spawn().expect("unshare is there").id();
            eventually(PATIENCE, || match fs::read_link(format!("/proc/{holder}/ns/net")) {
                Ok(namespace) if namespace != ours => Ok(()),
                other => Err(format!("{other:?}")),
            });
            network.holders.push(holder);
            network.inside(node, &["link", "set", "lo", "up"]);
            for link in [Link::Clients, Link::Store] {
                network.connect(node, link);
            }
        }
        network
    }

    fn connect(&self, node: u32, link: Link) {
        let (outer, inner) = (self.interface(node, link), inner(link));
        let holder = self.holders[node as usize - 1].to_string();
        ip(&["link", "add", &outer, "type", "veth", "peer", "name", inner, "netns", &holder]);
        let with_prefix = |address: IpAddr| format!("{address}/30");
        ip(&["address", "add", &with_prefix(self.outer_address(node, link)), "dev", &outer]);
        ip(&["link", "set", &outer, "up"]);
        self.inside(node, &["address", "add", &with_prefix(self.inner_address(node, link)), "dev", inner]);
        self.inside(node, &["link", "set", inner, "up"]);
    }

    /// The machine's end of a link: unique on the machine, at most 15 bytes.
    fn interface(&self, node: u32, link: Link) -> String {
        let kind = if link == Link::Clients { 'c' } else { 's' };
        format!("sft{}{kind}{node}", self.subnet)
    }

    fn address(&self, node: u32, link: Link, end: u8) -> IpAddr {
        let block = u8::try_from(node * 8).expect("few nodes") + if link == Link::Clients { 0 } else { 4 };
        Ipv4Addr::new(198, 18, self.subnet, block + end).into()
    }

    fn outer_address(&self, node: u32, link: Link) -> IpAddr {
        self.address(node, link, 1)
    }

    fn inner_address(&self, node: u32, link: Link) -> IpAddr {
        self.address(node, link, 2)
    }

    /// Where the nodes are reached by their clients.
    pub fn endpoints(&self) -> Vec<String> {
        let nodes = 1..=self.holders.len() as u32;
        nodes.map(|node| format!("http://{}:{PORT}", self.inner_address(node, Link::Clients))).collect()
    }

    /// Where the metadata store has to listen.
    pub fn store_hosts(&self) -> Vec<IpAddr> {
        (1..=self.holders.len() as u32).map(|node| self.outer_address(node, Link::Store)).collect()
    }

    /// Writes the programs that `dev up` is to start: they put a node into its namespace, let it listen there only, and
    /// tell the mount where.
    pub fn wrap_programs(&self, bin: &Path, etcd: &Etcd) {
        for (number, holder) in self.holders.iter().enumerate() {
            let node = number as u32 + 1;
            let facts = format!(
                "namespace=/proc/{holder}/ns/net\naddress={}\nmeta={}\n",
                self.inner_address(node, Link::Clients),
                etcd.address_at(self.outer_address(node, Link::Store)),
            );
            fs::write(self.folder.join(format!("node-{node}")), facts).unwrap();
        }
        let folder = self.folder.display();
        let node = format!(
            r#"#!/bin/bash
set -eu
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --id) . {folder}/"$2"; arguments+=("$1" "$2"); shift ;;
        --listen) arguments+=("$1" "$address:{PORT}"); shift ;;
        --listen-unix) shift ;;
        --meta) arguments+=("$1" "$meta"); shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
exec nsenter --net="$namespace" {bin}/shardfs-node "${{arguments[@]}}"
"#,
            bin = bin.display()
        );
        let daemon = format!(
            r#"#!/bin/bash
set -eu
arguments=()
while [ $# -gt 0 ]; do
    case $1 in
        --endpoints) arguments+=("$1" {endpoints}); shift ;;
        *) arguments+=("$1") ;;
    esac
    shift
done
exec {bin}/shardfsd "${{arguments[@]}}"
"#,
            endpoints = self.endpoints().join(","),
            bin = bin.display()
        );
        for (name, script) in [("shardfs-node", node), ("shardfsd", daemon)] {
            let path = self.folder.join(name);
            fs::write(&path, script).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        }
    }

    /// For the environment of `dev up`.
    pub fn programs(&self) -> [(&'static str, PathBuf); 2] {
        [
            ("SHARDFS_NODE_BIN", self.folder.join("shardfs-node")),
            ("SHARDFSD_BIN", self.folder.join("shardfsd")),
        ]
    }

    /// Cuts a link of a node: what is sent over it from now on, in either direction, is lost.
    pub fn cut(&self, node: &str, link: Link) {
        self.change(node, &[link], false);
    }

    /// Mends a link.
    pub fn heal(&self, node: &str, link: Link) {
        self.change(node, &[link], true);
    }

    /// Cuts all links of a node at one moment: from then on nobody hears of it.
    pub fn cut_off(&self, node: &str) {
        self.change(node, &[Link::Clients, Link::Store], false);
    }

    /// Mends all links of a node.
    pub fn reconnect(&self, node: &str) {
        self.change(node, &[Link::Clients, Link::Store], true);
    }

    /// What the node sends goes first: one batch is a matter of microseconds, the way into its namespace one of milliseconds.
    fn change(&self, node: &str, links: &[Link], whole: bool) {
        let node = number(node);
        let line = |address: IpAddr, interface: &str| match whole {
            true => format!("neigh del {address} dev {interface}\n"),
            false => format!("neigh replace {address} lladdr {NOBODY} dev {interface} nud permanent\n"),
        };
        let sent: String = links.iter().map(|l| line(self.outer_address(node, *l), inner(*l))).collect();
        let received: String =
            links.iter().map(|l| line(self.inner_address(node, *l), &self.interface(node, *l))).collect();
        batch(self.enter(node), &sent);
        batch(Command::new("ip"), &received);
    }

    fn inside(&self, node: u32, arguments: &[&str]) {
        let mut command = self.enter(node);
        command.args(arguments);
        run(command);
    }

    /// `ip`, in a node's namespace.
    fn enter(&self, node: u32) -> Command {
        let holder = self.holders[node as usize - 1];
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/proc/{holder}/ns/net")).arg("ip");
        command
    }
}

/// A node's end of a link.
fn inner(link: Link) -> &'static str {
    match link {
        Link::Clients => "clients",
        Link::Store => "store",
    }
}

fn number(node: &str) -> u32 {
    node.strip_prefix("node-").and_then(|n| n.parse().ok()).expect("nodes are called node-N")
}

fn ip(arguments: &[&str]) {
    let mut command = Command::new("ip");
    command.args(arguments);
    run(command);
}

/// Several of `ip`'s commands, one a line.
fn batch(mut ip: Command, lines: &str) {
    ip.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = ip.spawn().unwrap_or_else(|e| panic!("{ip:?}: {e}"));
    child.stdin.take().expect("it is piped").write_all(lines.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{lines}{}", described(&format!("{ip:?}"), &output));
}

fn run(mut command: Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{}", described(&format!("{command:?}"), &output));
}
