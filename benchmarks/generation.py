# SPDX-License-Identifier: Apache-2.0
"""How soon is the first token there, and how fast come the others, next to transformers?

    python benchmarks/generation.py [--dtypes=float32,bfloat16] [--batches=1,8] [--out=FILE]

A LLaVA of 200 million random parameters is written by transformers, converted, and asked by both
with the same 64 tokens of prompt and one image a row: 64 new tokens, greedily, on two threads.
transformers has 576 visual tokens; ours also has M3's 144, 36 and 1, from the same weights. A
question pass is what QueCC would add: the prompt read once more, alone. Medians over rounds in
which the sides take turns.
"""

import argparse
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is a folder, not installed

from benchmarks import facts  # noqa: E402

PROMPT, NEW = 64, 64  # tokens
SIZES = dict(
    tower=dict(width=384, depth=12, heads=6, mlp=1536, image=336, patch=14),
    llm=dict(width=768, depth=16, heads=12, mlp=2048, vocab=32000),
)
QUICK = dict(
    tower=dict(width=16, depth=2, heads=2, mlp=32, image=84, patch=14),
    llm=dict(width=16, depth=2, heads=2, mlp=32, vocab=128),
)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--batches", default="1,8")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs")
    parser.add_argument("--out", help="default: benchmarks/results/DATE-generation.json")
    return parser.parse_args(argv)


def peer(sizes: dict[str, Any], dtype: str):
    """transformers' LLaVA with random weights, in evaluation."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    tower, llm = sizes["tower"], sizes["llm"]
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=tower["width"],
            intermediate_size=tower["mlp"],
            num_hidden_layers=tower["depth"],
            num_attention_heads=tower["heads"],
            image_size=tower["image"],
            patch_size=tower["patch"],
        ),
        text_config=LlamaConfig(
            vocab_size=llm["vocab"],
            hidden_size=llm["width"],
            intermediate_size=llm["mlp"],
            num_hidden_layers=llm["depth"],
            num_attention_heads=llm["heads"],
            num_key_value_heads=llm["heads"],
            max_position_embeddings=2048,
            eos_token_id=None,
        ),
        image_token_index=llm["vocab"] - 1,
    )
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = None
    return model.to(getattr(torch, dtype))


def ours(folder: Path, dtype: str, scales: tuple[int, ...]):
    """The same weights, as a model that serves M3's numbers of visual tokens."""
    import jax

    from configs import base
    from vlm_jax import mesh
    from vlm_jax.data.processor import Processor, RowFormat
    from vlm_jax.data.word_tokenizer import train_tokenizer
    from vlm_jax.models import vlm
    from vlm_jax.serving import model as serving
    from vlm_jax.weights import names, sources
    from vlm_jax.weights.folder import place
    from vlm_jax.weights.methods import Wish

    stored = sources.llava(folder, vision=None, wish=Wish())
    stored.compressor |= dict(kind="m3", tokens=max(scales), scales=scales)
    size = replace(stored.size(), compute_dtype=dtype, kernels="auto")
    one = mesh.make(devices=jax.devices()[:1])
    with jax.set_mesh(one):
        stored.check()
        shapes = vlm.shapes(size)
        model = place(shapes, names.model_table(shapes), stored.tensors, dtype=dtype)
    c = base.get_config()
    c.vit.update(stored.vit)
    c.data.update(dict(template="plain", text_length=2048))
    processor = Processor(train_tokenizer(["a"], 100), replace(RowFormat.of(c), vocab=None))
    return unending(serving.VLM(model, processor, max_length=2048, mesh=one))


def unending(made):
    """A served model that stops nowhere early, and reads no common beginning ahead: transformers
    has none."""
    made.prefix, made.prefix_pass = [], None
    made.decoder.stop_ids = made.decoder.stop_ids[:0]
    made.processor.stop_ids = ()
    return made


def requests(sizes: dict[str, Any], rows: int):
    """Prompts whose image stands behind their first token, and their pixels."""
    import numpy as np

    from vlm_jax.serving.requests import Request

    draw, side = np.random.default_rng(0), sizes["tower"]["image"]
    return [
        Request(
            [int(x) for x in draw.integers(3, sizes["llm"]["vocab"] - 2, PROMPT)],
            (1,),
            [[1]],
            [draw.normal(size=(side, side, 3)).astype(np.float32)],
        )
        for _ in range(rows)
    ]


def torch_sides(model, made, image_token: int, patches: int, dtype: str):
    """Seconds to the first token, and tokens of a row in a second behind it; and the tokens."""
    import numpy as np
    import torch

    ids = torch.tensor([[*r.ids[:1], *[image_token] * patches, *r.ids[1:]] for r in made])
    pixels = torch.tensor(np.stack([r.pixels[0].transpose(2, 0, 1) for r in made]))
    pixels = pixels.to(getattr(torch, dtype))
    inputs = dict(input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids))

    def ask(new: int):
        then = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=new, do_sample=False)
        return time.perf_counter() - then, out[:, ids.shape[1] :]

    def measure() -> tuple[float, float, Any]:
        first, _ = ask(1)
        whole, out = ask(NEW)
        return first, (NEW - 1) / (whole - first), out.numpy()

    return measure


def our_sides(model, made, V: int):
    """The same of ours, with V visual tokens."""
    import numpy as np

    def measure() -> tuple[float, float, Any]:
        found = model.answer(made, max_new_tokens=NEW, visual_tokens=V, batch=len(made))
        ids = np.array([a.ids for a in found])
        return found[0].first_token_seconds, found[0].tokens_per_second, ids

    return measure


