# SPDX-License-Identifier: Apache-2.0
"""Rows that carry frames: a law of LLM size, frames and tokens of a frame."""

import dataclasses
import json

import numpy as np
import pytest
import tiny
from test_law import planted

from configs import base
from vlm_jax.__main__ import main
from vlm_jax.cost import flops as cost
from vlm_jax.cost import roofline
from vlm_jax.cost.chips import CHIPS
from vlm_jax.law import answer, law
from vlm_jax.models.sizes import ViTSize
from vlm_jax.planning import question


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


def test_a_video_costs_its_frames_encoded_one_by_one_and_an_llm_that_reads_them_all():
    """Of 8 frames x 4 tokens: the encoder of 8 requests, and the LLM of one with 32 tokens."""
    model, packer = tiny.size(tiny.config()), tiny.method
    vit, llm = model.vit, model.llm
    one = cost.request_flops(vit, packer("pool", 4), llm, Q=10, G=3)
    video = cost.request_flops(vit, packer("pool", 4), llm, Q=10, G=3, frames=8)
    long = cost.llm_flops(llm, 10 + 8 * 4)
    assert video.encoder == 8 * one.encoder and video.compressor == 8 * one.compressor
    assert video.prefill == long
    assert video.decode == cost.decode_flops(llm, context=42, G=3)
    # and on a chip that nothing but products binds: a batch of 8 images, and a prefill of 32 tokens
    chip = dataclasses.replace(CHIPS["v5e"], hbm_bytes_per_s=1e30)
    images = roofline.seconds(vit, packer("pool", 4), llm, roofline.Request(10, 3, batch=8), chip)
    frames = roofline.seconds(vit, packer("pool", 4), llm, roofline.Request(10, 3, frames=8), chip)
    assert frames["encoder"] == pytest.approx(images["encoder"])
    assert frames["prefill"] == pytest.approx(long / chip.peak_flops)


def test_a_plan_of_a_video_pays_for_its_frames_and_answers_with_the_law_of_frames(tmp_path, capsys):
    truth = law.Law(
        form="frames", sse=0.0, rmse=0.0, n=1, domain={"frames": [4.0, 32.0]},
        params={"A": 0.3, "B": 0.1, "C": 0.05, "F": 0.2, "G": 0.02, "D": 0.05, "alpha": 0.2,
                "beta": 0.4, "gamma": 0.01, "tau": 0.3, "delta": 0.01},
    )  # fmt: skip
    asked = dict(flops=1e14, text_tokens=50, tokens=[16], llms=[7.0])
    video = question.plan(truth, frames=16, **asked, cost_model="paper")
    assert video.predicted_error == pytest.approx(float(truth.error(7.0, 16, frames=16)))
    assert video.cost == pytest.approx(cost.paper_flops(7.0, 16 * 16, Q=50))
    assert any("no encoder, which runs 16 times" in w for w in video.warnings)
    # By default a video pays for its encoder, once for each frame.
    whole = question.plan(truth, frames=16, **asked)
    encoder = cost.encoder_flops(ViTSize.of(base.get_config().vit), tiny.method("token_packer", 16))
    assert whole.cost > 16 * encoder + 0.9 * video.cost
    assert not [w for w in whole.warnings if "frames" in w or "encoder" in w]
    outside = question.plan(truth, frames=64, **asked).warnings
    assert any("extrapolates frames: 64" in w for w in outside)
    assert any("--frames" in w for w in question.plan(truth, **asked).warnings)
    image = law.fit(planted("strong"), bootstrap=0)
    told = question.plan(image, frames=16, **asked).warnings
    assert any("does not count frames" in w for w in told)
