#!/bin/bash
# Puts what the Debian packages hold beside the programs into BIN/debian: manual pages, completions, the link by which mount(8) finds
# the daemon. `stage.sh BIN`; BIN is the folder of the built programs, and cargo-deb's target/release.
set -euo pipefail
bin=$1
out=$bin/debian
rm -rf "$out"
mkdir -p "$out/man" "$out/completions" "$out/sbin"
"$bin/shardfs" man --man-dir "$out/man"
mkdir "$out/man-node"
mv "$out/man/shardfs-node.1" "$out/man-node/"
"$bin/shardfs" completions bash >"$out/completions/shardfs"
"$bin/shardfs" completions zsh >"$out/completions/_shardfs"
"$bin/shardfs" completions fish >"$out/completions/shardfs.fish"
ln -s ../bin/shardfsd "$out/sbin/mount.fuse.shardfs"
gzip --best --no-name "$out"/man/*.1 "$out"/man-node/*.1
