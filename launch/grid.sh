#!/usr/bin/env bash
# Runs a grid on the TPU, waits for its end and brings rows and report here; continues what it finds.
# Usage: launch/grid.sh configs/demo_full.py runs/demo_full [--config.field=value ...]
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -ge 2 ] || die "$USAGE" "usage: launch/grid.sh CONFIG WORKDIR [--config.field=value ...]"
config=$1 workdir=$2
shift 2
case "$workdir" in
  gs://*) results=runs/$(basename "$workdir") ;;
  /* | *..* | *://*) die "$USAGE" "WORKDIR=$workdir must be gs://BUCKET/NAME, or lie inside the" \
    "checkout, as runs/NAME" ;;
  *) results=$workdir ;;
esac

set -- grid --config="$config" --workdir="$workdir" "$@"
launch/run.sh "$@"
launch/wait.sh "$@"
run mkdir -p "$results"
for result in rows.jsonl report; do
  case "$workdir" in
    gs://*) run gcloud storage cp --recursive "$workdir/$result" "$results/" ;;
    *) from_first_worker "vlm_jax/$workdir/$result" "$results/" ;;
  esac
done
