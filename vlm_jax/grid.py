# SPDX-License-Identifier: Apache-2.0
"""Every cell of a scaling run: train, evaluate, one row; then the law and the report.

    vlm-jax grid --config=configs/demo.py --workdir=runs/demo [--config.grid.seeds="(0,1)"]

A cell is an LLM size x a number of visual tokens x a seed, or one of the baselines. All cells share
one frozen encoder, pretrained first, and its cached features. Repeating the command goes on where
it stopped.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import cli, mesh, report
from vlm_jax import train as training
from vlm_jax.data import sources
from vlm_jax.data.processor import Processor, query_of
from vlm_jax.evals import tasks
from vlm_jax.evaluate import Clock, predict, write_predictions
from vlm_jax.features import Features, Sight, batches_of, blind_of, features_of
from vlm_jax.kernels import window_attention
from vlm_jax.learn.workdir import claim, provenance, write_json
from vlm_jax.models import vlm
from vlm_jax.models.compressors.compressor import Compressor
from vlm_jax.models.vit import ViT
from vlm_jax.scaling import cost, records
from vlm_jax.train import Inputs

# A small model reaches about this share of the machine's matrix-product speed (dry runs only).
SMALL_MODEL_EFFICIENCY = 0.15


@dataclass(frozen=True)
class Cell:
    """One model of the grid: its name, its whole configuration, its LLM's name and seed."""

    name: str
    config: ConfigDict
    llm: str
    seed: int

    @property
    def blind(self) -> bool:
        return self.config.data.blind


@dataclass(frozen=True)
class Shared:
    """What all cells share: splits, the encoder, and what it gives for their images."""

    train: Inputs
    test: Inputs
    features: dict[Sight, Features]
    encoder: ViT


def cells_of(config: ConfigDict) -> list[Cell]:
    """The cells that a configuration describes: the grid proper, then the baselines, per seed."""
    if not config.grid.llms:
        raise ValueError("grid.llms is empty: name at least one LLM size, as configs/demo.py does")
    kinds = [(config.compressor.kind, tokens) for tokens in config.grid.tokens]
    return [
        cell_of(config, llm, kind, int(tokens), int(seed), **dict(*fields))
        for seed in config.grid.seeds
        for kind, tokens, *fields in [*kinds, *config.grid.baselines]
        for llm in by_size(config)
    ]


def by_size(config: ConfigDict) -> list[str]:
    """The grid's LLMs, smallest first (a ConfigDict sorts its names instead)."""

    def parameters(name: str) -> int:
        fields = config.llm.to_dict() | config.grid.llms[name].to_dict()
        return cost.llm_parameters(cost.LLM.of(fields))

    return sorted(config.grid.llms, key=parameters)


def cell_of(
    config: ConfigDict, llm: str, kind: str, tokens: int, seed: int, **compressor: str | int
) -> Cell:
    """One cell; `kind` is a compressor, or "blind" for the grid's own without the image.
    What else of `compressor` differs from the grid's is part of the cell's name."""
    c = config.copy_and_resolve_references()
    with c.unlocked():
        del c.grid
    c.llm.update(config.grid.llms[llm].to_dict())
    c.data.blind = kind == "blind"
    c.compressor.kind = config.compressor.kind if kind == "blind" else kind
    c.compressor.tokens = tokens
    if unknown := sorted(compressor.keys() - c.compressor.keys()):
        raise ValueError(f"grid.baselines: no {unknown} in compressor {sorted(c.compressor)}")
    c.compressor.update(compressor)
    method = "-".join([kind, *map(str, compressor.values())])
    return Cell(f"{llm}-v{tokens}-{method}-s{seed}", c, llm, seed)


def describe(cell: Cell) -> tuple[int, dict[str, int], float]:
    """LLM parameters, parameters by part, and training FLOPs of one cell; nothing is allocated."""
    config = cell.config
    query_of(config)  # raises for a template that leaves nothing to be read
    shapes = vlm.shapes(config)
    parts = {name: vlm.parameters(getattr(shapes, name)) for name in ("vit", "compressor", "llm")}
    return parts["llm"], parts, train_flops(config)


def sizes(config: ConfigDict) -> tuple[cost.ViT, cost.Compressor, cost.LLM]:
    """The model as the cost model knows it."""
    return cost.ViT.of(config.vit), cost.Compressor.of(config.compressor), cost.LLM.of(config.llm)


def train_flops(config: ConfigDict) -> float:
    """FLOPs of both stages on cached features."""
    vit, compressor, llm = sizes(config)
    reads = compressor.kind == "quecc" and compressor.query == "separate"
    return float(
        sum(
            config[stage].steps
            * config[stage].batch
            * cost.train_step_flops(
                True,
                compressor,
                llm,
                vit=vit,
                stage=stage,
                tokens=config.data.text_length + compressor.tokens,
                logits=config.data.text_length,
                question=config.data.question_length * reads,
                recompute=config.remat == "full",
            )
            for stage in ("align", "finetune")
        )
    )


