# SPDX-License-Identifier: Apache-2.0
"""Whatever is described, what is built has the parameters and the FLOPs that are counted of it."""

import ast

import jax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cost import count, flops, shape
from test_house import files, imports, tree, where

from vlm_jax.compressors import describe
from vlm_jax.cost import flops as cost
from vlm_jax.models.llm import LLM
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.models.vit import ViT

SMALL = st.integers(1, 5)


@st.composite
def vits(draw):
    """Encoders of any shape: CLIP's, SigLIP's and what lies between."""
    heads, patch, depth = draw(SMALL), draw(SMALL), draw(SMALL)
    cut, token = draw(st.booleans()), draw(st.booleans())
    border = draw(st.integers(0, patch - 1)) if cut else 0
    levels = draw(st.sets(st.integers(1, depth), min_size=1))
    return dict(
        image_size=patch * draw(SMALL) + border,
        patch_size=patch,
        depth=depth,
        width=heads * draw(SMALL),
        mlp=draw(st.integers(1, 40)),
        heads=heads,
        norm_eps=1e-5,
        levels=tuple(sorted(levels)),
        activation=draw(st.sampled_from(["quick_gelu", "gelu", "gelu_tanh"])),
        class_token=token,
        keep_class=token and draw(st.booleans()),
        patch_bias=draw(st.booleans()),
        pre_norm=draw(st.booleans()),
        final_norm=depth in levels and draw(st.booleans()),
        cut_border=cut,
    )


@st.composite
def llms(draw):
    """Decoders of any shape: Llama's, Qwen1.5's, Qwen3's and what lies between."""
    kv_heads = draw(SMALL)
    return dict(
        vocab=draw(st.integers(1, 60)),
        depth=draw(SMALL),
        width=draw(st.integers(1, 40)),
        mlp=draw(st.integers(1, 40)),
        heads=kv_heads * draw(SMALL),
        kv_heads=kv_heads,
        head_size=2 * draw(SMALL),
        rope_theta=1e4,
        norm_eps=1e-6,
        qkv_bias=draw(st.booleans()),
        tied_embeddings=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
    )


@settings(max_examples=30)
@given(vit=vits(), llm=llms())
def test_what_is_built_has_the_parameters_that_are_counted(vit, llm, mesh1):
    vit, llm = ViTSize(**vit), LLMSize(**llm)
    with jax.set_mesh(mesh1):
        tower = jax.eval_shape(lambda: ViT(vit, rngs=nnx.Rngs(0)))
        decoder = jax.eval_shape(lambda: LLM(llm, rngs=nnx.Rngs(0)))
    assert count(tower) == cost.vit_parameters(vit)
    assert count(decoder) == cost.llm_parameters(llm)


# Of one block, as the compiler counts a scanned one once; wide, as it counts norms and activations
# too. Without a class token, with biases, with a border: what CLIP and Llama do not have.
SIGLIP = dict(
    image_size=50,
    patch_size=4,
    depth=1,
    width=1152,
    mlp=4304,
    heads=16,
    norm_eps=1e-6,
    levels=(1,),
    class_token=False,
    patch_bias=True,
    pre_norm=False,
    cut_border=True,
)
QWEN3 = dict(
    vocab=600,
    depth=1,
    width=1024,
    mlp=3072,
    heads=16,
    kv_heads=8,
    head_size=128,
    rope_theta=1e6,
    norm_eps=1e-6,
    qkv_bias=False,
    tied_embeddings=True,
    qk_norm=True,
)
KEPT = SIGLIP | dict(class_token=True, keep_class=True, image_size=48)


@pytest.mark.parametrize("of", [SIGLIP, KEPT], ids=["siglip", "class token kept"])
def test_encoder_flops_are_the_compilers(of, mesh1):
    size = ViTSize(**of)
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: ViT(size, rngs=nnx.Rngs(0)))
        side = size.image_size
        pixels = shape(1, side, side, 3, dims=("batch", "len", "len", "none"))
        got = flops(lambda model, x: model(x), model, pixels)
    plain = describe(dict(kind="none", tokens=size.rows))
    assert got == pytest.approx(cost.encoder_flops(size, plain), rel=0.01)
    assert cost.visual_tokens(plain, size) == 144 + size.kept


def test_decoder_flops_are_the_compilers(mesh1):
    size = LLMSize(**QWEN3)
    with jax.set_mesh(mesh1):
        model = jax.eval_shape(lambda: LLM(size, rngs=nnx.Rngs(0)))
        got = flops(lambda model, x: model.logits(model(x)[:, -1:]), model, shape(1, 32, 1024))
    assert got == pytest.approx(cost.llm_flops(size, 32), rel=0.01)


# Where a configuration goes in: what makes a description of it, and what keeps it as a document.
DOORS = {
    "of",
    "with_start",
    "run",
    "claim",
    "flat",
    "digest",
    "describe",
    "open_config",
    "models",
}  # of all rooms, and of a grid:
DOORS |= {"cells_of", "cell_of", "by_size", "dry_run", "check", "applied", "weights"}


def test_a_configuration_stops_at_the_door():
    """Rooms take frozen descriptions; `ml_collections` is imported where documents are kept."""
    wrong = []
    for path in files(*(f"vlm_jax/{name}" for name in
                        ("compressors", "models", "cost", "data", "training"))):  # fmt: skip
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef) and node.name not in DOORS:
                given = {a.arg for a in [*node.args.args, *node.args.kwonlyargs]}
                if "config" in given:
                    wrong.append(where(path, node.lineno))
        documents = (
            {"cells", "llms", "runs", "stages", "workdir"} if "training" in path.parts else set()
        )
        if "ml_collections.ConfigDict" in imports(path) or "ml_collections" in imports(path):
            if path.stem not in documents:
                wrong.append(where(path))
    assert not wrong
