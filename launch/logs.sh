#!/usr/bin/env bash
# Prints the last lines of the run's log: of every worker, or follows the first one's.
# Usage: launch/logs.sh [--follow]
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "${1:-}" in
  '') everywhere "tail -n ${LINES_OF_LOG:-40} vlm_jax.log | sed \"s/^/\${HOSTNAME##*-w-}: /\"" ;;
  --follow) on_first_worker "tail -n ${LINES_OF_LOG:-40} -F vlm_jax.log" ;;
  *) die "$USAGE" "$1 is not known: launch/logs.sh [--follow]" ;;
esac
