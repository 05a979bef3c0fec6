# SPDX-License-Identifier: Apache-2.0
"""Which option of a multiple-choice question a text names.

`choose` is the parser of our `official` protocols, where a benchmark has no published rule for
free text. It never guesses: what names no option, or several, names none.
"""

import re
import string
import unicodedata
from collections.abc import Sequence

LETTERS = string.ascii_uppercase
OUTSIDE = string.punctuation + string.whitespace
# "The answer is B", "Answer: (B)", "the correct option is **B**"; the last such statement counts.
STATED = re.compile(
    r"\b(?:answer|option|choice)\s*(?:is|:|=)\s*(?:option\s+)?[\s*(\[\"'{:]*([A-Z])(?![A-Za-z0-9'])",
    re.IGNORECASE,
)
FIRST = re.compile(r"\s*[*(\[\"']*([A-Z])[)\]*\"']*\s*(?:[.:)]|\s-)(?:\s|$)")


def choose(text: str, options: Sequence[str]) -> tuple[str, str]:
    """The letter of the option that a text names, or "", and the rule that found it.

    In this order: the text is one letter; it states the answer ("the answer is B"); it begins
    with a letter and a mark ("B. left", "(B) left"); it is the text of one option; it contains the
    text of exactly one option. Full-width characters count as plain ones; a letter inside a
    sentence counts only where it is stated, in upper case.
    """
    text = unicodedata.normalize("NFKC", text)
    allowed = LETTERS[: len(options)]
    bare = text.strip(OUTSIDE)
    if len(bare) == 1 and bare.upper() in allowed and bare.upper() != "":
        return bare.upper(), "letter alone"
    stated = [m.group(1) for m in STATED.finditer(text) if m.group(1) in allowed]
    if stated:
        return stated[-1], "letter that is stated as the answer"
    first = FIRST.match(text)
    if first and first.group(1) in allowed:
        return first.group(1), "letter at the beginning"
    plain = _plain(text)
    names = [_plain(option) for option in options]
    if plain and names.count(plain) == 1:
        return LETTERS[names.index(plain)], "text of an option"
    inside = [i for i, name in enumerate(names) if name and f" {name} " in f" {plain} "]
    if len(inside) == 1:
        return LETTERS[inside[0]], "text with one option in it"
    return "", "unparsed"


def _plain(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).lower().split()
    return " ".join(filter(None, (word.strip(string.punctuation) for word in words)))


def lettered(options: Sequence[str]) -> str:
    """One line for each option, "A. left"."""
    return "\n".join(
        f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)
    )
