//! shardfsd, and under its other names a mount helper or a probe: reads the command line, and nothing else.

use std::process::ExitCode;

use clap::Parser;
use shardfsd::cli::{self, Args, Invocation};
use shardfsd::config::Refused;
use shardfsd::probe;

fn main() -> ExitCode {
    let mut words = std::env::args_os();
    let program = words.next().unwrap_or_default();
    if probe::is_probe(&program) {
        return probe::run(words);
    }
    // In the background it is started through a link of another name, which `ps` and `pidof` would show.
    let _ = rustix::thread::set_name(c"shardfsd");
    if !cli::is_helper(&program) {
        return match shardfsd::run(Args::parse()) {
            Ok(code) => code,
            Err(error) => {
                eprintln!("shardfsd: {error:#}");
                if error.is::<Refused>() { ExitCode::from(cli::EXIT_CONFIG) } else { ExitCode::FAILURE }
            }
        };
    }
    let done = cli::parse_helper(words).and_then(|invocation| match invocation {
        Invocation::Mount(args) => shardfsd::run(*args),
        Invocation::Remount { point, flags } => {
            shardfsd::session::remount(&point, flags).map(|()| ExitCode::SUCCESS)
        }
        Invocation::Pretend => Ok(ExitCode::SUCCESS),
    });
    match done {
        Ok(code) => code,
        Err(error) => {
            eprintln!("mount.fuse.shardfs: {error:#}");
            ExitCode::from(cli::EXIT_MOUNT_FAILED)
        }
    }
}
