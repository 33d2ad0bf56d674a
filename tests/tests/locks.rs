//! POSIX locks over the cluster: processes on two mounts, failovers, holders that die, and a database that relies on them.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use shardfs_proto::types::limits::LOCK_SILENCE_MAX;
use shardfs_tests::cluster::{bin_dir, eventually};
use shardfs_tests::{Cluster, Options, Shell, mounted};

/// More than anything here takes that happens.
const PATIENCE: Duration = Duration::from_secs(60);
/// What does not happen by then does not happen.
const A_WHILE: Duration = Duration::from_secs(2);

/// A process of its own, since a process's locks exclude other processes only. Its commands: open NAME PATH; close NAME;
/// try, wait, ofd NAME r|w|u START LENGTH (0: to the end); get NAME r|w START LENGTH; write NAME TEXT. It answers "ok", what it was asked for, or
/// the name of an error.
const LOCKER: &str = r#"
import errno, fcntl, os, signal, struct, sys
class Handled(Exception): pass
def handle(number, frame): raise Handled()
signal.signal(signal.SIGUSR1, handle)
files, FLOCK, OFD_SETLK = {}, "hhqqi0q", 37
kinds = {"r": fcntl.F_RDLCK, "w": fcntl.F_WRLCK, "u": fcntl.F_UNLCK}
ops = {"r": fcntl.LOCK_SH, "w": fcntl.LOCK_EX, "u": fcntl.LOCK_UN}
def do(command, name, *rest):
    if command == "open":
        files[name] = os.open(rest[0], os.O_RDWR | os.O_CREAT, 0o644)
    elif command == "close":
        os.close(files.pop(name))
    elif command == "write":
        os.pwrite(files[name], rest[0].encode(), 0)
    elif command in ("try", "wait"):
        kind, start, length = rest[0], int(rest[1]), int(rest[2])
        now = fcntl.LOCK_NB if command == "try" and kind != "u" else 0
        fcntl.lockf(files[name], ops[kind] | now, length, start)
    else:
        flock = struct.pack(FLOCK, kinds[rest[0]], 0, int(rest[1]), int(rest[2]), 0)
        got = fcntl.fcntl(files[name], fcntl.F_GETLK if command == "get" else OFD_SETLK, flock)
        if command == "get":
            kind, _, start, length, pid = struct.unpack(FLOCK, got)
            names = {value: key for key, value in kinds.items()}
            return "u" if kind == fcntl.F_UNLCK else f"{names[kind]} {start} {length} {pid}"
    return "ok"
for line in sys.stdin:
    try:
        print(do(*line.split()), flush=True)
    except Handled:
        print("EINTR", flush=True)
    except OSError as e:
        print("EDEADLK" if e.errno == errno.EDEADLK else errno.errorcode[e.errno], flush=True)
"#;

struct Locker {
    child: Child,
    commands: ChildStdin,
    answers: Receiver<String>,
}

impl Locker {
    /// With a file open as `f`.
    fn start(file: &Path) -> Locker {
        let mut child = Command::new("python3")
            .args(["-c", LOCKER])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("python3 is there");
        let (tell, answers) = channel();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        std::thread::spawn(move || lines.map_while(Result::ok).try_for_each(|line| tell.send(line)));
        let commands = child.stdin.take().unwrap();
        let mut locker = Locker { child, commands, answers };
        assert_eq!(locker.ask(&format!("open f {}", file.display())), "ok");
        locker
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn send(&mut self, command: &str) {
        writeln!(self.commands, "{command}").unwrap();
    }

    fn answer(&mut self, within: Duration) -> Option<String> {
        match self.answers.recv_timeout(within) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => panic!("the process has ended"),
        }
    }

    #[track_caller]
    fn ask(&mut self, command: &str) -> String {
        self.send(command);
        self.answer(PATIENCE).unwrap_or_else(|| panic!("no answer to {command:?}"))
    }

    fn signal(&self, signal: i32) {
        // SAFETY: a signal to a process of this test, by number.
        unsafe { libc::kill(self.pid() as i32, signal) };
    }

    /// Kills it; it must end.
    fn kill(&mut self) {
        self.signal(libc::SIGKILL);
        eventually(PATIENCE, || match self.child.try_wait().unwrap() {
            Some(_) => Ok(()),
            None => Err("it lives".into()),
        });
    }
}

impl Drop for Locker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Another mount of a cluster.
fn mount_again(cluster: &Cluster, name: &str) -> PathBuf {
    let point = cluster.scratch(name);
    cluster.cli_run(&["mount", point.to_str().unwrap()]);
    point
}

