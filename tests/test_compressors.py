# SPDX-License-Identifier: Apache-2.0
"""The compressors against literal raster-order ones, published values, and their own promises.

More than 400 lines, because every part measures with the same few helpers.
"""

import doctest
import math

import jax
import jax.numpy as jnp
import literal_compressors
import literal_prumerge
import literal_selection
import numpy as np
import pytest
import tiny
from made_numbers import filled, numbers

from vlm_jax import mesh
from vlm_jax.compressors import COMPRESSORS, projector
from vlm_jax.compressors.compressor import Question
from vlm_jax.compressors.fwd2bot.module import Fwd2Bot
from vlm_jax.compressors.llava_mini.module import LlavaMini
from vlm_jax.compressors.m3.module import M3
from vlm_jax.compressors.mqt import module as mqt
from vlm_jax.compressors.mqt.module import MQT
from vlm_jax.compressors.pixel_unshuffle.module import PixelUnshuffle
from vlm_jax.compressors.quecc import module as quecc
from vlm_jax.compressors.quecc.module import QueCC
from vlm_jax.compressors.selection import Selection
from vlm_jax.compressors.selector import AnyTokens
from vlm_jax.compressors.token_packer.module import TokenPacker
from vlm_jax.compressors.voco.module import Voco
from vlm_jax.compressors.window import window_order
from vlm_jax.weights import folder

GATE = 1e-4  # absolute, on activations of order one, in float32


def exact(tensors):
    """Published names and weights in float64."""
    return {k: np.asarray(v, np.float64) for k, v in tensors.items()}


def literal(module, levels, question, *, width, heads, tensors=None):
    """What the literal compressor with the weights of `module`, or others, makes of one image."""
    tensors = tensors or exact(folder.compressor_tensors(module))
    if isinstance(module, QueCC):
        question = question if module.reads_question else None
        return literal_compressors.quecc(tensors, levels, question, width=width, heads=heads,
                                         kernel=module.kernel, stride=module.stride)  # fmt: skip
    if isinstance(module, TokenPacker):
        return literal_compressors.token_packer(tensors, levels, width=width, heads=heads,
                                                tokens=module.tokens)  # fmt: skip
    if isinstance(module, MQT):
        return literal_compressors.mqt(tensors, levels, width=width, heads=heads,
                                       tokens=module.tokens)  # fmt: skip
    if isinstance(module, LlavaMini):
        tokens = literal_compressors.llava_mini(tensors, levels[:, -width:], heads=heads)
        return literal_compressors.mlp(tensors, "0", "2", tokens)
    if isinstance(module, Fwd2Bot):  # what the LLM's first pass reads
        patches = literal_compressors.projected(tensors, levels, width=width)
        return np.concatenate([patches, tensors["summary"]])
    if isinstance(module, Voco):
        patches = literal_compressors.projected(tensors, levels, width=width)
        return np.concatenate([patches, np.tile(tensors["voco"], (module.method.tokens, 1))])
    if isinstance(module, AnyTokens):
        return literal_selection.compress(module.method, tensors, levels, question, width=width)
    if isinstance(module, PixelUnshuffle):
        rows = literal_selection.unshuffled(levels[:, -width:], module.window)
        rows = literal_selection.norm(tensors, "mlp1.0", rows)
        return literal_compressors.mlp(tensors, "mlp1.1", "mlp1.3", rows)
    if module.reads == "keys":
        tokens = 0 if module.adaptive else module.tokens
        merged = literal_prumerge.of_levels(levels, module.method.kind, tokens, width)
        return literal_compressors.mlp(tensors, "0", "2", merged)
    plain = literal_compressors.m3 if isinstance(module, M3) else literal_compressors.pool
    return plain(tensors, levels, width=width, tokens=module.tokens)


def roughened(module, seed=0):
    """`module` with order-one weights everywhere: biases and norms must not hide behind 0 and 1."""
    draw = np.random.default_rng(seed)
    return tiny.filled(module, {
        name: draw.normal(1.0 if "weight" in name and len(shape) == 1 else 0.0,
                          0.3 if len(shape) == 1 else math.prod(shape[1:]) ** -0.5, shape)
        for name, shape in tiny.tensor_shapes(module).items()
    })  # fmt: skip


