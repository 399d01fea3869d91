#!/usr/bin/env bash
# ./launch/table.sh RECIPE "SEEDS" "METHODS" [flags of big_ssl.main]: trains configs/METHOD.py:RECIPE for every method and
# seed into runs/RECIPE/METHOD-SEED (RUNS=FOLDER chooses another folder), then prints one table. Run again, it skips what
# is finished and resumes what is not. A run that fails is named at the end, with exit code 1; the others go on.
#   ./launch/table.sh sprites "0 1"
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/install.sh"
[ $# -ge 1 ] || fail "usage: launch/table.sh RECIPE [\"SEEDS\"] [\"METHODS\"] [flags of big_ssl.main]"
recipe=$1 seeds=${2:-0} methods=${3:-} runs=${RUNS:-runs/$1}
shift $(($# < 3 ? $# : 3))
# No rows of the table: these start from the run of another method, or are judged by the labels of their own task.
apart='distillation|finetune|segmentation'
[ -n "$methods" ] || methods=$(grep -l "^def $recipe()" configs/*.py | sed 's|.*/||; s|\.py$||' | grep -vxE "$apart" || true)
[ -n "$methods" ] || fail "RECIPE=$recipe: no method in configs/ has a recipe of this name."
install requirements.txt
mkdir -p "$runs"
failed=()
for seed in $seeds; do
  for method in $methods; do
    workdir=$runs/$method-$seed
    [ ! -e "$workdir/finished" ] || continue
    echo "=== $method, seed $seed"
    code=0
    .venv/bin/python -m big_ssl.main --config="configs/$method.py:$recipe" --workdir="$workdir" --config.seed="$seed" "$@" ||
      code=$?
    case $code in
      0) touch "$workdir/finished" ;;
      3 | 130 | 143) exit "$code" ;; # stopped by a signal, and so is the table
      *) failed+=("$method-$seed (exit code $code)") ;;
    esac
  done
done
code=0
.venv/bin/python -m big_ssl.table "$runs" || code=$?
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed: %s\n' "${failed[@]}" >&2
  code=1
fi
exit "$code"
