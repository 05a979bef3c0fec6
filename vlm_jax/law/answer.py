# SPDX-License-Identifier: Apache-2.0
"""What answers for the error at (N, V, Q): the forms that fit, or else the measured cells alone.

`vlm-jax fit`, the report and the planner share this rule. Every form is fitted and tested; those
that fit share the draws by AICc and by the errors on sizes and token counts left out of the fit, so
that draws run over forms as well as over parameters. If no form fits, only what was measured can
be compared.

N LLM parameters in billions   V visual tokens   Q text tokens   error = 1 - score, a fraction
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vlm_jax.law import components
from vlm_jax.law.compare import compare
from vlm_jax.law.forms import FORMS, Numbers
from vlm_jax.law.law import Law, fit, logarithmic
from vlm_jax.law.points import Points
from vlm_jax.law.solve import predict

LAW, CELLS_ALONE = "law", "cells"
LEAST_SHARE = 0.01  # a form below it gets no draws
SAME = 1e-3  # a cell is the one asked for if no logarithm differs by more


@dataclass(frozen=True)
class Cells:
    """The measured means: N, V, Q, error and sd of each place, float64[n], and sd's dof.

    `sd` is the noise of a mean; nan where neither seeds nor standard errors tell it.
    """

    N: np.ndarray
    V: np.ndarray
    Q: np.ndarray
    error: np.ndarray
    sd: np.ndarray
    dof: float
    frames: np.ndarray | None = None

    def find(self, N: Numbers, V: Numbers, frames: Numbers = 1) -> np.ndarray:
        """int[places]: the cell measured at each (N, V, frames), within SAME.

        Raises ValueError for a place that was not measured.
        """
        at = [np.ravel(x) for x in np.broadcast_arrays(N, V, frames)]
        distance = np.maximum(
            np.abs(np.log(at[0][:, None] / self.N)), np.abs(np.log(at[1][:, None] / self.V))
        )
        if self.frames is not None:
            distance = np.maximum(distance, np.abs(np.log(at[2][:, None] / self.frames)))
        if (bad := distance.min(1) > SAME).any():
            n, v = at[0][bad][0], at[1][bad][0]
            raise ValueError(
                f"no form of the law fits, and N={n:g}, V={v:g} was not measured: ask for one of "
                f"the {len(self.N)} measured cells, or measure this one"
            )
        return distance.argmin(1)


@dataclass(frozen=True)
class Answer:
    """The rule's outcome for one family.

    Attributes:
      by: "law", or "cells" if no form fits.
      forms: form -> its law with draws, those that answer, best first; empty for cells.
      shares: form -> its share of the draws; they sum to 1.
      cells: what was measured.
      tests: form -> scatter, noise, chi_square, sentence, aicc, left_out, share.
      misfit: "" or a sentence: that no form fits, or that the asked one does not.
    """

    by: str
    forms: dict[str, Law]
    shares: dict[str, float]
    cells: Cells | None
    tests: dict[str, dict[str, Any]] = field(default_factory=dict)
    misfit: str = ""

    @property
    def counts_frames(self) -> bool:
        """Whether its errors depend on the number of frames."""
        return any(FORMS[form].reads_frames for form in self.forms) or (
            self.cells is not None and self.cells.frames is not None
        )

    def error(self, N: Numbers, V: Numbers, Q: Numbers = 0, *, frames: Numbers = 1) -> np.ndarray:
        """The expected error, shaped as N, V, Q and frames broadcast."""
        shape = np.broadcast_shapes(*map(np.shape, (N, V, Q, frames)))
        if self.by == CELLS_ALONE:
            N, V, _, frames = np.broadcast_arrays(N, V, Q, frames)
            cells = self._cells()
            return cells.error[cells.find(N, V, frames)].reshape(shape)
        errors = [
            share * self.forms[form].error(N, V, Q, frames=frames)
            for form, share in self.shares.items()
        ]
        return np.asarray(sum(errors), dtype=np.float64)

    def draws(
        self,
        N: Numbers,
        V: Numbers,
        Q: Numbers = 0,
        *,
        frames: Numbers = 1,
        count: int = 1000,
        measured: bool = False,
    ) -> np.ndarray:
        """Paired draws of the error at many places, float64[count, *shape of N, V, Q].

        Row d is one world: one form and one set of its parameters (or one drawing of the measured
        means) for all places, so that differences along a row are differences of the places.
        Errors lie within 0..1. `measured` adds the scatter of one newly trained model per place.
        The same arguments give the same draws. Raises ValueError for a law without draws, and for
        places that were not measured if `by` is "cells".
        """
        shape = np.broadcast_shapes(*map(np.shape, (N, V, Q, frames)))
        flat = [np.ravel(x) for x in np.broadcast_arrays(N, V, Q, frames)]
        rng = np.random.default_rng(0)
        if self.by == CELLS_ALONE:
            cells = self._cells()
            which = cells.find(flat[0], flat[1], flat[3])
            t = student(max(cells.dof, 1.0), count)[orders(count, len(cells.N))]
            errors = (cells.error + np.nan_to_num(cells.sd) * t)[:, which]
        else:
            errors = np.concatenate([
                self._of_form(form, flat, number, measured, rng)
                for form, number in self._numbers(count).items()
            ])  # fmt: skip
        return np.clip(errors, 0.0, 1.0).reshape(count, *shape)

    def _numbers(self, count: int) -> dict[str, int]:
        """Form -> its number of draws; they sum to count."""
        ends = np.round(np.cumsum(list(self.shares.values())) / sum(self.shares.values()) * count)
        return dict(zip(self.shares, np.diff(ends, prepend=0).astype(int).tolist(), strict=True))

    def _of_form(
        self, form: str, flat: list, number: int, measured: bool, rng: np.random.Generator
    ) -> np.ndarray:
        law = self.forms[form]
        rows = np.arange(number) % len(law.drawn)
        vectors = logarithmic(form, law.drawn[rows])
        errors = predict(FORMS[form].design(*flat), vectors)
        if measured:
            sd, dof = law.scatter
            errors = errors + sd * rng.standard_t(dof, errors.shape)
        return errors

    def _cells(self) -> Cells:
        if self.cells is None:
            raise ValueError("this law.json does not hold the measured cells: run vlm-jax fit anew")
        return self.cells

    def to_dict(self) -> dict[str, Any]:
        """The field "answer" of a law in law.json."""
        fields: dict[str, Any] = {"by": self.by, "misfit": self.misfit, "shares": self.shares}
        fields["forms"] = {form: law.to_dict() for form, law in self.forms.items()}
        if self.cells is not None:
            fields["cells"] = {
                k: [None if np.isnan(x) else float(x) for x in getattr(self.cells, k)]
                for k in ("N", "V", "Q", "error", "sd")
            } | {"dof": self.cells.dof}
            if self.cells.frames is not None:
                fields["cells"]["frames"] = self.cells.frames.tolist()
        fields["tests"] = self.tests
        return fields

    @classmethod
    def alone(cls, law: Law, cells: Cells | None = None) -> "Answer":
        """One law that answers everything."""
        return cls(LAW, {law.form: law}, {law.form: 1.0}, cells)

    @classmethod
    def from_dict(cls, section: Mapping[str, Any]) -> "Answer":
        """The answer of a law in the parsed fields of law.json: its top level, or one family.

        A file of before answers has the law alone. Raises ValueError as `Law.from_dict` does.
        """
        stored = section.get("answer")
        if stored is None:
            return cls.alone(Law.from_dict(section))
        held = stored.get("cells")
        cells = None
        if held:
            columns = ("N", "V", "Q", "error", "sd")
            arrays = {k: np.array(held[k], dtype=np.float64) for k in columns}
            frames = held.get("frames")
            frames = None if frames is None else np.array(frames, dtype=np.float64)
            cells = Cells(**arrays, dof=held["dof"], frames=frames)
        return cls(
            by=stored["by"],
            forms={form: Law.from_dict(law) for form, law in stored["forms"].items()},
            shares=dict(stored["shares"]),
            cells=cells,
            tests=stored.get("tests", {}),
            misfit=stored.get("misfit", ""),
        )


def best_tokens(found: Answer, points: Points) -> dict[str, Any]:
    """The measured V of least error at one cost: "best_V", its "best_share" of the draws, and the
    cost "best_at", N (Q + V) in billions, the middle of what was measured.

    Compared are the V whose N at that cost lies within twice the measured sizes. best_V is None if
    no form fits or nothing can be compared.
    """
    Q, tokens = float(points.Q.mean()), np.unique(points.V)
    cost = float(np.exp(np.log(points.N * (Q + points.V)).mean()))
    sizes = cost / (Q + tokens)
    inside = (sizes >= points.N.min() / 2) & (sizes <= points.N.max() * 2)
    fields = {"best_V": None, "best_share": None, "best_at": cost}
    if found.by == CELLS_ALONE or inside.sum() < 2:
        return fields
    errors = found.draws(sizes[inside], tokens[inside], Q)
    wins = np.bincount(errors.argmin(1), minlength=int(inside.sum()))
    most = int(wins.argmax())
    return fields | {
        "best_V": float(tokens[inside][most]), "best_share": float(wins[most] / wins.sum())
    }  # fmt: skip


def student(dof: float, count: int) -> np.ndarray:
    """float64[count]: the middles of `count` equal shares of Student's t, ascending."""
    from scipy.special import stdtrit

    return np.asarray(stdtrit(dof, (np.arange(count) + 0.5) / count))


