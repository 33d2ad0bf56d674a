# A fenced failover of real nodes: two nodes, each with its own path to the one disk, their records in an etcd. The primary is
# stopped (SIGSTOP, its parent too, so that nobody records a death), the other one takes the device from it, and what the old
# one has still to write is refused by the device.
set -euo pipefail

logs=/tmp/logs
endpoints=http://127.0.0.1:7401,http://127.0.0.1:7402
# Seconds that one step may take: the machine is emulated.
patience=90
mkdir -p "$logs" /var/lib/node-1 /var/lib/node-2 /tmp/in

broken() {
    echo "failover: $*"
    for log in "$logs"/*; do
        echo "--- $log"
        tail -40 "$log"
    done
    echo "--- kernel"
    dmesg | tail -40
    exit 1
}
say() { echo "failover: $*"; }
# until_true WHAT COMMAND...: repeats the command until it succeeds.
until_true() {
    local what=$1 end=$((SECONDS + patience))
    shift
    until "$@" >/dev/null 2>&1; do
        ((SECONDS < end)) || broken "$what: not within $patience s"
        sleep 0.2
    done
}
fs() { shardfs --endpoints "$endpoints" --deadline "$patience" "$@"; }
put() { fs put "$@" >/tmp/said 2>&1 || broken "put $*: $(cat /tmp/said)"; }
# same FILE KEY: what is stored is what is in the file. Asks node-2 first: a node that is stopped takes a client its time.
same() {
    shardfs --endpoints http://127.0.0.1:7402,http://127.0.0.1:7401 get "$2" - >/tmp/out 2>/tmp/said || broken "get $2: $(cat /tmp/said)"
    cmp "$1" /tmp/out || broken "$2 differs"
}
served_by() { fs volume list | grep -q "^vol-1 .* $1 .* served"; }
logged() { grep -q "$2" "$logs/$1"; }
# The node itself; what was started is its parent.
child_of() { cat /proc/"$1"/task/*/children | grep -om1 '[0-9][0-9]*'; }
# Writes 4 KiB through a path, past every cache, and must be refused by the device (EBADE): then not a byte is changed. Twice: the
# first one may fail for what the path's own cache could not write before.
refused_raw() {
    local attempt said=
    for attempt in 1 2; do
        if said=$(dd if=/dev/zero of="$1" bs=4096 count=1 seek=1000 oflag=direct conv=notrunc 2>&1); then
            broken "$1 takes a write: $said"
        fi
    done
    [[ $said == *"Invalid exchange"* ]] || broken "a write to $1 fails, but not by the device: $said"
    say "a write to $1 is refused: Invalid exchange"
}

start_node() {
    shardfs-node --id "node-$1" --data-dir "/var/lib/node-$1" --listen "127.0.0.1:740$1" \
        --meta etcd://127.0.0.1:2379 --device "vol-1=$2" --block-cache 16MiB --write-buffer 16MiB \
        --log-level info,shardfs_node=debug >>"$logs/node-$1" 2>&1 &
    parent[$1]=$!
    until_true "node-$1 starts" child_of "${parent[$1]}"
}
declare -A parent

etcd --data-dir /tmp/etcd --log-level error --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 \
    --listen-peer-urls http://127.0.0.1:2380 >"$logs/etcd" 2>&1 &
start_node 1 /dev/sda
start_node 2 /dev/sdb
both_listed() { [ "$(fs node list | grep -c '^node-')" = 2 ]; }
until_true "both nodes are there" both_listed

# --- a volume on the disk ---
fs volume add vol-1 --source /dev/sda --nodes node-1,node-2
until_true "vol-1 is served by node-1" served_by node-1
until_true "node-2 stands by" logged node-2 "standing by"
grep -o 'serving the volume.*' "$logs/node-1" | tail -1
fs shard create data
for i in $(seq 8); do
    head -c $((i * 3000)) /dev/urandom >"/tmp/in/$i"
    put "/tmp/in/$i" "data/before/$i"
done
refused_raw /dev/sdb

