//! How a command finds its cluster, and for whom it acts.
//!
//! The order, first match wins (it also stands in `shardfs --help`): the flags `--endpoints` and `--dir`; the environment
//! `SHARDFS_ENDPOINTS`, `SHARDFS_DIR`; the config file (`--config`, `SHARDFS_CONFIG`, `~/.config/shardfs/config.yaml`,
//! `/etc/shardfs/config.yaml`); a `.shardfs` folder made by `dev up`, in the working directory or above it. The client id:
//! `--client-id`, `SHARDFS_CLIENT_ID`, the config file, that of the dev cluster, `default`. The deadline: `--deadline`,
//! `SHARDFS_DEADLINE`, the config file.
//!
//! Reads files, does no network I/O.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use clap::Args;
use serde::Deserialize;
use shardfs_proto::client::{Client, ClientConfig};
use shardfs_proto::types::ClientId;

use crate::devcluster::state::{self, Layout};
use crate::failure::{Failure, OrFail, Result};

/// The client id of who gives none.
pub const DEFAULT_CLIENT_ID: &str = "default";
/// The folder that `dev up` uses when none is given, and that other commands look for.
pub const DEV_FOLDER: &str = ".shardfs";
/// Seconds that a call may take, retries included, unless `--deadline` says otherwise.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// The longest deadline.
const DEADLINE_SECONDS_MAX: f64 = 86_400.0;
/// Bytes of a config file; a real one has a few hundred.
const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Flags that every command takes.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Cluster")]
pub struct Globals {
    /// A cluster on this machine: the folder that was given to `dev up` [env: SHARDFS_DIR]
    #[arg(long, global = true, value_name = "DIR", conflicts_with = "endpoints")]
    pub dir: Option<PathBuf>,
    /// Addresses of any nodes of the cluster: `http://HOST:PORT` or `unix:/PATH` [env: SHARDFS_ENDPOINTS]
    #[arg(long, global = true, value_name = "ADDRESS,...", value_delimiter = ',')]
    pub endpoints: Vec<String>,
    /// For which client id (tenant) to act [env: SHARDFS_CLIENT_ID] [default: default]
    #[arg(long, global = true, value_name = "ID")]
    pub client_id: Option<ClientId>,
    /// Config file [env: SHARDFS_CONFIG] [default: ~/.config/shardfs/config.yaml, then /etc/shardfs/config.yaml]
    #[arg(long, global = true, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How long one call may take, retries included, in seconds [env: SHARDFS_DEADLINE] [default: 60]
    #[arg(long, global = true, value_name = "SECONDS", value_parser = parse_seconds)]
    pub deadline: Option<Duration>,
}

/// What is read of the process's environment, apart from it so that tests can make one.
#[derive(Debug, Clone, Default)]
pub struct Environment {
    /// SHARDFS_ENDPOINTS
    pub endpoints: Option<String>,
    /// SHARDFS_DIR
    pub dir: Option<PathBuf>,
    /// SHARDFS_CLIENT_ID
    pub client_id: Option<String>,
    /// SHARDFS_DEADLINE
    pub deadline: Option<String>,
    /// SHARDFS_CONFIG
    pub config: Option<PathBuf>,
    /// Config files that are read if they are there, first match.
    pub config_candidates: Vec<PathBuf>,
    /// The working directory.
    pub working_directory: PathBuf,
}

impl Environment {
    /// That of this process.
    pub fn of_process() -> Environment {
        let text = |name: &str| std::env::var(name).ok().filter(|v| !v.is_empty());
        let path = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
        let home = path("XDG_CONFIG_HOME").or_else(|| path("HOME").map(|home| home.join(".config")));
        let mut config_candidates = Vec::new();
        if let Some(home) = home {
            config_candidates.push(home.join("shardfs/config.yaml"));
        }
        config_candidates.push(PathBuf::from("/etc/shardfs/config.yaml"));
        Environment {
            endpoints: text("SHARDFS_ENDPOINTS"),
            dir: path("SHARDFS_DIR"),
            client_id: text("SHARDFS_CLIENT_ID"),
            deadline: text("SHARDFS_DEADLINE"),
            config: path("SHARDFS_CONFIG"),
            config_candidates,
            working_directory: std::env::current_dir().unwrap_or_default(),
        }
    }
}

