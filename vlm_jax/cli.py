# SPDX-License-Identifier: Apache-2.0
"""Command lines the way JAX users know them: --config=FILE and --config.field=value."""

import argparse
import ctypes
import itertools
import logging
import operator
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict, config_flags

from vlm_jax.scaling import described


def parse(
    verb: str,
    doc: str,
    argv: Sequence[str] | None,
    *,
    strings: dict[str, str] | None = None,
    booleans: dict[str, str] | None = None,
    required: Sequence[str] = (),
) -> tuple[ConfigDict, flags.FlagValues]:
    """The configuration and the other flags of a verb; a wrong word ends the process with its
    cure."""
    argv = located(sys.argv[1:] if argv is None else argv)
    keep_freed_memory()
    values = flags.FlagValues()
    for name, text in (strings or {}).items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, text in (booleans or {}).items():
        flags.DEFINE_boolean(name, False, text, flag_values=values)
    flags.DEFINE_boolean("help", False, "show this text", flag_values=values)
    program = ["vlm-jax " + verb, *argv]
    config_flags.DEFINE_config_file(
        "config", None, "configuration file", flag_values=values, lock_config=True, sys_argv=program
    )
    # A configuration may import its neighbours (`from configs import base`) wherever it is run
    # from.
    if path := config_file(argv):
        first, last = described.neighbours(Path(path))
        sys.path[:] = [first, *sys.path, last]
    try:
        if "--help" in argv or "-h" in argv:
            print(
                f"{doc}\n\nflags: --config=FILE --config.FIELD=VALUE "
                + " ".join(f"--{n}" for n in [*(strings or {}), *(booleans or {})])
            )
            raise SystemExit(0)
        rest = values(program)[1:]
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
        if not values["config"].present:
            raise ValueError("--config is missing: name a file such as configs/demo.py")
        for name in required:
            if values[name].value is None:
                raise ValueError(f"--{name} is missing")
        if not isinstance(values.config, ConfigDict):
            raise ValueError(f"no configuration at {config_file(argv)}")
        seed_of("seed", values.config.seed)
        return values.config, values
    except (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError) as error:
        # str(KeyError) is the repr of its message.
        message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        message = in_one_line(message, config_file(argv))
        if isinstance(error, (KeyError, AttributeError)):
            message = f"the configuration has no such field: {message}"
        print(f"vlm-jax {verb}: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def in_one_line(message: str, path: str) -> str:
    """What absl and ml_collections say of a configuration, without tracebacks and dumps of it."""
    if "Traceback (most recent call last)" in message:
        lines = re.findall(rf'File "[^"]*{re.escape(Path(path).name)}", line (\d+)', message)
        where = f"{path}, line {lines[-1]}" if lines else path
        message = f"{where}: {message.strip().splitlines()[-1]}"
    message = message.replace("\\n", "\n").replace("\\'", "'")
    if meant := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', message):
        return f'"{meant[2]}", did you mean "{meant[1]}"?'
    return re.sub(r"\s*Other \w+ present:.*", "", message, flags=re.DOTALL)


def whole_number(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """What was given under this name, as an int.

    Raises:
      ValueError: for what is no whole number in that range. 1.5 cut to 1, or True taken for it,
        would be another number than the one that was asked for.
    """
    try:
        number = None if isinstance(value, (bool, np.bool_)) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        upwards = "upwards" if most is None else f"to {most}"
        raise ValueError(f"{name}={value!r:.40}: give a whole number from {least} {upwards}")
    return number


def seed_of(name: str, value: Any) -> int:
    """A seed as `whole_number`."""
    return whole_number(name, value, least=0, most=2**32 - 1)


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


def config_file(argv: Sequence[str]) -> str:
    """The value of --config, or nothing; --config=FILE and --config FILE are the same to absl."""
    words = [*argv, ""]
    return next(
        (
            after if word == "--config" else word.removeprefix("--config=")
            for word, after in itertools.pairwise(words)
            if word == "--config" or word.startswith("--config=")
        ),
        "",
    )


def located(argv: Sequence[str]) -> list[str]:
    """`argv` with --config=configs/NAME.py, where there is no such file, naming the package's."""
    given = config_file(argv)
    place = described.place(given)
    if not given or place == Path(given):
        return list(argv)
    at = next(i for i, word in enumerate(argv) if word in ("--config", f"--config={given}"))
    return [*argv[:at], f"--config={place}", *argv[at + 1 + (argv[at] == "--config") :]]


def report_errors(verb: str, body: Callable[[], int]) -> int:
    """Runs `body`; what a user can mend is one line on stderr and exit status 2, not a
    traceback."""
    try:
        return body()
    except (ValueError, OSError, RuntimeError) as error:
        print(f"vlm-jax {verb}: {error}", file=sys.stderr)
        return 2
