#!/usr/bin/env bash
# Asks for the TPU and waits until it is there; a TPU that is there already is left as it is.
# Usage: launch/create.sh [further flags of gcloud compute tpus queued-resources create]
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

case "$ACCELERATOR" in
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v4-*) runtime=tpu-ubuntu2204-base ;;
  *) die "ACCELERATOR=$ACCELERATOR is not known here: v6e-N, v5p-N, v5litepod-N or v4-N." \
    "TPU7x and later exist only through Compute Engine or GKE: see launch/README.md" ;;
esac
case "$CAPACITY" in
  spot | reserved) set -- "--$CAPACITY" "$@" ;;
  on-demand) ;;
  *) die "CAPACITY=$CAPACITY is not known: spot, reserved or on-demand" ;;
esac

look
case "$STATE" in
  FAILED | SUSPENDED) # a spot TPU that was taken away cannot be started again, only asked for anew
    run gcloud compute tpus queued-resources delete "$TPU" --project="$PROJECT" --zone="$ZONE" \
      --force --quiet
    STATE= ;;
esac
if [ -z "$STATE" ]; then
  run gcloud compute tpus queued-resources create "$TPU" --project="$PROJECT" --zone="$ZONE" \
    --node-id="$TPU" --accelerator-type="$ACCELERATOR" --runtime-version="$runtime" "$@"
  look
fi

[ "$DRY" != 1 ] || exit 0
while [ "$STATE" != ACTIVE ]; do
  case "$STATE" in
    ACCEPTED | WAITING_FOR_RESOURCES | CREATING | PROVISIONING) ;;
    *) die "$TPU is ${STATE:-gone}: run launch/create.sh again in a minute" ;;
  esac
  echo "$TPU is $STATE; looking again in $POLL_SECONDS s"
  sleep "$POLL_SECONDS"
  look
done
echo "$TPU is ACTIVE"
