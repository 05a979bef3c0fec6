# SPDX-License-Identifier: Apache-2.0
"""`plan`: a budget, a law and the allowed choices, in plain values, become a plan.

N LLM parameters in billions   V visual tokens   Q text tokens   G generated tokens
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax import compressors as methods
from vlm_jax.compressors.method import Number
from vlm_jax.cost import chips, described
from vlm_jax.cost.chips import Chip
from vlm_jax.cost.roofline import PHASES
from vlm_jax.law.law import Law
from vlm_jax.planning import answers, choices, costs, planner
from vlm_jax.planning.parsing import law_fields, law_of, number

MOST_TOKENS = 576  # patches of CLIP ViT-L/14-336: the paper's largest V
DEFAULT_COMPRESSOR = "token_packer"  # the paper's
COSTS = ("paper", "full")


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
    new_tokens: Number | None = None,
    batch: int = 1,
    cached_text: bool = False,
    cost_model: str | None = None,
    llms: Sequence[str] | Sequence[Number] | str | None = None,
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
      new_tokens: G of a request; by default 0, prefill only. Needed for a budget in time or money.
      batch: requests per batch.
      cached_text: keys and values of the text are kept from an earlier request.
      cost_model: "paper", 2N(Q+V), or "full", every phase of a request; by default "paper" for a
        budget in FLOPs and "full" for others.
      llms: names, sizes in billions, or "continuous"; by default the described LLMs within twice
        the range of N on which the law was fitted.
      tokens: V to choose from, or "continuous"; by default every V that the compressors can give
        within twice the fitted range.
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
    work = costs.Workload(
        tuple((number(Q, "--text-tokens"), share) for Q, share in texts.items()),
        number(new_tokens or 0, "--new-tokens"),
        batch,
        cached_text,
    )
    model = cost_model or default_cost(unit)
    if model not in COSTS:
        raise ValueError(f"cost_model={model!r}: choose one of {', '.join(COSTS)}")
    if model == "paper":
        refuse_chip(chip is not None or efficiency is not None)
    if new_tokens is None and unit in ("ms", "dollars"):
        raise ValueError(
            f"a budget in {costs.UNITS[unit]} needs --new-tokens, the length of an answer: most of "
            "the time is spent on it (1 for a first token alone)"
        )
    mixture = law if isinstance(law, planner.Mixture) else planner.Mixture({"all": law}, {"all": 1})
    # The paper's cost looks up no shapes unless LLMs are named, or the described ones are wanted.
    named = llms is None or (not isinstance(llms, str) and any(isinstance(n, str) for n in llms))
    models = described.models(config) if model == "full" or config or named else None
    own = [models.kind] if models and config else [DEFAULT_COMPRESSOR]
    kinds = list(compressors) if compressors else own
    for kind in kinds:
        methods.named(kind)  # an unknown name is an error with the choices
    offered = choices.llms(llms, models, mixture)
    offered_tokens, left_out = choices.tokens(
        tokens, kinds, mixture, most=models.vit.patches if models else MOST_TOKENS,
        theory=model == "paper", every_size=offered.sizes is None,
    )  # fmt: skip
    limits: list[tuple[str, Number]] = [(unit, float(limit))]
    cost: costs.Cost
    if model == "paper":
        cost = costs.PaperCost(work)
    else:
        assert models is not None
        device = chips.named(chip) if isinstance(chip, str) else chip
        device = device.times(chips_together) if device else None
        if unit in ("ms", "dollars") and device is None:
            raise ValueError(f"a budget in {costs.UNITS[unit]} needs --chip")
        if unit == "dollars" and not price_per_hour:
            raise ValueError("--dollars-per-million needs --price-per-hour, the price of one chip")
        if device is not None:
            limits = within_memory(limits, device)
        cost = costs.FullCost(
            work,
            dict(offered.known.values()),
            models.vit,
            query=models.query,
            heads=models.heads,
            chip=device,
            efficiency=by_phase(efficiency),
            dollars_per_hour=(price_per_hour or 0.0) * chips_together,
        )
    search = planner.Search(
        mixture, cost, planner.Budget(tuple(limits)), offered.sizes, offered_tokens, offered.most
    )
    fields = answers.plan(search, {N: name for name, (N, _) in offered.known.items()})
    fields["warnings"] += [*offered.notes, *left_out, *warnings]
    return of_fields(fields, search)


def within_memory(limits: list[tuple[str, Number]], device: Chip) -> list[tuple[str, Number]]:
    """The limits, and the chip's memory; ValueError for a budget beyond it."""
    asked = dict(limits).get("hbm")
    if asked is None:
        return [*limits, ("hbm", device.hbm_bytes)]
    if asked > device.hbm_bytes:
        raise ValueError(
            f"a budget of {asked:.4g} bytes is more than {device.name} can use, "
            f"{device.hbm_bytes:.4g} bytes: lower it, or raise --chips"
        )
    return limits


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


def read_law(path: str | Path) -> Law:
    """The law of a law.json, or of the folder that holds one.

    Raises:
      OSError: if there is no such file.
      ValueError: if it does not hold a law.
    """
    return law_of(law_fields(Path(path)), str(path))
