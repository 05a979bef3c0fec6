#!/usr/bin/env bash
# Starts one verb as a JobSet on GKE; while it is there, the same command starts nothing.
# Usage: IMAGE=REGISTRY/vlm-jax:TAG launch/gke/run.sh train --config=FILE --workdir=gs://BUCKET/DIR
set -euo pipefail
# shellcheck source=launch/gke/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

manifest=$(launch/gke/manifest.sh "$@") || exit
echo "+ ${kubectl[*]} apply --filename=- <<'YAML'"
echo "$manifest"
echo YAML
if [ "$DRY" != 1 ]; then
  applied=$("${kubectl[@]}" apply --filename=- <<< "$manifest") || die "$AGAIN" "not applied: see above;" \
    "where another command has this name, choose JOB=NAME or use launch/gke/delete.sh"
  echo "$applied"
  # One that has ended stays as it is.
  [[ "$applied" != *unchanged ]] || echo "it was there: to start it again, launch/gke/delete.sh first"
fi
echo "its end: launch/gke/wait.sh; its output: launch/gke/logs.sh; JOB=$JOB"
