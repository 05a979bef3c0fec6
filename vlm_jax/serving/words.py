# SPDX-License-Identifier: Apache-2.0
"""The tokens of an answer as text, whole or while they come."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

HALF = "\ufffd"  # stands where the bytes of a character are incomplete


class Words:
    """A tokenizer that several threads share, one at a time: transformers' are not safe."""

    def __init__(self, tokenizer: Any):
        self.tokenizer, self.lock = tokenizer, threading.Lock()
        backend = getattr(tokenizer, "backend_tokenizer", None)
        # Cleaning up changes blanks of the whole text, which a stream cannot.
        cleans = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self.backend = backend if isinstance(backend, Tokenizer) and not cleans else None

    def decode(self, ids: Sequence[int], **how: Any) -> str:
        """The text of tokens."""
        with self.lock:
            return self.tokenizer.decode(ids, **how)

    def answer(self, ids: Sequence[int], *, stop: bool) -> str:
        """The text of an answer's tokens; with `stop` the last one ended it, and is left out."""
        return self.decode(ids[:-1] if stop else ids, skip_special_tokens=True).lstrip()

    def stream(self) -> Callable[[int], str] | None:
        """What gives the text that a next token completes; None if this tokenizer has no such."""
        if self.backend is None:
            return None
        stream = DecodeStream(skip_special_tokens=True)

        def step(token: int) -> str:
            with self.lock:
                return stream.step(self.backend, token) or ""

        return step


class Text:
    """The tokens of an answer, `ids`, and their text piece by piece."""

    def __init__(self, words: Words):
        self.words, self.ids, self.shown = words, [], ""
        self._step = words.stream()
        self._known, self._read = "", 0  # the text of so many of the tokens

    def whole(self, *, stop: bool) -> str:
        """All text; with `stop` the last token, which ended the answer, is left out."""
        return self.words.answer(self.ids, stop=stop)

    def so_far(self) -> str:
        """The text before an incomplete character at its end. Each token is decoded once."""
        new, self._read = self.ids[self._read :], len(self.ids)
        if self._step is not None:
            try:
                self._known += "".join(map(self._step, new))
                return self._known.lstrip()
            except Exception:  # that of tokenizers for a text that a token changes behind itself
                self._step = None
        return self.whole(stop=False).rstrip(HALF)

    def piece(self, *, whole: bool, stop: bool) -> str:
        """The text that was not returned yet.

        The bytes of a character may come in several tokens: an incomplete character waits for the
        last one, unless the text is `whole`.
        """
        text = self.whole(stop=stop) if whole else self.so_far()
        new, self.shown = text[len(self.shown) :], text
        return new
