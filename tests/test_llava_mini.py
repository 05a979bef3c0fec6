# SPDX-License-Identifier: Apache-2.0
"""LLaVA-Mini: queries that read all patches, and layers in which the text reads them too."""

import dataclasses

import jax
import literal_compressors
import literal_models
import literal_pruning
import numpy as np
import pytest
import tiny
import whole_models
from flax import nnx
from made_numbers import filled, numbers
from test_cost import CLIP, VICUNA, WIDE_LLM, compressor, flops, shape
from test_generate import PROMPTS, made

import vlm_jax
from vlm_jax.__main__ import main
from vlm_jax.compressors import positions
from vlm_jax.compressors.llava_mini import LlavaMiniMethod
from vlm_jax.compressors.method import Interface
from vlm_jax.cost import flops as cost
from vlm_jax.models import vlm
from vlm_jax.models.prefusion import Prefusion
from vlm_jax.models.sizes import LLMSize
from vlm_jax.training.objective import next_token
from vlm_jax.weights import folder, names

MINI = dict(kind="llava_mini", tokens=4, heads=2, prefusion=2)


def config(**changes):
    return tiny.config(compressor=MINI, **changes)


@pytest.fixture(scope="module")
def model(mesh1):
    with jax.set_mesh(mesh1):
        return tiny.roughened(tiny.created(config()), scale=0.2)


def logits_of(model, batch):
    return np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))


def literal(model, row, c):
    """Logits of one row's text tokens but the first; those of answers are not read before."""
    weights = literal_models.of(model.llm)
    text = weights["embedding"][row["ids"]]
    length, at, place = row["length"], int(row["image_at"]), np.arange(len(row["ids"]))
    if at < len(place):
        tensors = {k: np.asarray(x, np.float64)
                   for k, x in folder.compressor_tensors(model.compressor).items()}  # fmt: skip
        features = row["levels"][:, -c.vit.width :].astype(np.float64)
        tokens = literal_compressors.llava_mini(tensors, features, heads=c.compressor.heads)
        patches = literal_compressors.mlp(tensors, "0", "2", features)
        tokens = literal_compressors.mlp(tensors, "0", "2", tokens)
        visible = (place < length) & ~row["loss_mask"]
        x = np.concatenate([patches, tokens, text])
        seen = np.concatenate([np.ones(len(x) - len(place), bool), visible])
        turned = np.where(seen, np.cumsum(seen) - 1, 1)
        mask = np.tri(len(x), dtype=bool) & seen
        layers = literal_models.of(model.compressor.fusion)
        for index in range(c.compressor.prefusion):
            x = literal_pruning.layer(literal_models.block(layers, index), x, c, turned, mask)
        read = x[len(patches) + len(tokens) :]
        text = np.where(visible[:, None], read, text)
        tokens = x[len(patches) : len(patches) + len(tokens)]
        text = np.concatenate([text[:at], tokens, text[at:]])
        place = place + len(tokens) * (place >= at)
    whole = place[length - 1] + 1
    hidden = literal_models.llm(weights, text[:whole], c)
    return literal_models.unembed(weights, hidden)[place[1:length] - 1]


def test_every_row_equals_the_literal_model(model, mesh1):
    c = config()
    batch = tiny.batch(c, rows=3)
    with jax.set_mesh(mesh1):
        ours = logits_of(model, batch)
    for index in range(3):
        row = {name: values[index] for name, values in batch.items()}
        theirs = literal(model, row, c)
        assert theirs.std() > 0.3
        np.testing.assert_allclose(ours[index, 1 : row["length"]], theirs, atol=3e-4)


def test_the_compressors_numbers_that_anyone_can_make_again(mesh1):
    shapes = {
        "pos_embed": (4, 8), "query": (4, 8), "attn.in_proj_weight": (24, 8),
        "attn.in_proj_bias": (24,), "attn.out_proj.weight": (8, 8), "attn.out_proj.bias": (8,),
        "ln_q.weight": (8,), "ln_q.bias": (8,), "ln_kv.weight": (8,), "ln_kv.bias": (8,),
    }  # fmt: skip
    tensors = {name: filled(t, name, of) for t, (name, of) in enumerate(shapes.items())}
    tensors["pos_embed"] = positions.sines(2, 8)
    x = np.sqrt(3) * numbers(128, 3003).reshape(16, 8)
    theirs = literal_compressors.llava_mini(tensors, x, heads=2)
    method = LlavaMiniMethod(tokens=4, heads=2, prefusion=0)
    with jax.set_mesh(mesh1):
        module = method.build(Interface(4, 8, 1, 8), rngs=nnx.Rngs(0))
        others = {name: np.zeros(of) for name, of in tiny.tensor_shapes(module).items()}
        module = tiny.filled(module, others | tensors)
        ours = jax.jit(lambda m, x: m.compress(x))(module, tiny.placed(x[None].astype("f4")))[0]
    np.testing.assert_allclose(ours, theirs, atol=1e-5)
    first = [0.119542, -0.700111, -0.231464, -0.759002, -0.44975, -0.535706, -0.268566, 0.180532]
    last = [-0.774172, 0.442352, 1.340664, -0.460732, 0.545784, -0.69795, 0.255071, 0.889219]
    np.testing.assert_allclose(ours[0], first, atol=1e-5)
    np.testing.assert_allclose(ours[3], last, atol=1e-5)
    np.testing.assert_allclose(ours[1, :4], [-0.48041, 0.195025, 0.87831, -0.38607], atol=1e-5)
    # Of one query the patches may come in any order.
    with jax.set_mesh(mesh1):
        one = LlavaMiniMethod(tokens=1, heads=2, prefusion=0).build(
            Interface(4, 8, 1, 8), rngs=nnx.Rngs(0)
        )
        mixed = [x, x[np.random.default_rng(0).permutation(16)]]
        both = [one.compress(tiny.placed(part[None].astype("f4"))) for part in mixed]
    np.testing.assert_allclose(*both, atol=1e-6)


