# SPDX-License-Identifier: Apache-2.0
"""The processes of one run: how they find each other, which of them writes, what they agree on.

A run on many hosts is one process for each host, all started with the same command. Process 0 is
the writer: it alone writes files and messages. What it decides or reads reaches the others by
`from_writer`; a value of each process reaches all by `collected`; `barrier` waits for all.

These three use the coordination service of `jax.distributed`, not the devices: a wait may last as
long as the writer works, and nothing is compiled. A process that fails reports it there (`fail`),
and the others end within seconds instead of waiting for it. A process that dies without a report is
detected by its missing heartbeat, and JAX then aborts the others.

In a run of one process these functions cost nothing.
"""

import atexit
import functools
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import jax
import numpy as np

from vlm_jax import errors, progress

T = TypeVar("T")
JOIN_TIMEOUT, HEARTBEAT_TIMEOUT = 300, 100  # seconds: the defaults of jax.distributed
# Exit status if another process died: the one that JAX itself ends with (SIGABRT).
PEER_DIED = 134
SLICE_MS = 5000  # of one wait for the service: between two waits Python handles signals
PIECE = 1 << 20  # bytes of one value in the service, whose message size is limited
# Exceptions that the other processes raise with the same type.
KINDS = {
    kind.__name__: kind
    for kind in (ValueError, OSError, RuntimeError, FileNotFoundError, PermissionError)
}


class Run:
    """The state of this process in a run of several; the defaults mean a run of one."""

    client: Any = None
    turn = 0  # calls so far: every process makes the same ones in the same order
    stop: threading.Event | None = None


_RUN = Run()


def join(
    coordinator: str | None = None,
    processes: int | None = None,
    process: int | None = None,
    *,
    join_timeout: int = JOIN_TIMEOUT,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    """Makes this process one of a run of several. Call it before JAX uses a device.

    Without arguments JAX looks for the others itself (Cloud TPU VMs, GKE, Slurm, Open MPI), and
    finds none on a single machine; if JAX_PLATFORMS is cpu it looks for Slurm only. `processes=1`
    alone looks for no other process.

    Args:
      coordinator: HOST:PORT of process 0, the same for all; the port is free on that host.
      processes: their number. process: the number of this one, from 0.
      join_timeout: seconds in which all processes must join.
      heartbeat_timeout: seconds without a heartbeat after which a process counts as dead.
    Raises:
      ValueError: for arguments that are incomplete or contradict each other, and if JAX then sees
        a different number of processes.
    """
    if _RUN.client is not None:
        return
    check(coordinator, processes, process, join_timeout, heartbeat_timeout)
    if coordinator is None and (processes == 1 or no_cluster()):
        add_up_in_ring_order()
        return
    joined_event = threading.Event()
    where = coordinator or "the address that JAX found for process 0"
    watch = functools.partial(
        end_after_timeout, joined_event, where, processes, process, join_timeout
    )
    threading.Thread(target=watch, daemon=True).start()
    # With arguments JAX detects nothing; without any it detects everything.
    how = {} if coordinator is None else {"cluster_detection_method": "deactivate"}
    try:
        with progress.doing("waiting for the other processes"):
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                # JAX aborts after this: `end_after_timeout` reports first what is missing.
                initialization_timeout=join_timeout + 30,
                heartbeat_timeout_seconds=heartbeat_timeout,
                **how,
            )
    except ValueError as error:
        if coordinator is None and "coordinator_address" in str(error):
            add_up_in_ring_order()
            return  # no cluster: a single machine
        raise
    finally:
        joined_event.set()
    from jax._src import distributed  # its key-value store has no public API

    state = distributed.global_state
    if state.num_processes == 1:
        return
    _RUN.client, _RUN.stop = state.client, threading.Event()
    if jax.process_count() != state.num_processes:
        raise ValueError(
            f"{state.num_processes} processes joined, and JAX sees devices of "
            f"{jax.process_count()}: start the same command with the same JAX_PLATFORMS on every "
            "host, once for each"
        )
    progress.VOICE.silent = not is_writer()
    threading.Thread(target=_listen, args=(_RUN.stop, state.client), daemon=True).start()
    atexit.register(_RUN.stop.set)
    progress.say(topology())


