# SPDX-License-Identifier: Apache-2.0
"""Scores and their standard errors against closed forms."""

import math
import random
import statistics

import pytest

from vlm_jax.evals import metrics


@pytest.mark.parametrize("prediction, answer, right", [
    ("4", "4", 1), (" 4\n", "4", 1), ("4.", "4", 0), ("Red", "red", 0), ("", "4", 0),
])  # fmt: skip
def test_exact_match_forgives_outer_white_space_alone(prediction, answer, right):
    assert metrics.exact_match(prediction, answer) == right


@pytest.mark.parametrize("prediction, answer, right", [
    ("true", "true", 1), ("True.", "true", 1), ("true, there is one", "True", 1),
    ("it is true", "true", 0), ("untrue", "true", 0), ("", "true", 0), ("  ", "true", 0),
])  # fmt: skip
def test_the_first_word_decides(prediction, answer, right):
    assert metrics.first_word(prediction, answer) == right


def test_clusters_of_one_give_the_plain_standard_error():
    values = [random.Random(0).random() for _ in range(50)]
    plain = statistics.stdev(values) / math.sqrt(50)
    assert metrics.clustered_stderr(values, [str(i) for i in range(50)]) == pytest.approx(plain)


def test_copies_of_one_value_carry_no_information():
    draw = random.Random(1)
    values = [draw.random() for _ in range(40)]
    single = metrics.clustered_stderr(values, [str(i) for i in range(40)])
    tripled = metrics.clustered_stderr(values * 3, [str(i) for i in range(40)] * 3)
    assert tripled == pytest.approx(single)
    # While three independent values each would shrink the error by sqrt(3), nearly.
    assert metrics.clustered_stderr(values * 3, [str(i) for i in range(120)]) < 0.6 * single


def test_the_clustered_error_is_the_spread_of_the_mean():
    # 60 clusters of 1 to 9 values that share a cluster effect: the error that is reported must be
    # the deviation of the mean over many data sets of that kind.
    draw = random.Random(2)
    sizes = [1 + i % 9 for i in range(60)]
    clusters = [str(i) for i, n in enumerate(sizes) for _ in range(n)]
    means, errors = [], []
    for _ in range(400):
        values = [
            e + draw.gauss(0, 0.5) for n in sizes for e in [draw.gauss(0, 1)] for _ in range(n)
        ]
        means.append(metrics.mean(values))
        errors.append(metrics.clustered_stderr(values, clusters))
    assert statistics.mean(errors) == pytest.approx(statistics.stdev(means), rel=0.1)


def test_one_cluster_and_no_value_have_no_error():
    assert metrics.clustered_stderr([0.0, 1.0], ["a", "a"]) == metrics.LARGEST_STDERR
    assert math.isnan(metrics.mean([]))
    with pytest.raises(ValueError):
        metrics.clustered_stderr([0.0, 1.0], ["a"])


def test_a_group_is_consistent_if_all_of_it_is_right():
    correct, groups = [1.0, 1.0, 1.0, 0.0, 1.0, 0.0], ["a", "b", "a", "b", "c", "d"]
    assert metrics.consistency(correct, groups) == [1, 0, 1, 0]


def test_the_jackknife_error_of_a_mean_is_the_clustered_one():
    draw = random.Random(3)
    values = [draw.random() for _ in range(40)]
    left_out = [metrics.mean(values[:i] + values[i + 1 :]) for i in range(40)]
    plain = metrics.clustered_stderr(values, [str(i) for i in range(40)])
    assert metrics.jackknife_stderr(left_out) == pytest.approx(plain)
    assert math.isnan(metrics.jackknife_stderr([0.5]))
