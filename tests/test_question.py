# SPDX-License-Identifier: Apache-2.0
"""A question read once is a question read as ever: two passes of the LLM against one over it all.

T = 32 text tokens, of which U = 12 may stand before the image.
"""

import jax
import jax.numpy as jnp
import literal_models
import numpy as np
import pytest
import tiny
from flax import nnx

from vlm_jax import mesh
from vlm_jax.compressors.projector import MLP
from vlm_jax.cost import flops as cost
from vlm_jax.data import sources
from vlm_jax.data.processor import Processor, RowFormat
from vlm_jax.data.sources import Origin
from vlm_jax.layers import rows
from vlm_jax.models import splice, vlm
from vlm_jax.models.question import feature
from vlm_jax.models.sizes import LLMSize
from vlm_jax.serving.predict import predict
from vlm_jax.training import stages
from vlm_jax.training.objective import score
from vlm_jax.weights import folder

U = 12


def config(query="prefix", **changes):
    reader = dict(kind="quecc", tokens=4, query=query)
    return tiny.config(compressor=reader, data=dict(question_length=U), **changes)


def batch_of(c):
    """A random batch in which at most U tokens stand before the image and T - U behind it.

    Row 0 has no image and ends in the first pass, row 1 has none and ends in the second; nothing
    follows the image of row 2, and rows 3 and 4 fill the room behind and before it.
    """
    made, draw, text = tiny.batch(c), np.random.default_rng(0), c.data.text_length
    at, behind = draw.integers(1, U + 1, 8), draw.integers(0, text - U + 1, 8)
    at[:2], behind[:5], at[3:5] = text, (0, 0, 0, text - U, text - U), (1, U)
    length = np.minimum(at + behind, text)
    length[:2] = U - 3, text - 1
    place = np.arange(text)
    made |= dict(
        image_at=at,
        length=length,
        loss_mask=made["loss_mask"] & (place < length[:, None]),
        question=made["ids"][:, :U],
        question_length=np.minimum(np.minimum(at, length), U),
    )
    return {k: v.astype(np.int32) if v.dtype == np.int64 else v for k, v in made.items()}


def born(c, mesh):
    with jax.set_mesh(mesh):
        return tiny.roughened(tiny.created(c), scale=0.2)


def one_pass(model, batch):
    """Scores by an ordinary causal pass over the spliced rows, given the same visual tokens."""
    text = model.llm.embed(batch["ids"])
    asked = feature(model.llm(text), batch["question_length"])
    visual = model.visual_tokens(batch, asked)
    x, _, _ = splice.splice(text, visual, batch)
    before = model.before(batch, vlm.Assembled(x, visual.count))
    return model.llm.logits(rows(model.llm(x), before))


@pytest.mark.parametrize(
    "devices, remat", [pytest.param(1, "full", marks=pytest.mark.slow), (8, "none")]
)
def test_two_passes_are_one_in_values_and_gradients(devices, remat, request):
    c = config(remat=remat)
    batch, here = batch_of(c), request.getfixturevalue(f"mesh{devices}")
    model = born(c, here)
    seen = np.arange(c.data.text_length) < batch["length"][:, None]

    def value(road):
        def of(model, batch):
            logits = road(model, batch)
            return score(logits, batch["ids"], batch["loss_mask"]).nll, logits

        return jax.jit(jax.value_and_grad(of, has_aux=True))

    with jax.set_mesh(here):
        placed = tiny.placed(batch)
        (ours, a), by_ours = value(lambda m, b: m.logits(b))(model, placed)
        (theirs, b), by_theirs = value(one_pass)(model, placed)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-5)
    np.testing.assert_allclose(np.asarray(a)[seen], np.asarray(b)[seen], atol=2e-5)
    leaves = zip(*map(jax.tree_util.tree_leaves_with_path, (by_ours, by_theirs)), strict=True)
    for (path, x), (_, y) in leaves:
        scale = max(1.0, float(jnp.abs(y).max()))
        np.testing.assert_allclose(x / scale, y / scale, atol=2e-5, err_msg=str(path))
    # The image has a say, and the question in what the image shows.
    for part in (by_ours.compressor.text, by_ours.compressor.keys_values.up):
        assert float(jnp.abs(part.kernel[...]).max()) > 1e-3


def test_every_row_equals_the_literal_model(mesh1):
    c = config()
    batch, model = batch_of(c), born(c, mesh1)
    with jax.set_mesh(mesh1):
        ours = np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))
    for index in range(5):
        row = {name: values[index] for name, values in batch.items()}
        theirs = literal_models.vlm(model, row, c)
        assert theirs.std() > 0.5
        np.testing.assert_allclose(ours[index, 1 : row["length"]], theirs, atol=3e-4)


@pytest.mark.parametrize("devices", [1, 8])
def test_decoding_goes_on_behind_both_passes(devices, request):
    c, new = config(), 3
    here = request.getfixturevalue(f"mesh{devices}")
    batch, model, every = batch_of(c), born(c, here), np.arange(8)
    # Prompts end before, in and behind the room of the first pass; one has nothing but its image.
    start = batch["length"].copy()
    start[[0, 1, 3, 4]] -= new
    going_on = np.flatnonzero(start + new <= batch["length"])
    place = np.arange(c.data.text_length)
    # What stands behind the prompt is padding to the model: it must not matter.
    ids = np.where(place < start[:, None], batch["ids"], 7).astype(np.int32)
    prompt = dict(batch, length=start, ids=ids)
    del prompt["loss_mask"]
    with jax.set_mesh(here):
        whole = np.asarray(jax.jit(lambda m, b: m.logits(b))(model, tiny.placed(batch)))
        prefill = jax.jit(lambda m, b: m.prefill(b, new_tokens=new))
        decode = jax.jit(lambda m, *x: m.decode(*x), donate_argnums=2)
        logits, caches, position = prefill(model, tiny.placed(prompt))
        np.testing.assert_array_equal(position, start + 4 * (batch["image_at"] < 32))
        for step in range(new):
            expected = whole[going_on, start[going_on] + step]
            np.testing.assert_allclose(np.asarray(logits)[going_on], expected, atol=1e-4)
            after = batch["ids"][every, np.minimum(start + step, 31)]
            logits, caches = decode(model, tiny.placed(after), caches, position)
            position = position + 1
        assert decode._cache_size() == 1


