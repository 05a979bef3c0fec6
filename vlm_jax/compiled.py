# SPDX-License-Identifier: Apache-2.0
"""Compiled programs are kept between runs: cells of one shape are compiled once on a machine."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from vlm_jax import progress

LIMIT = 2 * 10**9  # bytes; the programs that were not used for longest go first
SHORTEST = 0.3  # seconds of compilation that are worth a file


def home() -> Path:
    """The folder of the programs of this kind of processor.

    A home folder may serve machines of several kinds, and a program made for one may end another
    with an illegal instruction.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vlm_jax" / "compiled" / processor()


def processor() -> str:
    """The architecture and a hash of what the processor can do, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # x86 says flags, Arm Features.
    able = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    digest = hashlib.sha256(" ".join(able[:1]).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{digest}"


def keep() -> None:
    """Keeps what is compiled from now on, in `home`; JAX_COMPILATION_CACHE_DIR names another place.

    A folder that cannot be written is said, and nothing is kept.
    """
    if jax.config.values["jax_compilation_cache_dir"]:
        return
    folder = home()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        progress.say(
            f"compiled programs are not kept ({error}): JAX_COMPILATION_CACHE_DIR names a folder"
        )
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", LIMIT)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", SHORTEST)
