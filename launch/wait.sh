#!/usr/bin/env bash
# Waits until a run has ended on every worker, and ends as it did.
# Usage: launch/wait.sh VERB ... (the words that launch/run.sh was given)
# Status: 0 finished, 1 failed, 42 to be started again, 66 never started, 69 the TPU was taken away,
# 73 something else runs there, 75 no answer (the run goes on).
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -gt 0 ] || die "$USAGE" "which run? launch/wait.sh VERB ..., the words of launch/run.sh"
needs_run "$@"

command=$(quoted "$@")
# A worker that was never set up has no script to ask.
status="if [ -e vlm_jax/launch/worker.sh ]; then vlm_jax/launch/worker.sh status; else \
echo worker \${HOSTNAME##*-w-}: idle; fi"
misses=0 alone=0
while :; do
  look
  # A TPU that was taken away is not asked how the run does.
  case "$STATE" in
    ACTIVE) ;;
    LEAVING) pause "$TPU is $SAID" && continue ;;
    WAITING) # Google repairs what is no spot TPU
      [ "$CAPACITY" = spot ] || { pause "$TPU is $SAID" && continue; }
      die "$LOST" "$TPU is $SAID: taken away" ;;
    *) [ "$DRY" = 1 ] || die "$LOST" "$TPU is ${SAID:-gone}: taken away" ;;
  esac
  reached=0
  answers=$(everywhere "$status") || reached=$?
  echo "$answers"
  [ "$DRY" != 1 ] || exit 0
  if [ "$reached" != 0 ]; then
    misses=$((misses + 1))
    [ "$misses" -lt "$PATIENCE" ] || die "$AGAIN" "no answer from every worker $misses times in a row"
    pause "no answer from every worker" && continue
  fi
  misses=0 running=0 ended=0 stopped=0 unknown=0 none=0 failed=''
  while read -r _ worker now words; do
    case "$now $words" in
      "running, $command") running=$((running + 1)) ;;
      running,*) die "$BUSY" "worker ${worker%:} runs something else: $words" ;;
      "0, $command") ended=$((ended + 1)) ;;
      "gone, $command") unknown=$((unknown + 1)) ;;
      [0-9]*", $command")
        # What was killed by a signal is continued, as after a save. An error of the program's own
        # would only come again.
        if [ "${now%,}" = "$RESTART" ] || [ "${now%,}" -ge 128 ]; then
          stopped=$((stopped + 1))
        else
          failed="$failed, worker ${worker%:} with status ${now%,}"
        fi ;;
      *) none=$((none + 1)) ;;
    esac
  done < <(grep '^worker [^ ]*: ' <<< "$answers")
  over=$((stopped + unknown + ${#failed}))
  if [ "$running" -gt 0 ] && [ "$over" -gt 0 ]; then
    # JAX ends what misses a peer; what is still there after some looks hangs.
    alone=$((alone + 1))
    signal=TERM
    [ "$alone" -lt $((2 * PATIENCE)) ] || signal=KILL
    [ "$alone" -lt "$PATIENCE" ] || everywhere "vlm_jax/launch/worker.sh stop $signal" || true
  fi
  if [ "$running" -gt 0 ] && [ "$over$none" != 00 ] && [ "$over" = 0 ]; then
    die "$NOT_STARTED" "$command does not run on $none workers"
  fi
  [ "$running" = 0 ] || { pause "$running workers run" && continue; }
  # Where a machine could not say how the run ended, the others failed for want of it.
  [ -z "$failed" ] || [ "$unknown" -gt 0 ] || die 1 "the run failed: ${failed#, }; launch/logs.sh"
  [ "$over" = 0 ] || die "$RESTART" "the run stopped before its end: launch/run.sh continues it"
  [ "$none" = 0 ] || die "$NOT_STARTED" "there is no run of $command on $TPU"
  echo "finished on $ended workers"
  exit 0
done
