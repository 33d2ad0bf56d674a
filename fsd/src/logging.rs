//! Log lines: to standard error in the foreground, to a file if one is named, else nowhere.

use std::fs::OpenOptions;
use std::io::IsTerminal;
use std::sync::Mutex;

use anyhow::{Context, Result, anyhow};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

use crate::cli::LogFormat;
use crate::config::Settings;

/// Starts logging.
pub fn start(settings: &Settings, foreground: bool) -> Result<()> {
    let filter = EnvFilter::try_new(&settings.log_level)
        .with_context(|| format!("--log-level {:?}", settings.log_level))?;
    // fuser tells of every request that is left to the kernel, and of replies that came after their caller's end.
    let filter = if settings.log_level.contains("fuser") {
        filter
    } else {
        filter.add_directive("fuser=off".parse().context("a directive of ours")?)
    };
    let (writer, ansi) = match &settings.log_file {
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path);
            let file = file.with_context(|| format!("--log-file {}", path.display()))?;
            (BoxMakeWriter::new(Mutex::new(file)), false)
        }
        None if foreground => (BoxMakeWriter::new(std::io::stderr), std::io::stderr().is_terminal()),
        None => (BoxMakeWriter::new(std::io::sink), false),
    };
    // What a full disk keeps from being written is lost; by default it is told on standard error, where a failure panics.
    let lines = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(ansi)
        .log_internal_errors(false);
    let started = match settings.log_format {
        LogFormat::Text => lines.try_init(),
        LogFormat::Json => lines.json().flatten_event(true).try_init(),
    };
    started.map_err(|error| anyhow!("logging: {error}"))
}
