# SPDX-License-Identifier: Apache-2.0
"""The table of docs/pods.md: steps compiled for slices of TPUs, one command for each row.

    python benchmarks/pods.py --list             # the rows, their commands, which have results
    python benchmarks/pods.py --most=2           # compiles the first two that have none
    python benchmarks/pods.py --only=7b          # those with this in their name
    python benchmarks/pods.py --table            # the table in Markdown, from the results

Needs libtpu (extra aot), no TPU. A row takes minutes of CPU; results are kept one by one in
benchmarks/results/pods.jsonl, and a row that is there is not compiled again. Beside the memory that
the compiler takes stands what the formula of training says (`--dry-run`).
"""

import argparse
import json
import resource
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))  # configs lie beside the package, not in it
RESULTS = HERE / "results" / "pods.jsonl"
SLICES = ("v5p:4x4x4", "v6e:8x8", "v5e:8x8")
GRID_TOKENS = (1, 4, 16, 36, 64, 144, 576)
GRID = ("qwen1.5-0.5b", "qwen1.5-1.8b", "qwen1.5-4b", "qwen1.5-7b", "qwen1.5-14b")
STAGES = {"align": "configs/align.py", "finetune": "configs/finetune.py"}
GIB = 2**30
# LLaVA cuts text and visual tokens together at this length.
ROW = 2048
# USD per chip and hour, on demand, us-central1: those of tpu-v5litepod-8, tpu-v5p-8 (four chips)
# and tpu-v6e-1 in catalogs/v8/gcp/vms.csv of github.com/skypilot-org/skypilot-catalog at 006059e.
# Look up that of your region: dollars are proportional to it.
PRICES = {"v5e": 1.2, "v5p": 4.2, "v6e": 2.7}
# Where weights live, by slice: an axis over a part of the slice, as large as memory asks for.
LARGE = ("vicuna-1.5-13b", "qwen1.5-14b")
MESHES = {"v5p:4x4x4": (4, 16), "v6e:8x8": (8, 8), "v5e:8x8": (4, 16)}
MESHES_OF_LARGE = {"v5p:4x4x4": (4, 16), "v6e:8x8": (4, 16), "v5e:8x8": (2, 32)}
# Further fields of finetune: what memory is there for is not recomputed; v5e has 15.75 GiB.
MORE = {"v5p:4x4x4": {"remat": "dots"}, "v5e:8x8": {"finetune.moments": "bfloat16"}}


@dataclass(frozen=True)
class Row:
    """One row of the table: what is compiled, and for which slice."""

    name: str
    stage: str
    llm: str
    tokens: int
    slice_: str
    more: dict = field(default_factory=dict)

    @property
    def price(self) -> float:
        """USD per chip and hour."""
        return PRICES[self.slice_.partition(":")[0]]

    def config(self) -> list[str]:
        """The words that describe the run, the same for `vlm-jax compile` and `vlm-jax train`."""
        from configs import sizes

        kind = "none" if self.tokens == 576 else "quecc"
        data, fsdp = (MESHES_OF_LARGE if self.llm in LARGE else MESHES)[self.slice_]
        fields = {"compressor.kind": kind, "compressor.tokens": self.tokens}
        fields |= {f"llm.{name}": value for name, value in sizes.LLM[self.llm].items()}
        fields |= {"mesh.data": data, "mesh.fsdp": fsdp}
        if self.stage == "finetune":
            fields |= {"data.text_length": ROW - self.tokens} | MORE.get(self.slice_, {})
        words = [f"--config.{name}={value}" for name, value in (fields | self.more).items()]
        return [f"--config={STAGES[self.stage]}", *words]

    def command(self) -> list[str]:
        """The words of `vlm-jax compile` that make it."""
        return [
            *self.config(),
            f"--topology={self.slice_}",
            f"--mode={self.stage}",
            f"--dollars-per-chip-hour={self.price}",
        ]


def rows() -> list[Row]:
    """LLaVA-1.5's two sizes on three slices, stage 2 first, then the paper's grid on v5p."""
    found = []
    for llm in ("vicuna-1.5-7b", "vicuna-1.5-13b"):
        for stage in ("finetune", "align"):
            for tokens in (36, 576, 1):
                for slice_ in SLICES:
                    name = f"{llm}-{stage}-v{tokens}-{slice_.replace(':', '-')}"
                    found.append(Row(name, stage, llm, tokens, slice_))
    for llm in GRID:
        for tokens in sorted(GRID_TOKENS, key=lambda v: v not in (1, 36, 576)):
            name = f"{llm}-finetune-v{tokens}-v5p-4x4x4"
            found.append(Row(name, "finetune", llm, tokens, "v5p:4x4x4"))
    return found


