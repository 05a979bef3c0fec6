# SPDX-License-Identifier: Apache-2.0
"""The cells of a scaling run: one configuration becomes that of every row, and what each will cost.

Cells that differ in V alone have one model between them where it serves several V. Selections of
patches all have the model without compression, which is trained in the folder of that cell.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from vlm_jax import arguments, compressors
from vlm_jax.compressors.none import NoneMethod
from vlm_jax.cost import flops as cost
from vlm_jax.models import vlm
from vlm_jax.models.sizes import LLMSize, ViTSize
from vlm_jax.training import llms
from vlm_jax.training.recipe import Recipe

# A small model reaches about this share of the machine's matrix-product speed (dry runs only).
SMALL_MODEL_EFFICIENCY = 0.15


@dataclass(frozen=True)
class Cell:
    """One row of the grid: its name, its whole configuration, its LLM's name and seed.

    `model` names the model that it shares with other cells; the cell itself where it shares none.
    `llm_weights` says how its LLM comes by its weights, where grid.llms does.
    """

    name: str
    config: ConfigDict
    llm: str
    seed: int
    model: str
    llm_weights: str = ""

    @property
    def shares(self) -> bool:
        """Whether its model is that of other cells."""
        return self.model != self.name

    @property
    def recipe(self) -> Recipe:
        """What its configuration describes."""
        return Recipe.of(self.config)

    @property
    def training(self) -> Recipe:
        """How its model is trained: one that selects patches is trained without compression."""
        recipe = self.recipe
        size = recipe.model
        if not size.compressor.selects:
            return recipe
        return replace(recipe, model=replace(size, compressor=NoneMethod(tokens=size.vit.rows)))

    @property
    def blind(self) -> bool:
        return self.config.data.blind

    @property
    def frames(self) -> int:
        """T, images of a request: the frames of a clip, or one image."""
        return max(self.config.data.frames, 1)


def cells_of(config: ConfigDict) -> list[Cell]:
    """The cells that a configuration describes: the grid proper, then the baselines, per seed."""
    if not config.grid.llms:
        raise ValueError("grid.llms is empty: name at least one LLM size, as configs/demo.py does")
    if config.data.images_per_row > 1:
        raise ValueError(
            f"data.images_per_row={config.data.images_per_row}: the V and the FLOPs of a cell are "
            "those of one image in a request, or of one clip, and so is the law; compare models of "
            "several images by `vlm-jax train` and `vlm-jax evaluate`"
        )
    if config.grid.frames and config.data.frames:
        raise ValueError(
            f"grid.frames={config.grid.frames} and data.frames={config.data.frames}: each cell has "
            "frames of its own; set data.frames=0"
        )
    if config.data.row_length:
        raise ValueError(
            f"data.row_length={config.data.row_length}: which examples share a packed row depends "
            "on V, and cells are compared after the same rows in the same order; use data.buckets, "
            "or pack rows in `vlm-jax train`"
        )
    if config.eval_every:
        raise ValueError(
            f"eval_every={config.eval_every}: a grid evaluates each cell when it is trained, on "
            "features of two splits; validate during `vlm-jax train`, or set eval_every=0"
        )
    seeds = [arguments.seed_of("grid.seeds", seed) for seed in config.grid.seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"grid.seeds={seeds}: name at least one seed, and each once")
    frames = [arguments.whole_number("grid.frames", T) for T in config.grid.frames]
    if len(set(frames)) < len(frames):
        raise ValueError(f"grid.frames={frames}: name each number once")
    kinds = [(config.compressor.kind, tokens) for tokens in config.grid.tokens]
    cells = [
        cell_of(
            config,
            llm,
            kind,
            arguments.whole_number("grid.tokens", tokens, least=0),
            seed,
            frames=T,
            **dict(*fields),
        )
        for seed in seeds
        for kind, tokens, *fields in [*kinds, *config.grid.baselines]
        for T in frames or [0]
        for llm in by_size(config)
    ]
    for cell in cells:
        if cell.config.data.buckets and cell.recipe.model.compressor.reads_prefix:
            raise ValueError(
                f"data.buckets={tuple(cell.config.data.buckets)}: with compressor.query='prefix' "
                f"({cell.name}) rows have other lengths, and so other batches than those of other "
                "cells; set data.buckets=()"
            )
    alike: dict[tuple[int, str], str] = {}
    for cell in {cell.llm: cell for cell in cells}.values():
        key = (cost.llm_parameters(LLMSize.of(cell.config.llm)), cell.llm_weights)
        if (other := alike.setdefault(key, cell.llm)) != cell.llm:
            raise ValueError(
                f"grid.llms has {other} and {cell.llm}, which are of one size and come by their "
                f"weights alike ({cell.llm_weights or 'trained from random ones'}): their rows "
                "could not be told apart; use grid.seeds to repeat a training"
            )
    return cells


def by_size(config: ConfigDict) -> list[str]:
    """The grid's LLMs, smallest first (a ConfigDict sorts its names instead)."""

    def parameters(name: str) -> int:
        llms.check(config, name)
        fields = config.llm.to_dict() | config.grid.llms[name].to_dict()
        return cost.llm_parameters(LLMSize.of(fields))

    return sorted(config.grid.llms, key=parameters)


