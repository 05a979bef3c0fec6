# SPDX-License-Identifier: Apache-2.0
"""Scores at equal compute, methods side by side, and the costs and choices behind them."""

import csv

import made_rows
import numpy as np
import pytest

from vlm_jax.cost import flops as cost
from vlm_jax.law import published
from vlm_jax.law.points import Points
from vlm_jax.reports import cells, colors, score_figures
from vlm_jax.reports import run as runs


def test_equal_compute_finds_the_diagonal_of_the_published_grid_and_says_its_cost(tmp_path):
    groups = {name: cells.average(published.points(name)) for name in ("reasoning", "ocr")}
    looks = colors.of_sizes(groups["ocr"].N)
    (figure,) = score_figures.equal_compute(groups, tmp_path, name="four", Q=0, looks=looks)
    with figure.csv.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["label"] == "reasoning"]
    pairs = [(float(r["N_billions"]), float(r["V"])) for r in rows]
    assert pairs == [(0.5, 576), (1.8, 144), (4, 64), (7, 36)]
    assert [float(r["y"]) for r in rows] == pytest.approx([0.4320, 0.4758, 0.5023, 0.5141])
    assert [float(r["flops"]) for r in rows] == pytest.approx([2e9 * n * v for n, v in pairs])


def test_a_run_of_one_method_has_no_figure_of_methods(tmp_path):
    rows = [row for row in made_rows.rows() if row.compressor != "pool"]
    assert score_figures.methods(runs.of(rows), "text", tmp_path, name="m", looks={}) == []


def test_the_simple_cost_is_the_cost_model_s():
    assert cells.simple_flops(7.0, 36.0, 50.0) == cost.paper_flops(7.0, 36.0, Q=50.0)


def test_a_cell_is_on_the_pareto_set_when_no_cell_is_cheaper_and_better():
    rng = np.random.default_rng(1)
    cost_, error = rng.integers(0, 12, 40).astype(float), rng.integers(0, 12, 40).astype(float)
    pairs = list(zip(cost_, error, strict=True))
    beaten = [any(c <= c0 and e <= e0 and (c, e) != (c0, e0) for c, e in pairs) for c0, e0 in pairs]
    assert cells.pareto(cost_, error).tolist() == [not b for b in beaten]


def test_an_average_is_that_of_the_points_of_each_cell():
    rng = np.random.default_rng(2)
    stderr = np.where(rng.random(90) < 0.3, np.nan, rng.random(90))
    points = Points(
        N=rng.choice([0.5, 7.0], 90), V=rng.integers(1, 20, 90).astype(float), Q=rng.random(90),
        error=rng.random(90), stderr=stderr, label=[""] * 90,
    )  # fmt: skip
    found = cells.average(points)
    assert np.lexsort((found.V, found.N)).tolist() == list(range(len(found.N)))
    assert found.seeds.sum() == 90 and {1, 2} <= set(found.seeds)
    for i in range(len(found.N)):
        mine = (points.N == found.N[i]) & (points.V == found.V[i])
        error, known = points.error[mine], stderr[mine & np.isfinite(stderr)]
        several = len(error) > 1
        sampling = (known**2).mean() if len(known) else 0.0 if several else np.nan
        spread = np.sqrt(sampling + (error.var(ddof=1) / len(error) if several else 0.0))
        assert found.error[i] == pytest.approx(error.mean())
        assert found.Q[i] == pytest.approx(points.Q[mine].mean())
        assert found.stderr[i] == pytest.approx(spread, nan_ok=True)
        assert found.seeds[i] == len(error)


def test_cells_at_equal_compute_are_the_most_sizes_and_among_them_the_most_alike():
    rng = np.random.default_rng(3)
    N, flops = np.repeat([1.0, 2.0, 4.0], 6), np.exp(rng.uniform(0, 3, 18))
    found = cells.equal_compute(flops, N)
    best = (0, 0.0)
    for target in flops:
        near = [min(np.flatnonzero(N == n), key=lambda i: abs(np.log(flops[i] / target)))
                for n in np.unique(N)]  # fmt: skip
        near = [i for i in near if max(flops[i] / target, target / flops[i]) <= 1.5]
        ratio = flops[near].max() / flops[near].min()
        best = max(best, (len(near) if ratio <= 1.5 else 0, -ratio))
    assert (len(found), -flops[found].max() / flops[found].min()) == best
    assert len({N[i] for i in found}) == len(found)
    assert cells.equal_compute([1.0, 100.0], [1.0, 2.0]) == []
