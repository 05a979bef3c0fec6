# SPDX-License-Identifier: Apache-2.0
"""The table of docs/pods.md: steps compiled for slices of TPUs, one command for each row.

    python benchmarks/pods.py --list             # the rows, their commands, which have results
    python benchmarks/pods.py --most=2           # compiles the first two that have none
    python benchmarks/pods.py --only=7b          # those with this in their name
    python benchmarks/pods.py --compute          # computes those that were not compiled
    python benchmarks/pods.py --table            # the tables in Markdown, from the results

Needs libtpu (extra aot), no TPU. A row takes minutes of CPU; results are kept one by one in
benchmarks/results/pods.jsonl, and a row that is there is not compiled again. A row that is not
compiled is computed: FLOPs of the model at the MFU of the nearest row that is, and the memory
formula of training. It replaces nothing that was compiled.
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
COMPUTED = HERE / "results" / "pods-computed.json"
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


def nearest(row: Row, known: dict[str, dict]) -> dict | None:
    """The compiled row whose MFU a computed one takes: of its chip, of its stage if there is one,
    of the nearest size, and of the nearest number of visual tokens."""
    order = {name: at for at, name in enumerate([*GRID[:4], "vicuna-1.5-7b", *LARGE])}
    alike = [made for made in known.values() if made["slice"] == row.slice_ and made["estimate"]]
    return min(
        alike,
        key=lambda made: (
            made["stage"] != row.stage,
            abs(order[made["llm"]] - order[row.llm]),
            abs(made["tokens"] - row.tokens),
        ),
        default=None,
    )


def computed(row: Row, known: dict[str, dict]) -> dict:
    """FLOPs and memory of a row by formula, and hours at the MFU of the nearest compiled one."""
    import jax

    from vlm_jax import mesh as meshes
    from vlm_jax.aot import report, topology
    from vlm_jax.training import memory, stages
    from vlm_jax.training.recipe import Recipe
    from vlm_jax.verbs import configuration

    slice_ = topology.named(row.slice_)
    config = stages.with_start(configuration.read(row.config()).config)
    recipe = Recipe.of(config)
    with jax.set_mesh(meshes.make(**config.mesh, devices=slice_.devices())):
        need = memory.of_stage(recipe, row.stage)
        flops = report.work(recipe, row.stage, report.Serving(1, 1))[2]
    found = described(row) | dict(
        mesh=dict(config.mesh),
        remat=config.remat,
        model_flops=flops,
        formula_bytes=dict(
            parameters=need.parameters,
            gradients=need.gradients,
            optimizer=need.optimizer,
            activations=need.activations,
            total=need.total,
        ),
        hbm_share=need.total / slice_.hbm_bytes,
    )
    like = nearest(row, known)
    if like is None:
        return found | dict(like=None)
    seconds = flops / (like["estimate"]["mfu"] * slice_.peak_flops * slice_.device_count)
    hours = recipe.stage(row.stage).steps * seconds / 3600
    return found | dict(
        like=like["name"],
        mfu=like["estimate"]["mfu"],
        step_seconds=seconds,
        hours=hours,
        dollars=hours * slice_.chips * row.price,
    )


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A table."""
    rows_ = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows_)


def first_cells(row: Row, mesh: dict) -> list[str]:
    """What is the same in both tables."""
    tokens = "576 (none)" if row.tokens == 576 else str(row.tokens)
    axes = f"{mesh['data']} x {mesh['fsdp']}"
    return [row.llm, row.stage, tokens, row.slice_, axes]


def table_of_compiled() -> str:
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
        lines.append([*first_cells(row, made["mesh"]), parts, share, *numbers])
    heads = ["LLM", "stage", "V", "slice", "data x fsdp", "GiB: " + ", ".join(kinds),
             "GiB of a device", "ms a step", "MFU", "without communication", "hours", "dollars",
             "compiled in s / CPU s"]  # fmt: skip
    return markdown(heads, lines) + f"\n\nCompiled: {len(lines)} of {len(rows())} rows."


