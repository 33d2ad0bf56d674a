//! Reading the settings again, at SIGHUP, from the same options, flags, environment and file.
//!
//! What can change while the mount is there is `log_level`, and the log file is opened anew. Everything else stays as it was when it
//! was mounted, and is named in the log if it differs. Settings that are refused change nothing.

use anyhow::Result;

use crate::cli::Args;
use crate::config::Settings;
use crate::logging::Log;

/// Where a mount's settings come from, and its log.
pub struct Reload {
    args: Args,
    log: Log,
}

impl Reload {
    /// `args`: as the process was started with.
    pub fn new(args: Args, log: Log) -> Reload {
        Reload { args, log }
    }

    /// Reads them, and takes up in `settings` what may change; says in the log what came of it.
    pub fn again(&self, settings: &mut Settings) {
        // A log that is being rotated is, whatever becomes of the rest.
        if let Err(error) = self.log.reopen() {
            tracing::error!(error = %format!("{error:#}"), "the log goes on in the old file");
        }
        match self.take_up(settings) {
            Ok(need_restart) => {
                tracing::info!(log_level = settings.log_level, need_restart, "the settings are read again");
            }
            Err(error) => tracing::error!(
                error = %format!("{error:#}"),
                "the settings are refused, those of before go on"
            ),
        }
    }

    /// Answers whether others differ, which need a new mount.
    fn take_up(&self, settings: &mut Settings) -> Result<bool> {
        // What is found at the mount point is the mount itself now.
        let read =
            Settings { mount_point: settings.mount_point.clone(), ..Settings::load(self.args.clone())? };
        self.log.set_level(&read.log_level)?;
        settings.log_level.clone_from(&read.log_level);
        Ok(read != *settings)
    }
}
