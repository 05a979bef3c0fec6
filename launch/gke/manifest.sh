#!/usr/bin/env bash
# Prints the JobSet that runs one verb on one slice, restarts it where that helps, and fails otherwise.
# Usage: IMAGE=REGISTRY/vlm-jax:TAG launch/gke/manifest.sh train --config=FILE --workdir=gs://BUCKET/DIR
set -euo pipefail
# shellcheck source=launch/gke/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
needs_verb "$@"
[ -n "${IMAGE:-}" ] || die "$USAGE" "set IMAGE to an image of launch/Dockerfile"
chips=$(chips_of "$TOPOLOGY" "$ACCELERATOR") || exit
case "$ACCELERATOR" in
  tpu7x-*) label=tpu7x ;;
  v6e-*) label=tpu-v6e-slice ;;
  v5p-*) label=tpu-v5p-slice ;;
  v5litepod-*) label=tpu-v5-lite-podslice ;;
  v4-*) label=tpu-v4-podslice ;;
esac
needs_bucket "$*"
[ "$chips" -ge "$CHIPS_PER_VM" ] || CHIPS_PER_VM=$chips
[ $((chips % CHIPS_PER_VM)) = 0 ] || die "$USAGE" "TOPOLOGY=$TOPOLOGY: not machines of $CHIPS_PER_VM chips"
workers=$((chips / CHIPS_PER_VM))

# A word as YAML has it.
yaml() {
  local text=${1//\\/\\\\}
  printf '"%s"' "${text//\"/\\\"}"
}
# A line where its value is set.
line() { [ -z "$2" ] || printf '%s%s\n' "$1" "$2"; }

# Exit statuses with which the same command is started again: saved after SIGTERM, or killed.
again=$RESTART$(printf ',%s' {128..255})
command=$(for word in vlm-jax "$@"; do printf '                - %s\n' "$(yaml "$word")"; done)

grep -v "^$" <<YAML
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $JOB
$(line '  labels: {kueue.x-k8s.io/queue-name: ' "${QUEUE:+$QUEUE\}}")
  annotations:
    # A node pool is a slice: no two jobs share one.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # Every restart counts, and starts all workers; an error of the program itself ends the job.
    maxRestarts: $MAX_RESTARTS
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: $workers
        completions: $workers
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: vlm-jax
              operator: NotIn
              values: [$again]
        template:
          spec:
            restartPolicy: Never
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            terminationGracePeriodSeconds: $GRACE_SECONDS
$(line '            serviceAccountName: ' "$SERVICE_ACCOUNT")
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $label
              cloud.google.com/gke-tpu-topology: $TOPOLOGY
            tolerations:
            - {key: google.com/tpu, operator: Exists}
            containers:
            - name: vlm-jax
              image: $IMAGE
              command:
$command
              securityContext: {privileged: true}
              resources:
                limits: {google.com/tpu: $CHIPS_PER_VM}
              volumeMounts:
              - {name: shared-memory, mountPath: /dev/shm}
            volumes:
            - name: shared-memory
              emptyDir: {medium: Memory}
YAML