def no_cluster() -> bool:
    """Whether JAX need not look for other processes.

    On the CPU of a TPU VM it would find the VMs of the slice, which a run on CPUs does not use.
    """
    return os.environ.get("JAX_PLATFORMS") == "cpu" and "SLURM_STEP_NODELIST" not in os.environ


def add_up_in_ring_order() -> None:
    """Makes simulated devices of one process add up in the same order as those of several.

    Within a process XLA adds the parts of a sum in the order of the devices; between processes
    Gloo goes around a ring. With Gloo in both cases, 8 simulated devices give the same bits as 2
    processes with 4 each, so a test of one covers the other. A single device and accelerators are
    left as they are.
    """
    simulated = re.findall(r"host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    count = max(int((simulated or ["1"])[-1]), jax.config.jax_num_cpu_devices)
    if os.environ.get("JAX_PLATFORMS") != "cpu" or count < 2:
        return
    if any(name.lower().endswith("_proxy") for name in os.environ):
        # A connection to this machine needs no proxy, and JAX would warn about one.
        direct = os.environ.get("no_grpc_proxy", os.environ.get("no_proxy", ""))
        os.environ["no_grpc_proxy"] = f"{direct},127.0.0.1".lstrip(",")
        with suppress(AttributeError):
            jax.config.update("jax_check_proxy_envs", False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    # RuntimeError: the program that imports this one has already used its devices.
    with suppress(RuntimeError):
        jax.distributed.initialize(
            address, 1, 0, coordinator_bind_address=address, cluster_detection_method="deactivate"
        )


def check(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    join_timeout: int,
    heartbeat_timeout: int,
) -> None:
    """Raises ValueError for arguments that `join` does not accept."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < 3 and (missing, processes) != (["--coordinator", "--process"], 1):
        present = " and ".join(name for name in given if name not in missing)
        raise ValueError(
            f"{present} without {' and '.join(missing)}: "
            "give all three, as --coordinator=HOST:PORT --processes=N --process=I; none if JAX "
            "finds the processes itself (TPU VMs, GKE, Slurm); or --processes=1 alone for one "
            "process"
        )
    if processes is not None and processes < 1:
        raise ValueError(f"--processes={processes}: give the number of processes, 1 or more")
    if process is not None and not 0 <= process < processes:
        raise ValueError(
            f"--process={process} of --processes={processes}: give each host its number, from 0 "
            f"to {processes - 1}"
        )
    host, _, port = (coordinator or "host:1").rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ValueError(
            f"--coordinator={coordinator}: give HOST:PORT, the host of process 0 and a port that "
            "is free there, such as 10.0.0.2:8476"
        )
    for name, value in (
        ("--join-timeout", join_timeout),
        ("--heartbeat-timeout", heartbeat_timeout),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: give seconds, 1 or more")


def end_after_timeout(
    done: threading.Event, where: str, processes: int | None, process: int | None, seconds: int
) -> None:
    """Ends this process with one line unless `done` is set within `seconds`.

    JAX itself would abort without an explanation.
    """
    if done.wait(seconds):
        return
    name, _, port = where.rpartition(":")
    answers = False
    if process and port.isdigit():
        try:
            socket.create_connection((name.strip("[]"), int(port)), timeout=2).close()
            answers = True
        except OSError:
            pass
    missing = f"nothing answers at {where}" if process and not answers else (
        "not all processes joined")  # fmt: skip
    print(
        f"vlm-jax: {missing} within {seconds} s: start the same command on every host"
        f"{f', {processes} processes' if processes else ''}, with the address of process 0, whose "
        "port the others can reach; --join-timeout waits longer, --processes=1 alone runs one "
        "process",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def topology() -> str:
    """The processes and their devices, in a line."""
    devices = jax.devices()
    mine = len(jax.local_devices())
    return (
        f"{jax.process_count()} processes x {mine} devices ({devices[0].device_kind}) = "
        f"{len(devices)} devices; process {jax.process_index()} on {socket.gethostname()} writes "
        "files and messages"
    )


def joined() -> bool:
    """Whether this run has other processes."""
    return _RUN.client is not None


def is_writer() -> bool:
    """Whether this process writes files and messages: one process of each run does."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Returns when every process has called it."""
    collected(name)


def from_writer(make: Callable[[], T]) -> T:
    """Calls `make` in the writer only; its value in every process.

    The value must be JSON. Files that `make` writes exist when this returns. An exception of `make`
    is raised in every process.
    """
    if not joined():
        return make()
    key = _next_key()
    if not is_writer():
        answer = json.loads(_get(key))
        if "error" in answer:
            raise KINDS.get(answer["kind"], RuntimeError)(answer["error"])
        return answer["value"]
    try:
        value = make()
        _set(key, json.dumps({"value": value}))
        return value
    except Exception as error:
        failure = {"error": errors.sentence(error), "kind": type(error).__name__}
        _set(key, json.dumps(failure))
        raise


def collected(value: T) -> list[T]:
    """The JSON values of all processes, in their order, in every process."""
    if not joined():
        return [value]
    key = _next_key()
    _set(f"{key}/{jax.process_index()}", json.dumps(value))
    return [json.loads(_get(f"{key}/{i}")) for i in range(jax.process_count())]


def check_same(what: str, value: Any) -> None:
    """Raises ValueError in every process if `value`, which must be JSON, differs between them."""
    if not joined():
        return
    value = json.loads(json.dumps(value))
    for process, other in enumerate(collected(value)):
        if other != value:
            raise ValueError(
                f"{what} of process {process} and process {jax.process_index()} differ: every host "
                "needs the same command, the same version and the same files"
            )


def fetched(tree: Any) -> Any:
    """Arrays as numpy in every process, gathered from all devices.

    Every process must call it with the same arrays.
    """

    def one(x: Any) -> np.ndarray:
        spread = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return np.asarray(_everywhere(x)) if spread else np.asarray(x)

    return jax.tree.map(one, tree)


def _everywhere(x: jax.Array) -> jax.Array:
    """The array, whole on every device."""
    with jax.set_mesh(x.sharding.mesh):
        return jax.jit(lambda x: jax.sharding.reshard(x, jax.P()))(x)


def fail(code: int, message: str) -> None:
    """Ends every process of the run with `code`, because this one failed; returns in a run of one.

    Otherwise this process and the others would wait for each other at their ends.
    """
    if not joined():
        return
    _RUN.stop.set()
    failure = {"process": jax.process_index(), "code": code, "message": message}
    try:
        _RUN.client.key_value_set("vlm_jax/failed", json.dumps(failure))
    except Exception:
        pass  # another process failed first, or the service has ended: JAX ends the others
    _end(code)


def _end(code: int) -> None:
    """Exits without JAX's own shutdown, which waits for all processes. The process of the service
    waits up to 5 s, so that the others can read the reason."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        _RUN.client.key_value_set(f"vlm_jax/left/{jax.process_index()}", "")
        others, until = jax.process_count() - 1, time.monotonic() + 5
        while is_writer() and time.monotonic() < until:
            if len(_RUN.client.key_value_dir_get("vlm_jax/left/")) > others:
                break
            time.sleep(0.1)
    finally:
        os._exit(code)


def _listen(stop: threading.Event, client: Any) -> None:
    """Ends this process soon after another one failed."""
    while not stop.wait(1.0):
        try:
            failure = json.loads(client.key_value_try_get("vlm_jax/failed"))
        except Exception:
            continue  # no process failed; or the service has ended, and JAX ends this process
        if not stop.is_set():
            print(
                f"vlm-jax: process {failure['process']} failed ({failure['message']}), and process "
                f"{jax.process_index()} ends with it",
                file=sys.stderr,
                flush=True,
            )
            _end(failure["code"])


def _next_key() -> str:
    _RUN.turn += 1
    return f"vlm_jax/turn/{_RUN.turn}"


def _set(key: str, text: str) -> None:
    data = text.encode()
    pieces = [data[i : i + PIECE] for i in range(0, len(data), PIECE)]
    for number, piece in enumerate(pieces):
        _RUN.client.key_value_set_bytes(f"{key}/piece{number}", piece)
    _RUN.client.key_value_set_bytes(f"{key}/pieces", str(len(pieces)).encode())


def _get(key: str) -> str:
    count = int(_wait_for(f"{key}/pieces"))
    return b"".join(_wait_for(f"{key}/piece{number}") for number in range(count)).decode()


def _wait_for(key: str) -> bytes:
    """A value of the service; waits for it without a limit."""
    while True:
        try:
            return _RUN.client.blocking_key_value_get_bytes(key, SLICE_MS)
        except Exception as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
