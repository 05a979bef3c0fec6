# SPDX-License-Identifier: Apache-2.0
"""An image as an encoder sees it: made square, resized by PIL, normalised.

S pixels of the encoder's side
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

# openai/clip-vit-large-patch14-336/preprocessor_config.json
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FITS = ("pad", "crop", "stretch")
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
STRIP = 256  # rows of a padded image that are resized together
# Rescaled in float64, then rounded, as published.
UNIT = (np.arange(256) * (1 / 255)).astype(np.float32)


@dataclass(frozen=True)
class Preparation:
    """How images of any shape become the pixels of one encoder.

    Attributes:
      size: S. fit: "pad" to a square of the mean colour (LLaVA-1.5), "crop" the middle of it
        (CLIP), or "stretch" it to one (SigLIP). mean, std: of red, green and blue from 0 to 1.
      resample: PIL's filter, "bicubic" or "bilinear".
    """

    size: int
    fit: str = "pad"
    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    resample: str = "bicubic"

    def __post_init__(self) -> None:
        if self.fit not in FITS:
            raise ValueError(f"data.image_fit={self.fit!r}: choose one of {', '.join(FITS)}")
        if self.resample not in FILTERS:
            raise ValueError(
                f"data.image_resample={self.resample!r}: choose one of {', '.join(FILTERS)}"
            )
        if len(self.mean) != 3 or len(self.std) != 3 or min(self.std) <= 0:
            raise ValueError(
                f"data.image_mean={self.mean}, data.image_std={self.std}: three numbers each, for "
                "red, green and blue, deviations above 0"
            )

    @classmethod
    def of(cls, config: Any) -> "Preparation":
        """As a configuration says."""
        data = config.data
        return cls(
            config.vit.image_size,
            data.image_fit,
            tuple(data.image_mean),
            tuple(data.image_std),
            data.image_resample,
        )

    @property
    def colour(self) -> tuple[int, ...]:
        """The mean colour, cut to whole numbers as LLaVA-1.5 cuts it: what pads an image."""
        return tuple(int(255 * x) for x in self.mean)

    def square(self, image: np.ndarray) -> np.ndarray:
        """An RGB image uint8 [H, W, 3] made square and resized, uint8 [S, S, 3]."""
        size, (height, width) = self.size, image.shape[:2]
        if height == width == size:
            return image
        picture, how = Image.fromarray(image), FILTERS[self.resample]
        if self.fit == "pad" and height != width:
            return self._padded(picture)
        if self.fit != "crop":
            return np.asarray(picture.resize((size, size), how))
        # The short side to `size`, the long one cut after it.
        short, long = min(height, width), int(size * max(height, width) / min(height, width))
        wide, high = (size, long) if width == short else (long, size)
        left, top = (wide - size) // 2, (high - size) // 2
        picture = picture.resize((wide, high), how)
        return np.asarray(picture.crop((left, top, left + size, top + size)))

    def _padded(self, picture: Image.Image) -> np.ndarray:
        """The picture in the middle of a square of the mean colour, resized, uint8 [S, S, 3].

        Rows first, then columns, as PIL resizes the whole square, but some rows at a time: the
        square of an image 20,000 pixels wide would be 1.2 GB.
        """
        size, how, side = self.size, FILTERS[self.resample], max(picture.size)
        left, top = ((side - x) // 2 for x in picture.size)
        narrow = Image.new("RGB", (size, side), self.colour)
        for first in range(0, picture.height, STRIP):
            high = min(STRIP, picture.height - first)
            strip = Image.new("RGB", (side, high), self.colour)
            strip.paste(picture.crop((0, first, picture.width, first + high)), (left, 0))
            narrow.paste(strip.resize((size, high), how), (0, top + first))
        return np.asarray(narrow.resize((size, size), how))

    def normalise(self, image: np.ndarray) -> np.ndarray:
        """uint8 [..., 3] to float32 of the same shape: the mean to 0, the deviation to 1."""
        return (UNIT[image] - np.array(self.mean, np.float32)) / np.array(self.std, np.float32)

    def blank(self) -> np.ndarray:
        """The image that shows nothing but the mean colour, uint8 [S, S, 3]."""
        return np.full((self.size, self.size, 3), self.colour, np.uint8)
