# SPDX-License-Identifier: Apache-2.0
"""Every folder that holds a model is taken by every verb, and any other is told what it is."""

import json
import shutil

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

from vlm_jax.__main__ import main
from vlm_jax.files import write_json
from vlm_jax.serving import evaluation
from vlm_jax.serving.subject import Subject, name_of
from vlm_jax.training import runs
from vlm_jax.training.cells import cells_of
from vlm_jax.training.workdir import of_json
from vlm_jax.verbs import configuration
from vlm_jax.weights import folder

CELL = "only-v4-token_packer-s0"


@pytest.fixture(scope="module")
def grid(trained, tmp_path_factory):
    """The folder of a grid whose cell CELL is the trained model, as `vlm-jax grid` leaves it.

    Another cell is half trained, and a third was not begun.
    """
    home = tmp_path_factory.mktemp("grid") / "run"
    fields = json.loads((trained / "config.json").read_text())
    fields["grid"] |= dict(llms=dict(only={}), tokens=[1, 4], baselines=[["blind", 1]])
    home.mkdir()
    write_json(home / "config.json", fields)
    shutil.copytree(trained / "tokenizer", home / "tokenizer")
    for stage in ("align", "finetune"):
        shutil.copytree(trained / stage, home / "cells" / CELL / stage)
    write_json(home / "cells" / CELL / "row.json", {})
    (home / "cells" / CELL / "predictions.jsonl").write_text("of the grid\n")
    shutil.copytree(trained / "align", home / "cells/only-v1-token_packer-s0/align")
    shutil.copytree(trained / "encoder", home / "encoder")
    assert CELL in [cell.name for cell in cells_of(of_json(fields))]
    return home


@pytest.fixture(scope="module")
def model(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "folder"
    assert main(["convert", f"--from={trained}", f"--to={path}"]) == 0
    return path


@pytest.fixture
def photo(tmp_path):
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_cell_of_a_grid_answers_as_the_run_and_as_its_model_folder(
    trained, grid, model, photo, capsys
):
    said = []
    for path in (trained, grid / "cells" / CELL, model):
        argv = [f"--checkpoint={path}", f"--image={photo}", "--prompt=what is this?"]
        assert main(["generate", *argv]) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] == said[2]


def test_a_cell_is_converted_as_a_run_is(model, grid, tmp_path):
    assert main(["convert", f"--from={grid}/cells/{CELL}", f"--to={tmp_path}/c"]) == 0
    ours, theirs = folder.read(tmp_path / "c"), folder.read(model)
    assert ours.facts == theirs.facts and ours.llm == theirs.llm
    assert ours.compressor == theirs.compressor
    for name, tensor in theirs.tensors.items():
        np.testing.assert_array_equal(tensor.read(), ours.tensors[name].read(), err_msg=name)


def test_a_cell_has_its_own_configuration(grid):
    run = runs.of(grid / "cells" / CELL, "--workdir")
    assert run.config.compressor.tokens == 4 and not run.config.data.blind and run.grid
    blind = runs.cell(grid / "cells/only-v1-blind-s0", "--workdir=x")
    assert blind.config.data.blind and blind.config.compressor.tokens == 1


def test_cells_of_one_model_read_the_folder_that_they_share(grid, tmp_path):
    home = shutil.copytree(grid, tmp_path / "grid")
    fields = json.loads((home / "config.json").read_text())
    fields["compressor"]["kind"], fields["grid"]["tokens"] = "mqt", [1, 4, 16]
    write_json(home / "config.json", fields)
    cell, shared = (home / "cells" / name for name in ("only-v4-mqt-s0", "only-mqt-s0"))
    for path in (cell, shared):
        path.mkdir()
        run = runs.of(path, "--workdir")
        assert run.home == shared and run.folder == path
    assert runs.of(cell, "x").config.compressor.tokens == 4
    assert runs.of(shared, "x").config.compressor.tokens == 16


