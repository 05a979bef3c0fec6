# SPDX-License-Identifier: Apache-2.0
"""A folder serves one run and one configuration, and a file in it is whole or the old one."""

import errno
import json
import os
import subprocess
import sys

import pytest
import tiny

from vlm_jax import files
from vlm_jax.training import fields, workdir
from vlm_jax.training.workdir import claim


@pytest.fixture
def c():
    return tiny.get_config()


def begun(folder, c, *, stages=("encoder", "align", "finetune"), grid=False, **content):
    """A folder that a run of `c` was begun in, with a checkpoint of these stages."""
    with claim(folder, c, grid=grid) as claimed:
        claimed.reads(**content or dict(data="d" * 64, tokenizer="t" * 64))
        claimed.begin()
    for stage in stages:
        (folder / stage / "2/state").mkdir(parents=True)


def entered(folder, c, *, grid=False, **content):
    """Enters a folder as a command does, up to its first step."""
    with claim(folder, c, grid=grid) as claimed:
        claimed.reads(**content or dict(data="d" * 64, tokenizer="t" * 64))
        claimed.begin()
        return claimed


def test_the_same_configuration_enters_again(tmp_path, c):
    begun(tmp_path / "run", c)
    entered(tmp_path / "run", c)
    stored = json.loads((tmp_path / "run/config.json").read_text())
    assert stored == json.loads(json.dumps(c.to_dict()))


def test_an_attempt_that_failed_before_training_claims_nothing(tmp_path, c):
    with pytest.raises(FileNotFoundError), claim(tmp_path / "run", c):
        raise FileNotFoundError("data.path")
    other = tiny.config(llm=dict(depth=3))
    begun(tmp_path / "run", other, stages=())
    # Nor does one that was killed before anything was kept.
    entered(tmp_path / "run", c)
    assert json.loads((tmp_path / "run/config.json").read_text())["llm"]["depth"] == 2


@pytest.mark.parametrize("text", ['{"model_type": "vlm_jax"}', "[]", "{", ""])
def test_a_folder_of_something_else_is_left_alone(text, tmp_path, c):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is not of a training, but of a model folder"):
        entered(tmp_path, c)
    assert (tmp_path / "config.json").read_text() == text


def test_two_runs_in_one_folder_are_refused(tmp_path, c):
    with claim(tmp_path, c):
        with pytest.raises(ValueError, match="another run is using .* choose another --workdir"):
            with claim(tmp_path, c):
                pass
    with claim(tmp_path, c):
        pass  # and free again afterwards


def test_the_claim_of_a_killed_process_is_free(tmp_path, c):
    hold = (
        "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / ".lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(ValueError, match="another run is using"), claim(tmp_path, c):
        pass
    child.kill()
    child.communicate()
    with claim(tmp_path, c):
        pass


def test_another_configuration_is_refused_by_the_names_of_its_fields(tmp_path, c):
    begun(tmp_path, c)
    other = tiny.config(llm=dict(depth=3), vit=dict(levels=(2,)))
    words = r"llm.depth was 2, is 3; vit.levels was \(1, 2\), is \(2\)\): repeat the first command"
    with pytest.raises(ValueError, match=words):
        entered(tmp_path, other)


# Fields that differ, and whether a training and a grid go on with them.
SAME = [
    (dict(log=dict(every=7, tensorboard=True)), True, True),
    (dict(checkpoint=dict(every=3, keep=1)), True, True),
    (dict(data=dict(workers=2, on_bad_example="skip")), True, True),
    (dict(mesh=dict(fsdp=2), remat="full", kernels="xla"), True, True),
    (dict(finetune=dict(accumulate=2)), True, True),
    (dict(evaluate=dict(batch=3)), True, True),
    (dict(evaluate=dict(split="val")), True, False),
    (dict(evaluate=dict(max_new_tokens=9), data=dict(test_images=5)), True, False),
    (dict(grid=dict(tokens=(1, 4, 16), seeds=(0, 1))), True, True),
    (dict(lora=dict(alpha=3.0)), True, True),  # rank 0: nothing reads it
    (dict(data=dict(images="elsewhere")), True, True),  # nor the synthetic source this
    (dict(seed=1), False, False),
    (dict(compute_dtype="bfloat16"), False, False),
    (dict(compressor=dict(tokens=1)), False, False),
    (dict(data=dict(train_images=41)), False, False),
    (dict(data=dict(template="plain")), False, False),
    (dict(finetune=dict(learning_rate=1.0)), False, False),
    (dict(finetune=dict(batch=16)), False, False),
    (dict(lora=dict(rank=2)), False, False),
]


@pytest.mark.parametrize("changes, train, grid", SAME, ids=lambda x: str(x)[:40])
def test_only_what_a_result_depends_on_makes_another_run(changes, train, grid, tmp_path, c):
    for kind, goes_on in (("train", train), ("grid", grid)):
        folder = tmp_path / kind
        begun(folder, c, grid=kind == "grid")
        if goes_on:
            first = entered(folder, tiny.config(**changes), grid=kind == "grid").first()
            expected = c.copy_and_resolve_references()
            if kind == "grid" and "grid" in changes:
                expected.grid.update(changes["grid"])
            # And hashes of rows stay what they were.
            assert workdir.digest(first) == workdir.digest(expected)
        else:
            with pytest.raises(ValueError, match="another configuration"):
                entered(folder, tiny.config(**changes), grid=kind == "grid")


def test_mqt_draws_by_micro_batch_so_accumulation_is_part_of_the_run(tmp_path):
    c = tiny.config(compressor=dict(kind="mqt"))
    begun(tmp_path, c)
    with pytest.raises(ValueError, match="finetune.accumulate was 1, is 2"):
        entered(tmp_path, tiny.config(compressor=dict(kind="mqt"), finetune=dict(accumulate=2)))
    entered(tmp_path, tiny.config(compressor=dict(kind="mqt", tokens=1)))  # V is of requests


def test_a_stage_that_has_not_begun_may_change(tmp_path, c):
    begun(tmp_path, c, stages=("encoder", "align"))
    changes = dict(finetune=dict(steps=9, learning_rate=1.0), lora=dict(rank=2))
    entered(tmp_path, tiny.config(**changes))
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["finetune"]["steps"], stored["lora"]["rank"]) == (9, 2)
    with pytest.raises(ValueError, match="align.learning_rate was"):
        entered(tmp_path, tiny.config(align=dict(learning_rate=1.0), **changes))


