//! Flags that say who may answer a command's reads.

use std::time::Duration;

use clap::ValueEnum;
use serde_json::{Value, json};
use shardfs_proto::types::limits::STALENESS_DEFAULT;
use shardfs_proto::types::{ReadFrom, ViewLabel};

use crate::failure::{Failure, Result};

/// Longer than this is no bound.
const STALENESS_SECONDS_MAX: f64 = 86_400.0;

/// Who may answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, ValueEnum)]
pub enum Who {
    /// The primary; of a closed shard every node that has its volume
    #[default]
    Primary,
    /// A backup, from a view that may be some seconds old; the primary if no backup can
    Backup,
}

/// The flags.
#[derive(clap::Args, Debug, Clone, Default)]
pub struct ReadArgs {
    /// Who may answer
    #[arg(long, value_name = "WHO", value_enum, default_value_t)]
    read_from: Who,
    /// With --read-from backup: how old an answer may be, such as 10s or 500ms [default: 10s]
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    max_staleness: Option<Duration>,
}

impl ReadArgs {
    /// What they come to.
    pub fn read_from(&self) -> Result<ReadFrom> {
        match (self.read_from, self.max_staleness) {
            (Who::Primary, None) => Ok(ReadFrom::Primary),
            (Who::Primary, Some(_)) => Err(Failure::usage(
                "--max-staleness is for --read-from backup: the primary's answers are not stale",
            )),
            (Who::Backup, time) => Ok(ReadFrom::Backup { max_staleness: time.unwrap_or(STALENESS_DEFAULT) }),
        }
    }
}

/// Whence an answer is, for people.
pub fn described(label: Option<&ViewLabel>) -> String {
    match label {
        None => "from the primary".to_owned(),
        Some(label) if label.last => format!("from {}, a closed shard's last view", label.node),
        Some(label) => format!(
            "from {}, a view at most {:.1} s old (operation {})",
            label.node,
            label.age.as_secs_f64(),
            label.sequence
        ),
    }
}

/// Of which view an answer is, for programs.
pub fn to_json(label: &ViewLabel) -> Value {
    json!({
        "node": label.node.as_str(),
        "sequence": label.sequence,
        "age_ms": u64::try_from(label.age.as_millis()).unwrap_or(u64::MAX),
        "last": label.last,
    })
}

fn parse_time(text: &str) -> std::result::Result<Duration, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" | "min" => 60.0,
        unit => return Err(format!("unit {unit:?} is unknown, there are ms, s and min")),
    };
    let seconds = digits.parse::<f64>().map_err(|_| "expected a time, such as 10s".to_owned())? * unit;
    if !(0.0..=STALENESS_SECONDS_MAX).contains(&seconds) {
        return Err(format!("expected 0 to {STALENESS_SECONDS_MAX} seconds"));
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_understood() {
        for (text, ms) in [("10s", 10_000), ("2", 2_000), ("500ms", 500), ("1.5s", 1_500), ("1min", 60_000)] {
            assert_eq!(parse_time(text).unwrap(), Duration::from_millis(ms), "{text}");
        }
        for bad in ["", "s", "10h", "-1s", "NaN", "1e9"] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_bound_needs_a_backup() {
        let args = |read_from, max_staleness| ReadArgs { read_from, max_staleness };
        let second = Duration::from_secs(1);
        assert_eq!(args(Who::Primary, None).read_from().unwrap(), ReadFrom::Primary);
        assert!(args(Who::Primary, Some(second)).read_from().is_err());
        assert_eq!(
            args(Who::Backup, Some(second)).read_from().unwrap(),
            ReadFrom::Backup { max_staleness: second }
        );
        assert_eq!(
            args(Who::Backup, None).read_from().unwrap(),
            ReadFrom::Backup { max_staleness: STALENESS_DEFAULT }
        );
    }
}
