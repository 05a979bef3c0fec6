# SPDX-License-Identifier: Apache-2.0
"""Things that people know, each drawn in several styles: pictures with names and categories.

They are read from packages of npm that are made from iamcal/emoji-data. Each holds the drawings of
one vendor, `img/STYLE/64/*.png`, and `emoji.json`, which says what they show. Licenses:
docs/benchmark.md.

A number of things  H = 64 pixels of a picture's side
"""

import colorsys
import functools
import hashlib
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

STYLES = ("google", "twitter", "facebook")
VERSION = "16.0.0"  # of all packages; another one has other names and pictures
PIXELS = 64  # of a picture's side
NAME = re.compile("[a-z]+( [a-z]+){0,2}")  # what a name must be for a question to use it
LEFT_OUT = ("Component",)  # a category of parts: skin tones
# Root mean square difference of two pictures, each reduced to 16 x 16 pixels on white, in steps of
# 255, under which nobody could tell them apart by sight (Norway's flag and that of Bouvet Island).
ALIKE = 8.0
# Words that make variants of one thing. Variants are in one split.
VARIANTS = frozenset("man men woman women person".split())

COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink",
          "brown", "black", "gray", "white")  # fmt: skip
STEPS = 32  # of each channel, so that a table says what every pixel is called
HUES = (10, 42, 70, 165, 258, 310, 345)  # degrees at which red, orange .. pink end
SHARE = 0.5  # of a picture's pixels that a color must have to be its color
SECOND = 0.2  # the most that another color may have beside it


class Thing(NamedTuple):
    """What a picture shows. `category` and `subcategory` are those of emoji.json, `words` its other
    names."""

    name: str
    category: str
    subcategory: str
    words: tuple[str, ...]
    file: str

    @property
    def kin(self) -> str:
        """The name without what makes a variant of it; the name itself if nothing is left."""
        return " ".join(w for w in self.name.split() if w not in VARIANTS) or self.name


class Things:
    """All things that every style shows and a question can name, with their pictures.

    Attributes:
      things: in the order of the packages.
      pictures: style -> uint8 [A, H, H, 4], red, green, blue, opacity.
      colors: style -> the color of each picture, "" where none prevails (`color_of`).
      subcategories: all of them, sorted.
      version_hash: a sha256 over the packages' names and versions and all that is used of them.
    """

    def __init__(self, things: list[Thing], pictures: dict[str, np.ndarray]):
        self.things, self.pictures = tuple(things), pictures
        self.colors = {s: tuple(color_of(p) for p in drawn) for s, drawn in pictures.items()}
        self.subcategories = tuple(sorted({t.subcategory for t in things}))
        digest = hashlib.sha256(repr(([package(s) for s in STYLES], VERSION, things)).encode())
        for style in STYLES:
            digest.update(pictures[style].tobytes())
        self.version_hash = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.things)


def package(style: str) -> str:
    """The name of the npm package with the pictures of a style."""
    return f"emoji-datasource-{style}"


@functools.lru_cache(maxsize=1)
def read(folder: Path) -> Things:
    """The things in a folder that holds the unpacked packages, each in a folder of its own.

    Left out is what not every style has, an older form of another entry, a name that is not one to
    three plain words or not the only such, and what looks like another thing (`ALIKE`).

    Raises:
      FileNotFoundError: if a package or a picture is not there.
      ValueError: for a package of another version, and for a damaged file.
    """
    homes = {style: _home(folder, style) for style in STYLES}
    first = homes[STYLES[0]] / "emoji.json"
    entries = _entries(first)
    for home in homes.values():
        if _entries(home / "emoji.json") != entries:
            raise ValueError(
                f"{home / 'emoji.json'} says other things than {first}: fetch the packages again"
            )
    found = [_thing(e) for e in entries if _usable(e)]
    times = Counter(thing.name for thing in found)
    found = [t for t in found if NAME.fullmatch(t.name) and times[t.name] == 1]
    if not found:
        raise ValueError(f"{first} has no thing that a question can name: fetch the packages again")
    pictures = {
        style: np.stack([_picture(home / "img" / style / str(PIXELS) / t.file) for t in found])
        for style, home in homes.items()
    }
    kept = _distinct(found, pictures)
    return Things([found[k] for k in kept], {s: drawn[kept] for s, drawn in pictures.items()})


def _home(folder: Path, style: str) -> Path:
    """The folder of a style's package, whose name may have more in it than the package's."""
    versions = []
    for path in sorted(folder.glob(f"*{package(style)}*/package.json")):
        about = _json(path)
        if isinstance(about, dict) and about.get("name") == package(style):
            if about.get("version") == VERSION:
                return path.parent
            versions.append(f"{about.get('version')} in {path.parent.name}")
    if versions:
        raise ValueError(
            f"{folder} has {package(style)} {', '.join(versions)}: names, pictures and splits of "
            f"the benchmark are those of {VERSION}; `vlm-jax data fetch pictures` fetches it"
        )
    raise FileNotFoundError(
        f"{folder} has no package {package(style)} {VERSION}, unpacked: `vlm-jax data fetch "
        "pictures` fetches it and prints the folder for data.pictures"
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): fetch the package again") from None


