# SPDX-License-Identifier: Apache-2.0
"""Results become a scaling law with intervals: law.json, comparison.csv and figures.

vlm-jax fit --rows=FILE.jsonl|csv|json --out=DIR      rows of a grid, a table, or lmms-eval results
vlm-jax fit --published=reasoning|ocr --out=DIR       the measurements of arXiv 2411.03312
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
import scipy

from vlm_jax.cost import chips, described
from vlm_jax.law import compare, intervals, law, published
from vlm_jax.law.forms import FORMS
from vlm_jax.law.points import of_cells
from vlm_jax.models.sizes import ViTSize
from vlm_jax.rows import records, tables
from vlm_jax.verbs import cli


def flags() -> argparse.ArgumentParser:
    """The flags of the verb."""
    parser = argparse.ArgumentParser(
        prog="vlm-jax fit", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--rows", action="append", help="results; may be given several times")
    source.add_argument("--published", choices=sorted(published.ACCURACY))
    parser.add_argument("--out", required=True, help="folder for law.json and all else")
    parser.add_argument("--form", default="multiplicative", choices=list(FORMS))
    parser.add_argument("--family", help="one family or task (default: all and their mean)")
    parser.add_argument(
        "--compressor", metavar="METHOD",
        help="of a grid's rows, such as pool or 'quecc, query separate' (default: most cells)",
    )  # fmt: skip
    parser.add_argument("--bootstrap", type=int, default=1000, help="draws; 0 leaves bands out")
    parser.add_argument("--resample", default="residuals", choices=intervals.RESAMPLINGS)
    parser.add_argument("--seed", type=cli.seed_flag, default=0, help="of the draws")
    parser.add_argument("--huber", type=float, help="residual beyond which a row counts linearly")
    parser.add_argument("--weights", default="stderr", choices=("stderr", "equal"))
    parser.add_argument("--n-unit", choices=sorted(tables.N_UNITS), help="of a table's column N")
    parser.add_argument("--text-tokens", type=float, default=0.0, help="Q of rows without a Q")
    parser.add_argument(
        "--chip", default="v5e", help=f"of the latency figures: {', '.join(chips.CHIPS)}"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    """Fits, writes, draws; 0, or 2 after saying on stderr what was wrong."""
    options = flags().parse_args(argv)

    def body() -> int:
        print(json.dumps(run(options), allow_nan=False))
        return 0

    return cli.report_errors("fit", body)


def run(options) -> dict:
    """The fit that the flags describe: what law.json holds, without draws, and the files made."""
    if options.bootstrap < 0:
        raise ValueError(f"--bootstrap must be 0 or more draws, got {options.bootstrap}")
    if options.chip not in chips.CHIPS:
        raise ValueError(f"--chip={options.chip}: choose one of {', '.join(chips.CHIPS)}")
    families, tasks, rows = read(options)
    top = next(iter(families))  # the mean over families where there are several
    how = {"seed": options.seed, "huber": options.huber, "weighting": options.weights}
    laws, table = {}, []
    for name, points in families.items():
        laws[name] = law.fit(
            points, options.form, bootstrap=options.bootstrap, resample=options.resample, **how
        )
        table += [{"family": name} | row for row in compare.compare(points, **how)]
        say(name, points, laws[name], table)
    fields = laws[top].to_dict() | {"family": top}
    fields["families"] = {name: fitted.to_dict() for name, fitted in laws.items() if name != MEAN}
    fields["tasks"] = {
        name: law.fit(points, options.form, bootstrap=0, **how).to_dict()
        for name, points in tasks.items()
    }
    fields["extrapolation"] = compare.extrapolate(
        families[top], laws[top], bootstrap=options.bootstrap, resample=options.resample, **how
    )
    if options.published:
        fields["published"] = against_published(options.published, families[top], laws[top])
    fields["made_by"] = {
        "rows": options.rows or f"published {options.published}",
        **{k: getattr(options, k) for k in ("bootstrap", "resample", "seed", "huber", "weights")},
        "versions": {"numpy": np.__version__, "scipy": scipy.__version__},
    }
    out = Path(options.out)
    out.mkdir(parents=True, exist_ok=True)
    lines = [f" {json.dumps(k)}: {json.dumps(v, allow_nan=False)}" for k, v in fields.items()]
    records.replace(out / "law.json", "{\n" + ",\n".join(lines) + "\n}\n")
    with open(out / "comparison.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ["family", *compare.COLUMNS])
        writer.writeheader()
        writer.writerows(table)
    drawn = draw(families, laws, out, rows=rows, chip=chips.CHIPS[options.chip])
    files = [out / "law.json", out / "comparison.csv", *drawn]
    fields |= {"files": [str(path) for path in files]}
    return without_draws(fields)


MEAN = "mean of families"


def read(options) -> tuple[dict, dict, list]:
    """Family -> Points, led by their mean where there are several; task -> Points; a grid's rows.

    The rows are those of the points, one by one; of other sources there are none, nor any tasks.
    """
    if options.published:
        points = published.points(options.published, text_tokens=options.text_tokens)
        return {options.published: points}, {}, []
    own = [records.is_rows(path) for path in options.rows]
    if any(own) and not all(own):
        raise ValueError("--rows mixes rows of a grid with other tables: fit them apart")
    if own[0]:
        every = [row for path in options.rows for row in records.read(path)]
        method = options.compressor or records.main_method(every)
        rows = records.of_method([row for row in every if not row.blind], method)
        print(say_rows(rows, every), file=sys.stderr)
        by = {kind: records.cells(rows, by=kind) for kind in ("families", "tasks")}
    else:
        how = {"n_unit": options.n_unit, "text_tokens": options.text_tokens}
        cells = [cell for path in options.rows for cell in tables.read(path, **how)]
        seen = set()
        for cell in cells:
            key = (cell.N, cell.V, cell.Q, cell.label, cell.seed)
            if key in seen:
                raise ValueError(
                    f"N={cell.N:g}, V={cell.V:g} (seed {cell.seed}) occurs twice in the files of "
                    f"--rows: keep one, or add a column `seed` if both were measured"
                )
            seen.add(key)
        by, rows = {"families": cells, "tasks": []}, []
    names = {kind: sorted({n for cell in cells for n in cell.errors}) for kind, cells in by.items()}
    if options.family is not None:
        kind = "tasks" if options.family in names["tasks"] else "families"
        return {options.family: of_cells(by[kind], options.family)}, {}, rows
    families = {name: of_cells(by["families"], name) for name in names["families"]}
    if len(families) > 1:
        families = {MEAN: of_cells(by["families"])} | families
    return families, {name: of_cells(by["tasks"], name) for name in names["tasks"]}, rows


def say_rows(rows, every) -> str:
    """Which rows of a grid the law is fitted to, in a sentence."""
    others = {name: n for name, n in records.methods(every).items() if name != rows[0].method}
    left = [f"{n} cells of {name}" for name, n in others.items()]
    left += [f"{sum(row.blind for row in every)} blind rows"] * any(row.blind for row in every)
    return f"{len(rows)} rows of {rows[0].method}" + (
        f"; not used: {', '.join(left)}" if left else ""
    )


def say(name, points, fitted, table) -> None:
    """The fit in words and numbers, on stderr."""
    sizes, tokens = np.unique(points.N), np.unique(points.V)
    print(
        f"{name}: {len(points)} points, {len(sizes)} LLM sizes ({sizes[0]:g} to {sizes[-1]:g} "
        f"billion), {len(tokens)} token counts ({tokens[0]:g} to {tokens[-1]:g})\n"
        f"  error = {FORMS[fitted.form].formula}   SSE {fitted.sse:.5g}   rmse {fitted.rmse:.4g}",
        file=sys.stderr,
    )
    for parameter, value in fitted.params.items():
        low, high = fitted.intervals[parameter]
        print(f"  {parameter:6} {value:10.5g}   95 % [{low:.5g}, {high:.5g}]", file=sys.stderr)
    for note in fitted.notes:
        print(f"  {note}", file=sys.stderr)
    judged = [row for row in table if row["family"] == name and row["leave_one_size_out_rmse"]]
    for row in sorted(judged, key=lambda row: row["leave_one_size_out_rmse"]):
        print(
            f"  {row['form']:20} left-out size {row['leave_one_size_out_rmse']:.4f}"
            f"   left-out V {row['leave_one_V_out_rmse'] or float('nan'):.4f}   AIC "
            f"{row['aic']:.1f}",
            file=sys.stderr,
        )


def against_published(name, points, fitted) -> dict:
    """Where the published exponents lie: each in its interval or not, and both together."""
    pair = published.EXPONENTS[name]
    found = {"exponents": pair, "notes": list(published.NOTES[name])}
    if not fitted.form.startswith("multiplicative"):
        return found
    found["inside"] = _inside(pair, fitted.intervals)
    found["together"] = compare.with_exponents(points, fitted, pair)
    where = {"": fitted.intervals}
    if not fitted.identified["D"]:
        where[" (with D held at 0)"] = compare.without_floor(points, fitted)
        found["inside_with_D_0"] = _inside(pair, where[" (with D held at 0)"])
    for held, ends in where.items():
        for key, value in pair.items():
            place = "inside" if _inside(pair, ends)[key] else "outside"
            low, high = ends[key]
            print(
                f"  published {key} {value:g} lies {place} [{low:.4g}, {high:.4g}]{held}",
                file=sys.stderr,
            )
    both = found["together"]
    print(
        f"  both together: SSE {both['sse']:.5g}, {'inside' if both['inside'] else 'outside'} the "
        f"joint 95 % region, which ends at {both['limit']:.5g}",
        file=sys.stderr,
    )
    return found


def _inside(values, ends):
    return {key: ends[key][0] <= value <= ends[key][1] for key, value in values.items()}


def draw(families, laws, out, *, rows, chip) -> list[Path]:
    """The figures of every family, where matplotlib is installed and the laws carry draws."""
    if any(fitted.samples is None for fitted in laws.values()):
        print("no figures: their bands need --bootstrap of 1 or more draws", file=sys.stderr)
        return []
    try:
        from vlm_jax.reports import cost_figures, figures

        drawn = []
        for name, points in families.items():
            drawn += figures.law_figures(points, laws[name], out, name)
            if rows:
                more = cost_figures.counted_figures(rows, points, laws[name], out, name, chip=chip)
            elif sizes := described_sizes(points):
                llms, vit = sizes
                more = cost_figures.described_figures(
                    points, laws[name], out, name, llms=llms, vit=vit, chip=chip
                )
            else:
                more = []
            drawn += [path for figure in more for path in figure.paths]
        return drawn
    except ModuleNotFoundError as missing:
        if missing.name != "matplotlib":
            raise
        print("no figures: pip install 'vlm-jax[report]' for matplotlib", file=sys.stderr)
        return []


def described_sizes(points) -> tuple[dict, ViTSize] | None:
    """Label -> shape of every point's LLM, and the encoder; None, said on stderr, without one."""
    try:
        known = described.published_llms()
        if unknown := sorted(set(points.label) - known.keys()):
            raise ValueError(
                f"{', '.join(map(repr, unknown))} is none of {', '.join(known)}: "
                "name the LLM of every line in a column `label`"
            )
        encoder = ViTSize.of(described.base().vit)
    except (ValueError, ModuleNotFoundError) as problem:
        print(f"no figures of the whole cost and of latency: {problem}", file=sys.stderr)
        return None
    return {label: known[label][1] for label in set(points.label)}, encoder


def without_draws(fields):
    """The same JSON fields, at every depth, without the bootstrap draws."""
    if isinstance(fields, dict):
        return {key: without_draws(value) for key, value in fields.items() if key != "samples"}
    return fields
