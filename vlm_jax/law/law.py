# SPDX-License-Identifier: Apache-2.0
"""A fitted law: predicts the error of (N, V) with a band, and lists what the points determine.

N LLM parameters in billions   V visual tokens   Q text tokens   P parameters   n points
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vlm_jax.law import components, misfit
from vlm_jax.law import intervals as likely
from vlm_jax.law.components import System
from vlm_jax.law.forms import FORMS, Numbers
from vlm_jax.law.points import Points
from vlm_jax.law.solve import LOG_COEFFICIENT, predict, solve, starts

SCHEMA = 2  # of law.json; 1 had no schema, answer, method and fitted_on
STARTS = 48  # on the published points the hardest form reached its best minimum from 3 of 64


@dataclass(frozen=True)
class Law:
    """One form with its fitted parameters; valid within `domain`.

    `params` and `intervals` (95 %, profile likelihood) are keyed by name. A, B and C are errors at
    N = 1 billion and one token, exponents are pure numbers, D is the error left at any size. `sse`
    and `rmse` = sqrt(sse / n) are unweighted, in units of error. `identified` says whether an
    interval is closed on both sides. `samples` float64[draws, P] holds bootstrap parameters in
    `FORMS[form].names` order, `bootstrap_intervals` their 95 % quantiles. `domain` is the fitted
    range of N, V and Q; `criteria` is aic, aicc, bic; `components` the standard deviations of
    models, cells, seeds and questions ("sd" is None where the rows do not tell it, "why" says why),
    and their "total" for a new cell; `misfit` the test of `misfit.test`, whose "sentence" is empty
    if the form fits.
    """

    form: str
    params: dict[str, float]
    sse: float
    rmse: float
    n: int
    intervals: dict[str, list[float]] = field(default_factory=dict)
    bootstrap_intervals: dict[str, list[float]] = field(default_factory=dict)
    identified: dict[str, bool] = field(default_factory=dict)
    samples: np.ndarray | None = None
    domain: dict[str, list[float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    criteria: dict[str, float | None] = field(default_factory=dict)
    components: dict[str, Any] = field(default_factory=dict)
    misfit: dict[str, Any] = field(default_factory=dict)

    @property
    def drawn(self) -> np.ndarray:
        """`samples`; ValueError for a law without draws."""
        if self.samples is None:
            raise ValueError("this law has no bootstrap draws: fit it with bootstrap=1000")
        return self.samples

    @property
    def scatter(self) -> tuple[float, float]:
        """(standard deviation, degrees of freedom) of a newly trained and measured cell."""
        if "total" in self.components:
            return self.components["total"]["sd"], self.components["total"]["dof"]
        dof = self.n - len(self.params)
        return float(np.sqrt(self.sse / dof)), dof

    def error(self, N: Numbers, V: Numbers, Q: Numbers = 0, *, frames: Numbers = 1) -> np.ndarray:
        """The predicted error, a fraction, shaped as N, V, Q and frames broadcast."""
        shape = np.broadcast_shapes(*map(np.shape, (N, V, Q, frames)))
        design = self._design(N, V, Q, frames)
        return predict(design, to_vector(self.form, self.params)[None])[0].reshape(shape)

    def band(
        self,
        N: Numbers,
        V: Numbers,
        Q: Numbers = 0,
        *,
        frames: Numbers = 1,
        level: float = 0.95,
        measured: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """(low, high): the band of the law at `level`, fractions, shaped as N, V and Q broadcast.

        Quantiles of the bootstrap draws, within 0..1; `measured` adds the scatter of one new
        measurement. Raises ValueError for a law without draws.
        """
        shape = np.broadcast_shapes(*map(np.shape, (N, V, Q, frames)))
        errors = predict(self._design(N, V, Q, frames), logarithmic(self.form, self.drawn))
        if measured:
            sd, dof = self.scatter
            # one for all places of a draw: as wide at each, and smooth between them
            errors = errors + sd * np.random.default_rng(0).standard_t(dof, (len(errors), 1))
        ends = np.quantile(errors, [0.5 - level / 2, 0.5 + level / 2], axis=0)
        low, high = np.clip(ends, 0.0, 1.0)
        return low.reshape(shape), high.reshape(shape)

    def _design(self, *place: Numbers) -> np.ndarray:
        return FORMS[self.form].design(*(x.ravel() for x in np.broadcast_arrays(*place)))

    def to_dict(self) -> dict[str, Any]:
        """The fields of law.json; the parameters are at the top level."""
        fields: dict[str, Any] = {
            "form": self.form,
            "formula": FORMS[self.form].formula,
            **self.params,
        }
        for name in ("sse", "rmse", "n", *OPTIONAL):
            fields[name] = getattr(self, name)
        if self.samples is not None:
            draws = [[float(f"{x:.6g}") for x in row] for row in self.samples]
            fields["samples"] = {"names": FORMS[self.form].names, "values": draws}
        return fields

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), allow_nan=False)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "Law":
        """The law in the parsed fields of law.json; other fields are ignored.

        Raises ValueError for an unknown form and for missing fields.
        """
        form = fields.get("form")
        if form not in FORMS:
            raise ValueError(f"not a law: form is {form!r}, allowed are {', '.join(FORMS)}")
        needed = [*ordered(form), "sse", "rmse", "n"]
        if missing := [name for name in needed if name not in fields]:
            raise ValueError(f"not a law: {', '.join(missing)} missing from a {form} law")
        samples = fields.get("samples")
        if samples is not None:
            columns = [samples["names"].index(name) for name in FORMS[form].names]
            samples = np.array(samples["values"], dtype=np.float64)[:, columns]
        return cls(
            form=form,
            params={name: float(fields[name]) for name in ordered(form)},
            sse=float(fields["sse"]),
            rmse=float(fields["rmse"]),
            n=int(fields["n"]),
            samples=samples,
            **{name: fields[name] for name in OPTIONAL if name in fields},
        )

    @classmethod
    def from_json(cls, text: str) -> "Law":
        """The law that `to_json` or `vlm-jax fit` wrote. Raises ValueError as `from_dict` does."""
        return cls.from_dict(json.loads(text))


OPTIONAL = (
    "intervals", "bootstrap_intervals", "identified", "domain", "notes", "criteria", "components",
    "misfit",
)  # fmt: skip


def ordered(form: str) -> list[str]:
    """Parameter names in reading order: A, alpha, beta, D, then the others of the form."""
    names = FORMS[form].names
    first = [name for name in ("A", "alpha", "beta", "D") if name in names]
    return first + [name for name in names if name not in first]


def to_vector(form: str, params: Mapping[str, float]) -> np.ndarray:
    """The solver's parameter vector, float64[P], from parameters by name."""
    return logarithmic(form, [[params[name] for name in FORMS[form].names]])[0]


