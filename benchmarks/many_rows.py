# SPDX-License-Identifier: Apache-2.0
"""How long do `fit`, `plan` and `report` take, and how large is a page, with how many rows?

    python benchmarks/many_rows.py [--only=NAME ...] [--rounds=3] [--out=FILE]

Rows come from planted laws with noise: a run of 1,000 rows (five LLMs, eight token counts, five
methods, five seeds, two families, and blind models), tables of 10,000 and of 100,000 rows, and the
published points. Each command is a process of its own, as a user starts it; the numbers are its
processor time and its wall time, medians of the rounds, with imports. There is no peer.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# benchmarks/ is a folder of files, not installed; the rows are those of the tests
sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]

import made_rows  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks import facts  # noqa: E402
from vlm_jax.rows import records  # noqa: E402

LAWS = {"reasoning": (0.5, 0.08, 0.015, 0.0), "text": (0.8, 0.03, 0.05, 0.0)}
METHODS = (*made_rows.METHODS, ("mqt", "none", "", -0.01))
READ = "from vlm_jax.rows import measured; measured.read(['{}'])"
FIT = (
    "import sys, time; from vlm_jax.law import law, published; p = published.points('reasoning');"
    "t = time.process_time(); law.fit(p, bootstrap={0}, intervals={0} > 0);"
    "print(time.process_time() - t)"
)


def run_of(folder: Path, seeds: int) -> int:
    """A run folder of `seeds` x 200 rows and its blind models; how many rows it has."""
    sizes = [int(n * 1e9) for n in (0.5, 1.8, 4, 7, 14)]
    tokens = (1, 4, 9, 16, 36, 64, 144, 576)
    rows = made_rows.rows(sizes=sizes, tokens=tokens, seeds=range(seeds), laws=LAWS, noise=0.004,
                          methods=METHODS, timing=True)  # fmt: skip
    folder.mkdir()
    records.write(folder / "rows.jsonl", rows)
    return len(rows)


def table(path: Path, count: int) -> int:
    """A table of `count` rows of ten LLM sizes and 576 token counts, each a seed; the count."""
    rng = np.random.default_rng(0)
    N, V = rng.choice(np.geomspace(0.5, 14, 10).round(2), count), rng.integers(1, 577, count)
    error = 0.5 * N**-0.08 * V**-0.015 + 0.004 * rng.standard_normal(count)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["N", "V", "Q", "error", "stderr", "seed"])
        writer.writerows(zip(N, V, [0] * count, error, [0.004] * count, range(count), strict=True))
    return count


def timed(command: list[str]) -> tuple[float, float, str]:
    """(processor seconds, wall seconds, stdout) of a command."""
    before, start = os.times(), time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                          text=True)  # fmt: skip
    after = os.times()
    spent = after.children_user + after.children_system
    return spent - before.children_user - before.children_system, time.monotonic() - start, (
        done.stdout
    )  # fmt: skip


def commands(home: Path) -> dict[str, tuple[list[str], Path | None]]:
    """What is timed -> its command and the file whose size counts."""
    verb = [sys.executable, "-m", "vlm_jax"]
    python = [sys.executable, "-c"]
    out = f"--out={home / 'fit'}"
    law, run = home / "published", home / "run"
    subprocess.run([*verb, "fit", "--published=reasoning", f"--out={law}", "--bootstrap=1000"],
                   check=True, capture_output=True)  # fmt: skip
    plan = [*verb, "plan", f"--law={law}", "--flops=1e12", "--text-tokens=50", "--json"]
    made = [run_of(run, 5), table(home / "table.csv", 10_000), table(home / "long.csv", 100_000)]
    print(f"rows: {made}", flush=True)
    fit = [*verb, "fit", f"--rows={home / 'table.csv'}", out]
    return {
        "report of a run": ([*verb, "report", f"--workdir={run}"], run / "report" / "index.html"),
        "fit of 10,000 rows": (fit, None),
        "reading of 100,000 rows": ([*python, READ.format(home / "long.csv")], None),
        "point fit": ([*python, FIT.format(0)], None),
        "intervals, 1,000 draws": ([*python, FIT.format(1000)], None),
        "plan": (plan, None),
    }


def main() -> None:
    """Times each command, prints and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", help="names, or parts of names")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out")
    options = parser.parse_args()
    result = facts.of_run("How long do fit, plan and report take?", threads=2,
                          packages=("numpy", "scipy", "matplotlib"))  # fmt: skip
    result["times"] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (command, file) in commands(Path(folder)).items():
            if options.only and not any(word in name for word in options.only):
                continue
            rounds = []
            for _ in range(options.rounds):
                (Path(folder) / "run" / "law.json").unlink(missing_ok=True)
                rounds.append(timed(command))
            line = dict(processor_s=statistics.median(r[0] for r in rounds),
                        wall_s=statistics.median(r[1] for r in rounds))  # fmt: skip
            if command[1] == "-c" and rounds[0][2]:
                line["without_imports_s"] = statistics.median(float(r[2]) for r in rounds)
            if file:
                line["megabytes"] = file.stat().st_size / 1e6
            result["times"][name] = {k: round(v, 3) for k, v in line.items()}
            print(name, json.dumps(result["times"][name]), flush=True)
    print(facts.write(result, "many-rows", options.out))


if __name__ == "__main__":
    main()
