//! Access control lists and extended attributes on a mount: every script runs there and on an ext4, and both have to
//! tell the same.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use shardfs_tests::cluster::{Options, eventually};
use shardfs_tests::disk::Ext4;
use shardfs_tests::{Cluster, Shell};

/// A volume is served elsewhere within this, on a busy machine.
const MOVED_MAX: Duration = Duration::from_secs(30);
const EXT4_BYTES: u64 = 64 << 20;

/// What scripts have at hand: `state FOLDER` tells of everything below a folder all that is compared; `as UID COMMAND` runs a
/// program as a user without groups, `in_group UID GID COMMAND` as one with another group, `try COMMAND` tells how it ended.
/// All output is compared, the words of errors too.
const PRELUDE: &str = r#"
exec 2>&1
umask 022
state() {
    (
        cd "$1"
        find . | sort | xargs -d '\n' stat -c '%a %u %g %F %h %n'
        find . ! -type l | sort | getfacl -n -
        find . ! -type l | sort | xargs -d '\n' getfattr -d -m - -e hex
    )
}
as() { setpriv --reuid="$1" --regid="$1" --clear-groups "${@:2}"; }
in_group() { setpriv --reuid="$1" --regid="$1" --groups="$2" "${@:3}"; }
try() { local code=0; "$@" || code=$?; echo "$* -> $code"; }
# A capability of a program, as setcap stores it.
capable() { setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 "$1"; }
"#;

/// A folder on the mount and one on an ext4, both empty.
struct Pair {
    mount: PathBuf,
    local: PathBuf,
    _ext4: Ext4,
}

impl Pair {
    fn new(cluster: &Cluster, name: &str) -> Pair {
        let at = cluster.scratch(&format!("{name}-ext4"));
        let ext4 = Ext4::mounted(&cluster.root().join(format!("{name}.img")), &at, EXT4_BYTES);
        let (mount, local) = (cluster.shard(name).join("box"), at.join("box"));
        for folder in [&mount, &local] {
            fs::create_dir(folder).unwrap();
        }
        Pair { mount, local, _ext4: ext4 }
    }

    /// Runs a script in both folders; each must succeed, and both must print the same. What they printed.
    fn same(&self, script: &str) -> String {
        let (there, here) = (run(&self.local, script), run(&self.mount, script));
        assert_same(&there, &here, script);
        here
    }
}

fn run(folder: &Path, script: &str) -> String {
    Shell::new(folder).run(&format!("{PRELUDE}{script}"))
}

/// Shows the first lines that differ.
fn assert_same(ext4: &str, mount: &str, what: &str) {
    if ext4 == mount {
        return;
    }
    let differing: Vec<String> = (0..ext4.lines().count().max(mount.lines().count()))
        .map(|number| (ext4.lines().nth(number), mount.lines().nth(number)))
        .filter(|(there, here)| there != here)
        .take(10)
        .map(|(there, here)| format!("ext4:  {}\nmount: {}", there.unwrap_or("-"), here.unwrap_or("-")))
        .collect();
    panic!("{what}\n-- differs\n{}\n-- on the mount\n{mount}", differing.join("\n"));
}

#[test]
fn setfacl_getfacl_and_chmod() {
    let cluster = Cluster::shared();
    let pair = Pair::new(cluster, "setfacl");
    let told = pair.same(
        "touch f; mkdir d
         setfacl -m u:1001:r,g:1002:rw,u:1003:- f; state .
         setfacl -m m::r f; state .
         for mode in 664 g-w 4711 0 u+rw 2775; do chmod $mode f; getfacl -n f; stat -c %a f; done
         setfacl -x u:1001 f; state .
         setfacl -n -m u:1001:rwx f; state .
         setfacl -d -m u:1001:rwx,g:1002:rx d; setfacl -m d:o::- d; setfacl -m u:1001:x d; state .
         chmod 700 d; state .
         setfacl -k d; setfacl -b f; state .
         # What permission bits say leaves no list.
         setfacl --set u::rw,g::r,o::- f; state .; setfacl -m m::rw f; state .; setfacl -x m f; state .
         setfacl -m u:1001:rw f; setfattr -x system.posix_acl_access f; state .
         try setfattr -x system.posix_acl_access f; try setfattr -x system.posix_acl_default d
         try setfacl -d -m u:1001:r f
         ln -s f l; mkfifo p; mknod n c 1 3; ln f f2
         setfacl -m u:1001:rw l; setfacl -m u:1001:rw p n; state .
         try setfattr -h -n system.posix_acl_access -v 0x02000000 l
         for i in $(seq 2000 2100); do setfacl -m u:$i:r f; done; getfacl -n f2 | sort | md5sum; stat -c %a f
         getfacl -R -n d >backup; setfacl -b d; setfacl --restore=backup; state d",
    );
    assert!(told.contains("user:1001:rw-") && told.contains("default:group:1002:r-x"), "{told}");
    cluster.assert_clean("setfacl");
}

