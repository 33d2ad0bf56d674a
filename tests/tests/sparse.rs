//! Sparse files, fallocate, copies by the server and exact limits on a real mount, next to ext4 with the same calls.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use shardfs_tests::cluster::eventually;
use shardfs_tests::{Cluster, Shell, sh};

const MIB: u64 = 1 << 20;
const TIB: u64 = 1 << 40;
const CHUNK: u64 = 64 << 10;
const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;

/// A folder of an ext4 of this program's own; the cluster's guard removes it.
fn ext4(name: &str) -> PathBuf {
    static MOUNTED: OnceLock<PathBuf> = OnceLock::new();
    let root = MOUNTED.get_or_init(|| {
        let root = Cluster::shared().root();
        sh(root, "truncate -s 1G ext4.img && mkfs.ext4 -q -F ext4.img && mkdir ext4 && mount -o loop ext4.img ext4");
        root.join("ext4")
    });
    let path = root.join(name);
    fs::create_dir(&path).unwrap();
    path
}

fn shard(name: &str) -> PathBuf {
    Cluster::shared().shard(name)
}

fn made(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).create_new(true).open(path).unwrap()
}

fn outcome(code: i64) -> Result<u64, i32> {
    u64::try_from(code).map_err(|_| std::io::Error::last_os_error().raw_os_error().unwrap())
}

fn seek(file: &File, offset: u64, whence: i32) -> Result<u64, i32> {
    // SAFETY: a plain call on a descriptor that is open.
    outcome(unsafe { libc::lseek(file.as_raw_fd(), offset.cast_signed(), whence) })
}

fn fallocate(file: &File, mode: i32, offset: u64, length: u64) -> Result<u64, i32> {
    let (offset, length) = (offset.cast_signed(), length.cast_signed());
    // SAFETY: a plain call on a descriptor that is open.
    outcome(unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) }.into())
}

/// One call.
fn copy(from: (&File, u64), to: (&File, u64), length: u64) -> Result<u64, i32> {
    let (mut source, mut destination) = (from.1.cast_signed(), to.1.cast_signed());
    let (a, b) = (from.0.as_raw_fd(), to.0.as_raw_fd());
    // SAFETY: the offsets are live variables, the descriptors open.
    let code =
        unsafe { libc::copy_file_range(a, &raw mut source, b, &raw mut destination, length as usize, 0) };
    outcome(code as i64)
}

/// As many as it takes.
fn copy_all(from: (&File, u64), to: (&File, u64), length: u64) {
    let mut copied = 0;
    while copied < length {
        let more = copy((from.0, from.1 + copied), (to.0, to.1 + copied), length - copied).unwrap();
        assert!(more > 0, "{copied} of {length}");
        copied += more;
    }
}

/// Where a file has data.
fn extents(file: &File) -> Vec<(u64, u64)> {
    let mut extents = Vec::new();
    let mut at = 0;
    loop {
        match seek(file, at, libc::SEEK_DATA) {
            Ok(from) => {
                at = seek(file, from, libc::SEEK_HOLE).unwrap();
                assert!(at > from);
                extents.push((from, at));
            }
            Err(error) => {
                assert_eq!(error, libc::ENXIO);
                return extents;
            }
        }
    }
}

fn blocks(file: &File) -> u64 {
    file.metadata().unwrap().blocks()
}

fn read(file: &File, offset: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    file.read_exact_at(&mut bytes, offset).unwrap();
    bytes
}

fn requests(op: &str) -> u64 {
    let cluster = Cluster::shared();
    let http = cluster.http_address("mount");
    let metrics = sh(cluster.root(), &format!("curl -sf http://{http}/metrics"));
    let line = format!("shardfsd_requests_total{{op=\"{op}\",outcome=\"ok\"}} ");
    metrics.lines().find_map(|l| l.strip_prefix(&line)).map_or(0, |count| count.parse().unwrap())
}

