# SPDX-License-Identifier: Apache-2.0
"""What was computed of images and of beginnings of rows, kept for later requests in bounded memory.

An image is kept as its visual tokens, or as the keys and values of its summary; a beginning as the
keys and values of whole blocks of tokens. A block's key depends on all that stands before it and in
it, so that equal keys mean equal values.

V visual tokens, here of a summary too  D llm width  L layers  K kv heads  H head size
"""

import hashlib
import itertools
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from vlm_jax.serving.tickets import IndexStats

BLOCK = 32  # tokens


class Seen(NamedTuple):
    """The visual tokens of one image in its slots, of which the first `count` are read; where the
    text of every row reads the patches, what the encoder gives, which becomes `count` tokens."""

    tokens: Float[np.ndarray, "V D"]
    count: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tokens."""
        return self.tokens.nbytes


class Summarized(NamedTuple):
    """What text reads of an image behind its summary: the keys and values of V tokens in every
    layer, and their last hidden states, of which the first text token may need one."""

    hidden: Float[np.ndarray, "V D"]
    keys: Float[np.ndarray, "L V K H"]
    values: Float[np.ndarray, "L V K H"]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it."""
        return sum(x.nbytes for x in self)


def handle_of(identity: str, pixels: np.ndarray) -> str:
    """The name of an image for one model: hash of what makes its tokens, and of its pixels."""
    found = hashlib.sha256(f"{identity} {pixels.dtype} {pixels.shape}".encode())
    found.update(np.ascontiguousarray(pixels))
    return found.hexdigest()[:32]


def image_key(handle: str, slots: int, question: Sequence[int] | None) -> bytes:
    """The key of an image's tokens: so many slots, and compressed by this question if by one."""
    return hashlib.sha256(repr((handle, slots, question)).encode()).digest()


def block_keys(
    ids: Int[np.ndarray, "T"], image: Int[np.ndarray, "T"], images: Sequence[bytes]
) -> Iterator[bytes]:
    """The keys of the whole blocks of a row.

    `image` is the number of the image of which a token is part, -1 of text; `ids` then tell which
    part. `images` are the keys of the images.
    """
    key, marked = b"", np.where(image < 0, ids, -1 - ids).astype(np.int64)
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        here = slice(start, start + BLOCK)
        found = hashlib.sha256(key)
        found.update(marked[here])
        for number in dict.fromkeys(image[here].tolist()):
            found.update(images[number] if number >= 0 else b"")
        key = found.digest()
        yield key


class Kept:
    """Values of one kind with their bytes, in the order of their last use."""

    def __init__(self) -> None:
        self.values: OrderedDict[bytes, tuple[Any, int]] = OrderedDict()
        self.bytes = 0

    def add(self, key: bytes, value: Any, size: int) -> None:
        """Keeps a value that is not kept yet."""
        if key not in self.values:
            self.values[key] = value, size
            self.bytes += size

    def leave(self) -> None:
        """Forgets the least recently used one."""
        _, (_, size) = self.values.popitem(last=False)
        self.bytes -= size


class Index:
    """Images and blocks in at most `limit` bytes; the least recently used leave first.

    Images give way only beyond half of the bytes, because one of few tokens is a hundredth of its
    conversation's keys and values. For any thread.
    """

    def __init__(self, limit: int):
        self.limit, self.lock = limit, threading.Lock()
        self.images, self.blocks = Kept(), Kept()
        self.image_hits = self.image_misses = self.reused_tokens = 0

    @property
    def used(self) -> int:
        """Bytes of all that is kept."""
        return self.images.bytes + self.blocks.bytes

    def image(self, key: bytes) -> Any:
        """The `Seen` or `Summarized` of an image, None if it is not kept."""
        with self.lock:
            found = self.images.values.get(key)
            if found is None:
                self.image_misses += 1
                return None
            self.image_hits += 1
            self.images.values.move_to_end(key)
            return found[0]

    def keep_image(self, key: bytes, seen: Seen | Summarized) -> None:
        """Keeps what was made of an image."""
        with self.lock:
            self.images.add(key, seen, seen.nbytes)
            self._make_room()

    def beginning(self, keys: Sequence[bytes]) -> list[Any]:
        """The kept blocks from the first on, up to the first that is not."""
        with self.lock:
            known = list(itertools.takewhile(self.blocks.values.__contains__, keys))
            self._touch(known)
            self.reused_tokens += BLOCK * len(known)
            return [self.blocks.values[key][0] for key in known]

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """The numbers of the blocks that are not kept."""
        with self.lock:
            return [n for n, key in enumerate(keys) if key not in self.blocks.values]

    def keep_blocks(self, keys: Sequence[bytes], blocks: dict[int, Any]) -> None:
        """Keeps blocks, by their number, of a row with these keys."""
        with self.lock:
            for number, block in blocks.items():
                self.blocks.add(keys[number], block, sum(x.nbytes for kv in block for x in kv))
            self._touch(keys)
            self._make_room()

    def stats(self) -> IndexStats:
        """What it holds, and how often it was asked."""
        with self.lock:
            return IndexStats(
                images=len(self.images.values),
                blocks=len(self.blocks.values),
                bytes=self.used,
                limit=self.limit,
                image_hits=self.image_hits,
                image_misses=self.image_misses,
                reused_tokens=self.reused_tokens,
            )

    def _touch(self, keys: Sequence[bytes]) -> None:
        """The first block last: without it the others are of no use."""
        for key in reversed(keys):
            if key in self.blocks.values:
                self.blocks.values.move_to_end(key)

    def _make_room(self) -> None:
        while self.used > self.limit:
            many = self.images.bytes > self.limit // 2 or not self.blocks.values
            (self.images if many else self.blocks).leave()
