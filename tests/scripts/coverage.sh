#!/bin/bash
# Line coverage of the unit tests, with cargo-llvm-cov; arguments go to it (`--html`). Uses the LLVM tools of
# rustup's toolchain, or those of Debian that belong to Debian's Rust.
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${CARGO_TARGET_DIR:=$PWD/target}"
tools=$CARGO_TARGET_DIR/tools

if command -v rustup >/dev/null; then
    rustup component add llvm-tools
else
    llvm=$(rustc -vV | sed -n 's/^LLVM version: \([0-9]*\).*/\1/p')
    bin=/usr/lib/llvm-$llvm/bin
    if [ ! -x "$bin/llvm-profdata" ]; then
        apt-get update -q
        DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "llvm-$llvm"
    fi
    export LLVM_COV=$bin/llvm-cov LLVM_PROFDATA=$bin/llvm-profdata
fi
if [ ! -x "$tools/bin/cargo-llvm-cov" ]; then
    cargo install --quiet --locked --root "$tools" --target-dir "$tools/build" \
        cargo-llvm-cov --version "=$CARGO_LLVM_COV_VERSION"
fi
[ $# -gt 0 ] || set -- --summary-only
PATH=$tools/bin:$PATH exec cargo llvm-cov --release --locked --workspace --exclude shardfs-tests "$@"
