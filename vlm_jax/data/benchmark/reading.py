# SPDX-License-Identifier: Apache-2.0
"""Pages of numbers, words, labels and handwriting to be read: drawn and labeled by patch.

Print uses the fonts that matplotlib ships, handwriting the scanned digits that scikit-learn ships
(E. Alpaydin and C. Kaynak, UCI "Optical Recognition of Handwritten Digits", 8 x 8 pixels), of which
each split has its own. Glyphs are set one by one, at least ADVANCE pixels apart, so that no two
have their centers in one patch. The constants below set how hard a page is.
"""

import functools
import random
import zlib
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vlm_jax.data.benchmark.scenes import (
    COLOR_NAMES,
    COLORS,
    KINDS,
    PATCH,
    SHAPE_CLASSES,
    SIDE,
    covering,
    draw_shape,
    shape_class,
)

DIGITS = (2, 3)  # fewest and most digits of a printed number
SYLLABLES = (1, 2)  # of a word: a consonant and a vowel each
LABEL = (1, 2)  # characters of a label
WRITTEN = (2, 3)  # digits of a handwritten number
LINES = (1, 1, 1, 2)  # lines of a page, drawn from these
LABELS = (2, 2, 3)  # labels of a page, drawn from these
HEIGHT = (11, 14)  # font size in pixels
WRITTEN_HEIGHT = (9, 12)  # pixels of a scanned digit
ADVANCE = PATCH  # pixels from glyph to glyph
INDENT = 1  # patches by which the left edge of a line varies
HELD_OUT = 3  # strings of this length or more are never shared between splits
FILLER_RATE = 0.05  # share of questions that begin with filler words

CONSONANTS, VOWELS = "BDFGHKLMNPRSTVZ", "AEIOU"
FONTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
)
CHARACTERS = "0123456789" + "".join(sorted(CONSONANTS + VOWELS))
CARD_CLASS = SHAPE_CLASSES + 1  # patch classes of plain cards, by color
GLYPH_CLASS = CARD_CLASS + len(COLORS)  # patch classes of characters
PATCH_CLASSES = GLYPH_CLASS + len(CHARACTERS)

PLACES = {1: ("",), 2: ("top", "bottom"), 3: ("top", "middle", "bottom")}
NOUNS = {
    "number": ("number", "value"),
    "word": ("word", "text"),
    "handwriting": ("number", "value"),
}


class Line(NamedTuple):
    """One string on a page. `digits` are the scans of a handwritten number, else empty."""

    text: str
    task: str
    x: int  # left edge, pixels
    y: int  # middle, pixels
    height: int
    font: int
    ink: tuple[int, int, int]
    digits: tuple[int, ...]
    card: int  # color of the card below, or -1
    kind: int  # shape to the left, or -1
    kind_color: int


class Page(NamedTuple):
    """A page: its background and its lines, from top to bottom."""

    background: tuple[int, int, int]
    lines: tuple[Line, ...]


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """The scanned digits as opacity uint8 [1797, 8, 8], and which digit each is."""
    from sklearn.datasets import load_digits  # here: the import takes a second

    data = load_digits()
    return (data.images * (255 / 16)).astype(np.uint8), data.target


@functools.cache
def scans_of(split: str, digit: int) -> tuple[int, ...]:
    """The scans of one digit that a split has: 70 % train, 10 % val, 20 % test, in file order."""
    scans = np.flatnonzero(_scans()[1] == digit)
    a, b = int(0.7 * len(scans)), int(0.8 * len(scans))
    return tuple(int(i) for i in {"train": scans[:a], "val": scans[a:b], "test": scans[b:]}[split])


@functools.cache
def _font(font: int, height: int) -> ImageFont.FreeTypeFont:
    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{FONTS[font]}.ttf"
    return ImageFont.truetype(str(path), height)


@functools.cache
def _glyph(font: int, height: int, character: str) -> tuple[np.ndarray, int]:
    """A character's opacity cut to its ink, uint8 [h, w], and its top from the middle."""
    face = _font(font, height)
    left, top, right, bottom = face.getbbox(character, anchor="lm")
    image = Image.new("L", (right - left, bottom - top), 0)
    ImageDraw.Draw(image).text((-left, -top), character, font=face, fill=255, anchor="lm")
    return np.asarray(image), int(top)


