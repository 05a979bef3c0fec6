# SPDX-License-Identifier: Apache-2.0
"""One law for each published compression method, and a new method's law pooled with theirs.

`published_points.csv` holds 59 published points of 12 methods with their sources (MMTok, arXiv
2508.18264, tables 1, 17 and 21; arXiv 2411.03312, table 1; HTC-VLM, table 1; LLaVA-Mini, arXiv
2501.03895, table 1). The error is 1 - mean(GQA, MMBench, POPE F1), the three benchmarks that all
have. A method's error flattens at its many-token end, so its law is

    error = N^-alpha (A + C V^-beta)

which is `add_interact` with B and D held at 0 and gamma at -alpha. alpha is shared by the methods.
"""

import csv
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vlm_jax.law.answer import Answer, measured_cells
from vlm_jax.law.forms import FORMS
from vlm_jax.law.law import Law, logarithmic
from vlm_jax.law.points import Points
from vlm_jax.law.solve import predict, solve, starts

FILE = Path(__file__).with_name("published_points.csv")
FAMILY = "mean of GQA, MMBench and POPE F1"
SHARED = ("GQA", "MMB", "POPE_F1")  # percent, in the columns of FILE
LINES = ("LLaVA-1.5-7B", "LLaVA-1.5-13B")  # of one recipe: their points have a common curve
UNCOMPRESSED = "none"  # in the column "method" of FILE: all 576 tokens
FORM = "add_interact"
NAMES = FORMS[FORM].names  # of its parameter vector
FEWEST_TOKENS = {"free": 8.0, "trained": 1.0}
FEWEST_CELLS = 3  # own token counts of a method with a law
INSIDE_THE_LLM = ("fastv", "sparsevlm")  # V is a mean over layers
NOTES = (
    "Mean of three benchmarks (GQA, MMBench, POPE F1), one family of models (LLaVA-1.5, 7B and "
    "13B), no seeds and no standard errors.",
    "Two groups of sources with different evaluation code: training-free methods from MMTok, "
    "trained compressors from arXiv 2411.03312.",
    "Training-free methods are fitted from 8 tokens up: below, their scores fall to that of no "
    "tokens at all, which no power law follows.",
    "The full 576 tokens of the uncompressed model are the last point of every method's curve.",
    "alpha rests on two LLMs, 7B and 13B, at equal tokens: a third would move it more than its "
    "interval says.",
    "B and D are held at 0 and gamma at -alpha; intervals are quantiles of draws.",
)
PRIOR = 20_000  # draws of a curve's shape before the new cells are seen
JITTER = {"beta": 0.3, "rest": 0.5}  # how far, in logarithms, a new method may lie beside a known
FEW = 50.0  # effective draws below which the new cells contradict all published methods


@dataclass(frozen=True)
class Published:
    """The laws of the published methods.

    Attributes:
      points: method -> its points, the full 576 tokens last.
      training: method -> "trained" or "free".
      laws: method -> its law with draws; in each draw all have one alpha.
      best: method -> Q -> the V of its measured ones with the least error at fixed N (Q + V), its
        share of the draws, and the V of the other draws.
      alone: method with too few token counts for a law -> its (V, error).
      scatter, dof: the standard deviation around all curves, and its degrees of freedom.
    """

    points: dict[str, Points]
    training: dict[str, str]
    laws: dict[str, Law]
    best: dict[str, dict[str, dict[str, Any]]]
    alone: dict[str, list[tuple[float, float]]]
    scatter: float
    dof: int

    def answer(self, method: str) -> Answer:
        """The law of a method as what answers, see `answer.Answer`."""
        cells = measured_cells(self.points[method], float("nan"))
        return Answer.alone(self.laws[method], cells)


