# SPDX-License-Identifier: Apache-2.0
"""Holds the launch scripts to their words: DRY=1 prints what runs; twice is as good as once."""

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parent.parent / "launch"
SCRIPTS = sorted(path.name for path in LAUNCH.glob("*.sh") if path.name != "env.sh")

# Acts on a folder, not on a cloud: `state` is the queued resource, `home` the TPU's disk.
GCLOUD = r"""#!PYTHON
import json, os, subprocess, sys
from pathlib import Path

cloud, words = Path(os.environ["CLOUD"]), sys.argv[1:]
state, home = cloud / "state", cloud / "home"
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(words) + "\n")
verb = next(w for w in words if w in ("list", "create", "delete", "ssh", "scp"))
if verb == "list":
    if (cloud / "no-permission").exists():
        sys.exit("PERMISSION_DENIED")
    states = state.read_text().split() if state.exists() else []
    print(states[0] if states else "", end="\n" if states else "")
    state.write_text(" ".join(states[1:] or states))
elif verb == "create":
    if state.exists() and state.read_text():
        sys.exit("ALREADY_EXISTS")
    state.write_text("WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
elif verb == "delete":
    if not (state.exists() and state.read_text()):
        sys.exit("NOT_FOUND")
    state.write_text("")
elif verb == "ssh":
    command = next(w for w in words if w.startswith("--command=")).removeprefix("--command=")
    sys.exit(subprocess.run(["bash", "-c", command], cwd=home).returncode)
elif verb == "scp":
    source, target = [w for w in words[words.index("scp") + 1 :] if not w.startswith("--")]
    place = lambda name: str(home / name.split(":", 1)[1]) if ":" in name else name
    sys.exit(subprocess.run(["cp", "-r", place(source), place(target)]).returncode)
"""

VLM_JAX = """#!/bin/sh
# A run: leaves a line, makes its results, and goes on until the file `stop` is there.
echo "$@" >> "$CLOUD/runs"
mkdir -p runs/demo/report
touch runs/demo/rows.jsonl runs/demo/report/index.html
while [ ! -e "$CLOUD/stop" ]; do sleep 0.05; done
"""


