# SPDX-License-Identifier: Apache-2.0
"""The encoder against CLIP's equations written out, in any patch order, on one device and eight."""

import jax
import jax.numpy as jnp
import literal_models
import numpy as np
import pytest
import tiny
from flax import nnx

from configs import sizes
from vlm_jax.compressors.window import window_order
from vlm_jax.cost import flops as cost
from vlm_jax.models.sizes import ViTSize
from vlm_jax.models.vit import ViT, class_attention, middles, patchify
from vlm_jax.models.vlm import parameters


@pytest.fixture(scope="module")
def c():
    return tiny.get_config()


def rough(c, mesh):
    with jax.set_mesh(mesh):
        return tiny.roughened(jax.jit(lambda: ViT(ViTSize.of(c.vit), rngs=nnx.Rngs(0)))())


@pytest.fixture(scope="module")
def vit(c, mesh1):
    return rough(c, mesh1)


@pytest.fixture(scope="module")
def pixels(c):
    return np.random.default_rng(0).normal(size=(8, *[c.vit.image_size] * 2, 3)).astype("f4")


@pytest.fixture(scope="module")
def raster(vit, pixels, mesh1):
    with jax.set_mesh(mesh1):
        return np.asarray(jax.jit(lambda v, x: v(x))(vit, pixels))


def test_levels_equal_the_equations_of_clip(c, vit, pixels, raster):
    weights = literal_models.of(vit)
    theirs = np.stack([literal_models.vit(weights, image, c) for image in pixels[:2]])
    assert theirs.std() > 0.5
    np.testing.assert_allclose(raster[:2], theirs, atol=2e-5)


