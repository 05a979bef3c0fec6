# SPDX-License-Identifier: Apache-2.0
"""A model that prunes equals one that hides the same tokens by a mask, in prefill and decoding.

The literal form (tests/literal_pruning.py) leaves every token in its row; the model gathers.
"""

import jax
import jax.numpy as jnp
import literal_models
import literal_pruning
import numpy as np
import pytest
import tiny
from flax import nnx

from vlm_jax.layers import rows
from vlm_jax.models.cache import Pruned
from vlm_jax.models.llm import LLM
from vlm_jax.models.pruned import Images
from vlm_jax.models.pruning import describe, parse
from vlm_jax.models.sizes import LLMSize

C = tiny.config(llm=dict(depth=4))  # grouped heads, biases
V, LENGTH, NEW, PAST = 6, 13, 3, 2  # visual slots, slots of a row, decoded tokens, an earlier pass
# Of each row: where its image begins, its visual tokens, its length. No image; the longest row; an
# image first; one with fewer tokens than the others; one with fewer than are kept.
ROWS = [(0, 0, 7), (3, V, LENGTH), (0, V, 9), (4, 4, 8), (2, 1, 6)]
WAYS = {
    "fastv": ("fastv:layers=1:tokens=2", ROWS),
    "fastv after two": ("fastv:layers=2:tokens=3", ROWS),
    "pyramiddrop": ("pyramiddrop:layers=1,3:tokens=4,1", ROWS),
    "tokencarve": ("tokencarve:layers=2:tokens=3:weight=0.7", [*ROWS[:3], (2, V, 8)]),
}


def model(pruning, *, unrolled):
    llm = LLM(LLMSize.of(C.llm), rngs=nnx.Rngs(0), pruning=pruning)
    llm = tiny.roughened(llm)
    return llm.unrolled() if unrolled else llm


def described(text):
    size = tiny.size(tiny.config(llm=dict(depth=4), compressor=dict(kind="none", tokens=16)))
    return describe(parse(text), size.read._replace(visual=V))


@jax.jit
def run(llm, x, visual, last, tokens, past):
    """Hidden states of the last token of each row and of `tokens` decoded behind it."""
    before = None if past is None else llm.start(past, jnp.full_like(last, PAST))
    images = Images(visual, last, V)
    room = LENGTH + NEW + (0 if past is None else PAST)
    hidden, caches = llm.prefill(x, slots=room, past=before, images=images)
    gone = caches.dropped[-1] if isinstance(caches, Pruned) else 0
    found = [rows(hidden, (last - gone)[:, None])[:, 0]]
    at = last + 1 + (0 if past is None else PAST)
    for step in range(NEW):
        state, caches = llm.decode(tokens[:, step : step + 1], caches, at + step)
        found.append(state[:, 0])
    return jnp.stack(found, 1), [cache.slots for cache in slots_of(caches)]


def slots_of(caches):
    return caches.layers if isinstance(caches, Pruned) else caches


def inputs(many, seed=0):
    """Rows of random embeddings, where their images are, their last places, decoded tokens."""
    draw = np.random.default_rng(seed)
    x = draw.normal(size=(len(many), LENGTH, C.llm.width)).astype(np.float32)
    place = np.arange(LENGTH)
    visual = np.stack([(place >= first) & (place < first + n) for first, n, _ in many])
    last = np.array([length - 1 for *_, length in many], np.int32)
    tokens = draw.normal(size=(len(many), NEW, C.llm.width)).astype(np.float32)
    before = draw.normal(size=(len(many), PAST, C.llm.width)).astype(np.float32)
    return x, visual, last, tokens, before


@pytest.mark.parametrize(
    "behind", [pytest.param(False, marks=pytest.mark.slow), True], ids=["alone", "behind a past"]
)
@pytest.mark.parametrize("way", WAYS)
def test_pruning_equals_a_mask(way, behind, mesh1):
    text, many = WAYS[way]
    pruning = described(text)
    x, visual, last, tokens, before = inputs(many)
    with jax.set_mesh(mesh1):
        llm = model(pruning, unrolled=not behind)
        weights = literal_models.of(model(pruning, unrolled=False))
        ours, slots = run(llm, *map(tiny.placed, (x, visual, last, tokens)),
                          tiny.placed(before) if behind else None)  # fmt: skip
    for row, (first, count, length) in enumerate(many):
        parts = [x[row, :length], tokens[row]]
        parts = [before[row], *parts] if behind else parts
        prompt = length + PAST * behind
        whole = np.concatenate(parts).astype(np.float64)
        wanted, _ = literal_pruning.llm(
            weights, whole, C, pruning, prompt, first + PAST * behind, count
        )
        np.testing.assert_allclose(ours[row], wanted[prompt - 1 :], atol=3e-5, err_msg=str(row))
    room = LENGTH + NEW + PAST * behind
    runs = pruning.runs(C.llm.depth, V)
    kept = [run.tokens for run in runs for _ in range(run.first, run.end)]
    kept = [kept[-1]] * len(kept) if pruning.forgets else kept
    assert slots == [room - V + n for n in kept]


def test_keeping_everything_is_the_model_that_does_not_prune(mesh1):
    x, visual, last, tokens, _ = inputs(ROWS)
    with jax.set_mesh(mesh1):
        placed = [tiny.placed(part) for part in (x, visual, last, tokens)]
        plain, _ = run(model(None, unrolled=True), *placed, None)
        for text in (f"fastv:layers=1:tokens={V}", f"pyramiddrop:layers=1,3:tokens={V},{V}"):
            whole, _ = run(model(described(text), unrolled=True), *placed, None)
            np.testing.assert_array_equal(whole, plain)
    # So does what leaves none of an image's tokens out, through a gather.
    few = [(first, min(n, 2), length - max(n - 2, 0)) for first, n, length in ROWS]
    x, visual, last, tokens, _ = inputs(few)
    with jax.set_mesh(mesh1):
        placed = [tiny.placed(part) for part in (x, visual, last, tokens)]
        plain, _ = run(model(None, unrolled=True), *placed, None)
        whole, _ = run(model(described("fastv:layers=1:tokens=2"), unrolled=True), *placed, None)
    np.testing.assert_allclose(whole, plain, atol=1e-5)


@pytest.mark.parametrize("way", [pytest.param("pyramiddrop", marks=pytest.mark.slow), "tokencarve"])
def test_a_row_is_pruned_alike_on_eight_devices(way, mesh1, mesh8):
    text, many = WAYS[way]
    many = (many * 4)[:8]
    x, visual, last, tokens, before = inputs(many)
    found = []
    for mesh in (mesh1, mesh8):
        with jax.set_mesh(mesh):
            llm = model(described(text), unrolled=False)
            made, _ = run(llm, *map(tiny.placed, (x, visual, last, tokens, before)))
            found.append(np.asarray(made))
    np.testing.assert_allclose(*found, atol=2e-5)