#[test]
fn data_and_holes_are_those_of_ext4() {
    const SPAN: u64 = 2 * MIB;
    let (ours, theirs) = (made(&shard("random").join("f")), made(&ext4("random").join("f")));
    let seed = fastrand::u64(..);
    println!("seed {seed}");
    let mut random = fastrand::Rng::with_seed(seed);
    for step in 0..400 {
        let page = random.u64(..SPAN / 4096) * 4096;
        match random.u8(..8) {
            0..=3 => {
                let most = *random.choice(&[10, 4096, 20_000, 200_000]).unwrap();
                let (at, bytes) = (page + random.u64(..4096), vec![random.u8(1..); random.usize(1..=most)]);
                ours.write_all_at(&bytes, at).unwrap();
                theirs.write_all_at(&bytes, at).unwrap();
            }
            4 | 5 => {
                let pages = SPAN / 4096 / *random.choice(&[1, 8, 128]).unwrap();
                let length = random.u64(1..=pages) * 4096;
                fallocate(&ours, PUNCH, page, length).unwrap();
                fallocate(&theirs, PUNCH, page, length).unwrap();
            }
            6 => {
                ours.set_len(page).unwrap();
                theirs.set_len(page).unwrap();
            }
            _ => {
                // Else it is nearly always as long as it gets.
                let size = page / random.u64(1..20);
                let size = size - size % 4096;
                ours.set_len(size).unwrap();
                theirs.set_len(size).unwrap();
            }
        }
        if step % 4 == 3 {
            theirs.sync_all().unwrap();
            let found = extents(&ours);
            assert_eq!(found, extents(&theirs), "seed {seed} step {step}");
            let meta = ours.metadata().unwrap();
            assert_eq!(meta.len(), theirs.metadata().unwrap().len(), "seed {seed} step {step}");
            let data: u64 = found.iter().map(|(from, to)| to - from).sum();
            let chunks: BTreeSet<u64> =
                found.iter().flat_map(|(from, to)| from / CHUNK..=(to - 1) / CHUNK).collect();
            let most = chunks.len() as u64 * CHUNK;
            let used = meta.blocks() * 512;
            // A file of a page or less lies in its record, as long as it is.
            let fits = used <= most || meta.len() <= 4096;
            assert!(used >= data && fits, "seed {seed} step {step}: {used} for {found:?}");
        }
    }
    let size = ours.metadata().unwrap().len() as usize;
    assert!(read(&ours, 0, size) == read(&theirs, 0, size), "seed {seed}");
    drop((ours, theirs));
    Cluster::shared().assert_clean("random");
}

#[test]
fn fallocate_is_that_of_ext4() {
    let folders = [shard("fallocate"), ext4("fallocate")];
    let [ours, theirs] = folders.map(|folder| {
        let file = made(&folder.join("f"));
        let size = |file: &File| file.metadata().unwrap().len();
        fallocate(&file, 0, 0, MIB).unwrap();
        assert_eq!((size(&file), extents(&file)), (MIB, vec![]));
        assert!(blocks(&file) >= 2048);
        fallocate(&file, libc::FALLOC_FL_KEEP_SIZE, MIB, MIB).unwrap();
        assert_eq!(size(&file), MIB);
        fallocate(&file, 0, 3 * MIB, MIB).unwrap();
        assert_eq!(size(&file), 4 * MIB);
        file.write_all_at(&vec![7; MIB as usize], 0).unwrap();
        let full = blocks(&file);
        fallocate(&file, libc::FALLOC_FL_ZERO_RANGE, 1000, 500_000).unwrap();
        // ext4 may need a block more for the list of them.
        assert!((full..full + 16).contains(&blocks(&file)), "zeroing keeps what is allocated");
        fallocate(&file, PUNCH, 600_000, 300_000).unwrap();
        assert!(blocks(&file) < full);
        fallocate(&file, libc::FALLOC_FL_ZERO_RANGE, 4 * MIB - 10, 100).unwrap();
        assert_eq!(size(&file), 4 * MIB + 90);
        let keep = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        fallocate(&file, keep, 4 * MIB, 2 * MIB).unwrap();
        assert_eq!(size(&file), 4 * MIB + 90);
        assert_eq!(fallocate(&file, libc::FALLOC_FL_PUNCH_HOLE, 0, 4096), Err(libc::EOPNOTSUPP));
        assert_eq!(fallocate(&file, 0, 0, 0), Err(libc::EINVAL));
        assert_eq!(fallocate(&file, 0, 16 * TIB, 4096), Err(libc::EFBIG));
        file
    });
    for mode in [libc::FALLOC_FL_COLLAPSE_RANGE, libc::FALLOC_FL_INSERT_RANGE] {
        assert_eq!(fallocate(&ours, mode, 0, CHUNK), Err(libc::EOPNOTSUPP));
    }
    let size = 4 * MIB as usize + 90;
    assert!(read(&ours, 0, size) == read(&theirs, 0, size));
    drop((ours, theirs));
    Cluster::shared().assert_clean("fallocate");
}

