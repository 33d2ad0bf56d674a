//! Calls that ordinary programs rely on without saying so, on a real mount.

#![allow(clippy::unwrap_used)]

use std::collections::BTreeSet;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use shardfs_tests::{Cluster, sh, sh_fails, tree};

fn shard(name: &str) -> PathBuf {
    Cluster::shared().shard(name)
}

fn errno(result: std::io::Result<impl Sized>) -> i32 {
    match result {
        Ok(_) => panic!("should have failed"),
        Err(error) => error.raw_os_error().unwrap(),
    }
}

fn c_path(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

#[test]
fn an_unlinked_open_file_lives_on() {
    let root = shard("unlinked");
    let path = root.join("f");
    let content: Vec<u8> = (0..300_000u32).map(|i| i as u8).collect();
    fs::write(&path, &content).unwrap();
    let mut file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert_eq!(errno(File::open(&path)), libc::ENOENT);
    let mut read = Vec::new();
    file.read_to_end(&mut read).unwrap();
    assert_eq!(read, content);
    file.write_all(b"more").unwrap();
    file.sync_all().unwrap();
    assert_eq!(file.metadata().unwrap().nlink(), 0);
    assert_eq!(file.metadata().unwrap().len(), 300_004);
    // The name is free, and another file.
    fs::write(&path, "new").unwrap();
    assert_ne!(file.metadata().unwrap().ino(), fs::metadata(&path).unwrap().ino());
    let mut tail = [0; 4];
    file.read_exact_at(&mut tail, 300_000).unwrap();
    assert_eq!(&tail, b"more");

    // The same when another file is renamed over it.
    let mut replaced = File::open(&path).unwrap();
    fs::write(root.join("other"), "other").unwrap();
    fs::rename(root.join("other"), &path).unwrap();
    let mut text = String::new();
    replaced.read_to_string(&mut text).unwrap();
    assert_eq!((text.as_str(), fs::read(&path).unwrap().as_slice()), ("new", b"other".as_slice()));
    drop((file, replaced));
    Cluster::shared().assert_clean("unlinked");
}

#[test]
fn hard_links_share_an_inode() {
    let root = shard("links");
    fs::create_dir(root.join("d")).unwrap();
    fs::write(root.join("a"), "1").unwrap();
    fs::hard_link(root.join("a"), root.join("d/b")).unwrap();
    let (a, b) = (fs::metadata(root.join("a")).unwrap(), fs::metadata(root.join("d/b")).unwrap());
    assert_eq!((a.ino(), a.nlink()), (b.ino(), 2));
    OpenOptions::new().append(true).open(root.join("d/b")).unwrap().write_all(b"2").unwrap();
    assert_eq!(fs::read(root.join("a")).unwrap(), b"12");
    // rename(2) of one name over another name of the same file does nothing.
    fs::rename(root.join("a"), root.join("d/b")).unwrap();
    assert!(root.join("a").exists() && root.join("d/b").exists());
    fs::remove_file(root.join("a")).unwrap();
    assert_eq!(fs::metadata(root.join("d/b")).unwrap().nlink(), 1);
    assert_eq!(errno(fs::hard_link(root.join("d"), root.join("e"))), libc::EPERM);
    Cluster::shared().assert_clean("links");
}

#[test]
fn symlinks_fifos_and_sockets() {
    let root = shard("special");
    symlink("../outside/\u{e4}", root.join("link")).unwrap();
    assert_eq!(fs::read_link(root.join("link")).unwrap().to_str().unwrap(), "../outside/\u{e4}");
    symlink("x".repeat(4095), root.join("longest")).unwrap();
    assert_eq!(fs::read_link(root.join("longest")).unwrap().as_os_str().len(), 4095);
    symlink("loop", root.join("loop")).unwrap();
    assert_eq!(errno(File::open(root.join("loop"))), libc::ELOOP);

    sh(&root, "mkfifo fifo && { echo through >fifo & cat fifo; wait; } | grep -qx through");
    assert!(fs::metadata(root.join("fifo")).unwrap().file_type().is_fifo());

    let listener = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
    assert!(fs::metadata(root.join("socket")).unwrap().file_type().is_socket());
    let caller = std::thread::spawn({
        let path = root.join("socket");
        move || std::os::unix::net::UnixStream::connect(path).unwrap().write_all(b"hello").unwrap()
    });
    let mut said = String::new();
    listener.accept().unwrap().0.read_to_string(&mut said).unwrap();
    caller.join().unwrap();
    assert_eq!(said, "hello");
    sh(&root, "mknod null c 1 3 && test \"$(stat -c '%t %T' null)\" = '1 3'");
}

#[test]
fn extended_attributes() {
    let root = shard("xattr");
    fs::write(root.join("f"), "").unwrap();
    sh(
        &root,
        r#"setfattr -n user.colour -v red f
           test "$(getfattr --only-values -n user.colour f)" = red
           setfattr -n user.empty f
           getfattr -n user.empty f >/dev/null
           setfattr -n trusted.t -v x f
           setfattr -n user.colour -v blue f
           test "$(getfattr -d f | grep -c ^user)" = 2
           getfattr -d f | grep -x 'user.colour="blue"'
           mkdir d
           setfattr -n user.on-directory -v yes d
           getfattr -n user.on-directory d >/dev/null
           cp -a f g
           test "$(getfattr --only-values -n user.colour g)" = blue
           setfattr -x user.colour f
           if getfattr -n user.colour f 2>/dev/null; then exit 1; fi"#,
    );
    sh_fails(&root, "setfattr -x user.absent f");
    sh_fails(&root, "getfattr -n user.absent f");
    let big = c_path(&root.join("f"));
    let value = vec![7u8; 65_536];
    // SAFETY: the pointers and lengths are those of live buffers.
    let set = |len: usize| unsafe {
        libc::setxattr(big.as_ptr(), c"user.big".as_ptr(), value.as_ptr().cast(), len, 0)
    };
    assert_eq!(set(65_536), 0, "XATTR_SIZE_MAX fits");
    let mut back = vec![0u8; 65_536];
    // SAFETY: as above.
    let got =
        unsafe { libc::getxattr(big.as_ptr(), c"user.big".as_ptr(), back.as_mut_ptr().cast(), back.len()) };
    assert_eq!((got, &back), (65_536, &value));
    Cluster::shared().assert_clean("xattr");
}

#[test]
fn times_keep_their_nanoseconds() {
    let root = shard("times");
    let path = root.join("f");
    fs::write(&path, "x").unwrap();
    for (seconds, nanos) in [(1_700_000_000, 123_456_789), (0, 1), (4_000_000_000, 999_999_999)] {
        tree::set_mtime(&path, seconds, nanos);
        let meta = fs::metadata(&path).unwrap();
        assert_eq!((meta.mtime(), meta.mtime_nsec()), (seconds, i64::from(nanos)));
        assert_eq!((meta.atime(), meta.atime_nsec()), (seconds, i64::from(nanos)));
    }
    // A change moves mtime and ctime; chmod moves ctime alone.
    let before = fs::metadata(&path).unwrap();
    OpenOptions::new().append(true).open(&path).unwrap().write_all(b"y").unwrap();
    let after = fs::metadata(&path).unwrap();
    assert!((after.mtime(), after.mtime_nsec()) != (before.mtime(), before.mtime_nsec()));
    assert!((after.ctime(), after.ctime_nsec()) > (before.ctime(), before.ctime_nsec()));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    let chmod = fs::metadata(&path).unwrap();
    assert_eq!((chmod.mtime(), chmod.mtime_nsec()), (after.mtime(), after.mtime_nsec()));
    assert!((chmod.ctime(), chmod.ctime_nsec()) > (after.ctime(), after.ctime_nsec()));
}

#[test]
fn statfs_shows_the_shard() {
    let root = shard("statfs");
    let at = |path: &Path| rustix::fs::statvfs(path).unwrap();
    let before = at(&root);
    assert!(before.f_blocks > 0 && before.f_bavail > 0 && before.f_bfree <= before.f_blocks);
    assert_eq!(before.f_namemax, 255);
    sh(&root, "df . && df -i .");
}

#[test]
fn open_flags_do_what_they_say() {
    let root = shard("flags");
    let path = root.join("f");
    let open = |flags: i32| OpenOptions::new().read(true).write(true).custom_flags(flags).open(&path);
    assert_eq!(errno(open(0)), libc::ENOENT);
    let create = |flags: i32| {
        // SAFETY: a valid C string and plain flags.
        let fd = unsafe { libc::open(c_path(&path).as_ptr(), libc::O_RDWR | libc::O_CREAT | flags, 0o640) };
        if fd < 0 {
            Err(std::io::Error::last_os_error())
        } else {
            Ok(unsafe { <File as std::os::fd::FromRawFd>::from_raw_fd(fd) })
        }
    };
    create(libc::O_EXCL).unwrap().write_all(b"123456").unwrap();
    assert_eq!(errno(create(libc::O_EXCL)), libc::EEXIST);
    assert_eq!(errno(open(libc::O_DIRECTORY)), libc::ENOTDIR);
    assert_eq!(open(libc::O_TRUNC).unwrap().metadata().unwrap().len(), 0);
    let mut one = OpenOptions::new().append(true).open(&path).unwrap();
    let mut two = OpenOptions::new().append(true).open(&path).unwrap();
    for _ in 0..50 {
        one.write_all(b"aaaa").unwrap();
        two.write_all(b"bbbb").unwrap();
    }
    let text = fs::read(&path).unwrap();
    assert_eq!(text.len(), 400);
    assert!(text.chunks(8).all(|c| c == b"aaaabbbb"), "appends take turns");
    let mut sync = open(libc::O_SYNC).unwrap();
    sync.seek(SeekFrom::End(10)).unwrap();
    sync.write_all(b"x").unwrap();
    assert_eq!(&fs::read(&path).unwrap()[400..], b"\0\0\0\0\0\0\0\0\0\0x");
    symlink("f", root.join("link")).unwrap();
    assert_eq!(
        errno(OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(root.join("link"))),
        libc::ELOOP
    );
    assert_eq!(errno(OpenOptions::new().write(true).open(&root)), libc::EISDIR);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
}

#[test]
fn a_scan_sees_what_stays_exactly_once() {
    let root = shard("readdir");
    const STAYING: usize = 3_000;
    for number in 0..STAYING {
        fs::write(root.join(format!("stay-{number}")), "").unwrap();
        if number % 3 == 0 {
            fs::write(root.join(format!("go-{number}")), "").unwrap();
        }
    }
    let stop = std::sync::atomic::AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for number in (0..STAYING).step_by(3).cycle() {
                if stop.load(std::sync::atomic::Ordering::Relaxed) {
                    break;
                }
                let _ = fs::remove_file(root.join(format!("go-{number}")));
                fs::write(root.join(format!("new-{number}")), "").unwrap();
                let _ = fs::remove_file(root.join(format!("new-{number}")));
                fs::write(root.join(format!("go-{number}")), "").unwrap();
            }
        });
        for _ in 0..5 {
            let mut seen = BTreeSet::new();
            for entry in fs::read_dir(&root).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                if name.starts_with("stay-") {
                    assert!(seen.insert(name.clone()), "{name} seen twice");
                }
            }
            assert_eq!(seen.len(), STAYING);
        }
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
    });
    // Removing while reading, as `rm -r` does.
    sh(root.parent().unwrap(), "rm -rf readdir/* && test -z \"$(ls -A readdir)\"");
    Cluster::shared().assert_clean("readdir");
}

