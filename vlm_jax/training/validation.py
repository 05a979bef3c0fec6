# SPDX-License-Identifier: Apache-2.0
"""Validation while a stage is trained: loss and scores on examples that it is not trained on.

It changes no number of the training, and a resumed run has the lines of an unbroken one.
"""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, NamedTuple

import jax
from flax import nnx

from vlm_jax import files, hosts, progress
from vlm_jax.data import loader, subset
from vlm_jax.data.example import Source
from vlm_jax.data.processor import Processor
from vlm_jax.data.texts import Texts
from vlm_jax.models.vlm import VLM
from vlm_jax.training.log import drop_after
from vlm_jax.training.objective import next_token
from vlm_jax.training.optimizer import State
from vlm_jax.training.recipe import Recipe

FILE = "validation.jsonl"  # in the folder of a stage
Scores = Mapping[str, Mapping[str, Any]]  # task -> score, stderr, n, ...


class Outside(NamedTuple):
    """What validation needs of rooms above this one.

    Attributes:
      answers: of a split and its processor makes a function that scores a model's answers.
      draw: draws the curves in the folder of a stage.
    """

    answers: Callable[[Source, Processor], Callable[[VLM], Scores]]
    draw: Callable[[PurePath], None]


class Validation:
    """Validates one stage; `source` has the examples.

    The loss is that of every supervised token of at most `recipe.validation.examples` examples,
    each in a row of its own, at the V of requests. Scores are of the generated answers to at most
    `recipe.validation.answers` of them, by the protocol of the source.
    """

    def __init__(
        self,
        name: str,
        source: Source,
        processor: Processor,
        recipe: Recipe,
        folder: PurePath,
        outside: Outside | None,
    ):
        self.name, self.recipe, self.folder = name, recipe, folder / name
        self.processor, self.outside = processor, outside
        size, stage = recipe.validation, recipe.stage(name)
        self.every, self.last = size.every, stage.steps
        self.batch = stage.batch // stage.accumulate
        self.source = subset.sample(source, size.examples)
        self.texts = Texts(self.source, processor, answer=True, skip=recipe.skip)
        self.answers = None
        if outside is not None and size.answers:
            self.answers = outside.answers(subset.sample(source, size.answers), processor)
        self.done = -1
        self._sums: Callable | None = None

    def resume(self, step: int) -> None:
        """Drops the lines after the step from which the stage continues; all of a fresh stage."""
        path = self.folder / FILE
        if hosts.is_writer():
            drop_after(path, step if step else -1)

        def last() -> int:
            lines = path.read_text().splitlines() if path.exists() else []
            return json.loads(lines[-1])["step"] if lines else -1

        self.done = hosts.from_writer(last)

    def due(self, step: int) -> bool:
        """Whether this step is validated and was not yet: every so many, the first and the last."""
        return self.done < step and (step % self.every == 0 or step == self.last)

    def __call__(self, step: int, graph: nnx.GraphDef, state: State) -> float:
        """Validates the weights of a step, writes a line, draws the curves; the seconds it took."""
        then = time.monotonic()
        with progress.doing(f"validation of {self.name} at step {step}"):
            found = {"step": step} | self._loss(graph, state)
            if self.answers is not None:
                scores = self.answers(nnx.merge(graph, state.trained, state.frozen))
                shown = ("score", "stderr", "n", "skipped")
                found["scores"] = {
                    task: {key: score[key] for key in shown} for task, score in scores.items()
                }
        found["seconds"] = round(time.monotonic() - then, 2)
        self.done = step
        if hosts.is_writer():
            self._tell(found)
        return time.monotonic() - then

    def _tell(self, found: dict[str, Any]) -> None:
        with files.adding(self.folder / FILE) as lines:
            lines.add(json.dumps(found))
        words = "no supervised token" if found["loss"] is None else f"loss {found['loss']:.4f}"
        if scores := found.get("scores"):
            mean = sum(score["score"] for score in scores.values()) / len(scores)
            words += f"  score {mean:.3f}" + f" (mean of {len(scores)} tasks)" * (len(scores) > 1)
        progress.say(f"{self.name} {found['step']}/{self.last}  validation: {words}")
        if self.outside is not None:
            self.outside.draw(self.folder)

    def _loss(self, graph: nnx.GraphDef, state: State) -> dict[str, Any]:
        """Mean loss and accuracy of all supervised tokens, and how many tokens and examples."""
        if self._sums is None:
            tokens, chunk = self.recipe.model.compressor.tokens, self.recipe.loss_chunk

            @jax.jit
            def sums(trained, frozen, batch, valid):
                model = nnx.merge(graph, trained, frozen)
                model = model.at(tokens) if model.compressor.buckets else model
                mask = batch["loss_mask"] & valid[:, None]
                found = next_token(model, {**batch, "loss_mask": mask}, chunk=chunk)
                return found.nll, found.correct, mask.sum(), valid.sum()

            self._sums = sums
        faults: loader.Faults = {}
        batches = loader.evaluation_batches(
            self.source,
            self.processor,
            batch=self.batch,
            answer=True,
            skip=self.recipe.skip,
            texts=self.texts,
            mesh=jax.sharding.get_mesh(),
            faults=faults,
        )
        totals = [0.0, 0.0, 0, 0]
        for batch in batches:
            del batch["index"]
            valid = batch.pop("valid")
            found = self._sums(state.trained, state.frozen, batch, valid)
            totals = [a + b for a, b in zip(totals, map(float, found), strict=True)]
        nll, correct, tokens, examples = totals
        return {
            "loss": nll / tokens if tokens else None,
            "accuracy": correct / tokens if tokens else None,
            "tokens": int(tokens),
            "examples": int(examples),
            "skipped": len(self.source) - int(examples),
        }
