//! Random operations on the shard and on the model: the same answers, the same tree, a clean fsck, also
//! after the shard was closed and opened.

use std::collections::BTreeMap;

use bytes::Bytes;
use shardfs_proto::types::op::{AllocateMode, NewInode, OpResult, Operation, SetAttr};
use shardfs_proto::types::{Cookie, FileKind, InodeNo, Reason, Result};

use super::harness::*;
use super::model::Model;
use crate::shard::read;

const NAMES: [&str; 6] = ["a", "b", "c", "d", "e", ".snap"];
const CHUNK: u32 = 4096;
const FILE_MAX: usize = 40_000;

fn ino(n: u64) -> InodeNo {
    InodeNo::new(n).unwrap()
}

struct Run {
    rng: fastrand::Rng,
    world: World,
    model: Model,
    what: String,
}

impl Run {
    fn name(&mut self) -> &'static str {
        self.rng.choice(NAMES).unwrap()
    }

    /// Mostly one that fits.
    fn pick(&mut self, kind: Option<FileKind>) -> u64 {
        let all: Vec<u64> = self
            .model
            .nodes
            .iter()
            .filter(|(_, n)| kind.is_none_or(|kind| n.kind == kind))
            .map(|(ino, _)| *ino)
            .collect();
        if all.is_empty() || self.rng.u8(..20) == 0 {
            self.rng.u64(1..200)
        } else {
            *self.rng.choice(&all).unwrap()
        }
    }

    fn data(&mut self) -> Vec<u8> {
        let max = *self.rng.choice(&[10, 100, 5000, 20_000]).unwrap();
        let length = self.rng.usize(..max);
        let byte = self.rng.u8(1..);
        (0..length).map(|i| byte.wrapping_add(i as u8)).collect()
    }

    fn same<T: std::fmt::Debug>(&self, got: &Result<OpResult>, want: std::result::Result<T, Reason>) {
        match (got, &want) {
            (Ok(_), Ok(_)) => {}
            (Err(e), Err(reason)) if e.reason() == *reason => {}
            _ => panic!("{}: got {got:?}, the model says {want:?}", self.what),
        }
    }

    async fn run(&mut self, operation: Operation) -> Result<OpResult> {
        self.what = format!("{} -> {operation:?}", self.what);
        self.world.run(operation).await
    }

    async fn step(&mut self) {
        let new = NewInode { mode: 0o640, uid: 1, gid: 2, unmasked_mode: None };
        let dir = self.pick(Some(FileKind::Directory));
        let name_str = self.name();
        let parent = ino(dir);
        match self.rng.u8(..20) {
            0..=2 => {
                let kind = *self.rng.choice(&[FileKind::Regular, FileKind::Regular, FileKind::Fifo]).unwrap();
                let (existing_ok, open) = (self.rng.bool(), false);
                let got = self
                    .run(Operation::Create {
                        parent,
                        name: name(name_str),
                        kind,
                        inode: new,
                        rdev: 0,
                        existing_ok,
                        open,
                    })
                    .await;
                let mut want = self.model.free_name(dir, name_str);
                if want == Err(Reason::AlreadyExists) && existing_ok {
                    let there = self.model.nodes[&dir].entries[name_str];
                    if self.model.nodes[&there].kind == FileKind::Regular {
                        want = Ok(());
                        let got = got.as_ref().unwrap();
                        assert!(!got.created, "{}", self.what);
                        assert_eq!(got.attr.as_ref().unwrap().inode.get(), there, "{}", self.what);
                    }
                } else if want.is_ok() {
                    let made = got.as_ref().expect("made").attr.as_ref().unwrap().inode.get();
                    self.model.make(dir, name_str, made, kind, 0o640);
                }
                self.same(&got, want);
            }
            3 | 4 => {
                let got =
                    self.run(Operation::MakeDirectory { parent, name: name(name_str), inode: new }).await;
                let want = self.model.free_name(dir, name_str);
                self.same(&got, want);
                if let Ok(got) = got {
                    let made = got.attr.unwrap().inode.get();
                    self.model.make(dir, name_str, made, FileKind::Directory, 0o640);
                }
            }
            5 => {
                let target = Bytes::from_static(b"some/where");
                let got = self
                    .run(Operation::MakeSymlink { parent, name: name(name_str), target, inode: new })
                    .await;
                let want = self.model.free_name(dir, name_str);
                self.same(&got, want);
                if let Ok(got) = got {
                    let made = got.attr.unwrap().inode.get();
                    self.model.make(dir, name_str, made, FileKind::Symlink, 0o777).target =
                        b"some/where".to_vec();
                }
            }
            6 => {
                let inode = self.pick(None);
                let got = self
                    .run(Operation::Link { inode: ino(inode), new_parent: parent, new_name: name(name_str) })
                    .await;
                let want = self.model.link(inode, dir, name_str);
                self.same(&got, want);
            }
            7 => {
                let got = self.run(unlink(parent, name_str)).await;
                let want = self.model.unlink(dir, name_str);
                self.same(&got, want);
            }
            8 => {
                let got = self.run(Operation::RemoveDirectory { parent, name: name(name_str) }).await;
                let want = self.model.rmdir(dir, name_str);
                self.same(&got, want);
            }
            9 | 10 => {
                let to = self.pick(Some(FileKind::Directory));
                let new_name = self.name();
                let (no_replace, exchange) = (self.rng.u8(..4) == 0, self.rng.u8(..4) == 0);
                let got = self
                    .run(Operation::Rename {
                        parent,
                        name: name(name_str),
                        new_parent: ino(to),
                        new_name: name(new_name),
                        no_replace,
                        exchange,
                    })
                    .await;
                let want = self.model.rename((dir, name_str), (to, new_name), no_replace, exchange);
                self.same(&got, want);
            }
            11 | 12 => {
                let file = self.pick(Some(FileKind::Regular));
                let data = self.data();
                let offset = self.rng.usize(..FILE_MAX - data.len());
                let got = self.run(write(ino(file), offset as u64, &data)).await;
                let want = self.model.write(file, offset, &data);
                self.same(&got, want);
            }
            13 => {
                let file = self.pick(Some(FileKind::Regular));
                let data = self.data();
                let got = self
                    .run(Operation::Write {
                        inode: ino(file),
                        offset: 5,
                        data: data.clone().into(),
                        append: true,
                        kill_set_id: false,
                    })
                    .await;
                let at = self.model.nodes.get(&file).map_or(0, |n| n.data.len());
                let want = self.model.write(file, at, &data);
                if let (Ok(got), Ok(())) = (&got, &want) {
                    assert_eq!(got.offset, at as u64, "{}", self.what);
                }
                self.same(&got, want);
            }
            14 => {
                let file = self.pick(Some(FileKind::Regular));
                let size = *self.rng.choice(&[0, 1, 4095, 4096, 4097, 8192, 20_000, 39_999]).unwrap();
                let set = SetAttr { size: Some(size), mode: Some(0o600), ..SetAttr::default() };
                let got = self.run(Operation::SetAttr { inode: ino(file), set }).await;
                let want = self.model.regular(file).map(|n| {
                    n.data.resize(size as usize, 0);
                    n.mode = 0o600;
                });
                let want = want.map_err(|r| if r == Reason::WrongKind { Reason::InvalidArgument } else { r });
                self.same(&got, want);
            }
            15 => {
                let file = self.pick(Some(FileKind::Regular));
                let (offset, length) = (self.rng.usize(..FILE_MAX / 2), self.rng.usize(1..FILE_MAX / 2));
                let keep_size = self.rng.bool();
                let mode = *self
                    .rng
                    .choice(&[
                        AllocateMode::PunchHole,
                        AllocateMode::ZeroRange { keep_size },
                        AllocateMode::Allocate { keep_size },
                    ])
                    .unwrap();
                let got = self
                    .run(Operation::Allocate {
                        inode: ino(file),
                        offset: offset as u64,
                        length: length as u64,
                        mode,
                        kill_set_id: false,
                    })
                    .await;
                let want = self.model.regular(file).map(|n| {
                    if !matches!(mode, AllocateMode::Allocate { .. }) {
                        let end = n.data.len().min(offset + length);
                        if offset < end {
                            n.data[offset..end].fill(0);
                        }
                    }
                    if !keep_size && mode != AllocateMode::PunchHole {
                        n.data.resize(n.data.len().max(offset + length), 0);
                    }
                });
                self.same(&got, want);
            }
            16 => {
                let path = self.path();
                let data = self.data();
                let parts: Vec<&str> = path.split('/').collect();
                let reserved = parts[0] == ".snap";
                let next = self.world.shard().usage();
                let _ = next;
                let got = self.run(put(&path, &data)).await;
                let want = if reserved { Err(Reason::NotPermitted) } else { self.put(&parts, &data).await };
                self.same(&got, want);
            }
            17 | 18 => {
                let (from, to) = (self.pick(Some(FileKind::Regular)), self.pick(Some(FileKind::Regular)));
                let (at, offset) = (self.rng.usize(..FILE_MAX / 2), self.rng.usize(..FILE_MAX / 2));
                let length = self.rng.usize(..FILE_MAX / 2);
                let got = self
                    .run(Operation::CopyRange {
                        source: ino(from),
                        source_offset: at as u64,
                        destination: ino(to),
                        destination_offset: offset as u64,
                        length: length as u64,
                        kill_set_id: false,
                    })
                    .await;
                let want = self.model.copy((from, at), (to, offset), length);
                if let (Ok(got), Ok(copied)) = (&got, &want) {
                    assert_eq!(got.length, *copied as u64, "{}", self.what);
                }
                self.same(&got, want);
            }
            _ => {
                let path = self.path();
                let parts: Vec<&str> = path.split('/').collect();
                let got = self.run(Operation::DeleteValue { key: key(&path), if_version: None }).await;
                let want = self.model.delete(&parts);
                if let (Ok(got), Ok(pruned)) = (&got, &want) {
                    assert_eq!(got.pruned_directories, *pruned, "{}", self.what);
                }
                self.same(&got, want);
            }
        }
    }

    fn path(&mut self) -> String {
        let depth = self.rng.usize(1..4);
        let parts: Vec<&str> = (0..depth).map(|_| self.name()).collect();
        parts.join("/")
    }

    /// The model learns the numbers of what the put made from the shard.
    async fn put(&mut self, parts: &[&str], data: &[u8]) -> std::result::Result<(), Reason> {
        let view = self.world.view().await;
        let mut numbers = Vec::new();
        let mut at = InodeNo::ROOT;
        for part in parts {
            let Ok(attr) = read::lookup(&view, at, part.as_bytes()) else { break };
            at = attr.inode;
            if !self.model.nodes.contains_key(&at.get()) {
                numbers.push(at.get());
            }
        }
        self.model.put(parts, data, numbers.into_iter())
    }

    /// The whole tree is the model's.
    async fn compare(&self, seed: u64) {
        let view = self.world.view().await;
        let when = format!("seed {seed}: {}", self.what);
        assert_eq!(self.world.shard().usage().inodes, self.model.nodes.len() as u64, "{when}");
        for (number, node) in &self.model.nodes {
            let attr =
                read::get_attr(&view, ino(*number)).unwrap_or_else(|e| panic!("{when}: inode {number}: {e}"));
            assert_eq!(
                (attr.kind, attr.mode, attr.nlink),
                (node.kind, node.mode, node.nlink),
                "{when}: {number}"
            );
            match node.kind {
                FileKind::Regular => {
                    assert_eq!(attr.size, node.data.len() as u64, "{when}: {number}");
                    let data = read::read(&view, ino(*number), 0, attr.size as u32).unwrap();
                    assert!(data[..] == node.data[..], "{when}: content of {number} differs");
                    let mut at = 0;
                    for (from, to) in extents(&view, ino(*number)) {
                        let hole = &node.data[at as usize..from as usize];
                        assert!(hole.iter().all(|byte| *byte == 0), "{when}: no hole of {number} at {at}");
                        let ends = [from, to].map(|end| end.is_multiple_of(4096) || end == attr.size);
                        assert_eq!(ends, [true, true], "{when}: {number}: {from} to {to}");
                        at = to;
                    }
                    let hole = &node.data[at as usize..];
                    assert!(hole.iter().all(|byte| *byte == 0), "{when}: no hole of {number} at {at}");
                }
                FileKind::Directory => {
                    let page = read::read_directory(&view, ino(*number), Cookie::new(0), 100, false).unwrap();
                    let entries: BTreeMap<String, u64> = page
                        .entries
                        .iter()
                        .map(|e| (String::from_utf8(e.name.to_vec()).unwrap(), e.inode.get()))
                        .collect();
                    assert_eq!(entries, node.entries, "{when}: {number}");
                }
                FileKind::Symlink => {
                    assert_eq!(read::read_link(&view, ino(*number)).unwrap(), node.target, "{when}")
                }
                _ => {}
            }
        }
        self.world.check(&when).await;
    }
}