/// A list that the kernel is given as bytes.
#[test]
fn lists_and_attributes_are_refused_with_the_same_errors() {
    let cluster = Cluster::shared();
    let pair = Pair::new(cluster, "errors");
    let told = pair.same(
        r#"touch f; mkdir d; mkfifo p; ln -s f l; chmod 666 f; chmod 777 d; chmod 666 p
           cat >s.py <<'P'
import errno, os, struct
entry = lambda tag, permissions, who=0xffffffff: struct.pack('<HHI', tag, permissions, who)
head = struct.pack('<I', 2)
ends = entry(4, 4) + entry(16, 4) + entry(32, 0)
access, default = 'system.posix_acl_access', 'system.posix_acl_default'
good = head + entry(1, 6) + entry(2, 4, 1000) + ends
def attempt(what, call):
    try:
        print(what, call())
    except OSError as error:
        print(what, errno.errorcode[error.errno])
for name in (access, default):
    for path in 'f', 'd', 'p':
        for what, value in {
            'good': good, 'version': struct.pack('<I', 1) + good[4:], 'short': b'ab', 'cut': good[:-1], 'empty': head,
            'bare': b'', 'no mask': head + entry(1, 6) + entry(2, 4, 5) + entry(4, 4) + entry(32, 0),
            'order': head + ends + entry(1, 6), 'permission': head + entry(1, 8) + entry(4, 4) + entry(32, 0),
            'twice': head + entry(1, 6) + entry(2, 4, 5) + entry(2, 6, 5) + ends, 'kind': head + entry(3, 6) + ends,
        }.items():
            attempt((name, path, what), lambda: os.setxattr(path, name, value))
            attempt((name, path, 'now'), lambda: os.getxattr(path, name))
            attempt((name, path, 'now'), lambda: oct(os.stat(path).st_mode))
    attempt((name, 'l'), lambda: os.setxattr('l', name, good, follow_symlinks=False))
    attempt((name, 'l'), lambda: os.getxattr('l', name, follow_symlinks=False))
    attempt((name, 'create'), lambda: os.setxattr('d', name, good, os.XATTR_CREATE))
    attempt((name, 'create again'), lambda: os.setxattr('d', name, good, os.XATTR_CREATE))
for name in ('user.', 'user', 'user.x', 'foo.x', 'system.x', 'trusted.', 'trusted.x', 'security.', 'security.x', '',
             'user.' + 'x' * 250, 'user.' + 'x' * 251):
    for path in 'f', 'd', 'p', 'l':
        for what, call in {
            'replace': lambda: os.setxattr(path, name, b'v', os.XATTR_REPLACE, follow_symlinks=False),
            'create': lambda: os.setxattr(path, name, b'v', os.XATTR_CREATE, follow_symlinks=False),
            'create again': lambda: os.setxattr(path, name, b'v', os.XATTR_CREATE, follow_symlinks=False),
            'get': lambda: os.getxattr(path, name, follow_symlinks=False),
            'list': lambda: sorted(os.listxattr(path, follow_symlinks=False)),
            'remove': lambda: os.removexattr(path, name, follow_symlinks=False),
            'remove again': lambda: os.removexattr(path, name, follow_symlinks=False),
        }.items():
            attempt((name[:20], path, what), call)
attempt('too large', lambda: os.setxattr('f', 'user.big', b'v' * 65537))
P
           python3 s.py
           echo as another; as 1001 /usr/bin/python3 s.py; rm s.py; state ."#,
    );
    for number in ["NOTSUP", "EINVAL", "EACCES", "EPERM", "ENODATA", "EEXIST", "ERANGE", "E2BIG"] {
        assert!(told.contains(number), "{number} never came: {told}");
    }
}