#[test]
fn what_fallocate_sets_aside_others_do_not_get() {
    let cluster = Cluster::shared();
    cluster.cli_run(&["shard", "create", "aside", "--limit", &(4 * MIB).to_string()]);
    let root = cluster.mount().join("aside");
    let file = made(&root.join("f"));
    assert_eq!(fallocate(&file, 0, 0, 4 * MIB), Err(libc::ENOSPC), "the inodes need some");
    assert_eq!(file.metadata().unwrap().len(), 0);
    fallocate(&file, 0, 0, 3 * MIB).unwrap();
    let other = made(&root.join("g"));
    let mut written = 0;
    let error = loop {
        match other.write_at(&[1; 4096], written) {
            Ok(more) => written += more as u64,
            Err(error) => break error.raw_os_error().unwrap(),
        }
        assert!(written < 4 * MIB);
    };
    assert_eq!(error, libc::ENOSPC);
    assert!(written <= MIB && written > MIB - 2 * CHUNK, "{written}");
    assert_eq!(fallocate(&file, 0, 3 * MIB, MIB), Err(libc::ENOSPC));
    // What was set aside takes every byte, in whatever order.
    let mut pieces: Vec<u64> = (0..3 * MIB / 5000 + 1).collect();
    fastrand::shuffle(&mut pieces);
    for piece in pieces {
        let at = piece * 5000;
        file.write_all_at(&vec![2; 5000.min(3 * MIB - at) as usize], at).unwrap();
    }
    file.sync_all().unwrap();
    assert!(read(&file, 0, 3 * MIB as usize).iter().all(|byte| *byte == 2));
    let space = rustix::fs::statvfs(&root).unwrap();
    assert_eq!(space.f_blocks * space.f_frsize, 4 * MIB);
    assert!(space.f_bavail * space.f_frsize < 2 * CHUNK);
    // Room comes back at once, by whatever frees it.
    fallocate(&file, PUNCH, MIB, MIB).unwrap();
    let space = rustix::fs::statvfs(&root).unwrap();
    assert!((MIB..MIB + 2 * CHUNK).contains(&(space.f_bavail * space.f_frsize)));
    other.write_all_at(&vec![3; MIB as usize], written).unwrap();
    drop((file, other));
    cluster.assert_clean("aside");
}

