# SPDX-License-Identifier: Apache-2.0
"""What a compressor that reads a question's tokens is given: the words that matter, or CLIP's ids.

Sources: Ironieser/MMTok at d1522cda (words), Theia-4869/CDPruner at 9541616c (CLIP).
"""

import logging
import re
from typing import Any

log = logging.getLogger(__name__)

# What benchmarks add to a question, which says nothing about the image.
ONE_WORD = "Answer the question using a single word or phrase."
OPTION = "Answer with the option's letter from the given choices directly."
NO_QUESTION = "What do you see in this image?"
# Words that say nothing about an image, in lower case.
EMPTY_WORDS = frozenset(
    "a an the is are was were be been being have has had do does did it they he she we you i what "
    "where when why how who which and or but so if then question answer to for with by from at "
    "into onto upon".split()
)


def words(question: str) -> list[str]:
    """The words of a question that may be seen in an image; of an empty one those of another.

    Where no such word is left, the question itself is the only one.
    """
    for suffix in (ONE_WORD, OPTION):
        question = question.replace(suffix, "")
    question = question.strip() or NO_QUESTION
    kept = [word for word in re.findall(r"\b\w+\b", question) if word.lower() not in EMPTY_WORDS]
    return kept or [question]


def word_ids(tokenizer: Any, question: str) -> list[int]:
    """The ids of `words`, each tokenized by itself, without tokens before and after."""
    backend = tokenizer.backend_tokenizer
    return backend.encode(words(question), is_pretokenized=True, add_special_tokens=False).ids


def clip_ids(tokenizer: Any, question: str, length: int) -> list[int]:
    """The ids of a question for CLIP's text tower of `length` places, its first and last token
    included; a longer one loses its end, which is logged. ValueError without a tokenizer."""
    if tokenizer is None:
        raise ValueError(
            "this model's compressor reads the question with CLIP's text tower, whose tokenizer is "
            "missing: convert it with --text-tower=DIR, a folder of that CLIP"
        )
    question = question.removesuffix("\n" + ONE_WORD)
    ids = tokenizer.backend_tokenizer.encode(question).ids
    if len(ids) > length:
        log.warning(
            "a question has %d of CLIP's tokens and its text tower reads %d: its end is left out "
            "(%.60r ...)",
            len(ids),
            length,
            question,
        )
        ids = [*ids[: length - 1], ids[-1]]
    return ids
