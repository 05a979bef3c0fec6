#!/usr/bin/env bash
# Brings the last commit and what it needs to every worker; again after each commit, to bring the next.
# Usage: launch/setup.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

[ -z "$(git status --porcelain)" ] || echo "setup.sh: uncommitted changes are not sent" >&2

# Under a run nothing may change: its checkout and its packages are in use.
free='exec 9> vlm_jax.lock; flock --nonblock 9 || { echo "a run is going on" >&2; exit 75; }; '

run mkdir -p runs
run git bundle create --quiet runs/vlm_jax.bundle HEAD
run gcloud compute tpus tpu-vm scp runs/vlm_jax.bundle "$TPU:vlm_jax.bundle" --project="$PROJECT" \
  --zone="$ZONE" --worker=all
on_worker all "${free}git init --quiet vlm_jax && cd vlm_jax && git fetch --quiet ../vlm_jax.bundle \
HEAD && git checkout --quiet --force --detach FETCH_HEAD"
# uv brings its own Python: the images of v6e and older have 3.10.
on_worker all "${free}python3 -m pip install --quiet --user uv && cd vlm_jax && python3 -m uv venv \
--quiet --allow-existing --python 3.11 .venv && python3 -m uv pip install --quiet --python \
.venv/bin/python --constraint constraints/py311.txt --editable '.[tpu,report,demo,tensorboard]'"
