# SPDX-License-Identifier: Apache-2.0
"""What does each visual-token compressor cost, counted and timed, next to the published way?

    python benchmarks/compressors.py [--methods=NAME,...] [--tokens=V,...] [--threads=2] [--quick]
        [--out=FILE]

Each method makes V visual tokens from the 24 x 24 patches of four images, width 1024 into 4096,
float32, forward only, from the same weights: ours compiled by XLA in the form that inference runs,
and a PyTorch module that computes what the published code computes. Both are called in turn for
several rounds; medians. FLOPs: as derived from the sizes, as XLA counts our program, as PyTorch
counts the products of the peer.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

# benchmarks/ and configs/ are folders of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import facts  # noqa: E402

# How many times faster than the peer each is expected to be, and at which V; none where both do
# the same work. PruMerge is the same MLP on both sides, which is most of the time from some tokens
# on: the merging is timed by itself too.
EXPECTED = {
    "none": (None, None),
    "pool": (None, None),
    "quecc": (1.2, None),
    "token_packer": (1.2, None),
    "m3": (3.0, 1),
    "mqt": (10.0, 1),
    "prumerge": (20.0, None),
    "prumerge/merging": (20.0, None),
}
SIZES = dict(side=24, width=1024, levels=4, llm_width=4096, batch=4)
QUICK = dict(side=12, width=64, levels=4, llm_width=128, batch=2)
SAMPLE_MS = 60  # calls of a round are repeated until they take this long


def arguments(argv: list[str] | None) -> argparse.Namespace:
    def names(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(x) for x in text.split(",")]

    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--methods", type=names, default=list(EXPECTED), help=",".join(EXPECTED))
    parser.add_argument("--tokens", type=numbers, default=[1, 4, 16, 36, 144])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="toy sizes: does it run at all?")
    parser.add_argument("--out", help="default: benchmarks/results/DATE-compressors.json")
    args = parser.parse_args(argv)
    if unknown := sorted(set(args.methods) - EXPECTED.keys()):
        parser.error(f"no method {unknown}: choose of {sorted(EXPECTED)}")
    return args


class Contest:
    """One method at one V: the same function and weights on both sides, and their inputs."""

    def __init__(self, method: str, tokens: int, sizes: dict):
        import jax
        import numpy as np
        import torch
        from flax import nnx

        from benchmarks.peers import torch_compressors
        from vlm_jax import compressors, mesh
        from vlm_jax.compressors.matryoshka import Matryoshka
        from vlm_jax.compressors.method import Interface
        from vlm_jax.compressors.window import window_order
        from vlm_jax.cpu import RUN_ONCE
        from vlm_jax.models.vit import class_attention

        method, _, part = method.partition("/")
        batch = sizes["batch"]
        # MQT has 16 heads, the windowed ones 8; QueCC is the one that reads the question.
        self.heads, self.query = 16 if method == "mqt" else 8, "separate"
        sizes = {k: v for k, v in sizes.items() if k != "batch"}
        interface = Interface(**sizes)
        sizes |= dict(tokens=tokens, heads=self.heads, query=self.query)
        self.described, self.interface = compressors.describe(dict(kind=method) | sizes), interface
        described = self.described
        module = jax.jit(
            lambda: described.build(interface, rngs=nnx.Rngs(0)),
            compiler_options=mesh.known(RUN_ONCE),
        )()
        peer = torch_compressors.load(module, sizes)
        self.peer = peer.merged if part == "merging" else peer
        if isinstance(module, Matryoshka):
            module = module.fold()
        patches, width = sizes["side"] ** 2, sizes["width"]
        draw = np.random.default_rng(0)

        def drawn(*shape: int) -> np.ndarray:
            return draw.normal(size=(batch, *shape)).astype(np.float32)

        if module.reads:
            given = [drawn(patches, width), drawn(patches + 1, width), drawn(patches + 1, width)]
            ours = given

            def call(module, features, queries, keys):
                attention = class_attention(queries[:, 0], keys)
                tokens = module.compress(features, keys[:, 1:], attention).tokens
                return tokens if part == "merging" else module.projector(tokens)

        else:
            given = [drawn(patches, sizes["levels"] * width), drawn(sizes["llm_width"])]
            # The encoder gives window order for nothing; the published code regroups.
            order = window_order(sizes["side"], module.window)
            ours = [np.ascontiguousarray(given[0][:, order]), given[1]]

            def call(module, levels, question):
                return module(levels, question)

        self.module, self.ours = module, [jax.device_put(x) for x in ours]
        self.program = jax.jit(call).lower(module, *self.ours).compile()
        self.theirs = [torch.tensor(x) for x in given]

    def run_ours(self):
        return self.program(self.module, *self.ours).block_until_ready()

    def run_theirs(self):
        return self.peer(*self.theirs)

    def difference(self) -> float:
        """The largest difference between both sides' results."""
        import numpy as np

        return float(np.abs(np.asarray(self.run_ours()) - self.run_theirs().numpy()).max())

    def counted(self) -> tuple[float, float]:
        """GFLOP for all images, ours by XLA and the peer's products by PyTorch."""
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            self.run_theirs()
        ours = self.program.cost_analysis()["flops"]
        return ours / 1e9, counter.get_total_flops() / 1e9


