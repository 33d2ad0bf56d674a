//! `shardfs man`: manual pages of this program and of the daemons, made from the same words as `--help`.

use std::path::{Path, PathBuf};

use clap::{Arg, Command, CommandFactory};

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

/// The page of the daemon `shardfs-node`; that of the command `shardfs node` would have the same name, and gives way.
const NODE_PAGE: &str = "shardfs-node";

/// Runs.
pub fn run(args: &Args) -> Result<()> {
    let command = with_dots(Cli::command());
    let Some(dir) = &args.man_dir else {
        let mut page = Vec::new();
        clap_mangen::Man::new(command).render(&mut page).context("manual page")?;
        let mut out = Out::new();
        out.bytes(&page)?;
        return out.flush();
    };
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let mut command = command.disable_help_subcommand(true);
    command.build();
    write_pages(&command, &source_of(&command), dir)?;
    for daemon in [shardfs_node::config::Args::command(), shardfsd::cli::Args::command()] {
        let daemon = with_dots(daemon);
        write_page(daemon.clone(), &source_of(&daemon), dir)?;
    }
    Ok(())
}

/// "shardfs 0.1.0": the program that a page belongs to.
fn source_of(program: &Command) -> String {
    format!("{} {}", program.get_name(), program.get_version().unwrap_or_default())
}

/// A page for each command, those below it first.
fn write_pages(command: &Command, source: &str, dir: &Path) -> Result<()> {
    for below in command.get_subcommands().filter(|c| !c.is_hide_set()) {
        write_pages(below, source, dir)?;
    }
    if command.get_display_name() == Some(NODE_PAGE) {
        return Ok(());
    }
    write_page(command.clone(), source, dir)
}

fn write_page(command: Command, source: &str, dir: &Path) -> Result<()> {
    let page = clap_mangen::Man::new(command).source(source);
    page.generate_to(dir).map(drop).with_context(|| dir.display().to_string())
}

/// Shows by dots which arguments can be several; the generator leaves that out.
fn with_dots(command: Command) -> Command {
    let dotted = |arg: Arg| {
        let several = arg.is_positional() && arg.get_num_args().is_some_and(|n| n.max_values() == usize::MAX);
        match arg.get_value_names() {
            Some([name]) if several => {
                let name = format!("{name}...");
                arg.value_name(name)
            }
            _ => arg,
        }
    };
    command.mut_args(dotted).mut_subcommands(with_dots)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_program_and_command_has_a_page() {
        let temp = tempfile::tempdir().unwrap();
        run(&Args { man_dir: Some(temp.path().to_owned()) }).unwrap();
        let page = |name: &str| std::fs::read_to_string(temp.path().join(name)).unwrap();
        for (name, about) in [
            ("shardfs.1", "shardfs - A storage cluster"),
            ("shardfs-put.1", "shardfs-put - Store files"),
            ("shardfs-dev-up.1", "shardfs-dev-up - Start a cluster"),
            ("shardfs-shard-create.1", "shardfs-shard-create - Make a shard"),
            ("shardfs-node-list.1", "shardfs-node-list - "),
            ("shardfs-node.1", "shardfs-node - A storage node"),
            ("shardfsd.1", "shardfsd - Mounts a ShardFS cluster"),
        ] {
            // The generator escapes what roff would take for its own.
            let text = page(name).replace('\\', "");
            assert!(text.contains(".SH NAME") && text.contains(about), "{name}: {text}");
        }
        let version = env!("CARGO_PKG_VERSION");
        let title = |name: &str| page(name).lines().find(|l| l.starts_with(".TH")).unwrap().to_owned();
        for (name, source) in [("shardfs-shard-create.1", "shardfs"), ("shardfs-node.1", "shardfs-node")] {
            assert!(title(name).contains(&format!("\"{source} {version}\"")), "{}", title(name));
        }
        assert!(page("shardfs-put.1").contains("SRC..."), "several sources are possible");
        assert!(!temp.path().join("shardfs-dev-supervise.1").exists());
    }
}
