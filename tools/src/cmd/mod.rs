//! The commands, one file each: arguments, and what is done with them.
//!
//! A command that is interrupted is dropped at its next await; whatever must not stay behind half-written is
//! held by a value whose drop removes it.

pub mod backup;
pub mod bench;
pub mod completions;
pub mod dev;
pub mod doctor;
pub mod fsck;
pub mod get;
pub mod ls;
pub mod man;
pub mod mount;
pub mod node;
pub mod progress;
pub mod put;
pub mod reads;
pub mod remote;
pub mod rm;
pub mod shard;
pub mod stat;
pub mod status;
pub mod umount;
pub mod volume;

use std::convert::Infallible;
use std::io::IsTerminal;
use std::time::Duration;

use shardfs_proto::types::Reason;
use tokio::signal::unix::SignalKind;

use crate::cli::Command;
use crate::context::Context;
use crate::failure::{Failure, Result};

/// A command that is done by then has nothing to explain.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a node gets to answer when it is only asked whether it is there.
const PROBE: Duration = Duration::from_secs(1);

/// Runs a command.
pub async fn run(command: Command, context: &Context) -> Result<()> {
    let changes = changes(&command);
    let result = run_command(command, context).await;
    result.map_err(|failure| if changes { may_have_changed(failure) } else { failure })
}

/// A change that was not answered in time may have been made.
fn may_have_changed(failure: Failure) -> Failure {
    if failure.reason() != Some(Reason::Deadline) {
        return failure;
    }
    failure.hint_first("the change may have been made all the same: look before you repeat it")
}

async fn run_command(command: Command, context: &Context) -> Result<()> {
    match command {
        // These two look after signals themselves.
        Command::Bench(args) => bench::run(args, context).await.map_err(Failure::from),
        Command::Dev(args) => dev::run(args, context).await,
        // These replace the process or end at once.
        Command::Mount(args) => mount::run(args, context),
        Command::Completions(args) => completions::run(&args),
        Command::Man(args) => man::run(&args),
        Command::Put(args) => interruptible(put::run(args, context), context).await,
        Command::Get(args) => interruptible(get::run(args, context), context).await,
        Command::Ls(args) => interruptible(ls::run(args, context), context).await,
        Command::Rm(args) => interruptible(rm::run(args, context), context).await,
        Command::Stat(args) => interruptible(stat::run(args, context), context).await,
        Command::Shard(args) => interruptible(shard::run(args, context), context).await,
        Command::Node(args) => interruptible(node::run(args, context), context).await,
        Command::Volume(args) => interruptible(volume::run(args, context), context).await,
        Command::Backup(args) => interruptible(backup::run(args, context), context).await,
        Command::Status(args) => interruptible(status::run(args, context), context).await,
        Command::Fsck(args) => interruptible(fsck::run(args, context), context).await,
        Command::Umount(args) => interruptible(umount::run(args), context).await,
        // Cut off, it would leave its trials behind; each of its steps has a bound.
        Command::Doctor(args) => doctor::run(args).await,
    }
}

/// Whether a command changes something in the cluster.
fn changes(command: &Command) -> bool {
    match command {
        Command::Put(_) | Command::Rm(_) => true,
        Command::Shard(args) => args.changes(),
        Command::Backup(args) => args.changes(),
        _ => false,
    }
}

/// Drops the command on Ctrl-C or SIGTERM. While no node answers, says so; at the end, says which were asked.
async fn interruptible(command: impl Future<Output = Result<()>>, context: &Context) -> Result<()> {
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt())?;
    let result = tokio::select! {
        result = command => result,
        _ = terminate.recv() => Err(Failure::terminated()),
        _ = interrupt.recv() => Err(Failure::interrupted()),
        never = say_when_nobody_answers(context) => match never {},
    };
    result.map_err(|failure| match (failure.reason(), context.cluster()) {
        (Some(Reason::Unavailable | Reason::Deadline), Ok(cluster)) => failure.addition(format_args!(
            " (asked: {}, from {})",
            cluster.endpoints.join(", "),
            cluster.found_by
        )),
        _ => failure,
    })
}

/// Calls are repeated for a minute: a person should know what is waited for.
async fn say_when_nobody_answers(context: &Context) -> Infallible {
    tokio::time::sleep(PATIENCE).await;
    if std::io::stderr().is_terminal()
        && let (Some(client), Ok(cluster)) = (context.client_in_use(), context.cluster())
        && !client.reachable(PROBE).await
    {
        let seconds = cluster.deadline.as_secs_f32();
        let endpoints = cluster.endpoints.join(", ");
        crate::output::note(format!("no node answers at {endpoints}; trying for {seconds} s (--deadline)"));
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Cli;
    use clap::Parser;
    use shardfs_proto::types::Error;

    #[test]
    fn only_commands_that_change_something_warn_of_changes() {
        for (line, expected) in [
            ("put a s/", true),
            ("rm s/a", true),
            ("shard create s", true),
            ("shard close s", true),
            ("shard list", false),
            ("backup create vol-1", true),
            ("backup list", false),
            ("shard show s", false),
            ("ls s", false),
            ("get s/a", false),
            ("stat s/a", false),
        ] {
            let cli = Cli::try_parse_from(std::iter::once("shardfs").chain(line.split(' '))).unwrap();
            assert_eq!(changes(&cli.command), expected, "{line}");
        }
        let hint = |failure: &Failure| failure.hint_text().unwrap_or_default().to_owned();
        let late = Failure::from(Error::new(Reason::Deadline, "no success within 1 s"));
        assert!(!hint(&late).contains("change") && hint(&late).contains("--deadline"));
        assert!(hint(&may_have_changed(late)).contains("may have been made"));
        let gone = Failure::from(Error::new(Reason::NotFound, "x"));
        assert_eq!(hint(&may_have_changed(gone)), "");
    }
}