/// The cluster that most tests share, with a second mount.
fn shared() -> (&'static Cluster, &'static Path) {
    static SECOND: OnceLock<PathBuf> = OnceLock::new();
    let cluster = Cluster::shared();
    (cluster, SECOND.get_or_init(|| mount_again(cluster, "second")))
}

/// A file of a shard, on each mount.
fn file_on_both(shard: &str) -> (PathBuf, PathBuf) {
    let (cluster, second) = shared();
    let file = cluster.shard(shard).join("f");
    fs::write(&file, "content").unwrap();
    (file, second.join(shard).join("f"))
}

#[test]
fn processes_exclude_each_other_on_one_mount_and_on_two() {
    let (here, there) = file_on_both("exclusion");
    let (mut a, mut b, mut near) = (Locker::start(&here), Locker::start(&there), Locker::start(&here));
    assert_eq!(a.ask("try f w 0 10"), "ok");
    assert_eq!((b.ask("try f w 5 1"), near.ask("try f r 9 100")), ("EAGAIN".into(), "EAGAIN".into()));
    assert_eq!(b.ask("try f w 10 0"), "ok", "the rest of the file");
    assert_eq!(near.ask("try f r 1000000 1"), "EAGAIN", "to the end means to any end");
    let held_by_a = format!("w 0 10 {}", a.pid());
    assert_eq!((b.ask("get f r 3 1"), near.ask("get f r 3 1")), (held_by_a.clone(), held_by_a));
    assert_eq!(near.ask("get f w 50 1"), format!("w 10 0 {}", b.pid()));
    // Nobody is kept from writing.
    assert_eq!(near.ask("write f x"), "ok");
    assert_eq!(a.ask("try f r 0 10"), "ok", "what it has itself it may change");
    assert_eq!((b.ask("try f r 0 10"), near.ask("try f r 0 5")), ("ok".into(), "ok".into()));
    assert_eq!(a.ask("try f w 0 10"), "EAGAIN");
    assert_eq!((b.ask("try f u 0 0"), near.ask("try f u 0 0")), ("ok".into(), "ok".into()));
    assert_eq!(a.ask("get f w 0 0"), "u");
    assert_eq!(a.ask("try f w 0 0"), "ok");
    assert_eq!((b.ask("try f w 0 1"), near.ask("try f w 0 1")), ("EAGAIN".into(), "EAGAIN".into()));
    shared().0.assert_clean("exclusion");
}

#[test]
fn closing_any_descriptor_drops_a_processs_locks_and_so_does_its_end() {
    let (here, there) = file_on_both("closing");
    let (mut a, mut b) = (Locker::start(&here), Locker::start(&there));
    assert_eq!(a.ask("try f w 0 0"), "ok");
    assert_eq!(b.ask("try f w 0 0"), "EAGAIN");
    assert_eq!(a.ask(&format!("open g {}", here.display())), "ok");
    assert_eq!(a.ask("close g"), "ok");
    assert_eq!(b.ask("try f w 0 0"), "ok");
    // Closed and opened again: what is locked then stays.
    assert_eq!((b.ask("close f"), b.ask(&format!("open f {}", there.display()))), ("ok".into(), "ok".into()));
    assert_eq!(b.ask("try f w 0 0"), "ok");
    assert_eq!(a.ask("try f w 0 0"), "EAGAIN");
    b.kill();
    eventually(PATIENCE, || match a.ask("try f w 0 0").as_str() {
        "ok" => Ok(()),
        other => Err(other.to_owned()),
    });
    // A lock of an open file goes with it, whatever else its process closes.
    let mut c = Locker::start(&there);
    assert_eq!((a.ask("try f u 0 0"), a.ask("ofd f w 0 0")), ("ok".into(), "ok".into()));
    assert_eq!(a.ask(&format!("open g {}", here.display())), "ok");
    assert_eq!(a.ask("ofd g w 0 0"), "EAGAIN", "another open file is another owner");
    assert_eq!(a.ask("close g"), "ok");
    assert_eq!(c.ask("try f w 0 0"), "EAGAIN");
    assert_eq!(a.ask("close f"), "ok");
    eventually(PATIENCE, || match c.ask("try f w 0 0").as_str() {
        "ok" => Ok(()),
        other => Err(other.to_owned()),
    });
}

#[test]
fn who_waits_gets_the_lock_when_it_is_free() {
    let (here, there) = file_on_both("waiting");
    let (mut a, mut b) = (Locker::start(&here), Locker::start(&there));
    for free in ["try f u 0 0", "close f"] {
        assert_eq!(a.ask("try f w 0 0"), "ok");
        b.send("wait f w 3 1");
        assert_eq!(b.answer(A_WHILE), None, "it waits");
        // Other calls of that mount go on.
        assert_eq!(fs::read(&there).unwrap(), b"content");
        assert_eq!(a.ask(free), "ok");
        assert_eq!(b.answer(PATIENCE).unwrap(), "ok");
        assert_eq!(b.ask("try f u 0 0"), "ok");
    }
}

