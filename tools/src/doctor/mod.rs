//! `shardfs doctor`: whether this machine, and a device, are fit for ShardFS.
//!
//! Each file looks at one thing and answers [`Check`]s. What is read is judged by pure functions; nothing is changed on the
//! machine but files and a loop device of the doctor's own, which go with it. A device is changed only by
//! [`device`]'s check of two paths, which is asked for by naming the second one.

use serde::Serialize;

pub mod clocks;
pub mod device;
pub mod disk;
pub mod etcd;
pub mod ext4;
pub mod fuse;
pub mod kernel;
pub mod limits;
pub mod loops;
pub mod programs;

/// How a check came out.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// Not looked at, and why stands in the detail.
    Skipped,
    /// It works, worse than it could.
    Warn,
    /// Something of ShardFS does not work.
    Fail,
}

impl Outcome {
    /// For tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Ok => "ok",
            Outcome::Skipped => "skipped",
            Outcome::Warn => "warn",
            Outcome::Fail => "FAIL",
        }
    }
}

/// One thing that was looked at.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Check {
    /// Its name.
    pub check: String,
    /// How it came out.
    pub outcome: Outcome,
    /// What was seen.
    pub detail: String,
    /// What to do about it; empty: nothing.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub advice: String,
}

impl Check {
    fn new(name: &str, outcome: Outcome, detail: impl Into<String>, advice: impl Into<String>) -> Check {
        Check { check: name.to_owned(), outcome, detail: detail.into(), advice: advice.into() }
    }

    /// As it should be.
    pub fn ok(name: &str, detail: impl Into<String>) -> Check {
        Check::new(name, Outcome::Ok, detail, "")
    }

    /// It works, worse than it could; what to do.
    pub fn warn(name: &str, detail: impl Into<String>, advice: impl Into<String>) -> Check {
        Check::new(name, Outcome::Warn, detail, advice)
    }

    /// Something does not work; what to do.
    pub fn fail(name: &str, detail: impl Into<String>, advice: impl Into<String>) -> Check {
        Check::new(name, Outcome::Fail, detail, advice)
    }

    /// Not looked at, and why.
    pub fn skipped(name: &str, why: impl Into<String>) -> Check {
        Check::new(name, Outcome::Skipped, why, "")
    }
}

/// Milliseconds for people.
fn ms(duration: std::time::Duration) -> String {
    format!("{:.1} ms", duration.as_secs_f64() * 1e3)
}

/// The value below which this share of the values lies; the values are sorted.
fn quantile(sorted: &[std::time::Duration], share: f64) -> std::time::Duration {
    let at = ((sorted.len() as f64 * share) as usize).min(sorted.len().saturating_sub(1));
    sorted.get(at).copied().unwrap_or_default()
}
