# SPDX-License-Identifier: Apache-2.0
"""The stages of training: the encoder if it is trained, then align, then finetune."""

import logging
from collections.abc import Callable
from pathlib import PurePath
from typing import Any

import jax
from ml_collections import ConfigDict

from vlm_jax import hosts, layers, mesh, preemption, progress
from vlm_jax.data import loader, patches, prefixes, templates
from vlm_jax.models import lora, vlm
from vlm_jax.models.vit import ViT
from vlm_jax.models.vlm import VLM
from vlm_jax.training import contrast, memory, optimizer, precision, runs
from vlm_jax.training.checkpoint import Checkpoints
from vlm_jax.training.contrast import NameReader
from vlm_jax.training.fingerprint import Beginning
from vlm_jax.training.first_weights import first_model
from vlm_jax.training.inputs import Inputs as Inputs
from vlm_jax.training.inputs import open_inputs as open_inputs
from vlm_jax.training.inputs import tokenizer_of as tokenizer_of
from vlm_jax.training.log import Log
from vlm_jax.training.objective import PatchReader, Sums, of_stage, patch_class, patch_reader
from vlm_jax.training.overview import overview
from vlm_jax.training.recipe import Recipe
from vlm_jax.training.validation import Outside, Validation
from vlm_jax.training.workdir import claim
from vlm_jax.weights import start as weights_start

log = logging.getLogger(__name__)


def run_stage(
    name: str,
    model: Any,
    batches: loader.Batches | prefixes.Drawn,
    recipe: Recipe,
    folder: PurePath,
    objective: Callable[[Any, Any], Sums],
    *,
    begin: Callable[[], None] | None = None,
    validation: Validation | None = None,
) -> Any:
    """The model after stage `name` (encoder, align or finetune), resumed from `folder` if started.

    `begin` is called after the first step of this process, `validation` at the steps that are due.
    """
    stage = recipe.stage(name)
    tx = optimizer.optimizer(stage)
    graph, state = optimizer.start(model, name, tx)
    checkpoints = Checkpoints(folder / name, keep=recipe.checkpoint_keep)
    # Without adapters the notes are as in versions that had none.
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
            if first == 0:  # an attempt without a checkpoint may have been a different run
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
        if validation is not None:
            validation.resume(first)
            if validation.due(first):
                validation(first, graph, state)
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
                        seen(*waiting)  # it raises if the run must end without a save
                        waiting = None
                        batches.skips.share()
                        notes = {"position": batches.position} | described
                        if lines.skipped:
                            notes |= {"skipped_updates": lines.skipped}
                        lines.save()
                        checkpoints.save(state, notes)
                    if validation is not None and not stops and validation.due(step):
                        if waiting:
                            seen(*waiting)
                            waiting = None
                        lines.leave_out(validation(step, graph, state))
                    if stops:
                        checkpoints.close()
                        lines.close()
                        raise preemption.stopped(
                            f"{name} is saved at step {step} of {stage.steps}; the same command "
                            "continues from there"
                        )
                with progress.doing(f"{name}: writing its checkpoint"):
                    checkpoints.wait()
        lines.close()
        batches.close()
        if batches.skips:
            log.warning(skipped(name, batches, skipped_path))
    checkpoints.close()
    return optimizer.finish(graph, state)


def skipped(name: str, batches: loader.Batches | prefixes.Drawn, path: PurePath) -> str:
    """The message at the end of stage `name` about the data that it could not use."""
    what, of = "examples", len(batches.source)
    if name == "encoder":
        what, of = "images", len(batches.source.images)
    what += " were skipped and replaced by the next good one"
    return f"{name}: {batches.skips.summary(of, what)}\nall of them: {path}"


