# SPDX-License-Identifier: Apache-2.0
"""A cloud that is a folder: commands of the same names on PATH, which fail as the real ones do.

What gcloud prints for a refused ssh, a failed worker, a quota and a lost connection is what version
528.0.0 prints, as its sources have it.
"""

import atexit
import functools
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LAUNCH = Path(__file__).parent.parent / "launch"

# `state` is the queued resource or the group, `home/N` the disk of worker N. `faults` says which
# calls fail, `script` what happens after each look at the run. It imports next to nothing: a life
# has some thirty calls.
GCLOUD = r"""#!PYTHON -IS
import os, sys, time

cloud, words = os.environ["CLOUD"], sys.argv[1:]
path = lambda *parts: "/".join((cloud, *parts))
exists, execute = os.path.exists, lambda home, command, **more: os.waitstatus_to_exitcode(
    os.spawnvpe(os.P_WAIT, "setsid", ["setsid", "--wait", "bash", "-c", f"cd {home}; {command}"],
                os.environ | more) << 8)

def read(*parts):
    if not exists(path(*parts)): return ""
    with open(path(*parts)) as file: return file.read()

def write(name, text):  # at once: a run that reads an empty `stop` would end with status 2
    with open(path(f"{name}.{os.getpid()}"), "w") as file: file.write(text)
    os.replace(path(f"{name}.{os.getpid()}"), path(name))

with open(path("calls"), "a") as file:
    file.write("\x1f".join(words) + "\n")
plain = [word for word in words if not word.startswith("--")]
flags = dict(word[2:].partition("=")[::2] for word in words if word.startswith("--"))
verb = next(w for w in plain if w in ("list", "list-instances", "list-errors", "describe", "create",
                                      "resize", "delete", "ssh", "scp"))
compute, request = "tpus" not in words, {"queued-resources", "instance-groups"} & {*words}
workers = sorted(os.listdir(path("home")))
names = [name if compute else f"t1v-n-1a2b-w-{name}" for name in workers]
homes = [path("home", name) for name in workers]

def fault(name):
    # A number of calls that fail; counts them down.
    left = int(read("faults", name) or 0)
    if left: write(f"faults/{name}", str(left - 1))
    return left > 0

def fail(message, code=1):
    print(f"ERROR: (gcloud.{'.'.join(plain[:4])}) {message}", file=sys.stderr)
    sys.exit(code)

def end(worker, signal):
    pid = read("home", worker, "vlm_jax.pid")
    if pid:
        try: os.kill(int(pid), signal)
        except ProcessLookupError: pass

def wipe():
    import shutil
    for worker, home in zip(workers, homes):
        end(worker, 9)
        while exists(home):  # what was killed may still write its last word
            shutil.rmtree(home, ignore_errors=True)
        os.mkdir(home)

def answered():
    # Whether all workers have answered this look; one by one, where each is asked by itself.
    import fcntl
    with open(path("answers"), "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write("x")
        return not compute or file.tell() % len(workers) == 0

def started():
    # Nothing happens to a run between its start and its first word.
    end = time.monotonic() + 60
    for home in homes:
        status, word = f"{home}/vlm_jax.status", f"{home}/vlm_jax.up"
        while exists(status) and len(open(status).readlines()) == 1 and time.monotonic() < end:
            if exists(word) and os.stat(word).st_mtime_ns >= os.stat(status).st_mtime_ns: break
            time.sleep(0.01)

def happen(event, *which):
    started()
    if event == "take":  # a spot TPU is taken away, with its disk
        wipe()
        write("state", "TERMINATED" if compute else "SUSPENDING SUSPENDED")
    elif event == "wipe":  # its disks are gone before the cloud says so
        wipe()
    elif event == "vanish":  # one machine of a group, which the group no longer lists
        end(which[0], 9)
        write("vanished", which[0])
    elif event == "kill":  # one worker's process
        end(which[0], 9)
    elif event == "reboot":  # one worker's machine: nobody writes down how the run ended
        end(which[0], 9)
        execute(path("home", which[0]),
                "flock vlm_jax.lock sed -i 2d vlm_jax.status; touch vlm_jax.up")
    elif event == "term":
        for worker in workers: end(worker, 15)
    elif event == "fail":
        write(f"faults/{which[0]}", which[1])
    elif event == "end":  # the run ends, with a status
        write("stop", which[0])

def ssh(number, command):
    if fault(f"refuse-{workers[number][-4:]}"):
        print(f"ssh: connect to host 10.0.0.{number} port 22: Connection refused", file=sys.stderr)
        if compute: fail("[/usr/bin/ssh] exited with return code [255].", 255)
        return 255
    sys.stdout.flush()
    code = execute(homes[number], command, HOSTNAME=names[number], HOME=homes[number])
    if code and not compute:
        print(f"##### Command execution on worker {number} failed with exit status {code}. "
              "Continuing.", file=sys.stderr)
    return code

if verb in ("list", "list-instances", "list-errors"):
    if fault("permission"):
        fail("PERMISSION_DENIED: Permission 'tpu.queuedResources.list' denied on resource")
    if fault("network"):
        fail("There was a problem refreshing your current auth tokens: ('Connection aborted.')")
    states = read("state").split() if request and verb != "list-errors" else []
    if states and compute and verb == "list":
        print(len(homes))
    elif states:
        write("state", " ".join(states[1:] or states))
        action = "NONE" if states[0] in ("RUNNING", "TERMINATED") else "CREATING"
        machines = [f"{name},{states[0]},{action}" for name in names if name != read("vanished")]
        print(*(machines if compute else states[:1]), sep="\n")
elif verb == "describe":
    print(len(homes) if "tpu-vm" in words else read("reason"))
elif verb == "create" and "queued-resources" in words:
    if fault("quota"):
        fail("RESOURCE_EXHAUSTED: Quota limit 'TPUV6EPreemptiblePerProjectPerZoneForTPUAPI' has "
             "been exceeded. Limit: 0 in zone us-east5-b.")
    if read("state"):
        fail("ALREADY_EXISTS: Resource already exists")
    planned = read("planned").splitlines()  # what becomes of the next requests, a line each
    write("planned", "\n".join(planned[1:]))
    write("state", planned[0] if planned else "PROVISIONING ACTIVE")
elif verb == "resize":
    write("state", "PROVISIONING RUNNING")
elif verb == "delete" and request:
    if not read("state"):
        fail("NOT_FOUND: Resource not found")
    wipe()
    write("state", "")
    write("vanished", "")
elif verb == "ssh":
    if compute: asked = [workers.index(plain[2])]
    elif flags["worker"] == "all": asked = range(len(homes))
    else: asked = [int(flags["worker"])]
    try:
        code = max(ssh(number, flags["command"]) for number in asked)
    finally:
        if "worker.sh status" in flags["command"] and answered():
            first, _, rest = read("script").partition("\n")
            write("script", rest)
            if first: happen(*first.split())
    sys.exit(code)
elif verb == "scp":
    import shutil
    source, target = plain[-2:]
    if ":" in target:
        for worker, home in zip(workers, homes):
            if compute and target.split(":")[0] != worker: continue
            if fault(f"refuse-{worker[-4:]}"):
                fail("[/usr/bin/scp] exited with return code [255].", 255)
            shutil.copy(source, f"{home}/{target.split(':')[1]}")
    else:
        sys.exit(execute(os.getcwd(), f"cp -r {homes[0]}/{source.split(':')[1]} {target}"))
"""