def test_visual_tokens_do_not_depend_on_the_question_and_text_does_on_the_image(model, mesh1):
    c = config()
    one, other = tiny.batch(c), tiny.batch(c)
    other["ids"] = np.random.default_rng(9).integers(0, 256, one["ids"].shape).astype(np.int32)
    with jax.set_mesh(mesh1):
        fused = jax.jit(lambda m, b: m.fused(b, m.llm.embed(b["ids"])))
        visual, text = fused(model, tiny.placed(one))
        same, _ = fused(model, tiny.placed(other))
        np.testing.assert_allclose(visual.tokens, same.tokens, atol=1e-6)
        assert visual.count.tolist() == [0] + [4] * 7
        raw = np.asarray(model.llm.embed(tiny.placed(one["ids"])))
    changed = np.abs(np.asarray(text) - raw).max(-1) > 1e-3
    place = np.arange(one["ids"].shape[1])
    read = (place < one["length"][:, None]) & ~one["loss_mask"]
    read[0] = False  # without an image
    np.testing.assert_array_equal(changed, read)


def test_a_step_trains_the_layers_before_the_llm(model, mesh1):
    with jax.set_mesh(mesh1):
        batch = tiny.placed(tiny.batch(config()))
        grads = jax.jit(jax.grad(lambda m, b: next_token(m, b).nll))(model, batch)
    norms = {names.dotted(path): float(np.abs(x).max())
             for path, x in jax.tree_util.tree_flatten_with_path(grads.compressor)[0]}  # fmt: skip
    # The table is frozen, and the bias of the keys adds the same to all scores of a query.
    assert {name for name, size in norms.items() if size == 0} == {
        "position", "attention.key.bias"
    }  # fmt: skip
    assert any(name.startswith("fusion.") for name in norms)


def test_a_request_gets_the_same_tokens_in_any_company_and_those_of_training(
    trained, tmp_path, mesh1, mesh8
):
    draw = np.random.default_rng(0)
    images = [draw.integers(0, 256, (32, 32, 3)).astype(np.uint8) for _ in range(2)]
    path = made(tmp_path / "m", trained, compressor=MINI)
    one, many = (vlm_jax.VLM.from_checkpoint(path, mesh=mesh) for mesh in (mesh1, mesh8))
    assert one.prefix == []  # the text has read the image
    pictures, prompts = [*images, None], PROMPTS[:3]
    together, spread = (m.generate(pictures, prompts, max_new_tokens=4) for m in (one, many))
    with jax.set_mesh(mesh1):
        model, logits = tiny.model_of(path), jax.jit(lambda m, b: m.logits(b))
        for image, prompt, a, b in zip(pictures, prompts, together, spread, strict=True):
            assert a.ids == b.ids == one.generate([image], [prompt], max_new_tokens=4)[0].ids
            request = one.request(image, prompt)
            ids = np.zeros((1, 32), np.int32)
            length = len(request.ids)
            ids[0, : length + 4] = [*request.ids, *a.ids]
            place = np.arange(32)[None]
            batch = dict(
                ids=ids,
                length=np.array([length + 4], np.int32),
                loss_mask=(place >= length) & (place < length + 4),
                image_at=np.array([request.image_at if request.places else 32], np.int32),
                pixels=np.stack(request.pixels or [np.zeros((32, 32, 3), np.float32)]),
            )
            scores = np.asarray(logits(model, tiny.placed(batch)))[0, length : length + 4]
            assert scores.argmax(1).tolist() == a.ids
    with pytest.raises(ValueError, match="one image"):
        one.generate([images], ["which?"])


