# SPDX-License-Identifier: Apache-2.0
"""What a request is made of, and how its answer becomes text."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.data.pictures import Unusable, check_shape, one_line, read_image, rgb

Picture = str | Path | Image.Image | np.ndarray | None
Prompt = str | Sequence[str]


@dataclass(frozen=True)
class Request:
    """One prompt as tokens, and its image as pixels float32 [I, I, 3] if it has one."""

    ids: list[int]
    image_at: int | None
    question: list[int]
    pixels: np.ndarray | None


class Text:
    """The tokens of an answer, and their text as it becomes certain."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def read(self, *, stop: bool) -> str:
        """All text; with `stop` the last token ended it and is no part of it."""
        ids = self.ids[:-1] if stop else self.ids
        return self.tokenizer.decode(ids, skip_special_tokens=True).lstrip()

    def piece(self, *, whole: bool, stop: bool) -> str:
        """What was not shown yet. The bytes of a character come in several tokens: it waits for
        the last, unless the text is whole."""
        text = self.read(stop=stop)
        if not whole and text.endswith("\ufffd"):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new


def padded(rows: Sequence[list[int]], length: int, pad: int) -> np.ndarray:
    """Rows of tokens as int32 [B, length]."""
    return np.array([[*row, *[pad] * (length - len(row))] for row in rows], np.int32)


def bucket_of_rows(rows: int, shards: int) -> int:
    """The smallest power of two times the shards of a batch that holds so many rows."""
    size = shards
    while size < rows:
        size *= 2
    return size


def conversation(prompt: Any, *, image: bool) -> tuple[tuple[str, str], ...]:
    """The turns of a Prompt as (question, answer), the last answer empty; image marks taken out.

    Raises:
      ValueError: for what is no text or ends with no question, and for image marks that do not
        belong to the one image, or to none.
    """
    texts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(texts, (list, tuple)) or not all(isinstance(x, str) for x in texts):
        raise ValueError(
            f"a prompt is a text, or a list of texts [question, answer, ..., question], not "
            f"{prompt!r:.80}"
        )
    if len(texts) % 2 == 0:
        raise ValueError(
            f"a conversation of {len(texts)} texts: give questions and answers in turn, "
            "ending with a question"
        )
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"a prompt holds half a character: {error}") from error
    marks = [text.count(IMAGE_MARK) for text in texts]
    if sum(marks[1:]) or marks[0] > 1 or marks[0] > image:
        raise ValueError(
            f"{sum(marks)} times {IMAGE_MARK} in the prompt and {int(image)} "
            "image: one image belongs to a conversation, in its first question; the mark may "
            "be left out"
        )
    texts = [text.replace(IMAGE_MARK, "").strip() for text in texts]
    return tuple(zip(texts[::2], [*texts[1::2], ""], strict=True))


def picture(image: Any, *, exif: str = "apply") -> np.ndarray:
    """A Picture as uint8 [H, W, 3], RGB; `exif` as read_image has it.

    Raises:
      ValueError, FileNotFoundError: for what is none, with the way to one.
    """
    if isinstance(image, np.ndarray):
        return array(image)
    if isinstance(image, Image.Image):
        try:
            check_shape(*image.size)
            return rgb(image, exif=exif)
        except Unusable as error:
            raise ValueError(f"the PIL image {error}") from None
        except Exception as error:  # its file is read only now, by a decoder
            raise ValueError(f"the PIL image cannot be decoded: {one_line(error)}") from error
    if not isinstance(image, (str, Path)):
        raise ValueError(
            f"an image is a path, a PIL image or an array uint8 [H, W, 3], not {image!r:.80}"
        )
    if not os.path.lexists(image):
        raise FileNotFoundError(f"there is no image {image}")
    return read_image(str(image), "", "give another image", exif=exif)


def array(image: np.ndarray) -> np.ndarray:
    """An array image, if it is one; ValueError with the way to make one of it."""
    shape = list(image.shape)
    way = None
    if len(shape) == 2 or len(shape) == 3 and shape[2] == 1:
        way = "of a gray image x [H, W] it is np.stack([x] * 3, -1)"
    elif len(shape) == 3 and shape[2] == 4:
        way = "leave the opacity out: x[..., :3]"
    elif len(shape) == 3 and shape[2] != 3 and shape[0] in (1, 3, 4):
        way = "channels come last: x.transpose(1, 2, 0)"
    elif len(shape) != 3 or shape[2] != 3:
        way = "give one image for each prompt, its channels red, green and blue"
    elif np.issubdtype(image.dtype, np.floating):
        way = "of numbers x from 0 to 1 it is (255 * x).round().astype(np.uint8)"
    elif image.dtype == np.uint16:
        way = "of numbers x of 16 bits it is (x / 257).round().astype(np.uint8)"
    elif image.dtype != np.uint8:
        way = "of numbers x from 0 to 255 it is x.astype(np.uint8)"
    if way:
        raise ValueError(f"an array image is uint8 [H, W, 3], not {image.dtype}{shape}: {way}")
    try:
        check_shape(shape[1], shape[0])
    except Unusable as error:
        raise ValueError(f"the array image {error}: give another") from None
    return image