def table_of_computed() -> str:
    """The rows that were not compiled, by formula; those that differ in V alone in one line."""
    if not COMPUTED.exists():
        return ""
    known = results()
    made = {one["name"]: one for one in json.loads(COMPUTED.read_text())}
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows():
        one = made.get(row.name)
        if one is None or row.name in known:
            continue
        llm, stage, tokens, slice_, axes = first_cells(row, one["mesh"])
        size = f"{one['formula_bytes']['total'] / GIB:.0f} ({one['hbm_share']:.0%})"
        cells = [llm, stage, slice_, axes, size, f"{one['model_flops'] / 1e15:.2g}"]
        if one["like"]:
            cells += [f"{one['step_seconds']:.2g}", f"{one['hours']:.2g}",
                      f"{float(format(one['dollars'], '.2g')):.0f}", one["like"]]  # fmt: skip
        lines.setdefault((*cells, *[""] * (10 - len(cells))), []).append(tokens)
    heads = ["LLM", "stage", "V", "slice", "data x fsdp", "GiB of a device", "PFLOP a step",
             "s a step", "hours", "dollars", "MFU of row"]  # fmt: skip
    ordered = {cells: sorted(tokens, key=lambda v: int(v.split()[0])) for cells, tokens in
               lines.items()}  # fmt: skip
    return markdown(heads, [[*c[:2], ", ".join(v), *c[2:]] for c, v in ordered.items()])


def table_of_formula() -> str:
    """What `--dry-run` says a device needs, beside what the compiler allocates, for every row."""
    known, lines = results(), []
    for row in rows():
        made = known.get(row.name)
        if made is None or not made["fits"]:
            continue
        need, hbm = computed(row, {})["formula_bytes"], made["hbm_bytes"]
        # The formula has no code and no padding, and counts what is frozen as parameters.
        kept = sum(hbm.get(kind, 0) for kind in ("weights", "frozen", "optimizer"))
        live = hbm["total"] - kept
        said = need["total"] - need["parameters"] - need["optimizer"]
        lines.append([
            *first_cells(row, made["mesh"]),
            f"{(need['parameters'] + need['optimizer']) / GIB:.1f} / {kept / GIB:.1f}",
            f"{said / GIB:.1f} / {live / GIB:.1f}",
            f"{need['total'] / GIB:.1f} / {hbm['total'] / GIB:.1f}",
            f"{need['total'] / hbm['total']:.2f}",
        ])  # fmt: skip
        print(lines[-1], file=sys.stderr, flush=True)
    heads = ["LLM", "stage", "V", "slice", "data x fsdp", "GiB kept: formula / compiler",
             "GiB of a step", "GiB in all", "ratio"]  # fmt: skip
    return markdown(heads, lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--list", action="store_true", help="the rows and their commands")
    parser.add_argument("--table", action="store_true", help="the tables from the results")
    parser.add_argument("--compute", action="store_true", help="compute what was not compiled")
    parser.add_argument("--formula", action="store_true", help="the formula beside the compiler")
    parser.add_argument("--most", type=int, default=1000, help="rows to compile at most")
    parser.add_argument("--only", default="", help="rows with this in their name")
    given = parser.parse_args()
    if given.table:
        print(table_of_compiled(), table_of_computed(), sep="\n\n")
        return
    if given.formula:
        from vlm_jax.aot import topology

        topology.prepare()
        print(table_of_formula())
        return
    known = results()
    chosen = [row for row in rows() if given.only in row.name]
    if given.list:
        for row in chosen:
            print(f"{'compiled' if row.name in known else '':8} {row.name}")
            print(f"         vlm-jax compile {' '.join(row.command())}")
        return
    left = [row for row in chosen if row.name not in known]
    if given.compute:
        from vlm_jax.aot import topology

        topology.prepare()
        COMPUTED.write_text(json.dumps([computed(row, known) for row in left], indent=1) + "\n")
        return
    for row in left[: given.most]:
        made = compiled(row)
        with RESULTS.open("a") as file:
            file.write(json.dumps(made) + "\n")
        print(f"{row.name}: fits {made['fits']}, {made['compile_seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
