# SPDX-License-Identifier: Apache-2.0
"""Reads picture files as RGB uint8 [H, W, 3], or says in one sentence why that is not possible.

Every exception of the image library is a fault of the picture: its decoders raise ValueError,
RuntimeError, OverflowError, MemoryError, SyntaxError and struct.error for damaged files. A
truncated picture is bad, never half gray.
"""

import io
import os
import stat
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from vlm_jax.data.example import EXIF, BadExample

# A longer image has no use, and resizing its short side would fill memory.
MOST_ELONGATED = 100
# How a picture with an EXIF orientation is turned upright (Exif 3.0, 4.6.5.1.6). 1 is upright.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
# Chunks of a PNG without pixels; PIL limits their size as a protection.
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")


def check_exif(name: str, exif: str) -> None:
    """Raises ValueError unless the value of the field `name` is one of EXIF."""
    if exif not in EXIF:
        raise ValueError(f"{name}={exif!r}: choose one of {', '.join(EXIF)}")


class Unusable(ValueError):
    """Why a picture cannot be used: the end of a sentence that starts with its name."""


class Place(NamedTuple):
    """Where an image lies: bytes `start` to `start + size` of a file, to its end where size is -1.

    `name` is what the data set calls it.
    """

    path: str
    start: int = 0
    size: int = -1
    name: str = ""


WAY_OUT = "replace the file, or set data.on_bad_example=skip"


def read_image(
    path: str | Place, owner: str, way_out: str = WAY_OUT, *, exif: str = "ignore"
) -> np.ndarray:
    """An image file as RGB uint8 [H, W, 3]: the pixels of `read_picture`, which raises the same."""
    return np.array(read_picture(path, owner, way_out, exif=exif))


def read_picture(
    path: str | Place, owner: str, way_out: str = WAY_OUT, *, exif: str = "ignore"
) -> Image.Image:
    """An image file as a picture of PIL in RGB: its first frame, decoded by content, not by name.

    A `Place` is an image inside a file, as in a tar. `exif` is for the orientation in the file:
    "apply" turns the picture upright, "ignore" uses the pixels as stored.

    Raises:
      BadExample: if it cannot be decoded completely, with the row that `owner` describes, if any.
    """
    try:
        if isinstance(path, Place):
            return decoded(io.BytesIO(read_bytes(path)), exif=exif)
        with open_regular(path) as file:
            return decoded(file, exif=exif)
    except Unusable as error:
        reason = str(error)
    # Any exception, because each decoder has its own.
    except Exception as error:
        reason = f"cannot be decoded: {one_line(error)}"
    name = path.name or path.path if isinstance(path, Place) else path
    raise BadExample(f"{owner}{': ' * bool(owner)}image {name} {reason}; {way_out}")


def open_regular(path: str) -> io.BufferedIOBase:
    """A file opened for reading. Raises Unusable for anything but a regular file with content."""
    try:
        about = os.stat(path)  # opening a pipe would wait for its writer
        if stat.S_ISDIR(about.st_mode):
            raise Unusable("is a folder, not a picture")
        if not stat.S_ISREG(about.st_mode):
            raise Unusable("is a pipe or a device, not a picture")
        if not about.st_size:
            raise Unusable("is empty: 0 bytes")
        return open(path, "rb")
    except FileNotFoundError:
        raise Unusable("is not there") from None
    except OSError as error:
        raise Unusable(f"cannot be read: {error.strerror or error}") from None


def read_bytes(place: Place) -> bytes:
    """The bytes of an image. Raises Unusable if they cannot be read."""
    with open_regular(place.path) as file:
        file.seek(place.start)
        data = file.read(place.size)
    if len(data) < place.size:
        raise Unusable(f"is cut short: {len(data)} of its {place.size} bytes are in {place.path}")
    if not data:
        raise Unusable("is empty: 0 bytes")
    return data


def decode(file: io.BufferedIOBase, *, exif: str) -> np.ndarray:
    """The pixels of an open file, uint8 [H, W, 3]. Raises any exception of its decoder."""
    return np.array(decoded(file, exif=exif))