def orders(count: int, columns: int) -> np.ndarray:
    """int[count, columns]: in each column the numbers below `count` in an order of its own.

    The order is that of a hash (the finalizer of MurmurHash3) of consecutive numbers, which a page
    repeats without a table: a Latin hypercube, whose every column has the same values.
    """
    x: np.ndarray = np.arange(count * columns, dtype=np.uint32).reshape(columns, count)
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return np.asarray((x ^ (x >> 16)).argsort(1).T)


def measured_cells(points: Points, stderr: float) -> Cells:
    """The mean of each place and its noise: of its seeds, and of `stderr`, which seeds share."""
    place = components.places(points)
    count = np.bincount(place)
    mean = np.bincount(place, points.error) / count
    first = np.unique(place, return_index=True)[1]
    dof = len(points) - len(count)
    variance = np.full(len(count), np.nan)
    if dof:
        pure = ((points.error - mean[place]) ** 2).sum() / dof
        variance = pure / count
    if np.isfinite(stderr):
        own = np.bincount(place, points.stderr**2) / count
        variance = np.nan_to_num(variance) + own
    return Cells(
        points.N[first], points.V[first], points.Q[first], mean, np.sqrt(variance),
        float(dof) if dof and not np.isfinite(stderr) else max(float(dof), 30.0),
        None if points.frames is None else points.frames[first],
    )  # fmt: skip


