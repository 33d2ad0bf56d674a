//! The walk and the listing against sorted lists of whole keys.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

use super::*;

/// A tree in memory that counts what is read from it.
#[derive(Default)]
struct Tree {
    entries: BTreeMap<(u64, Vec<u8>), (u64, FileKind)>,
    next: u64,
    pages: Cell<u64>,
    page_entries: Cell<u64>,
    finds: Cell<u64>,
}

impl Tree {
    fn new() -> Tree {
        Tree { next: 2, ..Tree::default() }
    }

    fn add(&mut self, parent: u64, name: &[u8], kind: FileKind) -> Option<u64> {
        let at = (parent, name.to_vec());
        if self.entries.contains_key(&at) {
            return None;
        }
        self.entries.insert(at, (self.next, kind));
        self.next += 1;
        Some(self.next - 1)
    }

    /// All keys in order; directories end with `/`.
    fn keys(&self, include_directories: bool) -> Vec<Vec<u8>> {
        let mut keys = Vec::new();
        let mut todo = vec![(1u64, Vec::new())];
        while let Some((parent, path)) = todo.pop() {
            for ((_, name), (inode, kind)) in
                self.entries.range((parent, Vec::new())..(parent + 1, Vec::new()))
            {
                let mut key = [&path[..], name].concat();
                if *kind == FileKind::Directory {
                    key.push(b'/');
                    todo.push((*inode, key.clone()));
                    if !include_directories {
                        continue;
                    }
                }
                keys.push(key);
            }
        }
        keys.sort();
        keys
    }
}

impl Dirents for &Tree {
    fn page(&self, parent: InodeNo, from: &[u8], limit: usize) -> Result<Vec<NameEntry>> {
        self.pages.set(self.pages.get() + 1);
        let end = (parent.get() + 1, Vec::new());
        let page: Vec<_> = self
            .entries
            .range((parent.get(), from.to_vec())..end)
            .take(limit)
            .map(|((_, name), (inode, kind))| NameEntry {
                name: name.clone().into(),
                inode: InodeNo::new(*inode).unwrap(),
                kind: *kind,
            })
            .collect();
        self.page_entries.set(self.page_entries.get() + page.len() as u64);
        Ok(page)
    }

    fn find(&self, parent: InodeNo, name: &[u8]) -> Result<Option<NameEntry>> {
        self.finds.set(self.finds.get() + 1);
        Ok(self.entries.get(&(parent.get(), name.to_vec())).map(|(inode, kind)| NameEntry {
            name: name.to_vec().into(),
            inode: InodeNo::new(*inode).unwrap(),
            kind: *kind,
        }))
    }
}

fn drain(walker: &mut KeyWalker<&Tree>) -> Vec<Vec<u8>> {
    let mut keys = Vec::new();
    loop {
        match walker.step().unwrap() {
            Step::Item(found) => {
                assert_eq!(found.kind == FileKind::Directory, found.key.ends_with(b"/"));
                keys.push(found.key.to_vec());
            }
            Step::Pause => {}
            Step::End => return keys,
        }
    }
}

fn lines(tree: &Tree, query: &ListQuery) -> Vec<(bool, Vec<u8>)> {
    let mut listing = Listing::new(tree, InodeNo::ROOT, query).unwrap();
    let mut lines = Vec::new();
    loop {
        match listing.step().unwrap() {
            Step::Item(Listed::Key(found)) => lines.push((false, found.key.to_vec())),
            Step::Item(Listed::CommonPrefix(common)) => lines.push((true, common.to_vec())),
            Step::Pause => {}
            Step::End => return lines,
        }
    }
}

/// What a listing is, said as plainly as possible.
fn expected(tree: &Tree, query: &ListQuery) -> Vec<(bool, Vec<u8>)> {
    let mut lines: BTreeSet<(Vec<u8>, bool)> = BTreeSet::new();
    for key in tree.keys(query.include_directories) {
        let Some(rest) = key.strip_prefix(&query.prefix[..]) else { continue };
        let at = (!query.delimiter.is_empty())
            .then(|| rest.windows(query.delimiter.len()).position(|w| w == query.delimiter))
            .flatten();
        match at {
            Some(at) => {
                lines.insert((key[..query.prefix.len() + at + query.delimiter.len()].to_vec(), true));
            }
            None => {
                lines.insert((key, false));
            }
        }
    }
    lines
        .into_iter()
        .filter(|(line, _)| query.start_after.is_empty() || line[..] > query.start_after[..])
        .take(query.limit.map_or(usize::MAX, |l| l as usize))
        .map(|(line, common)| (common, line))
        .collect()
}

