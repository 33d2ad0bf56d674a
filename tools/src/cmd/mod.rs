//! The commands, one file each: arguments, and what is done with them.
//!
//! A command that is interrupted is dropped at its next await; whatever must not stay behind half-written is
//! held by a value whose drop removes it.

pub mod bench;
pub mod completions;
pub mod dev;
pub mod fsck;
pub mod get;
pub mod ls;
pub mod man;
pub mod mount;
pub mod node;
pub mod progress;
pub mod put;
pub mod remote;
pub mod rm;
pub mod shard;
pub mod stat;
pub mod status;
pub mod umount;
pub mod volume;

use tokio::signal::unix::SignalKind;

use crate::cli::Command;
use crate::context::Context;
use crate::failure::{Failure, Result};

/// Runs a command.
pub async fn run(command: Command, context: &Context) -> Result<()> {
    match command {
        // These two look after signals themselves.
        Command::Bench(args) => bench::run(args, context).await.map_err(Failure::from),
        Command::Dev(args) => dev::run(args, context).await,
        // These replace the process or end at once.
        Command::Mount(args) => mount::run(args, context),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
        Command::Put(args) => interruptible(put::run(args, context)).await,
        Command::Get(args) => interruptible(get::run(args, context)).await,
        Command::Ls(args) => interruptible(ls::run(args, context)).await,
        Command::Rm(args) => interruptible(rm::run(args, context)).await,
        Command::Stat(args) => interruptible(stat::run(args, context)).await,
        Command::Shard(args) => interruptible(shard::run(args, context)).await,
        Command::Node(args) => interruptible(node::run(args, context)).await,
        Command::Volume(args) => interruptible(volume::run(args, context)).await,
        Command::Status(args) => interruptible(status::run(args, context)).await,
        Command::Fsck(args) => interruptible(fsck::run(args, context)).await,
        Command::Umount(args) => interruptible(umount::run(args)).await,
    }
}

/// Drops the command on Ctrl-C or SIGTERM.
async fn interruptible(command: impl Future<Output = Result<()>>) -> Result<()> {
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt())?;
    tokio::select! {
        result = command => result,
        _ = terminate.recv() => Err(Failure::interrupted()),
        _ = interrupt.recv() => Err(Failure::interrupted()),
    }
}