def answer(
    points: Points,
    asked: Law,
    *,
    bootstrap: int = 1000,
    seed: int = 0,
    huber: float | None = None,
    weighting: str = "stderr",
) -> tuple[Answer, list[dict[str, Any]]]:
    """Who answers, and the rows of `compare.compare`.

    `asked` is the law of the points that the command names: it answers with the other forms if it
    fits. The other arguments are those of `law.fit`.
    """
    options: dict[str, Any] = {"seed": seed, "huber": huber, "weighting": weighting}
    laws = {asked.form: asked}
    for form in FORMS:
        # without text in any row the two readings of T are one form
        if form != asked.form and not (FORMS[form].total_tokens and not points.Q.any()):
            try:
                laws[form] = fit(points, form, bootstrap=0, intervals=False, **options)
            except ValueError:
                continue
    comparison = compare(points, laws, **options)
    tests, shares = _shares(points, laws, {row["form"]: row for row in comparison})
    cells = measured_cells(points, float(np.median(points.stderr)))
    if not shares:
        best = min(laws, key=lambda form: laws[form].criteria["aic"] or 0.0)
        return Answer(
            CELLS_ALONE, {}, {}, cells, tests,
            f"no form of the law fits; the best, {best}, {laws[best].misfit['sentence']}: answers "
            f"come from the {len(cells.N)} measured cells alone",
        ), comparison  # fmt: skip
    misfit = ""
    if why := asked.misfit.get("sentence"):
        misfit = f"the {asked.form} form {why}: answers come from {', '.join(shares)}"
    forms = {}
    for form, share in shares.items():
        count = int(np.ceil(share * bootstrap))
        law = laws[form]
        if bootstrap and law.samples is None:
            law = fit(points, form, bootstrap=count, intervals=False, **options)
        forms[form] = replace(
            law, samples=None if law.samples is None else law.samples[:count],
            bootstrap_intervals={},
        )  # fmt: skip
    return Answer(LAW, forms, shares, cells, tests, misfit), comparison


def _shares(
    points: Points, laws: Mapping[str, Law], rows: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
    """Form -> its tests; and form -> its share of the draws, of those that fit, largest first.

    Half of the difference of two forms is that of AICc, which knows the inside of the grid; half is
    what they say of sizes and token counts they have not seen, one observation for each left out.
    """
    folds = len(np.unique(points.N)) + len(np.unique(points.V))
    tests, costs = {}, {}
    for form, law in laws.items():
        row = rows[form]
        known = [x for x in (row[f"leave_one_{k}_out_rmse"] for k in ("size", "V")) if x]
        out = float(np.sqrt(np.mean(np.square(known)))) if known else None
        tests[form] = dict(law.misfit) | {"aicc": row["aicc"], "left_out": out, "share": 0.0}
        if not law.misfit.get("sentence"):
            costs[form] = (row["aicc"], 2 * folds * np.log(max(out, 1e-300)) if out else None)
    if not costs:
        return tests, {}
    table = np.array(list(costs.values()), dtype=np.float64)  # None becomes nan
    table[:, np.isnan(table).all(0)] = 0.0
    table = np.where(np.isnan(table), np.inf, table - np.nanmin(table, 0))
    if not np.isfinite(table.sum(1)).any():
        table[np.isinf(table)] = 1e3
    share = np.exp(-0.25 * table.sum(1))
    share[share < LEAST_SHARE * share.sum()] = 0.0
    pairs = sorted(zip(costs, share / share.sum(), strict=True), key=lambda pair: -pair[1])
    shares = {form: float(part) for form, part in pairs if part}
    for form, part in shares.items():
        tests[form]["share"] = part
    return tests, shares
