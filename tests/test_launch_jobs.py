# SPDX-License-Identifier: Apache-2.0
"""Jobs for schedulers that restart them: GKE's JobSet, SkyPilot; one for each cell of a grid."""

import re
from pathlib import Path

import pytest
import yaml

from tests.fake_cloud import LAUNCH, Cloud, executable
from vlm_jax import preemption
from vlm_jax.grids.run import cell_names

TRAIN = "train --config=configs/finetune.py --workdir=gs://bucket/run"
IMAGE = "IMAGE=registry/vlm-jax:1"

# `jobsets/NAME` is what was applied, `status` the lines that a look finds, one after another.
KUBECTL = """#!/bin/bash
echo "$@" >> "$CLOUD/calls"
case " $*" in
  *' apply '*)
    text=$(cat)
    name=$(sed -n 's/^  name: //p' <<< "$text")
    there=$CLOUD/jobsets/$name
    [ -e "$there" ] || { echo "$text" > "$there"; echo "jobset.x-k8s.io/$name created"; exit; }
    [ "$text" = "$(cat "$there")" ] && echo "jobset.x-k8s.io/$name unchanged" && exit
    echo "The JobSet \\"$name\\" is invalid: spec.replicatedJobs: field is immutable" >&2
    exit 1 ;;
  *' get '*)
    line=$(head -n 1 "$CLOUD/status")
    [ "$(wc -l < "$CLOUD/status")" = 1 ] || sed -i 1d "$CLOUD/status"
    [ "$line" != lost ] || { echo 'Unable to connect to the server: i/o timeout' >&2; exit 1; }
    printf %s "$line" ;;
  *' delete '*) rm -f "$CLOUD/jobsets/"* ;;
esac
"""
SKY = """#!/bin/bash
echo "$@" >> "$CLOUD/calls"
case "$1 $2" in
  'jobs queue') cat "$CLOUD/queue" ;;
  'jobs launch') echo "[{\\"job_name\\": \\"$5\\"}]" > "$CLOUD/queue" ;;
esac
"""
SUPERVISE = """#!/bin/bash
echo "$TPU $KEEP $*" >> "$CLOUD/supervised"
[[ "$*" != *"${FAILS:-none}"* ]]
"""


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud")
    (cloud.folder / "jobsets").mkdir()
    (cloud.folder / "queue").write_text("[]")
    for name, text in (("kubectl", KUBECTL), ("sky", SKY)):
        executable(cloud.folder / "bin" / name, text)
    executable(cloud.checkout / ".venv/bin/vlm-jax", '#!/bin/sh\nprintf "a-v1-s0\\na_b-v4-s0\\n"\n')
    return cloud