#[test]
fn default_lists_umask_and_set_group_id() {
    let cluster = Cluster::shared();
    let pair = Pair::new(cluster, "inherit");
    let told = pair.same(
        r#"chmod 777 .
           make() {
               touch $1/f; : >$1/redirected; mkdir $1/d; mkdir -m 700 $1/d700; mkdir -p $1/p/q/r; mkfifo $1/fifo
               mknod $1/node c 1 3 || true; ln -s f $1/link; ln $1/f $1/hard; cp /etc/passwd $1/copy
               install -m 751 /etc/passwd $1/installed; touch $1/d/f $1/p/q/r/f
               python3 -c "
import os, socket
for mode in 0o000, 0o600, 0o640, 0o666, 0o777, 0o7777:
    os.close(os.open('$1/open-%o' % mode, os.O_CREAT | os.O_EXCL, mode))
    os.mkdir('$1/mkdir-%o' % mode, mode)
os.mkfifo('$1/mkfifo', 0o623)
socket.socket(socket.AF_UNIX).bind('$1/socket')"
           }
           mkdir plain default minimal setgid deny
           setfacl -d -m u:1001:rwx,g:1002:rx,o::- default
           setfacl -d --set u::rwx,g::rwx,o::- minimal
           chgrp 1003 setgid; chmod 2775 setgid; setfacl -d -m u:1001:rw,m::rw setgid
           setfacl -d --set u::-,u:1001:rw,g::-,m::-,o::- deny
           chmod 2777 plain default minimal setgid deny
           for umask in 000 022 077 777; do
               for folder in plain default minimal setgid deny; do
                   umask 000; mkdir -m 2777 $folder/$umask $folder/$umask/1001
                   chmod 2777 $folder/$umask $folder/$umask/1001
                   umask $umask; make $folder/$umask
                   (cd $folder/$umask; as 1001 bash -c "umask $umask; $(declare -f make); make 1001") || true
               done
           done
           umask 022; state ."#,
    );
    assert!(told.contains("default:user:1001:rwx") && told.contains("user:1001:rw-"), "{told}");
    cluster.assert_clean("inherit");
}

const TREE: &str = r#"
mkdir -p src/a/b src/c
echo 1 >src/a/f; echo 2 >src/a/b/g; ln -s ../f src/a/b/link; ln src/a/f src/c/hard; touch src/c/program
setfacl -m u:1001:rw,g:1002:r src/a/f; setfacl -m u:1003:rwx,m::rx src/a; setfacl -d -m u:1004:rwx,o::- src/a/b
setfacl -m u:1001:- src/a/b/g; setfacl -d -m g:1002:rwx src/c
setfattr -n user.colour -v red src/a/f; setfattr -n user.empty src/a; setfattr -n trusted.t -v x src/a/b/g
setfattr -h -n trusted.l -v y src/a/b/link; setfattr -n security.x -v z src/c
chown 1001:1002 src/a/b/g src/c; chmod 4755 src/c/program; capable src/c/program; chmod 2770 src/c
"#;

