#!/usr/bin/env bash
# Asks for the TPU and waits until it is there; a TPU that is there already is left as it is.
# Usage: launch/create.sh [further flags of the request: gcloud compute tpus queued-resources create,
# or of the machines: gcloud compute instance-templates create]
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

look
while [ "$STATE" = LEAVING ]; do
  pause "$TPU is $SAID"
  look
done
case "$STATE" in
  FAILED | LOST) # a spot TPU that was taken away cannot be started again, only asked for anew
    release
    STATE= ;;
esac
if [ -z "$STATE" ]; then
  request "$@"
  look
fi

[ "$DRY" != 1 ] || exit 0
while [ "$STATE" != ACTIVE ]; do
  case "$STATE" in
    WAITING) reason ;;
    FAILED) reason && die "$FAILED" "the request for $TPU failed: ${ANSWER:-no reason given}" ;;
    *) die "$LOST" "$TPU is ${SAID:-gone}, taken away before it was ready: repeat the command" ;;
  esac
  refused "$ANSWER"
  pause "$TPU is $SAID${ANSWER:+ ($ANSWER)}"
  look
done
echo "$TPU is ACTIVE"
