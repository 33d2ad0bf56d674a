//! A real etcd for a cluster: one member or several, in a folder of their own, on free ports.
//!
//! They are gone when it is dropped, and when the thread that started it ends, however that ends.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::cluster::eventually;
use crate::ports;

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(120);
const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// An etcd.
#[derive(Debug)]
pub struct Etcd {
    dir: tempfile::TempDir,
    /// Where every member listens for clients.
    hosts: Vec<IpAddr>,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    client_port: u16,
    peer_port: u16,
    child: Option<Child>,
}

impl Etcd {
    /// Starts one with one member.
    pub fn start() -> Etcd {
        Etcd::start_members(1, &[])
    }

    /// Starts one with several members, which listen for clients on these addresses as well as on 127.0.0.1.
    pub fn start_members(members: usize, more_hosts: &[IpAddr]) -> Etcd {
        let dir = tempfile::Builder::new().prefix("shardfs-test-etcd.").tempdir().unwrap();
        let hosts: Vec<IpAddr> = [LOCALHOST].into_iter().chain(more_hosts.iter().copied()).collect();
        let member = |_| Member { client_port: ports::free(), peer_port: ports::free(), child: None };
        let mut etcd = Etcd { dir, hosts, members: (0..members).map(member).collect() };
        etcd.restart();
        etcd
    }

    /// As `--meta` takes it.
    pub fn address(&self) -> String {
        self.address_at(LOCALHOST)
    }

    /// As `--meta` takes it, by another of the addresses that it listens on.
    pub fn address_at(&self, host: IpAddr) -> String {
        let members: Vec<String> =
            self.members.iter().map(|member| format!("{host}:{}", member.client_port)).collect();
        format!("etcd://{}", members.join(","))
    }

    /// The member that leads.
    pub fn leader(&self) -> usize {
        eventually(PATIENCE, || {
            for (number, member) in self.members.iter().enumerate().filter(|(_, m)| m.child.is_some()) {
                let output = etcdctl(member.client_port, &["endpoint", "status", "--write-out=json"]);
                let Ok(status) = serde_json::from_slice::<serde_json::Value>(&output.stdout) else {
                    continue;
                };
                let status = &status[0]["Status"];
                if status["leader"].as_u64().is_some_and(|leader| leader != 0)
                    && status["leader"] == status["header"]["member_id"]
                {
                    return Ok(number);
                }
            }
            Err("no member of etcd leads".to_owned())
        })
    }

    /// Kills all members at once.
    pub fn kill(&mut self) {
        for number in 0..self.members.len() {
            self.kill_member(number);
        }
    }

    /// Kills one member.
    pub fn kill_member(&mut self, number: usize) {
        if let Some(mut child) = self.members[number].child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    /// Starts it again, with what it knew; answers when it listens.
    pub fn restart(&mut self) {
        self.kill();
        for number in 0..self.members.len() {
            self.launch(number);
        }
        for number in 0..self.members.len() {
            self.listens(number);
        }
    }

    /// Starts one member again.
    pub fn restart_member(&mut self, number: usize) {
        self.kill_member(number);
        self.launch(number);
        self.listens(number);
    }

    fn log(&self, number: usize) -> PathBuf {
        self.dir.path().join(format!("log-{number}"))
    }

    fn launch(&mut self, number: usize) {
        let output = File::options().create(true).append(true).open(self.log(number)).unwrap();
        let peer = |member: &Member| format!("http://127.0.0.1:{}", member.peer_port);
        let all: Vec<String> =
            self.members.iter().enumerate().map(|(n, member)| format!("m{n}={}", peer(member))).collect();
        let member = &self.members[number];
        let clients: Vec<String> =
            self.hosts.iter().map(|host| format!("http://{host}:{}", member.client_port)).collect();
        let mut command = Command::new(program("etcd"));
        command
            .args(["--name", &format!("m{number}"), "--listen-client-urls", &clients.join(",")])
            .args(["--advertise-client-urls", &clients[0]])
            .args(["--listen-peer-urls", &peer(member), "--initial-advertise-peer-urls", &peer(member)])
            .args(["--initial-cluster", &all.join(","), "--data-dir"])
            .arg(self.dir.path().join(format!("data-{number}")))
            // Nothing of ETCD_*; elsewhere than on amd64 3.4 wants to be told that one knows.
            .env_clear()
            .env("ETCD_UNSUPPORTED_ARCH", if cfg!(target_arch = "aarch64") { "arm64" } else { "" })
            .stdin(Stdio::null())
            .stdout(output.try_clone().unwrap())
            .stderr(output);
        // SAFETY: one system call between fork and exec, which allocates nothing.
        unsafe {
            command.pre_exec(|| {
                Ok(rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?)
            });
        }
        self.members[number].child = Some(command.spawn().unwrap());
    }

    fn listens(&self, number: usize) {
        eventually(PATIENCE, || {
            std::net::TcpStream::connect((LOCALHOST, self.members[number].client_port)).map_err(|e| {
                format!("etcd: {e}\n{}", std::fs::read_to_string(self.log(number)).unwrap_or_default())
            })
        });
    }

    /// The keys that begin with `prefix`, as `etcdctl` shows them.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let text = self.ctl(&["get", "--prefix", "--keys-only", prefix]);
        text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// Runs `etcdctl`.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let output = etcdctl(self.members[0].client_port, arguments);
        assert!(output.status.success(), "etcdctl {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn etcdctl(port: u16, arguments: &[&str]) -> std::process::Output {
    Command::new(program("etcdctl"))
        .env("ETCDCTL_API", "3")
        .args(["--endpoints", &format!("127.0.0.1:{port}")])
        .args(arguments)
        .output()
        .unwrap()
}

fn program(name: &str) -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/bin", "/usr/local/bin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
        .unwrap_or_else(|| {
            panic!("there is no {name}: `make deps-test` installs it (Debian: etcd-server, etcd-client)")
        })
}
