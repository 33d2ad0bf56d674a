//! Where things lie in a dev cluster's folder, and the two files that remember it: settings (chosen once, by
//! the first `dev up`) and processes (who runs, so that the next supervisor finds them).
//!
//! ```text
//! DIR/.shardfs-dev        says that the folder is a cluster's: made before anything else in it, deleted after it
//! DIR/cluster.json        settings
//! DIR/volumes-added       empty: the volumes that the cluster was made with were all added to its records, once
//! DIR/run/lock            held by the supervisor
//! DIR/run/processes.json  processes that were started and may run
//! DIR/meta/               the metadata store, if it is the embedded one
//! DIR/volumes/vol-N.img   backing files (loop), or folders vol-N (dir)
//! DIR/nodes/node-N/       the nodes' data; volumes are mounted below it
//! DIR/logs/NAME.log       what each process said
//! SOCKETS/                control.sock, meta.sock, node-N.sock: DIR/run, or a short folder if that path is long
//! ```
//!
//! Files are replaced atomically: written aside, synced, renamed.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shardfs_node::cluster::connect::MetaSettings;
use shardfs_proto::types::ClientId;

use super::process::Identity;
use crate::failure::{Failure, OrFail, Result};

/// The settings file, by which a folder is known to be a dev cluster.
pub const CLUSTER_FILE: &str = "cluster.json";
/// See [`Layout::volumes_were_added`].
const VOLUMES_ADDED_FILE: &str = "volumes-added";
/// Marks a folder as a cluster's own from the first moment on, also one whose first start failed half-way.
const MARKER_FILE: &str = ".shardfs-dev";
/// What the marker says to who finds it.
const MARKER_TEXT: &str = "This folder belongs to a cluster of `shardfs dev up`.\n";
/// Keeps a cluster inside a source tree out of version control.
const IGNORE_FILE: &str = ".gitignore";
/// What it says. One that says something else is not ours to delete.
const IGNORE_TEXT: &str = "*\n";
/// The supervisor's name among the logs.
pub const SUPERVISOR: &str = "supervisor";
/// The supervisor's socket, beside those of the nodes.
pub const CONTROL_SOCKET: &str = "control.sock";
/// Version of both files.
const FORMAT: u32 = 1;
/// Bytes of a unix socket's path, with its NUL (sun_path).
const SOCKET_PATH_BYTES_MAX: usize = 108;
/// The longest name of a socket in the sockets' folder: `/node-999.sock`.
const SOCKET_NAME_BYTES: usize = 16;
/// Nodes of a dev cluster: more than one machine can use.
pub const NODES_MAX: u32 = 64;
/// Volumes of one node.
pub const VOLUMES_PER_NODE_MAX: u32 = 64;

/// What a volume is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum VolumeKind {
    /// A sparse file behind a loop device, with ext4 (needs root)
    Loop,
    /// A folder (needs no root)
    Dir,
    /// An EBS volume, on EC2; the nodes are told of it by the environment (SHARDFS_AWS_CLUSTER, see `shardfs-node --help`)
    Aws,
}

impl VolumeKind {
    /// The provider's name in the metadata store.
    pub fn as_str(self) -> &'static str {
        match self {
            VolumeKind::Loop => "loop",
            VolumeKind::Dir => "dir",
            VolumeKind::Aws => "aws",
        }
    }
}

/// TCP ports on 127.0.0.1.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Ports {
    /// gRPC, by node.
    pub grpc: BTreeMap<String, u16>,
    /// Metrics and health, by process.
    pub http: BTreeMap<String, u16>,
}

/// An etcd that holds a cluster's records.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EtcdMeta {
    /// How it is reached. May be changed: by its id the cluster is known.
    #[serde(flatten)]
    pub reached: MetaSettings,
    /// The id under which the cluster is recorded there; made with the settings.
    pub cluster_id: String,
    /// Whether it is.
    pub recorded: Recorded,
}

