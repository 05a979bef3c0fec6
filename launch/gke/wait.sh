#!/usr/bin/env bash
# Waits until the JobSet has ended, through all restarts: 0 finished, 1 failed, 66 there is none.
# Usage: launch/gke/wait.sh
set -euo pipefail
# shellcheck source=launch/gke/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
plain "$@"

while :; do
  status='{.items[*].status.terminalState}/{.items[*].status.restarts}/{.items[*].metadata.name}'
  ask "${kubectl[@]}" get jobset --field-selector="metadata.name=$JOB" --output="jsonpath=$status"
  [ "$DRY" != 1 ] || exit 0
  IFS=/ read -r state restarts name <<< "$ANSWER"
  [ -n "$name" ] || die "$NOT_STARTED" "there is no JobSet $JOB"
  case "$state" in
    Completed) echo "$JOB is finished after ${restarts:-0} restarts" && exit 0 ;;
    Failed) die 1 "$JOB failed after ${restarts:-0} restarts: launch/gke/logs.sh" ;;
    *) pause "$JOB runs, ${restarts:-0} restarts so far" ;;
  esac
done
