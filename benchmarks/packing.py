# SPDX-License-Identifier: Apache-2.0
"""How much of what a training step computes is padding, on a mix of lengths like LLaVA-1.5's?

    python benchmarks/packing.py [--examples=66530] [--batch=128] [--out=FILE]

Rows padded to 2,048 text tokens, batches of like length (data.buckets) and packed rows
(data.row_length) of the same examples: the share of tokens and of images that is used, and FLOPs
for each example, at V = 1, 36 and 576 with Vicuna-7B. Nothing is trained: plans are made from
lengths, FLOPs are counted (vlm_jax.cost).

The mix is synthetic. How many examples of each kind LLaVA-1.5 665k has is published (arXiv
2310.03744, table 7; by image source in haotian-liu/LLaVA issue 657: coco 364,100, vg 86,417, gqa
72,140, ocr_vqa 80,000, textvqa 21,953, text alone 40,688). Their lengths are an assumption: each
kind log-normal around a median in tokens of Vicuna's template (its system prompt is 35), so that
their mean is about the 250 tokens on which LLaVA's 10 hours on 8 A100 are 24 % of peak.
"""

import argparse
import sys
import time
from pathlib import Path

# benchmarks/ and configs/ are folders of files, not installed
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np  # noqa: E402

from benchmarks import facts  # noqa: E402
from configs import finetune  # noqa: E402
from vlm_jax.cost import flops as cost  # noqa: E402
from vlm_jax.data.packing import Buckets, Group, Lengths, Packing  # noqa: E402
from vlm_jax.models.sizes import VLMSize  # noqa: E402

# Kind: examples in the mix, whether with an image, median tokens of text, sigma of their logarithm.
MIX = {
    "llava instruct": (158_000, True, 300, 0.5),
    "short answers on coco": (158_000, True, 120, 0.5),
    "regions on coco": (48_100, True, 200, 0.4),
    "regions of visual genome": (86_417, True, 250, 0.4),
    "gqa": (72_140, True, 180, 0.5),
    "ocr_vqa": (80_000, True, 160, 0.3),
    "textcaps": (21_953, True, 110, 0.3),
    "conversations without an image": (40_688, False, 900, 0.9),
}
TEXT, BUCKETS = 2048, (128, 256, 512, 1024)
# V -> tokens and images of a packed row. Of fewer images rows stay short, of more they stay empty.
PACKED = {1: (2048, 10), 36: (2048, 8), 576: (3072, 4)}


def lengths(examples: int, most: int) -> Lengths:
    """Examples of the mix in its proportions, texts cut after `most` tokens."""
    draw, total = np.random.default_rng(0), sum(count for count, *_ in MIX.values())
    text, images = [], []
    for count, shown, median, sigma in MIX.values():
        n = round(examples * count / total)
        text.append(median * np.exp(sigma * draw.normal(size=n)))
        images.append(np.full(n, int(shown)))
    whole = np.clip(np.concatenate(text).round(), 40, most).astype(np.int32)
    shown = np.concatenate(images).astype(np.int32)
    return Lengths(whole, shown, whole, np.ones(len(whole), bool))


def row_flops(model: VLMSize, *, tokens: int, text: int, images: int) -> float:
    """FLOPs of a row of the second stage: forward and backward, nothing recomputed."""
    return float(
        cost.train_step_flops(
            False,
            model.compressor,
            model.llm,
            vit=model.vit,
            tokens=tokens,
            logits=text,
            stage="finetune",
            images=images,
        )
    )


def used(groups: list[Group], of: Lengths, V: int, model: VLMSize) -> dict[str, float]:
    """What these batches use and cost."""
    tokens = computed = shown = slots = flops = examples = 0
    for group in groups:
        index = np.concatenate(group.rows)
        tokens += int(of.text[index].sum() + V * of.images[index].sum())
        length = group.text if group.packed else group.text + V * group.images
        computed += len(group.rows) * length
        shown += int(of.images[index].sum())
        slots += len(group.rows) * group.images
        row = row_flops(model, tokens=length, text=group.text, images=group.images)
        flops += len(group.rows) * row
        examples += len(index)
    return dict(
        tokens_used=tokens / computed,
        images_used=shown / slots,
        shapes=len({(group.text, group.images) for group in groups}),
        tflops_per_example=flops / examples / 1e12,
        useful_tflops_per_example=useful(of, V, model),
    )


