# SPDX-License-Identifier: Apache-2.0
"""Scenes of one to four pictures of things that people know (things.py): drawn, and labeled.

Things are split by what they show, whatever the style; one style is kept out of all
training. The constants below set how hard a scene is.
"""

import collections
import random
from typing import NamedTuple

import numpy as np
from PIL import Image

from vlm_jax.data.benchmark.balance import split_of
from vlm_jax.data.benchmark.scenes import SIDE, covering
from vlm_jax.data.benchmark.things import STYLES, Things

COUNTS = (1, 1, 2, 2, 3, 4)  # pictures of a scene, drawn from these
ALONE = (40, 64)  # smallest and largest side in pixels of a picture that is alone
AMONG = (26, 34)  # and of one that shares the scene: each has a quarter
ALIKE_RATE = 0.5  # share of scenes of two whose pictures show the same thing
NEAR_RATE = 0.5  # and of the other ones, that of two things of one subcategory
COLORED_RATE = 0.5  # share of pictures that are drawn color by color, not category by category
PLACES = ("top left", "top right", "bottom left", "bottom right")
LEVELS = (40, 235)  # of the ground
TINT = 20  # by which a channel of the ground may differ from its level
TEXTURE = 6  # by which a pixel of a textured ground differs from its color, at most


class Picture(NamedTuple):
    """One picture: a thing by its index, a style by its index in STYLES."""

    thing: int
    style: int
    place: int  # index into PLACES; -1 if it is alone
    x: int  # left edge, pixels
    y: int  # upper edge
    size: int  # side, pixels


class Scene(NamedTuple):
    """A ground and the pictures on it in reading order; `texture` is "plain" or one of TEXTURES."""

    ground: tuple[int, int, int]
    texture: str
    pictures: tuple[Picture, ...]


class Deck:
    """The things that a family of a split may show, and in which styles.

    Attributes:
      members: indices of the things.
      styles: indices of the styles; a scene of two has two of them. If `held_out`, the first is the
        one that is kept out of training, and every scene has it.
    """

    def __init__(self, things: Things, split: str, *, held_out: str, in_held_out: bool):
        first = STYLES.index(held_out)
        known = [k for k in range(len(STYLES)) if k != first]
        self.styles, self.held_out = [first, *known] if in_held_out else known, in_held_out
        self.members = [
            k for k, thing in enumerate(things.things) if split_of(("thing", thing.kin)) == split
        ]
        if len(self.members) < max(COUNTS):
            raise ValueError(
                f"the pictures have {len(self.members)} things for the {split} split: a scene "
                f"needs {max(COUNTS)}, take the whole packages"
            )
        grouped: dict[str, list[int]] = collections.defaultdict(list)
        self.near: dict[int, list[int]] = collections.defaultdict(list)
        for k in self.members:
            grouped[things.things[k].category].append(k)
        for k in self.members:
            kind = things.things[k].subcategory
            same = grouped[things.things[k].category]
            self.near[k] = [j for j in same if j != k and things.things[j].subcategory == kind]
        self.by_category = [grouped[name] for name in sorted(grouped)]
        self.by_color = []
        for style in STYLES:
            of_color: dict[str, list[int]] = collections.defaultdict(list)
            for k in self.members:
                of_color[things.colors[style][k]].append(k)
            of_color.pop("", None)
            self.by_color.append([of_color[name] for name in sorted(of_color)])

    def thing(self, rng: random.Random, style: int) -> int:
        """A thing at random: each category, or each color of the style, is as likely."""
        colored = rng.random() < COLORED_RATE and self.by_color[style]
        return rng.choice(rng.choice(self.by_color[style] if colored else self.by_category))


