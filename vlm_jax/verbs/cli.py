# SPDX-License-Identifier: Apache-2.0
"""What verbs share: errors in one line with exit status 2, warnings, types of flags, memory."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

from vlm_jax import errors, files, preemption, progress
from vlm_jax.arguments import seed_of


def seed_flag(text: str) -> int:
    """The value of a flag --seed, for argparse."""
    try:
        return seed_of("--seed", int(text))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r:.40} is no seed: give a whole number from 0 to {2**32 - 1}"
        ) from None


def pruning_flag(default: str) -> dict[str, Any]:
    """What argparse has to know of a flag --pruning."""
    return dict(
        metavar="KIND",
        help="visual tokens that the LLM leaves out between its layers, or of a clip before it, "
        "such as fastv:layers=2:tokens=64, pyramiddrop, tokencarve:tokens=64, evs:dropped=0.7 or "
        "none "
        f"(default: as {default})",
    )


def say_warnings() -> None:
    """Sends warnings to stderr without the logger's name, even if an imported library has already
    set up logging."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.root.handlers:
        if getattr(handler, "stream", None) is sys.stderr:
            handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))


def workdir_of(workdir: str | None) -> PurePath:
    """The folder of --workdir; ValueError if it is missing, which only a dry run allows."""
    if workdir is None:
        raise ValueError("--workdir is missing: name the folder of the run")
    return files.path_of(workdir)


def join(options: argparse.Namespace) -> None:
    """Joins the other processes, if any, and sets up the cache of programs.

    Call it before JAX uses a device. One process writes to stdout and warns; errors come from all.
    """
    import jax

    from vlm_jax import compiled, hosts

    compiled.keep()
    before = jax.distributed.is_initialized()
    hosts.join(
        options.coordinator,
        options.processes,
        options.process,
        join_timeout=options.join_timeout,
        heartbeat_timeout=options.heartbeat_timeout,
    )
    if before or not jax.distributed.is_initialized():
        return
    preemption.install()  # JAX has replaced the handler of SIGTERM
    # XLA may use Gloo, which prints to the file descriptor of stdout.
    stdout, silence = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    sys.stdout = os.fdopen(stdout if hosts.is_writer() else silence, "w")
    if not hosts.is_writer():
        logging.root.setLevel(logging.ERROR)


def report_errors(verb: str, body: Callable[[], int]) -> int:
    """Runs `body`; an error that a user can fix is one line on stderr and exit status 2.

    Meanwhile a progress message appears at least every 20 seconds, and SIGTERM is a notice to save
    and stop: exit status 42.
    """
    try:
        with progress.speaking(f"vlm-jax {verb} is at work"), preemption.listening():
            return body()
    except preemption.Preempted as notice:
        print(f"vlm-jax {verb}: {notice}", file=sys.stderr)
        return preemption.STATUS
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        message = errors.sentence(error)
        print(f"vlm-jax {verb}: {message}", file=sys.stderr)
        # With several processes a device error mostly means that another process died. On CPUs
        # that may come as a ValueError of Gloo, which carries what processes tell each other.
        of_device = type(error).__name__ == "JaxRuntimeError" or "Gloo " in str(error)
        lost = of_device and "RESOURCE_EXHAUSTED" not in str(error)
        end_others(134 if lost else 2, message)
        return 2
    except KeyboardInterrupt:
        print(f"vlm-jax {verb}: stopped from the keyboard", file=sys.stderr)
        end_others(130, "stopped from the keyboard")
        return 130
    except Exception as error:
        if several():
            traceback.print_exc()
            end_others(1, errors.sentence(error))
        raise


def several() -> bool:
    """Whether this command has several processes."""
    hosts = sys.modules.get("vlm_jax.hosts")  # of a verb without devices it is not imported
    return hosts is not None and hosts.joined()


def end_others(code: int, message: str) -> None:
    """Ends all processes of this command; returns if this is the only one."""
    if several():
        from vlm_jax import hosts

        hosts.fail(code, message)
