# SPDX-License-Identifier: Apache-2.0
"""Configuration to checkpoint: the encoder where it is to be made, then align, then finetune.

    vlm-jax train --config=configs/demo.py --workdir=runs/one [--config.llm.depth=4]

The same command resumes: a finished stage is read back, a broken one goes on behind its newest
whole
checkpoint, with the same numbers as if it had never stopped.
"""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import cli, mesh
from vlm_jax.data import loader, patches, prefixes, processor, sources, templates, word_tokenizer
from vlm_jax.data.tokenizer import check_vocabulary
from vlm_jax.learn import optimizer
from vlm_jax.learn.checkpoint import Checkpoints
from vlm_jax.learn.log import Log
from vlm_jax.learn.objective import (
    Sums,
    every_scale,
    next_token,
    patch_class,
    patch_reader,
)
from vlm_jax.learn.workdir import claim
from vlm_jax.models import layers, lora, vlm
from vlm_jax.models.vit import ViT
from vlm_jax.models.vlm import VLM
from vlm_jax.weights import start as weights_start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """The training split, how its examples become arrays, and its cached features if there are
    any."""

    source: sources.Source
    processor: processor.Processor
    features: np.ndarray | None = None  # [images, P, Z], raster order


def run_stage(
    name: str,
    model: Any,
    batches: loader.Batches,
    config: ConfigDict,
    folder: Path,
    objective: Callable[[Any, Any], Sums],
) -> Any:
    """The model after stage `name` (encoder, align or finetune), resumed from `folder` if begun."""
    stage = config[name]
    tx = optimizer.optimizer(stage)
    graph, state = optimizer.start(model, name, tx)
    checkpoints = Checkpoints(folder / name, keep=config.checkpoint.keep)
    # Of a stage without adapters the notes are what they were before there were any.
    adapters = lora.described(model) if name == "finetune" else None
    described = {"stage": name} | ({"lora": adapters} if adapters else {})
    if restored := checkpoints.restore(state, lora=adapters):
        state, notes = restored
        batches.position = notes["position"]
    first = int(state.step)
    if first < stage.steps:
        batches.skips.keep(folder / name / "skipped.jsonl")
        step_of = optimizer.make_step(
            graph, tx, objective, accumulate=stage.accumulate, z_loss=stage.z_loss
        )
        progress = Log(
            folder / name,
            name,
            first=first,
            last=stage.steps,
            every=config.log.every,
            batch=stage.batch,
            tensorboard=config.log.tensorboard,
            more=batches.fields,
        )
        waiting = None
        for step in range(first + 1, stage.steps + 1):
            state, metrics = step_of(state, next(batches))
            if waiting:
                progress(*waiting, checkpoints.newest)
            waiting = (step, metrics)
            if step % config.checkpoint.every == 0 or step == stage.steps:
                # Never save what has not been seen to be finite.
                progress(*waiting, checkpoints.newest)
                waiting = None
                checkpoints.save(state, {"position": batches.position} | described)
        progress.close()
        batches.close()
        if batches.skips:
            log.warning(skipped(name, batches, folder / name / "skipped.jsonl"))
    checkpoints.close()
    return optimizer.finish(graph, state)


def skipped(name: str, batches: loader.Batches, path: Path) -> str:
    """What stage `name` says in its end of the data that it could not use."""
    what, of = "examples", len(batches.source)
    if name == "encoder":
        what, of = "images", len(batches.source.images)
    what += " were skipped, the next good one taken instead"
    return f"{name}: {batches.skips.told(of, what)}\nall of them: {path}"


