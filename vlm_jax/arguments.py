# SPDX-License-Identifier: Apache-2.0
"""Checks of numbers that a user gave."""

import operator
from typing import Any


def whole_number(name: str, value: Any, *, least: int = 1, most: int | None = None) -> int:
    """The value of the argument `name` as an int.

    Raises:
      ValueError: if it is not a whole number from `least` to `most`. 1.5 and True are refused,
        because 1 would be another number than the one requested.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < least or (most is not None and number > most):
        upper = "upwards" if most is None else f"to {most}"
        raise ValueError(f"{name}={value!r:.40}: give a whole number from {least} {upper}")
    return number


def seed_of(name: str, value: Any) -> int:
    """A seed, from 0 to 2**32 - 1; raises as `whole_number` does."""
    return whole_number(name, value, least=0, most=2**32 - 1)
