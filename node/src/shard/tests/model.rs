//! A filesystem in a few maps: what the operations mean, said again and plainly.

use std::collections::{BTreeMap, BTreeSet};

use shardfs_proto::types::limits::LINKS_MAX;
use shardfs_proto::types::{FileKind, Reason};

type Outcome<T> = Result<T, Reason>;

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Node {
    pub kind: FileKind,
    pub mode: u32,
    pub nlink: u32,
    pub data: Vec<u8>,
    pub target: Vec<u8>,
    pub entries: BTreeMap<String, u64>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub auto: bool,
}

/// See the module. Nodes have the numbers that the shard gave them.
#[derive(Clone)]
pub struct Model {
    pub nodes: BTreeMap<u64, Node>,
}

fn node(kind: FileKind, mode: u32) -> Node {
    Node {
        kind,
        mode,
        nlink: if kind == FileKind::Directory { 2 } else { 1 },
        data: Vec::new(),
        target: Vec::new(),
        entries: BTreeMap::new(),
        xattrs: BTreeMap::new(),
        auto: false,
    }
}

impl Model {
    pub fn new() -> Model {
        Model { nodes: [(1, node(FileKind::Directory, 0o755))].into() }
    }

    fn directory(&self, ino: u64) -> Outcome<&Node> {
        let found = self.nodes.get(&ino).ok_or(Reason::NotFound)?;
        if found.kind == FileKind::Directory { Ok(found) } else { Err(Reason::NotDirectory) }
    }

    fn child(&self, parent: u64, name: &str) -> Outcome<Option<u64>> {
        Ok(self.directory(parent)?.entries.get(name).copied())
    }

    fn at(&mut self, ino: u64) -> &mut Node {
        self.nodes.get_mut(&ino).unwrap()
    }

    /// May `make` be called: the name is free.
    pub fn free_name(&self, parent: u64, name: &str) -> Outcome<()> {
        let there = self.child(parent, name)?;
        if parent == 1 && (name == ".snap" || name == ".index") {
            return Err(Reason::NotPermitted);
        }
        if there.is_some() { Err(Reason::AlreadyExists) } else { Ok(()) }
    }

    /// Enters what the shard has made as `ino`.
    pub fn make(&mut self, parent: u64, name: &str, ino: u64, kind: FileKind, mode: u32) -> &mut Node {
        self.at(parent).entries.insert(name.to_owned(), ino);
        if kind == FileKind::Directory {
            self.at(parent).nlink += 1;
        }
        self.nodes.insert(ino, node(kind, mode));
        self.at(ino)
    }

    pub fn link(&mut self, ino: u64, parent: u64, name: &str) -> Outcome<()> {
        let found = self.nodes.get(&ino).ok_or(Reason::NotFound)?;
        if found.kind == FileKind::Directory {
            return Err(Reason::NotPermitted);
        }
        let nlink = found.nlink;
        self.free_name(parent, name)?;
        assert!(nlink < LINKS_MAX);
        self.at(ino).nlink += 1;
        self.at(parent).entries.insert(name.to_owned(), ino);
        Ok(())
    }

    fn drop_name(&mut self, parent: u64, name: &str) {
        let ino = self.at(parent).entries.remove(name).unwrap();
        if self.nodes[&ino].kind == FileKind::Directory {
            self.at(parent).nlink -= 1;
            self.nodes.remove(&ino);
            return;
        }
        self.at(ino).nlink -= 1;
        if self.nodes[&ino].nlink == 0 {
            self.nodes.remove(&ino);
        }
    }

    pub fn unlink(&mut self, parent: u64, name: &str) -> Outcome<()> {
        let ino = self.child(parent, name)?.ok_or(Reason::NotFound)?;
        if self.nodes[&ino].kind == FileKind::Directory {
            return Err(Reason::IsDirectory);
        }
        self.drop_name(parent, name);
        Ok(())
    }

    pub fn rmdir(&mut self, parent: u64, name: &str) -> Outcome<()> {
        let ino = self.child(parent, name)?.ok_or(Reason::NotFound)?;
        if self.nodes[&ino].kind != FileKind::Directory {
            return Err(Reason::NotDirectory);
        }
        if !self.nodes[&ino].entries.is_empty() {
            return Err(Reason::NotEmpty);
        }
        self.drop_name(parent, name);
        Ok(())
    }

    /// Everything in and below a directory.
    fn below(&self, top: u64) -> BTreeSet<u64> {
        let mut all = BTreeSet::from([top]);
        for child in self.nodes[&top].entries.values() {
            all.extend(self.below(*child));
        }
        all
    }

