//! `shardfs mount`: becomes the daemon, with what this program knows of the cluster.

use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use crate::context::{Context, Environment, Globals};
use crate::failure::{Failure, Result};
use crate::system;

/// `shardfs mount`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  shardfs mount ./mnt                              the cluster that is found
  shardfs mount http://node-1:7400 /mnt/cluster    the cluster of these addresses
  shardfs mount -o ro,client_id=tenant-a ./mnt

Returns when the mount is usable. `shardfs umount` unmounts. `mount -t fuse.shardfs` and /etc/fstab work too (`shardfsd --help`).")]
pub struct Args {
    /// Addresses (http://HOST:PORT, unix:/PATH; separated by commas), if given; then the mount point
    #[arg(required = true, num_args = 1..=2, value_names = ["SOURCE", "MOUNTPOINT"])]
    paths: Vec<PathBuf>,
    /// Options, as for mount(8): ro, allow_other, client_id=ID, ...
    #[arg(short = 'o', value_name = "OPTION,...")]
    options: Vec<String>,
    /// Stay in the foreground
    #[arg(long, short)]
    foreground: bool,
}

/// Runs: on success it does not return, because the process is the daemon then.
pub fn run(args: Args, context: &Context) -> Result<()> {
    let (source, mount_point) = match <[PathBuf; 2]>::try_from(args.paths) {
        Ok([source, mount_point]) => (Some(source), mount_point),
        Err(one) => (None, one.into_iter().next().ok_or_else(|| Failure::usage("no mount point"))?),
    };
    let cluster = match source {
        None => context.cluster()?,
        Some(source) => {
            let text = source.to_string_lossy().into_owned();
            let globals = Globals {
                endpoints: text.split(',').map(str::to_owned).collect(),
                dir: None,
                ..context.globals().clone()
            };
            Context::new(globals, Environment::of_process()).cluster()?
        }
    };
    let program = system::find_program("shardfsd", "SHARDFSD_BIN")?;
    let mut command = Command::new(&program);
    command.arg(mount_point).arg("--endpoints").arg(cluster.endpoints.join(","));
    command.arg("--client-id").arg(cluster.client_id.as_str());
    if let Some(deadline) = context.globals().deadline {
        command.arg("--deadline").arg(deadline.as_secs_f64().to_string());
    }
    for option in &args.options {
        command.args(["-o", option]);
    }
    if args.foreground {
        command.arg("-f");
    }
    let error = crate::devcluster::process::inherit_only_stdio(&mut command).exec();
    Err(Failure::new(format!("cannot run {}: {error}", program.display())))
}