def _entries(path: Path) -> list[dict[str, Any]]:
    entries = _json(path)
    needed = {"name", "short_names", "category", "subcategory", "image", "sort_order",
              *(f"has_img_{style}" for style in STYLES)}  # fmt: skip
    for number, entry in enumerate(entries if isinstance(entries, list) else [None]):
        if not isinstance(entry, dict) or needed - entry.keys():
            lacking = ", ".join(sorted(needed - set(entry or ())))
            raise ValueError(f"{path}, entry {number} lacks {lacking}: fetch the package again")
    return sorted(entries, key=lambda e: e["sort_order"])


def _usable(entry: dict[str, Any]) -> bool:
    """Whether every style has it, and no newer entry stands for it."""
    everywhere = all(entry[f"has_img_{style}"] for style in STYLES)
    return everywhere and not entry.get("obsoleted_by") and entry["category"] not in LEFT_OUT


def _thing(entry: dict[str, Any]) -> Thing:
    name = entry["name"].lower()
    more = {w for short in entry["short_names"] for w in re.findall("[a-z]+", short)}
    return Thing(
        name,
        entry["category"].lower().replace("&", "and"),
        entry["subcategory"],
        tuple(sorted(more - set(name.split()))),
        entry["image"],
    )


def _picture(path: Path) -> np.ndarray:
    """A picture with its opacity, uint8 [H, H, 4]."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: fetch the package again")
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGBA"))
    except Exception as error:  # each decoder has its own
        raise ValueError(f"{path} cannot be decoded ({error}): fetch the package again") from None
    if pixels.shape[:2] != (PIXELS, PIXELS):
        height, width = pixels.shape[:2]
        raise ValueError(f"{path} is {width} x {height} pixels, not {PIXELS} x {PIXELS}")
    return pixels


def _distinct(things: list[Thing], pictures: dict[str, np.ndarray]) -> list[int]:
    """Indices of things that look like no other in any style; of lookalikes the shortest name."""
    near = np.zeros((len(things), len(things)), bool)
    for drawn in pictures.values():
        small = [_on_white(picture).reduce(PIXELS // 16) for picture in drawn]
        # Whole numbers below 2^53: the sums are exact, and the same on every machine.
        x = np.array([np.asarray(p) for p in small], np.float64).reshape(len(things), -1)
        square = np.square(x).sum(1)
        near |= square[:, None] + square - 2 * x @ x.T < ALIKE**2 * x.shape[1]
    kept: list[int] = []
    for k in sorted(range(len(things)), key=lambda k: (len(things[k].name.split()), k)):
        if not near[k, kept].any():
            kept.append(k)
    return sorted(kept)


def _on_white(picture: np.ndarray) -> Image.Image:
    ground = Image.new("RGBA", (PIXELS, PIXELS), "white")
    return Image.alpha_composite(ground, Image.fromarray(picture)).convert("RGB")


def color_of(picture: np.ndarray) -> str:
    """The one of COLORS that prevails in a picture [H, H, 4], or "".

    It covers at least SHARE of the opaque pixels, and no other color more than SECOND of them. A
    pixel is black, gray or white by its lightness where it has little color, brown if it is a dull
    red or orange, pink if it is a pale red, and else named by its hue.
    """
    counts = _counts(picture).tolist()
    ranked = sorted(range(len(COLORS)), key=lambda k: -counts[k])
    first, second = (counts[k] / max(sum(counts), 1) for k in ranked[:2])
    return COLORS[ranked[0]] if first >= SHARE and second <= SECOND else ""


def _counts(picture: np.ndarray) -> np.ndarray:
    """Opaque pixels of each color."""
    shown = picture[picture[..., 3] > 127].astype(np.int64) * STEPS // 256
    of_pixel = _table()[(shown[:, 0] * STEPS + shown[:, 1]) * STEPS + shown[:, 2]]
    return np.bincount(of_pixel, minlength=len(COLORS))


@functools.cache
def _table() -> np.ndarray:
    """The index in COLORS of every pixel, by its channels in STEPS steps each."""
    channels = [k / (STEPS - 1) for k in range(STEPS)]
    return np.array([_color(r, g, b) for r in channels for g in channels for b in channels])


def _color(red: float, green: float, blue: float) -> int:
    """The index in COLORS of a pixel, channels from 0 to 1."""
    turn, s, v = colorsys.rgb_to_hsv(red, green, blue)
    hue = 360 * turn
    if v < 0.2 or (s < 0.2 and v < 0.3):
        return COLORS.index("black")
    if s < 0.2:
        return COLORS.index("gray" if v < 0.85 else "white")
    if 5 <= hue < 45 and (v < 0.6 or (v < 0.8 and s < 0.78)):
        return COLORS.index("brown")
    if (hue < 15 or hue >= HUES[-1]) and s < 0.55 and v > 0.8:
        return COLORS.index("pink")
    return sum(hue >= end for end in HUES) % len(HUES)