def sizes(
    kind="quecc", tokens=4, side=12, width=16, levels=2, llm_width=24, heads=4, query="separate"
):
    return dict(
        kind=kind,
        tokens={"none": side**2, "prumerge_plus": tokens + 1}.get(kind, tokens),
        side=side,
        width=width,
        levels=levels,
        llm_width=llm_width,
        heads=heads,
        query=query,
    )


def inputs(of, batch=2, seed=1):
    """What the encoder gives in raster order and question features, float32."""
    draw, kind = np.random.default_rng(seed), COMPRESSORS[of["kind"]]
    patches = of["tokens"] if of["kind"] == "downsample" else of["side"] ** 2
    rows = patches + (kind.reads == "own_keys")
    channels = (of["levels"] + (kind.reads in ("keys", "own_keys"))) * of["width"]
    levels = draw.normal(size=(batch, rows, channels))
    if kind.reads.startswith("image"):
        numbers = np.repeat(draw.integers(1, 2**16, (batch, 1, 2)), rows, axis=1)
        if kind.reads == "image_size":
            numbers[..., 1] = numbers[..., 0]
        levels = np.concatenate([levels, numbers], axis=-1)
    elif kind.reads:
        attention = np.exp(draw.normal(size=(batch, rows, 1)))
        attention /= 1 + attention.sum(1, keepdims=True)
        levels = np.concatenate([levels, attention], axis=-1)
    question = draw.normal(size=(batch, of["llm_width"])).astype("f4")
    if kind.query == "words":
        question = Question(
            draw.normal(size=(batch, 3, of["llm_width"])).astype("f4"), full(3, batch)
        )
    if kind.query == "clip":
        question = Question(draw.integers(0, 16, (batch, 5)), full(5, batch))
    return levels.astype("f4"), question


def full(length, batch):
    return np.full(batch, length, np.int32)


def placed(x, *dims, dtype=jnp.float32):
    return jax.device_put(jnp.asarray(x, dtype), mesh.spec(*dims))


def apply(module, of, levels, question, *, dtype=jnp.float32, run=lambda m, *x: m(*x)):
    """The module on raster levels, compiled: the caller's part, the patch order, done for it."""
    order = window_order(math.isqrt(levels.shape[1]), module.window)
    levels = levels if module.window == 1 else levels[:, order]
    levels = placed(levels, "batch", "len", "feature", dtype=dtype)
    if isinstance(question, Question):
        question = jax.tree.map(lambda x: placed(x, "batch", dtype=x.dtype), question)
    else:
        question = placed(question, "batch", "feature", dtype=dtype)
    # A function of its own: no trace of an earlier call is reused.
    return jax.jit(lambda *x: run(*x))(module, levels, question)


def difference(module, of, levels, question):
    ours = np.asarray(apply(module, of, levels, question))
    theirs = [
        literal(module, x.astype("f8"), q.astype("f8"), width=of["width"], heads=of["heads"])
        for x, q in zip(levels, getattr(question, "tokens", question), strict=True)
    ]
    assert np.std(theirs) > 0.1
    return np.abs(ours - np.stack(theirs)).max()


# --- Two roads to one output ----------------------------------------------------------------------