def test_a_longer_run_is_told_what_its_schedule_does_and_what_to_do(tmp_path, c):
    begun(tmp_path, c)
    words = (
        r"finetune.steps was 6, is 10: the learning rate of .* falls along a cosine to 0 at step 6"
        rf".* start a new one .*--config.start_from={tmp_path} --config.encoder.steps=0 "
        r"--config.align.steps=0 --config.finetune.steps=4$"
    )
    with pytest.raises(ValueError, match=words):
        entered(tmp_path, tiny.config(finetune=dict(steps=10)))
    with pytest.raises(ValueError, match="finetune.steps was 6, is 2: .*choose another --workdir"):
        entered(tmp_path, tiny.config(finetune=dict(steps=2)))
    begun(tmp_path / "grid", c, grid=True)
    with pytest.raises(ValueError, match="align.steps was 4, is 9: .*every cell is trained again"):
        entered(tmp_path / "grid", tiny.config(align=dict(steps=9)), grid=True)


def test_data_may_move_and_may_not_change(tmp_path):
    def at(path):
        return tiny.config(data=dict(source="llava", path=path))

    begun(tmp_path, at("a.json"))
    entered(tmp_path, at("moved/a.json"))
    words = "another training data .data.path was a.json, is b.json; its hash was dddd.*is eeee"
    with pytest.raises(ValueError, match=words):
        entered(tmp_path, at("b.json"), data="e" * 64, tokenizer="t" * 64)
    with pytest.raises(ValueError, match=r"another training data \(its hash was"):
        entered(tmp_path, at("a.json"), data="e" * 64, tokenizer="t" * 64)
    with pytest.raises(ValueError, match="another tokenizer"):
        entered(tmp_path, at("a.json"), data="d" * 64, tokenizer="u" * 64)
    # A folder of an earlier version has no hashes: what cannot be compared is not taken for equal.
    (tmp_path / "content.json").unlink()
    entered(tmp_path, at("a.json"))
    with pytest.raises(ValueError, match="data.path was a.json, is moved/a.json"):
        entered(tmp_path, at("moved/a.json"))


def test_a_field_that_came_later_has_the_value_that_changes_nothing(tmp_path, c):
    begun(tmp_path, c)
    older = json.loads((tmp_path / "config.json").read_text())
    for name in fields.LATER:
        section, _, field = name.rpartition(".")
        del (older[section] if section else older)[field]
    files.write_json(tmp_path / "config.json", older)
    entered(tmp_path, c)
    assert workdir.of_json(older).to_dict() == c.to_dict()
    digest = workdir.digest(c)
    for name, other in (("image_exif", "apply"), ("image_resize", (40,)), ("images_per_row", 2)):
        changed = tiny.config(data={name: other})
        assert workdir.digest(changed) != digest
        with pytest.raises(ValueError, match=f"data.{name} was"):
            entered(tmp_path, changed)


@pytest.mark.parametrize("bad", ["file/run", "file"])
def test_a_folder_that_cannot_be_written_is_an_error_with_the_way_out(bad, tmp_path, c):
    # A file where a folder should be stops everyone, root too.
    (tmp_path / "file").write_text("")
    with pytest.raises(
        OSError, match=f"cannot write to the folder {tmp_path}/{bad}: .*; choose a folder"
    ):
        with claim(tmp_path / bad, c):
            pass


def test_a_read_only_file_system_is_an_error_with_the_way_out(tmp_path, c, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(workdir.Path, "open", refuse)
    with pytest.raises(OSError, match="Read-only file system; choose a folder"), claim(tmp_path, c):
        pass


def test_names_of_nested_fields():
    tree = {"a": {"b": (1, 2), "c": {}}, "d": None}
    assert fields.flat(tree) == {"a.b": [1, 2], "a.c": {}, "d": None}


def test_provenance_names_what_made_a_result():
    facts = workdir.provenance("xla")
    assert facts["machine"].startswith("8 x cpu")
    assert facts["machine"].endswith("xla kernels")
    assert {"python", "jax", "flax"} <= facts["versions"].keys()
    assert facts["commit"] == "unknown" or len(facts["commit"]) >= 12


def test_a_cell_of_a_grid_is_no_place_for_a_training(tmp_path, c):
    begun(tmp_path / "grid", c, grid=True)
    cell = tmp_path / "grid/cells/small-v1-s0"
    with pytest.raises(
        ValueError, match="small-v1-s0 is a cell of the grid in .*another --workdir"
    ):
        entered(cell, c)
    assert not cell.exists()
    entered(tmp_path / "cells/mine", c)
