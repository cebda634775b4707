#!/usr/bin/env bash
# From a fresh clone to an aligned model: sets up .venv, then trains configs/quickstart.yaml.
# Arguments go to the run:  launch/quickstart.sh num_steps=5 name=short
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
setup_environment
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} # the model comes with a package; nothing is fetched
say "training configs/quickstart.yaml $*"
exec .venv/bin/raylhf train configs/quickstart.yaml "$@"