def rows() -> list[dict[str, str]]:
    """The lines of FILE."""
    with open(FILE, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def error_of(row: Mapping[str, str]) -> float:
    """1 - the mean of the shared benchmarks of a line, a fraction."""
    return 1 - sum(float(row[name]) for name in SHARED) / (100 * len(SHARED))


def fit_published(*, bootstrap: int = 1000, seed: int = 0) -> Published:
    """Fits every method of FILE that has enough token counts; equal seeds give equal laws."""
    curves: dict[str, list[tuple[float, float, float, str]]] = defaultdict(list)
    alone: dict[str, list[tuple[float, float]]] = defaultdict(list)
    training, full = {}, []
    for row in rows():
        V, method = float(row["V"]), row["method"]
        place = float(row["N_billion"]), V, error_of(row), row["model"]
        if method == UNCOMPRESSED:
            full.append(place)
        elif V > 0 and row["model"] not in LINES:
            alone[method].append((V, place[2]))
        elif V >= FEWEST_TOKENS.get(row["training"], np.inf):
            curves[method].append(place)
            training[method] = row["training"]
    points = {}
    for method, places in sorted(curves.items()):
        if len({V for _, V, *_ in places}) < FEWEST_CELLS:
            alone[method] += [(V, e) for _, V, e, _ in places]
            continue
        sizes = {N for N, *_ in places}
        points[method] = _points(sorted(places) + [p for p in full if p[0] in sizes])
    alpha, spread, clusters = _shared_alpha(points)
    rng = np.random.default_rng(seed)
    best, left = {}, 0.0
    for method, own in points.items():
        best[method], loss = _curve(own, own.error[None], np.array([alpha]), rng=rng)
        left += float(loss[0])
    dof = sum(len(own) - 3 for own in points.values())
    scatter = float(np.sqrt(left / dof))
    alphas = alpha + spread * rng.standard_t(clusters - 1, bootstrap)
    widen = np.sqrt(dof / rng.chisquare(dof, (bootstrap, 1)))
    laws = {}
    for method, own in points.items():
        draws = np.empty((0, len(NAMES)))
        if bootstrap:
            exact = predict(_design(own), logarithmic(FORM, best[method]))
            noise = scatter * widen * rng.standard_normal((bootstrap, len(own)))
            draws, _ = _curve(own, exact + noise, alphas, near=best[method])
        laws[method] = _law(own, best[method][0], draws, scatter, dof)
    found = Published(points, training, laws, {}, dict(alone), scatter, dof)
    found.best.update({method: best_tokens(own, laws[method]) for method, own in points.items()})
    return found


def pooled(
    points: Points, known: Published, *, method: str = "", bootstrap: int = 1000, seed: int = 0
) -> Law:
    """The law of a new method from a few cells and from the shapes of the published curves.

    The shape (alpha, beta and A / C) of the new curve is one of a published method, moved by
    JITTER; its level is free, because the new cells may be of other benchmarks. The cells choose
    among PRIOR such shapes by their likelihood, with standard errors where all have one, and the
    published scatter otherwise. Half of the shapes are those of `method` if it is published.

    Raises ValueError for cells of one number of visual tokens and without draws.
    """
    if bootstrap < 1:
        raise ValueError("pooling with published methods needs --bootstrap of 1 or more draws")
    if len(np.unique(points.V)) < 2:
        raise ValueError(
            f"all cells have {points.V[0]:g} visual tokens: a curve needs two token counts at least"
        )
    rng = np.random.default_rng(seed)
    names = list(known.laws)
    weight = np.array([1.0 + (len(names) - 2) * (name == method) for name in names])
    samples = np.stack([known.laws[name].drawn for name in names])
    which = rng.choice(len(names), PRIOR, p=weight / weight.sum())
    prior = samples[which, rng.integers(0, samples.shape[1], PRIOR)]
    flat, steep, alpha, beta = (prior[:, NAMES.index(name)] for name in ("A", "C", "alpha", "beta"))
    beta = beta * np.exp(JITTER["beta"] * rng.standard_normal(PRIOR))
    rest = flat / np.maximum(steep, 1e-12) * np.exp(JITTER["rest"] * rng.standard_normal(PRIOR))
    log_n, log_v = np.log(points.N), np.log(points.V)
    shape = np.exp(-beta[:, None] * log_v) + rest[:, None]
    logs = np.log(np.maximum(points.error, 1e-9)) + alpha[:, None] * log_n - np.log(shape)
    told = bool(np.all(np.isfinite(points.stderr)) and np.all(points.stderr > 0))
    sd = np.maximum(points.stderr, known.scatter / 3) if told else known.scatter
    precision = np.broadcast_to((points.error / sd) ** 2, logs.shape)
    level = (precision * logs).sum(1) / precision.sum(1)
    squares = (precision * (logs - level[:, None]) ** 2).sum(1)
    # the noise is known as well as the published scatter is: Student's t with its freedom
    likelihood = -0.5 * (known.dof + len(points) - 1) * np.log1p(squares / known.dof)
    share = np.exp(likelihood - likelihood.max())
    share /= share.sum()
    effective = 1 / float((share**2).sum())
    chosen = rng.choice(PRIOR, bootstrap, p=share)
    freedom = known.dof + len(points) - 1
    scale = np.sqrt((known.dof + squares[chosen]) / rng.chisquare(freedom, bootstrap))
    level = level[chosen] + scale * rng.standard_normal(bootstrap) / np.sqrt(precision[0].sum())
    steep = np.exp(level)
    draws = _vectors(steep * rest[chosen], steep, alpha[chosen], beta[chosen])
    curves = predict(_design(points), logarithmic(FORM, draws))
    # the draw nearest to the middle curve, of those whose alpha is no extreme one
    low, high = np.quantile(alpha[chosen], [0.4, 0.6])
    away = ((curves - np.median(curves, 0)) ** 2).sum(1)
    away[(alpha[chosen] < low) | (alpha[chosen] > high)] = np.inf
    middle = draws[away.argmin()]
    noise = float(np.sqrt(np.mean(np.square(sd)))) if told else known.scatter
    law = _law(points, middle, draws, noise, known.dof)
    law.notes[:] = [
        f"Pooled: {len(points)} cells choose among the shapes of {len(names)} published methods; "
        "what they do not tell is as wide as those methods differ.",
        *NOTES,
    ]
    if effective < FEW:
        law.notes.insert(0, (
            f"These cells are unlike every published method ({effective:.0f} effective draws): "
            "measure more of them and fit them alone."
        ))  # fmt: skip
    return law


def best_tokens(points: Points, law: Law, texts: tuple[int, ...] = (0, 50)) -> dict[str, Any]:
    """Q -> the measured V of least error at fixed N (Q + V): "V", its "share", and "others".

    At a fixed budget N falls as 1 / (Q + V), which multiplies the error by (Q + V)^alpha.
    """
    tokens = np.unique(points.V)
    samples = law.drawn
    alpha = samples[:, NAMES.index("alpha"), None]
    errors = predict(
        _design(points, N=np.ones(len(tokens)), V=tokens), logarithmic(FORM, samples)
    )  # N^-alpha is in the factor
    found = {}
    for Q in texts:
        at = tokens[(errors * (Q + tokens) ** alpha).argmin(1)]
        values, counts = np.unique(at, return_counts=True)
        own = law.error(1.0, tokens) * (Q + tokens) ** law.params["alpha"]
        chosen = float(tokens[own.argmin()])
        found[str(Q)] = {
            "V": chosen,
            "share": float(np.mean(at == chosen)),
            "others": {f"{v:g}": float(c / len(at)) for v, c in zip(values, counts, strict=True)},
        }
    return found


def _points(places: list[tuple[float, float, float, str]]) -> Points:
    N, V, error = (np.array([p[k] for p in places]) for k in range(3))
    nan = np.full(len(places), np.nan)
    return Points(N=N, V=V, Q=0 * N, error=error, stderr=nan, label=[p[3] for p in places])


def _shared_alpha(points: Mapping[str, Points]) -> tuple[float, float, int]:
    """alpha, its standard error and the number of methods behind it: 13B against 7B at equal V."""
    slopes = []
    for own in points.values():
        errors = {(n, v): e for n, v, e in zip(own.N, own.V, own.error, strict=True)}
        sizes = sorted({n for n, _ in errors})
        both = [v for n, v in errors if n == sizes[0] and (sizes[-1], v) in errors]
        if len(sizes) > 1:
            falls = [np.log(errors[sizes[0], v] / errors[sizes[-1], v]) for v in both]
            slopes.append(float(np.mean(falls)) / np.log(sizes[-1] / sizes[0]))
    return (
        float(np.mean(slopes)),
        float(np.std(slopes, ddof=1) / np.sqrt(len(slopes))),
        len(slopes),
    )


def _curve(
    points: Points,
    errors: np.ndarray,
    alphas: np.ndarray,
    *,
    rng: np.random.Generator | None = None,
    near: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Parameter vectors [m, 7] and losses [m] of curves through `errors` [m, n], given alphas."""
    scaled = errors * points.N ** alphas[:, None]
    design = np.log(points.V)[None, None]
    weight = np.ones(len(points))
    if near is None:
        assert rng is not None
        guesses = starts(design, scaled[0], weight, 24, rng)
        theta, loss = solve(design, scaled, weight, guesses)
        theta, loss = theta[loss.argmin()][None], loss.min()[None]
    else:
        steep, flat, beta = (near[0, NAMES.index(name)] for name in ("C", "A", "beta"))
        guess = np.array([np.log(max(steep, 1e-12)), flat, beta])
        theta, loss = solve(design, scaled, weight, np.tile(guess, (len(errors), 1)))
    return _vectors(theta[:, 1], np.exp(theta[:, 0]), alphas, theta[:, 2]), loss


def _vectors(flat: np.ndarray, steep: np.ndarray, alpha: np.ndarray, beta: np.ndarray) -> Any:
    """Parameter vectors float64[m, 7] of curves N^-alpha (flat + steep V^-beta)."""
    vectors = np.zeros((len(steep), len(NAMES)))
    named = {"A": flat, "C": steep, "alpha": alpha, "beta": beta, "gamma": -alpha}
    for name, column in named.items():
        vectors[:, NAMES.index(name)] = column
    return vectors


def _design(points: Points, **at: np.ndarray) -> np.ndarray:
    N, V = at.get("N", points.N), at.get("V", points.V)
    return FORMS[FORM].design(N, V, np.zeros(len(N)))


def _law(points: Points, vector: np.ndarray, draws: np.ndarray, scatter: float, dof: int) -> Law:
    """The law of one curve with its draws."""
    missed = points.error - predict(_design(points), logarithmic(FORM, vector[None]))[0]
    named = dict(zip(NAMES, vector.tolist(), strict=True))
    fitted = ("A", "alpha", "beta", "C")
    ends = np.quantile(draws, [0.025, 0.975], axis=0).T if len(draws) else np.zeros((7, 0))
    intervals = {name: ends[NAMES.index(name)].tolist() for name in fitted} if len(draws) else {}
    return Law(
        form=FORM,
        params={name: named[name] for name in ("A", "alpha", "beta", "D", "B", "C", "gamma")},
        sse=float((missed**2).sum()),
        rmse=float(np.sqrt(np.mean(missed**2))),
        n=len(points),
        intervals=intervals,
        bootstrap_intervals=intervals,
        identified=dict.fromkeys(intervals, True),
        samples=draws if len(draws) else None,
        domain={k: [float(f(getattr(points, k))) for f in (np.min, np.max)] for k in "NVQ"},
        notes=list(NOTES),
        components={"total": {"sd": scatter, "dof": float(dof)}},
    )
