//! The command line: `shardfsd` itself, and the forms in which mount(8) calls a mount helper.

use std::ffi::OsString;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use rustix::mount::MountFlags;
use serde::Deserialize;

/// Exit status of a mount helper whose mount failed (mount(8)).
pub const EXIT_MOUNT_FAILED: u8 = 32;
/// Exit status of the daemon when its settings are wrong, which no restart mends: EX_CONFIG of sysexits.h.
pub const EXIT_CONFIG: u8 = 78;

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// When directories are read together with attributes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Readdirplus {
    /// If the kernel may keep attributes for a time.
    Auto,
    /// As the kernel sees fit.
    On,
    /// Never.
    Off,
}

/// Who may answer the mount's reads.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Who {
    /// The primary; of a closed shard every node that has its volume.
    Primary,
    /// A backup, from a view that may be some seconds old. The mount is read-only.
    Backup,
}

/// How long requests are repeated.
#[derive(Clone, Copy, PartialEq, Debug, Deserialize)]
#[serde(try_from = "DeadlineWord")]
pub enum Deadline {
    /// For so many seconds.
    Seconds(f64),
    /// For the default time.
    Soft,
    /// For ever.
    Hard,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum DeadlineWord {
    Number(f64),
    Word(String),
}

impl TryFrom<DeadlineWord> for Deadline {
    type Error = anyhow::Error;

    fn try_from(word: DeadlineWord) -> Result<Deadline> {
        match word {
            DeadlineWord::Number(seconds) => Ok(Deadline::Seconds(seconds)),
            DeadlineWord::Word(word) => word.parse(),
        }
    }
}

impl FromStr for Deadline {
    type Err = anyhow::Error;

    fn from_str(word: &str) -> Result<Deadline> {
        match word {
            "hard" => Ok(Deadline::Hard),
            "soft" => Ok(Deadline::Soft),
            seconds => {
                seconds.parse().map(Deadline::Seconds).context("expected seconds, such as 1.5, or `hard`")
            }
        }
    }
}

/// For whom POSIX locks hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Locks {
    /// For all mounts of the cluster.
    Shared,
    /// For processes of this mount.
    Local,
}

