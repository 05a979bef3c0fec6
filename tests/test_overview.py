# SPDX-License-Identifier: Apache-2.0
"""The overview at the start of a run counts every parameter once and says which stage trains it."""

import jax
import tiny

from vlm_jax.models import vlm
from vlm_jax.training.overview import overview


def test_parts_are_the_sum_of_their_layers_and_say_what_trains_them(mesh1):
    c = tiny.config(encoder=dict(steps=0), lora=dict(rank=2))
    with jax.set_mesh(mesh1):
        model = vlm.shapes(tiny.size(c))
    lines = [line.split(maxsplit=3) for line in overview(model, tiny.recipe(c)).splitlines()[1:]]
    counts = {name: int(number.replace(",", "")) for name, *_, number in (x[:3] for x in lines)}
    for part in ("vit", "compressor", "llm"):
        layers = [n for name, n in counts.items() if name.startswith(f"{part}.")]
        assert sum(layers) == counts[part] == vlm.parameters(getattr(model, part))
    assert counts["together"] == vlm.parameters(model)
    trained = {name: how[0] for name, _, _, *how in (x for x in lines if x[0] != "together") if how}
    assert trained == dict(vit="none: frozen", compressor="align, finetune", llm="finetune (LoRA)")


def test_a_training_says_that_it_prunes_nothing(mesh1):
    """PyramidDrop's authors train with its drops too; here nothing does."""
    c = tiny.config(pruning=dict(kind="pyramiddrop", layers=(1,), tokens=(2,)))
    with jax.set_mesh(mesh1):
        *_, last = overview(vlm.shapes(tiny.size(c)), tiny.recipe(c)).splitlines()
    assert (
        last == "training reads all visual tokens: pruning.kind='pyramiddrop' is of answers alone"
    )
