# SPDX-License-Identifier: Apache-2.0
"""Every compressor has the loss and gradients of one device on meshes over 1, 2 and 4 processes."""

import gradients
import numpy as np
import processes
import pytest

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Case -> mesh of one process of one device, or of the other processes -> arrays by name."""
    folder, made = tmp_path_factory.mktemp("gradients"), {}
    for count, devices in ((1, 1), (1, 8), (2, 4), (4, 2)):
        out = folder / f"{count}x{devices}.npz"
        done = processes.finish(
            processes.start(
                [str(out)], processes=count, devices=devices, script="tests/gradients.py"
            ),
            timeout=3000,
        )
        assert not any(code for code, _, _ in done), done[-1][2]
        with np.load(out) as arrays:
            for key in arrays.files:
                case, shape, name = key.split("/")
                of = made.setdefault(case, {}).setdefault(f"{count} processes, {shape}", {})
                of[name] = arrays[key]
    return made


@pytest.mark.parametrize("case", gradients.CASES)
def test_loss_and_gradients_are_those_of_one_device(case, found):
    one = found[case]["1 processes, 1x1x1"]
    others = {name: x for name, x in found[case].items() if name != "1 processes, 1x1x1"}
    assert len(others) == 3 * len(gradients.EVERY if case == gradients.FULL else gradients.CUTS)
    for where, arrays in others.items():
        assert arrays.keys() == one.keys()
        for name, x in arrays.items():
            scale = np.abs(one[name]).max()
            np.testing.assert_allclose(
                x, one[name], rtol=2e-5, atol=2e-5 * scale, err_msg=f"{where}: {name}"
            )
