# SPDX-License-Identifier: Apache-2.0
"""How long does it take to choose which patches an LLM sees, next to the published way?

    python benchmarks/selection.py [--methods=NAME,...] [--tokens=V,...] [--threads=2] [--quick]
        [--out=FILE]

Each method chooses V of 576 patches of eight images in float32, from arrays that are there already:
encoder, projector and CLIP's text tower are no part of it. Ours is one program for the batch; the
peer is PyTorch, image by image and patch by patch, as the releases do it. Both are called in turn
for several rounds; medians. Both must choose the same at toy sizes; at full ones numbers of patches
are so close that rounding decides some, and the result has the share of images with equal choices.
"""

import argparse
import functools
import sys
from pathlib import Path

# benchmarks/ and configs/ are folders of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import facts  # noqa: E402
from benchmarks.compressors import interleaved  # noqa: E402

METHODS = ("cdpruner", "divprune", "mmtok", "visionzip", "vispruner")
# How many times faster each is expected to be.
EXPECTED = 5.0
SIZES = dict(patches=576, width=1024, llm_width=4096, clip_width=768, words=10, batch=8)
QUICK = dict(patches=36, width=32, llm_width=64, clip_width=24, words=3, batch=2)


def arguments(argv: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--methods", type=names, default=list(METHODS), help=",".join(METHODS))
    parser.add_argument("--tokens", type=numbers, default=[16, 64])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run at all?")
    parser.add_argument("--out", help="default: benchmarks/results/DATE-selection.json")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.methods) - set(METHODS)):
        parser.error(f"no method {unknown}: choose of {METHODS}")
    return args


class Contest:
    """One method at one V: the same choice on both sides, and what both read."""

    def __init__(self, method: str, tokens: int, sizes: dict):
        import jax
        import jax.numpy as jnp
        import numpy as np
        import torch

        import vlm_jax.compressors.cdpruner.module as cdpruner
        import vlm_jax.compressors.divprune.module as divprune
        import vlm_jax.compressors.mmtok.module as mmtok
        import vlm_jax.compressors.visionzip.module as visionzip
        import vlm_jax.compressors.vispruner.module as vispruner
        from benchmarks.peers import torch_selection
        from vlm_jax.compressors.visionzip import VisionZipMethod

        draw, P, width = np.random.default_rng(0), sizes["patches"], sizes["width"]

        def drawn(*shape: int) -> np.ndarray:
            return draw.normal(size=(sizes["batch"], *shape)).astype(np.float32)

        projected, features = drawn(P, sizes["llm_width"]), drawn(P, width)
        images, text = drawn(P, sizes["clip_width"]), drawn(1, sizes["clip_width"])
        words, attention = drawn(sizes["words"], sizes["llm_width"]), np.exp(drawn(P))
        whole, keys = drawn(P + 1, width), drawn(P + 1, 64)

        def of_question(projected, features, words):
            real, free = jnp.ones(len(words), bool), jnp.zeros(P, bool)
            return mmtok.select(projected, features, words, real, free, count=tokens)

        def of_text(projected, images, text):
            return cdpruner.select(projected, cdpruner.relevance(images, text), count=tokens)

        split = dict(zip(("dominant", "contextual"), VisionZipMethod.split(tokens), strict=True))
        ours, given, count = {
            "cdpruner": (of_text, (projected, images, text), dict(count=tokens)),
            "divprune": (
                functools.partial(divprune.select, count=tokens), (projected,), dict(count=tokens),
            ),
            "mmtok": (of_question, (projected, features, words), dict(count=tokens)),
            "visionzip": (
                lambda *x: visionzip.zipped(*x, **split)[0], (whole, keys, attention), split,
            ),
            "vispruner": (
                functools.partial(vispruner.select, count=tokens, ratio=0.5),
                (features, attention),
                dict(count=tokens),
            ),
        }[method]  # fmt: skip

        def call(*given):
            found = jax.vmap(ours)(*given)
            return found if method == "visionzip" else jnp.sort(found, axis=1)

        self.given = [jax.device_put(x) for x in given]
        self.program = jax.jit(call).lower(*self.given).compile()
        self.peer = functools.partial(getattr(torch_selection, method), **count)
        self.theirs = [torch.tensor(x) for x in given]

    def run_ours(self):
        return self.program(*self.given).block_until_ready()

    def run_theirs(self):
        return [self.peer(*image) for image in zip(*self.theirs, strict=True)]

    def alike(self) -> float:
        """The share of images for which both sides give the same."""
        import numpy as np

        theirs = np.stack([x.numpy() for x in self.run_theirs()])
        apart = np.abs(np.asarray(self.run_ours()) - theirs)
        return float((apart.reshape(len(apart), -1).max(1) < 1e-4).mean())


def measure(method: str, tokens: int, *, sizes: dict, rounds: int) -> dict:
    """One row: times of both sides for the whole batch, and their ratio."""
    if Contest(method, min(tokens, QUICK["patches"] // 2), QUICK).alike() < 1:
        raise ValueError(f"{method} V={tokens}: the sides choose otherwise: nothing is timed")
    contest = Contest(method, tokens, sizes)
    sides = interleaved({"vlm_jax": contest.run_ours, "torch": contest.run_theirs}, rounds)
    return dict(
        method=method,
        V=tokens,
        images_alike=contest.alike(),
        sides=sides,
        speedup=sides["torch"]["median_ms"] / sides["vlm_jax"]["median_ms"],
        cpu_ratio=sides["torch"]["cpu_ms"] / sides["vlm_jax"]["cpu_ms"],
        expected=EXPECTED,
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    facts.use_threads(args.threads)
    from vlm_jax import heap

    heap.keep_freed_memory()
    import torch

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    sizes = QUICK if args.quick else SIZES
    results = facts.of_run(
        "milliseconds to choose V patches of each image of a batch, float32",
        threads=args.threads,
        packages=("jax", "numpy", "torch"),
    ) | dict(rounds=args.rounds, sizes=sizes, rows=[])
    print(f"{'method':10} {'V':>3} | {'torch ms':>9} {'ours ms':>8} {'ratio':>6}  of CPU time")
    for method in args.methods:
        for V in args.tokens:
            row = measure(method, V, sizes=sizes, rounds=args.rounds)
            results["rows"].append(row)
            sides = row["sides"]
            print(
                f"{method:10} {V:3} | {sides['torch']['median_ms']:9.2f} "
                f"{sides['vlm_jax']['median_ms']:8.2f} {row['speedup']:5.2f}x "
                f"{row['cpu_ratio']:5.2f}x",
                flush=True,
            )
    facts.write(results, "selection", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
