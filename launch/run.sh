#!/usr/bin/env bash
# Starts one verb on every worker, detached; while it runs, the same command starts nothing.
# Usage: launch/run.sh [NAME=VALUE ...] train --config=configs/demo.py --workdir=gs://BUCKET/demo
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
needs_run "$@"

everywhere "vlm_jax/launch/worker.sh start $(quoted "$@")" || die $? "not started on all workers:" \
  "see above; the command can be repeated, it starts what does not run"
echo "its output: launch/logs.sh; its end: launch/wait.sh $(quoted "$@")"
