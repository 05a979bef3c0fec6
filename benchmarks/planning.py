# SPDX-License-Identifier: Apache-2.0
"""Can a plan's chances be believed, and how many cells does a decision need?

    python benchmarks/planning.py [--study=chances|next|rows] [--worlds=200] [--out=FILE]

Both studies plant laws, so that the best configuration is known. "chances": a grid of 3 LLM sizes
and 4 token counts is measured with noise, the law is fitted as `vlm-jax fit` does it, a budget is
planned for, and the plan's p_best is compared with how often its choice is best; and its expected
regret with the true one. "next": the grid is measured cell by cell as `vlm-jax plan --next` names
them, until the expected regret is small, or in random order; the peer is the
whole grid of 4 x 6. "rows" does the same with the measured rows of a finished grid (--rows,
--family), for budgets over its whole range.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

# benchmarks/ is a folder of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402

from benchmarks import facts  # noqa: E402
from vlm_jax.law import answer  # noqa: E402
from vlm_jax.law.law import Law, fit  # noqa: E402
from vlm_jax.law.points import Points  # noqa: E402
from vlm_jax.planning import costs, decision, next_cell, planner  # noqa: E402
from vlm_jax.planning.mixture import Mixture
from vlm_jax.reports import run as runs
from vlm_jax.rows import records  # noqa: E402

SIZES, TOKENS = (0.5, 1.8, 4.0, 7.0), (1.0, 4.0, 16.0, 36.0, 144.0, 576.0)
# Many sizes and token counts, so that neighbors are nearly as good and few choices are certain.
LLMS = tuple(float(n) for n in np.geomspace(0.5, 14, 10))
PLANNED = (1.0, 2, 3, 4, 6, 9, 12, 16, 24, 36, 48, 64, 96, 144, 192, 288, 576)
SMALL = [(n, v) for n in (0.5, 1.8, 7.0) for v in (1.0, 16.0, 64.0, 576.0)]  # of "chances"
NOISE = 0.015  # of a measured cell: that of 1,000 questions, so that not every choice is certain
FEW = ((0.5, 1.0), (0.5, 36.0), (0.5, 576.0), (1.8, 4.0), (1.8, 144.0), (4.0, 16.0))
CLOSE = 5e-3  # the same on measured rows: what `--epsilon` calls as good
ENOUGH = 5e-4  # expected regret at which a search for cells ends


def planted(rng: np.random.Generator) -> Law:
    """A law whose exponents are drawn around the published ones of reasoning and of reading."""
    alpha, beta = rng.uniform(0.03, 0.15), rng.uniform(0.005, 0.07)
    params = {"A": rng.uniform(0.4, 0.8), "alpha": alpha, "beta": beta, "D": rng.uniform(0, 0.15)}
    form = rng.choice(["multiplicative", "interaction", "additive"])
    if form == "interaction":
        params["gamma"] = rng.uniform(0, 0.01)
    if form == "additive":
        params |= {"A": 0.3, "B": 0.3, "alpha": 2 * alpha, "beta": 2 * beta}
    return Law(str(form), params, sse=0.0, rmse=0.0, n=0)


def measured(law: Law, cells: list[tuple[float, float]], rng: np.random.Generator) -> Points:
    """The cells' errors under a law, with noise."""
    N, V = (np.array(x) for x in zip(*cells, strict=True))
    error = law.error(N, V) + NOISE * rng.standard_normal(len(N))
    return Points(N, V, np.zeros(len(N)), error, np.full(len(N), NOISE), [""] * len(N))


def search_of(mixture: Mixture, rng: np.random.Generator) -> planner.Search:
    """A budget of 1.5 to 60 times what the smallest configuration takes."""
    work = costs.Workload(((float(rng.choice([0, 25, 50, 100, 200])), 1.0),))
    cost = costs.PaperCost(work)
    least = cost.amount("flops", LLMS[0], PLANNED[0], "token_packer")
    flops = float(least * 10 ** rng.uniform(0.2, 1.8))
    return planner.Search(
        mixture, cost, planner.Budget((("flops", flops),)), LLMS,
        {"token_packer": list(PLANNED)},
    )  # fmt: skip


def alone(law: Law) -> Mixture:
    """A law that answers by itself."""
    return Mixture({"all": law}, {"all": 1.0})


