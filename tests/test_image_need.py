# SPDX-License-Identifier: Apache-2.0
"""What an image adds to a score: counted by hand, and its error by the delta method."""

import made_scores as made
import pytest
from scipy import stats

from vlm_jax.evals import image_need, scoring


def scored(folder, name, right):
    file = made.answers(folder / f"{name}.jsonl", right)
    return scoring.score("own", "exact_match", file, folder / "questions.jsonl")


def test_the_fields_are_those_counted_by_hand(tmp_path, capsys):
    made.questions(tmp_path, 8)
    runs = dict(
        seen=[1, 1, 1, 1, 0, 0, 1, 0],
        blind=[1, 0, 0, 0, 1, 0, 0, 0],
        downsampled=[1, 1, 0, 0, 0, 0, 0, None],
        full=[1, 1, 1, 1, 1, 0, 1, 0],
    )
    files = {name: made.answers(tmp_path / f"{name}.jsonl", r) for name, r in runs.items()}
    flags = [f"--{name}={files[name]}" for name in ("blind", "downsampled", "full")]
    image = made.score(capsys, *made.own(tmp_path, files["seen"]), *flags)["image"]
    assert image["contribution"]["value"] == pytest.approx((5 - 2) / 2)
    assert image["over_blind"]["value"] == pytest.approx(100 * 3 / 8)
    # The downsampled model is wrong on 2 to 7, of which the model itself has 2, 3 and 6.
    assert (image["hard"]["n"], image["hard"]["value"]) == (6, 50)
    # Of these the model without compression has 2, 3, 4 and 6.
    assert (image["group_a"]["n"], image["group_a"]["value"]) == (4, 75)
    assert (image["group_b"]["n"], image["group_b"]["value"]) == (2, 100)
    assert image["downsampled"]["failed"] == 1 and image["blind"]["value"] == 25


def test_the_error_of_the_contribution_is_that_of_the_delta_method(tmp_path):
    n = 300
    made.questions(tmp_path, n)
    seen, blind = made.drawn(1, n, 0.7), made.drawn(2, n, 0.4)
    told = image_need.contribution(scored(tmp_path, "a", seen), scored(tmp_path, "b", blind))
    mean = sum(blind) / n
    ratio = sum(seen) / n / mean
    linear = [(a - ratio * b) / mean for a, b in zip(seen, blind, strict=True)]
    assert told["contribution"]["stderr"] == pytest.approx(stats.sem(linear), rel=0.01)
    low, high = told["contribution"]["interval"]
    assert low < told["contribution"]["value"] < high
    assert told["words"].startswith(f"the image adds {100 * (ratio - 1):.1f} %")


def test_a_benchmark_that_needs_no_image_has_an_interval_about_zero(tmp_path):
    made.questions(tmp_path, 400, of_image=4)
    a, b = (scored(tmp_path, f"{k}", made.drawn(k, 400, 0.6)) for k in (3, 4))
    low, high = image_need.contribution(a, b)["contribution"]["interval"]
    assert low < 0 < high < 0.25


def test_nothing_right_without_the_image_is_said_and_no_number(tmp_path):
    made.questions(tmp_path, 4)
    none = scored(tmp_path, "b", [False] * 4)
    told = image_need.described(scored(tmp_path, "a", [True] * 4), blind=none, downsampled=none)
    assert told["contribution"] is None and "unlimited" in told["words"]
    assert (told["hard"]["n"], told["hard"]["value"]) == (4, 100)
    again = image_need.described(none, downsampled=scored(tmp_path, "a", [True] * 4))
    assert again["hard"] == dict(value=None, stderr=None, unit="percent", n=0, of=4)
