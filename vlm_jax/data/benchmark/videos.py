# SPDX-License-Identifier: Apache-2.0
"""Short clips of shapes for questions that one frame does not answer: direction, order, count.

In a clip three things happen at once. A walker goes around the border, one patch a frame, either
way; a lamp in the middle shows three colors in turn, in either order; a blinker is there in some
frames. Where the walk begins and which color is first are drawn evenly over their whole turn, so
that each frame by itself is as likely in one direction as in the other, and in one order as in the
other. A frame is a scene of shapes (scenes.py), and is drawn and labeled as one.
"""

import itertools
import random
from collections.abc import Iterator
from typing import NamedTuple

from vlm_jax.data.benchmark.balance import split_of
from vlm_jax.data.benchmark.questions import Question
from vlm_jax.data.benchmark.scenes import COLOR_NAMES, GRID, KINDS, PATCH, SIDE, SIZES, Scene, Shape

FRAMES = 8  # of a clip; data.frames of them are shown
ACROSS = SIDE // PATCH  # patches of a side
# The patches at the border, clockwise from the top left: a clip walks seven of the twenty, less
# than half a turn, so that no choice of two frames shows the other direction.
BORDER = (
    *((column, 0) for column in range(ACROSS)),
    *((ACROSS - 1, row) for row in range(1, ACROSS)),
    *((column, ACROSS - 1) for column in range(ACROSS - 2, -1, -1)),
    *((0, row) for row in range(ACROSS - 2, 0, -1)),
)
# The patches around the middle, and the four in the middle.
MIDDLE = tuple(itertools.product((ACROSS // 2 - 1, ACROSS // 2), repeat=2))
AROUND = tuple(
    place for place in itertools.product(range(1, ACROSS - 1), repeat=2) if place not in MIDDLE
)
SHOWN_FOR = 5  # frames of each of the lamp's colors: a clip shows two or three of them
BLINKS = (1, 2, 3, 4)  # frames in which the blinker is there, no two in a row
DIRECTIONS = ("clockwise", "counterclockwise")


class Clip(NamedTuple):
    """What happens in a clip; shapes are kind, color and size as in `scenes.Shape`."""

    background: int
    walker: tuple[int, int, int]
    start: int  # index into BORDER
    direction: int  # index into DIRECTIONS
    lamp: tuple[int, int]  # kind and size
    lamp_at: int  # index into MIDDLE
    colors: tuple[int, int, int]
    phase: int  # frames that the first color has been shown before the clip begins
    order: int  # 1 or -1: which way the colors follow each other
    blinker: tuple[int, int, int]
    blinker_at: int  # index into AROUND
    blinks: tuple[int, ...]  # frames in which it is there


def turn() -> int:
    """Frames in which the lamp has shown all of its colors."""
    return 3 * SHOWN_FOR


def scene(clip: Clip, frame: int) -> Scene:
    """What one of the FRAMES frames shows."""
    way = 1 if clip.direction == 0 else -1
    walked = BORDER[(clip.start + way * frame) % len(BORDER)]
    lit = clip.colors[clip.order * ((clip.phase + frame) // SHOWN_FOR) % 3]
    shapes = [
        _shape(clip.walker, walked),
        _shape((clip.lamp[0], lit, clip.lamp[1]), MIDDLE[clip.lamp_at]),
    ]
    if frame in clip.blinks:
        shapes.append(_shape(clip.blinker, AROUND[clip.blinker_at]))
    shapes.sort(key=lambda shape: (shape.y, shape.x))
    return Scene((clip.background,) * 3, tuple(shapes))


def _shape(looks: tuple[int, int, int], place: tuple[int, int]) -> Shape:
    x, y = (PATCH * k + PATCH // 2 for k in place)
    cell = SIDE // GRID
    return Shape(*looks, x // cell, y // cell, x, y)


def content(clip: Clip) -> tuple:
    """What a clip shows, without the background; equal content is the same clip."""
    return tuple(clip._replace(background=0))


def draw_clip(rng: random.Random, *, direction: int, order: int, blinks: int) -> Clip:
    """A clip at random in which these happen; the other fields do not depend on them, but for the
    frames of the blinker."""
    kinds = rng.sample(range(len(KINDS)), 3)
    walker, blinker, *colors = rng.sample(range(len(COLOR_NAMES)), 5)
    sizes = [rng.randrange(len(SIZES)) for _ in range(3)]
    level = rng.choice((rng.randint(15, 60), rng.randint(195, 250)))
    return Clip(
        level,
        (kinds[0], walker, sizes[0]),
        rng.randrange(len(BORDER)),
        direction,
        (kinds[1], sizes[1]),
        rng.randrange(len(MIDDLE)),
        (colors[0], colors[1], colors[2]),
        rng.randrange(turn()),
        order,
        (kinds[2], blinker, sizes[2]),
        rng.randrange(len(AROUND)),
        rng.choice(apart(blinks)),
    )


def apart(count: int) -> list[tuple[int, ...]]:
    """Every choice of `count` frames of which no two are in a row."""
    return [
        chosen
        for chosen in itertools.combinations(range(FRAMES), count)
        if all(b - a > 1 for a, b in itertools.pairwise(chosen))
    ]


def direction(clip: Clip, rng: random.Random) -> Question:
    """Which way the walker goes."""
    name = KINDS[clip.walker[0]]
    said = DIRECTIONS[clip.direction]
    text = rng.choice((f"which way does the {name} go around?",
                       f"in which direction does the {name} move?"))  # fmt: skip
    return Question("direction", "direction", ("direction",), said, said, text)


def order(clip: Clip, rng: random.Random, *, first: bool) -> Question:
    """Which color follows another one; the true one is named `first` or second."""
    asked = rng.randrange(3)
    after, before = (COLOR_NAMES[clip.colors[(asked + k * clip.order) % 3]] for k in (1, -1))
    a, b = (after, before) if first else (before, after)
    color = COLOR_NAMES[clip.colors[asked]]
    text = rng.choice((f"which colour comes after {color}, {a} or {b}?",
                       f"what follows {color}, {a} or {b}?"))  # fmt: skip
    label = "first" if first else "second"
    return Question("order", "order", ("order",), label, after, text)


def count(clip: Clip, rng: random.Random) -> Question:
    """How often the blinker is there."""
    name = KINDS[clip.blinker[0]]
    text = rng.choice((f"how many times does the {name} appear?",
                       f"how often is the {name} there?"))  # fmt: skip
    said = str(len(clip.blinks))
    return Question("events", "events", ("events",), said, said, text)


def _evenly(rng: random.Random, values: tuple) -> Iterator:
    """The values again and again, each as often as the others, in a new order every time."""
    while True:
        yield from rng.sample(values, len(values))


def clips_of(split: str, count_: int, *, seed: int) -> Iterator[tuple[Clip, list[Question]]]:
    """`count_` clips of a split, no two alike, and the three questions about each.

    Of every task each answer is as frequent as the others.
    """
    rng = random.Random(f"video/{seed}/{split}")
    answers = zip(
        _evenly(rng, (0, 1)),
        _evenly(rng, (1, -1)),
        _evenly(rng, BLINKS),
        _evenly(rng, (True, False)),
        strict=True,
    )
    made: set[tuple] = set()
    for way, follows, blinks, first in itertools.islice(answers, count_):
        while True:
            clip = draw_clip(rng, direction=way, order=follows, blinks=blinks)
            shown = content(clip)
            if split_of(shown) == split and shown not in made:
                break
        made.add(shown)
        asked = [direction(clip, rng), order(clip, rng, first=first), count(clip, rng)]
        yield clip, asked
