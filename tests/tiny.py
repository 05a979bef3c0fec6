# SPDX-License-Identifier: Apache-2.0
"""The smallest configuration in which everything is there, and batches and runs of it.

Tests use it by name and as a command line does: --config=tests/tiny.py
"""

import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]

# Strings for the child process: what runs before the verb, and the verb itself.
CHILD = """
import os, signal, sys
from vlm_jax.__main__ import main
{before}
sys.exit(main({argv!r}))
"""

# For `before` of a child: a grid without figures, which take a quarter of its time.
UNDRAWN = """
from vlm_jax.reports import figures
figures.run_figures = lambda *given, **more: []
"""


def get_config():
    """4x4 patches at two levels, two decoder blocks with grouped heads and biases."""
    from configs import base

    c = base.get_config()
    c.compute_dtype, c.remat = "float32", "none"
    c.vit.update(
        dict(image_size=32, patch_size=8, depth=3, width=16, mlp=32, heads=2, levels=(1, 2))
    )
    c.llm.update(
        dict(
            vocab=256,
            depth=2,
            width=16,
            mlp=32,
            heads=4,
            kv_heads=2,
            head_size=8,
            qkv_bias=True,
            tied_embeddings=True,
        )
    )
    c.compressor.update(dict(kind="token_packer", tokens=4, heads=2))
    c.data.update(
        dict(
            source="synthetic",
            template="bare",
            text_length=32,
            question_length=28,
            train_images=40,
            val_images=8,
            test_images=16,
        )
    )
    c.encoder.update(dict(steps=3, batch=8))
    c.align.update(dict(steps=4, batch=8))
    c.finetune.update(dict(steps=6, batch=8, learning_rate=3e-3, clip_norm=1.0))
    c.checkpoint.update(dict(every=2, keep=2))
    c.log.every = 1
    c.evaluate.update(dict(batch=32, max_new_tokens=4))
    with c.unlocked():
        c.grid.llms = {"small": dict(depth=1), "large": dict(depth=2)}
    c.grid.tokens = (1, 4)
    c.grid.baselines = (("blind", 1), ("pool", 16))
    return c


def config(**changes):
    """`get_config` with sections changed: config(compressor=dict(tokens=1), remat="full")."""
    c = get_config()
    for name, value in changes.items():
        if isinstance(value, dict):
            c[name].update(value)
        else:
            c[name] = value
    return c


def size(c):
    """The description of the model of a configuration."""
    from vlm_jax.models.sizes import VLMSize

    return VLMSize.of(c)


def recipe(c):
    """The description of the training of a configuration."""
    from vlm_jax.training.recipe import Recipe

    return Recipe.of(c)


def stage(section):
    """The description of one stage of it."""
    from vlm_jax.training.recipe import Stage

    return Stage.of(section)


def method(kind, tokens, heads=8, query="separate", **more):
    """The description of a compressor."""
    from vlm_jax import compressors

    return compressors.describe(dict(kind=kind, tokens=tokens, heads=heads, query=query) | more)


def model_of(path, **options):
    """The model of a folder on the current mesh; `dtype` is float32 unless given."""
    from vlm_jax.training import runs
    from vlm_jax.weights import folder

    stored = folder.read(path)
    stored.check()
    return runs.load(stored, stored.size(), **(dict(dtype="float32") | options))


def tensor_shapes(module):
    """The published tensors of a compressor and their shapes; it may be abstract."""
    from vlm_jax.weights import names

    return names.shapes(names.compressor_table(module), module)


def filled(module, tensors):
    """A compressor with the numbers of published tensors; ValueError where they do not fit."""
    from vlm_jax.weights import folder, names

    names.fit(tensor_shapes(module), {name: np.shape(x) for name, x in tensors.items()})
    tensors = {name: np.asarray(x, np.float32) for name, x in tensors.items()}
    return folder.place(module, names.compressor_table(module), tensors)


# Fields of the smallest CLIP text tower, of a compressor that has one.
CLIP = dict(clip_width=8, text_width=8, text_depth=2, text_heads=2, text_vocab=16, text_length=5)


def compressor(
    kind, *, side, width, llm_width, levels=1, heads=1, query="none", rngs=None, vit_heads=1, **more
):
    """The flax module of a compressor alone; `more` is of its description or of its module."""
    from flax import nnx

    from vlm_jax.compressors.method import Interface

    described = method(kind, heads=heads, query=query, **(CLIP | more))
    of_module = ("kernels", "kernel", "stride", "neighbors")
    return described.module()(
        described,
        Interface(side, width, levels, llm_width, heads=vit_heads),
        rngs=rngs or nnx.Rngs(0),
        **{name: value for name, value in more.items() if name in of_module},
    )