def check(recipe: Recipe, *, cell: bool = False) -> None:
    """Raises ValueError for a recipe that cannot be trained.

    The `cell` of a grid takes the LLM alone of the folder that it starts from, and the grid's
    encoder.
    """
    layers.remat(recipe.model.remat)
    lora.check(recipe.lora)
    if recipe.lora.rank and not recipe.finetune.steps:
        raise ValueError(
            f"lora.rank={recipe.lora.rank}, but finetune.steps=0: adapters are trained in finetune"
        )
    if recipe.start_from and recipe.encoder.steps and not cell:
        raise ValueError(
            f"encoder.steps={recipe.encoder.steps}: a new encoder would replace the one of "
            f"start_from={recipe.start_from}: set encoder.steps=0, or put the encoder that was "
            "trained in front of this LLM (`vlm-jax convert --vision=WORKDIR --llm=...`); the "
            "cells of `vlm-jax grid` may have both (grid.llms.NAME.start_from)"
        )
    if recipe.model.compressor.clip and (cell or not recipe.start_from):
        raise ValueError(
            f"compressor.kind={recipe.model.compressor.kind!r} reads questions with CLIP's text "
            "tower, which would be random: start_from a folder that `vlm-jax convert "
            "--text-tower=DIR` made with it; a selection is not trained, so it may also be chosen "
            "for a model that was trained without compression"
        )
    method, pruning, images = recipe.model.compressor, recipe.model.pruning, recipe.row[1]
    inside = pruning is not None and not pruning.of_clips
    if images > 1 and (method.summarizes or method.prefusion or (cell and inside)):
        what = f"compressor.kind={method.kind!r}"
        if not (method.summarizes or method.prefusion):
            what = f"pruning.kind={pruning.kind!r}"
        raise ValueError(
            f"{what} takes one image in a row, and rows have room for {images} (data.frames of a "
            "clip, data.images_per_row, data.row_images): choose another, or one image or frame"
        )
    if recipe.model.compressor.summarizes:
        templates.check_image_first(recipe.rows.template)
    if not recipe.align.steps + recipe.finetune.steps:
        raise ValueError(
            "align.steps=0 and finetune.steps=0: such a run trains no model; set one of them"
        )
    if recipe.drawn and recipe.arrangement.row_length:
        raise ValueError(
            f"compressor.elastic={recipe.drawn}: packed rows (data.row_length="
            f"{recipe.arrangement.row_length}) have room for the most visual tokens, so that steps "
            "of fewer would cost as much; set data.row_length=0 and sort rows by data.buckets"
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
    """An encoder trained to say what each patch of the training images shows."""
    return pretrain_reader(recipe, folder, inputs, begin=begin).vit


def pretrain_reader(
    recipe: Recipe,
    folder: PurePath,
    inputs: Inputs,
    *,
    begin: Callable[[], None] | None = None,
) -> PatchReader | NameReader:
    """That encoder with its heads; with config.contrast it also knows names."""
    source, weight = inputs.source, recipe.contrast.weight
    if not hasattr(source, "patch_labels"):
        raise ValueError(
            f"encoder.steps={recipe.encoder.steps}, but source {source.name!r} does not "
            "know what its patches show: set encoder.steps=0"
        )
    if weight and not getattr(source, "names", ()):
        raise ValueError(
            f"contrast.weight={weight}, but nothing that source {source.name!r} shows has a name: "
            "set data.picture_share above 0, or contrast.weight=0"
        )
    batches = patches.PatchBatches(
        source,
        inputs.processor,
        batch=recipe.encoder.batch,
        seed=recipe.seed,
        mesh=jax.sharding.get_mesh(),
        side=recipe.model.vit.side,
        names=weight > 0,
        skip=recipe.skip,
    )
    objective: Callable[[Any, Any], Sums] = patch_class
    if weight:
        known = contrast.vocabulary(source.names)
        sizes = (recipe.model, source.patch_classes, len(known), recipe.contrast.width)
        reader = contrast.name_reader(*sizes, seed=recipe.seed)
        objective = contrast.patch_class_and_name(contrast.bags(source.names, known), weight)
    else:
        reader = patch_reader(recipe.model, source.patch_classes, seed=recipe.seed)
    return run_stage("encoder", reader, batches, recipe, folder, objective, begin=begin)


def train(
    recipe: Recipe,
    folder: PurePath,
    inputs: Inputs,
    *,
    encoder: ViT | None = None,
    seed: int | None = None,
    begin: Callable[[], None] | None = None,
    outside: Outside | None = None,
) -> VLM:
    """Trains a model through both stages, with checkpoints in `folder`; `seed` defaults to the
    recipe's.

    With eval_every it is validated on `inputs.validation`; `outside` answers and draws.

    Adapters of finetune are merged into the LLM at the end. A model that serves any V is trained
    the same way for any `compressor.tokens`: with the most tokens that it can give in align, and as
    its method is published in finetune; one with `compressor.elastic` with a V of its own in each
    step of both.
    """
    seed = recipe.seed if seed is None else seed
    model = first_model(recipe, encoder, seed=seed)
    for name in ("align", "finetune"):
        if recipe.stage(name).steps == 0:
            continue
        if name == "finetune":
            if recipe.align.steps and recipe.frozen_dtype != "float32":
                # Align held its frozen weights in fewer bytes: take the first weights again.
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
        if drawn := model.compressor.drawn:
            batches = prefixes.DrawnTokens(batches, drawn, seed=seed)
            progress.say(
                f"{name}: each step runs one of {', '.join(map(str, drawn))} visual tokens, each "
                "compiled at its first step"
            )
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
                "of the data: each batch repeats some of them"
            )
        objective = of_stage(name, model.compressor, chunk=recipe.loss_chunk)
        validation = None
        if inputs.validation is not None:
            held_out = (inputs.validation, inputs.processor)
            validation = Validation(name, *held_out, recipe, folder, outside)
        model = run_stage(
            name, model, batches, recipe, folder, objective, begin=begin, validation=validation
        )
        progress.say(f"{name}: {rows.usage.everywhere()}")
        cut = set().union(*hosts.collected(sorted(rows.cut_rows)))
        if cut:
            log.warning(
                f"{name}: {len(cut)} of {len(inputs.source)} rows were longer than "
                f"data.text_length={recipe.rows.text_length} and data.question_length="
                f"{recipe.rows.question_length} allow, and were truncated"
            )
    return lora.merge(precision.widened(model))


