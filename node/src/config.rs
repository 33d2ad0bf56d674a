//! The node's settings: flags over the environment over a YAML file over defaults.
//!
//! [`Args`] is what the command line and the environment say, [`File`] what a YAML file says, and
//! [`NodeConfig`] what they come to, checked. Unknown fields of the file are refused by name. Every setting is
//! explained in `shardfs-node.example.yaml`, which a test keeps complete.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::{Parser, ValueEnum};
use serde::Deserialize;
use shardfs_proto::types::{NodeId, VolumeId};

use crate::catalog::Tunable;
use crate::cluster::connect::MetaSettings;
use crate::shard::chunk::CHUNK_BYTES;

/// Half of what a read from a backup takes unless it says otherwise.
const PUBLISH_EVERY_DEFAULT: f64 = 5.0;
/// Views that are older are of no use to most.
const PUBLISH_EVERY_MAX: f64 = 3600.0;
/// A tag's value on EC2.
const TAG_BYTES_MAX: usize = 256;
/// Calls that a shutdown waits for.
const SHUTDOWN_DEFAULT: Duration = Duration::from_secs(10);
/// A block cache below this holds not even the indexes of a few shards.
const BLOCK_CACHE_BYTES_MIN: u64 = 8 << 20;
/// Write buffers below this make every shard flush all the time.
const WRITE_BUFFER_BYTES_MIN: u64 = 8 << 20;
/// Smaller chunks make more records than their content is worth; larger ones are read whole for a few bytes.
const CHUNK_SIZE_RANGE: std::ops::RangeInclusive<u32> = 16 << 10..=1 << 20;

