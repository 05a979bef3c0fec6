# shellcheck shell=bash disable=SC2034,SC2153
# Sourced by launch/env.sh: a TPU by queued resources of the Cloud TPU API, v4 to v6e.

runtime=$(runtime_of "$ACCELERATOR") || exit
case "$CAPACITY" in
  spot | reserved) asked=("--$CAPACITY") ;;
  on-demand) asked=() ;;
  *) die "$USAGE" "CAPACITY=$CAPACITY is not known: spot, reserved or on-demand" ;;
esac
[ -z "$TOPOLOGY" ] || die "$USAGE" "TOPOLOGY is a setting of API=compute: ACCELERATOR says the size here"
of_tpu=(gcloud compute tpus)

# Sets STATE to '' (there is none), WAITING, ACTIVE, LEAVING, LOST or FAILED, and SAID to the cloud's
# word for it. It lists instead of describing: a list tells "none" (empty, success) from "could not
# ask" (failure).
look() {
  ask "${of_tpu[@]}" queued-resources list "${WHERE[@]}" --filter="name~/$TPU\$" \
    --format="value(state.state)"
  SAID=$ANSWER
  case "$SAID" in
    '' | ACTIVE | FAILED) STATE=$SAID ;;
    ACCEPTED | WAITING_FOR_RESOURCES | CREATING | PROVISIONING) STATE=WAITING ;;
    SUSPENDING | DELETING) STATE=LEAVING ;;
    SUSPENDED) STATE=LOST ;;
    *) die "$AGAIN" "$TPU is $SAID, a state that these scripts do not know" ;;
  esac
}

# Asks for the TPU, with further flags.
request() {
  attempt "${of_tpu[@]}" queued-resources create "$TPU" "${WHERE[@]}" --node-id="$TPU" \
    --accelerator-type="$ACCELERATOR" --runtime-version="$runtime" "${asked[@]}" "$@"
}

# Sets ANSWER to why the request failed, as far as the cloud says so; to nothing while it waits.
reason() {
  ANSWER=
  [ "$STATE" = FAILED ] || return 0
  ask "${of_tpu[@]}" queued-resources describe "$TPU" "${WHERE[@]}" \
    --format="value(state.failedData.error.message)"
}

# Gives it back, with its machines and their disks.
release() {
  attempt "${of_tpu[@]}" queued-resources delete "$TPU" "${WHERE[@]}" --force --quiet
}

# Sets NAMES to those of the workers, as these say them: 0, 1, ...
name_workers() {
  ask "${of_tpu[@]}" tpu-vm describe "$TPU" "${WHERE[@]}" --format="value(networkEndpoints.len())"
  NAMES=$(seq 0 $((ANSWER - 1)))
}

# A command on all workers; what they say goes into a file.
on_workers() {
  local ssh=("${of_tpu[@]}" tpu-vm ssh "$TPU" "${WHERE[@]}" --worker=all --quiet --command="$1")
  show "${ssh[@]}"
  [ "$DRY" = 1 ] || "${ssh[@]}" > "$2" < /dev/null
}

on_first_worker() {
  run "${of_tpu[@]}" tpu-vm ssh "$TPU" "${WHERE[@]}" --worker=0 --quiet --command="$1"
}

# A file into every worker's home folder.
to_workers() {
  run "${of_tpu[@]}" tpu-vm scp "$1" "$TPU:$(basename "$1")" "${WHERE[@]}" --worker=all --quiet
}

# A file or folder of the first worker to here.
from_first_worker() {
  run "${of_tpu[@]}" tpu-vm scp --recurse "$TPU:$1" "$2" "${WHERE[@]}" --worker=0 --quiet
}
