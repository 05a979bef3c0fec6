# SPDX-License-Identifier: Apache-2.0
"""`plan`: a budget, a law and the allowed choices, in plain values, become a plan.

N LLM parameters in billions   V visual tokens   Q text tokens   G generated tokens
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax import compressors as methods
from vlm_jax.compressors.method import Number
from vlm_jax.cost import chips, described
from vlm_jax.cost.chips import Chip
from vlm_jax.cost.described import Models
from vlm_jax.cost.roofline import PHASES
from vlm_jax.law.law import Law
from vlm_jax.models.sizes import LLMSize
from vlm_jax.planning import answers, planner
from vlm_jax.planning.parsing import law_fields, law_of, number

MOST_TOKENS = 576  # patches of CLIP ViT-L/14-336: the paper's largest V
FAMILY = "qwen1.5-"  # the paper's LLMs: what a plan without a configuration interpolates between
COSTS = ("paper", "full")

Choice = Mapping[str, Sequence[Number] | planner.Between]


@dataclass(frozen=True)
class Plan:
    """The configuration with the least predicted error within a budget.

    Attributes:
      N: LLM parameters in billions.
      V: visual tokens of an image.
      compressor: the method that produces them.
      llm: the name of the LLM, if one of this size is described.
      predicted_error: a fraction, 1 - score.
      interval: its 95 % interval; None for a law without draws or residuals.
      cost: of a request, or a batch, in the unit of the budget.
      unit: that unit, in words.
      warnings: what to know before trusting the plan, one sentence each.
      fields: everything as JSON values, as `vlm-jax plan` prints it (docs/planning.md).
      search: what was searched, for `reports.plan_figure.draw`.
    """

    N: Number
    V: Number
    compressor: str
    llm: str | None
    predicted_error: Number
    interval: tuple[Number, Number] | None
    cost: Number
    unit: str
    warnings: tuple[str, ...]
    fields: dict[str, Any]
    search: planner.Search


def plan(
    law: Law | planner.Mixture,
    *,
    text_tokens: Number | Mapping[Number, Number],
    flops: Number | None = None,
    ms: Number | None = None,
    dollars_per_million: Number | None = None,
    hbm_bytes: Number | None = None,
    new_tokens: Number = 0,
    batch: int = 1,
    cached_text: bool = False,
    cost_model: str | None = None,
    llms: Sequence[str] | Sequence[Number] | None = None,
    tokens: Sequence[Number] | str | None = None,
    compressors: Sequence[str] | None = None,
    config: Any = None,
    chip: str | Chip | None = None,
    chips_together: int = 1,
    price_per_hour: Number | None = None,
    efficiency: Number | Mapping[str, Number] | None = None,
    warnings: Sequence[str] = (),
) -> Plan:
    """The best LLM size and number of visual tokens for exactly one budget.

    Args:
      law: from `fit`, or a weighted mean of several laws.
      text_tokens: Q of a request, or Q -> its share of the requests; shares sum to 1.
      flops: a budget in FLOPs of a request.
      ms: a budget in milliseconds of a batch; needs `chip`.
      dollars_per_million: a budget in dollars for a million requests; needs `chip` and
        `price_per_hour`.
      hbm_bytes: a budget in bytes of memory for a batch.
      new_tokens: G of a request; 0 is prefill only.
      batch: requests per batch.
      cached_text: keys and values of the text are kept from an earlier request.
      cost_model: "paper", 2N(Q+V), or "full", every phase of a request; by default "paper" for a
        budget in FLOPs and "full" for others.
      llms: names, or sizes in billions; by default every size.
      tokens: V to choose from, or "continuous"; by default every V that the compressors support.
      compressors: methods; the law's error is used for each of them.
      config: a configuration or its path, for the sizes of encoder, compressor and LLMs.
      chip: a name of `cost.chips.CHIPS`, "cpu" (measured now) or a chip; its memory is a limit.
      chips_together: the number of chips used as one; communication counts as free.
      price_per_hour: dollars for one chip for one hour.
      efficiency: the fraction of the roofline that is reached, for all phases or by phase.
      warnings: sentences of the caller, added after the plan's own.
    Raises:
      ValueError: for arguments that contradict each other; if nothing meets the budget, with the
        cheapest configuration.
    """
    limits_by_unit = {"flops": flops, "ms": ms, "hbm": hbm_bytes, "dollars": dollars_per_million}
    budgets = [(unit, limit) for unit, limit in limits_by_unit.items() if limit is not None]
    if len(budgets) != 1:
        raise ValueError(
            f"{len(budgets)} budgets: give one of flops, ms, dollars_per_million, hbm_bytes"
        )
    unit, limit = budgets[0]
    number(limit, "the budget", least=1e-300)
    if batch < 1:
        raise ValueError(f"--batch={batch}: at least 1")
    texts = text_tokens if isinstance(text_tokens, Mapping) else {text_tokens: 1.0}
    work = planner.Workload(
        tuple((number(Q, "--text-tokens"), share) for Q, share in texts.items()),
        number(new_tokens, "--new-tokens"),
        batch,
        cached_text,
    )
    model = cost_model or default_cost(unit)
    if model not in COSTS:
        raise ValueError(f"cost_model={model!r}: choose one of {', '.join(COSTS)}")
    if model == "paper":
        refuse_chip(chip is not None or efficiency is not None)
    names_llms = llms is not None and any(isinstance(x, str) for x in llms)
    # The paper's cost looks up no shapes unless they are named.
    models = described.models(config) if model == "full" or config or names_llms else None
    sizes, family = chosen_llms(llms, models if model == "full" or names_llms else None)
    limits: list[tuple[str, Number]] = [(unit, float(limit))]
    cost: planner.Cost
    if model == "paper":
        cost = planner.PaperCost(work)
    else:
        assert models is not None
        device = chips.named(chip) if isinstance(chip, str) else chip
        device = device.times(chips_together) if device else None
        if unit in ("ms", "dollars") and device is None:
            raise ValueError(f"a budget in {planner.UNITS[unit]} needs --chip")
        if unit == "dollars" and not price_per_hour:
            raise ValueError("--dollars-per-million needs --price-per-hour, the price of one chip")
        if device is not None and unit != "hbm":
            limits.append(("hbm", device.hbm_bytes))
        cost = planner.FullCost(
            work,
            dict(family.values()),
            models.vit,
            query=models.query,
            heads=models.heads,
            chip=device,
            efficiency=by_phase(efficiency),
            dollars_per_hour=(price_per_hour or 0.0) * chips_together,
        )
    kinds = list(compressors) if compressors else [models.kind if models else "token_packer"]
    for kind in kinds:
        methods.named(kind)  # an unknown name is an error with the choices
    choices = token_choices(
        tokens, kinds, most=models.vit.patches if models else MOST_TOKENS,
        paper=model == "paper", every_size=llms is None,
    )  # fmt: skip
    mixture = law if isinstance(law, planner.Mixture) else planner.Mixture({"all": law}, {"all": 1})
    search = planner.Search(mixture, cost, planner.Budget(tuple(limits)), sizes, choices)
    fields = answers.plan(search, {N: name for name, (N, _) in family.items()})
    fields["warnings"] += list(warnings)
    return of_fields(fields, search)


def of_fields(fields: dict[str, Any], search: planner.Search) -> Plan:
    """The plan from the fields of `answers.plan`."""
    ends = fields["interval"]
    return Plan(
        N=fields["N"],
        V=fields["V"],
        compressor=fields["compressor"],
        llm=fields["llm"],
        predicted_error=fields["predicted_error"],
        interval=None if ends is None else (ends[0], ends[1]),
        cost=fields["cost"]["amount"],
        unit=fields["cost"]["unit"],
        warnings=tuple(fields["warnings"]),
        fields=fields,
        search=search,
    )


def default_cost(unit: str) -> str:
    """The default cost model for a budget in this unit."""
    return "paper" if unit == "flops" else "full"


def refuse_chip(given: bool) -> None:
    """Raises ValueError if a chip is given with the paper's cost."""
    if given:
        raise ValueError("the paper's cost has no chip: add --cost=full, or leave the chip out")


