# SPDX-License-Identifier: Apache-2.0
"""`plan`: a budget, a law and the allowed choices, in plain values, become a plan.

N LLM parameters in billions   V visual tokens   Q text tokens   G generated tokens
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax import compressors as methods
from vlm_jax.compressors.method import Number
from vlm_jax.cost import chips, described
from vlm_jax.cost.calibration import IDEAL, NAMED, Calibration
from vlm_jax.cost.catalog import Catalog
from vlm_jax.cost.chips import Chip
from vlm_jax.cost.flops import PHASES
from vlm_jax.cost.lifetime import LLAVA, Recipe
from vlm_jax.cost.roofline import AS_CHIP, Stored
from vlm_jax.law.law import Law
from vlm_jax.planning import answers, choices, costs, next_cell, planner
from vlm_jax.planning.decision import EPSILON
from vlm_jax.planning.mixture import Mixture
from vlm_jax.planning.parsing import law_fields, law_of, number, read_laws

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
      names: N -> the name of each LLM that is described.
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
    names: Mapping[Number, str]


def plan(
    law: Law | Mixture | str | Path,
    *,
    text_tokens: Number | Mapping[Number, Number],
    flops: Number | None = None,
    ms: Number | None = None,
    dollars_per_million: Number | None = None,
    hbm_bytes: Number | None = None,
    ttft_ms: Number | None = None,
    tpot_ms: Number | None = None,
    p95_ms: Number | None = None,
    lifetime_flops: Number | None = None,
    lifetime_dollars: Number | None = None,
    new_tokens: Number | None = None,
    batch: int = 1,
    rate: Number | None = None,
    requests: Number | None = None,
    recipe: Recipe = LLAVA,
    cached_text: bool = False,
    frames: Number = 1,
    cost_model: str | None = None,
    llms: Sequence[str] | Sequence[Number] | str | None = None,
    tokens: Sequence[Number] | str | None = None,
    compressors: Sequence[str] | None = None,
    config: Any = None,
    chip: str | Chip | None = None,
    chips_together: int = 1,
    price_per_hour: Number | None = None,
    efficiency: Number | Mapping[str, Number] | None = None,
    calibration: Calibration | str | None = None,
    stored: Stored = AS_CHIP,
    catalog: Catalog | None = None,
    epsilon: Number = EPSILON,
    next_cells: int = 0,
    warnings: Sequence[str] = (),
) -> Plan:
    """The best LLM size and number of visual tokens within one budget or several.

    Args:
      law: the path of a law.json, whose forms that fit answer together; or one form, from `fit`,
        or a weighted mean of several laws.
      text_tokens: Q of a request, or Q -> its share of the requests; shares sum to 1.
      flops: a budget in FLOPs of a request.
      ms: a budget in milliseconds of a batch; needs `chip`.
      dollars_per_million: a budget in dollars for a million requests; needs `chip` and
        `price_per_hour`.
      hbm_bytes: a budget in bytes of memory for a batch.
      ttft_ms: a budget in milliseconds to the first token of a batch.
      tpot_ms: a budget in milliseconds for each output token after the first.
      p95_ms: a budget in milliseconds that 95 % of requests do not exceed, at `rate`.
      lifetime_flops: a budget in FLOPs of training and of `requests`.
      lifetime_dollars: the same in dollars.
      new_tokens: G of a request; by default 0, prefill only. Needed for a budget in time or money.
      batch: requests per batch; with `rate` the most that a server takes at once.
      rate: requests per second, for `p95_ms`.
      requests: of the model's life, for its cost.
      recipe: of its training.
      cached_text: keys and values of the text are kept from an earlier request.
      frames: of a video, of V tokens each; the law must count them (`fit --form=frames`).
      cost_model: "paper", 2N(Q+V), or "full", every phase of a request; by default "paper" for
        budgets in FLOPs alone and "full" for others.
      llms: names, sizes in billions, or "continuous"; by default the described LLMs within twice
        the range of N on which the law was fitted.
      tokens: V to choose from, or "continuous"; by default every V that the compressors can give
        within twice the fitted range.
      compressors: methods; by default the law's. Each is judged by its own law if `law` has one.
      config: a configuration or its path, for the sizes of encoder, compressor and LLMs.
      chip: a name of `cost.chips.CHIPS`, "cpu" (measured now) or a chip; its memory is a limit.
      chips_together: the number of chips that work on one batch together.
      price_per_hour: dollars for one chip for one hour.
      efficiency: the fraction of the roofline that is reached, for all phases or by phase.
      calibration: that and overheads, or a name of `cost.calibration.NAMED`.
      stored: types of weights, cache and products of the LLM.
      catalog: chips and LLMs of your own; its LLMs are the described ones.
      epsilon: configurations are listed whose error is at most this much more than the best's.
      next_cells: how many cells to name that are worth training next; 0 ranks none.
      warnings: sentences of the caller, added after the plan's own.
    Raises:
      ValueError: for arguments that contradict each other; if nothing meets the budget, with the
        cheapest configuration.
    """
    calibration = reached(calibration, efficiency)
    given = {
        "flops": flops, "ms": ms, "ttft": ttft_ms, "tpot": tpot_ms, "p95": p95_ms,
        "dollars": dollars_per_million, "lifetime": lifetime_flops,
        "lifetime_dollars": lifetime_dollars, "hbm": hbm_bytes,
    }  # fmt: skip
    limits = [
        (unit, number(limit, f"the budget in {costs.UNITS[unit]}", least=1e-300))
        for unit, limit in given.items()
        if limit is not None
    ]
    if not limits:
        raise ValueError("0 budgets: give one of flops, ms, dollars_per_million, hbm_bytes, ...")
    units = [unit for unit, _ in limits]
    if batch < 1:
        raise ValueError(f"--batch={batch}: at least 1")
    texts = text_tokens if isinstance(text_tokens, Mapping) else {text_tokens: 1.0}
    work = costs.Workload(
        tuple((number(Q, "--text-tokens"), share) for Q, share in texts.items()),
        number(new_tokens or 0, "--new-tokens"),
        batch,
        cached_text,
        None if rate is None else number(rate, "--rate", least=1e-9),
        None if requests is None else number(requests, "--requests"),
        recipe,
        number(frames, "--frames", least=1.0),
    )
    model = cost_model or default_cost(units, frames=work.frames)
    if model not in COSTS:
        raise ValueError(f"cost_model={model!r}: choose one of {', '.join(COSTS)}")
    if model == "paper":
        refuse_chip(
            any(x is not None for x in (chip, calibration, rate, price_per_hour))
            or stored != AS_CHIP
        )
    check_workload(units, work, answered=new_tokens is not None)
    if isinstance(law, Law):
        mixture = Mixture({"all": law}, {"all": 1})
    else:
        mixture = law if isinstance(law, Mixture) else read_laws(str(law), None)
    mixture = mixture.asked_for(work.frames)
    # The paper's cost looks up no shapes unless LLMs are named, or the described ones are wanted.
    named = llms is None or (not isinstance(llms, str) and any(isinstance(n, str) for n in llms))
    models = described.models(config) if model == "full" or config or named or catalog else None
    if models and catalog and catalog.llms:
        shapes = dict(models.llms) | dict(catalog.llms)
        models = dataclasses.replace(models, llms=catalog.llms if llms is None else shapes)
        models = dataclasses.replace(models, own=models.own or llms is None)
    fitted = mixture.kind if mixture.kind in methods.COMPRESSORS else None
    own = [models.kind] if models and config else [fitted or DEFAULT_COMPRESSOR]
    kinds = list(compressors) if compressors else own
    for kind in kinds:
        methods.named(kind)  # an unknown name is an error with the choices
    offered = choices.llms(llms, models, mixture)
    offered_tokens, left_out = choices.tokens(
        tokens, kinds, mixture, most=models.vit.patches if models else MOST_TOKENS,
        theory=model == "paper", every_size=offered.sizes is None,
        elastic={models.kind: models.elastic} if models and models.elastic else {},
    )  # fmt: skip
    cost: costs.Cost
    if model == "paper":
        cost = costs.PaperCost(work)
    else:
        assert models is not None
        device = chip_of(chip, catalog)
        if device is None and (timed := [unit for unit in units if unit in costs.TIMES]):
            raise ValueError(f"a budget in {costs.UNITS[timed[0]]} needs --chip")
        if device is None and (calibration is not None or rate is not None):
            raise ValueError("--efficiency, --calibration and --rate need --chip")
        price = price_per_hour or (device.price_per_hour if device else None)
        if not price and {"dollars", "lifetime_dollars"} & set(units):
            raise ValueError("a budget in dollars needs --price-per-hour, the price of one chip")
        if device is not None:
            device = device.times(chips_together)
            limits = within_memory(limits, device)
        cost = costs.FullCost(
            work,
            dict(offered.known.values()),
            models.vit,
            query=models.query,
            heads=models.heads,
            chip=device,
            calibration=calibration or IDEAL,
            stored=stored,
            dollars_per_hour=(price or 0.0) * chips_together,
        )
    search = planner.Search(
        mixture,
        cost,
        planner.Budget(tuple(limits)),
        offered.sizes,
        offered_tokens,
        offered.most,
        {kind: one for kind, one in mixture.others.items() if kind != mixture.kind},
    )
    names = {N: name for name, (N, _) in offered.known.items()}
    fields = answers.plan(search, epsilon, names)
    if next_cells:
        ranked = next_cell.cells(search, search.candidates(), names)[:next_cells]
        fields["next"] = [dataclasses.asdict(cell) for cell in ranked]
    fields["warnings"] += [*offered.notes, *left_out, *warnings]
    return of_fields(fields, search, names)


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


def of_fields(fields: dict[str, Any], search: planner.Search, names: Mapping[Number, str]) -> Plan:
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
        names=names,
    )


def check_workload(units: Sequence[str], work: costs.Workload, *, answered: bool) -> None:
    """Raises ValueError if a budget lacks what it is counted from."""
    for unit in units:
        if unit in costs.TIMES and unit != "ttft" and not answered:
            raise ValueError(
                f"a budget in {costs.UNITS[unit]} needs --new-tokens, the length of an answer: "
                "most of the time is spent on it (1 for a first token alone)"
            )
        if unit == "tpot" and work.G < 2:
            raise ValueError("--tpot-ms needs answers of at least 2 tokens: --new-tokens")
        if unit == "p95" and not work.rate:
            raise ValueError("--p95-ms needs --rate, requests per second")
        if unit.startswith("lifetime") and work.requests is None:
            raise ValueError(f"a budget in {costs.UNITS[unit]} needs --requests, their number")


def default_cost(units: Sequence[str], *, frames: Number = 1) -> str:
    """The default cost model for budgets in these units.

    Of a video it is the full one: the paper's has no encoder, which runs once for each frame.
    """
    return "paper" if set(units) <= {"flops", "lifetime"} and frames == 1 else "full"


def chip_of(chip: str | Chip | None, catalog: Catalog | None) -> Chip | None:
    """The chip of a name, the catalog's before the built-in ones."""
    if not isinstance(chip, str):
        return chip
    return (catalog and catalog.chips.get(chip)) or chips.named(chip)


def refuse_chip(given: bool) -> None:
    """Raises ValueError if a chip is given with the paper's cost."""
    if given:
        raise ValueError("the paper's cost has no chip: add --cost=full, or leave the chip out")


def reached(
    calibration: Calibration | str | None, efficiency: Number | Mapping[str, Number] | None
) -> Calibration | None:
    """What is reached of the roofline, by either argument; None for the roofline itself."""
    if calibration is not None and efficiency is not None:
        raise ValueError("a calibration and an efficiency: give one of them")
    if isinstance(calibration, str):
        if calibration not in NAMED:
            raise ValueError(f"no calibration {calibration!r}: choose one of {', '.join(NAMED)}")
        return NAMED[calibration]
    if efficiency is None:
        return calibration
    phases = efficiency if isinstance(efficiency, Mapping) else dict.fromkeys(PHASES, efficiency)
    return Calibration(phases)


def read_law(path: str | Path) -> Law:
    """The law of a law.json, or of the folder that holds one.

    Raises:
      OSError: if there is no such file.
      ValueError: if it does not hold a law.
    """
    return law_of(law_fields(Path(path)), str(path))
