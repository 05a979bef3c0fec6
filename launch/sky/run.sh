#!/usr/bin/env bash
# Starts one verb as a managed job of SkyPilot, which asks again for a TPU that was taken away.
# Usage: JOB=NAME ACCELERATOR=v6e-8 launch/sky/run.sh train --config=FILE --workdir=gs://BUCKET/DIR
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/../shell.sh"
JOB=${JOB:-vlm-jax} ACCELERATOR=${ACCELERATOR:-v6e-8} CAPACITY=${CAPACITY:-spot}

needs_verb "$@"
needs_bucket "$*"
runtime=$(runtime_of "$ACCELERATOR") || exit
case "$CAPACITY" in
  spot) spot=true ;;
  on-demand) spot=false ;;
  *) die "$USAGE" "CAPACITY=$CAPACITY is not known: spot or on-demand" ;;
esac

# A second job of the same name would do the same work again.
ask sky jobs queue --skip-finished --output=json
if grep -q "\"job_name\": *\"$JOB\"" <<< "$ANSWER"; then
  echo "$JOB is in the queue already: sky jobs logs --name $JOB"
  exit 0
fi
task=$(sed -e "s/tpu-v6e-8: 1/tpu-$ACCELERATOR: 1/" -e "s/v2-alpha-tpuv6e/$runtime/" \
  -e "s/use_spot: true/use_spot: $spot/" -e '/^#/d' launch/sky/task.yaml)
echo "+ cat > runs/$JOB.yaml <<'YAML'"
echo "$task"
echo YAML
[ "$DRY" = 1 ] || { mkdir -p runs && echo "$task" > "runs/$JOB.yaml"; }
run sky jobs launch "runs/$JOB.yaml" --name "$JOB" --env "COMMAND=$(quoted "$@")" --detach-run --yes
echo "its output: sky jobs logs --name $JOB; its end: sky jobs queue; to stop it: sky jobs cancel --name $JOB"
