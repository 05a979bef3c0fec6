# SPDX-License-Identifier: Apache-2.0
"""An index keeps the latest used within its bytes, and equal keys are equal beginnings."""

import numpy as np

from vlm_jax.serving.index import BLOCK, Index, Seen, block_keys, handle_of, image_key

KV = [(np.zeros((1, BLOCK, 1, 4), np.float32),) * 2]  # of one layer
SIZE = 2 * BLOCK * 4 * 4


def keys_of(ids, image=None, images=(b"x", b"y")):
    ids = np.array(ids, np.int32)
    return list(block_keys(ids, ids * 0 - 1 if image is None else np.array(image), images))


def test_a_key_is_that_of_all_before_it_and_of_no_token_behind_it():
    row = np.arange(3 * BLOCK)
    one, two = keys_of(row), keys_of([*row[:-1], 7])
    assert len(one) == 3 and one[:2] == two[:2] and one[2] != two[2]
    assert keys_of(row[:-1]) == one[:2] and keys_of(row[: BLOCK - 1]) == []
    early = row.copy()
    early[0] = 9
    assert not set(keys_of(early)) & set(one)


def test_a_key_depends_on_the_images_and_on_nothing_else_of_their_tokens():
    ids, image = np.arange(BLOCK) % 8, np.repeat([-1, 0, -1, 1], 8)
    (one,) = keys_of(ids, image)
    assert keys_of(ids, image, (b"x", b"z")) != [one] != keys_of(ids)[0]
    # The number of an image in its row is not its name.
    assert keys_of(ids, np.where(image == 0, 1, -1), (b"y", b"x")) == keys_of(
        ids, np.where(image == 0, 0, -1)
    )
    assert keys_of(ids, image, (b"y", b"x")) != [one]
    # A part of an image is no text with its number.
    longer = image.copy()
    longer[16] = 0
    assert keys_of(ids, longer) != [one]


def test_names_of_images_hold_model_pixels_slots_and_question():
    pixels = np.zeros((4, 4, 3), np.float32)
    other = pixels.copy()
    other[0, 0, 0] = 1e-7
    handles = {handle_of("m", pixels), handle_of("n", pixels), handle_of("m", other)}
    assert len(handles) == 3 and handle_of("m", pixels.copy()) in handles
    assert len({image_key(*x) for x in (("a", 1, None), ("a", 4, None), ("a", 4, [1]))}) == 3


def test_the_least_recently_used_leave_and_the_first_block_last():
    index = Index(3 * SIZE)
    keys = keys_of(np.arange(3 * BLOCK))
    index.keep_blocks(keys, dict.fromkeys(range(3), KV))
    assert index.used == 3 * SIZE and len(index.beginning(keys)) == 3
    image = Seen(np.zeros((SIZE // 16, 4), np.float32), 5)
    index.keep_image(b"image", image)
    # The last block made room.
    assert index.missing(keys) == [2] and len(index.beginning(keys)) == 2
    assert index.image(b"image") is image and index.image(b"none") is None
    index.keep_blocks(keys_of(np.arange(5, 5 + BLOCK)), {0: KV})
    assert index.missing(keys) == [1, 2] and index.image(b"image") is image
    stats = index.stats()
    assert (stats.images, stats.blocks, stats.bytes, stats.limit) == (1, 2, 3 * SIZE, 3 * SIZE)
    assert (stats.image_hits, stats.image_misses, stats.reused_tokens) == (2, 1, 5 * BLOCK)


def test_images_give_way_beyond_half_of_the_bytes():
    index = Index(4 * SIZE)
    image = Seen(np.zeros((SIZE // 16, 4), np.float32), 5)
    for number in range(3):
        index.keep_image(bytes([number]), image)
    for first in range(4):
        index.keep_blocks(keys_of(np.arange(first, first + BLOCK)), {0: KV})
    stats = index.stats()
    assert (stats.images, stats.blocks) == (2, 2) and index.image(bytes([0])) is None


def test_what_is_larger_than_the_index_is_not_kept_and_nothing_is_kept_twice():
    index = Index(SIZE)
    index.keep_image(b"large", Seen(np.zeros((SIZE, 4), np.float32), 1))
    assert index.stats().bytes == 0
    keys = keys_of(np.arange(BLOCK))
    for _ in range(2):
        index.keep_blocks(keys, {0: KV})
    assert index.used == SIZE and index.stats().blocks == 1
    assert Index(0).beginning(keys) == []
