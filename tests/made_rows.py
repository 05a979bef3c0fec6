# SPDX-License-Identifier: Apache-2.0
"""Rows of a run that never was: a planted law per family, noise, blind and pooling baselines."""

import math

import numpy as np

from vlm_jax.rows.records import Row, families_of

SIZES = (25_000, 80_000, 250_000)
TOKENS = (1, 4, 16, 36)
# Family -> A, alpha, beta, D: the one gains from N, the other from V.
LAWS = {"reasoning": (0.06, 0.18, 0.02, 0.1), "text": (0.45, 0.06, 0.3, 0.0)}
BLIND = {"reasoning": 0.48, "text": 0.1}
TASKS = {"count": "reasoning", "relation": "reasoning", "digits": "text", "words": "text"}
QUESTIONS = 1000
# What an ablation adds: (compressor, query, variant, what it changes in every score).
METHODS = (
    ("quecc", "separate", "", 0.04),
    ("quecc", "none", "", 0.0),
    ("quecc", "separate", "pool", 0.02),
)


def rows(
    *,
    sizes=SIZES,
    tokens=TOKENS,
    seeds=(0,),
    tasks=TASKS,
    laws=LAWS,
    noise=0.008,
    blind=True,
    methods=(),
    timing=False,
) -> list[Row]:
    """All cells, a blind cell per size and seed, and two pooling cells of the largest size.

    `methods`, such as METHODS, are run at the sizes and tokens of the grid except the smallest V.
    """
    rng = np.random.default_rng(0)
    made = []

    def add(parameters, V, seed, kind, query="none", variant="", gain=0.0):
        scores = {}
        for task, family in tasks.items():
            A, alpha, beta, D = laws[family]
            score = 1 - A * (parameters / 1e9) ** -alpha * V**-beta - D
            if kind == "blind":
                score = BLIND[family]
            if kind == "pool":
                score -= 0.1
            score += gain
            score = float(np.clip(score + noise * rng.normal(), 0.0, 1.0))
            spread = math.sqrt(score * (1 - score) / QUESTIONS)
            scores[task] = {
                "family": family, "metric": "exact", "score": score, "stderr": spread,
                "n": QUESTIONS,
            }  # fmt: skip
        asked = "" if query == "none" else query
        words = (str(parameters), f"V{V}", kind, variant, asked, f"s{seed}")
        made.append(Row(
            cell="-".join(word for word in words if word), llm=f"{parameters // 1000}k",
            llm_parameters=parameters, vit_parameters=120_000, compressor_parameters=30_000,
            compressor="token_packer" if kind == "blind" else kind, query=query, variant=variant,
            blind=kind == "blind", V=V, Q=14.25, G=2.5, seed=seed, tasks=scores,
            families=families_of(scores),
            flops={
                "encoder": 3.5e7, "compressor": 2e6 + 1e4 * V,
                "question": 2.0 * parameters * 9 * (query == "separate"),
                "prefill": 2.0 * parameters * (14.25 + V), "decode": 3.0 * parameters,
            },
            train={"steps": 2000, "examples": 256_000, "flops": 4e12, "seconds": 25.5},
            evaluate_seconds=3.5, protocol="synthetic", prompt="bare", parser="exact",
            data_hash="d" * 16, config_hash="c" * 16, commit="a" * 40,
            versions={"jax": "0.10.2", "python": "3.11.2"}, machine="x86_64, 2 cores",
            created="2026-01-02T03:04:05+00:00",
            timing={"batch": 64, "new_tokens": 4.0, "seconds_per_example": 1e-9 * parameters + 1e-5}
            if timing else {},
        ))  # fmt: skip

    for seed in seeds:
        for parameters in sizes:
            for V in tokens:
                add(parameters, V, seed, "token_packer")
            if blind:
                add(parameters, tokens[0], seed, "blind")
            for V in tokens[1:]:
                for kind, query, variant, gain in methods:
                    add(parameters, V, seed, kind, query, variant, gain)
        for V in tokens[-2:]:
            add(sizes[-1], V, seed, "pool")
    return made
