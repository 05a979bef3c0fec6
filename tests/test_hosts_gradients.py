# SPDX-License-Identifier: Apache-2.0
"""Every compressor has the loss and gradients of one device on meshes over 1, 2 and 4 processes."""

import functools

import gradients
import numpy as np
import processes
import pytest

pytestmark = pytest.mark.slow
# What float32 rounding may be, of the largest entry of each gradient.
ROUNDING = 2e-5
# They move all keys of an image alike, which a softmax over them does not see: a gradient of 0, but
# for rounding.
UNSEEN = ("compressor.key_norm.bias.value", "compressor.attention.key.bias.value")
# Processes x devices of each. The first test of each waits for all of its cases.
LAYOUTS = pytest.mark.parametrize("count, devices", [(1, 8), (2, 4), (4, 2)])


@pytest.fixture(scope="module")
def found(request, tmp_path_factory):
    """Processes and devices of each -> CASE/MESH/NAME -> loss or gradient, for the cases of the
    tests that were chosen (-k)."""
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    cases = {spec.params["case"] for spec in chosen if spec and "case" in spec.params}
    asked = [f"--case={case}" for case in gradients.CASES if case in cases]

    @functools.cache
    def of(count, devices):
        folder = tmp_path_factory.mktemp(f"{count}x{devices}")
        done = processes.finish(
            processes.start(
                [str(folder), *asked], processes=count, devices=devices, script="tests/gradients.py"
            ),
            timeout=3000,
        )
        assert not any(code for code, _, _ in done), done[-1][2]
        return together([dict(np.load(folder / f"{process}.npz")) for process in range(count)])

    return of


def together(parts):
    """The arrays of which each process has a part, NaN elsewhere; AssertionError where two have a
    place and differ. What none has stays NaN."""
    whole = {key: np.fmax.reduce([part[key] for part in parts]) for key in parts[0]}
    for part in parts:
        for key, x in part.items():
            np.testing.assert_array_equal(x, np.where(np.isnan(x), x, whole[key]), key)
    return whole


def of_case(arrays, case):
    return {key: x for key, x in arrays.items() if key.startswith(f"{case}/")}


@LAYOUTS
@pytest.mark.parametrize("case", gradients.CASES)
def test_loss_and_gradients_are_those_of_one_device(count, devices, case, found):
    one, far = of_case(found(1, 1), case), {}
    several = of_case(found(count, devices), case)
    meshes = gradients.meshes_of(case, processes=count, devices=count * devices)
    assert len(one) > 20 and len(several) == len(meshes) * len(one)
    largest = max(np.abs(x).max() for key, x in one.items() if not key.endswith("/loss"))
    for key, x in several.items():
        name = key.rpartition("/")[2]
        plain = one[f"{case}/1x1x1/{name}"]
        if name in UNSEEN:
            assert max(np.abs(y).max() for y in (x, plain)) < 1e-7 * largest, key
            continue
        scale = np.abs(plain).max()
        far[key] = np.abs(x - plain).max() / scale if scale else np.abs(x).max()
    worst = max(far, key=lambda key: np.nan_to_num(far[key], nan=np.inf))
    assert far[worst] < ROUNDING, f"{worst}: {far[worst]:.1e}"


@pytest.mark.parametrize("case", gradients.CASES)
@pytest.mark.parametrize("count, devices", [(2, 4), (4, 2)])
def test_several_processes_have_the_bits_of_one_with_as_many_devices(count, devices, case, found):
    several, one = (of_case(found(*of), case) for of in ((count, devices), (1, 8)))
    for key, x in several.items():
        np.testing.assert_array_equal(x, one[key], key)