/// The config file of the command line; `tools/config.example.yaml` explains every setting.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct ConfigFile {
    endpoints: Vec<String>,
    dir: Option<PathBuf>,
    client_id: Option<ClientId>,
    /// `deadline` is what the daemon's file calls it.
    #[serde(alias = "deadline")]
    deadline_seconds: Option<f64>,
}

/// A cluster that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cluster {
    /// Addresses of nodes.
    pub endpoints: Vec<String>,
    /// For whom to act.
    pub client_id: ClientId,
    /// The folder of a dev cluster, if it is one.
    pub dir: Option<PathBuf>,
    /// Where this was found, for people: "--dir", "SHARDFS_DIR", ...
    pub found_by: String,
    /// How long one call may take.
    pub deadline: Duration,
}

/// What every command gets. Looks for the cluster only when a command needs it.
pub struct Context {
    globals: Globals,
    environment: Environment,
    /// Made by the first command that asks; shared, so that it can be closed at the end.
    client: OnceLock<Client>,
}

impl Context {
    /// From what was typed and what surrounds the process.
    pub fn new(globals: Globals, environment: Environment) -> Context {
        Context { globals, environment, client: OnceLock::new() }
    }

    /// The flags.
    pub fn globals(&self) -> &Globals {
        &self.globals
    }

    /// Finds the cluster; the module's words say where it looks.
    pub fn cluster(&self) -> Result<Cluster> {
        let config = self.config()?;
        let place = self.place(config.as_ref().map(|(path, config)| (path.as_path(), config)))?;
        let client_id = self
            .client_id_given(config.as_ref().map(|(_, config)| config))?
            .or(place.client_id)
            .map_or_else(|| ClientId::new(DEFAULT_CLIENT_ID), Ok)?;
        let deadline = self.deadline_given(config.as_ref().map(|(path, config)| (path.as_path(), config)))?;
        Ok(Cluster {
            endpoints: place.endpoints,
            client_id,
            dir: place.dir,
            found_by: place.found_by,
            deadline: deadline.unwrap_or(DEFAULT_DEADLINE),
        })
    }

    /// The client of the cluster: the same one for every caller. No network I/O yet.
    pub fn client(&self) -> Result<Client> {
        self.client_within(Duration::MAX)
    }

    /// The same with a deadline of its own for calls, if that is shorter, for the first who asks.
    pub fn client_within(&self, at_most: Duration) -> Result<Client> {
        if let Some(client) = self.client.get() {
            return Ok(client.clone());
        }
        let cluster = self.cluster()?;
        if let Some(dir) = &cluster.dir
            && !answers(&cluster.endpoints)
        {
            return Err(Failure::new(format!("the cluster in {} is down", dir.display()))
                .hint(format!("`shardfs dev up --dir {}` starts it", dir.display())));
        }
        let client = Client::new(ClientConfig {
            endpoints: cluster.endpoints,
            client_id: cluster.client_id,
            deadline: cluster.deadline.min(at_most),
            label: format!("shardfs pid {}", std::process::id()),
        })?;
        Ok(self.client.get_or_init(|| client).clone())
    }

    /// The client, if a command has asked for it.
    pub fn client_in_use(&self) -> Option<&Client> {
        self.client.get()
    }

    /// Ends what the client holds at the nodes. The last thing that a process does with it.
    pub async fn close(&self) {
        if let Some(client) = self.client.get() {
            client.close().await;
        }
    }

    /// The folder of a dev cluster that was named or is found; for the `dev` commands. Not checked to exist.
    pub fn dev_dir(&self) -> Result<PathBuf> {
        let given = self.globals.dir.clone().or_else(|| self.environment.dir.clone());
        if let Some(dir) = given {
            return self.absolute(&dir);
        }
        match self.walk_up() {
            Some(dir) => Ok(dir),
            None => self.absolute(Path::new(DEV_FOLDER)),
        }
    }

