# SPDX-License-Identifier: Apache-2.0
"""What a cut does to a row: the published numbers, the specification written out, ties."""

from pathlib import Path

import jax
import jax.numpy as jnp
import literal_pruning
import numpy as np
import published_pruning
import pytest
from made_numbers import numbers
from test_published_compressors import each_off_by_one_percent, largest_error, read

from vlm_jax.models.pruning import cuts

PUBLISHED = Path(__file__).parent / "published/methods"
PREFIX, IMAGE = 2, 8  # of the made row of 14 tokens
GATE = published_pruning.GATE
ATTENTION = literal_pruning.softmax(2 * np.sqrt(3) * numbers(28, 3011).reshape(2, 14))


def test_numbers_that_anyone_can_make_again(mesh1):
    meta = dict(prefix=PREFIX, image_tokens=IMAGE)
    attention = ATTENTION[None].astype(np.float32)
    hidden = (np.sqrt(3) * numbers(168, 3010)).reshape(1, 14, 12).astype(np.float32)
    fast = published_pruning.fastv(meta | dict(tokens=3), {}, hidden, attention)
    assert fast["indices"].tolist() == [[0, 1, 5, 6, 7, 10, 11, 12, 13]]
    carve = meta | dict(tokens=4, layer=2, weight=0.4)
    carved = published_pruning.token_carve(carve, {}, hidden, attention)
    assert carved["indices"].tolist() == [[0, 1, 2, 5, 6, 8, 10, 11, 12, 13]]
    made = np.asarray(carved["hidden_states"])
    assert made.mean() == pytest.approx(0.009888224, abs=1e-7)
    assert made.std() == pytest.approx(0.951731903, abs=1e-7)
    drop = dict(hidden=8, heads=2, image_index=2, image_tokens=5, prompt_len=4, stage=0,
                ratios=[1, 0.4], tokens=2, rope_theta=1e4, rms_eps=1e-5)  # fmt: skip
    x = (np.sqrt(3) * numbers(72, 3020)).reshape(1, 9, 8).astype(np.float32)
    q, k = ((np.sqrt(3 / 8) * numbers(64, t)).reshape(8, 8) for t in (3021, 3022))
    state = {
        "self_attn.q_proj.weight": q.astype(np.float32),
        "self_attn.k_proj.weight": k.astype(np.float32),
        "input_layernorm.weight": np.ones(8, np.float32),
    }
    with jax.set_mesh(mesh1):
        dropped = published_pruning.pyramid_drop(drop, state, x)
    assert dropped["indices"].tolist() == [[0, 1, 3, 5, 7, 8]]
    scores = literal_pruning.drop_scores(
        x[0], np.ones(8), q, k,
        heads=2, kv_heads=2, head_size=4, theta=1e4, eps=1e-5, first=2, slots=5,
    )  # fmt: skip
    np.testing.assert_allclose(scores, [0.106827, 0.107354, 0.064591, 0.226915, 0.039102],
                               atol=1e-6)  # fmt: skip


@pytest.mark.parametrize("tokens", [2, 3, 5, 8])
def test_cuts_are_those_of_the_specification_written_out(tokens):
    draw = np.random.default_rng(tokens)
    slots, first, length = 12, 3, 20
    hidden = draw.normal(size=(length, 16)).astype(np.float32)
    attention = draw.random((4, length)).astype(np.float32)
    meta = dict(prefix=first, image_tokens=slots, tokens=tokens, layer=2, weight=0.5)
    fast = published_pruning.fastv(meta, {}, hidden[None], attention[None])
    wanted = literal_pruning.by_attention(attention, first, slots, tokens)
    assert fast["indices"][0].tolist() == wanted
    np.testing.assert_array_equal(fast["hidden_states"][0], hidden[wanted])
    # At a weight of a half scores tie: the first comes first.
    made, left = literal_pruning.carve(
        hidden.astype(np.float64), attention, first, slots, tokens, 0.5
    )
    carved = published_pruning.token_carve(meta, {}, hidden[None], attention[None])
    assert carved["indices"][0].tolist() == left
    np.testing.assert_allclose(carved["hidden_states"][0], made, atol=1e-5)


def test_at_ties_the_first_is_kept_and_rows_with_fewer_tokens_or_none_lose_padding():
    slots, tokens = 6, 2
    hidden = jnp.arange(10.0)[:, None]
    one = lambda attention, visual: cuts.by_attention(  # noqa: E731
        hidden, jnp.asarray(attention), jnp.asarray(visual), slots=slots, tokens=tokens
    )
    places = np.arange(10)
    even = np.full(10, 0.1, np.float32)
    whole = (places >= 1) & (places < 7)
    assert one(even, whole).index.tolist() == [0, 1, 2, 7, 8, 9]
    fewer = (places >= 1) & (places < 2)  # its last five places are padding
    assert one(even, fewer).index.tolist() == [0, 1, 2, 3, 4, 5]
    assert one(even, np.zeros(10, bool)).index.tolist() == [0, 1, 2, 3, 4, 5]
    none = cuts.carve(
        hidden, jnp.asarray(even), jnp.zeros(10, bool),
        slots=slots, tokens=tokens, ranked=3, merged=1, weight=0.5,
    )  # fmt: skip
    np.testing.assert_array_equal(none.hidden[:, 0], np.arange(6))


@pytest.mark.parametrize(
    "stem", [pytest.param("llava_mini_v1", marks=pytest.mark.slow), "llava_mini_v4"]
)
def test_any_weight_or_input_off_by_one_percent_is_caught(stem, mesh1):
    meta, state, inputs, outputs = read(PUBLISHED / f"{stem}.npz")
    numbers_of = {name: x for name, x in inputs.items() if x.dtype == np.float32}
    missed = []
    with jax.set_mesh(mesh1):
        assert largest_error(meta, state, inputs, outputs) <= GATE
        for name, off in [*each_off_by_one_percent(state), *each_off_by_one_percent(numbers_of)]:
            changed = [part | {name: off} if name in part else part for part in (state, inputs)]
            if largest_error(meta, *changed, outputs) <= GATE:
                missed.append(name)
    assert not missed


@pytest.mark.parametrize("stem, change", [
    ("fastv_a", dict(prefix=6)),  # one late, as in the release
    ("fastv_b", dict(prefix=36)),
    ("token_carve_a", dict(prefix=6)),
    ("token_carve_a", dict(weight=0.6)),
    ("token_carve_b", dict(weight=0.5)),
    ("pyramid_drop_many", dict(rope_theta=1e3)),
    ("pyramid_drop_many", dict(image_index=4)),
    ("pyramid_drop_many", dict(prompt_len=6)),
    ("pyramid_drop_many", dict(heads=1, kv_heads=1, head_dim=16)),
])  # fmt: skip
def test_a_cut_that_differs_in_one_constant_is_caught(stem, change, mesh1):
    meta, state, inputs, outputs = read(PUBLISHED / f"{stem}.npz")
    with jax.set_mesh(mesh1):
        assert largest_error(meta, state, inputs, outputs) <= GATE
        assert largest_error(meta | change, state, inputs, outputs) > GATE
