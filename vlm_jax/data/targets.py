# SPDX-License-Identifier: Apache-2.0
"""Finds rows that teach nothing, because all tokens of their answers are cut off.

A row is cut after data.text_length tokens (and with compressor.query="prefix" before its image
after data.question_length). All its supervised tokens may be after the cut.
"""

import logging
import math
from dataclasses import dataclass, replace

import numpy as np

from vlm_jax.data.example import IMAGE_MARK, BadExample, Example, Source
from vlm_jax.data.processor import Processor, Tokens
from vlm_jax.data.templates import OwnTemplate

log = logging.getLogger(__name__)

LOOKED_AT = 10_000  # the most rows that are tokenized; of more rows an even sample
WORTH_A_WARNING = 0.01  # of the rows
# A byte of text is one token at most; a character may become several in a tokenizer's normal form
# (U+FDFA, three bytes: eighteen letters of two bytes).
MOST_TOKENS_PER_BYTE = 12


@dataclass(frozen=True)
class Targets:
    """Rows without a token of an answer after the cut, and lengths that would keep them.

    Attributes:
      rows: of the source. doubtful: rows that may be too long; looked_at of them were tokenized.
      without: how many of those have no target.
      lengths: the (data.text_length, data.question_length) that keep them whole, and those that
        keep all but one in a hundred of all rows; None where no row is without.
      misfit: what is wrong with the first row that cannot even be cut; "" where there is none.
    """

    rows: int
    doubtful: int
    looked_at: int
    without: int
    lengths: tuple[tuple[int, int], tuple[int, int]] | None
    misfit: str = ""

    @property
    def share(self) -> float:
        """Of all rows those without a target; an estimate where not all were looked at."""
        return self.without / max(self.looked_at, 1) * self.doubtful / self.rows


def survey(source: Source, processor: Processor, *, skip: bool) -> Targets:
    """Counts the rows of a source that teach nothing, before anything is trained.

    Raises:
      BadExample: for a row whose text cannot be used, unless `skip`.
    """
    doubtful = [i for i in range(len(source)) if not _surely_fits(processor, source[i])]
    picked = doubtful
    if len(doubtful) > LOOKED_AT:
        places = np.linspace(0, len(doubtful) - 1, LOOKED_AT).astype(int)
        picked = [doubtful[k] for k in places]
    needs, misfit = [], ""
    for i in picked:
        try:
            # Of a long conversation the first turn is enough, mostly.
            if _has_target(processor, processor.tokens(_beginning(source[i]), answer=True)):
                continue
            tokens = processor.tokens(source[i], answer=True)
            if _has_target(processor, tokens):
                continue
        except BadExample:
            if not skip:
                raise
            continue  # is skipped, and counted there
        needs.append(_needs(processor, tokens))
        try:
            processor.text(source[i])
        except ValueError as error:
            misfit = misfit or str(error)
    lengths = None
    if needs:
        needs.sort()
        few = math.floor(WORTH_A_WARNING * len(source) * len(picked) / len(doubtful))
        lengths = tuple(_lengths(processor, some) for some in (needs, needs[:-few] or needs[:1]))
        lengths = lengths if few else (lengths[0],) * 2
    return Targets(len(source), len(doubtful), len(picked), len(needs), lengths, misfit)


def warning(targets: Targets, processor: Processor, *, skip: bool = False) -> str:
    """The result of `survey` in a sentence; "" if every row has a target.

    Raises:
      ValueError: if no row has one.
      BadExample: if a row cannot even be cut, unless `skip`.
    """
    if not targets.without:
        return ""
    (text, question), (most, most_question) = targets.lengths
    limits = (
        f"within data.text_length={processor.text_length} and data.question_length="
        f"{processor.question_length}"
    )
    way_out = f"data.text_length={text} and data.question_length={question} keep all of them"
    if (most, most_question) != (text, question):
        way_out += f", {most} and {most_question} all but 1 % of the rows"
    if targets.without == targets.looked_at and targets.doubtful == targets.rows:
        raise ValueError(
            f"none of {targets.rows} rows has a token of an answer {limits}: there is nothing "
            f"to learn; {way_out}"
        )
    counted = f"{targets.without} of {targets.rows} rows ({targets.share:.2%})"
    if targets.looked_at < targets.doubtful:
        counted = (
            f"about {targets.share:.2%} of {targets.rows} rows (an even sample of "
            f"{targets.looked_at} was looked at)"
        )
    if targets.misfit and not skip:
        raise BadExample(
            f"{targets.misfit}, or set data.on_bad_example=skip; {counted} are too long: {way_out}"
        )
    return f"{counted} have no token of an answer {limits}, and teach nothing; {way_out}"


def _surely_fits(processor: Processor, example: Example) -> bool:
    """Whether the first answer certainly ends before the cut, judged by its number of bytes."""
    template = processor.template
    if isinstance(template, OwnTemplate) or processor.query == "prefix":
        return False
    count, answered = len(processor.bos) + 2, False
    for text, supervised in template.parts(example, processor.tokenizer, answer=True):
        if answered and not supervised:
            break
        answered = answered or supervised
        ascii_only = text.isascii()
        count += len(text) if ascii_only else MOST_TOKENS_PER_BYTE * len(text.encode())
    return answered and count <= processor.text_length


def _beginning(example: Example) -> Example:
    """The first turn of an example; all turns if other turns have images."""
    one = example.image is None or not isinstance(example.image, tuple)
    marked = any(IMAGE_MARK in question for question, _ in example.turns)
    return replace(example, turns=example.turns[:1]) if one and not marked else example


def _split_at(processor: Processor, tokens: Tokens) -> int | None:
    """Where the image splits the text into two parts with separate limits; None if it does not."""
    return tokens.image_at if processor.query == "prefix" else None


def _has_target(processor: Processor, tokens: Tokens) -> bool:
    """Whether a supervised token is left when the row is cut to its lengths."""
    most, first = processor.text_length, processor.question_length
    if (at := _split_at(processor, tokens)) is not None:
        return any(tokens.mask[: min(at, first)]) or any(tokens.mask[at:][: most - first])
    return any(tokens.mask[:most]) and (tokens.image_at or 0) < most


def _needs(processor: Processor, tokens: Tokens) -> tuple[int, int]:
    """The number of tokens after the image (or in all), and the number of those read first."""
    if (at := _split_at(processor, tokens)) is not None:
        return len(tokens.ids) - at, at
    longest = max(map(len, tokens.questions)) if processor.query == "separate" else 0
    return len(tokens.ids), longest


def _lengths(processor: Processor, needs: list[tuple[int, int]]) -> tuple[int, int]:
    """data.text_length and data.question_length that keep rows of these needs complete."""
    text, question = (8 * math.ceil(max(column) / 8) for column in zip(*needs, strict=True))
    question = max(question, processor.question_length)
    text = text + question if processor.query == "prefix" else text
    return max(text, processor.text_length), question


def check(source: Source, processor: Processor, *, skip: bool) -> str:
    """Looks for rows that teach nothing: logs a warning if they are over 1 %, else returns it.

    Raises:
      ValueError, BadExample: as `survey` and `warning` do.
    """
    targets = survey(source, processor, skip=skip)
    sentence = warning(targets, processor, skip=skip)
    if targets.share > WORTH_A_WARNING:
        log.warning(sentence)
        return ""
    return sentence
