#!/usr/bin/env bash
# TPU=name ZONE=zone ./launch/tpu_vm.sh --config=configs/msn.py --workdir=/mnt/shared/runs/msn
# Copies the last commit to every host of a TPU VM that is there already, installs, and starts one process per host.
# The work directory is on a file system that all hosts have mounted.
set -euo pipefail
: "${TPU:?the name of the TPU VM}" "${ZONE:?its zone}"
CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.."

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

archive=$(mktemp)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --output="$archive" HEAD
gcloud compute tpus tpu-vm scp "$archive" "$TPU:/tmp/big_ssl.tar.gz" --zone="$ZONE" --worker=all
on_all_hosts "mkdir -p ~/big_ssl && tar -xzf /tmp/big_ssl.tar.gz -C ~/big_ssl"
# On TPU VMs jax finds the coordinator and the other hosts by itself.
on_all_hosts "cd ~/big_ssl && ACCELERATOR=tpu ./launch/local.sh --coordinator=auto$(printf ' %q' "$@")"
