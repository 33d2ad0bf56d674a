//! Larger programs on a real mount over loop volumes, some of them while the nodes die that serve it. Smaller ones: `real_use`.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use shardfs_tests::cluster::eventually;
use shardfs_tests::disk::Ext4;
use shardfs_tests::postgres::Postgres;
use shardfs_tests::{Cluster, Options, Shell, failovers, tree};

/// The issue's size of a repository; of the short run, which meets a failover as well.
const GIT_FILES: usize = 10_000;
const GIT_FILES_SHORT: usize = 2_000;
/// Programs of pgbench have done something within this.
const BENCH_MAX: Duration = Duration::from_secs(100);
/// Between two failovers.
const KILL_EVERY: Duration = Duration::from_secs(2);
const KILL_EVERY_LONG: Duration = Duration::from_secs(10);

fn on(cluster: &Cluster, name: &str) -> (PathBuf, PathBuf, Shell) {
    let (mount, local) = (cluster.shard(name), cluster.scratch(&format!("local-{name}")));
    let shell =
        Shell::new(&local).with("M", &mount).with("L", &local).with("HOME", &local).deadline_seconds(1200);
    (mount, local, shell)
}

/// A shard on the shared cluster's mount, and a folder on the local disk.
fn places(name: &str) -> (PathBuf, PathBuf, Shell) {
    on(Cluster::shared(), name)
}

/// A seed that a failing run prints; `SHARDFS_TEST_SEED` repeats it.
fn seed() -> u64 {
    let seed = match std::env::var("SHARDFS_TEST_SEED") {
        Ok(seed) => seed.parse().unwrap(),
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_nanos() as u64,
    };
    println!("SHARDFS_TEST_SEED={seed}");
    seed
}

/// Writes a program for the test into its folder.
fn script(folder: &Path, name: &str, text: &str) {
    fs::write(folder.join(name), text).unwrap();
}

/// A local repository of so many files, in a few commits.
fn git_source(local: &Path, shell: &Shell, files: usize) {
    tree::generate(&local.join("source"), files, seed());
    shell.run(
        r#"git config --global user.name Test
           git config --global user.email test@example.org
           git config --global init.defaultBranch main
           git config --global --add safe.directory '*'
           git config --global gc.auto 0
           cd source
           git init -q
           git add -A
           git commit -q -m first
           for i in $(seq 5); do find . -path ./.git -prune -o -name 'file-*'$i'.txt' -exec sh -c 'echo more >>"$1"' - {} \;
               git add -A
           git commit -q -m "commit $i"; done"#,
    );
}

/// Clones, changes and cleans up on the mount; what is checked out is what was committed, byte for byte.
const GIT: &str = r#"
    git clone -q --no-local source $M/clone
    cd $M/clone
           test -z "$(git status --porcelain)"
           git fsck --full --strict
    test "$(git rev-parse HEAD)" = "$(git -C $L/source rev-parse HEAD)"
    git checkout -q -b topic HEAD~3
           find . -name 'file-*7.txt' -not -path './.git/*' -delete
           git commit -q -a -m topic
    git checkout -q main
           git merge -q -X ours -m merge topic
           git repack -q -a -d -f --window=5
           git gc -q --prune=now
    git fsck --full
           test -z "$(git status --porcelain)"
    git checkout -q HEAD~1
           diff -r --exclude=.git $L/source .
           git checkout -q main
    git clone -q --no-hardlinks . ../second
           git -C ../second fsck --full
           git stash list"#;

#[test]
#[ignore = "long: run by make test-long"]
fn git_clones_and_cleans_up_while_primaries_die() {
    let cluster = Cluster::start(&Options::default());
    let (_, local, shell) = on(&cluster, "git");
    git_source(&local, &shell, GIT_FILES_SHORT);
    failovers::under(&cluster, "git", KILL_EVERY, || shell.run(GIT));
    cluster.assert_clean("git");
}

#[test]
#[ignore = "long: run by make test-long"]
fn git_clones_and_cleans_up_many_files() {
    let (_, local, shell) = places("git-many");
    git_source(&local, &shell, GIT_FILES);
    shell.run(GIT);
    Cluster::shared().assert_clean("git-many");
}

#[test]
#[ignore = "long: run by make test-long"]
fn git_clones_and_cleans_up_many_files_while_primaries_die() {
    let cluster = Cluster::start(&Options::default());
    let (_, local, shell) = on(&cluster, "git");
    git_source(&local, &shell, GIT_FILES);
    failovers::under(&cluster, "git", KILL_EVERY_LONG, || shell.run(GIT));
    cluster.assert_clean("git");
}

