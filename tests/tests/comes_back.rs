//! A mount whose daemon dies comes back; one whose nodes are away can be left at any time.

#![allow(clippy::unwrap_used)]

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use shardfs_tests::cluster::{Cluster, Options, eventually};
use shardfs_tests::mounted::{self, CALLS, MOUNT_MAX, Mounted, Waiter, table};

/// What a program may take that is killed, or whose mount is gone: the daemon looks every half second.
const GONE_MAX: Duration = Duration::from_secs(30);
/// A call that is not answered within this is not answered at all.
const SETTLED: Duration = Duration::from_secs(3);
/// Nodes whose answers were waited for give them within this once they are back.
const ANSWERED_MAX: Duration = Duration::from_secs(120);

fn one_node() -> Cluster {
    Cluster::start(&Options { nodes: 1, ..Options::default() })
}

fn freeze(cluster: &Cluster) {
    cluster.freeze("node-1");
}

fn thaw(cluster: &Cluster) {
    cluster.cli_run(&["dev", "start", "node-1"]);
}

/// Kills the daemon and waits until another one serves the mount; how long that took.
fn kill_and_wait(mounted: &Mounted, probe: &Path) -> Duration {
    let dead = mounted.daemon();
    let started = Instant::now();
    dead.signal(Signal::KILL);
    eventually(MOUNT_MAX, || {
        if mounted.daemon().pid == dead.pid {
            return Err("the dead daemon is not reaped".to_owned());
        }
        fs::read(probe).map(drop).map_err(|e| e.to_string())
    });
    let took = started.elapsed();
    eventually(MOUNT_MAX, || mounted.usable());
    took
}

/// Bytes that a shard holds, what was unlinked and is open included.
fn used_bytes(cluster: &Cluster, shard: &str) -> u64 {
    cluster.cli_json(&["shard", "show", shard])["used_bytes"].as_u64().unwrap()
}

#[test]
fn a_daemon_that_is_killed_under_load_comes_back() {
    const KILLS: usize = 4;
    const FILES: usize = 50;
    /// What each program still does once the last daemon is there; none of it may fail.
    const AFTERWARDS: usize = 20;
    let cluster = one_node();
    let folder = cluster.shard("load");
    for n in 0..FILES {
        fs::write(folder.join(format!("f-{n}")), format!("content {n}")).unwrap();
    }
    let mounted = Mounted::start(&cluster, "loaded", &[]);
    let load = mounted.point().join("load");
    let written = Mutex::new(Vec::new());
    let (calm, failures, successes) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    // Works until things are calm, and then some more, without a failure.
    let program = |work: &dyn Fn(usize) -> std::io::Result<()>| {
        let mut left = AFTERWARDS;
        for round in 0.. {
            let strict = calm.load(Ordering::SeqCst);
            match work(round) {
                Ok(()) => successes.fetch_add(1, Ordering::Relaxed),
                Err(error) if strict => panic!("the mount is back, and yet: {error}"),
                Err(_) => failures.fetch_add(1, Ordering::Relaxed),
            };
            left -= usize::from(strict);
            if left == 0 {
                return;
            }
        }
    };
    let reads = |round: usize| {
        let n = round % FILES;
        let content = fs::read(load.join(format!("f-{n}")))?;
        assert_eq!(content, format!("content {n}").into_bytes());
        Ok(())
    };
    let lists = |_| {
        let names = fs::read_dir(&load)?.collect::<std::io::Result<Vec<_>>>()?;
        assert!(names.len() >= FILES, "{} names", names.len());
        Ok(())
    };
    let writes = |round: usize| {
        let name = format!("w-{round}");
        fs::write(load.join(&name), &name)?;
        // From here on it was answered.
        written.lock().unwrap().push(name);
        Ok(())
    };
    let open = File::open(load.join("f-0")).unwrap();
    let mut opened_to_write = File::options().append(true).open(load.join("f-1")).unwrap();
    std::thread::scope(|scope| {
        let programs = [
            scope.spawn(|| program(&reads)),
            scope.spawn(|| program(&lists)),
            scope.spawn(|| program(&writes)),
        ];
        for kill in 1..=KILLS {
            std::thread::sleep(Duration::from_millis(500));
            let took = kill_and_wait(&mounted, &load.join("f-0"));
            println!("kill {kill}: usable again after {} ms", took.as_millis());
            assert!(programs.iter().all(|program| !program.is_finished()));
        }
        calm.store(true, Ordering::SeqCst);
        for program in programs {
            program.join().unwrap_or_else(|reason| std::panic::resume_unwind(reason));
        }
    });
    println!("{successes:?} calls succeeded, {failures:?} failed meanwhile");
    // What was open fails, and does not hang.
    assert!(open.read_at(&mut [0; 8], 0).is_err());
    assert!(opened_to_write.write(b"lost").is_err());
    assert_eq!(fs::read(load.join("f-1")).unwrap(), b"content 1");
    // Whatever was answered is there, from wherever one looks.
    for name in written.into_inner().unwrap() {
        assert_eq!(fs::read_to_string(folder.join(&name)).unwrap(), name);
    }
    assert_eq!(mounted.metric("shardfsd_restarts_total"), Some(KILLS as f64));
    assert_eq!(mounted.table().len(), 1, "one mount, none below it, none above");
    drop((open, opened_to_write));
    drop(mounted);
    cluster.assert_clean("load");
}

