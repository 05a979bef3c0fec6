# SPDX-License-Identifier: Apache-2.0
"""MQT and M3 by themselves: cheaper forms, any number of visual tokens, what cannot be."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from vlm_jax import mesh
from vlm_jax.compressors import positions
from vlm_jax.compressors.m3 import M3Method
from vlm_jax.compressors.m3 import module as m3s
from vlm_jax.compressors.mqt import MQTMethod
from vlm_jax.compressors.mqt import module as mqts
from vlm_jax.weights import folder

M3, MQT = M3Method, MQTMethod
SIZES = dict(side=6, width=16, llm_width=24)


def roughened(module, seed=0):
    """`module` with order-one weights everywhere, norms and biases too."""
    draw = np.random.default_rng(seed)
    return tiny.filled(module, {
        name: draw.normal(1.0 if len(shape) == 1 and "weight" in name else 0.0,
                          0.3 if len(shape) == 1 else shape[-1] ** -0.5, shape)
        for name, shape in tiny.tensor_shapes(module).items()
    })  # fmt: skip


def made(method, tokens, **sizes):
    return roughened(jax.eval_shape(lambda: tiny.compressor(
        method.kind, tokens=tokens, **(SIZES | sizes))))  # fmt: skip


def levels(batch=2, side=6, width=16, seed=1):
    x = np.random.default_rng(seed).normal(size=(batch, side**2, width)).astype("f4")
    return jax.device_put(x, mesh.spec("batch", "len", "feature"))


def with_gradients(run, module, x):
    """Outputs, and the gradients of a sum of them with fixed signs, by published name."""

    def loss(module, x):
        out = run(module, x)
        signs = np.random.default_rng(2).choice([-1.0, 1.0], out.shape).astype("f4")
        return (out * signs).mean(), out

    (gradients, of_x), out = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(module, x)
    return {"out": out, "x": of_x} | folder.compressor_tensors(gradients)


def assert_alike(ours, theirs, atol=1e-5):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        np.testing.assert_allclose(ours[name], value, atol=atol, err_msg=name)


# --- Cheaper forms equal the direct ones, in values and gradients ---------------------------------


def mqt_for_every_image(module, x):
    """As published: keys, scores and values of every image and every query, the first V kept."""
    attention, queries = module.attention, module.queries
    place = module.position[...]
    ask = module.query_norm(module.query[...] + place)
    along = jnp.array(positions.cubic(math.isqrt(queries), module.side), jnp.float32)
    grid = place.reshape(along.shape[1], along.shape[1], -1)
    grid = jnp.einsum("ra,abe->rbe", along, grid)
    keys = module.key_norm(jnp.einsum("cb,rbe->rce", along, grid).reshape(x.shape[1], -1))

    # The plain sums of a textbook, on one device.
    whole = jax.sharding.PartitionSpec()
    kernels = [jax.sharding.reshard(getattr(attention, part).kernel[...], whole)
               for part in ("query", "key", "value", "out")]  # fmt: skip
    biases = [jax.sharding.reshard(getattr(attention, part).bias[...], whole)
              for part in ("query", "key", "value", "out")]  # fmt: skip
    last = jax.sharding.reshard(module.projector.kernel[...], whole)

    def one(patches):
        q, k, v = (
            jnp.einsum("te,enh->tnh", y, kernel) + bias
            for y, kernel, bias in zip(
                (ask, keys, module.value_norm(patches)), kernels, biases, strict=False
            )
        )
        scores = jnp.einsum("qnh,pnh->nqp", q, k) / math.sqrt(q.shape[-1])
        mixed = jnp.einsum("nqp,pnh->qnh", jax.nn.softmax(scores), v)
        return (jnp.einsum("qnh,nhe->qe", mixed, kernels[3]) + biases[3]) @ last

    return jax.vmap(one)(x)[:, : module.tokens]


def m3_projecting_first(module, x):
    """As published: every patch through the whole projector, then the means."""
    whole = module.projector(x)
    n, size = math.isqrt(module.tokens), module.side // math.isqrt(module.tokens)
    return whole.reshape(len(x), n, size, n, size, -1).mean((2, 4)).reshape(len(x), n * n, -1)


@pytest.mark.parametrize("tokens", [1, 3, 20, 36])
def test_mqt_equals_attention_made_anew_for_every_image(tokens, mesh1):
    with jax.set_mesh(mesh1):
        module = made(MQT, tokens, heads=4)
        assert mqts.mixing_first_pays(tokens, 36, 16, 4) == (tokens < 7)
        x = levels()
        ours = with_gradients(lambda m, x: m(x), module, x)
        assert_alike(ours, with_gradients(mqt_for_every_image, module, x))
        assert np.std(ours["out"]) > 0.1


@settings(max_examples=5)
@given(st.data())
def test_both_orders_of_mixing_give_the_same(mesh1, data):
    heads, size, batch = (data.draw(st.integers(1, n)) for n in (4, 6, 3))
    tokens, patches = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    draw = np.random.default_rng(0)
    scores = jax.nn.softmax(jnp.array(draw.normal(size=(heads, tokens, patches)), jnp.float32))
    values = jnp.array(draw.normal(size=(batch, patches, heads * size)), jnp.float32)
    kernel = jnp.array(draw.normal(size=(heads * size, heads, size)), jnp.float32)
    with jax.set_mesh(mesh1), pytest.MonkeyPatch.context() as patch:
        found = []
        for first in (True, False):
            patch.setattr(mqts, "mixing_first_pays", lambda *_, first=first: first)
            grads = jax.grad(lambda *x: (mqts.mix(*x) ** 2).sum(), argnums=(0, 1, 2))
            both = jax.jit(lambda *x, grads=grads: [mqts.mix(*x), *grads(*x)])
            found.append(both(scores, values, kernel))
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)


def test_the_order_turns_where_the_published_sizes_say():
    assert [mqts.mixing_first_pays(n, 576, 1024, 16) for n in (1, 61, 62, 256)] == [
        True, True, False, False]  # fmt: skip


def test_the_position_table_is_resampled_by_the_published_taps():
    taps = np.array([[-0.017361, 0.160880, 0.943287, -0.086806], [-0.09375, 0.59375, 0.59375,
                     -0.09375], [-0.086806, 0.943287, 0.160880, -0.017361]])  # fmt: skip
    along = positions.cubic(16, 24)
    for d in range(24):
        low, expected = math.floor(2 * d / 3 - 1 / 6), np.zeros(16)
        for tap, source in zip(taps[d % 3], range(low - 1, low + 3), strict=True):
            expected[np.clip(source, 0, 15)] += tap
        np.testing.assert_allclose(along[d], expected, atol=1e-6)
    np.testing.assert_array_equal(positions.cubic(6, 6), np.eye(6))


def test_the_position_table_is_born_as_published():
    table = mqts.sines(16, 1024)
    np.testing.assert_allclose(table[17, :3], [0.8413, 0.8218, 0.8018], atol=1e-4)
    np.testing.assert_allclose(table[17, 256:258], np.cos([1, 10000 ** (-1 / 256)]), atol=3e-4)
    assert (table == table.astype(np.float16)).all() and (table[2, 512:768] == 0).all()


@pytest.mark.parametrize("tokens", [1, 4, 9, 36])
def test_m3_averages_before_the_last_layer_as_well_as_behind_it(tokens, mesh1):
    with jax.set_mesh(mesh1):
        module, x = made(M3, tokens), levels()
        assert_alike(*(with_gradients(run, module, x)
                       for run in (lambda m, x: m(x), m3_projecting_first)))  # fmt: skip


@pytest.mark.parametrize("scales", [(1, 9, 36), (36, 4, 1, 9), (4,)])
def test_the_pyramid_gives_every_scale(scales, mesh1):
    def together(module, x):
        return jnp.concatenate(module.every_scale(x), axis=1)

    def apart(module, x):
        return jnp.concatenate([m3_projecting_first(module.at(n), x) for n in scales], axis=1)

    with jax.set_mesh(mesh1):
        module, x = made(M3, 1, scales=scales), levels()
        assert_alike(*(with_gradients(run, module, x) for run in (together, apart)))


def test_the_pyramid_repeats_no_work(mesh1):
    # Each layer is one product, and no mean is taken of more numbers than the level below has.
    with jax.set_mesh(mesh1):
        module = made(M3, 1)
        text = jax.jit(lambda m, x: m.every_scale(x)).lower(module, levels()).as_text()
        assert text.count("stablehlo.dot_general") == 2
        assert M3.nested(24) == (1, 9, 36, 144, 576)
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            pool = m3s.pool
            patch.setattr(m3s, "pool", lambda x, n: seen.append((x.shape[1], n)) or pool(x, n))
            m3s.pyramid(jnp.ones((1, 144, 8)), (1, 4, 9, 36, 144))
        assert seen == [(144, 144), (144, 36), (36, 9), (36, 4), (4, 1)]


# --- Any number of tokens -------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [1, 4])
def test_fewer_tokens_of_mqt_are_the_first_of_more(heads, mesh1):
    with jax.set_mesh(mesh1):
        module, x = made(MQT, 36, heads=heads), levels()
        run = jax.jit(lambda module, x: module(x))
        whole = run(module, x)
        for tokens in (1, 7, 35):
            np.testing.assert_allclose(run(module.at(tokens), x), whole[:, :tokens], atol=1e-6)
        assert module.tokens == 36  # a module is a value: `at` leaves it as it was


def test_a_folded_mqt_is_the_same_function(mesh1, mesh8):
    for meshes in (mesh1, mesh8):
        with jax.set_mesh(meshes):
            module, x = made(MQT, 36, heads=4), levels(batch=4)
            folded = jax.jit(lambda m: m.fold())(module)
            for tokens in (1, 9, 36):
                ours, theirs = (jax.jit(lambda m, x: m(x))(m.at(tokens), x)
                                for m in (folded, module))  # fmt: skip
                np.testing.assert_allclose(ours, theirs, atol=2e-6)
            assert folded.slots(5) == module.slots(5) == 16
            with pytest.raises(ValueError, match="choose any of 1 to 36"):
                folded.at(37)


def test_a_folded_mqt_computes_no_scores(mesh1):
    with jax.set_mesh(mesh1):
        module = made(MQT, 1, heads=4)
        folded = module.fold()
        count = [jax.jit(lambda m, x: m(x)).lower(m, levels()).as_text().count("dot_general")
                 for m in (folded, module)]  # fmt: skip
    # Averages, values and one last product; else two projections, scores and the out-projection.
    assert count[0] == 3 and count[1] > 6


@pytest.mark.parametrize("method, side, buckets", [
    (MQT, 24, (1, 4, 16, 36, 144, 256)), (MQT, 6, (1, 4, 16, 36)), (MQT, 1, (1,)),
    (M3, 24, (1, 4, 9, 16, 36, 64, 144, 576)), (M3, 6, (1, 4, 9, 36)), (M3, 7, (1, 49)),
])  # fmt: skip
def test_a_request_runs_in_the_smallest_bucket_that_holds_it(method, side, buckets, mesh1):
    with jax.set_mesh(mesh1):
        module = jax.eval_shape(lambda: tiny.compressor(
            method.kind, tokens=1, **(SIZES | dict(side=side))))  # fmt: skip
        assert module.buckets == buckets
        for tokens in method.supported(side):
            slots = module.slots(tokens)
            assert slots >= tokens and all(b >= slots or b < tokens for b in buckets)
            assert module.at(tokens).tokens == tokens


def test_what_training_shows():
    with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        shapes = lambda method, **of: jax.eval_shape(  # noqa: E731
            lambda: tiny.compressor(method.kind, tokens=1, **(SIZES | of)))  # fmt: skip
        assert shapes(MQT, side=24).prefixes == tuple(range(2, 257, 2))
        assert shapes(MQT, side=5).prefixes == tuple(range(1, 26, 2))
        assert shapes(M3, side=24).scales == (1, 9, 36, 144, 576)
        assert shapes(M3).scales == (1, 9, 36) and shapes(M3, scales=(4, 36)).scales == (4, 36)


# --- What cannot be ------------------------------------------------------------------------------


@pytest.mark.parametrize("method, change, said", [
    (MQT, dict(tokens=0), "0 visual tokens from a 6x6 patch grid: choose any of 1 to 36"),
    (MQT, dict(tokens=37), "37 visual tokens.*any of 1 to 36"),
    (MQT, dict(tokens=257, side=24), "257 visual tokens.*any of 1 to 256"),
    (MQT, dict(heads=3), r"heads=3 does not divide.*16.*\[1, 2, 4, 8, 16\]"),
    (MQT, dict(queries=10), "10 queries are not a square grid"),
    (MQT, dict(width=10, heads=1), "width=10 is not a multiple of 4"),
    (M3, dict(tokens=16), r"16 visual tokens from a 6x6 patch grid: choose one of \[1, 4, 9, 36\]"),
    (M3, dict(scales=(1, 25)), r"'m3' cannot make 25 visual tokens.*\[1, 4, 9, 36\]"),
])  # fmt: skip
def test_what_cannot_be_built_is_refused_with_the_choices(method, change, said, mesh1):
    sizes = dict(tokens=1, heads=4, **SIZES) | change
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=said):
        jax.eval_shape(lambda: tiny.compressor(method.kind, **sizes))


def test_weights_that_are_not_of_the_method_are_listed(mesh1):
    with jax.set_mesh(mesh1):
        mqt, m3 = (
            jax.eval_shape(lambda of=of: tiny.compressor(of.kind, tokens=1, heads=4, **SIZES))
            for of in (MQT, M3)
        )
        drawn = {name: np.zeros(shape, "f4") for name, shape in tiny.tensor_shapes(mqt).items()}
        with pytest.raises(ValueError, match="missing: 0.weight.* surplus: pos_embed"):
            tiny.filled(m3, drawn)
        wrong = drawn | {"query": np.zeros((256, 16), "f4")}
        del wrong["proj"]
        said = r"missing: proj; 1 of another shape: query \(256, 16\) instead of \(36, 16\)"
        with pytest.raises(ValueError, match=said):
            tiny.filled(mqt, wrong)


@pytest.mark.parametrize("method", [MQT, M3])
def test_only_the_last_level_is_read(method, mesh1):
    with jax.set_mesh(mesh1):
        one, three = made(method, 4, heads=4), made(method, 4, heads=4, levels=3)
        x = levels()
        more = jnp.concatenate([levels(seed=5), levels(seed=6), x], axis=2)
        np.testing.assert_array_equal(one(x), three(more))
