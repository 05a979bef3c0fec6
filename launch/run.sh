#!/usr/bin/env bash
# Starts one verb on every worker, detached; while it runs, the same command starts nothing.
# Usage: launch/run.sh train --config=configs/demo.py --workdir=runs/demo
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -gt 0 ] || die "which verb? launch/run.sh train --config=FILE --workdir=DIR"

# The process inherits the lock and holds it until it ends, however it ends.
on_worker all "cd vlm_jax && exec 9> ../vlm_jax.lock && if flock --nonblock 9; then nohup \
.venv/bin/vlm-jax$(printf ' %q' "$@") >> ../vlm_jax.log 2>&1 < /dev/null & else echo already running; fi"
echo "its output: gcloud compute tpus tpu-vm ssh $TPU --project=$PROJECT --zone=$ZONE --worker=0" \
  "--command='tail -f vlm_jax.log'"
