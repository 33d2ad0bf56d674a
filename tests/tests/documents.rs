//! The commands in the documents are commands that there are, with flags that they have; files that are named are there.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use shardfs_tests::cluster::bin_dir;

const DOCUMENTS: [&str; 2] = ["README.md", "DEPLOYMENT.md"];
const PROGRAMS: [&str; 3] = ["shardfs", "shardfsd", "shardfs-node"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// The lines of the blocks of shell commands of a document; those that end with a backslash are one with the next.
fn commands(text: &str) -> Vec<String> {
    let mut inside = false;
    let mut lines: Vec<String> = Vec::new();
    let mut goes_on = false;
    for line in text.lines() {
        if line.starts_with("```") {
            inside = line == "```sh";
        } else if inside {
            let part = line.trim_end_matches('\\');
            match lines.last_mut().filter(|_| goes_on) {
                Some(last) => last.push_str(part),
                None => lines.push(part.to_owned()),
            }
            goes_on = line.ends_with('\\');
        }
    }
    lines
}

/// The words of the calls of our programs in a line: without comments, redirections and what comes behind a pipe.
fn calls(line: &str) -> Vec<Vec<String>> {
    let code = line.split(" #").next().unwrap();
    code.split(['|', ';'])
        .map(|part| part.split_whitespace().take_while(|word| !word.starts_with(['>', '<'])))
        .map(|words| words.map(|word| word.trim_matches(['"', '\'']).to_owned()).collect::<Vec<_>>())
        .filter(|words| words.first().is_some_and(|first| PROGRAMS.contains(&first.as_str())))
        .collect()
}

/// `--help` behind a command prints its help if all before it is understood.
#[test]
fn the_commands_in_the_documents_are_understood() {
    let mut tried = 0;
    for document in DOCUMENTS {
        let text = fs::read_to_string(workspace().join(document)).unwrap();
        for call in commands(&text).iter().flat_map(|line| calls(line)) {
            let output = Command::new(bin_dir().join(&call[0]))
                .args(&call[1..])
                .arg("--help")
                .stdin(Stdio::null())
                .output()
                .unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(output.status.success(), "{document}: {}: {said}", call.join(" "));
            assert!(
                String::from_utf8_lossy(&output.stdout).contains("Usage:"),
                "{document}: {}",
                call.join(" ")
            );
            tried += 1;
        }
    }
    assert!(tried >= 20, "the documents hold commands: {tried}");
    // This test would see one that is wrong.
    let wrong = Command::new(bin_dir().join("shardfs"))
        .args(["volume", "add", "v", "--sourc", "x", "--help"])
        .output();
    assert!(!wrong.unwrap().status.success());
}

#[test]
fn the_files_that_the_documents_link_to_are_there() {
    let mut seen = 0;
    for document in ["README.md", "DEPLOYMENT.md", "ARCHITECTURE.md", "SEMANTICS.md"] {
        let text = fs::read_to_string(workspace().join(document)).unwrap();
        for (at, _) in text.match_indices("](") {
            let target = text[at + 2..].split(')').next().unwrap();
            if target.contains("://") || target.starts_with('#') {
                continue;
            }
            let path = workspace().join(target.split('#').next().unwrap());
            assert!(path.exists(), "{document}: {target} is not there");
            seen += 1;
        }
    }
    assert!(seen >= 10, "{seen}");
}