/// A workspace without dependencies on others: each member uses some of those before it.
fn cargo_workspace(folder: &Path, members: usize) {
    fs::create_dir_all(folder).unwrap();
    fs::write(folder.join("Cargo.toml"), "[workspace]\nmembers = [\"m*\"]\nresolver = \"2\"\n").unwrap();
    for member in 0..members {
        let uses: Vec<usize> = [member / 2, member / 3].into_iter().filter(|used| *used < member).collect();
        let dependencies: String =
            uses.iter().map(|used| format!("m{used} = {{ path = \"../m{used}\" }}\n")).collect();
        let mut lines: Vec<&str> = dependencies.lines().collect();
        lines.dedup();
        let source = folder.join(format!("m{member}/src"));
        fs::create_dir_all(&source).unwrap();
        fs::write(
            folder.join(format!("m{member}/Cargo.toml")),
            format!(
                "[package]\nname = \"m{member}\"\nversion = \"0.1.0\"\nedition = \"2021\"\nbuild = \"build.rs\"\n[dependencies]\n{}\n",
                lines.join("\n")
            ),
        )
        .unwrap();
        // Something that is made in the build, and included.
        fs::write(
            folder.join(format!("m{member}/build.rs")),
            "fn main() {\n    let out = std::env::var(\"OUT_DIR\").unwrap();\n    std::fs::write(format!(\"{out}/one.rs\"), \"1u64\").unwrap();\n}\n",
        )
        .unwrap();
        let sum: String = uses.iter().map(|used| format!(" + m{used}::value()")).collect();
        let one = "include!(concat!(env!(\"OUT_DIR\"), \"/one.rs\"))";
        fs::write(source.join("lib.rs"), format!("pub fn value() -> u64 {{\n    {one}{sum}\n}}\n")).unwrap();
        fs::write(
            source.join("main.rs"),
            format!("fn main() {{\n    println!(\"{{}}\", m{member}::value());\n}}\n"),
        )
        .unwrap();
    }
}

/// What the last member of a workspace of so many prints.
fn cargo_value(member: usize) -> u64 {
    let uses = [member / 2, member / 3];
    1 + uses.into_iter().filter(|used| *used < member).map(cargo_value).sum::<u64>()
}

#[test]
fn a_cargo_workspace_builds_while_primaries_die() {
    const MEMBERS: usize = 10;
    let cluster = Cluster::start(&Options::default());
    let (mount, _, shell) = on(&cluster, "cargo");
    // Where cargo finds its compiler may be said in the real home.
    let shell = shell
        .with("HOME", std::env::var("HOME").unwrap_or_default())
        .with("LAST", format!("m{}", MEMBERS - 1));
    cargo_workspace(&mount.join("w"), MEMBERS);
    let said = failovers::under(&cluster, "cargo", KILL_EVERY, || {
        shell.run(
            "cd $M/w
             export CARGO_TARGET_DIR=$M/w/target
             cargo build -q --offline --workspace -j4
             ./target/debug/$LAST
             # Nothing is built twice: times and fingerprints are what they were.
             test -z \"$(cargo build --offline --workspace 2>&1 | grep -v Finished)\"
             echo '// changed' >>m0/src/lib.rs
             cargo build -q --offline --workspace -j4
             ./target/debug/$LAST",
        )
    });
    let value = cargo_value(MEMBERS - 1);
    assert_eq!(said, format!("{value}\n{value}\n"));
    cluster.assert_clean("cargo");
}

#[test]
#[ignore = "long: run by make test-long"]
fn sqlite_keeps_its_log_under_threads_and_kills() {
    let (_, local, shell) = places("wal");
    script(&local, "wal.py", include_str!("programs/wal.py"));
    println!("{}", shell.run("python3 wal.py $M/test.db 5"));
}

#[test]
#[ignore = "long: run by make test-long"]
fn sqlite_keeps_its_log_under_threads_and_kills_for_long() {
    let (_, local, shell) = places("wal-long");
    script(&local, "wal.py", include_str!("programs/wal.py"));
    println!("{}", shell.run("python3 wal.py $M/test.db 90"));
}

#[test]
#[ignore = "long: run by make test-long"]
fn mail_is_delivered_once() {
    let (_, local, shell) = places("maildir");
    script(&local, "maildir.py", include_str!("programs/maildir.py"));
    assert_eq!(shell.run("python3 maildir.py $M/box 60").trim(), "240");
}

