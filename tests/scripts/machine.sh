#!/bin/bash
# Machines of a test: each is a systemd in namespaces of its own, on this kernel, with a Debian 12 root. To be sourced; it knows `work`, the
# folder of the test, and leaves nothing that it made when `machines_end` is called. As root.

# The first process of a machine, `machine.sh --inside ROOT [DEVICE=MAJOR:MINOR...]`: makes its file systems, and becomes systemd. With devices
# it has a /dev of its own with these in it; without, it has this machine's, where loop devices appear.
if [ "${1-}" = --inside ]; then
    set -euo pipefail
    root=$2
    shift 2
    ip link set lo up
    mount --bind "$root" "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    mount -t tmpfs tmpfs "$root/run"
    # This kernel's settings are not this machine's to change.
    mount --bind "$root/proc/sys" "$root/proc/sys"
    mount -o remount,bind,ro "$root/proc/sys"
    if [ $# = 0 ]; then
        mount --bind /dev "$root/dev"
    else
        mount -t tmpfs -o mode=755 tmpfs "$root/dev"
        for device in null zero full random urandom tty fuse; do cp -a "/dev/$device" "$root/dev/"; done
        ln -s /proc/self/fd "$root/dev/fd"
        for device; do
            mkdir -p "$(dirname "$root/dev/${device%=*}")"
            mknod "$root/dev/${device%=*}" b "$(cut -d: -f1 <<<"${device##*=}")" "$(cut -d: -f2 <<<"${device##*=}")"
        done
    fi
    cd "$root"
    mkdir -p old
    pivot_root . old
    umount -l /old
    exec env -i container=shardfs-test PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --show-status=0 \
        --log-target=journal
fi

machine_script=$(realpath "${BASH_SOURCE[0]}")
machine_groups=$(findmnt -n -o TARGET -t cgroup2 | head -1)/shardfs-test.$$
# By name: the process that started a machine, and its first process.
declare -A machine_pid=() machine_init=()

# machine_root ROOT BASE: an empty Debian 12.
machine_root() {
    mkdir "$1"
    tar -C "$1" -xf "$2"
}
# machine_chroot ROOT SCRIPT: a script in a root that is not booted; no service is started by it.
machine_chroot() {
    printf '#!/bin/sh\nexit 101\n' >"$1/usr/sbin/policy-rc.d"
    chmod 755 "$1/usr/sbin/policy-rc.d"
    chroot "$1" env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C sh -ec "$2"
    rm "$1/usr/sbin/policy-rc.d"
}
# machine_prepare ROOT: what a root that is booted here must not do.
machine_prepare() {
    local unit
    # Of the machine below, not of this one.
    for unit in console-getty getty@tty1 serial-getty@ttyS0 systemd-logind systemd-modules-load systemd-tmpfiles-setup-dev e2scrub_reap \
        systemd-udevd systemd-udev-trigger; do
        ln -sf /dev/null "$1/etc/systemd/system/$unit.service"
    done
    # The kernel's log is of all that runs on it.
    mkdir -p "$1/etc/systemd/journald.conf.d"
    printf '[Journal]\nReadKMsg=no\n' >"$1/etc/systemd/journald.conf.d/test.conf"
}
# machine_boot NAME ROOT [DEVICE=MAJOR:MINOR...]
machine_boot() {
    local name=$1 root=$2 group=$machine_groups/$1 init=
    shift 2
    mkdir -p "$group"
    bash -c 'echo $$ >"$1/cgroup.procs"; shift; exec unshare --pid --fork --mount --uts --ipc --net --cgroup --propagation private \
        --kill-child bash "$@"' bash "$group" "$machine_script" --inside "$root" "$@" </dev/null >"$work/console.$name" 2>&1 &
    machine_pid[$name]=$!
    for _ in $(seq 100); do
        init=$(pgrep -P "${machine_pid[$name]}" || true)
        if [ -n "$init" ] && [ "$(cat "/proc/$init/comm")" = systemd ]; then break; fi
        sleep 0.1
    done
    [ -n "$init" ] || { cat "$work/console.$name" >&2; return 1; }
    machine_init[$name]=$init
}
# machine_in NAME COMMAND...
machine_in() {
    local init=${machine_init[$1]}
    shift
    nsenter --target "$init" --all --root --wd env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C HOME=/root "$@"
}
# machine_off NAME: as if the power went.
machine_off() {
    local mount init=${machine_init[$1]-}
    # A daemon that waits for its own mount ends by no signal.
    if [ -n "$init" ]; then
        for mount in $(awk '/ - fuse\.shardfs / { split($3, device, ":"); print device[2] }' "/proc/$init/mountinfo" 2>/dev/null); do
            echo 1 >"/proc/$init/root/sys/fs/fuse/connections/$mount/abort" || true
        done
    fi
    # Its first process takes all others along.
    kill -KILL "${machine_pid[$1]}" 2>/dev/null || true
    wait "${machine_pid[$1]}" 2>/dev/null || true
    # That one is this test's child no longer: it is gone when its namespaces are.
    for _ in $(seq 100); do
        if [ -z "$init" ] || [ ! -e "/proc/$init" ]; then break; fi
        sleep 0.1
    done
    unset "machine_pid[$1]" "machine_init[$1]"
}
machines_end() {
    local name
    for name in "${!machine_pid[@]}"; do machine_off "$name"; done
    for _ in $(seq 50); do
        [ -d "$machine_groups" ] || break
        find "$machine_groups" -depth -type d -exec rmdir {} \; 2>/dev/null || true
        [ ! -d "$machine_groups" ] || sleep 0.1
    done
}

# What a test asserts, and how often it did; both end with its own `fail`.
checks=0
check() {
    checks=$((checks + 1))
    "$@" || fail "failed: $*"
}
# Until it succeeds, for `eventually_max` seconds, which the test sets.
eventually() {
    checks=$((checks + 1))
    for _ in $(seq $((eventually_max * 5))); do
        if "$@" >/dev/null 2>&1; then return; fi
        sleep 0.2
    done
    fail "not within $eventually_max s: $*"
}
