# SPDX-License-Identifier: Apache-2.0
"""The stages of a training: the encoder where it is to be made, then align, then finetune."""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from vlm_jax import hosts, layers, mesh, preemption, progress
from vlm_jax.data import (
    loader,
    patches,
    prefixes,
    processor,
    sources,
    targets,
    word_tokenizer,
)
from vlm_jax.data.texts import Texts
from vlm_jax.data.tokenizer import check_vocabulary, hash_of, keep_tokenizer
from vlm_jax.models import lora, vlm
from vlm_jax.models.vit import ViT
from vlm_jax.models.vlm import VLM
from vlm_jax.training import memory, optimizer, precision, runs
from vlm_jax.training.checkpoint import Checkpoints
from vlm_jax.training.fingerprint import Beginning
from vlm_jax.training.first_weights import first_model
from vlm_jax.training.log import Log
from vlm_jax.training.objective import Sums, of_stage, patch_class, patch_reader
from vlm_jax.training.overview import overview
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.workdir import Claim, claim
from vlm_jax.weights import start as weights_start

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """A split, how its examples become arrays, and its cached features if there are any."""

    source: sources.Source
    processor: processor.Processor
    features: np.ndarray | None = None  # [images, P, Z], raster order
    _texts: dict[tuple, Texts] = field(default_factory=dict, repr=False)

    def texts(self, *, answer: bool, skip: bool) -> Texts:
        """The texts of the split, made once for all stages and for all cells that read alike.

        Cells share what a grid makes of these inputs by `dataclasses.replace`; of the texts, only
        what is read as the question differs between them (`Processor.reading_as`).
        """
        key = (self.processor.query, answer, skip)
        if key not in self._texts:
            self._texts[key] = Texts(self.source, self.processor, answer=answer, skip=skip)
        return self._texts[key]


def run_stage(
    name: str,
    model: Any,
    batches: loader.Batches,
    recipe: Recipe,
    folder: PurePath,
    objective: Callable[[Any, Any], Sums],
    *,
    begin: Callable[[], None] | None = None,
) -> Any:
    """The model after stage `name` (encoder, align or finetune), resumed from `folder` if begun.

    `begin` is called when the first step of this process has ended.
    """
    stage = recipe.stage(name)
    tx = optimizer.optimizer(stage)
    graph, state = optimizer.start(model, name, tx)
    checkpoints = Checkpoints(folder / name, keep=recipe.checkpoint_keep)
    # Of a stage without adapters the notes are what they were before there were any.
    adapters = lora.described(model) if name == "finetune" else None
    described = {"stage": name} | ({"lora": adapters} if adapters else {})
    with progress.doing(f"{name}: reading its checkpoint"):
        restored = checkpoints.restore(state, lora=adapters)
    if restored:
        state, notes = restored
        batches.position = notes["position"]
    first = int(state.step)
    skipped_before = restored[1].get("skipped_updates", 0) if restored else 0
    if first < stage.steps:
        skipped_path = folder / name / "skipped.jsonl"
        if hosts.is_writer():
            if first == 0:  # an attempt that left nothing else may have been another run
                skipped_path.unlink(missing_ok=True)
            batches.skips.keep(skipped_path)
        step_of = optimizer.make_step(
            graph, tx, objective, accumulate=stage.accumulate, z_loss=stage.z_loss
        )
        lines = Log(
            folder / name,
            name,
            first=first,
            last=stage.steps,
            every=recipe.log_every,
            batch=batches.examples,
            tensorboard=recipe.tensorboard,
            patience=stage.max_nonfinite,
            skipped=skipped_before,
            more=batches.fields,
        )
        waiting, news = None, [begin] if begin else []
        beginning = Beginning(folder / name, state)

        def seen(step: int, metrics: optimizer.Metrics) -> None:
            lines(step, metrics, checkpoints.newest)
            beginning.note(step, float(metrics.loss))
            while news:
                news.pop()()

        with progress.doing(name, stage.steps) as task:
            task.note(first)
            with progress.doing("the first step, which is compiled"):
                state, metrics = step_of(state, next(batches))
            with preemption.held():
                for step in range(first + 1, stage.steps + 1):
                    if step > first + 1:
                        state, metrics = step_of(state, next(batches))
                    task.note(step)
                    if waiting:
                        seen(*waiting)
                    waiting = (step, metrics)
                    stops = preemption.reached()
                    if stops or step % recipe.checkpoint_every == 0 or step == stage.steps:
                        seen(*waiting)  # it raises where the run is to end without a save
                        waiting = None
                        batches.skips.share()
                        notes = {"position": batches.position} | described
                        if lines.skipped:
                            notes |= {"skipped_updates": lines.skipped}
                        lines.save()
                        checkpoints.save(state, notes)
                    if stops:
                        checkpoints.close()
                        lines.close()
                        raise preemption.stopped(
                            f"{name} is saved at step {step} of {stage.steps}; the same command "
                            "goes on from there"
                        )
                with progress.doing(f"{name}: writing its checkpoint"):
                    checkpoints.wait()
        lines.close()
        batches.close()
        if batches.skips:
            log.warning(skipped(name, batches, skipped_path))
    checkpoints.close()
    return optimizer.finish(graph, state)