/// Whether a cluster is recorded in its etcd.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Recorded {
    /// Not yet.
    No,
    /// That was begun, and may be done.
    Begun,
    /// It is: an etcd without it is not the right one.
    Done,
}

/// What a cluster was made with. Node and volume counts can grow by a later `dev up`, never shrink.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Nodes: node-1 ... node-N.
    pub nodes: u32,
    /// Kind of the volumes.
    pub volumes: VolumeKind,
    /// Size of each volume.
    pub volume_size_bytes: u64,
    /// Volumes of each node.
    pub volumes_per_node: u32,
    /// The mount's client id, and the default of commands.
    pub client_id: ClientId,
    /// The etcd with the cluster's records; `None`: the supervisor keeps them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub etcd: Option<EtcdMeta>,
    /// Where the cluster is mounted; `None`: nowhere.
    pub mount: Option<PathBuf>,
    /// Limit of new shards that ask for none; `None`: the volume's room.
    pub default_limit_bytes: Option<u64>,
    /// Folder of the unix sockets.
    pub sockets: PathBuf,
    /// Ports in use.
    pub ports: Ports,
    /// Options (`-o`) for the mount.
    #[serde(default)]
    pub mount_options: Vec<String>,
    /// The last mount that came to be: one that fails before it ever worked is forgotten for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mount_that_worked: Option<MountPlace>,
}

/// Where and how a cluster is mounted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MountPlace {
    /// Where.
    pub path: PathBuf,
    /// Options (`-o`).
    pub options: Vec<String>,
}

impl Settings {
    /// The mount that is asked for.
    pub fn mount_place(&self) -> Option<MountPlace> {
        let path = self.mount.clone()?;
        Some(MountPlace { path, options: self.mount_options.clone() })
    }

    /// Asks for another mount, or none.
    pub fn set_mount_place(&mut self, place: Option<MountPlace>) {
        (self.mount, self.mount_options) = match place {
            Some(place) => (Some(place.path), place.options),
            None => (None, Vec::new()),
        };
    }

    /// Where the metadata store is.
    pub fn meta(&self) -> MetaSettings {
        match &self.etcd {
            Some(etcd) => etcd.reached.clone(),
            None => MetaSettings::of(format!("unix:{}", Layout::meta_socket(self).display())),
        }
    }

    /// The nodes' names in order.
    pub fn node_names(&self) -> Vec<String> {
        (1..=self.nodes).map(|n| format!("node-{n}")).collect()
    }

    /// (volume, node) for every volume. Volume 1 is node-1's, volume 2 node-2's, and so on around, so that the first
    /// ones keep their places when there are more volumes later.
    pub fn volume_names(&self) -> Vec<(String, String)> {
        (0..self.nodes * self.volumes_per_node)
            .map(|v| (format!("vol-{}", v + 1), format!("node-{}", v % self.nodes + 1)))
            .collect()
    }
}

/// One process that was started.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ProcessRecord {
    /// Who it is.
    pub identity: Identity,
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<String>,
}

/// The processes file.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Processes {
    /// The supervisor.
    pub supervisor: Option<Identity>,
    /// Nodes and the mount by name.
    pub members: BTreeMap<String, ProcessRecord>,
}

/// A file with its format version.
#[derive(Serialize, Deserialize)]
struct Versioned<T> {
    format: u32,
    #[serde(flatten)]
    content: T,
}

/// The paths inside a cluster's folder.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    dir: PathBuf,
}

