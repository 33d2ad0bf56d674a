//! What can be typed.

use clap::{Parser, Subcommand};

use crate::cmd;
use crate::context::Globals;

/// The whole command line.
#[derive(Parser, Debug)]
#[command(
    name = "shardfs",
    version,
    about = "A storage cluster that you mount: directories are shards, files are keys",
    long_about = "ShardFS is a storage cluster that you mount: directories are shards, files are keys. This program runs a whole \
                  cluster on one machine (`dev up`), moves values in and out (`put`, `get`, `ls`, `rm`, `stat`), and looks after \
                  shards, volumes and nodes.",
    after_help = "Begin here:
  shardfs dev up --mount ./mnt      a whole cluster on this machine, mounted on ./mnt
  mkdir ./mnt/photos                a directory at the top is a shard
  shardfs put cat.jpg photos/       the same bytes over gRPC
  shardfs ls photos
  shardfs status

`shardfs COMMAND --help` explains a command with examples.",
    after_long_help = "Begin here:
  shardfs dev up --mount ./mnt      a whole cluster on this machine, mounted on ./mnt
  mkdir ./mnt/photos                a directory at the top is a shard
  shardfs put cat.jpg photos/       the same bytes over gRPC
  shardfs ls photos
  shardfs status

How the cluster is found (the first that is there):
  1. --endpoints or --dir
  2. SHARDFS_ENDPOINTS, then SHARDFS_DIR, in the environment
  3. `endpoints`, then `dir`, in the config file: --config, SHARDFS_CONFIG, ~/.config/shardfs/config.yaml or
     /etc/shardfs/config.yaml
  4. a folder .shardfs made by `dev up`, in the working directory or above it

Exit codes: 0 done; 1 it failed, or fsck found something; 2 the command line or the config file is wrong; 130 interrupted \
                       (Ctrl-C), 143 ended by SIGTERM.",
    propagate_version = true,
    subcommand_required = true,
    arg_required_else_help = true,
    max_term_width = 110
)]
pub struct Cli {
    /// Flags of every command.
    #[command(flatten)]
    pub globals: Globals,
    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Run a whole cluster on this machine
    Dev(cmd::dev::Args),
    /// Store files, or standard input, as values
    Put(cmd::put::Args),
    /// Fetch a value, or a directory of them
    Get(cmd::get::Args),
    /// List shards, or what is in one
    Ls(cmd::ls::Args),
    /// Remove keys, or directories with all that is in them
    Rm(cmd::rm::Args),
    /// Show everything about a key
    Stat(cmd::stat::Args),
    /// Make, list, close, rename and delete shards
    Shard(cmd::shard::Args),
    /// The cluster's nodes
    Node(cmd::node::Args),
    /// The cluster's volumes
    Volume(cmd::volume::Args),
    /// Back up, restore and verify volumes
    Backup(cmd::backup::Args),
    /// How the cluster is, on one screen
    Status(cmd::status::Args),
    /// Check shards against the invariants of their records, while they serve
    Fsck(cmd::fsck::Args),
    /// See whether this machine, and a device, are fit for ShardFS
    Doctor(cmd::doctor::Args),
    /// Mount the cluster
    Mount(cmd::mount::Args),
    /// Unmount; also mends "Transport endpoint is not connected"
    Umount(cmd::umount::Args),
    /// Measure how fast a directory or a cluster is
    Bench(cmd::bench::Args),
    /// Print a completion script for a shell
    Completions(cmd::completions::Args),
    /// Print or write the manual pages
    Man(cmd::man::Args),
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_anywhere() {
        for line in [
            ["shardfs", "--dir", "/c", "ls", "photos"],
            ["shardfs", "ls", "--dir", "/c", "photos"],
            ["shardfs", "ls", "photos", "--dir", "/c"],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(cli.globals.dir.as_deref(), Some(std::path::Path::new("/c")));
            assert!(matches!(cli.command, Command::Ls(_)));
        }
        assert!(Cli::try_parse_from(["shardfs", "--dir", "/c", "--endpoints", "a:1", "ls"]).is_err());
        assert!(Cli::try_parse_from(["shardfs", "--client-id", "a/b", "ls"]).is_err());
    }

    #[test]
    fn commands_parse() {
        for line in [
            "dev up --mount /m --nodes 5 --volumes dir --volume-size 1GiB --volumes-per-node 2 --default-limit 2GiB --foreground",
            "dev up --mount /m --meta embedded -o ro,noatime",
            "dev kill node-1 --signal STOP",
            "dev kill node-1 --signal kill",
            "dev start node-1",
            "dev status --json",
            "dev down --force",
            "dev down --delete --yes",
            "put a b s/",
            "put -r -p dir s/x --jobs 3 --buffered",
            "put - s/k --mode 600 --if-absent",
            "get s/k -",
            "get -rp s/dir out",
            "get s/k - --read-from backup --max-staleness 500ms",
            "ls s --read-from backup",
            "ls",
            "ls s -l -R --json",
            "ls -0 s/dir",
            "rm -rf s/a s/b",
            "stat s/k --json",
            "shard create s --limit 2GiB --mode 0750",
            "shard list --all-owners --deleted --json",
            "shard show s",
            "shard close s",
            "shard rename s t",
            "shard delete s --force --yes",
            "node list --json",
            "volume list",
            "volume add vol-9 --source /dev/sdb --nodes node-1,node-2 --allow-unfenced",
            "volume add vol-9 --kind loop --source /x --size 1GiB --nodes node-1",
            "backup create vol-1 --json",
            "volume snapshot vol-1",
            "volume restore 20261129T195900Z-1f3a --in-place --drop-missing",
            "backup list vol-1",
            "backup restore 20261129T195900Z-1f3a --volume vol-9 --nodes node-2,node-3 --source /x --suffix .old",
            "backup restore 20261129T195900Z-1f3a --in-place --drop-missing",
            "backup verify 20261129T195900Z-1f3a --quick",
            "backup schedule vol-1 --every 1d --keep 7",
            "backup schedule vol-1 --off",
            "backup schedules --json",
            "status --json",
            "fsck",
            "fsck a b --read-data --json",
            "doctor",
            "doctor --device /dev/sdb --second-path /dev/sdc --force --clear --json",
            "doctor --etcd etcd://h:2379 --folder /x",
            "mount /mnt -o ro",
            "mount http://h:1,unix:/s /mnt",
            "umount /mnt --force",
            "completions bash",
            "man --man-dir /tmp/man",
        ] {
            let words = std::iter::once("shardfs").chain(line.split(' ').filter(|w| !w.is_empty()));
            if let Err(e) = Cli::try_parse_from(words) {
                panic!("{line}: {e}");
            }
        }
        for line in [
            "put a",
            "get",
            "get s/k --read-from nobody",
            "rm",
            "dev kill",
            "dev kill node-1 --signal HUP",
            "shard create s --limit 2XB",
            "dev up --nodes x",
            "volume add vol-9 --source /dev/sdb",
            "backup restore 20261129T195900Z-1f3a",
            "backup restore 20261129T195900Z-1f3a --volume vol-9",
            "backup restore 20261129T195900Z-1f3a --volume vol-9 --nodes node-1 --in-place",
            "backup schedule vol-1 --every 1d",
            "backup schedule vol-1 --every 1x --keep 7",
            "doctor --second-path /dev/sdc",
            "nonsense",
        ] {
            let words = std::iter::once("shardfs").chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_err(), "{line}");
        }
    }
}