def parts(model, made, scales: tuple[int, ...], rounds: int) -> dict[str, float]:
    """Milliseconds of each part by itself: what is read once, and one step of decoding."""
    import jax
    import numpy as np

    from vlm_jax import mesh

    with jax.set_mesh(model.mesh):
        inner, where = model.decoder.model, mesh.sharding(model.mesh, "batch")
        pixels = jax.device_put(np.stack([r.pixels[0] for r in made]), where)
        ids = jax.device_put(np.array([r.ids for r in made], np.int32), where)
        encode = jax.jit(lambda m, x: m.encode(x))
        levels = encode(inner, pixels).astype(inner.llm.dtype)
        ask = jax.jit(lambda m, x: m.llm(m.llm.embed(x)))
        see = jax.jit(lambda m, x: m.compressor(x, None))
        jobs = {"encoder": lambda: encode(inner, pixels), "question pass": lambda: ask(inner, ids)}
        for V in scales:
            jobs[f"compressor, V={V}"] = functools.partial(see, inner.at(V), levels)
            jobs |= language(inner, V, len(made), where)
        found = {}
        for name, job in jobs.items():
            jax.block_until_ready(job())
            times = []
            for _ in range(2 * rounds + 1):
                then = time.perf_counter()
                jax.block_until_ready(job())
                times.append(1e3 * (time.perf_counter() - then))
            found[name] = round(statistics.median(times), 2)
    return found


def language(model, V: int, rows: int, where) -> dict[str, Callable]:
    """What the LLM does for a prompt with V visual tokens: prefill, and one more token."""
    import jax
    import numpy as np

    draw, read = np.random.default_rng(0), V + PROMPT
    width, dtype = model.llm.embedding.shape[1], model.llm.dtype

    def drawn(length: int):
        x = draw.normal(size=(rows, length, width))
        return jax.device_put(jax.numpy.asarray(x, dtype), where)

    prompt, token = drawn(read), drawn(1)
    place = jax.device_put(np.full(rows, read, np.int32), where)
    prefill = jax.jit(lambda m, x: m.llm.prefill(x, slots=read + NEW))
    caches = prefill(model, prompt)[1]

    @functools.partial(jax.jit, donate_argnums=2)
    def decode(m, x, caches, at):
        hidden, caches = m.llm.decode(x, caches, at)
        return m.llm.logits(hidden), caches

    def step():
        nonlocal caches  # donated, as generation does
        scores, caches = decode(model, token, caches, place)
        return scores

    return {f"prefill, V={V}": lambda: prefill(model, prompt), f"decode, V={V}": step}


def measure(sides: dict[str, Callable], rounds: int) -> dict[str, dict[str, float]]:
    """Medians of each side over rounds in which they take turns, the first round left out."""
    found: dict[str, list] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        names = list(sides)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            found[name].append(sides[name]())
    return {
        name: dict(
            first_token_ms=round(1e3 * statistics.median(x[0] for x in seen[1:]), 2),
            tokens_per_second=round(statistics.median(x[1] for x in seen[1:]), 2),
        )
        for name, seen in found.items()
    }


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    facts.use_threads(args.threads)
    from vlm_jax import heap

    heap.keep_freed_memory()
    import torch

    torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else SIZES
    side = sizes["tower"]["image"] // sizes["tower"]["patch"]
    scales = (1, 9, 36) if args.quick else (1, 36, 144, 576)
    results = facts.of_run(
        "seconds to the first token and tokens/s of a row behind it, 64 + V tokens of prompt",
        threads=args.threads,
        packages=("jax", "flax", "numpy", "torch", "transformers"),
    ) | dict(rounds=args.rounds, sizes=sizes, rows=[])
    head = f"{'dtype':9} {'batch':>5} {'side':18} {'first ms':>9} {'tokens/s':>9}"
    print(head + "  against transformers, V = 576")
    for dtype in args.dtypes.split(","):
        theirs = peer(sizes, dtype)
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            model = ours(Path(folder), dtype, scales)
        for rows in map(int, args.batches.split(",")):
            made = requests(sizes, rows)
            image_token = sizes["llm"]["vocab"] - 1
            sides = {"transformers": torch_sides(theirs, made, image_token, side**2, dtype)}
            for V in sorted(scales, reverse=True):
                sides[f"vlm_jax, V={V}"] = our_sides(model, made, V)
            same = sides["transformers"]()[2] == sides[f"vlm_jax, V={max(scales)}"]()[2]
            row = dict(
                dtype=dtype,
                batch=rows,
                tokens_that_agree=float(same.mean()),
                sides=measure(sides, args.rounds),
                parts_ms=parts(model, made, scales, args.rounds),
            )
            results["rows"].append(row)
            them = row["sides"]["transformers"]
            for name, of in row["sides"].items():
                first = them["first_token_ms"] / of["first_token_ms"]
                speed = of["tokens_per_second"] / them["tokens_per_second"]
                of |= dict(first_token_ratio=round(first, 3), decode_ratio=round(speed, 3))
                print(
                    f"{dtype:9} {rows:5} {name:18} {of['first_token_ms']:9.1f} "
                    f"{of['tokens_per_second']:9.1f}  {first:.2f}x {speed:.2f}x",
                    flush=True,
                )
            print(
                f"{'':15} parts, ms: {row['parts_ms']}; same tokens {same.mean():.1%}", flush=True
            )
            facts.write(results, "generation", args.out)  # rows take minutes: none is lost
    return 0


if __name__ == "__main__":
    sys.exit(main())
