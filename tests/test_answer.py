# SPDX-License-Identifier: Apache-2.0
"""Who answers: the forms that fit, with paired draws, or the measured cells alone."""

import dataclasses

import numpy as np
import pytest
from test_law import planted, taken

from vlm_jax.law import answer, law, misfit
from vlm_jax.law.points import Points

DEMO_TEXT = (  # N of millions, V, error: the digits and words of the demo's first grid
    (9.808, 1, 0.978), (9.808, 4, 0.982), (9.808, 9, 0.980), (9.808, 36, 0.977),
    (29.856, 1, 0.920), (29.856, 4, 0.808), (29.856, 9, 0.830), (29.856, 36, 0.687),
    (112.96, 1, 0.804), (112.96, 4, 0.829), (112.96, 9, 0.658), (112.96, 36, 0.456),
)  # fmt: skip


def demo_text() -> Points:
    N, V, error = np.array(DEMO_TEXT).T
    stderr = np.sqrt(error * (1 - error) / 1364)
    return Points(N=N / 1e6, V=V, Q=np.full(12, 8.8), error=error, stderr=stderr, label=[""] * 12)


@pytest.fixture(scope="module")
def strong():
    points = planted("strong")
    fitted = law.fit(points, bootstrap=200)
    return points, fitted, answer.answer(points, fitted, bootstrap=200)[0]


def test_forms_that_fit_share_the_draws(strong):
    _, fitted, found = strong
    assert found.by == "law" and not found.misfit and sum(found.shares.values()) == pytest.approx(1)
    assert found.shares["multiplicative"] > 0.1
    draws = found.draws([2.0, 4.0], [16, 36], count=500)
    assert draws.shape == (500, 2)
    assert draws.mean(0) == pytest.approx(found.error([2.0, 4.0], [16, 36]), abs=0.01)
    own = found.forms["multiplicative"].samples
    assert np.array_equal(own, fitted.samples[: len(own)])
    # one row is one world: the difference of two places varies less than either would alone
    assert np.std(draws[:, 0] - draws[:, 1]) < np.hypot(*draws.std(0))
    wide = found.draws(2.0, 16, count=500, measured=True)
    assert wide.std() > draws[:, 0].std()


def test_an_answer_survives_json(strong):
    _, fitted, found = strong
    again = answer.Answer.from_dict(fitted.to_dict() | {"answer": found.to_dict()})
    assert again.shares == found.shares and again.tests == found.tests
    np.testing.assert_allclose(again.draws(2.0, [4, 9]), found.draws(2.0, [4, 9]), atol=1e-4)
    # a file of before has the law alone
    alone = answer.Answer.from_dict(fitted.to_dict())
    assert alone.shares == {"multiplicative": 1.0}
    assert alone.error(2.0, 4) == pytest.approx(fitted.error(2.0, 4))


def test_where_no_form_fits_the_measured_cells_answer():
    points = demo_text()
    found, _ = answer.answer(points, law.fit(points, bootstrap=100), bootstrap=100)
    assert found.by == "cells" and "no form of the law fits" in found.misfit
    assert "12 measured cells alone" in found.misfit
    again = answer.Answer.from_dict({"form": "multiplicative", "answer": found.to_dict()})
    for one in (found, again):
        assert one.error(points.N, points.V) == pytest.approx(points.error)
        draws = one.draws(points.N[8:], points.V[8:])
        assert np.all(draws[:, :3].min(1) > draws[:, 3])  # 36 tokens are best in every draw
        with pytest.raises(ValueError, match="V=16 was not measured"):
            one.draws(points.N[0], 16)


def test_a_form_that_fits_answers_for_one_that_does_not():
    points = planted("additive", noise=0.0)
    twice = taken(points, [*range(28)] * 2)
    noise = np.random.default_rng(0).normal(0, 0.0005, 56)
    seeds = dataclasses.replace(twice, error=twice.error + noise)
    found, _ = answer.answer(seeds, law.fit(seeds, bootstrap=50), bootstrap=50)
    assert found.by == "law" and "additive" in found.shares
    assert "multiplicative" not in found.shares and "multiplicative form misses" in found.misfit


def test_a_right_form_is_rarely_called_wrong():
    """At one in a thousand and a size that matters: never among these."""
    for name in ("strong", "12 small models", "interaction"):
        for seed in range(10):
            points = planted(name, seed)
            form = "interaction" if name == "interaction" else "multiplicative"
            assert not law.fit(points, form, bootstrap=0, intervals=False).misfit["sentence"]


def test_a_smooth_rest_is_seen_without_seeds_and_standard_errors():
    points = planted("strong", noise=0.002)
    bent = points.error + 0.012 * (np.log(points.V) - 3) ** 2  # few tokens and many are worse
    found = law.fit(dataclasses.replace(points, error=bent), bootstrap=0, intervals=False)
    assert "smooth pattern" in found.misfit["sentence"]
    assert found.misfit["surface"] > misfit.LARGE and found.misfit["noise"] is None