#[test]
fn a_shard_that_is_full_of_names_is_exactly_full_and_recovers() {
    const INODES: usize = 512;
    let cluster = Cluster::shared();
    cluster.cli_run(&["shard", "create", "names", "--limit", &(512 * INODES).to_string()]);
    let root = cluster.mount().join("names");
    let at = |name: &str| root.join(name);
    let errno = |result: std::io::Result<()>| result.unwrap_err().raw_os_error().unwrap();
    for number in 0..INODES {
        File::create_new(at(&number.to_string())).unwrap();
    }
    let available = || rustix::fs::statvfs(&root).unwrap().f_bavail;
    assert_eq!(available(), 0);
    let full = || {
        assert_eq!(errno(File::create_new(at("more")).map(drop)), libc::ENOSPC);
        assert_eq!(errno(fs::create_dir(at("more"))), libc::ENOSPC);
        assert_eq!(errno(symlink("x", at("more"))), libc::ENOSPC);
        assert_eq!(errno(fs::hard_link(at("5"), at("more"))), libc::ENOSPC);
        assert_eq!(errno(fs::write(at("3"), "x")), libc::ENOSPC);
    };
    full();
    // What needs no room goes on.
    fs::rename(at("1"), at("one")).unwrap();
    fs::rename(at("2"), at("one")).unwrap();
    fs::set_permissions(at("3"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::set_permissions(at("3"), fs::Permissions::from_mode(0o644)).unwrap();
    // The replaced file's place is free (once the mount has given it back: it was open): for one, and no more.
    let soon = |change: &dyn Fn() -> std::io::Result<()>| {
        eventually(Duration::from_secs(60), || change().map_err(|e| e.to_string()));
    };
    soon(&|| fs::create_dir(at("d")));
    full();
    fs::rename(at("4"), at("d/4")).unwrap();
    fs::remove_file(at("6")).unwrap();
    soon(&|| fs::write(at("5"), [1; 512]));
    full();
    for number in 7..INODES {
        fs::remove_file(at(&number.to_string())).unwrap();
    }
    soon(&|| fs::write(at("big"), vec![1; 240 << 10]));
    assert!(available() > 0);
    cluster.assert_clean("names");
}

#[test]
fn ranges_are_copied_by_the_node() {
    let root = shard("copies");
    let before = requests("copy_file_range");
    let source = made(&root.join("source"));
    let content: Vec<u8> =
        (0..3_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 9) as u8 | 1).collect();
    source.write_all_at(&content, 0).unwrap();
    source.write_all_at(&content[..5000], 30 * MIB).unwrap();
    let size = 30 * MIB + 5000;
    let target = made(&root.join("target"));
    copy_all((&source, 0), (&target, 0), size);
    assert!(requests("copy_file_range") > before, "the kernel did not copy it by itself");
    assert_eq!(extents(&target), extents(&source));
    assert_eq!(blocks(&target), blocks(&source));
    assert!(read(&target, 0, size as usize) == read(&source, 0, size as usize));
    // Pages of the target that the kernel had are not shown any more, whichever way it is open.
    let again = File::open(root.join("target")).unwrap();
    copy_all((&source, 1234), (&target, 77), 200_000);
    assert!(read(&target, 77, 200_000) == content[1234..201_234]);
    assert!(read(&again, 77, 200_000) == content[1234..201_234]);
    assert!(fs::read(root.join("target")).unwrap()[77..200_077] == content[1234..201_234]);
    // Appends nothing past the source's end; changes times and version when it copies.
    assert_eq!(copy((&source, size), (&target, 0), 100), Ok(0));
    let old = target.metadata().unwrap();
    assert_eq!(copy((&source, size - 3), (&target, size), 100), Ok(3));
    let new = target.metadata().unwrap();
    assert_eq!(new.len(), size + 3);
    assert!((new.mtime(), new.mtime_nsec()) > (old.mtime(), old.mtime_nsec()));
    // Within one file; overlapping ranges are refused, as everywhere.
    assert_eq!(copy((&target, 0), (&target, 8192), 8192), Ok(8192));
    assert!(read(&target, 0, 8192) == read(&target, 8192, 8192));
    assert_eq!(copy((&target, 0), (&target, 100), 8192), Err(libc::EINVAL));
    let append = OpenOptions::new().append(true).open(root.join("target")).unwrap();
    assert_eq!(copy((&source, 0), (&append, 0), 10), Err(libc::EBADF));
    // What was written through a mapping is copied, too.
    let length = 8192;
    // SAFETY: a shared mapping of a file that is longer; it is used within its length and unmapped once.
    unsafe {
        let (access, shared) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED);
        let map = libc::mmap(std::ptr::null_mut(), length, access, shared, source.as_raw_fd(), 0);
        assert_ne!(map, libc::MAP_FAILED);
        std::slice::from_raw_parts_mut(map.cast::<u8>(), length).fill(b'm');
        assert_eq!(copy((&source, 0), (&target, 0), length as u64), Ok(length as u64));
        libc::munmap(map, length);
    }
    assert!(read(&target, 0, length).iter().all(|byte| *byte == b'm'));
    drop((source, target, again, append));
    // Programs: also from one shard to another, where the kernel copies, and by users without privileges.
    let other = shard("copies-other");
    Shell::new(&root).with("OTHER", &other).run(
        r#"cp source copy
           cmp source copy
           cp source "$OTHER/"
           cmp source "$OTHER/source"
           test "$(stat -c %b copy)" = "$(stat -c %b source)"
           cp --sparse=never copy dense
           cmp copy dense
           test "$(stat -c %b dense)" -ge 61440
           mkdir free
           chmod 777 free
           echo old >free/suid
           chown 1 free/suid
           chmod 4755 free/suid
           python3 - <<'P'
import os
os.setgroups([]); os.setgid(1); os.setuid(1)
out = os.open("free/suid", os.O_WRONLY)
assert os.copy_file_range(os.open("source", os.O_RDONLY), out, 10, 0, 0) == 10
P
           test "$(stat -c %a free/suid)" = 755"#,
    );
    Cluster::shared().assert_clean("copies");
    Cluster::shared().assert_clean("copies-other");
}