#[test]
fn copies_carry_everything() {
    let cluster = Cluster::shared();
    let pair = Pair::new(cluster, "copies");
    let told = pair.same(&format!(
        "{TREE}
         state src >state; cat state
         same() {{ state $1 | diff state -; echo $1 is the same; }}
         cp -a src cp; same cp
         rsync -aHAX src/ rsync; same rsync; rsync -aHAXi src/ rsync | grep -v '^\\.d\\.\\.t' || true
         tar --xattrs --xattrs-include='*' --acls -cf src.tar src; mkdir tar
         tar --xattrs --xattrs-include='*' --acls --same-owner -xpf src.tar -C tar; same tar/src
         setfacl -m u:1009:r cp/a/f; rsync -aHAX src/ cp; same cp
         mv cp moved; same moved"
    ));
    for copy in ["cp", "rsync", "tar/src", "moved"] {
        assert!(told.contains(&format!("{copy} is the same")), "{told}");
    }
    // From the one to the other and back.
    let across = |script: &str| {
        Shell::new(cluster.root())
            .with("MOUNT", &pair.mount)
            .with("LOCAL", &pair.local)
            .run(&format!("{PRELUDE}{script}"))
    };
    across(
        r#"state $LOCAL/src >state
           for to in $MOUNT $LOCAL; do
               [ $to = $MOUNT ] && from=$LOCAL || from=$MOUNT
               cp -a $from/src $to/across-cp; state $to/across-cp | diff state -
               rsync -aHAX $from/src/ $to/across-rsync; state $to/across-rsync | diff state -
               mkdir $to/across-tar
               tar --xattrs --xattrs-include='*' --acls -C $from -c src |
                   tar --xattrs --xattrs-include='*' --acls --same-owner -xp -C $to/across-tar
               state $to/across-tar/src | diff state -
           done"#,
    );
    // A snapshot and a clone have what the shard had.
    cluster.cli_run(&["shard", "snapshot", "copies", "then"]);
    cluster.cli_run(&["shard", "clone", "copies/.snap/then", "copies-again"]);
    across("setfacl -R -b $MOUNT/src; state $MOUNT/src >changed; if diff -q state changed; then exit 1; fi");
    across(
        "mount=${MOUNT%/copies/box}
         state $mount/copies/.snap/then/box/src | diff state -; state $mount/copies-again/box/src | diff state -",
    );
    for shard in ["copies", "copies-again"] {
        cluster.assert_clean(shard);
    }
}

#[test]
fn lists_are_enforced() {
    let cluster = Cluster::shared();
    let pair = Pair::new(cluster, "enforced");
    let told = pair.same(
        r#"echo secret >f; chmod 600 f; mkdir d; echo inside >d/f; chmod 700 d
           try as 1001 cat f; setfacl -m u:1001:r f; try as 1001 cat f; try as 1002 cat f; try as 1001 bash -c 'echo >>f'
           setfacl -m m::- f; try as 1001 cat f; setfacl -m m::rw f; try as 1001 cat f
           chmod g-r f; try as 1001 cat f; chmod g+r f; try as 1001 cat f
           # One that is named is not one of the others.
           chmod 644 f; setfacl -m g::r,u:1001:- f; try as 1001 cat f; try as 1002 cat f
           # Unless the group's bits are none: Linux looks at no list then.
           setfacl -m g::- f; try as 1001 cat f
           # A named group, and the owning group under the mask.
           setfacl -b f; chmod 600 f; setfacl -m g:1005:rw f; try as 1002 cat f; try in_group 1002 1005 cat f
           try in_group 1002 1005 bash -c 'echo more >>f'; chgrp 1006 f; setfacl -m g::rw,m::r f
           try in_group 1002 1006 cat f; try in_group 1002 1006 bash -c 'echo more >>f'
           # The owner is the owner, root is root.
           chown 1001 f; setfacl -m u::-,u:1001:rw f; try as 1001 cat f; try cat f
           # Directories: search without reading, and writing.
           try as 1001 cat d/f; setfacl -m u:1001:x d; try as 1001 cat d/f; try as 1001 ls d; try as 1001 touch d/new
           setfacl -m u:1001:rwx d; try as 1001 ls d; try as 1001 touch d/new; try as 1002 ls d
           try as 1001 mv d/f d/g; try as 1001 rm -f d/g; try as 1001 mkdir -p d/x/y; try as 1001 test -w d
           (cd d; try as 1001 touch within; setfacl -m u:1001:rx .; try as 1001 touch within2; try as 1001 ls)
           # Who may change a list.
           touch theirs; chown 1001:1001 theirs; try as 1002 setfacl -m u:1002:rw theirs; try as 1002 setfacl -b theirs
           try as 1001 setfacl -m u:1002:rw theirs; try as 1002 bash -c 'echo x >>theirs'; try as 1002 chmod 777 theirs
           try as 1001 setfacl -x u:1002 theirs; try as 1002 bash -c 'echo x >>theirs'
           # execve
           cp /bin/true program; chmod 700 program; try as 1001 ./program; setfacl -m u:1001:x program
           try as 1001 ./program
           # What a default gives.
           mkdir shared; chmod 700 shared; setfacl -m u:1001:rwx,d:u:1001:rwx,d:o::- shared; umask 077
           echo for both >shared/f; mkdir shared/d; try as 1001 cat shared/f; try as 1001 touch shared/d/x
           try as 1002 cat shared/f; umask 022; state ."#,
    );
    assert!(told.contains("secret") && told.contains("Permission denied"), "{told}");
    cluster.assert_clean("enforced");
}

