# SPDX-License-Identifier: Apache-2.0
"""How many seconds does a whole request take with each method, its choice of patches included?

    python benchmarks/whole_requests.py [--methods=NAME,...] [--tokens=1,16] [--batches=1,8]
        [--rounds=3] [--threads=2] [--quick] [--out=FILE]

The LLaVA of generation.py, with half its LLM's layers and random weights, answers with the
compressor of each method: one image and one question a row, 8 new tokens, greedily, in float32.
Timed is `VLM.answer`, from pixels and ids to the last token: encoder, choice or compressor,
question pass, prefill and decoding. Each method takes turns with the same model without compression
(576 tokens), and every round has new images, so that nothing is kept. Medians over rounds; the
ratio is the median of the rounds' own ratios. Random weights take the time of trained ones. `fastv`
prunes after layer 2 and reads all patches before.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))  # benchmarks/ is a folder, not installed

from benchmarks import facts, generation  # noqa: E402

NEW = 8  # tokens
SELECTIONS = ("uniform", "random", "visionzip", "vispruner", "divprune", "mmtok")
TRAINED = ("pool", "token_packer", "quecc", "mqt", "llava_mini", "voco", "fwd2bot")
PRUNED = ("fastv",)
METHODS = (*SELECTIONS, *TRAINED, *PRUNED)
ANY = (*SELECTIONS, "mqt")  # one model gives any V
PLAIN = dict(kind="none")
# Half the layers of generation.py's LLM: a round of all methods takes minutes, not an hour.
SIZES = generation.SIZES | dict(llm=generation.SIZES["llm"] | dict(depth=8))
QUICK = generation.QUICK | dict(llm=generation.QUICK["llm"] | dict(depth=4))
QUESTION = "how many red circles are there left of the blue square"


def arguments(argv: list[str] | None) -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default=",".join(METHODS), help="names, by commas")
    parser.add_argument("--tokens", type=numbers, default=[1, 16])
    parser.add_argument("--batches", type=numbers, default=[1, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run at all?")
    parser.add_argument("--out", help="default: benchmarks/results/DATE-whole-requests.json")
    args = parser.parse_args(argv)
    args.methods = args.methods.split(",")
    if unknown := sorted(set(args.methods) - set(METHODS)):
        parser.error(f"no method {unknown}: choose of {METHODS}")
    return args


def models(sizes: dict[str, Any], method: str, tokens: list[int]) -> Iterator[tuple[int, Any]]:
    """(V, a model that answers with it), one model for all V where the method gives any."""
    if method in ANY:
        made = served(sizes, dict(kind=method, tokens=max(tokens)))
    for V in tokens:
        if method in PRUNED:
            made = served(sizes, PLAIN, dict(kind=method, tokens=(V,)))
        elif method not in ANY:
            made = served(sizes, dict(kind=method, tokens=V))
        yield V, made


def served(
    sizes: dict[str, Any], compressor: dict[str, Any], pruning: dict[str, Any] | None = None
):
    """A model of random weights that stops nowhere early."""
    import jax

    from configs import base
    from vlm_jax import mesh
    from vlm_jax.data.processor import Processor, RowFormat
    from vlm_jax.data.word_tokenizer import train_tokenizer
    from vlm_jax.models import vlm
    from vlm_jax.models.sizes import VLMSize
    from vlm_jax.serving import model as serving

    tower, llm = sizes["tower"], sizes["llm"]
    depth, heads = tower["depth"], llm["heads"]
    c = base.get_config()
    c.vit.update(
        dict(
            {name: tower[name] for name in ("width", "depth", "heads", "mlp")},
            image_size=tower["image"],
            patch_size=tower["patch"],
            levels=tuple(sorted({max(1, depth * k // 12) for k in (6, 8, 10, 11)})),
        )
    )
    c.llm.update(
        dict(
            {name: llm[name] for name in ("width", "depth", "heads", "mlp", "vocab")},
            kv_heads=heads,
            head_size=llm["width"] // heads,
        )
    )
    patches = (tower["image"] // tower["patch"]) ** 2
    c.compressor.update(dict(tokens=patches) | compressor)
    c.pruning.update(pruning or {})
    c.data.update(dict(template="bare", text_length=2048))
    c.compute_dtype = "float32"
    tokenizer = train_tokenizer([QUESTION], 100)
    processor = Processor(tokenizer, replace(RowFormat.of(c), vocab=None))
    one = mesh.make(devices=jax.devices()[:1])
    with jax.set_mesh(one):
        model = vlm.create(VLMSize.of(c), seed=0)
    return generation.unending(serving.VLM(model, processor, max_length=2048, mesh=one))


def asked(model: Any, images: Iterator[Any], V: int | None, batch: int) -> Callable[[], float]:
    """A call that answers `batch` new requests and returns the seconds that it took."""

    def ask() -> float:
        requests = [model.request(next(images), QUESTION) for _ in range(batch)]
        then = time.perf_counter()
        found = model.answer(requests, max_new_tokens=NEW, visual_tokens=V, batch=batch)
        seconds = time.perf_counter() - then
        if any(len(answer.ids) != NEW for answer in found):
            raise ValueError(f"an answer has other than {NEW} tokens")
        return seconds

    return ask


def pictures(side: int) -> Iterator[Any]:
    """Random images, each of them new."""
    import numpy as np

    draw = np.random.default_rng(0)
    while True:
        yield draw.integers(0, 256, (side, side, 3)).astype(np.uint8)


def taking_turns(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side in each round, after one that compiles."""
    for ask in sides.values():
        ask()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, ask in sides.items():
            found[name].append(ask())
    return found


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    facts.use_threads(args.threads)
    from vlm_jax import heap

    heap.keep_freed_memory()
    sizes = QUICK if args.quick else SIZES
    images = pictures(sizes["tower"]["image"])
    results = facts.of_run(
        "seconds of a whole request by method", threads=args.threads, packages=("jax", "numpy")
    ) | dict(rounds=args.rounds, new_tokens=NEW, sizes=sizes, rows=[])
    print(f"{'method':12} {'V':>3} {'batch':>5} | {'s':>8} {'none, s':>8}  ratio", flush=True)
    plain = served(sizes, PLAIN)
    for method in args.methods:
        for V, model in models(sizes, method, args.tokens):
            asks = V if method in ANY else None
            for batch in args.batches:
                ask = functools.partial(asked, images=images, batch=batch)
                sides = {method: ask(model, V=asks), "none": ask(plain, V=None)}
                seconds = taking_turns(sides, args.rounds)
                row = dict(method=method, V=V, batch=batch, seconds=seconds)
                row["ratio"] = statistics.median(
                    one / other for one, other in zip(seconds[method], seconds["none"], strict=True)
                )
                results["rows"].append(row)
                median = {name: statistics.median(found) for name, found in seconds.items()}
                print(
                    f"{method:12} {V:3} {batch:5} | {median[method]:8.3f} "
                    f"{median['none']:8.3f}  {row['ratio']:.2f}",
                    flush=True,
                )
    print(facts.write(results, "whole-requests", args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
