# SPDX-License-Identifier: Apache-2.0
"""The frozen description of one training: its model, the rows it reads, its stages."""

import dataclasses
from typing import Any

from vlm_jax.compressors.method import read
from vlm_jax.data.packing import Arrangement
from vlm_jax.data.processor import RowFormat
from vlm_jax.data.sources import Origin
from vlm_jax.models.sizes import LoRASize, VLMSize


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage, field for field config.finetune, which explains them."""

    steps: int
    batch: int
    accumulate: int
    learning_rate: float
    compressor_rate: float
    warmup: float
    weight_decay: float
    beta1: float
    beta2: float
    epsilon: float
    moments: str
    clip_norm: float
    z_loss: float
    max_nonfinite: int

    @classmethod
    def of(cls, section: Any) -> "Stage":
        """The description in the section of a stage; ValueError for a field that is missing."""
        return cls(**read(cls, section, "a stage"))


@dataclasses.dataclass(frozen=True)
class ContrastSize:
    """The encoder's second objective, field for field config.contrast, which explains them."""

    weight: float
    width: int


@dataclasses.dataclass(frozen=True)
class ValidationSize:
    """How a training is validated: config.eval_every and the fields of config.validation."""

    every: int
    split: str
    hold_out: int
    examples: int
    answers: int

    @classmethod
    def of(cls, config: Any) -> "ValidationSize":
        """As a configuration says. ValueError for examples that are held out of nothing."""
        size = cls(every=config.eval_every, **config.validation)
        if size.hold_out and not size.every:
            raise ValueError(
                f"validation.hold_out={size.hold_out}, but eval_every=0: they would neither be "
                "trained on nor validated; set eval_every, or validation.hold_out=0"
            )
        return size


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One training.

    Attributes:
      model: what is trained. lora: adapters of its LLM.
      origin: where examples come from. rows: how one becomes a row.
      arrangement: which examples share a row or a batch. skip: whether bad examples
        are passed over. workers: processes that read.
      loss_chunk: positions of a row whose scores are there at a time, as config.loss_chunk.
      frozen_dtype: of the weights that a stage leaves alone.
      encoder, align, finetune: the stages, in this order.
      contrast: the second objective of the first.
      seed: of weights and order. start_from: the folder with the first weights, or "".
      validation: whether and how it is validated.
      checkpoint_every, checkpoint_keep, log_every: steps, checkpoints, steps.
      tensorboard: whether it is written too.
    """

    model: VLMSize
    lora: LoRASize
    origin: Origin
    rows: RowFormat
    arrangement: Arrangement
    skip: bool
    workers: int
    loss_chunk: int
    frozen_dtype: str
    encoder: Stage
    align: Stage
    finetune: Stage
    contrast: ContrastSize
    seed: int
    start_from: str
    validation: ValidationSize
    checkpoint_every: int
    checkpoint_keep: int
    log_every: int
    tensorboard: bool

    @classmethod
    def of(cls, config: Any) -> "Recipe":
        """As a configuration says. ValueError where it describes no model or no rows for it."""
        return cls(
            model=VLMSize.of(config),
            lora=LoRASize.of(config.lora),
            origin=Origin.of(config),
            rows=RowFormat.of(config),
            arrangement=Arrangement.of(config),
            skip=config.data.on_bad_example == "skip",
            workers=config.data.workers,
            loss_chunk=config.loss_chunk,
            frozen_dtype=config.frozen_dtype,
            encoder=Stage.of(config.encoder),
            align=Stage.of(config.align),
            finetune=Stage.of(config.finetune),
            contrast=ContrastSize(**config.contrast),
            seed=config.seed,
            start_from=config.start_from,
            validation=ValidationSize.of(config),
            checkpoint_every=config.checkpoint.every,
            checkpoint_keep=config.checkpoint.keep,
            log_every=config.log.every,
            tensorboard=config.log.tensorboard,
        )

    def stage(self, name: str) -> Stage:
        """The stage of this name."""
        return getattr(self, name)

    @property
    def visual(self) -> int:
        """V of an image in training: all that a method of any V can give, most slots of an adaptive
        one."""
        side, method = self.model.vit.side, self.model.compressor
        buckets = method.buckets(side)
        return buckets[-1] if buckets else self.model.visual_tokens

    @property
    def drawn(self) -> tuple[int, ...]:
        """V of which each step of align and finetune runs one; () if all have the same."""
        return self.model.compressor.drawn_tokens(self.model.vit.side)

    def fixed(self, tokens: int) -> "Recipe":
        """The training of the same model for `tokens` visual tokens alone."""
        compressor = self.model.compressor.fixed(tokens)
        return dataclasses.replace(
            self, model=dataclasses.replace(self.model, compressor=compressor)
        )

    @property
    def largest(self) -> "Recipe":
        """The same training with the largest V in every step; itself if all have the same."""
        return self.fixed(self.drawn[-1]) if self.drawn else self

    @property
    def row(self) -> tuple[int, int, int]:
        """Places of text of a row, its images, and the LLM's tokens of both; of the largest bucket
        where there are several, of the largest V where steps draw it, and of the V that is asked
        for where a method gives any."""
        arranged, rows = self.arrangement, self.rows
        if arranged.row_length:
            return arranged.row_length, arranged.row_images, arranged.row_length
        images, V = rows.images_per_row, max(self.drawn, default=self.model.visual_tokens)
        return rows.text_length, images, rows.text_length + images * V

    @property
    def last(self) -> str:
        """The stage that a finished training ends with; ValueError where there is none."""
        for name in ("finetune", "align"):
            if self.stage(name).steps:
                return name
        raise ValueError("align.steps=0 and finetune.steps=0: such a run trains no model")
