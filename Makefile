# Builds, runs and tests ShardFS. `make` alone lists what there is.
#
# Everything is built in one profile (release), so that RocksDB is compiled once.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

CARGO_TARGET_DIR ?= $(CURDIR)/target
export CARGO_TARGET_DIR

BIN := $(CARGO_TARGET_DIR)/release
DIR ?= .shardfs
PREFIX ?= /usr/local
DESTDIR ?=
MNT ?= mnt
# The versions of what is fetched beside the workspace's own dependencies.
PJDFSTEST_VERSION := 0.2.2
CARGO_DENY_VERSION := 0.20.2
CARGO_LLVM_COV_VERSION := 0.9.1
TOOLS := $(CARGO_TARGET_DIR)/tools

.PHONY: help deps deps-test build install up down test test-long test-vm pjdfstest coverage bench fmt lint deny

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## install what building and running needs (Debian 12)
	@tests/scripts/deps.sh

deps-test: ## install what the tests need as well
	@tests/scripts/deps.sh test

build: deps ## build the programs
	cargo build --release --locked --workspace --bins

install: build ## install programs, manual pages, completions and the mount helper (PREFIX, DESTDIR)
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/bash-completion/completions" "$(DESTDIR)/sbin"
	install "$(BIN)/shardfs" "$(BIN)/shardfsd" "$(BIN)/shardfs-node" "$(DESTDIR)$(PREFIX)/bin/"
	ln -sf "$(PREFIX)/bin/shardfsd" "$(DESTDIR)/sbin/mount.fuse.shardfs"
	"$(BIN)/shardfs" man --man-dir "$(DESTDIR)$(PREFIX)/share/man/man1"
	"$(BIN)/shardfs" completions bash >"$(DESTDIR)$(PREFIX)/share/bash-completion/completions/shardfs"

up: build ## build, start three nodes on this machine and mount them on ./mnt
	@"$(BIN)/shardfs" dev up --dir $(DIR) --mount $(MNT)
	@echo '`make down` stops it as well; what was written stays in $(DIR).'

down: ## unmount ./mnt and stop the nodes; keeps the data
	@"$(BIN)/shardfs" dev down --dir $(DIR)

test: deps-test ## run all tests, those on real mounts included (as root)
	@tests/scripts/test.sh

test-long: deps-test $(TOOLS)/bin/pjdfstest ## the long ones too: 110 faults, 20 kills, 60 power cuts, 10 nodes cut off, 1,000,000 keys, five minutes of reads from backups, pjdfstest (as root)
	@PJDFSTEST="$(TOOLS)/bin/pjdfstest" tests/scripts/test.sh --include-ignored

# Programs and tests have one graph of features if they are built together: built by themselves, the programs are compiled anew.
test-vm: deps ## reservations and a fenced failover on a kernel of its own with a SCSI target, in qemu (says so if skipped)
	@tests/scripts/deps.sh vm || echo "test-vm: not all that it needs could be installed" >&2
	cargo build --release --locked --workspace --all-targets
	@tests/vm/run.sh "$(BIN)" "$(CARGO_TARGET_DIR)/test-vm"

pjdfstest: deps-test $(TOOLS)/bin/pjdfstest ## run pjdfstest on a mount, and print its table (as root)
	cargo build --release --locked --workspace --all-targets
	PJDFSTEST="$(TOOLS)/bin/pjdfstest" \
	  cargo test --release --locked --workspace --test pjdfstest -- --ignored --nocapture

$(TOOLS)/bin/pjdfstest:
	cargo install --quiet --locked --root "$(TOOLS)" --target-dir "$(TOOLS)/build" pjdfstest --version =$(PJDFSTEST_VERSION)

coverage: deps-test ## line coverage of the unit tests (builds everything anew, instrumented)
	@CARGO_LLVM_COV_VERSION=$(CARGO_LLVM_COV_VERSION) tests/scripts/coverage.sh

bench: build ## ShardFS and ext4 on the same kind of loop device, in tables (a quarter of an hour)
	@tests/scripts/bench.sh

fmt: ## format the sources
	cargo fmt --all

lint: ## formatting and clippy
	cargo fmt --all -- --check
	cargo clippy --release --locked --workspace --all-targets -- -D warnings

deny: ## licences, sources and bans of the dependencies (installs cargo-deny: minutes)
	@cargo deny --version >/dev/null 2>&1 || cargo install --quiet --locked --target-dir "$(TOOLS)/build" cargo-deny --version =$(CARGO_DENY_VERSION)
	cargo deny --locked check bans licenses sources