/// How log lines look.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// A storage node of ShardFS: attaches volumes, keeps shards, serves gRPC.
///
/// Settings come from flags, then the environment, then the YAML file named by --config, then defaults.
/// The node learns from the metadata store which volumes are its own, attaches and mounts them under
/// DATA_DIR/volumes, and serves until SIGTERM or SIGINT; a second signal ends it at once. At SIGHUP it reads its settings again and
/// takes up --log-level, --shutdown-seconds, --default-limit and --publish-every; the others need a restart.
#[derive(Parser, Clone, Debug, Default)]
#[command(name = "shardfs-node", version, after_help = EXAMPLES)]
pub struct Args {
    /// YAML file with settings (see shardfs-node.example.yaml)
    #[arg(long, value_name = "FILE", env = "SHARDFS_NODE_CONFIG")]
    pub config: Option<PathBuf>,
    /// This node's id, unique in the cluster [default: the instance id, if there is one]
    #[arg(long, value_name = "ID", env = "NODE_ID")]
    pub id: Option<String>,
    /// Id of the machine in its cloud; stands in for --id
    #[arg(long, value_name = "ID", env = "INSTANCE_ID")]
    pub instance_id: Option<String>,
    /// Region of the machine in its cloud [default: with --aws-cluster, what the instance metadata service says]
    #[arg(long, value_name = "REGION", env = "AWS_REGION")]
    pub region: Option<String>,
    /// Availability zone of the machine [default: with --aws-cluster, what the instance metadata service says]
    #[arg(long, value_name = "ZONE", env = "AWS_ZONE")]
    pub zone: Option<String>,
    /// Use EBS volumes, as the cluster of this name: what belongs to it has it in the tag shardfs:cluster, which its instances' role is
    /// limited to. On EC2 only
    #[arg(long, value_name = "NAME", env = "SHARDFS_AWS_CLUSTER")]
    pub aws_cluster: Option<String>,
    /// Where EC2 answers [default: as the region has it]
    #[arg(long, value_name = "URL", env = "AWS_ENDPOINT_URL_EC2")]
    pub aws_endpoint: Option<String>,
    /// Where the instance metadata service answers [default: http://169.254.169.254]
    #[arg(long, value_name = "URL", env = "AWS_EC2_METADATA_SERVICE_ENDPOINT")]
    pub aws_metadata: Option<String>,
    /// Folder in which attached EBS volumes appear as links [default: /dev/disk/by-id]
    #[arg(long, value_name = "DIR", env = "SHARDFS_DEVICE_LINKS")]
    pub device_links: Option<PathBuf>,
    /// Folder for what this node keeps; volumes are mounted below it
    #[arg(long, value_name = "DIR", env = "SHARDFS_DATA_DIR")]
    pub data_dir: Option<PathBuf>,
    /// Address for gRPC; port 0: any that is free [default: 127.0.0.1:7400]
    #[arg(long, value_name = "IP:PORT", env = "SHARDFS_LISTEN")]
    pub listen: Option<String>,
    /// Unix socket for gRPC from the same machine
    #[arg(long, value_name = "PATH", env = "SHARDFS_LISTEN_UNIX")]
    pub listen_unix: Option<PathBuf>,
    /// Address that other machines reach --listen by [default: that of --listen]
    #[arg(long, value_name = "HOST:PORT", env = "SHARDFS_ADVERTISE")]
    pub advertise: Option<String>,
    /// Address for /metrics and /healthz over HTTP [default: none]
    #[arg(long, value_name = "IP:PORT", env = "SHARDFS_HTTP")]
    pub http: Option<String>,
    /// The metadata store: etcd://HOST:PORT[,HOST:PORT...], etcds://... for an etcd with TLS; http://HOST:PORT or
    /// unix:/PATH for an embedded one
    #[arg(long, value_name = "ADDRESS", env = "SHARDFS_META")]
    pub meta: Option<String>,
    /// Who signed the certificates of etcds://, in PEM [default: whom this machine trusts]
    #[arg(long, value_name = "FILE", env = "SHARDFS_META_CA_FILE")]
    pub meta_ca_file: Option<PathBuf>,
    /// Certificate to show to etcds://, in PEM; needs --meta-key-file
    #[arg(long, value_name = "FILE", env = "SHARDFS_META_CERT_FILE")]
    pub meta_cert_file: Option<PathBuf>,
    /// Key of --meta-cert-file, in PEM
    #[arg(long, value_name = "FILE", env = "SHARDFS_META_KEY_FILE")]
    pub meta_key_file: Option<PathBuf>,
    /// User of etcd; its password is in --meta-password-file or in SHARDFS_META_PASSWORD
    #[arg(long, value_name = "NAME", env = "SHARDFS_META_USER")]
    pub meta_user: Option<String>,
    /// File with the password of --meta-user
    #[arg(long, value_name = "FILE", env = "SHARDFS_META_PASSWORD_FILE")]
    pub meta_password_file: Option<PathBuf>,
    /// Path of a device volume on this machine, if it differs from the one in the volume's record; may be repeated
    #[arg(long = "device", value_name = "VOLUME=PATH", env = "SHARDFS_DEVICES", value_delimiter = ',')]
    pub devices: Vec<String>,
    /// Folder for backups of volumes of kind loop, on the filesystem of their backing files [default: beside each of them]
    #[arg(long, value_name = "DIR", env = "SHARDFS_BACKUP_DIR")]
    pub backup_dir: Option<PathBuf>,
    /// Memory for cached blocks of all shards, such as 512MiB [default: 256MiB]
    #[arg(long, value_name = "BYTES", env = "SHARDFS_BLOCK_CACHE")]
    pub block_cache: Option<String>,
    /// Memory for writes not yet in files, of all shards [default: 256MiB]
    #[arg(long, value_name = "BYTES", env = "SHARDFS_WRITE_BUFFER")]
    pub write_buffer: Option<String>,
    /// Shards open at a time; the longest idle is closed for the next [default: 512]
    #[arg(long, value_name = "N", env = "SHARDFS_OPEN_SHARDS")]
    pub open_shards: Option<usize>,
    /// Limit on the bytes of a new shard that asks for none; 0: the volume's room [default: 0]
    #[arg(long, value_name = "BYTES", env = "SHARDFS_DEFAULT_LIMIT")]
    pub default_limit: Option<String>,
    /// Bytes of a chunk of the files of new shards, a power of two from 16KiB to 1MiB [default: 64KiB]
    #[arg(long, value_name = "BYTES", env = "SHARDFS_CHUNK_SIZE")]
    pub chunk_size: Option<String>,
    /// Seconds between two views of a shard that is read on backups and changes; 0: no views, so nothing can be read on backups
    /// [default: 5]
    #[arg(long, value_name = "SECONDS", env = "SHARDFS_PUBLISH_EVERY")]
    pub publish_every: Option<f64>,
    /// Seconds that a shutdown waits for calls under way [default: 10]
    #[arg(long, value_name = "SECONDS", env = "SHARDFS_SHUTDOWN_SECONDS")]
    pub shutdown_seconds: Option<u64>,
    /// How log lines look [default: text]
    #[arg(long, value_name = "FORMAT", env = "SHARDFS_LOG_FORMAT")]
    pub log_format: Option<LogFormat>,
    /// What is logged: error, warn, info, debug, trace, or filters such as shardfs_node=debug [default: info]
    #[arg(long, value_name = "FILTER", env = "SHARDFS_LOG_LEVEL")]
    pub log_level: Option<String>,
    /// Write the node's addresses as a line of JSON to this descriptor once it serves
    #[arg(long, value_name = "FD")]
    pub ready_fd: Option<RawFd>,
}

