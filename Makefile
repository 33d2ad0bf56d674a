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
FSX_VERSION := 0.3.2
CARGO_DENY_VERSION := 0.20.2
CARGO_LLVM_COV_VERSION := 0.9.1
CARGO_DEB_VERSION := 3.8.0
CFN_LINT_VERSION := 1.58.0
TOOLS := $(CARGO_TARGET_DIR)/tools
# Programs from crates.io that tests run, and the variables by which the tests find them.
TEST_TOOLS := $(TOOLS)/bin/pjdfstest $(TOOLS)/bin/fsx
TEST_TOOL_NAMES := PJDFSTEST="$(TOOLS)/bin/pjdfstest" FSX="$(TOOLS)/bin/fsx"
# Those of the tests: one graph of features, so that nothing is compiled twice.
ALL_FEATURES := shardfs-tests/aws

.PHONY: help deps deps-test deps-long build install up down test test-long test-vm test-deb test-guide test-deploy test-skew deb pjdfstest coverage bench fmt lint deny

help: ## what there is
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

deps: ## install what building and running needs (Debian 12)
	@tests/scripts/deps.sh

deps-test: ## install what the tests need as well
	@tests/scripts/deps.sh test

deps-long: ## and what the long tests need
	@tests/scripts/deps.sh long

build: deps ## build the programs (FEATURES=aws: with EBS volumes, which takes minutes and 6 GB of memory more)
	cargo build --release --locked --workspace --bins $(if $(FEATURES),--features shardfs-node/$(FEATURES))

install: build ## install programs, manual pages, completions and the mount helper (PREFIX, DESTDIR)
	install -d "$(DESTDIR)$(PREFIX)/bin" "$(DESTDIR)$(PREFIX)/share/bash-completion/completions" "$(DESTDIR)/sbin"
	install "$(BIN)/shardfs" "$(BIN)/shardfsd" "$(BIN)/shardfs-node" "$(DESTDIR)$(PREFIX)/bin/"
	ln -sf "$(PREFIX)/bin/shardfsd" "$(DESTDIR)/sbin/mount.fuse.shardfs"
	"$(BIN)/shardfs" man --man-dir "$(DESTDIR)$(PREFIX)/share/man/man1"
	"$(BIN)/shardfs" completions bash >"$(DESTDIR)$(PREFIX)/share/bash-completion/completions/shardfs"

deb: deps $(TOOLS)/bin/cargo-deb ## make Debian packages, which know EBS volumes, in $(CARGO_TARGET_DIR)/debian
	cargo build --release --locked --workspace --bins --features shardfs-node/aws
	@tests/scripts/make-deb.sh "$(BIN)" "$(TOOLS)/bin/cargo-deb"

$(TOOLS)/bin/cargo-deb:
	cargo install --quiet --locked --root "$(TOOLS)" --target-dir "$(TOOLS)/build" cargo-deb --version =$(CARGO_DEB_VERSION)

test-deb: deb ## install the packages into a clean Debian 12 (debootstrap), boot its systemd with the units, remove them (as root)
	@tests/scripts/deb.sh "$(CARGO_TARGET_DIR)/debian"
	@tests/scripts/boot.sh "$(CARGO_TARGET_DIR)/debian"

test-guide: test-deb ## follow DEPLOYMENT.md on three machines, made of namespaces, each with a systemd of its own (as root)
	@tests/scripts/guide.sh "$(CARGO_TARGET_DIR)/debian"

test-deploy: ## check what is in deploy/: units, templates, policies, scripts (needs PyPI for cfn-lint)
	@CFN_LINT_VERSION=$(CFN_LINT_VERSION) tests/scripts/deploy.sh "$(TOOLS)"

up: build ## build, start three nodes on this machine and mount them on ./mnt
	@"$(BIN)/shardfs" dev up --dir $(DIR) --mount $(MNT)
	@echo '`make down` stops it as well; what was written stays in $(DIR).'

down: ## unmount ./mnt and stop the nodes; keeps the data
	@"$(BIN)/shardfs" dev down --dir $(DIR)

test: deps-test $(TEST_TOOLS) ## run all tests, those on real mounts, pjdfstest and fsx included (as root)
	@$(TEST_TOOL_NAMES) tests/scripts/test.sh

test-long: deps-long $(TEST_TOOLS) ## the long ones too: 110 faults, 20 kills, 60 power cuts, 10 nodes cut off, 1,000,000 keys, 20,000 transactions from two mounts, 8,000,000 operations of fsx, an hour of other programs, test-skew (as root)
	@$(TEST_TOOL_NAMES) tests/scripts/test.sh --include-ignored

test-skew: deps-test ## nodes, mounts and commands of the minor version before beside these: mixed, upgraded under load, downgraded (as root; needs history)
	@tests/scripts/skew.sh

# Programs and tests have one graph of features if they are built together: built by themselves, the programs are compiled anew.
test-vm: deps ## reservations, a fenced failover and an EBS volume that grows, on a kernel of its own with a SCSI target, in qemu (says so if skipped)
	@tests/scripts/deps.sh vm || echo "test-vm: not all that it needs could be installed" >&2
	cargo build --release --locked --workspace --all-targets --features $(ALL_FEATURES)
	@aws_cluster=$$(cargo build --quiet --release --locked --workspace --all-targets --features $(ALL_FEATURES) --message-format json | \
	  sed -n 's/.*"name":"aws_cluster".*"executable":"\([^"]*\)".*/\1/p'); \
	  tests/vm/run.sh "$(BIN)" "$(CARGO_TARGET_DIR)/test-vm" "$$aws_cluster"

pjdfstest: deps-test $(TOOLS)/bin/pjdfstest ## run pjdfstest on a mount, and print its table (as root)
	cargo build --release --locked --workspace --all-targets --features $(ALL_FEATURES)
	PJDFSTEST="$(TOOLS)/bin/pjdfstest" \
	  cargo test --release --locked --workspace --features $(ALL_FEATURES) --test pjdfstest -- --nocapture

$(TOOLS)/bin/pjdfstest:
	cargo install --quiet --locked --root "$(TOOLS)" --target-dir "$(TOOLS)/build" pjdfstest --version =$(PJDFSTEST_VERSION)

$(TOOLS)/bin/fsx:
	cargo install --quiet --locked --root "$(TOOLS)" --target-dir "$(TOOLS)/build" fsx --version =$(FSX_VERSION)

coverage: deps-test ## line coverage of the unit tests (builds everything anew, instrumented)
	@CARGO_LLVM_COV_VERSION=$(CARGO_LLVM_COV_VERSION) tests/scripts/coverage.sh

bench: build ## ShardFS and ext4 on the same kind of loop device, in tables (a quarter of an hour)
	@tests/scripts/bench.sh

fmt: ## format the sources
	cargo fmt --all

lint: ## formatting and clippy
	cargo fmt --all -- --check
	cargo clippy --release --locked --workspace --all-targets --features $(ALL_FEATURES) -- -D warnings

deny: ## licences, sources and bans of the dependencies (installs cargo-deny: minutes)
	@cargo deny --version >/dev/null 2>&1 || cargo install --quiet --locked --target-dir "$(TOOLS)/build" cargo-deny --version =$(CARGO_DENY_VERSION)
	cargo deny --locked check bans licenses sources
