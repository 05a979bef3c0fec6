# SPDX-License-Identifier: Apache-2.0
"""Every case that the published code computed comes out of our methods too, to the family's gate.

`--published-dir=DIR` runs another folder of cases; tests/published/README.md has the format.
"""

import json
from pathlib import Path

import jax
import numpy as np
import published_pruning
import published_selection
import published_trained
import pytest

# Each has `RUNS`, from a case's method to its outputs of ours, and `GATE`, the largest difference.
FAMILIES = (
    published_trained,
    published_pruning,
    published_selection,
)
RUNS = {method: run for family in FAMILIES for method, run in family.RUNS.items()}
GATES = {method: family.GATE for family in FAMILIES for method in family.RUNS}


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        folder = Path(metafunc.config.getoption("--published-dir"))
        cases = sorted(folder.rglob("*.npz"))
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


def largest_error(meta: dict, state: dict, inputs: dict, outputs: dict) -> float:
    """The largest absolute difference between the published outputs and ours."""
    if meta["method"] not in RUNS:
        pytest.fail(f"method {meta['method']!r} is not among those built here: {sorted(RUNS)}")
    ours = RUNS[meta["method"]](meta, state, inputs)
    assert {k: (v.shape, v.dtype) for k, v in ours.items()} == {
        k: (v.shape, v.dtype) for k, v in outputs.items()
    }
    # As float64: indices and masks too, and a difference of unsigned numbers is never negative.
    apart = [
        np.abs(np.asarray(ours[k], float) - np.asarray(outputs[k], float)).max() for k in outputs
    ]
    return float(max(apart))


def test_published_outputs(case, mesh1, record_property):
    meta, state, inputs, outputs = read(case)
    with jax.set_mesh(mesh1):
        error = largest_error(meta, state, inputs, outputs)
    record_property("largest_error", error)
    print(f"{case.stem}: largest error {error:.2e}")
    assert error <= GATES[meta["method"]]  # nan is not


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
            if largest_error(meta, state | {name: off}, inputs, outputs) <= GATES[meta["method"]]:
                missed.append(name)
    assert missed == free


def test_m3_has_no_weights_but_its_features_off_by_one_percent_are_caught(mesh1):
    meta, state, inputs, outputs = read(Path(__file__).parent / "published" / "m3.npz")
    assert not state
    ((name, off),) = each_off_by_one_percent(inputs)
    with jax.set_mesh(mesh1):
        for scale, tokens in outputs.items():
            counts = {"token_counts": [int(scale.removeprefix("tokens_"))]}
            error = largest_error(meta | counts, state, {name: off}, {scale: tokens})
            assert error > published_trained.GATE


@pytest.mark.parametrize("stem", ["prumerge", "prumerge_plus"])
def test_prumerge_has_no_weights_but_its_inputs_off_by_one_percent_are_caught(stem, mesh1):
    meta, state, inputs, outputs = read(Path(__file__).parent / "published" / f"{stem}.npz")
    assert not state
    with jax.set_mesh(mesh1):
        for name, off in each_off_by_one_percent(inputs):
            error = largest_error(meta, state, inputs | {name: off}, outputs)
            assert error > published_trained.GATE, name


def each_off_by_one_percent(arrays: dict) -> list[tuple[str, np.ndarray]]:
    """Every array with its numbers 1 % too large or too small.

    Signs differ, or a norm behind a weight would undo a common factor.
    """
    draw = np.random.default_rng(0)
    return [
        (name, value * (1 + 0.01 * draw.choice([-1, 1], value.shape)).astype(np.float32))
        for name, value in arrays.items()
    ]
