# SPDX-License-Identifier: Apache-2.0
"""How fast is a pretrained LLM trained and asked, next to transformers with the same weights?

    python benchmarks/pretrained.py --gguf=FILE --llm=DIR [--dtypes=float32,bfloat16] [--out=FILE]

SmolLM2-135M as in configs/demo_llm.py: FILE is read by transformers, DIR is what `vlm-jax convert
--llm=FILE` wrote. A step of 16 examples, in two halves, trains the compressor in front of the
frozen LLM (align), or it and adapters of rank 16 (lora); the peer is transformers' model, eager and
compiled, with PEFT's adapters, behind LLaVA's projector, which is less work than our compressor.
Then both answer 64 random tokens with 64 new ones, greedily. All on two threads; medians over
rounds in which the sides take turns.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, SupportsFloat

# benchmarks/ and configs/ are folders of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import facts, generation  # noqa: E402
from benchmarks.compressors import interleaved  # noqa: E402

STAGES = {"align": "align", "lora": "finetune"}  # name here -> stage of the configuration
ANSWER = 3  # supervised tokens of a row


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--gguf", required=True, type=Path)
    parser.add_argument("--llm", required=True, help="a folder of `vlm-jax convert --llm=GGUF`")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--parts", default="training,generation")
    parser.add_argument("--batches", default="1,8", help="of generation")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-compiled", action="store_true", help="transformers eager alone")
    parser.add_argument("--out", help="default: benchmarks/results/DATE-pretrained.json")
    return parser.parse_args(argv)


def peer(path: Path):
    """The LLM of a GGUF file as transformers reads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")


def cell(llm: str, dtype: str):
    """The demo's cell with adapters at V = 9, starting from the folder `llm`."""
    from configs import demo_llm
    from vlm_jax.grids.starts import adopted
    from vlm_jax.training.cells import cells_of

    config = demo_llm.get_config()
    config.compute_dtype = dtype
    config.data.source = "synthetic"
    config.data.picture_share = 0.0  # batches are random here
    entry = config.grid.llms["smollm2_lora"]
    with config.unlocked():
        config.grid.llms = {"smollm2_lora": {**entry, "start_from": llm}}
    (found,) = [c for c in cells_of(adopted(config)) if c.name.startswith("smollm2_lora-v9-token")]
    return found.config


def random_batch(config, rows: int) -> dict[str, Any]:
    """A training batch of full rows: random text, one image behind its first token."""
    import numpy as np

    draw, length = np.random.default_rng(0), config.data.text_length
    side = config.vit.image_size // config.vit.patch_size
    place = np.broadcast_to(np.arange(length), (rows, length))
    return dict(
        ids=draw.integers(0, config.llm.vocab, (rows, length), dtype=np.int32),
        loss_mask=place >= length - ANSWER,
        length=np.full(rows, length, np.int32),
        image_at=np.ones(rows, np.int32),
        levels=draw.normal(size=(rows, side**2, config.vit.width * len(config.vit.levels))).astype(
            np.float32
        ),
    )


def our_step(config, stage: str, batch) -> Callable[[], SupportsFloat]:
    """One optimizer step of a stage; its loss may still be on its way."""
    import jax

    from vlm_jax import mesh
    from vlm_jax.models import lora, vlm
    from vlm_jax.training import objective, optimizer, precision
    from vlm_jax.training.first_weights import first_model
    from vlm_jax.training.recipe import Recipe

    recipe, name = Recipe.of(config), STAGES[stage]
    encoder = vlm.create(recipe.model, seed=0, of=lambda model: model.vit)
    model = first_model(recipe, encoder, seed=0)
    if stage == "lora":
        model = lora.adapt(model, recipe.lora, seed=0)
    model = precision.narrowed(model, name, recipe.frozen_dtype)
    tx = optimizer.optimizer(recipe.stage(name))
    graph, state = optimizer.start(model, name, tx)
    loss = objective.of_stage(name, model.compressor, chunk=recipe.loss_chunk)
    advance = optimizer.make_step(graph, tx, loss, accumulate=recipe.stage(name).accumulate)
    batch = jax.device_put(batch, mesh.sharding(jax.sharding.get_mesh(), "batch"))

    def step() -> jax.Array:
        nonlocal state
        state, metrics = advance(state, batch)
        return metrics.loss

    return step


