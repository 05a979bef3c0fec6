# SPDX-License-Identifier: Apache-2.0
"""Scenes of colored shapes for questions that need reasoning: drawn, and labeled by patch.

A scene is a tuple of shapes on a jittered grid, so that "left of" and "above" are never in doubt:
two shapes of one column are at most 2 JITTER pixels apart in x, two of different columns at least
SIDE / GRID - 2 JITTER. The constants below set how hard a scene is.
"""

import random
from numbers import Real
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 72  # pixels of an image's side
PATCH = 12  # pixels: a shape or a character sits in one patch, so that a small encoder can tell it
GRID = 3  # cells of a side that may hold a shape
JITTER = 7  # pixels by which a shape may leave the middle of its cell: half a patch, and one pixel
OBJECTS = (2, 6)  # fewest and most shapes of a scene
KINDS = ("circle", "square", "triangle", "cross", "star")
COLORS = {
    "red": (214, 40, 40),
    "green": (38, 150, 62),
    "blue": (45, 85, 215),
    "yellow": (240, 205, 30),
    "purple": (140, 60, 185),
    "orange": (245, 130, 25),
}
COLOR_NAMES = tuple(COLORS)
SIZES = ("small", "big")
RADIUS = (4, 6)  # pixels, by size

SHAPE_CLASSES = len(KINDS) * len(COLORS) * len(SIZES)  # patch classes 1 .. SHAPE_CLASSES


class Shape(NamedTuple):
    """One shape: kind, color and size are indices into KINDS, COLOR_NAMES and SIZES."""

    kind: int
    color: int
    size: int
    column: int
    row: int
    x: int  # center, pixels
    y: int


class Scene(NamedTuple):
    """A scene: its background and its shapes in reading order."""

    background: tuple[int, int, int]
    shapes: tuple[Shape, ...]


def shape_class(kind: int, color: int, size: int) -> int:
    """The patch class of a shape, 1 .. SHAPE_CLASSES; 0 is the background."""
    return 1 + (kind * len(COLORS) + color) * len(SIZES) + size


def draw_scene(rng: random.Random) -> Scene:
    """A scene at random; some have few colors or kinds, so that large counts occur."""
    count = rng.randint(*OBJECTS)
    colors = rng.sample(range(len(COLORS)), rng.randint(2, len(COLORS)))
    kinds = rng.sample(range(len(KINDS)), rng.randint(2, len(KINDS)))
    cell = SIDE // GRID
    shapes = []
    for place in sorted(rng.sample(range(GRID * GRID), count)):
        row, column = divmod(place, GRID)
        shapes.append(
            Shape(
                rng.choice(kinds),
                rng.choice(colors),
                rng.randrange(len(SIZES)),
                column,
                row,
                column * cell + cell // 2 + _jitter(rng),
                row * cell + cell // 2 + _jitter(rng),
            )
        )
    level = rng.choice((rng.randint(15, 60), rng.randint(195, 250)))
    return Scene((level, level, level), tuple(shapes))


def _jitter(rng: random.Random) -> int:
    """From the middle of a cell, a corner of four patches, to about the middle of one of them."""
    return rng.choice((-1, 1)) * (JITTER - 1) + rng.randint(-1, 1)


def content(scene: Scene) -> tuple:
    """What the scene shows, without jitter and background; equal content is the same scene."""
    return tuple((s.kind, s.color, s.size, s.column, s.row) for s in scene.shapes)


def _unit_polygons() -> tuple[np.ndarray | None, ...]:
    """Corners of each kind for radius 1; None is a circle."""
    third = np.array([[0, -1], [0.92, 0.75], [-0.92, 0.75]])
    square = np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.82
    a = 0.32
    cross = np.array(
        [
            [-a, -1],
            [a, -1],
            [a, -a],
            [1, -a],
            [1, a],
            [a, a],
            [a, 1],
            [-a, 1],
            [-a, a],
            [-1, a],
            [-1, -a],
            [-a, -a],
        ]
    )
    angle = np.arange(10) * np.pi / 5 - np.pi / 2
    star = (
        np.stack([np.cos(angle), np.sin(angle)], 1)
        * np.where(np.arange(10) % 2, 0.42, 1.08)[:, None]
    )
    return None, square, third, cross, star


_POLYGONS = _unit_polygons()


def draw_shape(
    canvas: ImageDraw.ImageDraw, kind: int, x: Real, y: Real, radius: Real, fill
) -> None:
    """Fills one shape, centered at (x, y), on a PIL canvas; all lengths in pixels."""
    corners = _POLYGONS[kind]
    if corners is None:
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=fill)
    else:
        canvas.polygon([(x + radius * u, y + radius * v) for u, v in corners], fill=fill)


def render(scene: Scene) -> np.ndarray:
    """The picture, uint8 [SIDE, SIDE, 3]; drawn at twice the size and averaged for smooth edges."""
    image = Image.new("RGB", (2 * SIDE, 2 * SIDE), scene.background)
    canvas = ImageDraw.Draw(image)
    for s in scene.shapes:
        color = COLORS[COLOR_NAMES[s.color]]
        draw_shape(canvas, s.kind, 2 * s.x, 2 * s.y, 2 * RADIUS[s.size], color)
    return np.asarray(image.reduce(2))


def covering(owners: np.ndarray, side: int, least: float = 0.15) -> np.ndarray:
    """Per patch the number that covers most of it, int32 [side * side]; 0 below the share `least`.

    owners: uint8 [H, W], for each pixel 0 or a number; H and W must be multiples of `side`.
    """
    height, width = owners.shape
    if height % side or width % side:
        raise ValueError(f"{side} patches per side do not tile {height} x {width} pixels")
    tiles = owners.reshape(side, height // side, side, width // side).swapaxes(1, 2)
    tiles = tiles.reshape(side * side, -1)
    shares = (
        np.stack([(tiles == k).mean(1) for k in range(1, owners.max() + 1)], 1)
        if owners.any()
        else np.zeros((side * side, 1))
    )
    return np.where(shares.max(1) >= least, shares.argmax(1) + 1, 0).astype(np.int32)


def patch_labels(scene: Scene, side: int) -> np.ndarray:
    """Per patch the class of the shape that covers most of it, int32 [side * side]."""
    owners = Image.new("L", (SIDE, SIDE), 0)
    canvas = ImageDraw.Draw(owners)
    for number, s in enumerate(scene.shapes, 1):
        draw_shape(canvas, s.kind, s.x, s.y, RADIUS[s.size], number)
    classes = np.array([0] + [shape_class(s.kind, s.color, s.size) for s in scene.shapes], np.int32)
    return classes[covering(np.asarray(owners), side)]