def test_tensors_have_published_names(model):
    table = names.compressor_table(model.compressor)
    for name in ("pos_embed", "query", "attn.in_proj_weight", "ln_kv.bias", "0.weight",
                 "prefusion_layers.1.self_attn.q_proj.weight"):  # fmt: skip
        assert name in table
    for published, ours in {
        "model.prefusion_layers.0.mlp.up_proj.weight": "prefusion_layers.0.mlp.up_proj.weight",
        "model.compressor.query": "query",
        "model.mm_projector.2.bias": "2.bias",
    }.items():
        assert names.canonical(published) == f"compressor.{ours}"


def test_what_it_costs_at_7b_and_by_the_compilers_count(mesh1):
    mini = compressor("llava_mini", 1)
    assert mini.prefusion == 4
    request = cost.request_flops(CLIP, mini, VICUNA, Q=60, G=1)
    before = cost.fusion_flops(mini, CLIP, VICUNA, 0)
    # Published sizes: 934 GFLOP for 577 tokens of image without attention, 1.62 for each of text.
    attention = cost.llm_flops(dataclasses.replace(VICUNA, depth=4), 0, cached=0, logits=0)
    assert attention == 0 and before / 1e9 == pytest.approx(934 + 21.8, abs=1)
    assert request.compressor > before > 8 * cost.llm_flops(VICUNA, 1)
    with pytest.raises(ValueError, match="cached_text=True: the text of compressor 'llava_mini'"):
        cost.request_flops(CLIP, mini, VICUNA, Q=60, G=1, cached_text=True)
    llm = LLMSize.of(WIDE_LLM)
    one = LlavaMiniMethod(tokens=4, heads=8, prefusion=1)
    with jax.set_mesh(mesh1):
        between = Interface(8, 1024, 1, llm.width)
        module = jax.eval_shape(lambda: one.build(
            between, rngs=nnx.Rngs(0), fusion=Prefusion(llm, 1, rngs=nnx.Rngs(0))))  # fmt: skip
        got = flops(
            lambda m, *given: m.fuse(*given), module, shape(1, 64, 1024), shape(1, 24, llm.width),
            shape(1, 24, dims=("batch", "len"), dtype=bool),
        )  # fmt: skip
    vit = dataclasses.replace(CLIP, image_size=112, patch_size=14)
    counted = cost.compressor_flops(one, vit, llm) + cost.fusion_flops(one, vit, llm, 24)
    assert got == pytest.approx(counted, rel=0.01)
    with jax.set_mesh(mesh1):
        size = tiny.size(config())
        shapes = vlm.shapes(size)
    assert vlm.parameters(shapes.compressor) == cost.compressor_parameters(
        size.compressor, size.vit, size.llm
    )


def test_a_published_model_is_recognized_by_its_tensors(tmp_path, capsys, mesh1):
    width, depth, draw = 24, 2, np.random.default_rng(0)
    fields, tensors = whole_models.llm(width)
    fresh = {
        name.replace("model.layers.0.", f"model.prefusion_layers.{k}."): draw.normal(size=x.shape)
        for name, x in tensors.items()
        if name.startswith("model.layers.0.")
        for k in range(depth)
    }
    shapes = {
        "pos_embed": (4, 16), "query": (4, 16), "attn.in_proj_weight": (48, 16),
        "attn.in_proj_bias": (48,), "attn.out_proj.weight": (16, 16), "attn.out_proj.bias": (16,),
        "ln_q.weight": (16,), "ln_q.bias": (16,), "ln_kv.weight": (16,), "ln_kv.bias": (16,),
    }  # fmt: skip
    fresh |= {f"model.compressor.{name}": draw.normal(size=of) for name, of in shapes.items()}
    for layer, inner in ((0, 16), (2, width)):
        fresh[f"model.mm_projector.{layer}.weight"] = draw.normal(size=(width, inner))
        fresh[f"model.mm_projector.{layer}.bias"] = draw.normal(size=width)
    whole_models.tower(tmp_path / "tower", width=16, side=6, blocks=3)
    fields |= whole_models.FLAT | dict(mm_hidden_size=16)
    whole_models.save(tmp_path / "model", fields, tensors | fresh)
    given = ["--from", str(tmp_path / "model"), "--vision", str(tmp_path / "tower")]
    assert main(["convert", *given, f"--to={tmp_path}/a"]) == 0
    made = folder.read(tmp_path / "a")
    section = dict(kind="llava_mini", tokens=4, heads=8, prefusion=2)
    assert {name: made.compressor[name] for name in section} == section
    with jax.set_mesh(mesh1):
        fusion = tiny.model_of(tmp_path / "a").compressor.fusion
    ours = np.asarray(fusion.blocks.down.kernel[...])
    theirs = fresh["model.prefusion_layers.1.mlp.down_proj.weight"].T
    np.testing.assert_allclose(ours[1], theirs, atol=1e-6)
