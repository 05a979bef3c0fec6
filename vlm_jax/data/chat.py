# SPDX-License-Identifier: Apache-2.0
"""Conversations as the chat template of a tokenizer writes them, and where their answers stand.

A conversation is rendered once, whole, by transformers: what a template does to earlier turns once
more follow, or only in front of an answer that is still to come, is in the text because the
template did it. Answers are found in that text, never put together from several renderings.
"""

import logging
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from vlm_jax.data.example import IMAGE_MARK

log = logging.getLogger(__name__)

Span = tuple[int, int]  # characters [start, end)

# How a template says itself which text an assistant has written.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Turn(NamedTuple):
    """A question and its answer: `shown` images in front, and one between any two pieces."""

    shown: int
    pieces: tuple[str, ...]
    answer: str

    @property
    def texts(self) -> list[str]:
        """Pieces that say something, or the one of an empty question; and the answer."""
        asked = [piece for piece in self.pieces if piece or len(self.pieces) == 1]
        return [*asked, self.answer]

    def saying(self, texts: Sequence[str]) -> "Turn":
        """This turn with other texts in the place of `texts`."""
        left = iter(texts)
        pieces = [next(left) if piece or len(self.pieces) == 1 else "" for piece in self.pieces]
        return Turn(self.shown, tuple(pieces), next(left))

    @property
    def images(self) -> int:
        """How many images the question shows."""
        return self.shown + len(self.pieces) - 1


Turns = Sequence[Turn]


