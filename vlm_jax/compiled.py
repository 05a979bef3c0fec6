# SPDX-License-Identifier: Apache-2.0
"""The cache of compiled programs: cells of one shape are compiled once on a machine."""

import hashlib
import os
import platform
from pathlib import Path

import jax

from vlm_jax import progress

LIMIT = 2 * 10**9  # bytes; the least recently used programs are removed first
SHORTEST = 0.1  # seconds of compilation from which a program is kept


def home() -> Path:
    """The folder of the programs of this kind of processor.

    Machines of several kinds may share a home folder, and a program compiled for one may crash on
    another with an illegal instruction.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "vlm_jax" / "compiled" / processor()


def processor() -> str:
    """The architecture and a hash of the processor's features, as Linux lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    # x86 says flags, Arm Features.
    able = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    digest = hashlib.sha256(" ".join(able[:1]).encode()).hexdigest()[:8]
    return f"{platform.machine()}-{digest}"


def keep() -> None:
    """Keeps programs compiled from now on in `home`, or in JAX_COMPILATION_CACHE_DIR.

    If the folder cannot be written, a message says so and nothing is kept.
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
