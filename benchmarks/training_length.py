# SPDX-License-Identifier: Apache-2.0
"""Does longer training change the order of a grid's cells?

    python benchmarks/training_length.py --rows=SHORT/rows.jsonl --rows=LONG/rows.jsonl [--out=FILE]

Two runs of one grid that differ in the steps of finetuning. Of the cells that both have, each pair
is compared within each run: it is decided if the scores differ by more than 1.96 standard errors,
as the report has it. A pair that is decided in both and the other way round is reversed. There is
no peer: the shorter run is compared with the longer one.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

# benchmarks/ is a folder of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402
from scipy.stats import spearmanr  # noqa: E402

from benchmarks import facts  # noqa: E402
from vlm_jax.reports.findings import SURE, margin  # noqa: E402
from vlm_jax.rows import records  # noqa: E402

Scores = dict[str, tuple[float, float]]  # cell -> score and standard error


def scores(rows: list[records.Row], family: str) -> Scores:
    """Of the sighted cells that have the family."""
    return {
        row.cell: (row.families[family]["score"], row.families[family]["stderr"])
        for row in rows
        if not row.blind and family in row.families
    }


def order(short: Scores, long: Scores) -> dict[str, object]:
    """How the order of the cells of both runs agrees."""
    cells = sorted(short.keys() & long.keys())
    found = dict(cells=len(cells), pairs=0, decided_short=0, decided_long=0, decided_both=0)
    reversed_pairs = []
    for pair in itertools.combinations(cells, 2):
        signs = []
        for run in (short, long):
            difference, spread = margin(*(run[cell] for cell in pair))
            signs.append(float(np.sign(difference)) * (abs(difference) > SURE * spread))
        found["pairs"] += 1
        found["decided_short"] += bool(signs[0])
        found["decided_long"] += bool(signs[1])
        found["decided_both"] += bool(signs[0] and signs[1])
        if signs[0] * signs[1] < 0:
            reversed_pairs.append(pair)
    values = [[run[cell][0] for cell in cells] for run in (short, long)]
    gains = np.subtract(values[1], values[0])
    return found | dict(
        reversed=reversed_pairs,
        rank_correlation=round(float(spearmanr(*values).statistic), 4),
        gain=dict(least=round(gains.min(), 4), median=round(float(np.median(gains)), 4),
                  most=round(gains.max(), 4)),
    )  # fmt: skip


def main() -> None:
    """Compares the two runs, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", action="append", required=True, help="two files, shorter first")
    parser.add_argument("--out")
    options = parser.parse_args()
    if len(options.rows) != 2:
        parser.error(f"--rows is given {len(options.rows)} times: name two runs, shorter first")
    short, long = map(records.read, options.rows)
    steps = [
        sorted({row.train["steps"] for row in rows if not row.blind}) for rows in (short, long)
    ]
    result = facts.of_run("Does longer training change the order of a grid's cells?", threads=1,
                          packages=("numpy", "scipy"))  # fmt: skip
    result["steps"] = steps
    families = sorted({family for row in long for family in row.families})
    result["families"] = {
        family: order(scores(short, family), scores(long, family)) for family in families
    }
    for family, line in result["families"].items():
        print(family, json.dumps(line), flush=True)
    print(facts.write(result, "training-length", options.out))


if __name__ == "__main__":
    main()
