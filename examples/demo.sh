#!/usr/bin/env bash
# The main job from nothing: sets up what is missing, then records, compares, mounts and reads back a real
# training run. See examples/demo.py for the steps.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment.sh
require_fuse
prepare_environment .venv demo
exec .venv/bin/python examples/demo.py "$@"
