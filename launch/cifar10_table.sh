#!/usr/bin/env bash
# ./launch/cifar10_table.sh DIR_OF_TFDS ["SEEDS"]: the CIFAR-10 recipe of every method, k-NN (k=200, T=0.1) and a linear
# probe at the last epoch. 200 epochs of batch 512, but for DeepCluster, LOCA, PAWS, SeLa and SuNCEt (see their configs).
# One accelerator is enough; stopped and run again, it resumes.
set -euo pipefail
[ $# -ge 1 ] || { echo 'usage: launch/cifar10_table.sh DIR_OF_TFDS ["SEEDS"]' >&2; exit 2; }
directory=$(realpath -- "$1")
exec "$(dirname -- "${BASH_SOURCE[0]}")/table.sh" cifar10 "${2:-0}" "" --data_dir="$directory" "${@:3}"
