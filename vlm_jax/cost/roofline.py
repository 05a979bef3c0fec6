# SPDX-License-Identifier: Apache-2.0
"""Bytes, seconds and memory of a request on a chip: each phase at the slower of compute and memory.

seconds of a phase = max(FLOPs / peak, bytes / bandwidth) / efficiency, for the whole batch. Bytes
are weights (once per pass) and the key-value cache; activations stay on the chip in this model,
which holds where memory binds (few tokens) and does not matter where compute does.

V and Q are visual and text tokens, G generated tokens, P patches.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.compressors.method import Method, Number
from vlm_jax.cost import flops as cost
from vlm_jax.cost.chips import Chip
from vlm_jax.models.sizes import LLMSize, ViTSize

PHASES = tuple(field.name for field in dataclasses.fields(cost.Flops))


@dataclasses.dataclass(frozen=True)
class Request:
    """A request: Q text tokens and G generated ones, in batches of `batch` requests.

    `question`, the tokens of the separate question pass, is Q when None; with `cached_text` keys
    and values of the text are kept from an earlier request. Both as in `cost.request_flops`.
    """

    Q: Number
    G: Number = 0
    batch: int = 1
    question: Number | None = None
    cached_text: bool = False


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes that one batch needs at once."""

    weights: Number
    cache: Number
    activations: Number

    @property
    def total(self) -> Number:
        """Bytes of all kinds together."""
        return self.weights + self.cache + self.activations


def cache_numbers(llm: LLMSize) -> int:
    """Numbers in the key-value cache per token and sequence."""
    return 2 * llm.depth * llm.kv_heads * llm.head_size


def _encoder_weights(vit: ViTSize) -> int:
    return cost.vit_parameters(dataclasses.replace(vit, depth=max(vit.levels)))


def request_flops(vit: ViTSize, compressor: Method, llm: LLMSize, request: Request) -> cost.Flops:
    """FLOPs by phase of one request of the batch."""
    return cost.request_flops(
        vit,
        compressor,
        llm,
        Q=request.Q,
        G=request.G,
        question=request.question,
        cached_text=request.cached_text,
    )


def request_bytes(
    vit: ViTSize, compressor: Method, llm: LLMSize, request: Request, *, bytes_per_number: int = 2
) -> dict[str, Number]:
    """Bytes that each phase moves to or from memory for a whole batch."""
    flops = request_flops(vit, compressor, llm, request)
    V, batch = cost.visual_tokens(compressor, vit), request.batch
    tables = llm.vocab * llm.width
    body = cost.llm_parameters(llm) - tables * (1 if llm.tied_embeddings else 2)
    token = cache_numbers(llm) * batch
    passes = max(request.G - 1, 0)
    keys = passes * (request.Q + V) + passes * (passes + 1) / 2
    numbers = {
        "encoder": _encoder_weights(vit),
        "compressor": cost.compressor_parameters(compressor, vit, llm),
        "question": body if flops.question else 0,
        # Cached text is read, everything else is written: one cache entry per token either way.
        "prefill": body + tables + token * (request.Q + V),
        "decode": passes * (body + tables) + token * keys,
    }
    return {phase: count * bytes_per_number for phase, count in numbers.items()}


def seconds(
    vit: ViTSize,
    compressor: Method,
    llm: LLMSize,
    request: Request,
    chip: Chip,
    *,
    efficiency: Mapping[str, Number] | None = None,
) -> dict[str, Number]:
    """Seconds of each phase for a whole batch.

    `efficiency` maps phases to the fraction of the roofline that is reached; 1 for other phases.
    Raises ValueError for unknown phases and for fractions outside (0, 1].
    """
    fraction = {phase: 1.0 for phase in PHASES} | dict(efficiency or {})
    if unknown := sorted(set(fraction) - set(PHASES)):
        raise ValueError(
            f"efficiency of unknown phases {unknown}: the phases are {', '.join(PHASES)}"
        )
    if bad := {phase: e for phase, e in fraction.items() if not 0 < e <= 1}:
        raise ValueError(f"efficiency must be in (0, 1], got {bad}")
    flops = dataclasses.asdict(request_flops(vit, compressor, llm, request))
    traffic = request_bytes(vit, compressor, llm, request, bytes_per_number=chip.bytes_per_number)
    return {
        phase: max(
            request.batch * flops[phase] / chip.peak_flops, traffic[phase] / chip.hbm_bytes_per_s
        )
        / fraction[phase]
        for phase in PHASES
    }


