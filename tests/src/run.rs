//! Other programs, with deadlines: a hung mount fails a test, it does not hang the run.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

/// What a program may take before it is killed, unless a test says otherwise.
pub const DEADLINE_SECONDS: u32 = 300;

/// Shell scripts in one folder, with variables.
#[derive(Clone, Debug)]
pub struct Shell {
    folder: PathBuf,
    variables: Vec<(String, String)>,
    deadline_seconds: u32,
}

impl Shell {
    /// Scripts that start in `folder`.
    pub fn new(folder: impl Into<PathBuf>) -> Shell {
        Shell { folder: folder.into(), variables: Vec::new(), deadline_seconds: DEADLINE_SECONDS }
    }

    /// Gives the scripts a variable.
    pub fn with(mut self, name: &str, value: impl AsRef<OsStr>) -> Shell {
        let value = value.as_ref().to_str().expect("test paths are UTF-8").to_owned();
        self.variables.push((name.to_owned(), value));
        self
    }

    /// Gives the scripts another deadline.
    pub fn deadline_seconds(mut self, seconds: u32) -> Shell {
        self.deadline_seconds = seconds;
        self
    }

    /// Runs a bash script (`set -euo pipefail`), whatever its outcome.
    pub fn output(&self, script: &str) -> Output {
        Command::new("timeout")
            .args(["--kill-after=5", &self.deadline_seconds.to_string(), "bash", "-c"])
            .arg(format!("set -euo pipefail\n{script}"))
            .current_dir(&self.folder)
            .envs(self.variables.iter().map(|(n, v)| (n, v)))
            .env("LC_ALL", "C")
            .stdin(std::process::Stdio::null())
            .output()
            .expect("timeout and bash are there")
    }

    /// Runs a script that must succeed; its standard output.
    pub fn run(&self, script: &str) -> String {
        let output = self.output(script);
        assert!(output.status.success(), "{}", described(script, &output));
        String::from_utf8_lossy(&output.stdout).into_owned()
    }

    /// Runs a script that must fail by itself (not by its deadline); its standard error.
    pub fn fails(&self, script: &str) -> String {
        let output = self.output(script);
        let code = output.status.code();
        assert!(
            !output.status.success() && code != Some(124) && code != Some(137),
            "should have failed: {}",
            described(script, &output)
        );
        String::from_utf8_lossy(&output.stderr).into_owned()
    }
}

/// Runs a script in a folder; it must succeed. Its standard output.
pub fn sh(folder: impl AsRef<Path>, script: &str) -> String {
    Shell::new(folder.as_ref()).run(script)
}

/// Runs a script in a folder; it must fail. Its standard error.
pub fn sh_fails(folder: impl AsRef<Path>, script: &str) -> String {
    Shell::new(folder.as_ref()).fails(script)
}

/// A program's end, for a panic message.
pub fn described(what: &str, output: &Output) -> String {
    format!(
        "{what}\n-- {}\n-- stdout\n{}\n-- stderr\n{}",
        output.status,
        tail(&output.stdout),
        tail(&output.stderr)
    )
}

/// The last 8 KiB, as text.
fn tail(bytes: &[u8]) -> String {
    let from = bytes.len().saturating_sub(8 << 10);
    String::from_utf8_lossy(&bytes[from..]).into_owned()
}
