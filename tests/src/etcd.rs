//! A real etcd for a cluster: one member, in a folder of its own, on free ports of 127.0.0.1.
//!
//! It is gone when it is dropped, and when the thread that started it ends, however that ends.

use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::cluster::eventually;

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(30);
/// Below the ports that the kernel gives to connections: a port must be free again after a restart.
const PORTS: std::ops::Range<u16> = 10_240..32_000;

/// An etcd.
#[derive(Debug)]
pub struct Etcd {
    dir: tempfile::TempDir,
    ports: [u16; 2],
    child: Option<Child>,
}

impl Etcd {
    /// Starts one.
    pub fn start() -> Etcd {
        let dir = tempfile::Builder::new().prefix("shardfs-test-etcd.").tempdir().unwrap();
        let mut etcd = Etcd { dir, ports: [free_port(), free_port()], child: None };
        etcd.restart();
        etcd
    }

    /// As `--meta` takes it.
    pub fn address(&self) -> String {
        format!("etcd://127.0.0.1:{}", self.ports[0])
    }

    /// Kills it at once.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            // It may have ended by itself.
            let _ = child.kill();
            child.wait().unwrap();
        }
    }

    /// Starts it again, with what it knew; answers when it listens.
    pub fn restart(&mut self) {
        self.kill();
        let log = self.dir.path().join("log");
        let output = File::options().create(true).append(true).open(&log).unwrap();
        let [client, peer] = self.ports.map(|port| format!("http://127.0.0.1:{port}"));
        let mut command = Command::new(program("etcd"));
        command
            .args(["--name", "m", "--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("m={peer}"), "--data-dir"])
            .arg(self.dir.path().join("data"))
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
        self.child = Some(command.spawn().unwrap());
        eventually(PATIENCE, || {
            std::net::TcpStream::connect(("127.0.0.1", self.ports[0]))
                .map_err(|e| format!("etcd: {e}\n{}", std::fs::read_to_string(&log).unwrap_or_default()))
        });
    }

    /// The keys that begin with `prefix`, as `etcdctl` shows them.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let text = self.ctl(&["get", "--prefix", "--keys-only", prefix]);
        text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect()
    }

    /// Runs `etcdctl`.
    pub fn ctl(&self, arguments: &[&str]) -> String {
        let output = Command::new(program("etcdctl"))
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &format!("127.0.0.1:{}", self.ports[0])])
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success(), "etcdctl {arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.kill();
    }
}

fn free_port() -> u16 {
    loop {
        let port = fastrand::u16(PORTS);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
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
