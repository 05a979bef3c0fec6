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
# "The answer is B", "Answer: (B)", "the correct option is **B**", "Final: B", "I choose B"; the
# last such statement counts. A small letter must end the text: "the answer is a dog" names none.
STATED = re.compile(
    r"\b(?:(?i:(?:answer|option|choice)\s*(?:is|:|=)\s*(?:option\s+)?|final\s*:|"
    r"I\s+(?:choose|select|pick)\s+))[\s*(\[\"'{:]*(?:([A-Z])(?![A-Za-z0-9'])|([a-z])(?=\W*$))"
)
ALONE = re.compile(r"(?<![A-Za-z0-9'])([A-Z])(?![A-Za-z0-9'])")
WORD = re.compile(r"\s+[a-z]")  # after A or I: the article, the pronoun
NEGATED = re.compile(r"\b(?:not|never|wrong|incorrect|neither|\w+n't)\b", re.IGNORECASE)
FIRST = re.compile(r"\s*[*(\[\"']*([A-Z])[)\]*\"']*(?:\s*\n|\s*(?:[.:)]|\s-)(?:\s|$))")
MARKED = re.compile(r"(?m)^\s*\(?([A-Z])[.):]|\(([A-Z])\)")  # as in a list of options

UNSURE = ("text with one option in it", "unparsed")  # rules that saw no letter and no whole option


def choose(text: str, options: Sequence[str]) -> tuple[str, str]:
    """The letter of the option that a text names, or "", and the rule that found it.

    In this order: the text is one letter; it states the answer ("the answer is B"); it begins
    with a letter and a mark ("B. left", "(B) left"); it is the text of one option; a single
    capital letter stands alone in it and nothing is denied; it contains the text of exactly one
    option. Full-width characters count as plain ones.
    """
    text = unicodedata.normalize("NFKC", text)
    allowed = LETTERS[: len(options)]
    bare = text.strip(OUTSIDE)
    if len(bare) == 1 and bare.upper() in allowed:
        return bare.upper(), "letter alone"
    named = ((m.group(1) or m.group(2)).upper() for m in STATED.finditer(text))
    stated = [letter for letter in named if letter in allowed]
    if stated:
        return stated[-1], "letter that is stated as the answer"
    first = FIRST.match(text)
    marked = {m.group(1) or m.group(2) for m in MARKED.finditer(text)}
    if first and first.group(1) in allowed and marked <= {first.group(1)}:
        return first.group(1), "letter at the beginning"
    plain = _plain(text)
    names = [_plain(option) for option in options]
    if plain and names.count(plain) == 1:
        return LETTERS[names.index(plain)], "text of an option"
    single = {
        m.group(1)
        for m in ALONE.finditer(text)
        if m.group(1) in allowed and not (m.group(1) in "AI" and WORD.match(text, m.end()))
    }
    if len(single) == 1 and not NEGATED.search(text):
        return single.pop(), "the only letter"
    inside = [i for i, name in enumerate(names) if name and f" {name} " in f" {plain} "]
    if len(inside) == 1:
        return LETTERS[inside[0]], UNSURE[0]
    return "", UNSURE[1]


def _plain(text: str) -> str:
    words = unicodedata.normalize("NFKC", text).lower().split()
    return " ".join(filter(None, (word.strip(string.punctuation) for word in words)))


def lettered(options: Sequence[str]) -> str:
    """One line for each option, "A. left"."""
    return "\n".join(
        f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)
    )