/// Mounts a ShardFS cluster: its shards as directories, their keys as files.
///
/// Goes to the background once the mount is usable, and ends when the mount is unmounted (`umount`,
/// `fusermount3 -u`) or at SIGTERM or SIGINT, which unmount it. At SIGHUP it opens its log file anew and takes up another
/// --log-level; in the foreground of a terminal it unmounts. A daemon that dies is started again at the same place by its parent
/// process; what was open there fails, everything else goes on. Settings come from -o, then flags, then the environment, then the YAML
/// file named by --config, then defaults. SOURCE, as mount(8) gives it, is a
/// list of endpoints.
#[derive(Parser, Clone, Debug, Default)]
#[command(
    name = "shardfsd",
    version,
    override_usage = "shardfsd [OPTIONS] [SOURCE] <MOUNTPOINT>",
    after_help = EXAMPLES
)]
pub struct Args {
    /// Where to mount: a directory that exists. Before it, if given, SOURCE: endpoints
    #[arg(value_name = "MOUNTPOINT", num_args = 1..=2, required = true)]
    pub paths: Vec<PathBuf>,
    /// YAML file with settings (see shardfsd.example.yaml)
    #[arg(long, value_name = "FILE", env = "SHARDFS_FSD_CONFIG")]
    pub config: Option<PathBuf>,
    /// Addresses of any nodes, preferred first: unix:/PATH or HOST:PORT, separated by commas
    #[arg(long, value_name = "ENDPOINTS", env = "SHARDFS_ENDPOINTS", value_delimiter = ',')]
    pub endpoints: Option<Vec<String>>,
    /// The client id (tenant) to act for [default: default]
    #[arg(long, value_name = "ID", env = "SHARDFS_CLIENT_ID")]
    pub client_id: Option<String>,
    /// Stay in the foreground, and log to standard error
    #[arg(short, long)]
    pub foreground: bool,
    /// Mount options, as in fstab: ro, suid, dev, noexec, sync, dirsync, noatime, allow_other, or any setting as
    /// NAME=VALUE with `_` for `-`
    #[arg(short = 'o', value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Let other users in [default: if root mounts]
    #[arg(long)]
    pub allow_other: bool,
    /// Seconds for which a request is repeated while the cluster does not answer; then EIO. Or `hard`: for ever. Whoever waits can
    /// be killed at any time. As mount options also `soft`, `soft=SECONDS` and `hard` [default: 60]
    #[arg(long, value_name = "SECONDS|hard", env = "SHARDFS_DEADLINE")]
    pub deadline: Option<Deadline>,
    /// Seconds to wait for a node to answer before mounting [default: 10]
    #[arg(long, value_name = "SECONDS", env = "SHARDFS_CONNECT_TIMEOUT")]
    pub connect_timeout: Option<f64>,
    /// Seconds for which the kernel may keep attributes of active shards. More than 0 is right only while this
    /// mount is the only one that writes [default: 0]
    #[arg(long, value_name = "SECONDS", env = "SHARDFS_ATTR_TTL")]
    pub attr_ttl: Option<f64>,
    /// The same for names [default: 0]
    #[arg(long, value_name = "SECONDS", env = "SHARDFS_ENTRY_TTL")]
    pub entry_ttl: Option<f64>,
    /// Who may answer reads; with `backup` the mount is read-only, and shows shards as they were up to --max-staleness ago
    /// [default: primary]
    #[arg(long, value_name = "WHO", env = "SHARDFS_READ_FROM")]
    pub read_from: Option<Who>,
    /// With --read-from backup: seconds by which what is shown may be old [default: 10]
    #[arg(long, value_name = "SECONDS", env = "SHARDFS_MAX_STALENESS")]
    pub max_staleness: Option<f64>,
    /// Read directories together with attributes [default: auto]
    #[arg(long, value_name = "WHEN", env = "SHARDFS_READDIRPLUS")]
    pub readdirplus: Option<Readdirplus>,
    /// For whom POSIX locks (fcntl, lockf) hold: shared, for all mounts, kept by the shard; local, for the processes of this mount. Those of
    /// flock(2) hold for this mount only, always [default: shared; local with --read-from backup]
    #[arg(long, value_name = "WHOM", env = "SHARDFS_LOCKS")]
    pub locks: Option<Locks>,
    /// Threads that take requests from the kernel [default: 4]
    #[arg(long, value_name = "N", env = "SHARDFS_THREADS")]
    pub threads: Option<usize>,
    /// Read-ahead of the kernel in KiB; 0: the kernel's default [default: 1024]
    #[arg(long, value_name = "KIB", env = "SHARDFS_READ_AHEAD_KIB")]
    pub read_ahead_kib: Option<u32>,
    /// Permission bits of the mount's root, octal: who may make shards there [default: 0755]
    #[arg(long, value_name = "MODE", env = "SHARDFS_ROOT_MODE")]
    pub root_mode: Option<String>,
    /// Address for /metrics and /healthz over HTTP [default: none]
    #[arg(long, value_name = "IP:PORT", env = "SHARDFS_FSD_HTTP")]
    pub http: Option<String>,
    /// File to append log lines to [default: standard error in the foreground, else none]
    #[arg(long, value_name = "FILE", env = "SHARDFS_FSD_LOG_FILE")]
    pub log_file: Option<PathBuf>,
    /// How log lines look [default: text]
    #[arg(long, value_name = "FORMAT", env = "SHARDFS_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug, trace, or filters such as shardfsd=debug [default: info]
    #[arg(long, value_name = "FILTER", env = "SHARDFS_LOG_LEVEL")]
    pub log_level: Option<String>,
    /// Take away a dead mount at MOUNTPOINT, whose daemon is gone, when everything else is ready; and leave one there if this
    /// daemon dies for good: whoever starts it again has it taken away
    #[arg(long)]
    pub replace_dead: bool,
    /// Do not start the daemon again when it dies
    #[arg(long)]
    pub no_restart: bool,
    /// With --foreground: write "ready" and a newline to this descriptor once the mount is usable
    #[arg(long, value_name = "FD", requires = "foreground")]
    pub ready_fd: Option<RawFd>,
    /// Pass over unknown mount options, as mount(8) -s asks.
    #[arg(skip)]
    pub sloppy: bool,
}

const EXAMPLES: &str = "\
Examples:
  shardfsd /mnt/shards --endpoints node-1:7400,node-2:7400 --client-id photos
  shardfsd /mnt/shards --config /etc/shardfs/shardfsd.yaml -o ro,noexec
  mount -t fuse.shardfs node-1:7400,node-2:7400 /mnt/shards -o client_id=photos
In fstab (with shardfsd linked as /sbin/mount.fuse.shardfs):
  node-1:7400,node-2:7400 /mnt/shards fuse.shardfs client_id=photos,_netdev 0 0

