# SPDX-License-Identifier: Apache-2.0
"""The cell to train next is the one whose result would decide, weighed by what it costs."""

import numpy as np
import pytest

from vlm_jax.law import published
from vlm_jax.law.law import Law, fit
from vlm_jax.planning import next_cell, question
from vlm_jax.planning.decision import odds


def test_a_result_that_tells_worlds_apart_removes_the_regret():
    """Two worlds: candidate 0 loses .1 in one, candidate 1 .06 in the other. By hand."""
    errors = np.tile([[0.3, 0.2], [0.2, 0.26]], (500, 1))
    regret = odds(errors).regret.min()
    assert regret == pytest.approx(0.03)
    telling, silent = np.tile([0.2, 0.4], 500), np.full(1000, 0.3)
    assert next_cell.expected_regret(errors, telling, 0.01) < 1e-6
    assert next_cell.expected_regret(errors, silent, 0.01) == pytest.approx(regret)
    # The noisier the result, the less it says; never more than nothing is lost on average.
    by_noise = [next_cell.expected_regret(errors, telling, sd) for sd in (0.05, 0.1, 0.3, 3.0)]
    assert by_noise == sorted(by_noise) and by_noise[-1] == pytest.approx(regret, rel=0.1)


@pytest.fixture(scope="module")
def law():
    """A law of seven noisy cells: it does not know whether tokens or parameters gain more."""
    rng = np.random.default_rng(1)
    points = published.points("reasoning").where(np.isin(np.arange(28), [0, 3, 6, 8, 12, 15, 24]))
    noisy = points.error + rng.normal(0, 0.02, len(points))
    return fit(type(points)(points.N, points.V, points.Q, noisy, points.stderr, points.label),
               bootstrap=300, intervals=False)  # fmt: skip


def test_the_cells_are_ranked_by_regret_saved_per_flop(law):
    plan = question.plan(law, flops=4e11, text_tokens=50, next_cells=99)
    cells, now = plan.fields["next"], plan.fields["decision"]["regret"]
    assert cells and len({(c["N"], c["V"]) for c in cells}) == len(cells)
    worth = [(c["regret_now"] - c["regret_after"]) / c["training_flops"] for c in cells]
    assert worth == sorted(worth, reverse=True) and worth[0] > 0
    assert all(0 <= c["regret_after"] <= c["regret_now"] <= now + 1e-12 for c in cells)
    first = cells[0]
    assert f"training N = {first['N']:.4g}, V = {first['V']:.4g}" in first["reason"]
    assert first["llm"] and first["reason"].startswith("the choice is between N = ")


def test_where_nothing_can_be_predicted_no_cell_is_named(law):
    bare = Law("multiplicative", law.params, sse=0.0, rmse=0.0, n=7, domain=law.domain)
    for which, how in ((bare, {}), (law, dict(llms="continuous", tokens="continuous"))):
        with pytest.raises(ValueError, match="--next needs a law with draws"):
            question.plan(which, flops=4e11, text_tokens=50, next_cells=1, **how)
