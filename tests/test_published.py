# SPDX-License-Identifier: Apache-2.0
"""The paper's points as data: shape, anchors, what they say of the published exponents."""

import numpy as np
import pytest

from vlm_jax.law import compare, law, published


@pytest.mark.parametrize("name", published.ACCURACY)
def test_there_are_28_points_and_accuracy_rises_with_size_and_tokens(name):
    points = published.points(name)
    assert len(points) == 28 and len(set(zip(points.N, points.V, strict=True))) == 28
    error = points.error.reshape(4, 7)
    # one published exception: the OCR score at 7B, V = 144 (.2880) is below the 4B one (.2882)
    assert (np.diff(error, axis=1) < 0).all()
    assert (np.diff(error, axis=0) > 0).sum() == (name == "ocr")
    assert np.isnan(points.stderr).all() and points.label[0] == "qwen1.5-0.5b"
    assert published.NOTES[name] and published.EXPONENTS[name]


def test_effects_are_those_the_paper_reports():
    """V 1 to 576 adds .047-.056 to reasoning and .163-.219 to OCR; N .5 to 7B adds .096-.105."""
    for name, least, most in (("reasoning", 0.0464, 0.0565), ("ocr", 0.1625, 0.2195)):
        error = published.points(name).error.reshape(4, 7)
        gain = error[:, 0] - error[:, -1]
        assert least < gain.min() and gain.max() < most
    error = published.points("reasoning").error.reshape(4, 7)
    gain = error[0] - error[-1]
    assert 0.0915 < gain.min() and gain.max() < 0.1065


@pytest.mark.parametrize(
    "name,A,D,sse", [("reasoning", 0.553, 0.036, 4.4e-4), ("ocr", 0.79, 0.13, 5.85e-3)]
)
def test_published_exponents_fit_nearly_as_well_with_a_floor(name, A, D, sse):
    points = published.points(name)
    fitted = law.fit(points, bootstrap=0)
    held = compare.with_exponents(points, fitted, published.EXPONENTS[name])
    assert held["A"] == pytest.approx(A, abs=5e-3)
    assert held["D"] == pytest.approx(D, abs=5e-3)
    assert held["sse"] == pytest.approx(sse, rel=0.01)
    assert fitted.sse < held["sse"] < held["limit"]


def test_without_a_floor_one_exponent_of_each_pair_lies_outside():
    """Reasoning's alpha .077 and OCR's beta .048 need a floor D, which may as well be 0."""
    outside = {}
    for name, pair in published.EXPONENTS.items():
        points = published.points(name)
        fitted = law.fit(points, bootstrap=0)
        held = compare.without_floor(points, fitted)
        outside[name] = [k for k, v in pair.items() if not held[k][0] <= v <= held[k][1]]
        assert all(fitted.intervals[k][0] <= v <= fitted.intervals[k][1] for k, v in pair.items())
    assert outside == {"reasoning": ["alpha"], "ocr": ["beta"]}


def test_an_unknown_set_is_refused():
    with pytest.raises(
        ValueError, match="no published points 'video': choose one of reasoning, ocr"
    ):
        published.points("video")
