# SPDX-License-Identifier: Apache-2.0
"""`vlm-jax score` gives the values of the published scorers on small made examples."""

import json
from pathlib import Path

import pytest

from vlm_jax.evals import scoring
from vlm_jax.evals.tasks import TASKS
from vlm_jax.verbs import parser

EXAMPLES = Path(__file__).parent / "published" / "benchmarks"
EXPECTED = {path.parent.name: json.loads(path.read_text()) for path in EXAMPLES.glob("*/*.json")}
CASES = [
    (task, protocol, annotations)
    for task, expected in sorted(EXPECTED.items())
    if task in TASKS
    for protocol in expected["protocols"]
    for annotations in (expected["annotations"], *expected["annotations_also"])
]


@pytest.mark.parametrize("task, protocol, annotations", CASES)
def test_a_score_is_that_of_the_published_scorer(task, protocol, annotations):
    expected = EXPECTED[task]["protocols"][protocol]
    home = EXAMPLES / task
    got = scoring.score(
        task, protocol, home / EXPECTED[task]["predictions"], home / annotations
    ).described
    assert got["value"] == pytest.approx(expected["value"], rel=1e-6)
    assert (got["metric"], got["n"]) == (expected["metric"], expected["n"])
    for name, value in expected["subscores"].items():
        assert got["subscores"][name] == pytest.approx(value, rel=1e-6), name
    assert sum(got["parser"].values()) == len(
        (home / EXPECTED[task]["predictions"]).read_text().splitlines()
    )


def test_score_is_a_verb():
    assert parser.VERBS["score"]
