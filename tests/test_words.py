# SPDX-License-Identifier: Apache-2.0
"""The text of an answer while its tokens come is that of all its tokens, each decoded once."""

import random

import pytest
import real_tokenizers
from test_answering import Bytes

from vlm_jax.serving.words import HALF, Text, Words

KINDS = real_tokenizers.KINDS


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_text_so_far_is_the_text_of_all_tokens(kind):
    tokenizer, draw, shown = KINDS[kind](), random.Random(0), set()
    words = Words(tokenizer)
    for _ in range(100):
        text = Text(words)
        for _ in range(draw.randint(1, 30)):
            text.ids.append(draw.randrange(len(tokenizer)))
            whole, known = text.whole(stop=False), text.so_far()
            assert whole.startswith(known)
            if not whole.endswith(HALF):
                assert known == whole
            shown.add(known)
    assert len(shown) > 300


def test_pieces_are_the_text_and_no_half_character():
    ids, text = list("naïve 日本".encode()), Text(Words(Bytes()))
    pieces = []
    for k, token in enumerate(ids):
        text.ids.append(token)
        pieces.append(text.piece(whole=k == len(ids) - 1, stop=False))
    assert "".join(pieces) == "naïve 日本" and HALF not in "".join(pieces)


def test_a_token_is_decoded_once(monkeypatch):
    words, asked = Words(real_tokenizers.qwen()), []
    decode = type(words.tokenizer).decode

    def counted(self, ids, **how):
        asked.append(len(ids))
        return decode(self, ids, **how)

    monkeypatch.setattr(type(words.tokenizer), "decode", counted)
    text = Text(words)
    for token in words.tokenizer("is it big? no, it is small").input_ids:
        text.ids.append(token)
        text.piece(whole=False, stop=False)
    assert text.shown == "is it big? no, it is small" and not asked


def test_a_tokenizer_that_cannot_be_read_on_decodes_all(monkeypatch):
    assert Words(Bytes()).stream() is None
    cleans = real_tokenizers.word_level(clean_up_tokenization_spaces=True)
    assert Words(cleans).stream() is None

    def refused(token):
        raise Exception("Invalid prefix encountered while decoding stream")

    words = Words(real_tokenizers.qwen())
    monkeypatch.setattr(words, "stream", lambda: refused)
    text = Text(words)
    text.ids.extend(words.tokenizer("a red cat").input_ids)
    assert text.piece(whole=False, stop=False) == "a red cat"
