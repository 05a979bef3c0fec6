# SPDX-License-Identifier: Apache-2.0
"""A plan as data for the page: laws, draws and cost terms, from which a browser plans anew.

The page (vlm_jax/reports/templates/planner.js) is given numbers, not formulas, where it can be:
FLOPs, bytes and communication of each phase are polynomials in the request, read off the functions
of `cost` at a few requests; a law is its table of terms with its parameters and draws; the order of
draws, what may be chosen and sentences come from here. Written in both languages, and held together
by tests/test_exported.py on 200 random settings, are

    the paper's cost 2 N (Q + V + G), and the line between described sizes (costs._line);
    the roofline: max(FLOPs / peak, bytes / bandwidth) / efficiency + communication + overheads,
    dollars of a time, the key-value cache, and the larger one of the activations;
    power laws (law.forms), the hash that orders draws of measured cells (law.answer.orders);
    the search over a list, P(best), regret and limits (planning.decision), and refusals.

Left out: every continuous size, p95 at a rate, the next cell, `marginal`, and the interval of one
newly trained model.

N LLM parameters in billions   V visual tokens   Q text tokens   G generated tokens
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vlm_jax.compressors.method import Number
from vlm_jax.cost import roofline
from vlm_jax.cost.calibration import IDEAL
from vlm_jax.cost.catalog import Catalog
from vlm_jax.cost.chips import CHIPS, Chip
from vlm_jax.cost.lifetime import LLAVA, Recipe, paper_training_flops
from vlm_jax.law.answer import CELLS_ALONE, Answer, student
from vlm_jax.law.forms import FORMS
from vlm_jax.law.law import Law
from vlm_jax.planning import answers, choices, costs, question
from vlm_jax.planning.decision import EPSILON
from vlm_jax.planning.exported_costs import all_terms
from vlm_jax.planning.mixture import Mixture, order_of

WORLDS = 1000  # of `Mixture.draws`
OPEN = 1e300  # FLOPs: a budget that refuses nothing
# Arguments of `question.plan` that the page sets by itself; the others are fixed when it is made.
LIMITS = {
    "flops": "flops", "ms": "ms", "ttft_ms": "ttft", "tpot_ms": "tpot",
    "dollars_per_million": "dollars", "lifetime_flops": "lifetime",
    "lifetime_dollars": "lifetime_dollars", "hbm_bytes": "hbm",
}  # fmt: skip
SETTING = (*LIMITS, "text_tokens", "new_tokens", "batch", "cost_model", "chip", "price_per_hour")


def data(
    law: Mixture,
    families: Mixture | None,
    arguments: Mapping[str, Any],
    *,
    offer: str = "all",
    names: Mapping[Number, str] | None = None,
    mix: Mapping[str, Number] | None = None,
    own_name: str = "the law of the file",
) -> dict[str, Any]:
    """Everything that the page plans from, as JSON values.

    Args:
      law: what answers without weights over families.
      families: a mixture of all families whose weights the page may set; None for one family.
      arguments: those of `question.plan`; the page begins with the setting they describe.
      offer: "all" chips, or "asked": that of `arguments` alone, whose calibration it is.
      names: N -> the name of LLMs whose shapes are not known: the paper's cost alone.
      mix: the weights to begin with; None for `law`.
      own_name: what `law` answers for.
    Raises:
      ValueError: for what the page cannot do, and as `question.plan` does.
    """
    for name in ("rate", "p95_ms"):
        if arguments.get(name) is not None:
            raise ValueError(f"the page has no queue: leave --{name.replace('_', '-')} out")
    if arguments.get("frames", 1) != 1:
        raise ValueError("the page plans for images: leave --frames out")
    if choices.CONTINUOUS in (arguments.get("llms"), arguments.get("tokens")):
        raise ValueError("the page compares listed LLMs and V: leave --continuous out")
    start = law
    if mix is not None:
        assert families is not None
        start = dataclasses.replace(families, weights=mix)
    question.plan(start, **arguments)  # refuses what a plan refuses, before anything is written
    fixed = {name: x for name, x in arguments.items() if name not in SETTING}
    alone = {"own": law} | ({} if families is None else _each(families))
    paper = {name: _open(one, "paper", fixed) for name, one in alone.items()}
    whole: dict[str, question.Plan] = {}
    without = ""
    try:
        if names is not None:
            raise ValueError(
                "the shapes of these LLMs are not known here, and vlm-jax plan "
                "--config=FILE --page=FILE.html counts every phase"
            )
        whole = {name: _open(one, "full", fixed) for name, one in alone.items()}
    except ValueError as problem:
        without = str(problem)
    catalog, calibration = fixed.get("catalog"), fixed.get("calibration")
    reached = question.reached(calibration, fixed.get("efficiency")) or IDEAL
    stored = fixed.get("stored", roofline.AS_CHIP)
    asked = question.chip_of(arguments.get("chip"), catalog)
    chips, left = _chips(asked, catalog, stored, fixed.get("chips_together", 1), offer)
    full = whole["own"].search.cost if whole else None
    widths = sorted({2, *(chip.bytes_per_number for chip in chips)})
    known = full.sizes if isinstance(full, costs.FullCost) else {}
    return {
        "units": costs.UNITS,
        "times": [unit for unit in costs.TIMES if unit != "p95"],
        "phases": roofline.PHASES,
        "epsilon": fixed.get("epsilon", EPSILON),
        "beyond": choices.BEYOND,
        "cached_text": bool(fixed.get("cached_text")),
        "requests": fixed.get("requests"),
        "training_efficiency": (fixed.get("recipe") or LLAVA).efficiency,
        "chips_together": fixed.get("chips_together", 1),
        "calibration": _calibration(reached),
        "quantized": bool({"int8", "fp8"} & set(dataclasses.asdict(stored).values())),
        "chips": {chip.name: _chip(chip, stored) for chip in chips},
        "notes": left,
        "own_name": own_name,
        "without_full": without,
        "listed": {
            "llms": fixed.get("llms") is not None,
            "tokens": fixed.get("tokens") is not None,
        },
        "offers": {
            model: {name: _offer(one, names) for name, one in found.items()}
            for model, found in (("paper", paper), ("full", whole))
            if found
        },
        "paper_training": _paper_training(paper.values(), fixed.get("recipe") or LLAVA),
        "sizes": list(known),
        "terms": all_terms(_tokens(whole.values()), full, widths, chips)
        if isinstance(full, costs.FullCost)
        else {},
        "widths": widths,
        "laws": _laws(law, families),
        "forms": {name: _form(name) for name in FORMS},
        "start": _start(arguments, asked, start, mix),
    } | _quantiles([law, *law.others.values(), *([families] if families else [])])


def _each(families: Mixture) -> dict[str, Mixture]:
    """Each family as a mixture of itself."""
    return {
        name: Mixture({name: one}, {name: 1.0}, {name: families.answers[name]}, families.method)
        for name, one in families.laws.items()
    }


def _open(law: Mixture, model: str, fixed: Mapping[str, Any]) -> question.Plan:
    """A plan under a cost without a limit and without a chip: what may be chosen."""
    of_chip = ["calibration", "efficiency", "chips_together", "next_cells", "warnings"]
    of_chip += ["stored"] * (model == "paper")
    rest = {name: x for name, x in fixed.items() if name not in of_chip}
    return question.plan(law, text_tokens=1, flops=OPEN, cost_model=model, **rest)


# --- What may be chosen ---------------------------------------------------------------------------


def _offer(plan: question.Plan, names: Mapping[Number, str] | None) -> dict[str, Any]:
    """The LLMs, their names, and the V of each compressor."""
    assert plan.search.llms is not None
    return {
        "llms": [float(N) for N in plan.search.llms],
        "names": [[float(N), name] for N, name in (names or plan.names).items()],
        "tokens": {kind: sorted(V) for kind, V in _tokens([plan]).items()},
    }


def _tokens(plans: Collection[question.Plan]) -> dict[str, set[float]]:
    """Compressor -> the V that some plan offers."""
    found: dict[str, set[float]] = {}
    for plan in plans:
        for kind, V in plan.search.tokens.items():
            assert isinstance(V, Sequence)
            found.setdefault(kind, set()).update(float(v) for v in V)
    return found


def _paper_training(plans: Collection[question.Plan], recipe: Recipe) -> list[list[float]]:
    """[V, FLOPs of training one billion parameters] by the paper's cost."""
    tokens = sorted(set().union(*_tokens(plans).values()))
    return [[V, float(paper_training_flops(1.0, V, recipe))] for V in tokens]


