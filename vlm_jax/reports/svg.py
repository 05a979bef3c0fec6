# SPDX-License-Identifier: Apache-2.0
"""An SVG of matplotlib in half of its bytes: a page holds twenty of them."""

import re

ROUNDED = re.compile(r'(?<= d=")[^"]*|(?<=translate\()[^)]*|(?<= [xy]=")[^"]*')
LONG = re.compile(r"-?\d+\.\d{3,}")
LEFT_OUT = re.compile(
    r'<!--.*?-->|<metadata>.*?</metadata>|<!DOCTYPE[^>]*>| transform="rotate\(-0 [^"]*"', re.DOTALL
)
BETWEEN = re.compile(r">\s+<")
AFTER_COMMAND = re.compile(r"\s*([A-Za-z])\s*")
DIGITS = 2  # after the point, of a typographic point: a 7,000th of an inch


def slim(text: str) -> str:
    """The same picture: coordinates to .01 point, no comments, metadata or indentation."""
    text = BETWEEN.sub("><", LEFT_OUT.sub("", text))
    return ROUNDED.sub(lambda match: _path(match[0]), text)


def _path(numbers: str) -> str:
    numbers = LONG.sub(
        lambda match: f"{float(match[0]):.{DIGITS}f}".rstrip("0").rstrip("."), numbers
    )
    return AFTER_COMMAND.sub(r"\1", numbers)
