# SPDX-License-Identifier: Apache-2.0
"""Windowed cross-attention: every way of computing it gives what the direct form gives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from vlm_jax import mesh
from vlm_jax.compressors.window import WindowAttention, absorbing_pays
from vlm_jax.kernels import tiles, window_attention

NEAR = 1e-5  # absolute, on outputs and gradients of order one, in float32


def attention(tokens, patches, width, heads, seed=0):
    """A WindowAttention with weights of order one, biases too."""
    module = WindowAttention(width, heads, tokens=tokens, patches=patches, rngs=nnx.Rngs(0))
    leaves, tree = jax.tree.flatten(module)
    draw = np.random.default_rng(seed)
    return jax.tree.unflatten(tree, [
        jax.device_put(draw.normal(scale=width**-0.5, size=x.shape).astype("f4"), x.sharding)
        for x in leaves
    ])  # fmt: skip


def drawn(*shape, seed=0, dtype="f4"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


# --- Absorbed projections -------------------------------------------------------------------------


def value_and_gradients(module, absorbed, inputs):
    """The module's output, and the gradients of a weighted sum of it, with one of its two forms."""
    module.absorbed = absorbed
    inputs = [jax.device_put(x, mesh.spec("batch")) for x in inputs]
    toward = drawn(*inputs[0].shape, seed=9)

    def loss(module, *inputs):
        out = module(*inputs)
        return (out * toward).sum() / toward[0].size, out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3), has_aux=True))(
        module, *inputs
    )
    own = {"/".join(k): v for k, v in nnx.to_flat_state(nnx.state(gradients[0]))}
    return {"out": out} | own | dict(zip(("query", "keys", "values"), gradients[1:], strict=True))


@pytest.mark.parametrize("on", ["mesh1", "mesh8"])
@pytest.mark.parametrize(
    "tokens, patches, width, heads", [(1, 36, 32, 4), (4, 16, 32, 2), (9, 36, 24, 2), (4, 4, 16, 4)]
)
def test_absorbed_projections_equal_projected_keys_and_values(
    tokens, patches, width, heads, on, request
):
    with jax.set_mesh(request.getfixturevalue(on)):
        module = attention(tokens, patches, width, heads)
        inputs = [drawn(8, n, width, seed=i) for i, n in enumerate((tokens, patches, patches))]
        direct, absorbed = (value_and_gradients(module, form, inputs) for form in (False, True))
    assert direct.keys() == absorbed.keys()
    for name, value in absorbed.items():
        np.testing.assert_allclose(value, direct[name], atol=NEAR, err_msg=name)
    # Rounding in the one, nothing at all in the other.
    assert not np.any(absorbed["key/bias"])


def test_the_form_with_fewer_multiplications_is_built():
    chosen = [v for v in (1, 4, 9, 16, 36, 64, 144, 576) if absorbing_pays(v, 576, 1024, 8)]
    assert chosen == [1, 4, 9, 16, 36, 64, 144]
    assert absorbing_pays(571, 576, 1024, 8) and not absorbing_pays(573, 576, 1024, 8)
    # Windows of one patch never, and not when the heads are as many as the channels of one.
    assert not absorbing_pays(16, 16, 32, 4) and not absorbing_pays(4, 16, 8, 8)


@pytest.mark.parametrize("tokens, absorbed", [(4, True), (16, False)])
def test_the_choice_shows_in_the_compiled_program(tokens, absorbed, mesh1):
    with jax.set_mesh(mesh1):
        module = attention(tokens, 16, 32, 2)
        inputs = [
            jax.device_put(drawn(2, n, 32, seed=i), mesh.spec("batch", "len", "feature"))
            for i, n in enumerate((tokens, 16, 16))
        ]
        counted = jax.jit(lambda m, *x: m(*x)).lower(module, *inputs).cost_analysis()["flops"]
    assert module.absorbed == absorbed
    projections = 2 * 2 * 2 * 16 * 32**2  # two of them for two images of 16 patches
    rest = 2 * 2 * 2 * tokens * 32**2
    assert (counted > rest + projections) == (not absorbed)


# --- The kernels, interpreted ---------------------------------------------------------------------

# Reading outside an array raises, and what nobody wrote is nan.
STRICT = pltpu.InterpretParams(out_of_bounds_reads="raise", uninitialized_memory="nan")
SIZES = st.fixed_dictionaries(dict(
    batch=st.integers(1, 2), windows=st.integers(1, 12), keys=st.integers(1, 24),
    heads=st.integers(1, 3), size=st.sampled_from([4, 8]), seed=st.integers(0, 99),
))  # fmt: skip
FEW = dict(
    derandomize=True, database=None, phases=(Phase.explicit, Phase.generate)
)  # fmt: skip


ROW, PATCH = ("batch", "len", "heads"), ("batch", "len", "len")
KINDS = ["window_attention", "absorbed_attention", "unprojected_attention"]
SOME = ["window_attention", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])]


def drawn_for(kind, batch, windows, keys, heads, size, seed, dtype="f4"):
    """One kind of attention by its form, its inputs on the mesh, the gradient of its result."""
    query = (batch, windows, heads, size)
    width = {"window_attention": 0, "absorbed_attention": size, "unprojected_attention": 12}[kind]
    patch = (batch, windows, keys, width) if width else (batch, windows, keys, heads, size)
    inputs = [(query, ROW, 1), *2 * [(patch, PATCH if width else (*PATCH, "heads"), 1)]]
    if kind == "unprojected_attention":
        inputs += 2 * [((width, heads, size), ("none", "heads"), width**-0.5)]
    arrays = [
        jax.device_put(scale * drawn(*shape, seed=seed + i, dtype=dtype), mesh.spec(*dims))
        for i, (shape, dims, scale) in enumerate([(query, ROW, 1), *inputs])
    ]
    options = dict(scale=size**-0.5) if kind == "absorbed_attention" else {}

    def attend(form):
        return lambda *x: getattr(window_attention, kind)(*x, **options, form=form)

    return attend, arrays