async fn run(world: World, seed: u64, steps: usize) {
    let rng = fastrand::Rng::with_seed(seed);
    let mut run = Run { rng, world, model: Model::new(), what: String::new() };
    for step in 0..steps {
        run.what = format!("seed {seed} step {step}");
        run.step().await;
        if step % 50 == 49 {
            run.compare(seed).await;
        }
        if step % 200 == 199 {
            run.world.reopen();
            run.compare(seed).await;
        }
    }
    run.compare(seed).await;
}

fn seeds(count: usize) -> Vec<u64> {
    match std::env::var("SHARDFS_TEST_SEED").ok().and_then(|s| s.parse().ok()) {
        Some(seed) => vec![seed],
        None => (0..count).map(|_| fastrand::u64(..)).collect(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_on_memory_match_the_model() {
    for seed in seeds(20) {
        run(World::mem(None, CHUNK), seed, 1000).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_operations_on_rocksdb_match_the_model() {
    for seed in seeds(3) {
        run(World::rocks(None, CHUNK), seed, 800).await;
    }
}

/// Many callers at once, so that groups form: the sum of what succeeded is there, and nothing else.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn groups_keep_what_succeeded_and_nothing_of_what_failed() {
    for world in World::both(None, CHUNK) {
        let directory = world.mkdir(InodeNo::ROOT, "d").await.inode;
        let shard = world.shard();
        let tasks: Vec<_> = (0..400u32)
            .map(|i| {
                let shard = std::sync::Arc::clone(&shard);
                tokio::spawn(async move {
                    // Every name is tried four times: once it succeeds, and a rename onto itself fails with it.
                    let operation = create(directory, &format!("f{}", i / 4));
                    let mutation = crate::shard::Mutation {
                        session: None,
                        sequence: None,
                        durability: shardfs_proto::types::op::Durability::Sync,
                        operation,
                    };
                    shard.mutate(mutation).await
                })
            })
            .collect();
        let mut made = 0;
        for task in tasks {
            match task.await.unwrap() {
                Ok(_) => made += 1,
                Err(e) => assert_eq!(e.reason(), Reason::AlreadyExists),
            }
        }
        drop(shard);
        assert_eq!(made, 100);
        assert_eq!(world.shard().usage().inodes, 102);
        world.check("after groups").await;
    }
}