@functools.cache
def _scan(index: int, height: int) -> np.ndarray:
    """One scanned digit at a height in pixels, opacity uint8 [h, w], cut to its ink in x."""
    image = Image.fromarray(_scans()[0][index]).resize((height, height), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    ink = np.flatnonzero(pixels.max(0) > 60)
    return pixels[:, ink[0] : ink[-1] + 1]


def _glyphs(line: Line) -> list[tuple[np.ndarray, int, int]]:
    """Opacity, left and top in pixels of each character of a line."""
    placed, x = [], line.x
    for k, character in enumerate(line.text):
        if line.digits:
            ink = _scan(line.digits[k], line.height)
            top = -line.height // 2
        else:
            ink, top = _glyph(line.font, line.height, character)
        placed.append((ink, x + (ADVANCE - ink.shape[1]) // 2, line.y + top))
        x += ADVANCE
    return placed


def _belongs(text: str, split: str) -> bool:
    """Long strings belong to one split each: 70 % train, 10 % val, 20 % test, by their hash."""
    if len(text) < HELD_OUT:
        return True
    bucket = zlib.crc32(text.encode()) % 10
    return split == ("train" if bucket < 7 else "val" if bucket < 8 else "test")


def _string(rng: random.Random, task: str, split: str) -> str:
    while True:
        if task == "number" or task == "handwriting":
            text = "".join(
                rng.choices("0123456789", k=rng.randint(*(DIGITS if task == "number" else WRITTEN)))
            )
        elif task == "label" and rng.random() < 0.5:
            text = "".join(rng.choices("0123456789", k=rng.randint(*LABEL)))
        else:
            text = "".join(
                rng.choice(CONSONANTS) + rng.choice(VOWELS) for _ in range(rng.randint(*SYLLABLES))
            )
            text = text[: LABEL[1]] if task == "label" else text
        if _belongs(text, split):
            return text


def _brightness(color) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]


def _ink(rng: random.Random, ground) -> tuple[int, int, int]:
    """A color at random that stands out from the ground by 110 of 255 in brightness."""
    while True:
        ink = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        if abs(_brightness(ink) - _brightness(ground)) > 110:
            return ink


def _background(rng: random.Random) -> tuple[int, int, int]:
    level = rng.choice((25, 225))
    return tuple(level + rng.randint(-20, 25) for _ in range(3))


def draw_page(rng: random.Random, split: str) -> Page:
    """A page at random: lines of print or handwriting, or labels on cards or beside shapes."""
    background = _background(rng)
    labels = rng.random() < 0.2
    count = rng.choice(LABELS if labels else LINES)
    cards = rng.random() < 0.5
    kinds, colors = rng.sample(range(len(KINDS)), count), rng.sample(range(len(COLORS)), count)
    same = rng.choice(("number", "word", "handwriting"))  # one task per page, or one per line
    mixed = count > 1 and rng.random() < 0.3
    lines, band = [], SIDE // count
    for k in range(count):
        task = (
            "label" if labels else rng.choice(("number", "word", "handwriting")) if mixed else same
        )
        text = _string(rng, task, split)
        card = colors[k] if labels and cards else -1
        kind = kinds[k] if labels and not cards else -1
        ink = _ink(rng, COLORS[COLOR_NAMES[card]] if card >= 0 else background)
        digits = (
            tuple(rng.choice(scans_of(split, int(d))) for d in text)
            if task == "handwriting"
            else ()
        )
        height = rng.randint(*(WRITTEN_HEIGHT if digits else HEIGHT))
        line = Line(
            text,
            task,
            0,
            0,
            height,
            rng.randrange(len(FONTS)),
            ink,
            digits,
            card,
            kind,
            rng.randrange(len(COLORS)),
        )
        # In patches: room for the shape to the left, or for the margin of a card.
        first = 2 if kind >= 0 else 1 if card >= 0 else 0
        last = min(first + INDENT, SIDE // PATCH - len(text) - (card >= 0))
        row = (2 * k + 1) * band // (2 * PATCH)  # the middle of the line's share of the page
        lines.append(
            line._replace(
                x=PATCH * rng.randint(first, last) + rng.randint(-1, 1) * (first > 0),
                y=PATCH * row + PATCH // 2 + rng.randint(-1, 1),
            )
        )
    return Page(background, tuple(lines))


def content(page: Page) -> tuple:
    """What the page shows, without exact places and inks: two pages with equal content are one."""
    return tuple(
        (s.text, s.height, s.font, s.digits, s.card, s.kind, s.x // PATCH) for s in page.lines
    )


def ask(page: Page, k: int, rng: random.Random) -> tuple[str, str]:
    """A question that only line `k` of the page answers, and its kind of wording."""
    line = page.lines[k]
    if line.task == "label":
        if line.card >= 0:
            name = f"the {COLOR_NAMES[line.card]} card"
            wordings = (f"what is written on {name}?", f"read {name}.", f"what does {name} say?")
        else:
            name = f"the {KINDS[line.kind]}"
            wordings = (
                f"what is written next to {name}?",
                f"read the label of {name}.",
                f"what does the label of {name} say?",
            )
        form = "card" if line.card >= 0 else "beside"
    else:
        noun = rng.choice(NOUNS[line.task])
        alone = len(page.lines) == 1
        place = "" if alone else PLACES[len(page.lines)][k] + " "
        form = "alone" if alone else "place"
        wordings = (
            f"what is the {place}{noun}?",
            f"read the {place}{noun}.",
            f"what does the {place}line say?" if place else "what is written here?",
        )
    text = rng.choice(wordings)
    if rng.random() < FILLER_RATE:
        text = rng.choice(("please tell me,", "look closely:", "in this picture,")) + " " + text
    return text, f"{line.task}:{form}"


def render(page: Page) -> np.ndarray:
    """The picture, uint8 [SIDE, SIDE, 3]."""
    image = Image.new("RGB", (SIDE, SIDE), page.background)
    canvas = ImageDraw.Draw(image)
    _draw_props(canvas, page, [COLORS[name] for name in COLOR_NAMES], None)
    pixels = np.array(image)
    for line in page.lines:
        ink = np.array(line.ink, np.int32)
        for alpha, left, top in _glyphs(line):
            box = pixels[top : top + alpha.shape[0], left : left + alpha.shape[1]]
            opacity = alpha[: box.shape[0], : box.shape[1], None].astype(np.int32)
            box[:] = box + (ink - box) * opacity // 255
    return pixels


def _draw_props(canvas: ImageDraw.ImageDraw, page: Page, card_fill, shape_fill) -> None:
    """Draws cards and shapes; `shape_fill` numbers the shapes by line instead of coloring them."""
    for number, line in enumerate(page.lines, 1):
        if line.card >= 0:
            right = line.x + ADVANCE * len(line.text) + 7
            canvas.rectangle((line.x - 8, line.y - 7, right, line.y + 7), fill=card_fill[line.card])
        if line.kind >= 0:
            fill = number if shape_fill else COLORS[COLOR_NAMES[line.kind_color]]
            draw_shape(canvas, line.kind, line.x - 3 * PATCH // 2, line.y, 5, fill)


def patch_labels(page: Page, side: int) -> np.ndarray:
    """The class of each patch, int32 [side * side].

    It is the character whose center the patch holds, else the shape or the card that covers most of
    it, else 0.
    """
    owners = Image.new("L", (SIDE, SIDE), 0)
    count = len(page.lines)
    _draw_props(ImageDraw.Draw(owners), page, range(count + 1, count + 1 + len(COLORS)), True)
    classes = [0] + [shape_class(s.kind, s.kind_color, 0) if s.kind >= 0 else 0 for s in page.lines]
    classes += range(CARD_CLASS, CARD_CLASS + len(COLORS))
    labels = np.array(classes, np.int32)[covering(np.asarray(owners), side)]
    patch = SIDE // side
    for line in page.lines:
        for character, (alpha, left, top) in zip(line.text, _glyphs(line), strict=True):
            row = min((top + alpha.shape[0] // 2) // patch, side - 1)
            column = min((left + alpha.shape[1] // 2) // patch, side - 1)
            labels[row * side + column] = GLYPH_CLASS + CHARACTERS.index(character)
    return labels
