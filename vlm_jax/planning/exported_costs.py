# SPDX-License-Identifier: Apache-2.0
"""What configurations cost, as coefficients from which the page computes (see `exported`).

FLOPs, bytes and communication of a phase are polynomials in a request's text tokens and decoding
passes. They are read off the functions of `cost` at a few requests, so that no formula of a model
stands in two languages.

N LLM parameters in billions   V visual tokens   Q text tokens   p passes of decoding, G - 1
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vlm_jax.compressors.method import Method, Number
from vlm_jax.cost import flops as cost
from vlm_jax.cost import roofline
from vlm_jax.cost.chips import Chip
from vlm_jax.cost.lifetime import training_flops
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.planning import costs

Sized = tuple[ViTSize, Method, LLMSize]


def polynomial(value: Callable[[int, int], Number]) -> list[float]:
    """Coefficients of 1, Q, Q^2, p, p^2, pQ of a function of Q text tokens and p decoding passes.

    The function is such a polynomial for Q > 0; its values at small whole numbers tell it exactly.
    Zeros at the end are left out.
    """
    f1, f2, f3 = (value(q, 0) for q in (1, 2, 3))
    g1, g2, h = value(1, 1), value(1, 2), value(2, 1)
    qq = (f3 - 2 * f2 + f1) / 2
    q = f2 - f1 - 3 * qq
    pp = (g2 - 2 * g1 + f1) / 2
    once = g1 - f1 - pp  # of p at Q = 1
    pq = h - f2 - pp - once
    found = [f1 - q - qq, q, qq, once - pq, pp, pq]
    while found and not found[-1]:
        found.pop()
    return [float(x) for x in found]


def all_terms(
    tokens: Mapping[str, set[float]],
    full: costs.FullCost,
    widths: list[int],
    chips: list[Chip],
) -> dict[str, list[Any]]:
    """Compressor -> [V, terms of each described size]."""
    several = next((chip for chip in chips if chip.count > 1), None)
    return {
        kind: [
            [V, [_terms(full, kind, V, llm, widths, several) for llm in full.sizes.values()]]
            for V in sorted(of_kind)
        ]
        for kind, of_kind in tokens.items()
    }


def _terms(
    full: costs.FullCost, kind: str, V: float, llm: LLMSize, widths: list[int], chip: Chip | None
) -> dict[str, Any]:
    """The cost of a configuration as coefficients, see templates/planner.js.

    flops of one request by phase; bytes of a batch by phase, [of any batch, more for each request];
    the same for memory; passes through the LLM [always, for each decoding pass].
    """
    sized: Sized = (full.vit, full.compressor(kind, V), llm)
    cached, stored = full.workload.cached_text, full.stored

    def request(Q: int, p: int, batch: int = 1) -> roofline.Request:
        return roofline.Request(Q, p + 1, batch, None, cached)

    def flops(phase: str) -> list[float]:
        return polynomial(
            lambda Q, p: getattr(roofline.request_flops(*sized, request(Q, p)), phase)
        )

    def moved(phase: str, width: int) -> list[list[float]]:
        def at(Q: int, p: int, batch: int) -> Number:
            return roofline.request_bytes(
                *sized, request(Q, p, batch), bytes_per_number=width, stored=stored
            )[phase]

        return [
            polynomial(lambda Q, p: at(Q, p, 0)),
            polynomial(lambda Q, p: at(Q, p, 1) - at(Q, p, 0)),
        ]

    method = sized[1]
    found: dict[str, Any] = {
        "flops": [flops(phase) for phase in roofline.PHASES],
        "bytes": [[moved(phase, width) for phase in roofline.PHASES] for width in widths],
        "memory": [_memory(full, sized, width) for width in widths],
        "passes": [
            [
                roofline.passes(method, request(1, 0)).get(phase, 0),
                roofline.passes(method, request(1, 1)).get(phase, 0)
                - roofline.passes(method, request(1, 0)).get(phase, 0),
            ]
            for phase in roofline.PHASES
        ],
    }
    if chip is not None:
        found["sent"] = [_sent(sized, request, chip, width) for width in widths]
    if full.workload.requests is not None:
        found["training"] = float(training_flops(*sized, full.workload.recipe))
    return found


def _memory(full: costs.FullCost, sized: Sized, width: int) -> list[Any]:
    """[weights, cache of a token, V, of which cached, activations: before the row, prefill up to
    QUERIES tokens, and above].

    Prefill is [1, t, t^2] in its tokens t = Q + V; the last two are for each request of a batch.
    """
    need = roofline.memory(*sized, roofline.Request(1), bytes_per_number=width, stored=full.stored)
    V = float(cost.visual_tokens(sized[1], full.vit))
    held = float(cost.cached_tokens(V, sized[1], sized[2], None))
    most = roofline.QUERIES

    def live(tokens: int) -> Number:
        return roofline.live_bytes(*sized, tokens, width)[1]

    square = (live(2) - 2 * live(1) + live(0)) / 2
    line = live(most + 1) - live(most)
    return [
        float(need.weights),
        float(need.cache) / (1 + held),
        V,
        held,
        float(roofline.live_bytes(*sized, 1, width)[0]),
        [float(live(0)), float(live(1) - live(0) - square), float(square)],
        [float(live(most) - most * line), float(line)],
        most,
    ]


def _sent(
    sized: Sized, request: Callable[[int, int], roofline.Request], chip: Chip, width: int
) -> list[Any]:
    """Communication of each phase: [seconds of steps, bytes in a ring for each request]."""
    device = dataclasses.replace(chip, link_bytes_per_s=1.0, bytes_per_number=width)
    steps = dataclasses.replace(device, link_bytes_per_s=float("inf"))

    def seconds(phase: str, device: Chip) -> Callable[[int, int], Number]:
        return lambda Q, p: roofline.communication(*sized, request(Q, p), device)[phase]

    def ring(phase: str) -> Callable[[int, int], Number]:
        every, alone = seconds(phase, device), seconds(phase, steps)
        return lambda Q, p: every(Q, p) - alone(Q, p)

    return [
        [polynomial(seconds(phase, steps)), polynomial(ring(phase))] for phase in roofline.PHASES
    ]
