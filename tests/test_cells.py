# SPDX-License-Identifier: Apache-2.0
"""Cells of bucketed rows: the same batches for every V, and what their training costs."""

import numpy as np
import pytest
import tiny

from vlm_jax.data import loader, sources
from vlm_jax.data.processor import Processor
from vlm_jax.data.texts import Texts
from vlm_jax.grids import details
from vlm_jax.training.cells import cells_of, train_flops
from vlm_jax.training.inputs import Inputs, tokenizer_of

BUCKETS = (12, 22)


@pytest.fixture(scope="module")
def cells():
    return cells_of(tiny.config(data=dict(buckets=BUCKETS), grid=dict(baselines=())))


@pytest.fixture(scope="module")
def inputs(cells):
    """The training split of the cells, on this process's simulated devices."""
    recipe = cells[0].recipe
    source = sources.open_source(recipe.origin, "train")
    tokenizer = tokenizer_of("", recipe.model.llm.vocab, None, source)
    return Inputs(source, Processor(tokenizer, recipe.rows))


def test_bucketed_cells_see_the_same_examples_whatever_their_V(cells, inputs):
    texts, batches = inputs.texts(answer=True, skip=False), []
    for cell in cells:
        of = dict(batch=8, seed=cell.seed, visual=cell.recipe.visual)
        plan = loader.planned(texts, cell.recipe.arrangement, **of)
        batches.append([[row.tolist() for row in plan.batch(k).rows] for k in range(6)])
    assert len({cell.recipe.visual for cell in cells}) > 1
    assert all(of_cell == batches[0] for of_cell in batches)


def test_training_is_counted_by_the_mean_length_of_its_batches(cells, inputs):
    recipe = cells[0].recipe
    text = details.text_places(recipe, inputs, seed=0)
    texts: Texts = inputs.texts(answer=True, skip=False)
    ends = (*BUCKETS, recipe.rows.text_length)
    filled = [min(end for end in ends if end >= n) for n in texts.lengths().text]
    # Leftovers of an epoch go into longer rows, or wait for the next one.
    assert text == pytest.approx(np.mean(filled), rel=0.05) and text < recipe.rows.text_length
    most, mean = train_flops(recipe), train_flops(recipe, text=text)
    assert train_flops(recipe, text=float(recipe.rows.text_length)) == most
    assert mean < most * (text + recipe.visual) / (recipe.rows.text_length + recipe.visual) * 1.2
    plain = tiny.recipe(tiny.config())
    assert details.text_places(plain, inputs, seed=0) is None


@pytest.mark.parametrize("data, compressor, words", [
    (dict(row_length=64), {}, "data.row_length=64: which examples share a packed row depends on V"),
    (dict(buckets=(30,), template="question_first"), dict(kind="quecc", query="prefix"),
     "data.buckets=.30,.: with compressor.query='prefix' .small-v1-quecc-s0. rows have other"),
])  # fmt: skip
def test_rows_that_would_differ_between_cells_are_refused(data, compressor, words):
    with pytest.raises(ValueError, match=words):
        cells_of(tiny.config(data=data, compressor=compressor))
