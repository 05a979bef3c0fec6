# SPDX-License-Identifier: Apache-2.0
"""Counted costs equal published counts, the published modules' table, and the compiler's count."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
import tiny
from flax import nnx
from jax.sharding import NamedSharding

from configs import base, sizes
from vlm_jax import mesh
from vlm_jax.cost import flops as cost
from vlm_jax.models.cache import KV
from vlm_jax.models.llm import LLM
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.models.vit import ViT

CLIP = ViTSize.of(base.get_config().vit)
VICUNA = LLMSize.of(sizes.LLM["vicuna-1.5-7b"])


def compressor(kind, tokens, query="separate", heads=8):
    return tiny.method(kind, tokens, heads, query)


@pytest.mark.parametrize("name", sizes.LLM)
def test_llm_parameters_equal_the_published_count(name):
    assert cost.llm_parameters(LLMSize.of(sizes.LLM[name])) == sizes.LLM_PARAMETERS[name]


def test_vit_parameters_equal_the_published_count():
    for name, of in sizes.VIT.items():
        counted = cost.vit_parameters(ViTSize.of(of | dict(levels=(1,))))
        assert counted == sizes.VIT_PARAMETERS[name]


def test_exact_parameter_counts_of_the_published_modules():
    counts = {
        kind: cost.compressor_parameters(compressor(kind, 36), CLIP, VICUNA)
        for kind in ("none", "token_packer", "mqt")
    }
    assert counts == {"none": 20_979_712, "token_packer": 36_722_688, "mqt": 8_923_136}


def test_encoder_and_language_model_cost_the_derived_context_numbers():
    whole = dataclasses.replace(CLIP, levels=(24,))
    none, merge = compressor("none", 576), compressor("prumerge", 36)
    assert cost.encoder_flops(whole, none) == pytest.approx(381.9e9, rel=5e-4)
    assert cost.encoder_flops(CLIP, none) == pytest.approx(366.0e9, rel=5e-4)
    assert cost.encoder_flops(CLIP, merge) == pytest.approx(367.2e9, rel=5e-4)
    # One token without attention: 2 x 6.476e9 non-embedding parameters; the output layer 0.26e9.
    block = 12.952e9
    assert cost.llm_flops(VICUNA, 1, logits=0) == pytest.approx(block, rel=1e-3)
    assert cost.llm_flops(VICUNA, 1) - cost.llm_flops(VICUNA, 1, logits=0) == 2 * 32000 * 4096
    # The separate question pass of 32 tokens, without the vocabulary scores nobody reads.
    asked = cost.request_flops(CLIP, compressor("quecc", 36), VICUNA, Q=64, G=1, question=32)
    assert asked.question == pytest.approx((423 - 32 * 0.262) * 1e9, rel=5e-3)


def test_decoding_one_by_one_costs_what_one_pass_over_the_same_tokens_costs_less_the_mask():
    """G - 1 passes: linear terms as one prefill of G - 1 tokens, attention the lower triangle of
    it.
    """
    context, G = 100, 9
    decode = cost.decode_flops(VICUNA, context=context, G=G)
    steps = sum(cost.llm_flops(VICUNA, 1, cached=context + i) for i in range(G - 1))
    assert decode == steps
    assert cost.decode_flops(VICUNA, context=context, G=1) == 0


def test_cached_text_and_no_question_pass_leave_what_the_visual_tokens_cost():
    it = compressor("quecc", 36)
    full = cost.request_flops(CLIP, it, VICUNA, Q=50, G=4)
    kept = cost.request_flops(CLIP, it, VICUNA, Q=50, G=4, cached_text=True)
    assert (kept.encoder, kept.compressor, kept.decode) == (
        full.encoder,
        full.compressor,
        full.decode,
    )
    assert kept.question == 0 < full.question
    # The text computed alone, then the visual tokens against its keys: never more than the whole.
    text = cost.llm_flops(VICUNA, 50, logits=0)
    assert kept.prefill < full.prefill
    assert full.prefill - kept.prefill - text == 4 * 50 * 36 * VICUNA.width * VICUNA.depth
    assert (
        cost.request_flops(CLIP, compressor("quecc", 36, "none"), VICUNA, Q=50, G=1).question == 0
    )


def test_a_small_request_costs_the_papers_2nt_once_embeddings_are_left_out():
    """Prefill of few tokens is 2 x non-embedding parameters per token; attention is the rest."""
    llm = LLMSize.of(sizes.LLM["qwen1.5-7b"])
    body = (cost.llm_parameters(llm) - 2 * llm.vocab * llm.width) / 1e9
    prefill = cost.llm_flops(llm, 62, logits=0)
    assert prefill == pytest.approx(cost.paper_flops(body, 12, Q=50), rel=0.01)


def test_bad_sections_and_kinds_are_named():
    with pytest.raises(ValueError, match=r"llm needs .*'kv_heads'.* missing"):
        LLMSize.of({k: v for k, v in sizes.LLM["vicuna-1.5-7b"].items() if k != "kv_heads"})
    with pytest.raises(ValueError, match="compressor.kind='perceiver': choose one of"):
        compressor("perceiver", 4)
    with pytest.raises(ValueError, match="compressor.query='twice': choose one of"):
        compressor("quecc", 4, "twice")
    with pytest.raises(ValueError, match="form 'fast' of a compressor: choose one of"):
        cost.compressor_flops(compressor("quecc", 4), CLIP, VICUNA, form="fast")
    with pytest.raises(ValueError, match="choose align or finetune"):
        cost.train_step_flops(
            True, compressor("pool", 4), VICUNA, vit=CLIP, tokens=8, stage="pretrain"
        )


# --- held to the models ---------------------------------------------------------------------------

SMALL_VIT = {
    "image_size": 48,
    "patch_size": 4,
    "depth": 3,
    "width": 64,
    "mlp": 256,
    "heads": 4,
    "norm_eps": 1e-5,
    "levels": (1, 2),
}
SMALL_LLM = {
    "vocab": 500,
    "depth": 1,
    "width": 96,
    "mlp": 320,
    "heads": 6,
    "kv_heads": 2,
    "head_size": 16,
    "rope_theta": 1e4,
    "norm_eps": 1e-6,
    "qkv_bias": True,
    "tied_embeddings": False,
}
ONE_LEVEL = {
    **SMALL_VIT,
    "depth": 1,
    "levels": (1,),
}  # a scan of one block: the compiler counts a body once


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def flops(function, *arguments):
    """The compiler's count for one device; XLA counts elementwise work too, so layers are wide in
    the tests.
    """
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


@pytest.mark.parametrize("change", [{}, {"tied_embeddings": True}, {"qkv_bias": False, "depth": 3}])
def test_llm_parameters_equal_the_models(change, mesh1):
    sizes = SMALL_LLM | change
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: LLM(LLMSize.of(sizes), rngs=nnx.Rngs(0)))
    assert count(model) == cost.llm_parameters(LLMSize.of(sizes))


def test_vit_parameters_equal_the_models(mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: ViT(ViTSize.of(SMALL_VIT), rngs=nnx.Rngs(0)))
    assert count(model) == cost.vit_parameters(ViTSize.of(SMALL_VIT))


# Wide enough that norms, softmax and activations, which the compiler counts and `cost` does not,
# stay
# below 1 %. Nothing is computed or allocated: shapes alone are compiled.
WIDE_LLM = SMALL_LLM | {"width": 2048, "mlp": 5632, "heads": 16, "kv_heads": 4, "head_size": 128}
WIDE_VIT = ONE_LEVEL | {"width": 1024, "mlp": 4096, "heads": 8}


def shape(*sizes, dims=("batch", "len", "feature"), dtype=jnp.float32):
    """An abstract array, sharded like activations of these dimensions."""
    sharding = NamedSharding(jax.sharding.get_abstract_mesh(), mesh.spec(*dims))
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)


def test_prefill_flops_are_the_compilers(mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: LLM(LLMSize.of(WIDE_LLM), rngs=nnx.Rngs(0)))
        got = flops(lambda model, x: model.logits(model(x)[:, -1:]), model, shape(1, 64, 2048))
    assert got == pytest.approx(cost.llm_flops(LLMSize.of(WIDE_LLM), 64), rel=0.01)


def test_prefill_behind_the_question_is_the_compilers(mesh1):
    """The question read once, before the image: a pass over it, and one that goes on behind it."""

    def prefill(model, question, rest, length):
        past = model.start(question, length)
        hidden, _ = model.prefill(rest, slots=96, past=past)
        return model.logits(hidden[:, -1:]), past.hidden  # which the compressor reads

    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: LLM(LLMSize.of(WIDE_LLM), rngs=nnx.Rngs(0)))
        length = shape(1, dims=("batch",), dtype=jnp.int32)
        got = flops(prefill, model, shape(1, 32, 2048), shape(1, 64, 2048), length)
    parts = ViTSize.of(WIDE_VIT), compressor("quecc", 9, "prefix"), LLMSize.of(WIDE_LLM)
    request = cost.request_flops(*parts, Q=87, G=1, question=32)
    assert got == pytest.approx(request.prefill, rel=0.01)
    assert request.question == 0
    alone = cost.request_flops(*parts, Q=87, G=1, question=0)
    assert request.prefill < alone.prefill  # the question does not look at what is behind it


def test_decode_flops_are_the_compilers(mesh1):
    """One token against a cache of 64 slots, all of which the compiled step reads."""
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: LLM(LLMSize.of(WIDE_LLM), rngs=nnx.Rngs(0)))
        slots = shape(1, 64, 4, 128, dims=("batch", "len", "kv_heads", "head"))
        got = flops(
            lambda model, x, kv, at: model.logits(model.decode(x, [kv], at)[0]),
            model,
            shape(1, 1, 2048),
            KV(slots, slots),
            shape(1, dims=("batch",), dtype=jnp.int32),
        )
    assert got == pytest.approx(cost.decode_flops(LLMSize.of(WIDE_LLM), context=63, G=2), rel=0.01)


def test_encoder_flops_are_the_compilers(mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: ViT(ViTSize.of(WIDE_VIT), rngs=nnx.Rngs(0)))
        pixels = shape(1, 48, 48, 3, dims=("batch", "len", "len", "none"))
        got = flops(lambda model, x: model(x), model, pixels)
    assert got == pytest.approx(
        cost.encoder_flops(ViTSize.of(WIDE_VIT), compressor("none", 144)), rel=0.01
    )


@pytest.mark.parametrize("stage, images", [("align", 1), ("finetune", 1), ("finetune", 2)])
def test_training_flops_are_the_compilers(stage, images, mesh1):
    """Gradients of token_packer and one decoder block: of all weights, or the compressor's only."""
    vit = WIDE_VIT | {"depth": 3, "levels": (1, 3)}
    with jax.set_mesh(mesh1):
        packer = jax.eval_shape(
            lambda: tiny.compressor(
                "token_packer",
                tokens=9,
                side=12,
                width=vit["width"],
                levels=2,
                llm_width=WIDE_LLM["width"],
                heads=4,
            )
        )
        model = jax.eval_shape(lambda: LLM(LLMSize.of(WIDE_LLM), rngs=nnx.Rngs(0)))

        def loss(packer, model, levels, text):
            place = mesh.spec("batch", "len", "feature")
            visual = jnp.reshape(packer(levels), (1, -1, text.shape[2]), out_sharding=place)
            x = jnp.concatenate([visual, text], axis=1)
            return jnp.square(model.logits(model(x))).sum()

        wanted = (0, 1) if stage == "finetune" else (0,)
        levels, text = shape(images, 144, 2048), shape(1, 87, 2048)
        got = flops(jax.grad(loss, argnums=wanted), packer, model, levels, text)
    counted = cost.train_step_flops(
        True,
        compressor("token_packer", 9, "none", heads=4),
        LLMSize.of(WIDE_LLM),
        vit=ViTSize.of(vit),
        tokens=87 + 9 * images,
        stage=stage,
        images=images,
    )
    assert got == pytest.approx(counted, rel=0.01)
