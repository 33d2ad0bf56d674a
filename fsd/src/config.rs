//! The daemon's settings: mount options over flags over the environment over a YAML file over defaults.
//!
//! [`Args`] is what the command line and the environment say, [`File`] what a YAML file says, and
//! [`Settings`] what they come to, checked. Unknown fields of the file are refused by name. Every setting is
//! explained in `shardfsd.example.yaml`, which a test keeps complete.

use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use rustix::mount::MountFlags;
use serde::Deserialize;
use shardfs_proto::client::{DEADLINE_DEFAULT, DEADLINE_NEVER};
use shardfs_proto::types::limits::STALENESS_DEFAULT;
use shardfs_proto::types::{ClientId, ReadFrom};

use crate::cli::{Args, Deadline, Locks, LogFormat, Readdirplus, Who};
use crate::options;

/// Time for a node to answer before mounting.
const CONNECT_TIMEOUT_DEFAULT: Duration = Duration::from_secs(10);
/// Times beyond this are a mistake, and some would overflow.
const SECONDS_MAX: f64 = 1e6;
/// Threads that take requests: one can decode some 100,000 a second.
const THREADS_DEFAULT: usize = 4;
/// Each has a buffer of 16 MiB.
const THREADS_MAX: usize = 64;
/// What one request of the kernel carries.
const READ_AHEAD_KIB_DEFAULT: u32 = 1024;

/// The YAML file. Every field may be left out.
#[derive(Deserialize, Debug, Default)]
#[serde(deny_unknown_fields)]
pub struct File {
    endpoints: Option<Vec<String>>,
    client_id: Option<String>,
    deadline: Option<Deadline>,
    connect_timeout: Option<f64>,
    attr_ttl: Option<f64>,
    entry_ttl: Option<f64>,
    read_from: Option<Who>,
    max_staleness: Option<f64>,
    readdirplus: Option<Readdirplus>,
    locks: Option<Locks>,
    threads: Option<usize>,
    read_ahead_kib: Option<u32>,
    root_mode: Option<String>,
    http: Option<String>,
    log_file: Option<PathBuf>,
    log_format: Option<LogFormat>,
    log_level: Option<String>,
}

/// A mount's settings, checked.
#[derive(Clone, PartialEq, Debug)]
pub struct Settings {
    /// Where to mount; absolute.
    pub mount_point: PathBuf,
    /// What mount(8) shows as the source.
    pub source: String,
    /// Nodes: `unix:/path` or `http://host:port`.
    pub endpoints: Vec<String>,
    /// For whom to act.
    pub client_id: ClientId,
    /// Stay in the foreground.
    pub foreground: bool,
    /// For mount(2).
    pub flags: MountFlags,
    /// Let other users in.
    pub allow_other: bool,
    /// How long a request is repeated; [`DEADLINE_NEVER`]: for ever.
    pub deadline: Duration,
    /// How long to wait for a node before mounting.
    pub connect_timeout: Duration,
    /// How long the kernel may keep attributes.
    pub attr_ttl: Duration,
    /// How long the kernel may keep names.
    pub entry_ttl: Duration,
    /// Who may answer reads.
    pub reads: ReadFrom,
    /// Read directories with attributes.
    pub readdirplus: bool,
    /// POSIX locks hold for all mounts of the cluster.
    pub posix_locks: bool,
    /// Threads that take requests.
    pub threads: usize,
    /// Read-ahead; 0: the kernel's default.
    pub read_ahead_kib: u32,
    /// Permission bits of the root.
    pub root_mode: u32,
    /// HTTP.
    pub http: Option<SocketAddr>,
    /// Where log lines go; absolute.
    pub log_file: Option<PathBuf>,
    /// How log lines look.
    pub log_format: LogFormat,
    /// What is logged.
    pub log_level: String,
    /// Where to say that the mount is usable.
    pub ready_fd: Option<RawFd>,
    /// Whether a dead mount at the mount point may be taken away.
    pub replace_dead: bool,
}

/// An error: the settings are wrong, which no restart mends.
#[derive(Debug)]
pub struct Refused(pub String);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Refused {}

impl Settings {
    /// Reads the file that `args` name, if any, and puts the layers together.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn load(args: Args) -> Result<Settings> {
        Settings::put_together(args).map_err(|error| Refused(format!("{error:#}")).into())
    }

    fn put_together(mut args: Args) -> Result<Settings> {
        let options = options::parse(args.options.iter().map(String::as_str), args.sloppy)?;
        if options.remount {
            bail!("mount option remount: mount(8) changes the options of a mount (mount -o remount,ro DIR)");
        }
        for (name, value) in &options.settings {
            apply(&mut args, name, value).with_context(|| format!("mount option {name}={value}"))?;
        }
        let file = match &args.config {
            Some(path) => read(path)?,
            None => File::default(),
        };
        resolve(args, file, options)
    }
}

