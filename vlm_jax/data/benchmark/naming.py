# SPDX-License-Identifier: Apache-2.0
"""How the shapes of a scene are named: descriptions as bit masks over the shapes, and as words.

Shapes are bits of an integer, so "small red circles" is a mask and a question a few bit operations.
The constants set how varied the wording is.
"""

import random
from typing import NamedTuple

from vlm_jax.data.benchmark.scenes import COLOR_NAMES, KINDS, SIZES, Scene

FILLER_RATE = 0.05  # share of questions that begin with filler words
SYNONYM_RATE = 0.1  # share of words replaced by a synonym

SYNONYMS = {
    "big": ("large",),
    "small": ("little", "tiny"),
    "circle": ("disc",),
    "square": ("box",),
    "cross": ("plus",),
    "shape": ("thing", "object"),
    "circles": ("discs",),
    "squares": ("boxes",),
    "shapes": ("things", "objects"),
}
FILLERS = ("please tell me,", "look closely:", "in this picture,", "i want to know:")
RELATIONS = {
    "left": ("left of", "to the left of", "further left than"),
    "right": ("right of", "to the right of", "further right than"),
    "above": ("above", "over", "higher than"),
    "below": ("below", "under", "lower than"),
}
EXTREMES = {"left": "leftmost", "right": "rightmost", "above": "topmost", "below": "lowest"}


class Phrase(NamedTuple):
    """A description by size, color and kind; -1 leaves one out."""

    size: int
    color: int
    kind: int


ANY = Phrase(-1, -1, -1)


class View:
    """A scene as bit masks: which shapes a phrase names, which lie left of or above another."""

    def __init__(self, scene: Scene, rng: random.Random):
        self.rng = rng
        self.shapes = shapes = scene.shapes
        self.all = (1 << len(shapes)) - 1
        self.sizes, self.colors, self.kinds = (
            [0] * len(SIZES),
            [0] * len(COLOR_NAMES),
            [0] * len(KINDS),
        )
        for i, s in enumerate(shapes):
            self.sizes[s.size] |= 1 << i
            self.colors[s.color] |= 1 << i
            self.kinds[s.kind] |= 1 << i
        side = {name: [0] * len(shapes) for name in RELATIONS}
        for i, s in enumerate(shapes):
            for j, t in enumerate(shapes):
                if t.column < s.column:
                    side["left"][i] |= 1 << j
                    side["right"][j] |= 1 << i
                if t.row < s.row:
                    side["above"][i] |= 1 << j
                    side["below"][j] |= 1 << i
        self.side = side

    def mask(self, p: Phrase) -> int:
        """The bits of the shapes that a description fits."""
        mask = self.all
        if p.size >= 0:
            mask &= self.sizes[p.size]
        if p.color >= 0:
            mask &= self.colors[p.color]
        if p.kind >= 0:
            mask &= self.kinds[p.kind]
        return mask

    def phrase(self, index: int, parts: str) -> Phrase:
        """The description of shape `index` by "s" size, "c" color, "k" kind."""
        s = self.shapes[index]
        return Phrase(
            s.size if "s" in parts else -1,
            s.color if "c" in parts else -1,
            s.kind if "k" in parts else -1,
        )

    def any_phrase(self, parts: str) -> Phrase:
        """A description with these parts: of a shape of the scene or, as often, at random."""
        rng = self.rng
        if rng.random() < 0.5:
            return self.phrase(rng.randrange(len(self.shapes)), parts)
        return Phrase(
            rng.randrange(len(SIZES)) if "s" in parts else -1,
            rng.randrange(len(COLOR_NAMES)) if "c" in parts else -1,
            rng.randrange(len(KINDS)) if "k" in parts else -1,
        )

    def named(self, without: str = "", within: int = -1) -> tuple[int, Phrase] | None:
        """A shape of `within` and a description that fits it alone, without the parts `without`."""
        rng = self.rng
        bits = [i for i in range(len(self.shapes)) if within >> i & 1]
        if not bits:
            return None
        index = rng.choice(bits)
        options = [
            parts
            for parts in ("k", "c", "ck", "sk", "sc", "sck")
            if not set(parts) & set(without) and self.mask(self.phrase(index, parts)) == 1 << index
        ]
        # A longer description than needed adds words without information: keep it rare.
        options = (
            [p for p in options if len(p) == len(options[0])] if rng.random() < 0.8 else options
        )
        return (index, self.phrase(index, rng.choice(options))) if options else None

    # Wording.
    def word(self, word: str) -> str:
        """The word or, sometimes, a synonym."""
        others = SYNONYMS.get(word)
        return self.rng.choice(others) if others and self.rng.random() < SYNONYM_RATE else word

    def say(self, p: Phrase, plural: bool = False) -> str:
        """A description in words, without article."""
        words = [self.word(SIZES[p.size])] if p.size >= 0 else []
        if p.color >= 0:
            words.append(COLOR_NAMES[p.color])
        noun = KINDS[p.kind] if p.kind >= 0 else "shape"
        words.append(
            self.word((noun + "es" if noun == "cross" else noun + "s") if plural else noun)
        )
        return " ".join(words)

    def a(self, p: Phrase) -> str:
        """A description in words with "a" or "an"."""
        text = self.say(p)
        return ("an " if text[0] in "aeiou" else "a ") + text

    def relation(self, name: str) -> str:
        """One of the wordings of a relation."""
        return self.rng.choice(RELATIONS[name])

    def ask(self, *wordings: str) -> str:
        """One of the wordings of a question, sometimes with filler words before it."""
        text = self.rng.choice(wordings)
        return f"{self.rng.choice(FILLERS)} {text}" if self.rng.random() < FILLER_RATE else text
