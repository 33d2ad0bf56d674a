//! Log lines, to standard error; what is logged may change while the node runs.

use anyhow::{Context, Result, anyhow};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use crate::config::{LogFormat, NodeConfig};

/// What is logged.
#[derive(Clone)]
pub struct LogFilter(reload::Handle<EnvFilter, Registry>);

impl LogFilter {
    /// Changes it: `level` is as `--log-level` takes it.
    pub fn set(&self, level: &str) -> Result<()> {
        let filter = parse(level)?;
        self.0.reload(filter).map_err(|error| anyhow!("changing what is logged: {error}"))
    }

    /// What it is at the moment.
    pub fn shown(&self) -> Result<String> {
        self.0.with_current(ToString::to_string).map_err(|error| anyhow!("looking what is logged: {error}"))
    }
}

/// The filter as a part of a log, and what changes it while that part is there.
pub(crate) fn filter(level: &str) -> Result<(reload::Layer<EnvFilter, Registry>, LogFilter)> {
    let (layer, handle) = reload::Layer::new(parse(level)?);
    Ok((layer, LogFilter(handle)))
}

fn parse(level: &str) -> Result<EnvFilter> {
    EnvFilter::try_new(level).with_context(|| format!("{level:?} is no filter of log lines"))
}

/// Starts logging.
pub fn start(config: &NodeConfig) -> Result<LogFilter> {
    let (layer, filter) = filter(&config.log_level).context("--log-level")?;
    // What a full disk keeps from being written is lost; by default it is told on standard error, where a failure panics.
    let lines = fmt::layer().with_writer(std::io::stderr).log_internal_errors(false);
    let lines = match config.log_format {
        LogFormat::Text => lines.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr())).boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let started = tracing_subscriber::registry().with(layer).with(lines).try_init();
    started.map_err(|error| anyhow!("logging: {error}"))?;
    Ok(filter)
}