    pub fn rename(
        &mut self,
        (parent, name): (u64, &str),
        (new_parent, new_name): (u64, &str),
        no_replace: bool,
        exchange: bool,
    ) -> Outcome<()> {
        if no_replace && exchange {
            return Err(Reason::InvalidArgument);
        }
        self.directory(parent)?;
        self.directory(new_parent)?;
        let source = self.child(parent, name)?.ok_or(Reason::NotFound)?;
        let target = self.child(new_parent, new_name)?;
        if new_parent == 1 && (new_name == ".snap" || new_name == ".index") {
            return Err(Reason::NotPermitted);
        }
        if no_replace && target.is_some() {
            return Err(Reason::AlreadyExists);
        }
        let is_dir = |ino: u64| self.nodes[&ino].kind == FileKind::Directory;
        if is_dir(source) && self.below(source).contains(&new_parent) {
            return Err(Reason::InvalidArgument);
        }
        let Some(target) = target else {
            if exchange {
                return Err(Reason::NotFound);
            }
            self.carry(source, parent, name, new_parent, new_name);
            return Ok(());
        };
        if target == source {
            return Ok(());
        }
        if exchange {
            if is_dir(target) && self.below(target).contains(&parent) {
                return Err(Reason::InvalidArgument);
            }
            self.carry(source, parent, name, new_parent, new_name);
            self.at(parent).entries.insert(name.to_owned(), target);
            if self.nodes[&target].kind == FileKind::Directory {
                self.at(parent).nlink += 1;
                self.at(new_parent).nlink -= 1;
            }
            return Ok(());
        }
        match (is_dir(source), is_dir(target)) {
            (true, false) => return Err(Reason::NotDirectory),
            (false, true) => return Err(Reason::IsDirectory),
            (true, true) if !self.nodes[&target].entries.is_empty() => return Err(Reason::NotEmpty),
            _ => {}
        }
        self.drop_name(new_parent, new_name);
        self.carry(source, parent, name, new_parent, new_name);
        Ok(())
    }

    fn carry(&mut self, ino: u64, parent: u64, name: &str, new_parent: u64, new_name: &str) {
        self.at(parent).entries.remove(name);
        self.at(new_parent).entries.insert(new_name.to_owned(), ino);
        if self.nodes[&ino].kind == FileKind::Directory {
            self.at(parent).nlink -= 1;
            self.at(new_parent).nlink += 1;
        }
    }

    pub fn regular(&mut self, ino: u64) -> Outcome<&mut Node> {
        let found = self.nodes.get_mut(&ino).ok_or(Reason::NotFound)?;
        match found.kind {
            FileKind::Regular => Ok(found),
            FileKind::Directory => Err(Reason::IsDirectory),
            _ => Err(Reason::WrongKind),
        }
    }

    pub fn write(&mut self, ino: u64, offset: usize, data: &[u8]) -> Outcome<()> {
        let file = &mut self.regular(ino)?.data;
        if !data.is_empty() {
            file.resize(file.len().max(offset + data.len()), 0);
            file[offset..offset + data.len()].copy_from_slice(data);
        }
        Ok(())
    }

    /// How many bytes it copies.
    pub fn copy(&mut self, from: (u64, usize), to: (u64, usize), length: usize) -> Outcome<usize> {
        let source = self.regular(from.0)?.data.clone();
        self.regular(to.0)?;
        let length = length.min(source.len().saturating_sub(from.1));
        if length == 0 {
            return Ok(0);
        }
        if from.0 == to.0 && from.1.abs_diff(to.1) < length {
            return Err(Reason::InvalidArgument);
        }
        self.write(to.0, to.1, &source[from.1..from.1 + length])?;
        Ok(length)
    }

    pub fn put(&mut self, path: &[&str], data: &[u8], mut made: impl Iterator<Item = u64>) -> Outcome<()> {
        let (name, directories) = path.split_last().unwrap();
        let mut at = 1;
        let before = self.clone();
        for directory in directories {
            match self.child(at, directory)? {
                Some(next) if self.nodes[&next].kind != FileKind::Directory => {
                    *self = before;
                    return Err(Reason::NotDirectory);
                }
                Some(next) => at = next,
                None => {
                    let ino = made.next().unwrap();
                    self.make(at, directory, ino, FileKind::Directory, 0o755).auto = true;
                    at = ino;
                }
            }
        }
        let ino = match self.child(at, name)? {
            Some(ino) => {
                if self.nodes[&ino].kind != FileKind::Regular {
                    let directory = self.nodes[&ino].kind == FileKind::Directory;
                    *self = before;
                    return Err(if directory { Reason::IsDirectory } else { Reason::WrongKind });
                }
                ino
            }
            None => {
                let ino = made.next().unwrap();
                self.make(at, name, ino, FileKind::Regular, 0o644);
                ino
            }
        };
        self.at(ino).data = data.to_vec();
        Ok(())
    }

    /// How many directories a put of this path would make, and whether it would make the file.
    pub fn delete(&mut self, path: &[&str]) -> Outcome<u32> {
        let (name, directories) = path.split_last().unwrap();
        let mut walk = vec![1];
        for directory in directories {
            let next = self.child(*walk.last().unwrap(), directory)?.ok_or(Reason::NotFound)?;
            if self.nodes[&next].kind != FileKind::Directory {
                return Err(Reason::NotDirectory);
            }
            walk.push(next);
        }
        let parent = *walk.last().unwrap();
        let ino = self.child(parent, name)?.ok_or(Reason::NotFound)?;
        match self.nodes[&ino].kind {
            FileKind::Regular => {}
            FileKind::Directory => return Err(Reason::IsDirectory),
            _ => return Err(Reason::WrongKind),
        }
        self.drop_name(parent, name);
        let mut pruned = 0;
        while walk.len() > 1 {
            let at = walk.pop().unwrap();
            if !self.nodes[&at].auto || !self.nodes[&at].entries.is_empty() {
                break;
            }
            self.drop_name(*walk.last().unwrap(), directories[walk.len() - 1]);
            pruned += 1;
        }
        Ok(pruned)
    }
}
