# SPDX-License-Identifier: Apache-2.0
"""Conversations rendered by the chat template of a tokenizer, and the positions of their answers.

A conversation is rendered once and completely by transformers, so that the text has everything a
template does, such as changes to earlier turns or a text only before the next answer. Answers are
located in that text, never put together from several renderings.
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

# How a template marks the text that an assistant has written.
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Turn(NamedTuple):
    """A question and its answer: `shown` images first, and one between any two pieces."""

    shown: int
    pieces: tuple[str, ...]
    answer: str

    @property
    def texts(self) -> list[str]:
        """The non-empty pieces (or the one of an empty question) and the answer."""
        question = [piece for piece in self.pieces if piece or len(self.pieces) == 1]
        return [*question, self.answer]

    def saying(self, texts: Sequence[str]) -> "Turn":
        """This turn with other `texts`."""
        remaining = iter(texts)
        pieces = [
            next(remaining) if piece or len(self.pieces) == 1 else "" for piece in self.pieces
        ]
        return Turn(self.shown, tuple(pieces), next(remaining))

    @property
    def images(self) -> int:
        """The number of images of the question."""
        return self.shown + len(self.pieces) - 1


Turns = Sequence[Turn]


class Chat:
    """The chat template of a tokenizer; `mark` stands for an image in what it writes.

    Raises:
      ValueError: for a template that is not valid jinja, or refuses a question and its answer.
    """

    def __init__(self, tokenizer: Any, mark: str = IMAGE_MARK):
        self.tokenizer, self.mark = tokenizer, mark
        self.name = f"the chat template of {tokenizer.name_or_path or 'the tokenizer'}"
        text = tokenizer.get_chat_template()
        self._marks_answers = bool(GENERATION.search(text))
        added = sorted(map(str, tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        self._token = re.compile("|".join(map(re.escape, added)) or "(?!)")
        self._warned: set[str] = set()
        self._lists: dict[bool, tuple[bool, bool]] = {}
        self._skeletons: dict[tuple, list[str] | None] = {}
        one = self._skeleton([Turn(0, ("",), "")], open_=False)
        # The text after an answer; its first token ends generation.
        self.closing = one[-1].strip() if one else ""

    def prompt(self, turns: Turns, system: str = "") -> str:
        """The conversation up to the beginning of its last answer, as transformers renders it.

        Marks stand for images. `system` is the text of a system message before it.

        Raises:
          ValueError: if the template refuses the conversation, or does not write each image or the
            system message once.
        """
        if not system:
            return self._render(turns, open_=True)
        refused = f"{self.name} writes no system message"
        # A template for lists of parts writes a text as nothing, one for texts a list as Python.
        part = {"type": "text", "text": system}
        for content in (system, [part]):
            before = [{"role": "system", "content": content}]
            try:
                text = self._render(turns, open_=True, before=before)
            except ValueError as error:
                refused = str(error)
                continue
            if system.strip() in text and str(part) not in text:
                return text
        raise ValueError(f"{refused}: put the instructions into the first question")

    def row(self, turns: Turns) -> tuple[str, list[Span]]:
        """The whole conversation, and the span of each answer including its closing text.

        An answer begins where generation would begin. Its closing text is what the template writes
        both after the last answer and after this one, without spaces.

        Raises:
          ValueError: as `prompt` does, and if the text of an answer cannot be located.
        """
        text = self._render(turns, open_=False)
        places = self._places(text, turns)
        last = np.cumsum([len(turn.texts) for turn in turns]) - 1  # which of the texts answers are
        ends = [*(start for start, _ in places[1:]), len(text)]
        tail = text[places[-1][1] :]
        marked = self._marked(turns) if self._marks_answers else None
        spans: list[Span] = []
        for k, index in enumerate(last):
            (_, question_end), (start, end) = places[index - 1 : index + 1]
            closed = end + len(self._closing(text[end : ends[index]], tail))
            if marked is None:
                spans.append(
                    (question_end + self._opening(text[question_end:start], turns[: k + 1]), closed)
                )
            elif overlapping := [m for m in marked if m[0] < max(end, start + 1) and m[1] > start]:
                spans.append((overlapping[0][0], max(overlapping[-1][1], closed)))
        if not spans or any(b[0] < a[1] for a, b in zip(spans, spans[1:], strict=False)):
            raise ValueError(
                f"{self.name} marks no text as an answer ({{% generation %}}), or one answer "
                "inside another: choose another data.template"
            )
        self._tell(text, spans)
        return text, spans

    # --- rendering ---------------------------------------------------------------------------

    def _render(self, turns: Turns, *, open_: bool, before: Sequence[dict] = ()) -> str:
        images = sum(turn.images for turn in turns)
        messages = self._messages(turns, self._takes_lists(images > 0), open_)
        text = self._apply([*before, *messages], open_)
        if text.count(self.mark) != images:
            raise ValueError(
                f"{self.name} does not say where the image is: it writes {self.mark} "
                f"{text.count(self.mark)} times for images={images}; choose another data.template"
            )
        return text

    def _apply(self, messages: list[dict], open_: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=open_
            )
        except Exception as error:  # whatever a jinja program may raise
            place = f", line {error.lineno}" if getattr(error, "lineno", None) else ""
            message = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(
                f"{self.name} does not write a conversation of "
                f"{len(messages)} messages ({message}{place}): correct it, or choose another "
                "data.template"
            ) from error

    def _messages(self, turns: Turns, lists: tuple[bool, bool], open_: bool) -> list[dict]:
        """Messages for transformers: questions and answers as texts, or as lists of parts."""
        messages = []
        for turn in turns:
            question: Any = f"{self.mark}\n" * turn.shown + self.mark.join(turn.pieces)
            if lists[0]:
                question = [{"type": "image"}] * turn.shown
                for k, piece in enumerate(turn.pieces):
                    question += [{"type": "image"}] * (k > 0)
                    if piece or len(turn.pieces) == 1:
                        question.append({"type": "text", "text": piece})
            answer = [{"type": "text", "text": turn.answer}] if lists[1] else turn.answer
            messages.append({"role": "user", "content": question})
            messages.append({"role": "assistant", "content": answer})
        return messages[:-1] if open_ else messages

    def _takes_lists(self, images: bool) -> tuple[bool, bool]:
        """Whether questions, and whether answers, are lists of parts, as in vision language models.

        Otherwise they are texts in which a mark stands for an image.
        """
        if images not in self._lists:
            turn = [Turn(images, (_word(0),), _word(1))]
            questions = self._reads(turn, (True, False), images, open_=True)
            answers = questions and self._reads(turn, (True, True), images, open_=False)
            self._lists[images] = (questions, answers)
        return self._lists[images]

    def _reads(self, turn: Turns, lists: tuple[bool, bool], images: bool, *, open_: bool) -> bool:
        """Whether the template writes the texts of such messages."""
        try:
            text = self._apply(self._messages(turn, lists, open_), open_)
        except ValueError:
            return False
        # A template for texts writes a list as Python or JSON would show it.
        as_text = "'type'" in text or '"type"' in text
        words = turn[0].texts[: 1 if open_ else 2]
        return (
            not as_text
            and text.count(self.mark) == images
            and all(text.count(word) == 1 for word in words)
        )

    # --- where the answers are ---------------------------------------------------------------

    def _skeleton(self, turns: Turns, *, open_: bool) -> list[str] | None:
        """What a template writes between the texts of such turns.

        None if it repeats a text, drops one or changes a word of it.
        """
        shapes = [(turn.shown, tuple(map(bool, turn.pieces))) for turn in turns]
        key = (*shapes, open_)
        if key not in self._skeletons:
            words: list[str] = []
            worded = []
            for turn in turns:
                own_words = [_word(len(words) + k) for k in range(len(turn.texts))]
                worded.append(turn.saying(own_words))
                words += own_words
            self._skeletons[key] = _between(
                self._render(worded, open_=open_), words[: -1 if open_ else None]
            )
        return self._skeletons[key]

    def _places(self, text: str, turns: Turns) -> list[Span]:
        """The span of each text of the turns in the rendered conversation."""
        texts = [part for turn in turns for part in turn.texts]
        for _ in range(2):
            skeleton = self._skeleton(turns, open_=False)
            if skeleton and (spans := _fit(text, skeleton, texts)):
                return spans
            # A template may write the date, so a cached skeleton may be of yesterday.
            self._skeletons.clear()
        return self._compared(text, turns)

    def _compared(self, text: str, turns: Turns) -> list[Span]:
        """The same for a template that changes texts, such as an answer without its thoughts.

        The span of a text is the part of the rendering that changes with it.
        """
        places: list[Span] = []
        for k, turn in enumerate(turns):
            for j in range(len(turn.texts)):
                start, after = len(text), len(text)
                for letter in "zj":  # the text itself may begin or end with one of them
                    word = letter + _word(len(places)) + letter
                    while word in text:
                        word = letter + word + letter
                    other = turn.saying([*turn.texts[:j], word, *turn.texts[j + 1 :]])
                    rendered = self._render([*turns[:k], other, *turns[k + 1 :]], open_=False)
                    if rendered.count(word) != 1:
                        raise ValueError(self._ambiguous(k, j == len(turn.texts) - 1))
                    start = min(start, _common(text, rendered))
                    after = min(after, _common(text[::-1], rendered[::-1]))
                if places and start < places[-1][1]:
                    raise ValueError(self._ambiguous(k, j == len(turn.texts) - 1))
                places.append((start, max(start, len(text) - after)))
        return places

    def _ambiguous(self, k: int, answer: bool) -> str:
        return (
            f"{self.name} does not write {'answer' if answer else 'question'} {k + 1} once and "
            "after the earlier texts, so that answers cannot be told from the rest: choose "
            "another data.template"
        )

    def _opening(self, written: str, turns: Turns) -> int:
        """How many of the characters before the last answer belong to the generation prompt."""
        skeleton = self._skeleton(turns, open_=True)
        if skeleton and written.startswith(skeleton[-1]):
            return len(skeleton[-1])
        if skeleton:
            self._warn(
                "opening",
                f"{self.name} opens an answer of a conversation with {written!r} and asks for one "
                f"with {skeleton[-1]!r}: a model that is trained on the first generates from the "
                "second; another data.template has one for both",
            )
        return len(written)

    def _closing(self, following: str, tail: str) -> str:
        """The closing text of an answer, from the text after it and the text after the last one."""
        cut = _common(following, tail)
        # Tokens with a common beginning, <|end|> and <|endoftext|>, are different tokens.
        for text in (following, tail):
            cut = min(
                [cut, *(m.start() for m in self._token.finditer(text) if m.start() < cut < m.end())]
            )
        closing = following[:cut].rstrip()
        eos = self.tokenizer.eos_token
        if not closing and eos and following.lstrip().startswith(eos):
            closing = following[: following.index(eos) + len(eos)]
        return closing

    def _marked(self, turns: Turns) -> list[Span]:
        """The spans that the template marks as written by an assistant."""
        from transformers.utils.chat_template_utils import render_jinja_template

        lists = self._takes_lists(any(turn.images for turn in turns))
        messages = self._messages(turns, lists, False)
        _, spans = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.get_chat_template(),
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return [span for span in spans[0] if span[1] > span[0]]

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
        """Warns once of each kind, because the template is the same for all rows."""
        if kind not in self._warned:
            self._warned.add(kind)
            log.warning(words)


def _word(k: int) -> str:
    """A text that no template changes."""
    return f"zq{k}qz"


def _common(one: str, other: str) -> int:
    """The length of the common beginning of two texts."""
    return len(os.path.commonprefix((one, other)))


def _between(text: str, words: list[str]) -> list[str] | None:
    """The texts around the words; None unless each word occurs once and in order."""
    pieces, position = [], 0
    for word in words:
        if text.count(word) != 1 or text.index(word) < position:
            return None
        pieces.append(text[position : text.index(word)])
        position = text.index(word) + len(word)
    return [*pieces, text[position:]]


def _fit(text: str, between: list[str], texts: list[str]) -> list[Span] | None:
    """The spans of texts in a rendering of alternating `between` and (trimmed) texts, or None."""
    if not text.startswith(between[0]):
        return None
    at, places = len(between[0]), []
    for k, part in enumerate(texts):
        for form in (part, part.rstrip(), part.lstrip(), part.strip()):
            rest = form + between[k + 1]
            if text[at:] == rest if k == len(texts) - 1 else text.startswith(rest, at):
                places.append((at, at + len(form)))
                at += len(rest)
                break
        else:
            return None
    return places