@pytest.mark.parametrize("of", [
    sizes("none"),
    sizes("pool", tokens=1), sizes("pool", tokens=9), sizes("pool", tokens=144),
    sizes("quecc", tokens=1, side=24), sizes("quecc", tokens=16), sizes("quecc", tokens=144),
    sizes("quecc", tokens=36, side=24, width=12, heads=3, levels=4),
    sizes("quecc", tokens=1, side=7, width=10, heads=1), sizes("quecc", tokens=9, query="none"),
    sizes("token_packer", tokens=1, side=24), sizes("token_packer", tokens=144),
    sizes("token_packer", tokens=9), sizes("token_packer", tokens=16),
    sizes("token_packer", tokens=36, side=24, width=12, heads=3, levels=4),
    sizes("token_packer", tokens=1, side=7, width=10, heads=1),
    sizes("downsample", tokens=9), sizes("prumerge", tokens=1), sizes("prumerge", tokens=144),
    sizes("prumerge", tokens=19), sizes("prumerge", tokens=9, side=5), sizes("prumerge_plus"),
    sizes("prumerge_plus", tokens=36), sizes("prumerge_plus", tokens=24, side=5),
    sizes("m3", tokens=1), sizes("m3", tokens=9), sizes("m3", tokens=144),
    sizes("m3", tokens=9, side=24, levels=4), sizes("m3", tokens=49, side=7, width=10),
    sizes("mqt", tokens=1), sizes("mqt", tokens=2), sizes("mqt", tokens=144),
    sizes("mqt", tokens=7, side=24, width=12, heads=3, levels=4),
    sizes("mqt", tokens=256, side=24, width=12, heads=1), sizes("mqt", tokens=33, side=7, heads=8),
    sizes("pixel_unshuffle", tokens=9), sizes("pixel_unshuffle", tokens=144),
    sizes("visionzip", tokens=1), sizes("visionzip", tokens=20), sizes("vispruner", tokens=7),
    sizes("divprune", tokens=9), sizes("cdpruner", tokens=9, side=5), sizes("mmtok", tokens=9),
    sizes("random", tokens=11), sizes("uniform", tokens=36), sizes("divprune", tokens=144),
], ids=lambda of: f"{of['kind']}-{of['tokens']}-of-{of['side']}x{of['side']}")  # fmt: skip
def test_window_major_equals_the_literal_raster_form(of, mesh1):
    with jax.set_mesh(mesh1):
        module = roughened(jax.eval_shape(lambda: tiny.compressor(**of)))
        assert difference(module, of, *inputs(of)) < 1e-5


