//! What one mount, or a program over gRPC, was answered is seen by every other mount and program from then on.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use futures::TryStreamExt;
use shardfs_proto::client::{Client, ListItem, ListOptions};
use shardfs_proto::types::op::{Durability, PutOptions};
use shardfs_proto::types::{Key, Reason, ShardId, ShardName};
use shardfs_tests::Cluster;
use shardfs_tests::mounted::{Mounted, mapped};
use tokio::runtime::Runtime;

/// Changes one after another, each looked at from everywhere.
const ROUNDS: u64 = 2000;
/// Changes of each writer, when all write and look at the same time.
const CHANGES: u64 = 500;
/// Few, so that they are made, replaced and removed again and again.
const NAMES: usize = 6;

/// A place from where the files of a shard are changed and looked at.
enum View {
    Mount { folder: PathBuf, open: BTreeMap<String, File> },
    Grpc(Grpc),
}

/// A program without a mount.
struct Grpc {
    runtime: Runtime,
    client: Client,
    shard: ShardId,
}

fn key(name: &str) -> Key {
    Key::new(name.to_owned()).unwrap()
}

impl Grpc {
    fn new(cluster: &Cluster, shard: &str) -> Grpc {
        let runtime = Runtime::new().unwrap();
        let (client, shard) = runtime.block_on(async {
            let client = cluster.client();
            let info = client.shard_by_name(&ShardName::new(shard).unwrap()).await.unwrap();
            (client, info.id)
        });
        Grpc { runtime, client, shard }
    }

    fn put(&self, name: &str, content: &[u8]) {
        let put = self.client.put(
            self.shard,
            key(name),
            content.to_vec().into(),
            PutOptions::default(),
            Durability::Buffered,
        );
        self.runtime.block_on(put).unwrap();
    }

    fn get(&self, name: &str) -> Option<Vec<u8>> {
        match self.runtime.block_on(self.client.get(self.shard, &key(name))) {
            Ok((meta, content)) => {
                assert_eq!(meta.attr.size, content.len() as u64, "{name}");
                Some(content.to_vec())
            }
            Err(error) if error.reason() == Reason::NotFound => None,
            Err(error) => panic!("{name}: {error}"),
        }
    }

    fn mode(&self, name: &str) -> u32 {
        self.runtime.block_on(self.client.head(self.shard, &key(name))).unwrap().attr.mode & 0o7777
    }

    fn delete(&self, name: &str) {
        self.runtime.block_on(self.client.delete(self.shard, &key(name), Durability::Buffered)).unwrap();
    }

    fn names(&self) -> Vec<String> {
        let listing = self.client.list(self.shard, ListOptions::default());
        let items: Vec<ListItem> = self.runtime.block_on(listing.try_collect()).unwrap();
        items.iter().map(|item| String::from_utf8(item.position().to_vec()).unwrap()).collect()
    }
}

/// What a file must hold, and its permission bits.
type Files = BTreeMap<String, (Vec<u8>, u32)>;

