#!/usr/bin/env bash
# Runs one verb to its end, whatever is taken away meanwhile: asks for the TPU, sets it up, starts the
# command, and does so again when the TPU is taken away or the run is stopped. Gives the TPU back.
# Usage: launch/supervise.sh train --config=FILE --workdir=gs://BUCKET/DIR
# It can be stopped and started again: it finds what is going on. Further flags of the request: FLAGS.
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
needs_run "$@"
needs_bucket "$*" mounted
read -ra flags <<< "${FLAGS:-}"

if [ "$DRY" = 1 ]; then
  launch/create.sh "${flags[@]}"
  launch/setup.sh
  launch/run.sh "$@"
  launch/wait.sh "$@"
  [ "$KEEP" = 1 ] || launch/delete.sh
  exit 0
fi

starts=0 silences=0 failures=0 started=0
# One more start, of at most MAX_RESTARTS after the first.
again() {
  started=0
  starts=$((starts + 1))
  [ "$starts" -le "$MAX_RESTARTS" ] || finish 1 "gave up after $MAX_RESTARTS restarts"
  echo "supervise.sh: $*; start $((starts + 1)) of at most $((MAX_RESTARTS + 1))"
  sleep "$POLL_SECONDS"
}

# Keeps the log, gives the TPU back, and ends.
finish() {
  local status=$1 log=runs/$TPU.log
  shift
  mkdir -p runs
  if ! LINES_OF_LOG=2000 launch/logs.sh > "$log"; then
    echo "supervise.sh: the log could not be brought to $log" >&2
    [ "$status" = 0 ] || KEEP=1 # it is still needed
  fi
  if [ "$KEEP" = 1 ]; then
    echo "supervise.sh: $TPU is kept: launch/delete.sh gives it back" >&2
  else
    launch/delete.sh || echo "supervise.sh: $TPU may still be there: launch/delete.sh" >&2
  fi
  [ "$status" = 0 ] || die "$status" "$*; the log: $log"
  echo "supervise.sh: $*; the log: $log"
  exit 0
}

while :; do
  status=0
  launch/create.sh "${flags[@]}" || status=$?
  case "$status" in
    0) failures=0 ;;
    "$LOST") again "$TPU was taken away before it was ready" && continue ;;
    "$FAILED") # a request that is wrong would fail for ever
      failures=$((failures + 1))
      [ "$failures" -lt 3 ] || die "$FAILED" "the request failed $failures times in a row"
      again "the request failed" && continue ;;
    *) exit "$status" ;; # create.sh has said why
  esac

  # What was started before goes on: only what does not run is set up and started.
  launch/wait.sh "$@" || status=$?
  if [ "$status" = "$NOT_STARTED" ] || [ "$status" = "$RESTART" ]; then
    # A TPU that is taken away while its workers are asked can look like one without a run.
    [ "$status" = "$NOT_STARTED" ] || again "the run was stopped"
    [ "$started" = 0 ] || again "the run was lost"
    status=0
    launch/setup.sh || status=$?
    # Where some workers run already, they are set up, and the others are started.
    [ "$status" != "$BUSY" ] || status=0
    if [ "$status" = 0 ]; then
      launch/run.sh "$@" && started=1 || status=$?
    fi
    [ "$status" != 0 ] || launch/wait.sh "$@" || status=$?
  fi
  case "$status" in
    0) finish 0 "finished after $starts restarts" ;;
    "$RESTART" | "$NOT_STARTED") silences=0 ;; # the next round starts it
    "$LOST") # a group that has lost a machine looks like one that still waits for it
      silences=0
      [ "$API" != compute ] || launch/delete.sh || die "$AGAIN" "$TPU could not be given back"
      again "$TPU was taken away" ;;
    "$AGAIN") # a worker that cannot be reached comes back, or the TPU is exchanged
      silences=$((silences + 1))
      if [ "$silences" -ge "$PATIENCE" ]; then
        silences=0
        launch/delete.sh
        again "a worker of $TPU could not be reached"
      fi
      sleep "$POLL_SECONDS" ;;
    "$BUSY") die "$BUSY" "something else runs on $TPU: choose another TPU=NAME" ;;
    *) finish "$status" "the run failed" ;;
  esac
done