def decoded(file: io.BufferedIOBase, *, exif: str) -> Image.Image:
    """The picture in an open file, in RGB. Raises any exception of its decoder."""
    try:
        return in_rgb(open_image(file), exif=exif)
    except Unusable:
        raise
    except ValueError:
        # PIL refuses large texts and color profiles as an attack. They do not affect the pixels, so
        # the picture is read without them. PIL's limits are global and stay unchanged.
        file.seek(0)
        if file.read(len(PNG)) != PNG:
            raise
        return in_rgb(open_image(without_texts(file)), exif=exif)


def open_image(file: io.BufferedIOBase) -> Image.Image:
    """A picture of which only the header was read."""
    try:
        image = Image.open(file)
    except UnidentifiedImageError:
        raise Unusable(
            "cannot be decoded: it is damaged, or no picture (PNG, JPEG, GIF, WebP, BMP, TIFF ...)"
        ) from None
    if image.format == "EPS":
        raise Unusable("is PostScript, a program that draws a picture: save it as PNG")
    check_shape(*image.size)
    return image


def check_shape(width: int, height: int) -> None:
    """Raises Unusable for an image without pixels and for a very long one."""
    if min(width, height) < 1:
        raise Unusable(f"is {width} x {height} pixels: it is empty")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise Unusable(
            f"is {width} x {height} pixels, more than {MOST_ELONGATED} times as long as wide"
        )


def without_texts(file: io.BufferedIOBase) -> io.BufferedIOBase:
    """A PNG without its texts and its color profile."""
    file.seek(len(PNG))
    chunks = [PNG]
    while len(head := file.read(8)) == 8:
        length = int.from_bytes(head[:4], "big") + 4  # with the checksum
        if head[4:] in PNG_TEXTS:
            file.seek(length, os.SEEK_CUR)
        else:
            chunks += [head, file.read(length)]
    return io.BytesIO(b"".join(chunks))


def rgb(image: Image.Image, *, exif: str) -> np.ndarray:
    """A picture of PIL as uint8 [H, W, 3]; converts and raises as `in_rgb`."""
    return np.array(in_rgb(image, exif=exif))


def in_rgb(image: Image.Image, *, exif: str) -> Image.Image:
    """A picture of PIL in RGB; itself if it is that.

    Pixels of 16 bits are scaled by 1 / 257, so that white stays white. Transparency is dropped, as
    in the published code. Raises any exception of a decoder.
    """
    image.load()
    turn = TURNS.get(orientation(image)) if exif == "apply" else None
    mode = image.mode
    # PIL keeps a PGM of 16 bits in 32.
    if mode.startswith("I;16") or (mode == "I" and image.format == "PPM"):
        image = Image.fromarray(eight_bits(image))
    elif mode in ("I", "F"):
        raise Unusable(
            f"has numbers of 32 bits (mode {mode}), whose white level is undefined: save it "
            "with 8 or 16 bits"
        )
    elif mode in ("La", "RGBa"):  # the colors were multiplied with their opacity
        image = image.convert(mode.upper())
    if "transparency" in image.info:
        image = image.copy()  # it may belong to the caller
        del image.info["transparency"]
    image = image if image.mode == "RGB" else image.convert("RGB")
    return image if turn is None else image.transpose(turn)


def eight_bits(image: Image.Image) -> np.ndarray:
    """A gray picture of up to 16 bits as uint8 [H, W]."""
    pixels, bits, inverted = np.asarray(image).astype(np.int64), 16, False
    if image.format == "TIFF":
        # PIL does not convert numbers of 12 bits, and images in which 0 is white.
        bits = image.tag_v2.get(258, (16,))[0]
        inverted = image.tag_v2.get(262) == 0
    most = (1 << bits) - 1
    gray = (np.clip(pixels, 0, most) * 510 + most) // (2 * most)  # rounded
    return (255 - gray if inverted else gray).astype(np.uint8)


def orientation(image: Image.Image) -> int:
    """The EXIF orientation from 1 to 8; 1 (upright) if none can be read."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as picture viewers do: the pixels are valid
        return 1


def one_line(error: BaseException) -> str:
    """The message of a library's error in one line."""
    message = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(message.split()) or type(error).__name__