#[test]
fn set_id_bits_and_capabilities_go_when_they_must() {
    let cluster = Cluster::shared();
    let pair = Pair::new(cluster, "setid");
    pair.same(
        r#"chmod 777 .
           fresh() { rm -f f; echo content >f; chown 1001:${2-1005} f; setfacl -m u:1002:rwx f; chmod $1 f; }
           see() { echo "$1: $(stat -c '%a %u %g' f) $(getfattr -d -m security -e hex f | grep -c ^sec || true)"; }
           # Without execution by the group a set-group-id bit stays on the mount, which FUSE says.
           for mode in 6777 2777 4777; do
               fresh $mode; see fresh
               fresh $mode; as 1002 bash -c 'echo >>f'; see append; fresh $mode; echo >>f; see root-appends
               fresh $mode; as 1002 bash -c ': >f'; see truncate; fresh $mode; : >f; see root-truncates
               fresh $mode; as 1002 truncate -s 3 f; see shorten; fresh $mode; truncate -s 3 f; see root-shortens
               fresh $mode; chown 1003 f; see chown; fresh $mode; chgrp 1006 f; see chgrp
               fresh $mode; in_group 1001 1006 chgrp 1006 f; see owner-chgrp
               fresh $mode; chmod g-x f; see chmod
           done
           # Whoever is not in the file's group cannot keep its set-group-id bit, by chmod or by a list.
           for mode in 6777 6767 2777 4777; do
               fresh $mode; as 1001 chmod $mode f; see owner-chmod
               fresh $mode; in_group 1001 1005 chmod $mode f; see group-chmod
               fresh $mode; as 1001 setfacl -m u:1003:rx f; see owner-setfacl
               fresh $mode; in_group 1001 1005 setfacl -m u:1003:rx f; see group-setfacl
               fresh $mode 1001; as 1001 setfacl -m u:1003:rx f; see own-group-setfacl
               fresh $mode; setfacl -m u:1003:rx f; see root-setfacl
               fresh $mode
               setpriv --bounding-set=-fsetid --inh-caps=-fsetid setfacl -m u:1003:rx f; see root-without-fsetid
               fresh $mode
               setpriv --reuid=1001 --regid=1001 --clear-groups --inh-caps=+fsetid --ambient-caps=+fsetid \
                   setfacl -m u:1003:rx f; see owner-with-fsetid
               rm -rf d; mkdir d; chown 1001:1005 d; chmod $mode d; as 1001 setfacl -m u:1003:rx d; stat -c %a d
           done
           armed() { fresh 755; setfacl -m u:1002:rwx f; capable f; }
           armed; see armed; armed; as 1002 bash -c 'echo >>f'; see append; armed; echo >>f; see root-appends
           armed; as 1002 bash -c ': >f'; see truncate; armed; : >f; see root-truncates
           armed; as 1002 truncate -s 3 f; see shorten; armed; truncate -s 3 f; see root-shortens
           armed; chown 1001 f; see chown; armed; chgrp 1006 f; see chgrp; armed; chmod 700 f; see chmod
           armed; fallocate -l 100 f; see fallocate; armed; setfacl -m u:1009:r f; see setfacl
           armed; touch -d @1 f; see touch; armed; mv f g; mv g f; see rename"#,
    );
}