impl Layout {
    /// Of an absolute folder, which need not exist.
    pub fn new(dir: &Path) -> Layout {
        Layout { dir: dir.to_owned() }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The supervisor's lock.
    pub fn lock(&self) -> PathBuf {
        self.run().join("lock")
    }

    /// Files of what runs now.
    pub fn run(&self) -> PathBuf {
        self.dir.join("run")
    }

    /// The metadata store's folder.
    pub fn meta(&self) -> PathBuf {
        self.dir.join("meta")
    }

    /// The volumes' folder.
    pub fn volumes(&self) -> PathBuf {
        self.dir.join("volumes")
    }

    /// The backing file or folder of a volume.
    pub fn volume_source(&self, kind: VolumeKind, name: &str) -> PathBuf {
        match kind {
            VolumeKind::Loop => self.volumes().join(format!("{name}.img")),
            // Of one that the cloud has, nothing lies there.
            VolumeKind::Dir | VolumeKind::Aws => self.volumes().join(name),
        }
    }

    /// Whether the volumes that the cluster was made with were all added to its records. From then on the records alone say what
    /// volumes there are: one that is not among them was deleted.
    pub fn volumes_were_added(&self) -> Result<bool> {
        let path = self.volumes_added_file();
        path.try_exists().with_context(|| format!("cannot look for {}", path.display()))
    }

    /// Notes that they were.
    pub fn note_volumes_added(&self) -> Result<()> {
        let path = self.volumes_added_file();
        let write = || -> io::Result<()> {
            File::create(&path)?.sync_all()?;
            File::open(&self.dir)?.sync_all()
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }

    /// The file that says so.
    pub fn volumes_added_file(&self) -> PathBuf {
        self.dir.join(VOLUMES_ADDED_FILE)
    }

    /// All nodes' data.
    pub fn nodes(&self) -> PathBuf {
        self.dir.join("nodes")
    }

    /// A node's data.
    pub fn node_data(&self, node: &str) -> PathBuf {
        self.nodes().join(node)
    }

    /// A process's log.
    pub fn log(&self, name: &str) -> PathBuf {
        self.logs().join(format!("{name}.log"))
    }

    /// The socket of a node.
    pub fn node_socket(settings: &Settings, node: &str) -> PathBuf {
        settings.sockets.join(format!("{node}.sock"))
    }

    /// The socket of the embedded metadata store.
    pub fn meta_socket(settings: &Settings) -> PathBuf {
        settings.sockets.join("meta.sock")
    }

    /// The supervisor's socket.
    pub fn control_socket(settings: &Settings) -> PathBuf {
        settings.sockets.join(CONTROL_SOCKET)
    }

    /// The nodes' addresses.
    pub fn node_endpoints(&self, settings: &Settings) -> Vec<String> {
        settings
            .node_names()
            .iter()
            .map(|node| format!("unix:{}", Layout::node_socket(settings, node).display()))
            .collect()
    }

    /// The logs' folder.
    pub fn logs(&self) -> PathBuf {
        self.dir.join("logs")
    }

    /// Refuses to make a new cluster among the files of somebody else, which `dev down --delete` could not tell from
    /// its own. A mount point that was made below the folder beforehand does not count.
    pub fn check_new(&self, mount: Option<&Path>) -> Result<()> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotADirectory => {
                return Err(Failure::usage(format!("{} is a file; a folder is needed", self.dir.display()))
                    .hint("choose another --dir"));
            }
            Err(e) => return Err(Failure::new(format!("cannot read {}: {e}", self.dir.display()))),
        };
        if self.is_marked() {
            return Ok(());
        }
        for entry in entries {
            let entry = entry.with_context(|| self.dir.display().to_string())?;
            let path = entry.path();
            let expected = entry.file_name() == "lost+found" || mount.is_some_and(|m| m.starts_with(&path));
            if !expected {
                return Err(Failure::usage(format!(
                    "{} is not empty and no cluster: it holds {:?}",
                    self.dir.display(),
                    entry.file_name()
                ))
                .hint("choose an empty or a new folder with --dir: a cluster keeps a folder to itself"));
            }
        }
        Ok(())
    }

    /// Whether a cluster was made, or begun, in this folder.
    fn is_marked(&self) -> bool {
        [MARKER_FILE, CLUSTER_FILE].into_iter().any(|name| self.dir.join(name).is_file())
    }

