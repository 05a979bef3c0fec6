# shellcheck shell=bash disable=SC2034
# Sourced by the scripts that work on one TPU: which one, and what they share. Each value can be set
# from outside: PROJECT=my-project ZONE=us-east5-b ACCELERATOR=v6e-8 launch/create.sh
# shellcheck source=launch/shell.sh
source "$(dirname "${BASH_SOURCE[0]}")/shell.sh"

[ -n "${PROJECT:-}" ] || die "$USAGE" "set PROJECT to the Google Cloud project that pays"
[ -n "${ZONE:-}" ] || die "$USAGE" "set ZONE to a zone that has the accelerator, such as us-east5-b"
TPU=${TPU:-vlm-jax}                 # name of the request and of its machines
ACCELERATOR=${ACCELERATOR:-v6e-8}   # v4-N, v5litepod-N, v5p-N, v6e-N, tpu7x-N
TOPOLOGY=${TOPOLOGY:-}              # API=compute only: 2x2x2, as Google's table of slices has it
CAPACITY=${CAPACITY:-on-demand}     # on-demand, reserved, spot (its disk goes when it is taken away)
MAX_RESTARTS=${MAX_RESTARTS:-50}    # supervise.sh: starts after the first
KEEP=${KEEP:-0}                     # supervise.sh: 1 keeps the TPU when the run has ended
WHERE=(--project="$PROJECT" --zone="$ZONE")

whole MAX_RESTARTS
one_of KEEP 0 1
[[ "$TPU" =~ ^[a-z]([a-z0-9-]*[a-z0-9])?$ ]] || die "$USAGE" \
  "TPU=$TPU: lower-case letters, digits and dashes, from a letter on"
[[ "$ACCELERATOR" =~ -[1-9][0-9]*$ ]] || die "$USAGE" \
  "ACCELERATOR=$ACCELERATOR ends in no number of chips or cores: v6e-8"
case "$ACCELERATOR" in
  v4-* | v5litepod-* | v5p-* | v6e-*) API=${API:-queued} ;;
  tpu7x-*) API=${API:-compute} ;;
  *) die "$USAGE" "ACCELERATOR=$ACCELERATOR is not known here:" \
    "v4-N, v5litepod-N, v5p-N, v6e-N or tpu7x-N" ;;
esac
case "$API" in
  queued | compute) ;;
  *) die "$USAGE" "API=$API is not known: queued or compute" ;;
esac
# Both define look, request, reason, release; name_workers, on_workers, on_first_worker; to_workers
# and from_first_worker.
# shellcheck source=launch/api/queued.sh
source "launch/api/$API.sh"

# The words of a run: its settings, NAME=VALUE, then a verb with its flags.
needs_run() {
  while [[ "${1:-}" =~ ^[A-Za-z_]+= ]]; do shift; done
  needs_verb "$@"
}

# Does a command in the home folder of every worker, on all at once, as JAX needs it. Prints what they
# say. Each worker that failed or gave no answer is named; returns the highest status of a worker,
# AGAIN where one gave no answer.
everywhere() {
  local answers line worker reached=0 status=0
  local -A statuses=()
  answers=$(mktemp)
  # Each worker says who it is and how the command ended: who does not say it gave no answer.
  on_workers "( $1 ); echo worker \${HOSTNAME##*-w-} ended: \$?" "$answers" || reached=$?
  while IFS= read -r line; do
    if [[ "$line" =~ ^worker\ ([^ ]+)\ ended:\ ([0-9]+)$ ]]; then
      statuses[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
    else
      echo "$line"
    fi
  done < "$answers"
  rm "$answers"
  [ "$DRY" != 1 ] || return 0
  if [ "$reached" = 0 ]; then NAMES=${!statuses[*]}; else name_workers; fi
  for worker in $NAMES; do
    case "${statuses[$worker]:-}" in
      '') echo "worker $worker gave no answer" >&2 && status=$AGAIN ;;
      0) ;;
      *) echo "worker $worker failed with status ${statuses[$worker]}" >&2
        [ "${statuses[$worker]}" -le "$status" ] || status=${statuses[$worker]} ;;
    esac
  done
  return "$status"
}