#[test]
fn who_would_wait_for_himself_is_told() {
    let (here, there) = file_on_both("circle");
    let (mut a, mut b) = (Locker::start(&here), Locker::start(&there));
    assert_eq!((a.ask("try f w 0 1"), b.ask("try f w 1 1")), ("ok".into(), "ok".into()));
    a.send("wait f w 1 1");
    assert_eq!(a.answer(A_WHILE), None);
    assert_eq!(b.ask("wait f w 0 1"), "EDEADLK");
    assert_eq!(b.ask("try f u 0 0"), "ok");
    assert_eq!(a.answer(PATIENCE).unwrap(), "ok");
}

#[test]
fn a_waiting_process_dies_when_it_is_killed_and_hears_signals() {
    let (here, there) = file_on_both("signals");
    let (mut a, mut b, mut c) = (Locker::start(&here), Locker::start(&there), Locker::start(&there));
    assert_eq!(a.ask("try f w 0 0"), "ok");
    for waiting in [&mut b, &mut c] {
        waiting.send("wait f w 0 0");
        assert_eq!(waiting.answer(A_WHILE), None);
    }
    // The lock is never free meanwhile.
    c.signal(libc::SIGUSR1);
    assert_eq!(c.answer(PATIENCE).unwrap(), "EINTR");
    assert_eq!(c.ask("try f w 0 0"), "EAGAIN", "it goes on");
    b.kill();
    assert_eq!(a.ask("try f u 0 0"), "ok");
    // Nothing was locked for who is dead.
    eventually(PATIENCE, || match c.ask("try f w 0 0").as_str() {
        "ok" => Ok(()),
        other => Err(other.to_owned()),
    });
}

#[test]
fn a_closed_shard_is_locked_for_reading_only() {
    let (here, there) = file_on_both("closed");
    let (mut a, mut b) = (Locker::start(&here), Locker::start(&there));
    assert_eq!(a.ask("try f w 0 0"), "ok");
    shared().0.cli_run(&["shard", "close", "closed"]);
    assert_eq!(a.ask("try f u 0 0"), "ok");
    assert_eq!((a.ask("try f r 0 0"), b.ask("wait f r 0 0")), ("ok".into(), "ok".into()));
    assert_eq!((a.ask("get f r 0 0"), a.ask("try f w 0 0")), ("u".into(), "EROFS".into()));
    assert_eq!((a.ask("close f"), b.ask("close f")), ("ok".into(), "ok".into()));
}

/// As the mount's documentation says.
#[test]
fn locks_of_flock_and_of_a_mount_with_local_locks_hold_for_a_mount() {
    let (here, there) = file_on_both("local");
    let (cluster, _) = shared();
    let point = cluster.scratch("local-locks");
    let mounted = Command::new(bin_dir().join("shardfsd"))
        .arg(&point)
        .args(["-o", "locks=local", "--endpoints", &cluster.endpoints().join(",")])
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(mounted.success());
    let (mut a, mut b) = (Locker::start(&here), Locker::start(&point.join("local/f")));
    assert_eq!((a.ask("try f w 0 0"), b.ask("try f w 0 0")), ("ok".into(), "ok".into()));
    let mut c = Locker::start(&point.join("local/f"));
    assert_eq!(c.ask("try f r 0 0"), "EAGAIN");
    drop((b, c));
    Shell::new(cluster.root()).with("HERE", &here).with("THERE", &there).with("POINT", &point).run(
        r#"exec 9>>"$HERE"
           flock 9
           if flock -n "$HERE" true; then exit 1; fi
           flock -n "$THERE" true
           umount "$POINT""#,
    );
}

#[test]
fn a_lock_survives_the_failover_of_its_shard() {
    let cluster = Cluster::start(&Options::default());
    let second = mount_again(&cluster, "second");
    let here = cluster.shard("moved").join("f");
    fs::write(&here, "content").unwrap();
    let there = second.join("moved/f");
    let (mut a, mut b, mut c) = (Locker::start(&here), Locker::start(&there), Locker::start(&there));
    assert_eq!(a.ask("try f w 0 10"), "ok");
    c.send("wait f w 0 1");
    assert_eq!(c.answer(A_WHILE), None);
    let old = cluster.primary_of("moved");
    cluster.cli_run(&["dev", "kill", &old]);
    eventually(PATIENCE, || match cluster.primary_of("moved") {
        now if now != old => Ok(()),
        now => Err(format!("still served by {now}")),
    });
    assert_eq!(b.ask("try f r 5 1"), "EAGAIN");
    assert_eq!(b.ask("get f r 5 1"), format!("w 0 10 {}", a.pid()));
    assert_eq!(c.answer(A_WHILE), None, "it waits on");
    assert_eq!(a.ask("write f x"), "ok");
    assert_eq!(a.ask("try f u 0 0"), "ok");
    assert_eq!(c.answer(PATIENCE).unwrap(), "ok");
    assert_eq!(c.ask("try f u 0 0"), "ok");
    assert_eq!(b.ask("try f w 0 0"), "ok");
    drop((a, b, c));
    cluster.assert_clean("moved");
}

