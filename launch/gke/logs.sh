#!/usr/bin/env bash
# Prints the last lines of every worker's log; with --follow follows them.
# Usage: launch/gke/logs.sh [--follow]
set -euo pipefail
# shellcheck source=launch/gke/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1:-}" in
  '' | --follow) ;;
  *) die "$USAGE" "$1 is not known: launch/gke/logs.sh [--follow]" ;;
esac
run "${kubectl[@]}" logs --selector="jobset.sigs.k8s.io/jobset-name=$JOB" --container=vlm-jax --prefix \
  --tail="${LINES_OF_LOG:-40}" --max-log-requests=1000 "$@"
