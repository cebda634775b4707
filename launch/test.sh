#!/usr/bin/env bash
# Sets up .venv and runs the tests. Arguments go to pytest:  launch/test.sh tests/algos -q
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_environment dev
export HF_HUB_OFFLINE=1 # tests need no network
say "running the tests"
exec .venv/bin/python -m pytest "$@"