#[test]
fn what_a_dead_daemon_held_is_freed_at_once() {
    const HELD: usize = 8 << 20;
    let cluster = one_node();
    cluster.shard("held");
    let mounted = Mounted::start(&cluster, "holder", &[]);
    let path = mounted.point().join("held/k");
    fs::write(&path, vec![7; HELD]).unwrap();
    let file = File::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    assert!(used_bytes(&cluster, "held") >= HELD as u64, "it lives while it is open");
    kill_and_wait(&mounted, &mounted.point().join(".shardfs/README"));
    // By itself the session would end after 300 s.
    eventually(ANSWERED_MAX, || match used_bytes(&cluster, "held") {
        used if used < HELD as u64 => Ok(()),
        used => Err(format!("{used} bytes are held")),
    });
    assert!(file.metadata().is_err());
    drop(file);

    // The next daemon ends also what one left that died before it could end it.
    fs::write(&path, vec![7; HELD]).unwrap();
    let file = File::open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    freeze(&cluster);
    for _ in 0..2 {
        // Nothing there needs a node.
        kill_and_wait(&mounted, &mounted.point().join(".shardfs/README"));
    }
    thaw(&cluster);
    eventually(ANSWERED_MAX, || match used_bytes(&cluster, "held") {
        used if used < HELD as u64 => Ok(()),
        used => Err(format!("{used} bytes are held")),
    });
    drop(file);
    cluster.assert_clean("held");
}

#[test]
fn a_daemon_that_dies_again_and_again_is_given_up() {
    let cluster = one_node();
    let mut mounted = Mounted::start(&cluster, "given-up", &[]);
    let parent = mounted.parent().clone();
    let started = Instant::now();
    let mut kills = 0;
    while parent.is_alive() {
        for daemon in parent.children().iter().filter(|daemon| daemon.is_alive()) {
            daemon.kill();
            kills += 1;
        }
        assert!(started.elapsed() < 2 * MOUNT_MAX, "killed {kills} times: {}", mounted.log());
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!mounted.ended().success());
    println!("given up after {kills} kills, {:.1} s", started.elapsed().as_secs_f64());
    assert!(kills > 3, "{kills}");
    let log = mounted.log();
    assert!(log.contains("times in a row") && log.contains("given up"), "{log}");
}

