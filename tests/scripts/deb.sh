#!/bin/bash
# Installs the Debian packages into a clean Debian 12 root, runs the programs, upgrades, and removes the packages again. As root.
# `deb.sh FOLDER`: where the packages lie. The root is made anew by debootstrap, and kept as a tar in FOLDER for the next time.
set -euo pipefail
cd "$(dirname "$0")/../.."

debs=$(realpath "$1")
suite=bookworm
mirror=${SHARDFS_DEBIAN_MIRROR:-http://deb.debian.org/debian}
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
node=$(echo "$debs"/shardfs-node_"$version"-*.deb)
client=$(echo "$debs"/shardfs_"$version"-*.deb)

fail() {
    echo "deb: $*" >&2
    exit 1
}
checks=0
check() {
    checks=$((checks + 1))
    "$@" || fail "failed: $*"
}
check_not() {
    checks=$((checks + 1))
    if "$@"; then fail "should have failed: $*"; fi
}

[ "$(id -u)" = 0 ] || fail "a root of its own needs root"
[ -f "$node" ] && [ -f "$client" ] || fail "there are no packages of version $version in $debs: \`make deb\` makes them"
command -v debootstrap >/dev/null || apt-get install -y -q --no-install-recommends debootstrap

work=$(mktemp -d "${TMPDIR:-/var/tmp}/shardfs-deb.XXXXXX")
root=$work/root
finish() {
    for at in proc dev; do
        if mountpoint -q "$root/$at"; then umount "$root/$at"; fi
    done
    # Only what lies on this file system: a mount that is left is not followed.
    rm -rf --one-file-system "$work"
}
trap finish EXIT

base=$debs/$suite-base.tar
if [ ! -f "$base" ]; then
    mkdir "$root"
    debootstrap --variant=minbase "$suite" "$root" "$mirror" >"$debs/debootstrap.log" 2>&1 ||
        fail "debootstrap: $(tail -5 "$debs/debootstrap.log")"
    tar -C "$root" -cf "$base.new" .
    mv "$base.new" "$base"
else
    mkdir "$root"
    tar -C "$root" -xf "$base"
fi
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"

inside() {
    chroot "$root" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin DEBIAN_FRONTEND=noninteractive LC_ALL=C "$@"
}
# Nothing is started in there, whatever the packages say.
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"

cp "$node" "$client" "$root/var/tmp/"
inside apt-get update -q >/dev/null
inside sh -c 'apt-get install -y -q --no-install-recommends /var/tmp/*.deb' >"$debs/install.log" 2>&1 ||
    fail "installing: $(tail -20 "$debs/install.log")"
check grep -q 'systemctl enable --now shardfs-node' "$debs/install.log"

# The programs run with what the packages depend on, and are of this version.
for program in shardfs shardfsd shardfs-node; do
    check grep -q "$version" <(inside "$program" --version)
    check grep -q Usage <(inside "$program" --help)
done
check test "$(inside shardfs --version)" = "shardfs $version"
inside shardfs doctor >"$work/doctor" 2>&1 || true
check grep -qi 'mkfs.ext4\|kernel' "$work/doctor"

# A node that has no settings says which, and with the exit status that the unit does not restart.
status=0
inside shardfs-node --config /etc/shardfs/node.yaml >"$work/out" 2>&1 || status=$?
check test "$status" = 78
check grep -q 'no node id' "$work/out"
status=0
inside shardfsd --foreground /mnt >"$work/out" 2>&1 || status=$?
check test "$status" = 78
check grep -q 'no node is given' "$work/out"

# What belongs where.
for path in /usr/bin/shardfs /usr/bin/shardfsd /usr/bin/shardfs-node /etc/shardfs/node.yaml /etc/shardfs/shardfsd.yaml \
    /etc/shardfs/config.yaml /lib/systemd/system/shardfs-node.service /lib/systemd/system/shardfsd@.service \
    /usr/share/man/man1/shardfs-node.1.gz /usr/share/man/man1/shardfsd.1.gz /usr/share/man/man1/shardfs-put.1.gz \
    /usr/share/bash-completion/completions/shardfs /usr/share/doc/shardfs/copyright; do
    check test -f "$root$path"
    check test "$(stat -c %u:%g "$root$path")" = 0:0
done
# It may name a user of the metadata store.
check test "$(stat -c %a "$root/etc/shardfs/node.yaml")" = 640
check test "$(inside readlink -f /sbin/mount.fuse.shardfs)" = /usr/bin/shardfsd
for package in shardfs shardfs-node; do
    check test -z "$(inside dpkg --verify "$package")"
done
check test "$(inside dpkg-query -W -f '${Conffiles}' shardfs-node | grep -c etc/shardfs)" = 1
check test "$(inside dpkg-query -W -f '${Conffiles}' shardfs | grep -c etc/shardfs)" = 2

# mount(8) finds its helper, which says what is wrong.
mkdir "$root/mnt/shards"
status=0
inside mount -t fuse.shardfs 127.0.0.1:1 /mnt/shards -o connect_timeout=0.2 >"$work/out" 2>&1 || status=$?
check test "$status" = 32
check grep -q 'no node answers' "$work/out"

# An upgrade (the same version once more) keeps what was set.
echo 'id: mine' >>"$root/etc/shardfs/node.yaml"
inside sh -c 'dpkg -i /var/tmp/*.deb' >>"$debs/install.log" 2>&1 || fail "again: $(tail -20 "$debs/install.log")"
check grep -q 'id: mine' "$root/etc/shardfs/node.yaml"

# Removed, the settings stay; purged, they go. A node's data stays in any case.
mkdir -p "$root/var/lib/shardfs"
echo data >"$root/var/lib/shardfs/incarnation"
inside apt-get remove -y -q shardfs shardfs-node >>"$debs/install.log" 2>&1
check_not test -e "$root/usr/bin/shardfs-node"
check_not test -e "$root/lib/systemd/system/shardfsd@.service"
check grep -q 'id: mine' "$root/etc/shardfs/node.yaml"
inside dpkg --purge shardfs shardfs-node >>"$debs/install.log" 2>&1
check_not test -e "$root/etc/shardfs"
check_not test -e "$root/usr/sbin/mount.fuse.shardfs"
check test "$(cat "$root/var/lib/shardfs/incarnation")" = data

echo "deb: $(basename "$node") ($(stat -c %s "$node") bytes) and $(basename "$client") ($(stat -c %s "$client") bytes) install in a clean Debian 12"
echo "$checks passed, 0 failed"