#[test]
fn permissions_are_the_kernels() {
    let root = shard("permissions");
    fs::write(root.join("secret"), "x").unwrap();
    fs::set_permissions(root.join("secret"), fs::Permissions::from_mode(0o600)).unwrap();
    fs::create_dir(root.join("open")).unwrap();
    fs::set_permissions(root.join("open"), fs::Permissions::from_mode(0o1777)).unwrap();
    sh(
        &root,
        r#"as() { setpriv --reuid=1 --regid=1 --clear-groups "$@"; }
           may_not() { if as "$@" 2>/dev/null; then echo "allowed: $*"; exit 1; fi; }
           may_not cat secret
           may_not touch mine
           as touch open/mine
           test "$(stat -c '%u %g' open/mine)" = '1 1'
           touch open/roots
           may_not rm -f open/roots
           as chmod 700 open/mine
           may_not chown 0 open/mine
           may_not chmod 777 secret
           chown 1:1 secret
           as cat secret >/dev/null
           mkdir setgid
           chgrp 1 setgid
           chmod 2775 setgid
           mkdir setgid/d
           touch setgid/f
           test "$(stat -c %g setgid/f)" = 1
           test "$(stat -c '%g %a' setgid/d)" = '1 2755'
           cp /bin/true suid
           chmod 4755 suid
           echo >>suid
           test "$(stat -c %a suid)" = 4755
           chown 1 suid
           chmod 4755 suid
           as bash -c 'echo >>suid'
           test "$(stat -c %a suid)" = 755"#,
    );
}