def logarithmic(form: str, vectors: Numbers) -> np.ndarray:
    """Solver vectors [m, P], with logarithms of coefficients, from vectors of plain values."""
    terms = len(FORMS[form].coefficients)
    vectors = np.array(vectors, dtype=np.float64)
    vectors[:, :terms] = np.log(np.maximum(vectors[:, :terms], 1e-300))
    return vectors


def _linear(form: str, vectors: Numbers) -> np.ndarray:
    """Solver vectors [m, P] with coefficients for their logarithms; 0 at the search bound."""
    terms = len(FORMS[form].coefficients)
    vectors = np.array(vectors, dtype=np.float64)
    logs = vectors[:, :terms]
    vectors[:, :terms] = np.where(logs <= LOG_COEFFICIENT[0], 0.0, np.exp(logs))
    return vectors


def _by_name(form: str, rows: np.ndarray) -> dict[str, Any]:
    """Name -> its row (a number or [low, high]) as plain Python, in reading order."""
    named = dict(zip(FORMS[form].names, rows.tolist(), strict=True))
    return {name: named[name] for name in ordered(form)}


def check(points: Points, form: str) -> None:
    """Raises ValueError, with what to measure, if these points cannot determine this form."""
    if form not in FORMS:
        raise ValueError(f"no form {form!r}: choose one of {', '.join(FORMS)}")
    names = ordered(form)
    if len(points) <= len(names):
        raise ValueError(
            f"{len(points)} points cannot fit the {len(names)} parameters {', '.join(names)} of "
            f"the {form} law and leave one over: measure at least {len(names) + 1} cells"
        )
    for column, name, exponent in (
        (points.N, "LLM size", "alpha"),
        (points.V, "number of visual tokens", "beta"),
    ):
        if len(np.unique(column)) < 2:
            raise ValueError(
                f"all {len(points)} points have one {name} ({column[0]:g}), so {exponent} cannot "
                "be fitted: measure at least two, better four, evenly spaced on a log scale"
            )
    frames = np.unique(points.place[3])
    if FORMS[form].reads_frames and len(frames) < 2:
        raise ValueError(
            f"all {len(points)} points have one number of frames ({frames[0]:g}), which the "
            f"{form} form needs to vary: choose another --form, or add a column `frames`"
        )
    if len(frames) > 1 and not FORMS[form].reads_frames:
        raise ValueError(
            f"the points have {len(frames)} numbers of frames, which the {form} form does not "
            "read: pass --form=frames, or fit rows of one number"
        )
    if np.ptp(points.error) == 0:
        raise ValueError(
            f"all {len(points)} errors are {points.error[0]:g}: nothing depends on N or V, and "
            "there is no law to fit; check the column, or measure harder questions"
        )