impl View {
    /// The names, and of these files sizes, bits, contents by each way to read them, are as they must be.
    fn look(&mut self, files: &Files, looked_at: &[String], what: &str) {
        match self {
            View::Grpc(grpc) => {
                assert!(grpc.names().iter().eq(files.keys()), "{what}: {:?}", grpc.names());
                for name in looked_at {
                    let must = files.get(name);
                    assert_eq!(grpc.get(name).as_ref(), must.map(|(content, _)| content), "{what}: {name}");
                    if let Some((_, mode)) = must {
                        assert_eq!(grpc.mode(name), *mode, "{what}: {name}");
                    }
                }
            }
            View::Mount { folder, open } => {
                let mut names: Vec<String> = fs::read_dir(&*folder)
                    .unwrap()
                    .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                    .collect();
                names.sort();
                assert!(names.iter().eq(files.keys()), "{what}: {names:?}");
                for name in looked_at {
                    let path = folder.join(name);
                    let Some((content, mode)) = files.get(name) else {
                        let outcome = fs::symlink_metadata(&path).map(|found| found.len());
                        assert_eq!(
                            outcome.map_err(|e| e.raw_os_error()),
                            Err(Some(libc::ENOENT)),
                            "{what}: {name}"
                        );
                        continue;
                    };
                    let found = fs::symlink_metadata(&path).unwrap_or_else(|e| panic!("{what}: {name}: {e}"));
                    assert_eq!(
                        (found.len(), found.mode() & 0o7777),
                        (content.len() as u64, *mode),
                        "{what}: {name}"
                    );
                    assert_eq!(fs::read(&path).unwrap(), *content, "{what}: {name}");
                    assert_eq!(mapped(&path), *content, "{what}: {name}, mapped");
                    // A descriptor that has read the file before, as long as it is that file.
                    if let Some(file) =
                        open.get(name).filter(|file| file.metadata().unwrap().ino() == found.ino())
                    {
                        let mut read = vec![0; content.len() + 1];
                        let length = file.read_at(&mut read, 0).unwrap();
                        assert_eq!(read[..length], *content, "{what}: {name}, open for long");
                    } else {
                        open.insert(
                            name.clone(),
                            OpenOptions::new().read(true).write(true).open(&path).unwrap(),
                        );
                    }
                }
            }
        }
    }

    /// Changes a file, or makes or removes one, and says how.
    ///
    /// `to` is what it may be renamed to.
    fn change(
        &mut self,
        round: u64,
        (name, to): (&str, &str),
        files: &mut Files,
        random: &mut fastrand::Rng,
    ) -> String {
        // Now within the record of the inode, now in chunks.
        let length = if random.bool() { random.usize(8..200) } else { random.usize(70_000..140_000) };
        let new: Vec<u8> = round.to_le_bytes().into_iter().cycle().take(length).collect();
        let there = files.contains_key(name);
        let words;
        match self {
            View::Grpc(grpc) => match random.u32(..4) {
                0 if there => {
                    words = "deleted";
                    grpc.delete(name);
                    files.remove(name);
                }
                1 if there => {
                    words = "put with its length";
                    let file = files.get_mut(name).unwrap();
                    file.0 = round.to_le_bytes().into_iter().cycle().take(file.0.len()).collect();
                    grpc.put(name, &file.0);
                }
                _ => {
                    words = "put";
                    grpc.put(name, &new);
                    let mode = files.get(name).map_or_else(|| grpc.mode(name), |file| file.1);
                    files.insert(name.to_owned(), (new, mode));
                }
            },
            View::Mount { folder, open } => {
                let path = folder.join(name);
                let bits = |path: &Path| fs::symlink_metadata(path).unwrap().mode() & 0o7777;
                match random.u32(..8) {
                    0 if there => {
                        words = "unlinked";
                        fs::remove_file(&path).unwrap();
                        files.remove(name);
                    }
                    1 if there => {
                        words = "written into, at its length";
                        let (content, _) = files.get_mut(name).unwrap();
                        let at = random.usize(..=content.len().saturating_sub(8));
                        let piece = &round.to_le_bytes()[..8.min(content.len())];
                        content[at..at + piece.len()].copy_from_slice(piece);
                        // By the descriptor of long ago if it is that file still.
                        let inode = fs::symlink_metadata(&path).unwrap().ino();
                        match open.get(name).filter(|file| file.metadata().unwrap().ino() == inode) {
                            Some(file) => file.write_all_at(piece, at as u64).unwrap(),
                            None => {
                                OpenOptions::new()
                                    .write(true)
                                    .open(&path)
                                    .unwrap()
                                    .write_all_at(piece, at as u64)
                                    .unwrap();
                            }
                        }
                    }
                    2 if there => {
                        words = "appended to";
                        let (content, _) = files.get_mut(name).unwrap();
                        let end = content.len() as u64;
                        content.extend(round.to_le_bytes());
                        OpenOptions::new()
                            .write(true)
                            .open(&path)
                            .unwrap()
                            .write_all_at(&round.to_le_bytes(), end)
                            .unwrap();
                    }
                    3 if there => {
                        words = "truncated";
                        let (content, _) = files.get_mut(name).unwrap();
                        let length = random.usize(..=2 * content.len());
                        content.resize(length, 0);
                        OpenOptions::new().write(true).open(&path).unwrap().set_len(length as u64).unwrap();
                    }
                    4 if there => {
                        words = "given other bits";
                        let mode = 0o600 | random.u32(..0o100);
                        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
                        files.get_mut(name).unwrap().1 = mode;
                    }
                    5 if there => {
                        words = "renamed";
                        fs::rename(&path, folder.join(to)).unwrap();
                        let file = files.remove(name).unwrap();
                        files.insert(to.to_owned(), file);
                    }
                    6 => {
                        words = "replaced by a rename";
                        let beside = folder.join("beside");
                        fs::write(&beside, &new).unwrap();
                        let mode = bits(&beside);
                        fs::rename(&beside, &path).unwrap();
                        files.insert(name.to_owned(), (new, mode));
                    }
                    _ => {
                        words = "written anew";
                        fs::write(&path, &new).unwrap();
                        files.insert(name.to_owned(), (new, bits(&path)));
                    }
                }
            }
        }
        format!("round {round}: {name} {words}")
    }
}