def cell_of(
    config: ConfigDict,
    llm: str,
    kind: str,
    tokens: int,
    seed: int,
    *,
    frames: int = 0,
    **compressor: Any,
) -> Cell:
    """One cell; `kind` is a compressor, or "blind" for the grid's own without the image.
    What else of `compressor` differs from the grid's is part of the cell's name, and so are the
    `frames` of a clip where the grid has several numbers of them."""
    c = llms.applied(config, llm)
    c.data.blind = kind == "blind"
    c.compressor.kind = config.compressor.kind if kind == "blind" else kind
    c.compressor.tokens = tokens
    if unknown := sorted(compressor.keys() - c.compressor.keys()):
        raise ValueError(f"grid.baselines: no {unknown} in compressor {sorted(c.compressor)}")
    c.compressor.update(compressor)
    if frames:
        c.data.frames = frames
    method = "-".join([kind, *map(word, compressor.values())])
    shown = f"-f{frames}" if frames else ""
    name = f"{llm}-v{tokens}{shown}-{method}-s{seed}"
    described = compressors.describe(c.compressor)
    if c.compressor.elastic and tokens not in c.compressor.elastic:
        raise ValueError(
            f"grid.tokens, cell {name}: V={tokens} is not in compressor.elastic="
            f"{tuple(c.compressor.elastic)}: add it there, or leave it out of grid.tokens and "
            'grid.baselines, where {"elastic": ()} makes a model of one V'
        )
    model = name
    if described.selects:
        model = f"{llm}-v{ViTSize.of(c.vit).rows}{shown}-{NoneMethod.kind}-s{seed}"
    elif described.serves_several:
        model = f"{llm}{shown}-{method}-s{seed}"
    return Cell(name, c, llm, seed, model, llms.weights(list(config.grid.llms[llm]), c))


def word(value: Any) -> str:
    """A value of a field of `compressor` in the name of a cell."""
    return "+".join(map(str, value)) or "none" if isinstance(value, list | tuple) else str(value)


def describe(cell: Cell) -> tuple[int, dict[str, int], float]:
    """LLM parameters, parameters by part, and training FLOPs of one cell; nothing is allocated."""
    recipe = cell.recipe
    shapes = vlm.shapes(recipe.model)
    parts = {name: vlm.parameters(getattr(shapes, name)) for name in ("vit", "compressor", "llm")}
    return parts["llm"], parts, train_flops(cell.training)


def train_flops(recipe: Recipe, *, text: float | None = None) -> float:
    """FLOPs of both stages on cached features; `text` as for `stage_flops`."""
    stages = ("align", "finetune")
    return sum(stage_flops(recipe, stage, cached=True, text=text) for stage in stages)


def stage_flops(recipe: Recipe, stage: str, *, cached: bool, text: float | None = None) -> float:
    """FLOPs of one stage, on features that are `cached` or with the encoder in every step.

    `text` is the mean number of places of text in a row, of bucketed rows whose lengths are known;
    without it every row counts as one of the largest bucket.
    """
    model, rows, trained = recipe.model, recipe.rows, recipe.stage(stage)
    vit, compressor, llm = model.vit, model.compressor, model.llm
    if len(drawn := recipe.drawn) > 1:  # every V is that of as many steps
        each = (stage_flops(recipe.fixed(V), stage, cached=cached, text=text) for V in drawn)
        return sum(each) / len(drawn)
    shown = (compressor.tokens,)  # V of each pass of the LLM over an example
    if buckets := compressor.buckets(vit.side):
        shown = buckets[-1:]
    if stage == "finetune":
        shown = compressor.trained_tokens(vit.side) or shown
    made = [compressor.at(tokens) for tokens in shown]
    most, images, packed = *recipe.row[:2], recipe.arrangement.row_length
    text = most if text is None else text
    batch = trained.batch // trained.accumulate
    example = sum(
        cost.train_step_flops(
            True,
            each,
            llm,
            vit=vit,
            stage=stage,
            tokens=packed or text + images * cost.visual_tokens(each, vit),
            logits=text,
            question=rows.question_length,
            recompute=model.remat == "full",
            adapters=cost.lora_parameters(llm, recipe.lora.rank, recipe.lora.targets),
            batch=batch,
            images=images,
        )
        for each in made
    )
    # What reads the features does so once for all of them.
    example -= 2 * cost.compressor_products(made[0], vit, llm).reading * (len(made) - 1) * images
    if not cached:
        example += images * cost.encoder_flops(vit, made[0])
    return float(trained.steps * trained.batch * example)


def encoder_stage_flops(recipe: Recipe) -> float:
    """FLOPs of an encoder's own pretraining: forward and backward."""
    vit = recipe.model.vit
    plain = compressors.describe(dict(kind="none", tokens=vit.rows))
    images = recipe.encoder.steps * recipe.encoder.batch
    return float(3 * images * cost.encoder_flops(vit, plain))


def dry_run(config: ConfigDict, cells: Sequence[Cell]) -> None:
    """Prints the cells with parameters, FLOPs and an estimated time, and writes nothing."""
    rate = matmul_flops_per_second() * SMALL_MODEL_EFFICIENCY
    print(f"{'cell':36} {'LLM':>12} {'compressor':>11} {'V':>4} {'train GFLOP':>12} {'est. s':>7}")
    total, models = 0.0, set()
    for cell in cells:
        n, parts, flops = describe(cell)
        total += flops / rate * (cell.model not in models)
        models.add(cell.model)
        print(
            f"{cell.name:36} {n:12,} {parts['compressor']:11,} {cell.config.compressor.tokens:4} "
            f"{flops / 1e9:12,.0f} {flops / rate:7.0f}"
        )
    print(
        f"{len(cells)} cells, about {total / 60:.0f} min of training at {rate / 1e9:.0f} GFLOP/s "
        f"({SMALL_MODEL_EFFICIENCY:.0%} of what a matrix product reaches here now)"
    )


def matmul_flops_per_second(size: int = 768, dtype: str = "float32") -> float:
    """What one matrix product reaches on one device here; best of five."""
    x = jnp.ones((size, size), dtype)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        then = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - then)
    return 2 * size**3 / min(times)
