# SPDX-License-Identifier: Apache-2.0
"""What a plan may choose: the described LLMs and the V that a method can build, or every size.

What is offered without being named stays within twice the range on which the law was fitted.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from vlm_jax import compressors as methods
from vlm_jax.compressors.method import Number
from vlm_jax.cost.described import Models
from vlm_jax.models.sizes import LLMSize
from vlm_jax.planning.mixture import Mixture
from vlm_jax.planning.parsing import number
from vlm_jax.planning.planner import Between

FAMILY = "qwen1.5-"  # the paper's LLMs: what a plan without a configuration chooses from
BEYOND = 2.0  # how many times the fitted range is offered
CONTINUOUS = "continuous"

Tokens = Mapping[str, Sequence[Number] | Between]


@dataclass(frozen=True)
class LLMs:
    """The N to choose from (None: every size up to `most`), and name -> (N, shape) of those known.

    `notes` are sentences about what is not offered.
    """

    sizes: tuple[Number, ...] | None
    known: Mapping[str, tuple[Number, LLMSize]]
    most: Number = math.inf
    notes: list[str] = field(default_factory=list)


def offered(law: Mixture, axis: str) -> tuple[float, float]:
    """The range of N or V that is offered without being named."""
    ends = law.domain(axis)
    return (0.0, math.inf) if ends is None else (ends[0] / BEYOND, ends[1] * BEYOND)


def llms(
    wanted: Sequence[str] | Sequence[Number] | str | None, models: Models | None, law: Mixture
) -> LLMs:
    """The LLMs of names, of sizes in billions, "continuous", or by default those described.

    Raises ValueError for an unknown name, for two LLMs of one N, and if no described LLM is near
    the range on which the law was fitted.
    """
    described = models.llms if models else {}
    own = models is not None and models.own
    known = {n: x for n, x in described.items() if own or n.startswith(FAMILY)}
    cells = law.cells()
    if cells is not None and (wanted is None or wanted == CONTINUOUS):
        if wanted is not None:
            raise ValueError(
                "no form of the law fits, so only its measured cells can be compared: leave "
                f"{CONTINUOUS} out"
            )
        return LLMs(tuple(sorted({n for n, _ in cells})), known)
    low, high = (e * (1 + s) for e, s in zip(offered(law, "N"), (-1e-9, 1e-9), strict=True))
    if isinstance(wanted, str):
        if wanted != CONTINUOUS:
            raise ValueError(f"--llms={wanted}: give a list of LLMs, or {CONTINUOUS}")
        return LLMs(None, known, most=high)
    if wanted is None:
        near = {name: sized for name, sized in known.items() if low <= sized[0] <= high}
        if not near:
            fitted = law.domain("N") or (0, 0)
            others = (
                "name them with --llms, or" if own else "add --config, whose grid describes LLMs,"
            )
            raise ValueError(
                f"none of {', '.join(known)} lies within twice the range of N on which the law was "
                f"fitted ({fitted[0]:.4g} to {fitted[1]:.4g} billion): {others} give sizes in "
                "billions with --llms, or --continuous"
            )
        left = [name for name in known if name not in near]
        notes = [f"not offered, more than twice outside the fitted N: {', '.join(left)} "
                 "(name them with --llms)"] if left else []  # fmt: skip
        return LLMs(tuple(N for N, _ in near.values()), known, notes=notes)
    names = [one for one in wanted if isinstance(one, str)]
    if not names:
        return LLMs(tuple(number(one, "--llms", least=1e-9) for one in wanted), known)
    if unknown := [str(one) for one in wanted if one not in described]:
        raise ValueError(
            f"--llms: {', '.join(unknown)} unknown; there are {', '.join(described)}, "
            "or give sizes in billions"
        )
    known = {name: described[name] for name in names}
    sizes = tuple(N for N, _ in known.values())
    if len(set(sizes)) < len(names):
        raise ValueError(
            f"--llms={','.join(names)}: two LLMs with one N cannot be told apart by a law; name one"
        )
    return LLMs(sizes, known)


def supports(kind: str, side: int, V: Number, elastic: Mapping[str, Sequence[int]]) -> bool:
    """Whether a compressor can give V; one that was configured for several gives those alone."""
    return V in elastic[kind] if kind in elastic else methods.named(kind).supports(side, V)


def measured(kind: str, law: Mixture, side: int) -> set[float]:
    """The V at which a compressor's own law was measured and which it can give."""
    own = law.others.get(kind) or (law if law.kind == kind else None)
    if own is None:
        return set()
    cells = [answer.cells for answer in own.answers.values() if answer.cells is not None]
    return {
        v
        for each in cells
        for v in each.V.tolist()
        if v.is_integer() and methods.named(kind).supports(side, v)
    }


def tokens(
    wanted: Sequence[Number] | str | None,
    kinds: Sequence[str],
    law: Mixture,
    *,
    most: int,
    theory: bool,
    every_size: bool,
    elastic: Mapping[str, Sequence[int]],
) -> tuple[Tokens, list[str]]:
    """Compressor -> the V to search, and sentences about what is not offered.

    `most` is the number of patches; under `theory`, the paper's cost, any listed V is possible.
    `elastic` names the V of a compressor that is configured for several.
    """
    ends = {kind: offered(law.others.get(kind, law), "V") for kind in kinds}
    if isinstance(wanted, str):
        if wanted != CONTINUOUS:
            raise ValueError(f"--tokens={wanted}: give a list of V, or {CONTINUOUS}")
        if not every_size:
            raise ValueError(
                f"--tokens={CONTINUOUS} needs --llms={CONTINUOUS}: with a list of LLMs, list V too"
            )
        return {kind: Between(1.0, min(float(most), ends[kind][1])) for kind in kinds}, []
    side = math.isqrt(most)
    if wanted is None and (cells := law.cells()) is not None:
        return {kind: sorted({v for _, v in cells}) for kind in kinds}, []
    built = {
        kind: sorted(
            map(float, elastic[kind])
            if kind in elastic
            else {*map(float, methods.named(kind).planned(side)), *measured(kind, law, side)}
        )
        for kind in kinds
    }
    if wanted is None:
        near = {
            kind: [v for v in V if ends[kind][0] <= v <= ends[kind][1]] for kind, V in built.items()
        }
        if not any(near.values()):
            fitted = law.domain("V") or (0, 0)
            raise ValueError(
                f"no V of {', '.join(kinds)} lies within twice the range on which the law was "
                f"fitted ({fitted[0]:g} to {fitted[1]:g}): name V with --tokens"
            )
        left = sorted(
            {v for V in built.values() for v in V} - {v for V in near.values() for v in V}
        )
        words = [f"not offered, more than twice outside the fitted V: "
                 f"{', '.join(f'{v:g}' for v in left)} (name them with --tokens)"]  # fmt: skip
        return {kind: V for kind, V in near.items() if V}, words if left else []
    requested = [number(v, "--tokens", least=1.0) for v in wanted]
    if theory:
        odd = [
            f"{kind} cannot give V = {v:g}"
            for kind in kinds
            for v in requested
            if not supports(kind, side, v, elastic)
        ]
        return dict.fromkeys(kinds, requested), odd
    usable = {kind: [v for v in requested if supports(kind, side, v, elastic)] for kind in kinds}
    if not any(usable.values()):
        raise ValueError(
            f"--tokens={','.join(f'{v:g}' for v in requested)}: none is supported; allowed are "
            + "; ".join(f"{kind} [{', '.join(f'{v:g}' for v in built[kind])}]" for kind in kinds)
        )
    return {kind: V for kind, V in usable.items() if V}, []