fn random_name(rng: &mut fastrand::Rng) -> Vec<u8> {
    // Bytes around `/` (0x2f), the least and the greatest, and letters that repeat often, so that names
    // are prefixes of each other.
    const BYTES: &[u8] = &[0x01, b'!', b'-', b'.', b'0', b'a', b'a', b'b', 0xfe, 0xff];
    loop {
        let len = if rng.u8(..20) == 0 { 255 } else { rng.usize(1..6) };
        let name: Vec<u8> = match len {
            255 => vec![*rng.choice(b"a-\xff").unwrap(); 255 - rng.usize(0..2)],
            len => (0..len).map(|_| *rng.choice(BYTES).unwrap()).collect(),
        };
        if name != b"." && name != b".." {
            return name;
        }
    }
}

fn random_tree(rng: &mut fastrand::Rng) -> Tree {
    let mut tree = Tree::new();
    let mut directories = vec![1u64];
    for _ in 0..rng.usize(1..120) {
        let parent = *rng.choice(&directories).unwrap();
        let kind = *rng.choice(&[FileKind::Regular, FileKind::Directory, FileKind::Symlink]).unwrap();
        if let Some(inode) = tree.add(parent, &random_name(rng), kind)
            && kind == FileKind::Directory
        {
            directories.push(inode);
        }
    }
    tree
}

fn seeds(runs: u64) -> impl Iterator<Item = u64> {
    let first: u64 = match std::env::var("SHARDFS_TEST_SEED") {
        Ok(seed) => seed.parse().expect("SHARDFS_TEST_SEED is a number"),
        Err(_) => fastrand::u64(..1 << 32),
    };
    println!("first seed {first}; replay with SHARDFS_TEST_SEED={first}");
    (first..).take(runs as usize)
}

#[test]
fn directories_sort_as_their_name_and_a_slash() {
    let mut tree = Tree::new();
    let a = tree.add(1, b"a", FileKind::Directory).unwrap();
    let ab = tree.add(1, b"a-", FileKind::Directory).unwrap();
    tree.add(1, b"a-b", FileKind::Regular);
    tree.add(1, b"a0", FileKind::Regular);
    tree.add(1, b"a-b-", FileKind::Regular);
    tree.add(a, b"x", FileKind::Regular);
    tree.add(ab, b"y", FileKind::Regular);
    let keys = drain(&mut KeyWalker::new(&tree, InodeNo::ROOT, true));
    let text: Vec<_> = keys.iter().map(|k| String::from_utf8_lossy(k).into_owned()).collect();
    assert_eq!(text, ["a-/", "a-/y", "a-b", "a-b-", "a/", "a/x", "a0"]);
}

