# SPDX-License-Identifier: Apache-2.0
"""Checks of values in files from elsewhere; an error starts with the name of the value."""

import math
from typing import Any

LARGEST = 10**8  # of every size; no machine could hold a model of this width


def whole(name: str, value: Any, *, least: int = 1, most: int = LARGEST) -> int:
    """A whole number from `least` to `most`. Raises ValueError with the name."""
    if type(value) is not int or not least <= value <= most:
        raise ValueError(
            f"{name}={value_text(value)}: a whole number from {least} to {most} is needed"
        )
    return value


def number(name: str, value: Any, *, least: float = 0.0) -> float:
    """A finite number above `least`. Raises ValueError with the name."""
    if type(value) not in (int, float) or not finite(value) or value <= least:
        raise ValueError(f"{name}={value_text(value)}: a finite number above {least:g} is needed")
    return float(value)


def finite(value: int | float) -> bool:
    """Whether a number is finite as a float."""
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def text(name: str, value: Any) -> str:
    """A string. Raises ValueError with the name."""
    if not isinstance(value, str):
        raise ValueError(f"{name}={value_text(value)}: a text is needed")
    return value


def table(name: str, value: Any) -> dict[str, Any]:
    """A JSON object. Raises ValueError with the name."""
    if not isinstance(value, dict):
        raise ValueError(f"{name}={value_text(value)}: an object with named fields is needed")
    return value


def value_text(value: Any, most: int = 80) -> str:
    """A value as one short line for a message."""
    # Large containers are shown by their size: their text might not fit in memory.
    if not short(value):
        return f"a {type(value).__name__} of {len(value)}"
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    shown = " ".join(repr(value[:most] if isinstance(value, str) else value).split())
    return shown if len(shown) <= most else f"{shown[:most]}..."


def short(value: Any, levels: int = 3) -> bool:
    """Whether a value is small enough for one line."""
    if not isinstance(value, (list, tuple, dict)):
        return True
    inside = value.values() if isinstance(value, dict) else value
    return levels > 0 and len(value) <= 20 and all(short(x, levels - 1) for x in inside)


def depth(value: Any, most: int) -> int:
    """The nesting depth of containers, counted up to `most`."""
    level, levels = [value], 0
    while levels < most:
        level = [x for x in level if isinstance(x, (list, tuple, dict))]
        if not level:
            break
        level = [y for x in level for y in (x.values() if isinstance(x, dict) else x)]
        levels += 1
    return levels