/// What happens to the mount between the death of a daemon and its parent's notice.
fn meanwhile(mounted: &Mounted, what: impl FnOnce(&Path)) {
    let (parent, daemon) = (mounted.parent(), mounted.daemon());
    parent.stop();
    daemon.signal(Signal::KILL);
    eventually(MOUNT_MAX, || if daemon.is_alive() { Err("it lives".to_owned()) } else { Ok(()) });
    mounted::is_dead(mounted.point());
    what(mounted.point());
    parent.signal(Signal::CONT);
}

#[test]
fn a_mount_that_somebody_took_away_does_not_come_back() {
    let cluster = one_node();
    let mut mounted = Mounted::start(&cluster, "taken-away", &[]);
    meanwhile(&mounted, |point| {
        shardfs_tests::sh(cluster.root(), &format!("umount {}", point.display()));
    });
    assert!(mounted.ended().success());
    drop(mounted);

    // Nor does it touch what is there instead.
    let mut mounted = Mounted::start(&cluster, "replaced", &[]);
    let point = mounted.point().to_owned();
    meanwhile(&mounted, |point| {
        let (folder, point) = (cluster.root(), point.display());
        shardfs_tests::sh(
            folder,
            &format!("umount {point} && mount -t tmpfs none {point} && touch {point}/x"),
        );
    });
    eventually(MOUNT_MAX, || if mounted.parent().is_alive() { Err(mounted.log()) } else { Ok(()) });
    assert!(point.join("x").exists(), "somebody else's mount is left alone");
    shardfs_tests::sh(cluster.root(), &format!("umount {}", point.display()));
    assert!(mounted.ended().success());

    // A lazy unmount is one, too; the daemon serves who is still there.
    let mut mounted = Mounted::start(&cluster, "detached", &[]);
    let inside = File::open(mounted.point().join(".shardfs/README")).unwrap();
    shardfs_tests::sh(cluster.root(), &format!("umount -l {}", mounted.point().display()));
    assert!(inside.read_at(&mut [0; 8], 0).is_ok());
    mounted.daemon().signal(Signal::KILL);
    assert!(mounted.ended().success());
}

#[test]
fn settings_that_are_refused_when_it_dies_end_the_mount() {
    let cluster = one_node();
    let config = cluster.root().join("fsd.yaml");
    fs::write(&config, "threads: 2\n").unwrap();
    let mut mounted = Mounted::start(&cluster, "refused", &["--config", config.to_str().unwrap()]);
    fs::write(&config, "colour: red\n").unwrap();
    mounted.daemon().signal(Signal::KILL);
    assert_eq!(mounted.ended().code(), Some(78));
    let log = mounted.log();
    assert!(log.contains("refused") && log.contains("colour"), "{log}");
}

#[test]
fn a_mount_in_the_background_comes_back_too() {
    let cluster = one_node();
    fs::write(cluster.shard("behind").join("k"), "v").unwrap();
    let point = cluster.scratch("background");
    cluster.cli_run(&["mount", point.to_str().unwrap()]);
    let dead = mounted::daemon(&point);
    let parent = dead.parent().pid;
    let all: Vec<u32> = mounted::processes(&point).iter().map(|p| p.pid).collect();
    assert!(all.len() == 2 && all.contains(&parent), "{parent} is the parent of {}: {all:?}", dead.pid);
    dead.signal(Signal::KILL);
    eventually(MOUNT_MAX, || {
        if mounted::daemon(&point).pid == dead.pid {
            return Err("the dead daemon is not reaped".to_owned());
        }
        let content = fs::read(point.join("behind/k")).map_err(|e| e.to_string())?;
        assert_eq!(content, b"v");
        Ok(())
    });
    assert_eq!(table(&point).len(), 1);
    cluster.cli_run(&["umount", point.to_str().unwrap()]);
    eventually(MOUNT_MAX, || match mounted::processes(&point) {
        left if left.is_empty() => Ok(()),
        left => Err(format!("{left:?}")),
    });
}

