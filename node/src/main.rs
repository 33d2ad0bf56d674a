//! The program `shardfs-node`: parses, wires, runs.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use shardfs_node::config::{Args, NodeConfig, start_logging};

fn main() -> ExitCode {
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shardfs-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: Args) -> Result<()> {
    let config = NodeConfig::load(args)?;
    start_logging(&config)?;
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(shardfs_node::run(config))
}
