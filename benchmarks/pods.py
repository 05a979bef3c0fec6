# SPDX-License-Identifier: Apache-2.0
"""The table of docs/pods.md: steps compiled for slices of TPUs, one command for each row.

    python benchmarks/pods.py --list             # the rows, their commands, which have results
    python benchmarks/pods.py --most=2           # compiles the first two that have none
    python benchmarks/pods.py --only=7b          # those with this in their name
    python benchmarks/pods.py --table            # the table in Markdown, from the results

Needs libtpu (extra aot), no TPU. A row takes minutes of CPU; results are kept one by one in
benchmarks/results/pods.jsonl, and a row that is there is not compiled again.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "pods.jsonl"
SLICES = ("v5p:4x4x4", "v6e:8x8", "v5e:8x8")
GRID_TOKENS = (1, 4, 16, 36, 64, 144, 576)
GRID = ("qwen1.5-0.5b", "qwen1.5-1.8b", "qwen1.5-4b", "qwen1.5-7b", "qwen1.5-14b")
STAGES = {"align": "configs/align.py", "finetune": "configs/finetune.py"}
GIB = 2**30


@dataclass(frozen=True)
class Row:
    """One row of the table: what is compiled, and for which slice."""

    name: str
    stage: str
    llm: str
    tokens: int
    slice_: str
    more: dict = field(default_factory=dict)

    def command(self) -> list[str]:
        """The command that makes it."""
        kind = "none" if self.tokens == 576 else "quecc"
        words = [
            f"--config={STAGES[self.stage]}",
            f"--topology={self.slice_}",
            f"--mode={self.stage}",
            f"--config.compressor.kind={kind}",
            f"--config.compressor.tokens={self.tokens}",
        ]
        from configs import sizes

        llm = sizes.LLM[self.llm].items()
        words += [f"--config.llm.{name}={value}" for name, value in llm]
        # Two axes: a gather and a reduction over a part of the slice are what the compiler makes
        # them to be (docs/pods.md, "Collectives").
        mesh = {"data": 4, "fsdp": 16} | self.more
        return words + [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]


def rows() -> list[Row]:
    """LLaVA-1.5's two sizes on three slices, then the paper's grid on v5p."""
    found = []
    for llm in ("vicuna-1.5-7b", "vicuna-1.5-13b"):
        for slice_ in SLICES:
            for tokens in (36, 1, 576):
                for stage in ("finetune", "align"):
                    name = f"{llm}-{stage}-v{tokens}-{slice_.replace(':', '-')}"
                    found.append(Row(name, stage, llm, tokens, slice_))
    for llm in GRID:
        for tokens in GRID_TOKENS:
            name = f"{llm}-finetune-v{tokens}-v5p-4x4x4"
            found.append(Row(name, "finetune", llm, tokens, "v5p:4x4x4"))
    return found


def results() -> dict[str, dict]:
    """What was compiled, by name."""
    if not RESULTS.exists():
        return {}
    return {row["name"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}


def compiled(row: Row) -> dict:
    """The result of a row; raises where the command fails otherwise than by not fitting."""
    command = [sys.executable, "-m", "vlm_jax", "compile", *row.command()]
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{row.name}: {done.stderr[-2000:]}")
    made = json.loads(done.stdout)
    for one in made["programs"]:
        one.pop("largest", None)
    return dict(name=row.name, llm=row.llm, tokens=row.tokens, stage=row.stage) | made


def table() -> str:
    """The rows that were compiled, in Markdown, and how many were not."""
    known, every = results(), rows()
    heads = ["LLM", "stage", "V", "slice", "mesh", "HBM of a device", "ms a step", "MFU",
             "waiting", "hours", "chip hours", "compiled in"]  # fmt: skip
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for row in every:
        made = known.get(row.name)
        if made is None:
            continue
        t, hbm = made["estimate"], made["hbm_bytes"]
        mesh = " x ".join(str(n) for n in made["mesh"].values())
        used = f"{hbm['total'] / GIB:.1f} GiB ({made['hbm_share']:.0%})"
        if t is None:
            numbers = ["does not fit", "", "", "", ""]
        else:
            waiting = t["synchronous_seconds"] / t["step_seconds"]
            numbers = [
                f"{t['step_seconds'] * 1e3:.0f}",
                f"{t['mfu']:.0%}",
                f"{waiting:.0%}",
                f"{made['epoch']['hours']:.1f}",
                f"{made['epoch']['chip_hours']:.0f}",
            ]
        tokens = "576 (none)" if row.tokens == 576 else str(row.tokens)
        minutes = f"{made['compile_seconds'] / 60:.0f} min"
        cells = [row.llm, row.stage, tokens, row.slice_, mesh, used, *numbers, minutes]
        lines.append(f"| {' | '.join(cells)} |")
    left = [row.name for row in every if row.name not in known]
    lines.append(f"\nNot compiled yet: {len(left)} of {len(every)} rows.")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="the rows and their commands")
    parser.add_argument("--table", action="store_true", help="the table from the results")
    parser.add_argument("--most", type=int, default=1000, help="rows to compile at most")
    parser.add_argument("--only", default="", help="rows with this in their name")
    given = parser.parse_args()
    if given.table:
        print(table())
        return
    known = results()
    chosen = [row for row in rows() if given.only in row.name]
    if given.list:
        for row in chosen:
            print(f"{'compiled' if row.name in known else '':8} {row.name}")
            print(f"         vlm-jax compile {' '.join(row.command())}")
        return
    for row in [row for row in chosen if row.name not in known][: given.most]:
        made = compiled(row)
        with RESULTS.open("a") as file:
            file.write(json.dumps(made) + "\n")
        print(f"{row.name}: fits {made['fits']}, {made['compile_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