#[test]
fn renames() {
    let root = shard("renames");
    sh(
        &root,
        r#"mkdir -p a/b/c
           echo 1 >a/b/c/f
           mv a/b moved
           test "$(cat moved/c/f)" = 1
           if mv moved moved/c 2>/dev/null; then exit 1; fi
           mkdir empty full
           touch full/x
           mv -T moved empty
           test "$(cat empty/c/f)" = 1
           if mv -T empty full 2>/dev/null; then exit 1; fi
           test -e full/x"#,
    );
    let (a, b) = (c_path(&root.join("empty")), c_path(&root.join("full")));
    let rename = |flags: u32| {
        // SAFETY: valid C strings.
        let code = unsafe { libc::renameat2(libc::AT_FDCWD, a.as_ptr(), libc::AT_FDCWD, b.as_ptr(), flags) };
        if code == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    assert_eq!(errno(rename(libc::RENAME_NOREPLACE)), libc::EEXIST);
    rename(libc::RENAME_EXCHANGE).unwrap();
    assert!(root.join("full/c/f").exists() && root.join("empty/x").exists());
    Cluster::shared().assert_clean("renames");
}

#[test]
fn locks_work_on_one_mount() {
    let root = shard("locks");
    sh(
        &root,
        r#"touch l
           exec 9>l
           flock 9
           if flock -n l true; then exit 1; fi
           flock -u 9
           flock -n l true
           python3 - <<'P'
import fcntl, os
a = open("l", "w")
fcntl.lockf(a, fcntl.LOCK_EX)
if os.fork() == 0:
    try:
        fcntl.lockf(open("l", "w"), fcntl.LOCK_EX | fcntl.LOCK_NB)
        os._exit(1)
    except BlockingIOError:
        os._exit(0)
assert os.wait()[1] == 0
P"#,
    );
}

/// The kernel walks a path again if what it found was replaced meanwhile, but only once.
#[test]
fn a_name_that_is_replaced_all_the_time_is_always_there() {
    const REPLACERS: usize = 4;
    const LOOKS: usize = 700;
    let root = shard("replaced");
    fs::write(root.join("f"), "first").unwrap();
    symlink("f", root.join("l")).unwrap();
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..REPLACERS {
            let (root, over) = (&root, &over);
            scope.spawn(move || {
                let (file, link) = (root.join(format!("f{number}")), root.join(format!("l{number}")));
                while !over.load(Ordering::Relaxed) {
                    fs::write(&file, "again").unwrap();
                    fs::rename(&file, root.join("f")).unwrap();
                    symlink("f", &link).unwrap();
                    fs::rename(&link, root.join("l")).unwrap();
                }
            });
        }
        let looks = scope.spawn(|| {
            for look in 0..LOOKS {
                let told = |what: &str, e: std::io::Error| format!("{what}, look {look}: {e}");
                fs::read(root.join("f")).map_err(|e| told("read", e))?;
                fs::read(root.join("l")).map_err(|e| told("read through the link", e))?;
                fs::read_link(root.join("l")).map_err(|e| told("readlink", e))?;
                fs::metadata(root.join("f")).map_err(|e| told("stat", e))?;
                OpenOptions::new().append(true).open(root.join("f")).map_err(|e| told("append", e))?;
            }
            Ok::<(), String>(())
        });
        let looks = looks.join();
        over.store(true, Ordering::Relaxed);
        looks.unwrap().unwrap();
    });
}
