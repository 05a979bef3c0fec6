# SPDX-License-Identifier: Apache-2.0
"""Every case that the published code computed comes out of our compressors too, to 1e-4.

`--published-dir=DIR` runs another folder of cases; tests/published/README.md has the format.
"""

import functools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx

from vlm_jax.compressors.m3.module import pyramid
from vlm_jax.compressors.window import window_order
from vlm_jax.models.vit import class_attention

GATE = 1e-4  # absolute, on activations of order one, float32 with matmuls at highest precision


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--published-dir"))
        cases = sorted(folder.glob("*.npz"))
        if not cases:
            raise pytest.UsageError(f"--published-dir={folder} holds no *.npz")
        metafunc.parametrize("case", cases, ids=[case.stem for case in cases])


def read(path: Path) -> tuple[dict, dict, dict, dict]:
    """The meta, state, inputs and outputs of one case."""
    with np.load(path) as arrays:
        meta = json.loads(str(arrays["meta"]))
        parts = {"state": {}, "in": {}, "out": {}}
        for kind, name in (key.split("/", 1) for key in arrays if key != "meta"):
            parts[kind][name] = arrays[f"{kind}/{name}"]
    return meta, *parts.values()


def quecc(meta: dict) -> nnx.Module:
    kernel, stride = meta["kernel"], meta["stride"]
    return tiny.compressor(
        "quecc",
        tokens=((meta["grid"] - kernel) // stride + 1) ** 2,
        side=meta["grid"],
        width=meta["dim"],
        levels=meta["levels"],
        llm_width=meta["text_dim"],
        heads=meta["heads"],
        query="separate",
        kernel=kernel,
        stride=stride,
    )


def token_packer(meta: dict) -> nnx.Module:
    return tiny.compressor(
        "token_packer",
        tokens=(meta["grid"] // meta["scale_factor"]) ** 2,
        side=meta["grid"],
        width=meta["dim"],
        levels=meta["levels"],
        llm_width=meta["hidden"],
        heads=meta["heads"],
    )


def mqt(meta: dict) -> nnx.Module:
    queries = meta["query_grid"] ** 2
    return tiny.compressor(
        "mqt",
        tokens=queries,
        queries=queries,
        side=meta["grid"],
        width=meta["dim"],
        llm_width=meta["hidden"],
        heads=meta["heads"],
    )


def m3(meta: dict) -> nnx.Module:
    sizes = dict(side=meta["grid"], width=meta["dim"], llm_width=meta["dim"])
    return tiny.compressor("m3", tokens=1, **sizes)


def side(meta: dict) -> int:
    """Patches per side of the grid."""
    return meta["grid"] if "grid" in meta else math.isqrt(meta["tokens_in"])


def prumerge(meta: dict) -> nnx.Module:
    plus = meta["method"] == "prumerge_plus"
    selected = int(meta["tokens_in"] * meta["reduction_ratio"]) * (2 if plus else 1)
    return tiny.compressor(
        "prumerge_plus" if plus else "prumerge",
        tokens=0 if meta["adaptive"] else selected + 1,
        side=side(meta),
        width=meta["dim"],
        llm_width=meta["dim"],
        neighbors=meta["neighbours"],
    )


@jax.jit
def run_quecc(module, order, image_features, image_features_multi, text_features):
    return {
        "tokens": module.compress(
            image_features[:, order], image_features_multi[:, order], text_features[:, 0]
        )
    }


@jax.jit
def run_token_packer(module, order, image_features, image_features_multi):
    tokens = module.compress(image_features[:, order], image_features_multi[:, order])
    return {"tokens_after_mlp": module.projector(tokens)}


@functools.partial(jax.jit, static_argnames="counts")
def run_mqt(module, order, image_features, counts):
    return {f"tokens_{n}": module.at(n)(image_features[:, order]) for n in counts}


@functools.partial(jax.jit, static_argnames="counts")
def run_m3(module, order, projected_features, counts):
    made = pyramid(projected_features[:, order], [module.at(n).tokens for n in counts])
    return {f"tokens_{n}": tokens for n, tokens in zip(counts, made, strict=True)}


def run_prumerge(module, order, features, queries, keys):
    @jax.jit
    def run(module, features, queries, keys):
        attention = class_attention(queries[:, 0], keys)
        return module.compress(features[:, order], keys[:, 1:], attention)

    tokens, count = run(module, features, queries, keys)
    # The published code fills as many slots in every row of a batch.
    return {"tokens": tokens[:, : int(count.max())]}


# Method -> module, forward pass, where its tensors hang in `mm_projector`, tensors not in a case.
METHODS = {
    "m3": (m3, run_m3, "", ("0.", "2.")),
    "mqt": (mqt, run_mqt, "", ()),
    "prumerge": (prumerge, run_prumerge, "", ("0.", "2.")),
    "prumerge_plus": (prumerge, run_prumerge, "", ("0.", "2.")),
    "quecc": (quecc, run_quecc, "0.", ("1.", "3.")),
    "token_packer": (token_packer, run_token_packer, "", ()),
}


def largest_error(meta: dict, state: dict, inputs: dict, outputs: dict) -> float:
    """The largest absolute difference between the published outputs and ours."""
    if meta["method"] not in METHODS:
        pytest.fail(f"method {meta['method']!r} is not among those built here: {sorted(METHODS)}")
    if meta.get("layer_norm_eps", 1e-6) != 1e-6:
        pytest.fail(f"layer_norm_eps={meta['layer_norm_eps']}: the compressors have 1e-6")
    build, run, prefix, absent = METHODS[meta["method"]]
    module = jax.eval_shape(lambda: build(meta))
    tensors = {prefix + name: value for name, value in state.items()}
    for name, shape in tiny.tensor_shapes(module).items():
        if name.startswith(absent):
            tensors[name] = np.zeros(shape, np.float32)
    order = window_order(side(meta), module.window)
    if "token_counts" in meta:
        run = functools.partial(run, counts=tuple(meta["token_counts"]))
    ours = run(tiny.filled(module, tensors), order, **inputs)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in outputs.items()
    }
    return max(float(np.abs(np.asarray(ours[k]) - outputs[k]).max()) for k in outputs)


def test_published_outputs(case, mesh1, record_property):
    with jax.set_mesh(mesh1):
        error = largest_error(*read(case))
    record_property("largest_error", error)
    print(f"{case.stem}: largest error {error:.2e}")
    assert error <= GATE  # nan is not


# A shift of all scores of a softmax leaves it as it is: the key norm's bias has no effect.
@pytest.mark.parametrize(
    "stem, free",
    [
        ("quecc_k2", ["k_proj.3.bias"]),
        ("token_packer_s2", ["ln_k_1.bias"]),
        ("mqt", ["ln_k.bias"]),
    ],
)
def test_any_weight_off_by_one_percent_is_caught(stem, free, mesh1):
    meta, state, inputs, outputs = read(Path(__file__).parent / "published" / f"{stem}.npz")
    missed = []
    with jax.set_mesh(mesh1):
        for name, off in each_off_by_one_percent(state):
            if largest_error(meta, state | {name: off}, inputs, outputs) <= GATE:
                missed.append(name)
    assert missed == free


def test_m3_has_no_weights_but_its_features_off_by_one_percent_are_caught(mesh1):
    meta, state, inputs, outputs = read(Path(__file__).parent / "published" / "m3.npz")
    assert not state
    ((name, off),) = each_off_by_one_percent(inputs)
    with jax.set_mesh(mesh1):
        for scale, tokens in outputs.items():
            counts = {"token_counts": [int(scale.removeprefix("tokens_"))]}
            assert largest_error(meta | counts, state, {name: off}, {scale: tokens}) > GATE


@pytest.mark.parametrize("stem", ["prumerge", "prumerge_plus"])
def test_prumerge_has_no_weights_but_its_inputs_off_by_one_percent_are_caught(stem, mesh1):
    meta, state, inputs, outputs = read(Path(__file__).parent / "published" / f"{stem}.npz")
    assert not state
    with jax.set_mesh(mesh1):
        for name, off in each_off_by_one_percent(inputs):
            assert largest_error(meta, state, inputs | {name: off}, outputs) > GATE, name


def each_off_by_one_percent(arrays: dict) -> list[tuple[str, np.ndarray]]:
    """Every array with its numbers 1 % too large or too small.

    Signs differ, or a norm behind a weight would undo a common factor.
    """
    draw = np.random.default_rng(0)
    return [
        (name, value * (1 + 0.01 * draw.choice([-1, 1], value.shape)).astype(np.float32))
        for name, value in arrays.items()
    ]
