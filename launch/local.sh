#!/usr/bin/env bash
# ./launch/local.sh --config=configs/msn.py [flags of big_ssl.main]: installs into .venv on the first call, then trains.
# Relative paths are read from the root of the repository. ACCELERATOR=cpu keeps the run on the CPU.
set -euo pipefail
directory=$PWD
source "$(dirname -- "${BASH_SOURCE[0]}")/install.sh"
[ "$directory" = "$PWD" ] || echo "running in $PWD"
install requirements.txt
[ "${ACCELERATOR:-}" != cpu ] || export JAX_PLATFORMS=${JAX_PLATFORMS:-cpu}
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/big_ssl/jax}
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=${JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS:-0.5}
exec .venv/bin/python -m big_ssl.main "$@"
