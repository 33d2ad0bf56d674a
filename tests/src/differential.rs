//! The same random operations on two directories, side by side: a mount of ShardFS and a local ext4. What a program would see must be
//! the same, or stand in [`allowed`] with its reason.
//!
//! - [`op`]: what is done, drawn from a seed;
//! - [`actor`]: who does it: a thread with credentials, a umask and file descriptors of its own, as a process has them;
//! - [`view`]: what is seen of files and trees.
//!
//! Operations run one at a time, so that both sides have one order of them. A run is replayed by its seed.

mod actor;
mod op;
mod view;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};

use actor::{Actor, Outcome};
use op::{Draw, Op};

/// Operations between two looks at the whole trees.
const LOOK_EVERY: usize = 250;
/// Operations that a report of a difference shows.
const REPORT_LAST: usize = 40;

/// What a run is.
#[derive(Clone, Debug)]
pub struct Run {
    /// Below the mount.
    pub mount: PathBuf,
    /// Below the local filesystem.
    pub local: PathBuf,
    /// Where the operations come from.
    pub seed: u64,
    /// How many.
    pub steps: usize,
}

/// Why the two sides may differ in this, if they may.
fn allowed(op: &Op, mount: &Outcome, local: &Outcome, actor: &Actor) -> Option<&'static str> {
    match (op, mount, local) {
        (Op::SetXattr { .. }, Outcome::Done, Outcome::Failed(libc::ENOSPC)) => {
            Some("ext4 keeps the attributes of an inode in one block; ShardFS has 128 KiB for them")
        }
        (
            Op::StatSlot { slot } | Op::SetModeOfSlot { slot, .. } | Op::Sync { slot, .. },
            Outcome::Failed(libc::ESTALE),
            _,
        ) if actor.act(&Op::StatSlot { slot: *slot }).1.is_removed_directory() => Some(
            "a directory that is removed while it is open is gone; files live on, directories have nothing to live on with",
        ),
        (Op::Seek { slot, .. }, _, _) if actor.act(&Op::StatSlot { slot: *slot }).1.is_directory() => {
            Some("offsets of a directory are numbers of the filesystem's own making")
        }
        (Op::SetOwner { uid: None, gid: None, .. }, Outcome::Done, Outcome::Failed(libc::EPERM)) => Some(
            "the kernel asks no FUSE filesystem for a change of nothing, of which ext4 would clear set-id bits",
        ),
        _ => None,
    }
}

impl Run {
    /// Runs it, and calls `event` before each step, with its number. Panics at the first difference.
    pub fn run(&self, mut event: impl FnMut(usize)) {
        let _ = rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o022));
        for root in [&self.mount, &self.local] {
            std::fs::create_dir(root).unwrap();
            // All actors may make something in it.
            rustix::fs::chmod(root, rustix::fs::Mode::from_bits_truncate(0o777)).unwrap();
        }
        let actors: Vec<Actor> =
            actor::CAST.iter().map(|who| Actor::start(*who, &self.mount, &self.local)).collect();
        let mut draw = Draw::new(self.seed);
        let mut last: VecDeque<String> = VecDeque::new();
        for step in 0..self.steps {
            event(step);
            let who = draw.pick(actors.len());
            let op = draw.op();
            let (mount, local) = actors[who].act(&op);
            if last.len() == REPORT_LAST {
                last.pop_front();
            }
            last.push_back(format!("{step}: actor {who} {op:?} -> {local:?}"));
            if mount != local && allowed(&op, &mount, &local, &actors[who]).is_none() {
                self.differs(step, &last, &format!("the mount says {mount:?}\next4 says      {local:?}"));
            }
            if step % LOOK_EVERY == LOOK_EVERY - 1 || step + 1 == self.steps {
                self.look(step, &last);
            }
        }
        drop(actors);
        self.look(self.steps, &last);
    }

    /// Compares the whole trees.
    fn look(&self, step: usize, last: &VecDeque<String>) {
        let (mount, local) = (view::tree(&self.mount), view::tree(&self.local));
        if mount == local {
            return;
        }
        let mut text = String::new();
        for (path, seen) in &local {
            if mount.get(path) != Some(seen) {
                text += &format!("{}:\n  mount {:?}\n  ext4  {seen:?}\n", short(path), mount.get(path));
            }
        }
        for (path, seen) in mount.iter().filter(|(path, _)| !local.contains_key(*path)) {
            text += &format!("{}:\n  mount {seen:?}\n  ext4  None\n", short(path));
        }
        self.differs(step, last, &format!("the trees differ:\n{text}"));
    }

    fn differs(&self, step: usize, last: &VecDeque<String>, what: &str) -> ! {
        let last: Vec<String> = last.iter().map(|line| short(Path::new(line))).collect();
        panic!(
            "seed {} step {step} of {}\nthe last operations:\n{}\n{what}",
            self.seed,
            self.steps,
            last.join("\n")
        );
    }
}

/// A text with its long names cut.
fn short(text: &Path) -> String {
    text.to_string_lossy().replace(op::LONG_NAME, "LONG").replace(op::TOO_LONG_NAME, "TOO-LONG")
}
