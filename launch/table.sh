#!/usr/bin/env bash
# ./launch/table.sh RECIPE "SEEDS" "METHODS" [flags of big_ssl.main]: trains configs/METHOD.py:RECIPE for every method and
# seed into runs/RECIPE/METHOD-SEED (RUNS=FOLDER chooses another folder), then prints one table. Run again, it skips what
# is finished and resumes what is not.
#   ./launch/table.sh sprites "0 1"
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/install.sh"
[ $# -ge 1 ] || fail "usage: launch/table.sh RECIPE [\"SEEDS\"] [\"METHODS\"] [flags of big_ssl.main]"
recipe=$1 seeds=${2:-0} methods=${3:-} runs=${RUNS:-runs/$1}
shift $(($# < 3 ? $# : 3))
[ -n "$methods" ] || methods=$(grep -l "^def $recipe()" configs/*.py | xargs -n1 basename -s .py)
install requirements.txt
mkdir -p "$runs"
for seed in $seeds; do
  for method in $methods; do
    workdir=$runs/$method-$seed
    [ ! -e "$workdir/finished" ] || continue
    echo "=== $method, seed $seed"
    .venv/bin/python -m big_ssl.main --config="configs/$method.py:$recipe" --workdir="$workdir" --config.seed="$seed" "$@"
    touch "$workdir/finished"
  done
done
.venv/bin/python -m big_ssl.table "$runs"
