#!/usr/bin/env bash
# Runs a grid on many slices: one job for each cell, by a scheduler that is there. All cells meet in one
# work folder on a bucket; a cell that is finished is not run again, and two jobs never train one cell at
# the same time. When all are finished, `vlm-jax grid` with the same words has the law and the report.
# Usage: launch/cells.sh queued|gke|sky CONFIG gs://BUCKET/DIR [--config.field=value ...]
#   queued: SLICES supervisors here, each on a TPU of its own (TPU-0, TPU-1, ...), take one cell after
#           another; gke: one JobSet for each cell, which Kueue queues; sky: one managed job for each
set -euo pipefail
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"
[ $# -ge 3 ] || die "$USAGE" "usage: launch/cells.sh queued|gke|sky CONFIG gs://BUCKET/DIR [--config.x=y]"
scheduler=$1 config=$2 workdir=$3
shift 3
needs_bucket "--workdir=$workdir"
VLM_JAX=${VLM_JAX:-.venv/bin/vlm-jax}
SLICES=${SLICES:-2}
export JOB=${JOB:-vlm-jax} TPU=${TPU:-vlm-jax}

# A name that Kubernetes takes, 40 letters at most, different for different cells.
job_of() {
  local name sum
  name=$(tr '[:upper:]_.' '[:lower:]--' <<< "$JOB-$1")
  sum=$(cksum <<< "$1")
  if [ ${#name} -gt 40 ] || [[ "$1" = *[!a-z0-9-]* ]]; then name=${name:0:29}-${sum%% *}; fi
  echo "$name"
}

show "$VLM_JAX" grid --config="$config" "$@" --list-cells
cells=$("$VLM_JAX" grid --config="$config" "$@" --list-cells) || die "$USAGE" "no cells: see above"
job=(grid --config="$config" --workdir="$workdir" "$@")

case "$scheduler" in
  gke | sky)
    for cell in $cells; do
      JOB=$(job_of "$cell") "launch/$scheduler/run.sh" "${job[@]}" --cell="$cell" ||
        die $? "$cell was not started: repeat the command"
    done ;;
  queued)
    # Each slot has a TPU, which is kept from cell to cell and given back in the end.
    mkdir -p runs
    one="export TPU=$TPU-\$SLOT KEEP=1; launch/supervise.sh $(quoted "${job[@]}") --cell=\"\$1\""
    if [ "$DRY" = 1 ]; then
      for cell in $cells; do SLOT=0 bash -c "$one" cell "$cell"; done
    else
      failed=0
      xargs --max-procs="$SLICES" --process-slot-var=SLOT --max-args=1 bash -c \
        "$one >> runs/$TPU-cells-\$SLOT.log 2>&1 || { echo \"\$1 ended with status \$?: see\" \
runs/$TPU-cells-\$SLOT.log >&2; exit 1; }" cell <<< "$cells" || failed=$?
    fi
    for ((slot = 0; slot < SLICES; slot++)); do
      TPU=$TPU-$slot launch/delete.sh || echo "$TPU-$slot may still be there" >&2
    done
    [ "${failed:-0}" = 0 ] || die 1 "not all cells are finished: see above; repeat the command" ;;
  *) die "$USAGE" "$scheduler is not known: queued, gke or sky" ;;
esac
echo "when all are finished, law and report: $VLM_JAX $(quoted "${job[@]}")"
