# SPDX-License-Identifier: Apache-2.0
"""Requests as tokens and pixels, and batches of them."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax.compressors.compressor import Compressor, Visual
from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.data.paths import existing_path
from vlm_jax.data.pictures import Unusable, check_shape, one_line, read_image, rgb
from vlm_jax.data.processor import Processor, Tokens
from vlm_jax.serving.decoder import bucket

Picture = str | Path | Image.Image | np.ndarray | None
Prompt = str | Sequence[str]


class TooLong(ValueError):
    """A request and its answer do not fit: shorten the prompt, or ask for fewer new tokens."""


@dataclass(frozen=True)
class Request:
    """One prompt as tokens, with its images as pixels float32 [I, I, 3], in their order.

    `places` is the index of the id after each image, `questions` what is read of each image's
    question, `sizes` each image's width and height before it was padded (`Processor.shown_size`).
    """

    ids: list[int]
    places: tuple[int, ...]
    questions: list[list[int]]
    pixels: list[np.ndarray]
    sizes: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def of(cls, tokens: Tokens, pictures: Sequence[np.ndarray], processor: Processor) -> "Request":
        """The request of these tokens about pictures uint8 [H, W, 3]."""
        pixels = [processor.pixels(one) for one in pictures]
        sizes = [processor.shown_size(one) for one in pictures]
        return cls(tokens.ids, tokens.places, tokens.questions, pixels, sizes)

    @property
    def image_at(self) -> int | None:
        """The place of the first image, None without one."""
        return self.places[0] if self.places else None


def digest(requests: Sequence[Request]) -> str:
    """Sixteen hexadecimal digits that depend on the whole content of the requests."""
    digest_of_all = hashlib.sha256()
    for request in requests:
        of_text = request.ids, request.places, request.questions, request.sizes
        digest_of_all.update(repr(of_text).encode())
        for pixels in request.pixels:
            digest_of_all.update(np.ascontiguousarray(pixels))
    return digest_of_all.hexdigest()[:16]


def padded(rows: Sequence[list[int]], length: int, pad: int) -> np.ndarray:
    """Rows of tokens as int32 [B, length]."""
    return np.array([[*row, *[pad] * (length - len(row))] for row in rows], np.int32)


def bucket_of_rows(rows: int, shards: int) -> int:
    """The smallest power of two times `shards` that holds this number of rows."""
    size = shards
    while size < rows:
        size *= 2
    return size


def bucket_of_images(images: int) -> int:
    """The bucket of a row with this number of images: 0, 1, 2, 4, 8 ..."""
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

    Their first `skip` tokens are left out. The batch is padded with its first row, so that it
    splits over `shards`, and each row with empty images.
    """
    rows = [*requests, *[requests[0]] * (bucket_of_rows(len(requests), shards) - len(requests))]
    images = bucket_of_images(max(len(r.pixels) for r in rows))
    ids = [r.ids[skip:] for r in rows]
    length = np.array([len(x) for x in ids], np.int32)
    places = [[place - skip for place in r.places] for r in rows]
    if compressor.reads_prefix:
        # The text before the image, and room for the longest that follows it.
        at = [
            row_places[0] if row_places else len(x)
            for row_places, x in zip(places, ids, strict=True)
        ]
        questions = [[x[:k]] for x, k in zip(ids, at, strict=True)]
        room = bucket(max(len(x) for (x,) in questions))
        text = room + bucket(max(len(x) - k for x, k in zip(ids, at, strict=True)))
    else:
        questions = [r.questions for r in rows]
        room = bucket(max(len(x) for questions in questions for x in questions))
        # An image after the last token needs a place in the row too.
        last = max((row_places[-1] + 1 for row_places in places if row_places), default=0)
        text = bucket(max(int(max(length)), last))
    # Missing images have places in the padding and any question.
    places = [[*row_places, *[text] * (max(images, 1) - len(row_places))] for row_places in places]
    questions = [[*of_row, *[of_row[-1]] * (images - len(of_row))] for of_row in questions]
    of_images = {"image_at": np.array(places, np.int32)}
    if compressor.reads_question or compressor.reads_prefix:
        of_images["question"] = np.stack([padded(of_row, room, pad) for of_row in questions])
        lengths = [[max(len(x), 1) for x in of_row] for of_row in questions]
        of_images["question_length"] = np.array(lengths, np.int32)
    if images:
        pixels = np.zeros((len(rows), images, *rows[0].pixels[0].shape), np.float32)
        for row, request in zip(pixels, rows, strict=True):
            row[: len(request.pixels)] = request.pixels
        of_images["pixels"] = pixels
        if compressor.reads == "image_size":
            if any(len(r.sizes) != len(r.pixels) for r in rows):
                raise ValueError(f"{compressor.method.kind} reads the size of each image: give it")
            sizes = [[*r.sizes, *[(1, 1)] * (images - len(r.sizes))] for r in rows]
            of_images["image_size"] = np.array(sizes, np.int32)
    if images < 2:
        of_images = {name: values[:, 0] for name, values in of_images.items()}
    batch = {"ids": padded(ids, text, pad), "length": length, **of_images}
    if not images:
        # Without images the encoder does not run: one visual token that no row reads.
        visual = np.zeros((len(rows), 1, width), np.float32)
        none = np.zeros(len(rows), np.int32)
        batch["visual"] = Visual(visual, none) if compressor.adaptive else visual
    return batch


