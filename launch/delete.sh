#!/usr/bin/env bash
# Gives the TPU back, and everything on its disk with it; does nothing when there is none.
# Usage: launch/delete.sh
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
plain "$@"

look
if [ -z "$STATE" ] && [ "$DRY" != 1 ]; then
  echo "there is no $TPU in $ZONE"
  exit 0
fi
release