#[test]
fn signals_unmount_whoever_of_the_two_gets_them() {
    let cluster = one_node();
    let shard = cluster.shard("signals");
    let not_synced = |mounted: &Mounted, content: &str| {
        fs::write(mounted.point().join("signals/k"), content).unwrap();
    };
    for (name, signal) in [("term", Signal::TERM), ("int", Signal::INT)] {
        let mut mounted = Mounted::start(&cluster, &format!("parent-{name}"), &[]);
        not_synced(&mounted, name);
        mounted.parent().signal(signal);
        assert!(mounted.ended().success(), "{}", mounted.log());
        assert_eq!(fs::read_to_string(shard.join("k")).unwrap(), name);

        let mut mounted = Mounted::start(&cluster, &format!("daemon-{name}"), &[]);
        mounted.daemon().signal(signal);
        assert!(mounted.ended().success(), "{}", mounted.log());
    }
    // A daemon whose parent is gone would not be started again: it unmounts.
    let mut mounted = Mounted::start(&cluster, "orphan", &[]);
    not_synced(&mounted, "orphan");
    let daemon = mounted.daemon();
    mounted.parent().kill();
    eventually(MOUNT_MAX, || match (daemon.is_alive(), mounted.table()) {
        (false, table) if table.is_empty() => Ok(()),
        state => Err(format!("{state:?}")),
    });
    assert!(!mounted.ended().success());
    assert_eq!(fs::read_to_string(shard.join("k")).unwrap(), "orphan");
    // Without one it is as it was.
    let mut mounted = Mounted::start(&cluster, "alone", &["--no-restart"]);
    assert!(mounted.parent().children().is_empty());
    mounted.parent().signal(Signal::TERM);
    assert!(mounted.ended().success());
}

/// A file for each call that a [`Waiter`] makes, and a program at each.
fn waiters(cluster: &Cluster, mounted: &Mounted, shard: &str) -> Vec<Waiter> {
    let folder = cluster.shard(shard);
    CALLS
        .map(|what| {
            // Of its own: in the kernel, programs wait for one another's changes of a file.
            let own = folder.join(what);
            fs::create_dir(&own).unwrap();
            fs::write(own.join("k"), "content").unwrap();
            let own = mounted.point().join(shard).join(what);
            Waiter::start(what, &if what == "readdir" { own } else { own.join("k") })
        })
        .into()
}

fn go(waiters: &mut [Waiter]) {
    waiters.iter_mut().for_each(Waiter::go);
    waiters.iter_mut().for_each(Waiter::calls);
    std::thread::sleep(SETTLED);
    for waiter in waiters {
        assert!(waiter.waits(), "{} has not waited", waiter.what());
    }
}

#[test]
fn who_waits_on_a_hard_mount_can_be_killed_or_goes_on() {
    let cluster = one_node();
    let hard = Mounted::start(&cluster, "hard", &["-o", "hard"]);
    let soft = Mounted::start(&cluster, "soft", &["-o", "soft=2"]);
    let mut killed = waiters(&cluster, &hard, "killed");
    let mut patient = waiters(&cluster, &hard, "patient");
    let mut failing = waiters(&cluster, &soft, "failing");
    freeze(&cluster);
    go(&mut killed);
    go(&mut patient);
    failing.iter_mut().for_each(Waiter::go);
    for waiter in &mut failing {
        let outcome = waiter.outcome(ANSWERED_MAX);
        assert_eq!(outcome, libc::EIO, "soft: {}", waiter.what());
    }
    for waiter in &mut killed {
        assert!(waiter.waits(), "hard: {}", waiter.what());
        let took = waiter.kill(GONE_MAX);
        println!("{}: gone {} ms after SIGKILL", waiter.what(), took.as_millis());
    }
    for waiter in &mut patient {
        assert!(waiter.waits(), "hard: {}", waiter.what());
    }
    thaw(&cluster);
    for waiter in &mut patient {
        assert_eq!(waiter.outcome(ANSWERED_MAX), 0, "hard: {}", waiter.what());
    }
    for mounted in [&hard, &soft] {
        eventually(ANSWERED_MAX, || {
            fs::write(mounted.point().join("killed/after"), "v").map_err(|e| e.to_string())
        });
    }
    drop((hard, soft));
    cluster.assert_clean("killed");
}

