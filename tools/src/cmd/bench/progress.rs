//! Says on a terminal what is being measured; silent elsewhere.

use std::io::IsTerminal as _;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// One line on standard error that says what goes on. It moves only when a phase begins, and 4 times a second, so
/// that it costs the measurement nothing.
pub struct Progress {
    bar: ProgressBar,
    prefix: String,
}

impl Progress {
    /// On standard error, if that is a terminal.
    pub fn on_terminal() -> Progress {
        if !std::io::stderr().is_terminal() {
            return Progress::hidden();
        }
        let bar = ProgressBar::new_spinner();
        bar.set_style(
            ProgressStyle::with_template("{spinner} {elapsed} {wide_msg}")
                .expect("the template is a constant that parses"),
        );
        bar.enable_steady_tick(Duration::from_millis(250));
        Progress { bar, prefix: String::new() }
    }

    /// Nowhere.
    pub fn hidden() -> Progress {
        Progress { bar: ProgressBar::hidden(), prefix: String::new() }
    }

    /// What stands before the names of all following phases: run and target.
    pub fn within(&self, prefix: String) -> Progress {
        Progress { bar: self.bar.clone(), prefix }
    }

    /// Says what begins.
    pub fn phase(&self, what: &str) {
        self.bar.set_message(format!("{}{what}", self.prefix));
    }

    /// Takes the line away.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