    /// Makes the folders. The whole is for its owner only: it holds data of all client ids.
    pub fn create(&self) -> Result<()> {
        make_private(&self.dir)?;
        self.write_once(MARKER_FILE, MARKER_TEXT)?;
        for folder in [self.run(), self.meta(), self.volumes(), self.nodes(), self.logs()] {
            make_private(&folder)?;
        }
        self.write_once(IGNORE_FILE, IGNORE_TEXT)
    }

    fn write_once(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        if path.exists() {
            return Ok(());
        }
        fs::write(&path, text).with_context(|| path.display().to_string())
    }

    /// What a cluster with these settings has made in its folder, apart from its logs and from the files that say so
    /// ([`Layout::last_files`]). Whatever else is there is somebody else's.
    pub fn made(&self, settings: &Settings) -> Vec<PathBuf> {
        // First: after a deletion that was cut off, volumes that are gone may be added again.
        let mut made = vec![self.volumes_added_file()];
        made.extend(settings.node_names().iter().map(|node| self.node_data(node)));
        for (volume, _) in settings.volume_names() {
            let source = self.volume_source(settings.volumes, &volume);
            // One that was being made.
            made.push(source.with_extension("img.new"));
            made.push(source);
        }
        made.extend(settings.node_names().iter().map(|node| Layout::node_socket(settings, node)));
        made.extend([
            Layout::meta_socket(settings),
            Layout::control_socket(settings),
            self.meta().join("store.redb"),
            self.run().join("processes.json"),
            self.run().join("processes.json.new"),
            self.dir.join("cluster.json.new"),
            self.lock(),
        ]);
        made
    }

    /// The logs, also those of a first start that failed and had other settings.
    pub fn made_logs(&self) -> Vec<PathBuf> {
        let nodes = (1..=NODES_MAX).map(|n| format!("node-{n}"));
        nodes
            .chain([SUPERVISOR, super::member::MOUNT].map(str::to_owned))
            .map(|name| self.log(&name))
            .flat_map(|log| [log.with_extension("log.1"), log])
            .collect()
    }

    /// The folders of [`Layout::made`], to be removed when they are empty.
    pub fn made_folders(&self) -> [PathBuf; 5] {
        [self.nodes(), self.volumes(), self.meta(), self.run(), self.logs()]
    }

    /// What goes last, in this order: as long as the settings are there, a deletion that was cut off can be repeated.
    pub fn last_files(&self, keep_marker: bool) -> Vec<PathBuf> {
        let ignore = self.dir.join(IGNORE_FILE);
        let ours = fs::read_to_string(&ignore).is_ok_and(|text| text == IGNORE_TEXT);
        let marker = (!keep_marker).then(|| self.dir.join(MARKER_FILE));
        let ignore = (ours && !keep_marker).then_some(ignore);
        ignore.into_iter().chain([self.dir.join(CLUSTER_FILE)]).chain(marker).collect()
    }

    /// Where the sockets of a cluster in this folder go: `DIR/run` if the paths fit into a socket address, else a short
    /// folder named after it.
    pub fn choose_sockets(&self, runtime_dir: &Path) -> PathBuf {
        let near = self.run();
        if near.as_os_str().len() + SOCKET_NAME_BYTES < SOCKET_PATH_BYTES_MAX {
            return near;
        }
        runtime_dir.join(format!("shardfs-{:016x}", fnv1a(self.dir.as_os_str().as_encoded_bytes())))
    }

    /// The settings; `None`: this is no dev cluster.
    pub fn read_settings(&self) -> Result<Option<Settings>> {
        read_versioned(&self.dir.join(CLUSTER_FILE))
    }

    /// Stores the settings.
    pub fn write_settings(&self, settings: &Settings) -> Result<()> {
        write_versioned(&self.dir.join(CLUSTER_FILE), settings)
    }

    /// The processes; none if the file is absent.
    pub fn read_processes(&self) -> Result<Processes> {
        Ok(read_versioned(&self.run().join("processes.json"))?.unwrap_or_default())
    }

