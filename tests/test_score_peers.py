# SPDX-License-Identifier: Apache-2.0
"""Drawn answers get the grades that lmms-eval's and VLMEvalKit's own functions give (make
test-peers)."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from vlm_jax.evals.task import Question
from vlm_jax.evals.tasks import TASKS
from vlm_jax.evals.tasks.mmbench import matched

pytestmark = pytest.mark.peers

PEERS = Path(os.environ.get("PEERS", Path(sys.prefix) / "peers"))
DRAWS = 2000
WORDS = (
    "yes", "No", "a", "The", "two", "none", "10", "1,000", "3.5%", "$5.00", "U.S.A.", "dont",
    "it's", "man's", "t-shirt", "N/A", "7:30", "o'clock", "...", "?", ",", ";", "/", "(", "\n",
    "\t", "  ", "unanswerable", "é", "Ａ", "１", "-5", "1e3", "nan", "0", "5%", "05", "B", "B.",
    "(B)", "and", "",
)  # fmt: skip


def drawn(seed, most=5):
    chance = random.Random(seed)
    words = [chance.choice(WORDS) for _ in range(chance.randrange(most))]
    return chance.choice([" ", ""]).join(words)


def ours(task, text, answers, protocol="lmms-eval", **facts):
    question = Question(id=1, text="?", answers=tuple(answers), facts=facts)
    return TASKS[task].protocols[protocol].grade(question, text)


def published(cases):
    assert PEERS.is_dir(), "make test-peers installs them"
    done = subprocess.run(
        [sys.executable, Path(__file__).parent / "published_scorers.py"],
        input=json.dumps(dict(peers=str(PEERS), cases=cases)),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def cases(task, count):
    """Pairs of a text, often an answer or near one, and answers."""
    chance = random.Random(task)
    pairs = []
    for seed in range(DRAWS):
        golds = [drawn(f"{task} {seed} {i % chance.randrange(1, 4)}", 4) for i in range(count)]
        text = chance.choice([*golds, drawn(f"{task} {seed}"), f"{golds[0]} {drawn(seed, 2)}"])
        pairs.append((text.strip(), golds))
    return pairs


@pytest.mark.parametrize("task, count", [
    ("vqav2", 10), ("textvqa", 10), ("vizwiz", 10), ("docvqa", 3), ("chartqa", 1), ("ocrbench", 2),
])  # fmt: skip
def test_a_grade_is_that_of_lmms_eval(task, count):
    pairs = cases(task, count)
    found = published({task: pairs})[task]
    for (text, answers), value in zip(pairs, found, strict=True):
        grade = ours(task, text, answers, dataset="")
        assert grade.value == pytest.approx(value, abs=1e-9), (text, answers)
    assert 0.05 < sum(value > 0 for value in found) / len(found) < 1


def test_a_parsed_yes_or_no_is_that_of_lmms_eval():
    texts = [drawn(f"mme {seed}", 4) for seed in range(DRAWS)]
    found = published({"mme": [(text, []) for text in texts]})["mme"]
    assert [ours("mme", text, ["yes"]).parsed for text in texts] == found


def test_a_matched_option_is_that_of_vlmevalkit():
    chance, pairs = random.Random(1), []
    for seed in range(DRAWS):
        texts = [drawn(f"option {seed} {i}", 4).strip() for i in range(chance.randrange(2, 5))]
        options = {"ABCD"[i]: text or "none" for i, text in enumerate(texts)}
        said = [*options.values(), *"ABCDZ", "it is (C).", f"B. {texts[1]}", drawn(f"said {seed}")]
        pairs.append((chance.choice(said), options))
    found = published({"mmbench": pairs})["mmbench"]
    for (text, options), letter in zip(pairs, found, strict=True):
        assert matched(text, options)[0] == (letter or ""), (text, options)
    assert len(set(found)) == 6