def regret(law: Law, candidates: list[planner.Candidate]) -> float:
    """How much more the first candidate truly errs than the best."""
    true = law.error(np.array([c.N for c in candidates]), np.array([c.V for c in candidates]))
    return float(true[0] - true.min())


def chances(worlds: int) -> dict:
    """p_best and expected regret of each world's plan, and what is true."""
    found = []
    for world in range(worlds):
        rng = np.random.default_rng(world)
        law = planted(rng)
        points = measured(law, SMALL, rng)
        asked = fit(points, bootstrap=200, intervals=False)
        who, _ = answer.answer(points, asked, bootstrap=200)
        search = search_of(Mixture({"all": asked}, {"all": 1.0}, {"all": who}), rng)
        if who.by != "law":
            continue
        candidates = search.candidates()
        odds = decision.odds(search.draws(candidates))
        found.append((float(odds.best[0]), float(odds.regret[0]), regret(law, candidates)))
        print(world, *(f"{x:.4f}" for x in found[-1]), flush=True)
    p, expected, true = np.array(found).T
    right = true <= 1e-9
    bands = []
    for low, high in ((0.0, 0.5), (0.5, 0.7), (0.7, 0.9), (0.9, 1.01)):
        inside = (low <= p) & (p < high)
        n = int(inside.sum())
        mean = float(p[inside].mean()) if n else None
        bands.append(dict(
            low=low, high=min(high, 1.0), plans=n, mean_p_best=mean,
            best=float(right[inside].mean()) if n else None,
            binomial_sd=float(np.sqrt(mean * (1 - mean) / n)) if n and mean is not None else None,
            expected_regret=float(expected[inside].mean()) if n else None,
            true_regret=float(true[inside].mean()) if n else None,
        ))  # fmt: skip
    return dict(worlds=worlds, answered_by_law=len(found), bands=bands)


def until(law: Law, world: int, order: str) -> dict:
    """Cells measured until the expected regret is ENOUGH, and the true regret then."""
    rng = np.random.default_rng([world, 1])
    grid = [(n, v) for n in SIZES for v in TOKENS]
    points = measured(law, grid, rng)  # the same results whatever the order
    if order == "grid":
        known = list(range(len(grid)))
    else:
        known = [grid.index(cell) for cell in FEW]
    left = [i for i in np.random.default_rng([world, 2]).permutation(len(grid)) if i not in known]
    while True:
        here = points.where(np.isin(np.arange(len(grid)), known))
        fitted = fit(here, "multiplicative", bootstrap=100, intervals=False)
        search = search_of(alone(fitted), np.random.default_rng([world, 3]))
        candidates = search.candidates()
        errors = search.draws(candidates)
        if decision.odds(errors).regret.min() <= ENOUGH or not left:
            break
        if order == "next":
            cells = dataclasses.replace(search, llms=SIZES, tokens={"token_packer": TOKENS})
            ranked = next_cell.cells(cells, candidates, {})
            worth = {(cell.N, cell.V): cell.worth for cell in ranked}
            left.sort(key=lambda i: -worth.get(grid[i], 0.0))
        known.append(left.pop(0))
    spent = sum(search.cost.training(*grid[i], "token_packer") for i in known)
    choice = (candidates[0].N, candidates[0].V)
    return dict(cells=len(known), flops=spent, regret=regret(law, candidates), choice=choice)


def orders(worlds: int) -> dict:
    """Cells, FLOPs and true regret of the grid, of --next and of a random order."""
    found: dict[str, list[dict]] = {"grid": [], "next": [], "random": []}
    for world in range(worlds):
        rng = np.random.default_rng(world)
        law = planted(rng)
        while law.form != "multiplicative":
            law = planted(rng)
        for order, results in found.items():
            results.append(until(law, world, order))
        print(world, {k: (r[-1]["cells"], round(r[-1]["regret"], 4)) for k, r in found.items()},
              flush=True)  # fmt: skip
    grid = found["grid"]
    return dict(worlds=worlds, start=len(FEW), enough=ENOUGH, orders={
        order: dict(
            cells=float(np.mean([r["cells"] for r in results])),
            flops_of_grid=float(np.mean(
                [r["flops"] / g["flops"] for r, g in zip(results, grid, strict=True)])),
            same_choice=float(np.mean(
                [r["choice"] == g["choice"] for r, g in zip(results, grid, strict=True)])),
            true_regret=float(np.mean([r["regret"] for r in results])),
        )
        for order, results in found.items()
    })  # fmt: skip


