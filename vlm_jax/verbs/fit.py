# SPDX-License-Identifier: Apache-2.0
"""Fits a scaling law with intervals to results: law.json, comparison.csv and figures.

    vlm-jax fit --rows=runs/demo/rows.jsonl --out=runs/law
    vlm-jax fit --rows=mine.csv --rows=theirs.csv --out=runs/law --n-unit=billions
    vlm-jax fit --rows=scores --out=runs/law
    vlm-jax fit --rows=runs/demo_selection/rows.jsonl --compressor=all --out=runs/laws
    vlm-jax fit --published=reasoning --out=runs/law
    vlm-jax fit --published=methods --compressor=mmtok --out=runs/law
    vlm-jax fit --published=methods --rows=mine.csv --out=runs/law

docs/law.md explains the forms, the intervals and the columns of a table.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vlm_jax.cost import chips
from vlm_jax.law import published
from vlm_jax.law.forms import FORMS
from vlm_jax.rows import scores, tables
from vlm_jax.verbs import cli
from vlm_jax.verbs.parser import Parser

if TYPE_CHECKING:
    from vlm_jax.law.families import Fitted
    from vlm_jax.rows.measured import Measured

METHODS = "methods"  # of --published
ALL = "all"  # of --compressor


def add_flags(parser: Parser) -> None:
    """The flags of the verb."""
    parser.add_argument(
        "--rows",
        action="append",
        metavar="FILE",
        help="results: rows.jsonl of a grid, a .csv table, .json of lmms-eval, or scores of "
        "`vlm-jax score` (.jsonl, or a folder of them); repeat the flag for more",
    )
    parser.add_argument(
        "--published",
        choices=[METHODS, *sorted(published.ACCURACY)],
        help="the measurements of arXiv 2411.03312 instead; or 'methods': a law for each published "
        "compressor, alone or together with --rows of another",
    )
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for law.json and the other files")
    add(
        "--form",
        default="multiplicative",
        choices=list(FORMS),
        metavar="FORM",
        help=f"of the law: {', '.join(FORMS)}",
    )
    add("--family", metavar="NAME", help="one family or task (default: all and their mean)")
    add(
        "--compressor",
        metavar="METHOD",
        help="of a grid's rows, such as pool or 'quecc, query separate' (default: most cells), of "
        "a table's column `method`, or of --published=methods; 'all': a law for each method of the "
        "rows, in a folder of its name, and methods.csv",
    )
    add(
        "--bootstrap",
        type=int,
        metavar="N",
        default=1000,
        help="resamples for the bands of the figures; 0 draws no bands",
    )
    add("--seed", type=cli.seed_flag, metavar="N", default=0, help="of the resampling")
    add(
        "--huber",
        type=float,
        metavar="ERROR",
        help="residual, as a fraction, above which a row counts linearly (default: plain squares)",
    )
    add(
        "--weights",
        default="stderr",
        choices=("stderr", "equal"),
        help="of the rows: by their standard errors, or equal",
    )
    add(
        "--n-unit",
        choices=sorted(tables.N_UNITS),
        help="unit of a table's column N (default: billions)",
    )
    add(
        "--mme",
        type=int,
        metavar="POINTS",
        default=scores.PERCEPTION,
        choices=sorted(scores.MME),
        help="of scores: what MME's points are divided by, 2000 (perception) or 2800 (with "
        "cognition)",
    )
    add(
        "--tasks",
        metavar="FILE",
        help="of results of lmms-eval: a table (TOML) of families, metrics and divisors, over the "
        "one in vlm_jax/rows/lmms_eval.toml (default: none)",
    )
    add("--text-tokens", type=float, metavar="Q", default=0.0, help="text tokens of rows without Q")
    add(
        "--chip",
        default="v5e",
        choices=list(chips.CHIPS),
        metavar="CHIP",
        help=f"of the latency figures: {', '.join(chips.CHIPS)}",
    )


def run(options: argparse.Namespace) -> int:
    """Fits, writes, draws; 0."""
    from vlm_jax.reports.fitted import without_draws

    if not options.rows and not options.published:
        raise ValueError("nothing to fit: give --rows or --published")
    if options.rows and options.published not in (None, METHODS):
        raise ValueError(
            f"--published={options.published} is fitted alone: leave --rows out, or pool your rows "
            f"with --published={METHODS}"
        )
    if options.compressor == ALL:
        return run_all(options)
    measurements = read(options)
    fit = fitted_to(measurements, options)
    files = write(fit, measurements, Path(options.out), options)
    print(json.dumps(without_draws(fit.fields | {"files": files}), allow_nan=False))
    return 0


def run_all(options: argparse.Namespace) -> int:
    """A law for each method of the rows, in a folder of its name, and their table; 0."""
    from vlm_jax.reports import method_laws
    from vlm_jax.reports.cost_figures import slug
    from vlm_jax.rows import measured

    if options.published:
        raise ValueError(f"--compressor={ALL} is for --rows alone: leave --published out")
    table, missing, files = [], {}, []
    for method in measured.methods_of(options.rows, n_unit=options.n_unit):
        measurements = read(argparse.Namespace(**vars(options) | {"compressor": method}))
        try:
            fit = fitted_to(measurements, options)
        except ValueError as reason:
            missing[method] = str(reason)
            say([f"{method}: no law: {reason}"])
            continue
        files += write(fit, measurements, Path(options.out) / slug(method), options)
        table += method_laws.lines(method, measurements, fit)
    if not table:
        reasons = "; ".join(f"{method}: {reason}" for method, reason in missing.items())
        raise ValueError(f"no method of these rows has a law: {reasons}")
    files.append(str(method_laws.write(table, Path(options.out) / "methods.csv")))
    print(json.dumps({"methods": table, "no_law": missing, "files": files}, allow_nan=False))
    return 0


def read(options: argparse.Namespace) -> "Measured":
    """What is fitted."""
    from vlm_jax.rows import measured

    if options.published == METHODS and not options.rows:
        return measured.Measured({}, {}, [], method=options.compressor)
    if options.published and not options.rows:
        return measured.of_published(options.published, text_tokens=options.text_tokens)
    measurements = measured.read(
        options.rows,
        compressor=options.compressor,
        family=options.family,
        n_unit=options.n_unit,
        text_tokens=options.text_tokens,
        mme=options.mme,
        tasks_table=options.tasks,
    )
    say([measurements.note] if measurements.note else [])
    return measurements


def fitted_to(measurements: "Measured", options: argparse.Namespace) -> "Fitted":
    """The laws of the measurements. ValueError if they determine none."""
    import numpy
    import scipy

    from vlm_jax.law import families
    from vlm_jax.rows import measured

    used = [f"published {options.published}"] if options.published else []
    source = ", ".join([*(options.rows or []), *used])
    if options.published == METHODS:
        fit = families.fit_methods(
            measurements.families,
            method=measurements.method,
            source=source,
            bootstrap=options.bootstrap,
            seed=options.seed,
        )
    else:
        fit = families.fit_families(
            measurements.families,
            measurements.tasks,
            options.form,
            mean=measured.MEAN,
            method=measurements.method,
            source=source,
            exponents_of=options.published,
            bootstrap=options.bootstrap,
            seed=options.seed,
            huber=options.huber,
            weighting=options.weights,
        )
    say(fit.words)
    names = ("bootstrap", "seed", "huber", "weights")
    fit.fields["made_by"] = {
        "rows": options.rows or f"published {options.published}",
        **{name: getattr(options, name) for name in names},
        "versions": {"numpy": numpy.__version__, "scipy": scipy.__version__},
    }
    if measurements.about:
        fit.fields["scores"] = measurements.about
    return fit


def write(
    fit: "Fitted", measurements: "Measured", out: Path, options: argparse.Namespace
) -> list[str]:
    """Writes the files of a fit into a folder and draws; their paths."""
    from vlm_jax.reports import fitted

    files = fitted.write(fit, out)
    drawn: list[Path] = []
    videos = any(points.frames is not None for points in measurements.families.values())
    if videos:
        say(["no figures: they are of images, and these rows are of clips of several frames"])
    elif options.published != METHODS:
        drawn, notes = fitted.draw(
            measurements.families, fit.laws, out,
            rows=measurements.rows, chip=chips.CHIPS[options.chip],
        )  # fmt: skip
        say(notes)
    return [str(path) for path in [*files, *drawn]]


def say(lines: list[str]) -> None:
    """Prints lines on stderr."""
    for line in lines:
        print(line, file=sys.stderr)