const EXAMPLES: &str = "\
Examples:
  shardfs-node --id node-1 --data-dir /var/lib/shardfs --listen 10.0.0.11:7400 \
    --meta etcd://10.0.0.1:2379,10.0.0.2:2379,10.0.0.3:2379
  shardfs-node --config /etc/shardfs/node.yaml

For a whole cluster on one machine, use `shardfs dev up`.";

/// The YAML file. Every field may be left out.
#[derive(Deserialize, Debug, Default)]
#[serde(deny_unknown_fields)]
pub struct File {
    id: Option<String>,
    region: Option<String>,
    zone: Option<String>,
    aws_cluster: Option<String>,
    aws_endpoint: Option<String>,
    aws_metadata: Option<String>,
    device_links: Option<PathBuf>,
    data_dir: Option<PathBuf>,
    listen: Option<String>,
    listen_unix: Option<PathBuf>,
    advertise: Option<String>,
    http: Option<String>,
    meta: Option<String>,
    meta_ca_file: Option<PathBuf>,
    meta_cert_file: Option<PathBuf>,
    meta_key_file: Option<PathBuf>,
    meta_user: Option<String>,
    meta_password_file: Option<PathBuf>,
    devices: Option<Vec<String>>,
    backup_dir: Option<PathBuf>,
    block_cache: Option<String>,
    write_buffer: Option<String>,
    open_shards: Option<usize>,
    default_limit: Option<String>,
    chunk_size: Option<String>,
    publish_every: Option<f64>,
    shutdown_seconds: Option<u64>,
    log_format: Option<LogFormat>,
    log_level: Option<String>,
}

