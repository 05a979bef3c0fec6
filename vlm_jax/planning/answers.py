# SPDX-License-Identifier: Apache-2.0
"""Formats a finished search: fields for JSON, a few lines for the terminal, and warnings."""

import math
from collections.abc import Mapping
from typing import Any

from vlm_jax.compressors.method import Number, tilings
from vlm_jax.cost import flops as cost
from vlm_jax.cost.calibration import IDEAL
from vlm_jax.law.answer import Answer
from vlm_jax.law.law import Law
from vlm_jax.planning import costs, decision, planner

SCHEMA = 1  # of the JSON; raised when a field changes its meaning


def plan(search: planner.Search, epsilon: Number, names: Mapping[Number, str]) -> dict[str, Any]:
    """The plan as fields for JSON (docs/planning.md); `names` are the names of LLMs by their N.

    Raises ValueError, naming the cheapest configuration, if nothing meets the budget.
    """
    candidates = search.candidates()
    chosen, cost_model, Q = candidates[0], search.cost, search.cost.workload.Q
    law = search.law_of(chosen.compressor)
    interval = law.interval(chosen.N, chosen.V, Q)
    trained = law.interval(chosen.N, chosen.V, Q, measured=True)
    unit, limit = search.budget.limits[0]
    spent: dict[str, Any] = {"amount": chosen.cost, "unit": costs.UNITS[unit]}
    spent |= cost_model.parts(chosen.N, chosen.V, chosen.compressor)
    if isinstance(cost_model, costs.FullCost):
        shape = cost_model.sizes.get(chosen.N)
        spent["llm_parameters"] = None if shape is None else cost.llm_parameters(shape)
    known, others = decision.near(
        search, chosen, [*candidates[1:], *buildable(search, chosen)], epsilon
    )
    return {
        "schema": SCHEMA,
        "N": chosen.N,
        "V": chosen.V,
        "compressor": chosen.compressor,
        "llm": names.get(chosen.N),
        "predicted_error": chosen.error,
        "interval": None if interval is None else list(interval),
        "interval_of_a_trained_model": None if trained is None else list(trained),
        "interval_level": 0.95,
        "cost_model": cost_model.name,
        "cost": spent,
        "budget": {
            "limit": limit,
            "unit": costs.UNITS[unit],
            "also": dict(search.budget.limits[1:]),
        },
        "latency": latency(cost_model, spent),
        "text_tokens": Q,
        "new_tokens": cost_model.workload.G,
        "batch": cost_model.workload.batch,
        "cached_text": cost_model.workload.cached_text,
        # Where the measured cells answer, nothing is known between them.
        "marginal": None if law.cells() else planner.marginal(search, chosen),
        "decision": known,
        "limits": decision.limits(search, chosen),
        "runner_ups": others,
        "law": {
            "weights": dict(law.weights),
            "laws": {n: {"form": one.form, **one.params} for n, one in law.laws.items()},
            "answers": {n: {"by": a.by, "shares": a.shares} for n, a in law.answers.items()},
            "method": law.method,
        },
        "units": {
            "N": "billion LLM parameters",
            "V": "visual tokens",
            "predicted_error": "fraction, 1 - score",
        },
        "warnings": warnings_of(search, chosen),
    }


def latency(cost_model: costs.Cost, spent: Mapping[str, Any]) -> dict[str, Any] | None:
    """Times of the chosen configuration that a user notices; None without a chip."""
    if "ms" not in spent:
        return None
    work = cost_model.workload
    found = {
        "time_to_first_token_ms": sum(spent["ttft"].values()),
        "time_per_output_token_ms": spent["tpot"]["decode"] if work.G > 1 else None,
    }
    if work.rate:
        late = spent["p95"]["response"]
        found |= {"p95_ms": late if late < costs.NEVER else None, "requests_per_second": work.rate}
    return found


def buildable(search: planner.Search, chosen: planner.Candidate) -> list[planner.Candidate]:
    """For a continuous choice of V: the best candidates at the V that windows can produce."""
    return [
        candidate
        for kind, V in search.tokens.items()
        if isinstance(V, planner.Between)
        for candidate in search.listed(kind, [float(v) for v in tilings(math.isqrt(round(V.high)))])
        if (candidate.N, candidate.V) != (chosen.N, chosen.V)
    ]


def doubt_of(name: str, law: Law, answer: Answer) -> str:
    """Why a family's law does not answer, or why its answer cannot be trusted; else ""."""
    if answer.misfit:
        return f"{name}: {answer.misfit}"
    if answer.cells is None and (missed := law.misfit.get("sentence")):
        return (
            f"{name}: the {law.form} form {missed}: its answer and its intervals cannot be trusted"
        )
    return ""


