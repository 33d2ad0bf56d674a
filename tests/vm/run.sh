#!/bin/bash
# What takes a kernel, or rights, that the machine of the tests may not have: boots Debian's cloud kernel in qemu, where the kernel's
# own SCSI target gives two initiator paths to one disk, and runs `shardfs doctor` and a fenced failover there, and the test in which
# an EBS volume grows while it is used, on the emulated EC2 (guest/*.sh).
#
# `run.sh BIN_DIR WORK_DIR AWS_CLUSTER`: where the programs are, which were built with the feature `aws`; where the kernel is kept and
# the machine is made; and the test program `aws_cluster`. Its last line is `test-vm: PASSED`, `test-vm: FAILED: ...` (status 1) or
# `test-vm: SKIPPED: why` (status 0). No KVM is needed: the machine is emulated, which takes some minutes.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
bin=$1
work=$2
aws_cluster=${3-}
# The kernel package; its files are named by their version.
kernel_package=linux-image-cloud-amd64
# What the guest needs besides the kernel's built-ins. They are loaded in this order.
modules=(virtio_pci virtio_blk sd_mod configfs target_core_mod target_core_iblock target_core_file tcm_loop loop fuse xfs crc32c_generic)
# Programs of this machine that the guest runs, with the libraries that they name: what busybox does not have, or not with the options
# that are used.
programs=(bash rm dd mkfs.ext4 e2fsck dumpe2fs fusermount3 etcd mkfs.xfs losetup mount umount setsid timeout truncate)
# Bytes of the disk that has two paths; sparse.
disk_bytes=$((1 << 30))
# Mebibytes of the machine's memory; the root filesystem is in it.
memory_mib=3072
# Seconds until a machine that says nothing more is given up.
wait_max=${TEST_VM_SECONDS:-1500}

skip() {
    echo "test-vm: SKIPPED: $*"
    exit 0
}
fail() {
    echo "test-vm: FAILED: $*"
    exit 1
}

[ "$(uname -m)" = x86_64 ] || skip "this machine is $(uname -m); the test boots an x86_64 kernel"
for program in qemu-system-x86_64 busybox cpio zstd apt-get dpkg-deb; do
    command -v "$program" >/dev/null ||
        skip "$program is missing: on Debian 12, run tests/scripts/deps.sh vm"
done
busybox=$(command -v busybox)
! ldd "$busybox" >/dev/null 2>&1 || skip "$busybox is not static: run tests/scripts/deps.sh vm"
for program in "$bin"/{shardfs,shardfs-node,shardfsd} "$aws_cluster"; do
    [ -x "$program" ] || fail "${program:-aws_cluster} is missing: run make test-vm, which builds it"
done

mkdir -p "$work"
scratch=$(mktemp -d "$work/run.XXXXXX")
qemu=
# What was started here ends here, however this ends.
tidy() {
    [ -z "$qemu" ] || kill -9 "$qemu" 2>/dev/null || true
    rm -rf "$scratch"
}
trap tidy EXIT

# --- the kernel ---

