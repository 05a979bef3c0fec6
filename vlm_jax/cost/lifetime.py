# SPDX-License-Identifier: Apache-2.0
"""What a model costs over its life: two stages of training, and the requests that it answers."""

import dataclasses

from vlm_jax.compressors.method import Method, Number
from vlm_jax.cost import flops as cost
from vlm_jax.models.sizes import LLMSize, ViTSize


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Examples, text tokens and batch of the two stages, and the share of peak that training gets.

    By default LLaVA-1.5's: 558,128 captions, then 665,298 examples of 275 text tokens on average
    (docs/training.md); 30 tokens of a caption are assumed. 40 % of peak is what a 7B model reaches
    on slices of TPUs (docs/pods.md).
    """

    align: Number = 558_128
    align_text: Number = 30
    align_batch: int = 256
    finetune: Number = 665_298
    finetune_text: Number = 275
    finetune_batch: int = 128
    efficiency: Number = 0.4


LLAVA = Recipe()


def training_flops(vit: ViTSize, compressor: Method, llm: LLMSize, recipe: Recipe) -> Number:
    """FLOPs of both stages, forward and backward, without recomputation and padding."""
    V = cost.visual_tokens(compressor, vit)
    return sum(
        examples
        * cost.train_step_flops(
            False, compressor, llm, vit=vit, tokens=text + V, stage=stage, batch=batch
        )
        for stage, examples, text, batch in (
            ("align", recipe.align, recipe.align_text, recipe.align_batch),
            ("finetune", recipe.finetune, recipe.finetune_text, recipe.finetune_batch),
        )
    )


def paper_training_flops(N: Number, V: Number, recipe: Recipe) -> Number:
    """The same in the paper's terms: 2 N per token forward, twice that backward.

    The first stage does not train the LLM: half of its backward pass.
    """
    align = 4e9 * N * recipe.align * (recipe.align_text + V)
    return align + 6e9 * N * recipe.finetune * (recipe.finetune_text + V)