def warnings_of(search: planner.Search, chosen: planner.Candidate) -> list[str]:
    """What a reader must know before trusting the plan, one sentence each."""
    cost_model, sentences = search.cost, []
    if search.llms is None and math.isclose(chosen.N, search.most, rel_tol=1e-6):
        sentences.append(f"N is capped at {chosen.N:.4g} billion, twice the range on which the law "
                         "was fitted")  # fmt: skip
    mixture = search.law_of(chosen.compressor)
    for Q, _ in cost_model.workload.texts:
        sentences += [s for s in mixture.outside(chosen.N, chosen.V, Q) if s not in sentences]
    if any(not law.domain for law in mixture.laws.values()):
        sentences.append("the law does not say on which N, V and Q it was fitted: "
                     "extrapolation goes unnoticed")  # fmt: skip
    for name, weight in mixture.weights.items():
        if weight and (doubt := doubt_of(name, mixture.laws[name], mixture.answers[name])):
            sentences.append(doubt)
    counted = [answer.counts_frames for answer in mixture.answers.values()]
    if any(counted) and mixture.frames == 1:
        sentences.append("the law counts frames, and this plan is for one: --frames=T")
    if not all(counted) and mixture.frames != 1:
        sentences.append(f"the law does not count frames: its error is that of one image, the cost "
                         f"that of {mixture.frames:g} frames")  # fmt: skip
    if mixture.frames != 1 and cost_model.name == "paper":
        sentences.append(f"the paper's cost has no encoder, which runs {mixture.frames:g} times "
                         "for this video: --cost=full counts it")  # fmt: skip
    method = search.law.method
    unknown = [kind for kind in search.tokens if kind not in search.others]
    if other := [kind for kind in unknown if method and kind != search.law.kind]:
        sentences.append(f"the law was fitted with {method}: it does not know the errors of "
                         f"{', '.join(other)}")  # fmt: skip
    elif len(unknown) > 1:
        sentences.append("the law holds for the compressor it was fitted with: "
                         "others are compared by cost alone")  # fmt: skip
    if isinstance(cost_model, costs.FullCost):
        stored = cost_model.stored
        if {"int8", "fp8"} & {stored.weights, stored.cache, stored.products}:
            sentences.append("the law was fitted without quantization: what it costs in error is "
                         "not predicted")  # fmt: skip
        most = max(cost_model.sizes)
        if chosen.N > most * (1 + 1e-9):
            sentences.append(f"no LLM above N={most:g} is described: its cost is extrapolated")
        if cost_model.chip is not None and cost_model.calibration == IDEAL:
            sentences.append("times are the roofline's, which no system reaches: "
                         "give --efficiency, --calibration or --measured")  # fmt: skip
    return sentences


def in_words(answer: Mapping[str, Any]) -> str:
    """The plan as a few lines of text."""
    spread, budget = answer["interval"], answer["budget"]
    within = "" if spread is None else f" (95 % interval {spread[0]:.3f} to {spread[1]:.3f})"
    llm = f" ({answer['llm']})" if answer["llm"] else ""
    lines = [
        f"N = {answer['N']:.4g} billion parameters{llm}, "
        f"V = {answer['V']:.4g} visual tokens ({answer['compressor']})",
        f"predicted error {answer['predicted_error']:.4f}{within}",
        f"cost {answer['cost']['amount']:.4g} of {budget['limit']:.4g} {budget['unit']} "
        f"(cost model: {answer['cost_model']})",
    ]
    if (p := answer["decision"]["p_best"]) is not None:
        lines.append(f"best of {answer['decision']['candidates']} with probability {p:.2f}; "
                     f"expected regret {answer['decision']['regret']:.4f}")  # fmt: skip
    for limit in answer["limits"]:
        if limit["binds"]:
            more = limit["next"]
            lines.append(
                f"{limit['words']} bind: {more['more']:+.0%} buys N = {more['N']:.4g}, "
                f"V = {more['V']:.4g} and saves {more['error_saved']:.4f}"
            )
    lines += [
        f"  as good: N = {c['N']:.4g}, V = {c['V']:.4g}, {c['compressor']}: {c['error']:.4f} "
        f"at {c['cost']:.4g}" + ("" if c["p_best"] is None else f", best {c['p_best']:.2f}")
        for c in answer["runner_ups"][:5]
    ]
    if "next" in answer:
        why = [cell["reason"] for cell in answer["next"][:1]]
        lines.append(f"train next: {why[0] if why else 'no cell is expected to change the choice'}")
    return "\n".join(lines)