def _chips(
    asked: Chip | None, catalog: Catalog | None, stored: roofline.Stored, count: int, offer: str
) -> tuple[list[Chip], list[str]]:
    """The chips that the page offers, and a sentence for each that it does not."""
    known = [*(catalog.chips.values() if catalog else ()), *CHIPS.values()]
    found: dict[str, Chip] = {}
    left = []
    for chip in [*([asked] if asked else []), *(known if offer == "all" else [])]:
        try:
            chip.peak(stored.products)
            found.setdefault(chip.name, dataclasses.replace(chip.times(count), name=chip.name))
        except ValueError as problem:
            left.append(f"{chip.name} is not offered: {problem}.")
    return list(found.values()), left


def _chip(chip: Chip, stored: roofline.Stored) -> dict[str, Any]:
    """All chips together, as `Chip.times` has them; the price is of one."""
    return {
        "name": chip.name if chip.count == 1 else f"{chip.count} x {chip.name}",
        "peak": chip.peak_flops, "llm_peak": chip.peak(stored.products),
        "bandwidth": chip.hbm_bytes_per_s, "memory": chip.hbm_bytes,
        "width": chip.bytes_per_number, "link": chip.link_bytes_per_s, "count": chip.count,
        "price": chip.price_per_hour,
    }  # fmt: skip


