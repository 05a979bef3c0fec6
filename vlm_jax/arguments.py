# SPDX-License-Identifier: Apache-2.0
"""Numbers that a user gave, checked at the door."""

import operator
from typing import Any


def whole_number(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """What was given under this name, as an int.

    Raises:
      ValueError: for what is no whole number in that range. 1.5 cut to 1, or True taken for it,
        would be another number than the one that was asked for.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        upwards = "upwards" if most is None else f"to {most}"
        raise ValueError(f"{name}={value!r:.40}: give a whole number from {least} {upwards}")
    return number


def seed_of(name: str, value: Any) -> int:
    """A seed as `whole_number`."""
    return whole_number(name, value, least=0, most=2**32 - 1)