def derived(contest: Contest, part: str) -> dict[str, float]:
    """GFLOP of one image from the sizes alone, as published and as inference runs it here."""
    from vlm_jax.compressors.method import FORMS

    found = {}
    for form in FORMS:
        products = contest.described.products(contest.interface, form)
        found[form] = (products.fixed if part == "merging" else products.forward(math.inf)) / 1e9
    return found


def interleaved(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict]:
    """Milliseconds per call of each side; they take turns, and the order turns too."""
    calls = {}
    for name, call in sides.items():
        call()
        then = time.perf_counter()
        call()
        calls[name] = max(1, math.ceil(SAMPLE_MS / (1e3 * (time.perf_counter() - then))))
    wall = {name: [] for name in sides}
    cpu = {name: [] for name in sides}
    for number in range(rounds):
        names = list(sides) if number % 2 else list(sides)[::-1]
        for name in names:
            sides[name]()  # threads of the side before go to sleep meanwhile
            busy, then = time.process_time(), time.perf_counter()
            for _ in range(calls[name]):
                sides[name]()
            wall[name].append(1e3 * (time.perf_counter() - then) / calls[name])
            cpu[name].append(1e3 * (time.process_time() - busy) / calls[name])
    return {
        name: dict(
            median_ms=statistics.median(wall[name]),
            fastest_ms=min(wall[name]),
            cpu_ms=statistics.median(cpu[name]),
        )
        for name in sides
    }


def measure(method: str, tokens: int, *, sizes: dict, rounds: int) -> dict:
    """One row: FLOPs of one image by three counts, times of both sides and their ratio."""
    contest = Contest(method, tokens, sizes)
    difference = contest.difference()
    if not difference < 1e-3:
        raise ValueError(f"{method} V={tokens}: the sides differ by {difference}: nothing is timed")
    by_xla, by_torch = (x / sizes["batch"] for x in contest.counted())
    sides = interleaved({"vlm_jax": contest.run_ours, "torch": contest.run_theirs}, rounds)
    speedup = sides["torch"]["median_ms"] / sides["vlm_jax"]["median_ms"]
    expected, only = EXPECTED[method]
    return dict(
        method=method,
        V=tokens,
        gflop=derived(contest, method.partition("/")[2]) | dict(by_xla=by_xla, by_torch=by_torch),
        difference=difference,
        sides=sides,
        speedup=speedup,
        expected=expected if only in (None, tokens) else None,
    )


def supported(method: str, tokens: list[int], side: int) -> list[int]:
    """Of the wanted numbers of tokens those that a method gives; all it has without a choice."""
    from vlm_jax import compressors

    if method == "none":
        return [side**2]
    module = compressors.COMPRESSORS[method.partition("/")[0]]
    return [V for V in tokens if V in module.supported(side)]


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    facts.use_threads(args.threads)
    from vlm_jax import heap

    heap.keep_freed_memory()
    import jax
    import torch

    from vlm_jax import mesh

    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    sizes = QUICK if args.quick else SIZES
    results = facts.of_run(
        "milliseconds of a forward pass of each compressor, float32, and its FLOPs",
        threads=args.threads,
        packages=("jax", "flax", "numpy", "torch"),
    ) | dict(
        rounds=args.rounds,
        sizes=sizes,
        rows=[],
    )
    print("GFLOP of one image: derived from the sizes, and counted by torch (peer) and XLA (ours)")
    print(
        f"{'method':16} {'V':>3} | {'published':>9} {'by torch':>8} | {'here':>8} {'by XLA':>8} | "
        f"{'torch ms':>9} {'ours ms':>8} {'ratio':>6}  expected"
    )
    with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        for method in args.methods:
            for V in supported(method, args.tokens, sizes["side"]):
                row = measure(method, V, sizes=sizes, rounds=args.rounds)
                results["rows"].append(row)
                gflop, sides = row["gflop"], row["sides"]
                goal = f"{row['expected']:g}x" if row["expected"] else ""
                print(
                    f"{method:16} {V:3} | {gflop['published']:9.3f} {gflop['by_torch']:8.3f} | "
                    f"{gflop['folded']:8.3f} {gflop['by_xla']:8.3f} | "
                    f"{sides['torch']['median_ms']:9.2f} {sides['vlm_jax']['median_ms']:8.2f} "
                    f"{row['speedup']:5.2f}x  {goal}",
                    flush=True,
                )
    facts.write(results, "compressors", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
