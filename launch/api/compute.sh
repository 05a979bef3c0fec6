# shellcheck shell=bash disable=SC2034,SC2153
# Sourced by launch/env.sh: a TPU by Compute Engine (an instance template, a managed instance group and
# for several hosts a workload policy, all three named $TPU): v5p, v6e, TPU7x and later.

region=${ZONE%-*}
case "$ACCELERATOR" in
  tpu7x-*) machine=tpu7x-standard-4t image=ubuntu-accel-2404-amd64-tpu-tpu7x ;;
  v6e-*) machine=ct6e-standard-4t image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
  v5p-*) machine=ct5p-hightpu-4t image=ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e ;;
  *) die "$USAGE" "instance groups have no $ACCELERATOR: v5p-N, v6e-N or tpu7x-N" ;;
esac
case "$CAPACITY" in
  spot) asked=(--provisioning-model=SPOT --instance-termination-action=DELETE) ;;
  flex-start) asked=(--provisioning-model=FLEX_START --instance-termination-action=DELETE
    --max-run-duration="${MAX_RUN:-7d}") ;;
  on-demand) asked=() ;;
  *) die "$USAGE" "CAPACITY=$CAPACITY is not known: spot, flex-start or on-demand" \
    "(a reservation: on-demand, and --reservation-affinity=specific --reservation=NAME)" ;;
esac
[ -n "$TOPOLOGY" ] || die "$USAGE" "set TOPOLOGY, as 2x2x2 for tpu7x-16 (8 chips on 2 hosts)"
chips=$(chips_of "$TOPOLOGY" "$ACCELERATOR") || exit
[ $((chips % 4)) = 0 ] || die "$USAGE" "TOPOLOGY=$TOPOLOGY: a $machine has 4 chips"
hosts=$((chips / 4))
groups=(gcloud compute instance-groups managed)
of_project=(--project="$PROJECT")
urls=projects/$PROJECT/regions/$region
VMS=() LOOKED=0 # names of the machines, as the last look found them

# Sets STATE to '' (there is none), WAITING, ACTIVE, LEAVING, LOST or FAILED, and SAID to what the
# cloud says of the group and its machines.
look() {
  local status action
  ask "${groups[@]}" list "${of_project[@]}" --zones="$ZONE" --filter="name=$TPU" \
    --format="value(targetSize)"
  STATE='' SAID='' VMS=() LOOKED=1
  case "$ANSWER" in
    '') return 0 ;;
    0) STATE=FAILED SAID="a group that was never given machines" && return 0 ;;
  esac
  ask "${groups[@]}" list-instances "$TPU" "${WHERE[@]}" \
    --format="csv[no-heading](instance.basename(),instanceStatus,currentAction)"
  STATE=WAITING SAID="without machines"
  [ -n "$ANSWER" ] || return 0
  SAID=$(cut -d, -f2,3 <<< "$ANSWER" | sort | uniq -c | xargs)
  mapfile -t VMS < <(cut -d, -f1 <<< "$ANSWER")
  STATE=ACTIVE
  [ "${#VMS[@]}" = "$hosts" ] || STATE=WAITING
  while IFS=, read -r _ status action; do
    case "$status,$action" in
      RUNNING,NONE) ;;
      STOPPING,* | STOPPED,* | TERMINATED,* | SUSPEND*) [ "$STATE" = LEAVING ] || STATE=LOST ;;
      *,DELETING | *,ABANDONING) STATE=LEAVING ;;
      *) [ "$STATE" != ACTIVE ] || STATE=WAITING ;;
    esac
  done <<< "$ANSWER"
}

