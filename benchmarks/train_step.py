# SPDX-License-Identifier: Apache-2.0
"""How long is a training step, next to the same architecture in PyTorch on the same cores?

    python benchmarks/train_step.py [--cells=NAME,...] [--threads=2] [--malloc=keep] [--out=FILE]

One process runs vlm_jax, PyTorch eager and PyTorch compiled in turn, some steps each, for many
rounds: forward, backward, clipping and AdamW in float32 on one batch of cached features. A loss is
read one step late, as the training loop does. Medians over rounds; the peer is the faster of the
two PyTorch forms.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import SupportsFloat

# benchmarks/ and configs/ are folders of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import facts  # noqa: E402


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument(
        "--cells", help="cells of the demo, comma-separated; default: middle LLM, V = 4"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--steps", type=int, default=15, help="of each side in a round")
    parser.add_argument(
        "--malloc",
        choices=("keep", "default"),
        default="keep",
        help=(
            "keep: all sides reuse freed memory, as every vlm-jax command does; default: none does"
        ),
    )
    parser.add_argument("--out", help="default: benchmarks/results/DATE-train-step.json")
    return parser.parse_args(argv)


def middle(config) -> str:
    """The demo's middle cell: the LLM of middle size, 4 visual tokens."""
    from vlm_jax.training.cells import by_size

    llms = by_size(config)
    return f"{llms[len(llms) // 2]}-v4-{config.compressor.kind}-s{config.grid.seeds[0]}"


def random_batch(config):
    """Arrays of a training batch's shapes and types: questions of 12 to 32 tokens, answers of 3."""
    import numpy as np

    draw = np.random.default_rng(0)
    batch, length = config.finetune.batch, config.data.text_length
    side = config.vit.image_size // config.vit.patch_size
    ends = draw.integers(12, length + 1, (batch, 1))
    place = np.arange(length)
    return dict(
        ids=draw.integers(0, config.llm.vocab, (batch, length), dtype=np.int32),
        loss_mask=(place < ends) & (place >= ends - 3),
        length=ends[:, 0].astype(np.int32),
        image_at=draw.integers(0, 2, batch, dtype=np.int32),
        levels=draw.normal(size=(batch, side**2, config.vit.width * len(config.vit.levels))).astype(
            np.float32
        ),
    )


def contestants(config) -> dict[str, Callable[[], SupportsFloat]]:
    """Name -> one optimizer step that returns its loss; all start from the same weights.

    A loss may still be on its way: float() waits for it.
    """
    import jax

    from benchmarks.peers import torch_vlm
    from vlm_jax import mesh
    from vlm_jax.models import vlm
    from vlm_jax.models.sizes import VLMSize
    from vlm_jax.training import objective, optimizer
    from vlm_jax.training.recipe import Stage

    batch = random_batch(config)
    model = vlm.create(VLMSize.of(config), seed=0)
    peers = [torch_vlm.load(config, model) for _ in range(2)]
    graph, state = optimizer.start(
        model, "finetune", optimizer.optimizer(Stage.of(config.finetune))
    )
    advance = optimizer.make_step(
        graph, optimizer.optimizer(Stage.of(config.finetune)), objective.next_token
    )
    on_device = jax.device_put(batch, mesh.sharding(jax.sharding.get_mesh(), "batch"))

    def ours() -> jax.Array:
        nonlocal state
        state, metrics = advance(state, on_device)
        return metrics.loss

    tensors = torch_vlm.tensors(batch)
    eager, compiled = (
        torch_vlm.Trainer(peer, config.finetune, compiled=compiled)
        for peer, compiled in zip(peers, (False, True), strict=True)
    )
    return {
        "vlm_jax": ours,
        "torch eager": lambda: eager(tensors),
        "torch compiled": lambda: compiled(tensors),
    }


def measure(config, *, rounds: int, steps: int) -> dict:
    """Milliseconds per step of each side, and how many times faster ours is than the best peer."""
    sides = contestants(config)
    # The first steps compile and warm up.
    losses = {name: [float(step()) for _ in range(5)] for name, step in sides.items()}
    spread = max(
        abs(a - b) for name in losses for a, b in zip(losses[name], losses["vlm_jax"], strict=True)
    )
    if spread > 1e-3:
        raise ValueError(f"the sides do not train the same model: {losses}")
    wall = {name: [] for name in sides}
    cpu = {name: [] for name in sides}
    for number in range(rounds):
        # The order turns, so that no side always runs behind the same neighbor.
        names = list(sides)[number % len(sides) :] + list(sides)[: number % len(sides)]
        for name in names:
            waiting = float(sides[name]())  # threads of the side before go to sleep meanwhile
            busy, then = time.process_time(), time.perf_counter()
            for _ in range(steps):
                waiting, _ = sides[name](), float(waiting)
            float(waiting)
            wall[name].append(1e3 * (time.perf_counter() - then) / steps)
            cpu[name].append(1e3 * (time.process_time() - busy) / steps)
    found = {
        name: dict(
            median_ms=statistics.median(times),
            fastest_ms=min(times),
            cpu_ms=statistics.median(cpu[name]),
            examples_per_s=1e3 * config.finetune.batch / statistics.median(times),
        )
        for name, times in wall.items()
    }
    peer = min((n for n in found if n != "vlm_jax"), key=lambda n: found[n]["median_ms"])
    patches = (config.vit.image_size // config.vit.patch_size) ** 2
    return dict(
        batch=config.finetune.batch,
        patches=patches,
        text=config.data.text_length,
        llm=config.llm.to_dict(),
        sides=found,
        peer=peer,
        speedup=found[peer]["median_ms"] / found["vlm_jax"]["median_ms"],
    )


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    facts.use_threads(args.threads)
    from vlm_jax import heap

    if args.malloc == "keep":
        heap.keep_freed_memory()
    import jax
    import torch

    from configs import demo
    from vlm_jax import mesh
    from vlm_jax.training.cells import cells_of

    torch.set_num_threads(args.threads)
    cells = {cell.name: cell.config for cell in cells_of(demo.get_config())}
    names = (args.cells or middle(demo.get_config())).split(",")
    if unknown := set(names) - cells.keys():
        print(f"train_step: no cell {sorted(unknown)}: choose of {sorted(cells)}", file=sys.stderr)
        return 2
    results = facts.of_run(
        "seconds of one training step, forward, backward, clipping and AdamW, float32",
        threads=args.threads,
        packages=("jax", "flax", "optax", "numpy", "torch"),
    ) | dict(
        malloc=args.malloc,
        rounds=args.rounds,
        steps_per_round=args.steps,
        cells={},
    )
    print(
        f"{'cell':28} {'side':15} {'median ms':>9} {'fastest':>8} {'cpu ms':>7} {'examples/s':>10}"
    )
    with jax.set_mesh(mesh.make(devices=jax.devices()[:1])):
        for name in names:
            found = measure(cells[name], rounds=args.rounds, steps=args.steps)
            results["cells"][name] = found
            for side, x in found["sides"].items():
                print(
                    f"{name:28} {side:15} {x['median_ms']:9.2f} {x['fastest_ms']:8.2f} "
                    f"{x['cpu_ms']:7.1f} {x['examples_per_s']:10.0f}"
                )
            print(
                f"{name:28} vlm_jax is {found['speedup']:.2f}x the faster peer ({found['peer']})",
                flush=True,
            )
    facts.write(results, "train-step", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
