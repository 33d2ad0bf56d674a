#!/bin/bash
# Builds the programs and runs every test of the workspace; arguments go to the test programs
# (`--include-ignored`). Ends with the runner's own closing lines, one a test program.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${CARGO_TARGET_DIR:=$PWD/target}"
export CARGO_TARGET_DIR
export SHARDFS_BIN_DIR=$CARGO_TARGET_DIR/release

if [ "$(id -u)" != 0 ]; then
    echo "test: loop volumes and mounts need root; run as root (sudo -E make test)" >&2
    exit 1
fi
if [ ! -e /dev/fuse ]; then
    echo "test: /dev/fuse is missing; the tests mount real file systems" >&2
    exit 1
fi

# Tests with an earlier version's programs say that they are skipped otherwise.
if [[ " $* " == *" --include-ignored "* ]]; then
    SHARDFS_PREVIOUS_BIN_DIR=$(tests/scripts/skew.sh build | tail -1)
    export SHARDFS_PREVIOUS_BIN_DIR
fi

# One graph of features for programs and tests: nothing is compiled twice.
features=shardfs-tests/aws
cargo build --release --locked --workspace --all-targets --features "$features"

log=$CARGO_TARGET_DIR/test.log
status=0
cargo test --release --locked --workspace --features "$features" --no-fail-fast -- "$@" </dev/null 2>&1 | tee "$log" || status=$?

# Steps that are cut off: the failpoints are compiled in for these alone, which takes minutes.
if [[ " $* " == *" --include-ignored "* ]]; then
    cargo test --release --locked --workspace --exclude shardfs --exclude shardfsd --exclude shardfs-tests \
        --features shardfs-node/failpoints --lib -- failpoints </dev/null 2>&1 | tee -a "$log" || status=$?
fi

# What a killed test program left behind is removed by its guard; give it time to finish.
for _ in $(seq 100); do
    pgrep -f "$SHARDFS_BIN_DIR/shardfs dev down --dir .*/shardfs-test\." >/dev/null || break
    sleep 0.2
done

echo
grep -E '^test result:' "$log" | awk '
    { print; passed += $4; failed += $6; ignored += $8 }
    END { printf "total: %d passed, %d failed, %d ignored\n", passed, failed, ignored }'
exit "$status"
