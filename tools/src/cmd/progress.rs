//! A moving line on long transfers, only when stderr is a terminal.

use std::io::{self, IsTerminal};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A transfer that ends sooner shows nothing.
const SHOWN_AFTER: Duration = Duration::from_millis(500);

/// Of what has an end.
const WITH_TOTAL: &str = "{msg} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
/// Of what ends some day.
const WITHOUT_TOTAL: &str = "{msg} {bytes} {bytes_per_sec} {elapsed}";

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
        if let Ok(style) =
            ProgressStyle::with_template(if total.is_some() { WITH_TOTAL } else { WITHOUT_TOTAL })
        {
            bar.set_style(style);
        }
        bar.set_message(what.to_owned());
        Progress { handle: Handle { bar } }
    }

    /// The total is known by now, and nothing of it is done yet.
    pub fn restart(&self, total: u64) {
        let bar = &self.handle.bar;
        bar.set_position(0);
        bar.set_length(total);
        if let Ok(style) = ProgressStyle::with_template(WITH_TOTAL) {
            bar.set_style(style);
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn totals_can_become_known() {
        let progress = Progress::new("photos/big", None);
        progress.add(7);
        assert_eq!(
            (progress.handle.bar.length(), progress.handle.bar.message().as_str()),
            (None, "photos/big")
        );
        progress.restart(100);
        progress.add(40);
        assert_eq!((progress.handle.bar.length(), progress.handle.bar.position()), (Some(100), 40));
    }
}
