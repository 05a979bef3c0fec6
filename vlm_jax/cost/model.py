# SPDX-License-Identifier: Apache-2.0
"""A model described by its sizes, and what a request to it costs: FLOPs, bytes and seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax import compressors
from vlm_jax.compressors.method import Number
from vlm_jax.cost import chips, described, parameters, roofline
from vlm_jax.cost.chips import Chip
from vlm_jax.cost.flops import Flops
from vlm_jax.cost.roofline import Memory
from vlm_jax.models.sizes import LLMSize, ViTSize, VLMSize


class Description(VLMSize):
    """The sizes of a model, part by part, and how many parameters each has."""

    @property
    def vit_parameters(self) -> int:
        """Parameters of the encoder."""
        return parameters.vit_parameters(self.vit)

    @property
    def compressor_parameters(self) -> int:
        """Parameters of the compressor with its projection into the LLM."""
        return parameters.compressor_parameters(self.compressor, self.vit, self.llm)

    @property
    def llm_parameters(self) -> int:
        """Parameters of the LLM, embeddings included."""
        return parameters.llm_parameters(self.llm)


@dataclass(frozen=True)
class RequestCost:
    """What one request costs, or a batch of them.

    Attributes:
      flops: of one request, by phase.
      memory: bytes of one batch, by kind.
      seconds: of one batch, by phase; None without a chip.
    """

    flops: Flops
    memory: Memory
    seconds: Mapping[str, Number] | None

    @property
    def total_seconds(self) -> Number | None:
        """Seconds of one batch, all phases together; None without a chip."""
        return None if self.seconds is None else sum(self.seconds.values())


def read_config(path: str | Path) -> Any:
    """The configuration (an `ml_collections.ConfigDict`) of a file such as configs/demo.py.

    Fields are set as `config.llm.depth = 4`. configs/NAME.py that is not here is the package's own.

    Raises:
      ValueError: where there is no such file.
    """
    return described.open_config(path)


def describe(
    config: Any = None, *, llm: str | None = None, tokens: int | None = None
) -> Description:
    """The sizes of the model that a configuration builds.

    Args:
      config: a configuration, or the path of one; configs/base.py (LLaVA-1.5's encoder) unless
        given.
      llm: another LLM by its name, of the configuration's grid or of the published sizes.
      tokens: another number of visual tokens.
    Raises:
      ValueError: for a name that is neither, and for sizes that are none.
    """
    config = described.open_config(config)
    shape = LLMSize.of(config.llm)
    if llm is not None:
        known = described.published_llms() | described.grid_llms(config.llm, config.grid.llms)
        if llm not in known:
            raise ValueError(f"llm={llm!r}: choose one of {', '.join(known)}")
        shape = known[llm][1]
    section = dict(config.compressor) | ({} if tokens is None else {"tokens": tokens})
    return Description(
        ViTSize.of(config.vit),
        compressors.describe(section),
        shape,
        config.remat,
        config.compute_dtype,
        config.kernels,
    )


def request_cost(
    model: Description,
    *,
    text_tokens: Number,
    new_tokens: Number = 0,
    batch: int = 1,
    cached_text: bool = False,
    chip: str | Chip | None = None,
    efficiency: Mapping[str, Number] | None = None,
) -> RequestCost:
    """What a request to this model costs; formulas and how they are checked: docs/cost.md.

    Args:
      text_tokens: Q, tokens of the prompt.
      new_tokens: G, generated tokens; 0 is prefill only.
      batch: requests at a time.
      cached_text: keys and values of the text are kept from an earlier request.
      chip: a name of `cost.chips.CHIPS`, "cpu" (measured now) or a chip, for `seconds`.
      efficiency: phase -> the reached fraction of the roofline; 1 unless given.
    Raises:
      ValueError: for an unknown chip or phase.
    """
    request = roofline.Request(text_tokens, new_tokens, batch, None, cached_text)
    sized = (model.vit, model.compressor, model.llm, request)
    found = chips.named(chip) if isinstance(chip, str) else chip
    width = found.bytes_per_number if found else 2
    return RequestCost(
        flops=roofline.request_flops(*sized),
        memory=roofline.memory(*sized, bytes_per_number=width),
        seconds=roofline.seconds(*sized, found, efficiency=efficiency) if found else None,
    )
