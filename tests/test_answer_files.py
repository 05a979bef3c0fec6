# SPDX-License-Identifier: Apache-2.0
"""What a file of answers or the cache holds is an answer, or is made again."""

import json

from vlm_jax.evals.tasks import TASKS
from vlm_jax.serving import answer_files
from vlm_jax.serving.answer_cache import AnswerCache


def test_an_entry_of_another_form_is_none(tmp_path):
    cache, key = AnswerCache(tmp_path), "ab" * 32
    for answer in ([], None, "yes"):
        cache.put(key, {})
        cache.place(key).write_text(json.dumps({"key": key, "answer": answer}))
        assert cache.get(key) is None and cache.hits == 0


def test_a_line_without_a_text_is_asked_again(tmp_path):
    rows = [dict(question_id=i, prompt="?", text="yes", metadata={}) for i in range(3)]
    rows[0]["text"] = None
    del rows[1]["text"]
    file = answer_files.AnswerFile(tmp_path, "some", TASKS["ocrbench"])
    file.open({}, ["0", "1", "2"])
    file.path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    file.open({}, ["0", "1", "2"])
    assert list(file.lines) == ["2"] and file.path.read_text() == json.dumps(rows[2]) + "\n"
