# SPDX-License-Identifier: Apache-2.0
"""What every compressor costs: the published table, and the compiler's count of what is built."""

import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from test_cost import (
    CLIP,
    SMALL_LLM,
    SMALL_VIT,
    VICUNA,
    WIDE_VIT,
    compressor,
    count,
    flops,
    shape,
)

from vlm_jax import compressors
from vlm_jax.compressors.compressor import Question
from vlm_jax.compressors.method import Interface
from vlm_jax.compressors.mmtok import WORDS
from vlm_jax.cost import flops as cost
from vlm_jax.models.sizes import LLMSize, ViTSize

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
            # The table gathers 32 neighbors of each token; here a product weighs all patches.
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


# GFLOP of the choice alone at V = 64, as derived from the methods' steps. There all pairs are
# multiplied twice, here five eighths of them; VisPruner compares all patches, here those that are
# not important; MMTok has 10 tokens of words.
CHOICES = dict(visionzip=0.011, vispruner=0.68, divprune=2.72, cdpruner=16.93, mmtok=0.795)


@pytest.mark.parametrize("kind", CHOICES)
def test_choices_cost_what_their_steps_do(kind):
    between = Interface(24, 1024, 1, 4096, heads=16)
    counted = compressor(kind, 64).choice(between)
    if kind == "vispruner":
        counted *= (576 / (576 - 32)) ** 2 / 0.625
    widths = dict(divprune=4096, cdpruner=4096, mmtok=1024)
    counted += 0.375 * 2 * 576**2 * widths.get(kind, 0)
    if kind == "mmtok":
        counted -= 2 * (WORDS - 10) * 576 * 4096 + 3 * 64 * (WORDS - 10) * 576
    assert counted / 1e9 == pytest.approx(CHOICES[kind], rel=0.02)


# --- held to the models ---------------------------------------------------------------------------

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
    dict(kind="mqt", tokens=9, queries=16),
    dict(kind="pixel_unshuffle", tokens=36),
    dict(kind="uniform", tokens=9),
    dict(kind="random", tokens=9),
    dict(kind="divprune", tokens=9),
    dict(kind="divprune", tokens=144),
    dict(kind="mmtok", tokens=9),
    dict(kind="cdpruner", tokens=9),
    dict(kind="visionzip", tokens=2),
    dict(kind="visionzip", tokens=36),
    dict(kind="vispruner", tokens=9),
    dict(kind="vispruner", tokens=9, important_ratio=1.0),
]
# The compiler counts what is repeated for each layer once.
CLIP_TEXT = dict(
    clip_width=256, text_width=256, text_depth=1, text_heads=4, text_vocab=64, text_length=77
)
KINDS = [
    dict(heads=4, query="none", downsample="conv", queries=0) | CLIP_TEXT | section
    for section in KINDS
]


def name_of(section):
    name = "-".join(str(section[key]) for key in ("kind", "tokens", "query", "downsample"))
    return name + f"-{section['queries']} queries" * (section["queries"] > 0)


def build(section, vit, llm):
    return tiny.compressor(
        **section,
        side=vit["image_size"] // vit["patch_size"],
        width=vit["width"],
        levels=len(vit["levels"]),
        llm_width=llm["width"],
        vit_heads=vit["heads"],
    )


@pytest.mark.parametrize("section", KINDS, ids=name_of)
def test_compressor_parameters_equal_the_models(section, mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: build(section, SMALL_VIT, SMALL_LLM))
    parts = compressors.describe(section), ViTSize.of(SMALL_VIT), LLMSize.of(SMALL_LLM)
    assert count(model) == cost.compressor_parameters(*parts)


LEVELS_VIT = WIDE_VIT | {"depth": 3, "levels": (1, 3), "width": 2048}
LEVELS_LLM = SMALL_LLM | {"width": 4096}


def features(model, batch):
    """What the encoder gives for a compressor: fewer patches, or more beside them."""
    own = model.interface.head + 1
    beside = dict(keys=2048 + 1, own_keys=own, own_attention=1, image_id=2, image_size=2)
    rows = 144 // model.shrink**2 + (model.reads == "own_keys")
    return shape(batch, rows, 2 * 2048 + beside.get(model.reads, 0))


def see(model, x, question):
    """The visual tokens alone, also where the compressor says how many it made."""
    made = model(x, question)
    return made.tokens if model.adaptive else made


def question_shape(model, batch):
    """What a compressor reads of the question, of as many tokens as its cost counts."""
    length = shape(batch, dims=("batch",), dtype="int32")
    if model.method.query == "words":
        return Question(shape(batch, WORDS, 4096), length)
    if model.method.query == "clip":
        return Question(shape(batch, 77, dims=("batch", "len"), dtype="int32"), length)
    return shape(batch, 4096, dims=("batch", "feature"))


def parts_of(section):
    return compressors.describe(section), ViTSize.of(LEVELS_VIT), LLMSize.of(LEVELS_LLM)


@pytest.mark.parametrize("section", KINDS, ids=name_of)
def test_compressor_flops_are_the_compilers(section, mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: build(section, LEVELS_VIT, LEVELS_LLM))
        got = flops(see, model, features(model, 1), question_shape(model, 1))
    assert got == pytest.approx(cost.compressor_flops(*parts_of(section)), rel=0.01)


@pytest.mark.parametrize("section", [KINDS[9], KINDS[10]], ids=name_of)
def test_what_no_image_enters_is_computed_once_for_a_batch_or_before(section, mesh1):
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: build(section, LEVELS_VIT, LEVELS_LLM))
        got = flops(see, model, features(model, 3), question_shape(model, 3))
        folded = jax.eval_shape(lambda model: model.fold(), model)
        after = flops(see, folded, features(model, 3), question_shape(model, 3))
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

        got = flops(jax.grad(loss), model, features(model, 1), question_shape(model, 1))
    counted = cost.compressor_products(*parts_of(section)).training(1)
    assert got == pytest.approx(counted, rel=0.01)
