# shellcheck shell=bash disable=SC2034
# Sourced by every script of this folder: which machine, and what the scripts share. Each value can be
# set from outside: PROJECT=my-project ZONE=us-east5-b ACCELERATOR=v6e-8 launch/create.sh

: "${PROJECT:?set PROJECT to the Google Cloud project that pays}"
: "${ZONE:?set ZONE to a zone that has the accelerator, for example us-east5-b}"
TPU=${TPU:-vlm-jax}                 # name of the queued resource and of its node
ACCELERATOR=${ACCELERATOR:-v6e-8}   # v6e-N, v5p-N, v5litepod-N, v4-N
CAPACITY=${CAPACITY:-on-demand}     # on-demand, reserved, spot (its disk goes when it is taken away)
POLL_SECONDS=${POLL_SECONDS:-30}
DRY=${DRY:-0}                       # 1 prints the commands and does nothing

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

die() { echo "$(basename "$0"): $*" >&2; exit 1; }

# Prints a command as it could be typed.
show() {
  local word
  printf '+'
  for word; do
    case "$word" in
      *[!A-Za-z0-9_./:=,@%+-]*) printf " '%s'" "$(printf %s "$word" | sed "s/'/'\\\\''/g")" ;;
      *) printf ' %s' "$word" ;;
    esac
  done
  echo
}

# Prints a command, then does it.
run() {
  show "$@"
  [ "$DRY" = 1 ] || "$@"
}

# Sets STATE to the state of the queued resource; empty when there is none. It lists instead of
# describing, because a list tells "none" (empty, success) from "could not ask" (failure).
look() {
  set -- gcloud compute tpus queued-resources list --project="$PROJECT" --zone="$ZONE" \
    --filter="name~/$TPU\$" --format="value(state.state)"
  show "$@"
  STATE=
  [ "$DRY" = 1 ] || STATE=$("$@")
}

# Does the command in the home folder of one worker, or of all.
on_worker() {
  run gcloud compute tpus tpu-vm ssh "$TPU" --project="$PROJECT" --zone="$ZONE" \
    --worker="$1" --command="$2"
}