WRONG = {
    "a grid": ("", "is a grid of many models: give one of its cells, such as --workdir=.*/cells/"),
    "its cells": ("cells", rf"is a grid of many models: .*\(there are {CELL}\)"),
    "no cell": ("cells/nothing", "there is no folder --workdir="),
    "another folder among the cells": ("cells/mine", "is no cell of the grid in .*: choose one of"),
    "a cell that is half trained": (
        "cells/only-v1-token_packer-s0",
        "finetune holds 0 of 6 steps: repeat the command that trains it",
    ),
    "one stage": (f"cells/{CELL}/finetune", f"is one stage of a training: .*=.*cells/{CELL}$"),
    "one checkpoint": (f"cells/{CELL}/finetune/6", f"is one checkpoint: give .*cells/{CELL}$"),
    "nothing": ("empty", "holds no trained model: neither the config.json of a model folder"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_folder_is_told_what_it_is(name, grid, tmp_path, mesh1):
    where, words = WRONG[name]
    home = shutil.copytree(grid, tmp_path / "grid")
    for made in ("empty", "cells/mine"):
        (home / made).mkdir()
    with jax.set_mesh(mesh1), pytest.raises((ValueError, OSError), match=words):
        runs.read(home / where, "--workdir")


def test_published_weights_are_told_to_be_converted(capsys):
    path = "tests/published_weights/clip_llama"
    assert main(["generate", f"--checkpoint={path}", "--prompt=a"]) == 2
    assert "vlm-jax convert --from=" in capsys.readouterr().err
    assert main(["evaluate", f"--workdir={path}"]) == 2
    assert "vlm-jax convert --from=" in capsys.readouterr().err


# --- Evaluations of one model ---------------------------------------------------------------------


@pytest.fixture
def copy(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def evaluated(path, *flags, code=0):
    """Evaluates; the files that were written or changed."""
    before = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}
    assert main(["evaluate", f"--workdir={path}", *flags]) == code
    after = {p.name: p.read_bytes() for p in path.iterdir() if p.is_file()}
    return {name for name in after if after[name] != before.get(name)} - {".lock"}


def asked(path, *flags):
    """What an evaluation by these flags would differ in from the folder's own, and its name."""
    subject = Subject.of(str(path))
    given = configuration.read(flags, default=subject.default())
    config = subject.requested(given.config, given.overrides)
    settings = subject.settings(config, given.overrides)
    return settings, name_of(settings, "abcdef0123")


def test_another_split_has_its_own_files_beside_those_of_the_run(copy, capsys):
    assert evaluated(copy) == {"predictions.jsonl", "scores.json"}
    val = evaluated(copy, "--config.evaluate.split=val")
    assert val == {"predictions-val.jsonl", "scores-val.json"}
    settings = json.loads((copy / "scores-val.json").read_text())["settings"]
    assert settings["evaluate.split"] == "val" and len(settings["data_hash"]) == 64
    assert "data_hash" not in (copy / "scores.json").read_text()
    # Another content under the same name is not written over it.
    stored = json.loads((copy / "scores-val.json").read_text())
    stored["settings"]["data_hash"] = "0" * 64
    write_json(copy / "scores-val.json", stored)
    assert evaluated(copy, "--config.evaluate.split=val", code=2) == set()
    assert "is of another evaluation" in capsys.readouterr().err


@pytest.mark.parametrize("flags, name", [
    ((), ""),
    (("--config=tests/tiny.py",), ""),  # given, and agreeing
    (("--config=tests/tiny.py", "--config.log.every=9", "--config.mesh.fsdp=2"), ""),
    (("--config.grid.tokens=(1,)", "--config.data.workers=2", "--config.remat=full"), ""),
    (("--config.evaluate.split=val",), "val"),
    (("--config.evaluate.batch=16", "--config.evaluate.max_new_tokens=2"), "batch16-new2"),
    (("--config.data.test_images=3", "--config.compute_dtype=bfloat16"),
     "compute_dtype-bfloat16-test_images-3"),
    (("--config.data.source=llava", "--config.data.path=sets/My set.json"),
     "llava-My_set-abcdef01"),
    (("--config.data.blind=True",), "blind"),
])  # fmt: skip
def test_a_name_says_what_differs_and_the_settings_too(flags, name, trained):
    settings, found = asked(trained, *flags)
    assert found == name and len(settings) == len([f for f in flags if name and "=" in f])


def test_the_number_of_tokens_is_an_evaluation_where_one_model_serves_any(copy):
    with pytest.raises(ValueError, match="trained differently .compressor.tokens was 4, is 1"):
        asked(copy, "--config.compressor.tokens=1")
    fields = json.loads((copy / "config.json").read_text())
    fields["compressor"]["kind"] = "mqt"
    write_json(copy / "config.json", fields)
    flags = ("--config.compressor.tokens=1", "--config.evaluate.split=val")
    assert asked(copy, *flags)[1] == "val-v1"


@pytest.mark.parametrize("flag, words", [
    ("llm.depth=3", "llm.depth was 2, is 3"),
    ("compressor.kind=pool", "compressor.kind was token_packer, is pool"),
    ("vit.width=32", "vit.width was 16, is 32"),
    ("finetune.learning_rate=1.0", "finetune.learning_rate was 0.003, is 1.0"),
    ("seed=3", "seed was 0, is 3"),
])  # fmt: skip
def test_what_was_trained_is_not_changed_by_an_evaluation(flag, words, trained, capsys):
    for config in ((), ("--config=tests/tiny.py",)):
        assert main(["evaluate", f"--workdir={trained}", *config, f"--config.{flag}"]) == 2
        err = capsys.readouterr().err
        assert words in err and "trained differently" in err and "Traceback" not in err


def test_a_cell_keeps_the_predictions_of_its_grid(grid, tmp_path):
    path = shutil.copytree(grid, tmp_path / "grid") / "cells" / CELL
    assert evaluated(path) == {"predictions-test.jsonl", "scores-test.json"}
    assert (path / "predictions.jsonl").read_text() == "of the grid\n"
    assert asked(path, "--config.evaluate.split=val")[1] == "val"
    with pytest.raises(ValueError, match="compressor.tokens was 4, is 1"):
        asked(path, "--config.compressor.tokens=1")


def test_a_model_folder_is_evaluated_on_data_that_are_named(model, tmp_path, copy, capsys):
    path = shutil.copytree(model, tmp_path / "model")
    assert evaluated(path, code=2) == set()
    assert "is a model folder, which names no data: give --config=FILE" in capsys.readouterr().err
    flags = ("--config=tests/tiny.py", "--config.llm.depth=2")
    assert evaluated(path, *flags) == {
        "predictions-test-synthetic.jsonl", "scores-test-synthetic.json"}  # fmt: skip
    evaluated(copy)
    assert (path / "predictions-test-synthetic.jsonl").read_text() == (
        copy / "predictions.jsonl").read_text()  # fmt: skip
    assert asked(path, *flags, "--config.evaluate.batch=16")[1] == "test-synthetic-batch16"
    with pytest.raises(ValueError, match="--config.llm.width=32: the model in"):
        asked(path, *flags, "--config.llm.width=32")


def test_a_run_of_another_machine_is_evaluated_by_the_devices_that_are_here(capsys):
    c = tiny.config(mesh=dict(data=512))
    assert evaluation.mesh_of(c, {}).shape["data"] == 8
    assert "does not fit 8 devices" in capsys.readouterr().err
    with pytest.raises(ValueError, match="does not fit 8 devices"):
        evaluation.mesh_of(c, {"mesh.data": 512})


def test_an_alignment_alone_is_a_model_too(trained, tmp_path, mesh1):
    """Stage 1 of a recipe ends with `align`: finetune.steps=0."""
    path = tmp_path / "run"
    path.mkdir()
    fields = json.loads((trained / "config.json").read_text())
    fields["finetune"]["steps"] = 0
    write_json(path / "config.json", fields)
    for name in ("align", "tokenizer"):
        shutil.copytree(trained / name, path / name)
    with jax.set_mesh(mesh1):
        stored = runs.read(path, "--checkpoint")
    assert "compressor.mm_projector.0.weight" in stored.tensors or stored.tensors
    assert stored.facts["max_length"] == tiny.get_config().data.text_length + 4