#[test]
fn names_in_trusted_are_for_whoever_may_read_them() {
    let cluster = Cluster::shared();
    let pair = Pair::new(cluster, "trusted");
    let told = pair.same(
        r#"touch f; chmod 666 f; setfattr -n trusted.t -v x f; setfattr -n user.u -v y f; chown 1001 f
           list() { "$@" getfattr -d -m - f; "$@" getfattr -n trusted.t f || echo none; }
           echo root; list env; echo user; list as 1001; echo owner again; list in_group 1001 0
           echo root without; list setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin
           echo user with
           list setpriv --reuid=1001 --regid=1001 --clear-groups --inh-caps=+sys_admin --ambient-caps=+sys_admin
           echo root of a namespace; list unshare --user --map-root-user || true"#,
    );
    assert_eq!(told.matches("trusted.t=\"x\"").count(), 4, "twice for each who may: {told}");
}

/// A list that is set through one mount is seen and enforced on another at once.
#[test]
fn another_mount_sees_a_list_at_once() {
    let cluster = Cluster::shared();
    let here = cluster.shard("two-mounts");
    let point = cluster.scratch("other-mount");
    cluster.cli_run(&["mount", point.to_str().unwrap()]);
    let there = point.join("two-mounts");
    let shell = Shell::new(cluster.root()).with("HERE", &here).with("THERE", &there).deadline_seconds(300);
    let told = shell.run(&format!(
        r#"{PRELUDE}
           mkdir $HERE/d; echo secret >$HERE/d/f; chmod 700 $HERE/d; chmod 600 $HERE/d/f
           may() {{ as 1001 cat $THERE/d/f >/dev/null 2>&1; }}
           may_not() {{ if may; then echo "round $round: allowed"; exit 1; fi; }}
           # The kernel of the other mount knows both inodes, and what it was told of them.
           for round in $(seq 20); do
               may_not; setfacl -m u:1001:x $HERE/d
               may_not; setfacl -m u:1001:r $HERE/d/f
               may; diff <(cd $HERE; getfacl -nR d) <(cd $THERE; getfacl -nR d)
               setfacl -m m::- $HERE/d/f
               may_not; chmod g+r $HERE/d/f
               may; setfacl -b $HERE/d/f
               may_not; setfacl -m u:1001:r $HERE/d/f
               may; setfacl -x u:1001 $HERE/d
               may_not; setfacl -b $HERE/d $HERE/d/f
           done
           # Made there under a default that was set here.
           setfacl -d -m u:1001:rw $HERE/d; (umask 077; echo new >$THERE/d/new); getfacl -n $THERE/d/new | grep ^user:1001
           # One who stays within a directory, by a descriptor that was opened before: attributes hold for a tick there.
           chmod 755 $HERE/d; chmod 644 $HERE/d/f; exec 5<$THERE/d
           within() {{ as 1001 cat /proc/self/fd/5/f >/dev/null 2>&1; }}
           within; setfacl -m u:1001:- $HERE/d
           for try in $(seq 100); do within || break; sleep 0.1; done
           if within; then echo "still allowed within"; exit 1; fi
           exec 5<&-"#
    ));
    assert!(told.contains("user:1001:rw-"), "{told}");
    Shell::new("/").with("POINT", &point).run("umount $POINT");
    cluster.assert_clean("two-mounts");
}

#[test]
fn lists_survive_a_failover() {
    let cluster = Cluster::start(&Options::default());
    let folder = cluster.shard("moves");
    let before =
        run(&folder, &format!("{TREE}\nchmod 755 . src src/a; setfacl -m u:1008:- src/a/f; state ."));
    let primary = cluster.primary_of("moves");
    cluster.cli_run(&["dev", "kill", &primary]);
    eventually(MOVED_MAX, || match cluster.primary_of("moves") {
        now if now != primary => Ok(()),
        now => Err(format!("still served by {now}")),
    });
    assert_same(&before, &run(&folder, "state ."), "after the failover");
    let told = run(
        &folder,
        "try as 1001 cat src/a/f; try as 1008 cat src/a/f; setfacl -m u:1005:rwx,m::rwx src/a
         try as 1005 touch src/a/new; getfacl -n src/a",
    );
    assert!(told.contains("as 1001 cat src/a/f -> 0") && told.contains("as 1008 cat src/a/f -> 1"), "{told}");
    assert!(told.contains("touch src/a/new -> 0") && told.contains("user:1005:rwx"), "{told}");
    cluster.assert_clean("moves");
}
