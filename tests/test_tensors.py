# SPDX-License-Identifier: Apache-2.0
"""Published tensors go in and come out unchanged; a state that does not fit is refused, by name."""

import jax
import numpy as np
import pytest
import tiny

from vlm_jax.compressors import COMPRESSORS
from vlm_jax.weights import folder

# Where four is no number of visual tokens that a method can give.
TOKENS = {"none": 64, "prumerge_plus": 5}


def abstract(kind="quecc", *, tokens=4, query="separate"):
    return jax.eval_shape(lambda: tiny.compressor(
        kind, tokens=TOKENS.get(kind, tokens), side=8, width=16, levels=2, llm_width=24,
        heads=4, query=query))  # fmt: skip


def drawn(module):
    draw = np.random.default_rng(0)
    return {name: draw.normal(size=shape).astype("f4")
            for name, shape in tiny.tensor_shapes(module).items()}  # fmt: skip


@pytest.mark.parametrize("query", ["none", "separate"])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_what_is_loaded_is_exported(kind, query, mesh8):
    with jax.set_mesh(mesh8):
        module = abstract(kind, query=query)
        published = drawn(module)
        loaded = tiny.filled(module, published)
    # Every parameter is there, where it would have been born.
    for leaf, described in zip(*map(jax.tree.leaves, (loaded, module)), strict=True):
        assert leaf.shape == described.shape and leaf.sharding.spec == described.sharding.spec
    exported = folder.compressor_tensors(loaded)
    assert list(exported) == list(published)
    for name, array in published.items():
        np.testing.assert_array_equal(exported[name], array, err_msg=name)


def test_a_module_without_a_question_has_no_text_tensors(mesh1):
    with jax.set_mesh(mesh1):
        reads, blind = (set(tiny.tensor_shapes(abstract(query=q))) for q in ("separate", "none"))
    parts = ("0.weight", "0.bias", "1.weight", "1.bias")
    assert reads - blind == {f"0.text_projection.{part}" for part in parts}


def test_every_misfit_is_named_at_once(mesh1):
    with jax.set_mesh(mesh1):
        state = drawn(abstract(tokens=4))
        del state["3.bias"]
        state["2.weight"] = np.zeros(3, "f4")
        said = (
            r"1 missing: 3.bias; 1 surplus: 2.weight; 1 of another shape: "
            r"0.q_downsample.weight \(16, 1, 4, 4\) instead of \(16, 1, 2, 2\)"
        )
        with pytest.raises(ValueError, match=said):
            tiny.filled(abstract(tokens=16), state)


def test_weights_of_another_method_are_refused(mesh1):
    with (
        jax.set_mesh(mesh1),
        pytest.raises(ValueError, match="missing: q_proj_1.weight.* surplus: 0"),
    ):
        tiny.filled(abstract("token_packer"), drawn(abstract("quecc")))