class Chat:
    """The chat template of a tokenizer; `mark` stands for an image in what it writes.

    Raises:
      ValueError: for a template that is no jinja program, or refuses a question and its answer.
    """

    def __init__(self, tokenizer: Any, mark: str = IMAGE_MARK):
        self.tokenizer, self.mark = tokenizer, mark
        self.name = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        text = tokenizer.get_chat_template()
        self._marks_answers = bool(GENERATION.search(text))
        added = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._told: set[str] = set()  # what was warned of
        self._lists: dict[bool, tuple[bool, bool]] = {}
        self._skeletons: dict[tuple, list[str] | None] = {}
        one = self._skeleton([Turn(0, ("",), "")], open_=False)
        # What stands behind an answer; its first token ends generation.
        self.closing = one[-1].strip() if one else ""

    def prompt(self, turns: Turns) -> str:
        """The conversation up to where its last answer begins, as transformers would ask for it.

        Images stand where their marks are.

        Raises:
          ValueError: where the template refuses the conversation, or writes no place for an image.
        """
        return self._render(turns, open_=True)

    def row(self, turns: Turns) -> tuple[str, list[Span]]:
        """The whole conversation, and the part of it that each answer is, with what closes it.

        An answer begins where generation would begin to write it. What closes it is what the
        template writes behind its last answer, spaces apart, and behind this one too.

        Raises:
          ValueError: as `prompt` does, and where it cannot be told which text is an answer.
        """
        text = self._render(turns, open_=False)
        places = self._places(text, turns)
        last = np.cumsum([len(turn.texts) for turn in turns]) - 1  # which of the texts answers are
        ends = [*(start for start, _ in places[1:]), len(text)]
        tail = text[places[-1][1] :]
        marked = self._marked(turns) if self._marks_answers else None
        spans: list[Span] = []
        for k, at in enumerate(last):
            (_, asked), (start, end) = places[at - 1 : at + 1]
            closed = end + len(self._closing(text[end : ends[at]], tail))
            if marked is None:
                spans.append((asked + self._opening(text[asked:start], turns[: k + 1]), closed))
            elif found := [m for m in marked if m[0] < max(end, start + 1) and m[1] > start]:
                spans.append((found[0][0], max(found[-1][1], closed)))
        if not spans or any(b[0] < a[1] for a, b in zip(spans, spans[1:], strict=False)):
            raise ValueError(
                f"{self.name} marks no text as an answer ({{% generation %}}), or one answer "
                "inside another: choose another data.template"
            )
        self._tell(text, spans)
        return text, spans

    # --- rendering ---------------------------------------------------------------------------

    def _render(self, turns: Turns, *, open_: bool) -> str:
        images = sum(turn.images for turn in turns)
        text = self._apply(self._messages(turns, self._takes_lists(images > 0), open_), open_)
        if text.count(self.mark) != images:
            raise ValueError(
                f"{self.name} does not say where the image stands: it writes {self.mark} "
                f"{text.count(self.mark)} times for images={images}; choose another data.template"
            )
        return text

    def _apply(self, messages: list[dict], open_: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_
            )
        except Exception as error:  # whatever a jinja program may raise
            at = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            said = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"{self.name} does not write a conversation of "
                f"{len(messages)} messages ({said}{at}): correct it, or choose another "
                "data.template"
            ) from error

    def _messages(self, turns: Turns, lists: tuple[bool, bool], open_: bool) -> list[dict]:
        """What transformers is given: questions and answers as texts, or as lists of parts."""
        messages = []
        for turn in turns:
            asked: Any = f"{self.mark}\n" * turn.shown + self.mark.join(turn.pieces)
            if lists[0]:
                asked = [{"type": "image"}] * turn.shown
                for k, piece in enumerate(turn.pieces):
                    asked += [{"type": "image"}] * (k > 0)
                    if piece or len(turn.pieces) == 1:
                        asked.append({"type": "text", "text": piece})
            said = [{"type": "text", "text": turn.answer}] if lists[1] else turn.answer
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": said})
        return messages[:-1] if open_ else messages

    def _takes_lists(self, shown: bool) -> tuple[bool, bool]:
        """Whether questions, and whether answers, are lists of parts, as vision language models
        have them; else texts, in which a mark stands for an image."""
        if shown not in self._lists:
            turn = [Turn(shown, (_word(0),), _word(1))]
            asked = self._reads(turn, (True, False), shown, open_=True)
            said = asked and self._reads(turn, (True, True), shown, open_=False)
            self._lists[shown] = (asked, said)
        return self._lists[shown]

    def _reads(self, turn: Turns, lists: tuple[bool, bool], shown: bool, *, open_: bool) -> bool:
        """Whether the template writes what such contents say."""
        try:
            text = self._apply(self._messages(turn, lists, open_), open_)
        except ValueError:
            return False
        # A template for texts writes a list as Python or JSON would show it.
        as_text = "'type'" in text or '"type"' in text
        words = turn[0].texts[: 1 if open_ else 2]
        return (
            not as_text
            and text.count(self.mark) == shown
            and all(text.count(word) == 1 for word in words)
        )

    # --- where the answers stand -------------------------------------------------------------

    def _skeleton(self, turns: Turns, *, open_: bool) -> list[str] | None:
        """What a template writes between the texts of such turns; None where it repeats one,
        drops one or changes a word of it."""
        shapes = [(turn.shown, tuple(map(bool, turn.pieces))) for turn in turns]
        key = (*shapes, open_)
        if key not in self._skeletons:
            words: list[str] = []
            told = []
            for turn in turns:
                some = [_word(len(words) + k) for k in range(len(turn.texts))]
                told.append(turn.saying(some))
                words += some
            self._skeletons[key] = _between(
                self._render(told, open_=open_), words[: -1 if open_ else None]
            )
        return self._skeletons[key]

    def _places(self, text: str, turns: Turns) -> list[Span]:
        """Where each text of the turns stands in the rendered conversation."""
        texts = [said for turn in turns for said in turn.texts]
        for _ in range(2):
            skeleton = self._skeleton(turns, open_=False)
            if skeleton and (found := _fit(text, skeleton, texts)):
                return found
            # A template may write the date: what was known may be of yesterday.
            self._skeletons.clear()
        return self._compared(text, turns)

    def _compared(self, text: str, turns: Turns) -> list[Span]:
        """The same for a template that writes a text in another way than it is given, such as an
        earlier answer without its thoughts: what of the rendering changes with each text."""
        places: list[Span] = []
        for k, turn in enumerate(turns):
            for j in range(len(turn.texts)):
                start, behind = len(text), len(text)
                for letter in "zj":  # neither may be what the text itself begins or ends with
                    word = letter + _word(len(places)) + letter
                    while word in text:
                        word = letter + word + letter
                    other = turn.saying([*turn.texts[:j], word, *turn.texts[j + 1 :]])
                    made = self._render([*turns[:k], other, *turns[k + 1 :]], open_=False)
                    if made.count(word) != 1:
                        raise ValueError(self._ambiguous(k, j == len(turn.texts) - 1))
                    start = min(start, _common(text, made))
                    behind = min(behind, _common(text[::-1], made[::-1]))
                if places and start < places[-1][1]:
                    raise ValueError(self._ambiguous(k, j == len(turn.texts) - 1))
                places.append((start, max(start, len(text) - behind)))
        return places

    def _ambiguous(self, k: int, answer: bool) -> str:
        return (
            f"{self.name} does not write {'answer' if answer else 'question'} {k + 1} once and "
            "behind what was said before, so that answers cannot be told from the rest: choose "
            "another data.template"
        )

    def _opening(self, written: str, turns: Turns) -> int:
        """How many of the characters in front of the last answer generation is given."""
        asked = self._skeleton(turns, open_=True)
        if asked and written.startswith(asked[-1]):
            return len(asked[-1])
        if asked:
            self._warn(
                "opening",
                f"{self.name} opens an answer of a conversation with {written!r} and asks for one "
                f"with {asked[-1]!r}: a model that is trained on the first generates from the "
                "second; another data.template has one for both",
            )
        return len(written)

    def _closing(self, behind: str, tail: str) -> str:
        """What closes an answer, of the text behind it and of the text behind the last one."""
        cut = _common(behind, tail)
        # Tokens that begin alike, <|end|> and <|endoftext|>, have no part in common.
        for text in (behind, tail):
            cut = min(
                [cut, *(m.start() for m in self._token.finditer(text) if m.start() < cut < m.end())]
            )
        closing = behind[:cut].rstrip()
        eos = self.tokenizer.eos_token
        if not closing and eos and behind.lstrip().startswith(eos):
            closing = behind[: behind.index(eos) + len(eos)]
        return closing

    def _marked(self, turns: Turns) -> list[Span]:
        """What the template says an assistant has written."""
        from transformers.utils.chat_template_utils import render_jinja_template

        lists = self._takes_lists(any(turn.images for turn in turns))
        messages = self._messages(turns, lists, False)
        _, found = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [span for span in found[0] if span[1] > span[0]]

    def _tell(self, text: str, spans: list[Span]) -> None:
        """Warns of a template after which no model learns to end an answer."""
        ends = tuple(str(token) for token in self.tokenizer.added_tokens_decoder.values())
        if ends and not any(text[start:end].rstrip().endswith(ends) for start, end in spans):
            self._warn(
                "end",
                f"{self.name} ends an answer with no token that stops generation: a model trained "
                "on it does not learn to stop; another data.template closes answers",
            )

    def _warn(self, kind: str, words: str) -> None:
        """Warns once of each kind: it is the template's, not the row's."""
        if kind not in self._told:
            self._told.add(kind)
            log.warning(words)


def _word(k: int) -> str:
    """A text that no template treats in a special way."""
    return f"zq{k}qz"


def _common(one: str, other: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return len(os.path.commonprefix((one, other)))


def _between(text: str, words: list[str]) -> list[str] | None:
    """What stands around words; None where they do not stand there once and in turn."""
    found, at = [], 0
    for word in words:
        if text.count(word) != 1 or text.index(word) < at:
            return None
        found.append(text[at : text.index(word)])
        at = text.index(word) + len(word)
    return [*found, text[at:]]


def _fit(text: str, between: list[str], texts: list[str]) -> list[Span] | None:
    """Where texts stand in a rendering that is `between` and texts in turn, or those trimmed."""
    if not text.startswith(between[0]):
        return None
    at, places = len(between[0]), []
    for k, said in enumerate(texts):
        for form in (said, said.rstrip(), said.lstrip(), said.strip()):
            rest = form + between[k + 1]
            if text[at:] == rest if k == len(texts) - 1 else text.startswith(rest, at):
                places.append((at, at + len(form)))
                at += len(rest)
                break
        else:
            return None
    return places
