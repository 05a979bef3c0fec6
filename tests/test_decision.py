# SPDX-License-Identifier: Apache-2.0
"""Chances and regrets are those of the worlds drawn; what binds, and what is not known, is said."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from vlm_jax.law import families, published
from vlm_jax.law.law import fit
from vlm_jax.law.points import Points
from vlm_jax.planning import decision, parsing, question
from vlm_jax.planning.mixture import Mixture

REASONING, OCR = (fit(published.points(name), bootstrap=200) for name in ("reasoning", "ocr"))
BOTH = Mixture({"reasoning": REASONING, "ocr": OCR}, {"reasoning": 0.3, "ocr": 0.7})
V5E = dict(chip="v5e", new_tokens=5, efficiency=0.6)


def planned(law, **how):
    """A plan for 50 text tokens, as JSON fields."""
    return question.plan(law, **(dict(text_tokens=50) | how)).fields


def test_odds_are_counted_over_worlds():
    """Three worlds by hand; equal errors go to the first candidate."""
    draws = np.array([[0.3, 0.2, 0.4], [0.1, 0.2, 0.3], [0.2, 0.2, 0.1]])
    found = decision.odds(draws)
    assert found.best == pytest.approx([1 / 3, 1 / 3, 1 / 3])
    assert found.regret == pytest.approx([0.2 / 3, 0.2 / 3, 0.4 / 3])
    assert decision.odds(np.full((4, 2), 0.5)).best.tolist() == [1, 0]
    weighted = decision.odds(draws, np.array([0.5, 0.5, 0.0]))
    assert weighted.best == pytest.approx([0.5, 0.5, 0])
    assert weighted.regret[0] == pytest.approx(0.05)


def test_what_is_common_to_all_candidates_decides_nothing():
    """Errors known to .1, their difference to .001: intervals overlap, the choice is sure."""
    rng = np.random.default_rng(0)
    common = rng.normal(0, 0.1, (1000, 1))
    draws = 0.5 + common + rng.normal([0.0, 0.005], 0.001, (1000, 2))
    assert decision.odds(draws).best[0] > 0.99


def test_what_is_as_good_is_listed_with_its_chance_and_cost():
    """Every configuration within epsilon, best first; chances of all candidates sum to 1."""
    answer = planned(REASONING, flops=2e12, cost_model="full", epsilon=0.02)
    others, known = answer["runner_ups"], answer["decision"]
    errors = [other["error"] for other in others]
    assert errors == sorted(errors) and len(errors) > 1
    assert all(0 <= e - answer["predicted_error"] <= 0.02 for e in errors)
    assert 0 <= known["regret"] <= known["regret_95"] and known["epsilon"] == 0.02
    wide = planned(REASONING, flops=2e12, cost_model="full", epsilon=1)
    assert len(wide["runner_ups"]) == known["candidates"] - 1 > len(others)
    chances = [known["p_best"], *(other["p_best"] for other in wide["runner_ups"])]
    assert sum(chances) == pytest.approx(1)


def test_the_limit_that_binds_is_named_with_what_more_of_it_buys():
    """40 ms bind, the chip's memory does not; what "next" needs is a budget that buys it."""
    answer = planned(BOTH, ms=40, **V5E)
    time, memory = answer["limits"]
    assert (time["unit"], time["binds"], memory["unit"]) == ("ms", True, "hbm")
    assert time["used"] == answer["cost"]["amount"] <= time["limit"] < time["next"]["needs"]
    more = planned(BOTH, ms=time["next"]["needs"] * (1 + 1e-9), **V5E)
    assert (more["N"], more["V"]) == (time["next"]["N"], time["next"]["V"])
    saved = answer["predicted_error"] - more["predicted_error"]
    assert saved == pytest.approx(time["next"]["error_saved"])
    (flops,) = planned(REASONING, flops=1e12, llms="continuous", tokens="continuous")["limits"]
    assert flops["binds"] and flops["next"]["more"] == pytest.approx(0.25)


def test_a_law_of_another_method_is_said():
    law = dataclasses.replace(BOTH, method="mqt")
    own = planned(law, flops=1e12)
    assert own["compressor"] == "mqt" and own["V"] in (2**i for i in range(9))
    assert not own["warnings"]
    other = planned(law, flops=1e12, compressors=["quecc"])
    assert any("with mqt: it does not know the errors of quecc" in w for w in other["warnings"])
    odd = planned(law, flops=1e12, tokens=[5, 16, 700])
    assert any("mqt cannot give V = 700" in w for w in odd["warnings"])


