#!/bin/bash
# Makes the Debian packages of programs that are built already: `make-deb.sh BIN CARGO_DEB`; BIN is the folder release of a target folder.
# They lie in BIN/../debian then.
set -euo pipefail
cd "$(dirname "$0")/../.."

bin=$(realpath "$1")
cargo_deb=$(realpath "$2")
out=$(dirname "$bin")/debian
[ "$(basename "$bin")" = release ] || { echo "make-deb: $bin: expected a folder named release" >&2; exit 1; }
# Where cargo-deb looks for target/release.
CARGO_TARGET_DIR=$(dirname "$bin")
export CARGO_TARGET_DIR

deploy/debian/stage.sh "$bin"
mkdir -p "$out"
rm -f "$out"/*.deb "$out"/*.ddeb
for package in shardfs-node shardfs; do
    # Nothing is compiled: RocksDB would be, for ten minutes. The lines of the sources are in packages of their own (*.ddeb).
    "$cargo_deb" --package "$package" --no-build --dbgsym --quiet --locked --output "$out/" </dev/null
done
ls -l "$out"/*deb
