#!/bin/bash
# Follows DEPLOYMENT.md, "Step by step: machines of your own" and some of "Day two", block by block as they are written there, on three
# machines of their own (machine.sh) with two disks that all of them see. As root. `guide.sh FOLDER`: where the packages and the root of
# deb.sh lie. What differs from the guide is said: these disks have no reservations, so that `volume add` gets --allow-unfenced.
set -euo pipefail

cd "$(dirname "$0")/../.."
debs=$(realpath "$1")
base=$debs/bookworm-base.tar
[ -f "$base" ] || { echo "guide: there is no $base: deb.sh makes it" >&2; exit 1; }

work=$(mktemp -d "${TMPDIR:-/var/tmp}/shardfs-guide.XXXXXX")
. tests/scripts/machine.sh
switch=

fail() {
    echo "guide: $*" >&2
    for node in "${!machine_init[@]}"; do
        echo "guide: $node's journal's end:" >&2
        machine_in "$node" journalctl --no-pager -n 25 >&2 || true
    done
    exit 1
}
finish() {
    machines_end
    if [ -n "$switch" ]; then kill "$switch" 2>/dev/null || true; wait "$switch" 2>/dev/null || true; fi
    for disk in "$work"/disk.*; do
        if [ -e "$disk" ]; then
            for device in $(losetup -n -O NAME -j "$disk"); do losetup -d "$device"; done
        fi
    done
    rm -rf --one-file-system "$work"
}
trap finish EXIT
# Until it succeeds, for so many seconds.
eventually_max=120