#[test]
fn walks_equal_the_sorted_keys_from_every_point() {
    for seed in seeds(300) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let tree = random_tree(&mut rng);
        for include in [false, true] {
            let keys = tree.keys(include);
            assert_eq!(drain(&mut KeyWalker::new(&tree, InodeNo::ROOT, include)), keys, "seed {seed}");
            // One walker for all seeks, so that they also go backwards and from the middle.
            let mut walker = KeyWalker::new(&tree, InodeNo::ROOT, include);
            let mut targets: Vec<Vec<u8>> =
                vec![vec![], b"/".to_vec(), b"//".to_vec(), vec![0xff; 300], vec![0]];
            for key in tree.keys(true) {
                targets.push([&key[..], b"\0"].concat());
                targets.push([&key[..], b"/"].concat());
                targets.push(key[..key.len() - 1].to_vec());
                targets.push([&key[..], b"//a"].concat());
                targets.push([&key[..], &random_name(&mut rng)].concat());
                targets.push(key);
            }
            rng.shuffle(&mut targets);
            for target in targets {
                walker.seek(&target).unwrap();
                let from = keys.partition_point(|key| *key < target);
                if rng.bool() {
                    assert_eq!(drain(&mut walker), keys[from..], "seed {seed} target {target:?}");
                } else {
                    for key in keys[from..].iter().take(rng.usize(0..5)) {
                        let Step::Item(found) = walker.step().unwrap() else {
                            panic!("seed {seed}: too short")
                        };
                        assert_eq!(found.key, key[..], "seed {seed} target {target:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn listings_equal_the_model() {
    for seed in seeds(400) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let tree = random_tree(&mut rng);
        let all = tree.keys(true);
        for _ in 0..30 {
            let some_key = |rng: &mut fastrand::Rng| match rng.choice(&all) {
                Some(key) if rng.u8(..4) != 0 => key.clone(),
                Some(_) | None => random_name(rng),
            };
            let cut = |rng: &mut fastrand::Rng, key: Vec<u8>| key[..rng.usize(0..=key.len())].to_vec();
            let prefix = some_key(&mut rng);
            let prefix = if rng.bool() { vec![] } else { cut(&mut rng, prefix) };
            let start = some_key(&mut rng);
            let delimiters: [&[u8]; 7] = [b"", b"", b"/", b"/", b"a", b"-", b"a/"];
            let query = ListQuery {
                prefix: prefix.into(),
                delimiter: rng.choice(delimiters).unwrap().to_vec().into(),
                start_after: if rng.bool() { Bytes::new() } else { cut(&mut rng, start).into() },
                limit: if rng.bool() { None } else { Some(rng.u64(0..10)) },
                include_directories: rng.bool(),
            };
            let found = lines(&tree, &query);
            assert_eq!(found, expected(&tree, &query), "seed {seed} {query:?}");
            // Resuming after any line gives the rest.
            if let Some(at) = (!found.is_empty()).then(|| rng.usize(..found.len())) {
                let rest =
                    ListQuery { start_after: found[at].1.clone().into(), limit: None, ..query.clone() };
                assert_eq!(lines(&tree, &rest), expected(&tree, &rest), "seed {seed} {rest:?}");
            }
        }
    }
}

#[test]
fn every_start_after_resumes() {
    for seed in seeds(60) {
        let mut rng = fastrand::Rng::with_seed(seed);
        let tree = random_tree(&mut rng);
        for delimiter in [&b""[..], b"/", b"-"] {
            for include_directories in [false, true] {
                let base = ListQuery {
                    delimiter: Bytes::copy_from_slice(delimiter),
                    include_directories,
                    ..ListQuery::default()
                };
                let all = lines(&tree, &base);
                for (at, (_, line)) in all.iter().enumerate() {
                    let query = ListQuery { start_after: line.clone().into(), ..base.clone() };
                    assert_eq!(lines(&tree, &query), all[at + 1..], "seed {seed} {query:?}");
                }
            }
        }
    }
}

#[test]
fn a_large_directory_is_read_once_in_pages() {
    let mut tree = Tree::new();
    let directory = tree.add(1, b"d", FileKind::Directory).unwrap();
    for i in 0..20_000 {
        tree.add(directory, format!("{i:06}").as_bytes(), FileKind::Regular);
    }
    let mut walker = KeyWalker::new(&tree, InodeNo::ROOT, false);
    assert_eq!(drain(&mut walker).len(), 20_000);
    assert!(tree.page_entries.get() <= 20_001, "{} entries read", tree.page_entries.get());
    assert!(tree.pages.get() < 40, "{} pages read", tree.pages.get());
}

#[test]
fn skipping_by_delimiter_reads_little_of_large_directories() {
    let mut tree = Tree::new();
    for d in 0..50 {
        let directory = tree.add(1, format!("d{d:02}").as_bytes(), FileKind::Directory).unwrap();
        for i in 0..5_000 {
            tree.add(directory, format!("{i:06}").as_bytes(), FileKind::Regular);
        }
    }
    let query = ListQuery { delimiter: Bytes::from_static(b"/"), ..ListQuery::default() };
    assert_eq!(lines(&tree, &query).len(), 50);
    assert!(tree.page_entries.get() < 50 * 70, "{} entries read", tree.page_entries.get());
}

#[test]
fn deep_trees_keep_few_pages() {
    let mut tree = Tree::new();
    let mut directory = 1;
    for _ in 0..DEPTH_MAX {
        for i in 0..80 {
            tree.add(directory, format!("z{i:03}").as_bytes(), FileKind::Regular);
        }
        directory = tree.add(directory, b"d", FileKind::Directory).unwrap();
    }
    let mut walker = KeyWalker::new(&tree, InodeNo::ROOT, false);
    let mut count = 0;
    let mut held_max = 0;
    loop {
        match walker.step().unwrap() {
            Step::Item(_) => count += 1,
            Step::Pause => {}
            Step::End => break,
        }
        held_max = held_max.max(walker.frames.iter().map(|f| f.page.len()).sum::<usize>());
    }
    assert_eq!(count, DEPTH_MAX * 80);
    assert!(held_max <= (FRAMES_WITH_PAGES + 1) * PAGE_ENTRIES_MAX, "{held_max} entries held");
}

#[test]
fn a_loop_of_directories_is_an_error() {
    let mut tree = Tree::new();
    tree.entries.insert((1, b"d".to_vec()), (1, FileKind::Directory));
    let mut walker = KeyWalker::new(&tree, InodeNo::ROOT, false);
    let error = loop {
        match walker.step() {
            Ok(Step::Item(_) | Step::Pause) => {}
            Ok(Step::End) => panic!("a loop ended"),
            Err(error) => break error,
        }
    };
    assert_eq!(error.reason(), shardfs_proto::types::Reason::Corrupt);
}

#[test]
fn empty_directories_pause_the_walk() {
    let mut tree = Tree::new();
    for i in 0..10_000 {
        tree.add(1, format!("{i:06}").as_bytes(), FileKind::Directory);
    }
    let mut walker = KeyWalker::new(&tree, InodeNo::ROOT, false);
    assert_eq!(walker.step().unwrap(), Step::Pause);
    assert_eq!(drain(&mut walker), Vec::<Vec<u8>>::new());
}

#[test]
fn successors() {
    assert_eq!(successor(b"a"), Some(b"b".to_vec()));
    assert_eq!(successor(b"a\xff\xff"), Some(b"b".to_vec()));
    assert_eq!(successor(b"\xff"), None);
    assert_eq!(successor(b""), None);
}
