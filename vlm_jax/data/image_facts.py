# SPDX-License-Identifier: Apache-2.0
"""What one image file is, beside its pixels: format, colors, size, and whether it can be read.

Used by `vlm-jax data check`. It finds the same files unreadable as `pictures.read_image`.
"""

import hashlib
import io
import os
import warnings
from typing import NamedTuple

from PIL import Image

from vlm_jax.data.pictures import (
    TURNS,
    Place,
    Unusable,
    decode,
    one_line,
    open_image,
    open_regular,
    orientation,
    read_bytes,
)

# A photo of a camera has up to 50 million pixels, and takes 150 MB decoded.
ENORMOUS_PIXELS = 50_000_000
# Formats, as PIL names them, that a suffix promises. A camera writes MPO as .jpg.
OF_SUFFIX = {
    ".jpg": ("JPEG", "MPO"),
    ".jpeg": ("JPEG", "MPO"),
    ".png": ("PNG",),
    ".gif": ("GIF",),
    ".webp": ("WEBP",),
    ".bmp": ("BMP", "DIB"),
    ".tif": ("TIFF",),
    ".tiff": ("TIFF",),
}
PNG_DEPTH_AT = 24  # byte of the bits per channel in a PNG (its IHDR chunk comes first)
TIFF_DEPTH_TAG = 258


class ImageFacts(NamedTuple):
    """What an image file is.

    Attributes:
      format, mode: as PIL names them; "" if they are not known.
      width, height: in pixels as stored; 0 if they are not known.
      size: bytes. sha256: of the bytes, "" where only the header was read.
      kinds: of `check.FINDINGS` and `check.NOTES`.
      problem: why the image cannot be read: the end of a sentence that begins with its name.
    """

    format: str = ""
    mode: str = ""
    width: int = 0
    height: int = 0
    size: int = 0
    sha256: str = ""
    kinds: tuple[str, ...] = ()
    problem: str = ""


def image_facts(place: Place, *, whole: bool = True) -> ImageFacts:
    """What the image at a place is; `whole` reads all of it, otherwise its header.

    A JPEG is decoded at an eighth of its size: all its data are read, few pixels are made.
    """
    size, digest = 0, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of large images and odd metadata
        try:
            if whole:
                data = read_bytes(place)
                size, digest = len(data), hashlib.sha256(data).hexdigest()
                return _facts(io.BytesIO(data), place, size=size, sha256=digest, whole=True)
            if place.size >= 0:
                data = read_bytes(place)
                return _facts(io.BytesIO(data), place, size=len(data), sha256="", whole=False)
            with open_regular(place.path) as file:
                size = os.fstat(file.fileno()).st_size
                return _facts(file, place, size=size, sha256="", whole=False)
        except Unusable as error:
            kinds, problem = ("corrupt_image",), str(error)
        except Image.DecompressionBombError as error:
            kinds, problem = ("enormous_image",), f"cannot be decoded: {one_line(error)}"
        except Exception as error:  # each decoder has its own
            kinds, problem = ("corrupt_image",), f"cannot be decoded: {one_line(error)}"
    return ImageFacts(size=size, sha256=digest, kinds=kinds, problem=problem)


def _facts(
    file: io.BufferedIOBase, place: Place, *, size: int, sha256: str, whole: bool
) -> ImageFacts:
    head = file.read(PNG_DEPTH_AT + 1)
    file.seek(0)
    try:
        image = open_image(file)
    except ValueError as error:
        # A PNG with large texts, which the reader leaves out: `decode` has the rule.
        if isinstance(error, Unusable) or not whole:
            raise
        pixels = decode(file, exif="ignore")
        high, wide = pixels.shape[:2]
        return ImageFacts("PNG", "RGB", wide, high, size, sha256)
    kinds = tuple(_kinds(image, head, place.name or place.path))
    found = ImageFacts(
        image.format or "", image.mode, image.width, image.height, size, sha256, kinds
    )
    if whole:
        if image.format == "JPEG":
            image.draft(image.mode, (image.width // 8, image.height // 8))
            image.load()
        else:
            file.seek(0)
            decode(file, exif="ignore")
    return found


def _kinds(image: Image.Image, head: bytes, name: str) -> list[str]:
    """The kinds of findings and notes that a header shows."""
    mode, kinds = image.mode, []
    promised = OF_SUFFIX.get(os.path.splitext(name)[1].lower())
    if promised is None or image.format not in promised:
        kinds.append("wrongly_named")
    if image.width * image.height > ENORMOUS_PIXELS:
        kinds.append("enormous_image")
    # An MPO holds a second view, not a film; a multi-page TIFF loses its other pages.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        kinds.append("animated")
    if mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16"):
        kinds.append("gray")
    if mode == "CMYK":
        kinds.append("cmyk")
    if mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        kinds.append("alpha")
    if _bits(image, head) > 8:
        kinds.append("sixteen_bit")
    if orientation(image) in TURNS:
        kinds.append("exif_rotated")
    return kinds


def _bits(image: Image.Image, head: bytes) -> int:
    """Bits of a channel in the file; PIL gives a PNG of 16-bit colors as 8 bits."""
    if image.format == "PNG" and len(head) > PNG_DEPTH_AT:
        return head[PNG_DEPTH_AT]
    if image.format == "TIFF":
        depth = image.tag_v2.get(TIFF_DEPTH_TAG, (8,))
        return max(depth) if isinstance(depth, tuple) else int(depth)
    return 16 if image.mode.startswith("I") else 8
