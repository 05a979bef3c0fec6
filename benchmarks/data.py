# SPDX-License-Identifier: Apache-2.0
"""How many images a second do data pipelines decode, pad, resize and normalize into batches?

    python benchmarks/data.py --photos=DIR [--workers 0 2] [--batch=32] [--rounds=4] [--out=FILE]

2,000 JPEGs of 640 x 480 (92 kB), one LLaVA row each, as LLaVA-1.5 prepares them: padded to a square
with the mean color, resized to 336 by PIL (bicubic), normalized in float32. The peer is PyTorch's
DataLoader with the same PIL calls in its Dataset, the ids from the same table, and its own default
collation. Batches of both must agree, or nothing is timed.

The sides take turns. A round starts a side's processes anew, waits for four batches, and times the
following ones; both sides are endless, so that what is read ahead costs both.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

# benchmarks/ and configs/ are folders of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks import facts, made_photos  # noqa: E402
from configs import base  # noqa: E402
from vlm_jax.data.images import CLIP_MEAN, CLIP_STD  # noqa: E402
from vlm_jax.data.llava import Llava  # noqa: E402
from vlm_jax.data.loader import Batches  # noqa: E402
from vlm_jax.data.processor import Processor, RowFormat  # noqa: E402
from vlm_jax.data.texts import Texts  # noqa: E402
from vlm_jax.data.word_tokenizer import train_tokenizer  # noqa: E402

SIDE, WARM = 336, 4  # pixels; batches before the clock runs
COLOR = tuple(int(255 * x) for x in CLIP_MEAN)


class Peer:
    """A map-style Dataset for PyTorch, whose length is that of many epochs in a shuffled order."""

    def __init__(self, paths: list[str], table: dict[str, np.ndarray], order: np.ndarray):
        self.paths, self.table, self.order = paths, table, order
        self.mean = np.array(CLIP_MEAN, np.float32)
        self.std = np.array(CLIP_STD, np.float32)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> dict[str, np.ndarray]:
        index = int(self.order[place])
        picture = Image.open(self.paths[index]).convert("RGB")
        side = max(picture.size)
        square = Image.new("RGB", (side, side), COLOR)
        left, top = ((side - x) // 2 for x in picture.size)
        square.paste(picture, (left, top))
        square = square.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        pixels = np.asarray(square).astype(np.float32) * np.float32(1 / 255)
        text = {name: column[index] for name, column in self.table.items()}
        return {**text, "pixels": (pixels - self.mean) / self.std, "index": index}


def rows_of(folder: Path, photos: list[Path]) -> Path:
    """A LLaVA file with a row for each photo."""
    rows = []
    for number, path in enumerate(photos):
        said = [
            ("human", "<image>\nwhat is in the picture?"),
            ("gpt", f"clouds number {number % 9}"),
        ]
        turns = [{"from": who, "value": text} for who, text in said]
        rows.append({"id": f"{number}", "image": path.name, "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def rate(begin: Callable[[], Iterator], end: Callable[[Iterator], None], timed: int,
         batch: int) -> float:  # fmt: skip
    """Images a second over `timed` batches after the first WARM ones."""
    batches = begin()
    for _ in range(WARM):
        next(batches)
    then = time.perf_counter()
    for _ in range(timed):
        next(batches)
    took = time.perf_counter() - then
    end(batches)
    return timed * batch / took


def main(argv: list[str] | None = None) -> int:
    import torch
    from torch.utils.data import DataLoader

    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--photos", required=True, help="where photos are made, or were before")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--out", help="default: benchmarks/results/DATE-data.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    photos = made_photos.make(Path(args.photos), args.images)[: args.images]
    timed = max(args.images // args.batch // args.rounds, 1)
    config = base.get_config()
    found = {}
    with tempfile.TemporaryDirectory() as place:
        source = Llava(str(rows_of(Path(place), photos)), "train", images=args.photos)
    words = [text for k in range(len(source)) for turn in source[k].turns for text in turn]
    processor = Processor(train_tokenizer(words, config.llm.vocab), RowFormat.of(config))
    texts = Texts(source, processor, answer=True, skip=False)
    ours = Batches(source, processor, batch=args.batch, seed=0, texts=texts)
    first = ours.at(0)
    order = np.concatenate([ours.at(k)["index"] for k in range(1)])
    peer = Peer([str(path) for path in photos], texts.table, order)
    theirs = next(iter(DataLoader(peer, batch_size=args.batch)))
    for name in ("ids", "pixels"):
        apart = np.abs(first[name] - theirs[name].numpy()).max()
        if apart > 1e-5:
            raise RuntimeError(f"{name} of the two sides differ by {apart}")
    rng = np.random.default_rng(0)
    many = np.concatenate([rng.permutation(len(photos)) for _ in range(20)])
    endless = Peer(peer.paths, texts.table, many)
    for workers in args.workers:
        sides: dict[str, list[float]] = {"vlm_jax": [], "pytorch": []}

        def begin_ours(workers: int = workers) -> Iterator:
            return iter(Batches(source, processor, batch=args.batch, seed=0, texts=texts,
                                workers=workers))  # fmt: skip

        def begin_theirs(workers: int = workers) -> Iterator:
            return iter(DataLoader(endless, batch_size=args.batch, num_workers=workers))

        for turn in range(args.rounds):
            pair = [
                ("vlm_jax", begin_ours, lambda batches: batches.close()),
                ("pytorch", begin_theirs, lambda batches: None),
            ]
            for name, begin, end in pair[:: 1 if turn % 2 else -1]:
                sides[name].append(rate(begin, end, timed, args.batch))
        medians = {name: float(np.median(rates)) for name, rates in sides.items()}
        ratios = [a / b for a, b in zip(sides["vlm_jax"], sides["pytorch"], strict=True)]
        found[workers] = dict(
            images_per_second=sides, medians=medians, ratio=float(np.median(ratios)), ratios=ratios
        )
        print(
            f"{workers} workers: vlm_jax {medians['vlm_jax']:.0f} images/s, PyTorch "
            f"{medians['pytorch']:.0f}, ratio {np.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f} in {args.rounds} rounds)"
        )
    results = facts.of_run(
        __doc__.split("\n")[0], threads=1, packages=("grain", "torch", "pillow", "numpy")
    ) | dict(
        images=len(photos),
        mean_bytes=sum(path.stat().st_size for path in photos) / len(photos),
        batch=args.batch,
        timed_batches_of_a_round=timed,
        by_workers=found,
    )
    facts.write(results, "data", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