# --- reads from the backup, by its own path ---
# from_backup NODE FILE KEY: NODE answers from a view, and with what is in the file.
from_backup() {
    fs get -v --read-from backup --max-staleness 30s "$3" - >/tmp/out 2>/tmp/said || return
    grep -q "from $1, a view" /tmp/said && cmp "$2" /tmp/out
}
until_true "node-2 answers from a view" from_backup node-2 /tmp/in/8 data/before/8
for i in $(seq 8); do until_true "data/before/$i is right in the view" from_backup node-2 "/tmp/in/$i" "data/before/$i"; done
say "$(cat /tmp/said)"
# What was in this path's cache is not what the device holds after a while.
for round in 1 2 3; do
    put "/tmp/in/$round" data/changing
    until_true "round $round is seen on the backup" from_backup node-2 "/tmp/in/$round" data/changing
done
say "three changes were seen on the backup"

# --- a volume grows while it is used ---
blocks() { df -k /var/lib/node-1/volumes/vol-2 | tail -1 | tr -s ' ' | cut -d' ' -f2; }
second_served() { fs volume show vol-2 | grep -q '^state *served'; }
fs volume add vol-2 --kind loop --source /tmp/vol-2.img --size 96MiB --nodes node-1
until_true "vol-2 is served" second_served
before=$(blocks)
fs volume grow vol-2 --size 256MiB >/tmp/said 2>&1 || broken "vol-2 does not grow: $(cat /tmp/said)"
after=$(blocks)
((after > before + 140 * 1024)) || broken "vol-2 had $before KiB and has $after"
say "vol-2 grew from $before to $after KiB: $(cat /tmp/said)"
fs volume delete vol-2 >/tmp/said 2>&1 || broken "vol-2 does not leave: $(cat /tmp/said)"
[ ! -e /tmp/vol-2.img ] || broken "vol-2's file is there still"

# --- the primary is stopped ---
for i in $(seq 3); do put --buffered "/tmp/in/$i" "data/unsynced/$i"; done
old=$(child_of "${parent[1]}")
dmesg -c >/dev/null
kill -STOP "${parent[1]}" "$old"
say "node-1 is stopped, with writes in its kernel's cache"
put /tmp/in/8 data/during
until_true "vol-1 is served by node-2" served_by node-2
grep -o 'serving the volume.*' "$logs/node-2" | tail -1
grep -o 'reservation fence by.*' "$logs/node-2" | tail -1
logged node-2 "preempted" || broken "node-2 did not preempt"
for i in $(seq 8); do same "/tmp/in/$i" "data/before/$i"; done
say "what was acknowledged is there on node-2"

# --- what is late is refused ---
sync
# Linux before 6.4 calls it a nexus error.
refused='\(nexus\|reservation conflict\) error, dev sda.*'
dmesg | grep -q "$refused" || broken "the old primary's kernel had nothing refused"
say "the old primary's kernel: $(dmesg | grep -m1 -o "$refused")"
refused_raw /dev/sda

# --- the old primary goes on ---
kill -CONT "$old" "${parent[1]}"
until_true "node-1 steps down" logged node-1 "stepping down"
grep -o 'stepping down.*' "$logs/node-1" | tail -1
unmounted() { ! grep -q ' /var/lib/node-1/' /proc/mounts; }
until_true "node-1 has unmounted" unmounted
served_by node-2 || broken "the volume moved once more"
put /tmp/in/7 data/after
same /tmp/in/8 data/during
fs fsck data --read-data

# --- and back: handed over, then killed ---
fs volume promote vol-1 node-1
until_true "vol-1 is served by node-1" served_by node-1
grep -o 'reservation fence by.*' "$logs/node-1" | tail -1
same /tmp/in/7 data/after
kill -9 "$(child_of "${parent[1]}")"
put /tmp/in/6 data/last
until_true "vol-1 is served by node-2" served_by node-2
for i in $(seq 8); do same "/tmp/in/$i" "data/before/$i"; done
# The mount that the killed process left is taken away by its successor, and changes nothing.
wait "${parent[1]}" || true
: >"$logs/node-1"
start_node 1 /dev/sda
until_true "node-1 stands by" logged node-1 "standing by"
unmounted || broken "the mount of a killed process stays"
same /tmp/in/6 data/last
fs fsck data --read-data

for node in 1 2; do
    kill -TERM "${parent[$node]}"
    wait "${parent[$node]}" || broken "node-$node did not stop in order"
done
! grep -q '^/dev/sd' /proc/mounts || broken "something is still mounted: $(grep '^/dev/sd' /proc/mounts)"
! grep -h "a view's device was written to" "$logs"/node-* || broken "a view wrote to the device"
say "done"
