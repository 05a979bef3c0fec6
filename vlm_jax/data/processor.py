# SPDX-License-Identifier: Apache-2.0
"""Turns an example into token ids with their loss mask, and an image into normalized pixels.

Shapes: T text tokens, Tq question tokens, S pixels of the encoder's side.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from vlm_jax import compressors
from vlm_jax.data import clips, reading, templates
from vlm_jax.data.example import IMAGE_MARK, BadExample, Example
from vlm_jax.data.images import Preparation
from vlm_jax.data.templates import OwnTemplate, Part
from vlm_jax.data.tokenizer import Encoder, mark_of
from vlm_jax.data.tokenizer import load_tokenizer as load_tokenizer
from vlm_jax.data.tokens import Tokens as Tokens

NO_IMAGE_QUESTION = "image"  # what a question-reading compressor reads for a row without an image


@dataclass(frozen=True)
class RowFormat:
    """How an example becomes a row: fields of config.data, and what the model requires of its rows.

    Attributes:
      images: how images are prepared.
      query: how the question is read for the compressor: "none", "separate", "prefix", or by its
        tokens: "words" of the LLM's tokenizer, "clip" of CLIP's.
      images_per_row: M, the images of a row, frames of clips among them.
      reads: what the compressor reads beside the encoder's levels.
      vocab: rows of the LLM's embedding, if known.
    Raises:
      ValueError: for an unknown template; for query "prefix" with a template whose question does
        come before the image, with several images in a row, or with lengths that leave no room
        after it.
    """

    template: str
    text_length: int
    question_length: int
    images_per_row: int
    blind: bool
    images: Preparation
    query: str = "none"
    reads: str = ""
    vocab: int | None = None

    def __post_init__(self) -> None:
        templates.named(self.template)
        if self.query != "prefix":
            return
        templates.check_prefix(self.template)
        if self.images_per_row > 1:
            raise ValueError(
                "compressor.query='prefix' reads the text before the one image of a row once; "
                f"data.images_per_row={self.images_per_row} goes with "
                "compressor.query='separate' or 'none' (the frames of a clip are images too)"
            )
        if self.question_length >= self.text_length:
            raise ValueError(
                f"compressor.query='prefix' keeps data.question_length={self.question_length} of "
                f"data.text_length={self.text_length} tokens for the text before the image: raise "
                "data.text_length by what follows the image, the answer and its end included"
            )

    @classmethod
    def of(cls, config: Any) -> "RowFormat":
        """As a configuration says."""
        data, method = config.data, compressors.describe(config.compressor)
        return cls(
            data.template,
            data.text_length,
            data.question_length,
            clips.room(data),
            data.blind,
            Preparation.of(data, config.vit.image_size),
            method.query,
            method.reads,
            config.llm.vocab,
        )


class Processor:
    """Prepares examples for one model: its tokenizer, template, lengths and encoder size.

    Args:
      tokenizer: a fast transformers tokenizer.
      rows: how an example becomes a row.
      image_token: the token that stands for an image in the chat template of the tokenizer; <image>
        unless given.
      text_tokenizer: of CLIP's text tower, for a compressor that reads the question with it; with
        the number of its places, `text_places`.
    Raises:
      ValueError: for a tokenizer without the eos token that the template needs.
    """

    def __init__(
        self,
        tokenizer: Any,
        rows: RowFormat,
        image_token: int | None = None,
        *,
        text_tokenizer: Any = None,
        text_places: int = 77,
    ):
        self.mark = mark_of(tokenizer, image_token)
        self.template = templates.named(rows.template).of(tokenizer, self.mark)
        self.query, self.reads = rows.query, rows.reads
        self.text_tokenizer, self.text_places = text_tokenizer, text_places
        self.tokenizer, self.encode = tokenizer, Encoder(tokenizer)
        self.text_length, self.question_length = rows.text_length, rows.question_length
        self.images_per_row = rows.images_per_row
        self.images = rows.images
        self.blind = rows.blind
        if self.template.eos and tokenizer.eos_token is None:
            raise ValueError(
                f"template {rows.template!r} closes answers with an end-of-sequence token, and the "
                "tokenizer has none: set its eos_token, or choose data.template=plain"
            )
        self.eos_id = tokenizer.eos_token_id
        self.stop_ids = self._stop_ids(rows.template)
        # Where the tokenizer knows the mark as a token, its own template is tokenized with it.
        own = isinstance(self.template, OwnTemplate)
        self.image_id = tokenizer.get_vocab().get(self.mark) if own else None
        self.bos = self.encode.before
        pad = tokenizer.pad_token_id
        self.pad_id = pad if pad is not None else tokenizer.unk_token_id or 0
        # It is embedded although it has no effect: an added padding token may have no row.
        if rows.vocab is not None and self.pad_id >= rows.vocab:
            self.pad_id = 0

    def reading_as(self, query: str, reads: str) -> "Processor":
        """This processor for a model of the same data with another `query` and other `reads` of its
        compressor."""
        other = copy.copy(self)
        other.query, other.reads = query, reads
        return other

    def saying(self, system: str) -> "Processor":
        """This processor for conversations that begin with the text of a system message.

        Raises:
          ValueError: if the template has no place for one.
        """
        other = copy.copy(self)
        other.template = self.template.saying(system)
        return other

    def _tokens(self, parts: list[Part]) -> tuple[list[int], list[bool]]:
        """Ids and supervision of parts without an image mark."""
        ids, mask = [], []
        if not self.template.joined:
            for text, supervised in parts:
                part = [self.eos_id] if text == self.tokenizer.eos_token else self.encode(text).ids
                ids += part
                mask += [supervised] * len(part)
            return ids, mask
        encoded = self.encode("".join(text for text, _ in parts))
        # A token is supervised if one of its characters is: a token that ends the part before an
        # answer and begins the answer is the first one to learn.
        ends = np.cumsum([len(text) for text, _ in parts])
        first = np.searchsorted(ends, encoded.starts, side="right")
        last = np.searchsorted(
            ends, np.maximum(encoded.ends, np.add(encoded.starts, 1)) - 1, "right"
        )
        before = np.cumsum([0, *(flag for _, flag in parts)])
        last_part = len(parts) - 1
        supervised = before[np.minimum(last, last_part) + 1] > before[np.minimum(first, last_part)]
        return list(encoded.ids), supervised.tolist()

    def _stop_ids(self, name: str) -> tuple[int, ...]:
        """The tokens that end an answer."""
        closing = self.template.closing(self.tokenizer)
        ids = self.encode(closing).ids if closing else []
        eos = [] if self.eos_id is None else [self.eos_id]
        if isinstance(self.template, OwnTemplate):
            # The template may write words after an answer.
            special = self.tokenizer.added_tokens_decoder
            ids = [i for i in ids[:1] if i in special and special[i].special]
        elif closing and ids[-1:] != eos and len(ids) != 1:
            raise ValueError(
                f"template {name!r} closes answers with {closing}, which is not a token of this "
                "tokenizer, or one that it splits (split_special_tokens): choose another "
                "data.template, or a tokenizer that has it"
            )
        return tuple(dict.fromkeys([*ids[-1:], *eos]))

    def tokens(self, example: Example, *, answer: bool) -> Tokens:
        """The example as ids of any length; without `answer` up to the start of its last answer.

        Raises:
          BadExample: for texts that cannot be tokenized or written by the template, and for image
            marks whose number differs from that of the images.
        """
        try:
            return self._row(example, answer=answer)
        except ValueError as error:
            raise BadExample(f"example {example.id}: {error}") from error

    def _row(self, example: Example, *, answer: bool) -> Tokens:
        parts = self.template.parts(example, self.tokenizer, answer=answer)
        if example.frames > 1:
            mark = IMAGE_MARK if self.image_id is None else self.mark
            parts = [(text.replace(mark, mark * example.frames), told) for text, told in parts]
        ids, places = list(self.bos), []
        if ids and self.template.begins_itself(self.tokenizer, parts):
            ids = []
        mask = [False] * len(ids)
        if example.images and self.image_id is not None:
            # As transformers does: all at once, the mark a token among the others.
            self._append(ids, mask, parts)
            while self.image_id in ids:
                places.append(ids.index(self.image_id))
                del ids[places[-1]], mask[places[-1]]
        else:
            waiting: list[Part] = []
            for text, supervised in parts:
                first, *others = text.split(IMAGE_MARK) if example.images else [text]
                waiting.append((first, supervised))
                for after in others:
                    self._append(ids, mask, waiting)
                    places.append(len(ids))
                    waiting = [(after, supervised)]
            self._append(ids, mask, waiting)
        if len(places) != len(example.images):
            raise ValueError(
                f"{len(example.images)} images and {len(places)} times "
                f"{IMAGE_MARK} in its text: give each image one mark, in a question"
            )
        if not ids and not places:
            raise ValueError("its text has no token: ask something")
        prefix = self.query == "prefix"
        questions = [ids[: places[0] if places else None]] if prefix else self._questions(example)
        return Tokens(ids, mask, tuple(places), questions)

    def constant_prefix(self) -> list[int]:
        """The common first ids of all rows with an image, whatever the question."""
        one, other = (
            self.tokens(Example("", 0, ((text, ""),), "", ""), answer=False) for text in "ab"
        )
        shared = min(one.image_at, other.image_at)
        return one.ids[:shared] if one.ids[:shared] == other.ids[:shared] else []

    def text(self, example: Example, *, answer: bool = True) -> dict[str, np.ndarray]:
        """The example as ids; with answer=False the prompt up to where the last answer starts.

        Returns: ids int32 [T], right padded; loss_mask bool [T], True where the id is a target of
        the loss; length int32, ids that are not padding; image_at int32, before which id the visual
        tokens belong (T where there is no image); question int32 [Tq] and question_length int32:
        what a question-reading compressor reads, never of an answer; cut bool, whether a training
        row was longer than its room and lost the end. With data.images_per_row M above 1 image_at
        and question_length are [M], question is [M Tq], and a row's images come first.

        The question is that of the turn in which the image stands, after the begin-of-sequence
        token: alone if it is empty. With query="prefix" it is all text before the image, at most Tq
        tokens, and behind the image is room for T - Tq; a row without an image is one text, cut
        after Tq tokens.

        Raises:
          ValueError: for more images than data.images_per_row, or a question of no token at all
            where one is read.
          BadExample: for a prompt or question that does not fit (a training row is cut, and an
            image but the first goes with its text), or an image place that does not.
        """
        ids, mask, places, questions = self.tokens(example, answer=answer)
        has_image, first, most = bool(places), self.question_length, self.images_per_row
        if len(places) > most:
            raise ValueError(
                f"example {example.id} has {len(places)} images, data.images_per_row={most}: raise "
                "that, or leave the example out"
            )
        image_at = places[0] if has_image else self.text_length
        if self.query == "prefix" and has_image:
            room = self.text_length - first
            fits = image_at <= first and len(ids) - image_at <= room
            problem = (
                f"its prompt has {image_at} tokens before the image and {len(ids) - image_at} "
                f"behind it; data.question_length={first} and data.text_length={self.text_length} "
                f"leave {first} and {room}"
            )
            ids, mask = (r[: min(image_at, first)] + r[image_at:][:room] for r in (ids, mask))
            places = (image_at := min(image_at, first),)
        else:
            # An image is read by the tokens after it: there must be at least one.
            fits = len(ids) <= self.text_length and max(places, default=0) < self.text_length
            problem = f"its prompt has {len(ids)} tokens, data.text_length is {self.text_length}"
            if len(ids) <= self.text_length and not fits:
                problem += " and nothing follows its image"
            longest = max(map(len, questions))
            if self.query != "none" and has_image and longest > first:
                fits = False
                problem += f", its question {longest}, data.question_length is {first}"
        if not fits and (not answer or has_image and image_at >= self.text_length):
            raise BadExample(f"example {example.id}: {problem}: raise it, or shorten the question")
        if self.query != "none" and has_image and not all(questions):
            raise ValueError(
                f"example {example.id}: compressor.query={self.query!r} reads the question, which "
                "is empty (the plain template drops it), and the tokenizer has no "
                "begin-of-sequence token to be read in its place: drop the example, or choose "
                "compressor.query='none'"
            )
        # Missing images have places in the padding and any question.
        places = [min(place, self.text_length) for place in places]
        places += [self.text_length] * (most - len(places))
        questions = [*questions, *[questions[-1]] * (most - len(questions))]
        of_images = {
            "image_at": np.array(places, np.int32),
            "question": np.stack(
                [self._padded(q, first, np.int32, self.pad_id) for q in questions]
            ),
            "question_length": np.array([min(len(q), first) for q in questions], np.int32),
        }
        if most == 1:
            of_images = {name: values[0] for name, values in of_images.items()}
        return {
            "ids": self._padded(ids, self.text_length, np.int32, self.pad_id),
            "loss_mask": self._padded(mask, self.text_length, bool, False),
            "length": np.int32(min(len(ids), self.text_length)),
            **of_images,
            "cut": np.bool_(not fits),
        }

    def _questions(self, example: Example) -> list[list[int]]:
        """What a compressor reads of each image's question, by itself."""
        if self.query in ("words", "clip"):
            ids = self._last_question(example)
            return [ids] * max(len(example.images), 1)
        # As published for QueCC.
        questions = [
            text.replace(IMAGE_MARK, "").strip() if IMAGE_MARK in text else text
            for images, text in example.questions()
            for _ in range((images + text.count(IMAGE_MARK)) * example.frames)
        ]
        # As published, the plain template drops the instruction, so there is nothing to read.
        questions = questions if "{question}" in self.template.user else [""] * len(questions)
        texts = questions if example.images else [NO_IMAGE_QUESTION]
        return [[*self.bos, *self.encode(text).ids] for text in texts]

    def _last_question(self, example: Example) -> list[int]:
        """The tokens of the last question, as published for methods that read them."""
        text = NO_IMAGE_QUESTION
        if example.images:
            text = example.turns[-1][0].replace(IMAGE_MARK, "").strip()
        if self.query == "words":
            return reading.word_ids(self.tokenizer, text)
        return reading.clip_ids(self.text_tokenizer, text, self.text_places)

    def _append(self, ids: list[int], mask: list[bool], parts: list[Part]) -> None:
        parts = [part for part in parts if part[0]]
        if parts:
            more_ids, more_mask = self._tokens(parts)
            ids += more_ids
            mask += more_mask

    @staticmethod
    def _padded(values: list, length: int, dtype: Any, pad: Any) -> np.ndarray:
        row = np.full(length, pad, dtype)
        row[: len(values)] = values[:length]
        return row

    def square(self, image: np.ndarray | Image.Image) -> np.ndarray:
        """An RGB image, uint8 [H, W, 3] or of PIL, as a square, uint8 [S, S, 3]; blank if blind."""
        return self.images.blank() if self.blind else self.images.square(image)

    def shown_size(self, image: np.ndarray | Image.Image) -> tuple[int, int]:
        """Width and height of what is seen of an RGB image, to a common factor: its own if it is
        padded to a square, else those of a square."""
        if self.blind or self.images.fit != "pad":
            return 1, 1
        if isinstance(image, Image.Image):
            return image.size
        return image.shape[1], image.shape[0]

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """An RGB image uint8 [H, W, 3] as the encoder sees it: float32 [S, S, 3], normalized."""
        return self.images.normalized(self.square(image))
