#!/usr/bin/env bash
# What is done on a worker, by the scripts that reach it: it lies there with the rest of the checkout.
# Usage: vlm_jax/launch/worker.sh install | start [NAME=VALUE ...] VERB ... | status | stop [SIGNAL]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.." # the home folder: lock, log and status survive a checkout

free() { flock --nonblock vlm_jax.lock true; }

case "$1" in
  install)
    # uv brings its own Python: the images of v6e and older have 3.10. Those of Ubuntu 24.04 ask for
    # the variable before pip may install for a user.
    PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
    cd vlm_jax
    python3 -m uv venv --quiet --allow-existing --python 3.11 .venv
    python3 -m uv pip install --quiet --python .venv/bin/python \
      --constraint constraints/py311.txt --editable '.[tpu,gcs,report,demo,tensorboard]'
    ;;
  start)
    shift
    command=$(printf ' %q' "$@")
    command=${command# }
    # The process inherits the lock and holds it until it ends, however it ends.
    exec 9> vlm_jax.lock
    if ! flock --timeout 0.3 9; then # a status is being asked for, or a run goes on
      begun=$(head -n 1 vlm_jax.status)
      [ "$begun" = "$command" ] || { echo "another run is going on: $begun" >&2; exit 73; }
      echo already running
      exit 0
    fi
    echo "$command" > vlm_jax.status
    settings=()
    while [[ "$1" =~ ^[A-Za-z_]+= ]]; do
      settings+=("$1")
      shift
    done
    (
      trap '' HUP # the connection that started it may end
      trap : TERM # the run saves and ends; how it ended is still written down
      (
        cd vlm_jax
        echo "$BASHPID" > ../vlm_jax.pid
        exec env "${settings[@]}" .venv/bin/vlm-jax "$@"
      ) && code=0 || code=$?
      echo "exit $code" >> vlm_jax.status
    ) >> vlm_jax.log 2>&1 < /dev/null &
    ;;
  status) # running, the exit status, gone (it could not say how it ended) or idle; then the command
    if [ ! -s vlm_jax.status ]; then
      said=idle
    elif ! free; then
      said=running
    else
      said=$(sed -n '2s/exit //p' vlm_jax.status)
    fi
    echo "worker ${HOSTNAME##*-w-}: ${said:-gone}, $(head -n 1 vlm_jax.status 2> /dev/null || true)"
    ;;
  stop) # with TERM, or another signal
    free || kill "-${2:-TERM}" "$(cat vlm_jax.pid)"
    ;;
  *)
    echo "worker.sh: $1 is none of install, start, status, stop" >&2
    exit 2
    ;;
esac