def draw_scene(rng: random.Random, deck: Deck) -> Scene:
    """A scene at random."""
    count = rng.choice(COUNTS)
    if count == 2:
        styles = rng.sample(deck.styles, 2)
        if deck.held_out:
            styles = rng.sample([deck.styles[0], rng.choice(deck.styles[1:])], 2)
    else:
        choices = deck.styles[:1] if deck.held_out else deck.styles
        styles = [rng.choice(choices) for _ in range(count)]
    shown = [deck.thing(rng, styles[0])]
    if count == 2 and rng.random() < ALIKE_RATE:
        shown *= 2
    elif count == 2 and deck.near[shown[0]] and rng.random() < NEAR_RATE:
        shown.append(rng.choice(deck.near[shown[0]]))
    while len(shown) < count:
        if (drawn := deck.thing(rng, styles[len(shown)])) not in shown:
            shown.append(drawn)
    places = sorted(rng.sample(range(len(PLACES)), count)) if count > 1 else [-1]
    rng.shuffle(shown)
    level = rng.randint(*LEVELS)
    ground = tuple(min(255, max(0, level + rng.randint(-TINT, TINT))) for _ in range(3))
    return Scene(
        ground,
        rng.choice(("plain", *TEXTURES)),
        tuple(
            _placed(rng, thing, style, place)
            for thing, style, place in zip(shown, styles, places, strict=True)
        ),
    )


def _placed(rng: random.Random, thing: int, style: int, place: int) -> Picture:
    """A picture somewhere in its quarter, or in the whole scene if it is alone."""
    room, (row, column) = (SIDE, (0, 0)) if place < 0 else (SIDE // 2, divmod(place, 2))
    size = rng.randint(*(ALONE if place < 0 else AMONG))
    x, y = (k * room + rng.randint(0, room - size) for k in (column, row))
    return Picture(thing, style, place, x, y, size)


def _grain(rng: np.random.Generator) -> np.ndarray:
    return rng.uniform(-1, 1, (SIDE, SIDE))


def _slope(rng: np.random.Generator) -> np.ndarray:
    angle = rng.uniform(0, 2 * np.pi)
    y, x = np.mgrid[-1 : 1 : SIDE * 1j, -1 : 1 : SIDE * 1j]
    return (x * np.cos(angle) + y * np.sin(angle)) / np.sqrt(2)


def _stripes(rng: np.random.Generator) -> np.ndarray:
    return np.sin(_slope(rng) * rng.uniform(10, 40))


TEXTURES = {"grain": _grain, "slope": _slope, "stripes": _stripes}


def _resized(picture: Picture, things: Things) -> Image.Image:
    drawn = Image.fromarray(things.pictures[STYLES[picture.style]][picture.thing])
    return drawn.resize((picture.size, picture.size), Image.Resampling.BICUBIC)


def render(scene: Scene, things: Things) -> np.ndarray:
    """The image, uint8 [SIDE, SIDE, 3]."""
    pixels = np.empty((SIDE, SIDE, 4), np.uint8)
    pixels[..., :3], pixels[..., 3] = scene.ground, 255
    if scene.texture != "plain":
        # Of what the scene shows: the same scene has the same ground in every split and process.
        rng = np.random.default_rng([*scene.ground, *scene.pictures[0][3:]])
        uneven = np.rint(TEXTURE * TEXTURES[scene.texture](rng))[..., None]
        pixels[..., :3] = np.clip(pixels[..., :3] + uneven, 0, 255)
    image = Image.fromarray(pixels)
    for picture in scene.pictures:
        image.alpha_composite(_resized(picture, things), (picture.x, picture.y))
    return np.asarray(image.convert("RGB"))


def owners(scene: Scene, things: Things, side: int) -> np.ndarray:
    """Per patch 1 + the picture that covers most of it, int32 [side * side]; 0 is the ground."""
    covered = np.zeros((SIDE, SIDE), np.uint8)
    for number, picture in enumerate(scene.pictures, 1):
        opaque = np.asarray(_resized(picture, things))[..., 3] > 127
        part = covered[picture.y :, picture.x :][: picture.size, : picture.size]
        part[opaque] = number
    return covering(covered, side)