def weights(points: Points, weighting: str = "stderr") -> np.ndarray:
    """Weights float64[n], mean 1: 1 / stderr^2 if all points have one ("stderr"), else equal.

    A standard error below half the median counts as that half: at scores near 0 or 1 the binomial
    formula claims a certainty that one cell cannot have.
    """
    if weighting not in ("stderr", "equal"):
        raise ValueError(f"no weighting {weighting!r}: choose stderr or equal")
    stderr = points.stderr
    if weighting == "equal" or not np.all(np.isfinite(stderr)) or not np.median(stderr) > 0:
        return np.ones(len(points))
    weight = np.maximum(stderr, 0.5 * np.median(stderr)) ** -2
    return weight / weight.mean()


def unweighted(points: Points, weighting: str = "stderr") -> list[str]:
    """A sentence if some points have a standard error and none counts because of the others."""
    missing = int((~np.isfinite(points.stderr)).sum())
    if weighting == "equal" or missing in (0, len(points)):
        return []
    return [
        f"{missing} of {len(points)} rows have no stderr, so all rows count equally: give it to "
        "all of them, or say --weights=equal."
    ]


def minimum(
    design: np.ndarray,
    rows: System,
    *,
    seed: int = 0,
    huber: float | int | None = None,
    near: np.ndarray | None = None,
) -> tuple[np.ndarray, float]:
    """The solver vector float64[P] of least loss from many starts and from `near`, and its loss."""
    guesses = starts(design, rows.mean, rows.total, STARTS, np.random.default_rng(seed))
    if near is not None:
        guesses = np.vstack([near, guesses])
    theta, loss = solve(
        design, rows.target[None], rows.weight[None], guesses, huber=huber, mix=rows.mix
    )
    return theta[loss.argmin()], float(loss.min())


