//! Reading the settings again, at SIGHUP, from the same flags, environment and file.
//!
//! What can change while the node runs: `log_level`, `shutdown_seconds`, `default_limit`, `publish_every`. Everything else stays as
//! it was at the start, and is named in the log if it differs; certificates and passwords of the metadata store are read for every
//! new connection anyway. Settings that are refused change nothing: the node goes on with those it has.

use anyhow::{Context, Result};

use crate::catalog::Tunable;
use crate::config::{Args, NodeConfig};
use crate::logging::LogFilter;

/// Where a node's settings come from, and what they have come to.
pub struct Reload {
    args: Args,
    filter: LogFilter,
}

impl Reload {
    /// `args`: as the process was started with.
    pub fn new(args: Args, filter: LogFilter) -> Reload {
        Reload { args, filter }
    }

    /// Reads them, and takes up in `config` what may change; `tune` is told of what the catalog uses.
    ///
    /// # Errors
    /// In words for people; `config` is as before then.
    pub fn again(&self, config: &mut NodeConfig, tune: impl FnOnce(Tunable)) -> Result<Outcome> {
        let read = NodeConfig::load(self.args.clone())?;
        self.filter.set(&read.log_level).context("--log-level")?;
        let outcome = merge(config, read);
        tune(config.tunable());
        Ok(outcome)
    }
}

/// What came of it: names of settings.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Outcome {
    /// Taken up.
    pub changed: Vec<&'static str>,
    /// They differ, and wait for a restart.
    pub need_restart: Vec<&'static str>,
}

/// Takes from `read` what may change.
fn merge(config: &mut NodeConfig, read: NodeConfig) -> Outcome {
    let mut outcome = Outcome::default();
    let mut take = |name, differs: bool| {
        if differs {
            outcome.changed.push(name);
        }
    };
    take("log_level", config.log_level != read.log_level);
    take("shutdown_seconds", config.shutdown != read.shutdown);
    take("default_limit", config.default_limit_bytes != read.default_limit_bytes);
    take("publish_every", config.publish_every != read.publish_every);
    config.log_level.clone_from(&read.log_level);
    config.shutdown = read.shutdown;
    config.default_limit_bytes = read.default_limit_bytes;
    config.publish_every = read.publish_every;
    outcome.need_restart = config.differences(&read);
    outcome
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::time::Duration;

    use clap::Parser;

    use super::*;

    /// The last one is what the filter is a part of.
    fn start(file: &std::path::Path, text: &str) -> (Reload, NodeConfig, impl Sized) {
        std::fs::File::create(file).unwrap().write_all(text.as_bytes()).unwrap();
        let path = file.to_str().unwrap();
        let args = Args::parse_from(["shardfs-node", "--config", path, "--open-shards", "9"]);
        let config = NodeConfig::load(args.clone()).unwrap();
        let (log, filter) = crate::logging::filter("info").unwrap();
        (Reload::new(args, filter), config, log)
    }

    const NEEDED: &str = "id: n\ndata_dir: /d\nmeta: unix:/m\n";

    #[test]
    fn what_may_change_is_taken_up_and_the_rest_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.yaml");
        let (reload, mut config, _log) = start(&file, NEEDED);
        let same = reload.again(&mut config, |_| {}).unwrap();
        assert_eq!(same, Outcome::default());

        let text =
            "log_level: debug\ndefault_limit: 1GiB\npublish_every: 7\nlisten: 127.0.0.1:1\nopen_shards: 5\n";
        std::fs::write(&file, format!("{NEEDED}{text}")).unwrap();
        let mut told = None;
        let outcome = reload.again(&mut config, |tunable| told = Some(tunable)).unwrap();
        assert_eq!(outcome.changed, ["log_level", "default_limit", "publish_every"]);
        // A flag is over the file, so `open_shards` is what it was.
        assert_eq!(outcome.need_restart, ["listen"]);
        assert_eq!(config.listen.to_string(), "127.0.0.1:7400");
        let expected = Tunable { limit_bytes_default: Some(1 << 30), publish_every: Duration::from_secs(7) };
        assert_eq!(told, Some(expected));
        assert_eq!(reload.filter.shown().unwrap(), "debug");
    }

    #[test]
    fn settings_that_are_refused_change_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("node.yaml");
        let (reload, mut config, _log) = start(&file, NEEDED);
        let before = config.clone();
        for (bad, named) in [
            ("colour: red\n", "colour"),
            ("log_level: '==='\n", "log-level"),
            ("publish_every: -1\n", "publish"),
        ] {
            std::fs::write(&file, format!("{NEEDED}shutdown_seconds: 3\n{bad}")).unwrap();
            let error = reload.again(&mut config, |_| panic!("nothing is taken up")).unwrap_err();
            assert!(format!("{error:#}").contains(named), "{error:#}");
            assert_eq!(config, before);
            assert_eq!(reload.filter.shown().unwrap(), "info");
        }
        std::fs::remove_file(&file).unwrap();
        assert!(reload.again(&mut config, |_| {}).is_err());
    }
}
