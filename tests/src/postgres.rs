//! A PostgreSQL of Debian's package whose data is on a mount.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::cluster::eventually;
use crate::process::{self, Process};
use crate::run::Shell;

/// It answers within this, after its recovery.
const READY_MAX: Duration = Duration::from_secs(120);
/// All of its processes have ended within this.
const ENDED_MAX: Duration = Duration::from_secs(60);

/// A server, which is killed when this is dropped. It does not run as root: its package made a user.
#[derive(Debug)]
pub struct Postgres {
    data: PathBuf,
    /// Local: for sockets and the log. Processes of the server have its path in their titles, by which the guard of a cluster finds them as well.
    local: PathBuf,
    server: Option<Child>,
}

impl Postgres {
    /// Makes the files of one in `data`, which is not there yet, with checksums of pages. `local` is a folder below the cluster's root.
    pub fn create(data: &Path, local: &Path) -> Postgres {
        let postgres = Postgres { data: data.to_owned(), local: local.to_owned(), server: None };
        fs::create_dir(data).unwrap();
        postgres.shell().run("chown postgres: $DATA $LOCAL && $AS $BIN/initdb -D $DATA --data-checksums -U postgres >initdb.log");
        let settings = format!(
            "listen_addresses = ''\nunix_socket_directories = '{0}'\ncluster_name = '{0}/'\nshared_buffers = 32MB\nmax_wal_size = 64MB\n\
             checkpoint_timeout = 30s\nautovacuum_naptime = 1s\n",
            local.display()
        );
        fs::write(data.join("postgresql.auto.conf"), settings).unwrap();
        postgres
    }

    /// Scripts in the local folder, with what they need to reach it: `psql` and the like need no arguments, `$AS` begins a command of
    /// its user, `$BIN` is the folder of its programs.
    pub fn shell(&self) -> Shell {
        Shell::new(&self.local)
            .with("DATA", &self.data)
            .with("LOCAL", &self.local)
            .with("PGHOST", &self.local)
            .with("PGUSER", "postgres")
            .with("PGDATABASE", "postgres")
            .with("BIN", programs())
            .with("AS", "setpriv --reuid=postgres --regid=postgres --clear-groups")
    }

    /// Starts it and waits until it answers.
    pub fn start(&mut self) {
        let log = File::options().append(true).create(true).open(self.local.join("postgres.log")).unwrap();
        let child = Command::new("setpriv")
            .args(["--reuid=postgres", "--regid=postgres", "--clear-groups"])
            .arg(programs().join("postgres"))
            .arg("-D")
            .arg(&self.data)
            .current_dir(&self.local)
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0)
            .spawn()
            .expect("setpriv is there");
        self.server = Some(child);
        eventually(READY_MAX, || {
            let answer = self.shell().output("$BIN/psql -Atc 'select 1'");
            if answer.status.success() { Ok(()) } else { Err(format!("{answer:?}\n{}", self.log())) }
        });
    }

    /// Kills all its processes at once, as a machine that stops would.
    pub fn kill(&mut self) {
        let Some(mut server) = self.server.take() else { return };
        // The one that starts the others first.
        let _ = server.kill();
        let _ = server.wait();
        let mark = format!("{}/", self.local.display());
        eventually(ENDED_MAX, || {
            let left: Vec<Process> = process::naming(&self.local)
                .into_iter()
                .filter(|p| p.arguments.iter().any(|a| a.starts_with("postgres: ") && a.contains(&mark)))
                .collect();
            left.iter().for_each(Process::kill);
            if left.is_empty() { Ok(()) } else { Err(format!("still there: {left:?}")) }
        });
    }

    /// Stops it in order.
    pub fn stop(&mut self) {
        self.shell().run("$AS $BIN/pg_ctl stop -D $DATA -m fast -s");
        self.server.take().expect("it was started").wait().unwrap();
    }

    /// What it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.local.join("postgres.log")).unwrap_or_default()
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("-- the log of PostgreSQL\n{}", self.log());
        }
        self.kill();
    }
}

/// The folder of the programs of the newest version that is installed.
fn programs() -> PathBuf {
    let versions = fs::read_dir("/usr/lib/postgresql").expect("Debian's package postgresql is installed");
    let mut versions: Vec<PathBuf> = versions.map(|v| v.unwrap().path().join("bin")).collect();
    versions.retain(|bin| bin.join("postgres").is_file());
    versions.sort();
    versions.pop().expect("a version with a server")
}
