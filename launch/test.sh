#!/usr/bin/env bash
# ./launch/test.sh [pytest arguments]: installs into .venv on the first call, then runs the tests on the CPU.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/install.sh"
ACCELERATOR=${ACCELERATOR:-cpu} install requirements.txt requirements-test.txt
[ $# -gt 0 ] || set -- -q -n 2 --dist loadgroup --durations=15
JAX_PLATFORMS=cpu exec .venv/bin/python -m pytest "$@"
