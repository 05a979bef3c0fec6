# SPDX-License-Identifier: Apache-2.0
"""Images of a request: data URIs, and https from the hosts that the operator allows; never a file.

The size of a picture is known before its pixels are made: a file of a few kB may hold billions.
"""

import base64
import binascii
import io
from collections.abc import Callable

import numpy as np
from PIL import Image, UnidentifiedImageError

from vlm_jax.data import pictures
from vlm_jax.server.options import Limits
from vlm_jax.server.refusals import Refusal

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # each decoder more is one more way in
HANDLE = "vlm-jax:"  # what a handle of an image begins with
Fetch = Callable[[str], bytes]


def is_handle(url: str) -> bool:
    """Whether a url is the handle of an image that an earlier response gave."""
    return url.startswith(HANDLE)


def pixels_of(url: str, where: str, limits: Limits, fetch: Fetch | None) -> np.ndarray:
    """The picture of a url, uint8 [H, W, 3], RGB, upright by its EXIF orientation.

    Args:
      where: the field of the request, for messages.
      fetch: gets the bytes of an https url; None if no host is allowed.
    Raises:
      Refusal: for another kind of url, a picture that is damaged, too large or of another format.
    """
    try:
        return decoded(content_of(url, fetch), limits)
    except Refusal as refusal:
        refusal.param = where
        raise
    except pictures.Unusable as error:
        reason = str(error)
    except Exception as error:  # each decoder has its own
        reason = f"cannot be decoded: {pictures.one_line(error)}"
    raise Refusal(f"the image {reason}", param=where, code="invalid_image")


def content_of(url: str, fetch: Fetch | None) -> bytes:
    """The bytes of a picture's file. Raises Refusal for a url that is not allowed."""
    kind = url.partition(":")[0].lower()
    if kind == "data":
        return of_data_uri(url)
    if kind == "https" and fetch is not None:
        return fetch(url)
    if kind in ("http", "https"):
        way_out = (
            "use https"
            if fetch is not None
            else "send the picture as data:image/png;base64,..., or ask the operator for "
            "--allow-image-hosts"
        )
        raise Refusal(f"no picture is fetched from {kind} addresses here: {way_out}",
                      code="invalid_image_url")  # fmt: skip
    raise Refusal(
        "the url of an image is data:image/png;base64,..., and no file of the server is read",
        code="invalid_image_url",
    )


def of_data_uri(url: str) -> bytes:
    """The bytes in a data URI. Raises Refusal for anything but base64 of an image."""
    head, comma, body = url[5:].partition(",")
    kind, *options = [part.strip().lower() for part in head[:256].split(";")]
    if not comma or "base64" not in options or not (kind == "" or kind.startswith("image/")):
        raise Refusal(
            f"a data URI that begins data:{head[:40]!r}: the form is data:image/png;base64,...",
            code="invalid_image_url",
        )
    try:
        content = base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise Refusal(
            f"the base64 of an image cannot be read ({error}): use the standard alphabet with its "
            "padding, without line breaks",
            code="invalid_image_url",
        ) from None
    if not content:
        raise Refusal("the image is empty: 0 bytes", code="invalid_image")
    return content


def decoded(content: bytes, limits: Limits) -> np.ndarray:
    """The pixels in the bytes of a file, uint8 [H, W, 3]. Raises any exception of its decoder."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            width, height = header.size
    except UnidentifiedImageError:
        raise pictures.Unusable(
            f"cannot be decoded: it is damaged, or none of {', '.join(FORMATS)}"
        ) from None
    except Image.DecompressionBombError:
        raise too_large(f"more than {Image.MAX_IMAGE_PIXELS:,}", limits) from None
    if width * height > limits.pixels:
        raise too_large(f"{width} x {height}", limits)
    return pictures.decode(io.BytesIO(content), exif="apply")


def too_large(size: str, limits: Limits) -> Refusal:
    """The refusal of a picture of too many pixels."""
    return Refusal(
        f"the image has {size} pixels, and at most {limits.pixels:,} are decoded: make it smaller",
        code="image_too_large",
    )


def check_count(images: int, limits: Limits) -> None:
    """Raises Refusal for more images than a conversation may have."""
    if images > limits.images:
        raise Refusal(
            f"{images} images, and at most {limits.images} are read in a request: leave some out",
            param="messages",
            code="too_many_images",
        )
