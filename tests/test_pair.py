# SPDX-License-Identifier: Apache-2.0
"""The pair at equal compute follows the planted laws, and its choice does not follow its scores."""

import dataclasses

import made_rows

from vlm_jax.reports import pair
from vlm_jax.reports import run as runs

SIZES, TOKENS = (25_000, 80_000, 250_000), (1, 4, 16, 36)


def made(**how):
    """A run of the planted laws: reasoning gains from N, text from V."""
    return runs.of(made_rows.rows(sizes=SIZES, tokens=TOKENS, noise=0.0, **how))


def test_one_family_shows_the_thesis_and_the_other_its_opposite():
    found, without = pair.pairs(made())
    assert not without and [p.family for p in found] == ["reasoning", "text"]
    reasoning, text = found
    for p in found:
        assert p.larger.parameters > p.smaller.parameters and p.larger.V < p.smaller.V
        assert 1 / pair.SPREAD <= p.larger.flops / p.smaller.flops <= pair.SPREAD
        assert p.larger.flops == 2 * p.larger.parameters * (14.25 + p.larger.V)
    assert "as the thesis says" in reasoning.verdict
    assert "the opposite of the thesis" in text.verdict


def test_scores_do_not_choose_the_pair():
    run = made()
    worse = [
        dataclasses.replace(
            row,
            families={k: f | {"score": 0.5 + (-1) ** i * 0.01} for k, f in row.families.items()},
        )
        for i, row in enumerate(run.rows)
    ]
    first, _ = pair.pairs(run)
    second, _ = pair.pairs(runs.of(worse))
    for a, b in zip(first, second, strict=True):
        assert (a.larger.name, a.smaller.name) == (b.larger.name, b.smaller.name)
    assert any("no difference beyond" in p.verdict for p in second)


def test_a_run_without_such_cells_says_so():
    rows = [row for row in made().rows if row.llm_parameters == SIZES[0]]
    found, without = pair.pairs(runs.of(rows))
    assert not found and len(without) == 2 and "no two measured cells" in without[0]
    assert pair.pairs(runs.of([])) == ([], [])
