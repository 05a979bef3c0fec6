# SPDX-License-Identifier: Apache-2.0
"""What of a question a selection reads: the words that may be seen, and CLIP's own tokens."""

import logging

import pytest
import real_tokenizers
from made_clip import text_tokenizer
from transformers import PreTrainedTokenizerFast

from vlm_jax.data import reading


@pytest.mark.parametrize(
    "question, words",
    [
        ("What is the color of the red cat?", ["color", "of", "red", "cat"]),
        (f"Is it a DOG?\n{reading.ONE_WORD}", ["DOG"]),
        (f"Which one?\nA. cat\nB. dog\n{reading.OPTION}", ["one", "cat", "B", "dog"]),
        ("What is it?", ["What is it?"]),
        ("", ["see", "in", "this", "image"]),
        ("  \n", ["see", "in", "this", "image"]),
        ("don't", ["don", "t"]),
    ],
)
def test_the_words_of_a_question_are_those_that_may_be_seen(question, words):
    assert reading.words(question) == words


def test_words_are_tokenized_one_by_one_without_tokens_around_them():
    backend = real_tokenizers.pieces("bpe", prefix="first")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    ids = reading.word_ids(tokenizer, "a red cat")
    apart = [tokenizer(word, add_special_tokens=False).input_ids for word in ("red", "cat")]
    assert ids == [*apart[0], *apart[1]]


def test_a_question_too_long_for_clip_loses_its_end_but_for_the_last_token(caplog):
    tokenizer = text_tokenizer()
    short = reading.clip_ids(tokenizer, f"a cat\n{reading.ONE_WORD}", 8)
    assert short == reading.clip_ids(tokenizer, "a cat", 8) and not caplog.records
    first, last = short[0], short[-1]
    with caplog.at_level(logging.WARNING):
        long = reading.clip_ids(tokenizer, "is it a red cat or a small red cat?", 8)
    assert len(long) == 8 and (long[0], long[-1]) == (first, last)
    assert "its text tower reads 8" in caplog.text