/// A node's settings, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeConfig {
    /// Its id.
    pub id: NodeId,
    /// Its machine's id in its cloud.
    pub instance_id: Option<String>,
    /// Its cloud's region.
    pub region: Option<String>,
    /// Its zone there.
    pub zone: Option<String>,
    /// The name of the cluster in the cloud's tags; `None`: no cloud is used.
    pub aws_cluster: Option<String>,
    /// Where EC2 answers.
    pub aws_endpoint: Option<String>,
    /// Where the instance metadata service answers.
    pub aws_metadata: Option<String>,
    /// Where attached EBS volumes appear.
    pub device_links: Option<PathBuf>,
    /// Where it keeps what it keeps.
    pub data_dir: PathBuf,
    /// gRPC over TCP.
    pub listen: SocketAddr,
    /// gRPC over a unix socket.
    pub listen_unix: Option<PathBuf>,
    /// What others reach `listen` by, as HOST:PORT.
    pub advertise: Option<String>,
    /// HTTP.
    pub http: Option<SocketAddr>,
    /// The metadata store.
    pub meta: MetaSettings,
    /// Paths of device volumes on this machine.
    pub devices: BTreeMap<VolumeId, PathBuf>,
    /// Where backups of loop volumes lie; `None`: beside their backing files.
    pub backup_dir: Option<PathBuf>,
    /// Bytes of the block cache.
    pub block_cache_bytes: u64,
    /// Bytes of write buffers.
    pub write_buffer_bytes: u64,
    /// Shards open at a time.
    pub open_shards_max: usize,
    /// Limit of a new shard that asks for none.
    pub default_limit_bytes: Option<u64>,
    /// Bytes of a chunk of new shards.
    pub chunk_bytes: u32,
    /// Pause between two views of a shard that is read on backups; zero: none.
    pub publish_every: Duration,
    /// Patience of a shutdown.
    pub shutdown: Duration,
    /// How log lines look.
    pub log_format: LogFormat,
    /// What is logged.
    pub log_level: String,
    /// Where to say that it serves.
    pub ready_fd: Option<RawFd>,
}

impl NodeConfig {
    /// Reads the file that `args` name, if any, and puts the layers together. Files that the settings name must be
    /// there.
    pub fn load(args: Args) -> Result<NodeConfig> {
        let file = match &args.config {
            Some(path) => read(path)?,
            None => File::default(),
        };
        let config = resolve(args, file)?;
        config.meta.check().context("--meta")?;
        if config.aws_cluster.is_some() && !cfg!(feature = "aws") {
            bail!("--aws-cluster: this program was built without AWS: build it with `--features aws`");
        }
        Ok(config)
    }

    /// What may change while the catalog runs.
    pub fn tunable(&self) -> Tunable {
        Tunable { limit_bytes_default: self.default_limit_bytes, publish_every: self.publish_every }
    }

    /// The settings in which two differ, by name. Where it says that it serves is none: that is said once.
    pub fn differences(&self, other: &NodeConfig) -> Vec<&'static str> {
        let NodeConfig {
            id,
            instance_id,
            region,
            zone,
            aws_cluster,
            aws_endpoint,
            aws_metadata,
            device_links,
            data_dir,
            listen,
            listen_unix,
            advertise,
            http,
            meta,
            devices,
            backup_dir,
            block_cache_bytes,
            write_buffer_bytes,
            open_shards_max,
            default_limit_bytes,
            chunk_bytes,
            publish_every,
            shutdown,
            log_format,
            log_level,
            ready_fd: _,
        } = self;
        [
            ("id", *id != other.id),
            ("instance_id", *instance_id != other.instance_id),
            ("region", *region != other.region),
            ("zone", *zone != other.zone),
            ("aws_cluster", *aws_cluster != other.aws_cluster),
            ("aws_endpoint", *aws_endpoint != other.aws_endpoint),
            ("aws_metadata", *aws_metadata != other.aws_metadata),
            ("device_links", *device_links != other.device_links),
            ("data_dir", *data_dir != other.data_dir),
            ("listen", *listen != other.listen),
            ("listen_unix", *listen_unix != other.listen_unix),
            ("advertise", *advertise != other.advertise),
            ("http", *http != other.http),
            ("meta", *meta != other.meta),
            ("devices", *devices != other.devices),
            ("backup_dir", *backup_dir != other.backup_dir),
            ("block_cache", *block_cache_bytes != other.block_cache_bytes),
            ("write_buffer", *write_buffer_bytes != other.write_buffer_bytes),
            ("open_shards", *open_shards_max != other.open_shards_max),
            ("default_limit", *default_limit_bytes != other.default_limit_bytes),
            ("chunk_size", *chunk_bytes != other.chunk_bytes),
            ("publish_every", *publish_every != other.publish_every),
            ("shutdown_seconds", *shutdown != other.shutdown),
            ("log_format", *log_format != other.log_format),
            ("log_level", *log_level != other.log_level),
        ]
        .into_iter()
        .filter_map(|(name, differs)| differs.then_some(name))
        .collect()
    }
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

