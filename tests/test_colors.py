# SPDX-License-Identifier: Apache-2.0
"""A color means one thing in all figures of a run."""

import made_rows
import pytest

from vlm_jax.law import law
from vlm_jax.reports import canvas as canvases
from vlm_jax.reports import colors, figures
from vlm_jax.reports import run as runs
from vlm_jax.rows import records


def test_a_language_model_has_one_color_and_nothing_else_has_it(tmp_path, monkeypatch):
    """Every mark that the CSV ties to one N, in every figure of a run."""
    seen = {}

    def noting(name):
        draw = getattr(canvases.Canvas, name)

        def noted(self, series, x, *args, **more):
            n = more.get("N_billions")
            seen.setdefault(more.get("color", "black"), set()).add(
                n if isinstance(n, float) else "none"
            )
            return draw(self, series, x, *args, **more)

        monkeypatch.setattr(canvases.Canvas, name, noted)

    for name in ("line", "band", "points", "bars"):
        noting(name)
    rows = made_rows.rows(methods=made_rows.METHODS)
    laws = {f: law.fit(records.points(
        [row for row in rows if row.method == "token_packer" and not row.blind], f), bootstrap=50)
        for f in ("reasoning", "text")}  # fmt: skip
    figures.run_figures(runs.of(rows, "token_packer"), laws, canvases.Output(tmp_path, png=False))
    looks = colors.of_sizes(n / 1e9 for n in made_rows.SIZES)
    for n, look in looks.items():
        assert seen[look.color] == {n}
    assert not list(tmp_path.glob("*.png"))


def test_more_sizes_than_can_be_told_apart_are_refused():
    assert len(colors.of_sizes(range(colors.MOST_SIZES))) == colors.MOST_SIZES
    with pytest.raises(colors.TooManySizes, match="13 LLM sizes cannot be told apart"):
        colors.of_sizes(range(13))
