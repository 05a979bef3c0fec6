# SPDX-License-Identifier: Apache-2.0
"""Photographs that nobody took: JPEGs of 640 x 480 with the detail and the bytes of real ones."""

from pathlib import Path

import numpy as np
from PIL import Image

WIDE, HIGH = 640, 480  # the most frequent size in COCO
QUALITY = 92


def photo(seed: int) -> Image.Image:
    """Clouds at five scales, each half as strong as the one before, as in natural images."""
    rng = np.random.default_rng(seed)
    total = np.zeros((HIGH, WIDE, 3), np.float32)
    for octave in range(5):
        cells = 5 << octave
        field = rng.normal(size=(cells * 3, cells * 4, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(field[..., channel]).resize((WIDE, HIGH), 3)
            total[..., channel] += np.asarray(layer) * 0.5**octave
    grain = rng.normal(size=(HIGH, WIDE, 1)).astype(np.float32) * 0.045
    pixels = 128 + 55 * (total + grain)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def make(folder: Path, count: int) -> list[Path]:
    """`count` different files in a folder; those that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:06d}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        if not path.exists():
            photo(number).save(path, quality=QUALITY)
    return paths
