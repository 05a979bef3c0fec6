# SPDX-License-Identifier: Apache-2.0
"""What glibc does with memory that a process frees. Imports nothing: it comes before all else."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # M_... of glibc's malloc.h


def keep_freed_memory() -> None:
    """Freed memory stays with this process and is reused; call it before a second thread runs.

    XLA on a CPU allocates temporaries in every call. Freed large blocks return to the system, and
    the page faults of the next call took 40 % of a training step of a demo with 144 patches. One
    arena, because only the first can grow beyond 64 MB, and a thread that ran before has its own
    already. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(MMAP_THRESHOLD, 2**31 - 1)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
        mallopt(ARENA_MAX, 1)