    /// Stores the processes.
    pub fn write_processes(&self, processes: &Processes) -> Result<()> {
        write_versioned(&self.run().join("processes.json"), processes)
    }
}

/// Makes a folder with mode 0700, parents as they come.
pub fn make_private(dir: &Path) -> Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    }
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Ok(()) => Ok(()),
        Err(e) if e.kind() == io::ErrorKind::AlreadyExists && dir.is_dir() => Ok(()),
        Err(e) => Err(Failure::new(format!("cannot make {}: {e}", dir.display()))),
    }
}

/// A folder that anybody could have made before us (in /tmp) must be ours alone.
pub fn check_private(dir: &Path) -> Result<()> {
    let meta = fs::symlink_metadata(dir).with_context(|| dir.display().to_string())?;
    let ours = meta.is_dir() && meta.uid() == rustix::process::geteuid().as_raw() && meta.mode() & 0o077 == 0;
    if ours {
        return Ok(());
    }
    Err(Failure::new(format!("{} is not a folder of yours that only you can enter", dir.display()))
        .hint("remove it, or run `chmod 700` on it"))
}

fn read_versioned<T: for<'de> Deserialize<'de>>(path: &Path) -> Result<Option<T>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Failure::new(format!("cannot read {}: {e}", path.display()))),
    };
    let damaged = |why: String| {
        Failure::new(format!("{} is not readable: {why}", path.display()))
            .hint("it was changed by something else, or by another version of shardfs; the data beside it is not touched by this")
    };
    #[derive(Deserialize)]
    struct Format {
        format: u32,
    }
    let format: Format = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
    if format.format != FORMAT {
        return Err(damaged(format!("format {}, this version knows {FORMAT}", format.format)));
    }
    let file: Versioned<T> = serde_json::from_str(&text).map_err(|e| damaged(e.to_string()))?;
    Ok(Some(file.content))
}

fn write_versioned<T: Serialize>(path: &Path, content: &T) -> Result<()> {
    let words = || format!("cannot write {}", path.display());
    let text = serde_json::to_vec_pretty(&Versioned { format: FORMAT, content })
        .map_err(|e| Failure::new(e.to_string()))
        .with_context(words)?;
    let aside = path.with_extension("json.new");
    let write = || -> io::Result<()> {
        let mut file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(&text)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        fs::rename(&aside, path)?;
        File::open(path.parent().unwrap_or(Path::new(".")))?.sync_all()
    };
    write().with_context(words)
}

