# SPDX-License-Identifier: Apache-2.0
"""What a model is made of, as a table for the start of a run: parameters by part and layer."""

from collections import defaultdict

import jax

from vlm_jax.models.vlm import VLM
from vlm_jax.training.fields import STAGES
from vlm_jax.training.recipe import Recipe

TRAINED = {"vit": ("encoder",), "compressor": ("align", "finetune"), "llm": ("finetune",)}


def overview(model: VLM, recipe: Recipe) -> str:
    """A line for each part and each of its layers: arrays, parameters, the stages that train it;
    and one for a pruning, which trains nothing.

    Args:
      model: its parameters, or their shapes.
    """
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, leaf in jax.tree.leaves_with_path(model):
        part, layer = (str(getattr(key, "key", getattr(key, "name", key))) for key in path[:2])
        for name in (part, f"  {part}.{layer}"):
            counts[name][0] += 1
            counts[name][1] += leaf.size
    run = [stage for stage in STAGES if recipe.stage(stage).steps]
    lines = [f"{'parameters of':28}{'arrays':>8}{'numbers':>17}  trained in"]
    for part, trained in TRAINED.items():
        stages = [stage for stage in run if stage in trained]
        how = " (LoRA)" if part == "llm" and stages and recipe.lora.rank else ""
        for name, (arrays, numbers) in counts.items():
            if name.strip().partition(".")[0] != part:
                continue
            said = (", ".join(stages) or "none: frozen") + how if name == part else ""
            lines.append(f"{name:28}{arrays:8}{numbers:17,}  {said}".rstrip())
    total = sum(counts[part][1] for part in TRAINED)
    lines.append(f"{'together':36}{total:17,}")
    if pruning := recipe.model.pruning:
        lines.append(
            f"training reads all visual tokens: pruning.kind={pruning.kind!r} is of answers alone"
        )
    return "\n".join(lines)