# Makes the virtual environment, of which the run below is the only program.
PYTHON = """#!/bin/bash
echo "$@" >> "$CLOUD/python"
if [ "$2 $3" = "uv venv" ]; then
  mkdir -p .venv/bin
  cp "$CLOUD/vlm-jax" .venv/bin/vlm-jax
fi
"""

# A run: leaves a line, makes its results, and goes on until it is told to end, and how.
VLM_JAX = """#!/bin/bash
trap 'echo saved at the agreed step; exit 42' TERM
echo "${HOSTNAME##*-} $*" >> "$CLOUD/runs"
echo step 1
mkdir -p runs/demo/report
touch runs/demo/rows.jsonl runs/demo/report/index.html ../vlm_jax.up
exec {never}<> <(:) # waits without a process of its own
while [ ! -e "$CLOUD/stop" ]; do read -rt 0.05 -u "$never"; done
exit "$(cat "$CLOUD/stop")"
"""


def executable(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)  # other copies have the file in common
    path.write_text(text)
    path.chmod(0o755)


IDENTITY = "-c user.name=t -c user.email=t@example.com"


@functools.cache
def committed() -> Path:
    """A checkout of the scripts, of which every test has a copy with files in common."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    shutil.copytree(LAUNCH, folder / "launch")
    (folder / ".gitignore").write_text("runs/\n")
    command = f"git init -q && git add -A && git {IDENTITY} commit -q -m first && rm -r .git/hooks"
    subprocess.run(["bash", "-c", command], cwd=folder, check=True)
    return folder


class Cloud:
    """A checkout with the scripts, and a cloud of two workers, on whose folder `gcloud` acts."""

    def __init__(self, folder: Path, *, api: str = "queued"):
        self.folder, self.checkout = folder, folder / "checkout"
        for worker in ("0", "1") if api == "queued" else ("vlm-jax-a1b2", "vlm-jax-c3d4"):
            (folder / "home" / worker).mkdir(parents=True)
        (folder / "faults").mkdir()
        shutil.copytree(committed(), self.checkout, copy_function=os.link, symlinks=True)
        executable(folder / "bin/gcloud", GCLOUD.replace("PYTHON", sys.executable))
        executable(folder / "bin/python3", PYTHON)
        executable(folder / "vlm-jax", VLM_JAX)
        self.environment = {
            "PATH": f"{folder}/bin:/usr/local/bin:/usr/bin:/bin",
            "HOME": str(folder / "home"),
            "CLOUD": str(folder),
            "PROJECT": "my-project",
            "ZONE": "us-east5-b",
            "POLL_SECONDS": "0",
        }
        if api == "compute":
            self.environment |= {"ACCELERATOR": "tpu7x-16", "TOPOLOGY": "2x2x2", "CAPACITY": "spot"}

    def commit(self, message: str):
        self.shell(f"git {IDENTITY} commit -q --allow-empty -m {message}")

    def shell(self, command: str, **environment) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.checkout,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    def fault(self, name: str, times: int = 1):
        """The next `times` calls of this kind fail: network, quota, refuse-WORKER."""
        (self.folder / "faults" / name).write_text(str(times))

    def script(self, *events: str):
        """What happens after each look at the run."""
        (self.folder / "script").write_text("".join(f"{event}\n" for event in events))

    def calls(self) -> list[list[str]]:
        return [line.split("\x1f") for line in self.lines("calls")]

    def count(self, *words: str) -> int:
        """How many calls have all these words."""
        return sum({*words} <= {*call} for call in self.calls())

    def lines(self, name: str) -> list[str]:
        path = self.folder / name
        return path.read_text().splitlines() if path.exists() else []

    def close(self):
        """Ends what still runs."""
        (self.folder / "stop").write_text("0")


def until(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def printed(done: subprocess.CompletedProcess) -> list[list[str]]:
    """The commands that a script printed, by a shell's rules; none of them has several lines."""
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]