def their_step(path: Path, config, stage: str, batch, *, dtype: str, compiled: bool):
    """The same of transformers: AdamW over the projector, and adapters where there are some."""
    import torch
    from torch import nn

    llm = peer(path).requires_grad_(False)
    if stage == "lora":
        from peft import LoraConfig, get_peft_model

        size = config.lora
        llm = get_peft_model(
            llm, LoraConfig(r=size.rank, lora_alpha=size.alpha, target_modules="all-linear")
        )
    D, V = config.llm.width, config.compressor.tokens
    projector = nn.Sequential(nn.Linear(batch["levels"].shape[2], D), nn.GELU(), nn.Linear(D, D))
    recipe = getattr(config, STAGES[stage])
    trained = [*projector.parameters(), *(p for p in llm.parameters() if p.requires_grad)]
    adamw = torch.optim.AdamW(
        trained,
        lr=recipe.learning_rate,
        betas=(recipe.beta1, recipe.beta2),
        weight_decay=recipe.weight_decay,
    )
    run = torch.compile(llm, dynamic=False) if compiled else llm
    ids = torch.tensor(batch["ids"]).long()
    labels = torch.where(torch.tensor(batch["loss_mask"]), ids, -100)
    unseen = torch.full((len(ids), V), -100)
    labels = torch.cat([labels[:, :1], unseen, labels[:, 1:]], dim=1)
    levels = torch.tensor(batch["levels"])[:, :V]
    halves = recipe.accumulate

    def step() -> float:
        total = 0.0
        for half in range(halves):
            part = slice(half * len(ids) // halves, (half + 1) * len(ids) // halves)
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                text = llm.get_input_embeddings()(ids[part])
                x = torch.cat([text[:, :1], projector(levels[part]), text[:, 1:]], dim=1)
                loss = run(inputs_embeds=x, labels=labels[part]).loss / halves
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(trained, recipe.clip_norm)
        adamw.step()
        adamw.zero_grad()
        return total

    return step


def waiting(step: Callable[[], SupportsFloat]) -> Callable[[], float]:
    """A step whose loss is waited for."""
    return lambda: float(step())


def ask(made: Any, theirs: Any, rows: int, rounds: int) -> dict[str, Any]:
    """Seconds to the first token and tokens per second of both, and how many tokens agree."""
    import numpy as np
    import torch

    from vlm_jax.serving.requests import Request

    vocab = theirs.config.vocab_size
    ids = np.random.default_rng(0).integers(3, vocab, (rows, generation.PROMPT))
    asked = [Request([int(x) for x in row], (), [[]], []) for row in ids]
    inputs = dict(input_ids=torch.tensor(ids), attention_mask=torch.ones(ids.shape, dtype=int))

    def answers(new: int):
        then = time.perf_counter()
        with torch.inference_mode():
            out = theirs.generate(**inputs, max_new_tokens=new, min_new_tokens=new, do_sample=False)
        return time.perf_counter() - then, out[:, ids.shape[1] :]

    def transformers() -> tuple[float, float, Any]:
        first, _ = answers(1)
        whole, out = answers(generation.NEW)
        return first, (generation.NEW - 1) / (whole - first), out.numpy()

    def ours() -> tuple[float, float, Any]:
        found = made.answer(asked, max_new_tokens=generation.NEW, batch=rows)
        told = np.array([a.ids for a in found])
        return found[0].first_token_seconds, found[0].tokens_per_second, told

    same = transformers()[2] == ours()[2]
    sides = generation.measure({"transformers": transformers, "vlm_jax": ours}, rounds)
    return dict(batch=rows, tokens_that_agree=float(same.mean()), sides=sides)


def served(llm: str, dtype: str):
    """Our side of `ask`."""
    import jax

    from vlm_jax import mesh
    from vlm_jax.serving.model import VLM

    one = mesh.make(devices=jax.devices()[:1])
    return generation.unending(VLM.from_checkpoint(llm, dtype=dtype, mesh=one))


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    facts.use_threads(args.threads)
    from vlm_jax import heap

    heap.keep_freed_memory()
    import jax
    import torch

    from vlm_jax import mesh

    torch.set_num_threads(args.threads)
    results = facts.of_run(
        "seconds of a training step of 16 examples and of generation, SmolLM2-135M",
        threads=args.threads,
        packages=("jax", "flax", "optax", "numpy", "torch", "transformers", "peft"),
    ) | dict(rounds=args.rounds, training=[], generation=[])
    for dtype in args.dtypes.split(","):
        for stage in STAGES if "training" in args.parts.split(",") else ():
            config = cell(args.llm, dtype)
            batch = random_batch(config, config[STAGES[stage]].batch)
            with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
                sides = {"vlm_jax": our_step(config, stage, batch)}
                for how in ("eager", "compiled")[: 1 if args.no_compiled else 2]:
                    sides[f"transformers {how}"] = their_step(
                        args.gguf, config, stage, batch, dtype=dtype, compiled=how == "compiled"
                    )
                waited = {name: waiting(step) for name, step in sides.items()}
                found = interleaved(waited, args.rounds)
            best = min(x["median_ms"] for name, x in found.items() if name != "vlm_jax")
            ratio = round(best / found["vlm_jax"]["median_ms"], 3)
            results["training"].append(dict(dtype=dtype, stage=stage, sides=found, ratio=ratio))
            print(f"{dtype:9} {stage:6} {ratio:.2f}x the faster peer: {found}", flush=True)
            facts.write(results, "pretrained", args.out)  # each part takes minutes: none is lost
        if "generation" not in args.parts.split(","):
            continue
        theirs = peer(args.gguf).to(getattr(torch, dtype)).eval()
        made = served(args.llm, dtype)
        for rows in map(int, args.batches.split(",")):
            found = ask(made, theirs, rows, args.rounds)
            ours, them = found["sides"]["vlm_jax"], found["sides"]["transformers"]
            found |= dict(
                dtype=dtype,
                first_token_ratio=round(them["first_token_ms"] / ours["first_token_ms"], 3),
                decode_ratio=round(ours["tokens_per_second"] / them["tokens_per_second"], 3),
            )
            results["generation"].append(found)
            print(f"{dtype:9} batch {rows}: {found}", flush=True)
            facts.write(results, "pretrained", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
