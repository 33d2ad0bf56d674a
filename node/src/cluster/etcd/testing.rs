//! Real etcd processes for tests: each in a folder of its own, on free ports of 127.0.0.1, gone when it is dropped or
//! when the test's thread ends.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal};

use super::settings::{EtcdSettings, TlsFiles};

/// How long an etcd may take to listen, or to end when asked.
const PATIENCE: Duration = Duration::from_secs(90);
/// Below the ports that the kernel gives to connections: a port must be free again after a restart.
const PORTS: std::ops::Range<u16> = 10_240..32_000;

/// One member.
pub(crate) struct Etcd {
    dir: tempfile::TempDir,
    arguments: Vec<String>,
    client_port: u16,
    tls: Option<TlsFiles>,
    child: Option<Child>,
}

/// Certificates for an etcd on 127.0.0.1 and for its clients.
pub(crate) struct Certificates {
    dir: tempfile::TempDir,
}

impl Certificates {
    pub(crate) fn make() -> Certificates {
        let dir = tempfile::tempdir().unwrap();
        let script = "
            set -eu
            new='-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes'
            for ca in ca other-ca; do
                openssl req -x509 $new -days 2 -subj /CN=$ca -keyout $ca.key -out $ca.pem
            done
            echo 'subjectAltName=IP:127.0.0.1' >ext
            for name in server client; do
                openssl req $new -subj /CN=$name -keyout $name.key -out $name.csr
                openssl x509 -req -in $name.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile ext -out $name.pem
            done";
        let output =
            Command::new("sh").args(["-c", script]).current_dir(dir.path()).output().expect("sh is there");
        assert!(
            output.status.success(),
            "openssl (the Debian package openssl) makes the certificates: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        Certificates { dir }
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// What a client needs that etcd trusts.
    pub(crate) fn client(&self) -> TlsFiles {
        TlsFiles {
            ca: Some(self.file("ca.pem")),
            client: Some((self.file("client.pem"), self.file("client.key"))),
        }
    }
}

fn free_port() -> u16 {
    static TAKEN: Mutex<Option<HashSet<u16>>> = Mutex::new(None);
    let mut taken = TAKEN.lock().unwrap();
    let taken = taken.get_or_insert_default();
    loop {
        let port = fastrand::u16(PORTS);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() && taken.insert(port) {
            return port;
        }
    }
}

fn program() -> PathBuf {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain([PathBuf::from("/usr/sbin"), PathBuf::from("/usr/local/bin")])
        .map(|folder| folder.join("etcd"))
        .find(|program| program.is_file())
        .expect("there is no etcd: `make deps-test` installs it (the Debian package etcd-server)")
}

impl Etcd {
    /// One that is a cluster by itself.
    pub(crate) fn start() -> Etcd {
        Etcd::members(1, None).remove(0)
    }

    /// One that is a cluster by itself, with more arguments.
    pub(crate) fn start_with(arguments: &[&str]) -> Etcd {
        Etcd::make(1, None, arguments).remove(0)
    }

    /// One with TLS that wants to see certificates.
    pub(crate) fn start_with_tls(certificates: &Certificates) -> Etcd {
        Etcd::members(1, Some(certificates)).remove(0)
    }

    /// A cluster of some members.
    pub(crate) fn members(count: usize, certificates: Option<&Certificates>) -> Vec<Etcd> {
        Etcd::make(count, certificates, &[])
    }

    fn make(count: usize, certificates: Option<&Certificates>, more: &[&str]) -> Vec<Etcd> {
        let ports: Vec<(u16, u16)> = (0..count).map(|_| (free_port(), free_port())).collect();
        let peers: Vec<String> =
            ports.iter().enumerate().map(|(i, (_, peer))| format!("m{i}=http://127.0.0.1:{peer}")).collect();
        let scheme = if certificates.is_some() { "https" } else { "http" };
        let token = format!("token-{}", ports[0].0);
        let mut members: Vec<Etcd> = ports
            .iter()
            .enumerate()
            .map(|(i, (client_port, peer_port))| {
                let client = format!("{scheme}://127.0.0.1:{client_port}");
                let peer = format!("http://127.0.0.1:{peer_port}");
                let mut arguments: Vec<String> = [
                    ("--name", format!("m{i}")),
                    ("--listen-client-urls", client.clone()),
                    ("--advertise-client-urls", client),
                    ("--listen-peer-urls", peer.clone()),
                    ("--initial-advertise-peer-urls", peer),
                    ("--initial-cluster", peers.join(",")),
                    ("--initial-cluster-token", token.clone()),
                ]
                .into_iter()
                .flat_map(|(flag, value)| [flag.to_owned(), value])
                .chain(more.iter().map(|argument| (*argument).to_owned()))
                .collect();
                if let Some(certificates) = certificates {
                    arguments.push("--client-cert-auth".into());
                    for (flag, file) in [
                        ("--cert-file", "server.pem"),
                        ("--key-file", "server.key"),
                        ("--trusted-ca-file", "ca.pem"),
                    ] {
                        arguments.extend([flag.into(), certificates.file(file).to_str().unwrap().into()]);
                    }
                }
                Etcd {
                    dir: tempfile::tempdir().unwrap(),
                    arguments,
                    client_port: *client_port,
                    tls: certificates.map(Certificates::client),
                    child: None,
                }
            })
            .collect();
        // All before the first is waited for: a member alone does not serve.
        members.iter_mut().for_each(Etcd::spawn);
        members.iter_mut().for_each(Etcd::wait_until_it_listens);
        members
    }

    /// Starts it again.
    pub(crate) fn restart(&mut self) {
        assert!(self.child.is_none(), "it runs");
        self.spawn();
        self.wait_until_it_listens();
    }

    /// Forgets everything it knew. It does not run.
    pub(crate) fn wipe(&self) {
        assert!(self.child.is_none(), "it runs");
        std::fs::remove_dir_all(self.data()).unwrap();
    }

    fn data(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("log")
    }

    fn spawn(&mut self) {
        let log = File::options().create(true).append(true).open(self.log()).unwrap();
        let mut command = Command::new(program());
        command
            .args(&self.arguments)
            .arg("--data-dir")
            .arg(self.data())
            // Nothing of ETCD_*; elsewhere than on amd64 3.4 wants to be told that one knows.
            .env_clear()
            .env("ETCD_UNSUPPORTED_ARCH", if cfg!(target_arch = "aarch64") { "arm64" } else { "" })
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log);
        // SAFETY: one system call between fork and exec, which allocates nothing.
        unsafe {
            command.pre_exec(|| Ok(rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?));
        }
        self.child = Some(command.spawn().unwrap());
    }

    fn wait_until_it_listens(&mut self) {
        let end = Instant::now() + PATIENCE;
        while std::net::TcpStream::connect(("127.0.0.1", self.client_port)).is_err() {
            let ended = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < end, "etcd does not listen:\n{}", tail(&self.log()));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = self.child.as_ref().expect("it runs").id();
        rustix::process::kill_process(Pid::from_raw(pid as i32).unwrap(), signal).unwrap();
    }

    /// Stops it; `clean`: as asked to, else as a crash would.
    pub(crate) fn stop(&mut self, clean: bool) {
        self.signal(if clean { Signal::TERM } else { Signal::KILL });
        let mut child = self.child.take().unwrap();
        let end = Instant::now() + PATIENCE;
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > end {
                child.kill().unwrap();
                child.wait().unwrap();
                panic!("etcd does not end:\n{}", tail(&self.log()));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Freezes it: its connections stay, and it answers nothing.
    pub(crate) fn freeze(&self) {
        self.signal(Signal::STOP);
    }

    /// Lets it go on.
    pub(crate) fn thaw(&self) {
        self.signal(Signal::CONT);
    }

    /// `HOST:PORT`.
    pub(crate) fn member(&self) -> String {
        format!("127.0.0.1:{}", self.client_port)
    }

    /// How it is reached.
    pub(crate) fn settings(&self) -> EtcdSettings {
        EtcdSettings { members: vec![self.member()], tls: self.tls.clone(), user: None }
    }

    /// A client of the crate's own, for what the trait has no word for.
    pub(crate) async fn client(&self) -> etcd_client::Client {
        etcd_client::Client::connect([self.member()], None).await.unwrap()
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended by itself.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