/// pgbench is killed with its server, and recovery has every transaction that was acknowledged; then pgbench goes on, and all indexes and
/// pages are checked.
fn postgres(cluster: &Cluster, name: &str, seconds: u32, under: &dyn Fn(&(dyn Fn() + Sync))) {
    let (mount, local, _) = on(cluster, name);
    let mut postgres = Postgres::create(&mount.join("data"), &local);
    postgres.start();
    let shell = postgres.shell().with("T", seconds.to_string());
    shell.run("$BIN/pgbench -i -s 5 -q 2>&1");
    under(&|| {
        let said = shell.run("$BIN/pgbench -T $T -c 4 -j 2 2>&1");
        println!("{}", said.lines().filter(|line| line.contains("tps")).collect::<String>());
        assert!(said.contains("number of failed transactions: 0 "), "{said}");
    });
    let count = |shell: &Shell| -> u64 {
        shell.run("$BIN/psql -Atc 'SELECT count(*) FROM pgbench_history'").trim().parse().unwrap()
    };
    let before = count(&shell);

    // It dies in the middle of a run.
    let acknowledged = std::thread::scope(|scope| {
        let bench = scope.spawn(|| shell.output("$BIN/pgbench -n -T 120 -c 4 -j 2 2>&1"));
        // Each of its clients was answered by then.
        eventually(BENCH_MAX, || match count(&shell) {
            now if now >= before + 20 => Ok(()),
            now => Err(format!("{} transactions", now - before)),
        });
        postgres.kill();
        let said = String::from_utf8_lossy(&bench.join().unwrap().stdout).into_owned();
        let line = said.lines().find(|line| line.starts_with("number of transactions actually processed: "));
        let number = line.and_then(|line| line.rsplit(' ').next()).unwrap_or_else(|| panic!("{said}"));
        number.parse::<u64>().unwrap()
    });
    assert!(acknowledged > 0);
    postgres.start();
    let after = count(&shell);
    assert!(after >= before + acknowledged, "{before} and {acknowledged} acknowledged, {after} there");

    shell.run("$BIN/pgbench -n -t 100 -c 4 -j 2 2>&1");
    let sums = shell.run(
        "$BIN/psql -Atc 'SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
             (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history)'",
    );
    let sums: Vec<&str> = sums.trim().split('|').collect();
    assert!(sums.len() == 4 && sums.iter().all(|sum| *sum == sums[0]), "{sums:?}");
    shell.run("$BIN/psql -qc 'CREATE EXTENSION amcheck' && $BIN/pg_amcheck --all --install-missing --heapallindexed --rootdescend");
    postgres.stop();
    shell.run("$AS $BIN/pg_checksums --check -D $DATA");
    assert!(!postgres.log().contains("PANIC"), "{}", postgres.log());
    cluster.assert_clean(name);
}

#[test]
#[ignore = "long: run by make test-long"]
fn postgres_recovers_and_its_indexes_are_whole() {
    postgres(Cluster::shared(), "postgres", 10, &|work| work());
}

#[test]
#[ignore = "long: run by make test-long"]
fn postgres_recovers_and_its_indexes_are_whole_for_long() {
    postgres(Cluster::shared(), "postgres-long", 60, &|work| work());
}

#[test]
#[ignore = "long: run by make test-long"]
fn postgres_goes_on_while_primaries_die() {
    let cluster = Cluster::start(&Options::default());
    postgres(&cluster, "postgres", 60, &|work| failovers::under(&cluster, "postgres", KILL_EVERY_LONG, work));
}

#[test]
#[ignore = "long: run by make test-long"]
fn editors_save_by_a_terminal() {
    let (_, local, shell) = places("typed");
    script(&local, "editor.py", include_str!("programs/editor.py"));
    shell.run(
        r#"cd $M
           printf 'first\n' >text
           chmod 640 text
          python3 $L/editor.py nano -B text --keys 'hello ' '\x0f' '\r' '\x18'
          test "$(cat text)" = 'hello first'
           test "$(cat text~)" = first
           rm text~
          # With a swap file beside it, saved twice.
          python3 $L/editor.py vim.tiny -Nu NONE text --keys 'O' 'typed' '\x1b' ':w\r' 'ggdd' 'A' ' again' '\x1b' ':wq\r'
          test "$(cat text)" = 'hello first again'
           test "$(stat -c %a text)" = 640
           test "$(ls -A)" = text"#,
    );
}

