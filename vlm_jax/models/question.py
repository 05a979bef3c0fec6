# SPDX-License-Identifier: Apache-2.0
"""What a compressor is given of a question: a state of the LLM, or the question's tokens.

B batch  U tokens of a question  D llm width
"""

from collections.abc import Callable

from jax import lax
from jaxtyping import Array, Float, Int

from vlm_jax.compressors.compressor import Question
from vlm_jax.layers import rows


def feature(hidden: Float[Array, "B U D"], length: Int[Array, "B"]) -> Float[Array, "B D"]:
    """What a compressor reads of a question: the hidden state of its last token, no gradient.

    As published for QueCC, which reads the question in a separate pass with the current weights. A
    question that is part of the prompt is treated alike; its keys and values do get a gradient.
    """
    return lax.stop_gradient(rows(hidden, length[:, None] - 1)[:, 0])


# What a compressor reads of a question, by its `query`.
QUESTIONS: dict[str, Callable] = {
    "separate": lambda llm, ids, length: feature(llm(llm.embed(ids)), length),
    "words": lambda llm, ids, length: Question(llm.embed(ids), length),
    "clip": lambda llm, ids, length: Question(ids, length),
}