@pytest.mark.parametrize("window", [2, 4])
def test_window_major_is_raster_order_permuted(window, c, vit, pixels, raster, mesh1):
    order = window_order(c.vit.image_size // c.vit.patch_size, window)
    assert list(order) != sorted(order) or window == 4  # one window is raster order itself
    with jax.set_mesh(mesh1):
        ours = jax.jit(lambda v, x: v(x, window=window))(vit, pixels)
    np.testing.assert_allclose(ours, raster[:, order], atol=1e-5)


def test_a_window_holds_its_own_pixels(mesh1):
    # Each pixel is its own number: patch k of window-major order must show the patch `order[k]`.
    side, size, window = 6, 2, 3
    image = np.arange((side * size) ** 2 * 3, dtype="f4").reshape(1, side * size, side * size, 3)
    with jax.set_mesh(mesh1):
        ours = np.asarray(patchify(tiny.placed(image), size, window))[0]
    for k, index in enumerate(window_order(side, window)):
        row, column = size * (index // side), size * (index % side)
        np.testing.assert_array_equal(
            ours[k], image[0, row : row + size, column : column + size].reshape(-1)
        )


def test_eight_devices_give_the_levels_of_one(c, pixels, raster, mesh8):
    vit = rough(c, mesh8)
    with jax.set_mesh(mesh8):
        ours = jax.jit(lambda v, x: v(x))(vit, tiny.placed(pixels))
    np.testing.assert_allclose(ours, raster, atol=1e-5)


def cut(stacked, level):
    """A weight of all layers, those from `level` on no numbers."""
    values = np.array(stacked)
    values[level:] = np.nan
    return jax.device_put(values, stacked.sharding)


def test_blocks_behind_the_last_level_do_not_count(c, vit, pixels, raster, mesh1):
    assert c.vit.depth > max(c.vit.levels)
    broken = jax.tree_util.tree_map_with_path(
        lambda path, w: cut(w, max(c.vit.levels)) if "blocks" in str(path) else w, vit
    )
    with jax.set_mesh(mesh1):
        np.testing.assert_array_equal(jax.jit(lambda v, x: v(x))(broken, pixels), raster)


@pytest.mark.parametrize("devices", [1, 8])
def test_keys_are_those_of_the_whole_next_block(devices, request, c, vit, pixels, mesh1):
    # There all tokens attend to all; here only the class token's query is computed.
    mesh = request.getfixturevalue(f"mesh{devices}")
    with jax.set_mesh(mesh):
        found = jax.jit(lambda v, x: v(x, reads="keys"))(rough(c, mesh), tiny.placed(pixels))
    found = np.asarray(found)
    theirs = [literal_models.vit(literal_models.of(vit), x, c, keys=True) for x in pixels[:2]]
    np.testing.assert_allclose(found[:2], theirs, atol=2e-5)
    share = found[..., -1].sum(1)
    assert (share < 1).all() and np.ptp(share) > 0  # the class token attends to itself, too


def test_the_class_token_s_scores_are_its_row_of_all_scores_in_values_and_gradients():
    draw = np.random.default_rng(0)
    queries, keys = (jnp.asarray(draw.normal(size=(2, 10, 16)), "f4") for _ in range(2))
    toward = draw.normal(size=(2, 9)).astype("f4")

    def whole(queries, keys):
        scores = jnp.einsum("BQE,BSE->BQS", queries, keys) / 16**0.5
        return jax.nn.softmax(scores)[:, 0, 1:]

    def found(f):
        grads = jax.grad(lambda *x: (f(*x) * toward).sum(), argnums=(0, 1))(queries, keys)
        return f(queries, keys), *grads

    for one, other in zip(
        found(lambda q, k: class_attention(q[:, 0], k)), found(whole), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_of_the_next_block_only_keys_and_queries_count(c, vit, pixels, mesh1):
    def used(path):
        path = jax.tree_util.keystr(path)
        return "blocks" not in path or any(n in path for n in ("norm1", "key", "query"))

    level = max(c.vit.levels)
    broken = jax.tree_util.tree_map_with_path(
        lambda path, w: w if used(path) else cut(w, level), vit
    )
    with jax.set_mesh(mesh1):
        encode = jax.jit(lambda v, x: v(x, reads="keys"))
        np.testing.assert_array_equal(encode(broken, pixels), encode(vit, pixels))


def test_keys_are_float32_when_the_rest_is_bfloat16(c, vit, pixels, mesh1):
    low = nnx.merge(*nnx.split(vit))
    low.dtype = "bfloat16"
    with jax.set_mesh(mesh1):
        exact, rounded = (jax.jit(lambda v, x: v(x, reads="keys"))(v, pixels) for v in (vit, low))
    assert rounded.dtype == "float32"
    error = np.abs(np.asarray(exact) - rounded)
    assert 1e-4 < error.mean() < 0.05 * np.asarray(exact).std()


def test_a_shrunk_image_is_one_that_was_always_small(c, vit, pixels, mesh1):
    weights, times = literal_models.of(vit), 2
    side = c.vit.image_size // c.vit.patch_size
    table = weights["position"]
    small = interpolated(table[1:].reshape(side, side, -1), side // times)
    weights["position"] = np.concatenate([table[:1], small.reshape(-1, table.shape[1])])
    image = pixels[0].reshape(c.vit.image_size // times, times, -1, times, 3).mean((1, 3))
    sizes = tiny.config(vit=dict(image_size=c.vit.image_size // times))
    with jax.set_mesh(mesh1):
        ours = jax.jit(lambda v, x: v(x, shrink=times))(vit, pixels[:1])
    np.testing.assert_allclose(ours[0], literal_models.vit(weights, image, sizes), atol=2e-5)


def interpolated(grid, side):
    """The textbook bilinear interpolation of a square grid, half-pixel centers, no antialias."""
    along = np.zeros((side, len(grid)))
    for i in range(side):
        place = (i + 0.5) * len(grid) / side - 0.5
        along[i, int(place)] += 1 - place % 1
        along[i, min(int(place) + 1, len(grid) - 1)] += place % 1
    return np.einsum("ar,bc,rce->abe", along, along, grid)


@pytest.mark.parametrize("side, times", [(6, 1), (6, 2), (6, 3), (6, 6), (12, 4), (15, 5)])
def test_the_middles_of_squares_are_bilinear_interpolation(side, times):
    grid = np.random.default_rng(side).normal(size=(side, side, 3)).astype("f4")
    ours = middles(jax.numpy.asarray(grid.reshape(-1, 3)), side, times)
    np.testing.assert_allclose(ours, interpolated(grid, side // times).reshape(-1, 3), atol=1e-6)


@pytest.mark.parametrize("name", sizes.VIT)
def test_parameters_of_the_published_towers(name, mesh1):
    of = sizes.VIT[name] | dict(levels=(12, 16, 22, 23))
    with jax.set_mesh(mesh1):
        counted = parameters(jax.eval_shape(lambda: ViT(ViTSize.of(of), rngs=nnx.Rngs(0))))
    assert counted == sizes.VIT_PARAMETERS[name] == cost.vit_parameters(ViTSize.of(of))


@pytest.mark.parametrize("change, words", [
    (dict(patch_size=5), "patches of 5 pixels do not tile an image of 32"),
    (dict(heads=3), r"vit.heads=3 does not divide vit.width=16.*\[1, 2, 4, 8, 16\]"),
    (dict(levels=(2, 1)), "ascending block numbers from 1 to 3"),
    (dict(levels=(1, 4)), "ascending block numbers from 1 to 3"),
    (dict(levels=()), "ascending block numbers from 1 to 3"),
    (dict(activation="relu"), r"choose one of \['gelu', 'gelu_tanh', 'quick_gelu'\]"),
    (dict(class_token=False, keep_class=True), "there is none to keep"),
    (dict(final_norm=True), "ends before block 3"),
])  # fmt: skip
def test_impossible_sizes_are_refused_with_the_way_out(change, words, c, mesh1):
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=words):
        jax.eval_shape(lambda: ViT(ViTSize.of(c.vit.to_dict() | change), rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("asked, change, words", [
    (dict(reads="keys"), dict(levels=(1, 3)), "behind the last level.*raise vit.depth to 4, or"),
    (dict(reads="keys"), dict(class_token=False), "asks the class token.*such as CLIP"),
    (dict(shrink=3), {}, r"4x4 patches cannot be shrunk 3 times: choose one of \[1, 2, 4\]"),
    (dict(shrink=0), {}, r"cannot be shrunk 0 times: choose one of \[1, 2, 4\]"),
])  # fmt: skip
def test_what_an_encoder_cannot_give_is_refused_with_the_way_out(
    asked, change, words, c, pixels, mesh1
):
    with jax.set_mesh(mesh1), pytest.raises(ValueError, match=words):
        jax.eval_shape(
            lambda x: ViT(ViTSize.of(c.vit.to_dict() | change), rngs=nnx.Rngs(0))(x, **asked),
            pixels,
        )


def test_windows_that_do_not_tile_are_refused():
    with pytest.raises(
        ValueError, match=r"windows of 3x3 patches do not tile a 4x4 grid.*\[1, 2, 4\]"
    ):
        window_order(4, 3)
