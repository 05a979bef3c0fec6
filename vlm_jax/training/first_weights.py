# SPDX-License-Identifier: Apache-2.0
"""The model that training starts from: read from a folder, or initialized from the seed."""

from vlm_jax import progress
from vlm_jax.models import vlm
from vlm_jax.models.vit import ViT
from vlm_jax.models.vlm import VLM
from vlm_jax.training import runs
from vlm_jax.training.recipe import Recipe
from vlm_jax.weights import start as weights_start


def first_model(recipe: Recipe, encoder: ViT | None, *, seed: int) -> VLM:
    """The model that training starts from, at the most visual tokens that it can give.

    With an `encoder` the LLM alone is that of the folder to start from.
    """
    if recipe.start_from and encoder is not None:
        with progress.doing("reading the LLM to start from"):
            stored = runs.read(recipe.start_from, "start_from")
            llm = weights_start.language_model(recipe.model, stored, start_from=recipe.start_from)
            fresh = vlm.create(recipe.model, seed=seed, of=lambda model: model.compressor)
            model = VLM(encoder, fresh, llm)
    elif recipe.start_from:
        with progress.doing("reading the weights to start from"):
            stored = runs.read(recipe.start_from, "start_from")
            model = weights_start.load(
                recipe.model, stored, start_from=recipe.start_from, seed=seed
            )
    else:
        with progress.doing("initializing the weights"):
            # An encoder that would be replaced is not drawn.
            vit, *others = vlm.create(
                recipe.model,
                seed=seed,
                of=lambda m: (m.vit if encoder is None else None, m.compressor, m.llm),
            )
            model = VLM(vit if encoder is None else encoder, *others)
    return model.at(model.compressor.buckets[-1]) if model.compressor.buckets else model


def llm_digest(path: str, flag: str) -> str:
    """Sixteen hex digits of the LLM's weights in a folder that `flag` names."""
    return weights_start.digest(runs.read(path, flag))
