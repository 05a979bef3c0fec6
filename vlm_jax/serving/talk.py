# SPDX-License-Identifier: Apache-2.0
"""Answers a question or a conversation in the terminal: text on stdout, numbers on stderr."""

import dataclasses
import io
import sys
from collections.abc import Sequence
from typing import TextIO

from vlm_jax import hosts, progress
from vlm_jax.data.example import IMAGE_MARK
from vlm_jax.serving.model import VLM, Answer, Drawing


def say(
    model: VLM,
    images: Sequence[str] | None,
    turns: Sequence[str],
    *,
    drawing: Drawing,
    exif: str = "apply",
    stream: bool = False,
) -> str:
    """Answers a conversation on stdout, with the numbers on stderr, and returns the answer.

    `turns` are question, answer, ..., question; with `stream` the text is printed as it comes.
    """

    def show(index: int, piece: str) -> None:
        print(piece, end="", flush=True)

    (answer,) = model.generate(
        [images],
        [list(turns)],
        exif=exif,
        on_text=show if stream else None,
        **dataclasses.asdict(drawing),
    )
    print("" if stream else answer.text, flush=True)
    progress.say(numbers(answer))
    return answer.text


def numbers(answer: Answer) -> str:
    """Tokens and times of an answer in one line."""
    return (
        f"{answer.visual_tokens} visual tokens, {answer.prompt_tokens} of the prompt, "
        f"{len(answer.ids)} new; first token after {answer.first_token_seconds:.3f} s, then "
        f"{answer.tokens_per_second:.1f} tokens/s"
    )


def chat(
    model: VLM,
    images: Sequence[str] | None,
    lines: TextIO | io.TextIOBase,
    *,
    drawing: Drawing,
    exif: str = "apply",
    stream: bool = False,
) -> int:
    """Answers line after line to the end of `lines`; reports a conversation that is full."""
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
                answer = say(
                    model, images, [*turns, question], drawing=drawing, exif=exif, stream=stream
                )
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