# block TITLE N: the block number N below the line of DEPLOYMENT.md that begins with **TITLE.
block() {
    awk -v title="**$1" -v number="$2" '
        index($0, "**") == 1 { below = index($0, title) == 1; if (below) blocks = 0; next }
        /^## / { below = 0 }
        /^```/ { inside = !inside; if (inside && below) blocks++; next }
        inside && below && blocks == number { found = 1; print }
        END { exit !found }' DEPLOYMENT.md
}
# follow MACHINE TITLE N [SED]: runs that block on the machine, as it is written but for SED.
follow() {
    local text
    text=$(block "$2" "$3") || fail "DEPLOYMENT.md has no block $3 below $2 any more"
    text=$(sed "${4-}" <<<"$text")
    echo "guide: $1: $2"
    sed 's/^/    $ /' <<<"$text"
    checks=$((checks + 1))
    machine_in "$1" bash -ec "cd /root; $text" >"$work/said" 2>&1 || { cat "$work/said" >&2; fail "$1: this block failed"; }
    # Not what apt has to say.
    [[ $text == apt-get* ]] || sed 's/^/    /' "$work/said"
}
on() { machine_in "$@"; }
is() { [ "$(on "$1" systemctl show -P "$3" "$2")" = "$4" ]; }
said() { grep "$1" "$work/said" >/dev/null; }
nodes=(node-1 node-2 node-3)
# A block's own node is node-1.
for_node() { echo "s/--id node-1/--id $1/"; }

# The machines: systemd, and an apt that has what the guide installs in its cache, as they reach no archive.
machine_root "$work/fresh" "$base"
machine_prepare "$work/fresh"
cp "$debs"/shardfs*.deb "$work/fresh/root/"
machine_chroot "$work/fresh" '
    apt-get update -q
    apt-get install -y -q --no-install-recommends systemd systemd-sysv dbus procps iproute2
    cd /root
    apt-get install -y -q --download-only -o APT::Keep-Downloaded-Packages=true ./shardfs-node_*.deb ./shardfs_*.deb etcd-server etcd-client' \
    >"$debs/guide-install.log" 2>&1 || { tail -20 "$debs/guide-install.log" >&2; exit 1; }

# The network: a switch in a namespace of its own.
unshare --net bash -c 'ip link add name switch type bridge && ip link set switch up && exec sleep infinity' </dev/null >/dev/null 2>&1 &
switch=$!
# The disks; each machine has a path of its own to both, past this kernel's cache.
for disk in 1 2; do truncate -s 1G "$work/disk.$disk"; done
start() {
    local at=10.0.0.1${1#node-} devices=() disk device
    for disk in 1 2; do
        device=$(losetup --find --show --direct-io=on "$work/disk.$disk")
        devices+=("disk/by-id/wwn-0x6001405aa000$disk=$(lsblk -n -d -o MAJ:MIN "$device" | tr -d ' ')")
    done
    cp -a "$work/fresh" "$work/$1"
    echo "$1" >"$work/$1/etc/hostname"
    machine_boot "$1" "$work/$1" "${devices[@]}"
    eventually machine_in "$1" systemctl is-active multi-user.target
    ip link add name "shardfs$$" type veth peer name eth0 netns "${machine_init[$1]}"
    ip link set "shardfs$$" netns "$switch" name "$1"
    nsenter --target "$switch" --net ip link set "$1" master switch up
    machine_in "$1" ip address add "$at/24" dev eth0
    machine_in "$1" ip link set eth0 up
}
for node in "${nodes[@]}"; do start "$node"; done

# 1. Packages.
for node in "${nodes[@]}"; do follow "$node" '1. Packages' 1; done
for node in "${nodes[@]}"; do check is "$node" shardfs-node ActiveState inactive; done

# 2. Look whether the machines are fit. Devices without reservations are not, and it must say so.
text=$(block '2. Look' 1)
on node-1 bash -c "$text" >"$work/said" 2>&1 || true
sed 's/^/    /' "$work/said"
check said 'wwn-0x6001405aa0001'
check said 'wwn-0x6001405aa0002'
echo "guide: NOT TRIED: doctor with --second-path takes a disk with reservations (make test-vm has one)"

# 3. etcd and the node.
for node in "${nodes[@]}"; do follow "$node" '3. etcd' 1 "$(for_node "$node")"; done
for node in "${nodes[@]}"; do
    eventually on "$node" systemctl is-active etcd
    eventually is "$node" shardfs-node StatusText 'serves 0 volumes, 0 shards open'
done

# 4. Say where the cluster is.
for node in "${nodes[@]}"; do
    follow "$node" '4. Say' 1
    for other in "${nodes[@]}"; do check said "^$other  *alive"; done
done

# 5. Volumes.
follow node-1 '5. Volumes' 1 '/volume add/s/$/ --allow-unfenced/'
serves() { on node-1 shardfs volume list | grep "^$1  *device  *$2 .* served" >/dev/null; }
eventually serves vol-1 node-1
eventually serves vol-2 node-2

# 6. Mount, as a service and by fstab.
follow node-1 '6. Mount' 1
check is node-1 shardfsd@mnt-shards ActiveState active
line=$(block '6. Mount' 2)
on node-2 mkdir -p /mnt/shards
echo "$line" >>"$work/node-2/etc/fstab"
on node-2 systemctl daemon-reload
check on node-2 mount /mnt/shards

# 7. Try a failover.
follow node-1 '7. Try' 1
check said '^one$'
# Either volume may have got the shard: vol-1 is node-1's, vol-2 is node-2's.
server=$(sed -n 's/^on  *vol-[12] (\(node-[12]\)).*/\1/p' "$work/said")
check test -n "$server"
eventually serves vol-1 node-1
follow "$server" '7. Try' 2
check said '^one$'
eventually is "$server" shardfs-node ActiveState active
check test "$(on node-2 cat /mnt/shards/test/k)" = one
check test "$(on node-3 shardfs get test/k -)" = one

# Day two.
healthy() { [ "$(on node-1 shardfs status --json | tr -d ' \n' | grep -o '"healthy":[a-z]*')" = '"healthy":true' ]; }
eventually healthy
follow node-1 'Look after it' 1
follow node-1 'Maintain a machine' 1 '1!d'
away() { ! on node-1 shardfs volume list | grep '^vol-[12]  *device  *node-2 ' >/dev/null; }
eventually away
follow node-1 'Maintain a machine' 1 '1d'
eventually healthy
for node in "${nodes[@]}"; do
    follow "$node" 'Restart or upgrade' 1
    eventually is "$node" shardfs-node ActiveState active
    eventually healthy
done
check test "$(on node-1 cat /mnt/shards/test/k)" = one
follow node-1 'Back up and restore' 4

# A machine is lost, and another one takes its place.
machine_off node-3
lost() { on node-1 shardfs node list | grep '^node-3  *\(silent\|dead\)' >/dev/null; }
eventually lost
rm -rf --one-file-system "$work/node-3"
member=$(on node-1 etcdctl --endpoints http://10.0.0.11:2379 member list | grep ', node-3,' | cut -d, -f1)
follow node-1 'Replace a node' 1 "s/ID-OF-THE-LOST-MEMBER/$member/"
start node-3
follow node-3 'Replace a node' 2
eventually is node-3 shardfs-node ActiveState active
eventually healthy
follow node-3 '4. Say' 1
check test "$(on node-3 shardfs get test/k -)" = one
on node-1 shardfs volume promote vol-1 node-3
eventually serves vol-1 node-3
check test "$(on node-1 cat /mnt/shards/test/k)" = one

# The records are restored from the backup, while nothing runs.
for node in "${nodes[@]}"; do on "$node" systemctl stop shardfs-node; done
for node in "${nodes[@]}"; do on "$node" systemctl stop etcd; done
for node in "${nodes[@]}"; do
    if [ "$node" != node-1 ]; then cp "$work/node-1/var/backups/shardfs-etcd.db" "$work/$node/var/backups/"; fi
    follow "$node" 'Back up and restore' 5 "s/--name node-1/--name $node/; s,-peer-urls http://10.0.0.11,-peer-urls http://10.0.0.1${node#node-},"
done
for node in "${nodes[@]}"; do eventually on "$node" systemctl is-active etcd; done
for node in "${nodes[@]}"; do on "$node" systemctl start shardfs-node; done
eventually healthy
check test "$(on node-1 cat /mnt/shards/test/k)" = one
follow node-1 'Look after it' 1

# Stop everything: clients first, then the nodes.
on node-1 systemctl stop shardfsd@mnt-shards
on node-2 umount /mnt/shards
for node in "${nodes[@]}"; do on "$node" systemctl stop shardfs-node; done
for node in "${nodes[@]}"; do
    check is "$node" shardfs-node Result success
    check test -z "$(on "$node" findmnt -n -o TARGET -t fuse.shardfs || true)"
    check test -z "$(on "$node" findmnt -n -o TARGET | grep /var/lib/shardfs/ || true)"
done

echo "guide: DEPLOYMENT.md can be followed, but for what says NOT TRIED above and --allow-unfenced"
echo "$checks passed, 0 failed"
