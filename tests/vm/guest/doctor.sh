# `shardfs doctor` on this kernel, and its check of reservations on a real target: once on the two paths, once with the device
# held by somebody else, and once on two different disks.
set -euo pipefail

mkdir -p /var/tmp
broken() {
    echo "doctor: $*"
    cat /tmp/doctor.out
    dmesg | tail -30
    exit 1
}
# The device's own registrations, as the target keeps them.
registrations() { cat /sys/kernel/config/target/core/iblock_0/shared/pr/res_pr_registered_i_pts; }

shardfs doctor --device /dev/sda --second-path /dev/sdb >/tmp/doctor.out || broken "the check failed"
cat /tmp/doctor.out
for step in register free unreserved reserve conflict "preempt and abort" "late write" release; do
    grep -q "reservations: $step " /tmp/doctor.out || broken "no step $step"
done
grep -q '^ok .*reservations: late write .*a write by the first path is refused' /tmp/doctor.out || broken "no late write was refused"
registrations | grep -q 'None' || broken "registrations stay: $(registrations)"

# Two disks are no two paths.
if shardfs doctor --device /dev/sda --second-path /dev/sdc >/tmp/doctor.out; then broken "two disks pass"; fi
grep -o 'naa[^ ]* is .*two disks\|.*two disks' /tmp/doctor.out | tail -1
