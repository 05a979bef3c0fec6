# SPDX-License-Identifier: Apache-2.0
"""What verbs share: errors in one line with exit status 2, warnings, types of flags, memory."""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path

from vlm_jax import errors, progress
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


def workdir_of(workdir: str | None) -> Path:
    """The folder of --workdir; ValueError where it is missing, which only a dry run allows."""
    if workdir is None:
        raise ValueError("--workdir is missing: name the folder that the run lives in")
    return Path(workdir).absolute()


def report_errors(verb: str, body: Callable[[], int]) -> int:
    """Runs `body`; what a user can fix is one line on stderr and exit status 2, not a traceback.

    While it runs, it says at least every 20 seconds what it is doing.
    """
    try:
        with progress.speaking(f"vlm-jax {verb} is at work"):
            return body()
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        print(f"vlm-jax {verb}: {errors.sentence(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"vlm-jax {verb}: stopped from the keyboard", file=sys.stderr)
        return 130
