# SPDX-License-Identifier: Apache-2.0
"""The text of one answer while its tokens come: pieces, stop strings, scores, and its end."""

from collections.abc import Sequence

from vlm_jax.serving.tickets import Finish, Piece, Score
from vlm_jax.serving.words import Text, Words


class Answering:
    """An answer of at most `room` tokens that one of `stop_ids`, or a text of `stop`, ends.

    Text that may be the beginning of a text of `stop`, or of a character, waits.
    """

    def __init__(self, words: Words, *, stop_ids: Sequence[int], stop: Sequence[str], room: int):
        self.said, self.stop_ids, self.stop, self.room = Text(words), set(stop_ids), stop, room
        self.text = ""  # shown so far
        self.scores: list[Score] = []
        self.finish: Finish | None = None
        self.told = 0  # tokens that came with a piece

    @property
    def ids(self) -> list[int]:
        """All tokens so far."""
        return self.said.ids

    def take(self, token: int, score: Score | None = None) -> Piece | None:
        """The next token; the piece that it completes, if it does. Sets `finish` at the end."""
        self.ids.append(token)
        if score is not None:
            self.scores.append(score)
        stopped = token in self.stop_ids
        if stopped or len(self.ids) == self.room:
            self.finish = "stop" if stopped else "length"
        text = self.said.whole(stop=stopped) if self.finish else self.said.so_far()
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            text, self.finish = text[: min(found)], "stop"
        elif not self.finish:
            text = text[: len(text) - held(text, self.stop)]
        return self._shown(text)

    def end(self, finish: Finish) -> Piece | None:
        """Ends it where it is; the piece that waited, if one did."""
        self.finish = finish
        return self._shown(self.said.whole(stop=False))

    def _shown(self, text: str) -> Piece | None:
        new, first = text[len(self.text) :], self.told
        if not new and (not self.finish or first == len(self.ids)):
            return None
        self.text, self.told = text, len(self.ids)
        return Piece(new, tuple(self.ids[first:]), tuple(self.scores[first:]))


def held(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of a text may be the beginning of one of `stops`."""
    # A stop string may be as long as a request: no more of it is looked at than there is text.
    lengths = (
        n
        for stop in stops
        for n in range(1, min(len(stop), len(text) + 1))
        if text.endswith(stop[:n])
    )
    return max(lengths, default=0)
