//! shardfsd, and under its other names a mount helper: reads the command line, and nothing else.

use std::process::ExitCode;

use clap::Parser;
use shardfsd::cli::{self, Args, Invocation};

fn main() -> ExitCode {
    // In the background it is started through a link of another name, which `ps` and `pidof` would show.
    let _ = rustix::thread::set_name(c"shardfsd");
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_default();
    if !cli::is_helper(&program) {
        return match shardfsd::run(Args::parse()) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("shardfsd: {error:#}");
                ExitCode::FAILURE
            }
        };
    }
    let done = cli::parse_helper(words).and_then(|invocation| match invocation {
        Invocation::Mount(args) => shardfsd::run(*args),
        Invocation::Pretend => Ok(()),
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mount.fuse.shardfs: {error:#}");
            ExitCode::from(cli::EXIT_MOUNT_FAILED)
        }
    }
}