def with_start(config: ConfigDict) -> ConfigDict:
    """The configuration with the fields that the folder of `start_from` determines."""
    if not config.start_from:
        return config
    return weights_start.adopt(config, runs.described(config.start_from, "start_from"))


def run(config: ConfigDict, folder: PurePath, outside: Outside | None = None) -> int:
    """Trains as the configuration says, in `folder`; 0, the exit status."""
    with jax.set_mesh(mesh.make(**config.mesh)), claim(folder, config) as claimed:
        recipe = Recipe.of(config)
        check(recipe)
        # An impossible or too large model is refused before anything is computed.
        shapes = vlm.shapes(recipe.model)
        for warning in memory.check_training(recipe):
            log.warning(warning)
        progress.say(overview(shapes, recipe))
        inputs, begin = open_inputs(claimed, recipe)
        if not (config.start_from or config.encoder.steps):
            log.warning(
                "the encoder has random weights and is not trained: name a model that has one "
                "(start_from), or train one (encoder.steps)"
            )
        encoder = None
        if config.encoder.steps:
            encoder = pretrain_encoder(recipe, folder, inputs, begin=begin)
        model = train(recipe, folder, inputs, encoder=encoder, begin=begin, outside=outside)
        tokens = f"{config.compressor.tokens}"
        if model.compressor.buckets:
            tokens = f"up to {model.compressor.tokens}"
        if model.compressor.drawn:
            tokens = " or ".join(map(str, model.compressor.drawn))
        merged = f" (LoRA of rank {config.lora.rank} merged in)" if config.lora.rank else ""
        progress.say(
            f"llm {vlm.parameters(model.llm):,} parameters{merged}, compressor "
            f"{vlm.parameters(model.compressor):,}, {tokens} visual tokens: "
            f"checkpoints in {folder}"
        )
    return 0
