# SPDX-License-Identifier: Apache-2.0
"""--config=FILE and --config.FIELD=VALUE become a configuration, the way JAX users know them.

ml_collections reads the words: values have the types of the fields, tuples are written
"(1, 2)", and an unknown field is an error that names the nearest.
"""

import itertools
import re
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class Given:
    """A configuration, and the fields that were set on the command line, by dotted name."""

    config: Any
    overrides: dict[str, Any]


def read(words: Sequence[str], *, default: Any = None) -> Given:
    """The configuration that the words --config=FILE --config.FIELD=VALUE name.

    Without --config=FILE it is `default`, a ConfigDict, if there is one; --config.FIELD=VALUE goes
    over either.

    Raises:
      ValueError: in one line, for a file that is no configuration, a field that it does not have
        and a value of another type.
    """
    check_names(words)
    program = ["vlm-jax", *located(words)]
    path = value_of(program, "config")
    if not path and default is None:
        raise ValueError("--config is missing: name a file such as configs/demo.py")
    from absl import flags
    from ml_collections import ConfigDict, config_flags

    values = flags.FlagValues()
    how = dict(flag_values=values, lock_config=True, sys_argv=program)
    # A configuration may import its neighbors (`from configs import base`) wherever it is run
    # from.
    if path:
        first, last = described.import_paths(Path(path))
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
        if not isinstance(values.config, ConfigDict):
            raise ValueError(f"no configuration at {path}: {CONFIGURATION}")
        seed_of("seed", values.config.seed)
        flag: Any = values["config"]  # ml_collections' own kind of flag
        return Given(values.config, dict(flag.override_values))
    except Exception as error:  # a configuration is a program, which may raise anything
        # str(KeyError) is the repr of its message.
        message = str(error.args[0] if isinstance(error, KeyError) and error.args else error)
        known = (flags.Error, ValueError, AttributeError, KeyError, TypeError, OSError)
        if not isinstance(error, known):
            message = f"{place_in(error, path)}: {type(error).__name__}: {message}"
        message = in_one_line(message, path)
        if isinstance(error, (KeyError, AttributeError)):
            message = f"the configuration has no such field: {message}"
        raise ValueError(message) from None


def check_names(words: Sequence[str]) -> None:
    """Raises ValueError for a field of --config.FIELD=VALUE below a name, such as that of an LLM,
    which ml_collections cannot read there."""
    for word in words:
        if not word.startswith("--config."):
            continue
        path = word.removeprefix("--config.").partition("=")[0]
        for name in re.sub(r"\[.*?\]", "", path).split("."):
            if name and not name.isidentifier():
                raise ValueError(
                    f"--config.{path}: {name!r} is no name of Python, so nothing below it can be "
                    "set on the command line: set it in a configuration file, or choose a name of "
                    "letters, digits and _"
                )


def place_in(error: Exception, path: str) -> str:
    """The line of the file at `path` in which an error arose, as far as it is known."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(path)]
    if isinstance(error, SyntaxError):
        lines.append(error.lineno)
    return f"{path}, line {lines[-1]}" if lines and lines[-1] else path


def in_one_line(message: str, path: str) -> str:
    """An error of absl or ml_collections about a configuration, without tracebacks and dumps."""
    if "Traceback (most recent call last)" in message:
        lines = re.findall(rf'File "[^"]*{re.escape(Path(path).name)}", line (\d+)', message)
        where = f"{path}, line {lines[-1]}" if lines else path
        message = f"{where}: {message.strip().splitlines()[-1]}"
    message = message.replace("\\n", "\n").replace("\\'", "'")
    for pattern, better in PARSERS.items():
        message = re.sub(pattern, better, message)
    if meant := re.search(r'Did you mean "(.+?)" instead of "(.+?)"', message):
        return f'"{meant[2]}", did you mean "{meant[1]}"?'
    return re.sub(r"\s*Other \w+ present:.*", "", message, flags=re.DOTALL)


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
    """`argv` with --config=configs/NAME.py replaced by the package's file if there is none."""
    given = value_of(argv, "config")
    place = described.config_path(given)
    if not given or place == Path(given):
        return list(argv)
    at = next(i for i, word in enumerate(argv) if word in ("--config", f"--config={given}"))
    return [*argv[:at], f"--config={place}", *argv[at + 1 + (argv[at] == "--config") :]]
