//! `shardfs`: parses, wires, and prints what went wrong. Everything else is in the library.

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;
use shardfs::cli::Cli;
use shardfs::cmd;
use shardfs::context::{Context, Environment};
use shardfs::failure::{EXIT_USAGE, Failure};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => {
            // `--help` and `--version` come this way too, on stdout with code 0. A closed pipe is no news.
            let _ = e.print();
            return if e.use_stderr() { ExitCode::from(EXIT_USAGE) } else { ExitCode::SUCCESS };
        }
    };
    shardfs::output::start_logging();
    let result =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(Failure::from).and_then(
            |runtime| {
                let context = Context::new(cli.globals, Environment::of_process());
                let result = runtime.block_on(async {
                    let result = cmd::run(cli.command, &context).await;
                    context.close().await;
                    result
                });
                // A blocked read of a terminal must not keep the process.
                runtime.shutdown_background();
                result
            },
        );
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            // Nothing can be said to a stderr that is closed.
            let _ = std::io::stderr().write_all(failure.render().as_bytes());
            ExitCode::from(failure.code())
        }
    }
}