fn resolve(args: Args, file: File) -> Result<NodeConfig> {
    let id = args
        .id
        .or(file.id)
        .or_else(|| args.instance_id.clone())
        .context("no node id: give --id, NODE_ID or `id:`")?;
    let data_dir =
        args.data_dir.or(file.data_dir).context("no data folder: give --data-dir or `data_dir:`")?;
    let meta = MetaSettings {
        address: args.meta.or(file.meta).context("no metadata store: give --meta or `meta:`")?,
        ca_file: args.meta_ca_file.or(file.meta_ca_file),
        cert_file: args.meta_cert_file.or(file.meta_cert_file),
        key_file: args.meta_key_file.or(file.meta_key_file),
        user: args.meta_user.or(file.meta_user),
        password_file: args.meta_password_file.or(file.meta_password_file),
    };
    let bytes = |name: &str, flag: Option<String>, file: Option<String>, default: u64| match flag.or(file) {
        Some(text) => parse_bytes(&text).with_context(|| format!("--{name}")),
        None => Ok(default),
    };
    let block_cache_bytes = bytes("block-cache", args.block_cache, file.block_cache, 256 << 20)?;
    let write_buffer_bytes = bytes("write-buffer", args.write_buffer, file.write_buffer, 256 << 20)?;
    if block_cache_bytes < BLOCK_CACHE_BYTES_MIN {
        bail!("--block-cache: {block_cache_bytes} bytes are too few, the least is {BLOCK_CACHE_BYTES_MIN}");
    }
    if write_buffer_bytes < WRITE_BUFFER_BYTES_MIN {
        bail!(
            "--write-buffer: {write_buffer_bytes} bytes are too few, the least is {WRITE_BUFFER_BYTES_MIN}"
        );
    }
    let default_limit = bytes("default-limit", args.default_limit, file.default_limit, 0)?;
    let chunk_bytes = bytes("chunk-size", args.chunk_size, file.chunk_size, u64::from(CHUNK_BYTES))?;
    let chunk_bytes = match u32::try_from(chunk_bytes) {
        Ok(bytes) if bytes.is_power_of_two() && CHUNK_SIZE_RANGE.contains(&bytes) => bytes,
        _ => bail!("--chunk-size: {chunk_bytes} bytes are not a power of two from 16KiB to 1MiB"),
    };
    let publish_every = args.publish_every.or(file.publish_every).unwrap_or(PUBLISH_EVERY_DEFAULT);
    if !(0.0..=PUBLISH_EVERY_MAX).contains(&publish_every) {
        bail!("--publish-every: {publish_every} is not in 0..={PUBLISH_EVERY_MAX} seconds");
    }
    let publish_every = Duration::from_secs_f64(publish_every);
    let open_shards_max = args.open_shards.or(file.open_shards).unwrap_or(512);
    if open_shards_max == 0 {
        bail!("--open-shards: at least 1 shard must be allowed to be open");
    }
    let listen = args.listen.or(file.listen).unwrap_or_else(|| "127.0.0.1:7400".to_owned());
    let http = args.http.or(file.http);
    let shutdown = args.shutdown_seconds.or(file.shutdown_seconds).map(Duration::from_secs);
    Ok(NodeConfig {
        id: NodeId::new(id).context("--id")?,
        instance_id: args.instance_id,
        region: args.region.or(file.region),
        zone: args.zone.or(file.zone),
        aws_cluster: aws_cluster(args.aws_cluster.or(file.aws_cluster))?,
        aws_endpoint: args.aws_endpoint.or(file.aws_endpoint),
        aws_metadata: args.aws_metadata.or(file.aws_metadata),
        device_links: args.device_links.or(file.device_links),
        data_dir: std::path::absolute(&data_dir)
            .with_context(|| format!("--data-dir {}", data_dir.display()))?,
        listen: address("listen", &listen)?,
        listen_unix: args.listen_unix.or(file.listen_unix),
        advertise: args.advertise.or(file.advertise),
        http: http.map(|http| address("http", &http)).transpose()?,
        meta,
        devices: devices(&if args.devices.is_empty() {
            file.devices.unwrap_or_default()
        } else {
            args.devices
        })?,
        backup_dir: match args.backup_dir.or(file.backup_dir) {
            Some(folder) => Some(
                std::path::absolute(&folder).with_context(|| format!("--backup-dir {}", folder.display()))?,
            ),
            None => None,
        },
        block_cache_bytes,
        write_buffer_bytes,
        open_shards_max,
        default_limit_bytes: (default_limit != 0).then_some(default_limit),
        chunk_bytes,
        publish_every,
        shutdown: shutdown.unwrap_or(SHUTDOWN_DEFAULT),
        log_format: args.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
        log_level: args.log_level.or(file.log_level).unwrap_or_else(|| "info".to_owned()),
        ready_fd: args.ready_fd,
    })
}