def _calibration(reached: Any) -> dict[str, Any]:
    return {
        "ideal": reached == IDEAL,
        "efficiency": dict(reached.efficiency),
        "request": reached.request_seconds,
        "step": reached.step_seconds,
    }


# --- What it errs ---------------------------------------------------------------------------------


def _form(name: str) -> dict[str, Any]:
    form = FORMS[name]
    return {
        "formula": form.formula,
        "total": form.total_tokens,
        "terms": [
            [[form.exponents.index(e), regressor] for e, regressor in term.items()]
            for term in form.terms.values()
        ],
    }


def _laws(law: Mixture, families: Mixture | None) -> dict[str, Any]:
    """What answers: by itself, for each compressor that has its own law, and for each family."""
    return {
        "own": _mixture(law),
        "kinds": {kind: _mixture(one) for kind, one in law.others.items() if kind != law.kind},
        "families": None if families is None else _mixture(families),
    }


def _mixture(mixture: Mixture) -> dict[str, Any]:
    """A mixture, whose families draw in orders of their own."""
    return {
        "method": mixture.method,
        "kind": mixture.kind,
        "weights": [[name, float(w)] for name, w in mixture.weights.items()],
        "families": [
            _family(name, mixture.laws[name], mixture.answers[name]) for name in mixture.weights
        ],
    }


def _family(name: str, law: Law, answer: Answer) -> dict[str, Any]:
    """One family: its forms with their draws, or its measured cells, and its warnings."""
    found: dict[str, Any] = {
        "name": name, "by": answer.by, "warning": answers.doubt_of(name, law, answer),
        "domain": law.domain, "frames": answer.counts_frames,
        "order": order_of(name, WORLDS).tolist(),
    }  # fmt: skip
    if answer.by == CELLS_ALONE:
        cells = answer._cells()
        mixture = Mixture({name: law}, {name: 1.0}, {name: answer})
        frames = [1.0] * len(cells.N) if cells.frames is None else cells.frames.tolist()
        places = zip(cells.N.tolist(), cells.V.tolist(), frames, strict=True)
        ends = [mixture.asked_for(t).interval(n, v, 0) for n, v, t in places]
        return found | {
            "dof": max(cells.dof, 1.0),
            "cells": {
                "N": cells.N.tolist(), "V": cells.V.tolist(), "error": cells.error.tolist(),
                "sd": np.nan_to_num(cells.sd).tolist(), "interval": ends, "frames": frames,
            },
        }  # fmt: skip
    drawn = all(one.samples is not None for one in answer.forms.values())
    counts = answer._numbers(WORLDS)
    single = list(answer.forms) == [law.form] and law.samples is not None
    laws = dict(answer.forms) | ({law.form: law} if single else {})
    found["forms"] = [
        {
            "form": form,
            "share": answer.shares[form],
            "worlds": counts[form],
            "values": [laws[form].params[p] for p in FORMS[form].names],
            "draws": [[_short(x) for x in row] for row in laws[form].drawn] if drawn else None,
        }
        for form in answer.shares
    ]
    # The interval: of one form's draws, of 4,000 over all forms, of its residuals, or none.
    found["interval"] = (
        "form" if single else "forms" if drawn else "residuals" if law.rmse > 0 else None
    )
    if found["interval"] == "residuals":
        found["rmse"] = law.rmse
        found["law"] = {"form": law.form, "values": [law.params[p] for p in FORMS[law.form].names]}
    return found


def _short(x: float) -> float:
    """As law.json keeps draws: six digits."""
    return float(f"{x:.6g}")


def _quantiles(mixtures: list[Mixture]) -> dict[str, Any]:
    """Degrees of freedom -> the quantiles of which measured cells draw."""
    dofs = {
        max(answer.cells.dof, 1.0)
        for mixture in mixtures
        for answer in mixture.answers.values()
        if answer.by == CELLS_ALONE and answer.cells is not None
    }
    return {"student": [[dof, student(dof, WORLDS).tolist()] for dof in sorted(dofs)]}


def _start(
    arguments: Mapping[str, Any], asked: Chip | None, law: Mixture, mix: Mapping[str, Number] | None
) -> dict[str, Any]:
    """The setting that the page begins with."""
    texts = arguments["text_tokens"]
    texts = texts if isinstance(texts, Mapping) else {texts: 1.0}
    limits = [
        (unit, float(arguments[name]))
        for name, unit in LIMITS.items()
        if arguments.get(name) is not None
    ]
    model = arguments.get("cost_model") or question.default_cost([unit for unit, _ in limits])
    price = arguments.get("price_per_hour") or (asked.price_per_hour if asked else None)
    return {
        "cost": model,
        "limits": limits,
        "texts": [[float(q), float(share)] for q, share in texts.items()],
        "G": float(arguments.get("new_tokens") or 0),
        "batch": int(arguments.get("batch") or 1),
        "chip": asked.name if asked else None,
        "price": price,
        "mix": None if mix is None else [[name, float(w)] for name, w in mix.items()],
    }