def conversation(prompt: Any, *, images: int) -> tuple[tuple[str, str], ...]:
    """The turns of a Prompt about `images` images as (question, answer), the last answer empty.

    Marks of images stay in their questions, except for a single one in the first question.

    Raises:
      ValueError: for a prompt that is not text or does not end with a question, and for marks that
        are not one per image, in questions, or none.
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
    texts = list(texts)  # unchanged, because spaces may matter to a chat template
    if marks[0] == images == 1:
        texts[0] = texts[0].replace(IMAGE_MARK, "").strip()
    return tuple(zip(texts[::2], [*texts[1::2], ""], strict=True))


def listed(image: Any) -> list:
    """The pictures of one prompt as a list; None is an empty list."""
    return list(image) if isinstance(image, (list, tuple)) else [] if image is None else [image]


def picture(image: Any, *, exif: str = "apply") -> np.ndarray:
    """A Picture as uint8 [H, W, 3], RGB; `exif` as in `read_image`.

    Raises:
      ValueError, FileNotFoundError: for anything else, with the accepted kinds.
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
    """A valid array image. Raises ValueError for others, with the way to convert them."""
    shape = list(image.shape)
    advice = None
    if len(shape) == 2 or len(shape) == 3 and shape[2] == 1:
        advice = "for a gray image x [H, W] use np.stack([x] * 3, -1)"
    elif len(shape) == 3 and shape[2] == 4:
        advice = "leave the opacity out: x[..., :3]"
    elif len(shape) == 3 and shape[2] != 3 and shape[0] in (1, 3, 4):
        advice = "channels come last: x.transpose(1, 2, 0)"
    elif len(shape) != 3 or shape[2] != 3:
        advice = "give one image for each prompt, its channels red, green and blue"
    elif np.issubdtype(image.dtype, np.floating):
        advice = "for numbers x from 0 to 1 use (255 * x).round().astype(np.uint8)"
    elif image.dtype == np.uint16:
        advice = "for numbers x of 16 bits use (x / 257).round().astype(np.uint8)"
    elif image.dtype != np.uint8:
        advice = "for numbers x from 0 to 255 use x.astype(np.uint8)"
    if advice:
        raise ValueError(f"an array image is uint8 [H, W, 3], not {image.dtype}{shape}: {advice}")
    try:
        check_shape(shape[1], shape[0])
    except Unusable as error:
        raise ValueError(f"the array image {error}: give another") from None
    return image
