#!/bin/bash
# Builds the programs of the minor version before this one from history (tests/skew/PREVIOUS), and runs tests/tests/skew.rs with them and
# the present ones. `skew.sh build` only builds them; the last line it prints is their folder. They are built once.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${CARGO_TARGET_DIR:=$PWD/target}"
export CARGO_TARGET_DIR
read -r version commit < <(grep -v '^#' tests/skew/PREVIOUS)
programs=(shardfs shardfsd shardfs-node)
bin=$CARGO_TARGET_DIR/release
previous=$CARGO_TARGET_DIR/previous
features=shardfs-tests/aws

fail() {
    echo "test-skew: $*" >&2
    exit 1
}

# Programs of the commit are there, whole: its mark is written last.
built() {
    [ "$(cat "$previous/commit" 2>/dev/null)" = "$commit" ]
}

build_previous() {
    if ! git cat-file -e "$commit^{commit}" 2>/dev/null; then
        [ "$(git rev-parse --is-shallow-repository 2>/dev/null)" != true ] ||
            fail "this clone is shallow and has not version $version (commit $commit): git fetch --unshallow"
        fail "there is no commit $commit (version $version) here: it takes a clone with its history"
    fi
    local sources=$CARGO_TARGET_DIR/previous-sources kept=$CARGO_TARGET_DIR/previous-kept program
    rm -rf "$sources" "$previous" "$kept"
    mkdir -p "$sources" "$previous" "$kept"
    git archive "$commit" | tar -x -C "$sources"
    # Programs of both versions have the same names in the folder of programs: the present ones are put back.
    for program in "${programs[@]}"; do
        [ ! -e "$bin/$program" ] || cp -p "$bin/$program" "$kept/"
    done
    # In the same target directory, so that RocksDB is not compiled again.
    local status=0
    (cd "$sources" && cargo build --release --locked --workspace --bins) || status=$?
    if [ "$status" = 0 ]; then
        for program in "${programs[@]}"; do
            cp -p "$bin/$program" "$previous/"
        done
    fi
    for program in "$kept"/*; do
        [ ! -e "$program" ] || mv "$program" "$bin/"
    done
    rm -rf "$sources" "$kept"
    [ "$status" = 0 ] || fail "version $version (commit $commit) does not build"
    echo "$commit" >"$previous/commit"
}

built || build_previous
for program in "${programs[@]}"; do
    "$previous/$program" --version | grep -qF "$version" || fail "$previous/$program is not of version $version"
done
if [ "${1-}" = build ]; then
    echo "$previous"
    exit 0
fi

[ "$(id -u)" = 0 ] || fail "loop volumes and mounts need root; run as root (sudo -E make test-skew)"
[ -e /dev/fuse ] || fail "/dev/fuse is missing; the tests mount real file systems"
cargo build --release --locked --workspace --all-targets --features "$features"
present=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
for program in "${programs[@]}"; do
    "$bin/$program" --version | grep -qF "$present" || fail "$bin/$program is not of version $present"
done
SHARDFS_BIN_DIR=$bin SHARDFS_PREVIOUS_BIN_DIR=$previous \
    cargo test --release --locked --workspace --features "$features" --test skew -- --nocapture