    /// The client id by flag, environment or config file.
    fn client_id_given(&self, config: Option<&ConfigFile>) -> Result<Option<ClientId>> {
        if let Some(id) = &self.globals.client_id {
            return Ok(Some(id.clone()));
        }
        if let Some(id) = &self.environment.client_id {
            let id =
                ClientId::new(id.as_str()).map_err(|e| Failure::usage(format!("SHARDFS_CLIENT_ID: {e}")))?;
            return Ok(Some(id));
        }
        Ok(config.and_then(|c| c.client_id.clone()))
    }

    /// The deadline by flag, environment or config file.
    fn deadline_given(&self, config: Option<(&Path, &ConfigFile)>) -> Result<Option<Duration>> {
        if let Some(deadline) = self.globals.deadline {
            return Ok(Some(deadline));
        }
        if let Some(text) = &self.environment.deadline {
            let deadline = parse_seconds(text);
            return deadline.map(Some).map_err(|e| Failure::usage(format!("SHARDFS_DEADLINE {text:?}: {e}")));
        }
        let Some((path, Some(seconds))) = config.map(|(path, c)| (path, c.deadline_seconds)) else {
            return Ok(None);
        };
        check_seconds(seconds).map(Some).map_err(|e| {
            Failure::usage(format!("config file {}: deadline_seconds {seconds}: {e}", path.display()))
        })
    }

    fn place(&self, config: Option<(&Path, &ConfigFile)>) -> Result<Place> {
        if !self.globals.endpoints.is_empty() {
            return Place::of_endpoints(&self.globals.endpoints, "--endpoints");
        }
        if let Some(dir) = &self.globals.dir {
            return Place::of_dir(&self.absolute(dir)?, "--dir");
        }
        if let Some(endpoints) = &self.environment.endpoints {
            let endpoints: Vec<String> = endpoints.split(',').map(str::to_owned).collect();
            return Place::of_endpoints(&endpoints, "SHARDFS_ENDPOINTS");
        }
        if let Some(dir) = &self.environment.dir {
            return Place::of_dir(&self.absolute(dir)?, "SHARDFS_DIR");
        }
        if let Some((path, config)) = config {
            let found_by = path.display().to_string();
            if !config.endpoints.is_empty() {
                return Place::of_endpoints(&config.endpoints, &found_by);
            }
            if let Some(dir) = &config.dir {
                return Place::of_dir(dir, &found_by);
            }
        }
        if let Some(dir) = self.walk_up() {
            return Place::of_dir(&dir, &dir.display().to_string());
        }
        Err(Failure::usage("no cluster given")
            .hint("give --dir or --endpoints (or SHARDFS_DIR, SHARDFS_ENDPOINTS, a config file); `shardfs dev up` starts a cluster here"))
    }

    /// The config file that applies, if there is one.
    fn config(&self) -> Result<Option<(PathBuf, ConfigFile)>> {
        let named = self.globals.config.clone().or_else(|| self.environment.config.clone());
        let path = match named {
            Some(path) => path,
            None => match self.environment.config_candidates.iter().find(|p| p.is_file()) {
                Some(path) => path.clone(),
                None => return Ok(None),
            },
        };
        let wrong = |why: String| Failure::usage(format!("config file {}: {why}", path.display()));
        let size = std::fs::metadata(&path).map_err(|e| wrong(e.to_string()))?.len();
        if size > CONFIG_BYTES_MAX {
            return Err(wrong(format!("{size} bytes are too many for a config file")));
        }
        let text = std::fs::read_to_string(&path).map_err(|e| wrong(e.to_string()))?;
        // An empty document is a valid config: all comments.
        let config: Option<ConfigFile> = serde_saphyr::from_str(&text).map_err(|e| {
            wrong(e.to_string()).hint(
                "settings are: endpoints, dir, client_id, deadline_seconds (see tools/config.example.yaml)",
            )
        })?;
        Ok(Some((path, config.unwrap_or_default())))
    }

