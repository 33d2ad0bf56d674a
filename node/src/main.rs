//! The program `shardfs-node`: parses, wires, runs; as the parent of a node, or as the node.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use shardfs_node::config::{Args, NodeConfig};
use shardfs_node::logging;
use shardfs_node::parent::{self, Child};
use shardfs_node::reload::Reload;

/// The settings are wrong, which no restart mends: EX_CONFIG of sysexits.h.
const EXIT_CONFIG: u8 = 78;
/// Arenas of the memory allocator.
#[cfg(target_env = "gnu")]
const ARENAS_MAX: libc::c_int = 4;

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(code) => code,
        Err((code, error)) => {
            eprintln!("shardfs-node: {error:#}");
            code
        }
    }
}

/// Few arenas: each keeps what it once needed, and large messages come on every thread.
fn bound_arenas() {
    // SAFETY: called before any other thread exists; a refusal changes nothing.
    #[cfg(target_env = "gnu")]
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS_MAX);
    }
}

fn run(args: Args) -> std::result::Result<ExitCode, (ExitCode, anyhow::Error)> {
    bound_arenas();
    let child = Child::of_environment();
    // What is wrong with the settings is said by the parent.
    let config = NodeConfig::load(args.clone()).map_err(|error| (ExitCode::from(EXIT_CONFIG), error))?;
    serve(args, config, child).map_err(|error| (ExitCode::FAILURE, error))
}

fn serve(args: Args, config: NodeConfig, child: Option<Child>) -> Result<ExitCode> {
    let filter = logging::start(&config)?;
    let Some(child) = child else { return parent::run(&config) };
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(shardfs_node::run(config, child, &Reload::new(args, filter)))?;
    Ok(ExitCode::SUCCESS)
}
