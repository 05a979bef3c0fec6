# SPDX-License-Identifier: Apache-2.0
"""What is asked of a model besides its requests, and what it answers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """The model's answer to one request, with counts and times.

    `ids` end with the stop token if one ended the answer (`stopped`). `first_token_seconds` is from
    pixels and ids to the first token of the batch; `tokens_per_second` is this answer's rate after
    its first token. Times include the compilation of a new shape. `known_tokens` of the prompt and
    its image had been read before: the beginning of all prompts, an image whose summary is kept.
    """

    text: str
    ids: list[int]
    stopped: bool
    prompt_tokens: int
    visual_tokens: int
    first_token_seconds: float
    tokens_per_second: float
    batch: int
    known_tokens: int = 0


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn and batched: arguments of `VLM.answer`."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    visual_tokens: int | None = None
    batch: int = 8
