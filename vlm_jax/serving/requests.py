# SPDX-License-Identifier: Apache-2.0
"""What a request is made of, and how its answer becomes text."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.compressors.compressor import Compressor, Visual
from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.data.paths import existing_path
from vlm_jax.data.pictures import Unusable, check_shape, one_line, read_image, rgb
from vlm_jax.serving.decoder import bucket

Picture = str | Path | Image.Image | np.ndarray | None
Prompt = str | Sequence[str]


@dataclass(frozen=True)
class Request:
    """One prompt as tokens, with its images as pixels float32 [I, I, 3], in their order.

    `places` says before which id each image stands, `questions` what is read of each or of none.
    """

    ids: list[int]
    places: tuple[int, ...]
    questions: list[list[int]]
    pixels: list[np.ndarray]

    @property
    def image_at(self) -> int | None:
        """The place of the first image, None without one."""
        return self.places[0] if self.places else None


def digest(requests: Sequence[Request]) -> str:
    """Sixteen hex digits of all that requests hold."""
    found = hashlib.sha256()
    for request in requests:
        found.update(repr((request.ids, request.places, request.questions)).encode())
        for pixels in request.pixels:
            found.update(np.ascontiguousarray(pixels))
    return found.hexdigest()[:16]


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


def bucket_of_images(images: int) -> int:
    """For how many images a row has room that holds so many: 0, 1, 2, 4, 8 ..."""
    return bucket_of_rows(images, 1) if images else 0


def batch_of(
    requests: Sequence[Request],
    compressor: Compressor,
    *,
    skip: int,
    shards: int,
    width: int,
    pad: int,
) -> dict[str, Any]:
    """Requests in a batch of a bucket's shape for a VLM with this compressor and LLM width.

    Their first `skip` tokens are left out. The batch is filled up with its first row, so that it
    splits over `shards`, and each row with images that are not there.
    """
    rows = [*requests, *[requests[0]] * (bucket_of_rows(len(requests), shards) - len(requests))]
    images = bucket_of_images(max(len(r.pixels) for r in rows))
    ids = [r.ids[skip:] for r in rows]
    length = np.array([len(x) for x in ids], np.int32)
    places = [[place - skip for place in r.places] for r in rows]
    if compressor.reads_prefix:
        # The text before the image, and room for the longest that follows it.
        at = [where[0] if where else len(x) for where, x in zip(places, ids, strict=True)]
        asked = [[x[:k]] for x, k in zip(ids, at, strict=True)]
        room = bucket(max(len(x) for (x,) in asked))
        text = room + bucket(max(len(x) - k for x, k in zip(ids, at, strict=True)))
    else:
        asked = [r.questions for r in rows]
        room = bucket(max(len(x) for questions in asked for x in questions))
        # An image behind the last token has a place in the row too.
        last = max((where[-1] + 1 for where in places if where), default=0)
        text = bucket(max(int(max(length)), last))
    # Places in padding are those of no image, and any question does for one.
    places = [[*where, *[text] * (max(images, 1) - len(where))] for where in places]
    asked = [[*some, *[some[-1]] * (images - len(some))] for some in asked]
    of_images = {"image_at": np.array(places, np.int32)}
    if compressor.reads_question or compressor.reads_prefix:
        of_images["question"] = np.stack([padded(some, room, pad) for some in asked])
        lengths = [[max(len(x), 1) for x in some] for some in asked]
        of_images["question_length"] = np.array(lengths, np.int32)
    if images:
        pixels = np.zeros((len(rows), images, *rows[0].pixels[0].shape), np.float32)
        for row, request in zip(pixels, rows, strict=True):
            row[: len(request.pixels)] = request.pixels
        of_images["pixels"] = pixels
    if images < 2:
        of_images = {name: values[:, 0] for name, values in of_images.items()}
    made = {"ids": padded(ids, text, pad), "length": length, **of_images}
    if not images:
        # No image, no encoder: one visual token that no row reads.
        visual = np.zeros((len(rows), 1, width), np.float32)
        none = np.zeros(len(rows), np.int32)
        made["visual"] = Visual(visual, none) if compressor.adaptive else visual
    return made


def conversation(prompt: Any, *, images: int) -> tuple[tuple[str, str], ...]:
    """The turns of a Prompt about so many images as (question, answer), the last answer empty.

    Marks of images stay in their questions, but for a lone one in the first.

    Raises:
      ValueError: for what is no text or ends with no question, and for marks that are not one for
        each image, in the questions, or none at all.
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
    if sum(marks[1::2]) or sum(marks) not in (0, images):
        raise ValueError(
            f"{sum(marks)} times {IMAGE_MARK} in the prompt and {images} "
            f"{'image' if images == 1 else 'images'}: each image has one mark, in a question; "
            "without any mark all belong to the first question"
        )
    texts = list(texts)  # as they were given: a chat template may mind a space
    if marks[0] == images == 1:
        texts[0] = texts[0].replace(IMAGE_MARK, "").strip()
    return tuple(zip(texts[::2], [*texts[1::2], ""], strict=True))


def listed(image: Any) -> list:
    """The pictures of one prompt: of a list each, of None none."""
    return list(image) if isinstance(image, (list, tuple)) else [] if image is None else [image]


def picture(image: Any, *, exif: str = "apply") -> np.ndarray:
    """A Picture as uint8 [H, W, 3], RGB; `exif` as read_image has it.

    Raises:
      ValueError, FileNotFoundError: for anything else, with what is accepted.
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
    path = existing_path(image)
    if not os.path.lexists(path):
        raise FileNotFoundError(f"there is no image {image}")
    return read_image(str(path), "", "give another image", exif=exif)


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
