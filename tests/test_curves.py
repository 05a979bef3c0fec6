# SPDX-License-Identifier: Apache-2.0
"""The title of a figure says what its cells say, and nothing that chance says; its caption names
the form of the law that is drawn."""

import numpy as np
import pytest

from vlm_jax.law import law, published
from vlm_jax.reports import cells, colors, cost_figures, curves, figures


def table_of(errors, stderr=0.001, *, N=(1, 1, 2, 2), V=(1, 4, 1, 4)):
    """Cells of two LLM sizes, 1 and 2 billions, with 1 and 4 visual tokens."""
    columns = (np.array(x, float) for x in (N, V, [10] * len(N), errors))
    return cells.Cells(*columns, np.full(len(N), stderr), np.ones(len(N), int))


@pytest.mark.parametrize("errors, stderr, title", [
    ((0.9, 0.95, 0.5, 0.6), 0.01, "x: the best choices have\n1 of 4 visual tokens"),
    ((0.9, 0.95, 0.5, 0.4), 0.01, "x: the best choices have\n1 of 4 visual tokens\n"
                                  "until the LLM has 2 B parameters"),
    ((0.9, 0.8, 0.7, 0.6), 0.01, "x: the best choices go\nup to all 4 visual tokens"),
    ((0.51, 0.52, 0.50, 0.49), 0.02, "x: no cell is better than\nthe cheapest beyond chance"),
    ((0.51, 0.52, 0.53, 0.54), 0.0001, "x: no cell is better than\nthe cheapest beyond chance"),
    ((0.9, 0.8, 0.7, 0.6), np.nan, "x: the best choices go\nup to all 4 visual tokens"),
])  # fmt: skip
def test_a_title_says_what_the_cells_say_and_nothing_that_chance_says(errors, stderr, title):
    found = table_of(errors, stderr)
    assert curves.conclusion("x", found, found.flops) == title


def test_a_caption_names_the_form_that_is_drawn(tmp_path):
    points = published.points("reasoning")
    fitted = law.fit(points, "interaction", bootstrap=20, intervals=False)
    looks = colors.of_sizes(points.N)
    made = figures.points_figures(points, fitted, tmp_path, "reasoning", looks=looks, asked=(0.0,))
    made.append(cost_figures.error_against_cost(
        points, fitted, points.N * points.V, tmp_path, family="reasoning", name="cost", x="cost",
        title="", words="a cost.", looks=looks,
    ))  # fmt: skip
    said = {figure.name: figure.caption for figure in made}
    for name in ("reasoning_flops_q0", "cost"):
        assert "Curves and bands are the interaction form" in said[name]
    assert said["reasoning_extrapolation"].startswith("The interaction form fitted without")
