#!/usr/bin/env bash
# Runs a grid on the TPU, waits for its end and brings rows and report here; continues what it finds.
# Usage: launch/grid.sh configs/demo_full.py runs/demo_full [--config.field=value ...]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -ge 2 ] || die "usage: launch/grid.sh CONFIG WORKDIR [--config.field=value ...]"
config=$1 workdir=$2
shift 2
case "$workdir" in /* | *..*) die "WORKDIR=$workdir must lie inside the checkout, as runs/NAME" ;; esac

launch/run.sh grid --config="$config" --workdir="$workdir" "$@"
# The lock is free when the run has ended.
on_worker 0 "flock vlm_jax.lock tail -n 20 vlm_jax.log"
run mkdir -p "$workdir"
for result in rows.jsonl report; do
  run gcloud compute tpus tpu-vm scp --recurse "$TPU:vlm_jax/$workdir/$result" "$workdir/" \
    --project="$PROJECT" --zone="$ZONE" --worker=0
done
