#!/usr/bin/env bash
# Runs the tests from nothing: sets up what is missing. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
. .ci/environment.sh
require_fuse
require_old_fuse
prepare_environment .venv-test test,demo
exec .venv-test/bin/python -m pytest "$@"
