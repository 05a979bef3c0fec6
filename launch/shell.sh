# shellcheck shell=bash disable=SC2034
# Sourced by every script of this folder: it prints what it does, and ends with one line and a status.

# Exit statuses, the same in all scripts (launch/README.md has the table).
USAGE=2        # a wrong word or setting: nothing was done
REFUSED=3      # the cloud refused: quota or permission; nothing was created
RESTART=42     # the run saved and stopped, or was killed: the same command continues it
NOT_STARTED=66 # there is no run of this command on the TPU
LOST=69        # the TPU was taken away: launch/create.sh asks for it again
FAILED=70      # the request failed before the TPU was ready
BUSY=73        # another run is going on there
AGAIN=75       # no answer: the same command can be repeated

DRY=${DRY:-0}                   # 1 prints the commands and does nothing
POLL_SECONDS=${POLL_SECONDS:-30}
PATIENCE=${PATIENCE:-5}         # how many times in a row a cloud or a worker may give no answer

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit

# die STATUS WORD ...: the one line that a failure ends with.
die() {
  local status=$1
  shift
  echo "$(basename "$0"): $*" >&2
  exit "$status"
}

# one_of NAME VALUE ...: ends where the setting of this name has another value. DRY=true must not do
# what DRY=1 prints.
one_of() {
  local name=$1 value
  shift
  for value in "$@"; do [ "${!name}" != "$value" ] || return 0; done
  die "$USAGE" "$name=${!name} is not known: choose one of $*"
}

# whole NAME ...: ends where one of these settings is no whole number.
whole() {
  local name
  for name in "$@"; do
    [[ "${!name}" =~ ^[0-9]+$ ]] || die "$USAGE" "$name=${!name}: write a whole number"
  done
}

# plain WORD ...: ends where words follow a script that takes none.
plain() {
  [ $# = 0 ] || die "$USAGE" "takes no words, and got $*: settings stand before it, NAME=VALUE $0"
}

# The verbs of vlm-jax (a test compares them with its own list).
VERBS='train evaluate score grid report fit plan convert generate serve data checkpoint compile'

# needs_verb WORD ...: ends where these words do not begin with a verb. A worker would refuse them too,
# but only when there is a TPU to pay for.
needs_verb() {
  local verb
  [ $# -gt 0 ] || die "$USAGE" "which verb? $0 train --config=FILE --workdir=DIR"
  for verb in $VERBS; do [ "$1" != "$verb" ] || return 0; done
  die "$USAGE" "$1 is no verb of vlm-jax: choose one of $VERBS"
}

one_of DRY 0 1
whole POLL_SECONDS PATIENCE

# Words as a shell reads them back, with a space between.
quoted() {
  local text
  text=$(printf ' %q' "$@")
  echo "${text# }"
}

# Sleeps until things are looked at again.
pause() {
  echo "$1; looking again in $POLL_SECONDS s"
  sleep "$POLL_SECONDS"
}

# Prints the chips of a topology; ends where the accelerator has another number of them.
chips_of() {
  local topology=$1 accelerator=$2 cores chips
  case "$accelerator" in # N counts TensorCores, of which some chips have two
    tpu7x-* | v5p-* | v4-*) cores=2 ;;
    v6e-* | v5litepod-*) cores=1 ;;
    *) die "$USAGE" "ACCELERATOR=$accelerator is not known here:" \
      "v4-N, v5litepod-N, v5p-N, v6e-N or tpu7x-N" ;;
  esac
  [[ "$topology" =~ ^[0-9]+(x[0-9]+){1,2}$ ]] || die "$USAGE" "TOPOLOGY=$topology: write it as 2x2x2"
  chips=$((${topology//x/*}))
  [ $((chips * cores)) = "${accelerator##*-}" ] || die "$USAGE" "TOPOLOGY=$topology has $chips" \
    "chips, ACCELERATOR=$accelerator has $((${accelerator##*-} / cores))"
  echo "$chips"
}

# Prints the runtime version of a TPU VM; ends where there is none.
runtime_of() {
  case "$1" in
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v4-*) echo tpu-ubuntu2204-base ;;
    *) die "$USAGE" "ACCELERATOR=$1 is no TPU VM: v4-N, v5litepod-N, v5p-N or v6e-N here;" \
      "TPU7x by Compute Engine or GKE" ;;
  esac
}

# Ends where the work folder would go with the machine; $1 holds the words of a verb.
needs_bucket() {
  case " $1" in
    *' --workdir='[a-z]*://* | *' --workdir '[a-z]*://*) ;;
    *' --workdir='/* | *' --workdir '/*) [ "${2:-}" = mounted ] && return ;;&
    *) die "$USAGE" "--workdir must outlive the TPU: gs://BUCKET/DIR${2:+, or a mounted folder}" ;;
  esac
}

# Prints a command as it could be typed.
show() {
  local word
  printf '+'
  for word; do
    case "$word" in
      '' | *[!A-Za-z0-9_./:=,@%+-]*) printf " '%s'" "${word//\'/\'\\\'\'}" ;;
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

# Ends where a message of the cloud's is one that no repetition changes; it is on stderr already.
refused() {
  case "$1" in
    *' per minute'*) ;; # too many questions at once
    *RESOURCE_EXHAUSTED* | *QUOTA_EXCEEDED* | *[Qq]uota*exceeded*)
      die "$REFUSED" "the quota does not allow it: ask for more quota, or choose another ZONE" ;;
    *PERMISSION_DENIED* | *UNAUTHENTICATED* | *'Required '*' permission'* | *'gcloud auth login'*)
      die "$REFUSED" "permission refused: look at gcloud auth list, at PROJECT and at its roles" ;;
    *INVALID_ARGUMENT* | *'Invalid value for field'* | *'unrecognized arguments'*)
      die "$USAGE" "the cloud does not take the request: see its message above" ;;
  esac
}

# Prints a command, then does it; ends with one line where it fails.
attempt() {
  local errors said status=0
  show "$@"
  [ "$DRY" != 1 ] || return 0
  errors=$(mktemp)
  "$@" 2> "$errors" || status=$?
  said=$(cat "$errors")
  rm "$errors"
  [ -z "$said" ] || echo "$said" >&2
  [ "$status" != 0 ] || return 0
  case "$* $said" in # somebody else was faster
    *' create '*ALREADY_EXISTS* | *' create '*'already exists'*) return 0 ;;
    *' delete '*NOT_FOUND* | *' delete '*'was not found'*) return 0 ;;
  esac
  refused "$said"
  die "$AGAIN" "no success (status $status): see the message above; the command can be repeated"
}

# Prints a question to the cloud, then sets ANSWER to what it says. A network error is not an
# answer: it is asked again, PATIENCE times in a row.
ask() {
  local misses=0 errors said
  show "$@"
  ANSWER=
  [ "$DRY" != 1 ] || return 0
  errors=$(mktemp)
  until ANSWER=$("$@" 2> "$errors"); do
    said=$(cat "$errors")
    echo "$said" >&2
    refused "$said"
    misses=$((misses + 1))
    [ "$misses" -lt "$PATIENCE" ] || die "$AGAIN" \
      "the cloud gave no answer $misses times in a row: what runs goes on; repeat the command"
    echo "no answer; asking again in $POLL_SECONDS s" >&2
    sleep "$POLL_SECONDS"
  done
  rm "$errors"
}
