# SPDX-License-Identifier: Apache-2.0
"""LLMs of a grid start from folders: frozen ones stay as they are, rows say what began them.

Four cells are trained for the slow ones: a minute.
"""

import json
import shutil

import made_ggufs
import numpy as np
import pytest
import tiny

import vlm_jax
from vlm_jax.__main__ import main
from vlm_jax.cost import described
from vlm_jax.grids import kept, shared, starts
from vlm_jax.grids import run as grid_run
from vlm_jax.rows import records
from vlm_jax.training import llms, runs
from vlm_jax.weights import folder, start

PROMPTS = ["what is it?", "in 1984 there were", "two  22 33"]


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    """The folder of a random LLM, converted from a GGUF file."""
    home = tmp_path_factory.mktemp("llm")
    made_ggufs.made(home / "llm.gguf", "llama", "smollm")
    assert main(["convert", "--llm", str(home / "llm.gguf"), "--to", str(home / "made")]) == 0
    return home / "made"


def flags(llm, **more):
    values = {
        "grid.llms.frozen.start_from": llm, "grid.llms.adapted.start_from": llm,
        "grid.llms.fresh.data.tokenizer": llm / "tokenizer",
    }  # fmt: skip
    return [f"--config.{name}={value}" for name, value in (values | more).items()]


def config(llm, **more):
    from vlm_jax.verbs import configuration

    return configuration.read(["--config=tests/started.py", *flags(llm, **more)]).config


@pytest.fixture(scope="module")
def grid(llm, tmp_path_factory):
    """A grid of which two cells were run by a first command, the others by a second."""
    path = tmp_path_factory.mktemp("grid") / "run"
    words = ["grid", "--config=tests/started.py", f"--workdir={path}", *flags(llm)]
    first = [f"--cell={name}-v1-token_packer-s0" for name in ("frozen", "small")]
    done = tiny.run(
        *words,
        before=f"""
import pathlib
assert main({words + first!r}) == 0
rows = pathlib.Path({str(path)!r}).glob("cells/*/row.json")
print("FIRST", [str(p) for p in rows], file=sys.stderr)
""",
    )
    assert done.returncode == 0, done.stderr
    return path, done.stderr


def row_of(path, llm, method="token_packer"):
    name = f"{llm}-v1-{method}-s0"
    return next(row for row in records.read(path / "rows.jsonl") if row.cell == name)


@pytest.mark.slow
def test_a_repeated_grid_goes_on_and_makes_no_cell_again(grid):
    path, said = grid
    first, _, second = said.partition("FIRST")
    assert second.splitlines()[0].count("row.json") == 2
    assert (
        "2 of 4 cells were finished before" in second
        and len(records.read(path / "rows.jsonl")) == 4
    )
    assert first.count("encoder 3/3") == 1 and "encoder 3/3" not in second
    assert (said.count("align 3/3"), second.count("align 3/3")) == (1, 0)  # frozen's alone has 3


@pytest.mark.slow
def test_rows_say_how_their_llm_came_by_its_weights(grid, llm):
    path, digest = grid[0], start.digest(folder.read(llm))
    found = {name: row_of(path, name) for name in ("small", "fresh", "frozen", "adapted")}
    assert {name: row.llm_weights for name, row in found.items()} == {
        "small": "", "fresh": "", "frozen": "pretrained, frozen", "adapted": "pretrained, LoRA",
    }  # fmt: skip
    assert [row.train.get("start") for row in found.values()] == [None, None, digest, digest]
    assert len({row.train["encoder"] for row in found.values()}) == 1
    assert len({row.llm_parameters for row in found.values()}) == 2
    assert found["adapted"].train["lora"]["rank"] == 2
    assert (found["small"].prompt, found["frozen"].prompt) == ("bare", "checkpoint")
    assert found["frozen"].Q > found["small"].Q  # other tokenizers, other templates
    # A law, and the figures of one curve per size, are of one way alone.
    assert found["frozen"].method == "token_packer, pretrained, frozen"
    assert json.loads((path / "run.json").read_text())["method"] == "token_packer"