#[test]
#[ignore = "long: run by make test-long"]
fn ccache_answers_from_its_cache() {
    let (_, _, shell) = places("ccache");
    shell.with("SOURCE_DATE_EPOCH", "1").run(
        r#"cd $M
           export CCACHE_DIR=$M/cache CCACHE_BASEDIR=$M CCACHE_NOHASHDIR=1
           mkdir src
           for i in $(seq 24); do printf '#include <stdio.h>\nint f_%s(void) { return printf("%s");}\n' $i $i >src/$i.c; done
           build() { mkdir $1; seq 24 | xargs -P 8 -I{} ccache gcc -O1 -c src/{}.c -o $1/{}.o; }
           hits() { ccache --print-stats | awk '$1 == "direct_cache_hit" || $1 == "preprocessed_cache_hit" { n += $2 } END { print n + 0 }'; }
           build one
           test "$(hits)" = 0
           build two
           test "$(hits)" = 24
           diff -r one two
           # Objects that share an inode with the cache.
           CCACHE_HARDLINK=1 CCACHE_NOCOMPRESS=1 build three
           CCACHE_HARDLINK=1 CCACHE_NOCOMPRESS=1 build four
           diff -r one four
           mkdir plain
           for i in $(seq 24); do gcc -O1 -c src/$i.c -o plain/$i.o; done
           diff -r plain one
           ccache -c
           ccache -C"#,
    );
}

#[test]
#[ignore = "long: run by make test-long"]
fn archives_unpack_as_on_a_local_disk() {
    let (mount, local, shell) = places("zip");
    tree::generate(&local.join("tree"), 600, seed());
    // Names that zip takes for its own options are not what is tested.
    shell.run(
        "cd tree
         zip -q -y -r ../in.zip .
         cd ..
         unzip -q in.zip -d out
         unzip -q in.zip -d $M/out
         cd $M/out
         zip -q -y -r $M/again.zip .
         unzip -tq $M/again.zip
         unzip -q $M/again.zip -d $L/back",
    );
    tree::assert_same(&local.join("out"), &mount.join("out"));
    tree::assert_same(&local.join("out"), &local.join("back"));
}

/// An image's layers as `docker save` writes them: devices, whiteouts, capabilities, sparse files, hard links.
#[test]
#[ignore = "long: run by make test-long"]
fn an_image_of_a_system_unpacks_as_on_ext4() {
    let cluster = Cluster::shared();
    let (mount, local, shell) = places("image");
    let ext4 = Ext4::mounted(&local.join("ext4.img"), &cluster.scratch("ext4-image"), 1 << 30);
    tree::generate(&ext4.at().join("tree"), 300, seed());
    let shell = shell.with("E", ext4.at());
    shell.run(
        r#"cd $E/tree
           mkdir dev
           mknod dev/null c 1 3
           mknod dev/sda b 8 0
           mknod dev/large c 4095 1048575
           mkfifo dev/pipe
           chmod 4755 dev/sda
           chown 1234567:7654321 dev/null
           mknod -m 0 .wh.gone c 0 0
           mkdir -m 1777 tmp
           setfattr -n trusted.overlay.opaque -v y tmp
           touch -d @0 tmp
           cp /bin/true ping
           setfattr -n security.capability -v 0x0100000200200000000000000000000000000000 ping
           setfattr -n user.note -v "$(printf 'x%.0s' $(seq 1000))" ping
           truncate -s 3G sparse
           for at in 0 1000000 2147483648 3221225400; do printf data | dd of=sparse bs=1 seek=$at conv=notrunc status=none; done
           truncate -s 10M holes
           ln ping hard
           ln -s /nowhere/at/all dangling
           mkdir -m 000 closed
           long=$(printf 'n%.0s' $(seq 200))
           mkdir -p $long/$long
           echo deep >$long/$long/$long
           cd $E
           tar --format=posix --xattrs --xattrs-include='*' --numeric-owner --sparse -cf image.tar -C tree .
           for at in $E $M; do mkdir $at/out
           tar --xattrs --xattrs-include='*' --numeric-owner --same-owner -xpf image.tar -C $at/out; done
           tar --compare --xattrs --xattrs-include='*' --numeric-owner -f image.tar -C $M/out"#,
    );
    let seen = |at: &str| {
        shell.clone().with("AT", at).run(
            r#"cd $AT/out
           find . -print0 | sort -z | xargs -0 stat -c '%n %F %a %u:%g %t:%T'
               find . -print0 | sort -z | xargs -0 getfattr -h -d -m - -e hex 2>/dev/null"#,
        )
    };
    let (here, there) = (seen(&mount.display().to_string()), seen(&ext4.at().display().to_string()));
    assert_eq!(here, there);
    tree::assert_same(&ext4.at().join("out"), &mount.join("out"));
    // What the mount gives makes the same image again.
    shell.run(
        r#"tar --format=posix --xattrs --xattrs-include='*' --numeric-owner --sparse -cf $E/again.tar -C $M/out .
           tar --compare --xattrs --xattrs-include='*' --numeric-owner -f $E/again.tar -C $E/out"#,
    );
    cluster.assert_clean("image");
}