Should the mount point say \"Transport endpoint is not connected\" for long, the daemon and its parent are gone: `shardfs
umount /mnt/shards` (or, as root, `umount /mnt/shards`) mends it.";

/// How the program was called.
#[derive(Debug)]
pub enum Invocation {
    /// To mount.
    Mount(Box<Args>),
    /// As a mount helper: to change the flags of what is mounted there.
    Remount {
        /// Where it is mounted.
        point: PathBuf,
        /// All of them, old and new.
        flags: MountFlags,
    },
    /// As a mount helper that is to do nothing but check its arguments (mount(8) -f).
    Pretend,
}

/// Whether this name of the program is that of a mount helper.
pub fn is_helper(program: &OsString) -> bool {
    let name = Path::new(program).file_name();
    name.is_some_and(|name| name == "mount.fuse.shardfs" || name == "mount.shardfs")
}

/// Reads the arguments of a mount helper: `SOURCE DIR [-sfnv] [-N NS] [-o OPTIONS] [-t TYPE]` (mount(8)).
pub fn parse_helper(words: impl IntoIterator<Item = OsString>) -> Result<Invocation> {
    let mut args = Args::default();
    let mut pretend = false;
    let mut words = words.into_iter();
    while let Some(word) = words.next() {
        let text = word.to_str().unwrap_or_default();
        match text.strip_prefix('-') {
            None | Some("") => args.paths.push(word.into()),
            Some("o") => {
                let options = words.next().context("-o: no options follow")?;
                let options = options.into_string().ok().context("-o: not UTF-8")?;
                args.options.push(options);
            }
            Some("t" | "N") => {
                words.next().with_context(|| format!("{text}: nothing follows"))?;
            }
            Some(flags) => {
                for flag in flags.chars() {
                    match flag {
                        's' => args.sloppy = true,
                        'f' => pretend = true,
                        'n' | 'v' => {}
                        _ => bail!("flag -{flag} of a mount helper is not known"),
                    }
                }
            }
        }
    }
    if args.paths.len() != 2 {
        bail!(
            "a mount helper is called with a source and a mount point, not with {} paths",
            args.paths.len()
        );
    }
    let options = crate::options::parse(args.options.iter().map(String::as_str), args.sloppy)?;
    if pretend {
        return Ok(Invocation::Pretend);
    }
    if options.remount {
        return Ok(Invocation::Remount { point: args.paths.remove(1), flags: options.flags });
    }
    // mount(8) cleans the environment, but its caller may have set some: the same names as for the daemon.
    let from_environment = Args::try_parse_from([OsString::from("shardfsd"), OsString::from("/")])?;
    Ok(Invocation::Mount(Box::new(Args {
        paths: args.paths,
        options: args.options,
        sloppy: args.sloppy,
        ..from_environment
    })))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn helper(words: &[&str]) -> Result<Invocation> {
        parse_helper(words.iter().map(OsString::from))
    }

    #[test]
    fn the_names_of_a_mount_helper_are_known() {
        assert!(is_helper(&"/sbin/mount.fuse.shardfs".into()));
        assert!(is_helper(&"mount.shardfs".into()));
        assert!(!is_helper(&"/usr/bin/shardfsd".into()));
    }

    #[test]
    fn mount_calls_its_helper_like_this() {
        let words = ["h:1,h:2", "/mnt/x", "-n", "-o", "rw,client_id=a", "-t", "fuse.shardfs"];
        let Invocation::Mount(args) = helper(&words).unwrap() else { panic!("not a mount") };
        assert_eq!(args.paths, [PathBuf::from("h:1,h:2"), PathBuf::from("/mnt/x")]);
        assert_eq!(args.options, ["rw,client_id=a"]);
        assert!(!args.foreground && !args.sloppy);
        assert!(matches!(helper(&["h:1", "/mnt", "-f"]).unwrap(), Invocation::Pretend));
        assert!(helper(&["h:1", "/mnt", "-f", "-o", "nonsense"]).is_err());
        assert!(helper(&["h:1", "/mnt", "-sf", "-o", "nonsense"]).is_ok());
    }

    #[test]
    fn a_remount_is_told_from_a_mount() {
        let words = ["h:1", "/mnt", "-v", "-o", "rw,remount,noexec", "-t", "fuse.shardfs"];
        let Invocation::Remount { point, flags } = helper(&words).unwrap() else { panic!("not a remount") };
        assert_eq!(point, PathBuf::from("/mnt"));
        assert!(flags.contains(MountFlags::NOEXEC) && !flags.contains(MountFlags::RDONLY));
    }

    #[test]
    fn bad_calls_of_the_helper_are_explained() {
        assert!(helper(&["/mnt"]).unwrap_err().to_string().contains("1 paths"));
        assert!(helper(&["a", "/mnt", "-q"]).unwrap_err().to_string().contains("-q"));
        assert!(helper(&["a", "/mnt", "-o"]).is_err());
    }

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Args::command().debug_assert();
        let args =
            Args::try_parse_from(["shardfsd", "/m", "--endpoints", "a:1,unix:/s", "-f", "-o", "ro"]).unwrap();
        assert_eq!(args.endpoints.unwrap(), ["a:1", "unix:/s"]);
        assert!(args.foreground);
        assert!(Args::try_parse_from(["shardfsd"]).is_err());
    }
}