/// Puts a setting given as a mount option in the place of its flag.
fn apply(args: &mut Args, name: &str, value: &str) -> Result<()> {
    let seconds = || value.parse::<f64>().context("expected seconds, such as 1.5");
    let number = || value.parse::<u32>().context("expected a number");
    match name {
        // Commas separate options.
        "endpoints" => args.endpoints = Some(value.split(';').map(str::to_owned).collect()),
        "client_id" => args.client_id = Some(value.into()),
        "config" => args.config = Some(value.into()),
        "deadline" => args.deadline = Some(value.parse()?),
        "connect_timeout" => args.connect_timeout = Some(seconds()?),
        "attr_ttl" => args.attr_ttl = Some(seconds()?),
        "entry_ttl" => args.entry_ttl = Some(seconds()?),
        "read_from" => args.read_from = Some(choice(value)?),
        "max_staleness" => args.max_staleness = Some(seconds()?),
        "readdirplus" => args.readdirplus = Some(choice(value)?),
        "locks" => args.locks = Some(choice(value)?),
        "threads" => args.threads = Some(number()? as usize),
        "read_ahead_kib" => args.read_ahead_kib = Some(number()?),
        "root_mode" => args.root_mode = Some(value.into()),
        "http" => args.http = Some(value.into()),
        "log_file" => args.log_file = Some(value.into()),
        "log_format" => args.log_format = Some(choice(value)?),
        "log_level" => args.log_level = Some(value.into()),
        _ => bail!("not a setting"),
    }
    Ok(())
}

fn choice<T: ValueEnum>(value: &str) -> Result<T> {
    let names =
        || T::value_variants().iter().filter_map(|v| Some(v.to_possible_value()?.get_name().to_owned()));
    T::from_str(value, false)
        .map_err(|_| anyhow::anyhow!("expected one of {}", names().collect::<Vec<_>>().join(", ")))
}

fn read(path: &Path) -> Result<File> {
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    parse(&text).with_context(|| format!("in {}", path.display()))
}

fn parse(text: &str) -> Result<File> {
    // A file of comments only is no map: it says nothing.
    let file: Option<File> = serde_saphyr::from_str(text)?;
    Ok(file.unwrap_or_default())
}