    /// The nearest `.shardfs` that `dev up` made, from the working directory upwards.
    fn walk_up(&self) -> Option<PathBuf> {
        self.environment
            .working_directory
            .ancestors()
            .map(|dir| dir.join(DEV_FOLDER))
            .find(|dir| dir.join(state::CLUSTER_FILE).is_file())
    }

    fn absolute(&self, dir: &Path) -> Result<PathBuf> {
        let joined = self.environment.working_directory.join(dir);
        std::path::absolute(&joined).with_context(|| dir.display().to_string())
    }
}

/// Endpoints and what a dev cluster says besides.
struct Place {
    endpoints: Vec<String>,
    client_id: Option<ClientId>,
    dir: Option<PathBuf>,
    found_by: String,
}

impl Place {
    fn of_endpoints(endpoints: &[String], found_by: &str) -> Result<Place> {
        let mut checked = Vec::with_capacity(endpoints.len());
        for endpoint in endpoints.iter().map(|e| e.trim()).filter(|e| !e.is_empty()) {
            checked
                .push(normal_endpoint(endpoint).map_err(|why| Failure::usage(format!("{found_by}: {why}")))?);
        }
        if checked.is_empty() {
            return Err(Failure::usage(format!("{found_by} names no address")));
        }
        Ok(Place { endpoints: checked, client_id: None, dir: None, found_by: found_by.to_owned() })
    }

    fn of_dir(dir: &Path, found_by: &str) -> Result<Place> {
        let layout = Layout::new(dir);
        let settings = layout.read_settings()?.ok_or_else(|| {
            Failure::usage(format!("{} holds no cluster ({found_by})", dir.display()))
                .hint(format!("`shardfs dev up --dir {} --mount MNT` starts one there", dir.display()))
        })?;
        Ok(Place {
            endpoints: layout.node_endpoints(&settings),
            client_id: Some(settings.client_id),
            dir: Some(dir.to_owned()),
            found_by: found_by.to_owned(),
        })
    }
}

/// A number of seconds as it is typed, such as 5 or 0.5.
fn parse_seconds(text: &str) -> std::result::Result<Duration, String> {
    check_seconds(text.trim().parse().unwrap_or(f64::NAN))
}

/// A deadline is positive, and at most a day.
fn check_seconds(seconds: f64) -> std::result::Result<Duration, String> {
    if seconds > 0.0 && seconds <= DEADLINE_SECONDS_MAX {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(format!("write a number of seconds above 0, at most {DEADLINE_SECONDS_MAX}"))
    }
}

/// Whether somebody listens on any of these unix sockets, or on the supervisor's beside them: then the cluster runs, even
/// if its nodes are being started at the moment.
fn answers(endpoints: &[String]) -> bool {
    let sockets = endpoints.iter().filter_map(|e| e.strip_prefix("unix:")).map(PathBuf::from);
    let control = sockets.clone().next().map(|s| s.with_file_name(state::CONTROL_SOCKET));
    control.into_iter().chain(sockets).any(|socket| std::os::unix::net::UnixStream::connect(socket).is_ok())
}

/// `unix:/path` and `http://host:port` as they are; `host:port` gets its `http://`.
fn normal_endpoint(endpoint: &str) -> std::result::Result<String, String> {
    let wrong = || format!("{endpoint:?} is no address: write http://HOST:PORT or unix:/PATH");
    if let Some(path) = endpoint.strip_prefix("unix:") {
        return if path.starts_with('/') { Ok(endpoint.to_owned()) } else { Err(wrong()) };
    }
    let host_port = endpoint.strip_prefix("http://").unwrap_or(endpoint).trim_end_matches('/');
    let (host, port) = host_port.rsplit_once(':').ok_or_else(wrong)?;
    if host.is_empty() || host.contains('/') || port.parse::<u16>().map_or(true, |p| p == 0) {
        return Err(wrong());
    }
    Ok(format!("http://{host_port}"))
}

#[cfg(test)]
mod tests;
