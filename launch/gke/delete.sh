#!/usr/bin/env bash
# Stops the JobSet, which saves first, and removes it; does nothing when there is none.
# Usage: launch/gke/delete.sh
set -euo pipefail
# shellcheck source=launch/gke/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
plain "$@"

run "${kubectl[@]}" delete jobset "$JOB" --ignore-not-found
