# SPDX-License-Identifier: Apache-2.0
"""Scores at equal compute, methods side by side, and the costs and choices behind them."""

import csv

import made_rows
import numpy as np
import pytest

from vlm_jax.cost import flops as cost
from vlm_jax.law import published
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
