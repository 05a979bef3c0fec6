# SPDX-License-Identifier: Apache-2.0
"""Answers a question or a conversation in the terminal: text on stdout, numbers on stderr."""

import dataclasses
import functools
import io
import sys
from collections.abc import Sequence
from typing import TextIO

from vlm_jax import hosts, progress
from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.serving.engine import Engine, refusal
from vlm_jax.serving.model import VLM, Drawing
from vlm_jax.serving.requests import Picture
from vlm_jax.serving.tickets import Ask, Piece

INDEX_BYTES = 10**9  # of a chat's images and earlier turns


def say(
    model: VLM,
    images: Sequence[Picture] | None,
    turns: Sequence[str],
    *,
    drawing: Drawing,
    exif: str = "apply",
    stream: bool = False,
    frames: int = 1,
) -> str:
    """Answers a conversation on stdout, with the numbers on stderr, and returns the answer.

    `turns` are question, answer, ..., question; with `stream` the text is printed as it comes;
    `images` may be the T `frames` of a clip.
    """
    (answer,) = model.generate(
        [images],
        [list(turns)],
        exif=exif,
        frames=frames,
        on_text=(lambda _, piece: show(piece)) if stream else None,
        **dataclasses.asdict(drawing),
    )
    print("" if stream else answer.text, flush=True)
    said = numbers(
        answer.visual_tokens,
        answer.prompt_tokens,
        len(answer.ids),
        answer.first_token_seconds,
        answer.tokens_per_second,
    )
    if model.summaries is not None:
        said += f"; {answer.known_tokens} tokens read were known, {model.summaries.described()}"
    progress.say(said)
    return answer.text


def show(piece: str) -> None:
    """Prints a piece of an answer."""
    print(piece, end="", flush=True)


def numbers(visual: int, prompt: int, new: int, first: float, per_second: float) -> str:
    """Tokens and times of an answer in one line."""
    return (
        f"{visual} visual tokens, {prompt} of the prompt, {new} new; first token after "
        f"{first:.3f} s, then {per_second:.1f} tokens/s"
    )


class Memory:
    """A conversation that reads at every turn only what is new, with an engine of one row."""

    def __init__(
        self, model: VLM, images: Sequence[str] | None, *, visual_tokens: int | None, exif: str
    ):
        also = () if visual_tokens is None else (visual_tokens,)
        self.engine = Engine(model, slots=1, queue=1, index_bytes=INDEX_BYTES, visual_tokens=also)
        self.images = tuple(self.engine.pixels(one, exif=exif) for one in images or ())

    def say(self, turns: Sequence[str], *, drawing: Drawing, stream: bool) -> str:
        """As the function `say`."""
        asked = dataclasses.asdict(drawing)
        del asked["batch"]
        ticket = self.engine.submit(Ask(list(turns), self.images, **asked))
        for event in ticket:
            if isinstance(event, Piece) and stream:
                show(event.text)
        answer, usage = event, event.usage
        print("" if stream else answer.text, flush=True)
        first = answer.first_token_seconds
        rate = answer.tokens_per_second or 0.0
        said = numbers(usage.image_tokens, usage.text_tokens, usage.new_tokens, first, rate)
        progress.say(f"{said}; {usage.cached_tokens} tokens read were known")
        return answer.text


def chat(
    model: VLM,
    images: Sequence[str] | None,
    lines: TextIO | io.TextIOBase,
    *,
    drawing: Drawing,
    exif: str = "apply",
    stream: bool = False,
) -> int:
    """Answers line after line to the end of `lines`; reports a conversation that is full.

    Images and earlier turns are read once by an engine. Every turn reads the whole conversation
    where there can be none (`refusal`), and all but its image where a summary of that is kept,
    which an engine would not reuse.
    """
    if refusal(model) or model.summaries is not None:
        answered = functools.partial(say, model, images, drawing=drawing, exif=exif, stream=stream)
    else:
        memory = Memory(model, images, visual_tokens=drawing.visual_tokens, exif=exif)
        answered = functools.partial(memory.say, drawing=drawing, stream=stream)
    turns: list[str] = []
    prompt = "> " if lines.isatty() and hosts.is_writer() else ""
    while True:
        print(prompt, end="", file=sys.stderr, flush=True)
        with progress.listening():
            line = hosts.from_writer(lambda: typed(lines))
        if not line:
            return 0
        question = line.strip()
        if question:
            try:
                if turns and IMAGE_MARK in line:
                    raise ValueError(
                        f"{IMAGE_MARK} in a later question: the images of a chat belong to its "
                        "first; a conversation of --requests has them anywhere"
                    )
                answer = answered([*turns, question])
                turns += [question, answer]
            except ValueError as error:
                if not turns:
                    raise
                progress.say(f"not answered: {error}")


def typed(lines: TextIO | io.TextIOBase) -> str:
    """The next line; "" at the end, and when the user interrupts the chat."""
    try:
        return lines.readline()
    except KeyboardInterrupt:
        return ""
