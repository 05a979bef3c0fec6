# SPDX-License-Identifier: Apache-2.0
"""Command lines the way JAX users know them: --config=FILE and --config.field=value."""

import argparse
import ctypes
import itertools
import logging
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_jax import errors, progress
from vlm_jax.arguments import seed_of
from vlm_jax.cost import described

CONFIGURATION = (
    "name one whose get_config() returns a configuration, such as configs/demo.py (a folder that "
    "was trained in has its own, and `vlm-jax evaluate` needs no other)"
)
# What the parsers of flags say of a value, and what they would have taken.
PARSERS = {
    r"invalid literal for int\(\) with base 10: (.*)": r"give a whole number, not \1",
    r"could not convert string to float: (.*)": r"give a number, not \1",
    r"\('Non-boolean argument to boolean flag', (.*)\)": r"give True or False, not \1",
}


def parse(
    verb: str,
    doc: str,
    argv: Sequence[str] | None,
    *,
    strings: dict[str, str] | None = None,
    booleans: dict[str, str] | None = None,
    required: Sequence[str] = (),
    default: Any = None,
) -> tuple[Any, Any]:
    """The configuration and the other flags of a verb; a wrong word ends the process with
    status 2 and the way out.

    Without --config=FILE it is `default`, if there is one; --config.FIELD=VALUE goes over either.
    """
    argv = located(sys.argv[1:] if argv is None else argv)
    if "--help" in argv or "-h" in argv:
        print(
            f"{doc}\n\nflags: --config=FILE --config.FIELD=VALUE "
            + " ".join(f"--{n}" for n in [*(strings or {}), *(booleans or {})])
        )
        raise SystemExit(0)
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    keep_freed_memory()
    values = flags.FlagValues()
    for name, text in (strings or {}).items():
        flags.DEFINE_string(name, None, text, flag_values=values)
    for name, text in (booleans or {}).items():
        flags.DEFINE_boolean(name, False, text, flag_values=values)
    flags.DEFINE_boolean("help", False, "show this text", flag_values=values)
    program = ["vlm-jax " + verb, *argv]
    path = value_of(argv, "config")
    how = dict(flag_values=values, lock_config=True, sys_argv=program)
    # A configuration may import its neighbours (`from configs import base`) wherever it is run
    # from.
    if path:
        first, last = described.neighbours(Path(path))
        sys.path[:] = [first, *sys.path, last]
    try:
        if default is not None and not path:
            config_flags.DEFINE_config_dict("config", default, "configuration", **how)
        else:
            config_flags.DEFINE_config_file("config", None, "configuration file", **how)
        if Path(path).is_file() and not path.endswith(".py"):
            raise ValueError(f"--config={path} is no file of Python: {CONFIGURATION}")
        rest = values(program)[1:]
        if rest:
            raise ValueError(f"unexpected argument {rest[0]!r}: flags are written --name=value")
        for name, text in (strings or {}).items():
            if values[name].value == "":  # as of a variable of the shell that is not set
                raise ValueError(f"--{name}= is empty: give it a value ({text})")
            if name in required and values[name].value is None:
                raise ValueError(f"--{name} is missing: {text}")
        if not values["config"].present and default is None:
            raise ValueError("--config is missing: name a file such as configs/demo.py")
        if not isinstance(values.config, ConfigDict):
            raise ValueError(f"no configuration at {path}: {CONFIGURATION}")
        seed_of("seed", values.config.seed)
        return values.config, values
    except Exception as error:  # a configuration is a program, which may raise anything
        # str(KeyError) is the repr of its message.
        message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        known = (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError)
        if not isinstance(error, known):
            message = f"{place_in(error, path)}: {type(error).__name__}: {message}"
        message = in_one_line(message, path)
        if isinstance(error, (KeyError, AttributeError)):
            message = f"the configuration has no such field: {message}"
        print(f"vlm-jax {verb}: {message}", file=sys.stderr)
        raise SystemExit(2) from None


def place_in(error: Exception, path: str) -> str:
    """The line of the file at `path` in which an error arose, as far as it is known."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(path)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines and lines[-1] else path


def in_one_line(message: str, path: str) -> str:
    """What absl and ml_collections say of a configuration, without tracebacks and dumps of it."""
    if "Traceback (most recent call last)" in message:
        lines = re.findall(rf'File "[^"]*{re.escape(Path(path).name)}", line (\d+)', message)
        where = f"{path}, line {lines[-1]}" if lines else path
        message = f"{where}: {message.strip().splitlines()[-1]}"
    message = message.replace("\\n", "\n").replace("\\'", "'")
    for said, meant in PARSERS.items():
        message = re.sub(said, meant, message)
    if meant := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', message):
        return f'"{meant[2]}", did you mean "{meant[1]}"?'
    return re.sub(r"\s*Other \w+ present:.*", "", message, flags=re.DOTALL)


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


def value_of(argv: Sequence[str], name: str) -> str:
    """The value of flag `name`, or nothing; --name=VALUE and --name VALUE are the same to absl."""
    words, flag = [*argv, ""], f"--{name}"
    return next(
        (
            after if word == flag else word.removeprefix(f"{flag}=")
            for word, after in itertools.pairwise(words)
            if word == flag or word.startswith(f"{flag}=")
        ),
        "",
    )


def located(argv: Sequence[str]) -> list[str]:
    """`argv` with --config=configs/NAME.py, where there is no such file, naming the package's."""
    given = value_of(argv, "config")
    place = described.place(given)
    if not given or place == Path(given):
        return list(argv)
    at = next(i for i, word in enumerate(argv) if word in ("--config", f"--config={given}"))
    return [*argv[:at], f"--config={place}", *argv[at + 1 + (argv[at] == "--config") :]]


def overrides(values: Any) -> dict[str, Any]:
    """The fields that were set on the command line, by dotted name."""
    return dict(values["config"].override_values)


def workdir_of(parsed: Any) -> Path:
    """The folder of --workdir; ValueError where it is missing, which only a dry run allows."""
    if parsed.workdir is None:
        raise ValueError("--workdir is missing: name the folder that the run lives in")
    return Path(parsed.workdir).absolute()


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
