//! Log lines: to standard error in the foreground, to a file if one is named, else nowhere.
//!
//! What is logged may change while the daemon runs, and the file may be opened anew, so that it can be rotated.

use std::fs::{File, OpenOptions};
use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use parking_lot::Mutex;
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer, Registry, fmt, reload};

use crate::cli::LogFormat;
use crate::config::Settings;

/// A log that was started.
#[derive(Clone)]
pub struct Log {
    filter: reload::Handle<EnvFilter, Registry>,
    file: Option<LogFile>,
}

impl Log {
    /// Changes what is logged: `level` is as `--log-level` takes it.
    pub fn set_level(&self, level: &str) -> Result<()> {
        self.filter.reload(parse(level)?).map_err(|error| anyhow!("changing what is logged: {error}"))
    }

    /// Opens the file anew: what was there may have been moved away. If that fails, the old one goes on.
    pub fn reopen(&self) -> Result<()> {
        self.file.as_ref().map_or(Ok(()), LogFile::reopen)
    }
}

/// A file that log lines are appended to.
#[derive(Clone)]
struct LogFile {
    path: Arc<PathBuf>,
    file: Arc<Mutex<File>>,
}

impl LogFile {
    fn open(path: &Path) -> Result<LogFile> {
        let file = Arc::new(Mutex::new(append_to(path)?));
        Ok(LogFile { path: Arc::new(path.to_path_buf()), file })
    }

    fn reopen(&self) -> Result<()> {
        *self.file.lock() = append_to(&self.path)?;
        Ok(())
    }
}

impl Write for LogFile {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        self.file.lock().write(line)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.lock().flush()
    }
}

fn append_to(path: &Path) -> Result<File> {
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.with_context(|| format!("--log-file {}", path.display()))
}

fn parse(level: &str) -> Result<EnvFilter> {
    let filter = EnvFilter::try_new(level).with_context(|| format!("--log-level {level:?}"))?;
    // fuser tells of every request that is left to the kernel, and of replies that came after their caller's end.
    Ok(if level.contains("fuser") {
        filter
    } else {
        filter.add_directive("fuser=off".parse().context("a directive of ours")?)
    })
}

/// Starts logging.
pub fn start(settings: &Settings, foreground: bool) -> Result<Log> {
    let (layer, filter) = reload::Layer::new(parse(&settings.log_level)?);
    let file = settings.log_file.as_deref().map(LogFile::open).transpose()?;
    let (writer, ansi) = match &file {
        Some(file) => {
            let file = file.clone();
            (BoxMakeWriter::new(move || file.clone()), false)
        }
        None if foreground => (BoxMakeWriter::new(std::io::stderr), std::io::stderr().is_terminal()),
        None => (BoxMakeWriter::new(std::io::sink), false),
    };
    // What a full disk keeps from being written is lost; by default it is told on standard error, where a failure panics.
    let lines = fmt::layer().with_writer(writer).with_ansi(ansi).log_internal_errors(false);
    let lines = match settings.log_format {
        LogFormat::Text => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let started = tracing_subscriber::registry().with(layer).with(lines).try_init();
    started.map_err(|error| anyhow!("logging: {error}"))?;
    Ok(Log { filter, file })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_file_that_was_moved_away_is_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (path, old) = (dir.path().join("log"), dir.path().join("log.1"));
        let mut file = LogFile::open(&path).unwrap();
        file.write_all(b"one\n").unwrap();
        std::fs::rename(&path, &old).unwrap();
        file.write_all(b"two\n").unwrap();
        file.reopen().unwrap();
        file.write_all(b"three\n").unwrap();
        assert_eq!(std::fs::read(&old).unwrap(), b"one\ntwo\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"three\n");
        std::fs::remove_dir_all(dir.path()).unwrap();
        assert!(file.reopen().is_err(), "there is no folder for it");
        file.write_all(b"four\n").unwrap();
    }
}
