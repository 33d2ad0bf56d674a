//! A tree of files and the programs that people run over it: tar, find, grep, cp, git, rm.
//!
//! The tree is made once for all targets and runs, from a seed, in a scratch directory: text in a source tree's
//! shape, sizes spread over four orders of magnitude. What tar unpacked is compared with it (untimed) in every run. Figures are seconds of wall time of the whole program: its start and
//! its own work are in it, the same for every target.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal};
use shardfs_proto::types::clock;

use super::progress::Progress;
use super::report::Sample;
use super::stats::Unit;
use super::workspace::{Cold, Stop, Workspace};

/// How large a tree is.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Files.
    pub files: usize,
    /// Bytes of them together, nearly.
    pub bytes: usize,
}

/// About as large as the sources of a kernel's subsystem.
pub const SHAPE: Shape = Shape { files: 9_000, bytes: 88 << 20 };
/// Files of one directory of the tree.
const FILES_PER_DIRECTORY: usize = 30;
/// Smallest and largest file, as powers of two: sizes are spread evenly over the exponents between.
const SIZE_BITS: std::ops::Range<f64> = 5.0..17.3;
/// A word that stands in every [`NEEDLE_EVERY`]th file and nowhere else; grep looks for it.
const NEEDLE: &str = "needle_in_the_haystack";
const NEEDLE_EVERY: usize = 100;
/// How soon a running program is told that the run was interrupted.
const STOP_PAUSE: Duration = Duration::from_millis(20);

/// The tree, its archive and, if git is installed, a repository of it.
pub struct Source {
    workspace: Workspace,
    shape: Shape,
    has_git: bool,
}

impl Source {
    /// Makes all in `scratch`.
    pub fn make(scratch: &Path, shape: Shape, seed: u64, stop: &Stop, progress: &Progress) -> Result<Source> {
        progress.phase("making the tree");
        let workspace = Workspace::new(scratch)?;
        let tree = workspace.path().join("tree");
        make_tree(&tree, shape, seed, stop)?;
        run(stop, "tar", |c| {
            c.arg("-C").arg(workspace.path()).arg("-cf").arg(workspace.path().join("tree.tar")).arg("tree")
        })?;
        let has_git = Command::new("git").arg("--version").output().is_ok_and(|out| out.status.success());
        if has_git {
            let git = workspace.path().join("repository.git");
            let git = git.as_path();
            run(stop, "git", |c| c.args(["init", "-q", "--bare"]).arg(git))?;
            run(stop, "git", |c| within(c, git, &tree).args(["add", "-A", "."]))?;
            run(stop, "git", |c| {
                within(c, git, &tree).args([
                    "-c",
                    "user.name=b",
                    "-c",
                    "user.email=b@b",
                    "commit",
                    "-q",
                    "-m",
                    "tree",
                ])
            })?;
        }
        Ok(Source { workspace, shape, has_git })
    }

    /// Removes it.
    pub fn remove(self) -> Result<()> {
        self.workspace.remove()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.workspace.path().join(name)
    }

    /// For the head of a report.
    pub fn describe(&self) -> String {
        let git = if self.has_git { "" } else { "; no git here" };
        format!("{} files, {} MiB{git}", self.shape.files, self.shape.bytes >> 20)
    }
}

fn within<'a>(command: &'a mut Command, git: &Path, tree: &Path) -> &'a mut Command {
    command.arg("--git-dir").arg(git).arg("--work-tree").arg(tree)
}

/// Runs every program once below `parent`.
pub fn run_all(
    parent: &Path,
    source: &Source,
    cold: Cold,
    stop: &Stop,
    progress: &Progress,
) -> Result<Vec<Sample>> {
    let workspace = Workspace::new(parent)?;
    let base = workspace.path();
    let tree = base.join("tree");
    let mut samples = Vec::new();
    let mut timed = |name: &str, work: &dyn Fn() -> Result<Finished>| -> Result<Finished> {
        progress.phase(name);
        let finished = work().with_context(|| name.to_owned())?;
        samples.push(Sample {
            name: name.to_owned(),
            workers: 1,
            unit: Unit::Seconds,
            value: finished.took.as_secs_f64(),
            latencies: None,
        });
        Ok(finished)
    };
    let files = source.shape.files;
    let needles = files.div_ceil(NEEDLE_EVERY);
    timed("tar x", &|| run(stop, "tar", |c| c.arg("-C").arg(base).arg("-xf").arg(source.path("tree.tar"))))?;
    for warm in [false, true] {
        if !warm {
            if cold != Cold::DropCaches {
                continue;
            }
            cold.make(None)?;
        }
        let name = if warm { "grep -r" } else { "grep -r, cold" };
        let grep = timed(name, &|| run(stop, "grep", |c| c.args(["-r", "-l", NEEDLE]).arg(&tree)))?;
        if grep.lines != needles {
            bail!("WRONG CONTENT: grep found the word in {} files, it stands in {needles}", grep.lines);
        }
    }
    let find = timed("find -size", &|| {
        run(stop, "find", |c| c.arg(&tree).args(["-type", "f", "-size", "-1000000"]))
    })?;
    if find.lines != files {
        bail!("WRONG CONTENT: find found {} files, the tree has {files}", find.lines);
    }
    progress.phase("comparing");
    run(stop, "diff", |c| c.arg("-r").arg(source.path("tree")).arg(&tree)).context("WRONG CONTENT")?;
    timed("cp -a", &|| run(stop, "cp", |c| c.arg("-a").arg(&tree).arg(base.join("copy"))))?;
    if source.has_git {
        let clone = base.join("clone");
        timed("git clone", &|| {
            run(stop, "git", |c| {
                c.args(["clone", "-q", "--no-local"]).arg(source.path("repository.git")).arg(&clone)
            })
        })?;
        let status = timed("git status", &|| {
            run(stop, "git", |c| c.arg("-C").arg(&clone).args(["status", "--short"]))
        })?;
        if status.lines != 0 {
            bail!("WRONG CONTENT: git status sees {} changes in a fresh clone", status.lines);
        }
    }
    timed("rm -r", &|| run(stop, "rm", |c| c.arg("-r").arg(&tree)))?;
    workspace.remove()?;
    Ok(samples)
}

