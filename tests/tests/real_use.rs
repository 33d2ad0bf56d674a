//! Ordinary programs on a real mount over loop volumes. What they make on the mount is compared with what
//! they make on the local disk.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use shardfs_tests::{Cluster, Shell, tree};

/// The issue's least size of a tree that must survive `cp -a` and `diff -r`.
const TREE_FILES: usize = 10_000;

/// A shard on the shared cluster's mount, and a folder on the local disk.
fn places(name: &str) -> (PathBuf, PathBuf, Shell) {
    let cluster = Cluster::shared();
    let (mount, local) = (cluster.shard(name), cluster.scratch(&format!("local-{name}")));
    let shell = Shell::new(&local).with("M", &mount).with("L", &local).deadline_seconds(600);
    (mount, local, shell)
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

#[test]
fn cp_a_of_a_big_tree() {
    let (mount, local, shell) = places("cp");
    let made = tree::generate(&local.join("tree"), TREE_FILES, seed());
    println!("{} files, {} bytes", made.files, made.bytes);
    shell.run("cp -a tree $M/\n diff -r --no-dereference tree $M/tree");
    tree::assert_same(&local.join("tree"), &mount.join("tree"));
    // And back.
    shell.run("cp -a $M/tree back");
    tree::assert_same(&local.join("tree"), &local.join("back"));
    let count = |shell: &Shell, place: &str| shell.run(&format!("find {place} -type f -printf x | wc -c"));
    assert_eq!(count(&shell, "tree"), count(&shell, "$M/tree"));
    shell.run("rm -rf $M/tree/d-*\n if ls -d $M/tree/d-* 2>/dev/null; then exit 1; fi");
    Cluster::shared().assert_clean("cp");
}

#[test]
fn tar_out_and_in() {
    let (mount, local, shell) = places("tar");
    tree::generate(&local.join("tree"), 2_000, seed());
    shell.run(
        "tar --format=posix -cf in.tar tree && tar xf in.tar -C $M && diff -r --no-dereference tree $M/tree",
    );
    tree::assert_same(&local.join("tree"), &mount.join("tree"));
    // What tar reads from the mount, it finds equal to the mount, and makes the same tree of.
    shell.run("tar --format=posix -cf out.tar -C $M tree && tar df out.tar -C $M && mkdir back && tar xf out.tar -C back");
    tree::assert_same(&local.join("tree"), &local.join("back/tree"));
    // Hard links are in the archive as links: they were recognised by inode number.
    let links = |file: &str| shell.run(&format!("tar tvf {file} | grep -c ' link to ' || true"));
    assert_eq!(links("in.tar"), links("out.tar"));
    assert_ne!(links("in.tar").trim(), "0");
}

#[test]
fn rsync_twice_moves_nothing_the_second_time() {
    let (_, local, shell) = places("rsync");
    tree::generate(&local.join("tree"), 1_000, seed());
    shell.run("rsync -aHAX --numeric-ids tree/ $M/tree/ && diff -r --no-dereference tree $M/tree");
    let second = shell.run("rsync -aHAX --numeric-ids --itemize-changes --stats tree/ $M/tree/");
    assert!(second.contains("Number of regular files transferred: 0"), "{second}");
    let changed: Vec<&str> = second.lines().take_while(|l| !l.is_empty()).collect();
    assert_eq!(changed, [""; 0], "the second run changes nothing");
    // By content as well.
    assert_eq!(shell.run("rsync -aHAX --numeric-ids --checksum --itemize-changes tree/ $M/tree/"), "");
}

#[test]
fn git_clone_status_fsck() {
    let (_, local, shell) = places("git");
    tree::generate(&local.join("source"), 300, seed());
    let shell = shell.with("HOME", &local).with("GIT_CONFIG_NOSYSTEM", "1");
    shell.run(
        r#"git config --global user.name Test
           git config --global user.email test@example.org
           git config --global init.defaultBranch main
           git config --global --add safe.directory '*'
           cd source
           git init -q
           git add -A
           git commit -q -m first
           for i in $(seq 20); do
               echo "$i" >>log
               git add -A
               git commit -q -m "commit $i"
           done"#,
    );
    shell.run("git clone -q --no-local source $M/clone && git clone -q $M/clone $M/second");
    shell.run(
        r#"cd $M/clone
           test -z "$(git status --porcelain)"
           git fsck --full --strict
           test "$(git rev-parse HEAD)" = "$(git -C $L/source rev-parse HEAD)"
           git checkout -q -b topic HEAD~5
           echo change >>log
           git commit -q -a -m topic
           git checkout -q main
           git merge -q -X ours -m merge topic
           git gc -q
           git fsck --full
           test -z "$(git status --porcelain)"
           git worktree add -q ../worktree topic
           test -z "$(git -C ../worktree status --porcelain)"
           cd ../second
           git pull -q
           git fsck --full"#,
    );
}

#[test]
fn sqlite_in_rollback_and_wal_mode() {
    let (_, _, shell) = places("sqlite");
    for mode in ["delete", "truncate", "persist", "wal"] {
        let rows = shell.clone().with("MODE", mode).run(
            r#"db=$M/$MODE.db
               test "$(sqlite3 $db "PRAGMA journal_mode=$MODE")" = $MODE
               sqlite3 $db 'CREATE TABLE t(id INTEGER PRIMARY KEY, v TEXT); CREATE INDEX i ON t(v);'
               # Two writers at once, each row a transaction of its own.
               write() { for i in $(seq 20); do sqlite3 -cmd '.timeout 60000' $db "INSERT INTO t(v) VALUES('$1-$i')"; done; }
               write a & one=$!; write b & two=$!; wait $one; wait $two
               sqlite3 -cmd '.timeout 60000' $db "BEGIN; INSERT INTO t(v) WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n WHERE x<5000)
                 SELECT hex(randomblob(40)) FROM n; COMMIT;"
               sqlite3 $db "BEGIN; DELETE FROM t; ROLLBACK;"
               test "$(sqlite3 $db 'PRAGMA integrity_check')" = ok
               sqlite3 $db 'SELECT count(*) FROM t'
               sqlite3 $db 'VACUUM'
               test "$(sqlite3 $db 'PRAGMA integrity_check')" = ok"#,
        );
        assert_eq!(rows.trim(), "5040", "{mode}");
    }
}

#[test]
fn editors_save_by_rename() {
    let (mount, _, shell) = places("editor");
    fs::write(mount.join("text"), "first\n").unwrap();
    shell.run(
        r#"cd $M
           chmod 640 text
           # As vim does with 'backupcopy=no': the old file away, a new one in its place.
           for i in $(seq 50); do
               cp -p text text~
               printf 'line %s\n' "$i" >.text.new
               chmod --reference=text .text.new
               mv .text.new text
               rm text~
               test "$(cat text)" = "line $i"
           done
           test "$(stat -c %a text)" = 640
           test "$(ls -A)" = text"#,
    );
    for backup_copy in ["no", "yes"] {
        shell.clone().with("BC", backup_copy).run(
            r#"cd $M
               vim.tiny -Nu NONE -es -c "set backupcopy=$BC backup" -c 'normal ovim was here' -c wq text </dev/null || true
               test "$(tail -n1 text)" = 'vim was here'
               rm -f text~
               printf 'again\n' >text"#,
        );
    }
    shell.run(
        "cd $M
         sed -i 's/again/edited/' text
         test \"$(cat text)\" = edited
         test \"$(ls -A)\" = text",
    );
}

#[test]
fn dd_seek_and_notrunc() {
    let (_, _, shell) = places("dd");
    shell.run(
        r#"both() { for d in $L $M; do (cd $d && eval "$1"); done; cmp $L/f $M/f; test "$(stat -c %s $L/f)" = "$(stat -c %s $M/f)"; }
           head -c 3000000 /dev/urandom >src
           both 'dd if=$L/src of=f bs=64k status=none'
           both 'dd if=$L/src of=f bs=1000 seek=100 count=50 conv=notrunc status=none'
           both 'dd if=$L/src of=f bs=4096 seek=2000 count=1 conv=notrunc status=none'
           both 'dd if=$L/src of=f bs=1 seek=65535 count=2 conv=notrunc status=none'
           both 'dd if=$L/src of=f bs=777 seek=30 count=5 status=none'
           both 'dd if=$L/src of=f bs=512 count=3 oflag=append conv=notrunc status=none'
           both 'dd if=$L/src of=f bs=1M count=2 conv=notrunc,fsync oflag=sync status=none'
           both 'truncate -s 100 f; truncate -s 200000 f'
           both 'dd if=/dev/zero of=f bs=1 count=0 seek=5G status=none; printf end >>f; tail -c3 f | grep -q end; truncate -s 10M f'
           both 'fallocate -l 20M f; fallocate -p -o 100000 -l 300000 f'"#,
    );
}

#[test]
fn find_du_sed_sort() {
    let (_, local, shell) = places("tools");
    tree::generate(&local.join("tree"), 1_000, seed());
    shell.run("cp -a tree $M/");
    for script in [
        "cd $W/tree && find . -type f -size +4k | sort",
        "cd $W/tree && find . -perm -4000 -o -name '.*' -o -newermt 2020-01-01 | sort",
        "cd $W/tree && find . -type f -links +1 | sort",
        "cd $W/tree && du --apparent-size -b -a --exclude='*' . | wc -l",
        "cd $W/tree && find . -type f -print0 | du -b --files0-from=- -c | tail -n1",
        "cd $W/tree && find . -type f -empty -delete && find . | sort",
        "cd $W/tree && { grep -rlU ab . || true; } | sort",
    ] {
        let at = |place: &str| shell.run(&script.replace("$W", place));
        assert_eq!(at("$L"), at("$M"), "{script}");
    }
    assert_ne!(shell.run("du -s $M/tree | cut -f1").trim(), "0", "blocks are counted");
    shell.run(
        r#"awk 'BEGIN { srand(1); for (i = 1; i <= 400000; i++) print int(rand() * 32768), "line", i }' >$M/big
           sort $M/big >$L/want
           sort -S 2M -T $M -o $M/sorted $M/big
           cmp $L/want $M/sorted
           sort -o $M/big $M/big
           cmp $L/want $M/big
           sed -i 's/line/LINE/' $M/big
           sed 's/line/LINE/' $L/want | cmp - $M/big
           test "$(wc -l <$M/big)" = 400000
           split -n 7 $M/big $M/part.
           cat $M/part.* | cmp - $M/big"#,
    );
}

#[test]
fn shared_mappings_write_through() {
    let (mount, local, shell) = places("mmap");
    fs::write(
        local.join("map.py"),
        r#"
import mmap, os, sys, random
path, seed = sys.argv[1], int(sys.argv[2])
random.seed(seed)
size = 3 * 1024 * 1024 + 123
want = bytearray(random.randbytes(size))
with open(path, "wb") as f:
    f.write(want)
fd = os.open(path, os.O_RDWR)
m = mmap.mmap(fd, size)
for _ in range(2000):
    at = random.randrange(size - 300)
    data = random.randbytes(random.randrange(1, 300))
    m[at:at + len(data)] = data
    want[at:at + len(data)] = data
m.flush()
# What a mapping wrote, read(2) sees; what write(2) writes, the mapping sees.
assert os.pread(fd, size, 0) == bytes(want)
os.pwrite(fd, b"written", 70000)
want[70000:70007] = b"written"
assert m[70000:70007] == b"written"
m.close()
os.fsync(fd)
os.close(fd)
with open(path, "rb") as f:
    assert f.read() == bytes(want)
open(path + ".want", "wb").write(want)
"#,
    )
    .unwrap();
    let seed = seed().to_string();
    shell.with("SEED", &seed).run("python3 map.py $M/mapped $SEED && cmp $M/mapped $M/mapped.want");
    // The node has the same bytes as the page cache.
    let stored = local.join("stored");
    Cluster::shared().cli_run(&["get", "mmap/mapped", stored.to_str().unwrap()]);
    assert_eq!(fs::read(stored).unwrap(), fs::read(mount.join("mapped.want")).unwrap());
}

#[test]
fn a_c_project_builds() {
    let (mount, _, shell) = places("c-project");
    let units = 30;
    for unit in 0..units {
        let text = format!("#include \"all.h\"\nint unit_{unit}(int x) {{ return x + {unit}; }}\n");
        fs::write(mount.join(format!("unit_{unit}.c")), text).unwrap();
    }
    let header: String = (0..units).map(|u| format!("int unit_{u}(int);\n")).collect();
    fs::write(mount.join("all.h"), header).unwrap();
    let calls: String = (0..units).map(|u| format!("  x = unit_{u}(x);\n")).collect();
    let main = format!(
        "#include <stdio.h>\n#include \"all.h\"\nint main(void) {{\n  int x = 0;\n{calls}  printf(\"%d\\n\", x);\n  return 0;\n}}\n"
    );
    fs::write(mount.join("main.c"), main).unwrap();
    fs::write(
        mount.join("Makefile"),
        "OBJ := $(patsubst %.c,%.o,$(wildcard *.c))\nprogram: libunits.a main.o\n\t$(CC) -o $@ main.o -L. -lunits\n\
         libunits.a: $(filter unit_%,$(OBJ))\n\tar rcs $@ $^\n%.o: %.c all.h\n\t$(CC) -g -c -o $@ $<\n",
    )
    .unwrap();
    let said = shell.run(
        "cd $M
         make -s -j4
         ./program
         make -q
         touch unit_3.c
         if make -q; then exit 1; fi
         make -s
         ./program",
    );
    assert_eq!(said, "435\n435\n");
}

#[test]
fn a_cargo_project_builds() {
    let (mount, local, shell) = places("cargo");
    fs::create_dir_all(mount.join("hello/src")).unwrap();
    fs::write(
        mount.join("hello/Cargo.toml"),
        "[package]\nname = \"hello\"\nversion = \"0.1.0\"\nedition = \"2021\"\n[workspace]\n",
    )
    .unwrap();
    fs::write(
        mount.join("hello/src/lib.rs"),
        "pub fn two() -> u32 { 2 }\n#[test]\nfn t() { assert_eq!(two(), 2) }\n",
    )
    .unwrap();
    fs::write(mount.join("hello/src/main.rs"), "fn main() { println!(\"{}\", hello::two()) }\n").unwrap();
    // Everything of the build lies on the mount, cargo's locks and incremental state too.
    let said = shell.with("CARGO_TARGET_DIR", mount.join("hello/target")).with("T", &local).run(
        "cd $M/hello && cargo run -q --offline && cargo test -q --offline 2>&1 | grep -c 'test result: ok' \
         && echo '// touched' >>src/lib.rs && cargo build -q --offline && ./target/debug/hello",
    );
    assert!(said.starts_with("2\n") && said.ends_with("2\n"), "{said}");
}

#[test]
fn fio_verifies_what_it_wrote() {
    let (_, _, shell) = places("fio");
    for job in [
        "--rw=randwrite --bs=4k --size=16m",
        "--rw=write --bs=1m --size=64m",
        "--rw=randrw --bsrange=1k-128k --size=16m",
    ] {
        shell.clone().with("JOB", job).run(
            "fio --name=verify --directory=$M $JOB --ioengine=psync --verify=crc32c --verify_fatal=1 --do_verify=1 \
             --end_fsync=1 --output=$L/fio.out && rm -f $M/verify*",
        );
    }
}