def dry_run(config: ConfigDict, cells: Sequence[Cell]) -> None:
    """Prints the cells with parameters, FLOPs and an estimated time, and writes nothing."""
    rate = matmul_flops_per_second() * SMALL_MODEL_EFFICIENCY
    print(f"{'cell':36} {'LLM':>12} {'compressor':>11} {'V':>4} {'train GFLOP':>12} {'est. s':>7}")
    total = 0.0
    for cell in cells:
        n, parts, flops = describe(cell)
        total += flops / rate
        print(
            f"{cell.name:36} {n:12,} {parts['compressor']:11,} {cell.config.compressor.tokens:4} "
            f"{flops / 1e9:12,.0f} {flops / rate:7.0f}"
        )
    print(
        f"{len(cells)} cells, about {total / 60:.0f} min of training at {rate / 1e9:.0f} GFLOP/s "
        f"({SMALL_MODEL_EFFICIENCY:.0%} of what a matrix product reaches here now)"
    )


def matmul_flops_per_second(size: int = 768) -> float:
    """What one float32 matrix product reaches on this machine; best of five."""
    x = jnp.ones((size, size))
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        then = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - then)
    return 2 * size**3 / min(times)


class Phases:
    """Seconds of each phase of a run over all its restarts, kept in run.json."""

    def __init__(self, path: Path, facts: dict):
        self.path = path
        before = json.loads(path.read_text()) if path.exists() else {}
        self.facts = {**facts, "phases": before.get("phases", {})}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        then = time.monotonic()
        yield
        phases = self.facts["phases"]
        phases[name] = round(phases.get(name, 0.0) + time.monotonic() - then, 1)
        write_json(self.path, self.facts)


def sights_of(cells: Sequence[Cell]) -> list[Sight]:
    """How the images are encoded for these cells, each way once."""
    # It depends on the compressor alone: cells of one LLM and seed have them all.
    distinct = [c for c in cells if (c.llm, c.seed) == (cells[0].llm, cells[0].seed)]
    found = [Sight.of(vlm.shapes(cell.config).compressor) for cell in distinct]
    return list(dict.fromkeys(found))


def prepare(
    config: ConfigDict, folder: Path, phase: Phases, sights: Sequence[Sight] = (Sight(),)
) -> Shared:
    """Data, encoder and features, made once and found again by a restart."""
    with phase("data"):
        train, test = (
            sources.open_source(config, split) for split in ("train", config.evaluate.split)
        )
        for source in (train, test):
            print(f"data: {json.dumps(source.describe())}", file=sys.stderr)
        processor = Processor(training.tokenizer_of(config, folder, train), config)
        write_json(folder / "baselines.json", {"majority": sources.majority(train, test)})
    with phase("encoder"):
        encoder = training.pretrain_encoder(config, folder, Inputs(train, processor))
    with phase("features"):
        made = {
            sight: Features(
                *(
                    features_of(encoder, source, processor, sight, folder / "features")
                    for source in (train, test)
                ),
                blind_of(encoder, processor, sight),
            )
            for sight in sights
        }
    return Shared(Inputs(train, processor), Inputs(test, processor), made, encoder)


def run_cell(cell: Cell, folder: Path, shared: Shared, facts: dict) -> records.Row:
    """Trains and evaluates one cell; its row."""
    config = cell.config
    found = shared.features[Sight.of(vlm.shapes(config).compressor)]
    inputs, test = (
        replace(
            i,
            processor=i.processor.reading_as(config),
            features=np.broadcast_to(found.blind, seen.shape) if cell.blind else seen,
        )
        for i, seen in ((shared.train, found.train), (shared.test, found.test))
    )
    folder.mkdir(parents=True, exist_ok=True)
    then = time.monotonic()
    model = training.train(config, folder, inputs, encoder=shared.encoder, seed=cell.seed)
    train_seconds = time.monotonic() - then
    then = time.monotonic()
    clock = Clock()
    found = list(
        predict(config, model, test.source, test.processor, features=test.features, clock=clock)
    )
    seconds = time.monotonic() - then
    write_predictions(folder / "predictions.jsonl", found)
    protocol = test.source.protocol
    scores = tasks.score(protocol, found)
    method = method_of(config)
    Q, G, question = request_lengths(test, prefix=method["query"] == "prefix")
    steps = config.align.steps + config.finetune.steps
    vit, compressor, llm = sizes(config)
    return records.Row(
        cell=cell.name,
        llm=cell.llm,
        llm_parameters=vlm.parameters(model.llm),
        vit_parameters=vlm.parameters(model.vit),
        compressor_parameters=vlm.parameters(model.compressor),
        **method,
        blind=cell.blind,
        V=tokens_read(model.compressor, test.features),
        Q=Q,
        G=G,
        seed=cell.seed,
        tasks=scores,
        families=records.families_of(scores),
        flops=vars(cost.request_flops(vit, compressor, llm, Q=Q, G=G, question=question)),
        train=dict(
            steps=steps,
            examples=sum(config[s].steps * config[s].batch for s in ("align", "finetune")),
            flops=train_flops(config),
            seconds=round(train_seconds, 2),
        ),
        evaluate_seconds=round(seconds, 2),
        timing=clock.timing(),
        protocol=protocol,
        prompt=config.data.template,
        parser=tasks.PROTOCOLS[protocol][1],
        data_hash=test.source.data_hash,
        config_hash=cli.digest(config),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    )