def by_phase(efficiency: Number | Mapping[str, Number] | None) -> Mapping[str, Number] | None:
    """The fraction of the roofline that is reached, by phase."""
    if efficiency is None or isinstance(efficiency, Mapping):
        return efficiency
    return dict.fromkeys(PHASES, efficiency)


def chosen_llms(
    llms: Sequence[str] | Sequence[Number] | None, models: Models | None
) -> tuple[tuple[Number, ...] | None, dict[str, tuple[Number, LLMSize]]]:
    """The N to choose from (None: every size), and name -> (N, shape) to interpolate between."""
    described: Mapping[str, tuple[Number, LLMSize]] = models.llms if models else {}
    own = models is not None and models.own
    family = {name: sized for name, sized in described.items() if own or name.startswith(FAMILY)}
    if llms is None:
        return None, family
    names = [one for one in llms if isinstance(one, str)]
    if not names:
        return tuple(number(one, "--llms", least=1e-9) for one in llms), family
    if unknown := [str(one) for one in llms if one not in described]:
        raise ValueError(
            f"--llms: {', '.join(unknown)} unknown; there are {', '.join(described)}, "
            "or give sizes in billions"
        )
    family = {name: described[name] for name in names}
    sizes = tuple(N for N, _ in family.values())
    if len(set(sizes)) < len(names):
        raise ValueError(
            f"--llms={','.join(names)}: two LLMs with one N cannot be told apart by a law; name one"
        )
    return sizes, family


def token_choices(
    tokens: Sequence[Number] | str | None,
    kinds: Sequence[str],
    *,
    most: int,
    paper: bool,
    every_size: bool,
) -> Choice:
    """Compressor -> the V to search, at most `most`."""
    if tokens is None and paper and every_size:
        tokens = "continuous"
    if isinstance(tokens, str):
        if tokens != "continuous":
            raise ValueError(f"--tokens={tokens}: give a list of V, or continuous")
        if not every_size:
            raise ValueError(
                "--tokens=continuous needs --llms=continuous: with a list of LLMs, list V too"
            )
        return {kind: planner.Between(1.0, float(most)) for kind in kinds}
    side = math.isqrt(most)
    offered = {kind: methods.named(kind).planned(side) for kind in kinds}
    if tokens is None:
        return {kind: [float(v) for v in V] for kind, V in offered.items()}
    requested = [number(v, "--tokens", least=1.0) for v in tokens]
    if paper:
        return dict.fromkeys(kinds, requested)
    usable = {
        kind: [v for v in requested if methods.named(kind).supports(side, v)] for kind in kinds
    }
    if not any(usable.values()):
        raise ValueError(
            f"--tokens={','.join(f'{v:g}' for v in requested)}: none is supported; allowed are "
            + "; ".join(f"{kind} {offered[kind]}" for kind in kinds)
        )
    return {kind: V for kind, V in usable.items() if V}


def read_law(path: str | Path) -> Law:
    """The law of a law.json, or of the folder that holds one.

    Raises:
      OSError: if there is no such file.
      ValueError: if it does not hold a law.
    """
    return law_of(law_fields(Path(path)), str(path))