#[test]
fn a_terabyte_with_holes() {
    let root = shard("terabyte");
    let path = root.join("big");
    let big = made(&path);
    let page = [9u8; 4096];
    big.write_all_at(&page, TIB - 4096).unwrap();
    big.write_all_at(&page, 300 * MIB).unwrap();
    big.sync_all().unwrap();
    let two = [(300 * MIB, 300 * MIB + 4096), (TIB - 4096, TIB)];
    assert_eq!((big.metadata().unwrap().len(), extents(&big)), (TIB, two.to_vec()));
    assert_eq!(blocks(&big) * 512, 2 * CHUNK);
    assert_eq!(read(&big, TIB - 4096, 4096), page);
    assert_eq!(read(&big, TIB / 2, 4096), [0; 4096]);
    assert_eq!(seek(&big, TIB, libc::SEEK_DATA), Err(libc::ENXIO));
    assert_eq!(seek(&big, TIB - 1, libc::SEEK_HOLE), Ok(TIB));
    sh(
        &root,
        "cp --sparse=always big copy
         test \"$(du -k copy | cut -f1)\" = 128
         cp big plain
         test \"$(du -k plain | cut -f1)\" = 128
         test \"$(du -k --apparent-size big | cut -f1)\" = 1073741824
         tar -cSf packed.tar big
         test \"$(stat -c %s packed.tar)\" -lt 100000
         mkdir out
         tar -xSf packed.tar -C out
         mkdir .snap/then",
    );
    for name in ["copy", "plain", "out/big", ".snap/then/big"] {
        let file = File::open(root.join(name)).unwrap();
        assert_eq!((file.metadata().unwrap().len(), extents(&file)), (TIB, two.to_vec()), "{name}");
        assert_eq!(read(&file, 300 * MIB, 4096), page, "{name}");
        assert_eq!(read(&file, TIB - 4096, 4096), page, "{name}");
    }
    fallocate(&big, PUNCH, MIB, TIB - 2 * MIB).unwrap();
    assert_eq!((extents(&big), blocks(&big) * 512), (vec![(TIB - 4096, TIB)], CHUNK));
    big.set_len(TIB - 4096).unwrap();
    assert_eq!((extents(&big), blocks(&big)), (vec![], 0));
    big.set_len(16 * TIB).unwrap();
    big.write_all_at(&page, 16 * TIB - 4096).unwrap();
    assert_eq!(extents(&big), [(16 * TIB - 4096, 16 * TIB)]);
    assert_eq!(big.write_at(b"x", 16 * TIB).unwrap_err().raw_os_error(), Some(libc::EFBIG));
    // The snapshot has what was there.
    assert_eq!(extents(&File::open(root.join(".snap/then/big")).unwrap()), two);
    drop(big);
    Cluster::shared().assert_clean("terabyte");
    sh(
        &root,
        "rm -r big copy plain out packed.tar
         rmdir .snap/then
         test \"$(du -s . | cut -f1)\" -lt 100",
    );
    Cluster::shared().assert_clean("terabyte");
}

#[test]
fn zeros_become_holes_where_programs_ask_for_it() {
    let root = shard("zeros");
    sh(
        &root,
        r#"head -c 4M /dev/zero >zeros
           test "$(stat -c %b zeros)" = 8192
           cp --sparse=always zeros holes
           test "$(stat -c '%b %s' holes)" = '0 4194304'
           cmp zeros holes
           { head -c 1M /dev/urandom; head -c 2M /dev/zero; head -c 1M /dev/urandom; } >mixed
           cp --sparse=always mixed sparse
           cmp mixed sparse
           test "$(stat -c %b sparse)" = 4096
           fallocate --dig-holes mixed
           cmp mixed sparse
           test "$(stat -c %b mixed)" = 4096"#,
    );
    // O_TRUNC and O_DIRECT know them as well.
    let direct =
        OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(root.join("sparse")).unwrap();
    assert_eq!(extents(&direct), [(0, MIB), (3 * MIB, 4 * MIB)]);
    let mut truncated = OpenOptions::new().write(true).truncate(true).open(root.join("sparse")).unwrap();
    assert_eq!((extents(&truncated), blocks(&truncated)), (vec![], 0));
    truncated.write_all(b"data").unwrap();
    assert_eq!(extents(&truncated), [(0, 4)]);
    drop((direct, truncated));
    Cluster::shared().assert_clean("zeros");
}
