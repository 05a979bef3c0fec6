# SPDX-License-Identifier: Apache-2.0
"""What a step of decoding may cost: caches written in place, no weight copied, few programs."""

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.layers import layer
from vlm_jax.serving.decoder import Decoder, bucket


@pytest.fixture(scope="module")
def case(mesh1):
    """A decoder whose weights are larger than everything else, and a batch."""
    c = tiny.config(llm=dict(depth=4, width=64, mlp=256))
    batch = {k: v for k, v in tiny.batch(c, rows=2).items() if k != "loss_mask"}
    with jax.set_mesh(mesh1):
        model = tiny.created(c)
        return model, Decoder(model, stop_ids=()), tiny.placed(batch)


def size(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_a_layer_apart_is_that_layer_of_the_stack(case):
    model, decoder, _ = case
    assert len(decoder.model.llm.blocks) == model.llm.depth == 4
    for i, block in enumerate(decoder.model.llm.blocks):
        jax.tree.map(np.testing.assert_array_equal, block, layer(model.llm.blocks, i))


def test_a_step_transfers_nothing_writes_into_its_caches_and_copies_no_weight(case, mesh1):
    _, decoder, batch = case
    with jax.set_mesh(mesh1):
        ids, caches, length, sampling = decoder.start(batch, new_tokens=3)
        step = decoder.following.lower(decoder.model, ids, caches, length, sampling).compile()
        cost = step.memory_analysis()
        assert cost.alias_size_in_bytes >= size(caches)
        assert cost.temp_size_in_bytes < size(decoder.model.llm.blocks[0])
        with jax.transfer_guard("disallow"):
            decoder.following(decoder.model, ids, caches, length, sampling)
    assert all(x.is_deleted() for x in jax.tree.leaves(caches))


def test_numbers_of_new_tokens_in_one_bucket_are_one_program(case, mesh1):
    _, decoder, batch = case
    with jax.set_mesh(mesh1):
        found = [decoder(batch, new_tokens=n) for n in (1, 2, 5)]
        assert decoder.first._cache_size() == decoder.following._cache_size() == 1
    assert [x.shape[1] for x in found] == [1, 2, 5] and bucket(5) == bucket(1)
    np.testing.assert_array_equal(found[2][:, :2], found[1])


def test_no_step_is_run_behind_the_end_of_all_rows(case, mesh1, monkeypatch):
    model, _, batch = case
    with jax.set_mesh(mesh1):
        first = Decoder(model, stop_ids=())(batch, new_tokens=1)
        decoder = Decoder(model, stop_ids=first[:, 0].tolist())
        monkeypatch.setattr(decoder, "following", None)
        np.testing.assert_array_equal(decoder(batch, new_tokens=9), first)


def test_one_row_of_bfloat16_is_decoded_as_two_are(case, mesh1):
    """A single row is multiplied twice on a CPU: its scores must be those it has in company."""
    model, _, batch = case
    with jax.set_mesh(mesh1):
        narrow = jax.tree.map(lambda w: w.astype("bfloat16"), model.llm)
        narrow.dtype = "bfloat16"
        hidden = narrow.embed(batch["ids"][:, :1])
        two = np.asarray(jax.jit(lambda m, x: m.logits(m(x)))(narrow, hidden))
        for row in range(2):
            one = jax.jit(lambda m, x: m.logits(m(x)))(narrow, hidden[row : row + 1])
            assert one.shape == (1, 1, two.shape[2])
            np.testing.assert_allclose(np.asarray(one)[0], two[row], atol=0.05 * two.std())