/// Two mounts, one of them dead and one of them stopped: both are silent for a minute.
#[test]
#[ignore = "two minutes: make test-long"]
fn a_lock_of_a_mount_that_is_gone_is_free_after_a_while_and_its_holder_is_told() {
    let cluster = Cluster::start(&Options { nodes: 1, ..Options::default() });
    let file = cluster.shard("silent").join("f");
    fs::write(&file, "content").unwrap();
    let (dead, stopped) = (mount_again(&cluster, "dead"), mount_again(&cluster, "stopped"));
    let mut other = Locker::start(&file);
    let mut of_dead = Locker::start(&dead.join("silent/f"));
    assert_eq!(of_dead.ask("try f w 0 1"), "ok");
    let mut of_stopped = Locker::start(&stopped.join("silent/f"));
    assert_eq!(of_stopped.ask("try f w 1 1"), "ok");
    mounted::kill(&dead);
    let daemon = mounted::daemon(&stopped);
    daemon.stop();
    other.send("wait f w 0 2");
    assert_eq!(other.answer(A_WHILE), None, "they may come back");
    assert_eq!(other.answer(LOCK_SILENCE_MAX + PATIENCE).unwrap(), "ok");
    assert_eq!(other.ask("write f theirs"), "ok");
    daemon.signal(rustix::process::Signal::CONT);
    // It believes that it holds the lock.
    assert_eq!(of_stopped.ask("write f mine"), "EIO");
    assert_eq!(of_stopped.ask("try f w 5 1"), "EIO", "until it opens the file anew");
    let mut buffer = [0; 6];
    fs::File::open(&file).unwrap().read_exact_at(&mut buffer, 0).unwrap();
    assert_eq!(&buffer, b"theirs");
    assert_eq!(of_stopped.ask("close f"), "ok");
    assert_eq!(of_stopped.ask(&format!("open f {}", stopped.join("silent/f").display())), "ok");
    assert_eq!((of_stopped.ask("try f w 1 1"), of_stopped.ask("write f x")), ("EAGAIN".into(), "ok".into()));
    drop((other, of_dead, of_stopped));
    cluster.assert_clean("silent");
}

/// Two processes on two mounts change one database, each in transactions of its own.
fn sqlite_from_two_mounts(shard: &str, transactions: u32) {
    let (cluster, second) = shared();
    let folder = cluster.shard(shard);
    let script = r#"
        sqlite3 -bail "$HERE/db" 'pragma journal_mode=delete; create table sum (n integer);
            insert into sum values (0); create table done (who text, i integer, unique (who, i));'
        work() {
            { echo '.timeout 600000'
              for i in $(seq "$N"); do
                  echo "begin immediate; update sum set n = n + 1; insert into done values ('$1', $i); commit;"
              done; } | sqlite3 -bail "$2/db"
        }
        work here "$HERE" & here=$!
        work there "$THERE" & there=$!
        failed=0
        wait "$here" || failed=1
        wait "$there" || failed=1
        test "$failed" = 0
        for folder in "$HERE" "$THERE"; do
            sqlite3 "$folder/db" 'pragma integrity_check; select n from sum; select who, count(*) from done group by who;'
        done
        if test -e "$HERE/db-journal"; then exit 1; fi"#;
    let said = Shell::new(&folder)
        .with("HERE", &folder)
        .with("THERE", second.join(shard))
        .with("N", transactions.to_string())
        .deadline_seconds(7200)
        .run(script);
    let found = format!("ok\n{}\nhere|{transactions}\nthere|{transactions}\n", 2 * transactions);
    assert_eq!(said, format!("delete\n{found}{found}"));
    cluster.assert_clean(shard);
}

#[test]
fn a_database_is_changed_from_two_mounts() {
    sqlite_from_two_mounts("sqlite", 500);
}

#[test]
#[ignore = "long: run by make test-long"]
fn a_database_is_changed_from_two_mounts_for_long() {
    sqlite_from_two_mounts("sqlite-long", 10_000);
}
