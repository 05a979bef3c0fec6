# SPDX-License-Identifier: Apache-2.0
"""Laws of published methods: what the points show, and a new method that is pooled with them."""

import dataclasses
import json

import numpy as np
import pytest

from vlm_jax.__main__ import main
from vlm_jax.law import answer, methods
from vlm_jax.law.law import Law

SELECTION = ("mmtok", "divprune", "visionzip")


@pytest.fixture(scope="module")
def known():
    return methods.fit_published()


def test_one_token_is_best_for_trained_compressors_only(known):
    best = {name: known.best[name]["0"]["V"] for name in known.laws}
    assert {best["quecc"], best["token_packer"]} == {1} and best["mqt"] == 16
    assert all(64 <= best[name] <= 192 for name in SELECTION)
    # the same from the measured errors alone, with the paper's way to count a budget
    for name in ("mqt", *SELECTION):
        points = known.points[name].where(known.points[name].N == 7)
        alpha = known.laws[name].params["alpha"]
        direct = points.V[(points.error * points.V**alpha).argmin()]
        found = known.best[name]["0"]
        assert found["V"] == direct and found["share"] > 0.5
    texts = [known.best[name]["50"]["V"] for name in ("quecc", "token_packer", "mqt")]
    assert all(16 <= V <= 36 for V in texts)


def test_methods_share_alpha_and_have_a_beta_each(known):
    alphas = {tuple(law.intervals["alpha"]) for law in known.laws.values()}
    assert len(alphas) == 1
    for law in known.laws.values():
        low, high = law.intervals["alpha"]
        assert low < 0.0742 < high  # the mean over all ten pairs of 7B and 13B
        assert law.intervals["beta"][0] < law.params["beta"] < law.intervals["beta"][1]
        assert law.rmse < 0.007
        np.testing.assert_allclose(
            law.error(13.0, 64) / law.error(7.0, 64), (13 / 7) ** -law.params["alpha"]
        )
    assert {"voco_llama", "llava_mini"} <= known.alone.keys()  # one token count has no law


@pytest.mark.parametrize("name", [*SELECTION, "quecc", "token_packer", "mqt"])
def test_three_cells_of_a_method_nobody_has_published_give_bands_that_hold_the_rest(known, name):
    laws = {other: law for other, law in known.laws.items() if other != name}
    others = dataclasses.replace(known, laws=laws)
    points = known.points[name].where(known.points[name].N == 7)
    few = np.isin(np.arange(len(points)), (0, 2, len(points) - 2))
    law = methods.pooled(points.where(few), others)
    rest = points.where(~few)
    low, high = law.band(7.0, rest.V, measured=True)
    assert np.all((low <= rest.error) & (rest.error <= high))
    wide, narrow = (
        np.ptp(methods.pooled(points.where(k), others).band(7.0, 576))
        for k in (few & (points.V < points.V[few].max()), few)
    )
    assert wide > narrow  # fewer cells say less
    assert "Pooled: 3 cells" in law.notes[0]


def test_the_command_writes_a_law_for_each_method(tmp_path, capsys):
    flags = ["fit", "--published=methods", f"--out={tmp_path}", "--bootstrap=100"]
    assert main([*flags, "--compressor=mmtok"]) == 0
    fields = json.loads((tmp_path / "law.json").read_text())
    err = capsys.readouterr().err
    assert fields["method"] == "mmtok" and fields["best_tokens"]["0"]["V"] == 64
    assert fields["domain"]["V"] == [8, 576] and fields["schema"] == 2
    assert any("no seeds and no standard errors" in note for note in fields["notes"])
    assert "visionzip    free" in err and "best V at Q = 0: 192" in err
    quecc = answer.Answer.from_dict(fields["methods"]["quecc"])
    assert quecc.draws(7.0, [1, 36]).shape == (1000, 2)
    assert Law.from_dict(fields).error(7.0, 64) == pytest.approx(0.316, abs=0.01)
    assert main([*flags, "--compressor=magic"]) == 2
    assert "no published method 'magic'" in capsys.readouterr().err

    table = tmp_path / "mine.csv"
    table.write_text("N,V,accuracy,method\n7,4,61,mine\n7,36,66,mine\n7,144,68,mine\n")
    assert main([*flags, f"--rows={table}"]) == 0
    fields = json.loads((tmp_path / "law.json").read_text())
    assert fields["method"] == "mine" and fields["n"] == 3 and "mqt" in fields["methods"]
    low, high = Law.from_dict(fields).band(7.0, 36)
    assert low < 0.34 < high < low + 0.05
    assert main(["fit", "--published=ocr", f"--rows={table}", f"--out={tmp_path}"]) == 2
    assert "--published=ocr is fitted alone" in capsys.readouterr().err