fn name_of(number: usize) -> String {
    format!("name-{number}")
}

#[test]
fn each_change_that_was_answered_is_seen_from_everywhere() {
    let cluster = Cluster::shared();
    let folder = cluster.shard("seen");
    let other = Mounted::start(cluster, "seen-from-here-too", &[]);
    let mount = |folder: PathBuf| View::Mount { folder, open: BTreeMap::new() };
    let mut views =
        [mount(folder), mount(other.point().join("seen")), View::Grpc(Grpc::new(cluster, "seen"))];
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    let mut files = Files::new();
    for round in 1..=ROUNDS {
        let by = random.usize(..views.len());
        let [name, to] = [(); 2].map(|()| name_of(random.usize(..NAMES)));
        let what = views[by].change(round, (&name, &to), &mut files, &mut random);
        let what = format!("{what} by {by}");
        let looked_at = if round % 20 == 0 { (0..NAMES).map(name_of).collect() } else { vec![name, to] };
        views.iter_mut().for_each(|view| view.look(&files, &looked_at, &what));
    }
    drop((views, other));
    cluster.assert_clean("seen");
}

/// How far a writer is: numbers only grow, and a file holds the last one, or one that is on its way.
#[derive(Default)]
struct Progress {
    begun: AtomicU64,
    answered: AtomicU64,
    failed: AtomicBool,
}

/// Lets go of those who look on if the writer panics.
struct Ending<'a>(&'a AtomicBool);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.store(std::thread::panicking(), Ordering::SeqCst);
    }
}

impl Progress {
    fn write(&self, mut change: impl FnMut(u64)) {
        let _ending = Ending(&self.failed);
        for number in 1..=CHANGES {
            self.begun.store(number, Ordering::SeqCst);
            change(number);
            self.answered.store(number, Ordering::SeqCst);
        }
    }

    /// Looks until the writer has ended.
    fn watch(&self, what: &str, mut look: impl FnMut() -> u64) -> u64 {
        let mut looks = 0;
        loop {
            let answered = self.answered.load(Ordering::SeqCst);
            let seen = look();
            let begun = self.begun.load(Ordering::SeqCst);
            assert!(
                (answered..=begun).contains(&seen),
                "{what}: {seen} is seen, {answered} was answered, {begun} begun"
            );
            assert!(!self.failed.load(Ordering::SeqCst), "{what}: its writer has failed");
            looks += 1;
            if answered == CHANGES {
                return looks;
            }
        }
    }
}