def fit(
    points: Points,
    form: str = "multiplicative",
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    huber: float | None = None,
    weighting: str = "stderr",
    intervals: bool = True,
) -> Law:
    """Fits one form to the points by least squares from many starts; equal seeds give equal laws.

    `huber` is the residual, in units of error, beyond which a point counts linearly; rows then
    count as independent. `bootstrap` is the number of draws for `Law.band` (0: none). Raises
    ValueError if the points cannot determine the form.
    """
    check(points, form)
    if huber is not None and not huber > 0:
        raise ValueError(f"huber must be a positive residual in units of error, got {huber}")
    weight, y = weights(points, weighting), points.error
    rows = components.system(points, weight, alone=huber is not None)
    of_all = FORMS[form].design(*rows.place)
    binned = components.many(rows)
    few = components.condensed(rows) if binned else rows
    design = FORMS[form].design(*few.place)
    best, loss = minimum(design, few, seed=seed, huber=huber)
    if binned:
        theta, losses = solve(of_all, rows.target[None], rows.weight[None], best[None], huber=huber)
        best, loss = theta[0], float(losses[0])  # the minimum over all rows, from that over bins
    for _ in range(3 * rows.shared):
        rows = components.balanced(design, rows, best)
        best, _ = minimum(design, rows, seed=seed, near=best)
    everywhere = FORMS[form].design(*points.place)
    sse = float(((y - predict(everywhere, best[None])[0]) ** 2).sum())
    stderr = float(np.median(points.stderr))
    noise = components.noise(of_all, rows, best, float(np.mean(1 / weight)), stderr)
    found = misfit.test(of_all, rows, best, noise, stderr)
    fields: dict[str, Any] = {
        "form": form,
        "params": _by_name(form, _linear(form, best[None])[0]),
        "sse": sse,
        "rmse": float(np.sqrt(sse / len(y))),
        "n": len(y),
        "domain": {
            k: [float(x.min()), float(x.max())]
            for k, x in zip(components.PLACE, points.place, strict=True)
            if k != "frames" or points.frames is not None
        },
        "criteria": criteria(loss, len(rows.target), len(best)),
        "components": {k: {"sd": sd, "why": why} for k, (sd, why) in noise.components.items()}
        | {"total": {"sd": noise.sd, "dof": noise.sd_dof}},
        "misfit": found.to_dict(),
        "notes": unweighted(points, weighting)
        + [f"This form {found.sentence}."] * bool(found.sentence),
    }
    if binned:
        rows = components.condensed(
            rows, lambda *place: predict(FORMS[form].design(*place), best[None])[0]
        )
    if intervals:
        limits, bounded = likely.profile(design, rows, best, noise, huber=huber)
        by_name, closed = _by_name(form, _linear(form, limits.T).T), _by_name(form, bounded)
        fields["intervals"] = by_name
        fields["identified"] = {name: all(sides) for name, sides in closed.items()}
        fields["notes"] += in_words(fields["params"], by_name, closed)
    if bootstrap:
        samples = likely.draws(
            design, rows, best, noise, count=bootstrap, rng=np.random.default_rng(seed), huber=huber
        )
        fields["samples"] = _linear(form, samples)
        quantiles = np.quantile(fields["samples"], [0.025, 0.975], axis=0).T
        fields["bootstrap_intervals"] = _by_name(form, quantiles)
    return Law(**fields)


def criteria(loss: float, n: int, size: int) -> dict[str, float | None]:
    """AIC, AICc (None if n is too small) and BIC of Gaussian residuals, from a weighted loss.

    The variance counts as a parameter. Only differences between forms on the same points have a
    meaning.
    """
    k = size + 1
    misfit = n * np.log(max(loss, 1e-300) / n)
    aicc = float(misfit + 2 * k * n / (n - k - 1)) if n > k + 1 else None
    return {"aic": float(misfit + 2 * k), "aicc": aicc, "bic": float(misfit + k * np.log(n))}


EFFECTS = {
    "alpha": "the LLM's size",
    "beta": "the number of visual tokens",
    "gamma": "an interaction of size and tokens",
}


def in_words(
    params: Mapping[str, float], intervals: Mapping[str, Any], closed: Mapping[str, Any]
) -> list[str]:
    """One sentence for each parameter that the points do not determine."""
    notes = []
    for name, (low, high) in intervals.items():
        match closed[name]:
            case [True, True]:
                if name in EFFECTS and low < 0 < high:
                    notes.append(
                        f"{name}'s interval contains 0: no effect of {EFFECTS[name]} is visible."
                    )
            case [False, True] if name == "D":
                notes.append(
                    f"D is not identifiable: any floor from 0 to {high:.3g} fits these points "
                    "within 95 %, A and the exponents moving with it; the fitted "
                    f"{params['D']:.3g} is not the error of an infinite model."
                )
            case [False, True]:
                notes.append(
                    f"{name} has no lower limit: these points only keep it below {high:.3g}."
                )
            case [True, False]:
                notes.append(
                    f"{name} has no upper limit: these points only keep it above {low:.3g}."
                )
            case _:
                notes.append(f"{name} is not identifiable: these points exclude no value of it.")
    return notes