def tokens_read(compressor: Compressor, features: np.ndarray) -> int | float:
    """V: visual tokens of an image, their mean over these features where an image chooses."""
    if not compressor.adaptive:
        return compressor.tokens
    count = jax.jit(lambda module, levels: module(levels).count)
    means = [count(compressor, part) for part in batches_of(features)]
    return float(np.concatenate(means)[: len(features)].mean())


def method_of(config: ConfigDict) -> dict[str, str]:
    """What a row says of its compressor: kind, how it reads the question, what is not its default.

    The variant is how QueCC makes its queries, where that is not the published way.
    """
    made = cost.Compressor.of(config.compressor)
    pooled = made.kind == "quecc" and made.downsample != "conv"
    return dict(
        compressor=made.kind,
        query=made.query if made.reads_question else "none",
        variant=made.downsample if pooled else "",
    )


def request_lengths(
    test: Inputs, *, prefix: bool = False, sample: int = 500
) -> tuple[float, float, float]:
    """Mean tokens of prompts, answers and questions of the evaluation split (an even sample of it).

    The question is what a question-reading compressor reads, or with `prefix` all text before the
    image.
    """
    picked = np.linspace(0, len(test.source) - 1, min(sample, len(test.source))).astype(int)
    prompts = [test.processor.text(test.source[int(i)], answer=False) for i in picked]
    wholes = [int(test.processor.text(test.source[int(i)])["length"]) for i in picked]
    prompt = np.mean([int(made["length"]) for made in prompts])
    question = np.mean([int(made["image_at" if prefix else "question_length"]) for made in prompts])
    return float(prompt), float(np.mean(wholes) - prompt), float(question)


def run_grid(config: ConfigDict, folder: Path, command: str) -> dict:
    """All cells that have no row yet, then the law and the report; what the report says of it."""
    cells = cells_of(config)
    facts = provenance(window_attention.form(config.kernels))
    # The law is fitted to the grid's own method, where others are run beside it.
    method = records.method_of(**method_of(cells[0].config))
    described = dict(command=command, config=cli.digest(config), method=method)
    phase = Phases(folder / "run.json", described | facts)
    training.check(config)
    for cell in cells:
        describe(cell)  # an impossible cell is found before the first is trained
    shared = prepare(config, folder, phase, sights_of(cells))
    rows = []
    for number, cell in enumerate(cells, 1):
        home = folder / "cells" / cell.name
        done = home / "row.json"
        if not done.exists():
            print(f"cell {number}/{len(cells)}: {cell.name}", file=sys.stderr)
            with phase("cells"):
                row = run_cell(cell, home, shared, facts)
            # The row is written whole or not at all, and rows.jsonl is always all rows so far.
            write_json(done, json.loads(row.to_json()))
        rows.append(records.Row.from_json(done.read_text()))
        records.write(folder / "rows.jsonl", rows)
        scores = "  ".join(f"{name} {s['score']:.3f}" for name, s in rows[-1].families.items())
        print(f"cell {number}/{len(cells)}: {cell.name}  {scores}", file=sys.stderr)
    with phase("law and report"):
        made = report.write(folder)
    print(
        "seconds per phase: "
        + "  ".join(f"{k} {v:.0f}" for k, v in phase.facts["phases"].items())
        + f"  total {sum(phase.facts['phases'].values()):.0f}",
        file=sys.stderr,
    )
    return made


def main(argv: list[str] | None = None) -> int:
    argv = list(sys.argv[1:] if argv is None else argv)
    config, flags = cli.parse(
        "grid",
        __doc__,
        argv,
        strings={"workdir": "where the run lives"},
        booleans={"dry-run": "print the cells and stop"},
    )
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")

    def body() -> int:
        with jax.set_mesh(mesh.make(**config.mesh)):
            if flags["dry-run"].value:
                dry_run(config, cells_of(config))
                return 0
            if flags.workdir is None:
                raise ValueError("--workdir is missing: name the folder that the run lives in")
            folder = Path(flags.workdir).absolute()
            # Cells of one size and V are one program, and a restart compiles nothing twice.
            jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
            with claim(folder, config):
                print(json.dumps(run_grid(config, folder, " ".join(["vlm-jax grid", *argv]))))
        return 0

    return cli.report_errors("grid", body)


if __name__ == "__main__":
    sys.exit(main())
