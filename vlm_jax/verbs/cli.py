# SPDX-License-Identifier: Apache-2.0
"""What verbs share: errors in one line with exit status 2, warnings, types of flags, memory."""

import argparse
import ctypes
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from vlm_jax import errors, preemption, progress
from vlm_jax.arguments import seed_of


def seed_flag(text: str) -> int:
    """The value of a flag --seed, for argparse."""
    try:
        return seed_of("--seed", int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r:.40} is no seed: give a whole number from 0 to {2**32 - 1}"
        ) from None


def say_warnings() -> None:
    """Warnings go to stderr without the name of what gave them, also where an imported library has
    set up logging already."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.root.handlers:
        if getattr(handler, "stream", None) is sys.stderr:
            handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))


def keep_freed_memory() -> None:
    """Freed memory stays with this process and is reused; must be called before jax starts.

    XLA on a CPU allocates the temporaries of every call afresh. Large blocks go back to the system
    when freed, and the page faults of the next call took 40 % of a training step of a demo with 144
    patches. One arena, because only the first can grow beyond 64 MB. Does nothing without glibc.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        trim_threshold, mmap_threshold, arena_max = -1, -3, -8  # M_... of glibc's malloc.h
        mallopt(mmap_threshold, 2**31 - 1)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(arena_max, 1)


def workdir_of(workdir: str | None) -> Path:
    """The folder of --workdir; ValueError where it is missing, which only a dry run allows."""
    if workdir is None:
        raise ValueError("--workdir is missing: name the folder that the run lives in")
    return Path(workdir).absolute()


def report_errors(verb: str, body: Callable[[], int]) -> int:
    """Runs `body`; what a user can fix is one line on stderr and exit status 2, not a traceback.

    While it runs, it says at least every 20 seconds what it is doing, and SIGTERM is a notice to
    save and stop: exit status 42.
    """
    try:
        with progress.speaking(f"vlm-jax {verb} is at work"), preemption.listening():
            return body()
    except preemption.Preempted as notice:
        print(f"vlm-jax {verb}: {notice}", file=sys.stderr)
        return preemption.STATUS
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"vlm-jax {verb}: {errors.sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vlm-jax {verb}: stopped from the keyboard", file=sys.stderr)
        return 130
