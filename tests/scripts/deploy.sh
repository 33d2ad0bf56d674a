#!/bin/bash
# Checks what is in deploy/: the CloudFormation template, the policy, user data, units, scripts. `deploy.sh TOOLS`: where cfn-lint is
# installed, from PyPI. Units are verified where their programs are installed (deb.sh).
set -euo pipefail
cd "$(dirname "$0")/../.."

tools=$1
version=${CFN_LINT_VERSION:?}
venv=$tools/cfn-lint-$version
# The worst scores that systemd may give; DEPLOYMENT.md says why they are no better.
exposures=(shardfs-node.service=47 shardfsd@.service=43)

fail() {
    echo "deploy: $*" >&2
    exit 1
}
checks=0
passed() {
    checks=$((checks + 1))
    echo "deploy: $*"
}

if [ ! -x "$venv/bin/cfn-lint" ]; then
    mkdir -p "$tools"
    python3 -m venv "$venv"
    "$venv/bin/pip" install --quiet "cfn-lint==$version" || { rm -rf "$venv"; fail "cfn-lint $version cannot be installed"; }
fi
"$venv/bin/cfn-lint" --include-checks W --template deploy/cloudformation/*.yaml
passed "cfn-lint $version has nothing to say"

"$venv/bin/python" tests/scripts/deploy.py
passed "the template's policy is iam-policy.json, and user data is as it must be"

for script in deploy/bootstrap deploy/debian/stage.sh tests/scripts/*.sh; do
    bash -n "$script"
done
for script in deploy/debian/shardfs*/*; do
    sh -n "$script"
done
passed "scripts are read without an error"

for pair in "${exposures[@]}"; do
    unit=${pair%=*}
    if ! said=$(systemd-analyze security --offline=true --no-pager --threshold="${pair#*=}" "deploy/systemd/$unit"); then
        fail "$unit is more exposed than ${pair#*=} of 100: $(tail -1 <<<"$said")"
    fi
    passed "$(tail -1 <<<"$said" | sed 's/^[^A-Za-z]*//')"
done
echo "$checks passed, 0 failed"
