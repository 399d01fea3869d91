#!/usr/bin/env bash
# ./launch/test.sh [pytest arguments]: installs into .venv on the first call, then runs the tests on the CPU.
set -euo pipefail
export ACCELERATOR=${ACCELERATOR:-cpu} JAX_PLATFORMS=cpu
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
install requirements.txt requirements-test.txt
exec .venv/bin/python -m pytest "$@"
