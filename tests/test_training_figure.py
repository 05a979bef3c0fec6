# SPDX-License-Identifier: Apache-2.0
"""Prune or train: both kinds beside each other, and a verdict only beyond the noise."""

import csv
import dataclasses

import made_rows
import pytest

from vlm_jax.compressors import kinds
from vlm_jax.reports import run as runs
from vlm_jax.reports import training_figure
from vlm_jax.reports.colors import of_sizes

LOOKS = of_sizes(n / 1e9 for n in made_rows.SIZES)
METHODS = (
    ("quecc", "none", "", -0.05),
    ("visionzip", "none", "", -0.2),
    ("mmtok", "none", "", -0.15),
    ("random", "none", "", -0.3),
)


def drawn(rows, tmp_path):
    return training_figure.prune_or_train(
        runs.of(rows, "token_packer"), tmp_path, name="prune_or_train", looks=LOOKS
    )


def test_both_kinds_the_controls_and_the_blind_are_drawn_with_their_best(tmp_path):
    rows = made_rows.rows(methods=METHODS, seeds=(0, 1))
    (figure,) = drawn(rows, tmp_path)
    with figure.csv.open() as file:
        marks = list(csv.DictReader(file))
    methods = {"token_packer", "quecc", "pool", "visionzip", "mmtok"}
    lines = {m["series"] for m in marks if m["kind"] == "line"}
    assert lines == {"blind", "random", *methods}
    points = [m for m in marks if m["kind"] == "point"]
    for V in ("4", "16", "36"):
        at = [m for m in points if m["V"] == V]
        for kind, methods in (("trained compressors", ("token_packer", "quecc")),
                              ("training-free selections", ("visionzip", "mmtok"))):  # fmt: skip
            best = [float(m["y"]) for m in at if m["series"] == f"best of {kind}"]
            assert sorted(best) == sorted(
                max(float(m["y"]) for m in family)
                for family in halves([m for m in at if m["series"].startswith(methods)])
            )
    assert figure.caption.count("training is better at V = 4, 16, 36") == 2


def halves(marks):
    """The marks of two families, drawn one after the other."""
    return marks[: len(marks) // 2], marks[len(marks) // 2 :]


def test_differences_within_the_noise_are_no_verdict():
    one, other = {4: (0.5, 0.02), 9: (0.6, 0.01)}, {4: (0.47, 0.02), 16: (0.1, 0.01)}
    assert training_figure.verdict(one, other) == "none"
    other[9] = (0.65, 0.01)
    assert training_figure.verdict(one, other) == "selection is better at V = 9"
    assert training_figure.verdict(other, one) == "training is better at V = 9"


@pytest.mark.parametrize("methods", [(), METHODS[:1], (("none", "none", "", 0.1),)])
def test_a_run_without_both_kinds_has_no_such_figure(methods, tmp_path):
    assert drawn(made_rows.rows(methods=methods), tmp_path) == []


def test_the_size_shown_is_the_one_that_most_methods_were_run_with(tmp_path):
    rows = made_rows.rows(methods=METHODS)
    fewer = [
        r
        for r in rows
        if r.llm_parameters != made_rows.SIZES[-1] or r.compressor not in ("mmtok", "pool")
    ]
    (figure,) = drawn(fewer, tmp_path)
    assert "80 k" in figure.caption
    renamed = [dataclasses.replace(r, compressor="of_mine") if r.compressor == "quecc" else r
               for r in rows]  # fmt: skip
    assert (kinds.kind_of("of_mine"), kinds.kind_of("none")) == (kinds.TRAINED, kinds.PLAIN)
    assert len(drawn(renamed, tmp_path)) == 1