#[test]
#[ignore = "long: run by make test-long"]
fn a_package_of_debian_unpacks() {
    let (mount, local, shell) = places("dpkg");
    // As the user that apt downloads as, if it can.
    let got = shell.output("chmod 777 . && apt-get download -q coreutils 2>&1");
    if !got.status.success() {
        println!("skipped: apt cannot download here: {}", String::from_utf8_lossy(&got.stdout));
        return;
    }
    shell.run(
        r#"mkdir local
           dpkg -x coreutils_*.deb local
           dpkg -x coreutils_*.deb $M/unpacked
           test "$($M/unpacked/bin/echo unpacked)" = unpacked
           # And as dpkg itself does it, with its database on the mount.
           mkdir -p $M/root/var/lib/dpkg/{info,updates,triggers} $M/root/var/log
           touch $M/root/var/lib/dpkg/{status,available}
           for again in 1 2; do dpkg --root=$M/root --force-all --no-triggers --unpack coreutils_*.deb >dpkg.log 2>&1 || { cat dpkg.log; exit 1; }; done
           dpkg --root=$M/root -s coreutils | grep -q unpacked
           dpkg --root=$M/root --verify coreutils
           dpkg --root=$M/root --force-all --purge coreutils >>dpkg.log 2>&1
           test ! -e $M/root/bin/ls"#,
    );
    tree::assert_same(&local.join("local"), &mount.join("unpacked"));
}

#[test]
#[ignore = "long: run by make test-long"]
fn a_python_environment_is_made() {
    let (_, _, shell) = places("venv");
    let got = shell.output(
        "python3 -m pip download -q --no-deps --disable-pip-version-check -d wheels six==1.16.0 2>&1",
    );
    let online = got.status.success();
    if !online {
        println!("not all is tested: PyPI is not reachable: {}", String::from_utf8_lossy(&got.stdout));
    }
    shell.run(
        r#"python3 -m venv $M/venv
           cd $M
           ./venv/bin/python -c 'import sys; assert sys.prefix != sys.base_prefix'
           ./venv/bin/python -m pip --disable-pip-version-check check
           ./venv/bin/python -m compileall -q -f venv/lib"#,
    );
    if online {
        shell.run(
            r#"cd $M
               pip() { ./venv/bin/python -m pip --disable-pip-version-check "$@"; }
               pip install -q --no-index --find-links $L/wheels six
           test "$(./venv/bin/python -c 'import six; print(six.__version__)')" = 1.16.0
               pip install -q --no-index --find-links $L/wheels --force-reinstall six
           pip check
           pip uninstall -q -y six
               if ./venv/bin/python -c 'import six' 2>/dev/null; then exit 1; fi"#,
        );
    }
}

#[test]
#[ignore = "long: run by make test-long"]
fn npm_installs_a_tree_of_packages() {
    let (_, local, shell) = places("npm");
    script(
        &local,
        "package.json",
        "{ \"name\": \"t\", \"version\": \"1.0.0\", \"dependencies\": { \"eslint\": \"8.57.0\" } }\n",
    );
    let npm = "npm install --no-audit --no-fund --no-update-notifier --ignore-scripts";
    let got = shell
        .output(&format!("mkdir local && cp package.json local && cd local && {npm} --cache $L/cache 2>&1"));
    if !got.status.success() {
        println!("skipped: npm installs nothing here: {}", String::from_utf8_lossy(&got.stdout));
        return;
    }
    // The same, from what was downloaded; npm's own cache lies on the mount as well.
    shell.run(&format!(
        "mkdir $M/p
         cp local/package*.json $M/p
         cp -a cache $M/cache
         cd $M/p
         {npm} --offline --cache $M/cache
         diff -r --no-dereference --exclude=.package-lock.json $L/local/node_modules node_modules
         test $(find node_modules -type f | wc -l) -gt 1000
         printf 'var x = 1;\\n' >x.js
         printf '{{\"root\": true, \"rules\": {{\"no-unused-vars\": 2}}}}' >.eslintrc.json
         if node_modules/.bin/eslint x.js >said; then exit 1; fi
         grep -q no-unused-vars said
         rm -rf node_modules
         npm ci --offline --cache $M/cache --no-audit --no-fund --ignore-scripts
         diff -r --no-dereference --exclude=.package-lock.json $L/local/node_modules node_modules"
    ));
    Cluster::shared().assert_clean("npm");
}