def useful(of: Lengths, V: int, model: VLMSize) -> float:
    """TFLOP of an example of the mix without any padding."""
    need, count = np.unique(of.text + 10_000 * of.images, return_counts=True)
    total = sum(
        n * row_flops(model, tokens=int(x % 10_000 + V * (x // 10_000)), text=int(x % 10_000),
                      images=int(x // 10_000))
        for x, n in zip(need, count, strict=True)
    )  # fmt: skip
    return total / len(of.text) / 1e12


def measure(V: int, *, examples: int, batch: int) -> dict[str, dict]:
    """The three ways at V visual tokens."""
    config = finetune.get_config()
    kind = "none" if V == 576 else "token_packer"
    config.compressor.update(dict(kind=kind, tokens=V))
    model = VLMSize.of(config)
    row, images = PACKED[V]
    whole, cut = lengths(examples, TEXT), lengths(examples, min(row - V, TEXT))
    rows = np.arange(len(whole.text) // batch * batch).reshape(-1, batch, 1)
    padded = [Group(group, TEXT, 1, False) for group in rows]
    bucketed = Buckets(whole, batch=batch, seed=0, buckets=(*BUCKETS, TEXT), images=1)
    packed = Packing(cut, batch=batch, seed=0, tokens=row, images=images, visual=V)
    then = time.perf_counter()
    planned = packed.rows
    seconds = time.perf_counter() - then
    found = dict(
        padded=used(padded, whole, V, model),
        bucketed=used(bucketed.units(0), whole, V, model),
        packed=used([packed.batch(k) for k in range(planned // batch)], cut, V, model),
    )
    found["packed"] |= dict(row_length=row, row_images=images, planning_seconds=seconds,
                            examples_per_row=len(cut.text) / planned)  # fmt: skip
    found["row_of_250_tokens"] = dict(
        tflops=row_flops(model, tokens=250 + V, text=250, images=1) / 1e12
    )
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=66530, help="a tenth of the mix by default")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--out", help="default: benchmarks/results/DATE-packing.json")
    args = parser.parse_args(argv)
    of = lengths(args.examples, TEXT)
    found = {V: measure(V, examples=args.examples, batch=args.batch) for V in PACKED}
    print(f"{len(of.text):,} examples, {of.text.mean():.0f} text tokens on average, "
          f"median {np.median(of.text):.0f}")  # fmt: skip
    print(f"{'V':>4} {'rows':10}{'tokens used':>12}{'images used':>12}{'shapes':>8}"
          f"{'TFLOP an example':>18}{'of useful':>11}")  # fmt: skip
    for V, ways in found.items():
        for name in ("padded", "bucketed", "packed"):
            way = ways[name]
            share = way["useful_tflops_per_example"] / way["tflops_per_example"]
            print(
                f"{V:4} {name:10}{way['tokens_used']:12.1%}{way['images_used']:12.1%}"
                f"{way['shapes']:8}{way['tflops_per_example']:18.1f}{share:11.1%}"
            )
    for name in ("padded", "bucketed", "packed"):
        ratio = found[576][name]["tflops_per_example"] / found[1][name]["tflops_per_example"]
        print(f"V = 576 costs {ratio:.2f} times V = 1 in {name} rows")
    results = facts.of_run(__doc__.split("\n")[0], threads=1, packages=("numpy",)) | dict(
        examples=len(of.text),
        mean_text_tokens=float(of.text.mean()),
        mix={name: list(kind) for name, kind in MIX.items()},
        batch=args.batch,
        by_visual_tokens=found,
    )
    facts.write(results, "packing", args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
