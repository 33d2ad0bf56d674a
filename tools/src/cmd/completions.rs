//! `shardfs completions`: completion scripts.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::Cli;
use crate::failure::Result;
use crate::output::Out;

/// `shardfs completions`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  shardfs completions bash > /etc/bash_completion.d/shardfs
  shardfs completions zsh > \"${fpath[1]}/_shardfs\"
  shardfs completions fish > ~/.config/fish/completions/shardfs.fish")]
pub struct Args {
    /// The shell
    shell: Shell,
}

/// Runs.
pub fn run(args: &Args) -> Result<()> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "shardfs", &mut script);
    let mut out = Out::new();
    out.bytes(&script)?;
    out.flush()
}
