# SPDX-License-Identifier: Apache-2.0
"""Numbers that a change of the house must not move, through the doors that stay.

tests/golden.json holds them: laws of the published points, plans, parameters and FLOPs of every
grid of configs/, the first steps of a run of tests/tiny.py, the fields of the files that are
written. Who moves one on purpose writes the file anew, and says so under "Changed numbers":

    PYTHONPATH=.:tests JAX_PLATFORMS=cpu python tests/test_golden.py
"""

import contextlib
import io
import json
import re
import tempfile
from pathlib import Path

import pytest

from vlm_jax.__main__ import main

GOLDEN = Path(__file__).with_name("golden.json")
LAW = ("A", "alpha", "beta", "D", "sse", "rmse", "criteria", "n")
PLANS = {
    "paper": ["--flops=1e12", "--text-tokens=50"],
    "long question": ["--flops=2e12", "--text-tokens=25:0.5,100:0.5"],
    "continuous": ["--flops=1e12", "--text-tokens=50", "--continuous"],
    "milliseconds": ["--ms=40", "--chip=v5e", "--text-tokens=50", "--new-tokens=1"],
    "quecc": ["--flops=1e12", "--text-tokens=50", "--compressors=quecc"],
}
GRIDS = ("demo", "demo_full", "demo_methods", "grid_nlvr")


def printed(*argv: str) -> str:
    """What a command prints on stdout."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(argv) == 0, argv
    return out.getvalue()


def laws(folder: Path) -> dict:
    """The fits of the published points, and what the door `plan` makes of them."""
    found = {}
    for name in ("reasoning", "ocr"):
        printed("fit", f"--published={name}", "--bootstrap=0", f"--out={folder / name}")
        law = json.loads((folder / name / "law.json").read_text())
        found[name] = {key: law[key] for key in LAW}
        for plan, flags in PLANS.items():
            law_flag = f"--law={folder / name / 'law.json'}"
            found[name][plan] = json.loads(printed("plan", law_flag, *flags, "--json"))
        found[name]["fields"] = sorted(law)
    return found


def grid(name: str) -> dict:
    """Cell -> parameters of LLM and compressor, V and training FLOPs, of a grid of configs/."""
    lines = printed("grid", f"--config=configs/{name}.py", "--dry-run").splitlines()
    rows = [line.split() for line in lines if re.match(r"\S+-s\d+ ", line)]
    return {cell: numbers[:-1] for cell, *numbers in rows}  # the last one is a time


def run(folder: Path) -> dict:
    """The first and last losses of each stage of a run, and the fields of what it wrote."""
    found = {}
    for stage in ("encoder", "align", "finetune"):
        lines = (folder / stage / "metrics.jsonl").read_text().splitlines()
        metrics = [json.loads(line) for line in lines]
        found[stage] = {
            "loss": [line["loss"] for line in metrics],
            "fields": sorted(metrics[-1]),
            "files": sorted(p.name for p in (folder / stage).iterdir()),
        }
    found["files"] = sorted(p.name for p in folder.iterdir())
    return found


def near(found, golden, where, tolerance):
    """Whether everything in `golden` was found; numbers to a relative `tolerance`."""
    if isinstance(golden, dict):
        assert found.keys() == golden.keys(), where
        for key in golden:
            near(found[key], golden[key], f"{where}.{key}", tolerance)
    elif isinstance(golden, list):
        assert len(found) == len(golden), where
        for k, (a, b) in enumerate(zip(found, golden, strict=True)):
            near(a, b, f"{where}[{k}]", tolerance)
    elif isinstance(golden, float):
        assert found == pytest.approx(golden, rel=tolerance, abs=1e-12), where
    else:
        assert found == golden, where


def test_laws_and_plans_of_the_published_points(tmp_path):
    # Left-out errors of forms that hardly fit differ by 1e-6 from processor to processor.
    near(laws(tmp_path), json.loads(GOLDEN.read_text())["laws"], "laws", 1e-5)


@pytest.mark.parametrize(
    "name", [GRIDS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in GRIDS[1:])]
)
def test_parameters_and_flops_of_a_grid(name):
    near(grid(name), json.loads(GOLDEN.read_text())["grids"][name], name, 0)


def test_losses_and_files_of_a_run(trained):
    """Processors round sums in their own order: a run of 13 steps stays within 1e-3."""
    near(run(trained), json.loads(GOLDEN.read_text())["run"], "run", 1e-3)


if __name__ == "__main__":
    import tiny

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        done = tiny.run("train", "--config=tests/tiny.py", f"--workdir={folder / 'run'}")
        assert done.returncode == 0, done.stderr
        numbers = dict(
            laws=laws(folder), grids={name: grid(name) for name in GRIDS}, run=run(folder / "run")
        )
    GOLDEN.write_text(json.dumps(numbers, indent=1) + "\n")
