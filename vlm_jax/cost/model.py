# SPDX-License-Identifier: Apache-2.0
"""A model described by its sizes, and what a request to it costs: FLOPs, bytes and seconds."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_jax import compressors
from vlm_jax.compressors.method import Number
from vlm_jax.cost import chips, described, parameters, roofline
from vlm_jax.cost.calibration import Calibration
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

    Set fields as in `config.llm.depth = 4`. If configs/NAME.py does not exist it is the package's.

    Raises:
      ValueError: if there is no such file.
    """
    return described.open_config(path)


def describe(
    config: Any = None, *, llm: str | None = None, tokens: int | None = None
) -> Description:
    """The sizes of the model that a configuration builds.

    Args:
      config: a configuration or its path; by default configs/base.py (LLaVA-1.5's encoder).
      llm: the name of another LLM, from the configuration's grid or the published sizes.
      tokens: another number of visual tokens.
    Raises:
      ValueError: for an unknown name, and for sizes that are not valid.
    """
    config = described.open_config(config)
    shape = LLMSize.of(config.llm)
    if llm is not None:
        by_name = described.published_llms() | described.grid_llms(config.llm, config.grid.llms)
        if llm not in by_name:
            raise ValueError(f"llm={llm!r}: choose one of {', '.join(by_name)}")
        shape = by_name[llm][1]
    section = dict(config.compressor) | ({} if tokens is None else {"tokens": tokens})
    size = Description(
        ViTSize.of(config.vit),
        compressors.describe(section),
        shape,
        config.remat,
        config.compute_dtype,
        config.kernels,
    )
    return size.pruned(config.pruning)


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
      batch: requests per batch.
      cached_text: keys and values of the text are kept from an earlier request.
      chip: a name of `cost.chips.CHIPS`, "cpu" (measured now) or a chip, for `seconds`.
      efficiency: phase -> the fraction of the roofline that is reached; by default 1.
    Raises:
      ValueError: for an unknown chip or phase.
    """
    request = roofline.Request(
        text_tokens, new_tokens, batch, None, cached_text, pruning=model.pruning
    )
    request_sizes = (model.vit, model.compressor, model.llm, request)
    device = chips.named(chip) if isinstance(chip, str) else chip
    width = device.bytes_per_number if device else 2
    return RequestCost(
        flops=roofline.request_flops(*request_sizes),
        memory=roofline.memory(*request_sizes, bytes_per_number=width),
        seconds=roofline.seconds(*request_sizes, device, calibration=Calibration(efficiency or {}))
        if device
        else None,
    )