def executable(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Cloud:
    """A checkout with the scripts, and a cloud that is a folder: `gcloud` on PATH acts on it."""

    def __init__(self, folder: Path):
        self.folder, self.checkout = folder, folder / "checkout"
        (folder / "home").mkdir(parents=True)
        shutil.copytree(LAUNCH, self.checkout / "launch")
        (self.checkout / ".gitignore").write_text("runs/\n")
        executable(folder / "bin/gcloud", GCLOUD.replace("PYTHON", sys.executable))
        executable(folder / "bin/python3", '#!/bin/sh\necho "$@" >> "$CLOUD/python"\n')
        self.environment = {
            "PATH": f"{folder}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "CLOUD": str(folder),
            "PROJECT": "my-project",
            "ZONE": "us-east5-b",
            "POLL_SECONDS": "0",
        }
        self.shell("git init -q && git add -A")
        self.commit("first")

    def commit(self, message: str):
        identity = "-c user.name=t -c user.email=t@example.com"
        self.shell(f"git {identity} commit -q --allow-empty -m {message}")

    def shell(self, command: str, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.checkout,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def calls(self) -> list[list[str]]:
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def cloud(tmp_path):
    cloud = Cloud(tmp_path / "cloud")
    yield cloud
    (cloud.folder / "stop").touch()


def until(condition, seconds: float = 10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


WHERE = "--project=my-project --zone=us-east5-b"
LIST = (
    f"+ gcloud compute tpus queued-resources list {WHERE} "
    "'--filter=name~/vlm-jax$' '--format=value(state.state)'\n"
)
FREE = 'exec 9> vlm_jax.lock; flock --nonblock 9 || { echo "a run is going on" >&2; exit 75; }; '
FOLLOW = (
    f"its output: gcloud compute tpus tpu-vm ssh vlm-jax {WHERE} "
    "--worker=0 --command='tail -f vlm_jax.log'\n"
)
START = (
    f"+ gcloud compute tpus tpu-vm ssh vlm-jax {WHERE} --worker=all '--command=cd vlm_jax && "
    "exec 9> ../vlm_jax.lock && if flock --nonblock 9; then nohup .venv/bin/vlm-jax {words} "
    ">> ../vlm_jax.log 2>&1 < /dev/null & else echo already running; fi'\n"
)
GOLDEN = {
    "create.sh": LIST
    + f"+ gcloud compute tpus queued-resources create vlm-jax {WHERE} --node-id=vlm-jax "
    "--accelerator-type=v6e-8 --runtime-version=v2-alpha-tpuv6e\n" + LIST,
    "setup.sh": "+ mkdir -p runs\n"
    "+ git bundle create --quiet runs/vlm_jax.bundle HEAD\n"
    "+ gcloud compute tpus tpu-vm scp runs/vlm_jax.bundle vlm-jax:vlm_jax.bundle "
    f"{WHERE} --worker=all\n"
    f"+ gcloud compute tpus tpu-vm ssh vlm-jax {WHERE} --worker=all '--command={FREE}"
    "git init --quiet vlm_jax && cd vlm_jax && git fetch --quiet ../vlm_jax.bundle HEAD && "
    "git checkout --quiet --force --detach FETCH_HEAD'\n"
    f"+ gcloud compute tpus tpu-vm ssh vlm-jax {WHERE} --worker=all '--command={FREE}"
    "python3 -m pip install --quiet --user uv && cd vlm_jax && python3 -m uv venv --quiet "
    "--allow-existing --python 3.11 .venv && python3 -m uv pip install --quiet --python "
    ".venv/bin/python --constraint constraints/py311.txt --editable "
    "'\\''.[tpu,report,demo,tensorboard]'\\'''\n",
    "run.sh train --config=configs/demo.py --workdir=runs/demo": START.format(
        words="train --config=configs/demo.py --workdir=runs/demo"
    )
    + FOLLOW,
    "grid.sh configs/demo.py runs/demo --config.seed=1": START.format(
        words="grid --config=configs/demo.py --workdir=runs/demo --config.seed=1"
    )
    + FOLLOW
    + f"+ gcloud compute tpus tpu-vm ssh vlm-jax {WHERE} --worker=0 "
    "'--command=flock vlm_jax.lock tail -n 20 vlm_jax.log'\n"
    "+ mkdir -p runs/demo\n"
    "+ gcloud compute tpus tpu-vm scp --recurse vlm-jax:vlm_jax/runs/demo/rows.jsonl runs/demo/ "
    f"{WHERE} --worker=0\n"
    "+ gcloud compute tpus tpu-vm scp --recurse vlm-jax:vlm_jax/runs/demo/report runs/demo/ "
    f"{WHERE} --worker=0\n",
    "delete.sh": LIST
    + f"+ gcloud compute tpus queued-resources delete vlm-jax {WHERE} --force --quiet\n",
}


def test_every_script_has_a_golden_text():
    assert sorted(words.split()[0] for words in GOLDEN) == SCRIPTS


@pytest.mark.parametrize("words", GOLDEN)
def test_a_dry_run_prints_the_golden_text_and_does_nothing(words, cloud):
    before = sorted(cloud.checkout.rglob("*"))
    done = cloud.shell(f"launch/{words}", DRY="1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == GOLDEN[words]
    assert cloud.calls() == []
    assert sorted(cloud.checkout.rglob("*")) == before


def test_what_a_run_prints_is_what_it_does(cloud):
    """Two roads to the calls: the recorded ones, and the printed lines read by a shell's rules."""
    flags = "--labels='owner=some one' \"--description=it's $ mine\""
    done = cloud.shell(f"launch/create.sh {flags} && launch/setup.sh && launch/delete.sh")
    assert done.returncode == 0, done.stderr
    # A command printed over several lines cannot be told apart from two: there is none.
    printed = [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
    assert cloud.calls() == [words[1:] for words in printed if words[0] == "gcloud"]


def test_create_twice_asks_once_and_waits_until_the_tpu_is_there(cloud):
    for _ in range(2):
        done = cloud.shell("launch/create.sh")
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("vlm-jax is ACTIVE\n")
    assert sum("create" in call for call in cloud.calls()) == 1


@pytest.mark.parametrize("state", ["SUSPENDED", "FAILED"])
def test_create_replaces_a_tpu_that_was_taken_away(state, cloud):
    (cloud.folder / "state").write_text(state)
    done = cloud.shell("launch/create.sh")
    assert done.returncode == 0, done.stderr
    verbs = [call[3] for call in cloud.calls()]
    assert [verb for verb in verbs if verb != "list"] == ["delete", "create"]


def test_create_and_delete_stop_when_the_cloud_does_not_answer(cloud):
    (cloud.folder / "no-permission").touch()
    for script in ("create.sh", "delete.sh"):
        done = cloud.shell(f"launch/{script}")
        assert done.returncode != 0 and "PERMISSION_DENIED" in done.stderr
    assert all("list" in call for call in cloud.calls())


@pytest.mark.parametrize(
    "words, told",
    [
        ("ACCELERATOR=tpu7x-8 launch/create.sh", "Compute Engine"),
        ("CAPACITY=cheap launch/create.sh", "on-demand"),
        ("ZONE= launch/create.sh", "set ZONE"),
        ("launch/run.sh", "which verb"),
        ("launch/grid.sh configs/demo.py", "usage"),
        ("launch/grid.sh configs/demo.py ../elsewhere", "inside the checkout"),
    ],
)
def test_a_wrong_word_is_refused_before_anything_happens(words, told, cloud):
    done = cloud.shell(words)
    assert done.returncode != 0 and told in done.stderr
    assert cloud.calls() == []


def test_delete_twice_deletes_once(cloud):
    (cloud.folder / "state").write_text("ACTIVE")
    first, second = cloud.shell("launch/delete.sh"), cloud.shell("launch/delete.sh")
    assert (first.returncode, second.returncode) == (0, 0)
    assert "there is no vlm-jax" in second.stdout
    assert sum("delete" in call for call in cloud.calls()) == 1


def test_setup_brings_the_last_commit_and_again_the_next(cloud):
    for message in ("first", "second", "second"):
        cloud.commit(message)
        done = cloud.shell("launch/setup.sh")
        assert (done.returncode, done.stderr) == (0, "")
        commit = cloud.shell("git rev-parse HEAD").stdout
        assert cloud.shell('git -C "$HOME/vlm_jax" rev-parse HEAD').stdout == commit
    assert re.search(r"uv pip install .*\.\[tpu,", cloud.lines("python")[-1])


def test_setup_says_that_uncommitted_changes_stay_here(cloud):
    (cloud.checkout / "new.py").touch()
    assert "uncommitted changes are not sent" in cloud.shell("launch/setup.sh", DRY="1").stderr


def test_a_run_started_twice_runs_once_and_holds_the_machine_until_it_ends(cloud):
    executable(cloud.folder / "home/vlm_jax/.venv/bin/vlm-jax", VLM_JAX)
    command = "launch/run.sh train '--config.grid.tokens=(1, 4)'"

    def refused(done: subprocess.CompletedProcess) -> bool:
        return "already running" in done.stdout.splitlines()

    assert not refused(cloud.shell(command))
    until(lambda: cloud.lines("runs"))
    assert refused(cloud.shell(command))
    assert cloud.lines("runs") == ["train --config.grid.tokens=(1, 4)"]

    setup = cloud.shell("launch/setup.sh")
    assert setup.returncode == 75 and "a run is going on" in setup.stderr

    (cloud.folder / "stop").touch()
    until(lambda: cloud.shell('flock --nonblock "$HOME/vlm_jax.lock" true').returncode == 0)
    assert not refused(cloud.shell(command))
    until(lambda: len(cloud.lines("runs")) == 2)


def test_a_grid_waits_for_its_end_and_brings_rows_and_report_home(cloud):
    executable(cloud.folder / "home/vlm_jax/.venv/bin/vlm-jax", VLM_JAX)
    (cloud.folder / "stop").touch()
    for _ in range(2):
        done = cloud.shell("launch/grid.sh configs/demo.py runs/demo")
        assert done.returncode == 0, done.stderr
        brought = sorted(path.name for path in (cloud.checkout / "runs/demo").rglob("*"))
        assert brought == ["index.html", "report", "rows.jsonl"]
