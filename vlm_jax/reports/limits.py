# SPDX-License-Identifier: Apache-2.0
"""What the cells of a run leave open for every family of tasks."""

from collections import Counter
from collections.abc import Sequence

from vlm_jax.reports.amounts import parameters_text

# The smallest size of the published grid (arXiv 2411.03312), in parameters.
PUBLISHED_SMALLEST = 0.5e9


def of_cells(main: Sequence) -> list[str]:
    """Sentences on sizes, seeds, encoder, training, compressor and cost."""
    sizes = sorted({row.llm_parameters for row in main})
    sentences = []
    if sizes[-1] < PUBLISHED_SMALLEST:
        sentences.append(
            f"That these exponents hold at usual sizes: the largest LLM here has "
            f"{parameters_text(sizes[-1] / 1e9)} parameters, {PUBLISHED_SMALLEST / sizes[-1]:,.0f} "
            "times fewer than the smallest of the published grid (0.5B)."
        )
    if len(sizes) == 1:
        sentences.append("Anything about N: there is one LLM size.")
    elif len(sizes) < 4:
        sentences.append(f"How well a power law in N holds: {len(sizes)} sizes hardly test it.")
    if len(seeds := {row.seed for row in main}) == 1:
        sentences.append(
            f"How much another training run would differ: there is one seed ({next(iter(seeds))}), "
            "and standard errors count the test questions only."
        )
    encoders = Counter(row.train.get("encoder") for row in main)
    if len(encoders) > 1 and None not in encoders:
        counts = " and ".join(f"{count}" for count in encoders.values())
        sentences.append(
            f"That all cells read the same features: {counts} rows have encoders of different "
            "weights, as where a run went on on another machine. These cells differ by that too."
        )
    if len(steps := {row.train.get("steps") for row in main}) == 1 and None not in steps:
        sentences.append(
            f"What longer training gives: every cell was trained for {next(iter(steps)):,} steps, "
            "whatever its size."
        )
    sentences.append(f"Other methods: the law is of {main[0].method} and of these tasks.")
    total = [max(sum(row.flops.values()), 1) for row in main]
    share = [100 * row.flops.get("prefill", 0) / t for row, t in zip(main, total, strict=True)]
    sentences.append(
        f"The whole cost: 2N(Q+V) stands for the prefill, {min(share):.0f} to {max(share):.0f} % "
        "of the FLOPs of a request of these cells. The figures with every phase show what that "
        "changes."
    )
    return sentences
