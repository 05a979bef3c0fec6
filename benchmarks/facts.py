# SPDX-License-Identifier: Apache-2.0
"""What every result says of its machine and versions, and where it is written."""

import json
import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent.parent


def cpu_model() -> str:
    """The processor's name as Linux has it, else the machine type."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def use_threads(threads: int) -> None:
    """XLA and PyTorch on so many cores; before jax starts its pool, which has one thread a core."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    os.environ["JAX_PLATFORMS"] = "cpu"


def of_run(question: str, *, threads: int, packages: tuple[str, ...]) -> dict[str, Any]:
    """The head of a result: question, date, machine and versions."""
    return dict(
        question=question,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=dict(
            cpu=cpu_model(),
            cores=os.cpu_count(),
            threads=threads,
            load_average=[round(x, 2) for x in os.getloadavg()],
        ),
        versions=dict(python=platform.python_version(), **{n: version(n) for n in packages}),
    )


def write(results: dict[str, Any], name: str, out: str | None) -> Path:
    """Writes a result to `out`, or to its dated place; the path."""
    path = Path(out or HOME / "benchmarks/results" / f"{datetime.now(UTC):%Y-%m-%d}-{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path
