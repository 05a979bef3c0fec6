# SPDX-License-Identifier: Apache-2.0
"""What a file of answers or the cache holds is an answer, or is made again."""

import json
import os

import pytest

from vlm_jax.evals.tasks import TASKS
from vlm_jax.serving import answer_files
from vlm_jax.serving.answer_cache import AnswerCache
from vlm_jax.serving.greedy import Said

SAID = dict(ids=[3, 1], stopped=True, visual_tokens=4)


@pytest.mark.parametrize("answer", [
    [], None, "yes", {}, SAID | {"more": 1}, SAID | {"ids": 3}, SAID | {"ids": ["3"]},
    SAID | {"ids": [-1]}, SAID | {"stopped": 1}, SAID | {"visual_tokens": None},
])  # fmt: skip
def test_an_entry_of_another_form_is_damaged_and_none(answer, tmp_path):
    cache, key = AnswerCache(tmp_path, fits=Said.fits), "ab" * 32
    assert cache.get(key) is None and cache.damaged == 0
    cache.put(key, SAID)
    assert Said(**cache.get(key)) == Said([3, 1], True, 4) and cache.hits == 1
    cache.place(key).write_text(json.dumps({"key": key, "answer": answer}))
    assert cache.get(key) is None and (cache.hits, cache.damaged) == (1, 1)
    cache.put(key, SAID)
    assert cache.get(key) == SAID and (cache.hits, cache.damaged) == (2, 1)


def test_a_cache_is_bounded_and_keeps_what_was_read_last(tmp_path):
    cache = AnswerCache(tmp_path, fits=lambda _: True, most=256 * 10)
    keys = [f"ab{i:062d}" for i in range(30)]
    for number, key in enumerate(keys):
        cache.put(key, {"n": number})
        os.utime(cache.place(key), ns=(number, number))
        if number < 10:
            assert cache.get(keys[0]) == {"n": 0}  # as new as now
    assert len(list(tmp_path.glob("*/*"))) <= 10
    assert cache.get(keys[0]) == {"n": 0} and cache.get(keys[29]) == {"n": 29}
    assert cache.get(keys[1]) is None and cache.get("cd" + "0" * 62) is None


def test_a_line_without_a_text_is_asked_again(tmp_path):
    rows = [dict(question_id=i, prompt="?", text="yes", metadata={}) for i in range(3)]
    rows[0]["text"] = None
    del rows[1]["text"]
    file = answer_files.AnswerFile(tmp_path, "some", TASKS["ocrbench"])
    file.open({}, ["0", "1", "2"])
    file.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.open({}, ["0", "1", "2"])
    assert list(file.lines) == ["2"] and file.path.read_text() == json.dumps(rows[2]) + "\n"
