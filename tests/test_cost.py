# SPDX-License-Identifier: Apache-2.0
"""Counted costs equal published counts, the published modules' table, and the compiler's count."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from configs import base, sizes
from vlm_jax import mesh
from vlm_jax.models import compressors
from vlm_jax.models.llm import KV, LLM
from vlm_jax.models.vit import ViT
from vlm_jax.scaling import cost

CLIP = cost.ViT.of(base.get_config().vit)
VICUNA = cost.LLM.of(sizes.LLM["vicuna-1.5-7b"])


def compressor(kind, tokens, query="separate", heads=8):
    return cost.Compressor(kind, tokens, heads, query)


@pytest.mark.parametrize("name", sizes.LLM)
def test_llm_parameters_equal_the_published_count(name):
    assert cost.llm_parameters(cost.LLM.of(sizes.LLM[name])) == sizes.LLM_PARAMETERS[name]


def test_vit_parameters_equal_the_published_count():
    assert cost.vit_parameters(CLIP) == sizes.VIT_PARAMETERS["clip-vit-large-patch14-336"]


TOKENS = (1, 4, 16, 36, 144)
# GFLOP of one image at these V, of the published modules for CLIP ViT-L/14-336 into an LLM of width
# 4096, as derived from their code: as they are written, and after every exact simplification.
GFLOP = {
    ("none", "published"): "24.16 24.16 24.16 24.16 24.16",
    ("quecc", "published"): "16.97 17.11 17.66 18.58 23.57",
    ("quecc", "built"): "14.57 14.73 15.33 16.34 21.77",
    ("token_packer", "published"): "14.55 14.69 15.27 16.24 21.45",
    ("token_packer", "built"): "12.15 12.31 12.94 13.99 19.65",
    ("mqt", "published"): "2.43 2.48 2.66 2.95 4.57",
    ("mqt", "built"): "0.031 0.126 0.503 1.13 2.89",
    ("m3", "published"): "24.16 24.16 24.16 24.16 24.16",
    ("m3", "built"): "4.87 4.97 5.37 6.04 9.66",
    ("prumerge", "published"): "0.73 0.86 1.37 2.24 6.90",
    ("prumerge", "built"): "0.044 0.174 0.69 1.56 6.22",
    ("prumerge_plus", "published"): "0.73 0.86 1.37 2.24 6.90",
}
# Millions of parameters, one number or one for each V.
MILLIONS = {
    "none": [20.98] * 5,
    "quecc": [42.56, 42.12, 42.01, 41.99, 41.98],
    "token_packer": [36.72] * 5,
    "mqt": [8.92] * 5,
    "m3": [20.98] * 5,
    "prumerge": [20.98] * 5,
    "prumerge_plus": [20.98] * 5,
}


@pytest.mark.parametrize("kind, form", GFLOP)
def test_compressors_cost_what_the_table_of_published_modules_says(kind, form):
    for V, printed in zip(TOKENS, GFLOP[kind, form].split(), strict=True):
        # MQT has 16 heads; what it computes once for all images is no cost of one image.
        it = compressor(kind, V, heads=16 if kind == "mqt" else 8)
        flops = cost.compressor_flops(it, CLIP, VICUNA, batch=math.inf, form=form)
        if kind == "prumerge" and form == "built":
            # The table gathers 32 neighbours of each token; here a product weighs all patches.
            flops -= 2 * (V - 1) * (576 - 32) * 1024
        if kind == "quecc" and form == "built":
            # Nor does it have the question's own way through the query's first layer.
            flops -= 2 * 1024**2
        # Half of the last printed digit. The table adds rounded terms: four of its numbers are off
        # by up to 1.4 MFLOP more.
        digits = len(printed.split(".")[1])
        allowed = 0.5 * 10**-digits + (0.0014 if form == "published" else 0)
        assert flops / 1e9 == pytest.approx(float(printed), abs=allowed), V


@pytest.mark.parametrize("kind", MILLIONS)
def test_compressors_have_the_parameters_of_the_published_modules(kind):
    for V, millions in zip(TOKENS, MILLIONS[kind], strict=True):
        counted = cost.compressor_parameters(compressor(kind, V), CLIP, VICUNA)
        assert counted / 1e6 == pytest.approx(millions, abs=0.005)


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
    llm = cost.LLM.of(sizes.LLM["qwen1.5-7b"])
    body = (cost.llm_parameters(llm) - 2 * llm.vocab * llm.width) / 1e9
    prefill = cost.llm_flops(llm, 62, logits=0)
    assert prefill == pytest.approx(cost.paper_flops(body, 12, Q=50), rel=0.01)


def test_bad_sections_and_kinds_are_named():
    with pytest.raises(ValueError, match=r"LLM needs .*'kv_heads'.* missing"):
        cost.LLM.of({k: v for k, v in sizes.LLM["vicuna-1.5-7b"].items() if k != "kv_heads"})
    with pytest.raises(ValueError, match="'perceiver' has no cost: choose one of"):
        compressor("perceiver", 4)
    with pytest.raises(ValueError, match="query 'twice' has no cost: choose one of"):
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
KINDS = [
    dict(kind="none", tokens=144),
    dict(kind="pool", tokens=9),
    dict(kind="downsample", tokens=9),
    dict(kind="token_packer", tokens=9),
    dict(kind="token_packer", tokens=144),  # windows of one patch: nothing is absorbed
    dict(kind="quecc", tokens=9),
    dict(kind="quecc", tokens=9, downsample="pool"),
    dict(kind="quecc", tokens=4, query="separate"),
    dict(kind="quecc", tokens=4, query="prefix"),
    dict(kind="mqt", tokens=9),
    dict(kind="mqt", tokens=100),
    dict(kind="m3", tokens=9),
    dict(kind="prumerge", tokens=9),
    dict(kind="prumerge", tokens=0),
    dict(kind="prumerge_plus", tokens=9),
    dict(kind="prumerge_plus", tokens=0),
]
KINDS = [dict(heads=4, query="none", downsample="conv") | section for section in KINDS]


def name_of(section):
    return "-".join(str(section[key]) for key in ("kind", "tokens", "query", "downsample"))


def count(module):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))


def flops(function, *arguments):
    """The compiler's count for one device; XLA counts elementwise work too, hence wide layers in
    the tests.
    """
    return jax.jit(function).lower(*arguments).compile().cost_analysis()["flops"]


def build(section, vit, llm):
    return compressors.build(
        **section,
        side=vit["image_size"] // vit["patch_size"],
        width=vit["width"],
        levels=len(vit["levels"]),
        llm_width=llm["width"],
        rngs=nnx.Rngs(0),
    )


@pytest.mark.parametrize("change", [{}, {"tied_embeddings": True}, {"qkv_bias": False, "depth": 3}])
def test_llm_parameters_equal_the_models(change, mesh1):
    sizes = SMALL_LLM | change
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: LLM(**sizes, rngs=nnx.Rngs(0)))
    assert count(model) == cost.llm_parameters(cost.LLM.of(sizes))


def test_vit_parameters_equal_the_models(mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: ViT(**SMALL_VIT, rngs=nnx.Rngs(0)))
    assert count(model) == cost.vit_parameters(cost.ViT.of(SMALL_VIT))


@pytest.mark.parametrize("section", KINDS, ids=name_of)
def test_compressor_parameters_equal_the_models(section, mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: build(section, SMALL_VIT, SMALL_LLM))
    parts = cost.Compressor.of(section), cost.ViT.of(SMALL_VIT), cost.LLM.of(SMALL_LLM)
    assert count(model) == cost.compressor_parameters(*parts)


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
        model = jax.eval_shape(lambda: LLM(**WIDE_LLM, rngs=nnx.Rngs(0)))
        got = flops(lambda model, x: model.logits(model(x)[:, -1:]), model, shape(1, 64, 2048))
    assert got == pytest.approx(cost.llm_flops(cost.LLM.of(WIDE_LLM), 64), rel=0.01)


def test_prefill_behind_the_question_is_the_compilers(mesh1):
    """The question read once, before the image: a pass over it, and one that goes on behind it."""

    def prefill(model, question, rest, length):
        past = model.start(question, length)
        hidden, _ = model.prefill(rest, slots=96, past=past)
        return model.logits(hidden[:, -1:]), past.hidden  # which the compressor reads

    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: LLM(**WIDE_LLM, rngs=nnx.Rngs(0)))
        length = shape(1, dims=("batch",), dtype=jnp.int32)
        got = flops(prefill, model, shape(1, 32, 2048), shape(1, 64, 2048), length)
    parts = cost.ViT.of(WIDE_VIT), compressor("quecc", 9, "prefix"), cost.LLM.of(WIDE_LLM)
    request = cost.request_flops(*parts, Q=87, G=1, question=32)
    assert got == pytest.approx(request.prefill, rel=0.01)
    assert request.question == 0
    alone = cost.request_flops(*parts, Q=87, G=1, question=0)
    assert request.prefill < alone.prefill  # the question does not look at what is behind it


def test_decode_flops_are_the_compilers(mesh1):
    """One token against a cache of 64 slots, all of which the compiled step reads."""
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: LLM(**WIDE_LLM, rngs=nnx.Rngs(0)))
        slots = shape(1, 64, 4, 128, dims=("batch", "len", "kv_heads", "head"))
        got = flops(
            lambda model, x, kv, at: model.logits(model.decode(x, [kv], at)[0]),
            model,
            shape(1, 1, 2048),
            KV(slots, slots),
            shape(1, dims=("batch",), dtype=jnp.int32),
        )
    assert got == pytest.approx(cost.decode_flops(cost.LLM.of(WIDE_LLM), context=63, G=2), rel=0.01)


def test_encoder_flops_are_the_compilers(mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: ViT(**WIDE_VIT, rngs=nnx.Rngs(0)))
        pixels = shape(1, 48, 48, 3, dims=("batch", "len", "len", "none"))
        got = flops(lambda model, x: model(x), model, pixels)
    assert got == pytest.approx(
        cost.encoder_flops(cost.ViT.of(WIDE_VIT), compressor("none", 144)), rel=0.01
    )


LEVELS_VIT = WIDE_VIT | {"depth": 3, "levels": (1, 3), "width": 2048}
LEVELS_LLM = SMALL_LLM | {"width": 4096}


def features(model, batch):
    """What the encoder gives for a compressor: fewer patches, or keys and attention beside them."""
    return shape(batch, 144 // model.shrink**2, 2 * 2048 + (2048 + 1) * model.reads_keys)


def see(model, x, question):
    """The visual tokens alone, also where the compressor says how many it made."""
    made = model(x, question)
    return made.tokens if model.adaptive else made


def question_shape(batch):
    return shape(batch, 4096, dims=("batch", "feature"))


def parts_of(section):
    return cost.Compressor.of(section), cost.ViT.of(LEVELS_VIT), cost.LLM.of(LEVELS_LLM)


@pytest.mark.parametrize("section", KINDS, ids=name_of)
def test_compressor_flops_are_the_compilers(section, mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: build(section, LEVELS_VIT, LEVELS_LLM))
        got = flops(see, model, features(model, 1), question_shape(1))
    assert got == pytest.approx(cost.compressor_flops(*parts_of(section)), rel=0.01)


@pytest.mark.parametrize("section", [KINDS[9], KINDS[10]], ids=name_of)
def test_what_no_image_enters_is_computed_once_for_a_batch_or_before(section, mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: build(section, LEVELS_VIT, LEVELS_LLM))
        got = flops(see, model, features(model, 3), question_shape(3))
        folded = jax.eval_shape(lambda model: model.fold(), model)
        after = flops(see, folded, features(model, 3), question_shape(3))
    shared, own = (
        cost.compressor_flops(*parts_of(section), batch=3, form=form)
        for form in ("built", "folded")
    )
    assert got / 3 == pytest.approx(shared, rel=0.01)
    # Little is left beside the norm of the patches, which is no matrix product.
    assert after / 3 == pytest.approx(own + 10 * 144 * 2048, rel=0.01)


@pytest.mark.parametrize(
    "section", [s for s in KINDS if s["kind"] not in ("none", "pool")], ids=name_of
)
def test_compressor_training_flops_are_the_compilers(section, mesh1):
    """Gradients of all its weights, from frozen features."""
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: build(section, LEVELS_VIT, LEVELS_LLM))

        def loss(model, x, question):
            return jnp.square(see(model, x, question)).sum()

        got = flops(jax.grad(loss), model, features(model, 1), question_shape(1))
    counted = cost.compressor_products(*parts_of(section)).training(1)
    assert got == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("stage", ["align", "finetune"])
def test_training_flops_are_the_compilers(stage, mesh1):
    """Gradients of token_packer and one decoder block: of all weights, or the compressor's only."""
    vit = WIDE_VIT | {"depth": 3, "levels": (1, 3)}
    with jax.set_mesh(mesh1):
        packer = jax.eval_shape(lambda: build(KINDS[3], vit, WIDE_LLM))
        model = jax.eval_shape(lambda: LLM(**WIDE_LLM, rngs=nnx.Rngs(0)))

        def loss(packer, model, levels, text):
            x = jnp.concatenate([packer(levels), text], axis=1)
            return jnp.square(model.logits(model(x))).sum()

        wanted = (0, 1) if stage == "finetune" else (0,)
        got = flops(
            jax.grad(loss, argnums=wanted), packer, model, shape(1, 144, 2048), shape(1, 87, 2048)
        )
    counted = cost.train_step_flops(
        True,
        cost.Compressor.of(KINDS[3]),
        cost.LLM.of(WIDE_LLM),
        vit=cost.ViT.of(vit),
        tokens=96,
        stage=stage,
    )
    assert got == pytest.approx(counted, rel=0.01)