fn first_number(page: &[u8]) -> u64 {
    u64::from_le_bytes(page[..8].try_into().unwrap())
}

/// A page that bears one number all over. Where another mount writes, what is read is never a mixture of two; on the same
/// mount it may be, as on any file system that reads from the page cache.
fn whole_number(page: &[u8]) -> u64 {
    assert!(page.chunks(8).all(|piece| piece == &page[..8]), "torn, from {}", first_number(page));
    first_number(page)
}

fn page_of(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(512)
}

#[test]
fn no_reader_sees_less_than_was_answered() {
    let cluster = Cluster::shared();
    let here = cluster.shard("numbers");
    let other = Mounted::start(cluster, "numbers-from-here-too", &[]);
    let there = other.point().join("numbers");
    for name in ["in-place", "kept-open", "renamed", "put"] {
        fs::write(here.join(name), page_of(0)).unwrap();
    }
    fs::write(here.join("appended"), "").unwrap();
    let [in_place, kept_open, renamed, put, appended, named] = &[(); 6].map(|()| Progress::default());
    let pages = [("in-place", in_place), ("renamed", renamed), ("put", put)];
    std::thread::scope(|scope| {
        let mut readers = Vec::new();
        for (folder, in_this) in [(&here, first_number as fn(&[u8]) -> u64), (&there, whole_number)] {
            for (name, progress) in pages {
                let look = move || in_this(&fs::read(folder.join(name)).unwrap());
                readers.push((name, scope.spawn(move || progress.watch(name, look))));
            }
            let size = move || fs::metadata(folder.join("appended")).unwrap().len() / 8;
            readers.push(("appended", scope.spawn(move || appended.watch("appended", size))));
            let listed = move || {
                let names = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name());
                let number = |name: OsString| name.to_str()?.strip_prefix("named-")?.parse().ok();
                names.filter_map(number).max().unwrap_or(0)
            };
            readers.push(("named", scope.spawn(move || named.watch("named", listed))));
        }
        // Of readers on one mount who have a file open while others change it, each may see what another of them has just
        // seen, and no more (SEMANTICS.md): here is one only.
        let open = File::open(there.join("kept-open")).unwrap();
        let look = move || {
            let mut page = page_of(0);
            open.read_exact_at(&mut page, 0).unwrap();
            whole_number(&page)
        };
        readers.push(("kept-open", scope.spawn(move || kept_open.watch("kept-open", look))));
        for (name, progress) in pages.into_iter().chain([("kept-open", kept_open)]) {
            let grpc = Grpc::new(cluster, "numbers");
            let look = move || whole_number(&grpc.get(name).unwrap());
            readers.push((name, scope.spawn(move || progress.watch(name, look))));
        }
        for (name, progress) in [("in-place", in_place), ("kept-open", kept_open)] {
            let file = OpenOptions::new().write(true).open(here.join(name)).unwrap();
            let change = move |number| file.write_all_at(&page_of(number), 0).unwrap();
            scope.spawn(move || progress.write(change));
        }
        scope.spawn(|| {
            renamed.write(|number| {
                fs::write(there.join("beside"), page_of(number)).unwrap();
                fs::rename(there.join("beside"), there.join("renamed")).unwrap();
            });
        });
        scope.spawn(|| {
            let grpc = Grpc::new(cluster, "numbers");
            put.write(|number| grpc.put("put", &page_of(number)));
        });
        scope.spawn(|| {
            let file = OpenOptions::new().append(true).open(there.join("appended")).unwrap();
            appended.write(|number| assert_eq!(rustix::io::write(&file, &number.to_le_bytes()).unwrap(), 8));
        });
        scope.spawn(|| named.write(|number| fs::write(here.join(format!("named-{number}")), "").unwrap()));
        for (name, reader) in readers {
            println!("{name}: {} looks", reader.join().unwrap());
        }
    });
    drop(other);
    cluster.assert_clean("numbers");
}
