//! `shardfs man`: manual pages, made from the same words as `--help`.

use std::path::PathBuf;

use clap::CommandFactory;

use crate::cli::Cli;
use crate::failure::{OrFail, Result};
use crate::output::Out;

/// `shardfs man`.
#[derive(clap::Args, Debug)]
#[command(after_help = "Examples:
  shardfs man | man -l -
  shardfs man --man-dir /usr/local/share/man/man1")]
pub struct Args {
    /// Write a page for every command into this folder, instead of one to standard output
    #[arg(long, value_name = "FOLDER")]
    man_dir: Option<PathBuf>,
}

/// Runs.
pub fn run(args: &Args) -> Result<()> {
    let command = Cli::command();
    let Some(dir) = &args.man_dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page).context("manual page")?;
        let mut out = Out::new();
        out.bytes(&page)?;
        return out.flush();
    };
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    clap_mangen::generate_to(command, dir).with_context(|| dir.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_has_a_page() {
        let temp = tempfile::tempdir().unwrap();
        run(&Args { man_dir: Some(temp.path().to_owned()) }).unwrap();
        for page in ["shardfs.1", "shardfs-put.1", "shardfs-dev-up.1", "shardfs-shard-create.1"] {
            let text = std::fs::read_to_string(temp.path().join(page)).unwrap();
            assert!(text.contains(".SH NAME"), "{page}");
        }
        assert!(!temp.path().join("shardfs-dev-supervise.1").exists());
    }
}
