# SPDX-License-Identifier: Apache-2.0
"""Every field has a rule; a number out of its range is refused by its name and what it may be."""

import re

import pytest
import tiny
from ml_collections import ConfigDict

from configs import base
from vlm_jax.__main__ import main
from vlm_jax.training import fields
from vlm_jax.training.workdir import flat


def test_the_table_has_every_field_and_a_range_for_every_number():
    ours = flat(base.get_config())
    assert set(ours) == set(fields.FIELDS)
    for name, value in ours.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        numbers = isinstance(value, list) and value and isinstance(value[0], (int, float))
        if number or numbers:
            assert fields.FIELDS[name].range is not None, name
            assert fields.FIELDS[name].range.holds(value), name
    fields.check(ours)
    assert fields.LATER.keys() <= ours.keys()


@pytest.mark.parametrize("name, value, allowed", [
    ("finetune.batch", 0, "a whole number from 1 upwards"),
    ("align.batch", -8, "a whole number from 1 upwards"),
    ("encoder.batch", 8.5, "a whole number from 1 upwards"),
    ("finetune.steps", -1, "a whole number from 0 upwards"),
    ("finetune.accumulate", 0, "a whole number from 1 upwards"),
    ("finetune.learning_rate", float("nan"), "a number from 0 upwards"),
    ("finetune.warmup", 1.5, "a number from 0 to 1"),
    ("align.beta2", 1.0, "a number from 0 to 0.9999999"),
    ("checkpoint.every", 0, "a whole number from 1 upwards"),
    ("checkpoint.keep", 0, "a whole number from 1 upwards"),
    ("log.every", 0, "a whole number from 1 upwards"),
    ("evaluate.batch", 0, "a whole number from 1 upwards"),
    ("evaluate.max_new_tokens", 0, "a whole number from 1 upwards"),
    ("data.workers", -1, "a whole number from 0 upwards"),
    ("data.text_length", 0, "a whole number from 1 upwards"),
    ("vit.levels", 2, "whole numbers, each from 1 upwards"),
    ("llm.norm_eps", 0.0, "a number above 0"),
    ("llm.heads", True, "a whole number from 1 upwards"),
    ("seed", -1, "a whole number from 0 to 4294967295"),
    ("grid.llms.small.depth", 0, "a whole number from 1 upwards"),
])  # fmt: skip
def test_a_number_out_of_range_is_refused_by_its_field(name, value, allowed):
    shown = re.escape(fields.value_text(value))
    with pytest.raises(ValueError, match=rf"^{name}={shown}: give {allowed}$"):
        fields.check(flat(base.get_config()) | {name: value})


@pytest.mark.parametrize("name, values, wrong, allowed", [
    ("data.image_std", (0.5, 0.0, 0.5), "0.0", "a number above 0 and below 10"),
    ("vit.levels", (2, 0), "0", "a whole number from 1 upwards"),
    ("grid.seeds", (0, "1"), "1", "a whole number from 0 to 4294967295"),
])  # fmt: skip
def test_of_several_numbers_the_wrong_one_is_shown(name, values, wrong, allowed):
    with pytest.raises(ValueError, match=rf"^{name}={wrong}: give {allowed}$"):
        fields.check(flat(base.get_config()) | {name: values})


@pytest.mark.parametrize("verb", ["train", "grid"])
def test_the_verbs_refuse_it_before_anything_is_made(verb, tmp_path, capsys):
    argv = ["--config=tests/tiny.py", f"--workdir={tmp_path}/run", "--config.finetune.batch=0"]
    assert main([verb, *argv]) == 2
    assert "finetune.batch=0: give a whole number from 1 upwards\n" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_evaluation_refuses_it_too(trained, capsys):
    assert main(["evaluate", f"--workdir={trained}", "--config.evaluate.batch=0"]) == 2
    assert "evaluate.batch=0: give a whole number from 1 upwards\n" in capsys.readouterr().err


def test_values_are_shown_as_they_are_written():
    values = ("chatml", "", (1, 2), (("blind", 1),), 1e-3, False, ConfigDict().to_dict())
    assert [fields.value_text(v) for v in values] == [
        "chatml", '""', "(1, 2)", "((blind, 1))", "0.001", "False", "{}"]  # fmt: skip
    then, now = {"a": 1, "b": "x", "c": 2}, {"a": 2, "b": "x", "d": ""}
    names = list(fields.differing(then, now))
    assert (
        fields.changes(names, then, now)
        == 'a was 1, is 2; c was 2, is gone; d was not there, is ""'
    )
    assert fields.changes(names, then, now, most=1) == "a was 1, is 2; and 2 more"


def test_tiny_is_within_all_ranges():
    fields.check(flat(tiny.get_config()))