@pytest.mark.parametrize("of", [
    sizes("none", side=4), sizes("pool", side=6), sizes("quecc", side=6, tokens=9),
    sizes("quecc", side=4, tokens=16), sizes("token_packer", side=6, tokens=9),
    sizes("token_packer", side=4, tokens=16), sizes("downsample", side=6), sizes("m3", side=6),
    sizes("mqt", side=6, tokens=5), sizes("mqt", side=4, tokens=16), sizes("prumerge", side=6),
    sizes("prumerge_plus", side=6),
], ids=lambda of: f"{of['kind']}-{of['tokens']}-of-{of['side']}x{of['side']}")  # fmt: skip
def test_gradients_are_the_slopes_of_the_literal_raster_form(of, mesh1):
    # Of every weight and of what the encoder gives, along a random direction in each.
    levels, question = inputs(of, batch=1)
    draw = np.random.default_rng(3)
    with jax.set_mesh(mesh1):
        module = roughened(jax.eval_shape(lambda: tiny.compressor(**of)))
        toward = draw.normal(size=apply(module, of, levels, question).shape)

        def loss(module, levels, question):
            return (module(levels, question) * placed(toward, "batch")).sum()

        gradients, *of_inputs = apply(
            module, of, levels, question, run=jax.grad(loss, argnums=(0, 1))
        )
        gradients = exact(folder.compressor_tensors(gradients))
    order = window_order(math.isqrt(levels.shape[1]), module.window)
    gradients["levels"] = np.zeros(levels[0].shape)
    gradients["levels"][order] = of_inputs[0][0]
    at = exact(folder.compressor_tensors(module) | {"levels": levels[0]})

    def value(tensors):
        made = literal(module, tensors.pop("levels"), question[0].astype("f8"),
                       width=of["width"], heads=of["heads"], tensors=tensors)  # fmt: skip
        return (made * toward).sum()

    step, scale = 1e-6, np.linalg.norm(gradients["levels"])
    for name, gradient in gradients.items():
        along = draw.normal(size=gradient.shape)
        along /= np.linalg.norm(along)
        ends = [value(at | {name: at[name] + sign * step * along}) for sign in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert abs(slope - (gradient * along).sum()) < 1e-5 * max(scale, 1), name


@pytest.mark.parametrize("kernel, stride, tokens", [(3, 4, 36), (9, 4, 16), (5, 5, 16), (1, 6, 16)])
def test_a_convolution_that_does_not_match_the_windows(kernel, stride, tokens, mesh1):
    of = sizes(tokens=tokens, side=24)
    with jax.set_mesh(mesh1):
        module = roughened(
            jax.eval_shape(lambda: tiny.compressor(**of, kernel=kernel, stride=stride))
        )
        assert difference(module, of, *inputs(of, batch=1)) < 1e-5


# --- Values published for the full width ----------------------------------------------------------


def test_the_deterministic_numbers():
    expected = [0.76662162, -0.13694401, -0.94713246, 0.94176396]
    np.testing.assert_allclose(numbers(4, 0), expected, atol=1e-8)


# tokens -> mean, standard deviation, first four and last three numbers, computed in float64 by the
# published modules; QueCC's are before the projector MLP.
GOLDEN = {
    "quecc": {
        36: [0.021415958, 0.550252734, 0.8306008, 0.8313736, -0.1996199, -0.5478329,
             -0.5049845, 0.3517074, 0.4177524],
        4: [0.021925349, 0.464020630, 1.0697215, 0.7038897, -0.4997801, 0.2667523,
            -0.5302417, 0.3629868, 0.4774873],
    },
    "token_packer": {
        144: [-0.015210165, 0.441707637, -0.2150970, 0.5193303, 0.3861266, -0.0530688,
              -0.1886038, 0.4708867, 0.0003553],
        36: [-0.014556317, 0.328111016, -0.1650343, 0.2305767, 0.1802808, 0.1188005,
             -0.7824082, 0.3801037, 0.0769414],
    },
    "mqt": {
        256: [0.000037617, 0.054947144, -0.0631830, 0.0377031, 0.0492476, 0.0941810,
              -0.0204217, 0.0479509, 0.0476015],
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", GOLDEN)
def test_values_at_the_published_width(kind, mesh1):
    run = {
        "quecc": lambda m, x, question: m.compress(x[..., -1024:], x, question),
        "token_packer": lambda m, x, question: m(x),
        "mqt": lambda m, x, question: m(x),
    }[kind]
    levels = math.sqrt(3) * numbers(576 * 4096, 1000).reshape(1, 576, 4096)
    question = math.sqrt(3) * numbers(4096, 1002).reshape(1, 4096)
    kept = {}
    for tokens, golden in GOLDEN[kind].items():
        of = sizes(kind, tokens, side=24, width=1024, levels=4, llm_width=4096,
                   heads=16 if kind == "mqt" else 8)  # fmt: skip
        with jax.set_mesh(mesh1):
            module = jax.eval_shape(lambda of=of: tiny.compressor(**of))
            for t, (name, shape) in enumerate(tiny.tensor_shapes(module).items()):
                if kind == "quecc" and name.startswith(("1.", "3.")):
                    kept[name] = np.zeros(shape, np.float32)
                elif name == "pos_embed":
                    kept[name] = mqt.sines(16, 1024)
                elif name not in kept or kept[name].shape != shape:
                    kept[name] = filled(t, name, shape)
            module = tiny.filled(module, kept)
            out = np.asarray(apply(module, of, levels, question, run=run))[0]
        got = np.array([out.mean(), out.std(), *out[0, :4], *out[-1, -3:]])
        print(f"{kind} {tokens}: largest error {np.abs(got - golden).max():.1e}")
        np.testing.assert_allclose(got, golden, atol=1e-5)


# Millions at llm width 4096 on a 24x24 grid, from the published modules.
@pytest.mark.parametrize("kind, tokens, millions", [
    ("none", 576, 20.979712), ("pool", 36, 20.979712), ("token_packer", 36, 36.722688),
    ("quecc", 1, 42.56), ("quecc", 4, 42.12), ("quecc", 16, 42.01), ("quecc", 36, 41.99),
    ("quecc", 144, 41.98), ("m3", 9, 20.979712), ("downsample", 9, 20.979712),
    ("prumerge", 36, 20.979712), ("mqt", 36, 8.923136),
])  # fmt: skip
def test_parameters_equal_the_published_count(kind, tokens, millions, mesh1):
    of = sizes(kind, tokens, side=24, width=1024, levels=4, llm_width=4096, heads=8)
    with jax.set_mesh(mesh1):
        module = jax.eval_shape(lambda: tiny.compressor(**of))
    count = sum(leaf.size for leaf in jax.tree.leaves(module))
    digits = len(str(millions).split(".")[1])
    assert round(count / 1e6, digits) == millions


@pytest.mark.parametrize("query", ["none", "separate"])
@pytest.mark.parametrize("kind", COMPRESSORS)
def test_parameters_equal_the_closed_form(kind, query, mesh1):
    of = sizes(kind, query=query)
    with jax.set_mesh(mesh1):
        module = jax.eval_shape(lambda: tiny.compressor(**of))
    count = sum(leaf.size for leaf in jax.tree.leaves(module))
    assert count == module.method.parameters(module.interface)


# --- The comparison sees what it must -------------------------------------------------------------


def test_another_epsilon_of_the_norms_is_caught(mesh1, monkeypatch):
    of = sizes()
    levels, question = inputs(of)
    # Small inputs and no biases: variances near the epsilon, as flat image regions give.
    with jax.set_mesh(mesh1):
        errors = []
        for eps in (1e-6, 1e-5):
            monkeypatch.setattr(quecc, "EPS", eps)
            module = jax.eval_shape(lambda: tiny.compressor(**of))
            weights = folder.compressor_tensors(roughened(module))
            weights["0.v_proj.2.weight"] *= 1e-3
            weights["0.v_proj.2.bias"] *= 0
            errors.append(difference(tiny.filled(module, weights), of, levels, question))
    assert errors[0] < 1e-5 and errors[1] > 10 * GATE


@pytest.mark.parametrize("kind", [kind for kind in COMPRESSORS if kind != "mqt"])  # MQT has none
def test_the_tanh_form_of_gelu_is_caught(kind, mesh1, monkeypatch):
    # CDPruner's kernel has the rank of the LLM's width here.
    of = sizes(kind, tokens=16 if kind == "cdpruner" else 36)
    with jax.set_mesh(mesh1):
        module = roughened(jax.eval_shape(lambda: tiny.compressor(**of)))
        assert difference(module, of, *inputs(of)) < 1e-5
        monkeypatch.setattr(projector, "gelu", lambda x: jax.nn.gelu(x, approximate=True))
        assert difference(module, of, *inputs(of)) > GATE


# --- Training -------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=COMPRESSORS)
def trained(request, mesh1, mesh8):
    """Loss and gradients of the same weights and data on one device and on eight."""
    of = sizes(request.param)
    return [loss_and_gradients(of, meshes, *inputs(of, batch=8)) for meshes in (mesh1, mesh8)]


def loss_and_gradients(of, meshes, levels, question):
    with jax.set_mesh(meshes):
        module = roughened(jax.eval_shape(lambda: tiny.compressor(**of)))
        # Of one that condenses, what the LLM reads, and what it hands on.
        made = module.tokens + module.method.condensed(of["side"] ** 2)
        toward = np.random.default_rng(2).normal(size=(made, of["llm_width"]))

        def loss(module, levels, question):
            tokens = module(levels, question)
            if module.method.condenses:
                tokens = jnp.concatenate([tokens, module.handed(tokens)], axis=1)
            return (tokens * toward.astype("f4")).sum() / toward.size

        step = jax.value_and_grad(loss)
        value, gradients = apply(module, of, levels, question, run=step)
        for w, g in zip(*map(jax.tree.leaves, (module, gradients)), strict=True):
            assert w.sharding == g.sharding
        return float(value), folder.compressor_tensors(gradients)


def test_eight_devices_give_the_loss_and_gradients_of_one(trained):
    (loss1, gradients1), (loss8, gradients8) = trained
    assert loss8 == pytest.approx(loss1, abs=1e-5)
    for name, gradient in gradients1.items():
        np.testing.assert_allclose(gradients8[name], gradient, atol=1e-5, err_msg=name)


def test_every_parameter_has_a_gradient(trained):
    # What only shifts all scores of a window has none: the keys' bias and their norm's.
    rounding = 1e-7
    for name, gradient in trained[0][1].items():
        size = np.abs(gradient).reshape(3 if name.endswith("in_proj_bias") else 1, -1).max(1)
        free = {"in_proj_bias": [1], "k_proj.3.bias": [0], "ln_k_1.bias": [0],
                "ln_k.bias": [0]}  # fmt: skip
        if "ln_kv.bias" in trained[0][1]:  # LLaVA-Mini's table stays as it was born
            free["pos_embed"] = [0]
        none = next((parts for end, parts in free.items() if name.endswith(end)), [])
        # CLIP's own weights decide which patches are kept, and are not trained.
        none = [0] if name.startswith(("text_", "visual_projection", "post_layer")) else none
        assert np.flatnonzero(size < rounding).tolist() == none, name


# Of nearly equal patches a selection keeps one or the other: rounding decides.
@pytest.mark.parametrize(
    "kind", [k for k, of in COMPRESSORS.items() if not issubclass(of, Selection)]
)
def test_bfloat16_stays_near_float32(kind, mesh1):
    of = sizes(kind)
    with jax.set_mesh(mesh1):
        module = roughened(jax.eval_shape(lambda: tiny.compressor(**of)))
        exact, rounded = (
            np.asarray(apply(module, of, *inputs(of), dtype=dtype), np.float32)
            for dtype in (jnp.float32, jnp.bfloat16)
        )
    # A handful of roundings of 2^-9 each, relative to outputs of order one.
    assert np.abs(exact - rounded).mean() < 0.02 * np.abs(exact).mean()


# --- What cannot be built -------------------------------------------------------------------------


POOLING = ["downsample", "m3", "pixel_unshuffle", "pool", "quecc", "token_packer"]


@pytest.mark.parametrize("kind", POOLING)
def test_supported_tokens_are_those_that_can_be_built(kind, mesh1):
    assert COMPRESSORS[kind].supported(24) == [1, 4, 9, 16, 36, 64, 144, 576]
    built = []
    with jax.set_mesh(mesh1):
        for tokens in range(1, 40):
            of = sizes(kind, tokens)
            try:
                jax.eval_shape(lambda of=of: tiny.compressor(**of))
            except ValueError as error:
                assert str(COMPRESSORS[kind].supported(12)) in str(error)
            else:
                built.append(tokens)
    assert built == [1, 4, 9, 16, 36]


@pytest.mark.parametrize("change, said", [
    (dict(kind="qecc"), r"'qecc'.*none.*pool.*quecc.*token_packer"),
    (dict(kind="none", tokens=36), r"36 visual tokens.*12x12.*\[144\]"),
    (dict(heads=3), r"heads=3 does not divide.*16.*\[1, 2, 4, 8, 16\]"),
    (dict(kind="token_packer", heads=0), r"heads=0.*\[1, 2, 4, 8, 16\]"),
    (dict(query="both"), r"query='both'.*none.*separate"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused_with_the_choices(change, said, mesh1):
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda: tiny.compressor(**(sizes() | change)))


def test_a_convolution_that_misses_the_tokens_is_refused(mesh1):
    of = sizes(side=24, tokens=36)
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match="gives 5x5 queries.*not 36"):
        tiny.compressor(**of, kernel=6, stride=4)


def test_a_missing_question_is_refused(mesh1):
    of = sizes()
    with jax.set_mesh(mesh1):
        module = roughened(jax.eval_shape(lambda: tiny.compressor(**of)))
        with pytest.raises(ValueError, match="pass its feature"):
            module(placed(inputs(of)[0], "batch", "len", "feature"))


@pytest.mark.parametrize("kind", COMPRESSORS)
def test_the_example_in_the_docstring(kind):
    cls = COMPRESSORS[kind].module()
    (example,) = (e for e in doctest.DocTestFinder(recurse=False).find(cls) if e.examples)
    assert doctest.DocTestRunner().run(example).failed == 0
