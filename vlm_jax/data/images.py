# SPDX-License-Identifier: Apache-2.0
"""An image as an encoder sees it: made square, resized by PIL, cut, rescaled, normalized.

S pixels of the encoder's side
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# openai/clip-vit-large-patch14-336/preprocessor_config.json
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FITS = ("pad", "crop", "stretch")
FILTERS = {how.name.lower(): how for how in Image.Resampling}
STRIP = 256  # rows of a padded image that are resized together
AT_ONCE = 336  # rows that are normalized together
LARGEST_EDGE = 1344  # of image_resize, where the encoder's side is small: images are 100:1 at most


def largest_edge(side: int) -> int:
    """The most pixels of an edge that images are resized to, of an encoder of `side` pixels."""
    return max(LARGEST_EDGE, 4 * side)


@dataclass(frozen=True)
class Preparation:
    """How images of any shape become the pixels of one encoder.

    An image is resized, its middle S x S pixels are cut out (what lies outside the image is black),
    and its numbers from 0 to 255 are rescaled and normalized. These are the steps of transformers'
    PIL processors of CLIP, SigLIP and LLaVA, pixel by pixel.

    Attributes:
      size: S.
      fit: what is resized, and how. "pad": a square of the mean color with the image in its middle
        (LLaVA-1.5); "crop": the image, its shape kept (CLIP); "stretch": the image, to any shape
        (SigLIP).
      mean, std: of red, green and blue after rescaling.
      resample: PIL's filter by its name: nearest, lanczos, bilinear, bicubic, box, hamming and
        whatever else the installed PIL has.
      resize: () to S; (a,) to a: the shorter side with "crop", both sides otherwise; (0,) not at
        all. (a, b) with "crop": the shorter side to a, the longer one to at most b; with "stretch":
        to height a and width b.
      rescale: what the numbers from 0 to 255 are multiplied with.
      normalize: whether the mean is subtracted and the deviation divided by.
    """

    size: int
    fit: str = "pad"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: str = "bicubic"
    resize: tuple[int, ...] = ()
    rescale: float = 1 / 255
    normalize: bool = True

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"data.image_fit={self.fit!r}: choose one of {', '.join(FITS)}")
        if self.resample not in FILTERS:
            raise ValueError(
                f"data.image_resample={self.resample!r}: choose one of {', '.join(FILTERS)}"
            )
        if not (_numbers(self.mean) and _numbers(self.std) and min(self.std) > 0):
            raise ValueError(
                f"data.image_mean={self.mean}, data.image_std={self.std}: three numbers each, for "
                "red, green and blue, deviations above 0"
            )
        if self.fit == "pad" and not 0 <= min(self.mean) <= max(self.mean) <= 1:
            raise ValueError(
                f"data.image_mean={self.mean}: data.image_fit='pad' pads with this color, so that "
                "it is from 0 to 1; choose crop or stretch"
            )
        largest = largest_edge(self.size)
        sides = self.resize if isinstance(self.resize, (tuple, list)) else (None,)
        if not (
            all(type(x) is int and 0 <= x <= largest for x in sides)
            and len(sides) <= 2
            and (0 not in sides or len(sides) == 1)
        ):
            raise ValueError(
                f"data.image_resize={self.resize}: () for the encoder's side, or one or two whole "
                f"numbers from 1 to {largest}, or (0,) for no resizing"
            )
        if self.fit == "pad" and len(sides) == 2:
            raise ValueError(
                f"data.image_resize={self.resize}: data.image_fit='pad' makes a square, which is "
                "resized to a square: give one number"
            )
        if not (_numbers([self.rescale] * 3) and self.rescale > 0):
            raise ValueError(f"data.image_rescale={self.rescale}: a number above 0, often 1/255")
        if type(self.normalize) is not bool:
            raise ValueError(f"data.image_normalize={self.normalize}: choose True or False")

    @classmethod
    def of(cls, section: Any, size: int) -> "Preparation":
        """As a `data` section says, for an encoder of `size` pixels."""
        return cls(
            size,
            section["image_fit"],
            tuple(section["image_mean"]),
            tuple(section["image_std"]),
            section["image_resample"],
            tuple(section["image_resize"]),
            section["image_rescale"],
            section["image_normalize"],
        )

    @property
    def color(self) -> tuple[int, ...]:
        """The mean color, cut to whole numbers as LLaVA-1.5 cuts it: what pads an image."""
        return tuple(int(255 * x) for x in self.mean)

    def square(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """An RGB image, uint8 [H, W, 3] or of PIL, made square and resized, uint8 [S, S, 3]."""
        picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
        how = FILTERS[self.resample]
        wide, high = self.resized(*picture.size)
        if self.fit == "pad" and picture.width != picture.height:
            picture = self._padded(picture, wide)
        else:
            picture = picture.resize((wide, high), how)
        left, top = ((x - self.size) // 2 for x in picture.size)
        if picture.size != (self.size, self.size):
            picture = picture.crop((left, top, left + self.size, top + self.size))
        return np.asarray(picture)

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """Width and height to which an image of a width and height, or its square, is resized."""
        if self.resize == (0,):
            side = max(width, height)
            return (side, side) if self.fit == "pad" else (width, height)
        first, *second = self.resize or (self.size,)
        if self.fit != "crop":
            return (*second, first) if second else (first, first)
        short, long = min(width, height), max(width, height)
        goal = first
        if second and long / short * first > second[0]:
            goal = second[0] * short / long
        # transformers rounds the shorter side, cuts the longer, and leaves what is right as it is.
        made = max(round(goal), 1), max(int(goal * long / short), 1)
        made = (short, long) if made[0] == short else made
        return made if width <= height else made[::-1]

    def _padded(self, picture: Image.Image, size: int) -> Image.Image:
        """The picture in the middle of a square of the mean color, resized to `size` x `size`.

        Rows first, then columns, as PIL resizes a square to a square, but some rows at a time: the
        square of an image 20,000 pixels wide would be 1.2 GB.
        """
        how, side = FILTERS[self.resample], max(picture.size)
        left, top = ((side - x) // 2 for x in picture.size)
        if self.resize == (0,):
            # Of a large square only the middle is cut out.
            kept = min(side, self.size)
            cut = (side - kept) // 2
            square = Image.new("RGB", (kept, kept), self.color)
            square.paste(picture, (left - cut, top - cut))
            return square
        narrow = Image.new("RGB", (size, side), self.color)
        if picture.width == side:  # nothing is padded within a row
            narrow.paste(picture.resize((size, picture.height), how), (0, top))
            return narrow.resize((size, size), how)
        for first in range(0, picture.height, STRIP):
            rows = min(STRIP, picture.height - first)
            strip = Image.new("RGB", (side, rows), self.color)
            strip.paste(picture.crop((0, first, picture.width, first + rows)), (left, 0))
            narrow.paste(strip.resize((size, rows), how), (0, top + first))
        return narrow.resize((size, size), how)

    def normalized(self, image: np.ndarray) -> np.ndarray:
        """uint8 [..., 3] to float32 of the same shape: the mean to 0, the deviation to 1."""
        # Rescaled in float64, then rounded, as published.
        made = (np.arange(256) * self.rescale).astype(np.float32)
        if not self.normalize:
            return made[image]
        pixels = np.empty(image.shape, np.float32)
        across = 3 * (image.shape[-2] if image.ndim > 1 else 1)
        rows, made_rows = image.reshape(-1, across), pixels.reshape(-1, across)
        mean, std = (np.tile(np.array(x, np.float32), across // 3) for x in (self.mean, self.std))
        # A part at a time stays in the processor's cache: a quarter of the time.
        for first in range(0, len(rows), AT_ONCE):
            part = made_rows[first : first + AT_ONCE]
            np.take(made, rows[first : first + AT_ONCE], out=part, mode="clip")
            part -= mean
            part /= std
        return pixels

    def blank(self) -> np.ndarray:
        """The image that shows nothing but the mean color, uint8 [S, S, 3]."""
        color = self.color
        if self.normalize and self.rescale != 1 / 255:
            color = [min(max(int(x / self.rescale), 0), 255) for x in self.mean]
        return np.full((self.size, self.size, 3), color, np.uint8)


def _numbers(values: Sequence[Any]) -> bool:
    """Whether these are three finite numbers."""
    return len(values) == 3 and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x) for x in values
    )
