# SPDX-License-Identifier: Apache-2.0
"""Rows that carry frames: a law of LLM size, frames and tokens of a frame."""

import json

import numpy as np
import pytest
from test_law import planted

from vlm_jax.__main__ import main
from vlm_jax.law import answer, law


def test_frames_are_a_third_variable_beside_size_and_tokens_of_a_frame(tmp_path, capsys):
    truth = dict(
        A=0.15, alpha=0.5, beta=0.4, D=0.1, F=0.2, tau=0.6, B=0.1, C=0.1, gamma=-0.2, G=0.1,
        delta=-0.3,
    )  # fmt: skip
    grid = [(n, v, f) for n in (0.5, 1.0, 2.8, 7.5) for v in (4, 16, 49, 196) for f in (4, 8, 32)]
    N, V, frames = np.array(grid, float).T
    exact = law.Law(form="frames", params=truth, sse=0.0, rmse=0.0, n=1).error(N, V, frames=frames)
    error = exact + np.random.default_rng(0).normal(0, 0.002, len(N))
    lines = [f"{n},{v},{f},{e}" for n, v, f, e in zip(N, V, frames, error, strict=True)]
    (tmp_path / "t.csv").write_text("\n".join(["N,V,frames,error", *lines]))
    flags = ["fit", f"--rows={tmp_path / 't.csv'}", f"--out={tmp_path}", "--bootstrap=20"]
    assert main([*flags, "--form=frames"]) == 0
    fields = json.loads((tmp_path / "law.json").read_text())
    found = answer.Answer.from_dict(fields)
    assert fields["domain"]["frames"] == [4, 32] and set(found.shares) == {"frames"}
    assert fields["rmse"] < 0.0025
    # between the measured frames, and beyond the measured sizes
    place = (np.array([2.0, 15.0]), np.array([36.0, 36.0]))
    wanted = law.Law(form="frames", params=truth, sse=0.0, rmse=0.0, n=1).error(*place, frames=16)
    assert found.error(*place, frames=16) == pytest.approx(wanted, abs=0.01)
    assert found.draws(*place, frames=16, count=40).shape == (40, 2)
    assert main(flags) == 2
    assert "3 numbers of frames, which the multiplicative form" in capsys.readouterr().err
    with pytest.raises(ValueError, match="one number of frames"):
        law.fit(planted("strong"), "frames")
