//! A moving line on long transfers, only when stderr is a terminal.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A transfer that ends sooner shows nothing.
const SHOWN_AFTER: Duration = Duration::from_millis(500);

/// Progress in bytes; does nothing when nobody looks.
pub struct Progress {
    handle: Handle,
}

/// A part of a transfer, wherever it runs, adds to its progress.
#[derive(Clone)]
pub struct Handle {
    bar: ProgressBar,
}

impl Handle {
    /// So many bytes more.
    pub fn add(&self, bytes: u64) {
        if self.bar.is_hidden() && self.bar.elapsed() > SHOWN_AFTER && io::stderr().is_terminal() {
            self.bar.set_draw_target(ProgressDrawTarget::stderr());
        }
        self.bar.inc(bytes);
    }
}

impl Progress {
    /// Of `total` bytes, if that is known. Shown when it takes longer than a moment.
    pub fn new(what: &str, total: Option<u64>) -> Progress {
        let bar = match total {
            Some(total) => ProgressBar::new(total),
            None => ProgressBar::no_length(),
        };
        bar.set_draw_target(ProgressDrawTarget::hidden());
        let template = match total {
            Some(_) => "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
            None => "{msg} {bytes} {bytes_per_sec} {elapsed}",
        };
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        Progress { handle: Handle { bar } }
    }

    /// Of things, not bytes.
    pub fn count(what: &str) -> Progress {
        let progress = Progress::new(what, None);
        if let Ok(style) = ProgressStyle::with_template("{msg} {human_pos} {elapsed}") {
            progress.handle.bar.set_style(style);
        }
        progress
    }

    /// So many bytes more.
    pub fn add(&self, bytes: u64) {
        self.handle.add(bytes);
    }

    /// For parts that run elsewhere.
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// What is being done now.
    pub fn message(&self, what: String) {
        self.handle.bar.set_message(what);
    }

    /// Prints a line above it.
    pub fn note(&self, text: &str) {
        self.handle.bar.suspend(|| crate::output::note(text));
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.handle.bar.finish_and_clear();
    }
}
