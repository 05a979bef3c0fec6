#!/usr/bin/env bash
# Starts one verb by xpk on a cluster that xpk made; it writes a JobSet like manifest.sh's.
# Usage: CLUSTER=NAME PROJECT=... ZONE=... IMAGE=REGISTRY/vlm-jax:TAG launch/gke/xpk.sh train --config=FILE
#        --workdir=gs://BUCKET/DIR
set -euo pipefail
# shellcheck source=launch/gke/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
needs_verb "$@"
needs_bucket "$*"
for name in CLUSTER PROJECT ZONE IMAGE; do
  [ -n "${!name:-}" ] || die "$USAGE" "set $name"
done

# exec: SIGTERM reaches the run itself. 42 and 127-255 are xpk's own statuses to restart with.
run xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" --workload="$JOB" \
  --tpu-type="$ACCELERATOR" --num-slices=1 --docker-image="$IMAGE" --docker-name=vlm-jax \
  --max-restarts="$MAX_RESTARTS" --termination-grace-period-seconds="$GRACE_SECONDS" \
  --command="exec vlm-jax $(quoted "$@")"