fn make_tree(root: &Path, shape: Shape, seed: u64, stop: &Stop) -> Result<()> {
    let mut random = fastrand::Rng::with_seed(seed);
    let words: Vec<String> = (0..4_000)
        .map(|_| (0..random.usize(2..11)).map(|_| char::from(random.u8(b'a'..=b'z'))).collect())
        .collect();
    let mut sizes: Vec<f64> = (0..shape.files)
        .map(|_| (SIZE_BITS.start + random.f64() * (SIZE_BITS.end - SIZE_BITS.start)).exp2())
        .collect();
    let scale = shape.bytes as f64 / sizes.iter().sum::<f64>();
    for size in &mut sizes {
        *size *= scale;
    }
    let mut text = Vec::new();
    for (number, size) in sizes.into_iter().enumerate() {
        stop.check()?;
        let directory = number / FILES_PER_DIRECTORY;
        let dir = root.join(format!("part{:02}/module{directory:03}", directory / 20));
        std::fs::create_dir_all(&dir).with_context(|| format!("mkdir {}", dir.display()))?;
        text.clear();
        if number % NEEDLE_EVERY == 0 {
            writeln!(text, "{NEEDLE}")?;
        }
        while text.len() < size as usize {
            let word = &words[random.usize(..words.len())];
            let end = if random.u8(..) < 25 { '\n' } else { ' ' };
            write!(text, "{word}{end}")?;
        }
        let path = dir.join(format!("file{number:05}.txt"));
        std::fs::write(&path, &text).with_context(|| format!("write {}", path.display()))?;
    }
    Ok(())
}

/// A program that ended well.
struct Finished {
    took: Duration,
    /// Lines that it printed.
    lines: usize,
}

/// Runs a program to its end; kills it if the run is interrupted.
fn run(stop: &Stop, program: &str, set: impl FnOnce(&mut Command) -> &mut Command) -> Result<Finished> {
    stop.check()?;
    let mut command = Command::new(program);
    set(&mut command).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).env("LC_ALL", "C");
    let began = clock::monotonic();
    let child = command.spawn().with_context(|| format!("cannot run {program}: is it installed?"))?;
    let pid =
        i32::try_from(child.id()).ok().and_then(Pid::from_raw).context("a child's process id is positive")?;
    let handle = rustix::process::pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
    let ended = AtomicBool::new(false);
    let (output, took) = std::thread::scope(|scope| {
        scope.spawn(|| {
            while !ended.load(Ordering::Relaxed) {
                if stop.requested() {
                    // An error means that it ended by itself.
                    let _ = rustix::process::pidfd_send_signal(&handle, Signal::KILL);
                    return;
                }
                std::thread::park_timeout(STOP_PAUSE);
            }
        });
        let output = child.wait_with_output();
        let took = began.elapsed();
        ended.store(true, Ordering::Relaxed);
        (output, took)
    });
    stop.check()?;
    let output = output.with_context(|| format!("cannot wait for {program}"))?;
    if !output.status.success() {
        let said =
            String::from_utf8_lossy(if output.stderr.is_empty() { &output.stdout } else { &output.stderr });
        let said: Vec<&str> = said.lines().take(5).collect();
        bail!("{program} failed ({}): {}", output.status, said.join("; "));
    }
    Ok(Finished { took, lines: output.stdout.iter().filter(|byte| **byte == b'\n').count() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_measures_every_program_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (stop, progress) = (Stop::default(), Progress::hidden());
        let source =
            Source::make(dir.path(), Shape { files: 250, bytes: 1 << 20 }, 3, &stop, &progress).unwrap();
        let target = tempfile::tempdir().unwrap();
        let samples = run_all(target.path(), &source, Cold::Fadvise, &stop, &progress).unwrap();
        let names: Vec<&str> = samples.iter().map(|s| s.name.as_str()).collect();
        let mut want = vec!["tar x", "grep -r", "find -size", "cp -a"];
        if source.has_git {
            want.extend(["git clone", "git status"]);
        }
        want.push("rm -r");
        assert_eq!(names, want);
        source.remove().unwrap();
        for dir in [dir, target] {
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        }
    }

    #[test]
    fn programs_that_fail_are_named_and_stopped() {
        let stop = Stop::default();
        let error =
            run(&stop, "sh", |c| c.args(["-c", "echo broken >&2; exit 3"])).err().unwrap().to_string();
        assert!(error.contains("sh failed") && error.contains("broken"), "{error}");
        let other = stop.clone();
        let stopper = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            other.request(crate::failure::EXIT_INTERRUPTED);
        });
        let began = clock::monotonic();
        assert!(run(&stop, "sleep", |c| c.arg("1000")).is_err());
        assert!(began.elapsed() < Duration::from_secs(100));
        stopper.join().unwrap();
    }
}