@pytest.mark.slow
def test_a_frozen_llm_ends_as_it_began(grid, llm):
    before = folder.read(llm)
    frozen, adapted = (
        runs.read(grid[0] / f"cells/{name}-v1-token_packer-s0", "--checkpoint").tensors
        for name in ("frozen", "adapted")
    )
    names = [name for name in before.tensors if name.startswith("llm.")]
    for name in names:
        np.testing.assert_array_equal(before.tensors[name].read(), frozen[name])
    assert any((frozen[name] != adapted[name]).any() for name in names)


@pytest.mark.slow
def test_answers_to_texts_alone_do_not_change_by_align(grid, llm):
    answers = [
        [a.text for a in vlm_jax.load(path).generate([None] * 3, PROMPTS, max_new_tokens=8)]
        for path in (llm, grid[0] / "cells/frozen-v1-token_packer-s0")
    ]
    assert answers[0] == answers[1] and any(answers[0])


@pytest.mark.slow
def test_a_run_goes_on_elsewhere_from_its_rows_alone(grid, llm, tmp_path, monkeypatch):
    path, here = grid[0], tmp_path / "elsewhere"
    here.mkdir()
    lines = (path / "rows.jsonl").read_text().splitlines(keepends=True)
    left = "small-v1-token_packer-s0"
    lines = [line for line in lines if f'"cell": "{left}"' not in line]
    assert len(lines) == 3
    (here / "rows.jsonl").write_text("".join(lines))
    made = []
    before = grid_run.run_cell
    monkeypatch.setattr(
        grid_run, "run_cell", lambda cell, *a: made.append(cell.name) or before(cell, *a)
    )
    words = ["grid", "--config=tests/started.py", f"--workdir={here}", *flags(llm)]
    assert main(words) == 0 and made == [left]
    rows = {row.cell: row.to_json() for row in records.read(here / "rows.jsonl")}
    assert len(rows) == 4 and all(rows[json.loads(x)["cell"]] == x.strip() for x in lines)
    # Rows of another grid are neither lost nor mixed in.
    text = (here / "rows.jsonl").read_text()
    shutil.rmtree(here / "cells")
    with pytest.raises(ValueError, match="has the hash .*paths count"):
        grid_run.train_cell(
            config(llm, **{"grid.llms.adapted.lora.rank": 3}), tmp_path / "elsewhere",
            cell="adapted-v1-token_packer-s0",
        )  # fmt: skip
    assert (here / "rows.jsonl").read_text() == text and kept.written(here)


def test_the_sizes_of_a_start_are_those_of_its_folder(llm):
    c = starts.adopted(config(llm))
    assert dict(c.grid.llms.frozen)["width"] == 64
    assert c.grid.llms.frozen.data.tokenizer == str(llm / "tokenizer")
    assert shared.words_of(llms.applied(c, "frozen")) == shared.words_of(llms.applied(c, "fresh"))
    c = config(llm)
    with c.unlocked():
        c.grid.llms.frozen.depth = 5
    with pytest.raises(ValueError, match="frozen.start_from=.* an LLM with depth=2 and not 5"):
        starts.adopted(c)
    with pytest.raises(ValueError, match="grid.llms.adapted has its size from the folder"):
        described.models(config(llm))


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("small", "dpeth", 1, "grid.llms.small.dpeth: no such field"),
        ("small", "vit", {"depth": 1}, "grid.llms.small.vit: an LLM of a grid sets"),
        ("small", "data", {"blind": True}, "grid.llms.small.data.blind: choose of buckets"),
        ("frozen", "lora", {"rnak": 1}, "grid.llms.frozen.lora.rnak: choose of alpha"),
        ("small", "start_from", "nowhere", "no folder grid.llms.small.start_from=.*nowhere"),
        ("frozen", "finetune", {"steps": 2, "learning_rate": -1.0},
         "grid.llms.frozen.finetune.learning_rate=-1.0: give a number from 0"),
    ],
)  # fmt: skip
def test_what_an_llm_of_a_grid_cannot_set_is_refused_by_name(llm, name, field, value, message):
    c = config(llm)
    with c.unlocked():
        c.grid.llms[name][field] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        grid_run.open_config(c)


def test_llms_of_one_size_that_come_by_their_weights_alike_are_refused(llm):
    c = config(llm)
    with c.unlocked():
        c.grid.llms.again = dict(depth=1, align=dict(steps=7))
    with pytest.raises(ValueError, match="has again and small, .*trained from random ones"):
        grid_run.cell_names(c)