image=$(apt-cache depends "$kernel_package" 2>/dev/null | sed -nE 's/^ *Depends: (linux-image-[0-9].*)$/\1/p' | head -1)
[ -n "$image" ] || skip "apt knows no $kernel_package: run apt-get update (or this is not Debian)"
release=${image#linux-image-}
kernel=$work/$image
if [ ! -e "$kernel/complete" ]; then
    echo "test-vm: fetching $image"
    rm -rf "$kernel"
    mkdir -p "$kernel/fetch"
    (cd "$kernel/fetch" && apt-get download -q "$image" >"$scratch/apt.log" 2>&1) ||
        skip "$image cannot be fetched: $(grep -m1 '^E:' "$scratch/apt.log" || tail -1 "$scratch/apt.log")"
    dpkg-deb -x "$kernel"/fetch/*.deb "$kernel"
    rm -rf "$kernel/fetch"
    touch "$kernel/complete"
fi
echo "test-vm: kernel $release, $(qemu-system-x86_64 --version | head -1)"

# --- the root filesystem ---

root=$scratch/root
mkdir -p "$root"/{bin,proc,sys,dev,run,tmp,etc,var,modules,lib64}
cp "$busybox" "$root/bin/busybox"

# A module after those that it depends on; built-in ones have no file.
order=()
add_module() {
    local name=${1//-/_} file depends
    case " ${order[*]} " in *" $name "*) return ;; esac
    file=$(find "$kernel/lib/modules/$release" -name "$name.ko" -o -name "${name//_/-}.ko" | head -1)
    [ -n "$file" ] || return 0
    depends=$(grep -azo 'depends=[^[:cntrl:]]*' "$file" | tr -d '\0' | sed 's/^depends=//' | tr ',' ' ')
    for depend in $depends; do add_module "$depend"; done
    order+=("$name")
    cp "$file" "$root/modules/$name.ko"
}
for module in "${modules[@]}"; do add_module "$module"; done
for module in target_core_mod target_core_iblock target_core_file tcm_loop sd_mod xfs; do
    [ -e "$root/modules/$module.ko" ] || skip "$image has no module $module"
done
printf '%s\n' "${order[@]}" >"$root/modules/order"

# A program, under another name if one is given, and the libraries that the loader would give it here, in the same places.
add_program() {
    local library
    local copy=$root/usr/bin/${2-${1##*/}}
    install -D -m 755 "$1" "$copy"
    strip --strip-debug "$copy" 2>/dev/null || true
    while read -r library; do
        [ -e "$root$library" ] || install -D "$library" "$root$library"
    done < <(ldd "$1" 2>/dev/null | grep -oE '/[^ ]+')
}
for program in "${programs[@]}"; do
    path=$(PATH=$PATH:/usr/sbin:/sbin command -v "$program") || skip "$program is missing: run tests/scripts/deps.sh vm"
    add_program "$path"
done
# Scripts that the tests write name it so.
ln -s ../usr/bin/bash "$root/bin/bash"
for program in shardfs shardfs-node shardfsd; do add_program "$bin/$program"; done
add_program "$aws_cluster" aws_cluster
cp "$here"/guest/* "$root/"
chmod 755 "$root/init" "$root"/*.sh

(cd "$root" && find . -print0 | cpio --null --quiet -o -H newc | zstd -q -1 -T0) >"$scratch/initramfs"
truncate -s "$disk_bytes" "$scratch/disk"

# --- the machine ---

# Its serial line is this script's output; it powers itself off.
qemu-system-x86_64 -accel tcg,thread=multi -machine q35 -cpu max -smp 2 -m "$memory_mib" \
    -kernel "$kernel/boot/vmlinuz-$release" -initrd "$scratch/initramfs" \
    -append "console=ttyS0 quiet loglevel=1 panic=-1" \
    -drive "file=$scratch/disk,if=virtio,format=raw,cache=writeback" \
    -nic none -display none -no-reboot -monitor none -serial "file:$scratch/console" </dev/null &
qemu=$!
tail -n +1 -f --pid="$qemu" "$scratch/console" --retry 2>/dev/null | sed -u 's/\r$//' &
deadline=$((SECONDS + wait_max))
while kill -0 "$qemu" 2>/dev/null; do
    if ((SECONDS > deadline)); then
        kill -9 "$qemu"
        wait "$qemu" 2>/dev/null || true
        qemu=
        fail "the machine did not end within $wait_max s (TEST_VM_SECONDS)"
    fi
    sleep 0.5
done
wait "$qemu" || fail "qemu ended with status $?"
qemu=
wait

result=$(tr -d '\r' <"$scratch/console" | grep -a '^GUEST: ' | tail -1)
[ -z "${TEST_VM_KEEP-}" ] || cp "$scratch/console" "$work/console.log"
case $result in
    "GUEST: done") ;;
    *) fail "${result:-the machine ended before it had a result}" ;;
esac
e2fsck -fn "$scratch/disk" >"$scratch/e2fsck.log" 2>&1 ||
    fail "the disk after the end: $(tail -3 "$scratch/e2fsck.log" | tr '\n' ' ')"
echo "test-vm: the disk's filesystem is clean"
echo "test-vm: PASSED"
