#!/bin/bash
# Installs what ShardFS needs on Debian 12: `deps.sh` to build and run it, `deps.sh test` to test it as
# well, `deps.sh long` for its long tests too, `deps.sh vm` for the test in a machine of its own. Idempotent, and a fraction of a second when everything is
# there. Other systems: it says what to install.
set -euo pipefail

# rust-version of the workspace.
rust_minor_min=91

# libprotobuf-dev holds the .proto files of protobuf itself, which etcd's import.
build=(build-essential pkg-config clang libclang-dev protobuf-compiler libprotobuf-dev ca-certificates git
    e2fsprogs fuse3 util-linux mount procps)
# vim-tiny brings vim.tiny, psmisc fuser(1), attr setfattr(1).
test=(rsync sqlite3 vim-tiny python3 python3-venv fio xfsprogs attr acl strace psmisc libacl1-dev openssl iproute2
    stress-ng dbench nano ccache zip unzip)
long=()
# Node.js from elsewhere brings its own npm, and does not go together with Debian's.
command -v npm >/dev/null || long+=(npm)
vm=(qemu-system-x86 busybox-static cpio zstd xfsprogs)
# Programs that Debian starts as services when they are installed, and that the tests start by themselves.
idle=(etcd-server etcd-client)
# The same, for `test` and `long` only.
idle_test=(postgresql)

want=("${build[@]}")
case ${1-} in
    test) want+=("${test[@]}" "${idle[@]}" "${idle_test[@]}") ;;
    long) want+=("${test[@]}" "${long[@]}" "${idle[@]}" "${idle_test[@]}") ;;
    vm) want+=("${vm[@]}" "${idle[@]}") ;;
esac

as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif command -v sudo >/dev/null; then
        sudo "$@"
    else
        echo "deps: not root and no sudo; as root, run: $*" >&2
        exit 1
    fi
}

updated=
install() {
    if [ -z "$updated" ]; then
        as_root apt-get update -q
        updated=1
    fi
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends "$@"
}

# Installs programs without their services: those are neither started now nor at the next boot.
policy=/usr/sbin/policy-rc.d
install_idle() {
    local guard=
    if [ ! -e "$policy" ]; then
        guard=1
        trap 'as_root rm -f "$policy"' EXIT
        printf '#!/bin/sh\nexit 101\n' | as_root tee "$policy" >/dev/null
        as_root chmod 755 "$policy"
    fi
    install "$@"
    if [ -n "$guard" ]; then
        as_root rm -f "$policy"
        trap - EXIT
    fi
    # Those of the packages that came now: one that was there before is somebody's.
    local package service
    for package in "$@"; do
        service=${package%-server}
        [ -x "/etc/init.d/$service" ] || continue
        # Somebody else's policy may have let it start.
        if [ -d /run/systemd/system ] && systemctl --quiet is-active "$service"; then
            as_root systemctl stop "$service"
        fi
        as_root update-rc.d "$service" disable
    done
}

rust_ok() {
    command -v cargo >/dev/null && command -v rustc >/dev/null || return 1
    local version
    version=$(rustc --version | sed -E 's/^rustc 1\.([0-9]+).*/\1/')
    [[ $version =~ ^[0-9]+$ ]] && ((version >= rust_minor_min))
}

if ! command -v apt-get >/dev/null || ! command -v dpkg-query >/dev/null; then
    echo "deps: this is not Debian. Install what these Debian packages hold: ${want[*]}," >&2
    echo "deps: and Rust 1.$rust_minor_min or later." >&2
    rust_ok
    exit
fi

missing=()
missing_idle=()
for package in "${want[@]}"; do
    state=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [ "$state" = installed ] && continue
    case " ${idle[*]} ${idle_test[*]} " in
        *" $package "*) missing_idle+=("$package") ;;
        *) missing+=("$package") ;;
    esac
done
if [ ${#missing[@]} -gt 0 ]; then
    echo "deps: installing ${missing[*]}"
    install "${missing[@]}"
fi
if [ ${#missing_idle[@]} -gt 0 ]; then
    echo "deps: installing ${missing_idle[*]}, without starting a service"
    install_idle "${missing_idle[@]}"
fi

if ! rust_ok; then
    if command -v rustup >/dev/null; then
        echo "deps: Rust is older than 1.$rust_minor_min. Run: rustup update stable" >&2
        exit 1
    fi
    # Debian 12 itself has Rust 1.63; its security archive has a current one for the browsers.
    echo "deps: installing Rust from Debian (rustc-web, cargo-web)"
    install rustc-web cargo-web rustfmt-web rust-web-clippy
    hash -r
    rust_ok || {
        echo "deps: Debian gave $(rustc --version 2>&1); ShardFS needs 1.$rust_minor_min: install it from rustup.rs" >&2
        exit 1
    }
fi

if [ ! -e /dev/fuse ]; then
    echo "deps: /dev/fuse is missing: mounting will not work here (in a container: --device /dev/fuse --privileged)" >&2
fi