MANIFEST = """apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: vlm-jax
  labels: {kueue.x-k8s.io/queue-name: multislice-queue}
  annotations:
    # A node pool is a slice: no two jobs share one.
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    # Every restart counts, and starts all workers; an error of the program itself ends the job.
    maxRestarts: 50
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: 1
    template:
      spec:
        parallelism: 2
        completions: 2
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: vlm-jax
              operator: NotIn
              values: [AGAIN]
        template:
          spec:
            restartPolicy: Never
            hostNetwork: true
            dnsPolicy: ClusterFirstWithHostNet
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v6e-slice
              cloud.google.com/gke-tpu-topology: 2x4
            tolerations:
            - {key: google.com/tpu, operator: Exists}
            containers:
            - name: vlm-jax
              image: registry/vlm-jax:1
              command:
                - "vlm-jax"
                - "train"
                - "--config=configs/finetune.py"
                - "--workdir=gs://bucket/run"
              securityContext: {privileged: true}
              resources:
                limits: {google.com/tpu: 4}
              volumeMounts:
              - {name: shared-memory, mountPath: /dev/shm}
            volumes:
            - name: shared-memory
              emptyDir: {medium: Memory}
""".replace("AGAIN", ",".join(map(str, [42, *range(128, 256)])))
ENDS = "its end: launch/gke/wait.sh; its output: launch/gke/logs.sh; JOB=vlm-jax\n"
STATUS = "{.items[*].status.terminalState}/{.items[*].status.restarts}/{.items[*].metadata.name}"
TASK = re.sub("^#.*\n", "", (LAUNCH / "sky/task.yaml").read_text(), flags=re.MULTILINE)
GOLDEN = {
    f"{IMAGE} launch/gke/manifest.sh {TRAIN}": MANIFEST,
    f"{IMAGE} launch/gke/run.sh {TRAIN}": "+ kubectl --namespace=default apply --filename=- "
    f"<<'YAML'\n{MANIFEST}YAML\n{ENDS}",
    "launch/gke/wait.sh": "+ kubectl --namespace=default get jobset "
    f"--field-selector=metadata.name=vlm-jax '--output=jsonpath={STATUS}'\n",
    "launch/gke/logs.sh --follow": "+ kubectl --namespace=default logs "
    "--selector=jobset.sigs.k8s.io/jobset-name=vlm-jax --container=vlm-jax --prefix --tail=40 "
    "--max-log-requests=1000 --follow\n",
    "launch/gke/delete.sh": "+ kubectl --namespace=default delete jobset vlm-jax "
    "--ignore-not-found\n",
    f"CLUSTER=c {IMAGE} launch/gke/xpk.sh {TRAIN}": "+ xpk workload create --cluster=c "
    "--project=my-project --zone=us-east5-b --workload=vlm-jax --tpu-type=v6e-8 --num-slices=1 "
    "--docker-image=registry/vlm-jax:1 --docker-name=vlm-jax --max-restarts=50 "
    f"--termination-grace-period-seconds=300 '--command=exec vlm-jax {TRAIN}'\n",
    f"launch/sky/run.sh {TRAIN}": "+ sky jobs queue --skip-finished --output=json\n"
    f"+ cat > runs/vlm-jax.yaml <<'YAML'\n{TASK}YAML\n"
    f"+ sky jobs launch runs/vlm-jax.yaml --name vlm-jax --env 'COMMAND={TRAIN}' --detach-run "
    "--yes\nits output: sky jobs logs --name vlm-jax; its end: sky jobs queue; to stop it: "
    "sky jobs cancel --name vlm-jax\n",
}


CELLS = "grid --config=configs/demo.py --workdir=gs://bucket/demo"


def of_cell(cell: str, job: str) -> str:
    """What the dry run of a cell's job prints."""
    text = GOLDEN[f"launch/sky/run.sh {TRAIN}"].replace(TRAIN, f"{CELLS} --cell={cell}")
    for before, after in (("runs/", ".yaml"), ("--name ", " "), ("logs --name ", ";")):
        text = text.replace(f"{before}vlm-jax{after}", f"{before}{job}{after}")
    return text.replace("cancel --name vlm-jax\n", f"cancel --name {job}\n")


GOLDEN["launch/cells.sh sky configs/demo.py gs://bucket/demo"] = (
    "+ .venv/bin/vlm-jax grid --config=configs/demo.py --list-cells\n"
    + of_cell("a-v1-s0", "vlm-jax-a-v1-s0")
    + of_cell("a_b-v4-s0", "vlm-jax-a-b-v4-s0-3463548953")
    + f"when all are finished, law and report: .venv/bin/vlm-jax {CELLS}\n"
)


def test_every_script_has_a_golden_text():
    scripts = [p for p in LAUNCH.rglob("*.sh") if p.parent.name in ("gke", "sky")]
    named = {f"launch/{p.relative_to(LAUNCH)}" for p in [*scripts, LAUNCH / "cells.sh"]}
    assert {re.search(r"launch/\S+", words)[0] for words in GOLDEN} == named - {"launch/gke/env.sh"}


