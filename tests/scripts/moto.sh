#!/bin/bash
# Installs moto, another emulator of AWS, from PyPI: `moto.sh FOLDER VERSION` prints where its programs are. Repeated, it finds them.
set -euo pipefail

folder=$1
version=$2
venv=$folder/moto-$version

mkdir -p "$folder"
# One at a time: tests may ask at once.
exec 9>"$folder/moto.lock"
flock 9
if [ ! -e "$venv/complete" ]; then
    rm -rf "$venv"
    python3 -m venv "$venv"
    if ! "$venv/bin/pip" install --quiet "moto[ec2,server]==$version" >&2; then
        rm -rf "$venv"
        echo "moto $version cannot be installed from PyPI: is there a network?" >&2
        exit 1
    fi
    touch "$venv/complete"
fi
echo "$venv/bin"
