# SPDX-License-Identifier: Apache-2.0
"""Sentences derived by rules from rows and laws: what a run shows, and what is open.

A difference counts if it exceeds 1.96 standard errors; an effect of N or V counts if the 95 %
intervals of its exponent and of the error it removes both exclude zero. Everything else is open.
Sentences are plain text; the page escapes them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from vlm_jax.law import answer
from vlm_jax.reports import cells as table
from vlm_jax.reports import limits
from vlm_jax.reports.amounts import amount_text, parameters_text
from vlm_jax.reports.run import Run, mean_over_seeds
from vlm_jax.rows import records

SURE = 1.96  # standard errors: 95 % two-sided under a normal error
GREEK = {"alpha": "α", "beta": "β"}


@dataclass
class Findings:
    """Lists of (family, sentence): the answer, what the run shows, what it leaves open.

    The family is "" for a sentence about all families.
    """

    answer: list[tuple[str, str]] = field(default_factory=list)
    shows: list[tuple[str, str]] = field(default_factory=list)
    open: list[tuple[str, str]] = field(default_factory=list)


def number(x: int | float) -> str:
    """Three digits and a proper minus: 0.0123, −0.5, 36."""
    return f"{x:.3g}".replace("-", "−")


def interval(pair: Sequence[int | float]) -> str:
    """[low, high] with three digits each."""
    return f"[{number(pair[0])}, {number(pair[1])}]"


def derive(
    run: Run,
    laws: Mapping,
    *,
    reasons: Mapping[str, str],
    majority: Mapping[str, int | float],
) -> Findings:
    """The findings of a run.

    `laws` maps family -> Law; `reasons` maps a family without a law to the reason;
    `majority` maps a family to the score of always giving its commonest answers.
    """
    findings = Findings()
    for family in run.families:
        rows = [row for row in run.main if family in row.families]
        if family in laws and rows:
            _law(findings, family, laws[family], rows)
        elif family in reasons:
            findings.answer.append((family, f"No law, so no answer yet. {reasons[family]}"))
        _best_cells(findings, family, rows)
        _against_blind(findings, family, rows, run.blind)
        _against_other(findings, family, rows, run.other)
        _against_majority(findings, family, rows, majority.get(family))
    _between_families(
        findings, {f: law for f, law in laws.items() if not law.misfit.get("sentence")}
    )
    if not run.main:
        findings.answer.append(("", "There is no finished cell of the grid yet, so no answer."))
    else:
        findings.open += [("", sentence) for sentence in limits.of_cells(run.main)]
    return findings


def best_tokens(law, rows: Sequence) -> tuple[float, float, float] | None:
    """(best V, low, high of its 95 % interval) at the rows' mean Q and within their V.

    None if the law has no closed optimum.
    """
    draws = table.exponent_draws(law)
    if draws is None or law.form != "multiplicative" or not rows:
        return None
    Q, V = _mean_q(rows), _range_of_v(rows)
    best = float(table.best_tokens(law.params["alpha"], law.params["beta"], Q, V))
    low, high = np.percentile(table.best_tokens(*draws.T, Q, V), [2.5, 97.5])
    return best, float(low), float(high)


def _mean_q(rows: Sequence) -> float:
    return float(np.mean([row.Q for row in rows]))


def _range_of_v(rows: Sequence) -> tuple[float, float]:
    return float(min(row.V for row in rows)), float(max(row.V for row in rows))


def _law(findings: Findings, family: str, law, rows: Sequence) -> None:
    if law.misfit.get("sentence"):
        # what it says of N, V and D is not what the cells say
        return findings.answer.append((family, _cells_alone(family, law, rows)))
    if GREEK.keys() <= law.intervals.keys():
        gains = [_exponent(findings, family, law, name, rows) for name in GREEK]
        _what_to_buy(findings, family, law, rows, any(gains))
    if loose := [name for name, closed in law.identified.items() if not closed]:
        ends = ", ".join(f"{name} {interval(law.intervals[name])}" for name in loose)
        floor = " The error of a very large model is not known." if "D" in loose else ""
        findings.open.append((family, f"Not determined by these cells: {ends}.{floor}"))
    typical = np.sqrt(np.mean([row.families[family]["stderr"] ** 2 for row in rows]))
    if law.rmse > 2 * typical > 0:
        sentence = (
            f"The law misses the cells by {number(law.rmse)} (root mean square); the number of "
            f"questions alone explains {number(typical)}. The rest is the law's form or the chance "
            "of single training runs; this run cannot tell which."
        )
        findings.open.append((family, sentence))


def _exponent(findings: Findings, family: str, law, name: str, rows: Sequence) -> bool:
    """A sentence on one exponent and its reduction of error; True if both intervals exclude 0."""
    low, high = law.intervals[name]
    fall, ends, span = effect(law, name, rows)
    more = {"alpha": "a larger LLM", "beta": "more visual tokens"}[name]
    sentence = f"{GREEK[name]} = {number(law.params[name])} {interval((low, high))}"
    sentence = f"{span} the law's error falls by {number(fall)} {interval(ends)}; {sentence}"
    if low > 0 and ends[0] > 0:
        findings.shows.append((family, f"{more[0].upper()}{more[1:]} helped: {sentence}."))
    elif high < 0 and ends[1] < 0:
        findings.shows.append((family, f"{more[0].upper()}{more[1:]} hurt: {sentence}."))
    else:
        findings.open.append(
            (family, f"Whether {more} helped: {sentence}. An interval includes 0.")
        )
        return False
    return True


def effect(law, name: str, rows: Sequence) -> tuple[float, tuple[float, float], str]:
    """How much the law's error falls from the smallest to the largest measured N or V.

    `name` is "alpha" (N) or "beta" (V). Returns the fall, its 95 % interval from the bootstrap (the
    fall twice without draws) and the span in words; the other of N and V stays at its geometric
    mean, Q at its mean.
    """
    sizes, tokens = [row.llm_parameters / 1e9 for row in rows], [row.V for row in rows]
    N, V = (np.array([min(x), max(x)], float) for x in (sizes, tokens))
    if name == "alpha":
        V = np.full(2, np.sqrt(V[0] * V[1]))
        span = f"from {parameters_text(N[0])} to {parameters_text(N[1])} parameters"
    else:
        N = np.full(2, np.sqrt(N[0] * N[1]))
        span = f"from {V[0]:g} to {V[1]:g} visual tokens"
    Q = np.full(2, _mean_q(rows))
    errors = law.error(N, V, Q)
    fall = float(errors[0] - errors[1])
    draws = table.error_draws(law, N, V, Q)
    if draws is None:
        return fall, (fall, fall), span
    low, high = np.percentile(draws[:, 0] - draws[:, 1], [2.5, 97.5])
    return fall, (float(low), float(high)), span


def _what_to_buy(findings: Findings, family: str, law, rows: Sequence, helps: bool) -> None:
    chosen = best_tokens(law, rows)
    if chosen is None:
        return findings.answer.append((family, _at_one_cost(family, law, rows)))
    best, low, high = chosen
    lowest, highest = _range_of_v(rows)
    draws = table.exponent_draws(law)
    difference = np.percentile(draws[:, 0] - draws[:, 1], [2.5, 97.5])
    if not helps:
        none = "No advice: neither the LLM's size nor V has an effect that differs from zero."
        return findings.answer.append((family, none))
    if low <= lowest * 1.01 and high >= highest * 0.99:
        verdict = "Open: any number of visual tokens that was measured may be the best."
    elif difference[0] > 0:
        verdict = "Parameters before visual tokens (α > β)."
    elif difference[1] < 0:
        verdict = "Visual tokens before parameters (β > α)."
    else:
        verdict = f"Which to buy first is open: α − β lies in {interval(difference.tolist())}."
    beyond = ""
    if best in (lowest, highest):
        beyond = f" That is the {'most' if best == highest else 'fewest'} measured"
        beyond += ": more may be better still." if best == highest and best > 1 else "."
    findings.answer.append(
        (
            family,
            f"{verdict} With questions of {number(_mean_q(rows))} text tokens and a fixed cost "
            f"2N(Q+V), the law's best is {best:.0f} visual token{'s' * (round(best) != 1)}; 95 % "
            f"interval {low:.0f} to {high:.0f}, within the {lowest:g} to {highest:g} "
            f"measured.{beyond}",
        )
    )


def _at_one_cost(family: str, law, rows: Sequence) -> str:
    """The answer of a form whose best V depends on the cost."""
    told = "Other costs: the frontier, the planner."
    found = law.samples is not None and answer.best_tokens(
        answer.Answer.alone(law), records.points(rows, family)
    )
    if not found or found["best_V"] is None:
        return f"By the {law.form} form, the best V depends on the cost. {told}"
    cost = f"at a cost 2N(Q+V) of {amount_text(2e9 * found['best_at'])}FLOPs, that of a middle cell"
    best = f"the best measured V is {found['best_V']:g} (in {found['best_share']:.0%} of the draws)"
    return f"By the {law.form} form, {cost}, {best}. {told}"


def _cells_alone(family: str, law, rows: Sequence) -> str:
    """The answer where the law misses the cells: the best of what was measured, by cost."""
    Q = _mean_q(rows)
    sizes = {row.llm: row.llm_parameters for row in rows}
    cells = list(by_cell(rows, family).items())
    costs = np.array([sizes[llm] * (Q + V) for (llm, V), _ in cells])
    best = table.pareto(costs, [-score for _, (score, _) in cells])
    frontier = [cells[i] for i in np.argsort(costs, kind="stable") if best[i]]
    steps = ", ".join(
        f"{llm} with {V:g} ({number(score)} ± {number(SURE * spread)})"
        for (llm, V), (score, spread) in frontier[-5:]
    )
    return (
        f"No answer from the law: its {law.form} form {law.misfit['sentence']}. Of the measured "
        f"cells alone, at a cost of 2N(Q+V) with {number(Q)} text tokens, none is cheaper and "
        f"better than these, by rising cost: {steps}."
    )


def by_cell(rows: Sequence, family: str) -> dict:
    """(LLM, V) -> (mean score, standard error) over seeds."""
    grouped = {}
    for row in rows:
        grouped.setdefault((row.llm, row.V), []).append(row.families[family])
    return {key: mean_over_seeds(scores) for key, scores in grouped.items()}


def blind_scores(blind: Sequence, family: str) -> dict:
    """LLM -> (mean blind score, standard error) over seeds and all V of blind rows."""
    grouped = {}
    for row in blind:
        if family in row.families:
            grouped.setdefault(row.llm, []).append(row.families[family])
    return {llm: mean_over_seeds(scores) for llm, scores in grouped.items()}


def margin(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """Difference of two (score, standard error) and its standard error, as if independent.

    Both models answered the same questions, which usually makes the true error of the difference
    smaller: the test is conservative.
    """
    return one[0] - other[0], float(np.hypot(one[1], other[1]))


def _cell(key) -> str:
    return f"{key[0]} with V={key[1]:g}"


def _best_cells(findings: Findings, family: str, main: Sequence) -> None:
    if len(scores := by_cell(main, family)) < 2:
        return
    best = max(scores, key=lambda key: scores[key][0])
    equals = []
    for key, score in scores.items():
        difference, spread = margin(scores[best], score)
        if key != best and difference <= SURE * spread:
            equals.append(_cell(key))
    score, spread = scores[best]
    sentence = f"The best measured cell is {_cell(best)}, score {score:.3f} ± {spread:.3f}"
    if not equals:
        sentence += f", above every other by more than {SURE} standard errors."
    elif len(equals) <= 4:
        sentence += f"; not significantly better than {', '.join(equals)}."
    else:
        sentence += (
            f"; {len(equals)} of the other {len(scores) - 1} cells are not significantly worse."
        )
    findings.shows.append((family, sentence))


def _against_blind(findings: Findings, family: str, main: Sequence, blind: Sequence) -> None:
    floor, scores = blind_scores(blind, family), by_cell(main, family)
    pairs = {key: margin(score, floor[key[0]]) for key, score in scores.items() if key[0] in floor}
    if not pairs:
        if scores:
            sentence = "What the image itself adds: no blind model was run."
            findings.open.append((family, sentence))
        return
    above = [key for key, (difference, spread) in pairs.items() if difference > SURE * spread]
    if not above:
        sentence = (
            f"Whether any model sees: none of {len(pairs)} cells beats the blind score of its LLM "
            f"by more than {SURE} standard errors, so a law fitted to these scores has no meaning "
            "either."
        )
        findings.open.append((family, sentence))
        return
    largest = max(pairs, key=lambda key: pairs[key][0])
    difference, spread = pairs[largest]
    sentence = (
        f"{len(above)} of {len(pairs)} cells beat the blind score of their LLM by more than {SURE} "
        f"standard errors ({len(pairs) / 40:.1f} would by chance alone); the largest margin is "
        f"{difference:.3f} ± {spread:.3f}, {_cell(largest)}."
    )
    findings.shows.append((family, sentence))


def _against_other(findings: Findings, family: str, main: Sequence, other: Sequence) -> None:
    scores = by_cell(main, family)
    other = [row for row in other if family in row.families]
    for method in sorted({row.method for row in other}):
        rival = by_cell([row for row in other if row.method == method], family)
        pairs = [margin(scores[key], rival[key]) for key in rival if key in scores]
        if not pairs:
            continue
        better = sum(difference > SURE * spread for difference, spread in pairs)
        worse = sum(difference < -SURE * spread for difference, spread in pairs)
        sentence = f"{main[0].method} against {method} at the same LLM and V"
        if better or worse:
            sentence += f": better in {better} and worse in {worse} of {len(pairs)} cells."
            findings.shows.append((family, sentence))
        else:
            sentence += (
                f": no difference beyond {SURE} standard errors in any of {len(pairs)} cells."
            )
            findings.open.append((family, sentence))


def _against_majority(
    findings: Findings, family: str, main: Sequence, majority: int | float | None
) -> None:
    if majority is None or not (scores := by_cell(main, family)):
        return
    above = sum(score - majority > SURE * spread for score, spread in scores.values())
    sentence = (
        f"{above} of {len(scores)} cells beat always giving the commonest answer ({majority:.3f})"
    )
    if above:
        findings.shows.append((family, sentence + "."))
    else:
        sentence += ": the run does not show that anything beyond such a rule was learned."
        findings.open.append((family, sentence))


def _between_families(findings: Findings, laws: Mapping) -> None:
    for name, change in (("alpha", "a larger LLM"), ("beta", "more visual tokens")):
        families = sorted(family for family, law in laws.items() if name in law.intervals)
        for i, one in enumerate(families):
            for another in families[i + 1 :]:
                if laws[one].form != laws[another].form:
                    continue  # exponents of two forms say different things
                more, less = sorted((one, another), key=lambda f: -laws[f].params[name])
                high, low = laws[more].intervals[name], laws[less].intervals[name]
                ends = f"{GREEK[name]} {interval(high)} against {interval(low)}"
                if high[0] > low[1]:
                    told = f"{more} gains more from {change} than {less}: {ends} do not overlap."
                    findings.shows.append(("", told))
                else:
                    told = f"Which of {more} and {less} gains more from {change}: {ends} overlap."
                    findings.open.append(("", told))