def batch(c, *, rows=8, seed=0, levels=True):
    """A random batch in the loader's form, on no device yet; row 0 has no image.

    Lengths, supervision and the image's place differ from row to row.
    """
    draw = np.random.default_rng(seed)
    text, read = c.data.text_length, c.data.question_length
    length = draw.integers(text // 2, text + 1, rows)
    image_at = draw.integers(0, length // 2)
    image_at[0] = text
    place = np.arange(text)
    made = dict(
        ids=draw.integers(0, c.llm.vocab, (rows, text)),
        loss_mask=(place < length[:, None]) & (draw.random((rows, text)) < 0.6) & (place > 0),
        length=length,
        image_at=image_at,
        question=draw.integers(0, c.llm.vocab, (rows, read)),
        question_length=draw.integers(1, read + 1, rows),
    )
    made = {k: v.astype(np.int32) if v.dtype != bool else v for k, v in made.items()}
    side = c.vit.image_size // c.vit.patch_size
    if levels:
        made["levels"] = draw.normal(size=(rows, side**2, len(c.vit.levels) * c.vit.width))
    else:
        made["pixels"] = draw.normal(size=(rows, c.vit.image_size, c.vit.image_size, 3))
    return {k: v.astype(np.float32) if v.dtype == np.float64 else v for k, v in made.items()}


def placed(made):
    """The batch on the current mesh, as the loader would place it."""
    from vlm_jax import mesh

    return jax.device_put(made, mesh.sharding(jax.sharding.get_mesh(), "batch"))


def created(c, *, seed=0):
    """The numbers of `vlm.create(size(c), seed=seed)`, bit by bit, on the current mesh.

    They are drawn weight by weight on one device, which compiles one small program for each shape
    and not a large one for each model and mesh; tests/test_vlm.py compares.
    """
    from flax import nnx

    from vlm_jax import mesh as meshes
    from vlm_jax.models import vlm

    with jax.set_mesh(meshes.make(devices=jax.local_devices()[:1])):
        drawn = vlm.build(size(c), nnx.Rngs(seed))
    now = jax.sharding.get_mesh()

    def place(x, like):
        where = jax.sharding.NamedSharding(now, like.sharding.spec)
        if jax.process_count() == 1:
            return jax.device_put(np.asarray(x), where)
        return jax.make_array_from_callback(x.shape, where, np.asarray(x).__getitem__)

    return jax.tree.map(place, drawn, vlm.shapes(size(c)))


def roughened(model, seed=0, scale=0.3):
    """`model` with noise on every weight: biases and norms must not hide behind 0 and 1."""
    leaves, tree = jax.tree.flatten(model)
    draw = np.random.default_rng(seed)
    noise = [draw.normal(scale=scale, size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(
        tree,
        [jax.device_put(np.asarray(x) + n, x.sharding) for x, n in zip(leaves, noise, strict=True)],
    )


def adapted(model, *, rank=2, alpha=6.0, targets=(), scale=0.1):
    """`model` with adapters of which neither half is zero, and noise on its compressor: a model
    that LoRA has trained. Its encoder and its LLM are shared with `model`."""
    from vlm_jax.models import lora
    from vlm_jax.models.sizes import LoRASize
    from vlm_jax.models.vlm import VLM

    model = lora.adapt(model, LoRASize(rank, alpha, targets), seed=0)
    for target in lora.adapted(model):
        layer = lora.at(model, target)
        for half in ("lora_a", "lora_b"):
            rough = roughened(getattr(layer, half), seed=len(target), scale=scale)
            layer = lora.changed(layer, (half,), rough)
        model = lora.changed(model, ("llm", "blocks", *lora.TARGETS[target]), layer)
    return VLM(model.vit, roughened(model.compressor, scale=scale), model.llm)


def run(*argv, before="", timeout=600):
    """`vlm-jax ARGV` in a process of its own with one device, after the statements `before`."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=1"),
    }
    return subprocess.run(
        [sys.executable, "-c", CHILD.format(before=before, argv=list(argv))],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def losses(folder):
    """Step and loss of every line of a stage's metrics.jsonl."""
    import json

    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [(m["step"], m["loss"], m["gradient_norm"]) for m in map(json.loads, lines)]


def rows(grid):
    """The rows of a grid's folder, without what a clock or the checkout says."""
    import json

    found = [json.loads(line) for line in (grid / "rows.jsonl").read_text().splitlines()]
    for row in found:
        del row["train"]["seconds"]
        for name in ("created", "timing", "evaluate_seconds", "commit"):
            del row[name]
    return found