def test_the_prompt_costs_no_second_reading(mesh1):
    # Counted by the compiler, one layer deep, as it counts the body of a scan once.
    flops = {}
    for query in ("none", "prefix", "separate"):
        c = config(query, llm=dict(depth=1, width=64, mlp=128, kv_heads=4, head_size=16))
        with jax.set_mesh(mesh1):
            shapes, batch = vlm.shapes(tiny.size(c)), tiny.placed(batch_of(c))
            lowered = jax.jit(lambda m, b: m.logits(b)).lower(shapes, batch)
            flops[query] = lowered.cost_analysis()["flops"]
    llm, examples = LLMSize.of(c.llm), 8
    # The feature into the queries, and the pass that the prompt makes unnecessary.
    projected = examples * 2 * (c.llm.width * c.vit.width + c.vit.width**2)
    again = examples * cost.llm_flops(llm, U, logits=0)
    assert flops["separate"] - flops["none"] > 0.97 * (again + projected) > 0.2 * flops["none"]
    # Tokens before the image do not ask those behind it: a little less attention.
    assert 0.97 * flops["none"] < flops["prefix"] < 1.005 * (flops["none"] + projected)


@pytest.mark.slow
def test_a_model_with_a_prefix_trains_and_answers(tmp_path, mesh8, caplog):
    c = tiny.config(
        compressor=dict(kind="quecc", tokens=4, query="prefix"),
        data=dict(template="question_first", question_length=24, text_length=30),
        align=dict(steps=0),
        finetune=dict(steps=2),
        llm=dict(depth=1),
    )
    train, test = (sources.open_source(Origin.of(c), split) for split in ("train", "test"))
    with jax.set_mesh(mesh8):
        processor = Processor(stages.tokenizer_of("", c.llm.vocab, None, train), RowFormat.of(c))
        model = stages.train(tiny.recipe(c), tmp_path, stages.Inputs(train, processor))
        found = list(predict(c, model, test, processor))
    assert len(found) == len(test) and {f["answer"] for f in found} > {"yes", "no"}
    # Captions are longer than what this configuration leaves behind the image.
    assert "data.question_length=24 allow, and were truncated" in caplog.text
    assert all(np.isfinite(loss) for _, loss, _ in tiny.losses(tmp_path / "finetune"))


# --- What reads the question ----------------------------------------------------------------------


def test_a_vector_shared_by_all_positions_is_multiplied_once(mesh1):
    draw = np.random.default_rng(0)
    x, shared = draw.normal(size=(3, 5, 8)), draw.normal(size=(3, 8))
    with jax.set_mesh(mesh1):
        mlp = tiny.roughened(MLP(8, 6, 4, rngs=nnx.Rngs(0)))
        x, shared = (tiny.placed(a.astype("f4")) for a in (x, shared))
        roads = [lambda m, x, s: m(x, s), lambda m, x, s: m(x + s[:, None])]
        found = [
            jax.jit(jax.value_and_grad(lambda *a, r=road: jnp.sin(r(*a)).sum(), (0, 1, 2)))
            for road in roads
        ]
        ours, theirs = (f(mlp, x, shared) for f in found)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), ours, theirs)
        np.testing.assert_allclose(mlp(x, shared), mlp(x + shared[:, None]), atol=1e-5)


def quecc(tokens=4, **options):
    sizes = dict(tokens=tokens, side=4, width=8, levels=2, llm_width=6, heads=2, query="none")
    return tiny.compressor("quecc", **(sizes | options))


def test_pooling_is_the_convolution_with_equal_taps(mesh1):
    levels = np.random.default_rng(0).normal(size=(2, 16, 16)).astype("f4")
    with jax.set_mesh(mesh1):
        conv = quecc()
        tensors = folder.compressor_tensors(conv)
        pool = quecc(downsample="pool")
        taps = {name for name in tensors if "q_downsample" in name}
        assert tensors.keys() - folder.compressor_tensors(pool).keys() == taps and len(taps) == 2
        with pytest.raises(ValueError, match="surplus: 0.q_downsample.weight"):
            tiny.filled(pool, tensors)
        pool = tiny.filled(pool, {k: v for k, v in tensors.items() if k not in taps})
        equal = {name: np.full_like(tensors[name], 0.25 * ("weight" in name)) for name in taps}
        conv = tiny.filled(conv, tensors | equal)
        levels = jax.device_put(levels, mesh.spec("batch"))
        np.testing.assert_allclose(pool(levels), conv(levels), atol=1e-6)


@pytest.mark.parametrize("change, words", [
    (dict(downsample="max"), r"compressor.downsample='max': choose one of \['conv', 'pool'\]"),
    (dict(query="last"), r"compressor.query='last': choose one of \['none', 'separate', 'prefix'"),
])  # fmt: skip
def test_unknown_choices_are_refused(change, words, mesh1):
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=words):
        vlm.shapes(tiny.size(tiny.config(compressor=dict(kind="quecc") | change)))


def test_a_pool_has_no_kernel(mesh1):
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="kernel=2 and stride=None"):
        quecc(downsample="pool", kernel=2)
