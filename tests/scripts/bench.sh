#!/bin/bash
# A cluster of its own on loop volumes, measured beside ext4 on the same kind of loop device; arguments go
# to `shardfs bench all` (default: `--runs 3`). Reports are left in $CARGO_TARGET_DIR/bench.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${CARGO_TARGET_DIR:=$PWD/target}"
shardfs=$CARGO_TARGET_DIR/release/shardfs
reports=$CARGO_TARGET_DIR/bench
root=$(mktemp -d "${TMPDIR:-/var/tmp}/shardfs-bench.XXXXXX")
mkdir -p "$reports" "$root/mnt"

finish() {
    "$shardfs" dev down --dir "$root/c" >/dev/null || true
    if mountpoint -q "$root/mnt"; then
        echo "bench: $root/mnt is still mounted; not removing $root" >&2
    else
        rm -rf --one-file-system "$root"
    fi
}
trap finish EXIT

"$shardfs" dev up --dir "$root/c" --mount "$root/mnt" --volume-size 16GiB
mkdir "$root/mnt/bench"
[ $# -gt 0 ] || set -- --runs 3
"$shardfs" bench all "shardfs=$root/mnt/bench" --reference ext4 --reference-dir "$root" \
    --json "$reports/all.json" "$@" | tee "$reports/all.txt"
"$shardfs" --dir "$root/c" bench kv --json "$reports/kv.json" | tee "$reports/kv.txt"