/// FNV-1a, 64 bits: a short name for a long path.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, b| (hash ^ u64::from(*b)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            nodes: 3,
            volumes: VolumeKind::Loop,
            volume_size_bytes: 4 << 30,
            volumes_per_node: 2,
            client_id: ClientId::new("default").unwrap(),
            etcd: Some(EtcdMeta {
                reached: MetaSettings::of("etcd://a:1"),
                cluster_id: "c".to_owned(),
                recorded: Recorded::Begun,
            }),
            mount: Some(PathBuf::from("/mnt/x y")),
            default_limit_bytes: Some(2 << 30),
            sockets: PathBuf::from("/run/shardfs-1"),
            ports: Ports {
                grpc: [("node-1".to_owned(), 4000)].into(),
                http: [("mount".to_owned(), 4001)].into(),
            },
            mount_options: vec!["ro".to_owned()],
            mount_that_worked: Some(MountPlace { path: PathBuf::from("/mnt/z"), options: Vec::new() }),
        }
    }

    #[test]
    fn settings_survive_a_round_trip() {
        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::new(&temp.path().join("c"));
        assert_eq!(layout.read_settings().unwrap(), None);
        layout.create().unwrap();
        layout.create().unwrap();
        layout.write_settings(&settings()).unwrap();
        assert_eq!(layout.read_settings().unwrap(), Some(settings()));
        let text = fs::read_to_string(layout.dir().join(CLUSTER_FILE)).unwrap();
        assert!(text.starts_with("{\n  \"format\": 1,\n  \"nodes\": 3,\n  \"volumes\": \"loop\""), "{text}");
    }

    #[test]
    fn processes_survive_a_round_trip() {
        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::new(temp.path());
        layout.create().unwrap();
        assert_eq!(layout.read_processes().unwrap(), Processes::default());
        let me = Identity::of(std::process::id()).unwrap();
        let record =
            ProcessRecord { identity: me.clone(), program: "/bin/x".into(), args: vec!["--a b".into()] };
        let processes = Processes { supervisor: Some(me), members: [("node-1".to_owned(), record)].into() };
        layout.write_processes(&processes).unwrap();
        assert_eq!(layout.read_processes().unwrap(), processes);
    }

    #[test]
    fn damaged_and_newer_files_are_named() {
        let temp = tempfile::tempdir().unwrap();
        let layout = Layout::new(temp.path());
        fs::write(temp.path().join(CLUSTER_FILE), "{\"format\": 2}").unwrap();
        let failure = layout.read_settings().unwrap_err();
        assert!(failure.message().ends_with("cluster.json is not readable: format 2, this version knows 1"));
        fs::write(temp.path().join(CLUSTER_FILE), "{\"format\": 1, \"no").unwrap();
        assert!(layout.read_settings().unwrap_err().message().contains("cluster.json is not readable"));
    }

    #[test]
    fn folders_of_others_are_no_place_for_a_cluster() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("d");
        let layout = Layout::new(&dir);
        layout.check_new(None).unwrap();
        fs::create_dir(&dir).unwrap();
        layout.check_new(None).unwrap();
        // The mount point may be there before; nothing else may.
        fs::create_dir_all(dir.join("m/nt")).unwrap();
        layout.check_new(Some(&dir.join("m/nt"))).unwrap();
        let failure = layout.check_new(Some(&temp.path().join("elsewhere"))).unwrap_err();
        assert!(failure.message().ends_with("/d is not empty and no cluster: it holds \"m\""), "{failure}");
        assert_eq!(failure.code(), crate::failure::EXIT_USAGE);
        fs::write(dir.join("file"), "mine").unwrap();
        assert!(layout.check_new(Some(&dir.join("m/nt"))).is_err());
        // Nor is a file a folder.
        assert!(Layout::new(&dir.join("file")).check_new(None).unwrap_err().message().contains("is a file"));
        // What a first start left behind is the cluster's own, even before it has settings.
        layout.create().unwrap();
        layout.check_new(None).unwrap();
    }

    #[test]
    fn volumes_go_around() {
        let names = settings().volume_names();
        assert_eq!(names.len(), 6);
        assert_eq!(names[0], ("vol-1".to_owned(), "node-1".to_owned()));
        assert_eq!(names[3], ("vol-4".to_owned(), "node-1".to_owned()));
    }

    #[test]
    fn folders_of_others_are_refused() {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path().join("s");
        make_private(&dir).unwrap();
        check_private(&dir).unwrap();
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o777)).unwrap();
        assert!(check_private(&dir).is_err());
        std::os::unix::fs::symlink(temp.path(), temp.path().join("link")).unwrap();
        assert!(check_private(&temp.path().join("link")).is_err());
    }

    #[test]
    fn sockets_fit_their_addresses() {
        let short = Layout::new(Path::new("/srv/c"));
        assert_eq!(short.choose_sockets(Path::new("/run")), Path::new("/srv/c/run"));
        let long = Layout::new(&Path::new("/srv").join("x".repeat(200)));
        let sockets = long.choose_sockets(Path::new("/run"));
        assert!(sockets.starts_with("/run") && sockets.as_os_str().len() < 40, "{sockets:?}");
        assert_ne!(
            sockets,
            Layout::new(&Path::new("/srv").join("y".repeat(200))).choose_sockets(Path::new("/run"))
        );
    }
}
