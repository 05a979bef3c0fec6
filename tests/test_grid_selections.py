# SPDX-License-Identifier: Apache-2.0
"""A grid trains the model without compression once, and every selection answers with it."""

import json

import jax
import pytest
import tiny

from vlm_jax.grids import run
from vlm_jax.rows import records
from vlm_jax.training import workdir
from vlm_jax.training.cells import cells_of

PATCHES = 16


def grid(*baselines, kind="token_packer", tokens=4):
    """One LLM, one V of a method, and these baselines."""
    c = tiny.config(
        encoder=dict(steps=0), align=dict(steps=0), finetune=dict(steps=2),
        compressor=dict(kind=kind, tokens=tokens),
    )  # fmt: skip
    with c.unlocked():
        c.grid.llms = dict(only=dict(depth=1))
        c.grid.baselines = baselines
    c.grid.tokens = (tokens,)
    return c


SELECTIONS = (("visionzip", 4), ("divprune", PATCHES))


@pytest.fixture(scope="module")
def done(tmp_path_factory, mesh1):
    """A finished grid's folder, and its rows by method and V."""
    folder = tmp_path_factory.mktemp("selections") / "grid"
    # The first cell selects, so that a selection trains the model.
    config = run.checked(grid(*SELECTIONS[1:], ("none", PATCHES), kind="visionzip"))
    with pytest.MonkeyPatch.context() as patch, jax.set_mesh(mesh1):
        patch.setattr("vlm_jax.reports.figures.run_figures", lambda *given, **more: [])
        with workdir.claim(folder, config, grid=True) as claimed:
            run.run(claimed, "vlm-jax grid")
    rows = records.read(folder / "rows.jsonl")
    return folder, {(row.compressor, row.V): row for row in rows}


def test_one_model_is_trained_for_all_selections(done):
    folder, rows = done
    trained = {path.parts[-3] for path in folder.glob("cells/*/finetune/metrics.jsonl")}
    assert trained == {"only-v16-none-s0"}
    for kind, tokens in SELECTIONS:
        row = rows[kind, tokens]
        assert row.trained_with == "only-v16-none-s0"
        assert row.train == rows["none", PATCHES].train


def test_all_patches_of_a_selection_answer_as_the_model_without_compression(done):
    folder, rows = done
    said = []
    for name in ("only-v16-divprune-s0", "only-v16-none-s0", "only-v4-visionzip-s0"):
        lines = (folder / "cells" / name / "predictions.jsonl").read_text().splitlines()
        said.append([json.loads(line)["answer"] for line in lines])
    assert said[0] == said[1] and len(said[0]) == len(said[2])
    assert rows["visionzip", 4].flops["prefill"] < rows["none", PATCHES].flops["prefill"]


def test_what_only_a_choice_reads_is_made_of_the_test_images_alone(done):
    folder, _ = done
    assert {path.name for path in (folder / "features").iterdir()} == {
        "train.npy", "test.npy", "test-own_keys.npy",
    }  # fmt: skip


def test_a_selection_has_the_model_of_its_own_size_and_seed():
    c = grid(("random", 1), ("uniform", 9, dict(elastic=())))
    c.grid.seeds = (0, 1)
    selecting = [cell for cell in cells_of(c) if "token_packer" not in cell.name]
    assert {(cell.seed, cell.model) for cell in selecting} == {
        (0, "only-v16-none-s0"), (1, "only-v16-none-s1"),
    }  # fmt: skip
    assert all(cell.training.model.compressor.tokens == PATCHES for cell in selecting)


def test_a_selection_whose_text_tower_would_be_random_is_refused(tmp_path, mesh1):
    c = run.checked(grid(("cdpruner", 4), ("blind", 1)))
    with (
        jax.set_mesh(mesh1),
        workdir.claim(tmp_path / "grid", c, grid=True) as claimed,
        pytest.raises(ValueError, match="cdpruner.*text tower, which would be random"),
    ):
        run.Grid(claimed, "vlm-jax grid")
