# SPDX-License-Identifier: Apache-2.0
"""Every case that the published code computed comes out of our compressors too, to 1e-4.

`--published-dir=DIR` runs another folder of cases; tests/published/README.md has the format.
"""

import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from vlm_jax.models import pretrained
from vlm_jax.models.compressors import QueCC, TokenPacker
from vlm_jax.models.vit import window_order

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
    return QueCC(
        tokens=((meta["grid"] - kernel) // stride + 1) ** 2,
        side=meta["grid"],
        width=meta["dim"],
        levels=meta["levels"],
        llm_width=meta["text_dim"],
        heads=meta["heads"],
        query="separate",
        kernel=kernel,
        stride=stride,
        rngs=nnx.Rngs(0),
    )


def token_packer(meta: dict) -> nnx.Module:
    return TokenPacker(
        tokens=(meta["grid"] // meta["scale_factor"]) ** 2,
        side=meta["grid"],
        width=meta["dim"],
        levels=meta["levels"],
        llm_width=meta["hidden"],
        heads=meta["heads"],
        rngs=nnx.Rngs(0),
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


# Method -> module, forward pass, where its tensors hang in `mm_projector`, tensors not in a case.
METHODS = {
    "quecc": (quecc, run_quecc, "0.", ("1.", "3.")),
    "token_packer": (token_packer, run_token_packer, "", ()),
}


def largest_error(meta: dict, state: dict, inputs: dict, outputs: dict) -> float:
    """The largest absolute difference between the published outputs and ours."""
    if meta["method"] not in METHODS:
        pytest.fail(f"method {meta['method']!r} is not among those built here: {sorted(METHODS)}")
    if meta["layer_norm_eps"] != 1e-6:
        pytest.fail(f"layer_norm_eps={meta['layer_norm_eps']}: the compressors have 1e-6")
    build, run, prefix, absent = METHODS[meta["method"]]
    module = jax.eval_shape(lambda: build(meta))
    tensors = {prefix + name: value for name, value in state.items()}
    for name, shape in pretrained.shapes(module).items():
        if name.startswith(absent):
            tensors[name] = np.zeros(shape, np.float32)
    order = window_order(meta["grid"], module.window)
    ours = run(pretrained.load(module, tensors), order, **inputs)
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


# A shift of all scores of a window leaves its softmax as it is: the key norm's bias has no effect.
@pytest.mark.parametrize(
    "stem, free", [("quecc_k2", ["k_proj.3.bias"]), ("token_packer_s2", ["ln_k_1.bias"])]
)
def test_any_weight_off_by_one_percent_is_caught(stem, free, mesh1):
    meta, state, inputs, outputs = read(Path(__file__).parent / "published" / f"{stem}.npz")
    draw = np.random.default_rng(0)
    missed = []
    with jax.set_mesh(mesh1):
        for name, value in state.items():
            # Signs differ, or a norm behind the weight would undo a common factor.
            off = value * (1 + 0.01 * draw.choice([-1, 1], value.shape)).astype(np.float32)
            if largest_error(meta, state | {name: off}, inputs, outputs) <= GATE:
                missed.append(name)
    assert missed == free