def skipped(name: str, batches: loader.Batches, path: PurePath) -> str:
    """What stage `name` says in its end of the data that it could not use."""
    what, of = "examples", len(batches.source)
    if name == "encoder":
        what, of = "images", len(batches.source.images)
    what += " were skipped, the next good one taken instead"
    return f"{name}: {batches.skips.summary(of, what)}\nall of them: {path}"


def check(recipe: Recipe) -> None:
    """Raises for a training that no later step could serve."""
    layers.remat(recipe.model.remat)
    lora.check(recipe.lora)
    if recipe.lora.rank and not recipe.finetune.steps:
        raise ValueError(
            f"lora.rank={recipe.lora.rank}, but finetune.steps=0: adapters are trained in finetune"
        )
    if recipe.start_from and recipe.encoder.steps:
        raise ValueError(
            f"encoder.steps={recipe.encoder.steps}: start_from={recipe.start_from} has an encoder, "
            "which a new one would replace: set encoder.steps=0"
        )
    if not recipe.align.steps + recipe.finetune.steps:
        raise ValueError(
            "align.steps=0 and finetune.steps=0: such a run trains no model; set one of them"
        )
    recipe.arrangement.check(
        text=recipe.rows.text_length,
        question=recipe.rows.question_length,
        images=recipe.rows.images_per_row,
        visual=recipe.visual,
        query=recipe.rows.query,
    )
    for name in ("encoder", "align", "finetune"):
        stage = recipe.stage(name)
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


def pretrain_encoder(
    recipe: Recipe,
    folder: PurePath,
    inputs: Inputs,
    *,
    begin: Callable[[], None] | None = None,
) -> ViT:
    """An encoder that has learnt what each patch of the training images shows."""
    source = inputs.source
    if not hasattr(source, "patch_labels"):
        raise ValueError(
            f"encoder.steps={recipe.encoder.steps}, but source {source.name!r} does not "
            "know what its patches show: set encoder.steps=0"
        )

    batches = patches.PatchBatches(
        source,
        inputs.processor,
        batch=recipe.encoder.batch,
        seed=recipe.seed,
        mesh=jax.sharding.get_mesh(),
        side=recipe.model.vit.side,
        skip=recipe.skip,
    )
    reader = patch_reader(recipe.model, source.patch_classes, seed=recipe.seed)
    return run_stage("encoder", reader, batches, recipe, folder, patch_class, begin=begin).vit


def train(
    recipe: Recipe,
    folder: PurePath,
    inputs: Inputs,
    *,
    encoder: ViT | None = None,
    seed: int | None = None,
    begin: Callable[[], None] | None = None,
) -> VLM:
    """A model through both stages, its checkpoints in `folder`; `seed` defaults to the recipe's.

    Adapters, where finetune trains them, are merged into the LLM in the end.
    Where one model serves any V it is trained alike whatever `compressor.tokens` says: by as many
    tokens as it can give in align, as its method is published in finetune.
    """
    seed = recipe.seed if seed is None else seed
    model = first_model(recipe, encoder, seed=seed)
    for name in ("align", "finetune"):
        if recipe.stage(name).steps == 0:
            continue
        if name == "finetune":
            if recipe.align.steps and recipe.frozen_dtype != "float32":
                # What align left alone was narrowed: trained on, or frozen again, from the first.
                first = first_model(recipe, encoder, seed=seed)
                model = VLM(first.vit, model.compressor, first.llm)
                del first
            model = lora.adapt(model, recipe.lora, seed=seed)
        model = precision.narrowed(model, name, recipe.frozen_dtype)
        with progress.doing(f"{name}: preparing the rows"):
            batches = rows = loader.Batches(
                inputs.source,
                inputs.processor,
                batch=recipe.stage(name).batch,
                seed=seed,
                features=inputs.features,
                texts=inputs.texts(answer=True, skip=recipe.skip),
                skip=recipe.skip,
                mesh=jax.sharding.get_mesh(),
                workers=recipe.workers,
                arrangement=recipe.arrangement,
                visual=model.compressor.tokens,
            )
        if rows.plan is not None:
            progress.say(rows.plan.summary(name))
        if name == "finetune" and model.compressor.prefixes:
            batches = prefixes.RandomPrefixes(
                batches,
                model.compressor.prefixes,
                seed=seed,
                accumulate=recipe.finetune.accumulate,
            )
        batch = recipe.stage(name).batch
        if recipe.arrangement.plain and batch > len(inputs.source):
            log.warning(
                f"{name}.batch={batch} is more than the {len(inputs.source)} examples "
                "of the data: each batch has some of them more than once"
            )
        objective = of_stage(name, model.compressor, chunk=recipe.loss_chunk)
        model = run_stage(name, model, batches, recipe, folder, objective, begin=begin)
        progress.say(f"{name}: {rows.usage.everywhere()}")
        cut = set().union(*hosts.collected(sorted(rows.cut_rows)))
        if cut:
            log.warning(
                f"{name}: {len(cut)} of {len(inputs.source)} rows were longer than "
                f"data.text_length={recipe.rows.text_length} and data.question_length="
                f"{recipe.rows.question_length} allow, and lost their end"
            )
    return lora.merge(precision.widened(model))


