#!/bin/bash
# Boots a systemd of its own, in namespaces of its own, from a Debian 12 root with the packages in it, and lives through what the units
# are for: a cluster of one node as DEPLOYMENT.md sets it up, watchdogs, restarts, reloads, mounts, an end that leaves nothing. As root.
# `boot.sh FOLDER`: where the packages and the root of deb.sh lie.
set -euo pipefail

cd "$(dirname "$0")/../.."
debs=$(realpath "$1")
base=$debs/bookworm-base.tar
[ -f "$base" ] || { echo "boot: there is no $base: deb.sh makes it" >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/var/tmp}/shardfs-boot.XXXXXX")
root=$work/root
. tests/scripts/machine.sh

fail() {
    echo "boot: $*" >&2
    echo "boot: the journal's end:" >&2
    inside journalctl --no-pager -n 60 >&2 || true
    exit 1
}
# The loop devices of the machine's volumes. By inode: their paths are those of the machine.
loops() {
    local image
    for image in "$root"/var/lib/*.img; do
        if [ -e "$image" ]; then losetup -n -O NAME -j "$image"; fi
    done
}
finish() {
    machines_end
    for device in $(loops); do losetup -d "$device"; done
    rm -rf --one-file-system "$work"
}
trap finish EXIT
inside() { machine_in machine "$@"; }
# Until it succeeds, for so many seconds.
eventually_max=60
is() { [ "$(inside systemctl show -P "$2" "$1")" = "$3" ]; }
# What a unit has said, since a moment.
says() { inside journalctl --no-pager -q -o cat -u "$1" | grep "$2" >/dev/null; }

machine_root "$root" "$base"
cp "$debs"/shardfs*.deb "$root/var/tmp/"
machine_chroot "$root" '
    apt-get update -q
    apt-get install -y -q --no-install-recommends systemd systemd-sysv dbus procps etcd-server etcd-client /var/tmp/*.deb
    systemctl disable etcd' >"$debs/boot-install.log" 2>&1 || { tail -20 "$debs/boot-install.log" >&2; exit 1; }
machine_prepare "$root"
# Patience that a test has.
for unit in shardfs-node.service shardfsd@.service; do
    mkdir -p "$root/etc/systemd/system/$unit.d"
    printf '[Service]\nWatchdogSec=4\nTimeoutAbortSec=4\n' >"$root/etc/systemd/system/$unit.d/test.conf"
done

machine_boot machine "$root"
init=${machine_init[machine]}
eventually inside systemctl is-active multi-user.target

# What is installed is in order, as systemd itself reads it.
verified=$(inside systemd-analyze verify --man=no /lib/systemd/system/shardfs-node.service /lib/systemd/system/shardfsd@.service \
    /usr/share/doc/shardfs/examples/mnt-shards.mount 2>&1) || fail "systemd-analyze verify: $verified"
check test -z "$verified"
for unit in shardfs-node.service shardfsd@.service; do
    inside systemd-analyze security --no-pager --offline=true "/lib/systemd/system/$unit" | tail -1
done

# Step 3 of DEPLOYMENT.md, with one node.
inside /usr/lib/shardfs/bootstrap --id node-1 --peers node-1=127.0.0.1 >/dev/null
eventually inside systemctl is-active shardfs-node
check says shardfs-node '"message":"ready"'
eventually is shardfs-node StatusText 'serves 0 volumes, 0 shards open'
# Run again, it changes nothing; what was changed by hand stays.
check test -z "$(inside /usr/lib/shardfs/bootstrap --id node-1 --peers node-1=127.0.0.1 --no-start 2>&1 | grep 'by hand')"
echo 'publish_every: 3' >>"$root/etc/shardfs/node.yaml"
check grep -q 'node.yaml was changed by hand' \
    <(inside /usr/lib/shardfs/bootstrap --id node-1 --peers node-1=127.0.0.1 --no-start 2>&1)

# Steps 4 to 6.
echo 'endpoints: ["http://127.0.0.1:7400"]' >>"$root/etc/shardfs/config.yaml"
echo 'endpoints: ["127.0.0.1:7400"]' >>"$root/etc/shardfs/shardfsd.yaml"
inside shardfs volume add vol-1 --kind loop --source /var/lib/vol-1.img --size 256MiB --nodes node-1
eventually is shardfs-node StatusText 'serves 1 volumes, 0 shards open'
inside mkdir -p /mnt/shards /mnt/fstab
inside systemctl start shardfsd@mnt-shards
check is shardfsd@mnt-shards StatusText 'mounted at /mnt/shards'
inside mkdir /mnt/shards/a
inside sh -c 'echo one >/mnt/shards/a/k'
check test "$(inside shardfs get a/k -)" = one
check inside findmnt -n /var/lib/shardfs/volumes/vol-1
check test -n "$(loops)"

# What bounds them is in force: the filter of system calls, no new privileges, and no other mount namespace than the machine's.
node() { pgrep -P "$(pgrep -P "$init" -x shardfs-node)"; }
daemon() { pgrep -P "$(pgrep -P "$init" -x shardfsd)"; }
for process in "$(node)" "$(daemon)"; do
    check grep -q '^Seccomp:[[:space:]]*2$' "/proc/$process/status"
    check grep -q '^NoNewPrivs:[[:space:]]*1$' "/proc/$process/status"
    check test "$(readlink "/proc/$process/ns/mnt")" = "$(readlink "/proc/$init/ns/mnt")"
done
# CAP_SYS_RESOURCE, which not every container has.
if (((0x$(sed -n 's/^CapBnd:[[:space:]]*//p' /proc/self/status) >> 24) & 1)); then
    check inside shardfs volume grow vol-1 --size 320MiB
else
    echo "boot: NOT TRIED: to enlarge a volume takes CAP_SYS_RESOURCE, which is missing here"
fi

# Settings are read again; bad ones are refused.
inside systemctl reload shardfs-node
eventually says shardfs-node '"message":"the settings are read again","changed":"publish_every"'
check is shardfs-node ActiveState active
cp "$root/etc/shardfs/node.yaml" "$work/node.yaml"
echo 'colour: red' >>"$root/etc/shardfs/node.yaml"
inside systemctl reload shardfs-node
eventually says shardfs-node 'the settings are refused, those of before go on'
check is shardfs-node ActiveState active

# The second process is the node. One that stands still is ended, and started again; so is one that is killed.
cp "$work/node.yaml" "$root/etc/shardfs/node.yaml"
kill -STOP "$(node)"
eventually is shardfs-node NRestarts 1
eventually inside systemctl is-active shardfs-node
check says shardfs-node 'Watchdog timeout'
check test "$(inside cat /mnt/shards/a/k)" = one
kill -KILL "$(node)"
eventually is shardfs-node NRestarts 2
eventually inside systemctl is-active shardfs-node
check says shardfs-node 'its death is recorded'
check test "$(inside cat /mnt/shards/a/k)" = one
# It gives signs of life: nothing more happens for longer than the manager's patience.
sleep 10
check is shardfs-node NRestarts 2
check is shardfsd@mnt-shards NRestarts 0

# The second process is the daemon. One that is killed is started again by the first; one that stands still takes the first along.
kill -KILL "$(daemon)"
eventually says shardfsd@mnt-shards 'the daemon died: it is started again'
eventually is shardfsd@mnt-shards StatusText 'mounted at /mnt/shards'
check is shardfsd@mnt-shards NRestarts 0
check test "$(inside cat /mnt/shards/a/k)" = one
kill -STOP "$(daemon)"
eventually is shardfsd@mnt-shards NRestarts 1
eventually inside systemctl is-active shardfsd@mnt-shards
check test "$(inside cat /mnt/shards/a/k)" = one
inside systemctl reload shardfsd@mnt-shards
eventually says shardfsd@mnt-shards 'the settings are read again'

# The line of DEPLOYMENT.md for fstab, and the mount unit that is an example.
echo '127.0.0.1:7400 /mnt/fstab fuse.shardfs client_id=default,_netdev,nofail,x-systemd.mount-timeout=60 0 0' >>"$root/etc/fstab"
inside systemctl daemon-reload
inside systemctl start mnt-fstab.mount
check test "$(inside cat /mnt/fstab/a/k)" = one
inside systemctl stop mnt-fstab.mount
inside systemctl stop shardfsd@mnt-shards
check test -z "$(inside ls /mnt/shards)"
sed 's/^What=.*/What=127.0.0.1:7400/' "$root/usr/share/doc/shardfs/examples/mnt-shards.mount" >"$root/etc/systemd/system/mnt-shards.mount"
inside systemctl daemon-reload
inside systemctl start mnt-shards.mount
check test "$(inside cat /mnt/shards/a/k)" = one
inside systemctl stop mnt-shards.mount

# Wrong settings end it for good, with what is wrong in the journal.
inside systemctl restart shardfs-node
eventually inside systemctl is-active shardfs-node
echo 'colour: red' >>"$root/etc/shardfs/node.yaml"
check test "$(inside sh -c 'systemctl restart shardfs-node || echo refused' 2>/dev/null)" = refused
sleep 3
check is shardfs-node ActiveState failed
check is shardfs-node ExecMainStatus 78
check says shardfs-node 'colour'
cp "$work/node.yaml" "$root/etc/shardfs/node.yaml"
inside systemctl start shardfs-node

# An end in order leaves nothing: no mount, no loop device, no socket, no failed unit.
eventually inside shardfs fsck a
inside systemctl stop shardfs-node etcd
check is shardfs-node Result success
check test -z "$(inside findmnt -n -o TARGET -t ext4,fuse.shardfs | grep -v '^/$' || true)"
check test -z "$(loops)"
check test ! -e "$root/run/shardfs/node-1.sock"
failed=$(inside systemctl list-units --failed --no-legend --plain | grep shardfs || true)
check test -z "$failed"

# A removal stops what runs first.
inside systemctl start etcd shardfs-node
inside env DEBIAN_FRONTEND=noninteractive apt-get remove -y -q shardfs shardfs-node >/dev/null 2>&1
check is shardfs-node ActiveState inactive
check test -z "$(pgrep -P "$init" -x shardfs-node || true)"

echo "boot: the units do what they are for under $(chroot "$root" /lib/systemd/systemd --version | head -1)"
echo "$checks passed, 0 failed"
