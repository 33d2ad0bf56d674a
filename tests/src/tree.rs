//! Trees of files that look like real ones, from a seed.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

/// Directories above a file, at most: as in real source trees.
const DEPTH_MAX: usize = 5;

/// What [`generate`] made.
#[derive(Clone, Copy, Debug, Default)]
pub struct Made {
    /// Regular files.
    pub files: usize,
    /// Bytes in them.
    pub bytes: u64,
}

/// Fills `root` with `files` regular files in nested directories: mostly small, some of a few hundred KiB,
/// a few around the sizes where storage changes its mind (4 KiB, 64 KiB), with symlinks, hard links,
/// empty directories, unusual names, modes and times among them.
pub fn generate(root: &Path, files: usize, seed: u64) -> Made {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut made = Made::default();
    fs::create_dir_all(root).unwrap();
    let mut folders = vec![root.to_path_buf()];
    let mut last: Option<std::path::PathBuf> = None;
    while made.files < files {
        if made.files.is_multiple_of(40) {
            let parent = folders[random.usize(..folders.len())].clone();
            let folder = parent.join(format!("d-{}", unusual(&mut random, folders.len())));
            let shallow = folder.components().count() < root.components().count() + DEPTH_MAX;
            // One in ten stays empty.
            if shallow && fs::create_dir(&folder).is_ok() && random.u8(..10) > 0 {
                folders.push(folder);
            }
        }
        let folder = &folders[random.usize(..folders.len())];
        let path = folder.join(unusual(&mut random, made.files));
        let size = match random.u16(..1000) {
            0 => 300 << 10,
            1..10 => 65_535 + random.usize(..3),
            10..30 => 4_095 + random.usize(..3),
            30..100 => random.usize(..65_536),
            100..150 => 0,
            _ => random.usize(..4096),
        };
        let content: Vec<u8> = (0..size).map(|_| random.u8(..)).collect();
        fs::write(&path, &content).unwrap();
        made.files += 1;
        made.bytes += size as u64;
        if random.u8(..20) == 0 {
            let mode = [0o600, 0o755, 0o444, 0o640, 0o4755][random.usize(..5)];
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        if random.u8(..50) == 0 {
            symlink(format!("target of {}", made.files), folder.join(format!("link-{}", made.files)))
                .unwrap();
        }
        if random.u8(..50) == 0
            && let Some(other) = &last
        {
            fs::hard_link(other, folder.join(format!("hard-{}", made.files))).unwrap();
        }
        if random.u8(..30) == 0 {
            let seconds = random.i64(0..2_000_000_000);
            set_mtime(&path, seconds, random.u32(..1_000_000_000));
        }
        last = Some(path);
    }
    made
}

/// Sets a file's times, in nanoseconds.
pub fn set_mtime(path: &Path, seconds: i64, nanos: u32) {
    let time = rustix::fs::Timespec { tv_sec: seconds, tv_nsec: nanos.into() };
    let times = rustix::fs::Timestamps { last_access: time, last_modification: time };
    rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty()).unwrap();
}

/// A name, now and then one that scripts stumble over.
fn unusual(random: &mut fastrand::Rng, number: usize) -> String {
    match random.u8(..40) {
        0 => format!("with space {number}"),
        1 => format!("-dash{number}"),
        2 => format!("ümläut-{number}"),
        3 => format!(".hidden{number}"),
        4 => format!("new\nline{number}"),
        5 => format!("q'uote\"{number}"),
        6 => format!("{}{number}", "long".repeat(40)),
        _ => format!("file-{number}.txt"),
    }
}

/// One line for everything in a tree: path, kind, mode, owner, size, mtime to the nanosecond, link count,
/// symlink target, and the content's checksum. Two trees are the same if their listings are.
pub fn listing(root: &Path) -> String {
    crate::sh(
        root,
        r#"find . -mindepth 1 -printf '%P\t%y %m %U:%G %l %n\0' | sort -z | tr '\0' '\n'
           find . -mindepth 1 ! -type d -printf '%P\t%T@ %s\0' | sort -z | tr '\0' '\n'
           find . -type f -print0 | sort -z | xargs -0 -r sha256sum"#,
    )
}

/// Panics with the first differences unless both trees have the same listing.
pub fn assert_same(one: &Path, other: &Path) {
    const SHOWN: usize = 10;
    let (a, b) = (listing(one), listing(other));
    if a == b {
        return;
    }
    let (left, right): (BTreeSet<&str>, BTreeSet<&str>) = (a.lines().collect(), b.lines().collect());
    let only = |of: &BTreeSet<&str>, not: &BTreeSet<&str>| -> String {
        of.difference(not).take(SHOWN).map(|line| format!("  {line}\n")).collect()
    };
    panic!(
        "the trees differ\nonly in {}:\n{}only in {}:\n{}",
        one.display(),
        only(&left, &right),
        other.display(),
        only(&right, &left)
    );
}