def results() -> dict[str, dict]:
    """What was compiled, by name."""
    if not RESULTS.exists():
        return {}
    return {row["name"]: row for row in map(json.loads, RESULTS.read_text().splitlines())}


def children() -> float:
    """CPU seconds of the commands that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def compiled(row: Row) -> dict:
    """The result of a row; raises where the command fails otherwise than by not fitting."""
    command = [sys.executable, "-m", "vlm_jax", "compile", *row.command()]
    before = children()
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    if done.returncode not in (0, 3):
        raise RuntimeError(f"{row.name}: {done.stderr[-2000:]}")
    made = json.loads(done.stdout)
    for one in made["programs"]:
        one.pop("largest", None)
    seconds = round(children() - before, 1)
    return described(row) | dict(config=row.config(), cpu_seconds=seconds) | made


def described(row: Row) -> dict:
    """What a row is."""
    return dict(name=row.name, llm=row.llm, tokens=row.tokens, stage=row.stage, slice=row.slice_)


def by_formula(row: Row, made: dict) -> int:
    """Bytes of a device by the formula of `--dry-run`; what is kept is the compiler's."""
    from vlm_jax.training import stages, working_set
    from vlm_jax.training.recipe import Recipe
    from vlm_jax.verbs import configuration

    recipe = Recipe.of(stages.with_start(configuration.read(row.config()).config))
    found = working_set.of_step(recipe, row.stage, made["mesh"], "tpu")
    hbm = made["hbm_bytes"]
    gradients = hbm["weights"]
    kept = sum(hbm.get(kind, 0) for kind in ("weights", "frozen", "optimizer"))
    return kept + gradients + found.total


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A table."""
    rows_ = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows_)


def first_cells(row: Row, mesh: dict) -> list[str]:
    """What a row is, for a reader."""
    tokens = "576 (none)" if row.tokens == 576 else str(row.tokens)
    axes = f"{mesh['data']} x {mesh['fsdp']}"
    return [row.llm, row.stage, tokens, row.slice_, axes]


def table() -> str:
    """The rows that were compiled, and what each takes."""
    known, lines = results(), []
    kinds = ("weights", "optimizer", "frozen", "activations", "gradients", "temporaries")
    for row in rows():
        made = known.get(row.name)
        if made is None:
            continue
        t, hbm = made["estimate"], made["hbm_bytes"]
        parts = " + ".join(f"{hbm.get(kind, 0) / GIB:.1f}" for kind in kinds)
        numbers = ["does not fit", "", "", "", "", ""]
        if t is not None:
            numbers = [
                f"{t['step_seconds'] * 1e3:.0f}",
                f"{t['mfu']:.0%}",
                f"{t['mfu_without_communication']:.0%}",
                f"{made['epoch']['hours']:.1f}",
                f"{made['epoch']['dollars']:,.0f}",
                f"{made['compile_seconds']:.0f} / {made['cpu_seconds']:.0f}",
            ]
        share = f"{hbm['total'] / GIB:.1f} ({made['hbm_share']:.0%})"
        said = by_formula(row, made)
        formula = f"{said / GIB:.1f} ({said / hbm['total']:.2f})"
        lines.append([*first_cells(row, made["mesh"]), parts, share, formula, *numbers])
    heads = ["LLM", "stage", "V", "slice", "data x fsdp", "GiB: " + ", ".join(kinds),
             "GiB of a device", "by formula (ratio)", "ms a step", "MFU", "without communication",
             "hours", "dollars", "compiled in s / CPU s"]  # fmt: skip
    return markdown(heads, lines) + f"\n\nCompiled: {len(lines)} of {len(rows())} rows."


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
    left = [row for row in chosen if row.name not in known]
    for row in left[: given.most]:
        made = compiled(row)
        with RESULTS.open("a") as file:
            file.write(json.dumps(made) + "\n")
        print(f"{row.name}: fits {made['fits']}, {made['compile_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