def memory(
    vit: ViTSize, compressor: Method, llm: LLMSize, request: Request, *, bytes_per_number: int = 2
) -> Memory:
    """Bytes needed at once: all weights, the full cache, and the activations of the larger phase.

    Activations are those alive at the peak of a block: its input, its widest inner result and the
    scores in float32.
    """
    V, batch = cost.visual_tokens(compressor, vit), request.batch
    weights = _encoder_weights(vit) + cost.llm_parameters(llm)
    weights += cost.compressor_parameters(compressor, vit, llm)
    rows, tokens = vit.patches + vit.first, request.Q + V
    encode = rows * (2 * vit.width + max(vit.mlp, 4 * vit.width) + len(vit.levels) * vit.width)
    prefill = tokens * (2 * llm.width + max(2 * llm.mlp, 2 * llm.heads * llm.head_size))
    scores = (vit.heads * rows**2, llm.heads * tokens**2)
    live = max(
        encode * bytes_per_number + 4 * scores[0], prefill * bytes_per_number + 4 * scores[1]
    )
    return Memory(
        weights=weights * bytes_per_number,
        cache=batch * cache_numbers(llm) * (tokens + request.G) * bytes_per_number,
        activations=batch * live,
    )


def calibrate(
    ideal: Sequence[Mapping[str, Number]], measured: Sequence[Number]
) -> dict[str, Number]:
    """The efficiency of each phase that best explains measured seconds, by relative least squares.

    Args:
        ideal: seconds of each phase at 100 % of the roofline, one mapping per measurement.
        measured: seconds of the same requests, all phases together.

    Phases that the measurements cannot tell apart share one factor (a weak pull toward the common
    one). Efficiencies are at most 1. Raises ValueError for no measurement or one that is not
    positive.
    """
    if not ideal or len(ideal) != len(measured):
        raise ValueError(
            f"{len(ideal)} ideal and {len(measured)} measured times: as many of each, at least 1"
        )
    if bad := [t for t in measured if not t > 0]:
        raise ValueError(f"measured seconds must be positive, got {bad[:5]}")
    from scipy.optimize import lsq_linear

    columns = np.array([[row.get(phase, 0.0) for phase in PHASES] for row in ideal])
    columns /= np.asarray(measured, float)[:, None]
    total = columns.sum(1)
    common = max(1.0, total.sum() / (total**2).sum())
    pull = 1e-3 * np.sqrt(len(ideal)) * total.mean() * np.eye(len(PHASES))
    slowdown = lsq_linear(
        np.vstack([columns, pull]),
        np.concatenate([np.ones(len(ideal)), pull @ np.full(len(PHASES), common)]),
        bounds=(1.0, np.inf),
    ).x
    return {phase: float(1 / s) for phase, s in zip(PHASES, slowdown, strict=True)}


def row_seconds(
    row: Any, chip: Chip, *, batch: int = 1, new_tokens: Number | None = None
) -> dict[str, Number]:
    """Lower bounds on the seconds of each phase for a batch of the requests of a results row.

    FLOPs and weights are the row's; the key-value cache is left out, because a row does not hold
    the LLM's shape. `new_tokens` are decoded, by default the row's mean G; the longest answer of a
    batch sets it.
    """
    passes = max((row.G if new_tokens is None else new_tokens) - 1, 0)
    counted = max(row.G - 1, 0)
    flops = dict(row.flops) | {"decode": row.flops["decode"] * passes / counted if counted else 0}
    weights = {
        "encoder": row.vit_parameters,
        "compressor": row.compressor_parameters,
        "question": row.llm_parameters if row.flops["question"] else 0,
        "prefill": row.llm_parameters,
        "decode": passes * row.llm_parameters,
    }
    return {
        phase: max(
            batch * flops[phase] / chip.peak_flops,
            weights[phase] * chip.bytes_per_number / chip.hbm_bytes_per_s,
        )
        for phase in PHASES
    }


def calibrate_rows(rows: Sequence[Any], chip: Chip) -> dict[str, Number]:
    """`calibrate` from a grid's results rows, evaluated on `chip` with cached features.

    Rows with `timing` are used if there are any: their batch is known, and their times exclude
    loading and compiling. For older rows a request counts with its FLOPs alone and the whole time
    of the evaluation counts. The encoder was not run: it gets the common factor.
    """
    timed = [row for row in rows if row.timing]
    ideal, measured = [], []
    for row in timed:
        batch, new_tokens = row.timing["batch"], row.timing["new_tokens"]
        ideal.append(row_seconds(row, chip, batch=batch, new_tokens=new_tokens) | {"encoder": 0.0})
        measured.append(row.timing["seconds_per_example"] * batch)
    for row in [] if timed else rows:
        requests = sum(task["n"] for task in row.tasks.values())
        if requests and row.evaluate_seconds > 0:
            ideal.append({phase: row.flops[phase] / chip.peak_flops for phase in PHASES[1:]})
            measured.append(row.evaluate_seconds / requests)
    if not ideal:
        raise ValueError(
            f"none of {len(rows)} rows has timing or evaluate_seconds: nothing to calibrate with"
        )
    return calibrate(ideal, measured)