@pytest.mark.parametrize("words", GOLDEN, ids=lambda words: re.search(r"\w+/\w+\.sh", words)[0])
def test_a_dry_run_prints_the_golden_text_and_does_nothing(words, cloud):
    before = sorted(cloud.checkout.rglob("*"))
    done = cloud.shell(words, DRY="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == GOLDEN[words]
    assert cloud.calls() == [] and sorted(cloud.checkout.rglob("*")) == before


def test_a_job_restarts_with_the_status_of_a_run_that_saved_and_with_no_error_of_its_own(cloud):
    """Both schedulers by the status of `vlm_jax.preemption`; 1 and 2 are errors of the program."""
    made = yaml.safe_load(cloud.shell(f"{IMAGE} launch/gke/manifest.sh {TRAIN}").stdout)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    codes = job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
    recovery = yaml.safe_load(TASK)["resources"]["job_recovery"]["recover_on_exit_codes"]
    for again in (codes, recovery):
        assert preemption.STATUS in again and 137 in again and not {0, 1, 2} & {*again}
    assert f"RESTART={preemption.STATUS} " in (LAUNCH / "shell.sh").read_text()


def test_every_word_of_a_command_arrives_as_it_is(cloud):
    words = ["train", "--workdir=gs://b/r", "--config.grid.tokens=(1, 4)", 'a "b" \\c $d `e`']
    text = " ".join(f"'{word}'" for word in words)
    made = yaml.safe_load(cloud.shell(f"{IMAGE} launch/gke/manifest.sh {text}").stdout)
    pod = made["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == ["vlm-jax", *words]
    cloud.shell(f"launch/sky/run.sh {text}")
    command = cloud.calls()[-1][0].split("COMMAND=")[1].removesuffix(" --detach-run --yes")
    run = yaml.safe_load(TASK)["run"].replace("exec .venv/bin/vlm-jax", "printf '%s\\n'")
    assert cloud.shell(run, COMMAND=command).stdout.splitlines() == words


@pytest.mark.parametrize(
    "settings, label, workers, chips",
    [
        ("ACCELERATOR=tpu7x-128 TOPOLOGY=4x4x4", "tpu7x", 16, 4),
        ("ACCELERATOR=v5p-8 TOPOLOGY=2x2x1", "tpu-v5p-slice", 1, 4),
        ("ACCELERATOR=v5litepod-8 TOPOLOGY=2x4 CHIPS_PER_VM=8", "tpu-v5-lite-podslice", 1, 8),
        ("ACCELERATOR=v6e-1 TOPOLOGY=1x1", "tpu-v6e-slice", 1, 1),
    ],
)
def test_a_slice_has_a_pod_for_each_machine(settings, label, workers, chips, cloud):
    text = cloud.shell(f"{IMAGE} QUEUE= {settings} launch/gke/manifest.sh {TRAIN}").stdout
    made = yaml.safe_load(text)
    job = made["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert (job["parallelism"], job["completions"]) == (workers, workers)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": chips}
    assert "labels" not in made["metadata"]


@pytest.mark.parametrize(
    "words, told",
    [
        (f"launch/gke/run.sh {TRAIN}", "set IMAGE"),
        (f"{IMAGE} launch/gke/run.sh train --workdir=/disk/run", "must outlive the TPU"),
        (f"{IMAGE} TOPOLOGY=4x4 launch/gke/run.sh {TRAIN}", "has 16 chips"),
        (f"{IMAGE} JOB=My_Job launch/gke/run.sh {TRAIN}", "lower-case"),
        (f"{IMAGE} launch/gke/xpk.sh {TRAIN}", "set CLUSTER"),
        (f"{IMAGE} launch/gke/run.sh trian", "trian is no verb of vlm-jax: choose one of train"),
        (f"{IMAGE} CLUSTER=c launch/gke/xpk.sh A=b {TRAIN}", "A=b is no verb"),
        ("launch/sky/run.sh", "which verb"),
        ("launch/sky/run.sh train --workdir=runs/a", "must outlive the TPU"),
        (f"ACCELERATOR=tpu7x-8 launch/sky/run.sh {TRAIN}", "Compute Engine or GKE"),
        ("launch/cells.sh gke configs/demo.py", "usage"),
        ("launch/cells.sh gke configs/demo.py runs/demo", "must outlive the TPU"),
        ("launch/cells.sh slurm configs/demo.py gs://bucket/demo", "queued, gke or sky"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_happens(words, told, cloud):
    done = cloud.shell(words)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert cloud.calls() == []


def test_a_job_applied_twice_is_one_and_another_under_its_name_is_refused(cloud):
    command = f"{IMAGE} launch/gke/run.sh {TRAIN}"
    first, second = cloud.shell(command), cloud.shell(command)
    assert "vlm-jax created" in first.stdout and "it was there" in second.stdout
    other = cloud.shell(f"{command} --config.seed=1")
    assert other.returncode == 75 and "choose JOB=NAME" in other.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "looks, status, said",
    [
        (["//vlm-jax", "lost", "/2/vlm-jax", "Completed/2/vlm-jax"], 0, "after 2 restarts"),
        (["Failed/50/vlm-jax"], 1, "vlm-jax failed after 50 restarts"),
        (["//"], 66, "there is no JobSet vlm-jax"),
        (["lost"], 75, "no answer 5 times in a row"),
    ],
)
def test_the_end_of_a_job_is_the_status_of_waiting_for_it(looks, status, said, cloud):
    (cloud.folder / "status").write_text("\n".join(looks) + "\n")
    done = cloud.shell("launch/gke/wait.sh")
    assert done.returncode == status and said in done.stdout + done.stderr


def test_a_job_in_the_queue_of_skypilot_is_not_started_again(cloud):
    for _ in range(2):
        done = cloud.shell(f"CAPACITY=on-demand ACCELERATOR=v5p-8 launch/sky/run.sh {TRAIN}")
        assert done.returncode == 0, done.stderr
    assert "in the queue already" in done.stdout
    assert sum(call[0].startswith("jobs launch") for call in cloud.calls()) == 1
    task = yaml.safe_load((cloud.checkout / "runs/vlm-jax.yaml").read_text())["resources"]
    assert task["accelerators"] == {"tpu-v5p-8": 1} and task["use_spot"] is False
    assert task["accelerator_args"] == {"runtime_version": "v2-alpha-tpuv5"}


@pytest.mark.parametrize("scheduler", ["gke", "sky"])
def test_a_grid_becomes_a_job_for_each_cell(scheduler, cloud):
    words = f"launch/cells.sh {scheduler} configs/demo.py gs://bucket/demo --config.seed=1"
    done = cloud.shell(f"{IMAGE} {words}")
    assert done.returncode == 0, done.stderr
    grid = "grid --config=configs/demo.py --workdir=gs://bucket/demo --config.seed=1"
    for cell in ("a-v1-s0", "a_b-v4-s0"):
        if scheduler == "sky":
            assert f"COMMAND={grid} --cell={cell} " in "\n".join(cloud.lines("calls"))
        else:
            applied = [yaml.safe_load(p.read_text()) for p in (cloud.folder / "jobsets").iterdir()]
            pods = [job["spec"]["replicatedJobs"][0]["template"]["spec"] for job in applied]
            commands = [p["template"]["spec"]["containers"][0]["command"] for p in pods]
            assert ["vlm-jax", *grid.split(), f"--cell={cell}"] in commands
    assert done.stdout.endswith(f"law and report: .venv/bin/vlm-jax {grid}\n")
    names = re.findall(r"JOB=(.*)|--name (\S+) --env", done.stdout)
    assert all(re.fullmatch("[a-z0-9-]{1,40}", name or other) for name, other in names)


@pytest.mark.parametrize("fails", ["", "a-v1-s0"])
def test_supervisors_take_the_cells_of_a_grid_and_give_their_tpus_back(fails, cloud):
    executable(cloud.checkout / "launch/supervise.sh", SUPERVISE)
    (cloud.folder / "state").write_text("ACTIVE")
    words = "launch/cells.sh queued configs/demo.py gs://bucket/demo"
    done = cloud.shell(words, **({"FAILS": fails} if fails else {}))
    assert done.returncode == (1 if fails else 0), done.stderr
    grid = "1 grid --config=configs/demo.py --workdir=gs://bucket/demo"
    ran = cloud.lines("supervised")
    assert sorted(line[10:] for line in ran) == [f"{grid} --cell={c}" for c in
                                                 ("a-v1-s0", "a_b-v4-s0")]  # fmt: skip
    assert {line[:9] for line in ran} <= {"vlm-jax-0", "vlm-jax-1"}
    deleted = {call[4] for call in cloud.calls() if "list" in call or "delete" in call}
    assert deleted and cloud.count("queued-resources", "list") == 2
    if fails:
        assert "a-v1-s0 ended with status 1: see runs/" in done.stderr
        assert done.stderr.splitlines()[-1].endswith("repeat the command")


def test_the_cells_of_every_ready_grid_have_names_of_their_own_for_kubernetes(cloud):
    names = [name for path in ("demo", "demo_methods") for name in cell_names(f"configs/{path}.py")]
    source = (LAUNCH / "cells.sh").read_text()
    job_of = source[source.index("job_of() {") :].split("\n}\n")[0] + "\n}\n"
    (cloud.folder / "cells").write_text("\n".join(sorted({*names})) + "\n")
    loop = f'JOB=vlm-jax; {job_of} while read -r cell; do job_of "$cell"; done < "$CLOUD/cells"'
    jobs = cloud.shell(loop).stdout.split()
    assert len({*jobs}) == len({*names})
    assert all(re.fullmatch("[a-z][a-z0-9-]{0,38}[a-z0-9]", job) for job in jobs)


def test_the_image_installs_what_was_tried():
    text = Path(LAUNCH, "Dockerfile").read_text()
    assert "--constraint constraints/py311.txt" in text and "FROM python:3.11" in text