def check(config: ConfigDict) -> None:
    """Raises for a configuration that no later step could serve."""
    layers.remat(config.remat)
    lora.check(config.lora)
    if config.lora.rank and not config.finetune.steps:
        raise ValueError(
            f"lora.rank={config.lora.rank}, but finetune.steps=0: adapters are trained in finetune"
        )
    templates.query_of(config)
    for name in ("encoder", "align", "finetune"):
        stage = config[name]
        if stage.batch % stage.accumulate:
            raise ValueError(
                f"{name}.accumulate={stage.accumulate} does not divide {name}.batch={stage.batch}"
            )
        shards = mesh.batch_shards(jax.sharding.get_mesh())
        if stage.steps and (stage.batch // stage.accumulate) % shards:
            raise ValueError(
                f"{name}.batch={stage.batch} / accumulate={stage.accumulate} does not split "
                f"over the "
                f"{shards} batch shards of the mesh: make it a multiple of {shards}"
            )


def pretrain_encoder(config: ConfigDict, folder: Path, inputs: Inputs) -> ViT:
    """An encoder that has learnt what each patch of the training images shows."""
    source = inputs.source
    if not hasattr(source, "patch_labels"):
        raise ValueError(
            f"encoder.steps={config.encoder.steps}, but source {source.name!r} does not "
            "know what its patches show: set encoder.steps=0"
        )

    batches = patches.PatchBatches(
        source,
        inputs.processor,
        batch=config.encoder.batch,
        seed=config.seed,
        mesh=jax.sharding.get_mesh(),
        side=config.vit.image_size // config.vit.patch_size,
        skip=config.data.on_bad_example == "skip",
    )
    reader = patch_reader(config, source.patch_classes)
    return run_stage("encoder", reader, batches, config, folder, patch_class).vit


def train(
    config: ConfigDict,
    folder: Path,
    inputs: Inputs,
    *,
    encoder: ViT | None = None,
    seed: int | None = None,
) -> VLM:
    """A model through both stages, its checkpoints in `folder`; `seed` defaults to the config's.

    Adapters, where finetune trains them, are merged into the LLM in the end.
    Where one model serves any V it is trained alike whatever `compressor.tokens` says: by as many
    tokens as it can give in align, as its method is published in finetune.
    """
    seed = config.seed if seed is None else seed
    start = weights_start.load if config.start_from else vlm.create
    model = start(config, seed=seed)
    if encoder is not None:
        model = VLM(encoder, model.compressor, model.llm)
    if model.compressor.buckets:
        model = model.at(model.compressor.buckets[-1])
    for name in ("align", "finetune"):
        if config[name].steps == 0:
            continue
        if name == "finetune":
            model = lora.adapt(model, config.lora, seed=seed)
        batches = rows = loader.Batches(
            inputs.source,
            inputs.processor,
            batch=config[name].batch,
            seed=seed,
            features=inputs.features,
            skip=config.data.on_bad_example == "skip",
            mesh=jax.sharding.get_mesh(),
            workers=config.data.workers,
        )
        objective = next_token
        if name == "finetune" and model.compressor.prefixes:
            batches = prefixes.RandomPrefixes(
                batches,
                model.compressor.prefixes,
                seed=seed,
                accumulate=config.finetune.accumulate,
            )
        if name == "finetune" and model.compressor.scales:
            objective = every_scale
        model = run_stage(name, model, batches, config, folder, objective)
        if rows.cut:
            log.warning(
                f"{name}: {rows.cut} rows were longer than data.text_length="
                f"{config.data.text_length} and data.question_length="
                f"{config.data.question_length} allow, and lost their end"
            )
    return lora.merge(model)


def tokenizer_of(config: ConfigDict, folder: Path, source: sources.Source) -> Any:
    """The tokenizer that the configuration names, or a small one made from the training texts."""
    if config.data.tokenizer:
        tokenizer = processor.load_tokenizer(config.data.tokenizer)
    elif (folder / "tokenizer").is_dir():
        tokenizer = processor.load_tokenizer(folder / "tokenizer")
    else:
        texts = (text for i in range(len(source)) for turn in source[i].turns for text in turn)
        tokenizer = word_tokenizer.train_tokenizer(texts, config.llm.vocab)
        # Whole or not at all: a killed run must not leave half a tokenizer behind.
        tokenizer.save_pretrained(folder / "tokenizer.tmp")
        (folder / "tokenizer.tmp").rename(folder / "tokenizer")
    check_vocabulary(tokenizer, config.llm.vocab)
    return tokenizer


def main(argv: list[str] | None = None) -> int:
    config, flags = cli.parse(
        "train", __doc__, argv, strings={"workdir": "where the run lives"}, required=["workdir"]
    )
    cli.say_warnings()

    def body() -> int:
        return run(weights_start.adopt(config), Path(flags.workdir).absolute())

    return cli.report_errors("train", body)


def run(config: ConfigDict, folder: Path) -> int:
    """Trains as the configuration says, in `folder`."""
    with jax.set_mesh(mesh.make(**config.mesh)), claim(folder, config):
        check(config)
        vlm.shapes(config)  # an impossible model is found before the encoder is trained
        source = sources.open_source(config, "train")
        print(f"data: {source.describe()}", file=sys.stderr)
        inputs = Inputs(source, processor.Processor(tokenizer_of(config, folder, source), config))
        encoder = pretrain_encoder(config, folder, inputs) if config.encoder.steps else None
        model = train(config, folder, inputs, encoder=encoder)
        tokens = f"{config.compressor.tokens}"
        if model.compressor.buckets:
            tokens = f"up to {model.compressor.tokens}"
        merged = f" (LoRA of rank {config.lora.rank} merged in)" if config.lora.rank else ""
        print(
            f"llm {vlm.parameters(model.llm):,} parameters{merged}, compressor "
            f"{vlm.parameters(model.compressor):,}, {tokens} visual tokens: "
            f"checkpoints in {folder}",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
