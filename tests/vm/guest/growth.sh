# An EBS volume grows while it is written to: its disk on the emulated EC2, the device, and the ext4 on it, which takes CAP_SYS_RESOURCE.
# It is done by a test of tests/tests/aws_cluster.rs, that of a cluster's whole life; elsewhere that test may leave out the ext4.
set -euo pipefail

name=a_cluster_lives_on_ebs_volumes
out=/tmp/growth.out
mkdir -p /var/tmp
# The machine is emulated.
export SHARDFS_TEST_PATIENCE=5 SHARDFS_DEADLINE=300 SHARDFS_BIN_DIR=/usr/bin

broken() {
    echo "growth: $*"
    cat "$out"
    for log in /usr/test-logs/*/*.log /var/tmp/shardfs-test.*/c/logs/*.log; do
        [ ! -e "$log" ] || { echo "--- $log"; tail -40 "$log"; }
    done
    echo "--- kernel"
    dmesg | tail -40
    exit 1
}

RUST_BACKTRACE=1 aws_cluster --exact "$name" --nocapture >"$out" 2>&1 || broken "the test fails"
grep -q ' 1 passed; 0 failed; 0 ignored' "$out" || broken "there is no test $name"
grep -o 'vol-[0-9]* has grown from .*' "$out" || broken "the test has left the growth out"
[ ! -e /usr/test-logs ] || ! grep -sh 'panicked' /usr/test-logs/*/*.log || broken "a program has panicked"
echo "growth: $(grep -o 'finished in .*' "$out")"