# Asks for the group, with further flags for the machines. Template and policy belong to the group:
# what an earlier attempt left of them may say something else.
request() {
  local policy=()
  remove_parts
  if [ "$hosts" -gt 1 ]; then
    attempt gcloud compute resource-policies create workload-policy "$TPU" "${of_project[@]}" \
      --region="$region" --type=HIGH_THROUGHPUT --accelerator-topology="$TOPOLOGY" \
      --accelerator-topology-mode=AUTO_CONNECT
    policy=(--target-size-policy-mode=bulk --workload-policy="$urls/resourcePolicies/$TPU")
  fi
  attempt gcloud compute instance-templates create "$TPU" "${of_project[@]}" \
    --instance-template-region="$region" --machine-type="$machine" --maintenance-policy=TERMINATE \
    "${asked[@]}" --image-project=ubuntu-os-accelerator-images --image-family="$image" \
    --boot-disk-size=200GB --scopes=https://www.googleapis.com/auth/cloud-platform "$@"
  attempt "${groups[@]}" create "$TPU" "${WHERE[@]}" --size=0 \
    --template="$urls/instanceTemplates/$TPU" --default-action-on-vm-failure=do-nothing "${policy[@]}"
  attempt "${groups[@]}" resize "$TPU" "${WHERE[@]}" --size="$hosts"
}

# Template and policy, where they are.
remove_parts() {
  ask gcloud compute instance-templates list "${of_project[@]}" --regions="$region" \
    --filter="name=$TPU" --format="value(name)"
  [ -z "$ANSWER" ] || attempt gcloud compute instance-templates delete "$TPU" "${of_project[@]}" \
    --region="$region" --quiet
  ask gcloud compute resource-policies list "${of_project[@]}" \
    --filter="name=$TPU AND region~/$region\$" --format="value(name)"
  [ -z "$ANSWER" ] || attempt gcloud compute resource-policies delete "$TPU" "${of_project[@]}" \
    --region="$region" --quiet
}

# Sets ANSWER to why the machines are not there yet, as far as the cloud says so.
reason() {
  ask "${groups[@]}" list-errors "$TPU" "${WHERE[@]}" --limit=1 --sort-by=~timestamp \
    --format="value(error.code,error.message)"
}

# Gives the group back, with its machines and their disks, and what belongs to it.
release() {
  attempt "${groups[@]}" delete "$TPU" "${WHERE[@]}" --quiet
  remove_parts
}

# Looks for the machines, where that was not done.
found() {
  [ "$LOOKED" = 1 ] || look
  [ "$DRY" = 1 ] || [ "${#VMS[@]}" -gt 0 ] || die "$LOST" "$TPU has no machines: launch/create.sh"
  # A dry run has none yet.
  [ "$DRY" != 1 ] || mapfile -t VMS < <(seq -f "$TPU-%g" "$hosts")
}

# Sets NAMES to those of the workers, as these say them: their host names.
name_workers() {
  found
  NAMES=${VMS[*]}
}

# Starts a command for each worker, all together: there is no --worker=all here. WORKER in its words
# is the worker's name. What they say goes into a file; returns the last failure.
for_workers() {
  local file=$1 worker started=() status=0
  shift
  found
  for worker in "${VMS[@]}"; do
    show "${@//WORKER/$worker}"
    [ "$DRY" != 1 ] || continue
    "${@//WORKER/$worker}" >> "$file" < /dev/null &
    started+=($!)
  done
  for worker in "${started[@]}"; do wait "$worker" || status=$?; done
  return "$status"
}

# A command on all workers; what they say goes into a file.
on_workers() {
  for_workers "$2" gcloud compute ssh WORKER "${WHERE[@]}" --quiet --command="$1"
}

on_first_worker() {
  found
  run gcloud compute ssh "${VMS[0]}" "${WHERE[@]}" --quiet --command="$1"
}

# A file into every worker's home folder.
to_workers() {
  for_workers /dev/stdout gcloud compute scp "$1" "WORKER:$(basename "$1")" "${WHERE[@]}" --quiet
}

# A file or folder of the first worker to here.
from_first_worker() {
  found
  run gcloud compute scp --recurse "${VMS[0]}:$1" "$2" "${WHERE[@]}" --quiet
}
