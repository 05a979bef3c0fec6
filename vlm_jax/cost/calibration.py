# SPDX-License-Identifier: Apache-2.0
"""What a system reaches of its chip: an efficiency for each phase, and times that nothing shortens.

Below some number of tokens a request takes as long as launching its kernels: the overhead of a pass
through the LLM and that of a batch stand beside the roofline's seconds (`roofline.seconds`). They
are fitted to measured times, or taken from a named table.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm_jax.compressors.method import Number
from vlm_jax.cost.chips import Chip
from vlm_jax.cost.flops import PHASES


@dataclass(frozen=True)
class Calibration:
    """What is reached; by default the roofline itself.

    `efficiency` maps phases to the fraction of the roofline, 1 for the others. `request_seconds`
    are spent once for a batch, `step_seconds` in every pass through the LLM. ValueError for unknown
    phases, fractions outside (0, 1] and negative times.
    """

    efficiency: Mapping[str, Number] = field(default_factory=dict)
    request_seconds: Number = 0.0
    step_seconds: Number = 0.0
    source: str = ""

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.efficiency) - set(PHASES)):
            raise ValueError(
                f"efficiency of unknown phases {unknown}: the phases are {', '.join(PHASES)}"
            )
        if bad := {phase: e for phase, e in self.efficiency.items() if not 0 < e <= 1}:
            raise ValueError(f"efficiency must be in (0, 1], got {bad}")
        for name in ("request_seconds", "step_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)}: at least 0")


IDEAL = Calibration()


def calibrate(
    ideal: Sequence[Mapping[str, Number]],
    measured: Sequence[Number],
    passes: Sequence[Number] | None = None,
    *,
    source: str = "",
) -> Calibration:
    """The calibration that best explains measured seconds, by relative least squares.

    Args:
        ideal: seconds of each phase at 100 % of the roofline, one mapping per measurement.
        measured: seconds of the same batches, all phases together.
        passes: how often each went through the LLM; None leaves overheads out.
        source: of the measurements.

    Phases that the measurements cannot tell apart share one factor (a weak pull toward the common
    one), and overheads that they do not show are 0. Raises ValueError for no measurement or one
    that is not positive.
    """
    if not ideal or len(ideal) != len(measured):
        raise ValueError(
            f"{len(ideal)} ideal and {len(measured)} measured times: as many of each, at least 1"
        )
    if bad := [t for t in measured if not t > 0]:
        raise ValueError(f"measured seconds must be positive, got {bad[:5]}")
    from scipy.optimize import lsq_linear

    times = np.asarray(measured, float)
    columns = np.array([[row.get(phase, 0.0) for phase in PHASES] for row in ideal])
    columns /= times[:, None]
    total = columns.sum(1)
    # Overheads are found as shares of a usual time, which makes their pull comparable.
    usual = float(np.exp(np.log(times).mean()))
    overheads = np.zeros((len(times), 0))
    if passes is not None:
        overheads = usual * np.stack([np.ones(len(times)), np.asarray(passes, float)], 1)
        overheads /= times[:, None]
    fixed = overheads.shape[1]

    def least(design: np.ndarray, factors: int, toward: np.ndarray, weak: Number) -> np.ndarray:
        """Slowdowns and overheads, pulled toward values; each in units of its mean effect."""
        pull = np.diag(weak * np.sqrt(len(times)) * np.maximum(design.mean(0), total.mean()))
        return np.asarray(
            lsq_linear(
                np.vstack([design, pull]),
                np.concatenate([np.ones(len(times)), pull @ toward]),
                bounds=([1.0] * factors + [0.0] * fixed, np.inf),
            ).x
        )

    # One factor for all phases first; then each its own, as far as the times ask for it.
    start = np.array([1.0] + [0.0] * fixed)
    alone = least(np.hstack([total[:, None], overheads]), 1, start, 1e-4)
    toward = np.concatenate([np.full(len(PHASES), alone[0]), alone[1:]])
    found = least(np.hstack([columns, overheads]), len(PHASES), toward, 1e-3)
    slowdown, spent = found[: len(PHASES)], usual * found[len(PHASES) :]
    efficiency = {phase: float(1 / s) for phase, s in zip(PHASES, slowdown, strict=True)}
    request, step = spent if fixed else (0.0, 0.0)
    return Calibration(efficiency, float(request), float(step), source)


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


def calibrate_rows(rows: Sequence[Any], chip: Chip) -> Calibration:
    """`calibrate` from a grid's results rows, evaluated on `chip` with cached features.

    Rows with `timing` are used if there are any: their batch is known, and their times exclude
    loading and compiling. For older rows a request counts with its FLOPs alone and the whole time
    of the evaluation counts, without overheads. The encoder was not run: it gets the common factor.
    """
    timed = [row for row in rows if row.timing]
    ideal, measured, passes = [], [], []
    for row in timed:
        batch, new_tokens = row.timing["batch"], row.timing["new_tokens"]
        ideal.append(row_seconds(row, chip, batch=batch, new_tokens=new_tokens) | {"encoder": 0.0})
        measured.append(row.timing["seconds_per_example"] * batch)
        passes.append(max(new_tokens - 1, 0) + 1 + bool(row.flops["question"]))
    for row in [] if timed else rows:
        requests = sum(task["n"] for task in row.tasks.values())
        if requests and row.evaluate_seconds > 0:
            ideal.append({phase: row.flops[phase] / chip.peak_flops for phase in PHASES[1:]})
            measured.append(row.evaluate_seconds / requests)
    if not ideal:
        raise ValueError(
            f"none of {len(rows)} rows has timing or evaluate_seconds: nothing to calibrate with"
        )
    return calibrate(ideal, measured, passes if timed else None, source=f"{len(ideal)} rows")


@dataclass(frozen=True)
class Measured:
    """One published time: `ms` from the encoder to the first token, at batch 1."""

    kind: str
    V: int
    ms: Number


# LLaVA-1.5-7B on one A100, batch 1, encoder to prefill: tables 1 and 8 of the independent study of
# QueCC, TokenPacker and MQT that retrained all three ("Braco"). Its FLOPs give the lengths: 50 text
# tokens (1.26 TFLOP of TokenPacker at 16), of which QueCC reads 8 as the question (.10 more).
A100_TABLE = (
    Measured("none", 576, 67.3),
    *(Measured("quecc", V, ms) for V, ms in ((16, 63.2), (9, 62.8), (4, 64.2))),
    *(Measured("token_packer", V, ms) for V, ms in ((16, 37.9), (9, 37.4), (4, 37.1))),
    *(Measured("mqt", V, ms) for V, ms in ((16, 44.3), (9, 43.0), (4, 44.8))),
)
A100_TEXT, A100_QUESTION = 50, 8

# `calibrate` of that table; tests/test_calibration.py fits it anew.
NAMED = {
    "a100-transformers": Calibration(
        dict(encoder=0.747, compressor=1.0, question=0.746, prefill=0.745, decode=0.747),
        request_seconds=0.0153,
        step_seconds=0.0146,
        source="LLaVA-1.5-7B in transformers on one A100, batch 1 (A100_TABLE)",
    ),
}