def test_each_compressor_is_judged_by_its_own_law(tmp_path):
    """Two methods of one law.json: the same cost, errors of their own, chances among all pairs."""
    fields = REASONING.to_dict() | {"method": "token_packer"}
    better = fields | {"method": "mqt", "A": 0.9 * fields["A"]}
    better["samples"] = dict(fields["samples"])
    first = fields["samples"]["names"].index("A")
    better["samples"]["values"] = [
        [0.9 * x if i == first else x for i, x in enumerate(row)]
        for row in fields["samples"]["values"]
    ]
    whole = fields | {"methods": {"token_packer": fields, "mqt": better}}
    (tmp_path / "law.json").write_text(json.dumps(whole))
    how = dict(flops=4e11, compressors=["token_packer", "mqt"], epsilon=1)
    answer = planned(tmp_path, **how)
    assert answer["compressor"] == "mqt" == answer["law"]["method"]
    assert not any("errors of" in w or "by cost alone" in w for w in answer["warnings"])
    at = {(c["compressor"], c["N"], c["V"]): c["error"] for c in answer["runner_ups"]}
    assert at["mqt", 1.8, 16] == pytest.approx(0.9 * at["token_packer", 1.8, 16], rel=1e-3)
    chances = [answer["decision"]["p_best"], *(c["p_best"] for c in answer["runner_ups"])]
    assert sum(chances) == pytest.approx(1) and chances[0] > 0.9
    alone = planned(tmp_path, flops=4e11, compressors=["mqt"])
    assert alone["predicted_error"] == answer["predicted_error"]


def test_where_no_form_fits_the_measured_cells_answer(tmp_path):
    """A planted bend that no power law has: the best measured cell within the budget, as it is."""
    rng = np.random.default_rng(0)
    N, V = (x.ravel().repeat(3) for x in np.meshgrid([0.5, 1.8, 4, 7], [1, 4, 16, 64.0]))
    error = 0.5 - 0.03 * np.log(N) + 0.2 * np.abs(np.log(V / 16)) / 3 + rng.normal(0, 1e-3, 48)
    points = Points(N, V, np.zeros(48), error, np.full(48, np.nan), [""] * 48)
    fitted = families.fit_families({"all": points}, {}, bootstrap=20, method="token_packer")
    (tmp_path / "law.json").write_text(json.dumps(fitted.fields))
    answer = planned(tmp_path, flops=3e11, text_tokens=0)
    assert answer["law"]["answers"]["all"]["by"] == "cells"
    assert (answer["N"], answer["V"]) == (7, 16) and answer["decision"]["p_best"] == 1
    assert answer["predicted_error"] == pytest.approx(error[(N == 7) & (V == 16)].mean())
    assert any("measured cells alone" in w for w in answer["warnings"])
    with pytest.raises(ValueError, match="leave continuous out"):
        planned(tmp_path, flops=3e11, llms="continuous", tokens="continuous")


def test_a_limit_of_a_life_binds_and_refuses():
    """Amounts of training lie far above those of a request, where no server is too slow."""
    how = dict(requests=1e9, new_tokens=5)
    answer = planned(REASONING, lifetime_flops=3e21, **how)
    (limit,) = answer["limits"]
    assert limit["binds"] and limit["next"]["needs"] > limit["limit"] > limit["used"]
    with pytest.raises(ValueError, match="and the limit is 1e\\+17"):
        planned(REASONING, lifetime_flops=1e17, **how)


def test_a_family_without_a_weight_is_not_asked():
    """Text is answered by its measured cells alone: V = 16 was not measured."""
    path = Path(__file__).parent.parent / "docs/results/demo/law.json"
    law = parsing.read_laws(str(path), "reasoning:1,text:0")
    assert 0 < law.error(2e-5, 16, 9) < 1 and law.draws([2e-5], [16], 9).shape == (1000, 1)
    assert law.interval(2e-5, 16, 9)[0] < law.error(2e-5, 16, 9)
    with pytest.raises(ValueError, match="was not measured"):
        parsing.read_laws(str(path), "reasoning:1,text:1").error(2e-5, 16, 9)
