#!/usr/bin/env bash
# Brings the last commit and what it needs to every worker; again after each commit, to bring the next.
# Usage: launch/setup.sh
set -euo pipefail
# shellcheck source=launch/env.sh
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
plain "$@"

[ -z "$(git status --porcelain)" ] || echo "setup.sh: uncommitted changes are not sent" >&2

# Under a run nothing may change: its checkout and its packages are in use.
free='exec 9> vlm_jax.lock; flock --nonblock 9 || { echo "a run is going on" >&2; exit 73; }; '
bundle=runs/$TPU.bundle

run mkdir -p runs
run git bundle create --quiet "$bundle" HEAD
to_workers "$bundle" || die "$AGAIN" "a worker could not be reached: repeat the command"
everywhere "${free}git init --quiet vlm_jax && cd vlm_jax && git fetch --quiet ../$TPU.bundle HEAD && \
git checkout --quiet --force --detach FETCH_HEAD" || die $? "the checkout failed: see above"
everywhere "${free}vlm_jax/launch/worker.sh install" || die $? "the installation failed: see above"