def results(attend, toward, *inputs):
    """What comes out without and with a gradient to follow, and the gradients."""

    def run(toward, *inputs):
        out, back = jax.vjp(attend, *inputs)
        return attend(*inputs), out, *back(toward)

    return [np.asarray(x, np.float32) for x in jax.jit(run)(toward, *inputs)]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3, **FEW)
@given(of=SIZES)
def test_a_kernel_equals_the_direct_form(kind, mesh1, of):
    with jax.set_mesh(mesh1):
        attend, arrays = drawn_for(kind, **of)
        direct = results(attend("xla"), *arrays)
        with pltpu.force_tpu_interpret_mode(STRICT):
            kernel = results(attend("pallas"), *arrays)
    for ours, exact in zip(kernel, direct, strict=True):
        np.testing.assert_allclose(ours, exact, atol=NEAR)


@pytest.mark.parametrize("kind", SOME)
@settings(max_examples=2, **FEW)
@given(of=SIZES)
def test_a_kernel_in_bfloat16_is_two_units_from_float32(kind, mesh1, of):
    with jax.set_mesh(mesh1):
        attend, arrays = drawn_for(kind, **of, dtype="bfloat16")
        exact = results(attend("xla"), *(x.astype("f4") for x in arrays))
        with pltpu.force_tpu_interpret_mode(STRICT):
            kernel = results(attend("pallas"), *arrays)
    for ours, reference in zip(kernel, exact, strict=True):
        unit = 2**-8 * np.abs(reference).max()  # half of the last place of the largest number
        assert np.abs(ours - reference).max() <= 2 * unit


@pytest.mark.parametrize("kind", SOME)
def test_eight_devices_attend_to_their_own_images_and_heads(kind, mesh1, mesh8):
    found = []
    for on in (mesh1, mesh8):
        with jax.set_mesh(on), pltpu.force_tpu_interpret_mode(STRICT):
            attend, arrays = drawn_for(kind, 8, 4, 4, 4, 8, seed=0)
            found.append(results(attend("pallas"), *arrays))
            program = jax.jit(attend("pallas")).lower(*arrays[1:]).compile().as_text()
            for collective in ("all-gather", "all-to-all", "collective-permute"):
                assert collective not in program
    for one, eight in zip(*found, strict=True):
        np.testing.assert_allclose(eight, one, atol=NEAR)


@pytest.mark.parametrize("tokens, absorbed", [(4, True), (16, False)])
def test_a_module_gives_the_same_with_kernels(tokens, absorbed, mesh8, monkeypatch):
    inputs = [drawn(8, n, 32, seed=i) for i, n in enumerate((tokens, 16, 16))]
    found = []
    with jax.set_mesh(mesh8), pltpu.force_tpu_interpret_mode(STRICT):
        for platform in ("cpu", "tpu"):
            monkeypatch.setattr(window_attention, "platform", lambda name=platform: name)
            found.append(value_and_gradients(attention(tokens, 16, 32, 2), absorbed, inputs))
    for name, value in found[0].items():
        np.testing.assert_allclose(found[1][name], value, atol=NEAR, err_msg=name)


def test_a_large_block_is_cut_by_windows_then_by_heads():
    """At the published width: what each grid step holds fits, and starts where a tile does."""
    for windows in (1, 4, 9, 16, 36, 64, 144):
        keys = 576 // windows
        for itemsize in (2, 4):
            row = 1024 * itemsize
            for window_bytes in (row * (2 + 2 * keys), row * (3 * 8 + 4 * keys)):
                block = tiles.windows_per_block(windows, keys, window_bytes)
                assert windows % block == 0
                assert block == windows or block * keys % 16 == 0
                assert 2 * block * window_bytes <= tiles.BLOCKS or windows == 1
        groups = tiles.groups(windows, keys)
        assert [i for first, last in groups for i in range(first, last)] == list(range(windows))
        assert all(first * keys % 16 == 0 for first, _ in groups)


# --- Which form runs ------------------------------------------------------------------------------


def test_without_a_tpu_xla_attends(mesh1):
    assert [window_attention.form(kernels) for kernels in ("auto", "xla")] == ["xla", "xla"]
    with jax.set_mesh(mesh1):
        assert window_attention.form("auto") == "xla"


def test_on_a_tpu_the_kernels_attend(monkeypatch):
    monkeypatch.setattr(window_attention, "platform", lambda: "tpu")
    chosen = {kernels: window_attention.form(kernels) for kernels in ("auto", "pallas", "xla")}
    assert chosen == {"auto": "pallas", "pallas": "pallas", "xla": "xla"}


@pytest.mark.parametrize("kernels, said", [
    ("triton", r"kernels='triton'.*'auto', 'pallas', 'xla'"),
    ("pallas", r"'pallas' needs a TPU.*'cpu'.*'auto' or 'xla'"),
])  # fmt: skip
def test_a_form_that_cannot_run_is_refused_with_the_choices(kernels, said, mesh1):
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=said):
        window_attention.form(kernels)