def tokenizer_of(named: str, vocab: int, kept: PurePath | None, source: sources.Source) -> Any:
    """The tokenizer that is named, or that a run keeps in a folder, or a small one
    made from the training texts."""
    if named:
        tokenizer = processor.load_tokenizer(named)
    elif kept is not None and kept.is_dir():
        tokenizer = processor.load_tokenizer(kept)
    else:
        texts = (text for i in range(len(source)) for turn in source[i].turns for text in turn)
        tokenizer = word_tokenizer.train_tokenizer(texts, vocab)
    check_vocabulary(tokenizer, vocab)
    return tokenizer


def open_inputs(claimed: Claim, recipe: Recipe, **hashes: str) -> tuple[Inputs, Callable[[], None]]:
    """The training split of a claimed folder's run, as `recipe` describes it, and what makes the
    folder its own.

    ValueError where the folder was begun with other data or another tokenizer, or with anything
    else of other `hashes`.
    """
    named, kept = claimed.config.data.tokenizer, claimed.folder / "tokenizer"
    with progress.doing("opening the training data"):
        source = sources.open_source(recipe.origin, "train")
    progress.say(f"data: {json.dumps(source.describe())}")
    with progress.doing("making or reading the tokenizer"):
        folder = kept if claimed.recorded else None
        tokenizer = tokenizer_of(named, recipe.model.llm.vocab, folder, source)
    claimed.reads(data=source.data_hash, tokenizer=hash_of(tokenizer), **hashes)

    def begin() -> None:
        fresh = claimed.recorded is None
        if fresh and not named and hosts.is_writer():
            keep_tokenizer(tokenizer, kept)
        claimed.begin()

    row_processor = processor.Processor(tokenizer, recipe.rows)
    with progress.doing("looking for rows without an answer"):
        note = targets.check(source, row_processor, skip=recipe.skip)
    if note:
        progress.say(note)
    return Inputs(source, row_processor), begin


def with_start(config: ConfigDict) -> ConfigDict:
    """The configuration with what the folder that it starts from decides."""
    if not config.start_from:
        return config
    return weights_start.adopt(config, runs.described(config.start_from, "start_from"))


def run(config: ConfigDict, folder: PurePath) -> int:
    """Trains as the configuration says, in `folder`."""
    with jax.set_mesh(mesh.make(**config.mesh)), claim(folder, config) as claimed:
        recipe = Recipe.of(config)
        check(recipe)
        # An impossible model, or one too large, is found before anything is made of it.
        shapes = vlm.shapes(recipe.model)
        for warning in memory.check_training(recipe):
            log.warning(warning)
        progress.say(overview(shapes, recipe))
        inputs, begin = open_inputs(claimed, recipe)
        if not (config.start_from or config.encoder.steps):
            log.warning(
                "the encoder has random weights and keeps them: name a model that has one "
                "(start_from), or let one be trained (encoder.steps)"
            )
        encoder = None
        if config.encoder.steps:
            encoder = pretrain_encoder(recipe, folder, inputs, begin=begin)
        model = train(recipe, folder, inputs, encoder=encoder, begin=begin)
        tokens = f"{config.compressor.tokens}"
        if model.compressor.buckets:
            tokens = f"up to {model.compressor.tokens}"
        merged = f" (LoRA of rank {config.lora.rank} merged in)" if config.lora.rank else ""
        progress.say(
            f"llm {vlm.parameters(model.llm):,} parameters{merged}, compressor "
            f"{vlm.parameters(model.compressor):,}, {tokens} visual tokens: "
            f"checkpoints in {folder}"
        )
    return 0