fn resolve(args: Args, file: File, mut options: options::MountOptions) -> Result<Settings> {
    let (source, mount_point) = match args.paths.as_slice() {
        [mount_point] => (None, mount_point),
        [source, mount_point] => (Some(source), mount_point),
        _ => bail!("expected a mount point, or a source and a mount point"),
    };
    let source = source.map(|source| source.to_str().context("the source is not UTF-8")).transpose()?;
    // By this mount(8) knows that a line of fstab is mounted.
    let shown = options.source.or(source.map(str::to_owned)).unwrap_or_else(|| "shardfs".to_owned());
    // fstab needs something in its first column: these stand for the configured endpoints.
    let source = source.filter(|source| !matches!(*source, "none" | "shardfs"));
    let source = source.map(|list| list.split([',', ';']).map(str::to_owned).collect::<Vec<_>>());
    let explicit = options.settings.iter().any(|(name, _)| name == "endpoints");
    let endpoints = if explicit { args.endpoints } else { source.or(args.endpoints).or(file.endpoints) };
    let endpoints = endpoints.context(
        "no node is given: use --endpoints, SHARDFS_ENDPOINTS, a source or `endpoints:` in --config",
    )?;
    let endpoints = endpoints.iter().map(|e| endpoint(e.trim())).collect::<Result<Vec<_>>>()?;

    let root_mode = args.root_mode.or(file.root_mode).unwrap_or_else(|| "0755".to_owned());
    let root_mode =
        u32::from_str_radix(&root_mode, 8).ok().filter(|mode| *mode <= 0o7777).with_context(|| {
            format!("--root-mode {root_mode:?}: expected an octal mode, such as 0755 or 1777")
        })?;
    let threads = args.threads.or(file.threads).unwrap_or(THREADS_DEFAULT);
    if threads == 0 || threads > THREADS_MAX {
        bail!("--threads {threads}: expected 1 to {THREADS_MAX}");
    }
    let seconds = |name: &str, flag: Option<f64>, file: Option<f64>, default: Duration| match flag.or(file) {
        Some(seconds) if (0.0..=SECONDS_MAX).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        Some(seconds) => bail!("--{name} {seconds}: expected 0 to {SECONDS_MAX} seconds"),
        None => Ok(default),
    };
    let attr_ttl = seconds("attr-ttl", args.attr_ttl, file.attr_ttl, Duration::ZERO)?;
    let deadline = match args.deadline.or(file.deadline) {
        Some(Deadline::Hard) => DEADLINE_NEVER,
        Some(Deadline::Seconds(given)) => seconds("deadline", Some(given), None, DEADLINE_DEFAULT)?,
        Some(Deadline::Soft) | None => DEADLINE_DEFAULT,
    };
    if deadline.is_zero() {
        bail!("--deadline 0: requests need some time");
    }
    let staleness = args.max_staleness.or(file.max_staleness);
    let reads = match args.read_from.or(file.read_from) {
        Some(Who::Backup) => {
            // What a mount writes, it would not see for a while: that is no file system.
            options.flags.insert(MountFlags::RDONLY);
            let max_staleness = seconds("max-staleness", staleness, None, STALENESS_DEFAULT)?;
            ReadFrom::Backup { max_staleness }
        }
        Some(Who::Primary) | None if staleness.is_some() => {
            bail!("--max-staleness is for --read-from backup: the primary's answers are not stale")
        }
        Some(Who::Primary) | None => ReadFrom::Primary,
    };
    let posix_locks = match (args.locks.or(file.locks), reads) {
        (Some(Locks::Shared), ReadFrom::Backup { .. }) => {
            bail!("--locks shared: with --read-from backup the mount changes nothing, locks neither")
        }
        (Some(Locks::Local), _) | (None, ReadFrom::Backup { .. }) => false,
        (Some(Locks::Shared) | None, ReadFrom::Primary) => true,
    };
    let http = args.http.or(file.http);
    let http = http.map(|http| {
        http.parse().with_context(|| format!("--http {http:?}: expected IP:PORT, such as 127.0.0.1:7480"))
    });
    let absolute = |name: &str, path: &Path| {
        std::path::absolute(path).with_context(|| format!("{name} {}", path.display()))
    };
    let log_file = args.log_file.or(file.log_file).map(|path| absolute("--log-file", &path)).transpose()?;
    let client_id = args.client_id.or(file.client_id).unwrap_or_else(|| "default".to_owned());
    Ok(Settings {
        mount_point: absolute("the mount point", mount_point)?,
        source: shown,
        endpoints,
        client_id: ClientId::new(client_id).context("--client-id")?,
        foreground: args.foreground,
        flags: options.flags,
        allow_other: args.allow_other || options.allow_other || rustix::process::geteuid().is_root(),
        deadline,
        connect_timeout: seconds(
            "connect-timeout",
            args.connect_timeout,
            file.connect_timeout,
            CONNECT_TIMEOUT_DEFAULT,
        )?,
        attr_ttl,
        entry_ttl: seconds("entry-ttl", args.entry_ttl, file.entry_ttl, Duration::ZERO)?,
        reads,
        readdirplus: match args.readdirplus.or(file.readdirplus).unwrap_or(Readdirplus::Auto) {
            Readdirplus::Auto => !attr_ttl.is_zero(),
            Readdirplus::On => true,
            Readdirplus::Off => false,
        },
        posix_locks,
        threads,
        read_ahead_kib: args.read_ahead_kib.or(file.read_ahead_kib).unwrap_or(READ_AHEAD_KIB_DEFAULT),
        root_mode,
        http: http.transpose()?,
        log_file,
        log_format: args.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
        log_level: args.log_level.or(file.log_level).unwrap_or_else(|| "info".to_owned()),
        replace_dead: args.replace_dead,
        ready_fd: args.ready_fd,
    })
}

/// `unix:/path`, `http://host:port`, or `host:port` for the latter.
fn endpoint(text: &str) -> Result<String> {
    if let Some(path) = text.strip_prefix("unix:") {
        if !path.starts_with('/') {
            bail!(
                "endpoint {text:?}: the path of a unix socket must be absolute, as in unix:/run/shardfs.sock"
            );
        }
        return Ok(text.to_owned());
    }
    let address = text.strip_prefix("http://").unwrap_or(text).trim_end_matches('/');
    let good = match address.rsplit_once(':') {
        Some((host, port)) => {
            !host.is_empty()
                && !host.contains('/')
                && (!host.contains(':') || (host.starts_with('[') && host.ends_with(']')))
                && port.parse::<u16>().is_ok_and(|port| port != 0)
        }
        None => false,
    };
    if !good {
        bail!("endpoint {text:?}: expected HOST:PORT, http://HOST:PORT or unix:/PATH");
    }
    Ok(format!("http://{address}"))
}

#[cfg(test)]
mod tests;