/// Runs a program that must end; whether it succeeds is another matter.
fn must_return(program: &str, arguments: &[&str]) {
    let mut child = Command::new(program).args(arguments).spawn().unwrap();
    let ended = mounted::within(&mut child, GONE_MAX);
    assert!(ended.is_some(), "{program} {arguments:?} hangs");
    println!("{program} {arguments:?}: {}", ended.unwrap());
}

#[test]
fn a_mount_whose_nodes_are_away_can_be_unmounted_and_aborted() {
    let cluster = one_node();
    let [mut forced, mut lazy, mut aborted] =
        ["forced", "lazy", "aborted"].map(|name| Mounted::start(&cluster, name, &["-o", "hard"]));
    let mut of_forced = waiters(&cluster, &forced, "of-forced");
    let mut of_lazy = waiters(&cluster, &lazy, "of-lazy");
    let mut of_aborted = waiters(&cluster, &aborted, "of-aborted");
    let control = cluster.scratch("fusectl");
    shardfs_tests::sh(cluster.root(), &format!("mount -t fusectl none {}", control.display()));
    freeze(&cluster);
    go(&mut of_forced);
    go(&mut of_lazy);
    go(&mut of_aborted);

    must_return("umount", &["-f", forced.point().to_str().unwrap()]);
    for waiter in &mut of_forced {
        assert_ne!(waiter.outcome(GONE_MAX), 0, "umount -f: {}", waiter.what());
    }
    assert!(forced.ended().success(), "{}", forced.log());

    must_return("umount", &["-l", lazy.point().to_str().unwrap()]);
    assert_eq!(lazy.table(), []);
    for waiter in &mut of_lazy {
        assert!(waiter.waits(), "umount -l takes nothing from those who are there: {}", waiter.what());
    }

    fs::write(control.join(aborted.connection().to_string()).join("abort"), "1").unwrap();
    for waiter in &mut of_aborted {
        assert_ne!(waiter.outcome(GONE_MAX), 0, "abort: {}", waiter.what());
    }
    assert!(aborted.ended().success(), "{}", aborted.log());

    shardfs_tests::sh(cluster.root(), &format!("umount {}", control.display()));
    thaw(&cluster);
    for waiter in &mut of_lazy {
        assert_eq!(waiter.outcome(ANSWERED_MAX), 0, "after umount -l: {}", waiter.what());
    }
    assert!(lazy.ended().success(), "{}", lazy.log());
    let again = Mounted::start(&cluster, "forced", &[]);
    assert_eq!(fs::read(again.point().join("of-forced/read/k")).unwrap(), b"content");
    fs::write(again.point().join("of-forced/new"), "v").unwrap();
}

#[test]
fn a_mount_whose_nodes_are_away_comes_back_and_waits_for_them() {
    let cluster = one_node();
    fs::write(cluster.shard("later").join("k"), "v").unwrap();
    let mut mounted = Mounted::start(&cluster, "nodes-away", &["-o", "hard"]);
    freeze(&cluster);
    kill_and_wait(&mounted, &mounted.point().join(".shardfs/README"));
    let path = mounted.point().join("later/k");
    let reader = std::thread::spawn(move || fs::read(path));
    std::thread::sleep(SETTLED);
    assert!(!reader.is_finished(), "it waits for the nodes");
    thaw(&cluster);
    assert_eq!(reader.join().unwrap().unwrap(), b"v");
    // Asked to end, it does not wait for them.
    freeze(&cluster);
    mounted.parent().signal(Signal::TERM);
    assert!(mounted.ended().success(), "{}", mounted.log());
    thaw(&cluster);
}
