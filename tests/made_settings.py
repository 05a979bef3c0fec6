# SPDX-License-Identifier: Apache-2.0
"""Pages of several kinds of laws and costs, random settings of each, and Python's plans."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from vlm_jax.cost.calibration import NAMED
from vlm_jax.cost.roofline import Stored
from vlm_jax.law import families, published
from vlm_jax.planning import exported, parsing, planner, question
from vlm_jax.reports.cells import pareto

HOME = Path(__file__).parent.parent
DEMO = HOME / "docs/results/demo/law.json"
ARGUMENT = {unit: name for name, unit in exported.LIMITS.items()}


def few_pages(folder: Path) -> list[tuple[str, bool, dict]]:
    """Three of `pages`, which take a third of its time: a mixture, types of numbers, cells; and one
    of what an LLM reads in a pass of its own, or forgets."""
    points = {name: published.points(name) for name in ("reasoning", "ocr")}
    both = families.fit_families(points, {}, bootstrap=40, method="token_packer").fields
    (folder / "both.json").write_text(json.dumps(both))
    stored = dict(cached_text=True, stored=Stored("int8", "fp8", "int8"), tokens=[1, 16, 144])
    return [
        (str(folder / "both.json"), True, {}),
        (str(folder / "both.json"), False, stored | dict(llms=[1.0, 3.5, 20.0])),
        (str(folder / "both.json"), False, dict(
            compressors=["voco", "fwd2bot"], tokens=[1, 16], chips_together=4)),
        (str(DEMO), True, dict(config=str(HOME / "configs/demo.py"))),
    ]  # fmt: skip


def pages(folder: Path) -> list[tuple[str, bool, dict]]:
    """(law.json, whether its families are mixed, fixed arguments of the plan) of each page."""
    points = {name: published.points(name) for name in ("reasoning", "ocr")}
    both = families.fit_families(points, {}, bootstrap=150, method="token_packer").fields
    methods = families.fit_methods({}, bootstrap=100).fields
    bare = {k: v for k, v in methods.items() if k not in ("samples", "methods", "answer")}
    written = {"both": both, "methods": methods, "bare": bare}
    for name, fields in written.items():
        (folder / f"{name}.json").write_text(json.dumps(fields))
    path = {name: str(folder / f"{name}.json") for name in written} | {"demo": str(DEMO)}
    return [
        (path["both"], True, {}),
        (path["both"], True, dict(chips_together=4, calibration=NAMED["a100-transformers"])),
        (path["both"], False, dict(
            compressors=["quecc", "token_packer"], efficiency={"prefill": 0.6, "decode": 0.8},
            requests=1e9, epsilon=0.02)),
        (path["both"], False, dict(
            cached_text=True, stored=Stored("int8", "fp8", "int8"), tokens=[1, 16, 144],
            llms=[1.0, 3.5, 20.0])),
        (path["methods"], False, dict(compressors=["token_packer", "mqt", "quecc"])),
        (path["bare"], False, {}),
        (path["demo"], True, dict(config=str(HOME / "configs/demo.py"))),
        (path["demo"], True, dict(requests=1e6, llms=[9.808e-06, 0.00011296], tokens=[1, 36])),
    ]  # fmt: skip


def laws(path: str, mixed: bool):
    """The law of a file, and the mixture of its families."""
    law = parsing.read_laws(path, None)
    if not mixed:
        return law, None
    names = json.loads(Path(path).read_text())["families"]
    return law, parsing.read_laws(path, ",".join(f"{name}:1" for name in names))


def data(page) -> dict:
    """The exported data of a page, after a trip through JSON."""
    path, mixed, fixed = page
    begin = dict(text_tokens=50, flops=1e30)
    if {"calibration", "efficiency", "stored"} & set(fixed):
        begin |= dict(cost_model="full", chip="h200")
    arguments = begin | fixed
    return json.loads(json.dumps(exported.data(*laws(path, mixed), arguments), allow_nan=False))


def settings(page, of_page: dict, count: int, rng: np.random.Generator) -> list[dict]:
    """Random settings, most of which have an answer."""
    found = []
    scale = 1.0 if max(of_page["sizes"] or [1e-4]) > 0.1 else 1e-5
    for _ in range(count):
        full = bool(of_page["sizes"]) and rng.random() < 0.75
        chip = str(rng.choice(list(of_page["chips"]))) if full and rng.random() < 0.85 else None
        G = float(rng.choice([0, 1, 2, 5, 40.5]))
        ranges = {"flops": (3e10 * scale, 2e14 * scale)}
        if chip:
            ranges |= {
                "ms": (0.3, 2e4),
                "ttft": (0.3, 2e3),
                "dollars": (0.1, 1e4),
                "hbm": (1e9, 1e12),
            }
            ranges |= {"tpot": (0.1, 500)} if G > 1 else {}
        if of_page["requests"]:
            ranges |= {"lifetime": (1e20 * scale, 1e24 * scale)}
            ranges |= {"lifetime_dollars": (10, 1e7)} if chip else {}
        share = rng.choice([0.0, 0.1, 0.5, 0.9])
        units = [u for u in exported.LIMITS.values() if u in ranges and rng.random() < 0.2]
        units = units or [str(rng.choice(list(ranges)))]
        texts = [[float(rng.choice([0, 8.814, 30, 50, 400])), 1 - share]]
        texts += [[700.0, share]] * bool(share)
        found.append({
            "cost": "full" if full else "paper",
            "limits": [[u, float(np.exp(rng.uniform(*np.log(ranges[u]))))] for u in units],
            "texts": texts, "G": G, "batch": int(rng.choice([1, 3, 32])), "chip": chip,
            "price": None if rng.random() < 0.1 else float(rng.choice([1.2, 3.0])),
            "mix": mix(of_page, rng) if page[1] and rng.random() < 0.7 else None,
        })  # fmt: skip
    return found


def mix(of_page: dict, rng: np.random.Generator) -> list:
    """Random weights over the families, sometimes all of one."""
    names = [name for name, _ in of_page["laws"]["families"]["weights"]]
    weights = (
        rng.choice([0.0, 0.3, 1.0], len(names)) if rng.random() < 0.5 else rng.random(len(names))
    )
    if not weights.sum():
        weights[0] = 1.0
    return [[name, float(w)] for name, w in zip(names, weights / weights.sum(), strict=True)]


def by_python(page, setting: dict) -> dict:
    """The fields of the plan, or {"error": words}."""
    path, mixed, fixed = page
    law, of_families = laws(path, mixed)
    if setting["mix"] is not None:
        weights = ",".join(f"{name}:{w!r}" for name, w in setting["mix"])
        law = parsing.read_laws(path, weights)
    arguments = {ARGUMENT[unit]: limit for unit, limit in setting["limits"]}
    arguments |= dict(
        text_tokens=dict(map(tuple, setting["texts"])), new_tokens=setting["G"],
        batch=setting["batch"], cost_model=setting["cost"], chip=setting["chip"],
    )  # fmt: skip
    paper = setting["cost"] == "paper"
    if not paper:
        arguments["price_per_hour"] = setting["price"]
    of_chip = ("chips_together", "calibration", "efficiency")
    without = (*of_chip, "stored") if paper else () if setting["chip"] else of_chip
    try:
        plan = question.plan(
            law, **arguments, **{k: v for k, v in fixed.items() if k not in without}
        )
        return plan.fields | {"frontier": frontier(plan.search)}
    except ValueError as problem:
        return {"error": str(problem)}


def frontier(search: planner.Search) -> list[dict]:
    """Places within all limits but the first that none beats in its cost and in error."""
    (unit, _), *others = search.budget.limits
    budget = planner.Budget(((unit, np.inf), *others))
    rivals = dataclasses.replace(search, budget=budget).candidates()
    kept = pareto([one.cost for one in rivals], [one.error for one in rivals])
    return [dataclasses.asdict(one) for one, is_kept in zip(rivals, kept, strict=True) if is_kept]


SAME = (
    "N", "V", "compressor", "llm", "predicted_error", "interval", "cost_model", "cost", "decision",
    "limits", "latency", "runner_ups", "frontier",
)  # fmt: skip


def assert_same(page: dict, python: dict, where: str) -> None:
    """The page's plan is Python's to a millionth, its refusals and warnings word for word."""
    assert ("error" in page) == ("error" in python), (where, page.get("error"), python.get("error"))
    if "error" in page:
        assert page["error"] == python["error"], (where, page["error"], python["error"])
        return
    for name in SAME:
        close(page[name], python[name], f"{where} {name}")
    notes = [
        w for w in python["warnings"] if not w.startswith("not offered") and "cannot give" not in w
    ]
    assert page["warnings"] == notes, (where, page["warnings"], notes)


def close(one, other, where: str) -> None:
    """Equal to 1e-6, at every depth; fields that the page has for itself do not count."""
    if isinstance(other, dict):
        names = set(other) - {"llm_parameters"}  # of the JSON alone
        assert names <= set(one), (where, names - set(one))
        for name in names:
            close(one[name], other[name], f"{where}.{name}")
    elif isinstance(other, list | tuple):
        assert len(one) == len(other), (where, one, other)
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            close(a, b, f"{where}[{i}]")
    elif isinstance(other, float) and not isinstance(one, str) and one is not None:
        assert abs(one - other) <= 1e-6 * max(abs(one), abs(other)) + 1e-12, (where, one, other)
    else:
        assert one == other, (where, one, other)
