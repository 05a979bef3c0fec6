# SPDX-License-Identifier: Apache-2.0
"""An engine answers as `VLM.generate` does, whatever the company, and every request ends."""

import pytest

from vlm_jax.serving import engine
from vlm_jax.serving.tickets import Answer, Failed, Piece, Ticket, Usage

END = Answer("ab", (1, 2), "stop", Usage(1, 0, 0, 0, 2), (), (), 0.1, 0.2)


def test_a_ticket_gives_its_events_in_order_and_ends_with_the_answer_or_the_reason():
    ticket = Ticket()
    for event in (Piece("a", (1,)), Piece("b", (2,)), END):
        ticket.tell(event)
    *pieces, answer = ticket
    assert "".join(piece.text for piece in pieces) == answer.text and answer is END
    failed = Ticket()
    failed.tell(Failed("out of memory"))
    with pytest.raises(RuntimeError, match="out of memory"):
        failed.answer()
    heard = []
    Ticket(heard.append).tell(END)
    assert heard == [END] and engine.Full(3).waiting == 3
