#!/usr/bin/env bash
# ./launch/local.sh --config=configs/msn.py [flags of big_ssl.main]: installs into .venv on the first call, then trains.
set -euo pipefail
directory=$PWD
source "$(dirname "${BASH_SOURCE[0]}")/install.sh"
[ "$directory" = "$PWD" ] || echo "running in $PWD"
install requirements.txt
exec .venv/bin/python -m big_ssl.main "$@"
