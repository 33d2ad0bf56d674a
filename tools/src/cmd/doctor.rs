//! `shardfs doctor`: whether this machine, and a device, are fit for ShardFS.

use std::path::PathBuf;

use serde_json::json;
use shardfs_node::cluster::connect::MetaSettings;
use shardfs_node::config::NodeConfig;

use crate::doctor::device::Allowed;
use crate::doctor::{
    Check, Outcome, clocks, device, disk, etcd, ext4, fuse, kernel, limits, loops, programs,
};
use crate::failure::{EXIT_FAILURE, Failure, Result};
use crate::meta_flags::MetaFlags;
use crate::output::{Align, Out, Table, printable};

/// `shardfs doctor`.
#[derive(clap::Args, Debug)]
#[command(after_help = "\
Nothing is changed but for a folder and a loop device of its own, which go with it. With --second-path it tries the
reservations of a device that nobody uses: both paths are registered, each reserves, writes and is refused; the last block is
written as it was read; the registrations are taken back. Exit code 0: all is well enough; 1: something failed.

Examples:
  shardfs doctor
  shardfs doctor --meta etcd://10.0.0.1:2379,10.0.0.2:2379 --folder /var/lib/shardfs
  shardfs doctor --device /dev/sdb
  shardfs doctor --device /dev/sdb --second-path /dev/sdc       two paths of one machine to one disk")]
pub struct Args {
    /// A device that is to become a volume, or is one; may be repeated
    #[arg(long, value_name = "PATH")]
    device: Vec<PathBuf>,
    /// Another path to the --device, of another initiator: tries its reservations
    #[arg(long, value_name = "PATH", requires = "device")]
    second_path: Option<PathBuf>,
    /// Try a device that holds something; its content stays as it is
    #[arg(long, requires = "second_path")]
    force: bool,
    /// Remove whatever reservations the device has before trying it
    #[arg(long, requires = "second_path")]
    clear: bool,
    /// Where this machine keeps data: its disk is timed, and a loop volume tried there
    #[arg(long, value_name = "DIR", default_value = "/var/tmp")]
    folder: PathBuf,
    /// The metadata store, as shardfs-node has it: etcd://HOST:PORT[,HOST:PORT...], http://HOST:PORT or unix:/PATH
    #[arg(long, visible_alias = "etcd", value_name = "ADDRESS")]
    meta: Option<String>,
    #[command(flatten)]
    meta_flags: MetaFlags,
    /// Config file of a node: its metadata store, folder and devices are looked at
    #[arg(long, value_name = "FILE", conflicts_with = "meta")]
    node_config: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs.
pub async fn run(mut args: Args) -> Result<()> {
    let meta = wanted(&mut args)?;
    let mut checks = machine(args.folder).await?;
    match &meta {
        Some(meta) => checks.extend(etcd::checks(meta).await),
        None => checks.push(Check::skipped("metadata store", "none named: --meta, or --node-config")),
    }
    if args.device.is_empty() {
        checks.push(Check::skipped("devices", "none named: --device"));
    }
    let (devices, second) = (args.device, args.second_path);
    let allowed = Allowed { content: args.force, clear: args.clear };
    let seen = blocking(move || {
        let mut checks: Vec<Check> = devices.iter().flat_map(|path| device::checks(path)).collect();
        if let (Some(first), Some(second)) = (devices.first(), second) {
            checks.extend(device::checks(&second));
            checks.extend(device::conforms(first, &second, allowed));
        }
        checks
    });
    checks.extend(seen.await?);
    print(&checks, args.json)
}

/// The metadata store that is to be looked at. What a node's config file says is taken over.
fn wanted(args: &mut Args) -> Result<Option<MetaSettings>> {
    if let Some(config) = args.node_config.take() {
        let named = shardfs_node::config::Args { config: Some(config.clone()), ..Default::default() };
        let node = NodeConfig::load(named).map_err(|e| Failure::usage(format!("--node-config: {e:#}")))?;
        args.device.extend(node.devices.into_values());
        args.folder = node.data_dir;
        return Ok(Some(node.meta));
    }
    Ok(args.meta.as_deref().map(|address| args.meta_flags.settings(address)).transpose()?)
}

async fn machine(folder: PathBuf) -> Result<Vec<Check>> {
    blocking(move || {
        let mut checks = vec![kernel::check()];
        checks.extend(fuse::checks());
        checks.push(loops::check());
        checks.extend(programs::checks());
        checks.extend(ext4::checks(&folder));
        checks.extend(clocks::checks());
        checks.extend(limits::checks());
        checks.push(disk::check(&folder));
        checks
    })
    .await
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(|e| Failure::new(format!("a check broke off: {e}")))
}

fn print(checks: &[Check], json: bool) -> Result<()> {
    let failed = checks.iter().filter(|check| check.outcome == Outcome::Fail).count();
    let warned = checks.iter().filter(|check| check.outcome == Outcome::Warn).count();
    let mut out = Out::new();
    if json {
        out.json(&json!({ "fit": failed == 0, "checks": checks }))?;
    } else {
        out.bytes(table(checks).as_bytes())?;
        for check in checks.iter().filter(|check| !check.advice.is_empty()) {
            out.line(format!(
                "{} {}: {}",
                check.outcome.as_str(),
                check.check,
                printable(check.advice.as_bytes())
            ))?;
        }
        out.line(match (failed, warned) {
            (0, 0) => "this machine is fit".to_owned(),
            (0, n) => format!("this machine is fit; {n} of {} checks warn", checks.len()),
            (n, _) => format!("{n} of {} checks failed", checks.len()),
        })?;
    }
    out.flush()?;
    if failed == 0 { Ok(()) } else { Err(Failure::silent(EXIT_FAILURE)) }
}

fn table(checks: &[Check]) -> String {
    let mut table = Table::new(&[("", Align::Left), ("CHECK", Align::Left), ("FOUND", Align::Left)]);
    for check in checks {
        let detail = printable(check.detail.as_bytes());
        table.row(vec![check.outcome.as_str().to_owned(), check.check.clone(), detail]);
    }
    table.render()
}