/// The name in the cloud's tags.
fn aws_cluster(name: Option<String>) -> Result<Option<String>> {
    match name {
        Some(name) if name.is_empty() || name.len() > TAG_BYTES_MAX => {
            bail!("--aws-cluster {name:?}: expected a name of 1 to {TAG_BYTES_MAX} bytes")
        }
        name => Ok(name),
    }
}

fn devices(pairs: &[String]) -> Result<BTreeMap<VolumeId, PathBuf>> {
    let mut devices = BTreeMap::new();
    for pair in pairs {
        let (id, path) = pair
            .split_once('=')
            .filter(|(_, path)| path.starts_with('/'))
            .with_context(|| format!("--device {pair:?}: expected VOLUME=PATH, such as vol-1=/dev/sdb"))?;
        let id = VolumeId::new(id).with_context(|| format!("--device {pair:?}"))?;
        if devices.insert(id.clone(), PathBuf::from(path)).is_some() {
            bail!("--device: {id} is named twice");
        }
    }
    Ok(devices)
}

fn address(name: &str, text: &str) -> Result<SocketAddr> {
    text.parse().with_context(|| format!("--{name} {text:?}: expected IP:PORT, such as 127.0.0.1:7400"))
}

/// A number of bytes: digits, with KiB, MiB, GiB or TiB behind them if wanted.
pub fn parse_bytes(text: &str) -> Result<u64> {
    let text = text.trim();
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..].trim() {
        "" | "B" => 0,
        "KiB" | "K" | "k" => 10,
        "MiB" | "M" => 20,
        "GiB" | "G" => 30,
        "TiB" | "T" => 40,
        unit => bail!("{text:?}: unit {unit:?} is unknown, there are KiB, MiB, GiB and TiB"),
    };
    let number: u64 =
        digits.parse().with_context(|| format!("{text:?} is no number of bytes, such as 512MiB"))?;
    number.checked_mul(1 << shift).with_context(|| format!("{text:?} is more bytes than 64 bits count"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const EXAMPLE: &str = include_str!("../shardfs-node.example.yaml");

    fn args(words: &[&str]) -> Args {
        Args::try_parse_from(std::iter::once("shardfs-node").chain(words.iter().copied())).unwrap()
    }

    fn needed() -> Args {
        args(&["--id", "n", "--data-dir", "/d", "--meta", "unix:/m"])
    }

    /// The example with its settings switched on.
    fn example() -> String {
        EXAMPLE.lines().map(|line| line.strip_prefix("#: ").unwrap_or(line)).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn the_example_is_valid_and_complete() {
        parse(EXAMPLE).unwrap();
        let all = parse(&example()).unwrap();
        let shown = format!("{all:?}");
        assert!(!shown.contains("None"), "the example lacks a setting: {shown}");
        resolve(Args::default(), all).unwrap();
    }

    #[test]
    fn devices_come_from_flags_or_the_file() {
        let file = || parse("devices: [vol-1=/dev/sdb, vol-2=/dev/disk/by-id/x]\n").unwrap();
        let of = |config: NodeConfig| -> Vec<String> {
            config.devices.iter().map(|(id, path)| format!("{id} {}", path.display())).collect()
        };
        assert_eq!(of(resolve(needed(), file()).unwrap()), ["vol-1 /dev/sdb", "vol-2 /dev/disk/by-id/x"]);
        let flags =
            args(&["--id", "n", "--data-dir", "/d", "--meta", "unix:/m", "--device", "vol-1=/dev/sdc"]);
        assert_eq!(of(resolve(flags, file()).unwrap()), ["vol-1 /dev/sdc"]);
    }

    #[test]
    fn unknown_fields_are_named() {
        let error = format!("{:#}", parse("data_dirr: /x\n").unwrap_err());
        assert!(error.contains("data_dirr") && error.contains("data_dir"), "{error}");
    }

    #[test]
    fn flags_override_the_file_and_the_file_overrides_defaults() {
        let file = parse("open_shards: 7\nblock_cache: 64MiB\n").unwrap();
        let mut flags = needed();
        flags.open_shards = Some(9);
        let config = resolve(flags, file).unwrap();
        assert_eq!(config.open_shards_max, 9);
        assert!(config.devices.is_empty());
        assert_eq!(config.block_cache_bytes, 64 << 20);
        assert_eq!(config.write_buffer_bytes, 256 << 20);
    }

    #[test]
    fn every_setting_of_the_file_is_a_flag_with_an_environment_variable() {
        use clap::CommandFactory;
        let command = Args::command();
        let fields: Vec<String> = example()
            .lines()
            .filter_map(|l| Some(l.split_once(": ")?.0.to_owned()))
            .filter(|l| !l.starts_with('#'))
            .collect();
        assert!(fields.len() >= 15);
        for field in fields {
            let arg = command.get_arguments().find(|a| a.get_id().as_str() == field);
            assert!(arg.unwrap_or_else(|| panic!("no flag for {field}")).get_env().is_some(), "{field}");
        }
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let missing = resolve(args(&["--id", "n"]), File::default()).unwrap_err();
        assert!(missing.to_string().contains("--data-dir"));
        let mut bad = needed();
        bad.listen = Some("here".into());
        assert!(format!("{:#}", resolve(bad, File::default()).unwrap_err()).contains("--listen"));
        let mut bad = needed();
        bad.meta = Some("ftp:x".into());
        assert!(format!("{:#}", NodeConfig::load(bad).unwrap_err()).contains("--meta"));
        let mut bad = needed();
        bad.block_cache = Some("1KiB".into());
        assert!(resolve(bad, File::default()).is_err());
        for bad in [&["vol-1"][..], &["vol-1=sdb"], &["=/dev/sdb"], &["v=/dev/sdb", "v=/dev/sdc"]] {
            let bad = Args { devices: bad.iter().map(|s| (*s).to_owned()).collect(), ..needed() };
            assert!(format!("{:#}", resolve(bad, File::default()).unwrap_err()).contains("--device"));
        }
        for size in ["48KiB", "8KiB", "2MiB", "8GiB"] {
            let mut bad = needed();
            bad.chunk_size = Some(size.into());
            assert!(format!("{:#}", resolve(bad, File::default()).unwrap_err()).contains("--chunk-size"));
        }
    }

    #[test]
    fn bytes_are_parsed() {
        assert_eq!(parse_bytes("512MiB").unwrap(), 512 << 20);
        assert_eq!(parse_bytes(" 3 GiB ").unwrap(), 3 << 30);
        assert_eq!(parse_bytes("17").unwrap(), 17);
        for bad in ["", "MiB", "12XB", "-1", "99999999TiB", "1.5GiB"] {
            assert!(parse_bytes(bad).is_err(), "{bad}");
        }
    }
}
