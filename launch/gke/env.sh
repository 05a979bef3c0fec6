# shellcheck shell=bash disable=SC2034,SC2154
# Sourced by the scripts of this folder: which job, on which slice of the cluster that kubectl talks to.
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/../shell.sh"

JOB=${JOB:-vlm-jax}                    # name of the JobSet
ACCELERATOR=${ACCELERATOR:-v6e-8}      # v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N
TOPOLOGY=${TOPOLOGY:-2x4}              # of that slice, as its node pool has it
CHIPS_PER_VM=${CHIPS_PER_VM:-4}        # 8 for a node pool of ct6e-standard-8t or ct5lp-hightpu-8t
NAMESPACE=${NAMESPACE:-default}
QUEUE=${QUEUE-multislice-queue}        # Kueue's LocalQueue, by xpk's name; empty: no Kueue
SERVICE_ACCOUNT=${SERVICE_ACCOUNT:-}   # one that may write to the bucket
MAX_RESTARTS=${MAX_RESTARTS:-50}
GRACE_SECONDS=${GRACE_SECONDS:-300}    # between SIGTERM and SIGKILL: the time to save

whole CHIPS_PER_VM MAX_RESTARTS GRACE_SECONDS
[[ "$JOB" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] && [ ${#JOB} -le 40 ] || die "$USAGE" \
  "JOB=$JOB: at most 40 lower-case letters, digits and dashes, from a letter on"
kubectl=(kubectl --namespace="$NAMESPACE")
