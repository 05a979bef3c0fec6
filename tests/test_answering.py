# SPDX-License-Identifier: Apache-2.0
"""The pieces of an answer are its text: no half character, no part of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_jax.serving.answering import Answering, held
from vlm_jax.serving.tickets import Score
from vlm_jax.serving.words import Words


class Bytes:
    """A tokenizer whose tokens are bytes."""

    def decode(self, ids, skip_special_tokens=True):
        return bytes(ids).decode("utf-8", errors="replace")


def answered(text, *, stop=(), room=None, stop_ids=()):
    """The pieces of an answer with these bytes, and the answer."""
    ids = list(text.encode())
    answering = Answering(Words(Bytes()), stop_ids=stop_ids, stop=stop, room=room or len(ids))
    pieces = []
    for token in ids:
        piece = answering.take(token)
        pieces += [] if piece is None else [piece]
        if answering.finish:
            break
    assert "".join(piece.text for piece in pieces) == answering.text
    assert [k for piece in pieces for k in piece.ids] == answering.ids
    assert "\ufffd" not in answering.text
    return pieces, answering


@given(st.text("abé日", min_size=1), st.lists(st.text("abé日", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string(text, stop):
    found = [text.index(x) for x in stop if x in text]
    _, answering = answered(text, stop=tuple(stop))
    # Of two that end with the same token, the one that begins first.
    shortest = (
        min(len(text[: text.index(x) + len(x)].encode()) for x in stop if x in text) if found else 0
    )
    ended = [text.index(x) for x in stop if x in text
             and len(text[: text.index(x) + len(x)].encode()) == shortest]  # fmt: skip
    assert answering.text == (text[: min(ended)] if found else text)
    assert answering.finish == ("stop" if found else "length")


def test_what_may_become_a_stop_string_waits_and_is_shown_if_it_does_not():
    pieces, answering = answered("a##b###c", stop=("###",))
    assert [piece.text for piece in pieces] == ["a", "##b", ""] and answering.text == "a##b"
    assert held("say ##", ("###", "#!")) == 2 and held("say", ("###",)) == 0


def test_a_stop_string_as_long_as_a_request_costs_no_more_than_the_text():
    class Counted(str):
        """A stop string that counts what is taken of it."""

        def __getitem__(self, part):
            taken.append(part.stop)
            return super().__getitem__(part)

    taken = []
    assert held("say a", (Counted("a" * 10_000_000),)) == 1
    assert taken == [1, 2, 3, 4, 5]


def test_a_stop_token_is_no_text_and_scores_come_with_their_tokens():
    answering = Answering(Words(Bytes()), stop_ids=(0,), stop=("bc",), room=9)
    scores = [Score(k, chr(k), -0.5) for k in b"ab"]
    first = answering.take(ord("a"), scores[0])
    assert (first.text, first.scores) == ("a", (scores[0],))
    assert answering.take(ord("b"), scores[1]) is None
    last = answering.take(0)
    assert (last.text, last.ids, last.scores) == ("b", (98, 0), (scores[1],))
    assert answering.finish == "stop" and answering.text == "ab"


@pytest.mark.parametrize("finish", ["deadline", "cancelled"])
def test_an_answer_that_is_ended_shows_what_waited(finish):
    answering = Answering(Words(Bytes()), stop_ids=(), stop=("abc",), room=9)
    assert answering.take(ord("a")) is None
    piece = answering.end(finish)
    assert (piece.text, piece.ids, answering.finish) == ("a", (97,), finish)
    assert answering.end(finish) is None
