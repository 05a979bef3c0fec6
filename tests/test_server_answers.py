# SPDX-License-Identifier: Apache-2.0
"""How tokens become chunks of a stream."""

import made_engine
import openai
import pytest
import tiny
from listening import serving
from made_engine import said

M3 = tiny.size(tiny.config(compressor=dict(kind="m3", tokens=4)))


@pytest.mark.parametrize(("seconds", "apart"), [(0.05, True), (0.001, False)])
def test_tokens_that_come_soon_after_another_share_a_chunk(seconds, apart):
    """Each has a chunk of its own where they come slowly; text and scores are the same."""
    with serving(made_engine.service(M3, seconds=seconds)) as found:
        client = openai.OpenAI(base_url=f"{found}/v1", api_key="unused", max_retries=0)
        chunks = client.chat.completions.create(
            model="made",
            messages=[{"role": "user", "content": "tell me"}],
            stream=True,
            logprobs=True,
        )
        pieces = [c.choices[0] for c in chunks if c.choices[0].delta.content]
    words = said(["tell me"], [])
    assert "".join(piece.delta.content for piece in pieces).split() == words
    tokens = [[score.token.strip() for score in piece.logprobs.content] for piece in pieces]
    assert sum(tokens, []) == words
    assert (len(pieces) == len(words)) == apart
