# SPDX-License-Identifier: Apache-2.0
"""Commands in several processes at once, each with simulated devices: what a run on many hosts is.

Starting a process takes longer than a small command: each runs a list of them, one after another.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def share_programs():
    """Makes the processes of a run find in the cache of programs what any of them has compiled.

    On a CPU each process describes the same devices in other words, which are part of the key. One
    process would read what the others compile, and wait for them: Gloo waits no longer than 30 s.
    """
    from jax._src import cache_key

    cache_key._hash_accelerator_config = lambda *_: None


def free_port():
    """A port that no process listens at."""
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def environment(devices):
    """That of a process with so many simulated devices; the programs are those of the tests."""
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={devices}"),
    }


def start(commands, *, processes, devices, flags=(), script=None):
    """Begins `commands`, a list of command lines, in each of so many processes.

    With a `script` they are its arguments.
    """
    given = [__file__, json.dumps(commands)] if script is None else [script, *commands]
    joined = [f"--coordinator=localhost:{free_port()}", f"--processes={processes}"]
    return [
        subprocess.Popen(
            [sys.executable, *given,
             *([*joined, f"--process={i}", *flags] if processes > 1 else ())],
            cwd=ROOT,
            env=environment(devices),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]  # fmt: skip


def finish(started, *, timeout=600):
    """Exit status, stdout and stderr of each process."""
    try:
        said = [process.communicate(timeout=timeout) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(started, said, strict=True)]


def run(commands, *, processes, devices, flags=(), timeout=600):
    """`start` and `finish`; AssertionError where one of the processes fails."""
    done = finish(start(commands, processes=processes, devices=devices, flags=flags),
                  timeout=timeout)  # fmt: skip
    assert not any(code for code, _, _ in done), "\n".join(text for _, _, text in done)
    return done


if __name__ == "__main__":
    from vlm_jax.__main__ import main

    share_programs()
    for number, argv in enumerate(json.loads(sys.argv[1])):
        print(f"command {number}", flush=True)
        if status := main([*argv, *sys.argv[2:]]):
            sys.exit(status)
