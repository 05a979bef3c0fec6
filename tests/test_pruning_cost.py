# SPDX-License-Identifier: Apache-2.0
"""What a model costs that prunes: the published averages, and the compiler's count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx
from test_cost import CLIP, VICUNA, WIDE_LLM, compressor, flops, shape

from vlm_jax.cost import flops as cost
from vlm_jax.cost import model, roofline
from vlm_jax.models.llm import LLM
from vlm_jax.models.pruned import Images
from vlm_jax.models.pruning import Read, describe, parse
from vlm_jax.models.pruning.tokencarve import decomposition_flops
from vlm_jax.models.sizes import LLMSize

NONE = compressor("none", 576)
OF_7B = Read(32, 576, NONE)


def pruning(text, read=OF_7B):
    return describe(parse(text), read)


@pytest.mark.parametrize("text, average", [
    ("fastv:tokens=288", 306),
    ("fastv:tokens=64", 96),
    ("pyramiddrop", 270),
    ("tokencarve:tokens=64", 96),
    ("tokencarve:tokens=128", 156),
    ("tokencarve:tokens=192", 216),
])  # fmt: skip
def test_layers_read_the_published_numbers_of_tokens_on_average(text, average):
    assert pruning(text).average(32, 576) == average


def test_no_number_of_kept_tokens_costs_less_than_the_layers_before_the_cut():
    one = pruning("fastv:tokens=1")
    assert one.average(32, 576) == pytest.approx(36, abs=1)
    full = cost.request_flops(CLIP, NONE, VICUNA, Q=50, G=8)
    less = cost.request_flops(CLIP, NONE, VICUNA, Q=50, G=8, pruning=one)
    same = cost.request_flops(CLIP, compressor("pool", 36), VICUNA, Q=50, G=8)
    assert (less.encoder, less.compressor) == (full.encoder, full.compressor)
    # As many FLOPs as 37 tokens in every layer, and the choice; attention among 576 is dearer.
    assert same.prefill < less.prefill < 1.1 * same.prefill < full.prefill
    assert less.decode == pytest.approx(
        cost.decode_flops(VICUNA, context=50 + one.cached(32, 576), G=8)
    )


def test_decoding_and_memory_know_the_caches():
    carve, fast = pruning("tokencarve:tokens=64"), pruning("fastv:tokens=64")
    # TokenCarve's first layers forget what later ones have not read.
    assert (carve.cached(32, 576), fast.cached(32, 576)) == (64, 96)
    sized = CLIP, NONE, VICUNA
    plain, cut = (roofline.Request(50, 10, pruning=of) for of in (None, carve))
    token = roofline.cache_numbers(VICUNA) * 2
    full, small = (roofline.memory(*sized, request) for request in (plain, cut))
    assert full.cache - small.cache == token * (576 - 64)
    assert full.weights == small.weights and full.activations == small.activations
    assert roofline.request_bytes(*sized, plain)["prefill"] - roofline.request_bytes(*sized, cut)[
        "prefill"
    ] == token * (576 - 64)


@pytest.mark.parametrize("text", [
    "fastv:layers=1:tokens=16",
    "pyramiddrop:layers=1,2:tokens=32,8",
    "tokencarve:layers=1:tokens=16",
])  # fmt: skip
def test_prefill_flops_are_the_compilers(text, mesh1):
    V, Q = 64, 24
    llm = LLMSize.of(WIDE_LLM | {"depth": 3})
    cut = pruning(text, Read(3, V, compressor("none", V)))

    def prefill(model, x, visual, last):
        hidden, caches = model.prefill(x, slots=V + Q, images=Images(visual, last, V))
        return model.logits(hidden[:, -1:]), caches

    with jax.set_mesh(mesh1):
        made = jax.eval_shape(lambda: LLM(llm, rngs=nnx.Rngs(0), pruning=cut).unrolled())
        got = flops(
            prefill,
            made,
            shape(1, V + Q, llm.width),
            shape(1, V + Q, dims=("batch", "len"), dtype=jnp.bool_),
            shape(1, dims=("batch",), dtype=jnp.int32),
        )
    counted = cost.prefill_flops(llm, V + Q, visual=V, pruning=cut)
    if cut.kind == "tokencarve":
        counted -= decomposition_flops(V, llm.width)  # a call that the compiler does not see into
    assert got == pytest.approx(counted, rel=0.01)
    assert counted < 0.8 * cost.prefill_flops(llm, V + Q, visual=V)


def test_a_described_model_costs_what_it_prunes_and_what_cannot_be_is_refused():
    config = tiny.config(compressor=dict(kind="none", tokens=16))
    full = model.request_cost(model.describe(config), text_tokens=20)
    config.pruning.update(dict(kind="fastv", layers=(1,), tokens=(4,)))
    described = model.describe(config)
    less = model.request_cost(described, text_tokens=20)
    assert less.flops.prefill < full.flops.prefill
    with pytest.raises(ValueError, match="cached_text=True.*set pruning.kind='none'"):
        model.request_cost(described, text_tokens=20, cached_text=True)
    request = roofline.Request(20, frames=2, pruning=described.pruning)
    with pytest.raises(ValueError, match="frames=2"):
        roofline.request_flops(described.vit, described.compressor, described.llm, request)


@pytest.mark.parametrize("text, words", [
    ("fastv", r"pruning.tokens=\(\): pruning.kind='fastv' needs .* such as \(144,\)"),
    ("fastv:tokens=600", "reads 576 visual tokens"),
    ("fastv:tokens=0", "1 or more"),
    ("fastv:layers=32:tokens=9", "ascending from 1 to 31"),
    ("fastv:layers=2,4:tokens=9,4", "fastv cuts once"),
    ("fastv:tokens=9:weight=0.4", "weight=0.4 is of pruning.kind='tokencarve'"),
    ("pyramiddrop:layers=8,4:tokens=9,4", "ascending"),
    ("pyramiddrop:tokens=9", "as many numbers of tokens as cuts"),
    ("pyramiddrop:layers=4,8:tokens=4,9", "never more than before"),
    ("tokencarve:tokens=1", "keeps from 2 to 384 of 576"),
    ("tokencarve:tokens=385", "keeps from 2 to 384 of 576"),
    ("tokencarve:tokens=64:weight=2.0", "from 0 to 1"),
    ("none:tokens=4", "pruning.kind='none' prunes nothing"),
    ("sparsevlm:tokens=4", "choose one of .*'fastv', 'pyramiddrop', 'tokencarve'"),
    ("fastv:token=4", "'token=4' is none of layers=N,N"),
    ("fastv:tokens=few", "'tokens=few' is none of"),
])  # fmt: skip
def test_what_is_no_pruning_is_refused_with_the_way_out(text, words):
    with pytest.raises(ValueError, match=words):
        pruning(text)


def test_tokencarve_refuses_a_number_of_tokens_that_varies():
    for kind in ("m3", "prumerge"):
        method = compressor(kind, 0 if kind == "prumerge" else 36)
        with pytest.raises(ValueError, match="choose fastv or pyramiddrop"):
            pruning("tokencarve:tokens=9", OF_7B._replace(compressor=method))


def test_a_section_describes_itself():
    for text in ("fastv:tokens=64", "pyramiddrop", "tokencarve:tokens=9:weight=0.7"):
        made = pruning(text)
        assert describe(made.section(), OF_7B) == made
        assert dataclasses.asdict(made)["layers"] == made.layers