def until_on_rows(points: Points, flops: float, order: str, start: list[int]) -> dict:
    """Measured rows, taken one after the other until the expected regret is CLOSE, and the choice.

    The rows are those of a grid with one row a cell; the choice is among its N and V.
    """
    sizes, tokens = (tuple(map(float, np.unique(x))) for x in (points.N, points.V))
    cost = costs.PaperCost(costs.Workload(((float(points.Q.mean()), 1.0),)))
    known, left = list(start), [i for i in range(len(points)) if i not in start]
    if order == "grid":
        known, left = list(range(len(points))), []
    elif order != "next":
        left = list(np.random.default_rng(int(order)).permutation(left))
    while True:
        here = points.where(np.isin(np.arange(len(points)), known))
        mixture = alone(fit(here, "multiplicative", bootstrap=200, intervals=False))
        search = planner.Search(mixture, cost, planner.Budget((("flops", flops),)), sizes,
                                {"token_packer": list(tokens)})  # fmt: skip
        candidates = search.candidates()
        if decision.odds(search.draws(candidates)).regret.min() <= CLOSE or not left:
            choice = (candidates[0].N, candidates[0].V)
            return dict(cells=len(known), flops=float((points.N * points.V)[known].sum()),
                        choice=choice)  # fmt: skip
        if order == "next":
            ranked = next_cell.cells(search, candidates, {})
            worth = {(cell.N, cell.V): cell.worth for cell in ranked}
            left.sort(key=lambda i: -worth.get((points.N[i], points.V[i]), 0.0))
        known.append(left.pop(0))


def on_rows(path: Path, family: str, budgets: int = 12) -> dict:
    """How many cells of a finished grid its decisions needed, from its corners and middle on."""
    points = records.points(runs.of(records.read(path)).main, family)
    order = np.lexsort((points.V, points.N))
    points = Points(
        points.N[order], points.V[order], points.Q[order], points.error[order],
        points.stderr[order], [points.label[i] for i in order],
    )  # fmt: skip
    sizes, tokens = np.unique(points.N), np.unique(points.V)
    first = {(n, v) for n in (sizes[0], sizes[-1]) for v in (tokens[0], tokens[-1])}
    first |= {(sizes[len(sizes) // 2], v) for v in tokens[1:3]}
    start = [i for i in range(len(points)) if (points.N[i], points.V[i]) in first]
    flops = 2e9 * points.N * (points.Q + points.V)
    found: dict[str, list[dict]] = {}
    for limit in np.geomspace(flops.min() * 1.5, flops.max(), budgets):
        for how in ("grid", "next", *map(str, range(5))):
            one = until_on_rows(points, float(limit), how, start)
            found.setdefault(how if how in ("grid", "next") else "random", []).append(one)
        print(f"{limit:.3g}", found["grid"][-1]["choice"], found["next"][-1], flush=True)
    grid = found["grid"]
    what = dict(rows="/".join(path.parts[-3:]), family=family, start=len(start), enough=CLOSE)
    return what | dict(budgets=budgets, orders={
        how: dict(
            cells=float(np.mean([r["cells"] for r in results])),
            same_choice=float(np.mean([
                r["choice"] == grid[i * len(grid) // len(results)]["choice"]
                for i, r in enumerate(results)])),
        )
        for how, results in found.items()
    })  # fmt: skip


def main() -> None:
    """Runs a study, prints each world and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--study", choices=("chances", "next", "rows"), default="chances")
    parser.add_argument("--worlds", type=int, default=200)
    parser.add_argument("--rows", type=Path, default=facts.HOME / "docs/results/demo/rows.jsonl")
    parser.add_argument("--family", default="reasoning")
    parser.add_argument("--out")
    options = parser.parse_args()
    question = {"chances": "Is a choice given p best that often?",
                "next": "How many cells does a decision need?",
                "rows": "How many cells of a grid did its decisions need?",
                }[options.study]  # fmt: skip
    result = facts.of_run(question, threads=1, packages=("numpy", "scipy"))
    if options.study == "rows":
        result |= on_rows(options.rows, options.family)
    else:
        study = chances if options.study == "chances" else orders
        result |= study(options.worlds)
    print(facts.write(result, f"planning-{options.study}", options.out))


if __name__ == "__main__":
    main()
